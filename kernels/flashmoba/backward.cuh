/*
The backward of flashmoba's work items. An item gathers each of its queries and their gradients once, and
makes 5 products:

    S = K Q^T    dP = V dO^T    dV += P dO    dK += dS Q    dQ = dS^T K

The results are a partial row of dQ for each query, choice and part, and sums of dK and dV
(kernels/flashmoba/sums.cuh).

    launch(flashmoba_backward_kernel<D, M>, flashmoba_item_grid(x), 2 * x->keys / M,
           flashmoba_backward_shared_bytes<D>(x->keys), stream, dqkv, partial_dq, sums, dout, statistics, *x,
           padded, scale);

dS goes through shared memory, from the warps that own keys to the warps that own columns of dQ.

dQ is rounded to bf16 (8 significant bits) three times: dS, the row of each choice, and the sum. The first
error is large if the keys of a block have a large common component: the exact dS of a query add up to 0
and cancel it, but the rounded ones do not.
*/
#ifndef KERNELS_FLASHMOBA_BACKWARD_CUH
#define KERNELS_FLASHMOBA_BACKWARD_CUH

// FlashmobaSums, FlashmobaItem, gathered, partials
#include "kernels/flashmoba/sums.cuh"

template <int D> struct FlashmobaBackwardShape {
#if defined(PRECISION_BF16)
    enum { M = D <= 64 ? 2 : 1, QUERIES = 32 }; // this M or 1: a part may have only 16 keys
#else
    enum { M = 1, QUERIES = D <= 64 ? 32 : 16 };
#endif
    enum { TILE = QUERIES * D };
    enum { COLUMNS = 32 }; // a warp computes this many columns of dQ of 16 queries at a time
};

// Statistics (as in gqa.cuh) and list entries of a tile of gathered queries. Beyond the last query they are
// 0, and so are the rows of queries and gradients. The probabilities of such a row are then 1 and add nothing
// to any gradient.
template <int QUERIES> struct FlashmobaQueryTile {
    float4 statistics[QUERIES / 2];
    int2 entries[QUERIES / 2];
};

// Values that a thread block reads once per tile. They are in shared memory, because the sums of dK and dV
// leave no registers for them.
typedef struct {
    FlashmobaItem item;
    size_t of_keys; // offset of the sequence's keys in (B, T, H + 2G, D)
    const floatX *queries, *dout;
    const float2* statistics;
} FlashmobaWork;

template <int D> static constexpr size_t flashmoba_backward_shared_bytes(int keys) {
    typedef FlashmobaBackwardShape<D> shape;
    return 2 * carved_bytes<floatX>((size_t)keys * D) + carved_bytes<floatX>(shape::TILE) +
           carved_bytes<floatX>(2 * shape::TILE) + carved_bytes<floatX>((size_t)keys * shape::QUERIES) +
           carved_bytes<FlashmobaQueryTile<shape::QUERIES>>(FLASHMOBA_TILES_OF_ENTRIES) +
           carved_bytes<FlashmobaWork>(1);
}

