/*
Mixture of block attention, forward and backward (docs/math.md section 2). The CUDA twin of dev/cpu/moba.h.

Every query attends to its own block of S keys, causally, and to the K-1 complete earlier blocks whose mean
keys score highest with it. One softmax covers all these keys. The algorithm is FlashMoBA (Optimizing Mixture
of Block Attention, arXiv 2511.11571): it goes through the key blocks and gathers the queries of each.

    void* workspace = device_malloc(flashmoba_forward_workspace(B, T, H, G, D, S, K), "attention");
    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);   // kernels/keys.cuh
    flashmoba_forward(out, lse, selected, centroids, qkv, kv_of_q, workspace, B, T, 0, H, G, D, S, K, NULL,
                      stream);
    workspace = device_malloc(flashmoba_backward_workspace(B, T, H, G, D, S, K), "attention");
    flashmoba_backward(dqkv, dout, out, lse, selected, qkv, kv_of_q, workspace, B, T, H, G, D, S, K, stream);

Both are chains of kernels with no host synchronisation. The stages are in kernels/flashmoba/, in this order:

    router      top-k selection: the K-1 best blocks of every query, by its scores with the centroids
    lists       the queries that attend to each key block, ascending: count, prefix sum, scatter
    items       a work item is one key block and up to FLASHMOBA_ITEM queries of its list
    forward     a partial row of output and a log-sum-exp for each query of an item
    backward    dK and dV of an item's keys (sums.cuh), and a partial row of dQ for each of its queries
    merge       the partial rows of each query, and the sums of each key
    groups      workspaces; long sequences go in groups of heads, so that the partial rows stay within a bound

Only integer counts use atomics, so every run gives the same bits. Bytes, clocks: docs/results/kernels.md.
*/
#ifndef MOBA_CUH
#define MOBA_CUH

// MobaShape, moba_supports, moba_selected_count, moba_centroids_count
#include "kernels/moba_shape.cuh"
// the stages, in the order of reading
#include "kernels/flashmoba/router.cuh"
#include "kernels/flashmoba/lists.cuh"
#include "kernels/flashmoba/items.cuh"
#include "kernels/flashmoba/forward.cuh"
#include "kernels/flashmoba/sums.cuh"
#include "kernels/flashmoba/backward.cuh"
#include "kernels/flashmoba/merge.cuh"
// the loop over groups of heads; moba_set_workspace_bound
#include "kernels/flashmoba/groups.cuh"

template <int D>
static inline void flashmoba_forward_launch(floatX* out, float* lse, int* selected, const float* centroids,
                                            const floatX* qkv, const int* kv_of_q, char* workspace,
                                            const MobaShape* s, const AttentionNoise* noise,
                                            stream_t stream) {
    typedef FlashmobaForwardShape<D> shape;
    static_assert(shape::shared_bytes(FLASHMOBA_KEYS) <= MOST_SHARED_BYTES, "more than sm_86 has");
    size_t used = 0;
    const floatX* terms = flashmoba_terms(centroids, workspace, &used, s, stream);
    if (s->K > 1) flashmoba_route_launch<D>(selected, terms, qkv, kv_of_q, s, stream);

    const FlashmobaGroupSize size = flashmoba_group_size(s, 0);
    for (FlashmobaGroup group = flashmoba_first_group(workspace + used, s, &size, selected, qkv, kv_of_q, 0);
         group.heads > 0; flashmoba_next_group(&group, s, &size)) {
        const FlashmobaLists* x = &group.lists;
        auto kernel = flashmoba_forward_kernel<D, 16>;
        if constexpr (FLASHMOBA_KEYS >= 64)
            if (x->keys >= 64) kernel = flashmoba_forward_kernel<D, 64>;
        flashmoba_build_lists(x, stream);
        launch(kernel, flashmoba_item_grid(x), shape::THREADS, shape::shared_bytes(x->keys), stream,
               group.partial_rows, group.partial_lse, *x, attention_scale(D) * LOG2_E);
        launch(noise ? flashmoba_merge_kernel<D, true> : flashmoba_merge_kernel<D, false>,
               flashmoba_merge_grid<D>(x->end - x->start, group.heads, 1), FLASHMOBA_MERGE_THREADS, 0, stream,
               out, lse, group.partial_rows, group.partial_lse, *x, noised_rows(noise, s->T, s->H));
    }
}

