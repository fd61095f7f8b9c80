/*
Causal attention, dense or in a sliding window, of H query heads to G KV heads through any map
(docs/math.md sections 1 and 3).

    const AttentionShape s = {B, T, 0, H, G, D, window, 0, 0};
    x.workspace = device_malloc(attention_forward_workspace(&s), "attention");    // AttentionTensors x
    attention_forward(&x, &s, stream);
    x.workspace = device_malloc(attention_backward_workspace(&s), "attention");
    attention_backward(&x, &s, stream);

One row of qkv holds a token's H query heads, then its G key heads, then its G value heads. With window = 0
the query at t sees all keys 0..t, with window = W the keys t-W+1..t. Only one tile of the T x T scores exists
at a time. The forward pass keeps a running maximum and sum of every row (Milakov and Gimelshein, arXiv
1805.02867; Dao et al., FlashAttention, arXiv 2205.14135). The backward pass computes the probabilities again
from the saved lse. The matrix products are gemm() of matmul.h on tiles.

The results have the same bits for any number of threads: each product runs on one thread, and neither its
shape nor the order of the sums depends on the thread.
*/
#ifndef DEV_CPU_GQA_H
#define DEV_CPU_GQA_H

#include <assert.h>
// gemm
#include "dev/cpu/matmul.h"
// attention_noise
#include "dev/cpu/noise.h"
// exp_fast
#include "dev/cpu/math.h"
// AttentionShape, AttentionTensors
#include "runtime/attention_shape.h"

// Tiles of the score matrix: rows (queries) by columns (keys). At 64 x 192 the products of a tile, with one
// operand transposed beforehand, run at about 95 % of the speed of large products; narrower tiles are slower
// because of the overhead of a call, and taller tiles compute more scores that the mask discards.
enum { ATTENTION_QUERIES = 64, ATTENTION_KEYS = 192 };
// Rows of one head that are one parallel task; they share the transposed keys. A multiple of both numbers
// above. Twice as many rows are 2 % faster on few cores, but leave half of the cores idle on machines with
// many.
enum { ATTENTION_TASK = 192 };
// With fewer queries than this (generation) transposing the keys costs more than it saves.
enum { ATTENTION_FEW_QUERIES = 32 };

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }

// Whether attention supports this head dimension, and this shape; the CPU supports all.
static inline int attention_supports_head_dim(int D) { return D > 0; }
static inline int attention_supports(const AttentionShape* s) { return attention_supports_head_dim(s->D); }

static inline floatX attention_scale(int D) { return (floatX)(1.0 / sqrt((double)D)); }

// The keys that query t sees are first_visible_key(t, window)..t.
static inline int first_visible_key(int t, int window) { return window > 0 ? max_int(0, t - window + 1) : 0; }

// One past the last query that sees key t, in a sequence of T tokens.
static inline int end_visible_query(int t, int window, int T) {
    return window > 0 && window < T - t ? t + window : T;
}

// ----------------------------------------------------------------------------
// Functions that work on one tile; moba.h also calls some of them, for gathered queries

// The columns begin..end-1 of row `query` of a tile whose first column is key first_key; empty where begin >= end.
static inline void visible_columns(int* begin, int* end, int query, int first_key, int keys, int window) {
    *begin = max_int(0, first_visible_key(query, window) - first_key);
    *end = min_int(keys, query - first_key + 1);
}

static inline void transpose_tile(floatX* out,       // (columns, out_stride)
                                  const floatX* inp, // (rows, columns), stride inp_stride
                                  int rows, int columns, int out_stride, int inp_stride) {
    // A few rows at a time: at the strides of qkv, more rows would compete for too few sets of the cache.
    for (int first = 0; first < rows; first += 16) {
        const int end = min_int(rows, first + 16);
        for (int c = 0; c < columns; c++)
            for (int r = first; r < end; r++)
                out[(size_t)c * out_stride + r] = inp[(size_t)r * inp_stride + c];
    }
}

