/*
Counters of the kernels' work since the program began. An increment is cheap beside a switch of fibers, so the
emulator always counts. To count one launch, subtract the counters before it (launch_observer in
kernels/launch.cuh).

    const simt::Counters before = simt::counters;
    launch(kernel, ...);
    printf("%llu products\n", (unsigned long long)(simt::counters.products - before.products));
*/
#ifndef DEV_SIMT_COUNTERS_H
#define DEV_SIMT_COUNTERS_H

#include <stdint.h>
#include "dev/simt/sanitizers.h"

namespace simt {

struct Counters {
    uint64_t launches;
    uint64_t products; // mma.m16n8k16, one for each warp
    uint64_t matrices; // ldmatrix.x4, one for each warp
    uint64_t copied;   // bytes that cp.async read
    uint64_t loaded;   // bytes read by load() of kernels/vector.cuh
    uint64_t stored;   // bytes written by store() of kernels/vector.cuh and store_rows() of kernels/tile.cuh
    uint64_t atomics;  // one for each thread
};
inline Counters counters;

SIMT_INTERNAL inline void count(uint64_t Counters::*what, uint64_t by) { counters.*what += by; }

} // namespace simt

#endif
