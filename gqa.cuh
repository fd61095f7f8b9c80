/*
Causal attention, dense or in a sliding window, of H query heads over G key/value heads through any map
(docs/math.md sections 1 and 3). The CUDA twin of dev/cpu/gqa.h.

    const AttentionShape s = {B, T, 0, H, G, D, window, 0, 0};
    x.workspace = device_malloc(attention_forward_workspace(&s), "attention");    // AttentionTensors x
    attention_forward(&x, &s, stream);
    x.workspace = device_malloc(attention_backward_workspace(&s), "attention");
    attention_backward(&x, &s, stream);

The algorithm is FlashAttention-2 (Dao, arXiv 2307.08691). The scores exist one tile at a time, in registers,
and the backward recomputes them from the saved log-sum-exp. Head dimensions are 32, 64 and 128
(attention_supports_head_dim).

The backward is two kernels. They have no atomics and no sums across thread blocks, so every run gives the
same bits:

    keys      a thread block owns keys; dk and dv are in registers; it reads the queries of its heads
    queries   a thread block owns queries; dq is in registers; it reads the keys and values

Together they make 7 matrix products; a single kernel would make 5. docs/results/kernels.md says why, and has
the clocks and the predicted speed.
*/
#ifndef GQA_CUH
#define GQA_CUH

#include <assert.h>
#include <math.h>
#include <type_traits>
// stream_t
#include "kernels/device.cuh"
// AttentionNoise, noise_row
#include "kernels/noise.cuh"
// tiles and their products
#include "kernels/tile.cuh"
// AttentionShape, AttentionTensors
#include "runtime/attention_shape.h"
// fail
#include "runtime/checks.h"

// Whether attention can be called with this head dimension, and with this shape.
static inline int attention_supports_head_dim(int D) { return D == 32 || D == 64 || D == 128; }
static inline int attention_supports(const AttentionShape* s) { return attention_supports_head_dim(s->D); }

static inline void attention_refuse(int D) { fail("head dimension %d: on this device 32, 64 or 128", D); }

// Calls operation(head_dim), where head_dim is D as a constant of the compiler.
//
//     for_head_dim(D, [&](auto head_dim) { attention_forward_launch<head_dim>(x, s, stream); });
template <typename Operation> static inline void for_head_dim(int D, Operation operation) {
    if (D == 32) operation(std::integral_constant<int, 32>());
    else if (D == 64) operation(std::integral_constant<int, 64>());
    else if (D == 128) operation(std::integral_constant<int, 128>());
    else attention_refuse(D);
}

static inline float attention_scale(int D) { return (float)(1 / sqrt((double)D)); }

#define LOG2_E 1.44269504f
#define LN2 0.693147181f

// ----------------------------------------------------------------------------
// Which query sees which key. In the kernels window is T for dense attention.

static __device__ __forceinline__ bool sees(int query, int key, int window) {
    return (unsigned)(query - key) < (unsigned)window;
}

// Whether any of `queries` neighbouring queries sees any of `keys` neighbouring keys, and whether all see
// all.
static __device__ __forceinline__ bool some_see(int query, int queries, int key, int keys, int window) {
    return key < query + queries && query - (key + keys - 1) < window;
}

static __device__ __forceinline__ bool all_see(int query, int queries, int key, int keys, int window) {
    return key + keys - 1 <= query && query + queries - 1 - key < window;
}

// The scores of neighbouring queries and keys that do not see each other become -INFINITY.
template <int M, int N>
__device__ __forceinline__ void hide_scores(float (&scores)[M][N][4], int query, int key, int window) {
    const int row = query + lane_of_warp() / 4, column = key + lane_of_warp() % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!sees(row + 16 * m + i / 2 * 8, column + 8 * n + i % 2, window))
                    scores[m][n][i] = -INFINITY;
}

// ----------------------------------------------------------------------------
// Forward

