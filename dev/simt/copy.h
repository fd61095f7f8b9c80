/*
cp.async: copies of 16 bytes from device memory to shared memory that are done only when the thread has waited for them, and
then only known to that thread until the next barrier.

On a GPU the copy happens at any moment between its issue and the wait. SIMT_ASYNC chooses one: at the wait (lazy; until then
what it will overwrite is 0xFF bytes, so neither old nor new values can be read), at the issue (eager), or either by
chance for every copy (mixed). A missing wait, or a stage that is overwritten while others read it, shows in one of them.

The copies themselves are instrumented, so that the sanitizers see them as this thread's accesses.
*/
#ifndef DEV_SIMT_COPY_H
#define DEV_SIMT_COPY_H

#include "dev/simt/counters.h"
#include "dev/simt/fibers.h"

namespace simt {

inline void do_copy(void* to, const void* from, bool valid) {
    *(uint4*)to = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
}

// What may happen at once to both ends of a copy: an access that the sanitizers see where the copy is issued.
inline void overwrite(void* to, const void* from, bool valid) {
#if defined(SIMT_ADDRESS) || defined(SIMT_THREAD)
    if (valid) (void)*(const volatile unsigned*)from, (void)((const volatile unsigned*)from)[3];
#endif
    (void)from, (void)valid;
    *(uint4*)to = make_uint4(~0u, ~0u, ~0u, ~0u);
}

SIMT_INTERNAL inline void copy_async(void* to, const void* from, bool valid, const Place& place) {
    if (((uintptr_t)to | (uintptr_t)from) % 16)
        kernel_error("%s (%s:%d): addresses %p and %p must be multiples of 16", place.operation, place.file,
                     place.line, to, from);
    if (!may_be_shared(to, 16))
        kernel_error("%s (%s:%d): %p is not shared memory", place.operation, place.file, place.line, to);
    if (valid && !is_device_memory((uintptr_t)from, 16))
        kernel_error("%s (%s:%d): %p is not device memory", place.operation, place.file, place.line, from);
    Thread* thread = current;
    if (thread->pending_end - thread->first_pending == MAX_PENDING)
        kernel_error("%s (%s:%d): more than %d copies that nobody has waited for", place.operation,
                     place.file, place.line, MAX_PENDING);
    PendingCopy* copy = &thread->pending[thread->pending_end++ % MAX_PENDING];
    *copy = {to, from, thread->open_group, valid, false};
    overwrite(to, from, valid);
    if (valid) count(&Counters::copied, 16);
    copy->done = options.async == ASYNC_EAGER || (options.async == ASYNC_MIXED && random_bits() % 2);
    if (copy->done) do_copy(to, from, valid);
}

// Finishes all groups but the newest `groups` ones. Copies that were never committed are in no group yet.
SIMT_INTERNAL inline void copy_wait(unsigned groups) {
    Thread* thread = current;
    for (; thread->first_pending != thread->pending_end; thread->first_pending++) {
        PendingCopy* copy = &thread->pending[thread->first_pending % MAX_PENDING];
        if (copy->group + groups >= thread->open_group) return;
        if (!copy->done) do_copy(copy->to, copy->from, copy->valid);
    }
}

SIMT_INTERNAL inline void copy_commit() { current->open_group++; }

} // namespace simt

inline void cp_async16(void* shared, const void* global, bool valid, SIMT_PLACE) {
    simt::copy_async(shared, global, valid, {"cp_async16", file, line});
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int groups> inline void cp_async_wait() { simt::copy_wait(groups); }

#endif
