/*
moba: mixture of block attention as it was first published (Lu et al., MoBA, arXiv 2502.13189,
algorithm 1). It is here for comparison with flashmoba. The twin of moba_forward and moba_backward in
dev/cpu/moba.h. It computes the same function as flashmoba_forward and flashmoba_backward (moba.cuh), by
another algorithm (docs/math.md section 2).

    const AttentionShape s = {B, T, 0, H, G, D, 0, S, K};
    x.workspace = device_malloc(moba_forward_workspace(&s), "attention");    // AttentionTensors x
    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);   // kernels/keys.cuh
    moba_forward(&x, &s, stream);
    x.workspace = device_malloc(moba_backward_workspace(&s), "attention");
    moba_backward(&x, &s, stream);

    scores       of every query with every block: a matrix of fp32 in memory
    selection    the best K-1 blocks of each row of the matrix
    pairs        (query, selected block), in the order of blocks and then tokens
    gather       the queries of the pairs, copied into neighbouring rows
    attention    once for the block's own tokens, causally, and once for its pairs
    merge        of a query's own attention and its pairs, by their log-sum-exp

The backward rebuilds the pairs from the selection and makes the same two passes. All sums have a fixed order,
so every run gives the same bits. Time and memory are quadratic in T, and nothing is pipelined.
Bytes: docs/results/kernels.md.
*/
#ifndef KERNELS_MOBA_PLAIN_CUH
#define KERNELS_MOBA_PLAIN_CUH

// AttentionShape, AttentionTensors, MobaRank, moba_supports, moba_take
#include "kernels/moba_shape.cuh"

// Most keys that are in shared memory at one time.
#if defined(PRECISION_BF16)
enum { MOBA_KEYS = 64 };
#else
enum { MOBA_KEYS = 32 };
#endif
enum { MOBA_WARPS = 4, MOBA_THREADS = WARP * MOBA_WARPS, MOBA_QUERIES = 16 * MOBA_WARPS };
enum { MOBA_COLUMNS = 16 }; // keys of one product
// Thread blocks that share the pairs of one key block.
enum { MOBA_SHARES = 8 };

// Sizes and arrays of one call. A pair is a query and a key block that it selected.
typedef struct {
    int B, T, start, H, G, S, K;
    int blocks;          // complete blocks, with all S keys: the ones that can be selected
    int keys;            // keys of a block that are in shared memory at one time
    size_t most;         // room for this many pairs of a head
    const floatX* qkv;   // (B, T, H + 2G, D)
    const int* selected; // (B, H, T, K-1)
    const int* kv_of_q;  // (H)
    // the pairs
    unsigned char* choices; // (B, H, blocks, T) 1 + the choice that selected the block; 0: not selected
    int* begins;            // (B, H, blocks + 1) index of the first pair of a block
    int* tokens;            // (B, H, most) token of a pair's query
    int* places;            // (B, H, T, K-1) index of the pair of a choice
    floatX* queries;        // (B, H, most, D) gathered queries
    floatX* gradients;      // (B, H, most, D) gathered gradients of the outputs (backward only)
} MobaPairs;

// ----------------------------------------------------------------------------
// Scores and selection

enum { MOBA_TILE = 32, MOBA_TILE_ROWS = 8 };

// A thread block computes the scores of a tile of queries with a tile of key blocks. Every score is one sum
// in the order of d, so equal centroids give equal scores.
template <int D>
__global__ void moba_scores_kernel(float* scores,          // (B, H, T, blocks)
                                   const float* centroids, // (B, blocks, G, D)
                                   MobaPairs x) {
    __shared__ float queries[MOBA_TILE][MOBA_TILE + 1], means[MOBA_TILE][MOBA_TILE + 1];
    const int head = blockIdx.z, b = head / x.H, h = head % x.H, column = threadIdx.x;
    const int first_block = blockIdx.x * MOBA_TILE, first_query = x.start + blockIdx.y * MOBA_TILE;
    if (first_block >= (min(x.T, first_query + MOBA_TILE) - 1) / x.S) return; // no query is past them
    const floatX* q = x.qkv + (size_t)b * x.T * (x.H + 2 * x.G) * D + h * D;
    const float* of_head = centroids + ((size_t)b * x.blocks * x.G + x.kv_of_q[h]) * D;
    float sums[MOBA_TILE / MOBA_TILE_ROWS] = {};
    for (int d = 0; d < D; d += MOBA_TILE) {
        __syncthreads(); // no thread reads the previous tile any more
        for (int row = threadIdx.y; row < MOBA_TILE; row += MOBA_TILE_ROWS) {
            const size_t t = min(first_query + row, x.T - 1), block = min(first_block + row, x.blocks - 1);
            queries[row][column] = to_float(q[t * (x.H + 2 * x.G) * D + d + column]);
            means[row][column] = of_head[block * x.G * D + d + column];
        }
        __syncthreads();
        for (int i = 0; i < MOBA_TILE; i++)
            for (int row = threadIdx.y; row < MOBA_TILE; row += MOBA_TILE_ROWS)
                sums[row / MOBA_TILE_ROWS] += queries[row][i] * means[column][i];
    }
    for (int row = threadIdx.y; row < MOBA_TILE; row += MOBA_TILE_ROWS)
        if (first_query + row < x.T && first_block + column < x.blocks)
            scores[((size_t)head * x.T + first_query + row) * x.blocks + first_block + column] =
                sums[row / MOBA_TILE_ROWS];
}

