/*
The router of flashmoba. It selects the K-1 complete earlier blocks whose centroids have the highest
scores with a query (docs/math.md section 2).

    const floatX* terms = flashmoba_terms(centroids, workspace, &used, &shape, stream);
    if (K > 1) flashmoba_route_launch<D>(selected, terms, qkv, kv_of_q, &shape, stream);

A thread block has a tile of queries in shared memory and reads the centroids tile by tile, the newest first.
The scores stay in registers: the matrix of all scores never exists. Four lanes keep the best blocks of a row
so far, and a warp skips a tile whose scores improve none of its rows.
*/
#ifndef KERNELS_FLASHMOBA_ROUTER_CUH
#define KERNELS_FLASHMOBA_ROUTER_CUH

#include <limits.h>
// AttentionShape, MobaRank, moba_take
#include "kernels/moba_shape.cuh"

// The router multiplies floatX. In bf16 a centroid is the sum of two terms: the rounded centroid and the
// rounded rest. Together they have 16 significant bits, close enough to fp32 to select the same blocks. This
// takes twice the products.
#if defined(PRECISION_BF16)
enum { FLASHMOBA_TERMS = 2 };
static __global__ void flashmoba_split_kernel(floatX* terms, // (FLASHMOBA_TERMS, count)
                                              const float* centroids, size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float rest = centroids[i];
    for (int term = 0; term < FLASHMOBA_TERMS; term++) {
        terms[term * count + i] = __float2bfloat16(rest);
        rest -= rounded(rest);
    }
}
#else
enum { FLASHMOBA_TERMS = 1 };
#endif

// Returns the terms of the centroids: in bf16 an array at the beginning of the workspace, in fp32 the
// centroids themselves.
static inline const floatX* flashmoba_terms(const float* centroids, // (B, T/S, G, D)
                                            char* workspace, size_t* used, const AttentionShape* s,
                                            stream_t stream) {
#if defined(PRECISION_BF16)
    const size_t count = moba_centroids_count(s->B, s->T, s->G, s->D, s->S);
    floatX* terms = (floatX*)moba_take(workspace, used, count * FLASHMOBA_TERMS, sizeof(floatX));
    if (count > 0 && s->K > 1)
        launch(flashmoba_split_kernel, flat_grid(count, 1), FLAT_BLOCK, 0, stream, terms, centroids, count);
    return terms;
#else
    (void)workspace, (void)used, (void)s, (void)stream;
    return centroids;
#endif
}

// Bytes of the terms in the workspace.
static inline size_t flashmoba_terms_bytes(const AttentionShape* s) {
    size_t used = 0;
    if (FLASHMOBA_TERMS > 1)
        moba_take(NULL, &used, moba_centroids_count(s->B, s->T, s->G, s->D, s->S) * FLASHMOBA_TERMS,
                  sizeof(floatX));
    return used;
}

static const MobaRank FLASHMOBA_NO_SLOT = ~0ull; // higher than every rank: marks a slot that is not used

static __device__ __forceinline__ MobaRank quad_highest(MobaRank x) {
    for (int other = 1; other < 4; other *= 2) {
        const MobaRank theirs = __shfl_xor_sync(ALL_LANES, x, other);
        x = theirs > x ? theirs : x;
    }
    return x;
}

// The highest ranks of a row so far. The four lanes of a quad share a row, and each lane holds EACH slots.
// The rank of an empty slot is its number, from 1: all these numbers differ and are below the rank of every
// block.
template <int EACH> struct BestOfRow {
    MobaRank slots[EACH], lowest;

    __device__ __forceinline__ void find_lowest(void) {
        lowest = slots[0];
#pragma unroll
        for (int e = 1; e < EACH; e++) lowest = slots[e] < lowest ? slots[e] : lowest;
        lowest = ~quad_highest(~lowest);
    }

    __device__ __forceinline__ void begin(int choices) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int slot = lane_of_warp() % 4 * EACH + e;
            slots[e] = slot < choices ? (MobaRank)(slot + 1) : FLASHMOBA_NO_SLOT;
        }
        find_lowest();
    }

    // The best candidate replaces the lowest slot, again and again, until no candidate is better. All lanes
    // of a warp must call this together.
    template <int COUNT> __device__ __forceinline__ void take(MobaRank (&candidates)[COUNT]) {
        for (;;) {
            MobaRank best = 0;
#pragma unroll
            for (int i = 0; i < COUNT; i++) best = candidates[i] > best ? candidates[i] : best;
            best = quad_highest(best);
            const bool better = best > lowest;
            if (!__any_sync(ALL_LANES, better)) return;
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                if (candidates[i] == best) candidates[i] = 0;
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (better && slots[e] == lowest) slots[e] = best;
            find_lowest();
        }
    }

    // Writes the selected blocks, the newest first, then -1 for every empty slot.
    __device__ __forceinline__ void write(int* selected, bool exists) const {
        int order[EACH], before[EACH] = {};
#pragma unroll
        for (int e = 0; e < EACH; e++)
            order[e] = slots[e] == FLASHMOBA_NO_SLOT ? INT_MIN
                       : slots[e] >> 32              ? (int)(unsigned)slots[e]
                                                     : -(int)slots[e];
        for (int lane = 0; lane < 4; lane++)
#pragma unroll
            for (int other = 0; other < EACH; other++) {
                const int theirs = __shfl_sync(ALL_LANES, order[other], (int)(lane_of_warp() & ~3u) + lane);
#pragma unroll
                for (int e = 0; e < EACH; e++) before[e] += theirs > order[e];
            }
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (exists && order[e] != INT_MIN) selected[before[e]] = max(order[e], -1);
    }
};