// Adds one row of raw scores to a running softmax: the row becomes exp(scale * score - row_max), 0 outside
// begin..end-1. The caller must multiply earlier sums, which used the old maximum, by the value returned.
static inline floatX softmax_row_update(floatX* row, float_acc* row_max, float_acc* row_sum, int begin,
                                        int end, int keys, floatX scale) {
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

// Turns one row of raw scores into probabilities, and the gradient of the probabilities into that of the raw
// scores.
static inline void softmax_row_backward(floatX* probs,   // (keys) in: raw scores
                                        floatX* dscores, // (keys) in: gradient of the probabilities
                                        float_acc lse, float_acc delta, int begin, int end, int keys,
                                        floatX scale) {
    for (int k = 0; k < begin && k < keys; k++) probs[k] = dscores[k] = 0;
    for (int k = max_int(end, 0); k < keys; k++) probs[k] = dscores[k] = 0;
#pragma omp simd
    for (int k = begin; k < end; k++) {
        probs[k] = exp_fast(probs[k] * scale - lse);
        dscores[k] = probs[k] * (dscores[k] - delta) * scale;
    }
}

static inline void scale_row(floatX* row, floatX factor, int D) {
    for (int d = 0; d < D; d++) row[d] *= factor;
}

// One step of the online softmax: adds `keys` keys and values from first_key on to the unnormalised output of
// `rows` neighbouring queries. The first step of a row (is_first) overwrites out. With many rows the product
// with the transposed keys is faster; k_t may be NULL.
static inline void
attention_tile_forward(floatX* out,        // (rows, D), stride out_stride
                       float_acc* row_max, // (rows)
                       float_acc* row_sum, // (rows)
                       floatX* scores,     // (rows, keys) scratch
                       const floatX* q,    // (rows, D), stride qkv_stride
                       const floatX* k,    // (keys, D), stride qkv_stride
                       const floatX* k_t,  // (D, ATTENTION_KEYS) columns 0..keys-1: k transposed
                       const floatX* v,    // (keys, D), stride qkv_stride
                       int is_first, int first_query, int rows, int first_key, int keys, int D,
                       int out_stride, int qkv_stride, int window) {
    if (k_t) gemm(0, 0, rows, keys, D, q, qkv_stride, k_t, ATTENTION_KEYS, 0, scores, keys);
    if (!k_t) gemm(0, 1, rows, keys, D, q, qkv_stride, k, qkv_stride, 0, scores, keys);
    for (int r = 0; r < rows; r++) {
        int begin, end;
        visible_columns(&begin, &end, first_query + r, first_key, keys, window);
        floatX correction = softmax_row_update(scores + (size_t)r * keys, &row_max[r], &row_sum[r], begin,
                                               end, keys, attention_scale(D));
        if (!is_first && correction != 1) scale_row(out + (size_t)r * out_stride, correction, D);
    }
    gemm(0, 0, rows, D, keys, scores, keys, v, qkv_stride, !is_first, out, out_stride);
}

// One tile of the backward pass: `rows` neighbouring queries and `keys` keys. Adds to dq, dk and dv. Either
// dq may be NULL, or dk and dv.
static inline void
attention_tile_backward(floatX* dq,             // (rows, D), stride qkv_stride
                        floatX* dk,             // (keys, D)
                        floatX* dv,             // (keys, D)
                        floatX* probs,          // (rows, keys) scratch
                        floatX* dscores,        // (rows, keys) scratch
                        const floatX* dout,     // (rows, D), stride out_stride
                        const floatX* q,        // (rows, D), stride qkv_stride
                        const floatX* k,        // (keys, D), stride qkv_stride
                        const floatX* k_t,      // (D, ATTENTION_KEYS) columns 0..keys-1: k transposed
                        const floatX* v_t,      // (D, ATTENTION_KEYS)
                        const float_acc* lse,   // (rows)
                        const float_acc* delta, // (rows) sum over d of dout * out
                        int first_query, int rows, int first_key, int keys, int D, int out_stride,
                        int qkv_stride, int window) {
    const floatX scale = attention_scale(D);
    gemm(0, 0, rows, keys, D, q, qkv_stride, k_t, ATTENTION_KEYS, 0, probs, keys);
    gemm(0, 0, rows, keys, D, dout, out_stride, v_t, ATTENTION_KEYS, 0, dscores, keys);
    for (int r = 0; r < rows; r++) {
        int begin, end;
        visible_columns(&begin, &end, first_query + r, first_key, keys, window);
        softmax_row_backward(probs + (size_t)r * keys, dscores + (size_t)r * keys, lse[r], delta[r], begin,
                             end, keys, scale);
    }
    if (dq) gemm(0, 0, rows, D, keys, dscores, keys, k, qkv_stride, 1, dq, qkv_stride);
    if (dv) gemm(1, 0, keys, D, rows, probs, keys, dout, out_stride, 1, dv, D);
    if (dk) gemm(1, 0, keys, D, rows, dscores, keys, q, qkv_stride, 1, dk, D);
}

// ----------------------------------------------------------------------------
// Forward

// The outputs of the queries first_query..end_query-1 of one head.
static inline void attention_rows_forward(floatX* out,     // (rows, D), stride out_stride
                                          float_acc* lse,  // (rows)
                                          floatX* tiles,   // scratch
                                          const floatX* q, // (rows, D), stride qkv_stride
                                          const floatX* k, // (T, D), stride qkv_stride: from token 0
                                          const floatX* v, // (T, D), stride qkv_stride
                                          int first_query, int end_query, int D, int out_stride,
                                          int qkv_stride, int window) {
    floatX* scores = tiles;
    floatX* k_t =
        end_query - first_query < ATTENTION_FEW_QUERIES ? NULL : scores + ATTENTION_QUERIES * ATTENTION_KEYS;
    float_acc row_max[ATTENTION_TASK], row_sum[ATTENTION_TASK];
    for (int r = 0; r < end_query - first_query; r++) {
        row_max[r] = -INFINITY;
        row_sum[r] = 0;
    }
    for (int first_key = first_visible_key(first_query, window); first_key < end_query;
         first_key += ATTENTION_KEYS) {
        const int end_key = min_int(first_key + ATTENTION_KEYS, end_query);
        if (k_t)
            transpose_tile(k_t, k + (size_t)first_key * qkv_stride, end_key - first_key, D, ATTENTION_KEYS,
                           qkv_stride);
        for (int query = first_query; query < end_query; query += ATTENTION_QUERIES) {
            const int rows = min_int(ATTENTION_QUERIES, end_query - query), row = query - first_query;
            const int first_seen = first_visible_key(query, window), key = max_int(first_key, first_seen);
            const int keys = min_int(end_key, query + rows) - key;
            if (keys <= 0) continue;
            attention_tile_forward(out + (size_t)row * out_stride, row_max + row, row_sum + row, scores,
                                   q + (size_t)row * qkv_stride, k + (size_t)key * qkv_stride,
                                   k_t ? k_t + (key - first_key) : NULL, v + (size_t)key * qkv_stride,
                                   key == first_seen, query, rows, key, keys, D, out_stride, qkv_stride,
                                   window);
        }
    }
    for (int r = 0; r < end_query - first_query; r++) {
        scale_row(out + (size_t)r * out_stride, 1 / row_sum[r], D);
        lse[r] = row_max[r] + log(row_sum[r]);
    }
}

// Scratch of one thread, in numbers of floatX: scores and the transposed key.
static inline size_t attention_forward_tiles(int D) {
    return (size_t)ATTENTION_KEYS * (ATTENTION_QUERIES + D);
}

// Bytes of the workspace of attention_forward, for as many threads as omp_get_max_threads() says now or fewer.
static inline size_t attention_forward_workspace(const AttentionShape* s) {
    return omp_get_max_threads() * attention_forward_tiles(s->D) * sizeof(floatX);
}

// Reads kv_of_q and, of qkv, the queries of the rows start..T-1 and all keys and values. Writes these rows of
// out and lse, and of noise->noised unless noise is NULL.
static inline void attention_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    (void)stream;
    const int T = s->T, H = s->H, D = s->D, row_stride = (H + 2 * s->G) * D;
    const int tasks = (T - s->start + ATTENTION_TASK - 1) / ATTENTION_TASK;
    const int* kv_of_q = x->kv_of_q;
    // The last queries see the most keys. The loop starts these long tasks first, so that short ones fill the
    // gaps.
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(omp_get_max_threads())
    for (int i = 0; i < tasks; i++) {
        for (int b = 0; b < s->B; b++) {
            for (int h = 0; h < H; h++) {
                const int t = s->start + (tasks - 1 - i) * ATTENTION_TASK;
                const floatX* sequence = x->qkv + (size_t)b * T * row_stride;
                const floatX* k = sequence + (size_t)(H + kv_of_q[h]) * D;
                floatX* tiles = (floatX*)x->workspace + attention_forward_tiles(D) * omp_get_thread_num();
                assert(kv_of_q[h] >= 0 && kv_of_q[h] < s->G && (h == 0 || kv_of_q[h - 1] <= kv_of_q[h]));
                attention_rows_forward(
                    x->out + (((size_t)b * T + t) * H + h) * D, x->lse + ((size_t)b * H + h) * T + t, tiles,
                    sequence + (size_t)t * row_stride + (size_t)h * D, k, k + (size_t)s->G * D, t,
                    min_int(T, t + ATTENTION_TASK), D, H * D, row_stride, s->window);
            }
        }
    }
    attention_noise(x->noise, x->out, s->B, T, s->start, H, D);
}

