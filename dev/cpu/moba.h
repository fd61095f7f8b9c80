/*
Mixture of block attention, forward and backward (docs/math.md section 2).

Every query attends to its own block of S keys, causally, and to the K-1 complete earlier blocks whose
centroids score highest with it, with one softmax over all these keys. Two algorithms compute this function:

    moba_*        the original (Lu et al., MoBA, arXiv 2502.13189), one query at a time: the matrix of scores,
                  the selection, attention in the own block and in the selected ones, merged by lse.
    flashmoba_*   works by key blocks (Optimizing Mixture of Block Attention, arXiv 2511.11571). It attends
                  within each own block first. Then each task takes a chunk of queries, lists for every key
                  block the queries that selected it, and gathers these into tiles for dense products.

    const AttentionShape s = {B, T, 0, H, G, D, 0, S, K};
    x.workspace = device_malloc(flashmoba_forward_workspace(&s), "attention");    // AttentionTensors x
    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);   // dev/cpu/keys.h
    flashmoba_forward(&x, &s, stream);
    x.workspace = device_malloc(flashmoba_backward_workspace(&s), "attention");
    flashmoba_backward(&x, &s, stream);

qkv has the layout of gqa.h; its keys are final (after key convolution and RoPE). The forward pass writes the
selection and the backward pass reads it, so the router runs once, and no gradient flows through the
selection. With start > 0 the forward pass continues a sequence: it computes the rows start..T-1, so one more
token reads at most K*S keys and T/S centroids for each query head.

The results have the same bits for any number of threads.
*/
#ifndef DEV_CPU_MOBA_H
#define DEV_CPU_MOBA_H

// attention_rows_forward, attention_head_backward, attention_delta, softmax rows, transpose_tile, gemm
#include "dev/cpu/gqa.h"

// The router: queries of one task, and centroids that it scores at once (a multiple of 16).
enum { FLASHMOBA_ROUTE_QUERIES = 128, MOBA_CENTROIDS = 128 };
// Tiles of gathered queries by keys of one block: the number of rows is limited so that the tile stays in the
// cache.
enum { FLASHMOBA_KEYS = 256, FLASHMOBA_ROWS = 240, FLASHMOBA_SCORES = 72 * FLASHMOBA_KEYS };
// Rows of the smallest and of the largest tile in the forward pass, which must be causal to the last bit
// (docs/math.md section 6; see flashmoba_forward_rows).
enum { FLASHMOBA_FIRST_ROWS = 12, FLASHMOBA_FORWARD_ROWS = 48 };
// Average length of a key block's list in one chunk. Longer lists fill the tiles better; shorter lists give
// more chunks, and the queries of a smaller chunk stay in the cache.
enum { FLASHMOBA_LIST = 256 };

// Only GPUs bound the workspace; here its size depends on the number of threads.
static inline void moba_set_workspace_bound(size_t bytes) { (void)bytes; }

// The number of complete key blocks. A query can select those that end before its own block.
static inline int moba_blocks(const AttentionShape* s) { return s->T / s->S; }

// Whether MoBA supports this shape. It does not use the window.
static inline int moba_supports(const AttentionShape* s) {
    return s->T > 0 && s->D > 0 && s->S > 0 && s->K > 0;
}

// Numbers of elements of the arrays that the caller keeps between forward and backward, or between two
// tokens.
static inline size_t moba_selected_count(int B, int T, int H, int K) { return (size_t)B * H * T * (K - 1); }
static inline size_t moba_centroids_count(int B, int T, int G, int D, int S) {
    return (size_t)B * (T / S) * G * D;
}

// The query heads of KV head g are first..first+heads-1.
static inline void moba_group(int* first, int* heads, const int* kv_of_q, int H, int g) {
    *first = 0;
    while (*first < H && kv_of_q[*first] < g) (*first)++;
    *heads = 0;
    while (*first + *heads < H && kv_of_q[*first + *heads] == g) (*heads)++;
}

// ----------------------------------------------------------------------------
// Centroids, scores and the order of the selection: shared by both algorithms

// Computes the centroids of the key blocks that the tokens start..T-1 complete; earlier centroids do not
// change.
static inline void moba_centroids(float_acc* centroids, // (B, T/S, G, D)
                                  const floatX* qkv,    // (B, T, H + 2G, D)
                                  const AttentionShape* s) {
    const int row = s->G * s->D, stride = (s->H + 2 * s->G) * s->D, blocks = moba_blocks(s);
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < s->B; b++) {
        for (int block = s->start / s->S; block < blocks; block++) {
            float_acc* mean = centroids + ((size_t)b * blocks + block) * row;
            const floatX* k = qkv + ((size_t)b * s->T + (size_t)block * s->S) * stride + (size_t)s->H * s->D;
            for (int i = 0; i < row; i++) mean[i] = 0;
            for (int t = 0; t < s->S; t++)
                for (int i = 0; i < row; i++) mean[i] += k[(size_t)t * stride + i];
            for (int i = 0; i < row; i++) mean[i] /= (float_acc)s->S;
        }
    }
}

