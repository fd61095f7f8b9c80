/*
The step between the projection and attention: key convolution, positions and block centroids, in one pass
over keys and queries, in place (docs/math.md sections 1 and 2). The twin of dev/cpu/keys.h.

    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);
    void* workspace = device_malloc(keys_backward_workspace(B, T, G, D, taps), "keys");
    keys_backward(dqkv, dweight, raw, weight, table, workspace, B, T, H, G, D, taps, stream);

    convolution  k'_t = k_t + silu( sum over l < taps of w_l * k_{t-l} )  keys, if weight is given; raw has k
    positions    pairs (i, i + D/2) rotated by the angles of the table    keys and queries, if table is given
    centroids    the mean of each block of S keys                         keys, if centroids is given

A NULL pointer turns a part off. A centroid is the mean of the stored keys, which are rounded to floatX. These
are the keys that attention uses.

A thread block has a tile of tokens of one head; with centroids, the tile is a key block. A key needs the
taps - 1 keys before it, and the gradient of a key needs the gradients of the taps - 1 keys after it. The
thread block of the neighbouring tile may have overwritten these rows already. So a small kernel first copies
the edge rows of all tiles: in the forward the last rows of each tile to raw, in the backward the first rows
of each tile to the workspace. Each tile itself copies its other rows to raw before it overwrites them.
Bytes: docs/results/kernels.md.
*/
#ifndef KERNELS_KEYS_CUH
#define KERNELS_KEYS_CUH

#include "kernels/device.cuh"
// keyconv_add
#include "kernels/keyconv.cuh"
// rope_turn
#include "kernels/rope.cuh"
#include "kernels/vector.cuh"

enum { KEYS_THREADS = 128 };
enum { KEYS_TILE = 64 }; // tokens of a tile without centroids

// Copies the last taps - 1 rows of every tile to raw.
template <int WIDTH>
__global__ void keys_copy_kernel(floatX* raw, const floatX* qkv, int T, int start, int H, int G, int D,
                                 int tile, int taps) {
    const size_t width = (size_t)G * D, i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    const int row = (int)(i / width), c = (int)(i % width);
    const int t = (start / tile + row / (taps - 1) + 1) * tile - 1 - row % (taps - 1);
    if (t < start || t >= T) return;
    const size_t token = (size_t)blockIdx.y * T + t;
    store(raw + token * width + c, load<WIDTH>(qkv + (token * (H + 2 * G) + H) * D + c));
}