// The highest rank of all lanes of a warp.
static __device__ __forceinline__ MobaRank moba_highest(MobaRank rank) {
    for (int other = WARP / 2; other > 0; other /= 2) {
        const MobaRank theirs = __shfl_xor_sync(ALL_LANES, rank, other);
        rank = theirs > rank ? theirs : rank;
    }
    return rank;
}

// Top-k selection, one warp for each query. The warp finds the highest rank, then the highest below it, and
// so on K-1 times. All blocks that rank no lower than the last one are selected. They are written the newest
// first, then -1.
static __global__ void moba_select_kernel(int* selected, // (B, H, T, K-1)
                                          const float* scores, MobaPairs x) {
    const int t = x.start + blockIdx.x * MOBA_WARPS + warp_of_block(), eligible = t / x.S;
    if (t >= x.T) return;
    const size_t row = (size_t)blockIdx.y * x.T + t;
    const int lane = lane_of_warp(), most = x.K - 1;
    auto rank = [&](int block) { return moba_rank(scores[row * x.blocks + block], block, eligible); };
    MobaRank lowest = ~0ull;
    for (int taken = 0; taken < most; taken++) {
        MobaRank best = 0;
        for (int block = lane; block < eligible; block += WARP) {
            const MobaRank candidate = rank(block);
            if (candidate < lowest && candidate > best) best = candidate;
        }
        best = moba_highest(best);
        if (best == 0) break;
        lowest = best;
    }
    int written = 0;
    for (int newest = eligible - 1; newest >= 0; newest -= WARP) {
        const int block = newest - lane;
        const bool is_selected = block >= 0 && rank(block) >= lowest;
        const unsigned lanes = __ballot_sync(ALL_LANES, is_selected);
        if (is_selected) selected[row * most + written + __popc(lanes & ((1u << lane) - 1))] = block;
        written += __popc(lanes);
    }
    for (int choice = written + lane; choice < most; choice += WARP) selected[row * most + choice] = -1;
}

// ----------------------------------------------------------------------------
// Pairs

// Marks every selected block in the matrix `choices`, and counts the pairs of each block. One thread for each
// choice.
static __global__ void moba_mark_kernel(MobaPairs x) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
    const int t = x.start + (int)(i / (x.K - 1)), choice = (int)(i % (x.K - 1));
    if (t >= x.T) return;
    const int block = x.selected[(head * x.T + t) * (x.K - 1) + choice];
    if (block < 0) return;
    x.choices[(head * x.blocks + block) * x.T + t] = (unsigned char)(choice + 1);
    atomicAdd(x.begins + head * (x.blocks + 1) + block + 1, 1);
}

// Prefix sum: the number of pairs of each block becomes the index of its first pair. One thread for each
// head.
static __global__ void moba_scan_kernel(MobaPairs x) {
    const int head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= x.B * x.H) return;
    int* begins = x.begins + (size_t)head * (x.blocks + 1);
    for (int block = 0; block < x.blocks; block++) begins[block + 1] += begins[block];
}

// Scatter: writes the pairs of a block in the order of tokens. A warp goes through the block's row of the
// matrix, 32 tokens at a time.
static __global__ void moba_fill_kernel(MobaPairs x) {
    const size_t head = blockIdx.y;
    const int block = blockIdx.x, lane = lane_of_warp();
    const unsigned char* choices = x.choices + (head * x.blocks + block) * x.T;
    int pair = x.begins[head * (x.blocks + 1) + block];
    for (int first = 0; first < x.T; first += WARP) {
        const int t = first + lane, choice = t < x.T ? choices[t] : 0;
        const unsigned lanes = __ballot_sync(ALL_LANES, choice > 0);
        const int own = pair + __popc(lanes & ((1u << lane) - 1));
        pair += __popc(lanes);
        if (choice == 0) continue;
        x.tokens[head * x.most + own] = t;
        x.places[(head * x.T + t) * (x.K - 1) + choice - 1] = own;
    }
}