// Scores of `rows` queries with `blocks` <= MOBA_CENTROIDS centroids. Every score is one sum in the order of
// d, independent of its tile. So a query has the same scores in training, prefill and decoding, and equal
// centroids have equal scores. (The library's products promise neither.)
static inline void moba_scores(float_acc* scores,      // (rows, scores_stride), to a multiple of 16 columns
                               float_acc* centroids_t, // (D, MOBA_CENTROIDS) scratch
                               const floatX* q,        // (rows, D), stride q_stride
                               const float_acc* centroids, // (blocks, D), stride centroids_stride
                               int rows, int blocks, int D, int scores_stride, int q_stride,
                               int centroids_stride) {
    enum { M = MOBA_CENTROIDS };
    const int columns = (blocks + 15) / 16 * 16;
    memset(centroids_t, 0, sizeof(float_acc) * M * D);
    transpose_tile(centroids_t, centroids, blocks, D, M, centroids_stride);
    for (int r = 0; r < rows; r++) {
        float_acc* row = scores + (size_t)r * scores_stride;
        const floatX* query = q + (size_t)r * q_stride;
        int d = 0;
        for (int j = 0; j < columns; j++) row[j] = 0;
        for (; d + 8 <= D; d += 8) {
            const floatX* x = query + d;
            const float_acc* c = centroids_t + (size_t)d * M;
#pragma omp simd
            for (int j = 0; j < columns; j++) {
                float_acc sum = row[j];
                sum += x[0] * c[j];
                sum += x[1] * c[j + M];
                sum += x[2] * c[j + 2 * M];
                sum += x[3] * c[j + 3 * M];
                sum += x[4] * c[j + 4 * M];
                sum += x[5] * c[j + 5 * M];
                sum += x[6] * c[j + 6 * M];
                sum += x[7] * c[j + 7 * M];
                row[j] = sum;
            }
        }
        for (; d < D; d++) {
            const float_acc* c = centroids_t + (size_t)d * M;
#pragma omp simd
            for (int j = 0; j < columns; j++) row[j] += query[d] * c[j];
        }
    }
}

// Writes a query's selected blocks in the order of `selected`: the newest block first, then -1.
static inline void moba_write_selected(int* selected,     // (choices)
                                       const int* blocks, // (count) in any order
                                       int count, int choices) {
    for (int i = 0; i < count; i++) {
        int at = i;
        for (; at > 0 && selected[at - 1] < blocks[i]; at--) selected[at] = selected[at - 1];
        selected[at] = blocks[i];
    }
    for (int i = count; i < choices; i++) selected[i] = -1;
}

// ----------------------------------------------------------------------------
// moba: one query at a time

// Selects the best of a row of scores, then the next best, and so on; of equal scores the more recent block.
// A selected score becomes NaN, which is never selected.
static inline void moba_select_row(int* selected,     // (choices)
                                   int* taken,        // (choices) scratch
                                   float_acc* scores, // (eligible)
                                   int eligible, int choices) {
    int count = 0;
    for (; count < choices; count++) {
        int best = -1;
        for (int j = eligible - 1; j >= 0; j--)
            if (scores[j] == scores[j] && (best < 0 || scores[j] > scores[best])) best = j;
        if (best < 0) break;
        taken[count] = best;
        scores[best] = (float_acc)NAN;
    }
    moba_write_selected(selected, taken, count, choices);
}

// Attention of query t to its keys in the given blocks (-1 for none). Returns the lse.
static inline float_acc moba_attend(floatX* out,       // (D)
                                    float_acc* probs,  // (count * S) scratch
                                    const floatX* q,   // (D)
                                    const floatX* k,   // (T, D), stride qkv_stride
                                    const floatX* v,   // (T, D), stride qkv_stride
                                    const int* blocks, // (count)
                                    int count, int t, int D, int S, int qkv_stride) {
    float_acc row_max = -INFINITY, row_sum = 0;
    int keys = 0;
    for (int i = 0; i < count && blocks[i] >= 0; i++) {
        const int first = blocks[i] * S, end = min_int(first + S, t + 1);
        for (int key = first; key < end; key++) {
            float_acc score = 0;
#pragma omp simd reduction(+ : score)
            for (int d = 0; d < D; d++) score += q[d] * k[(size_t)key * qkv_stride + d];
            probs[keys++] = score * attention_scale(D);
        }
    }
    for (int i = 0; i < keys; i++) row_max = probs[i] > row_max ? probs[i] : row_max;
    for (int i = 0; i < keys; i++) row_sum += probs[i] = exp_fast(probs[i] - row_max);
    for (int d = 0; d < D; d++) out[d] = 0;
    keys = 0;
    for (int i = 0; i < count && blocks[i] >= 0; i++) {
        const int first = blocks[i] * S, end = min_int(first + S, t + 1);
        for (int key = first; key < end; key++) {
            const float_acc prob = probs[keys++] / row_sum;
#pragma omp simd
            for (int d = 0; d < D; d++) out[d] += prob * v[(size_t)key * qkv_stride + d];
        }
    }
    return row_max + log(row_sum);
}

// Merges two partials of one query, over different keys, into one over all these keys.
static inline void moba_merge(floatX* out,         // (D) in and out
                              float_acc* lse,      // in and out
                              const floatX* other, // (D)
                              float_acc other_lse, int D) {
    const float_acc largest = other_lse > *lse ? other_lse : *lse;
    const float_acc mine = exp_fast(*lse - largest), theirs = exp_fast(other_lse - largest),
                    sum = mine + theirs;
    for (int d = 0; d < D; d++) out[d] = (mine * out[d] + theirs * other[d]) / sum;
    *lse = largest + log(sum);
}

// One thread's share of the workspace, in numbers of float_acc: the scores of one head, and the arrays of one
// query.
static inline size_t moba_forward_scratch(const AttentionShape* s) {
    const int blocks = moba_blocks(s);
    const size_t columns = (size_t)(blocks + 15) / 16 * 16;
    return (size_t)s->T * columns + (size_t)s->D * (MOBA_CENTROIDS + 1) +
           (size_t)min_int(s->K, blocks + 1) * s->S + s->K;
}

// Bytes of the workspace of moba_forward, for as many threads as omp_get_max_threads() says now or fewer. The score
// matrix makes it quadratic in T.
static inline size_t moba_forward_workspace(const AttentionShape* s) {
    return omp_get_max_threads() * moba_forward_scratch(s) * sizeof(float_acc);
}

