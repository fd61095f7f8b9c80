/*
Mixture of block attention, forward and backward (docs/math.md section 2). The CUDA twin of dev/cpu/moba.h.

Every query attends to its own block of S keys, causally, and to the K-1 complete earlier blocks whose mean
keys score highest with it. One softmax covers all these keys. The algorithm is FlashMoBA (Optimizing Mixture
of Block Attention, arXiv 2511.11571): it goes through the key blocks and gathers the queries of each.

    void* workspace = device_malloc(flashmoba_forward_workspace(B, T, H, G, D, S, K), "attention");
    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);   // kernels/keys.cuh
    flashmoba_forward(out, lse, selected, centroids, qkv, kv_of_q, workspace, B, T, 0, H, G, D, S, K, NULL,
                      stream);
    workspace = device_malloc(flashmoba_backward_workspace(B, T, H, G, D, S, K), "attention");
    flashmoba_backward(dqkv, dout, out, lse, selected, qkv, kv_of_q, workspace, B, T, H, G, D, S, K, stream);

Both are chains of kernels with no host synchronisation. This file has them in this order:

    router      top-k selection: the K-1 best blocks of every query, by its scores with the centroids
    lists       the queries that attend to each key block, ascending: count, prefix sum, scatter
    forward     a work item is one key block and up to FLASHMOBA_ITEM queries of its list: a partial row of output
                and a log-sum-exp for each query; then a merge of the partial rows of each query
    backward    the same work items: dK and dV of the keys, a partial row of dQ of each query; then two merges
    workspaces  heads are processed in groups, so that the partial rows stay within a bound

Only integer counts use atomics, so every run gives the same bits. Limits: S is a power of two from 16 to 512,
K is at most 64. ATTN=moba is in kernels/moba_plain.cuh. Bytes and clocks: docs/results/kernels.md.
*/
#ifndef MOBA_CUH
#define MOBA_CUH

#include <limits.h>
// attention_supports_head_dim, attention_scale, the statistics of the backward, count_heads_below
#include "gqa.cuh"
// load, store
#include "kernels/vector.cuh"

// Most keys of a thread block. A larger key block is split into parts of FLASHMOBA_KEYS keys. One thread block
// computes each part of a work item; each part has its own partial rows.
#if defined(PRECISION_BF16)
enum { FLASHMOBA_KEYS = 128 };
#else
enum { FLASHMOBA_KEYS = 32 };
#endif
// Most queries of a work item.
enum { FLASHMOBA_ITEM = 1024 };
// Queries of a tile of the lists: one warp writes the list entries of one tile.
enum { FLASHMOBA_LIST_QUERIES = 256 };
// A list entry holds the token of a query in its low MOBA_TOKEN_BITS bits, and the number of the choice above
// them.
enum { MOBA_TOKEN_BITS = 25 };

// Upper bound, in bytes, of the lists, partial rows and sums of one group of heads (--moba-workspace). It is
// exceeded only if one eighth of a head needs more.
static size_t moba_workspace_bound = (size_t)1 << 30;

// Call this before any *_workspace() function.
static inline void moba_set_workspace_bound(size_t bytes) { moba_workspace_bound = bytes; }

// Sizes of one call. It computes rows start..T-1.
typedef struct {
    int B, T, start, H, G, D, S, K;
} MobaShape;

// Numbers of elements of two arrays of the caller. The backward pass reads `selected`. In generation, a later
// call (start > 0) reads the centroids of earlier blocks.
static inline size_t moba_selected_count(int B, int T, int H, int K) { return (size_t)B * H * T * (K - 1); }
static inline size_t moba_centroids_count(int B, int T, int G, int D, int S) {
    return (size_t)B * (T / S) * G * D;
}

// ----------------------------------------------------------------------------
// Router

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

// A rank orders pairs of score and block: the higher score wins, and of equal scores the later block. The
// rank is 0 if the score is NaN or the block is not a complete block of the past.
typedef unsigned long long MobaRank;
static const MobaRank FLASHMOBA_NO_SLOT = ~0ull; // higher than every rank: marks a slot that is not used

static __device__ __forceinline__ MobaRank moba_rank(float score, int block, int eligible) {
    if (block >= eligible || score != score) return 0;
    const unsigned bits = __float_as_uint(score + 0.0f); // no negative zero
    const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (MobaRank)ordered << 32 | (unsigned)block;
}

// The score of a rank; -INFINITY for the rank of an empty slot. A candidate needs at least this score to
// replace it.
static __device__ __forceinline__ float moba_score(MobaRank rank) {
    const unsigned ordered = (unsigned)(rank >> 32);
    return ordered == 0 ? -INFINITY : __uint_as_float(ordered >> 31 ? ordered ^ 0x80000000u : ~ordered);
}

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

// ----------------------------------------------------------------------------
// Lists
//
// Each head and key block has a list of the queries that attend to it, ascending. A query's own block is its
// choice 0. Only later queries can select the block, so its list begins with its own tokens, and a mask hides
// the future from them. Thus the causal part needs no kernel of its own.
//
// Lists are built for one group of heads at a time: heads first_head..first_head+heads-1 of the sequences
// first_sequence..first_sequence+sequences-1. The kernels number these pairs, sequence by sequence, and call
// the number `head`. A group may also be a piece of one head: only some of its queries.

