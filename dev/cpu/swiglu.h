/*
SwiGLU (Shazeer, arXiv 2002.05202): out = silu(gate) * up, silu(x) = x / (1 + exp(-x)). Each input row holds
gate and up.
*/
#ifndef DEV_CPU_SWIGLU_H
#define DEV_CPU_SWIGLU_H

#include "dev/cpu/device.h"
#include "dev/cpu/math.h"

static inline void swiglu_forward(floatX* out,           // (rows, F)
                                  const floatX* gate_up, // (rows, 2F): F of gate, F of up
                                  int rows, int F, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        const floatX *gate = gate_up + (size_t)row * 2 * F, *up = gate + F;
        floatX* to = out + (size_t)row * F;
#pragma omp simd
        for (int f = 0; f < F; f++) to[f] = gate[f] / (1 + exp_fast(-gate[f])) * up[f];
    }
}

static inline void swiglu_backward(floatX* dgate_up,      // (rows, 2F)
                                   const floatX* dout,    // (rows, F)
                                   const floatX* gate_up, // (rows, 2F)
                                   int rows, int F, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        const floatX *gate = gate_up + (size_t)row * 2 * F, *up = gate + F;
        floatX *dgate = dgate_up + (size_t)row * 2 * F, *dup = dgate + F;
        const floatX* dto = dout + (size_t)row * F;
#pragma omp simd
        for (int f = 0; f < F; f++) {
            floatX sigmoid = 1 / (1 + exp_fast(-gate[f]));
            floatX silu = gate[f] * sigmoid;
            dup[f] = dto[f] * silu;
            dgate[f] = dto[f] * up[f] * (sigmoid + silu * (1 - sigmoid));
        }
    }
}

#endif
