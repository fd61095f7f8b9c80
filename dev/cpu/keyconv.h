/*
Key convolution (Optimizing Mixture of Block Attention, arXiv 2511.11571; docs/math.md section 2): a short
causal filter over the keys of a layer, for each channel, with a residual:

    k'_t = k_t + silu( sum over l < taps of w_l * k_{t-l} )        keys before the sequence are zero

It works in place on packed rows of queries, keys and values, before RoPE.

    keyconv_forward(qkv, raw, weight, B, T, 0, H, G, D, taps, stream);
    keyconv_backward(dqkv, dweight, raw, weight, workspace, B, T, H, G, D, taps, stream);

`raw` receives the keys before the convolution. The backward pass needs them, because k' does not determine k;
and generation needs them, because the next k' depends on the last keys. With zero taps k' = k, and the
gradient of the taps is not zero.
*/
#ifndef DEV_CPU_KEYCONV_H
#define DEV_CPU_KEYCONV_H

#include "dev/cpu/device.h"
#include "dev/cpu/math.h"

enum { KEYCONV_MAX_TAPS = 5 };
// Channels that one call filters together: one cache line.
enum { KEYCONV_SLICE = 16 };

// sums (width) = sum over l of w_l * k_{t-l}; `keys` points at k_t, and the first `taken` taps reach existing
// tokens.
static inline void keyconv_filter(floatX* sums, const floatX* keys, const floatX* weight, int width,
                                  int taken, size_t key_stride, size_t weight_stride) {
    for (int c = 0; c < width; c++) sums[c] = 0;
    for (int l = 0; l < taken; l++) {
        const floatX *key = keys - (size_t)l * key_stride, *w = weight + (size_t)l * weight_stride;
#pragma omp simd
        for (int c = 0; c < width; c++) sums[c] += w[c] * key[c];
    }
}

// Computes the rows start..T-1 of every sequence. If start > 0, raw holds the rows 0..start-1 from earlier
// calls.
static inline void keyconv_forward(floatX* qkv,          // (B, T, H + 2G, D) its keys become k'
                                   floatX* raw,          // (B, T, G, D)
                                   const floatX* weight, // (taps, G, D)
                                   int B, int T, int start, int H, int G, int D, int taps, stream_t stream) {
    (void)stream;
    const size_t width = (size_t)G * D, stride = (size_t)(H + 2 * G) * D;
    const int rows = T - start;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int i = 0; i < B * rows; i++) {
            const size_t row = (size_t)(i / rows) * T + start + i % rows;
            memcpy(raw + row * width, qkv + row * stride + (size_t)H * D, width * sizeof(floatX));
        }
#pragma omp for schedule(static)
        for (int i = 0; i < B * rows; i++) {
            const int t = start + i % rows;
            const size_t row = (size_t)(i / rows) * T + t;
            const floatX* key = raw + row * width;
            floatX* out = qkv + row * stride + (size_t)H * D;
            for (size_t first = 0; first < width; first += KEYCONV_SLICE) {
                const int some = width - first < KEYCONV_SLICE ? (int)(width - first) : KEYCONV_SLICE;
                floatX sums[KEYCONV_SLICE];
                keyconv_filter(sums, key + first, weight + first, some, t + 1 < taps ? t + 1 : taps, width,
                               width);
#pragma omp simd
                for (int c = 0; c < some; c++)
                    out[first + c] = key[first + c] + sums[c] / (1 + exp_fast(-sums[c]));
            }
        }
    }
}

// Bytes of the workspace of keyconv_backward.
static inline size_t keyconv_backward_workspace(int B, int T, int G, int D, int taps) {
    (void)B, (void)T, (void)G, (void)D, (void)taps;
    return 0;
}

// On entry, the keys of dqkv hold the gradient of k'. The function replaces it in place by the gradient of k, and
// adds the taps' gradient to dweight. Each thread takes some channels and visits the tokens in ascending order, so
// every sum has a fixed order. Token t changes only rows t, t-1, ..., after the loop has read the gradient of k'
// from these rows.
static inline void keyconv_backward(floatX* dqkv,         // (B, T, H + 2G, D)
                                    float_acc* dweight,   // (taps, G, D)
                                    const floatX* raw,    // (B, T, G, D)
                                    const floatX* weight, // (taps, G, D)
                                    void* workspace, int B, int T, int H, int G, int D, int taps,
                                    stream_t stream) {
    (void)workspace, (void)stream;
    const int width = G * D;
    const size_t stride = (size_t)(H + 2 * G) * D;
#pragma omp parallel for schedule(static)
    for (int first = 0; first < width; first += KEYCONV_SLICE) {
        const int some = width - first < KEYCONV_SLICE ? width - first : KEYCONV_SLICE;
        float_acc dtaps[KEYCONV_MAX_TAPS][KEYCONV_SLICE] = {{0}};
        for (int row = 0; row < B * T; row++) {
            const int t = row % T, taken = t + 1 < taps ? t + 1 : taps;
            const floatX* key = raw + (size_t)row * width + first;
            floatX* dkey = dqkv + (size_t)row * stride + (size_t)H * D + first;
            floatX sums[KEYCONV_SLICE], dsums[KEYCONV_SLICE];
            keyconv_filter(sums, key, weight + first, some, taken, (size_t)width, (size_t)width);
#pragma omp simd
            for (int c = 0; c < some; c++) {
                floatX sigmoid = 1 / (1 + exp_fast(-sums[c]));
                dsums[c] = dkey[c] * sigmoid * (1 + sums[c] * (1 - sigmoid));
            }
            for (int l = 0; l < taken; l++) {
                const floatX *w = weight + (size_t)l * width + first, *earlier = key - (size_t)l * width;
                floatX* to = dkey - (size_t)l * stride;
#pragma omp simd
                for (int c = 0; c < some; c++) {
                    dtaps[l][c] += dsums[c] * earlier[c];
                    to[c] += w[c] * dsums[c];
                }
            }
        }
        for (int l = 0; l < taps; l++)
            for (int c = 0; c < some; c++) dweight[(size_t)l * width + first + c] += dtaps[l][c];
    }
}

#endif
