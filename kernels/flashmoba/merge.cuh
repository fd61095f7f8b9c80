/*
The merges of flashmoba. Each adds up the results of work items.

    flashmoba_merge_kernel            partial rows of output, by their log-sum-exp -> out, lse
    flashmoba_merge_keys_kernel       sums of dK and dV -> dqkv
    flashmoba_merge_queries_kernel    partial rows of dQ -> dqkv

    launch(flashmoba_merge_queries_kernel<D>, flashmoba_merge_grid<D>(rows, heads, 1),
           FLASHMOBA_MERGE_THREADS, 0, stream, dqkv, partial_dq, *x);

Neighbouring lanes share a row, and each of them has 16 bytes of it. Every sum has a fixed order.
*/
#ifndef KERNELS_FLASHMOBA_MERGE_CUH
#define KERNELS_FLASHMOBA_MERGE_CUH

// NoisedRows, noise_row
#include "kernels/noise.cuh"
// FlashmobaSums, the order of partial rows
#include "kernels/flashmoba/sums.cuh"
// load, store
#include "kernels/vector.cuh"

enum { FLASHMOBA_MERGE_THREADS = 128 };

// Grid of the merges: one thread for every 16 bytes of `rows` rows.
template <int D> static inline dim3 flashmoba_merge_grid(int rows, int heads, int sequences) {
    return dim3((unsigned)ceil_div(rows, FLASHMOBA_MERGE_THREADS / (D / CHUNK)), (unsigned)heads,
                (unsigned)sequences);
}

// Number of choices of a query, including its own block.
static __device__ __forceinline__ int flashmoba_count_choices(const FlashmobaLists& x, int head, int t) {
    int count = 1;
    while (count < x.K && flashmoba_choice(x, head, t, count) >= 0) count++;
    return count;
}

// Merges the partial rows of a query by their log-sum-exp, in the order of its choices, and adds pgqa's noise
// if NOISY. LANES neighbouring lanes share a query, and each lane has 16 bytes of its row. The noise needs
// all lanes of a warp, so lanes beyond the last query repeat it and store nothing. NOISY is a variant because
// the noise takes ten registers more.
template <int D, bool NOISY>
__global__ void __launch_bounds__(FLASHMOBA_MERGE_THREADS)
    flashmoba_merge_kernel(floatX* out, // (B, T, H, D)
                           float* lse,  // (B, H, T)
                           const floatX* partial_out, const float* partial_lse, FlashmobaLists x,
                           NoisedRows noise) {
    constexpr int LANES = D / CHUNK;
    const int query = x.start + (blockIdx.x * FLASHMOBA_MERGE_THREADS + threadIdx.x) / LANES,
              head = blockIdx.y;
    const int t = NOISY ? min(query, x.end - 1) : query, column = threadIdx.x % LANES * CHUNK;
    if (t >= x.end) return;
    const int rows = flashmoba_count_choices(x, head, t) * x.parts;
    const size_t first = flashmoba_first_partial(x, head, t);
    float maximum = -INFINITY, total = 0;
    for (int i = 0; i < rows; i++) maximum = fmaxf(maximum, partial_lse[first + i]);
    Values<CHUNK> sum = {};
    for (int i = 0; i < rows; i++) {
        const Values<CHUNK> row = load<CHUNK>(partial_out + (first + i) * D + column);
        const float weight = exp2f(partial_lse[first + i] - maximum);
        total += weight;
        for (int c = 0; c < CHUNK; c++) sum.at[c] += weight * row.at[c];
    }
    for (int c = 0; c < CHUNK; c++) sum.at[c] /= total;
    const size_t row = ((size_t)flashmoba_sequence(x, head) * x.T + t) * x.H + flashmoba_head(x, head);
    if (query < x.end) store(out + row * D + column, sum);
    if (query < x.end && column == 0) lse[flashmoba_rows(x, head) + t] = (maximum + log2f(total)) * LN2;
    if constexpr (NOISY) {
        for (int c = 0; c < CHUNK; c++) sum.at[c] = rounded(sum.at[c]);
        const Values<CHUNK> noised = noise_row<D>(sum, row, column, noise);
        if (query < x.end) store(noise.noised + row * D + column, noised);
    }
}