// Copies the row of each pair's query to the place of the pair. A thread copies 16 bytes.
enum { MOBA_COPY_THREADS = 128 };
template <int D>
__global__ void moba_gather_kernel(floatX* gathered,   // (B, H, most, D)
                                   const floatX* rows, // (B, T, heads, D) reads the first H heads
                                   int heads, MobaPairs x) {
    constexpr int LANES = D / CHUNK;
    const size_t pair = ((size_t)blockIdx.x * MOBA_COPY_THREADS + threadIdx.x) / LANES, head = blockIdx.y;
    const int column = threadIdx.x % LANES * CHUNK;
    if (pair >= (size_t)x.begins[head * (x.blocks + 1) + x.blocks]) return;
    const size_t token = head / x.H * x.T + x.tokens[head * x.most + pair];
    *(uint4*)(gathered + (head * x.most + pair) * D + column) =
        *(const uint4*)(rows + (token * heads + head % x.H) * D + column);
}

// ----------------------------------------------------------------------------
// Attention of a block's own tokens (OWN), and of its pairs. In both cases the queries are neighbouring rows
// of a matrix.

typedef struct {
    int first, end; // rows
} MobaRows;

// The block's own tokens, from x.start on.
static __device__ __forceinline__ MobaRows moba_own(const MobaPairs& x, int block) {
    const MobaRows rows = {max(x.start, block * x.S), min(x.T, (block + 1) * x.S)};
    return rows;
}

// The pairs of a block. A last block with fewer than S keys has none.
static __device__ __forceinline__ MobaRows moba_chosen(const MobaPairs& x, int head, int block) {
    MobaRows rows = {0, 0};
    if (block < x.blocks && x.K > 1) {
        const int* begins = x.begins + (size_t)head * (x.blocks + 1) + block;
        rows.first = begins[0], rows.end = begins[1];
    }
    return rows;
}

// The query tiles of one key block are divided among `shares` thread blocks. A warp computes 16 rows of a
// tile.
template <int D, bool OWN>
__global__ void __launch_bounds__(MOBA_THREADS)
    moba_forward_kernel(floatX* out, // own tokens: (B, T, H, D), pairs: (B, H, most, D)
                        float* lse,  // own tokens: (B, H, T), pairs: (B, H, most)
                        MobaPairs x, int first_block, int shares, float scale_log2) {
    SHARED_MEMORY(floatX, shared);
    floatX* q_tile = shared;
    floatX* k_tile = q_tile + MOBA_QUERIES * D;
    floatX* v_tile = k_tile + x.keys * D;

    const int block = first_block + blockIdx.x / shares, share = blockIdx.x % shares, head = blockIdx.y;
    const int b = head / x.H, h = head % x.H, stride = (x.H + 2 * x.G) * D, lane = lane_of_warp();
    const floatX* sequence = x.qkv + (size_t)b * x.T * stride;
    const floatX* k = sequence + (x.H + x.kv_of_q[h]) * D;
    const floatX* queries = OWN ? sequence + h * D : x.queries + head * x.most * D;
    floatX* of_head = OWN ? out + ((size_t)b * x.T * x.H + h) * D : out + head * x.most * D;
    float* lse_of_head = lse + head * (OWN ? x.T : x.most);
    const MobaRows rows = OWN ? moba_own(x, block) : moba_chosen(x, head, block);
    const int warp_row = warp_of_block() * 16;

    for (int query = rows.first + share * MOBA_QUERIES; query < rows.end; query += shares * MOBA_QUERIES) {
        const bool some = query + warp_row < rows.end;
        TileRows<1, D, false> q;
        RunningSoftmax<1> softmax;
        float sum[1][D / 8][4], scores[1][MOBA_COLUMNS / 8][4];
        q.take(q_tile, warp_row);
        softmax.begin();
        clear(sum);
        __syncthreads(); // no thread uses the previous queries any more
        load_tile<D>(q_tile, neighbours(queries, OWN ? stride : D, query, rows.end), MOBA_QUERIES);
        for (int key = block * x.S; key < (block + 1) * x.S; key += x.keys) {
            __syncthreads(); // no thread uses the previous keys and values any more
            load_tile<D>(k_tile, neighbours(k, stride, key, x.T), x.keys);
            load_tile<D>(v_tile, neighbours(k + x.G * D, stride, key, x.T), x.keys);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            for (int column = 0; some && column < x.keys; column += MOBA_COLUMNS) {
                multiply_transposed(scores, q, k_tile, column);
                if (OWN) hide_scores(scores, query + warp_row, key + column, x.T);
                softmax.update(scores, sum, scale_log2);
                multiply_add(sum, scores, v_tile, column);
            }
        }
        if (!some) continue;
        for (int half = 0; half < 2; half++) {
            const int row = query + warp_row + lane / 4 + 8 * half;
            const float total = row_total(softmax.sum[0][half]), inverse = 1 / total;
#pragma unroll
            for (int c = 0; c < D / 8; c++)
#pragma unroll
                for (int i = 0; i < 2; i++) sum[0][c][2 * half + i] *= inverse;
            if (lane % 4 == 0 && row < rows.end)
                lse_of_head[row] = softmax.maximum[0][half] * LN2 + logf(total);
        }
        __syncwarp(); // the rows replace the warp's own queries, which all its lanes have read
        store_rows(neighbours(of_head, OWN ? x.H * D : D, query, rows.end), q_tile, warp_row, sum);
    }
}

