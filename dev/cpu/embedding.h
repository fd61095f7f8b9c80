/*
Token embedding: out[row] = weight[token[row]]. It adds no positions: RoPE does that.
*/
#ifndef DEV_CPU_EMBEDDING_H
#define DEV_CPU_EMBEDDING_H

#include "dev/cpu/device.h"

static inline void embedding_forward(floatX* out,          // (rows, C)
                                     const int* tokens,    // (rows)
                                     const floatX* weight, // (Vp, C)
                                     int rows, int C, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++)
        memcpy(out + (size_t)row * C, weight + (size_t)tokens[row] * C, (size_t)C * sizeof(floatX));
}

// Bytes of the workspace of embedding_backward.
static inline size_t embedding_backward_workspace(int rows, int C) {
    (void)rows, (void)C;
    return 0;
}

// dweight accumulates. The channels are divided among the threads, not the rows: so the rows of a repeated
// token are added in the same order for any number of threads.
static inline void embedding_backward(float_acc* dweight, // (Vp, C)
                                      const floatX* dout, // (rows, C)
                                      const int* tokens,  // (rows)
                                      void* workspace, int rows, int C, stream_t stream) {
    (void)workspace, (void)stream;
    const int slice = 64;
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += slice) {
        int last = first + slice < C ? first + slice : C;
        for (int row = 0; row < rows; row++) {
            float_acc* to = dweight + (size_t)tokens[row] * C;
            const floatX* from = dout + (size_t)row * C;
#pragma omp simd
            for (int c = first; c < last; c++) to[c] += from[c];
        }
    }
}

#endif
