/*
Tiles of attention in shared memory, and the matrix products of a warp with them.

A tile holds rows of queries, keys, values or gradients; each row has D elements of floatX. A function object
tells the address of each row, so a tile may hold neighbouring tokens or a gathered list:

    rows = neighbours(memory, stride, first, T);              // or another type with from(), has() and at()
    load_tile<64, D, THREADS>(tile, rows);                    // all threads; then commit, wait and barrier
    TileRows<2, D, true> queries;  queries.take(q_tile, first_row);      // 32 rows as the left operand
    multiply_transposed(scores, queries, k_tile, 0);                      // scores = q k^T
    multiply_add(out, scores, v_tile, 0);                                 // out += scores v

A product is spread over the lanes of a warp as in the result of mma.m16n8k16. sum[m][n][i] of a lane is the
element of row 16 m + lane / 4 + 8 (i / 2) and column 8 n + 2 (lane % 4) + i % 2: the four lanes of a quad
hold a row. The left operand has the same layout, so the result of one product is the left operand of the next
one without leaving the registers (Dao, FlashAttention-2, arXiv 2307.08691, section 3.3).

The bf16 build multiplies on the tensor cores and accumulates in fp32. The fp32 build has the same functions
with plain multiplications, for checking. The kernels that use them differ only in tile sizes, and in the
router's two bf16 terms of a centroid (kernels/flashmoba/router.cuh).
*/
#ifndef KERNELS_TILE_CUH
#define KERNELS_TILE_CUH

// ldmatrix, mma, cp.async
#include "kernels/ptx.cuh"
// WARP, ALL_LANES, lane_of_warp, warp_of_block
#include "kernels/threads.cuh"
// floatX
#include "runtime/precision.h"

// ----------------------------------------------------------------------------
// Shared memory

// A chunk is 16 bytes: the size of a copy, and of a row of the 8 x 8 matrices that ldmatrix loads.
enum { CHUNK = 16 / sizeof(floatX) };

// Index of element (row, column) in a tile. ldmatrix reads the same chunk of eight rows at once. In a plain
// layout these eight chunks would lie in the same banks (a bank conflict). So the number of a chunk is
// combined with the number of its row by exclusive or. Any eight chunks that are read together, along a row
// or down a column, then cover all 32 banks. A row of 64 bytes covers only half of the banks, so two
// neighbouring rows use the same exclusive or.
template <int D> __device__ __forceinline__ int tile_offset(unsigned row, unsigned column) {
    constexpr unsigned CHUNKS = D / CHUNK;
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "rows of 64 bytes or a multiple of 128");
    const unsigned turn = CHUNKS == 4 ? row / 2 % 4 : row % 8;
    return row * D + ((column / CHUNK) ^ turn) * CHUNK + column % CHUNK;
}

// Row source of neighbouring tokens: row i of the tile is row first + i of memory, which has `end` rows.
template <typename Element> struct NeighbourRows {
    Element* memory;
    int stride, first, end;

    // The same source, starting at `row`.
    __device__ __forceinline__ NeighbourRows from(int row) const {
        NeighbourRows rest = *this;
        rest.first += row;
        return rest;
    }
    __device__ __forceinline__ bool has(int row) const { return first + row < end; }
    // The address of the row. If the row does not exist, this is the last row, so it may still be read.
    __device__ __forceinline__ Element* at(int row) const {
        return memory + (size_t)min(first + row, end - 1) * stride;
    }
};

template <typename Element>
__device__ __forceinline__ NeighbourRows<Element> neighbours(Element* memory, int stride, int first,
                                                             int end) {
    NeighbourRows<Element> rows;
    rows.memory = memory, rows.stride = stride, rows.first = first, rows.end = end;
    return rows;
}

// load_tile() starts asynchronous copies of rows into a tile. Rows that do not exist become 0. This one
// copies ROWS rows, by THREADS threads.
template <int ROWS, int D, int THREADS, typename Rows>
__device__ __forceinline__ void load_tile(floatX* tile, const Rows& rows) {
    constexpr int CHUNKS = D / CHUNK, STEP = THREADS / CHUNKS; // rows at a time
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0,
                  "a thread copies one column of every STEP-th row");
    const unsigned thread = compute_here(threadIdx.x);
    const unsigned first = thread / CHUNKS, column = thread % CHUNKS * CHUNK;
    const Rows own = rows.from(first);