template <int D> struct AttentionForwardShape {
#if defined(PRECISION_BF16)
    enum { M = 2, KEYS = D <= 64 ? 64 : 48, SLOTS = 4, BLOCKS = 2 };
#else
    enum { M = 1, KEYS = 32, SLOTS = 2, BLOCKS = 1 };
#endif
    enum { IN_REGISTERS = D <= 64, WARPS = 4, THREADS = WARP * WARPS, QUERIES = 16 * M * WARPS };
    enum { SHARED_BYTES = (QUERIES + SLOTS * KEYS) * D * sizeof(floatX) };
    static_assert(SHARED_BYTES <= MOST_SHARED_BYTES, "more than sm_86 has");
};

// Adds noise to 16M rows of a warp that store_rows() has left in a tile, and writes them. The rows are still
// in shared memory, so the noise needs no additional registers. `first` is the index of the tile's first row
// in (B, T, H), and `stride` is the distance between rows.
template <int M, int D, typename Rows>
__device__ __forceinline__ void store_noised_rows(const Rows& rows, const floatX* tile, int first_row,
                                                  size_t first, int stride, const NoisedRows& noise) {
    constexpr int CHUNKS = D / CHUNK;
#pragma unroll 1
    for (int i = 0; i < 16 * M * CHUNKS / WARP; i++) {
        const unsigned chunk = i * WARP + lane_of_warp(), row = first_row + chunk / CHUNKS,
                       column = chunk % CHUNKS * CHUNK;
        const Values<CHUNK> own = load<CHUNK>(tile + tile_offset<D>(row, column));
        const Values<CHUNK> noised = noise_row<D>(own, first + (size_t)row * stride, column, noise);
        if (rows.has(row)) store(rows.at(row) + column, noised);
    }
}

// One thread block computes QUERIES rows of one head; a warp computes 16M of them. Tiles of keys and values
// share a ring of SLOTS slots: tile 2j is the j-th tile of the keys, tile 2j + 1 that of the values.
// While one tile is in use, SLOTS - 1 tiles are in flight.
template <int D>
__global__ void __launch_bounds__(AttentionForwardShape<D>::THREADS, AttentionForwardShape<D>::BLOCKS)
    attention_forward_kernel(floatX* out,        // (B, T, H, D)
                             float* lse,         // (B, H, T)
                             const floatX* qkv,  // (B, T, H + 2G, D)
                             const int* kv_of_q, // (H)
                             int T, int start, int H, int G, int window, float scale_log2, NoisedRows noise) {
    typedef AttentionForwardShape<D> shape;
    constexpr int M = shape::M, KEYS = shape::KEYS, QUERIES = shape::QUERIES, SLOTS = shape::SLOTS;
    SHARED_MEMORY(floatX, shared);
    floatX* q_tile = shared;
    floatX* ring = q_tile + QUERIES * D;

    // The last queries see the most keys. Their thread blocks start first, and the short ones fill the gaps
    // at the end.
    const int h = blockIdx.y, b = blockIdx.z, stride = (H + 2 * G) * D;
    const int first_query = start + (gridDim.x - 1 - blockIdx.x) * QUERIES;
    const int end_query = min(T, first_query + QUERIES), first_key = max(0, first_query - window + 1);
    const int tiles = 2 * ((end_query - first_key + KEYS - 1) / KEYS);
    const floatX* sequence = qkv + (size_t)b * T * stride;
    const floatX* k = sequence + (H + kv_of_q[h]) * D;
    auto load = [&](int tile) {
        if (tile < tiles)
            load_tile<KEYS, D, shape::THREADS>(
                ring + tile % SLOTS * KEYS * D,
                neighbours(k + tile % 2 * G * D, stride, first_key + tile / 2 * KEYS, T));
        cp_async_commit();
    };

    load_tile<QUERIES, D, shape::THREADS>(q_tile, neighbours(sequence + h * D, stride, first_query, T));
    for (int tile = 0; tile < SLOTS - 1; tile++) load(tile);

    const int lane = lane_of_warp(), warp_row = warp_of_block() * 16 * M;
    const int warp_query = first_query + warp_row;
    TileRows<M, D, shape::IN_REGISTERS> q;
    RunningSoftmax<M> softmax;
    float sum[M][D / 8][4], scores[M][KEYS / 8][4];
    softmax.begin();
    clear(sum);
    // A tile is complete after every thread has waited for its own copies and the barrier. After the barrier
    // no warp uses the previous tile any more, so its slot can be filled again.
    cp_async_wait<SLOTS - 2>();
    __syncthreads();
    q.take(q_tile, warp_row);
    for (int tile = 0; tile < tiles; tile += 2) {
        const int key = first_key + tile / 2 * KEYS;
        const bool some = some_see(warp_query, 16 * M, key, KEYS, window);
        load(tile + SLOTS - 1);
        if (some) multiply_transposed(scores, q, ring + tile % SLOTS * KEYS * D, 0);
        cp_async_wait<SLOTS - 2>();
        __syncthreads();

        load(tile + SLOTS);
        if (some) {
            if (!all_see(warp_query, 16 * M, key, KEYS, window)) hide_scores(scores, warp_query, key, window);
            softmax.update(scores, sum, scale_log2);
            multiply_add(sum, scores, ring + (tile + 1) % SLOTS * KEYS * D, 0);
        }
        cp_async_wait<SLOTS - 2>();
        __syncthreads();
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = warp_query + 16 * m + lane / 4 + 8 * half;
            const float total = row_total(softmax.sum[m][half]), inverse = 1 / total;
#pragma unroll
            for (int c = 0; c < D / 8; c++)
#pragma unroll
                for (int i = 0; i < 2; i++) sum[m][c][2 * half + i] *= inverse;
            if (lane % 4 == 0 && query < T)
                lse[((size_t)b * H + h) * T + query] = softmax.maximum[m][half] * LN2 + logf(total);
        }
    // The rows replace the warp's own queries, which no warp reads any more.
    const size_t of_head = (size_t)b * T * H + h;
    store_rows(neighbours(out + of_head * D, H * D, first_query, T), q_tile, warp_row, sum);
    if (noise.noised)
        store_noised_rows<M, D>(neighbours(noise.noised + of_head * D, H * D, first_query, T), q_tile,
                                warp_row, of_head + (size_t)first_query * H, H, noise);
}