// Adds up the gradients of keys (which = 0) and values (1) over the heads of the group, in order. LANES
// neighbouring lanes share a key. If the next group continues the last KV head, its sum becomes the
// carry-over, in the sums of the group's first head. A KV head that no query head reads gets zeros while the
// next query head, or the last one, is handled.
template <int D>
__global__ void __launch_bounds__(FLASHMOBA_MERGE_THREADS)
    flashmoba_merge_keys_kernel(floatX* dqkv, // (B, T, H + 2G, D)
                                FlashmobaSums sums, FlashmobaLists x, float scale) {
    constexpr int LANES = D / CHUNK;
    const int key = (blockIdx.x * FLASHMOBA_MERGE_THREADS + threadIdx.x) / LANES, which = blockIdx.y;
    const int column = threadIdx.x % LANES * CHUNK, first_head = blockIdx.z * x.heads;
    if (key >= x.T) return;
    const int block = key / x.S, part = key % x.S / x.keys, row = key % x.S % x.keys;
    const size_t of_key = ((size_t)which * x.T + key) * D + column, of_head = (size_t)2 * x.T * D;
    floatX* to = dqkv + (((size_t)x.first_sequence + blockIdx.z) * x.T + key) * (x.H + 2 * x.G) * D +
                 (x.H + which * x.G) * D + column;
    const bool carries_over = flashmoba_carries_over(x);
    Values<CHUNK> sum = {};
    for (int head = first_head; head < first_head + x.heads; head++) {
        const int h = flashmoba_head(x, head), g = x.kv_of_q[h],
                  next_g = h + 1 < x.H ? x.kv_of_q[h + 1] : x.G;
        for (int empty = h > 0 ? x.kv_of_q[h - 1] + 1 : 0; empty < g; empty++)
            store(to + empty * D, Values<CHUNK>{});
        for (int empty = g + 1; h + 1 == x.H && empty < x.G; empty++) store(to + empty * D, Values<CHUNK>{});
        const int begin = flashmoba_more_before(x, head, block),
                  end = flashmoba_more_before(x, head, block + 1);
        if (carries_over && x.heads == 1 && begin == end) return; // the sums are the carry-over already
        if (flashmoba_is_whole(x, head, block)) continue;
        if (h == 0 || x.kv_of_q[h - 1] < g) sum = {};
        const Values<CHUNK> first = load<CHUNK>(sums.of_heads + head * of_head + of_key);
        for (int c = 0; c < CHUNK; c++) sum.at[c] += first.at[c];
        for (int i = begin; i < end; i++) {
            const size_t number = (((size_t)head * x.max_more + i) * x.parts + part) * 2 + which;
            const Values<CHUNK> more = load<CHUNK>(sums.more + (number * x.keys + row) * D + column);
            for (int c = 0; c < CHUNK; c++) sum.at[c] += more.at[c];
        }
        if (next_g == g || x.end < x.T) continue;
        for (int c = 0; c < CHUNK; c++) sum.at[c] *= which == 0 ? scale : 1;
        store(to + g * D, sum);
    }
    if (carries_over) store(sums.of_heads + first_head * of_head + of_key, sum);
}

// Adds up the partial rows of dQ of a query, in the order of its choices.
template <int D>
__global__ void __launch_bounds__(FLASHMOBA_MERGE_THREADS)
    flashmoba_merge_queries_kernel(floatX* dqkv, // (B, T, H + 2G, D)
                                   const floatX* partial_dq, FlashmobaLists x) {
    constexpr int LANES = D / CHUNK;
    const int t = x.start + (blockIdx.x * FLASHMOBA_MERGE_THREADS + threadIdx.x) / LANES, head = blockIdx.y;
    const int column = threadIdx.x % LANES * CHUNK;
    if (t >= x.end) return;
    const int rows = flashmoba_count_choices(x, head, t) * x.parts;
    const floatX* first = partial_dq + flashmoba_first_partial(x, head, t) * D + column;
    Values<CHUNK> sum = {};
    for (int i = 0; i < rows; i++) {
        const Values<CHUNK> row = load<CHUNK>(first + (size_t)i * D);
        for (int c = 0; c < CHUNK; c++) sum.at[c] += row.at[c];
    }
    const size_t token = (size_t)flashmoba_sequence(x, head) * x.T + t;
    store(dqkv + (token * (x.H + 2 * x.G) + flashmoba_head(x, head)) * D + column, sum);
}

#endif
