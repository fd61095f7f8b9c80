/*
Workspaces of flashmoba, and the groups of heads that share one. Groups matter for long sequences only: else
one group has all heads of all sequences, and the loop over groups runs once.

    const FlashmobaGroupSize size = flashmoba_group_size(&shape, 0);    // 0: of the forward
    for (FlashmobaGroup group = flashmoba_first_group(memory, &x, &shape, &size, 0);
         group.heads > 0; flashmoba_next_group(&group, &shape, &size)) { ... }

The partial rows take K times the memory of the output. So heads are processed in groups whose workspace
stays within moba_workspace_bound. If a single head needs more, a group is a piece of its queries. Query
heads of one KV head may be in two groups, because kv_of_q is in device memory and the host cannot read it
while it makes the groups. The sums of such a KV head stay in memory, and the work items of the next group
start from this carry-over (kernels/flashmoba/sums.cuh).
*/
#ifndef KERNELS_FLASHMOBA_GROUPS_CUH
#define KERNELS_FLASHMOBA_GROUPS_CUH

// FlashmobaLists, FlashmobaSums
#include "kernels/flashmoba/sums.cuh"

// Upper bound, in bytes, of the lists, partial rows and sums of one group of heads (--moba-workspace). It is
// exceeded only if one eighth of a head needs more.
static size_t moba_workspace_bound = (size_t)1 << 30;

// Call this before any *_workspace() function.
static inline void moba_set_workspace_bound(size_t bytes) { moba_workspace_bound = bytes; }

// One group: its lists, and the arrays for the results of its work items.
typedef struct {
    FlashmobaLists lists;
    floatX* partial_rows;
    float* partial_lse; // forward
    FlashmobaSums sums; // backward
    int heads;          // heads of the group, summed over its sequences
} FlashmobaGroup;

// Largest size of a group: sequences, heads of each, queries of each head.
typedef struct {
    int sequences, heads, queries;
} FlashmobaGroupSize;

// Lays out the workspace of a group of `heads` heads and `queries` queries of each, and returns its bytes. If
// memory is NULL, it only counts the bytes.
static inline size_t flashmoba_lay_out(FlashmobaGroup* group, char* memory, const AttentionShape* s,
                                       int heads, int queries, int is_backward) {
    FlashmobaLists* x = &group->lists;
    const size_t n = (size_t)heads;
    size_t used = 0;
    x->T = s->T, x->H = s->H, x->G = s->G, x->S = s->S, x->K = s->K, x->queries = queries;
    x->blocks = ceil_div(s->T, s->S);
    x->keys = s->S < FLASHMOBA_KEYS ? s->S : FLASHMOBA_KEYS, x->parts = s->S / x->keys;
    x->tiles = ceil_div(queries, FLASHMOBA_LIST_QUERIES);
    x->max_more = (int)((size_t)queries * s->K / FLASHMOBA_ITEM), x->max_items = x->blocks + x->max_more;
    const size_t blocks = (size_t)x->blocks, rows = (size_t)queries * s->K, parts = (size_t)x->parts;
    const size_t D = (size_t)s->D, keys = is_backward ? (size_t)s->T : 0;
    x->counts = (int*)moba_take(memory, &used, n * x->tiles * blocks, sizeof(int));
    x->totals = (int*)moba_take(memory, &used, n * blocks, sizeof(int));
    x->begins = (int*)moba_take(memory, &used, n * (blocks + 1), sizeof(int));
    x->first_item = (int*)moba_take(memory, &used, n * (blocks + 1), sizeof(int));
    x->entries = (int*)moba_take(memory, &used, n * rows, sizeof(int));
    x->items = (int2*)moba_take(memory, &used, n * x->max_items, sizeof(int2));
    group->partial_rows = (floatX*)moba_take(memory, &used, n * rows * parts * D, sizeof(floatX));
    group->partial_lse = (float*)moba_take(memory, &used, is_backward ? 0 : n * rows * parts, sizeof(float));
    group->sums.of_heads = (float*)moba_take(memory, &used, n * 2 * keys * D, sizeof(float));
    group->sums.more =
        (float*)moba_take(memory, &used, is_backward ? n * x->max_more * 2 * s->S * D : 0, sizeof(float));
    return used;
}

static inline size_t flashmoba_group_bytes(const AttentionShape* s, int heads, int queries, int is_backward) {
    FlashmobaGroup group;
    return flashmoba_lay_out(&group, NULL, s, heads, queries, is_backward);
}