// ----------------------------------------------------------------------------
// Backward

// The workspace, in numbers of floatX. Each query head has its own gradients of keys and values; the last
// step adds them up over the query heads of a group. So query heads do not wait for each other.
typedef struct {
    size_t delta;     // (B, H, T), rounded up to whole cache lines
    size_t kv;        // (B, H, T, D), once for the keys and once for the values
    size_t tiles;     // of one thread: probs and dscores, then key and value transposed
    size_t all_tiles; // of all threads
} AttentionWorkspace;

static inline AttentionWorkspace attention_workspace_layout(const AttentionShape* s) {
    AttentionWorkspace sizes;
    sizes.delta = ((size_t)s->B * s->H * s->T + 15) / 16 * 16;
    sizes.kv = (size_t)s->B * s->H * s->T * s->D;
    sizes.tiles = 2 * (size_t)ATTENTION_KEYS * (ATTENTION_QUERIES + s->D);
    sizes.all_tiles = sizes.tiles * omp_get_max_threads();
    return sizes;
}

// Bytes of the workspace of attention_backward, for as many threads as omp_get_max_threads() says now or fewer.
static inline size_t attention_backward_workspace(const AttentionShape* s) {
    const AttentionWorkspace sizes = attention_workspace_layout(s);
    return (sizes.delta + sizes.all_tiles + 2 * sizes.kv) * sizeof(floatX);
}

