/*
The kinds of attention, and one interface to them.

    const AttentionShape s = {B, T, 0, H, G, D, window, S, K};
    AttentionTensors x;                                // the arrays of the layer; see the struct
    const AttentionModule* module = attention_module(ATTENTION_FLASHMOBA);
    module->forward(&x, &s, stream);                   // writes out, lse and, with blocks, selected
    module->backward(&x, &s, stream);                  // writes dqkv

`make ATTN=KIND` builds only KIND and dense attention. ATTENTION_MODULES has one bit for each kind: 1 if the
build contains it. The table has NULL for the other kinds. docs/math.md section 2 defines the kinds, and
docs/adding_attention.md shows how to add one.
*/
#ifndef RUNTIME_ATTENTION_H
#define RUNTIME_ATTENTION_H

#if defined(DEVICE_CPU)
#include "dev/cpu/gqa.h"  // defines attention_forward, attention_backward
#include "dev/cpu/moba.h" // defines moba_forward, moba_backward, flashmoba_forward, flashmoba_backward
#else
#include "gqa.cuh"  // the same functions, on the GPU or on its emulator
#include "moba.cuh" // flashmoba's
#include "kernels/moba_plain.cuh"
#endif
#include "runtime/attention_shape.h" // defines AttentionShape, AttentionTensors
#include "runtime/model.h"           // defines AttentionKind, ATTENTION_MODULES

typedef struct {
    int (*supports)(const AttentionShape* s); // whether the device can compute a call of this shape
    size_t (*forward_workspace)(const AttentionShape* s); // bytes, for any start
    size_t (*backward_workspace)(const AttentionShape* s);
    void (*forward)(const AttentionTensors* x, const AttentionShape* s, stream_t stream);
    void (*backward)(const AttentionTensors* x, const AttentionShape* s, stream_t stream); // start: 0
} AttentionModule;

// The shape of a layer's attention, for B sequences of which the tokens start..T-1 are computed.
static inline AttentionShape layer_shape(const ModelConfig* config, int layer, int B, int T, int start) {
    const AttentionShape shape = {B,
                                  T,
                                  start,
                                  config->heads,
                                  config->kv_heads,
                                  config->head_dim,
                                  layer_window(config, layer),
                                  config->moba_block,
                                  config->moba_topk};
    return shape;
}

// The table's index is an AttentionKind. A NULL row means that this build does not contain the kind.
static const AttentionModule attention_modules[] = {
    {attention_supports, attention_forward_workspace, attention_backward_workspace, attention_forward,
     attention_backward},
#if ATTENTION_MODULES >> 1 & 1
    {moba_supports, moba_forward_workspace, moba_backward_workspace, moba_forward, moba_backward},
#else
    {NULL, NULL, NULL, NULL, NULL},
#endif
#if ATTENTION_MODULES >> 2 & 1
    {moba_supports, flashmoba_forward_workspace, flashmoba_backward_workspace, flashmoba_forward,
     flashmoba_backward},
#else
    {NULL, NULL, NULL, NULL, NULL},
#endif
};

// Returns the operations of `kind`. Call attention_is_built() first: a kind that is not built has NULL functions.
static inline const AttentionModule* attention_module(AttentionKind kind) { return &attention_modules[kind]; }

#endif