// ----------------------------------------------------------------------------
// Backward

template <int D> struct AttentionBackwardKeysShape {
#if defined(PRECISION_BF16)
    enum { M = D <= 64 ? 2 : 1, WARPS = D <= 64 ? 4 : 8, QUERIES = 32, BLOCKS = D <= 64 ? 2 : 1 };
#else
    enum { M = 1, WARPS = 4, QUERIES = D <= 64 ? 32 : 16, BLOCKS = 1 };
#endif
    enum { THREADS = WARP * WARPS, KEYS = 16 * M * WARPS };
    enum { SHARED_BYTES = (2 * KEYS + 4 * QUERIES) * D * sizeof(floatX) + 2 * QUERIES * sizeof(float2) };
    static_assert(SHARED_BYTES <= MOST_SHARED_BYTES, "more than sm_86 has");
};

template <int D> struct AttentionBackwardQueriesShape {
#if defined(PRECISION_BF16)
    enum { M = 2, KEYS = D <= 64 ? 64 : 32, COLUMNS = 32, IN_REGISTERS = D <= 64, BLOCKS = 2 };
#else
    enum { M = 1, KEYS = D <= 64 ? 32 : 16, COLUMNS = 16, IN_REGISTERS = 0, BLOCKS = 1 };
#endif
    enum { WARPS = 4, THREADS = WARP * WARPS, QUERIES = 16 * M * WARPS };
    enum { SHARED_BYTES = (2 * QUERIES + 4 * KEYS) * D * sizeof(floatX) + QUERIES * sizeof(float2) };
    static_assert(SHARED_BYTES <= MOST_SHARED_BYTES, "more than sm_86 has");
};

// Statistics of a row of scores for the backward: x is its log-sum-exp in base 2, and y its delta. The
// number of rows is padded to a multiple of ATTENTION_ROWS, so that all tiles are whole. Rows beyond T are 0,
// as are their queries and gradients, so they add nothing to dk and dv.
enum { ATTENTION_ROWS = 128 };
static inline int attention_padded(int T) { return ceil_div(T, ATTENTION_ROWS) * ATTENTION_ROWS; }