// Chooses the size of the groups: as many heads as the bound allows, and several sequences only if all heads
// fit. If one head does not fit, it is cut into up to FLASHMOBA_PIECES pieces. Each piece loads keys, values
// and their sums again.
enum { FLASHMOBA_PIECES = 8 };
static inline FlashmobaGroupSize flashmoba_group_size(const AttentionShape* s, int is_backward) {
    FlashmobaGroupSize size = {1, 1, s->T};
    const size_t fit = moba_workspace_bound / flashmoba_group_bytes(s, 1, s->T, is_backward);
    const size_t H = (size_t)s->H, B = (size_t)s->B;
    if (fit > 0) {
        size.heads = (int)(fit < H ? fit : H);
        size.sequences = (int)(fit < H ? 1 : fit / H < B ? fit / H : B);
    }
    for (int pieces = 2; pieces <= FLASHMOBA_PIECES; pieces++) {
        if (flashmoba_group_bytes(s, 1, size.queries, is_backward) <= moba_workspace_bound) break;
        size.queries = ceil_div(ceil_div(s->T, pieces), FLASHMOBA_LIST_QUERIES) * FLASHMOBA_LIST_QUERIES;
    }
    return size;
}

// Bytes that are enough for these sequences, and for fewer or shorter ones. If not all heads fit at once,
// this is at least the bound, because more heads of shorter sequences may go at once.
static inline size_t flashmoba_workspace_bytes(const AttentionShape* s, int is_backward) {
    const FlashmobaGroupSize size = flashmoba_group_size(s, is_backward);
    const size_t bytes = flashmoba_group_bytes(s, size.sequences * size.heads, size.queries, is_backward);
    const size_t all = flashmoba_group_bytes(s, s->B * s->H, s->T, is_backward);
    const size_t least = all < moba_workspace_bound ? all : moba_workspace_bound;
    return bytes > least ? bytes : least;
}

// Begins the group at this sequence, head and query. The group has no heads if `sequence` is beyond the last
// one.
static inline void flashmoba_begin_group(FlashmobaGroup* group, const AttentionShape* s,
                                         const FlashmobaGroupSize* size, int sequence, int head, int query) {
    FlashmobaLists* x = &group->lists;
    x->first_sequence = sequence, x->first_head = head;
    x->sequences = s->B - sequence < size->sequences ? s->B - sequence : size->sequences;
    x->heads = s->H - head < size->heads ? s->H - head : size->heads;
    x->start = query > s->start ? query : s->start;
    x->end = s->T - query < size->queries ? s->T : query + size->queries;
    x->tiles = ceil_div(x->end, FLASHMOBA_LIST_QUERIES) - x->start / FLASHMOBA_LIST_QUERIES;
    group->heads = x->sequences * x->heads;
}

// First query of the first piece, at most s->start. Every piece begins at the first query of a tile of the
// lists.
static inline int flashmoba_first_query(const AttentionShape* s, const FlashmobaGroupSize* size) {
    return s->start / size->queries * size->queries;
}

static inline FlashmobaGroup flashmoba_first_group(char* memory, const AttentionTensors* tensors,
                                                   const AttentionShape* s, const FlashmobaGroupSize* size,
                                                   int is_backward) {
    FlashmobaGroup group;
    flashmoba_lay_out(&group, memory, s, size->sequences * size->heads, size->queries, is_backward);
    group.lists.selected = tensors->selected, group.lists.qkv = tensors->qkv;
    group.lists.kv_of_q = tensors->kv_of_q;
    flashmoba_begin_group(&group, s, size, 0, 0, flashmoba_first_query(s, size));
    return group;
}

// The next group: the next piece of the head, or else the next heads, or else the next sequences.
static inline void flashmoba_next_group(FlashmobaGroup* group, const AttentionShape* s,
                                        const FlashmobaGroupSize* size) {
    const FlashmobaLists* x = &group->lists;
    const int first_query = flashmoba_first_query(s, size), next_head = x->first_head + x->heads;
    if (x->end < s->T) flashmoba_begin_group(group, s, size, x->first_sequence, x->first_head, x->end);
    else if (next_head < s->H)
        flashmoba_begin_group(group, s, size, x->first_sequence, next_head, first_query);
    else flashmoba_begin_group(group, s, size, x->first_sequence + x->sequences, 0, first_query);
}

#endif
