/*
Causal attention, dense or in a sliding window, of H query heads over G key/value heads through any map (MATH.md
sections 1 and 4): the CPU twin of dev/cuda/gqa.cuh.

    attention_forward(out, lse, qkv, kv_of_q, B, T, 0, H, G, D, window, stream);
    void* workspace = device_malloc(attention_backward_workspace(B, T, H, G, D), "attention");
    attention_backward(dqkv, dout, out, lse, qkv, kv_of_q, workspace, B, T, H, G, D, window, stream);

One row of qkv holds a token's H query heads, then its G key heads, then its G value heads. window = 0 sees the whole
past, window = W the keys t-W+1..t. The T x T scores exist one tile at a time: the forward keeps a running maximum and
sum of every row (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135), the backward
computes the probabilities again from the saved log-sum-exp. The matrix products are gemm() of matmul.h on tiles.

Results are the same bits for any number of threads: what a tile adds up, and in which order, does not depend on
who computes it.
*/
#ifndef DEV_CPU_GQA_H
#define DEV_CPU_GQA_H

#include <assert.h>
// gemm
#include "dev/cpu/matmul.h"
// exp_fast
#include "dev/cpu/math.h"

// Tile sizes, in rows (queries) and columns (keys) of the score matrix.
enum { ATTENTION_QUERIES = 128, ATTENTION_KEYS = 128 };

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }

static inline floatX attention_scale(int D) { return (floatX)(1.0 / sqrt((double)D)); }

// The keys that query t sees are first_visible_key(t, window)..t.
static inline int first_visible_key(int t, int window) { return window > 0 ? max_int(0, t - window + 1) : 0; }

// One past the last query that sees key t, where T tokens exist.
static inline int end_visible_query(int t, int window, int T) {
    return window > 0 && window < T - t ? t + window : T;
}

// ----------------------------------------------------------------------------
// Pieces that work on one tile; also for callers that gather queries instead of taking neighbours

// The columns begin..end-1 of row `query` of a tile whose first column is key first_key; empty where begin >= end.
static inline void visible_columns(int* begin, int* end, int query, int first_key, int keys, int window) {
    *begin = max_int(0, first_visible_key(query, window) - first_key);
    *end = min_int(keys, query - first_key + 1);
}

// Takes one row of raw scores into a running softmax: the row becomes exp(scale * score - row_max), 0 outside
// begin..end-1. What was summed with the old maximum has to be multiplied by the value returned.
static inline floatX softmax_row_update(floatX* row, float_acc* row_max, float_acc* row_sum, int begin, int end,
                                        int keys, floatX scale) {
    for (int k = 0; k < begin && k < keys; k++) row[k] = 0;
    for (int k = max_int(end, 0); k < keys; k++) row[k] = 0;
    if (begin >= end) return 1;
    floatX largest = row[begin];
#pragma omp simd reduction(max : largest)
    for (int k = begin; k < end; k++) largest = row[k] > largest ? row[k] : largest;
    floatX new_max = scale * largest > *row_max ? scale * largest : *row_max;
    floatX correction = exp_fast(*row_max - new_max);
    float_acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int k = begin; k < end; k++) {
        row[k] = exp_fast(row[k] * scale - new_max);
        sum += row[k];
    }
    *row_sum = *row_sum * correction + sum;
    *row_max = new_max;
    return correction;
}

static inline void scale_row(floatX* row, floatX factor, int D) {
    for (int d = 0; d < D; d++) row[d] *= factor;
}

