/*
Key convolution (Optimizing Mixture of Block Attention, arXiv 2511.11571; docs/math.md section 2): a short causal filter over the
keys of a layer, channel by channel, with a residual, in place on packed rows. The twin of dev/cpu/keyconv.h.

    k'_t = k_t + silu( sum over l < taps of w_l * k_{t-l} )        keys before the sequence are zero

Cost, bytes for each element of the keys (bf16): forward 8 (keys to raw, raw to keys: a thread may not overwrite the key that its
neighbour still reads); backward 16, for the gradients of the filter's sums pass through memory in fp32.
*/
#ifndef KERNELS_KEYCONV_CUH
#define KERNELS_KEYCONV_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

enum { KEYCONV_MAX_TAPS = 5 };
enum { KEYCONV_CHUNK = 128 }; // rows whose part of dweight one thread sums

// Rows start..T-1 of every sequence, counted without gaps.
__device__ inline size_t keyconv_row(size_t i, int T, int start) {
    const size_t rows = (size_t)(T - start);
    return i / rows * T + start + i % rows;
}

template <int WIDTH>
__global__ void keyconv_copy_kernel(floatX* raw, const floatX* qkv, int B, int T, int start, int H, int G,
                                    int D) {
    const size_t width = (size_t)G * D, stride = (size_t)(H + 2 * G) * D;
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= (size_t)B * (T - start) * width) return;
    const size_t row = keyconv_row(at / width, T, start), c = at % width;
    store(raw + row * width + c, load<WIDTH>(qkv + row * stride + (size_t)H * D + c));
}

// sum over l < taken of w_l * k_{t-l}; `key` and `weight` point at k_t and w_0, rows of `width` channels.
template <int WIDTH>
__device__ inline Values<WIDTH> keyconv_filter(const floatX* key, const floatX* weight, int taken,
                                               size_t width) {
    Values<WIDTH> sum = {};
    for (int l = 0; l < KEYCONV_MAX_TAPS; l++) {
        if (l >= taken) break;
        const Values<WIDTH> k = load<WIDTH>(key - l * width), w = load<WIDTH>(weight + l * width);
        for (int i = 0; i < WIDTH; i++) sum.at[i] += w.at[i] * k.at[i];
    }
    return sum;
}

template <int WIDTH>
__global__ void keyconv_forward_kernel(floatX* qkv, const floatX* raw, const floatX* weight, int B, int T,
                                       int start, int H, int G, int D, int taps) {
    const size_t width = (size_t)G * D, stride = (size_t)(H + 2 * G) * D;
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= (size_t)B * (T - start) * width) return;
    const size_t row = keyconv_row(at / width, T, start), c = at % width;
    const floatX* key = raw + row * width + c;
    const Values<WIDTH> sum = keyconv_filter<WIDTH>(key, weight + c, min((int)(row % T) + 1, taps), width);
    Values<WIDTH> out = load<WIDTH>(key);
    for (int i = 0; i < WIDTH; i++) out.at[i] += sum.at[i] / (1 + __expf(-sum.at[i]));
    store(qkv + row * stride + (size_t)H * D + c, out);
}

// Rows start..T-1 of every sequence. Where start > 0, the rows 0..start-1 of raw are there from earlier calls.
static inline void keyconv_forward(floatX* qkv,          // (B, T, H + 2G, D) its keys become k'
                                   floatX* raw,          // (B, T, G, D)
                                   const floatX* weight, // (taps, G, D)
                                   int B, int T, int start, int H, int G, int D, int taps, stream_t stream) {
    const int packs = whole_packs(D, qkv, raw, weight);
    const dim3 grid = flat_grid((size_t)B * (T - start) * G * D, packs ? (int)PACK : 1);
    launch(packs ? keyconv_copy_kernel<PACK> : keyconv_copy_kernel<1>, grid, FLAT_BLOCK, 0, stream, raw, qkv,
           B, T, start, H, G, D);
    launch(packs ? keyconv_forward_kernel<PACK> : keyconv_forward_kernel<1>, grid, FLAT_BLOCK, 0, stream, qkv,
           raw, weight, B, T, start, H, G, D, taps);
}

// ----------------------------------------------------------------------------
// Backward