typedef struct {
    int T, H, G, S, K;
    int blocks;      // including the last one, which may have fewer than S keys
    int keys, parts; // S = keys * parts
    int first_sequence, first_head, sequences, heads;
    int start, end;          // the queries of the group are start..end-1
    int queries;             // capacity: the arrays have room for this many queries of each head
    int tiles;               // of FLASHMOBA_LIST_QUERIES queries
    int max_items, max_more; // most work items of a head: all, and all but the first of each block
    const int* selected;     // (B, H, T, K-1)
    const floatX* qkv;       // (B, T, H + 2G, D)
    const int* kv_of_q;      // (H)
    // arrays with one part for each head of the group; the shapes are those of one part:
    int* counts;     // (tiles, blocks) entries of a tile; later the position of its next entry in the list
    int* totals;     // (blocks) number of entries of a list
    int* begins;     // (blocks + 1) offset of a list in `entries`
    int* first_item; // (blocks + 1) offset of a block's work items in `items`
    int* entries;    // (queries * K) all lists, one after the other
    int2* items;     // (max_items) block, offset of its first entry
} FlashmobaLists;

static __device__ __forceinline__ int flashmoba_sequence(const FlashmobaLists& x, int head) {
    return x.first_sequence + head / x.heads;
}
static __device__ __forceinline__ int flashmoba_head(const FlashmobaLists& x, int head) {
    return x.first_head + head % x.heads;
}
// The head's first row in (B, H, T).
static __device__ __forceinline__ size_t flashmoba_rows(const FlashmobaLists& x, int head) {
    return ((size_t)flashmoba_sequence(x, head) * x.H + flashmoba_head(x, head)) * x.T;
}

// The key block of a query's choice. Choice 0 is the query's own block.
static __device__ __forceinline__ int flashmoba_choice(const FlashmobaLists& x, int head, int t, int choice) {
    return choice == 0 ? t / x.S : x.selected[(flashmoba_rows(x, head) + t) * (x.K - 1) + choice - 1];
}

static __device__ __forceinline__ int* flashmoba_tile_counts(const FlashmobaLists& x, int head, int t) {
    return x.counts +
           ((size_t)head * x.tiles + t / FLASHMOBA_LIST_QUERIES - x.start / FLASHMOBA_LIST_QUERIES) *
               x.blocks;
}

// Counts the entries of every tile in every list. One thread for each query and choice.
static __global__ void flashmoba_count_kernel(FlashmobaLists x) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int head = blockIdx.y, t = x.start + (int)(i / x.K);
    if (t >= x.end) return;
    const int block = flashmoba_choice(x, head, t, (int)(i % x.K));
    if (block >= 0) atomicAdd(flashmoba_tile_counts(x, head, t) + block, 1);
}

// Prefix sum of the counts over the tiles. One thread for each key block; it keeps FLASHMOBA_SCAN_TILES loads in
// flight.
enum { FLASHMOBA_SCAN_TILES = 8 };
static __global__ void flashmoba_scan_tiles_kernel(FlashmobaLists x) {
    const int block = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
    if (block >= x.blocks) return;
    int total = 0;
    for (int tile = 0; tile < x.tiles; tile += FLASHMOBA_SCAN_TILES) {
        int* first = x.counts + ((size_t)head * x.tiles + tile) * x.blocks + block;
        int counts[FLASHMOBA_SCAN_TILES];
#pragma unroll
        for (int i = 0; i < FLASHMOBA_SCAN_TILES; i++)
            counts[i] = tile + i < x.tiles ? first[(size_t)i * x.blocks] : 0;
#pragma unroll
        for (int i = 0; i < FLASHMOBA_SCAN_TILES; i++) {
            if (tile + i < x.tiles) first[(size_t)i * x.blocks] = total;
            total += counts[i];
        }
    }
    x.totals[(size_t)head * x.blocks + block] = total;
}

// Work items of a list. At least one, because the gradients of a block that no query selected are written,
// too.
static __device__ __forceinline__ int flashmoba_items(int entries) {
    return max(1, ceil_div(entries, FLASHMOBA_ITEM));
}

// Prefix sums of entries and work items over the key blocks of one head. Each thread adds up its neighbouring
// blocks, thread 0 adds up the sums of the threads, and then every thread goes over its blocks again.
enum { FLASHMOBA_SCAN_THREADS = 256 };
static __global__ void flashmoba_scan_blocks_kernel(FlashmobaLists x) {
    __shared__ int2 sums[FLASHMOBA_SCAN_THREADS + 1]; // entries, items
    const int head = blockIdx.x, each = ceil_div(x.blocks, FLASHMOBA_SCAN_THREADS);
    const int first = min(x.blocks, (int)threadIdx.x * each), end = min(x.blocks, first + each);
    const int* totals = x.totals + (size_t)head * x.blocks;
    int2 sum = make_int2(0, 0);
    for (int block = first; block < end; block++)
        sum.x += totals[block], sum.y += flashmoba_items(totals[block]);
    sums[threadIdx.x + 1] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sums[0] = make_int2(0, 0);
        for (int i = 0; i < FLASHMOBA_SCAN_THREADS; i++)
            sums[i + 1].x += sums[i].x, sums[i + 1].y += sums[i].y;
    }
    __syncthreads();
    int* begins = x.begins + (size_t)head * (x.blocks + 1);
    int* first_item = x.first_item + (size_t)head * (x.blocks + 1);
    sum = sums[threadIdx.x];
    for (int block = first; block < end; block++) {
        begins[block] = sum.x, first_item[block] = sum.y;
        for (int i = 0; i < flashmoba_items(totals[block]); i++)
            x.items[(size_t)head * x.max_items + sum.y++] = make_int2(block, sum.x + i * FLASHMOBA_ITEM);
        sum.x += totals[block];
    }
    if (threadIdx.x == 0)
        begins[x.blocks] = sums[FLASHMOBA_SCAN_THREADS].x,
        first_item[x.blocks] = sums[FLASHMOBA_SCAN_THREADS].y;
}

