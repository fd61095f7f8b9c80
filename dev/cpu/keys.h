/*
What keys and queries go through between the projection and attention, in place (docs/math.md sections 1 and 2): key convolution,
rotary positions, and the centroids of the blocks that MoBA chooses from. Each is there or not, by a pointer that is NULL or not.

    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);
    keys_backward(dqkv, dweight, raw, weight, table, NULL, B, T, H, G, D, taps, stream);
*/
#ifndef DEV_CPU_KEYS_H
#define DEV_CPU_KEYS_H

#include "dev/cpu/keyconv.h"
#include "dev/cpu/moba.h"
#include "dev/cpu/rope.h"

// Rows start..T-1 of every sequence, and the centroids of the blocks that these rows complete. Where start > 0, the keys 0..start-1
// of qkv and raw, and the centroids of the blocks before start / S, are there from earlier calls. raw is for convolution alone, S
// for centroids.
static inline void keys_forward(floatX* qkv,            // (B, T, H + 2G, D) in and out
                                floatX* raw,            // (B, T, G, D) keys before the convolution, or NULL
                                float_acc* centroids,   // (B, T/S, G, D) or NULL
                                const floatX* weight,   // (taps, G, D) or NULL
                                const float_acc* table, // (T, D/2, 2) or NULL
                                int B, int T, int start, int H, int G, int D, int S, int taps,
                                stream_t stream) {
    const size_t stride = (size_t)(H + 2 * G) * D;
    const moba_shape_t shape = {B, T, start, H, G, D, S, 1};
    if (weight) keyconv_forward(qkv, raw, weight, B, T, start, H, G, D, taps, stream);
    for (int b = 0; b < B && table; b++)
        rope_forward(qkv + ((size_t)b * T + start) * stride, table + (size_t)start * D, 1, T - start, H, G, D,
                     stream);
    if (centroids) moba_centroids(centroids, qkv, &shape);
}

// Bytes of the workspace of keys_backward.
static inline size_t keys_backward_workspace(int B, int T, int G, int D, int taps) {
    return taps ? keyconv_backward_workspace(B, T, G, D, taps) : 0;
}

// dqkv's queries and keys hold the gradients of what keys_forward left and become those of what it was given; dweight accumulates.
// Without a weight, dweight, raw and workspace are not used.
static inline void keys_backward(floatX* dqkv,           // (B, T, H + 2G, D) in and out
                                 float_acc* dweight,     // (taps, G, D)
                                 const floatX* raw,      // (B, T, G, D)
                                 const floatX* weight,   // (taps, G, D) or NULL
                                 const float_acc* table, // (T, D/2, 2) or NULL
                                 void* workspace, int B, int T, int H, int G, int D, int taps,
                                 stream_t stream) {
    if (table) rope_backward(dqkv, table, B, T, H, G, D, stream);
    if (weight) keyconv_backward(dqkv, dweight, raw, weight, workspace, B, T, H, G, D, taps, stream);
}

#endif
