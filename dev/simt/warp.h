/*
The collective operations of a warp: shuffles, votes, __syncwarp(). matrix.h builds mma and ldmatrix on the
same function, meet().

Every lane of the mask brings its value and waits. The last lane to arrive may compute something for all; then
each lane reads its result. All lanes must be at the same place of the source. Some mistakes are always errors
here, but only sometimes give wrong results on a GPU: a caller outside its own mask, a mask that names a lane
which has returned or does not exist, a shuffle that reads a lane outside the mask.

Only __syncwarp() orders memory. CUDA does not promise this for shuffles and votes, so the thread sanitizer
reports kernels that rely on it.
*/
#ifndef DEV_SIMT_WARP_H
#define DEV_SIMT_WARP_H

#include <type_traits>
#include "dev/simt/bf16.h"
#include "dev/simt/fibers.h"

namespace simt {

SIMT_INTERNAL inline int lane() { return current->lane; }

SIMT_INTERNAL inline Meeting* meeting_of(Warp* warp, unsigned mask, const Place& place) {
    for (int i = 0; i < warp->meeting_count; i++)
        if (warp->meetings[i].mask == mask) return &warp->meetings[i];
    if (warp->meeting_count == MAX_MEETINGS)
        kernel_error("%s (%s:%d): more than %d different masks in one warp", place.operation, place.file,
                     place.line, MAX_MEETINGS);
    Meeting* meeting = &warp->meetings[warp->meeting_count++];
    meeting->mask = mask;
    meeting->arrived = 0;
    return meeting;
}

struct Nothing {
    SIMT_INTERNAL void operator()(Payload*) const {}
};

// Collects `mine` from every lane of the mask. The last lane to arrive calls finish() on all values. The result is
// valid until these lanes call meet() again. orders_memory = true also orders memory accesses.
template <class T, class Finish>
SIMT_INTERNAL inline const Payload* meet(unsigned mask, const T& mine, Finish finish, bool orders_memory,
                                         const Place& place) {
    static_assert(sizeof(T) <= sizeof(Payload), "too much for a lane to bring");
    Warp* warp = &warps[current->warp];
    const unsigned self = 1u << current->lane;
    if (!(mask & self))
        kernel_error("%s (%s:%d): mask %08x does not name the calling lane %d", place.operation, place.file,
                     place.line, mask, current->lane);
    if (unsigned missing = mask & (warp->returned | ~warp->lanes))
        kernel_error(
            "%s (%s:%d): mask %08x names %d lanes that have returned or do not exist (the first is %d)",
            place.operation, place.file, place.line, mask, __builtin_popcount(missing),
            __builtin_ctz(missing));
    Meeting* meeting = meeting_of(warp, mask, place);
    if (!meeting->arrived) meeting->place = place;
    else if (!same_place(meeting->place, place))
        kernel_error("%s (%s:%d): %d lanes of mask %08x are at %s (%s:%d) meanwhile", place.operation,
                     place.file, place.line, __builtin_popcount(meeting->arrived), mask,
                     meeting->place.operation, meeting->place.file, meeting->place.line);
    const unsigned turn = meeting->generation % 2;
    Payload* payload = meeting->payload[turn];
    __builtin_memcpy(payload[current->lane].bytes, &mine, sizeof(T));
    if (orders_memory) release(&meeting->order[turn]);
    meeting->arrived |= self;
    if (meeting->arrived != mask) {
        wait_at(place);
    } else {
        finish(payload);
        meeting->arrived = 0;
        meeting->generation++;
        make_ready(current->warp, mask);
        draw_again();
    }
    if (orders_memory) acquire(&meeting->order[turn]);
    return payload;
}

// The value of lane `source`, which must be in the mask.
template <class T> SIMT_INTERNAL inline T shuffle(unsigned mask, T value, int source, const Place& place) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, long> ||
                      std::is_same_v<T, unsigned long> || std::is_same_v<T, long long> ||
                      std::is_same_v<T, unsigned long long> || std::is_same_v<T, float> ||
                      std::is_same_v<T, double> || std::is_same_v<T, __nv_bfloat16> ||
                      std::is_same_v<T, __nv_bfloat162>,
                  "CUDA has no shuffle of this type");
    const Payload* payload = meet(mask, value, Nothing(), false, place);
    if (!(mask >> source & 1))
        kernel_error("%s (%s:%d): reads lane %d, which mask %08x does not name", place.operation, place.file,
                     place.line, source, mask);
    T result;
    __builtin_memcpy(&result, payload[source].bytes, sizeof(T));
    return result;
}