// Scatters the entries of one tile into the lists, in the order of queries. A warp handles 32 places at a
// time, which are the choices of several queries or half of those of one. Lanes with the same block write
// neighbouring entries, and the first of these lanes adds their number to the count. A query has K places,
// rounded up to a power of two; the places beyond K are empty.
static __global__ void flashmoba_fill_kernel(FlashmobaLists x) {
    const int head = blockIdx.y, tile = x.start / FLASHMOBA_LIST_QUERIES + blockIdx.x;
    const int first = max(x.start, tile * FLASHMOBA_LIST_QUERIES);
    const int queries = min(x.end, (tile + 1) * FLASHMOBA_LIST_QUERIES) - first;
    const int* begins = x.begins + (size_t)head * (x.blocks + 1);
    const int* selected = x.selected + (flashmoba_rows(x, head) + first) * (x.K - 1);
    int* counts = flashmoba_tile_counts(x, head, first);
    int* entries = x.entries + (size_t)head * x.queries * x.K;
    const int places_log2 = 32 - __clz(x.K - 1), S_log2 = 31 - __clz(x.S), lane = lane_of_warp();
    auto choice_of = [&](int place) { return place & ((1 << places_log2) - 1); };
    auto block_of = [&](int place) {
        const int query = place >> places_log2, choice = choice_of(place);
        if (query >= queries || choice >= x.K) return -1;
        return choice == 0 ? (first + query) >> S_log2 : selected[query * (x.K - 1) + choice - 1];
    };
    int next = block_of(lane);
    for (int done = 0; done < queries << places_log2; done += WARP) {
        const int place = done + lane, block = next;
        next = block_of(place + WARP); // this load is in flight while the current entry is written
        const unsigned same = __match_any_sync(ALL_LANES, block), before = same & ((1u << lane) - 1);
        const int counted = block >= 0 ? counts[block] : 0;
        if (block >= 0)
            entries[begins[block] + counted + __popc(before)] =
                (int)((unsigned)choice_of(place) << MOBA_TOKEN_BITS) | (first + (place >> places_log2));
        __syncwarp(); // all lanes have read their counts before one of them changes
        if (block >= 0 && before == 0) counts[block] = counted + __popc(same);
        __syncwarp();
    }
}

static __device__ __forceinline__ int flashmoba_token(int entry) {
    return entry & ((1 << MOBA_TOKEN_BITS) - 1);
}

// One work item, or one part of it: x.keys keys from first_key on, and some entries of the block's list.
typedef struct {
    int block, more; // more: 0 for the first item of a block; all other items of a head are numbered from 1
    int first_key, end_local, count; // tokens below end_local are in this block: they need the causal mask
    const int* entries;              // (count)
} FlashmobaItem;

// Counts the head's items with more > 0 in all blocks before `block`; block may be x.blocks.
static __device__ __forceinline__ int flashmoba_more_before(const FlashmobaLists& x, int head, int block) {
    return x.first_item[(size_t)head * (x.blocks + 1) + block] - block;
}

// Finds the work item, and its part, of this thread block. Returns false if there is none.
static __device__ __forceinline__ bool flashmoba_item(FlashmobaItem* item, const FlashmobaLists& x,
                                                      int head) {
    const int i = blockIdx.x / x.parts, part = blockIdx.x % x.parts;
    if (i >= x.first_item[(size_t)head * (x.blocks + 1) + x.blocks]) return false;
    const int2 of_item = x.items[(size_t)head * x.max_items + i];
    const int end = x.begins[(size_t)head * (x.blocks + 1) + of_item.x + 1];
    item->block = of_item.x;
    item->more = i - of_item.x == flashmoba_more_before(x, head, of_item.x) ? 0 : i - of_item.x;
    item->first_key = of_item.x * x.S + part * x.keys;
    item->end_local = (of_item.x + 1) * x.S;
    item->count = min((int)FLASHMOBA_ITEM, end - of_item.y);
    item->entries = x.entries + (size_t)head * x.queries * x.K + of_item.y;
    return true;
}

// A ring of tiles of list entries in shared memory. The entries are loaded one tile ahead of the rows, or
// every gathered row would first wait for its entry: while a tile is in use, the next rows and the entries
// after these are in flight. Three tiles are enough; with four the slot number needs no division and fewer
// registers.
enum { FLASHMOBA_TILES_OF_ENTRIES = 4 };

// Starts asynchronous copies of QUERIES entries of an item, from entry `first` on. Entries beyond the last
// one become 0.
template <int QUERIES>
__device__ __forceinline__ void load_entries(int* to, const FlashmobaItem& item, int first) {
    const int i = threadIdx.x;
    if (i < QUERIES) cp_async4(to + i, item.entries + first + i, first + i < item.count);
}

// Row source of a tile: row i is the token of list entry i, for i < end.
template <typename Element> struct GatheredRows {
    Element* memory;
    const int* entries; // in shared memory
    int stride, end;

    __device__ __forceinline__ bool has(int row) const { return row < end; }
    __device__ __forceinline__ Element* of(int entry) const {
        return memory + (size_t)flashmoba_token(entry) * stride;
    }
    __device__ __forceinline__ Element* at(int row) const { return of(entries[row]); }
};

