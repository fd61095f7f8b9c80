/*
Key-driven maps of query heads to KV heads (runtime/allocation.h), computed at every step with no host
synchronisation. The twin of dev/cpu/heads.h.

    heads_begin_step(&heads, step, stream);                  // maps of all layers, from the last statistics
    heads_of_batch(&heads, l, norms, B, B, step, stream);    // or the map of one layer, in its forward pass
    heads_measure(&heads, sums, sequences, step, stream);    // the statistics of this step

The struct `heads` is in host memory, and its pointers are to device memory. Every step launches the same
kernels, whether or not it makes a new map, so that the recorded graph of one step also fits the next.

One lane handles a whole layer, with the same functions as the host. The order of these short sums decides
their bits, so they are not divided among lanes. A warp handles 32 layers, or a single layer in
heads_of_batch.

Cost: the launch and some thousand clocks of latency. A layer has a few hundred bytes.
*/
#ifndef KERNELS_HEADS_CUH
#define KERNELS_HEADS_CUH

#include "kernels/device.cuh"
#include "kernels/threads.cuh"
#include "runtime/allocation.h"

enum { HEADS_BLOCK = WARP };

static inline int heads_grid(const HeadAllocation* heads) { return ceil_div(heads->L, HEADS_BLOCK); }

__global__ void heads_begin_step_kernel(HeadAllocation heads, int step) {
    const int l = (int)(blockIdx.x * HEADS_BLOCK + threadIdx.x);
    if (l < heads.L) allocation_begin_step(&heads, l, step);
}

// Makes the maps of all layers, from the last statistics or from random numbers (every source but `forward`).
static inline void heads_begin_step(const HeadAllocation* heads, int step, stream_t stream) {
    launch(heads_begin_step_kernel, heads_grid(heads), HEADS_BLOCK, 0, stream, *heads, step);
}

__global__ void heads_of_batch_kernel(HeadAllocation heads, int l, const float* norms, int B, long sequences,
                                      int step) {
    allocation_of_batch(&heads, l, norms, B, sequences, step);
}

// Makes the map of layer l from its keys in this batch. sequences: B plus the sequences of the other ranks
// whose norms have been added.
static inline void heads_of_batch(const HeadAllocation* heads, int l,
                                  const float_acc* norms, // (B, G)
                                  int B, long sequences, int step, stream_t stream) {
    launch(heads_of_batch_kernel, 1, 1, 0, stream, *heads, l, norms, B, sequences, step);
}

__global__ void heads_measure_kernel(HeadAllocation heads, const float* sums, long sequences, int step) {
    const int l = (int)(blockIdx.x * HEADS_BLOCK + threadIdx.x);
    if (l < heads.L) allocation_measure(&heads, l, sums + (size_t)l * heads.G, sequences, step);
}

// Computes the statistics of all layers: the means of these sums.
static inline void heads_measure(const HeadAllocation* heads,
                                 const float_acc* sums, // (L, G) over the sequences
                                 long sequences, int step, stream_t stream) {
    launch(heads_measure_kernel, heads_grid(heads), HEADS_BLOCK, 0, stream, *heads, sums, sequences, step);
}

#endif
