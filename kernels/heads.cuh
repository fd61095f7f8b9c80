/*
Query heads that follow the keys, step by step, without a word from the host (runtime/allocation.h). The twin of dev/cpu/heads.h.

    heads_begin_step(&heads, step, stream);                              // maps from what was measured before
    heads_of_batch(&heads, l, norms, B, B, step, stream);                // or of one layer, in the middle of its forward pass
    heads_measure(&heads, sums, sequences, step, stream);               // what was measured in this step

Here `heads` is of the host, and what it points to is the device's memory. Every step launches the same kernels, whether a map is
due or not, so that a graph of one step is that of the next.

A lane does a whole layer, with the very functions that the host has: sums of a few numbers whose order decides the bits are
nothing to share among lanes. So a warp does 32 layers, or one where the forward pass waits for it.

Cost: nothing but the launch and some thousand clocks of latency; a layer has a few hundred bytes.
*/
#ifndef KERNELS_HEADS_CUH
#define KERNELS_HEADS_CUH

#include "kernels/device.cuh"
#include "runtime/allocation.h"

enum { HEADS_BLOCK = 32 };

static inline int heads_grid(const HeadAllocation* heads) {
    return (heads->L + HEADS_BLOCK - 1) / HEADS_BLOCK;
}

__global__ void heads_begin_step_kernel(HeadAllocation heads, int step) {
    const int l = (int)(blockIdx.x * HEADS_BLOCK + threadIdx.x);
    if (l < heads.L) allocation_begin_step(&heads, l, step);
}

// The maps of all layers, where the source is not the keys of this very step.
static inline void heads_begin_step(const HeadAllocation* heads, int step, stream_t stream) {
    launch(heads_begin_step_kernel, heads_grid(heads), HEADS_BLOCK, 0, stream, *heads, step);
}

__global__ void heads_of_batch_kernel(HeadAllocation heads, int l, const float* norms, int B, long sequences,
                                      int step) {
    allocation_of_batch(&heads, l, norms, B, sequences, step);
}

// The map of layer l from its keys in this batch. sequences: B, and those of other ranks whose norms have been added.
static inline void heads_of_batch(const HeadAllocation* heads, int l,
                                  const float_acc* norms, // (B, G)
                                  int B, long sequences, int step, stream_t stream) {
    launch(heads_of_batch_kernel, 1, 1, 0, stream, *heads, l, norms, B, sequences, step);
}

__global__ void heads_measure_kernel(HeadAllocation heads, const float* sums, long sequences, int step) {
    const int l = (int)(blockIdx.x * HEADS_BLOCK + threadIdx.x);
    if (l < heads.L) allocation_measure(&heads, l, sums + (size_t)l * heads.G, sequences, step);
}

// The statistics of all layers, the means of these sums.
static inline void heads_measure(const HeadAllocation* heads,
                                 const float_acc* sums, // (L, G) over the sequences
                                 long sequences, int step, stream_t stream) {
    launch(heads_measure_kernel, heads_grid(heads), HEADS_BLOCK, 0, stream, *heads, sums, sequences, step);
}

#endif