template <int D>
static inline void flashmoba_backward_launch(floatX* dqkv, const floatX* dout, const floatX* out,
                                             const float* lse, const int* selected, const floatX* qkv,
                                             const int* kv_of_q, char* workspace, const MobaShape* s,
                                             stream_t stream) {
    static_assert(flashmoba_backward_shared_bytes<D>(FLASHMOBA_KEYS) <= MOST_SHARED_BYTES,
                  "more than sm_86 has");
    const int padded = attention_padded(s->T);
    const float scale = attention_scale(D);
    size_t used = 0;
    float2* statistics = (float2*)moba_take(workspace, &used, (size_t)s->B * s->H * padded, sizeof(float2));
    launch(attention_statistics_kernel<D>,
           attention_grid(padded, STATISTICS_THREADS / (D / CHUNK), s->H, s->B), STATISTICS_THREADS, 0,
           stream, statistics, dout, out, lse, s->T, padded, s->H);

    const FlashmobaGroupSize size = flashmoba_group_size(s, 1);
    for (FlashmobaGroup group = flashmoba_first_group(workspace + used, s, &size, selected, qkv, kv_of_q, 1);
         group.heads > 0; flashmoba_next_group(&group, s, &size)) {
        const FlashmobaLists* x = &group.lists;
        constexpr int MOST = FlashmobaBackwardShape<D>::M;
        const int M = x->keys < 16 * MOST ? 1 : MOST;
        const auto kernel = M == MOST ? flashmoba_backward_kernel<D, MOST> : flashmoba_backward_kernel<D, 1>;
        flashmoba_build_lists(x, stream);
        launch(kernel, flashmoba_item_grid(x), 2 * x->keys / M, flashmoba_backward_shared_bytes<D>(x->keys),
               stream, dqkv, group.partial_rows, group.sums, dout, statistics, *x, padded, scale);
        launch(flashmoba_merge_keys_kernel<D>, flashmoba_merge_grid<D>(s->T, 2, x->sequences),
               FLASHMOBA_MERGE_THREADS, 0, stream, dqkv, group.sums, *x, scale);
        launch(flashmoba_merge_queries_kernel<D>, flashmoba_merge_grid<D>(x->end - x->start, group.heads, 1),
               FLASHMOBA_MERGE_THREADS, 0, stream, dqkv, group.partial_rows, *x);
    }
}

// Bytes of the workspaces. moba_workspace_bound must be the same here and when the workspace is used.
static inline size_t flashmoba_forward_workspace(int B, int T, int H, int G, int D, int S, int K) {
    const MobaShape shape = {B, T, 0, H, G, D, S, K};
    return flashmoba_terms_bytes(&shape) + flashmoba_workspace_bytes(&shape, 0);
}

static inline size_t flashmoba_backward_workspace(int B, int T, int H, int G, int D, int S, int K) {
    const MobaShape shape = {B, T, 0, H, G, D, S, K};
    size_t used = 0;
    moba_take(NULL, &used, (size_t)B * H * attention_padded(T), sizeof(float2));
    return used + flashmoba_workspace_bytes(&shape, 1);
}

// Computes rows start..T-1 of out, lse and selected, and of noise->noised unless noise is NULL. If start > 0,
// qkv already holds the earlier keys and values. The centroids are those of all complete blocks
// (keys_forward). The workspace needs no initial value. With K = 1, selected is empty and centroids are not
// read.
static inline void flashmoba_forward(floatX* out,    // (B, T, H, D)
                                     float_acc* lse, // (B, H, T) natural log of the sum of exp(scaled scores)
                                     int* selected, // (B, H, T, K-1) blocks chosen, the newest first, then -1
                                     const float_acc* centroids, // (B, T/S, G, D)
                                     const floatX* qkv,          // (B, T, H + 2G, D)
                                     const int* kv_of_q,         // (H) non-decreasing
                                     void* workspace, int B, int T, int start, int H, int G, int D, int S,
                                     int K, const AttentionNoise* noise, stream_t stream) {
    const MobaShape shape = {B, T, start, H, G, D, S, K};
    char* memory = (char*)workspace;
    if (!moba_supports(T, D, S, K)) moba_refuse(&shape);
    for_head_dim(D, [&](auto head_dim) {
        flashmoba_forward_launch<head_dim>(out, lse, selected, centroids, qkv, kv_of_q, memory, &shape, noise,
                                           stream);
    });
}

// Writes every element of dqkv. A KV head that no query head reads gets exact zeros.
static inline void flashmoba_backward(floatX* dqkv,         // (B, T, H + 2G, D)
                                      const floatX* dout,   // (B, T, H, D)
                                      const floatX* out,    // (B, T, H, D)
                                      const float_acc* lse, // (B, H, T)
                                      const int* selected,  // (B, H, T, K-1)
                                      const floatX* qkv,    // (B, T, H + 2G, D)
                                      const int* kv_of_q,   // (H)
                                      void* workspace, int B, int T, int H, int G, int D, int S, int K,
                                      stream_t stream) {
    const MobaShape shape = {B, T, 0, H, G, D, S, K};
    char* memory = (char*)workspace;
    if (!moba_supports(T, D, S, K)) moba_refuse(&shape);
    for_head_dim(D, [&](auto head_dim) {
        flashmoba_backward_launch<head_dim>(dqkv, dout, out, lse, selected, qkv, kv_of_q, memory, &shape,
                                            stream);
    });
}

#endif
