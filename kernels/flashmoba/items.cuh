/*
Work items of flashmoba, for its forward and its backward. A work item is one key block and up to
FLASHMOBA_ITEM entries of its list. If the block has more than FLASHMOBA_KEYS keys, an item has several parts.
A thread block computes one part.

    FlashmobaItem item;
    if (!flashmoba_item(&item, x, head)) return;                               // this thread block has none
    load_entries<QUERIES>(entries, item, first);                               // to shared memory
    load_tile<QUERIES, D, THREADS>(tile, gathered(q, stride, entries, end));   // the queries of these entries
    store_rows(partials<D>(partial_out, x, head, part, entries, end), tile, row, sum);

The result of an item is a partial row for each of its queries, choices and parts. kernels/flashmoba/merge.cuh
merges the partial rows of each query.
*/
#ifndef KERNELS_FLASHMOBA_ITEMS_CUH
#define KERNELS_FLASHMOBA_ITEMS_CUH

// FlashmobaLists
#include "kernels/flashmoba/lists.cuh"

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

// Grid of the kernels that compute work items.
static inline dim3 flashmoba_item_grid(const FlashmobaLists* x) {
    return dim3((unsigned)(x->max_items * x->parts), (unsigned)(x->sequences * x->heads));
}

#endif
