/*
The lists of flashmoba. The router has selected blocks for each query; the next stages need the queries of
each block.

    flashmoba_build_lists(x, stream);     // x->selected -> counts, totals, begins, first_item, entries, items

Each head and key block has a list of the queries that attend to it, ascending. A query's own block is its
choice 0. Only later queries can select the block, so its list begins with its own tokens, and a mask hides
the future from them. Thus the causal part needs no kernel of its own.

    count          entries of each tile of queries in each list
    scan tiles     prefix sum over the tiles
    scan blocks    prefix sum over the key blocks; cuts the lists into work items
    fill           scatters the entries, in the order of queries

Lists are built for one group of heads at a time (kernels/flashmoba/groups.cuh): heads
first_head..first_head+heads-1 of the sequences first_sequence..first_sequence+sequences-1. The kernels number
these pairs, sequence by sequence, and call the number `head`. A group may also be a piece of one head: only
some of its queries.
*/
#ifndef KERNELS_FLASHMOBA_LISTS_CUH
#define KERNELS_FLASHMOBA_LISTS_CUH

// AttentionShape, MOBA_TOKEN_BITS
#include "kernels/moba_shape.cuh"

// Most keys of a thread block. A larger key block is split into parts of FLASHMOBA_KEYS keys. One thread
// block computes each part of a work item; each part has its own partial rows.
#if defined(PRECISION_BF16)
enum { FLASHMOBA_KEYS = 128 };
#else
enum { FLASHMOBA_KEYS = 32 };
#endif
// Most queries of a work item.
enum { FLASHMOBA_ITEM = 1024 };
// Queries of a tile of the lists: one warp writes the list entries of one tile.
enum { FLASHMOBA_LIST_QUERIES = 256 };

// The lists of one group of heads.
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

// Prefix sum of the counts over the tiles. One thread for each key block; it keeps FLASHMOBA_SCAN_TILES loads
// in flight.
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

// Builds the lists of x->sequences * x->heads heads.
static inline void flashmoba_build_lists(const FlashmobaLists* x, stream_t stream) {
    const unsigned heads = (unsigned)(x->sequences * x->heads);
    const size_t choices = (size_t)(x->end - x->start) * x->K;
    device_zero(x->counts, sizeof(int) * heads * x->tiles * x->blocks, stream);
    launch(flashmoba_count_kernel, dim3(flat_grid(choices, 1).x, heads), FLAT_BLOCK, 0, stream, *x);
    launch(flashmoba_scan_tiles_kernel, dim3((unsigned)ceil_div(x->blocks, 128), heads), 128, 0, stream, *x);
    launch(flashmoba_scan_blocks_kernel, heads, FLASHMOBA_SCAN_THREADS, 0, stream, *x);
    launch(flashmoba_fill_kernel, dim3((unsigned)x->tiles, heads), WARP, 0, stream, *x);
}

#endif
