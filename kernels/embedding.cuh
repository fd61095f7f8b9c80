/*
Token embedding: out[row] = weight[token[row]]. The twin of dev/cpu/embedding.h.

Cost of the forward: each row is read and written once, 4 bytes for each element of bf16.

Backward: a token may occur in thousands of rows. Their gradients must be added in a fixed order, without
atomics, and not all by one thread. So the rows are first sorted by token:

    1. keys (token, row) are sorted in tiles in shared memory; then pairs of sorted runs are merged until one
       run is left
    2. a thread block for each 32 sorted rows (a chunk) adds up neighbouring rows of the same token. If all
       rows of a token are in the chunk, it adds their sum to dweight. A sum that crosses an edge goes to
       `partials`
    3. the partial sums of a token are added up in the order of the chunks

Cost of the backward: 2 bytes for each element of dout (bf16), 8 for each element of the rows of dweight that
occur, up to 1/2 for the partial sums. Before that the sort takes 16 bytes a row for each of
log2(rows / 1024) + 1 launches. It is bound by the launches: about 10 launches of a few microseconds for 2^19
rows.
*/
#ifndef KERNELS_EMBEDDING_CUH
#define KERNELS_EMBEDDING_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

// A token (upper half) and its row (lower half). Keys sort by token, then by row. All keys differ, so there
// is only one sorted order.
typedef unsigned long long EmbeddingKey;

enum { EMBEDDING_TILE = 1024 }; // keys that are sorted in shared memory
enum { EMBEDDING_CHUNK = 32 };  // sorted rows that a thread block adds up
enum { EMBEDDING_BATCH = 8 };   // rows of a chunk whose loads are in flight at one time

__device__ inline int key_token(EmbeddingKey key) { return (int)(key >> 32); }
__device__ inline int key_row(EmbeddingKey key) { return (int)(key & 0xFFFFFFFFu); }

// ----------------------------------------------------------------------------
// Forward

template <int WIDTH>
__global__ void embedding_forward_kernel(floatX* out, const int* tokens, const floatX* weight, int rows,
                                         int C) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= (size_t)rows * C) return;
    const size_t row = at / C, c = at % C;
    store(out + at, load<WIDTH>(weight + (size_t)tokens[row] * C + c));
}

static inline void embedding_forward(floatX* out,          // (rows, C)
                                     const int* tokens,    // (rows)
                                     const floatX* weight, // (Vp, C)
                                     int rows, int C, stream_t stream) {
    const int packs = whole_packs(C, out, weight);
    launch(packs ? embedding_forward_kernel<PACK> : embedding_forward_kernel<1>,
           flat_grid((size_t)rows * C, packs ? (int)PACK : 1), FLAT_BLOCK, 0, stream, out, tokens, weight,
           rows, C);
}

// ----------------------------------------------------------------------------
// Backward: the sort

// Sorts EMBEDDING_TILE keys in shared memory (Batcher's bitonic network): each thread compares one pair at a
// time.
__global__ void embedding_sort_kernel(EmbeddingKey* keys, // (rows) each tile of it sorted
                                      const int* tokens, int rows) {
    __shared__ EmbeddingKey tile[EMBEDDING_TILE];
    const int start = (int)blockIdx.x * EMBEDDING_TILE;
    for (int i = (int)threadIdx.x; i < EMBEDDING_TILE; i += (int)blockDim.x) {
        const int row = start + i;
        tile[i] = row < rows ? (EmbeddingKey)tokens[row] << 32 | (EmbeddingKey)row : ~(EmbeddingKey)0;
    }
    for (int size = 2; size <= EMBEDDING_TILE; size *= 2) {
        for (int stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
            const int lower = 2 * (int)threadIdx.x - ((int)threadIdx.x & (stride - 1)),
                      upper = lower + stride;
            const EmbeddingKey a = tile[lower], b = tile[upper];
            const bool ascending = (lower & size) == 0;
            if ((a > b) == ascending) tile[lower] = b, tile[upper] = a;
        }
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < EMBEDDING_TILE && start + i < rows; i += (int)blockDim.x)
        keys[start + i] = tile[i];
}

// Number of the sorted keys that are below `key`.
__device__ inline int keys_below(const EmbeddingKey* keys, int count, EmbeddingKey key) {
    int first = 0;
    while (count > 0) {
        const int half = count / 2;
        if (keys[first + half] < key) first += half + 1, count -= half + 1;
        else count = half;
    }
    return first;
}

// Merges pairs of neighbouring sorted runs. The place of a key is its place in its own run plus the number of
// smaller keys in the other run.
__global__ void embedding_merge_kernel(EmbeddingKey* merged, const EmbeddingKey* keys, int rows, int run) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= rows) return;
    const int own = i / run * run, other = own / run % 2 ? own - run : own + run;
    const int others = min(run, rows - other); // below 0 where the last run has no neighbour
    const int pair = min(own, other);
    merged[pair + (i - own) + keys_below(keys + other, others, keys[i])] = keys[i];
}

// ----------------------------------------------------------------------------
// Backward: the sums

template <int WIDTH> __device__ inline void add_to(float* to, const Values<WIDTH>& added) {
    Values<WIDTH> sum = load<WIDTH>(to);
    for (int i = 0; i < WIDTH; i++) sum.at[i] += added.at[i];
    store(to, sum);
}

