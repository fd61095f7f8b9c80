/*
The noise of perturbed grouped attention (PGQA of arXiv 2408.08454, with normal noise; docs/math.md section 3): while training,
each row o of attention's output, the D values of one token and head, becomes

    o - alpha * std(o) * z        z normal, std over the D values

    attention_noise(noised, out, B, T, H, D, alpha, seed, noise_stream(step, layer), first_sequence, stream);

The twin of dev/cpu/noise.h: z comes from the same random bits, and is computed from them in fp32.

Cost: 4 bytes an element of bf16; more than these, the arithmetic of a draw (ten rounds of Philox, a logarithm, a cosine).
*/
#ifndef KERNELS_NOISE_CUH
#define KERNELS_NOISE_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"
#include "runtime/random.h"

// One stream of random numbers for each layer of each step.
static inline uint64_t noise_stream(int step, int layer) {
    return random_stream("attention noise") + ((uint64_t)step << 16) + (uint64_t)layer;
}

// random_normal() in fp32. A uniform number within 2^-25 of 1 becomes 1, and z then 0 instead of up to 3e-4.
__device__ inline float noise_normal(uint64_t seed, uint64_t draws, uint64_t element) {
    uint64_t bits[2];
    random_bits(bits, seed, draws, element);
    const float uniform = ((float)(bits[0] >> 12) + 0.5f) * 0x1p-52f;
    const float turn = ((float)(bits[1] >> 12) + 0.5f) * 0x1p-52f;
    return sqrtf(-2 * logf(uniform)) * cosf(6.283185307f * turn);
}

__global__ void attention_noise_kernel(floatX* noised, const floatX* out, size_t rows, int D, float alpha,
                                       uint64_t seed, uint64_t draws, uint64_t first_row) {
    const size_t row = (size_t)blockIdx.x * blockDim.y + threadIdx.y;
    const int end = row < rows ? D : 0; // threads without a row still meet the others at the sums
    float sum = 0, square = 0;
    for (int d = (int)threadIdx.x; d < end; d += (int)blockDim.x) sum += to_float(out[row * D + d]);
    const float mean = row_sum(sum) / D;
    for (int d = (int)threadIdx.x; d < end; d += (int)blockDim.x) {
        const float apart = to_float(out[row * D + d]) - mean;
        square += apart * apart;
    }
    const float scale = alpha * sqrtf(row_sum(square) / D);
    for (int d = (int)threadIdx.x; d < end; d += (int)blockDim.x) {
        const float z = noise_normal(seed, draws, (first_row + row) * D + d);
        round_to(&noised[row * D + d], to_float(out[row * D + d]) - scale * z);
    }
}

// first_sequence is the place of this batch's first sequence among those of the whole step.
static inline void attention_noise(floatX* noised,    // (B, T, H, D)
                                   const floatX* out, // (B, T, H, D)
                                   int B, int T, int H, int D, float alpha, uint64_t seed, uint64_t draws,
                                   long first_sequence, stream_t stream) {
    const size_t rows = (size_t)B * T * H;
    const dim3 block = row_block(D, 1);
    launch(attention_noise_kernel, (unsigned)((rows + block.y - 1) / block.y), block, 0, stream, noised, out,
           rows, D, alpha, seed, draws, (uint64_t)first_sequence * T * H);
}

#endif