// One step of the online softmax: takes `keys` keys and values from first_key on into the unnormalised output of
// `rows` neighbouring queries. The first step of a row (is_first) overwrites out.
static inline void attention_tile_forward(floatX* out,        // (rows, D), stride out_stride
                                          float_acc* row_max, // (rows)
                                          float_acc* row_sum, // (rows)
                                          floatX* scores,     // (rows, keys) scratch
                                          const floatX* q,    // (rows, D), stride qkv_stride
                                          const floatX* k,    // (keys, D), stride qkv_stride
                                          const floatX* v,    // (keys, D), stride qkv_stride
                                          int is_first, int first_query, int rows, int first_key, int keys,
                                          int D, int out_stride, int qkv_stride, int window) {
    gemm(0, 1, rows, keys, D, q, qkv_stride, k, qkv_stride, 0, scores, keys);
    for (int r = 0; r < rows; r++) {
        int begin, end;
        visible_columns(&begin, &end, first_query + r, first_key, keys, window);
        floatX correction = softmax_row_update(scores + (size_t)r * keys, &row_max[r], &row_sum[r], begin, end,
                                               keys, attention_scale(D));
        if (!is_first && correction != 1) scale_row(out + (size_t)r * out_stride, correction, D);
    }
    gemm(0, 0, rows, D, keys, scores, keys, v, qkv_stride, !is_first, out, out_stride);
}

// ----------------------------------------------------------------------------
// Forward

// All keys of one tile of queries of one head.
static inline void attention_rows_forward(floatX* out,     // (rows, D), stride out_stride
                                          float_acc* lse,  // (rows)
                                          const floatX* q, // (rows, D), stride qkv_stride
                                          const floatX* k, // (T, D), stride qkv_stride: from token 0
                                          const floatX* v, // (T, D), stride qkv_stride
                                          int first_query, int rows, int D, int out_stride, int qkv_stride,
                                          int window) {
    floatX scores[ATTENTION_QUERIES * ATTENTION_KEYS];
    float_acc row_max[ATTENTION_QUERIES], row_sum[ATTENTION_QUERIES];
    for (int r = 0; r < rows; r++) {
        row_max[r] = -INFINITY;
        row_sum[r] = 0;
    }
    int begin = first_visible_key(first_query, window), end = first_query + rows;
    for (int key = begin; key < end; key += ATTENTION_KEYS) {
        attention_tile_forward(out, row_max, row_sum, scores, q, k + (size_t)key * qkv_stride,
                               v + (size_t)key * qkv_stride, key == begin, first_query, rows, key,
                               min_int(ATTENTION_KEYS, end - key), D, out_stride, qkv_stride, window);
    }
    for (int r = 0; r < rows; r++) {
        scale_row(out + (size_t)r * out_stride, 1 / row_sum[r], D);
        lse[r] = row_max[r] + log(row_sum[r]);
    }
}

// Rows start..T-1 of out and lse, given queries of these rows and keys and values of all; start > 0 continues a
// sequence whose earlier keys and values are in qkv already.
static inline void attention_forward(floatX* out,        // (B, T, H, D)
                                     float_acc* lse,     // (B, H, T) natural log of the sum of exp(scaled scores)
                                     const floatX* qkv,  // (B, T, H + 2G, D)
                                     const int* kv_of_q, // (H) non-decreasing
                                     int B, int T, int start, int H, int G, int D, int window, stream_t stream) {
    (void)stream;
    const int row_stride = (H + 2 * G) * D;
    const int tiles = (T - start + ATTENTION_QUERIES - 1) / ATTENTION_QUERIES;
    // The last queries see the most keys: long tasks first, short ones fill the gaps.
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int i = 0; i < tiles; i++) {
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < H; h++) {
                int t = start + (tiles - 1 - i) * ATTENTION_QUERIES;
                const floatX* sequence = qkv + (size_t)b * T * row_stride;
                const floatX* k = sequence + (size_t)(H + kv_of_q[h]) * D;
                assert(kv_of_q[h] >= 0 && kv_of_q[h] < G && (h == 0 || kv_of_q[h - 1] <= kv_of_q[h]));
                attention_rows_forward(out + (((size_t)b * T + t) * H + h) * D, lse + ((size_t)b * H + h) * T + t,
                                       sequence + (size_t)t * row_stride + (size_t)h * D, k, k + (size_t)G * D, t,
                                       min_int(ATTENTION_QUERIES, T - t), D, H * D, row_stride, window);
            }
        }
    }
}

#endif
