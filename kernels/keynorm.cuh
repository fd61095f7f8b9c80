/*
These kernels measure how large the keys of each KV head are: the root mean square of the keys, or the norm of
their weights. Key-driven attention allocates query heads by this statistic (docs/math.md section 3).

    key_rms(rms, sums, qkv, B, T, H, G, D, stream);      // of the keys: a number for each sequence and KV head
    key_weight_norm(norm, wk, gain, G, D, C, stream);    // of the key projection's weights: needs no data

The kernels read the keys or the weights once. dev/cpu/keynorm.h has the CPU version.
*/
#ifndef KERNELS_KEYNORM_CUH
#define KERNELS_KEYNORM_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

enum { KEYNORM_BLOCK = 512, KEYNORM_LOADS = 8 };

// One thread block for each sequence and head; D / WIDTH neighbouring threads for a token. A thread keeps
// KEYNORM_LOADS loads in flight, so that no load waits for the previous one. For a token beyond the last one
// it loads the last, and adds nothing.
template <int WIDTH>
__global__ void key_rms_kernel(float* rms, const floatX* qkv, int T, int H, int G, int D) {
    const int b = (int)blockIdx.x / G, g = (int)blockIdx.x % G;
    const int lanes = D / WIDTH, step = KEYNORM_BLOCK / lanes;
    const floatX* keys = qkv + ((size_t)b * T * (H + 2 * G) + H + g) * D + threadIdx.x % lanes * WIDTH;
    const int first = (int)threadIdx.x < lanes * step ? (int)threadIdx.x / lanes : T;
    float square = 0;
    for (int t = first; t < T; t += KEYNORM_LOADS * step) {
        Values<WIDTH> key[KEYNORM_LOADS];
#pragma unroll
        for (int i = 0; i < KEYNORM_LOADS; i++)
            key[i] = load<WIDTH>(keys + (size_t)min(t + i * step, T - 1) * (H + 2 * G) * D);
#pragma unroll
        for (int i = 0; i < KEYNORM_LOADS; i++)
            for (int k = 0; k < WIDTH && t + i * step < T; k++) square += key[i].at[k] * key[i].at[k];
    }
    square = row_sum(square);
    if (threadIdx.x == 0) rms[blockIdx.x] = sqrtf(square / ((float)T * D));
}

__global__ void key_sums_kernel(float* sums, const float* rms, int B, int G) {
    const int g = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (g >= G) return;
    float sum = sums[g];
    for (int b = 0; b < B; b++) sum += rms[b * G + g];
    sums[g] = sum;
}

// rms[b][g] is the root mean square of KV head g's keys in sequence b, over tokens and channels. Adds rms[b][g]
// over all b to sums[g].
static inline void key_rms(float_acc* rms,    // (B, G)
                           float_acc* sums,   // (G) accumulates
                           const floatX* qkv, // (B, T, H + 2G, D), D at most KEYNORM_BLOCK
                           int B, int T, int H, int G, int D, stream_t stream) {
    launch(whole_packs(D, qkv) ? key_rms_kernel<PACK> : key_rms_kernel<1>, B * G, KEYNORM_BLOCK, 0, stream,
           rms, qkv, T, H, G, D);
    launch(key_sums_kernel, ceil_div(G, WARP), WARP, 0, stream, sums, rms, B, G);
}

template <int WIDTH>
__global__ void key_weight_norm_kernel(float* norm, const floatX* wk, const floatX* gain, int D, int C) {
    const floatX* rows = wk + (size_t)blockIdx.x * D * C;
    float square = 0;
    for (size_t i = threadIdx.x * WIDTH; i < (size_t)D * C; i += KEYNORM_BLOCK * WIDTH) {
        const Values<WIDTH> weight = load<WIDTH>(rows + i), factor = load<WIDTH>(gain + i % C);
        for (int k = 0; k < WIDTH; k++) {
            const float weighted = weight.at[k] * factor.at[k];
            square += weighted * weighted;
        }
    }
    square = row_sum(square);
    if (threadIdx.x == 0) norm[blockIdx.x] = sqrtf(square);
}

// Multiplies each column of Wk by the gain of the RMSNorm before the projection. norm[g] is then the Frobenius
// norm of KV head g's D rows.
static inline void key_weight_norm(float_acc* norm,    // (G)
                                   const floatX* wk,   // (G, D, C)
                                   const floatX* gain, // (C)
                                   int G, int D, int C, stream_t stream) {
    launch(whole_packs(C, wk, gain) ? key_weight_norm_kernel<PACK> : key_weight_norm_kernel<1>, G,
           KEYNORM_BLOCK, 0, stream, norm, wk, gain, D, C);
}

#endif
