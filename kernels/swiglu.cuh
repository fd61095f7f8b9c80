/*
SwiGLU (Shazeer, arXiv 2002.05202): out = silu(gate) * up, with silu(x) = x / (1 + exp(-x)). A row holds gate,
then up. The twin of dev/cpu/swiglu.h.

Cost: each element is read or written once. For bf16 this is 6 bytes for each element of out in the forward,
and 10 in the backward.
*/
#ifndef KERNELS_SWIGLU_CUH
#define KERNELS_SWIGLU_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

template <int WIDTH>
__global__ void swiglu_forward_kernel(floatX* out, const floatX* gate_up, int rows, int F) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= (size_t)rows * F) return;
    const floatX* from = gate_up + at / F * 2 * F + at % F;
    Values<WIDTH> gate = load<WIDTH>(from), up = load<WIDTH>(from + F);
    for (int i = 0; i < WIDTH; i++) up.at[i] *= gate.at[i] / (1 + __expf(-gate.at[i]));
    store(out + at, up);
}

static inline void swiglu_forward(floatX* out,           // (rows, F)
                                  const floatX* gate_up, // (rows, 2F): F of gate, F of up
                                  int rows, int F, stream_t stream) {
    const int packs = whole_packs(F, out, gate_up);
    launch(packs ? swiglu_forward_kernel<PACK> : swiglu_forward_kernel<1>,
           flat_grid((size_t)rows * F, packs ? (int)PACK : 1), FLAT_BLOCK, 0, stream, out, gate_up, rows, F);
}

template <int WIDTH>
__global__ void swiglu_backward_kernel(floatX* dgate_up, const floatX* dout, const floatX* gate_up, int rows,
                                       int F) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= (size_t)rows * F) return;
    const size_t in_row = at / F * 2 * F + at % F;
    Values<WIDTH> gate = load<WIDTH>(gate_up + in_row), up = load<WIDTH>(gate_up + in_row + F);
    const Values<WIDTH> d = load<WIDTH>(dout + at);
    for (int i = 0; i < WIDTH; i++) {
        const float sigmoid = 1 / (1 + __expf(-gate.at[i])), silu = gate.at[i] * sigmoid;
        gate.at[i] = d.at[i] * up.at[i] * (sigmoid + silu * (1 - sigmoid));
        up.at[i] = d.at[i] * silu;
    }
    store(dgate_up + in_row, gate);
    store(dgate_up + in_row + F, up);
}

static inline void swiglu_backward(floatX* dgate_up,      // (rows, 2F)
                                   const floatX* dout,    // (rows, F)
                                   const floatX* gate_up, // (rows, 2F)
                                   int rows, int F, stream_t stream) {
    const int packs = whole_packs(F, dgate_up, dout, gate_up);
    launch(packs ? swiglu_backward_kernel<PACK> : swiglu_backward_kernel<1>,
           flat_grid((size_t)rows * F, packs ? (int)PACK : 1), FLAT_BLOCK, 0, stream, dgate_up, dout, gate_up,
           rows, F);
}

#endif