// The arrays and sizes of one query head; the pointers point at this head's token 0.
typedef struct {
    floatX* dq;             // (T, D), stride qkv_stride
    floatX* dk;             // (T, D)
    floatX* dv;             // (T, D)
    const floatX* dout;     // (T, D), stride out_stride
    const floatX* q;        // (T, D), stride qkv_stride
    const floatX* k;        // (T, D), stride qkv_stride
    const floatX* v;        // (T, D), stride qkv_stride
    const float_acc* lse;   // (T)
    const float_acc* delta; // (T)
    int T, D, out_stride, qkv_stride, window;
} AttentionHead;

// Adds the gradients of one tile of keys (from first_key on) and the queries first_query..end_query-1, each
// through the other. first_query is a multiple of ATTENTION_QUERIES.
static inline void attention_keys_backward(const AttentionHead* head, floatX* tiles, int first_key,
                                           int first_query, int end_query, int with_dq, int with_dkv) {
    floatX* probs = tiles;
    floatX* dscores = probs + ATTENTION_QUERIES * ATTENTION_KEYS;
    floatX* k_t = dscores + ATTENTION_QUERIES * ATTENTION_KEYS;
    floatX* v_t = k_t + (size_t)head->D * ATTENTION_KEYS;
    const int D = head->D, end_key = min_int(first_key + ATTENTION_KEYS, head->T);
    const size_t kv = (size_t)first_key * head->qkv_stride;
    transpose_tile(k_t, head->k + kv, end_key - first_key, D, ATTENTION_KEYS, head->qkv_stride);
    transpose_tile(v_t, head->v + kv, end_key - first_key, D, ATTENTION_KEYS, head->qkv_stride);
    first_query = max_int(first_query, first_key / ATTENTION_QUERIES * ATTENTION_QUERIES);
    end_query = min_int(end_query, end_visible_query(end_key - 1, head->window, head->T));
    for (int query = first_query; query < end_query; query += ATTENTION_QUERIES) {
        const int rows = min_int(ATTENTION_QUERIES, end_query - query);
        // Only the columns that at least one row of the tile sees.
        const int key = max_int(first_key, first_visible_key(query, head->window));
        const int keys = min_int(end_key, query + rows) - key;
        const size_t row = (size_t)query * head->qkv_stride;
        attention_tile_backward(with_dq ? head->dq + row : NULL, with_dkv ? head->dk + (size_t)key * D : NULL,
                                with_dkv ? head->dv + (size_t)key * D : NULL, probs, dscores,
                                head->dout + (size_t)query * head->out_stride, head->q + row,
                                head->k + (size_t)key * head->qkv_stride, k_t + (key - first_key),
                                v_t + (key - first_key), head->lse + query, head->delta + query, query, rows,
                                key, keys, D, head->out_stride, head->qkv_stride, head->window);
    }
}