// Merges the pairs of a query into the output of its own block, in the order of its choices. A thread has 16
// bytes of a row.
template <int D>
__global__ void moba_merge_kernel(floatX* out,           // (B, T, H, D) in and out
                                  float* lse,            // (B, H, T)
                                  const float* own_lse,  // (B, H, T)
                                  const floatX* of_pair, // (B, H, most, D)
                                  const float* pair_lse, // (B, H, most)
                                  MobaPairs x) {
    constexpr int LANES = D / CHUNK;
    const int t = x.start + (blockIdx.x * MOBA_COPY_THREADS + threadIdx.x) / LANES;
    const int column = threadIdx.x % LANES * CHUNK;
    if (t >= x.T) return;
    const size_t head = blockIdx.y, row = head * x.T + t, first_pair = head * x.most;
    const int* selected = x.selected + row * (x.K - 1);
    const int* places = x.places + row * (x.K - 1);
    float maximum = own_lse[row];
    for (int i = 0; i < x.K - 1 && selected[i] >= 0; i++)
        maximum = fmaxf(maximum, pair_lse[first_pair + places[i]]);
    floatX* own = out + ((head / x.H * x.T + t) * x.H + head % x.H) * D + column;
    Values<CHUNK> sum = load<CHUNK>(own);
    float total = expf(own_lse[row] - maximum);
    for (int c = 0; c < CHUNK; c++) sum.at[c] *= total;
    for (int i = 0; i < x.K - 1 && selected[i] >= 0; i++) {
        const size_t pair = first_pair + places[i];
        const float weight = expf(pair_lse[pair] - maximum);
        const Values<CHUNK> more = load<CHUNK>(of_pair + pair * D + column);
        total += weight;
        for (int c = 0; c < CHUNK; c++) sum.at[c] += weight * more.at[c];
    }
    for (int c = 0; c < CHUNK; c++) sum.at[c] /= total;
    store(own, sum);
    if (column == 0) lse[row] = maximum + logf(total);
}

// Writes rows start..T-1 of the output with pgqa's noise. A thread has 16 bytes of a row. The noise needs all
// lanes of a warp, so threads beyond the last row repeat it and store nothing.
template <int D>
__global__ void moba_noise_kernel(const floatX* out, // (B, T, H, D)
                                  MobaPairs x, NoisedRows noise) {
    constexpr int LANES = D / CHUNK;
    const size_t of_sequence = (size_t)(x.T - x.start) * x.H, rows = x.B * of_sequence;
    const size_t i = ((size_t)blockIdx.x * MOBA_COPY_THREADS + threadIdx.x) / LANES;
    const size_t at = i < rows ? i : rows - 1;
    const size_t row = at / of_sequence * x.T * x.H + (size_t)x.start * x.H + at % of_sequence;
    const int column = threadIdx.x % LANES * CHUNK;
    const Values<CHUNK> noised = noise_row<D>(load<CHUNK>(out + row * D + column), row, column, noise);
    if (i < rows) store(noise.noised + row * D + column, noised);
}

// ----------------------------------------------------------------------------
// Backward

enum { MOBA_BACKWARD_QUERIES = 32 }; // queries of a tile of moba_backward_keys_kernel

