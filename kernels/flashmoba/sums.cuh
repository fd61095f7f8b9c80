/*
Sums of dK and dV in the backward of flashmoba.

The gradients of a key are sums over all work items and query heads that read it. Each item stores its sums in
fp32, and flashmoba_merge_keys_kernel adds them up in the order of heads and items. If one item has the whole
sum (flashmoba_is_whole), it writes dK and dV itself.

    const RowsOfSums rows = flashmoba_sums_of(sums, x, item, head, part, D);
    store_sums(rows.keys, warp_row, rows.count, dk);

Only very long sequences have a carry-over. Heads are then processed in groups, and the query heads of one KV
head, or the queries of one head, may be in two groups (kernels/flashmoba/groups.cuh). The first group leaves
its sums in memory (flashmoba_carries_over), and the second one starts from them (flashmoba_goes_on).
*/
#ifndef KERNELS_FLASHMOBA_SUMS_CUH
#define KERNELS_FLASHMOBA_SUMS_CUH

// FlashmobaItem, FlashmobaLists
#include "kernels/flashmoba/items.cuh"

// Sums of the gradients of keys and values, in fp32. The sums of keys are not multiplied by the scale yet.
typedef struct {
    float* of_heads; // (heads, 2, T, D) sums of the first item of every block
    float* more;     // (heads, max_more, parts, 2, keys, D) sums of the other items
} FlashmobaSums;

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

// ----------------------------------------------------------------------------
// The carry-over from one group to the next

// Whether the sums of a head start from the carry-over that the previous group left in of_heads. This is so
// for the first head of a group, if the previous group had the same KV head or earlier queries of the same
// head.
static __device__ __forceinline__ bool flashmoba_goes_on(const FlashmobaLists& x, int head) {
    const int h = flashmoba_head(x, head);
    return h == x.first_head && (x.start > 0 || (h > 0 && x.kv_of_q[h - 1] == x.kv_of_q[h]));
}

// Whether the sums of the last head of a group become the carry-over of the next group.
static __device__ __forceinline__ bool flashmoba_carries_over(const FlashmobaLists& x) {
    const int last = x.first_head + x.heads - 1;
    return x.end < x.T || (last + 1 < x.H && x.kv_of_q[last] == x.kv_of_q[last + 1]);
}

#endif
