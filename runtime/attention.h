/*
The kinds of attention, and one interface to them.

    AttentionShape shape = {B, T, 0, H, G, D, window, block, topk};
    AttentionTensors tensors = {...};                  // the arrays of the layer; see the struct
    const AttentionModule* module = attention_module(ATTENTION_FLASHMOBA);
    module->forward(&tensors, &shape, stream);         // writes out, lse and, with blocks, selected
    module->backward(&tensors, &shape, stream);        // writes dqkv

Include this header after the operations of the device. A new kind of attention is a name in runtime/model.h, a header
with its operations for each device, and a row of attention_modules below. `make ATTN=KIND` sets ATTENTION_MODULES, and
so leaves out the rows of other kinds. docs/math.md section 2 defines what each kind computes.
*/
#ifndef RUNTIME_ATTENTION_H
#define RUNTIME_ATTENTION_H

#include "runtime/model.h" // defines AttentionKind, ATTENTION_MODULES
#include "runtime/noise.h" // defines AttentionNoise

// The sizes of one call. A row of qkv holds H query heads, G key heads and G value heads of D channels.
typedef struct {
    int B, T;    // sequences and their tokens
    int start;   // first token to compute; the keys and values of earlier tokens are in qkv. 0 in training
    int H, G, D; // query heads, key/value heads, head dimension
    int window;  // dense: a query at t sees the keys t-window+1..t; 0: all past keys
    int block, topk; // keys of a block, and blocks that a query attends to: of kinds that choose blocks
} AttentionShape;

// The arrays of one call, in device memory. Forward reads qkv, centroids and kv_of_q, and writes out, lse, selected and,
// with noise, noise->noised. Backward reads all of these and dout, and writes dqkv.
typedef struct {
    floatX* out;                 // (B, T, H, D)
    float_acc* lse;              // (B, H, T)
    int* selected;               // (B, H, T, topk-1) of kinds that choose blocks
    const float_acc* centroids;  // (B, T/block, G, D) of kinds that choose blocks: the blocks' mean keys
    const floatX* qkv;           // (B, T, H + 2G, D)
    const int* kv_of_q;          // (H) the KV head of each query head, non-decreasing
    void* workspace;             // the bytes that the module asks for; needs no initial value
    const AttentionNoise* noise; // NULL: none
    floatX* dqkv;                // (B, T, H + 2G, D)
    const floatX* dout;          // (B, T, H, D)
} AttentionTensors;

typedef struct {
    int (*supports)(const AttentionShape* shape); // whether the device can compute a call of this shape
    size_t (*forward_workspace)(const AttentionShape* shape); // bytes
    size_t (*backward_workspace)(const AttentionShape* shape);
    void (*forward)(const AttentionTensors* tensors, const AttentionShape* shape, stream_t stream);
    void (*backward)(const AttentionTensors* tensors, const AttentionShape* shape, stream_t stream);
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

// ----------------------------------------------------------------------------
// dense: gqa.cuh, dev/cpu/gqa.h

static int dense_module_supports(const AttentionShape* s) { return attention_supports_head_dim(s->D); }

static size_t dense_module_forward_workspace(const AttentionShape* s) {
    return attention_forward_workspace(s->B, s->T, s->H, s->G, s->D);
}

static size_t dense_module_backward_workspace(const AttentionShape* s) {
    return attention_backward_workspace(s->B, s->T, s->H, s->G, s->D);
}

static void dense_module_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    attention_forward(x->out, x->lse, x->qkv, x->kv_of_q, x->workspace, s->B, s->T, s->start, s->H, s->G,
                      s->D, s->window, x->noise, stream);
}

static void dense_module_backward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    attention_backward(x->dqkv, x->dout, x->out, x->lse, x->qkv, x->kv_of_q, x->workspace, s->B, s->T, s->H,
                       s->G, s->D, s->window, stream);
}

// ----------------------------------------------------------------------------
// moba: kernels/moba_plain.cuh; flashmoba: moba.cuh; both: dev/cpu/moba.h

#define BLOCK_MODULE(kind)                                                                                   \
    static int kind##_module_supports(const AttentionShape* s) {                                             \
        return moba_supports(s->T, s->D, s->block, s->topk);                                                 \
    }                                                                                                        \
    static size_t kind##_module_forward_workspace(const AttentionShape* s) {                                 \
        return kind##_forward_workspace(s->B, s->T, s->H, s->G, s->D, s->block, s->topk);                    \
    }                                                                                                        \
    static size_t kind##_module_backward_workspace(const AttentionShape* s) {                                \
        return kind##_backward_workspace(s->B, s->T, s->H, s->G, s->D, s->block, s->topk);                   \
    }                                                                                                        \
    static void kind##_module_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) { \
        kind##_forward(x->out, x->lse, x->selected, x->centroids, x->qkv, x->kv_of_q, x->workspace, s->B,    \
                       s->T, s->start, s->H, s->G, s->D, s->block, s->topk, x->noise, stream);               \
    }                                                                                                        \
    static void kind##_module_backward(const AttentionTensors* x, const AttentionShape* s,                   \
                                       stream_t stream) {                                                    \
        kind##_backward(x->dqkv, x->dout, x->out, x->lse, x->selected, x->qkv, x->kv_of_q, x->workspace,     \
                        s->B, s->T, s->H, s->G, s->D, s->block, s->topk, stream);                            \
    }

#if ATTENTION_MODULES >> 1 & 1
BLOCK_MODULE(moba)
#endif
#if ATTENTION_MODULES >> 2 & 1
BLOCK_MODULE(flashmoba)
#endif
#undef BLOCK_MODULE

// ----------------------------------------------------------------------------
// The table, by AttentionKind

#define MODULE(kind)                                                                                         \
    {                                                                                                        \
        kind##_module_supports, kind##_module_forward_workspace, kind##_module_backward_workspace,           \
            kind##_module_forward, kind##_module_backward                                                    \
    }
#define NOT_BUILT                                                                                            \
    { NULL, NULL, NULL, NULL, NULL }

static const AttentionModule attention_modules[] = {
    MODULE(dense),
#if ATTENTION_MODULES >> 1 & 1
    MODULE(moba),
#else
    NOT_BUILT,
#endif
#if ATTENTION_MODULES >> 2 & 1
    MODULE(flashmoba),
#else
    NOT_BUILT,
#endif
};
#undef MODULE
#undef NOT_BUILT

// The operations of a kind that this build has (attention_is_built).
static inline const AttentionModule* attention_module(AttentionKind kind) { return &attention_modules[kind]; }

#endif