// One thread block computes dk and dv of x.keys keys of one KV head. For each query head of the KV head it
// adds the block's own tokens, then its pairs. A warp owns 16 keys. The scores are transposed, as in gqa.cuh.
template <int D>
__global__ void __launch_bounds__(2 * MOBA_KEYS)
    moba_backward_keys_kernel(floatX* dqkv,             // (B, T, H + 2G, D)
                              const floatX* dout,       // (B, T, H, D)
                              const float2* statistics, // (B, H, padded), as gqa.cuh has them
                              MobaPairs x, int padded, float scale) {
    constexpr int QUERIES = MOBA_BACKWARD_QUERIES;
    SHARED_MEMORY(floatX, shared);
    floatX* k_tile = shared;
    floatX* v_tile = k_tile + x.keys * D;
    floatX* q_tile = v_tile + x.keys * D;
    floatX* dout_tile = q_tile + QUERIES * D;
    float2* of_rows = (float2*)(dout_tile + QUERIES * D); // (QUERIES)

    const int g = blockIdx.y, b = blockIdx.z, stride = (x.H + 2 * x.G) * D, lane = lane_of_warp();
    const int first_key = blockIdx.x * x.keys, block = first_key / x.S, warp_row = warp_of_block() * 16;
    const int first_head = count_heads_below(g, x.kv_of_q, x.H),
              end_head = count_heads_below(g + 1, x.kv_of_q, x.H);
    const size_t sequence = (size_t)b * x.T * stride, of_group = sequence + (x.H + g) * D;
    const float scale_log2 = scale * LOG2_E;
    TileRows<1, D, false> k, v;
    float dk[1][D / 8][4], dv[1][D / 8][4];
    clear(dk);
    clear(dv);
    load_tile<D>(k_tile, neighbours(x.qkv + of_group, stride, first_key, x.T), x.keys);
    load_tile<D>(v_tile, neighbours(x.qkv + of_group + x.G * D, stride, first_key, x.T), x.keys);
    cp_async_commit();
    k.take(k_tile, warp_row), v.take(v_tile, warp_row);
    for (int turn = 2 * first_head; turn < 2 * end_head; turn++) {
        const int h = turn / 2;
        const bool own = turn % 2 == 0;
        const size_t head = (size_t)b * x.H + h;
        const MobaRows rows = own ? moba_own(x, block) : moba_chosen(x, (int)head, block);
        const floatX* queries = own ? x.qkv + sequence + h * D : x.queries + head * x.most * D;
        const floatX* gradients =
            own ? dout + ((size_t)b * x.T * x.H + h) * D : x.gradients + head * x.most * D;
        for (int query = rows.first; query < rows.end; query += QUERIES) {
            __syncthreads(); // no thread uses the previous tile any more
            load_tile<D>(q_tile, neighbours(queries, own ? stride : D, query, rows.end), QUERIES);
            load_tile<D>(dout_tile, neighbours(gradients, own ? x.H * D : D, query, rows.end), QUERIES);
            for (int row = threadIdx.x; row < QUERIES; row += blockDim.x) {
                of_rows[row] = make_float2(INFINITY, 0); // a row that does not exist has no probability
                if (query + row < rows.end)
                    of_rows[row] = statistics[head * padded +
                                              (own ? query + row : x.tokens[head * x.most + query + row])];
            }
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            float probs[1][QUERIES / 8][4], dscores[1][QUERIES / 8][4];
            multiply_transposed(probs, k, q_tile, 0);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = n * 8 + lane % 4 * 2 + i % 2;
                    probs[0][n][i] = exp2_approximate(fmaf(probs[0][n][i], scale_log2, -of_rows[row].x));
                    if (own && first_key + warp_row + lane / 4 + i / 2 * 8 > query + row) probs[0][n][i] = 0;
                }
            multiply_add(dv, probs, dout_tile, 0);
            multiply_transposed(dscores, v, dout_tile, 0);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    dscores[0][n][i] =
                        probs[0][n][i] * (dscores[0][n][i] - of_rows[n * 8 + lane % 4 * 2 + i % 2].y);
            multiply_add(dk, dscores, q_tile, 0);
        }
    }
    // If no query head reads this KV head, the loop above has waited for nothing.
    cp_async_wait<0>();
    __syncthreads();
    scale_rows(dk, scale);
    store_rows(neighbours(dqkv + of_group, stride, first_key, x.T), k_tile, warp_row, dk);
    store_rows(neighbours(dqkv + of_group + x.G * D, stride, first_key, x.T), v_tile, warp_row, dv);
}