// One thread block for each tile and head. A thread has WIDTH elements c.. of a row and the WIDTH elements
// D/2 + c.. that they rotate with, in every blockDim.y-th row of the tile.
template <int WIDTH>
__global__ void __launch_bounds__(KEYS_THREADS)
    keys_forward_kernel(floatX* qkv,          // (B, T, H + 2G, D)
                        floatX* raw,          // (B, T, G, D)
                        float* centroids,     // (B, T/tile, G, D)
                        const floatX* weight, // (taps, G, D)
                        const float* table,   // (T, D/2, 2)
                        int T, int start, int H, int G, int D, int tile, int taps, int first_head) {
    __shared__ float sums[KEYS_THREADS * 2 * WIDTH]; // (blockDim.y, D)
    const int head = first_head + blockIdx.y, half = D / 2, c = threadIdx.x * WIDTH;
    const int number = start / tile + blockIdx.x, first = number * tile, end = min(T, first + tile);
    const bool is_key = head >= H, has_taps = is_key && taps > 0;
    const bool has_mean = is_key && centroids && first + tile <= T;
    const size_t width = (size_t)G * D, stride = (size_t)(H + 2 * G) * D;
    if (!has_taps && !table && !has_mean) return;
    floatX* x = qkv + (size_t)blockIdx.z * T * stride + (size_t)head * D + c;
    const size_t of_key = (size_t)(head - H) * D + c;
    floatX* kept = has_taps ? raw + (size_t)blockIdx.z * T * width + of_key : NULL;

    if (has_taps) {
        const int last = first + tile - taps; // keys_copy_kernel has copied the rows after this one
        for (int t = first + threadIdx.y; t < min(end, last + 1); t += blockDim.y) {
            if (t < start) continue;
            store(kept + t * width, load<WIDTH>(x + t * stride));
            store(kept + t * width + half, load<WIDTH>(x + t * stride + half));
        }
        __syncthreads();
    }
    Values<WIDTH> sum[2] = {};
    for (int t = first + threadIdx.y; t < end; t += blockDim.y) {
        if (t < start && !has_mean) continue;
        floatX* at = x + t * stride;
        Values<WIDTH> a = load<WIDTH>(at), b = load<WIDTH>(at + half);
        if (t >= start) {
            if (has_taps) {
                keyconv_add<WIDTH>(a, kept + t * width, weight + of_key, min(t + 1, taps), width);
                keyconv_add<WIDTH>(b, kept + t * width + half, weight + of_key + half, min(t + 1, taps),
                                   width);
            }
            if (table) rope_turn<WIDTH>(a, b, table + ((size_t)t * half + c) * 2, 1);
            if (has_taps || table) {
                store(at, a);
                store(at + half, b);
            }
        }
        for (int i = 0; i < WIDTH; i++) sum[0].at[i] += rounded(a.at[i]), sum[1].at[i] += rounded(b.at[i]);
    }
    if (!has_mean) return;
    for (int i = 0; i < WIDTH; i++) {
        sums[threadIdx.y * D + c + i] = sum[0].at[i];
        sums[threadIdx.y * D + half + c + i] = sum[1].at[i];
    }
    __syncthreads();
    for (int d = threadIdx.y * blockDim.x + threadIdx.x; d < D; d += blockDim.x * blockDim.y) {
        float total = 0;
        for (int row = 0; row < (int)blockDim.y; row++) total += sums[row * D + d];
        centroids[(((size_t)blockIdx.z * (T / tile) + number) * G + head - H) * D + d] = total / (float)tile;
    }
}

// Computes rows start..T-1 of every sequence, and the centroids of the blocks that these rows complete. If
// start > 0, earlier calls have computed the keys 0..start-1 of qkv and raw, and the centroids of the blocks
// before start / S. raw is used only for the convolution, S only for the centroids.
static inline void keys_forward(floatX* qkv,            // (B, T, H + 2G, D) in and out
                                floatX* raw,            // (B, T, G, D) keys before the convolution, or NULL
                                float_acc* centroids,   // (B, T/S, G, D) or NULL
                                const floatX* weight,   // (taps, G, D) or NULL
                                const float_acc* table, // (T, D/2, 2) or NULL
                                int B, int T, int start, int H, int G, int D, int S, int taps,
                                stream_t stream) {
    const int completes_blocks = centroids && T / S > start / S;
    if (!weight && !table && !completes_blocks) return;
    const int packs = whole_packs(D / 2, qkv, raw, weight, table), lanes = D / 2 / (packs ? (int)PACK : 1);
    const int tile = centroids ? S : (int)KEYS_TILE, tiles = ceil_div(T, tile) - start / tile;
    const int most = KEYS_THREADS / lanes, first_head = table ? 0 : H;
    if (!weight) taps = 0;
    if (taps)
        launch(packs ? keys_copy_kernel<PACK> : keys_copy_kernel<1>,
               dim3(flat_grid((size_t)tiles * (taps - 1) * G * D, packs ? (int)PACK : 1).x, (unsigned)B),
               FLAT_BLOCK, 0, stream, raw, qkv, T, start, H, G, D, tile, taps);
    launch(packs ? keys_forward_kernel<PACK> : keys_forward_kernel<1>,
           dim3((unsigned)tiles, (unsigned)(H + G - first_head), (unsigned)B),
           dim3((unsigned)lanes, (unsigned)(most < tile ? most : tile)), 0, stream, qkv, raw, centroids,
           weight, table, T, start, H, G, D, tile, taps, first_head);
}

// ----------------------------------------------------------------------------
// Backward

