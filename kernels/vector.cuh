/*
Functions shared by the memory-bound kernels: rows read 16 bytes at a time, and sums in a fixed order.

    const int width = whole_packs(C, out, inp) ? PACK : 1;       // host: may it read 16 bytes at a time?
    Values<WIDTH> x = load<WIDTH>(inp + at);                     // WIDTH elements, widened to float
    store(out + at, x);                                          // rounded to floatX

    const dim3 block = row_block(C, width);                      // x threads for each of y rows
    float sum = row_sum(value);                                  // over the threads of one row

A kernel is built for two widths: PACK elements (16 bytes of floatX), and 1 for rows whose length or address
is not a multiple of 16 bytes. A sum is a butterfly reduction in each warp, then a sum over the warps in
order. It has the same bits in every run and on every thread.
*/
#ifndef KERNELS_VECTOR_CUH
#define KERNELS_VECTOR_CUH

#include <float.h>
#include <stdint.h>
#include <string.h>
// WARP, ALL_LANES, ceil_div, flat_grid
#include "kernels/threads.cuh"
#include "runtime/precision.h"

enum { PACK = 16 / sizeof(floatX) };

// ----------------------------------------------------------------------------
// Loads and stores

template <int WIDTH> struct Values { float at[WIDTH]; };

// 1 if rows of `width` elements of floatX or float that begin at these addresses consist of whole packs. Else
// 0.
template <typename... Pointers> static inline int whole_packs(int width, Pointers... rows) {
    return width % PACK == 0 && ((uintptr_t)rows | ...) % 16 == 0;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void round_to(float* to, float x) { *to = x; }
__device__ inline void round_to(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

// The value after rounding to floatX.
__device__ inline float rounded(float x) {
    floatX kept;
    round_to(&kept, x);
    return to_float(kept);
}

template <int WIDTH> __device__ inline Values<WIDTH> load(const float* from) {
    Values<WIDTH> values;
    count_loaded(WIDTH * sizeof(*from));
    if (WIDTH % 4 == 0) {
        for (int i = 0; i < WIDTH; i += 4) {
            const float4 four = *(const float4*)(from + i);
            memcpy(&values.at[i], &four, sizeof(four));
        }
    } else {
        for (int i = 0; i < WIDTH; i++) values.at[i] = from[i];
    }
    return values;
}

template <int WIDTH> __device__ inline void store(float* to, const Values<WIDTH>& values) {
    count_stored(WIDTH * sizeof(*to));
    if (WIDTH % 4 == 0) {
        for (int i = 0; i < WIDTH; i += 4) {
            float4 four;
            memcpy(&four, &values.at[i], sizeof(four));
            *(float4*)(to + i) = four;
        }
    } else {
        for (int i = 0; i < WIDTH; i++) to[i] = values.at[i];
    }
}

// bf16 is the upper half of a float. Of two bf16 in a 32-bit word, the first is in the lower half.
template <int WIDTH> __device__ inline Values<WIDTH> load(const __nv_bfloat16* from) {
    Values<WIDTH> values;
    count_loaded(WIDTH * sizeof(*from));
    if (WIDTH == 8) {
        unsigned words[4];
        const uint4 four = *(const uint4*)from;
        memcpy(words, &four, sizeof(words));
        for (int i = 0; i < WIDTH; i++)
            values.at[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
        for (int i = 0; i < WIDTH; i++) values.at[i] = __bfloat162float(from[i]);
    }
    return values;
}

template <int WIDTH> __device__ inline void store(__nv_bfloat16* to, const Values<WIDTH>& values) {
    count_stored(WIDTH * sizeof(*to));
    if (WIDTH == 8) {
        __nv_bfloat162 pairs[4];
        for (int i = 0; i < 4; i++) pairs[i] = __floats2bfloat162_rn(values.at[2 * i], values.at[2 * i + 1]);
        uint4 four;
        memcpy(&four, pairs, sizeof(four));
        *(uint4*)to = four;
    } else {
        for (int i = 0; i < WIDTH; i++) to[i] = __float2bfloat16(values.at[i]);
    }
}

// ----------------------------------------------------------------------------
// Sums and maxima of a row

// Thread block of a kernel that works row by row: x threads for each row and y rows. x grows up to 1024 until
// each thread has at most 4 packs. y makes a block of at least 256 threads.
static inline dim3 row_block(int width, int pack) {
    const int packs = ceil_div(width, pack);
    int threads = WARP;
    while (threads < WARP * WARP && threads * 4 < packs) threads *= 2;
    return dim3((unsigned)threads, threads < 256 ? 256u / (unsigned)threads : 1u);
}

__device__ inline float warp_sum(float value) {
    for (int other = WARP / 2; other > 0; other /= 2) value += __shfl_xor_sync(ALL_LANES, value, other);
    return value;
}

__device__ inline float warp_max(float value) {
    for (int other = WARP / 2; other > 0; other /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, other));
    return value;
}

// Gives all threads of a row the values of the row's warps. `warps` is shared memory with one value for each
// warp of the block. All threads of the block must call this.
__device__ inline const float* exchange_among_warps(float* warps, float value) {
    __syncthreads(); // an earlier exchange may still be read
    const int warps_of_row = (int)blockDim.x / WARP, first = (int)threadIdx.y * warps_of_row;
    if (threadIdx.x % WARP == 0) warps[first + (int)threadIdx.x / WARP] = value;
    __syncthreads();
    return warps + first;
}

// The sum over the threads of a row. All threads of the block must call this.
__device__ inline float row_sum(float value) {
    __shared__ float warps[WARP];
    value = warp_sum(value);
    if (blockDim.x == WARP) return value;
    const float* of_row = exchange_among_warps(warps, value);
    float sum = 0;
    for (int w = 0; w < (int)blockDim.x / WARP; w++) sum += of_row[w];
    return sum;
}

// The maximum over the threads of a row. It ignores NaN.
__device__ inline float row_max(float value) {
    __shared__ float warps[WARP];
    value = warp_max(value);
    if (blockDim.x == WARP) return value;
    const float* of_row = exchange_among_warps(warps, value);
    float largest = of_row[0];
    for (int w = 1; w < (int)blockDim.x / WARP; w++) largest = fmaxf(largest, of_row[w]);
    return largest;
}

// ----------------------------------------------------------------------------
// Sums of columns: adds up the partial sums of thread blocks

enum { COLUMN_SUM_PARTS = 16 };

// A thread block has 32 columns. Each column is summed in 16 parts, which are then added in order. The sums
// are short and bound by the latency of the loads, so eight loads are in flight at a time.
__global__ void column_sums_kernel(float* totals, const float* partials, int count, int columns) {
    __shared__ float parts[COLUMN_SUM_PARTS][WARP];
    const int c = (int)(blockIdx.x * WARP + threadIdx.x);
    const int end = c < columns ? count : 0;
    float sum = 0;
#pragma unroll 8
    for (int i = (int)threadIdx.y; i < end; i += COLUMN_SUM_PARTS) sum += partials[(size_t)i * columns + c];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= columns) return;
    for (int part = 1; part < COLUMN_SUM_PARTS; part++) sum += parts[part][threadIdx.x];
    totals[c] += sum;
}

static inline void add_column_sums(float* totals,         // (columns) accumulates
                                   const float* partials, // (count, columns)
                                   int count, int columns, cudaStream_t stream) {
    launch(column_sums_kernel, ceil_div(columns, WARP), dim3(WARP, COLUMN_SUM_PARTS), 0, stream, totals,
           partials, count, columns);
}

#endif
