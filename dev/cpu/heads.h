/*
Query heads that follow the keys, step by step (runtime/allocation.h): the loop over the layers.

    heads_begin_step(&heads, step, stream);                              // maps from what was measured before
    heads_of_batch(&heads, l, norms, B, B, step, stream);                // or of one layer, in the middle of its forward pass
    heads_measure(&heads, sums, sequences, step, stream);               // what was measured in this step

What `heads` points to is the device's memory: here that of the host.
*/
#ifndef DEV_CPU_HEADS_H
#define DEV_CPU_HEADS_H

#include "dev/cpu/device.h"
#include "runtime/allocation.h"

// The maps of all layers, where the source is not the keys of this very step.
static inline void heads_begin_step(const HeadAllocation* heads, int step, stream_t stream) {
    (void)stream;
    for (int l = 0; l < heads->L; l++) allocation_begin_step(heads, l, step);
}

// The map of layer l from its keys in this batch. sequences: B, and those of other ranks whose norms have been added.
static inline void heads_of_batch(const HeadAllocation* heads, int l,
                                  const float_acc* norms, // (B, G)
                                  int B, long sequences, int step, stream_t stream) {
    (void)stream;
    allocation_of_batch(heads, l, norms, B, sequences, step);
}

// The statistics of all layers, the means of these sums.
static inline void heads_measure(const HeadAllocation* heads,
                                 const float_acc* sums, // (L, G) over the sequences
                                 long sequences, int step, stream_t stream) {
    (void)stream;
    for (int l = 0; l < heads->L; l++)
        allocation_measure(heads, l, sums + (size_t)l * heads->G, sequences, step);
}

#endif