#pragma unroll
    for (unsigned row = 0; row < ROWS; row += STEP)
        cp_async16(tile + tile_offset<D>(first + row, column), own.at(row) + column, own.has(row));
}

// For a number of rows that is known at run time, by all threads of the block.
template <int D, typename Rows>
__device__ __forceinline__ void load_tile(floatX* tile, const Rows& rows, int count) {
    constexpr int CHUNKS = D / CHUNK;
    const int thread = compute_here(threadIdx.x), step = blockDim.x / CHUNKS;
    const int column = thread % CHUNKS * CHUNK;
    for (int row = thread / CHUNKS; row < count; row += step)
        cp_async16(tile + tile_offset<D>(row, column), rows.at(row) + column, rows.has(row));
}

// ----------------------------------------------------------------------------
// Products

template <int M, int N> __device__ __forceinline__ void clear(float (&sum)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][n][i] = 0;
}

template <int M, int N> __device__ __forceinline__ void scale_rows(float (&sum)[M][N][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][n][i] *= factor;
}

#if defined(PRECISION_BF16)

static __device__ __forceinline__ unsigned pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

// Loads 16 x 16 elements of a tile, from (row, column) on, as the left operand.
template <int D>
__device__ __forceinline__ void load_left(unsigned (&a)[4], const floatX* tile, int row, int column) {
    const unsigned lane = lane_of_warp();
    ldmatrix_x4(a, tile + row * D + (tile_offset<D>(lane % 16, lane / 16 * 8) ^ column));
}

// Loads 16 x 16 elements of a tile as the left operand. The rows of the operand are the tile's columns.
template <int D>
__device__ __forceinline__ void load_left_transposed(unsigned (&a)[4], const floatX* tile, int row,
                                                     int column) {
    const unsigned lane = lane_of_warp();
    ldmatrix_x4_trans(a,
                      tile + row * D + (tile_offset<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8) ^ column));
}

// Loads 16 x 16 elements of a tile as the right operand. The columns of the operand are the tile's rows.
template <int D>
__device__ __forceinline__ void load_right_transposed(unsigned (&b)[4], const floatX* tile, int row,
                                                      int column) {
    const unsigned lane = lane_of_warp();
    ldmatrix_x4(b, tile + row * D + (tile_offset<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8) ^ column));
}

// Loads 16 x 16 elements of a tile as the right operand. The columns of the operand are the tile's columns.
template <int D>
__device__ __forceinline__ void load_right(unsigned (&b)[4], const floatX* tile, int row, int column) {
    const unsigned lane = lane_of_warp();
    ldmatrix_x4_trans(b, tile + row * D + (tile_offset<D>(lane % 16, lane / 16 * 8) ^ column));
}

// 16 M rows of a tile as the left operand of products. They are loaded once into registers (IN_REGISTERS), or
// again for every product.
template <int M, int D, bool IN_REGISTERS> struct TileRows {
    unsigned at[M][D / 16][4];

    __device__ __forceinline__ void take(const floatX* tile, int first_row) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < D / 16; k++) load_left<D>(at[m][k], tile, first_row + 16 * m, 16 * k);
    }
    __device__ __forceinline__ void get(unsigned (&a)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = at[m][k][i];
    }
};

template <int M, int D> struct TileRows<M, D, false> {
    const floatX* tile;
    int first_row;

    __device__ __forceinline__ void take(const floatX* of_tile, int row) { tile = of_tile, first_row = row; }
    __device__ __forceinline__ void get(unsigned (&a)[4], int m, int k) const {
        load_left<D>(a, tile, first_row + 16 * m, 16 * k);
    }
};