// Computes the rows start..T-1 of query head h of sequence b.
static inline void moba_head_forward(const AttentionTensors* x, float_acc* scratch, int b, int h,
                                     const AttentionShape* s) {
    const int g = x->kv_of_q[h];
    const int D = s->D, S = s->S, choices = s->K - 1, stride = (s->H + 2 * s->G) * D;
    const int blocks = moba_blocks(s), columns = (blocks + 15) / 16 * 16;
    const floatX* q = x->qkv + (size_t)b * s->T * stride + (size_t)h * D;
    const floatX* k = x->qkv + (size_t)b * s->T * stride + (size_t)(s->H + g) * D;
    const floatX* v = k + (size_t)s->G * D;
    float_acc* matrix = scratch; // (T - start, columns)
    float_acc* centroids_t = matrix + (size_t)s->T * columns;
    floatX* other = (floatX*)(centroids_t + (size_t)D * MOBA_CENTROIDS);
    float_acc* probs = (float_acc*)(other + D);
    int* taken = (int*)(probs + (size_t)min_int(s->K, blocks + 1) * S);
    for (int first = 0; first < blocks && choices > 0; first += MOBA_CENTROIDS)
        moba_scores(matrix + first, centroids_t, q + (size_t)s->start * stride,
                    x->centroids + (((size_t)b * blocks + first) * s->G + g) * D, s->T - s->start,
                    min_int(MOBA_CENTROIDS, blocks - first), D, columns, stride, s->G * D);
    for (int t = s->start; t < s->T; t++) {
        const size_t row = ((size_t)b * s->H + h) * s->T + t;
        floatX* output = x->out + (((size_t)b * s->T + t) * s->H + h) * D;
        const int own = t / S;
        x->lse[row] = moba_attend(output, probs, q + (size_t)t * stride, k, v, &own, 1, t, D, S, stride);
        if (choices == 0) continue;
        int* chosen = x->selected + row * choices;
        moba_select_row(chosen, taken, matrix + (size_t)(t - s->start) * columns, own, choices);
        if (chosen[0] < 0) continue;
        const float_acc other_lse =
            moba_attend(other, probs, q + (size_t)t * stride, k, v, chosen, choices, t, D, S, stride);
        moba_merge(output, &x->lse[row], other, other_lse, D);
    }
}

// Reads kv_of_q, the centroids of all complete blocks (keys_forward) and, of qkv, the queries of the rows
// start..T-1 and all keys and values. Writes these rows of out, lse and selected, and of noise->noised unless
// noise is NULL. With K = 1, selected is empty and centroids are not read.
static inline void moba_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    (void)stream;
    const size_t scratch = moba_forward_scratch(s);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(omp_get_max_threads())
    for (int b = 0; b < s->B; b++)
        for (int h = 0; h < s->H; h++)
            moba_head_forward(x, (float_acc*)x->workspace + scratch * omp_get_thread_num(), b, h, s);
    attention_noise(x->noise, x->out, s->B, s->T, s->start, s->H, s->D);
}

static inline size_t moba_backward_workspace(const AttentionShape* s) {
    return (size_t)s->B * s->H * s->T * sizeof(float_acc);
}

// Adds the gradients of query t and its keys and values in one block.
static inline void moba_attend_backward(floatX* dq,         // (D) added to
                                        floatX* dk,         // (T, D), stride qkv_stride, added to
                                        floatX* dv,         // (T, D), stride qkv_stride, added to
                                        const floatX* dout, // (D)
                                        const floatX* q,    // (D)
                                        const floatX* k,    // (T, D), stride qkv_stride
                                        const floatX* v,    // (T, D), stride qkv_stride
                                        float_acc lse, float_acc delta, int block, int t, int D, int S,
                                        int qkv_stride) {
    const floatX scale = attention_scale(D);
    for (int key = block * S; key < min_int(block * S + S, t + 1); key++) {
        const size_t row = (size_t)key * qkv_stride;
        float_acc score = 0, dprob = 0;
#pragma omp simd reduction(+ : score, dprob)
        for (int d = 0; d < D; d++) {
            score += q[d] * k[row + d];
            dprob += dout[d] * v[row + d];
        }
        const float_acc prob = exp_fast(score * scale - lse), dscore = prob * (dprob - delta) * scale;
#pragma omp simd
        for (int d = 0; d < D; d++) {
            dq[d] += dscore * k[row + d];
            dk[row + d] += dscore * q[d];
            dv[row + d] += prob * dout[d];
        }
    }
}