// One thread block computes one part of a work item (all of it if parts = 1): the sums of dK and dV of its
// keys, and one partial row of dQ for each query. A warp owns 16M keys. The scores are transposed, as in
// gqa.cuh, so that P and dS are left operands of the next products. For dQ, dS goes through shared memory,
// and a warp computes COLUMNS columns of 16 rows at a time. There are two tiles of queries: while one is
// loaded, the other is in use and afterwards stages dQ for its stores. There is one tile of output gradients;
// it is loaded during dQ and the next scores.
template <int D, int M>
__global__ void __launch_bounds__(2 * FLASHMOBA_KEYS / M, M)
    flashmoba_backward_kernel(floatX* dqkv,             // (B, T, H + 2G, D)
                              floatX* partial_dq,       // (heads, queries, K, parts, D)
                              FlashmobaSums sums,       //
                              const floatX* dout,       // (B, T, H, D)
                              const float2* statistics, // (B, H, padded)
                              FlashmobaLists x, int padded, float scale) {
    typedef FlashmobaBackwardShape<D> shape;
    constexpr int QUERIES = shape::QUERIES, COLUMNS = shape::COLUMNS, TILE = shape::TILE;
    typedef FlashmobaQueryTile<QUERIES> QueryTile;
    SHARED_MEMORY(char, rest);
    floatX* k_tile = carve<floatX>(rest, x.keys * D);
    floatX* v_tile = carve<floatX>(rest, x.keys * D);
    floatX* dscores_tile = carve<floatX>(rest, x.keys * QUERIES); // keys are rows
    floatX* dout_tile = carve<floatX>(rest, TILE);
    floatX* q_ring = carve<floatX>(rest, 2 * TILE);
    QueryTile* rows_ring = carve<QueryTile>(rest, FLASHMOBA_TILES_OF_ENTRIES);
    FlashmobaWork* work = carve<FlashmobaWork>(rest, 1);
    const int head = blockIdx.y, part = blockIdx.x % x.parts, stride = (x.H + 2 * x.G) * D;
    FlashmobaItem item;
    if (!flashmoba_item(&item, x, head)) return;
    const bool goes_on = item.more == 0 && flashmoba_goes_on(x, head);
    if (goes_on && item.count == 0) return;
    auto rows_of = [&](int first) { return rows_ring + first / QUERIES % FLASHMOBA_TILES_OF_ENTRIES; };
    load_entries<QUERIES>((int*)rows_of(0)->entries, item, 0);
    cp_async_commit();
    const size_t sequence = flashmoba_sequence(x, head), h = flashmoba_head(x, head),
                 first_row = sequence * x.T;
    const size_t of_keys = first_row * stride + (x.H + x.kv_of_q[h]) * D;
    load_tile<D>(k_tile, neighbours(x.qkv + of_keys, stride, item.first_key, x.T), x.keys);
    load_tile<D>(v_tile, neighbours(x.qkv + of_keys + x.G * D, stride, item.first_key, x.T), x.keys);
    if (threadIdx.x == 0) {
        work->item = item, work->of_keys = of_keys;
        work->queries = x.qkv + first_row * stride + h * D;
        work->dout = dout + (first_row * x.H + h) * D;
        work->statistics = statistics + (sequence * x.H + h) * padded;
    }
    cp_async_wait<0>();
    __syncthreads(); // the first entries have arrived; keys and values arrive with the first queries
    auto load_queries = [&](int first) { // also loads their statistics, and the entries of the next tile
        const int end = work->item.count - first, row = threadIdx.x;
        QueryTile* rows = rows_of(first);
        const int* entries = (const int*)rows->entries;
        if (end > 0) {
            load_tile<D>(q_ring + first / QUERIES % 2 * TILE, gathered(work->queries, stride, entries, end),
                         QUERIES);
            if (row < QUERIES)
                cp_async8((float2*)rows->statistics + row, work->statistics + flashmoba_token(entries[row]),
                          row < end);
            load_entries<QUERIES>((int*)rows_of(first + QUERIES)->entries, work->item, first + QUERIES);
        }
        cp_async_commit();
    };
    auto load_dout = [&](int first) {
        const int end = work->item.count - first;
        if (end > 0)
            load_tile<D>(dout_tile, gathered(work->dout, x.H * D, (const int*)rows_of(first)->entries, end),
                         QUERIES);
        cp_async_commit();
    };
    load_queries(0);
    load_dout(0);
    const int warp_row = warp_of_block() * 16 * M, warps = blockDim.x / WARP;
    const float scale_log2 = scale * LOG2_E;
    TileRows<M, D, false> k, v;
    float dk[M][D / 8][4], dv[M][D / 8][4];
    clear(dk);
    clear(dv);
    if (goes_on) {
        const RowsOfSums of_item = flashmoba_sums_of(sums, x, item, head, part, D);
        load_sums(dk, of_item.keys, warp_row, of_item.count);
        load_sums(dv, of_item.values, warp_row, of_item.count);
    }
    k.take(k_tile, warp_row), v.take(v_tile, warp_row);
    cp_async_wait<1>();
    __syncthreads();
    for (int first = 0; first < work->item.count; first += QUERIES) {
        floatX* q_tile = q_ring + first / QUERIES % 2 * TILE;
        const QueryTile* rows = rows_of(first);
        float probs[M][QUERIES / 8][4], dscores[M][QUERIES / 8][4];
        multiply_transposed(probs, k, q_tile, 0);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const float4 pair =
                rows->statistics[n * 4 + lane_of_warp() % 4]; // of the two columns of this lane
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    probs[m][n][i] =
                        exp2_approximate(fmaf(probs[m][n][i], scale_log2, -(i % 2 == 0 ? pair.x : pair.z)));
        }
        if (flashmoba_token(rows->entries[0].x) < work->item.end_local) {
            const int key = work->item.first_key + warp_row + lane_of_warp() / 4;
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const int2 entries = rows->entries[n * 4 + lane_of_warp() % 4];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (key + 16 * m + i / 2 * 8 > flashmoba_token(i % 2 == 0 ? entries.x : entries.y))
                            probs[m][n][i] = 0;
            }
        }
        cp_async_wait<0>();
        __syncthreads(); // dO has arrived; no warp uses the previous dS or the other tile of queries any more
        load_queries(first + QUERIES);
        multiply_transposed(dscores, v, dout_tile, 0);
        multiply_add(dv, probs, dout_tile, 0);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const float4 pair = rows->statistics[n * 4 + lane_of_warp() % 4];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float* of_row = &dscores[m][n][2 * half];
                    of_row[0] = probs[m][n][2 * half] * (of_row[0] - pair.y);
                    of_row[1] = probs[m][n][2 * half + 1] * (of_row[1] - pair.w);
                    store_pair(dscores_tile +
                                   tile_offset<QUERIES>(warp_row + 16 * m + 8 * half + lane_of_warp() / 4,
                                                        8 * n + lane_of_warp() % 4 * 2),
                               of_row[0], of_row[1]);
                }
        }
        multiply_add(dk, dscores, q_tile, 0);
        cp_async_wait<0>();
        __syncthreads(); // dS and the next queries are complete; no warp uses these queries and dO any more
        load_dout(first + QUERIES);
        for (int unit = warp_of_block(); unit < QUERIES / 16 * D / COLUMNS; unit += warps) {
            const int row = unit / (D / COLUMNS) * 16, column = unit % (D / COLUMNS) * COLUMNS;
            float dq[1][COLUMNS / 8][4];
            clear(dq);
            multiply_columns_add<QUERIES, D>(dq, dscores_tile, row, k_tile, column, x.keys);
            scale_rows(dq, scale);
            store_columns<D>(
                partials<D>(partial_dq, x, head, part, (const int*)rows->entries, work->item.count - first),
                q_tile, row, column, dq);
        }
    }

    item = work->item;
    if (!flashmoba_is_whole(x, head, item.block)) {
        const RowsOfSums of_item = flashmoba_sums_of(sums, x, item, head, part, D);
        store_sums(of_item.keys, warp_row, of_item.count, dk);
        store_sums(of_item.values, warp_row, of_item.count, dv);
        return;
    }
    __syncthreads(); // no warp uses the keys any more; a warp replaces only its own rows of the values
    scale_rows(dk, scale);
    floatX* to = dqkv + work->of_keys;
    store_rows(neighbours(to, stride, item.first_key, x.T), k_tile, warp_row, dk);
    store_rows(neighbours(to + x.G * D, stride, item.first_key, x.T), v_tile, warp_row, dv);
}

#endif