template <int D> struct FlashmobaRouteShape {
    enum { WARPS = 8, THREADS = WARP * WARPS, QUERIES = 16 * WARPS, COLUMNS = 32, TILE = COLUMNS * D };
    enum { SHARED_BYTES = (QUERIES * D + 2 * FLASHMOBA_TERMS * TILE) * sizeof(floatX) };
    static_assert(SHARED_BYTES <= MOST_SHARED_BYTES, "more than sm_86 has");
};

// One thread block selects the key blocks for QUERIES queries of one head; a warp handles 16 queries. It
// reads the newest centroids first.
template <int D, int EACH>
__global__ void __launch_bounds__(FlashmobaRouteShape<D>::THREADS, EACH <= 4 ? 2 : 1)
    flashmoba_route_kernel(int* selected,       // (B, H, T, choices)
                           const floatX* terms, // (FLASHMOBA_TERMS, B, blocks, G, D)
                           const floatX* qkv,   // (B, T, H + 2G, D)
                           const int* kv_of_q,  // (H)
                           int B, int T, int start, int H, int G, int S, int choices) {
    typedef FlashmobaRouteShape<D> shape;
    constexpr int QUERIES = shape::QUERIES, COLUMNS = shape::COLUMNS, TILE = shape::TILE;
    SHARED_MEMORY(floatX, shared);
    floatX* q_tile = shared;
    floatX* ring = q_tile + QUERIES * D; // two slots of FLASHMOBA_TERMS tiles

    const int h = blockIdx.y, b = blockIdx.z, stride = (H + 2 * G) * D, blocks = T / S;
    const int first_query = start + (gridDim.x - 1 - blockIdx.x) * QUERIES; // rows with most blocks first
    const int end_block = (min(T, first_query + QUERIES) - 1) / S;
    const int tiles = (end_block + COLUMNS - 1) / COLUMNS;
    const floatX* of_head = terms + ((size_t)b * blocks * G + kv_of_q[h]) * D;
    auto load = [&](int tile) {
        if (tile < tiles)
            for (int term = 0; term < FLASHMOBA_TERMS; term++)
                load_tile<D>(ring + (tile % 2 * FLASHMOBA_TERMS + term) * TILE,
                             neighbours(of_head + (size_t)term * B * blocks * G * D, G * D,
                                        (tiles - 1 - tile) * COLUMNS, blocks),
                             COLUMNS);
        cp_async_commit();
    };

    if (tiles > 0)
        load_tile<D>(q_tile, neighbours(qkv + (size_t)b * T * stride + h * D, stride, first_query, T),
                     QUERIES);
    load(0);
    const int lane = lane_of_warp(), warp_row = warp_of_block() * 16;
    const int query = first_query + warp_row + lane / 4; // this lane has rows query and query + 8
    const int eligible[2] = {query / S, (query + 8) / S};
    BestOfRow<EACH> best[2];
    best[0].begin(choices), best[1].begin(choices);
    TileRows<1, D, true> q;
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile == 0) q.take(q_tile, warp_row);
        load(tile + 1);
        float scores[1][COLUMNS / 8][4], more[1][COLUMNS / 8][4];
        multiply_transposed(scores, q, ring + tile % 2 * FLASHMOBA_TERMS * TILE, 0);
        if (FLASHMOBA_TERMS == 2) {
            multiply_transposed(more, q, ring + (tile % 2 * FLASHMOBA_TERMS + FLASHMOBA_TERMS - 1) * TILE, 0);
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) scores[0][n][i] += more[0][n][i];
        }
        // A warp skips a tile whose scores improve none of its rows. Most tiles are skipped.
        bool improves = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = -INFINITY;
#pragma unroll
            for (int i = 0; i < COLUMNS / 4; i++)
                highest = fmaxf(highest, scores[0][i / 2][2 * half + i % 2]);
            improves = improves || highest >= moba_score(best[half].lowest);
        }
        if (!__any_sync(ALL_LANES, improves)) continue;
        const int first_column = (tiles - 1 - tile) * COLUMNS + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            MobaRank candidates[COLUMNS / 4];
#pragma unroll
            for (int i = 0; i < COLUMNS / 4; i++)
                candidates[i] = moba_rank(scores[0][i / 2][2 * half + i % 2],
                                          first_column + i / 2 * 8 + i % 2, eligible[half]);
            best[half].take(candidates);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = query + 8 * half;
        best[half].write(selected + (((size_t)b * H + h) * T + t) * choices, t < T);
    }
}

template <int D>
static inline void flashmoba_route_launch(int* selected, const floatX* terms, const floatX* qkv,
                                          const int* kv_of_q, const AttentionShape* s, stream_t stream) {
    typedef FlashmobaRouteShape<D> shape;
    const int choices = s->K - 1;
    launch(choices <= 8    ? flashmoba_route_kernel<D, 2>
           : choices <= 16 ? flashmoba_route_kernel<D, 4>
                           : flashmoba_route_kernel<D, 16>,
           attention_grid(s->T - s->start, shape::QUERIES, s->H, s->B), shape::THREADS, shape::SHARED_BYTES,
           stream, selected, terms, qkv, kv_of_q, s->B, s->T, s->start, s->H, s->G, s->S, choices);
}

#endif