template <typename Element>
__device__ __forceinline__ GatheredRows<Element> gathered(Element* memory, int stride, const int* entries,
                                                          int end) {
    GatheredRows<Element> rows;
    rows.memory = memory, rows.entries = entries, rows.stride = stride, rows.end = end;
    return rows;
}

// Starts asynchronous copies of gathered rows into a tile, by THREADS threads. A thread reads all its entries
// before its first copy: the compiler must assume that a copy writes to any memory, so it moves no read ahead
// of a copy.
template <int ROWS, int D, int THREADS, typename Element>
__device__ __forceinline__ void load_tile(floatX* tile, const GatheredRows<Element>& rows) {
    constexpr int CHUNKS = D / CHUNK, STEP = THREADS / CHUNKS, EACH = ROWS / STEP;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "a thread copies a column of every STEP-th row");
    const int thread = compute_here(threadIdx.x), first = thread / CHUNKS, column = thread % CHUNKS * CHUNK;
    int entries[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) entries[i] = rows.entries[first + i * STEP];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        cp_async16(tile + tile_offset<D>(first + i * STEP, column), rows.of(entries[i]) + column,
                   rows.has(first + i * STEP));
}

// Indices into the partial rows (heads, queries, K, parts): the first row of a query, and the first part of
// an entry's row.
static __device__ __forceinline__ size_t flashmoba_first_partial(const FlashmobaLists& x, int head, int t) {
    return ((size_t)head * x.queries + t - x.start) * x.K * x.parts;
}
static __device__ __forceinline__ size_t flashmoba_partial(const FlashmobaLists& x, int head, int entry) {
    return flashmoba_first_partial(x, head, flashmoba_token(entry)) +
           ((unsigned)entry >> MOBA_TOKEN_BITS) * x.parts;
}

// Row destination of a tile: row i goes to the partial row of list entry i, for one part of the keys.
template <int D> struct PartialRows {
    floatX* memory;
    const int* entries;
    int end, start, K, parts;

    __device__ __forceinline__ bool has(int row) const { return row < end; }
    __device__ __forceinline__ floatX* at(int row) const {
        const int entry = entries[row];
        const size_t query = flashmoba_token(entry) - start, choice = (unsigned)entry >> MOBA_TOKEN_BITS;
        return memory + (query * K + choice) * parts * D;
    }
};

template <int D>
__device__ __forceinline__ PartialRows<D> partials(floatX* memory, const FlashmobaLists& x, int head,
                                                   int part, const int* entries, int end) {
    PartialRows<D> rows;
    rows.memory = memory + (flashmoba_first_partial(x, head, x.start) + part) * D;
    rows.entries = entries, rows.end = end, rows.start = x.start, rows.K = x.K, rows.parts = x.parts;
    return rows;
}

// ----------------------------------------------------------------------------
// Forward

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

// One thread block computes one part of a work item (all of it if parts = 1). Its keys and values stay in shared memory; tiles of QUERIES
// gathered queries pass through a ring, and a warp computes 16M queries of each tile. The next tile is in
// flight while one is in use.
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
enum { FLASHMOBA_MERGE_THREADS = 128 };
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

// ----------------------------------------------------------------------------
// Backward
//
// A work item gathers each of its queries and their gradients once, and makes 5 products:
//
//     S = K Q^T    dP = V dO^T    dV += P dO    dK += dS Q    dQ = dS^T K
//
// dS goes through shared memory, from the warps that own keys to the warps that own columns of dQ. Each
// choice of a query gets one partial row of dQ; another kernel adds up these rows.
//
// dK and dV of a key block are sums over all work items and query heads that read it. Each item stores its
// sums in fp32, and another kernel adds them up in the order of heads and items. If one item has the whole
// sum (flashmoba_is_whole), it writes dK and dV itself.
//
// dQ is rounded to bf16 (8 significant bits) three times: dS, the row of each choice, and the sum. The first
// error is large if the keys of a block have a large common component: the exact dS of a query add up to 0
// and cancel it, but the rounded ones do not.

// Sums of the gradients of keys and values, in fp32. The sums of keys are not multiplied by the scale yet.
typedef struct {
    float* of_heads; // (heads, 2, T, D) sums of the first item of every block
    float* more;     // (heads, max_more, parts, 2, keys, D) sums of the other items
} FlashmobaSums;

// Whether the sums of a head start from the carry-over that the previous group left in of_heads. This is so
// for the first head of a group, if the previous group had the same KV head or earlier queries of the same
// head.
static __device__ __forceinline__ bool flashmoba_goes_on(const FlashmobaLists& x, int head) {
    const int h = flashmoba_head(x, head);
    return h == x.first_head && (x.start > 0 || (h > 0 && x.kv_of_q[h - 1] == x.kv_of_q[h]));
}

// Whether one item has the whole gradients of a block, so that no sums are needed: no other query head reads
// the KV head, all queries are in this group, and the block has a single item.
static __device__ __forceinline__ bool flashmoba_is_whole(const FlashmobaLists& x, int head, int block) {
    const int h = flashmoba_head(x, head), g = x.kv_of_q[h];
    return x.start == 0 && x.end == x.T && (h == 0 || x.kv_of_q[h - 1] < g) &&
           (h + 1 == x.H || x.kv_of_q[h + 1] > g) &&
           flashmoba_more_before(x, head, block) == flashmoba_more_before(x, head, block + 1);
}

// The sums of an item, and their number of rows. The rows of of_heads end at the last token.
typedef struct {
    float *keys, *values;
    int count;
} RowsOfSums;

