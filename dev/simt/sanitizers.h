/*
The sanitizers' view of fibers and of the GPU's memories. In a plain build every function here is empty.

    address   each fiber has its own stack; device memory and the gaps between shared arrays are poisoned
    thread    each CUDA thread is a thread of its own, and only what orders memory on a GPU orders it: release() and
              acquire() at barriers, never the switch from one fiber to the next. So a missing barrier is reported with
              file and line even where the result is right

The emulator's own functions are marked SIMT_INTERNAL: not instrumented, for what they touch is no part of the kernel.
*/
#ifndef DEV_SIMT_SANITIZERS_H
#define DEV_SIMT_SANITIZERS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// Memory that cannot be had is an answer.
extern "C" __attribute__((weak, used)) const char* __asan_default_options() {
    return "allocator_may_return_null=1";
}
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_THREAD
#include <sanitizer/tsan_interface.h>
// The interface for managed languages: the one way to say that memory is fresh, and earlier accesses to it forgotten.
extern "C" void __tsan_java_init(uintptr_t heap_begin, uintptr_t heap_size);
extern "C" void __tsan_java_alloc(uintptr_t pointer, uintptr_t size);
// It waits a second at exit for threads that might still race; there are none. Memory that cannot be had is an answer.
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

// All that a thread did before release(object) is ordered before what a thread does after acquire(object).
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

// Accesses to this memory by earlier blocks are no races with those to come: it is another block's memory now. Always the
// same memory.
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