// Copies the first taps - 1 rows of every tile of the keys' gradient to the workspace.
template <int WIDTH>
__global__ void keys_ahead_kernel(floatX* ahead,      // (B, tiles, taps - 1, G, D)
                                  const floatX* dqkv, // (B, T, H + 2G, D)
                                  int T, int H, int G, int D, int tiles, int taps) {
    const size_t width = (size_t)G * D, i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    const int row = (int)(i / width), c = (int)(i % width);
    const int t = row / (taps - 1) * KEYS_TILE + row % (taps - 1);
    if (t >= T) return;
    const size_t b = blockIdx.y;
    store(ahead + b * tiles * (taps - 1) * width + i,
          load<WIDTH>(dqkv + ((b * T + t) * (H + 2 * G) + H) * D + c));
}

// The gradient of the filter's sum, from the sum and the gradient of silu(sum).
template <int WIDTH>
__device__ inline Values<WIDTH> keys_dsum(const Values<WIDTH>& sum, const Values<WIDTH>& gradient) {
    Values<WIDTH> d;
    for (int i = 0; i < WIDTH; i++) {
        const float sigmoid = 1 / (1 + __expf(-sum.at[i]));
        d.at[i] = gradient.at[i] * sigmoid * (1 + sum.at[i] * (1 - sigmoid));
    }
    return d;
}

// Threads as in the forward. First dsum_t = dk'_t silu'(sum_t), the gradients of the filter's sums, go to
// shared memory, for the tile and the taps - 1 rows after it. Then dk_t = dk'_t + sum over l of w_l *
// dsum_{t+l}, and the tile's part of dw_l = sum over t of dsum_t * k_{t-l}.
template <int WIDTH>
__global__ void __launch_bounds__(KEYS_THREADS)
    keys_backward_kernel(floatX* dqkv,         // (B, T, H + 2G, D)
                         float* partials,      // (B, tiles, taps, G, D)
                         const floatX* ahead,  // (B, tiles, taps - 1, G, D)
                         const floatX* raw,    // (B, T, G, D)
                         const floatX* weight, // (taps, G, D)
                         const float* table,   // (T, D/2, 2)
                         int T, int H, int G, int D, int taps, int first_head) {
    SHARED_MEMORY(float, dsums); // (KEYS_TILE + taps - 1, D)
    const int head = first_head + blockIdx.y, half = D / 2, c = threadIdx.x * WIDTH;
    const int first = blockIdx.x * KEYS_TILE, end = min(T, first + KEYS_TILE);
    const size_t width = (size_t)G * D, stride = (size_t)(H + 2 * G) * D;
    floatX* x = dqkv + (size_t)blockIdx.z * T * stride + (size_t)head * D + c;
    auto load_turned = [&](Values<WIDTH>& a, Values<WIDTH>& b, const floatX* at, int t) {
        a = load<WIDTH>(at), b = load<WIDTH>(at + half);
        if (table) rope_turn<WIDTH>(a, b, table + ((size_t)t * half + c) * 2, -1);
    };
    Values<WIDTH> a, b;
    if (head < H || taps == 0) {
        for (int t = first + threadIdx.y; t < end; t += blockDim.y) {
            load_turned(a, b, x + t * stride, t);
            store(x + t * stride, a);
            store(x + t * stride + half, b);
        }
        return;
    }

    const size_t of_head = (size_t)(head - H) * D, tile = (size_t)blockIdx.z * gridDim.x + blockIdx.x;
    const floatX* keys = raw + (size_t)blockIdx.z * T * width + of_head;
    const floatX *w = weight + of_head, *next = ahead + (tile + 1) * (taps - 1) * width + of_head + c;
    for (int t = first + threadIdx.y; t < min(T, first + KEYS_TILE + taps - 1); t += blockDim.y) {
        const floatX* key = keys + t * width + c;
        float* to = dsums + (t - first) * D + c;
        load_turned(a, b, t < end ? x + t * stride : next + (t - end) * width, t);
        store(to, keys_dsum(keyconv_filter<WIDTH>(key, w + c, min(t + 1, taps), width), a));
        store(to + half,
              keys_dsum(keyconv_filter<WIDTH>(key + half, w + c + half, min(t + 1, taps), width), b));
    }
    __syncthreads();
    for (int t = first + threadIdx.y; t < end; t += blockDim.y) {
        load_turned(a, b, x + t * stride, t);
        for (int l = 0; l < min(taps, T - t); l++) {
            const float* dsum = dsums + (t - first + l) * D + c;
            const Values<WIDTH> w_a = load<WIDTH>(w + l * width + c),
                                w_b = load<WIDTH>(w + l * width + c + half);
            const Values<WIDTH> d_a = load<WIDTH>(dsum), d_b = load<WIDTH>(dsum + half);
            for (int i = 0; i < WIDTH; i++)
                a.at[i] += w_a.at[i] * d_a.at[i], b.at[i] += w_b.at[i] * d_b.at[i];
        }
        store(x + t * stride, a);
        store(x + t * stride + half, b);
    }
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < taps * D; i += blockDim.x * blockDim.y) {
        const int l = i / D, d = i % D;
        float total = 0;
        for (int t = max(first, l); t < end; t++)
            total += dsums[(t - first) * D + d] * to_float(keys[(size_t)(t - l) * width + d]);
        partials[(tile * taps + l) * width + of_head + d] = total;
    }
}

