/*
The sizes and the arrays of one call of attention. Every kind takes these two structs, on every device.

    const AttentionShape s = {B, T, 0, H, G, D, window, S, K};
    AttentionTensors x;
    memset(&x, 0, sizeof(x));                          // NULL: no noise
    x.out = out, x.lse = lse, x.qkv = qkv, x.kv_of_q = kv_of_q;
    x.workspace = device_malloc(attention_forward_workspace(&s), "attention");
    attention_forward(&x, &s, stream);

The caller owns all arrays. A comment at each operation says which members it reads and writes. The letters
are those of docs/math.md.
*/
#ifndef RUNTIME_ATTENTION_SHAPE_H
#define RUNTIME_ATTENTION_SHAPE_H

#include "runtime/noise.h"     // defines AttentionNoise
#include "runtime/precision.h" // defines floatX, float_acc

// The sizes of one call. A row of qkv holds H query heads, G key heads and G value heads of D channels.
typedef struct {
    int B, T;    // sequences and their tokens
    int start;   // first token to compute; the keys and values of earlier tokens are in qkv. 0 in training
    int H, G, D; // query heads, key/value heads, head dimension
    int window;  // dense: a query at t sees the keys t-window+1..t; 0: all past keys
    int S, K;    // keys of a block, and blocks that a query attends to: of kinds that choose blocks
} AttentionShape;

// The arrays of one call, in device memory. Forward reads qkv, centroids and kv_of_q, and writes out, lse,
// selected and, with noise, noise->noised. Backward reads all of these and dout, and writes dqkv. Both use
// workspace.
typedef struct {
    floatX* out;                 // (B, T, H, D)
    float_acc* lse;              // (B, H, T) natural log of the sum of exp(scaled scores)
    int* selected;               // (B, H, T, K-1) of kinds that choose blocks: the newest first, then -1
    const float_acc* centroids;  // (B, T/S, G, D) of kinds that choose blocks: the blocks' mean keys
    const floatX* qkv;           // (B, T, H + 2G, D)
    const int* kv_of_q;          // (H) the KV head of each query head, non-decreasing
    void* workspace;             // the bytes that the kind asks for; needs no initial value
    const AttentionNoise* noise; // NULL: none
    floatX* dqkv;                // (B, T, H + 2G, D)
    const floatX* dout;          // (B, T, H, D)
} AttentionTensors;

#endif