// Reads dout, out, lse, selected, qkv and kv_of_q. Writes every element of dqkv: exact zeros for a KV head that
// no query head reads. start must be 0.
static inline void moba_backward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    assert(s->start == 0);
    float_acc* delta = (float_acc*)x->workspace; // (B, H, T)
    const int B = s->B, T = s->T, H = s->H, G = s->G, D = s->D, S = s->S;
    const int stride = (H + 2 * G) * D, choices = s->K - 1;
    attention_delta(delta, x, s);
    device_zero(x->dqkv, sizeof(floatX) * B * T * stride, stream);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++) {
        for (int g = 0; g < G; g++) {
            const size_t k = (size_t)b * T * stride + (size_t)(H + g) * D, v = k + (size_t)G * D;
            int first_head, heads;
            moba_group(&first_head, &heads, x->kv_of_q, H, g);
            for (int i = 0; i < heads * T; i++) {
                const int h = first_head + i / T, t = i % T;
                const size_t row = ((size_t)b * H + h) * T + t;
                const size_t q = ((size_t)b * T + t) * stride + (size_t)h * D;
                for (int c = -1; c < choices; c++) {
                    const int block = c < 0 ? t / S : x->selected[row * choices + c];
                    if (block < 0) break;
                    moba_attend_backward(x->dqkv + q, x->dqkv + k, x->dqkv + v,
                                         x->dout + (((size_t)b * T + t) * H + h) * D, x->qkv + q, x->qkv + k,
                                         x->qkv + v, x->lse[row], delta[row], block, t, D, S, stride);
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------
// flashmoba: chunks, and the workspace of one thread

// A chunk: all query heads of one KV head at consecutive tokens. One task of the routed passes computes one
// chunk. Row r is head first_head + r % heads at token first_token + r / heads, so that rows ascend in time.
typedef struct {
    int b, g, first_head, heads;
    int first_token, tokens;
} FlashmobaChunk;

// A query of a chunk: its offset in qkv, in out, and in (B, H, T).
typedef struct {
    size_t q, out, row;
} FlashmobaQuery;

static inline FlashmobaQuery flashmoba_query(const FlashmobaChunk* chunk, int r, const AttentionShape* s) {
    const int h = chunk->first_head + r % chunk->heads, t = chunk->first_token + r / chunk->heads;
    const size_t token = (size_t)chunk->b * s->T + t;
    const FlashmobaQuery query = {(token * (s->H + 2 * s->G) + h) * s->D, (token * s->H + h) * s->D,
                                  ((size_t)chunk->b * s->H + h) * s->T + t};
    return query;
}

// The number of rows of a chunk for which a key block's list has FLASHMOBA_LIST entries on average.
static inline int flashmoba_chunk_rows(const AttentionShape* s) {
    const int blocks = max_int(1, moba_blocks(s)), choices = max_int(1, min_int(s->K - 1, blocks));
    return (int)(((size_t)FLASHMOBA_LIST * blocks + choices - 1) / choices);
}

static inline int flashmoba_chunk_tokens(const AttentionShape* s, int heads) {
    return min_int(s->T, (flashmoba_chunk_rows(s) + heads - 1) / heads);
}

// Makes chunk i of KV head g. Returns 0 if there is no such chunk: g has no query heads, or earlier chunks
// have all its queries.
static inline int flashmoba_chunk(FlashmobaChunk* chunk, const int* kv_of_q, int b, int g, int i,
                                  const AttentionShape* s) {
    chunk->b = b, chunk->g = g;
    moba_group(&chunk->first_head, &chunk->heads, kv_of_q, s->H, g);
    if (chunk->heads == 0) return 0;
    const int tokens = flashmoba_chunk_tokens(s, chunk->heads);
    if ((size_t)i * tokens >= (size_t)(s->T - s->start)) return 0;
    chunk->first_token = s->start + i * tokens;
    chunk->tokens = min_int(tokens, s->T - chunk->first_token);
    return 1;
}

// No KV head has more chunks than this.
static inline int flashmoba_max_chunks(const AttentionShape* s) {
    const int tokens = flashmoba_chunk_tokens(s, s->H);
    return (s->T - s->start + tokens - 1) / tokens;
}

typedef struct {
    // Lists of a chunk: the rows rows[begin[j]..begin[j + 1]-1], ascending, selected block j
    int* begin; // (T/S + 2)
    int* rows;  // (rows of a chunk * choices)
    // Running softmax of a chunk
    float_acc* row_max; // (rows of a chunk)
    float_acc* row_sum; // (rows of a chunk)
    // A tile
    floatX* q;         // (FLASHMOBA_ROWS, D) gathered queries
    floatX* dout;      // (FLASHMOBA_ROWS, D) gathered output gradients
    floatX* result;    // (FLASHMOBA_ROWS, D) rows to scatter
    floatX* scores;    // (tile rows, keys), then probabilities
    floatX* dscores;   // (tile rows, keys)
    floatX* k_t;       // (D, FLASHMOBA_KEYS)
    floatX* v_t;       // (D, FLASHMOBA_KEYS)
    floatX* dk;        // (FLASHMOBA_KEYS, D), or of a whole block in the local pass
    floatX* dv;        // (FLASHMOBA_KEYS, D), likewise
    floatX* attention; // scratch of the tiles of gqa.h
    // The router; it keeps each query's best blocks so far sorted, the worst last
    float_acc* centroids_t;  // (D, MOBA_CENTROIDS)
    float_acc* block_scores; // (FLASHMOBA_ROUTE_QUERIES, MOBA_CENTROIDS)
    float_acc* best_scores;  // (FLASHMOBA_ROUTE_QUERIES, choices)
    int* best_blocks;        // (FLASHMOBA_ROUTE_QUERIES, choices)
    size_t bytes;            // of all arrays above
} FlashmobaScratch;

static inline void* moba_take(char* memory, size_t* used, size_t count, size_t size) {
    void* taken = memory ? memory + *used : NULL;
    *used += (count * size + 63) / 64 * 64;
    return taken;
}

// Lays out one thread's share of the workspace. Without memory it only counts the bytes.
static inline FlashmobaScratch flashmoba_scratch(char* memory, const AttentionShape* s, int is_backward) {
    const size_t blocks = (size_t)moba_blocks(s), choices = (size_t)s->K - 1, D = (size_t)s->D;
    const size_t rows = (size_t)flashmoba_chunk_rows(s) + s->H; // a chunk is rounded up to whole tokens
    const size_t keys = (size_t)max_int(FLASHMOBA_KEYS, min_int(s->S, s->T)), x = sizeof(floatX);
    const size_t backward = is_backward ? 1 : 0, forward = 1 - backward;
    FlashmobaScratch scratch;
    size_t used = 0;
    scratch.begin = (int*)moba_take(memory, &used, blocks + 2, sizeof(int));
    scratch.rows = (int*)moba_take(memory, &used, rows * min_int(s->K - 1, (int)blocks), sizeof(int));
    scratch.row_max = (float_acc*)moba_take(memory, &used, forward * rows, sizeof(float_acc));
    scratch.row_sum = (float_acc*)moba_take(memory, &used, forward * rows, sizeof(float_acc));
    scratch.q = (floatX*)moba_take(memory, &used, FLASHMOBA_ROWS * D, x);
    scratch.dout = (floatX*)moba_take(memory, &used, backward * FLASHMOBA_ROWS * D, x);
    scratch.result = (floatX*)moba_take(memory, &used, FLASHMOBA_ROWS * D, x);
    scratch.scores = (floatX*)moba_take(memory, &used, FLASHMOBA_SCORES, x);
    scratch.dscores = (floatX*)moba_take(memory, &used, backward * FLASHMOBA_SCORES, x);
    scratch.k_t = (floatX*)moba_take(memory, &used, FLASHMOBA_KEYS * D, x);
    scratch.v_t = (floatX*)moba_take(memory, &used, backward * FLASHMOBA_KEYS * D, x);
    scratch.dk = (floatX*)moba_take(memory, &used, backward * keys * D, x);
    scratch.dv = (floatX*)moba_take(memory, &used, backward * keys * D, x);
    scratch.attention = (floatX*)moba_take(memory, &used, (1 + backward) * attention_forward_tiles(s->D), x);
    scratch.centroids_t =
        (float_acc*)moba_take(memory, &used, forward * D * MOBA_CENTROIDS, sizeof(float_acc));
    scratch.block_scores = (float_acc*)moba_take(
        memory, &used, forward * FLASHMOBA_ROUTE_QUERIES * MOBA_CENTROIDS, sizeof(float_acc));
    scratch.best_scores =
        (float_acc*)moba_take(memory, &used, forward * FLASHMOBA_ROUTE_QUERIES * choices, sizeof(float_acc));
    scratch.best_blocks =
        (int*)moba_take(memory, &used, forward * FLASHMOBA_ROUTE_QUERIES * choices, sizeof(int));
    scratch.bytes = used;
    return scratch;
}

// The workspace of the backward pass begins with delta: sum over d of dout * out, (B, H, T), rounded up to whole
// cache lines. The scratch of each thread follows.
static inline float_acc* flashmoba_delta(const AttentionTensors* x) { return (float_acc*)x->workspace; }
static inline size_t flashmoba_delta_bytes(const AttentionShape* s) {
    return ((size_t)s->B * s->H * s->T * sizeof(float_acc) + 63) / 64 * 64;
}

// The scratch of the calling thread.
static inline FlashmobaScratch flashmoba_my_scratch(const AttentionTensors* x, const AttentionShape* s,
                                                    int is_backward) {
    const size_t bytes = flashmoba_scratch(NULL, s, is_backward).bytes;
    char* memory = (char*)x->workspace + (is_backward ? flashmoba_delta_bytes(s) : 0);
    return flashmoba_scratch(memory + bytes * omp_get_thread_num(), s, is_backward);
}

// Builds the lists of the blocks first_block..end_block-1: counts the entries, makes the prefix sum, then
// fills.
static inline void flashmoba_build_lists(int* begin,          // (T/S + 2)
                                         int* rows,           // (rows of a chunk * choices)
                                         const int* selected, // (B, H, T, K-1)
                                         const FlashmobaChunk* chunk, int first_block, int end_block,
                                         const AttentionShape* s) {
    const int choices = s->K - 1, num_rows = chunk->heads * chunk->tokens;
    memset(begin, 0, sizeof(int) * (moba_blocks(s) + 2));
    for (int pass = 0; pass < 2; pass++) {
        for (int r = 0; r < num_rows; r++) {
            const int* chosen = selected + flashmoba_query(chunk, r, s).row * choices;
            for (int c = 0; c < choices && chosen[c] >= first_block; c++) {
                if (chosen[c] >= end_block) continue;
                if (pass == 0) begin[chosen[c] + 2]++;
                if (pass == 1) rows[begin[chosen[c] + 1]++] = r;
            }
        }
        for (int j = 0; pass == 0 && j < moba_blocks(s); j++) begin[j + 2] += begin[j + 1];
    }
}

// Rows of a backward tile with this number of keys.
static inline int flashmoba_tile_rows(int keys) { return min_int(FLASHMOBA_ROWS, FLASHMOBA_SCORES / keys); }

// Rows of the forward tile that begins at entry `position` of a list: as many as all tiles before it, within
// limits. How the library rounds a row's product depends on the number of rows and on the row's place among
// them. Here both depend only on the row's position in the list, which earlier tokens determine. They do not
// depend on the length of the list, which later tokens determine.
static inline int flashmoba_forward_rows(int position, int keys) {
    const int most = min_int(FLASHMOBA_FORWARD_ROWS, FLASHMOBA_SCORES / keys);
    return min_int(most, max_int(FLASHMOBA_FIRST_ROWS, position));
}

// ----------------------------------------------------------------------------
// flashmoba, forward

// Adds the scores of consecutive blocks, the newest first, to a query's best blocks so far; returns how many
// it has.
static inline int flashmoba_take_best(float_acc* best,         // (choices) sorted, the worst last
                                      int* blocks,             // (choices)
                                      const float_acc* scores, // (num)
                                      int count, int choices, int first_block, int num) {
    for (int end = num; end > 0; end -= 16) {
        const int begin = max_int(0, end - 16);
        float_acc largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (int j = begin; j < end; j++) largest = scores[j] > largest ? scores[j] : largest;
        if (count == choices && !(largest > best[choices - 1])) continue;
        for (int j = end - 1; j >= begin; j--) {
            // An equal score belongs to an older block and loses; a comparison with NaN is false.
            if (count == choices ? !(scores[j] > best[choices - 1]) : scores[j] != scores[j]) continue;
            int at = count < choices ? count++ : choices - 1;
            for (; at > 0 && best[at - 1] < scores[j]; at--) {
                best[at] = best[at - 1];
                blocks[at] = blocks[at - 1];
            }
            best[at] = scores[j];
            blocks[at] = first_block + j;
        }
    }
    return count;
}

// The selection for neighbouring queries of one query head.
static inline void flashmoba_route_rows(int* selected,              // (rows, choices)
                                        const floatX* q,            // (rows, D), stride q_stride
                                        const float_acc* centroids, // (T/S, D), stride G * D
                                        const FlashmobaScratch* scratch, int first_query, int rows,
                                        int q_stride, const AttentionShape* s) {
    const int choices = s->K - 1;
    int count[FLASHMOBA_ROUTE_QUERIES] = {0};
    for (int end = (first_query + rows - 1) / s->S; end > 0; end -= MOBA_CENTROIDS) {
        const int first = max_int(0, end - MOBA_CENTROIDS);
        moba_scores(scratch->block_scores, scratch->centroids_t, q, centroids + (size_t)first * s->G * s->D,
                    rows, end - first, s->D, MOBA_CENTROIDS, q_stride, s->G * s->D);
        for (int r = 0; r < rows; r++) {
            const int eligible = min_int(end, (first_query + r) / s->S) - first;
            count[r] = flashmoba_take_best(
                scratch->best_scores + (size_t)r * choices, scratch->best_blocks + (size_t)r * choices,
                scratch->block_scores + (size_t)r * MOBA_CENTROIDS, count[r], choices, first, eligible);
        }
    }
    for (int r = 0; r < rows; r++)
        moba_write_selected(selected + (size_t)r * choices, scratch->best_blocks + (size_t)r * choices,
                            count[r], choices);
}

// The selection for all queries from start on. Reads qkv, kv_of_q and centroids; writes selected.
static inline void flashmoba_route(const AttentionTensors* x, const AttentionShape* s) {
    const int stride = (s->H + 2 * s->G) * s->D, blocks = moba_blocks(s);
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(omp_get_max_threads())
    for (int first = s->start; first < s->T; first += FLASHMOBA_ROUTE_QUERIES) {
        for (int b = 0; b < s->B; b++) {
            for (int h = 0; h < s->H; h++) {
                const FlashmobaScratch scratch = flashmoba_my_scratch(x, s, 0);
                flashmoba_route_rows(x->selected + (((size_t)b * s->H + h) * s->T + first) * (s->K - 1),
                                     x->qkv + ((size_t)b * s->T + first) * stride + (size_t)h * s->D,
                                     x->centroids + ((size_t)b * blocks * s->G + x->kv_of_q[h]) * s->D,
                                     &scratch, first, min_int(FLASHMOBA_ROUTE_QUERIES, s->T - first), stride,
                                     s);
            }
        }
    }
}

// Causal attention of every query in its own block. Reads qkv and kv_of_q; writes out and lse over these keys
// alone.
static inline void flashmoba_local_forward(const AttentionTensors* x, const AttentionShape* s) {
    const int D = s->D, S = s->S, stride = (s->H + 2 * s->G) * D;
    const int pieces = (min_int(S, s->T) + ATTENTION_TASK - 1) / ATTENTION_TASK; // of a block
#pragma omp parallel for collapse(4) schedule(dynamic) num_threads(omp_get_max_threads())
    for (int block = s->start / S; block <= (s->T - 1) / S; block++) {
        for (int b = 0; b < s->B; b++) {
            for (int h = 0; h < s->H; h++) {
                for (int piece = 0; piece < pieces; piece++) {
                    const int first_key = block * S, begin = first_key + piece * ATTENTION_TASK;
                    const int first = max_int(s->start, begin);
                    const int end = min_int(min_int(s->T, first_key + S), begin + ATTENTION_TASK);
                    if (first >= end) continue;
                    const FlashmobaScratch scratch = flashmoba_my_scratch(x, s, 0);
                    const floatX* sequence = x->qkv + (size_t)b * s->T * stride;
                    const floatX* k =
                        sequence + (size_t)first_key * stride + (size_t)(s->H + x->kv_of_q[h]) * D;
                    attention_rows_forward(x->out + (((size_t)b * s->T + first) * s->H + h) * D,
                                           x->lse + ((size_t)b * s->H + h) * s->T + first, scratch.attention,
                                           sequence + (size_t)first * stride + (size_t)h * D, k,
                                           k + (size_t)s->G * D, first - first_key, end - first_key, D,
                                           s->H * D, stride, 0);
                }
            }
        }
    }
}

// One step of the online softmax: some keys of one block, for `rows` queries that selected it. The products
// have tile_rows >= rows rows; the last ones are zero.
static inline void flashmoba_tile_forward(const AttentionTensors* x,
                                          const floatX* k,     // (keys, D), stride qkv_stride
                                          const floatX* k_t,   // (D, FLASHMOBA_KEYS), or NULL
                                          const floatX* v,     // (keys, D), stride qkv_stride
                                          const int* rows_ids, // (rows)
                                          const FlashmobaScratch* scratch, const FlashmobaChunk* chunk,
                                          int rows, int tile_rows, int keys, const AttentionShape* s) {
    const int D = s->D, stride = (s->H + 2 * s->G) * D;
    floatX corrections[FLASHMOBA_FORWARD_ROWS];
    for (int r = 0; r < rows; r++)
        memcpy(scratch->q + (size_t)r * D, x->qkv + flashmoba_query(chunk, rows_ids[r], s).q,
               sizeof(floatX) * D);
    memset(scratch->q + (size_t)rows * D, 0, sizeof(floatX) * (size_t)(tile_rows - rows) * D);
    if (k_t) gemm(0, 0, tile_rows, keys, D, scratch->q, D, k_t, FLASHMOBA_KEYS, 0, scratch->scores, keys);
    if (!k_t) gemm(0, 1, tile_rows, keys, D, scratch->q, D, k, stride, 0, scratch->scores, keys);
    for (int r = 0; r < rows; r++)
        corrections[r] =
            softmax_row_update(scratch->scores + (size_t)r * keys, &scratch->row_max[rows_ids[r]],
                               &scratch->row_sum[rows_ids[r]], 0, keys, keys, attention_scale(D));
    gemm(0, 0, tile_rows, D, keys, scratch->scores, keys, v, stride, 0, scratch->result, D);
    for (int r = 0; r < rows; r++) {
        floatX* row = x->out + flashmoba_query(chunk, rows_ids[r], s).out;
        const floatX* more = scratch->result + (size_t)r * D;
#pragma omp simd
        for (int d = 0; d < D; d++) row[d] = row[d] * corrections[r] + more[d];
    }
}

// Adds the selected blocks of a chunk's queries to their outputs, oldest block first. Before, out and lse hold
// the results of the local pass.
static inline void flashmoba_chunk_forward(const AttentionTensors* x, const FlashmobaScratch* scratch,
                                           const FlashmobaChunk* chunk, const AttentionShape* s) {
    const int D = s->D, stride = (s->H + 2 * s->G) * D, num_rows = chunk->heads * chunk->tokens;
    const floatX* keys_of_head = x->qkv + (size_t)chunk->b * s->T * stride + (size_t)(s->H + chunk->g) * D;
    for (int r = 0; r < num_rows; r++) {
        scratch->row_max[r] = x->lse[flashmoba_query(chunk, r, s).row];
        scratch->row_sum[r] = 1;
    }
    const int blocks = (chunk->first_token + chunk->tokens - 1) / s->S;
    // This must not depend on the length of a list. Products with and without transposed keys round
    // differently, and the selections of later tokens must not change a bit of earlier outputs.
    floatX* k_t = num_rows < ATTENTION_FEW_QUERIES ? NULL : scratch->k_t;
    for (int key = 0, keys; key < blocks * s->S; key += keys) {
        const int block = key / s->S, begin = scratch->begin[block], end = scratch->begin[block + 1];
        keys = min_int(FLASHMOBA_KEYS, (block + 1) * s->S - key);
        const floatX* k = keys_of_head + (size_t)key * stride;
        if (begin == end) continue;
        if (k_t) transpose_tile(k_t, k, keys, D, FLASHMOBA_KEYS, stride);
        for (int i = begin, tile_rows; i < end; i += tile_rows) {
            tile_rows = flashmoba_forward_rows(i - begin, keys);
            flashmoba_tile_forward(x, k, k_t, k + (size_t)s->G * D, scratch->rows + i, scratch, chunk,
                                   min_int(tile_rows, end - i), tile_rows, keys, s);
        }
    }
    for (int r = 0; r < num_rows; r++) {
        const FlashmobaQuery query = flashmoba_query(chunk, r, s);
        scale_row(x->out + query.out, 1 / scratch->row_sum[r], D);
        x->lse[query.row] = scratch->row_max[r] + log(scratch->row_sum[r]);
    }
}

// Adds the selected blocks to out and lse of the local pass. Reads selected, qkv and kv_of_q.
static inline void flashmoba_routed_forward(const AttentionTensors* x, const AttentionShape* s) {
    const int chunks = flashmoba_max_chunks(s);
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(omp_get_max_threads())
    for (int i = 0; i < chunks; i++) {
        for (int b = 0; b < s->B; b++) {
            for (int g = 0; g < s->G; g++) {
                FlashmobaChunk chunk;
                if (!flashmoba_chunk(&chunk, x->kv_of_q, b, g, i, s)) continue;
                const FlashmobaScratch scratch = flashmoba_my_scratch(x, s, 0);
                flashmoba_build_lists(scratch.begin, scratch.rows, x->selected, &chunk, 0, moba_blocks(s), s);
                flashmoba_chunk_forward(x, &scratch, &chunk, s);
            }
        }
    }
}

// Bytes of the workspace of flashmoba_forward, for as many threads as omp_get_max_threads() says now or fewer.
static inline size_t flashmoba_forward_workspace(const AttentionShape* s) {
    return omp_get_max_threads() * flashmoba_scratch(NULL, s, 0).bytes;
}

// Reads and writes the same members as moba_forward.
static inline void flashmoba_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    (void)stream;
    flashmoba_local_forward(x, s);
    if (s->K > 1) {
        flashmoba_route(x, s);
        flashmoba_routed_forward(x, s);
    }
    attention_noise(x->noise, x->out, s->B, s->T, s->start, s->H, s->D);
}

// ----------------------------------------------------------------------------
// flashmoba, backward

static inline void flashmoba_add_rows(floatX* to,         // (rows, D), stride to_stride
                                      const floatX* from, // (rows, D)
                                      int rows, int D, int to_stride) {
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < D; d++) to[(size_t)r * to_stride + d] += from[(size_t)r * D + d];
}

// The own block: the queries of one block, of all query heads of a KV head, with the keys of that block,
// causally. It writes these rows of dqkv.
static inline void flashmoba_block_backward(const AttentionTensors* x, const FlashmobaScratch* scratch, int b,
                                            int g, int block, const AttentionShape* s) {
    const int D = s->D, stride = (s->H + 2 * s->G) * D, first = block * s->S;
    const int tokens = min_int(s->S, s->T - first);
    const size_t token = (size_t)b * s->T + first;
    const size_t k = token * stride + (size_t)(s->H + g) * D, v = k + (size_t)s->G * D;
    int first_head, heads;
    moba_group(&first_head, &heads, x->kv_of_q, s->H, g);
    for (int t = 0; t < tokens; t++) {
        memset(x->dqkv + k + (size_t)t * stride, 0, sizeof(floatX) * D);
        memset(x->dqkv + v + (size_t)t * stride, 0, sizeof(floatX) * D);
    }
    for (int h = first_head; h < first_head + heads; h++) {
        const size_t q = token * stride + (size_t)h * D, row = ((size_t)b * s->H + h) * s->T + first;
        const AttentionHead head = {x->dqkv + q,
                                    scratch->dk,
                                    scratch->dv,
                                    x->dout + (token * s->H + h) * D,
                                    x->qkv + q,
                                    x->qkv + k,
                                    x->qkv + v,
                                    x->lse + row,
                                    flashmoba_delta(x) + row,
                                    tokens,
                                    D,
                                    s->H * D,
                                    stride,
                                    0};
        attention_head_backward(&head, scratch->attention, 0, tokens, 0, tokens);
        flashmoba_add_rows(x->dqkv + k, scratch->dk, tokens, D, stride);
        flashmoba_add_rows(x->dqkv + v, scratch->dv, tokens, D, stride);
    }
}

static inline void flashmoba_local_backward(const AttentionTensors* x, const AttentionShape* s) {
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(omp_get_max_threads())
    for (int block = 0; block <= (s->T - 1) / s->S; block++) {
        for (int b = 0; b < s->B; b++) {
            for (int g = 0; g < s->G; g++) {
                const FlashmobaScratch scratch = flashmoba_my_scratch(x, s, 1);
                flashmoba_block_backward(x, &scratch, b, g, block, s);
            }
        }
    }
}

// Some keys of one block and queries that selected it: adds to dq of these queries, and to the scratch's dk
// and dv.
static inline void flashmoba_tile_backward(const AttentionTensors* x,
                                           const floatX* k,     // (keys, D), stride qkv_stride
                                           const int* rows_ids, // (rows)
                                           const FlashmobaScratch* scratch, const FlashmobaChunk* chunk,
                                           int rows, int keys, int with_dq, int with_dkv,
                                           const AttentionShape* s) {
    const int D = s->D, stride = (s->H + 2 * s->G) * D;
    floatX *probs = scratch->scores, *dscores = scratch->dscores;
    for (int r = 0; r < rows; r++) {
        const FlashmobaQuery query = flashmoba_query(chunk, rows_ids[r], s);
        memcpy(scratch->q + (size_t)r * D, x->qkv + query.q, sizeof(floatX) * D);
        memcpy(scratch->dout + (size_t)r * D, x->dout + query.out, sizeof(floatX) * D);
    }
    gemm(0, 0, rows, keys, D, scratch->q, D, scratch->k_t, FLASHMOBA_KEYS, 0, probs, keys);
    gemm(0, 0, rows, keys, D, scratch->dout, D, scratch->v_t, FLASHMOBA_KEYS, 0, dscores, keys);
    for (int r = 0; r < rows; r++) {
        const size_t row = flashmoba_query(chunk, rows_ids[r], s).row;
        softmax_row_backward(probs + (size_t)r * keys, dscores + (size_t)r * keys, x->lse[row],
                             flashmoba_delta(x)[row], 0, keys, keys, attention_scale(D));
    }
    if (with_dkv) gemm(1, 0, keys, D, rows, probs, keys, scratch->dout, D, 1, scratch->dv, D);
    if (with_dkv) gemm(1, 0, keys, D, rows, dscores, keys, scratch->q, D, 1, scratch->dk, D);
    if (!with_dq) return;
    gemm(0, 0, rows, D, keys, dscores, keys, k, stride, 0, scratch->result, D);
    for (int r = 0; r < rows; r++) {
        floatX* dq = x->dqkv + flashmoba_query(chunk, rows_ids[r], s).q;
        const floatX* more = scratch->result + (size_t)r * D;
        for (int d = 0; d < D; d++) dq[d] += more[d];
    }
}

// Adds the gradients of the blocks first_block..end_block-1 and the queries of a chunk that selected them.
static inline void flashmoba_chunk_backward(const AttentionTensors* x, const FlashmobaScratch* scratch,
                                            const FlashmobaChunk* chunk, int first_block, int end_block,
                                            int with_dq, int with_dkv, const AttentionShape* s) {
    const int D = s->D, stride = (s->H + 2 * s->G) * D;
    flashmoba_build_lists(scratch->begin, scratch->rows, x->selected, chunk, first_block, end_block, s);
    for (int key = first_block * s->S, keys; key < end_block * s->S; key += keys) {
        const int block = key / s->S, begin = scratch->begin[block], end = scratch->begin[block + 1];
        keys = min_int(FLASHMOBA_KEYS, (block + 1) * s->S - key);
        if (begin == end) continue;
        const size_t k = ((size_t)chunk->b * s->T + key) * stride + (size_t)(s->H + chunk->g) * D;
        const size_t v = k + (size_t)s->G * D;
        transpose_tile(scratch->k_t, x->qkv + k, keys, D, FLASHMOBA_KEYS, stride);
        transpose_tile(scratch->v_t, x->qkv + v, keys, D, FLASHMOBA_KEYS, stride);
        memset(scratch->dk, 0, sizeof(floatX) * keys * D);
        memset(scratch->dv, 0, sizeof(floatX) * keys * D);
        for (int i = begin; i < end; i += flashmoba_tile_rows(keys))
            flashmoba_tile_backward(x, x->qkv + k, scratch->rows + i, scratch, chunk,
                                    min_int(flashmoba_tile_rows(keys), end - i), keys, with_dq, with_dkv, s);
        if (with_dkv) flashmoba_add_rows(x->dqkv + k, scratch->dk, keys, D, stride);
        if (with_dkv) flashmoba_add_rows(x->dqkv + v, scratch->dv, keys, D, stride);
    }
}

// Adds the gradients of the selected blocks. If there are enough KV heads to keep the threads busy, one task
// is one KV head. Otherwise tasks are chunks for dq and ranges of blocks for dk and dv. This keeps any number
// of threads busy, but needs 7 products instead of 5 (scores and dout v^T are computed twice). Both ways give
// the same sums in the same order.
static inline void flashmoba_routed_backward(const AttentionTensors* x, const AttentionShape* s) {
    const int threads = omp_get_max_threads(), heads = s->B * s->G, blocks = moba_blocks(s);
    const int whole_heads = 5 * ((heads + threads - 1) / threads) * threads <= 7 * heads;
    const int chunks = flashmoba_max_chunks(s), ranges = min_int(blocks, 16);
    const int tasks = whole_heads ? 1 : chunks + ranges;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int task = 0; task < tasks; task++) {
        for (int bg = 0; bg < heads; bg++) {
            const FlashmobaScratch scratch = flashmoba_my_scratch(x, s, 1);
            const int with_dq = whole_heads || task >= ranges, with_dkv = whole_heads || task < ranges;
            const int first = with_dq ? 0 : (int)((size_t)blocks * task / ranges);
            const int end = with_dq ? blocks : (int)((size_t)blocks * (task + 1) / ranges);
            const int only_chunk = whole_heads || with_dkv ? -1 : task - ranges;
            FlashmobaChunk chunk;
            for (int i = max_int(0, only_chunk); i <= (only_chunk < 0 ? chunks : only_chunk); i++)
                if (flashmoba_chunk(&chunk, x->kv_of_q, bg / s->G, bg % s->G, i, s))
                    flashmoba_chunk_backward(x, &scratch, &chunk, first, end, with_dq, with_dkv, s);
        }
    }
}

// Bytes of the workspace of flashmoba_backward, for as many threads as omp_get_max_threads() says now or fewer.
static inline size_t flashmoba_backward_workspace(const AttentionShape* s) {
    return flashmoba_delta_bytes(s) + omp_get_max_threads() * flashmoba_scratch(NULL, s, 1).bytes;
}

// Reads and writes the same members as moba_backward.
static inline void flashmoba_backward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    (void)stream;
    assert(s->start == 0);
    attention_delta(flashmoba_delta(x), x, s);
    flashmoba_local_backward(x, s);
    if (s->K > 1) flashmoba_routed_backward(x, s);
}

#endif