static __device__ __forceinline__ RowsOfSums flashmoba_sums_of(const FlashmobaSums& sums,
                                                               const FlashmobaLists& x,
                                                               const FlashmobaItem& item, int head, int part,
                                                               int D) {
    RowsOfSums rows;
    if (item.more == 0) {
        rows.keys = sums.of_heads + ((size_t)head * 2 * x.T + item.first_key) * D;
        rows.values = rows.keys + (size_t)x.T * D, rows.count = x.T - item.first_key;
    } else {
        const size_t number = ((size_t)head * x.max_more + item.more - 1) * x.parts + part;
        rows.keys = sums.more + number * 2 * x.keys * D;
        rows.values = rows.keys + (size_t)x.keys * D, rows.count = x.keys;
    }
    return rows;
}

// Load and store a warp's rows of sums, from and to memory (rows, D), D = 8C. Rows beyond `rows` are skipped.
template <int M, int C>
__device__ __forceinline__ void load_sums(float (&sum)[M][C][4], const float* from, int first_row, int rows) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int c = 0; c < C; c++) {
                const float2 pair = *(const float2*)(from + (size_t)row * 8 * C + 8 * c + lane % 4 * 2);
                sum[m][c][2 * half] = pair.x, sum[m][c][2 * half + 1] = pair.y;
            }
        }
}

template <int M, int C>
__device__ __forceinline__ void store_sums(float* to, int first_row, int rows, const float (&sum)[M][C][4]) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int c = 0; c < C; c++)
                *(float2*)(to + (size_t)row * 8 * C + 8 * c + lane % 4 * 2) =
                    make_float2(sum[m][c][2 * half], sum[m][c][2 * half + 1]);
        }
}

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