// dq of the own block or of the pairs, divided among thread blocks as in moba_forward_kernel.
template <int D, bool OWN>
__global__ void __launch_bounds__(MOBA_THREADS)
    moba_backward_queries_kernel(floatX* dq,         // own tokens: (B, T, H + 2G, D), pairs: (B, H, most, D)
                                 const floatX* dout, // (B, T, H, D)
                                 const float2* statistics, // (B, H, padded)
                                 MobaPairs x, int shares, int padded, float scale) {
    SHARED_MEMORY(floatX, shared);
    floatX* q_tile = shared;
    floatX* dout_tile = q_tile + MOBA_QUERIES * D;
    floatX* k_tile = dout_tile + MOBA_QUERIES * D;
    floatX* v_tile = k_tile + x.keys * D;

    const int block = blockIdx.x / shares, share = blockIdx.x % shares, head = blockIdx.y;
    const int b = head / x.H, h = head % x.H, stride = (x.H + 2 * x.G) * D, lane = lane_of_warp();
    const size_t sequence = (size_t)b * x.T * stride;
    const floatX* k = x.qkv + sequence + (x.H + x.kv_of_q[h]) * D;
    const floatX* queries = OWN ? x.qkv + sequence + h * D : x.queries + head * x.most * D;
    const floatX* gradients = OWN ? dout + ((size_t)b * x.T * x.H + h) * D : x.gradients + head * x.most * D;
    floatX* of_head = OWN ? dq + sequence + h * D : dq + head * x.most * D;
    const MobaRows rows = OWN ? moba_own(x, block) : moba_chosen(x, head, block);
    const int warp_row = warp_of_block() * 16;
    const float scale_log2 = scale * LOG2_E;

    for (int query = rows.first + share * MOBA_QUERIES; query < rows.end; query += shares * MOBA_QUERIES) {
        const bool some = query + warp_row < rows.end;
        TileRows<1, D, false> q, gradient;
        float sum[1][D / 8][4], scores[1][MOBA_COLUMNS / 8][4], dscores[1][MOBA_COLUMNS / 8][4];
        float2 of_rows[2];
        for (int half = 0; half < 2; half++) {
            const int row = min(query + warp_row + lane / 4 + 8 * half, rows.end - 1);
            of_rows[half] = statistics[(size_t)head * padded + (OWN ? row : x.tokens[head * x.most + row])];
        }
        q.take(q_tile, warp_row), gradient.take(dout_tile, warp_row);
        clear(sum);
        __syncthreads(); // no thread uses the previous queries any more
        load_tile<D>(q_tile, neighbours(queries, OWN ? stride : D, query, rows.end), MOBA_QUERIES);
        load_tile<D>(dout_tile, neighbours(gradients, OWN ? x.H * D : D, query, rows.end), MOBA_QUERIES);
        for (int key = block * x.S; key < (block + 1) * x.S; key += x.keys) {
            __syncthreads(); // no thread uses the previous keys and values any more
            load_tile<D>(k_tile, neighbours(k, stride, key, x.T), x.keys);
            load_tile<D>(v_tile, neighbours(k + x.G * D, stride, key, x.T), x.keys);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            for (int column = 0; some && column < x.keys; column += MOBA_COLUMNS) {
                multiply_transposed(scores, q, k_tile, column);
                if (OWN) hide_scores(scores, query + warp_row, key + column, x.T);
                multiply_transposed(dscores, gradient, v_tile, column);
#pragma unroll
                for (int n = 0; n < MOBA_COLUMNS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        dscores[0][n][i] =
                            exp2_approximate(fmaf(scores[0][n][i], scale_log2, -of_rows[i / 2].x)) *
                            (dscores[0][n][i] - of_rows[i / 2].y);
                multiply_add(sum, dscores, k_tile, column);
            }
        }
        if (!some) continue;
        scale_rows(sum, scale);
        __syncwarp(); // the rows replace the warp's own queries, which all its lanes have read
        store_rows(neighbours(of_head, OWN ? stride : D, query, rows.end), q_tile, warp_row, sum);
    }
}

// Adds the dq of a query's pairs to that of its own block, in the order of its choices. A thread has 16 bytes
// of a row.
template <int D>
__global__ void moba_merge_queries_kernel(floatX* dqkv,          // (B, T, H + 2G, D) in and out
                                          const floatX* of_pair, // (B, H, most, D)
                                          MobaPairs x) {
    constexpr int LANES = D / CHUNK;
    const int t = (blockIdx.x * MOBA_COPY_THREADS + threadIdx.x) / LANES;
    const int column = threadIdx.x % LANES * CHUNK;
    if (t >= x.T) return;
    const size_t head = blockIdx.y, row = head * x.T + t;
    floatX* own = dqkv + ((head / x.H * x.T + t) * (x.H + 2 * x.G) + head % x.H) * D + column;
    Values<CHUNK> sum = load<CHUNK>(own);
    for (int i = 0; i < x.K - 1 && x.selected[row * (x.K - 1) + i] >= 0; i++) {
        const size_t pair = head * x.most + x.places[row * (x.K - 1) + i];
        const Values<CHUNK> more = load<CHUNK>(of_pair + pair * D + column);
        for (int c = 0; c < CHUNK; c++) sum.at[c] += more.at[c];
    }
    store(own, sum);
}

// ----------------------------------------------------------------------------
// Workspaces

typedef struct {
    MobaPairs pairs;
    floatX* of_pairs; // (B, H, most, D) of the pairs: outputs (forward) or gradients of queries (backward)
    // forward
    float* scores;   // (B, H, T, blocks)
    float* own_lse;  // (B, H, T)
    float* pair_lse; // (B, H, most)
    // backward
    float2* statistics; // (B, H, padded)
} MobaWorkspace;

// Lays out the workspace of a call and returns its bytes. If memory is NULL, it only counts the bytes.
static inline size_t moba_lay_out(MobaWorkspace* w, char* memory, const AttentionShape* s, int is_backward) {
    MobaPairs* x = &w->pairs;
    const size_t heads = (size_t)s->B * s->H, T = (size_t)s->T;
    const size_t forward = !is_backward, backward = is_backward != 0; // factors 0 or 1
    size_t used = 0;
    x->B = s->B, x->T = s->T, x->start = s->start, x->H = s->H, x->G = s->G, x->S = s->S, x->K = s->K;
    x->blocks = s->T / s->S;
    x->keys = s->S < MOBA_KEYS ? s->S : (int)MOBA_KEYS;
    x->most = T * (s->K - 1);
    const size_t pairs = heads * x->most, matrix = s->K > 1 ? heads * T * x->blocks : 0;
    x->choices = (unsigned char*)moba_take(memory, &used, matrix, 1);
    x->begins = (int*)moba_take(memory, &used, heads * (x->blocks + 1), sizeof(int));
    x->tokens = (int*)moba_take(memory, &used, pairs, sizeof(int));
    x->places = (int*)moba_take(memory, &used, pairs, sizeof(int));
    x->queries = (floatX*)moba_take(memory, &used, pairs * s->D, sizeof(floatX));
    x->gradients = (floatX*)moba_take(memory, &used, backward * pairs * s->D, sizeof(floatX));
    w->of_pairs = (floatX*)moba_take(memory, &used, pairs * s->D, sizeof(floatX));
    w->scores = (float*)moba_take(memory, &used, forward * matrix, sizeof(float));
    w->own_lse = (float*)moba_take(memory, &used, forward * heads * T, sizeof(float));
    w->pair_lse = (float*)moba_take(memory, &used, forward * pairs, sizeof(float));
    w->statistics =
        (float2*)moba_take(memory, &used, backward * heads * attention_padded(s->T), sizeof(float2));
    return used;
}

static inline size_t moba_forward_workspace(const AttentionShape* s) {
    MobaWorkspace workspace;
    return moba_lay_out(&workspace, NULL, s, 0);
}

static inline size_t moba_backward_workspace(const AttentionShape* s) {
    MobaWorkspace workspace;
    return moba_lay_out(&workspace, NULL, s, 1);
}

// The workspace of a call, with the tensors that the pairs come from.
static inline MobaWorkspace moba_workspace_of(const AttentionTensors* tensors, const AttentionShape* s,
                                              int is_backward) {
    MobaWorkspace w;
    if (!moba_supports(s)) moba_refuse(s);
    moba_lay_out(&w, (char*)tensors->workspace, s, is_backward);
    w.pairs.qkv = tensors->qkv, w.pairs.selected = tensors->selected, w.pairs.kv_of_q = tensors->kv_of_q;
    return w;
}

// ----------------------------------------------------------------------------
// The operations

// Grid of the copies and merges: one thread for every 16 bytes of `rows` rows.
template <int D> static inline dim3 moba_copy_grid(size_t rows, int heads) {
    return dim3((unsigned)ceil_div(rows, MOBA_COPY_THREADS / (D / CHUNK)), (unsigned)heads);
}

// Whether any query can have a pair.
static inline int moba_has_pairs(const MobaPairs* x) { return x->K > 1 && x->blocks > 0; }

// Makes the pairs from the selection, and gathers their queries.
template <int D> static inline void moba_pair_up(const MobaPairs* x, stream_t stream) {
    const int heads = x->B * x->H;
    const size_t choices = (size_t)(x->T - x->start) * (x->K - 1);
    device_zero(x->choices, (size_t)heads * x->blocks * x->T, stream);
    device_zero(x->begins, sizeof(int) * heads * (x->blocks + 1), stream);
    launch(moba_mark_kernel, dim3(flat_grid(choices, 1).x, (unsigned)heads), FLAT_BLOCK, 0, stream, *x);
    launch(moba_scan_kernel, ceil_div(heads, WARP), WARP, 0, stream, *x);
    launch(moba_fill_kernel, dim3((unsigned)x->blocks, (unsigned)heads), WARP, 0, stream, *x);
    launch(moba_gather_kernel<D>, moba_copy_grid<D>(x->most, heads), MOBA_COPY_THREADS, 0, stream, x->queries,
           x->qkv, x->H + 2 * x->G, *x);
}

template <int D>
static inline void moba_forward_launch(const AttentionTensors* tensors, const MobaWorkspace* w,
                                       stream_t stream) {
    const MobaPairs* x = &w->pairs;
    const int heads = x->B * x->H, rows = x->T - x->start, first_block = x->start / x->S;
    const int own_shares = ceil_div(x->S, MOBA_QUERIES);
    const size_t shared = sizeof(floatX) * D * (MOBA_QUERIES + 2 * x->keys);
    const float scale_log2 = attention_scale(D) * LOG2_E;
    if (moba_has_pairs(x))
        launch(moba_scores_kernel<D>,
               dim3((unsigned)ceil_div(x->blocks, MOBA_TILE), (unsigned)ceil_div(rows, MOBA_TILE),
                    (unsigned)heads),
               dim3(MOBA_TILE, MOBA_TILE_ROWS), 0, stream, w->scores, tensors->centroids, *x);
    if (x->K > 1)
        launch(moba_select_kernel, dim3((unsigned)ceil_div(rows, MOBA_WARPS), (unsigned)heads), MOBA_THREADS,
               0, stream, tensors->selected, w->scores, *x);
    launch(moba_forward_kernel<D, true>,
           dim3((unsigned)((ceil_div(x->T, x->S) - first_block) * own_shares), (unsigned)heads), MOBA_THREADS,
           shared, stream, tensors->out, moba_has_pairs(x) ? w->own_lse : tensors->lse, *x, first_block,
           own_shares, scale_log2);
    if (moba_has_pairs(x)) {
        moba_pair_up<D>(x, stream);
        launch(moba_forward_kernel<D, false>, dim3((unsigned)(x->blocks * MOBA_SHARES), (unsigned)heads),
               MOBA_THREADS, shared, stream, w->of_pairs, w->pair_lse, *x, 0, (int)MOBA_SHARES, scale_log2);
        launch(moba_merge_kernel<D>, moba_copy_grid<D>((size_t)rows, heads), MOBA_COPY_THREADS, 0, stream,
               tensors->out, tensors->lse, w->own_lse, w->of_pairs, w->pair_lse, *x);
    }
    if (tensors->noise)
        launch(moba_noise_kernel<D>, moba_copy_grid<D>((size_t)x->B * rows * x->H, 1), MOBA_COPY_THREADS, 0,
               stream, tensors->out, *x, noised_rows(tensors->noise, x->T, x->H));
}

template <int D>
static inline void moba_backward_launch(const AttentionTensors* tensors, const AttentionShape* s,
                                        const MobaWorkspace* w, stream_t stream) {
    const MobaPairs* x = &w->pairs;
    const int heads = x->B * x->H, padded = attention_padded(x->T), own_shares = ceil_div(x->S, MOBA_QUERIES);
    const size_t row = sizeof(floatX) * D, keys_shared = row * 2 * (x->keys + MOBA_BACKWARD_QUERIES),
                 queries_shared = row * 2 * (x->keys + MOBA_QUERIES);
    const float scale = attention_scale(D);
    attention_statistics_launch<D>(w->statistics, tensors, s, stream);
    if (moba_has_pairs(x)) {
        moba_pair_up<D>(x, stream);
        launch(moba_gather_kernel<D>, moba_copy_grid<D>(x->most, heads), MOBA_COPY_THREADS, 0, stream,
               x->gradients, tensors->dout, x->H, *x);
    }
    launch(moba_backward_keys_kernel<D>, attention_grid(x->T, x->keys, x->G, x->B), 2 * x->keys,
           keys_shared + sizeof(float2) * MOBA_BACKWARD_QUERIES, stream, tensors->dqkv, tensors->dout,
           w->statistics, *x, padded, scale);
    launch(moba_backward_queries_kernel<D, true>,
           dim3((unsigned)(ceil_div(x->T, x->S) * own_shares), (unsigned)heads), MOBA_THREADS, queries_shared,
           stream, tensors->dqkv, tensors->dout, w->statistics, *x, own_shares, padded, scale);
    if (!moba_has_pairs(x)) return;
    launch(moba_backward_queries_kernel<D, false>, dim3((unsigned)(x->blocks * MOBA_SHARES), (unsigned)heads),
           MOBA_THREADS, queries_shared, stream, w->of_pairs, tensors->dout, w->statistics, *x,
           (int)MOBA_SHARES, padded, scale);
    launch(moba_merge_queries_kernel<D>, moba_copy_grid<D>((size_t)x->T, heads), MOBA_COPY_THREADS, 0, stream,
           tensors->dqkv, w->of_pairs, *x);
}

// Reads and writes the same members as flashmoba_forward (moba.cuh).
static inline void moba_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    const MobaWorkspace w = moba_workspace_of(x, s, 0);
    for_head_dim(s->D, [&](auto head_dim) { moba_forward_launch<head_dim>(x, &w, stream); });
}

// Reads and writes the same members as flashmoba_backward (moba.cuh).
static inline void moba_backward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    assert(s->start == 0);
    const MobaWorkspace w = moba_workspace_of(x, s, 1);
    for_head_dim(s->D, [&](auto head_dim) { moba_backward_launch<head_dim>(x, s, &w, stream); });
}

#endif
