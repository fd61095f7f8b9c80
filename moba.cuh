/*
Mixture of block attention, forward and backward (docs/math.md section 2). The CUDA twin of dev/cpu/moba.h.

Every query attends to its own block of S keys, causally, and to the K-1 complete earlier blocks whose mean
keys score highest with it. One softmax covers all these keys. The algorithm is FlashMoBA (Optimizing Mixture
of Block Attention, arXiv 2511.11571): it goes through the key blocks and gathers the queries of each.

    const AttentionShape s = {B, T, 0, H, G, D, 0, S, K};
    x.workspace = device_malloc(flashmoba_forward_workspace(&s), "attention");    // AttentionTensors x
    keys_forward(qkv, raw, centroids, weight, table, B, T, 0, H, G, D, S, taps, stream);   // kernels/keys.cuh
    flashmoba_forward(&x, &s, stream);
    x.workspace = device_malloc(flashmoba_backward_workspace(&s), "attention");
    flashmoba_backward(&x, &s, stream);

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

// AttentionShape, AttentionTensors, moba_supports, moba_selected_count, moba_centroids_count
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
static inline void flashmoba_forward_launch(const AttentionTensors* x, const AttentionShape* s,
                                            stream_t stream) {
    typedef FlashmobaForwardShape<D> shape;
    static_assert(shape::shared_bytes(FLASHMOBA_KEYS) <= MOST_SHARED_BYTES, "more than sm_86 has");
    char* workspace = (char*)x->workspace;
    size_t used = 0;
    const floatX* terms = flashmoba_terms(x->centroids, workspace, &used, s, stream);
    if (s->K > 1) flashmoba_route_launch<D>(x->selected, terms, x->qkv, x->kv_of_q, s, stream);

    const FlashmobaGroupSize size = flashmoba_group_size(s, 0);
    for (FlashmobaGroup group = flashmoba_first_group(workspace + used, x, s, &size, 0); group.heads > 0;
         flashmoba_next_group(&group, s, &size)) {
        const FlashmobaLists* lists = &group.lists;
        auto kernel = flashmoba_forward_kernel<D, 16>;
        if constexpr (FLASHMOBA_KEYS >= 64)
            if (lists->keys >= 64) kernel = flashmoba_forward_kernel<D, 64>;
        flashmoba_build_lists(lists, stream);
        launch(kernel, flashmoba_item_grid(lists), shape::THREADS, shape::shared_bytes(lists->keys), stream,
               group.partial_rows, group.partial_lse, *lists, attention_scale(D) * LOG2_E);
        launch(x->noise ? flashmoba_merge_kernel<D, true> : flashmoba_merge_kernel<D, false>,
               flashmoba_merge_grid<D>(lists->end - lists->start, group.heads, 1), FLASHMOBA_MERGE_THREADS, 0,
               stream, x->out, x->lse, group.partial_rows, group.partial_lse, *lists,
               noised_rows(x->noise, s->T, s->H));
    }
}

template <int D>
static inline void flashmoba_backward_launch(const AttentionTensors* x, const AttentionShape* s,
                                             stream_t stream) {
    static_assert(flashmoba_backward_shared_bytes<D>(FLASHMOBA_KEYS) <= MOST_SHARED_BYTES,
                  "more than sm_86 has");
    char* workspace = (char*)x->workspace;
    const int padded = attention_padded(s->T);
    const float scale = attention_scale(D);
    size_t used = 0;
    float2* statistics = (float2*)moba_take(workspace, &used, (size_t)s->B * s->H * padded, sizeof(float2));
    attention_statistics_launch<D>(statistics, x, s, stream);

    const FlashmobaGroupSize size = flashmoba_group_size(s, 1);
    for (FlashmobaGroup group = flashmoba_first_group(workspace + used, x, s, &size, 1); group.heads > 0;
         flashmoba_next_group(&group, s, &size)) {
        const FlashmobaLists* lists = &group.lists;
        constexpr int MOST = FlashmobaBackwardShape<D>::M;
        const int M = lists->keys < 16 * MOST ? 1 : MOST;
        const auto kernel = M == MOST ? flashmoba_backward_kernel<D, MOST> : flashmoba_backward_kernel<D, 1>;
        flashmoba_build_lists(lists, stream);
        launch(kernel, flashmoba_item_grid(lists), 2 * lists->keys / M,
               flashmoba_backward_shared_bytes<D>(lists->keys), stream, x->dqkv, group.partial_rows,
               group.sums, x->dout, statistics, *lists, padded, scale);
        launch(flashmoba_merge_keys_kernel<D>, flashmoba_merge_grid<D>(s->T, 2, lists->sequences),
               FLASHMOBA_MERGE_THREADS, 0, stream, x->dqkv, group.sums, *lists, scale);
        launch(flashmoba_merge_queries_kernel<D>,
               flashmoba_merge_grid<D>(lists->end - lists->start, group.heads, 1), FLASHMOBA_MERGE_THREADS, 0,
               stream, x->dqkv, group.partial_rows, *lists);
    }
}

// Bytes of the workspaces, for any start. moba_workspace_bound must be the same here and in the call that uses
// the workspace.
static inline size_t flashmoba_forward_workspace(const AttentionShape* s) {
    return flashmoba_terms_bytes(s) + flashmoba_workspace_bytes(s, 0);
}

static inline size_t flashmoba_backward_workspace(const AttentionShape* s) {
    size_t used = 0;
    moba_take(NULL, &used, (size_t)s->B * s->H * attention_padded(s->T), sizeof(float2));
    return used + flashmoba_workspace_bytes(s, 1);
}

// Reads kv_of_q, the centroids of all complete blocks (keys_forward) and, of qkv, the queries of the rows
// start..T-1 and all keys and values. Writes these rows of out, lse and selected, and of noise->noised unless
// noise is NULL. With K = 1, selected is empty and centroids are not read.
static inline void flashmoba_forward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    if (!moba_supports(s)) moba_refuse(s);
    for_head_dim(s->D, [&](auto head_dim) { flashmoba_forward_launch<head_dim>(x, s, stream); });
}

// Reads dout, out, lse, selected, qkv and kv_of_q. Writes every element of dqkv: exact zeros for a KV head that
// no query head reads. start must be 0.
static inline void flashmoba_backward(const AttentionTensors* x, const AttentionShape* s, stream_t stream) {
    assert(s->start == 0);
    if (!moba_supports(s)) moba_refuse(s);
    for_head_dim(s->D, [&](auto head_dim) { flashmoba_backward_launch<head_dim>(x, s, stream); });
}

#endif