// delta = sum over d of dout * out. The gradient of the softmax subtracts it from the gradient of each
// probability of the row. LANES neighbouring lanes share a row.
enum { STATISTICS_THREADS = 128 };
template <int D>
__global__ void __launch_bounds__(STATISTICS_THREADS)
    attention_statistics_kernel(float2* statistics, // (B, H, padded)
                                const floatX* dout, // (B, T, H, D)
                                const floatX* out,  // (B, T, H, D)
                                const float* lse,   // (B, H, T)
                                int T, int padded, int H) {
    constexpr int LANES = D / CHUNK;
    const int t = (blockIdx.x * STATISTICS_THREADS + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
    const int h = blockIdx.y, b = blockIdx.z;
    float delta = 0;
    if (t < T) {
        const size_t at = (((size_t)b * T + t) * H + h) * D + lane * CHUNK;
        const uint4 gradient_bits = *(const uint4*)(dout + at), output_bits = *(const uint4*)(out + at);
        floatX gradient[CHUNK], output[CHUNK];
        memcpy(gradient, &gradient_bits, 16);
        memcpy(output, &output_bits, 16);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) delta += (float)gradient[i] * (float)output[i];
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        delta += __shfl_xor_sync(ALL_LANES, delta, distance);
    if (lane == 0)
        statistics[((size_t)b * H + h) * padded + t] =
            t < T ? make_float2(lse[((size_t)b * H + h) * T + t] * LOG2_E, delta) : make_float2(0, 0);
}

// Counts the query heads that read a KV head below g. This is the index of the first query head that reads g,
// as kv_of_q is non-decreasing. Every warp counts. The shuffle shows the compiler that all lanes have the
// same number, so that values derived from it take no registers of every thread.
static __device__ __forceinline__ int count_heads_below(int g, const int* kv_of_q, int H) {
    int heads = 0;
    for (int h = 0; h < H; h += WARP) {
        const int kv = h + (int)lane_of_warp() < H ? kv_of_q[h + lane_of_warp()] : g;
        heads += __popc(__ballot_sync(ALL_LANES, kv < g));
    }
    return __shfl_sync(ALL_LANES, heads, 0);
}

// One thread block computes dk and dv of KEYS keys of one KV head. It visits this head's query heads in order,
// and only tiles with queries that see these keys. One warp computes 16 x M of the keys. The scores are transposed
// (keys are rows, queries are columns), so that probabilities and gradients of scores are the left operands of
// the next products. Tiles of queries, with their gradients and statistics, are loaded one tile ahead. A KV head
// that no query head reads gets zeros.
template <int D>
__global__ void __launch_bounds__(AttentionBackwardKeysShape<D>::THREADS,
                                  AttentionBackwardKeysShape<D>::BLOCKS)
    attention_backward_keys_kernel(floatX* dqkv,             // (B, T, H + 2G, D)
                                   const floatX* dout,       // (B, T, H, D)
                                   const floatX* qkv,        // (B, T, H + 2G, D)
                                   const float2* statistics, // (B, H, padded)
                                   const int* kv_of_q,       // (H)
                                   int T, int padded, int H, int G, int window, float scale) {
    typedef AttentionBackwardKeysShape<D> shape;
    constexpr int M = shape::M, KEYS = shape::KEYS, QUERIES = shape::QUERIES;
    constexpr int TILE = QUERIES * D;
    SHARED_MEMORY(floatX, shared);
    floatX* k_tile = shared;
    floatX* v_tile = k_tile + KEYS * D;
    floatX* ring = v_tile + KEYS * D;               // two slots, of queries and their gradients
    float2* rows_ring = (float2*)(ring + 4 * TILE); // two slots

    const int g = blockIdx.y, b = blockIdx.z, stride = (H + 2 * G) * D, lane = lane_of_warp();
    const int first_head = count_heads_below(g, kv_of_q, H), end_head = count_heads_below(g + 1, kv_of_q, H);

    // The first query that sees any of these keys is the one of the first key's token.
    const int first_key = blockIdx.x * KEYS, end_query = min(T, min(T, first_key + KEYS) - 1 + window);
    const size_t sequence = (size_t)b * T * stride, of_group = sequence + (H + g) * D;
    auto load = [&](int slot, int h, int query) {
        floatX* q_tile = ring + slot * 2 * TILE;
        const float2* of_rows = statistics + ((size_t)b * H + h) * padded + query;
        load_tile<QUERIES, D, shape::THREADS>(q_tile, neighbours(qkv + sequence + h * D, stride, query, T));
        load_tile<QUERIES, D, shape::THREADS>(
            q_tile + TILE, neighbours(dout + ((size_t)b * T * H + h) * D, H * D, query, T));
        if (threadIdx.x < QUERIES / 2)
            cp_async16(rows_ring + slot * QUERIES + 2 * threadIdx.x, of_rows + 2 * threadIdx.x, true);
        cp_async_commit();
    };

    const int warp_row = warp_of_block() * 16 * M, warp_key = first_key + warp_row;
    const float scale_log2 = scale * LOG2_E;
    TileRows<M, D, false> k, v;
    float dk[M][D / 8][4], dv[M][D / 8][4];
    clear(dk);
    clear(dv);
    if (first_head < end_head) {
        load_tile<KEYS, D, shape::THREADS>(k_tile, neighbours(qkv + of_group, stride, first_key, T));
        load_tile<KEYS, D, shape::THREADS>(v_tile, neighbours(qkv + of_group + G * D, stride, first_key, T));
        load(0, first_head, first_key);
    }
    cp_async_wait<0>();
    __syncthreads();
    k.take(k_tile, warp_row), v.take(v_tile, warp_row);
    int slot = 0, query = first_key;
    for (int h = first_head; h < end_head; slot = 1 - slot) {
        const bool same_head = query + QUERIES < end_query;
        if (same_head || h + 1 < end_head)
            load(1 - slot, same_head ? h : h + 1, same_head ? query + QUERIES : first_key);
        const floatX* q_tile = ring + slot * 2 * TILE;
        const floatX* dout_tile = q_tile + TILE;
        if (some_see(query, QUERIES, warp_key, 16 * M, window)) {
            const bool all = all_see(query, QUERIES, warp_key, 16 * M, window);
            const float4* rows = (const float4*)(rows_ring + slot * QUERIES);
            float probs[M][QUERIES / 8][4], dscores[M][QUERIES / 8][4];
            multiply_transposed(probs, k, q_tile, 0);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const float4 pair = rows[n * 4 + lane % 4]; // of the two columns of this lane
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        probs[m][n][i] = exp2_approximate(
                            fmaf(probs[m][n][i], scale_log2, -(i % 2 == 0 ? pair.x : pair.z)));
                        if (!all && !sees(query + 8 * n + lane % 4 * 2 + i % 2,
                                          warp_key + 16 * m + lane / 4 + i / 2 * 8, window))
                            probs[m][n][i] = 0;
                    }
            }
            multiply_add(dv, probs, dout_tile, 0);
            multiply_transposed(dscores, v, dout_tile, 0);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const float4 pair = rows[n * 4 + lane % 4];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        dscores[m][n][i] =
                            probs[m][n][i] * (dscores[m][n][i] - (i % 2 == 0 ? pair.y : pair.w));
            }
            multiply_add(dk, dscores, q_tile, 0);
        }
        query += QUERIES;
        if (query >= end_query) h++, query = first_key;
        cp_async_wait<0>();
        __syncthreads();
    }

    // The rows replace the warp's own keys and values, which no warp reads any more.
    scale_rows(dk, scale);
    store_rows(neighbours(dqkv + of_group, stride, first_key, T), k_tile, warp_row, dk);
    store_rows(neighbours(dqkv + of_group + G * D, stride, first_key, T), v_tile, warp_row, dv);
}