// One thread block computes one part of a work item (all of it if parts = 1): the sums of dK and dV of its keys, and one partial row of dQ for
// each query. A warp owns 16M keys. The scores are transposed, as in gqa.cuh, so that P and dS are left
// operands of the next products. For dQ, dS goes through shared memory, and a warp computes COLUMNS columns
// of 16 rows at a time. There are two tiles of queries: while one is loaded, the other is in use and
// afterwards stages dQ for its stores. There is one tile of output gradients; it is loaded during dQ and the
// next scores.
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
    const int last = x.first_head + x.heads - 1;
    const bool goes_on =
        x.end < x.T || (last + 1 < x.H && x.kv_of_q[last] == x.kv_of_q[last + 1]); // there is a carry-over
    Values<CHUNK> sum = {};
    for (int head = first_head; head < first_head + x.heads; head++) {
        const int h = flashmoba_head(x, head), g = x.kv_of_q[h],
                  next_g = h + 1 < x.H ? x.kv_of_q[h + 1] : x.G;
        for (int empty = h > 0 ? x.kv_of_q[h - 1] + 1 : 0; empty < g; empty++)
            store(to + empty * D, Values<CHUNK>{});
        for (int empty = g + 1; h + 1 == x.H && empty < x.G; empty++) store(to + empty * D, Values<CHUNK>{});
        const int begin = flashmoba_more_before(x, head, block),
                  end = flashmoba_more_before(x, head, block + 1);
        if (goes_on && x.heads == 1 && begin == end) return; // the sums are the carry-over already
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
    if (goes_on) store(sums.of_heads + first_head * of_head + of_key, sum);
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

// ----------------------------------------------------------------------------
// Workspaces
//
// The partial rows take K times the memory of the output. So heads are processed in groups whose workspace
// stays within moba_workspace_bound. If a single head needs more, a group is a piece of its queries. Query
// heads of one KV head may be in two groups, because kv_of_q is in device memory and the host cannot read it
// while it makes the groups. The sums of such a KV head stay in memory, and the work items of the next group
// start from this carry-over.

typedef struct {
    FlashmobaLists lists;
    floatX* partial_rows;
    float* partial_lse; // forward
    FlashmobaSums sums; // backward
    int heads;          // heads of the group, summed over its sequences
} FlashmobaGroup;

// Largest size of a group: sequences, heads of each, queries of each head.
typedef struct {
    int sequences, heads, queries;
} FlashmobaGroupSize;

// Takes count elements from a workspace, rounded up to 256 bytes. Returns NULL if memory is NULL.
static inline void* moba_take(char* memory, size_t* used, size_t count, size_t size) {
    void* taken = memory ? memory + *used : NULL;
    *used += (count * size + 255) / 256 * 256;
    return taken;
}

// Lays out the workspace of a group of `heads` heads and `queries` queries of each, and returns its bytes. If
// memory is NULL, it only counts the bytes.
static inline size_t flashmoba_lay_out(FlashmobaGroup* group, char* memory, const MobaShape* s, int heads,
                                       int queries, int is_backward) {
    FlashmobaLists* x = &group->lists;
    const size_t n = (size_t)heads;
    size_t used = 0;
    x->T = s->T, x->H = s->H, x->G = s->G, x->S = s->S, x->K = s->K, x->queries = queries;
    x->blocks = ceil_div(s->T, s->S);
    x->keys = s->S < FLASHMOBA_KEYS ? s->S : FLASHMOBA_KEYS, x->parts = s->S / x->keys;
    x->tiles = ceil_div(queries, FLASHMOBA_LIST_QUERIES);
    x->max_more = (int)((size_t)queries * s->K / FLASHMOBA_ITEM), x->max_items = x->blocks + x->max_more;
    const size_t blocks = (size_t)x->blocks, rows = (size_t)queries * s->K, parts = (size_t)x->parts;
    const size_t D = (size_t)s->D, keys = is_backward ? (size_t)s->T : 0;
    x->counts = (int*)moba_take(memory, &used, n * x->tiles * blocks, sizeof(int));
    x->totals = (int*)moba_take(memory, &used, n * blocks, sizeof(int));
    x->begins = (int*)moba_take(memory, &used, n * (blocks + 1), sizeof(int));
    x->first_item = (int*)moba_take(memory, &used, n * (blocks + 1), sizeof(int));
    x->entries = (int*)moba_take(memory, &used, n * rows, sizeof(int));
    x->items = (int2*)moba_take(memory, &used, n * x->max_items, sizeof(int2));
    group->partial_rows = (floatX*)moba_take(memory, &used, n * rows * parts * D, sizeof(floatX));
    group->partial_lse = (float*)moba_take(memory, &used, is_backward ? 0 : n * rows * parts, sizeof(float));
    group->sums.of_heads = (float*)moba_take(memory, &used, n * 2 * keys * D, sizeof(float));
    group->sums.more =
        (float*)moba_take(memory, &used, is_backward ? n * x->max_more * 2 * s->S * D : 0, sizeof(float));
    return used;
}

static inline size_t flashmoba_group_bytes(const MobaShape* s, int heads, int queries, int is_backward) {
    FlashmobaGroup group;
    return flashmoba_lay_out(&group, NULL, s, heads, queries, is_backward);
}

// Chooses the size of the groups: as many heads as the bound allows, and several sequences only if all heads
// fit. If one head does not fit, it is cut into up to FLASHMOBA_PIECES pieces. Each piece loads keys, values and
// their sums again.
enum { FLASHMOBA_PIECES = 8 };
static inline FlashmobaGroupSize flashmoba_group_size(const MobaShape* s, int is_backward) {
    FlashmobaGroupSize size = {1, 1, s->T};
    const size_t fit = moba_workspace_bound / flashmoba_group_bytes(s, 1, s->T, is_backward);
    const size_t H = (size_t)s->H, B = (size_t)s->B;
    if (fit > 0) {
        size.heads = (int)(fit < H ? fit : H);
        size.sequences = (int)(fit < H ? 1 : fit / H < B ? fit / H : B);
    }
    for (int pieces = 2; pieces <= FLASHMOBA_PIECES; pieces++) {
        if (flashmoba_group_bytes(s, 1, size.queries, is_backward) <= moba_workspace_bound) break;
        size.queries = ceil_div(ceil_div(s->T, pieces), FLASHMOBA_LIST_QUERIES) * FLASHMOBA_LIST_QUERIES;
    }
    return size;
}

// Bytes that are enough for these sequences, and for fewer or shorter ones. If not all heads fit at once,
// this is at least the bound, because more heads of shorter sequences may go at once.
static inline size_t flashmoba_workspace_bytes(const MobaShape* s, int is_backward) {
    const FlashmobaGroupSize size = flashmoba_group_size(s, is_backward);
    const size_t bytes = flashmoba_group_bytes(s, size.sequences * size.heads, size.queries, is_backward);
    const size_t all = flashmoba_group_bytes(s, s->B * s->H, s->T, is_backward);
    const size_t least = all < moba_workspace_bound ? all : moba_workspace_bound;
    return bytes > least ? bytes : least;
}

// Begins the group at this sequence, head and query. The group has no heads if `sequence` is beyond the last
// one.
static inline void flashmoba_begin_group(FlashmobaGroup* group, const MobaShape* s,
                                         const FlashmobaGroupSize* size, int sequence, int head, int query) {
    FlashmobaLists* x = &group->lists;
    x->first_sequence = sequence, x->first_head = head;
    x->sequences = s->B - sequence < size->sequences ? s->B - sequence : size->sequences;
    x->heads = s->H - head < size->heads ? s->H - head : size->heads;
    x->start = query > s->start ? query : s->start;
    x->end = s->T - query < size->queries ? s->T : query + size->queries;
    x->tiles = ceil_div(x->end, FLASHMOBA_LIST_QUERIES) - x->start / FLASHMOBA_LIST_QUERIES;
    group->heads = x->sequences * x->heads;
}

// First query of the first piece, at most s->start. Every piece begins at the first query of a tile of the
// lists.
static inline int flashmoba_first_query(const MobaShape* s, const FlashmobaGroupSize* size) {
    return s->start / size->queries * size->queries;
}

static inline FlashmobaGroup flashmoba_first_group(char* memory, const MobaShape* s,
                                                   const FlashmobaGroupSize* size, const int* selected,
                                                   const floatX* qkv, const int* kv_of_q, int is_backward) {
    FlashmobaGroup group;
    flashmoba_lay_out(&group, memory, s, size->sequences * size->heads, size->queries, is_backward);
    group.lists.selected = selected, group.lists.qkv = qkv, group.lists.kv_of_q = kv_of_q;
    flashmoba_begin_group(&group, s, size, 0, 0, flashmoba_first_query(s, size));
    return group;
}

// The next group: the next piece of the head, or else the next heads, or else the next sequences.
static inline void flashmoba_next_group(FlashmobaGroup* group, const MobaShape* s,
                                        const FlashmobaGroupSize* size) {
    const FlashmobaLists* x = &group->lists;
    const int first_query = flashmoba_first_query(s, size), next_head = x->first_head + x->heads;
    if (x->end < s->T) flashmoba_begin_group(group, s, size, x->first_sequence, x->first_head, x->end);
    else if (next_head < s->H)
        flashmoba_begin_group(group, s, size, x->first_sequence, next_head, first_query);
    else flashmoba_begin_group(group, s, size, x->first_sequence + x->sequences, 0, first_query);
}

static inline void flashmoba_build_lists(const FlashmobaGroup* group, stream_t stream) {
    const FlashmobaLists* x = &group->lists;
    const unsigned heads = (unsigned)group->heads;
    const size_t choices = (size_t)(x->end - x->start) * x->K;
    device_zero(x->counts, sizeof(int) * heads * x->tiles * x->blocks, stream);
    launch(flashmoba_count_kernel, dim3((unsigned)((choices + 255) / 256), heads), 256, 0, stream, *x);
    launch(flashmoba_scan_tiles_kernel, dim3((unsigned)ceil_div(x->blocks, 128), heads), 128, 0, stream, *x);
    launch(flashmoba_scan_blocks_kernel, heads, FLASHMOBA_SCAN_THREADS, 0, stream, *x);
    launch(flashmoba_fill_kernel, dim3((unsigned)x->tiles, heads), WARP, 0, stream, *x);
}

static inline dim3 flashmoba_item_grid(const FlashmobaGroup* group) {
    return dim3((unsigned)(group->lists.max_items * group->lists.parts), (unsigned)group->heads);
}

// Grid of the merges: one thread for every 16 bytes of `rows` rows.
template <int D> static inline dim3 flashmoba_merge_grid(int rows, int heads, int sequences) {
    return dim3((unsigned)ceil_div(rows, FLASHMOBA_MERGE_THREADS / (D / CHUNK)), (unsigned)heads,
                (unsigned)sequences);
}

// Whether MoBA can be called with these sizes.
static inline int moba_supports(int T, int D, int S, int K) {
    return attention_supports_head_dim(D) && S >= 16 && S <= 512 && (S & (S - 1)) == 0 && K >= 1 && K <= 64 &&
           T < 1 << MOBA_TOKEN_BITS;
}

static inline void moba_refuse(const MobaShape* s) {
    fail("MoBA with %d tokens, head dimension %d, blocks of %d keys, %d of them a query: on this device head "
         "dimension 32, 64 or 128, blocks of 16, 32, ... 512, up to 64 of them, less than 2^%d tokens",
         s->T, s->D, s->S, s->K, (int)MOBA_TOKEN_BITS);
}

// ----------------------------------------------------------------------------
// The operations

template <int D>
static inline void flashmoba_route_launch(int* selected, const floatX* terms, const floatX* qkv,
                                          const int* kv_of_q, const MobaShape* s, stream_t stream) {
    typedef FlashmobaRouteShape<D> shape;
    const int choices = s->K - 1;
    launch(choices <= 8    ? flashmoba_route_kernel<D, 2>
           : choices <= 16 ? flashmoba_route_kernel<D, 4>
                           : flashmoba_route_kernel<D, 16>,
           attention_grid(s->T - s->start, shape::QUERIES, s->H, s->B), shape::THREADS, shape::SHARED_BYTES,
           stream, selected, terms, qkv, kv_of_q, s->B, s->T, s->start, s->H, s->G, s->S, choices);
}

template <int D>
static inline void flashmoba_forward_launch(floatX* out, float* lse, int* selected, const float* centroids,
                                            const floatX* qkv, const int* kv_of_q, char* workspace,
                                            const MobaShape* s, const AttentionNoise* noise,
                                            stream_t stream) {
    typedef FlashmobaForwardShape<D> shape;
    static_assert(shape::shared_bytes(FLASHMOBA_KEYS) <= MOST_SHARED_BYTES, "more than sm_86 has");
    const floatX* terms = (const floatX*)centroids;
    size_t used = 0;
#if defined(PRECISION_BF16)
    const size_t count = moba_centroids_count(s->B, s->T, s->G, D, s->S);
    floatX* split = (floatX*)moba_take(workspace, &used, count * FLASHMOBA_TERMS, sizeof(floatX));
    if (count > 0 && s->K > 1)
        launch(flashmoba_split_kernel, flat_grid(count, 1), FLAT_BLOCK, 0, stream, split, centroids, count);
    terms = split;
#endif
    if (s->K > 1) flashmoba_route_launch<D>(selected, terms, qkv, kv_of_q, s, stream);

    const FlashmobaGroupSize size = flashmoba_group_size(s, 0);
    for (FlashmobaGroup group = flashmoba_first_group(workspace + used, s, &size, selected, qkv, kv_of_q, 0);
         group.heads > 0; flashmoba_next_group(&group, s, &size)) {
        const FlashmobaLists* x = &group.lists;
        auto kernel = flashmoba_forward_kernel<D, 16>;
        if constexpr (FLASHMOBA_KEYS >= 64)
            if (x->keys >= 64) kernel = flashmoba_forward_kernel<D, 64>;
        flashmoba_build_lists(&group, stream);
        launch(kernel, flashmoba_item_grid(&group), shape::THREADS, shape::shared_bytes(x->keys), stream,
               group.partial_rows, group.partial_lse, *x, attention_scale(D) * LOG2_E);
        launch(noise ? flashmoba_merge_kernel<D, true> : flashmoba_merge_kernel<D, false>,
               flashmoba_merge_grid<D>(x->end - x->start, group.heads, 1), FLASHMOBA_MERGE_THREADS, 0, stream,
               out, lse, group.partial_rows, group.partial_lse, *x, noised_rows(noise, s->T, s->H));
    }
}

template <int D>
static inline void flashmoba_backward_launch(floatX* dqkv, const floatX* dout, const floatX* out,
                                             const float* lse, const int* selected, const floatX* qkv,
                                             const int* kv_of_q, char* workspace, const MobaShape* s,
                                             stream_t stream) {
    static_assert(flashmoba_backward_shared_bytes<D>(FLASHMOBA_KEYS) <= MOST_SHARED_BYTES,
                  "more than sm_86 has");
    const int padded = attention_padded(s->T);
    const float scale = attention_scale(D);
    size_t used = 0;
    float2* statistics = (float2*)moba_take(workspace, &used, (size_t)s->B * s->H * padded, sizeof(float2));
    launch(attention_statistics_kernel<D>,
           attention_grid(padded, STATISTICS_THREADS / (D / CHUNK), s->H, s->B), STATISTICS_THREADS, 0,
           stream, statistics, dout, out, lse, s->T, padded, s->H);

    const FlashmobaGroupSize size = flashmoba_group_size(s, 1);
    for (FlashmobaGroup group = flashmoba_first_group(workspace + used, s, &size, selected, qkv, kv_of_q, 1);
         group.heads > 0; flashmoba_next_group(&group, s, &size)) {
        const FlashmobaLists* x = &group.lists;
        constexpr int MOST = FlashmobaBackwardShape<D>::M;
        const int M = x->keys < 16 * MOST ? 1 : MOST;
        const auto kernel = M == MOST ? flashmoba_backward_kernel<D, MOST> : flashmoba_backward_kernel<D, 1>;
        flashmoba_build_lists(&group, stream);
        launch(kernel, flashmoba_item_grid(&group), 2 * x->keys / M,
               flashmoba_backward_shared_bytes<D>(x->keys), stream, dqkv, group.partial_rows, group.sums,
               dout, statistics, *x, padded, scale);
        launch(flashmoba_merge_keys_kernel<D>, flashmoba_merge_grid<D>(s->T, 2, x->sequences),
               FLASHMOBA_MERGE_THREADS, 0, stream, dqkv, group.sums, *x, scale);
        launch(flashmoba_merge_queries_kernel<D>, flashmoba_merge_grid<D>(x->end - x->start, group.heads, 1),
               FLASHMOBA_MERGE_THREADS, 0, stream, dqkv, group.partial_rows, *x);
    }
}

// Bytes of the workspaces. moba_workspace_bound must be the same here and when the workspace is used.
static inline size_t flashmoba_forward_workspace(int B, int T, int H, int G, int D, int S, int K) {
    const MobaShape shape = {B, T, 0, H, G, D, S, K};
    size_t used = 0;
    if (FLASHMOBA_TERMS > 1)
        moba_take(NULL, &used, moba_centroids_count(B, T, G, D, S) * FLASHMOBA_TERMS, sizeof(floatX));
    return used + flashmoba_workspace_bytes(&shape, 0);
}

static inline size_t flashmoba_backward_workspace(int B, int T, int H, int G, int D, int S, int K) {
    const MobaShape shape = {B, T, 0, H, G, D, S, K};
    size_t used = 0;
    moba_take(NULL, &used, (size_t)B * H * attention_padded(T), sizeof(float2));
    return used + flashmoba_workspace_bytes(&shape, 1);
}

// Computes rows start..T-1 of out, lse and selected, and of noise->noised unless noise is NULL. If start > 0,
// qkv already holds the earlier keys and values. The centroids are those of all complete blocks
// (keys_forward). The workspace needs no initial value. With K = 1, selected is empty and centroids are not
// read.
static inline void flashmoba_forward(floatX* out,    // (B, T, H, D)
                                     float_acc* lse, // (B, H, T) natural log of the sum of exp(scaled scores)
                                     int* selected, // (B, H, T, K-1) blocks chosen, the newest first, then -1
                                     const float_acc* centroids, // (B, T/S, G, D)
                                     const floatX* qkv,          // (B, T, H + 2G, D)
                                     const int* kv_of_q,         // (H) non-decreasing
                                     void* workspace, int B, int T, int start, int H, int G, int D, int S,
                                     int K, const AttentionNoise* noise, stream_t stream) {
    const MobaShape shape = {B, T, start, H, G, D, S, K};
    char* memory = (char*)workspace;
    if (!moba_supports(T, D, S, K)) moba_refuse(&shape);
    for_head_dim(D, [&](auto head_dim) {
        flashmoba_forward_launch<head_dim>(out, lse, selected, centroids, qkv, kv_of_q, memory, &shape, noise,
                                           stream);
    });
}

// Writes every element of dqkv. A KV head that no query head reads gets exact zeros.
static inline void flashmoba_backward(floatX* dqkv,         // (B, T, H + 2G, D)
                                      const floatX* dout,   // (B, T, H, D)
                                      const floatX* out,    // (B, T, H, D)
                                      const float_acc* lse, // (B, H, T)
                                      const int* selected,  // (B, H, T, K-1)
                                      const floatX* qkv,    // (B, T, H + 2G, D)
                                      const int* kv_of_q,   // (H)
                                      void* workspace, int B, int T, int H, int G, int D, int S, int K,
                                      stream_t stream) {
    const MobaShape shape = {B, T, 0, H, G, D, S, K};
    char* memory = (char*)workspace;
    if (!moba_supports(T, D, S, K)) moba_refuse(&shape);
    for_head_dim(D, [&](auto head_dim) {
        flashmoba_backward_launch<head_dim>(dqkv, dout, out, lse, selected, qkv, kv_of_q, memory, &shape,
                                            stream);
    });
}

#endif
