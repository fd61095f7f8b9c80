/*
The sanitizers' view of fibers and of the GPU's memories. In a plain build every function here is empty.

    address   each fiber has its own stack; device memory and the gaps between shared arrays are poisoned
    thread    each CUDA thread is a separate thread, and only operations that order memory on a GPU order it
              here: release() and acquire() at barriers, never the switch from one fiber to the next. So the
              sanitizer reports a missing barrier, with file and line, even if the result is right

The emulator's own functions are marked SIMT_INTERNAL: they are not instrumented, because their accesses do
not belong to the kernel.
*/
#ifndef DEV_SIMT_SANITIZERS_H
#define DEV_SIMT_SANITIZERS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// A failed allocation returns null instead of ending the program.
extern "C" __attribute__((weak, used)) const char* __asan_default_options() {
    return "allocator_may_return_null=1";
}
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_THREAD
#include <sanitizer/tsan_interface.h>
// The interface for managed languages. Only this interface can tell the sanitizer that memory is new and that
// it must forget earlier accesses to it.
extern "C" void __tsan_java_init(uintptr_t heap_begin, uintptr_t heap_size);
extern "C" void __tsan_java_alloc(uintptr_t pointer, uintptr_t size);
// By default the sanitizer waits a second at exit for threads that might still race; here there are none. A
// failed allocation returns null instead of ending the program.
extern "C" __attribute__((weak, used)) const char* __tsan_default_options() {
    return "atexit_sleep_ms=0:allocator_may_return_null=1";
}
#endif

#if defined(SIMT_ADDRESS) || defined(SIMT_THREAD)
#define SIMT_INTERNAL __attribute__((no_sanitize("address", "thread", "undefined")))
#else
#define SIMT_INTERNAL
#endif

namespace simt {

inline void poison(const void* memory, size_t bytes) {
#ifdef SIMT_ADDRESS
    __asan_poison_memory_region(memory, bytes);
#endif
    (void)memory, (void)bytes;
}

inline void unpoison(const void* memory, size_t bytes) {
#ifdef SIMT_ADDRESS
    __asan_unpoison_memory_region(memory, bytes);
#endif
    (void)memory, (void)bytes;
}

// Accesses of a thread before release(object) are ordered before accesses of a thread after acquire(object).
SIMT_INTERNAL inline void release(char* object) {
#ifdef SIMT_THREAD
    __tsan_release(object);
#endif
    (void)object;
}

SIMT_INTERNAL inline void acquire(char* object) {
#ifdef SIMT_THREAD
    __tsan_acquire(object);
#endif
    (void)object;
}

// Forgets earlier blocks' accesses to this memory: they do not race with the next block's accesses, because a
// GPU gives each block its own memory. Every call must pass the same memory.
inline void forget_accesses(void* memory, size_t bytes) {
#ifdef SIMT_THREAD
    static bool initialised = false;
    if (!initialised) __tsan_java_init((uintptr_t)memory, bytes);
    initialised = true;
    __tsan_java_alloc((uintptr_t)memory, bytes);
#endif
    (void)memory, (void)bytes;
}

} // namespace simt

#endif