// One thread block computes dq of QUERIES queries of one head, from all the keys that they see. A warp
// computes 16M queries. Tiles of keys and values are loaded one tile ahead.
template <int D>
__global__ void __launch_bounds__(AttentionBackwardQueriesShape<D>::THREADS,
                                  AttentionBackwardQueriesShape<D>::BLOCKS)
    attention_backward_queries_kernel(floatX* dqkv,             // (B, T, H + 2G, D)
                                      const floatX* dout,       // (B, T, H, D)
                                      const floatX* qkv,        // (B, T, H + 2G, D)
                                      const float2* statistics, // (B, H, padded)
                                      const int* kv_of_q,       // (H)
                                      int T, int padded, int H, int G, int window, float scale) {
    typedef AttentionBackwardQueriesShape<D> shape;
    constexpr int M = shape::M, KEYS = shape::KEYS, QUERIES = shape::QUERIES, COLUMNS = shape::COLUMNS;
    constexpr int TILE = KEYS * D;
    SHARED_MEMORY(floatX, shared);
    floatX* q_tile = shared;
    floatX* dout_tile = q_tile + QUERIES * D;
    floatX* ring = dout_tile + QUERIES * D;    // two slots, of keys and values
    float2* rows = (float2*)(ring + 4 * TILE); // (QUERIES)

    const int h = blockIdx.y, b = blockIdx.z, stride = (H + 2 * G) * D, lane = lane_of_warp();
    const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES; // long blocks first
    const int first_key = max(0, first_query - window + 1);
    const int end_key = min(T, first_query + QUERIES);
    const size_t sequence = (size_t)b * T * stride;
    const floatX* k = qkv + sequence + (H + kv_of_q[h]) * D;
    auto load = [&](int slot, int key) {
        floatX* k_tile = ring + slot * 2 * TILE;
        load_tile<KEYS, D, shape::THREADS>(k_tile, neighbours(k, stride, key, T));
        load_tile<KEYS, D, shape::THREADS>(k_tile + TILE, neighbours(k + G * D, stride, key, T));
        cp_async_commit();
    };

    load_tile<QUERIES, D, shape::THREADS>(q_tile, neighbours(qkv + sequence + h * D, stride, first_query, T));
    load_tile<QUERIES, D, shape::THREADS>(
        dout_tile, neighbours(dout + ((size_t)b * T * H + h) * D, H * D, first_query, T));
    if (threadIdx.x < QUERIES / 2)
        cp_async16(rows + 2 * threadIdx.x,
                   statistics + ((size_t)b * H + h) * padded + first_query + 2 * threadIdx.x, true);
    load(0, first_key);

    const int warp_row = warp_of_block() * 16 * M, warp_query = first_query + warp_row;
    const float scale_log2 = scale * LOG2_E;
    TileRows<M, D, shape::IN_REGISTERS> q, gradient;
    float dq[M][D / 8][4];
    clear(dq);
    cp_async_wait<0>();
    __syncthreads();
    q.take(q_tile, warp_row), gradient.take(dout_tile, warp_row);
    int slot = 0;
    for (int tile_key = first_key; tile_key < end_key; tile_key += KEYS, slot = 1 - slot) {
        if (tile_key + KEYS < end_key) load(1 - slot, tile_key + KEYS);
        const floatX* k_tile = ring + slot * 2 * TILE;
        const floatX* v_tile = k_tile + TILE;
#pragma unroll 1
        for (int column = 0; column < KEYS; column += COLUMNS) {
            const int key = tile_key + column;
            if (!some_see(warp_query, 16 * M, key, COLUMNS, window)) continue;
            const bool all = all_see(warp_query, 16 * M, key, COLUMNS, window);
            float scores[M][COLUMNS / 8][4], dscores[M][COLUMNS / 8][4];
            multiply_transposed(scores, q, k_tile, column);
            multiply_transposed(dscores, gradient, v_tile, column);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = warp_row + 16 * m + 8 * half + lane / 4;
                    const float2 of_row = rows[row];
#pragma unroll
                    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float* dscore = &dscores[m][n][2 * half + i];
                            const float score = scores[m][n][2 * half + i];
                            *dscore =
                                exp2_approximate(fmaf(score, scale_log2, -of_row.x)) * (*dscore - of_row.y);
                            if (!all && !sees(first_query + row, key + 8 * n + lane % 4 * 2 + i, window))
                                *dscore = 0;
                        }
                }
            multiply_add(dq, dscores, k_tile, column);
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    // The rows replace the warp's own queries, which no warp reads any more.
    scale_rows(dq, scale);
    store_rows(neighbours(dqkv + sequence + h * D, stride, first_query, T), q_tile, warp_row, dq);
}

