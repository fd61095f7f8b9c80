/*
The forward of flashmoba's work items. Each query of an item attends to the keys of the item. The results are
a partial row of output and a log-sum-exp for each query.

    typedef FlashmobaForwardShape<D> shape;
    launch(flashmoba_forward_kernel<D, 64>, flashmoba_item_grid(x), shape::THREADS,
           shape::shared_bytes(x->keys), stream, partial_rows, partial_lse, *x, scale_log2);

The products and the running softmax are those of dense attention (gqa.cuh): FlashAttention-2, arXiv
2307.08691. The difference is that a tile's queries are gathered from a list.
*/
#ifndef KERNELS_FLASHMOBA_FORWARD_CUH
#define KERNELS_FLASHMOBA_FORWARD_CUH

// FlashmobaItem, gathered, partials
#include "kernels/flashmoba/items.cuh"

template <int D> struct FlashmobaForwardShape {
#if defined(PRECISION_BF16)
    enum { M = D <= 64 ? 2 : 1 };
#else
    enum { M = 1 };
#endif
    enum { WARPS = 4, THREADS = WARP * WARPS, QUERIES = 16 * M * WARPS };
    static constexpr size_t shared_bytes(int keys) {
        return sizeof(floatX) * D * (2 * keys + 2 * QUERIES) +
               sizeof(int) * FLASHMOBA_TILES_OF_ENTRIES * QUERIES;
    }
};

// One thread block computes one part of a work item (all of it if parts = 1). Its keys and values stay in
// shared memory; tiles of QUERIES gathered queries pass through a ring, and a warp computes 16M queries of
// each tile. The next tile is in flight while one is in use.
template <int D, int COLUMNS>
__global__ void __launch_bounds__(FlashmobaForwardShape<D>::THREADS, 2)
    flashmoba_forward_kernel(floatX* partial_out, // (heads, queries, K, parts, D)
                             float* partial_lse,  // (heads, queries, K, parts) log2 of the sums
                             FlashmobaLists x, float scale_log2) {
    typedef FlashmobaForwardShape<D> shape;
    constexpr int M = shape::M, QUERIES = shape::QUERIES;
    SHARED_MEMORY(floatX, shared);
    floatX* k_tile = shared;
    floatX* v_tile = k_tile + x.keys * D;
    floatX* ring = v_tile + x.keys * D;                 // two slots
    int* entries_ring = (int*)(ring + 2 * QUERIES * D); // FLASHMOBA_TILES_OF_ENTRIES

    FlashmobaItem item;
    const int head = blockIdx.y, part = blockIdx.x % x.parts;
    if (!flashmoba_item(&item, x, head) || item.count == 0) return;
    const int h = flashmoba_head(x, head), stride = (x.H + 2 * x.G) * D, lane = lane_of_warp();
    const floatX* sequence = x.qkv + (size_t)flashmoba_sequence(x, head) * x.T * stride;
    const floatX* k = sequence + (x.H + x.kv_of_q[h]) * D;
    auto entries_of = [&](int first) {
        return entries_ring + first / QUERIES % FLASHMOBA_TILES_OF_ENTRIES * QUERIES;
    };
    auto load = [&](int first) { // loads a tile of queries, and the entries of the tile after it
        if (first < item.count) {
            load_tile<QUERIES, D, shape::THREADS>(
                ring + first / QUERIES % 2 * QUERIES * D,
                gathered(sequence + h * D, stride, entries_of(first), item.count - first));
            load_entries<QUERIES>(entries_of(first + QUERIES), item, first + QUERIES);
        }
        cp_async_commit();
    };
    load_entries<QUERIES>(entries_of(0), item, 0);
    cp_async_commit();
    load_tile<D>(k_tile, neighbours(k, stride, item.first_key, x.T), x.keys);
    load_tile<D>(v_tile, neighbours(k + x.G * D, stride, item.first_key, x.T), x.keys);
    cp_async_wait<0>();
    __syncthreads(); // the first entries have arrived; keys and values arrive with the first queries
    load(0);

    const int warp_row = warp_of_block() * 16 * M;
    for (int first = 0; first < item.count; first += QUERIES) {
        cp_async_wait<0>();
        __syncthreads(); // the tile has arrived, and no warp uses the previous one any more
        load(first + QUERIES);
        if (first + warp_row >= item.count) continue;
        floatX* q_tile = ring + first / QUERIES % 2 * QUERIES * D;
        const int* entries = entries_of(first);
        const int end = item.count - first;
        const bool local = flashmoba_token(entries[warp_row]) < item.end_local;
        TileRows<M, D, true> q;
        RunningSoftmax<M> softmax;
        float sum[M][D / 8][4], scores[M][COLUMNS / 8][4];
        q.take(q_tile, warp_row);
        softmax.begin();
        clear(sum);
#pragma unroll 1
        for (int column = 0; column < x.keys; column += COLUMNS) {
            multiply_transposed(scores, q, k_tile, column);
            if (local) {
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int row = warp_row + 16 * m + i / 2 * 8 + lane / 4;
                        const int t = flashmoba_token(entries[row]);
                        const int key = item.first_key + column + lane % 4 * 2 + i % 2;
#pragma unroll
                        for (int n = 0; n < COLUMNS / 8; n++)
                            if (key + 8 * n > t) scores[m][n][i] = -INFINITY;
                    }
            }
            softmax.update(scores, sum, scale_log2);
            multiply_add(sum, scores, v_tile, column);
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = warp_row + 16 * m + lane / 4 + 8 * half;
                // total is 0 if all keys of this part of the own block are in the query's future
                const float total = row_total(softmax.sum[m][half]), inverse = total > 0 ? 1 / total : 0;
#pragma unroll
                for (int c = 0; c < D / 8; c++)
#pragma unroll
                    for (int i = 0; i < 2; i++) sum[m][c][2 * half + i] *= inverse;
                if (lane % 4 == 0 && row < end)
                    partial_lse[flashmoba_partial(x, head, entries[row]) + part] =
                        total > 0 ? softmax.maximum[m][half] + log2f(total) : -INFINITY;
            }
        __syncwarp(); // the rows replace the warp's own queries, which all its lanes have read
        store_rows(partials<D>(partial_out, x, head, part, entries, end), q_tile, warp_row, sum);
    }
}

#endif
