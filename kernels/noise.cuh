/*
The noise of perturbed grouped attention (runtime/noise.h). The kernels that write attention's output call it
while they hold a row, so the row is not read again.

    const Values<PACK> own = ...;      // from `column` on; D / PACK neighbouring lanes hold the row
    store(rows.noised + at, noise_row<D>(own, row, column, noise));     // all lanes of the warp together

z comes from the same random bits as on the CPU. It is computed from them in fp32.

Cost: 2 bytes of bf16 for each element, and the arithmetic of each random number (ten rounds of Philox, a
logarithm, a cosine), which takes longer. Dense attention has enough registers for it (gqa.cuh). The merge of
flashmoba takes ten more, so it has a variant without noise.
*/
#ifndef KERNELS_NOISE_CUH
#define KERNELS_NOISE_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"
#include "runtime/noise.h"

// The part of an AttentionNoise that kernels need. Without noise `noised` is NULL.
typedef struct {
    floatX* noised; // (B, T, H, D)
    float alpha;
    uint64_t seed, draws, first_row; // first_row: number of the first row in the whole step
} NoisedRows;

static inline NoisedRows noised_rows(const AttentionNoise* noise, int T, int H) {
    NoisedRows rows = {};
    if (!noise) return rows;
    rows.noised = noise->noised, rows.alpha = noise->alpha, rows.seed = noise->seed,
    rows.draws = noise->draws;
    rows.first_row = noise->first_sequence * (uint64_t)T * (uint64_t)H;
    return rows;
}

// random_normal() in fp32. A uniform number within 2^-25 of 1 is rounded to 1. Then z is 0; in fp64 it would
// be up to 3e-4.
__device__ inline float noise_normal(uint64_t seed, uint64_t draws, uint64_t element) {
    uint64_t bits[2];
    random_bits(bits, seed, draws, element);
    const float uniform = ((float)(bits[0] >> 12) + 0.5f) * 0x1p-52f;
    const float turn = ((float)(bits[1] >> 12) + 0.5f) * 0x1p-52f;
    return sqrtf(-2 * logf(uniform)) * cospif(2 * turn);
}

// The sum over the LANES neighbouring lanes that hold a row.
template <int LANES> __device__ inline float neighbours_sum(float value) {
    for (int other = LANES / 2; other > 0; other /= 2) value += __shfl_xor_sync(ALL_LANES, value, other);
    return value;
}

// Returns this lane's part of a row with noise. `row` is the index of the row in (B, T, H).
template <int D>
__device__ inline Values<PACK> noise_row(const Values<PACK>& own, size_t row, int column,
                                         const NoisedRows& noise) {
    float sum = 0, square = 0;
#pragma unroll
    for (int i = 0; i < PACK; i++) sum += own.at[i];
    const float mean = neighbours_sum<D / PACK>(sum) / D;
#pragma unroll
    for (int i = 0; i < PACK; i++) square += (own.at[i] - mean) * (own.at[i] - mean);
    const float scale = noise.alpha * sqrtf(neighbours_sum<D / PACK>(square) / D);
    const uint64_t first = (noise.first_row + row) * D + column;
    Values<PACK> noised;
#pragma unroll
    for (int i = 0; i < PACK; i++)
        noised.at[i] = own.at[i] - scale * noise_normal(noise.seed, noise.draws, first + i);
    return noised;
}

#endif