// ----------------------------------------------------------------------------
// The operations

static inline dim3 attention_grid(int rows, int rows_of_block, int heads, int B) {
    return dim3(ceil_div(rows, rows_of_block), heads, B);
}

// The window of the kernels: T if the shape's window is 0 (dense) or at least T.
static inline int attention_window(const AttentionShape* s) {
    return s->window > 0 && s->window < s->T ? s->window : s->T;
}

template <int D>
static inline void attention_forward_launch(const AttentionTensors* x, const AttentionShape* s,
                                            stream_t stream) {
    typedef AttentionForwardShape<D> shape;
    launch(attention_forward_kernel<D>, attention_grid(s->T - s->start, shape::QUERIES, s->H, s->B),
           shape::THREADS, shape::SHARED_BYTES, stream, x->out, x->lse, x->qkv, x->kv_of_q, s->T, s->start,
           s->H, s->G, attention_window(s), attention_scale(D) * LOG2_E, noised_rows(x->noise, s->T, s->H));
}

// Launches the kernel that computes the statistics of all rows, which every backward pass reads.
template <int D>
static inline void attention_statistics_launch(float2* statistics, // (B, H, attention_padded(T))
                                               const AttentionTensors* x, const AttentionShape* s,
                                               stream_t stream) {
    const int padded = attention_padded(s->T);
    launch(attention_statistics_kernel<D>,
           attention_grid(padded, STATISTICS_THREADS / (D / CHUNK), s->H, s->B), STATISTICS_THREADS, 0,
           stream, statistics, x->dout, x->out, x->lse, s->T, padded, s->H);
}