// A chunk has two rows of partials. Row 0 is the sum of the token that continues from the previous chunk. Row
// 1 is the sum of the token that begins in this chunk and continues in the next.
template <int WIDTH>
__global__ void embedding_chunk_kernel(float* dweight,           // (Vp, C)
                                       float* partials,          // (chunks, 2, C)
                                       const floatX* dout,       // (rows, C)
                                       const EmbeddingKey* keys, // (rows)
                                       int rows, int C) {
    const int c = (int)(blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (c >= C) return;
    const int first = (int)blockIdx.x * EMBEDDING_CHUNK, end = min(first + EMBEDDING_CHUNK, rows);
    int begins_here = first == 0 || key_token(keys[first - 1]) != key_token(keys[first]);
    Values<WIDTH> sum = {};
    for (int batch = first; batch < end; batch += EMBEDDING_BATCH) {
        Values<WIDTH> added[EMBEDDING_BATCH];
        // For a row beyond the end the last row is read, and not used.
        for (int j = 0; j < EMBEDDING_BATCH; j++)
            added[j] = load<WIDTH>(dout + (size_t)key_row(keys[min(batch + j, end - 1)]) * C + c);
        for (int j = 0; j < EMBEDDING_BATCH; j++) {
            const int i = batch + j;
            if (i >= end) break;
            for (int k = 0; k < WIDTH; k++) sum.at[k] += added[j].at[k];
            const int token = key_token(keys[i]);
            const int ends_here = i + 1 == rows || key_token(keys[i + 1]) != token;
            if (!ends_here && i + 1 < end) continue;
            if (begins_here && ends_here) add_to(dweight + (size_t)token * C + c, sum);
            else store(partials + ((size_t)blockIdx.x * 2 + begins_here) * C + c, sum);
            begins_here = 1;
            sum = {};
        }
    }
}

// Adds up the partial sums of a token that crosses edges. The chunk in which the token begins does this.
template <int WIDTH>
__global__ void embedding_edge_kernel(float* dweight, const float* partials, const EmbeddingKey* keys,
                                      int rows, int C) {
    const int c = (int)(blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    const int first = (int)blockIdx.x * EMBEDDING_CHUNK, end = first + EMBEDDING_CHUNK;
    if (c >= C || end >= rows) return;
    const int token = key_token(keys[end]);
    if (key_token(keys[end - 1]) != token) return;
    if (first > 0 && key_token(keys[first - 1]) == token) return;
    const int last = end + keys_below(keys + end, rows - end, (EmbeddingKey)(token + 1) << 32) - 1;
    Values<WIDTH> sum = load<WIDTH>(partials + ((size_t)blockIdx.x * 2 + 1) * C + c);
    for (int chunk = (int)blockIdx.x + 1; chunk <= last / EMBEDDING_CHUNK; chunk++) {
        const Values<WIDTH> added = load<WIDTH>(partials + (size_t)chunk * 2 * C + c);
        for (int k = 0; k < WIDTH; k++) sum.at[k] += added.at[k];
    }
    add_to(dweight + (size_t)token * C + c, sum);
}

static inline size_t embedding_key_bytes(int rows) {
    return ((size_t)rows * sizeof(EmbeddingKey) + 15) / 16 * 16;
}

// Bytes of the workspace of embedding_backward.
static inline size_t embedding_backward_workspace(int rows, int C) {
    return 2 * embedding_key_bytes(rows) +
           (size_t)ceil_div(rows, EMBEDDING_CHUNK) * 2 * (size_t)C * sizeof(float);
}

// dweight accumulates. The order of each sum follows from the tokens alone.
static inline void embedding_backward(float_acc* dweight, // (Vp, C)
                                      const floatX* dout, // (rows, C)
                                      const int* tokens,  // (rows)
                                      void* workspace, int rows, int C, stream_t stream) {
    EmbeddingKey* keys = (EmbeddingKey*)workspace;
    EmbeddingKey* other = (EmbeddingKey*)((char*)workspace + embedding_key_bytes(rows));
    float* partials = (float*)((char*)other + embedding_key_bytes(rows));

    launch(embedding_sort_kernel, ceil_div(rows, EMBEDDING_TILE), EMBEDDING_TILE / 2, 0, stream, keys, tokens,
           rows);
    for (int run = EMBEDDING_TILE; run < rows; run *= 2) {
        launch(embedding_merge_kernel, flat_grid((size_t)rows, 1), FLAT_BLOCK, 0, stream, other, keys, rows,
               run);
        EmbeddingKey* merged = other;
        other = keys;
        keys = merged;
    }

    const int packs = whole_packs(C, dweight, dout), columns = C / (packs ? (int)PACK : 1);
    const dim3 block((unsigned)(columns < 128 ? ceil_div(columns, WARP) * WARP : 128));
    const dim3 grid((unsigned)ceil_div(rows, EMBEDDING_CHUNK), (unsigned)ceil_div(columns, (int)block.x));
    launch(packs ? embedding_chunk_kernel<PACK> : embedding_chunk_kernel<1>, grid, block, 0, stream, dweight,
           partials, dout, keys, rows, C);
    launch(packs ? embedding_edge_kernel<PACK> : embedding_edge_kernel<1>, grid, block, 0, stream, dweight,
           partials, keys, rows, C);
}

#endif