// product (16M, 8N) = left (16M, D) times the transpose of 8N rows of a tile, from first_row on.
template <int M, int N, int D, bool IN_REGISTERS>
__device__ __forceinline__ void multiply_transposed(float (&product)[M][N][4],
                                                    const TileRows<M, D, IN_REGISTERS>& left,
                                                    const floatX* tile, int first_row) {
    clear(product);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left.get(a[m], m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            load_right_transposed<D>(b, tile, first_row + 8 * n, 16 * k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16_bf16(product[m][n], a[m], b[0], b[1]);
                mma_m16n8k16_bf16(product[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sum (16M, 8C) += left (16M, 8N), rounded to floatX, times 8N rows of a tile from first_row on.
template <int M, int N, int C>
__device__ __forceinline__ void multiply_add(float (&sum)[M][C][4], const float (&left)[M][N][4],
                                             const floatX* tile, int first_row) {
    unsigned a[N / 2][M][4];
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[k][m][i] = pack(left[m][2 * k + i / 2][i % 2 * 2], left[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            unsigned b[4];
            load_right<8 * C>(b, tile, first_row + 16 * k, 8 * c);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16_bf16(sum[m][c], a[k][m], b[0], b[1]);
                mma_m16n8k16_bf16(sum[m][c + 1], a[k][m], b[2], b[3]);
            }
        }
}

// sum (16, 8C) += the transpose of 16 columns of the tile `left` (rows, COLUMNS), times 8C columns of the
// tile `right` (rows, D); `rows` is a multiple of 16.
template <int COLUMNS, int D, int C>
__device__ __forceinline__ void multiply_columns_add(float (&sum)[1][C][4], const floatX* left,
                                                     int left_column, const floatX* right, int right_column,
                                                     int rows) {
#pragma unroll 2
    for (int row = 0; row < rows; row += 16) {
        unsigned a[4];
        load_left_transposed<COLUMNS>(a, left, row, left_column);
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            unsigned b[4];
            load_right<D>(b, right, row, right_column + 8 * c);
            mma_m16n8k16_bf16(sum[0][c], a, b[0], b[1]);
            mma_m16n8k16_bf16(sum[0][c + 1], a, b[2], b[3]);
        }
    }
}

static __device__ __forceinline__ void store_pair(floatX* at, float low, float high) {
    *(unsigned*)at = pack(low, high); // columns are even: a multiple of 4 bytes
}

#else // fp32

// fp32: the products read the rows from the tile; IN_REGISTERS has no effect.
template <int M, int D, bool IN_REGISTERS> struct TileRows {
    const floatX* tile;
    int first_row;

    __device__ __forceinline__ void take(const floatX* of_tile, int row) { tile = of_tile, first_row = row; }
};

template <int M, int N, int D, bool IN_REGISTERS>
__device__ __forceinline__ void multiply_transposed(float (&product)[M][N][4],
                                                    const TileRows<M, D, IN_REGISTERS>& left,
                                                    const floatX* tile, int first_row) {
    const unsigned lane = lane_of_warp(), row = left.first_row + lane / 4, column = first_row + lane % 4 * 2;
    clear(product);
    for (int d = 0; d < D; d++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    product[m][n][i] += left.tile[tile_offset<D>(row + 16 * m + i / 2 * 8, d)] *
                                        tile[tile_offset<D>(column + 8 * n + i % 2, d)];
}

template <int M, int N, int C>
__device__ __forceinline__ void multiply_add(float (&sum)[M][C][4], const float (&left)[M][N][4],
                                             const floatX* tile, int first_row) {
    const unsigned lane = lane_of_warp(), column = lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < 8 * N; k++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // The lane of the quad that holds column k of this row broadcasts it to the quad.
                const float factor =
                    __shfl_sync(ALL_LANES, left[m][k / 8][half * 2 + k % 2], (lane & ~3u) + k % 8 / 2);
#pragma unroll
                for (int c = 0; c < C; c++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        sum[m][c][half * 2 + i] +=
                            factor * tile[tile_offset<8 * C>(first_row + k, 8 * c + column + i)];
            }
}

template <int COLUMNS, int D, int C>
__device__ __forceinline__ void multiply_columns_add(float (&sum)[1][C][4], const floatX* left,
                                                     int left_column, const floatX* right, int right_column,
                                                     int rows) {
    const unsigned lane = lane_of_warp(), column = lane % 4 * 2;
    for (int row = 0; row < rows; row++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float factor = left[tile_offset<COLUMNS>(row, left_column + lane / 4 + 8 * half)];
#pragma unroll
            for (int c = 0; c < C; c++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    sum[0][c][half * 2 + i] +=
                        factor * right[tile_offset<D>(row, right_column + 8 * c + column + i)];
        }
}

static __device__ __forceinline__ void store_pair(floatX* at, float low, float high) {
    at[0] = low, at[1] = high;
}

#endif

// ----------------------------------------------------------------------------
// Rows of results

// The largest element and the sum of a row. The argument is the largest element or the sum of this lane's
// columns.
static __device__ __forceinline__ float row_maximum(float largest) {
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
}

static __device__ __forceinline__ float row_total(float sum) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// A running softmax over the columns of 16M rows. It uses powers of two: exp(x) = exp2(x log2(e)), and exp2
// is one instruction. Every lane has the scaled maximum of its whole rows, but only the sums over its own
// columns.
template <int M> struct RunningSoftmax {
    float maximum[M][2], sum[M][2];

    __device__ __forceinline__ void begin(void) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) maximum[m][half] = -INFINITY, sum[m][half] = 0;
    }

    // Replaces each score by exp2(scale_log2 * score - maximum), and rescales the sums from the old maximum
    // to the new one. A score of -INFINITY marks a key that the row does not see. The maximum is stored after
    // its multiplication by scale_log2 and rounding. So while it does not change, the sums are multiplied by
    // exactly 1.
    template <int N, int C>
    __device__ __forceinline__ void update(float (&scores)[M][N][4], float (&out)[M][C][4],
                                           float scale_log2) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float largest = -INFINITY;
#pragma unroll
                for (int n = 0; n < N; n++)
                    largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                largest = fmaxf(maximum[m][half], row_maximum(largest) * scale_log2);
                // A row that has seen no key yet: -INFINITY minus -INFINITY would be NaN.
                const float offset = largest == -INFINITY ? 0 : largest;
                const float correction = exp2_approximate(maximum[m][half] - offset);
                maximum[m][half] = largest;
                sum[m][half] *= correction;
#pragma unroll
                for (int c = 0; c < C; c++)
#pragma unroll
                    for (int i = 0; i < 2; i++) out[m][c][2 * half + i] *= correction;
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float* score = &scores[m][n][2 * half + i];
                        *score = exp2_approximate(fmaf(*score, scale_log2, -offset));
                        sum[m][half] += *score;
                    }
            }
    }
};

// Writes 16M rows of a warp to memory: 8C of their D columns, from first_column on. The elements go through
// the same rows and columns of a tile, so that each store has 16 bytes. No other warp may read or write this
// part of the tile any more.
template <int D, int M, int C, typename Rows>
__device__ __forceinline__ void store_columns(const Rows& rows, floatX* tile, int first_row, int first_column,
                                              const float (&sum)[M][C][4]) {
    constexpr int CHUNKS = 8 * C / CHUNK;
    const unsigned lane = lane_of_warp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < C; c++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_pair(tile + tile_offset<D>(first_row + 16 * m + 8 * half + lane / 4,
                                                 first_column + 8 * c + lane % 4 * 2),
                           sum[m][c][2 * half], sum[m][c][2 * half + 1]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * M * CHUNKS / WARP; i++) {
        const unsigned chunk = i * WARP + lane, row = first_row + chunk / CHUNKS,
                       column = first_column + chunk % CHUNKS * CHUNK;
        if (rows.has(row)) {
            *(uint4*)(rows.at(row) + column) = *(const uint4*)(tile + tile_offset<D>(row, column));
            count_stored(sizeof(uint4));
        }
    }
}

// The same for whole rows of D = 8C columns.
template <int M, int C, typename Rows>
__device__ __forceinline__ void store_rows(const Rows& rows, floatX* tile, int first_row,
                                           const float (&sum)[M][C][4]) {
    store_columns<8 * C>(rows, tile, first_row, 0, sum);
}

#endif