// The gradient of the filter's sums, and each chunk's part of the gradient of the taps.
template <int WIDTH>
__global__ void keyconv_sums_kernel(float* dsums,         // (B, T, G, D)
                                    float* partials,      // (chunks, taps, G, D)
                                    const floatX* dqkv,   // (B, T, H + 2G, D)
                                    const floatX* raw,    // (B, T, G, D)
                                    const floatX* weight, // (taps, G, D)
                                    int rows, int T, int H, int G, int D, int taps) {
    const size_t width = (size_t)G * D, stride = (size_t)(H + 2 * G) * D;
    const size_t c = ((size_t)blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (c >= width) return;
    Values<WIDTH> dtaps[KEYCONV_MAX_TAPS] = {};
    const int first = (int)blockIdx.x * KEYCONV_CHUNK, end = min(first + KEYCONV_CHUNK, rows);
    for (int row = first; row < end; row++) {
        const int taken = min(row % T + 1, taps);
        const floatX* key = raw + (size_t)row * width + c;
        const Values<WIDTH> sum = keyconv_filter<WIDTH>(key, weight + c, taken, width);
        Values<WIDTH> d = load<WIDTH>(dqkv + (size_t)row * stride + (size_t)H * D + c);
        for (int i = 0; i < WIDTH; i++) {
            const float sigmoid = 1 / (1 + __expf(-sum.at[i]));
            d.at[i] *= sigmoid * (1 + sum.at[i] * (1 - sigmoid));
        }
        store(dsums + (size_t)row * width + c, d);
        for (int l = 0; l < KEYCONV_MAX_TAPS; l++) {
            if (l >= taken) break;
            const Values<WIDTH> k = load<WIDTH>(key - l * width);
            for (int i = 0; i < WIDTH; i++) dtaps[l].at[i] += d.at[i] * k.at[i];
        }
    }
    for (int l = 0; l < KEYCONV_MAX_TAPS; l++)
        if (l < taps) store(partials + ((size_t)blockIdx.x * taps + l) * width + c, dtaps[l]);
}

// dk_t = dk'_t + sum over l of w_l * dsum_{t+l}
template <int WIDTH>
__global__ void keyconv_backward_kernel(floatX* dqkv, const float* dsums, const floatX* weight, int rows,
                                        int T, int H, int G, int D, int taps) {
    const size_t width = (size_t)G * D, stride = (size_t)(H + 2 * G) * D;
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= rows * width) return;
    const size_t row = at / width, c = at % width;
    const int later = min(T - (int)(row % T), taps);
    floatX* dkey = dqkv + row * stride + (size_t)H * D + c;
    Values<WIDTH> d = load<WIDTH>(dkey);
    for (int l = 0; l < KEYCONV_MAX_TAPS; l++) {
        if (l >= later) break;
        const Values<WIDTH> dsum = load<WIDTH>(dsums + at + l * width),
                            w = load<WIDTH>(weight + l * width + c);
        for (int i = 0; i < WIDTH; i++) d.at[i] += w.at[i] * dsum.at[i];
    }
    store(dkey, d);
}

static inline size_t keyconv_dsums(int B, int T, int G, int D) {
    return ((size_t)B * T * G * D + 3) / 4 * 4; // what follows stays aligned
}

// Bytes of the workspace of keyconv_backward.
static inline size_t keyconv_backward_workspace(int B, int T, int G, int D, int taps) {
    const size_t partials = (size_t)ceil_div(B * T, KEYCONV_CHUNK) * taps * G * D;
    return (keyconv_dsums(B, T, G, D) + partials) * sizeof(float);
}

// dqkv's keys hold the gradient of k' and become that of k; dweight accumulates.
static inline void keyconv_backward(floatX* dqkv,         // (B, T, H + 2G, D)
                                    float_acc* dweight,   // (taps, G, D)
                                    const floatX* raw,    // (B, T, G, D)
                                    const floatX* weight, // (taps, G, D)
                                    void* workspace, int B, int T, int H, int G, int D, int taps,
                                    stream_t stream) {
    float *dsums = (float*)workspace, *partials = dsums + keyconv_dsums(B, T, G, D);
    const int packs = whole_packs(D, dqkv, raw, weight), columns = G * D / (packs ? (int)PACK : 1);
    const int rows = B * T, chunks = ceil_div(rows, KEYCONV_CHUNK), threads = 64;
    launch(packs ? keyconv_sums_kernel<PACK> : keyconv_sums_kernel<1>,
           dim3((unsigned)chunks, (unsigned)ceil_div(columns, threads)), threads, 0, stream, dsums, partials,
           dqkv, raw, weight, rows, T, H, G, D, taps);
    launch(packs ? keyconv_backward_kernel<PACK> : keyconv_backward_kernel<1>,
           flat_grid((size_t)rows * G * D, packs ? (int)PACK : 1), FLAT_BLOCK, 0, stream, dqkv, dsums, weight,
           rows, T, H, G, D, taps);
    add_column_sums(dweight, partials, chunks, taps * G * D, stream);
}

#endif