// Writes the rows dq_begin..dq_end-1 of dq, and dkv_begin..dkv_end-1 of dk and dv. The ranges start at
// multiples of ATTENTION_TASK. Either both are the whole sequence, or one of them is empty.
static inline void attention_head_backward(const AttentionHead* head, floatX* tiles, int dq_begin, int dq_end,
                                           int dkv_begin, int dkv_end) {
    const int with_dq = dq_begin < dq_end, with_dkv = dkv_begin < dkv_end, D = head->D;
    for (int t = dq_begin; t < dq_end; t++)
        memset(head->dq + (size_t)t * head->qkv_stride, 0, sizeof(floatX) * D);
    memset(head->dk + (size_t)dkv_begin * D, 0, sizeof(floatX) * (dkv_end - dkv_begin) * D);
    memset(head->dv + (size_t)dkv_begin * D, 0, sizeof(floatX) * (dkv_end - dkv_begin) * D);
    const int first_seen = first_visible_key(dq_begin, head->window) / ATTENTION_KEYS * ATTENTION_KEYS;
    const int key_begin = with_dkv ? dkv_begin : first_seen, key_end = with_dkv ? dkv_end : dq_end;
    const int query_begin = with_dq ? dq_begin : 0, query_end = with_dq ? dq_end : head->T;
    for (int key = key_begin; key < key_end; key += ATTENTION_KEYS)
        attention_keys_backward(head, tiles, key, query_begin, query_end, with_dq, with_dkv);
}

// delta_t = sum over d of dout * out: the softmax backward subtracts it from every gradient of a row's
// probabilities.
static inline void attention_delta(float_acc* delta, // (B, H, T)
                                   const AttentionTensors* x, const AttentionShape* s) {
    const int B = s->B, T = s->T, H = s->H, D = s->D;
    const floatX *dout = x->dout, *out = x->out;
#pragma omp parallel for schedule(static)
    for (int token = 0; token < B * T; token++) {
        for (int h = 0; h < H; h++) {
            const floatX* gradient = dout + ((size_t)token * H + h) * D;
            const floatX* output = out + ((size_t)token * H + h) * D;
            float_acc sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int d = 0; d < D; d++) sum += gradient[d] * output[d];
            delta[((size_t)(token / T) * H + h) * T + token % T] = sum;
        }
    }
}

