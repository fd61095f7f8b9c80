/*
Query heads that follow the keys, step by step (runtime/allocation.h): the loop over the layers.

    heads_begin_step(&heads, step, stream);                // makes the maps from earlier measurements
    heads_of_batch(&heads, l, norms, B, B, step, stream);  // or the map of one layer, in its forward pass
    heads_measure(&heads, sums, sequences, step, stream);  // stores the statistics of this step

The pointers in `heads` are device memory; on the CPU this is the host's memory.
*/
#ifndef DEV_CPU_HEADS_H
#define DEV_CPU_HEADS_H

#include "dev/cpu/device.h"
#include "runtime/allocation.h"

// Makes the maps of all layers, unless the source is the keys of this same step.
static inline void heads_begin_step(const HeadAllocation* heads, int step, stream_t stream) {
    (void)stream;
    for (int l = 0; l < heads->L; l++) allocation_begin_step(heads, l, step);
}

// Makes the map of layer l from its keys in this micro-batch. sequences: the B sequences of this rank, plus
// those of the other ranks if their norms have been added.
static inline void heads_of_batch(const HeadAllocation* heads, int l,
                                  const float_acc* norms, // (B, G)
                                  int B, long sequences, int step, stream_t stream) {
    (void)stream;
    allocation_of_batch(heads, l, norms, B, sequences, step);
}

// Stores the statistics of all layers: these sums divided by the number of sequences.
static inline void heads_measure(const HeadAllocation* heads,
                                 const float_acc* sums, // (L, G) over the sequences
                                 long sequences, int step, stream_t stream) {
    (void)stream;
    for (int l = 0; l < heads->L; l++)
        allocation_measure(heads, l, sums + (size_t)l * heads->G, sequences, step);
}

#endif