// The first lane of the caller's segment of `width` lanes; a shuffle of this width stays in its segment.
SIMT_INTERNAL inline int segment_begin(int width, const Place& place) {
    if (width < 1 || width > WARP || (width & (width - 1)))
        kernel_error("%s (%s:%d): width %d is no power of two up to 32", place.operation, place.file,
                     place.line, width);
    return lane() & ~(width - 1);
}

SIMT_INTERNAL inline unsigned vote(unsigned mask, int predicate, const Place& place) {
    const Payload* payload = meet(mask, predicate, Nothing(), false, place);
    unsigned ballot = 0;
    for (unsigned left = mask; left; left &= left - 1) {
        int other;
        __builtin_memcpy(&other, payload[__builtin_ctz(left)].bytes, sizeof(other));
        if (other) ballot |= left & -left;
    }
    return ballot;
}

// The lanes whose values have the same bits as the caller's.
template <class T> SIMT_INTERNAL inline unsigned match(unsigned mask, T value, const Place& place) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "CUDA has no match of this type");
    const Payload* payload = meet(mask, value, Nothing(), false, place);
    unsigned same = 0;
    for (unsigned left = mask; left; left &= left - 1)
        if (!__builtin_memcmp(payload[__builtin_ctz(left)].bytes, &value, sizeof(value)))
            same |= left & -left;
    return same;
}

} // namespace simt

// ----------------------------------------------------------------------------
// CUDA's names

inline void __syncthreads(SIMT_PLACE) { simt::barrier(0, {"__syncthreads", file, line}); }
inline int __syncthreads_or(int predicate, SIMT_PLACE) {
    return simt::barrier(predicate, {"__syncthreads_or", file, line}).any;
}
inline int __syncthreads_and(int predicate, SIMT_PLACE) {
    return simt::barrier(predicate, {"__syncthreads_and", file, line}).all;
}
inline int __syncthreads_count(int predicate, SIMT_PLACE) {
    return simt::barrier(predicate, {"__syncthreads_count", file, line}).count;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_PLACE) {
    simt::meet(mask, 0, simt::Nothing(), true, {"__syncwarp", file, line});
}

// A lane that would read beyond its segment of `width` lanes gets its own value; only xor may read an earlier
// segment (PTX ISA, shfl.sync).
template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_PLACE) {
    const simt::Place place = {"__shfl_sync", file, line};
    return simt::shuffle(mask, value, simt::segment_begin(width, place) | (source & (width - 1)), place);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_PLACE) {
    const simt::Place place = {"__shfl_up_sync", file, line};
    int source = simt::lane() - (int)by;
    return simt::shuffle(mask, value, source >= simt::segment_begin(width, place) ? source : simt::lane(),
                         place);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_PLACE) {
    const simt::Place place = {"__shfl_down_sync", file, line};
    int source = simt::lane() + (int)by;
    return simt::shuffle(mask, value,
                         source < simt::segment_begin(width, place) + width ? source : simt::lane(), place);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, SIMT_PLACE) {
    const simt::Place place = {"__shfl_xor_sync", file, line};
    int source = simt::lane() ^ by;
    return simt::shuffle(mask, value,
                         source < simt::segment_begin(width, place) + width ? source : simt::lane(), place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_PLACE) {
    return simt::vote(mask, predicate, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, SIMT_PLACE) {
    return simt::vote(mask, predicate, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_PLACE) {
    return simt::vote(mask, predicate, {"__all_sync", file, line}) == mask;
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T value, SIMT_PLACE) {
    return simt::match(mask, value, {"__match_any_sync", file, line});
}

#endif