// The key and value gradients of every KV head: the sum over its query heads in their order, or 0 without
// query heads.
static inline void attention_sum_groups(floatX* dqkv,       // (B, T, H + 2G, D)
                                        const floatX* dk,   // (B, H, T, D)
                                        const floatX* dv,   // (B, H, T, D)
                                        const int* kv_of_q, // (H)
                                        const AttentionShape* s) {
    const int B = s->B, T = s->T, H = s->H, G = s->G, D = s->D;
#pragma omp parallel for schedule(static)
    for (int token = 0; token < B * T; token++) {
        floatX* dk_row = dqkv + ((size_t)token * (H + 2 * G) + H) * D;
        floatX* dv_row = dk_row + (size_t)G * D;
        memset(dk_row, 0, sizeof(floatX) * 2 * (size_t)G * D);
        for (int h = 0; h < H; h++) {
            const size_t row = (((size_t)(token / T) * H + h) * T + token % T) * D;
            for (int d = 0; d < D; d++) dk_row[(size_t)kv_of_q[h] * D + d] += dk[row + d];
            for (int d = 0; d < D; d++) dv_row[(size_t)kv_of_q[h] * D + d] += dv[row + d];
        }
    }
}

// Reads dout, out, lse, qkv and kv_of_q. Writes every element of dqkv. start must be 0.
static inline void attention_backward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    (void)stream;
    assert(s->start == 0);
    const int B = s->B, T = s->T, H = s->H, D = s->D;
    const AttentionWorkspace sizes = attention_workspace_layout(s);
    floatX* delta = (floatX*)x->workspace;
    floatX* tiles = delta + sizes.delta;
    floatX* dk = tiles + sizes.all_tiles;
    floatX* dv = dk + sizes.kv;
    const int qkv_stride = (H + 2 * s->G) * D, threads = omp_get_max_threads();
    attention_delta(delta, x, s);

    // A task is a whole head, or one tile of a head: a tile of queries for dq, or of keys for dk and dv. A whole
    // head needs 5 products. Tiles need 7, because they compute the scores and dout v^T twice, but they keep any
    // number of threads busy. whole_heads is 1 if whole heads take less time. Both ways add the same terms in the
    // same order.
    const int rounds = (B * H + threads - 1) / threads;
    const int whole_heads = 5 * rounds * threads <= 7 * B * H;
    const int query_tasks = whole_heads ? 0 : (T + ATTENTION_TASK - 1) / ATTENTION_TASK;
    const int tasks = whole_heads ? 1 : 2 * query_tasks;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int task = 0; task < tasks; task++) {
        for (int bh = 0; bh < B * H; bh++) {
            const int b = bh / H, h = bh % H;
            const size_t q = (size_t)b * T * qkv_stride + (size_t)h * D;
            const size_t k = (size_t)b * T * qkv_stride + (size_t)(H + x->kv_of_q[h]) * D;
            const size_t o = (size_t)b * T * H * D + (size_t)h * D;
            const AttentionHead head = {x->dqkv + q,
                                        dk + (size_t)bh * T * D,
                                        dv + (size_t)bh * T * D,
                                        x->dout + o,
                                        x->qkv + q,
                                        x->qkv + k,
                                        x->qkv + k + (size_t)s->G * D,
                                        x->lse + (size_t)bh * T,
                                        delta + (size_t)bh * T,
                                        T,
                                        D,
                                        H * D,
                                        qkv_stride,
                                        s->window};
            floatX* my_tiles = tiles + sizes.tiles * omp_get_thread_num();
            const int begin = task % max_int(1, query_tasks) * ATTENTION_TASK;
            const int end = min_int(T, begin + ATTENTION_TASK);
            if (whole_heads) {
                attention_head_backward(&head, my_tiles, 0, T, 0, T);
            } else if (task < query_tasks) {
                attention_head_backward(&head, my_tiles, begin, end, 0, 0);
            } else {
                attention_head_backward(&head, my_tiles, 0, 0, begin, end);
            }
        }
    }
    attention_sum_groups(x->dqkv, dk, dv, x->kv_of_q, s);
}

#endif
