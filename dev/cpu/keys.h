/*
The steps between the projection and attention, in place on queries and keys (docs/math.md sections 1 and 2):
key convolution, rotary positions, and the centroids of the key blocks for MoBA. A NULL pointer skips its
step: weight skips the convolution, table skips RoPE, centroids skips the centroids.

    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);
    keys_backward(dqkv, dweight, raw, weight, table, NULL, B, T, H, G, D, taps, stream);
*/
#ifndef DEV_CPU_KEYS_H
#define DEV_CPU_KEYS_H

#include "dev/cpu/keyconv.h"
#include "dev/cpu/moba.h"
#include "dev/cpu/rope.h"

// Computes the rows start..T-1 of every sequence, and the centroids of the key blocks that these rows
// complete. If start > 0, the keys 0..start-1 of qkv and raw, and the centroids of the blocks before start /
// S, are there from earlier calls. Only the convolution uses raw, and only the centroids use S.
static inline void keys_forward(floatX* qkv,            // (B, T, H + 2G, D) in and out
                                floatX* raw,            // (B, T, G, D) keys before the convolution, or NULL
                                float_acc* centroids,   // (B, T/S, G, D) or NULL
                                const floatX* weight,   // (taps, G, D) or NULL
                                const float_acc* table, // (T, D/2, 2) or NULL
                                int B, int T, int start, int H, int G, int D, int S, int taps,
                                stream_t stream) {
    const size_t stride = (size_t)(H + 2 * G) * D;
    const AttentionShape shape = {B, T, start, H, G, D, 0, S, 1};
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

// The queries and keys of dqkv hold the gradients of the outputs of keys_forward and become the gradients of
// its inputs; dweight accumulates. Without a weight, dweight, raw and workspace are not used.
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