// Bytes of the gradients at the edges of tiles, rounded up so that the array after them is aligned.
static inline size_t keys_ahead_bytes(int B, int T, int G, int D, int taps) {
    const size_t rows = (size_t)B * ceil_div(T, KEYS_TILE) * (taps - 1);
    return (rows * G * D * sizeof(floatX) + 15) / 16 * 16;
}

// Bytes of the workspace of keys_backward.
static inline size_t keys_backward_workspace(int B, int T, int G, int D, int taps) {
    if (taps == 0) return 0;
    return keys_ahead_bytes(B, T, G, D, taps) +
           (size_t)B * ceil_div(T, KEYS_TILE) * taps * G * D * sizeof(float);
}

// In: dqkv holds the gradients of the queries and keys that keys_forward wrote. Out: the gradients of the
// queries and keys that it was given. dweight accumulates. Without a weight, dweight, raw and workspace are
// not used.
static inline void keys_backward(floatX* dqkv,           // (B, T, H + 2G, D) in and out
                                 float_acc* dweight,     // (taps, G, D)
                                 const floatX* raw,      // (B, T, G, D)
                                 const floatX* weight,   // (taps, G, D) or NULL
                                 const float_acc* table, // (T, D/2, 2) or NULL
                                 void* workspace, int B, int T, int H, int G, int D, int taps,
                                 stream_t stream) {
    if (!weight && !table) return;
    if (!weight) taps = 0;
    const int packs = whole_packs(D / 2, dqkv, raw, weight, table), lanes = D / 2 / (packs ? (int)PACK : 1);
    const int tiles = ceil_div(T, KEYS_TILE), most = KEYS_THREADS / lanes, first_head = table ? 0 : H;
    floatX* ahead = (floatX*)workspace;
    float* partials = taps ? (float*)((char*)workspace + keys_ahead_bytes(B, T, G, D, taps)) : NULL;
    if (taps)
        launch(packs ? keys_ahead_kernel<PACK> : keys_ahead_kernel<1>,
               dim3(flat_grid((size_t)tiles * (taps - 1) * G * D, packs ? (int)PACK : 1).x, (unsigned)B),
               FLAT_BLOCK, 0, stream, ahead, dqkv, T, H, G, D, tiles, taps);
    launch(packs ? keys_backward_kernel<PACK> : keys_backward_kernel<1>,
           dim3((unsigned)tiles, (unsigned)(H + G - first_head), (unsigned)B),
           dim3((unsigned)lanes, (unsigned)(most < KEYS_TILE ? most : (int)KEYS_TILE)),
           taps ? sizeof(float) * D * (KEYS_TILE + taps - 1) : 0, stream, dqkv, partials, ahead, raw, weight,
           table, T, H, G, D, taps, first_head);
    if (taps) add_column_sums(dweight, partials, B * tiles, taps * G * D, stream);
}

#endif