template <int D>
static inline void attention_backward_launch(const AttentionTensors* x, const AttentionShape* s,
                                             stream_t stream) {
    typedef AttentionBackwardKeysShape<D> keys;
    typedef AttentionBackwardQueriesShape<D> queries;
    float2* statistics = (float2*)x->workspace;
    const int T = s->T, H = s->H, padded = attention_padded(T), window = attention_window(s);
    const float scale = attention_scale(D);
    attention_statistics_launch<D>(statistics, x, s, stream);
    launch(attention_backward_keys_kernel<D>, attention_grid(T, keys::KEYS, s->G, s->B), keys::THREADS,
           keys::SHARED_BYTES, stream, x->dqkv, x->dout, x->qkv, statistics, x->kv_of_q, T, padded, H, s->G,
           window, scale);
    launch(attention_backward_queries_kernel<D>, attention_grid(T, queries::QUERIES, H, s->B),
           queries::THREADS, queries::SHARED_BYTES, stream, x->dqkv, x->dout, x->qkv, statistics, x->kv_of_q,
           T, padded, H, s->G, window, scale);
}

// Bytes of the workspaces. The forward needs none.
static inline size_t attention_forward_workspace(const AttentionShape* s) {
    (void)s;
    return 0;
}

static inline size_t attention_backward_workspace(const AttentionShape* s) {
    return (size_t)s->B * s->H * attention_padded(s->T) * sizeof(float2);
}

// Reads kv_of_q and, of qkv, the queries of the rows start..T-1 and all keys and values. Writes these rows of
// out and lse, and of noise->noised unless noise is NULL. It needs no workspace.
static inline void attention_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    for_head_dim(s->D, [&](auto head_dim) { attention_forward_launch<head_dim>(x, s, stream); });
}

// Reads dout, out, lse, qkv and kv_of_q. Writes every element of dqkv. start must be 0.
static inline void attention_backward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    assert(s->start == 0);
    for_head_dim(s->D, [&](auto head_dim) { attention_backward_launch<head_dim>(x, s, stream); });
}

#endif
