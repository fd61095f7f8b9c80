/*
cp.async: copies of 4, 8 or 16 bytes from device memory to shared memory. A copy is complete only after the
thread has waited for it, and other threads may rely on it only after the next barrier.

On a GPU the copy happens at any moment between its issue and the wait. SIMT_ASYNC selects the moment: at the
wait (lazy), at the issue (eager), or at random one of the two for every copy (mixed). With lazy the
destination holds 0xFF bytes until the wait, so a thread can read neither old nor new values. One of the modes
shows a missing wait, and a stage that a copy overwrites while other threads still read it.

The copies themselves are instrumented, so that the sanitizers see them as this thread's accesses.
*/
#ifndef DEV_SIMT_COPY_H
#define DEV_SIMT_COPY_H

#include "dev/simt/counters.h"
#include "dev/simt/fibers.h"

namespace simt {

template <class T> inline void copy_as(void* to, const void* from, bool valid) {
    *(T*)to = valid ? *(const T*)from : T();
}

inline void do_copy(void* to, const void* from, unsigned bytes, bool valid) {
    if (bytes == 4) copy_as<unsigned>(to, from, valid);
    else if (bytes == 8) copy_as<uint2>(to, from, valid);
    else copy_as<uint4>(to, from, valid);
}

// The earliest access to both ends of a copy: it fills the destination with 0xFF bytes, and the sanitizers
// see both accesses where the copy is issued.
inline void overwrite(void* to, const void* from, unsigned bytes, bool valid) {
    for (unsigned i = 0; i < bytes / 4; i++) {
#if defined(SIMT_ADDRESS) || defined(SIMT_THREAD)
        if (valid) (void)((const volatile unsigned*)from)[i];
#endif
        ((unsigned*)to)[i] = ~0u;
    }
    (void)from, (void)valid;
}

SIMT_INTERNAL inline void copy_async(void* to, const void* from, unsigned bytes, bool valid,
                                     const Place& place) {
    if (((uintptr_t)to | (uintptr_t)from) % bytes)
        kernel_error("%s (%s:%d): addresses %p and %p must be multiples of %u", place.operation, place.file,
                     place.line, to, from, bytes);
    if (!may_be_shared(to, bytes))
        kernel_error("%s (%s:%d): %p is not shared memory", place.operation, place.file, place.line, to);
    if (valid && !is_device_memory((uintptr_t)from, bytes))
        kernel_error("%s (%s:%d): %p is not device memory", place.operation, place.file, place.line, from);
    Thread* thread = current;
    if (thread->pending_end - thread->first_pending == MAX_PENDING)
        kernel_error("%s (%s:%d): more than %d copies that nobody has waited for", place.operation,
                     place.file, place.line, MAX_PENDING);
    PendingCopy* copy = &thread->pending[thread->pending_end++ % MAX_PENDING];
    *copy = {to, from, thread->open_group, bytes, valid, false};
    overwrite(to, from, bytes, valid);
    if (valid) count(&Counters::copied, bytes);
    copy->done = options.async == ASYNC_EAGER || (options.async == ASYNC_MIXED && random_bits() % 2);
    if (copy->done) do_copy(to, from, bytes, valid);
}

// Finishes all groups except the newest `groups` ones. Copies that were never committed are in no group yet.
SIMT_INTERNAL inline void copy_wait(unsigned groups) {
    Thread* thread = current;
    for (; thread->first_pending != thread->pending_end; thread->first_pending++) {
        PendingCopy* copy = &thread->pending[thread->first_pending % MAX_PENDING];
        if (copy->group + groups >= thread->open_group) return;
        if (!copy->done) do_copy(copy->to, copy->from, copy->bytes, copy->valid);
    }
}

SIMT_INTERNAL inline void copy_commit() { current->open_group++; }

} // namespace simt

inline void cp_async4(void* shared, const void* global, bool valid, SIMT_PLACE) {
    simt::copy_async(shared, global, 4, valid, {"cp_async4", file, line});
}
inline void cp_async8(void* shared, const void* global, bool valid, SIMT_PLACE) {
    simt::copy_async(shared, global, 8, valid, {"cp_async8", file, line});
}
inline void cp_async16(void* shared, const void* global, bool valid, SIMT_PLACE) {
    simt::copy_async(shared, global, 16, valid, {"cp_async16", file, line});
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int groups> inline void cp_async_wait() { simt::copy_wait(groups); }

#endif
