/*
The work of flashmoba at any length, by formula: matrix products, bytes, atomics and launches of each stage,
and lower bounds of the bytes. It needs no GPU and no emulator, so it can count real lengths.

    int* selected = drawn_selection(&shape, DRAW_UNIFORM, 1);   // one head for all; or the router's selection
    Work works[NUM_STAGES];
    count_work(works, &shape, NULL, selected, 1);
    Floors floors = count_floors(&shape, selected, 1);

Each formula below follows one kernel of flashmoba, with the tile sizes of the compiled kernel and the groups
of heads of flashmoba_first_group() and flashmoba_next_group(). test/test_moba_counts.cu compares the results with the
emulator's counters (dev/simt/counters.h), exactly. The emulator counts the bytes of rows, and of list entries
and statistics that cp.async copies. It does not count other single words (indices, lse, sums that go from
registers to memory); the formulas count each such word once for every kernel that uses it.

A floor is a lower bound of the bytes that kernels with these stages move. count_floors() has the formulas.
*/
#ifndef DEV_BENCH_MOBA_COUNTS_H
#define DEV_BENCH_MOBA_COUNTS_H

// The sizes of the kernels
#include "moba.cuh"

enum {
    CENTROIDS,
    ROUTER,
    LISTS,
    FORWARD,
    MERGE,
    STATISTICS,
    BACKWARD,
    MERGE_KEYS,
    MERGE_QUERIES,
    NUM_STAGES
};
static const char* const stage_names[NUM_STAGES] = {"centroids", "router",     "lists",
                                                    "forward",   "merge",      "statistics",
                                                    "backward",  "merge keys", "merge queries"};

// The stage of a kernel, found by a part of its (mangled) name; NUM_STAGES for any other kernel.
static inline int stage_of_kernel(const char* name) {
    static const struct {
        const char* part;
        int stage;
    } kernels[] = {{"keys_forward_kernel", CENTROIDS},
                   {"flashmoba_split_kernel", CENTROIDS},
                   {"flashmoba_route_kernel", ROUTER},
                   {"flashmoba_count_kernel", LISTS},
                   {"flashmoba_scan_tiles_kernel", LISTS},
                   {"flashmoba_scan_blocks_kernel", LISTS},
                   {"flashmoba_fill_kernel", LISTS},
                   {"flashmoba_forward_kernel", FORWARD},
                   {"flashmoba_merge_kernel", MERGE},
                   {"attention_statistics_kernel", STATISTICS},
                   {"flashmoba_backward_kernel", BACKWARD},
                   {"flashmoba_merge_keys_kernel", MERGE_KEYS},
                   {"flashmoba_merge_queries_kernel", MERGE_QUERIES}};
    for (size_t i = 0; i < sizeof(kernels) / sizeof(kernels[0]); i++)
        if (strstr(name, kernels[i].part)) return kernels[i].stage;
    return NUM_STAGES;
}

// ----------------------------------------------------------------------------
// Random selections, to count with when no router has run

typedef enum { DRAW_UNIFORM, DRAW_RECENT, DRAW_SINK, DRAW_OLDEST, NUM_DRAWS } Draw;
static const char* const draw_names[NUM_DRAWS] = {"uniform", "recent", "sink", "oldest"};

static inline uint64_t draw_bits(uint64_t* state) { // xorshift64*
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Dull;
}

// Draws the selection of a query with `past` complete blocks before its own, more than K-1. It always
// contains the first block (sink) or the first ones (oldest). The others are drawn with equal probability, or
// for recent with a probability that falls as 1 / distance.
static inline void draw_choices(int* chosen, int choices, int past, Draw draw, uint64_t* state) {
    const int certain = draw == DRAW_OLDEST ? choices : draw == DRAW_SINK;
    for (int i = 0; i < choices; i++) {
        const double chance = (double)(draw_bits(state) >> 11) / (double)((uint64_t)1 << 53);
        int block = i < certain ? i : (int)(chance * past);
        if (draw == DRAW_RECENT) block = past - (int)pow(past, chance);
        for (int other = 0; other < i; other++)
            if (chosen[other] == block)
                block = (block + past - 1) % past, other = -1; // already drawn: take the next older one
        chosen[i] = block;
    }
}

// Draws the selection of one head, (T, K-1); the blocks of a query are in no particular order.
static inline int* drawn_selection(const AttentionShape* s, Draw draw, uint64_t seed) {
    const int choices = s->K - 1;
    int* selected = (int*)malloc_or_fail(sizeof(int) * ((size_t)s->T * choices + 1), "a selection");
    uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
    for (int t = 0; t < s->T; t++) {
        int* chosen = selected + (size_t)t * choices;
        const int past = t / s->S;
        if (past > choices) draw_choices(chosen, choices, past, draw, &state);
        for (int i = 0; past <= choices && i < choices; i++)
            chosen[i] = past - 1 - i >= 0 ? past - 1 - i : -1;
    }
    return selected;
}

// ----------------------------------------------------------------------------
// Work

typedef struct {
    double launches;
    double products;                  // mma.m16n8k16
    double copied;                    // bytes that cp.async reads: rows, list entries and statistics
    double loaded, stored;            // bytes of rows by load(), and by store() and store_rows()
    double words_read, words_written; // other bytes
    double atomics;
    double useful; // operations of the definition in docs/math.md
} Work;

enum { OPERATIONS_OF_PRODUCT = 2 * 16 * 8 * 16 };
static inline double bytes_read(const Work* w) { return w->copied + w->loaded + w->words_read; }
static inline double bytes_written(const Work* w) { return w->stored + w->words_written; }
static inline double bytes_moved(const Work* w) { return bytes_read(w) + bytes_written(w); }

// Number of mma.m16n8k16 for (rows, depth) times (depth, columns); the fp32 build has none.
static inline double products(double rows, double columns, double depth) {
#if defined(PRECISION_BF16)
    return rows / 16 * (columns / 8) * (depth / 16);
#else
    return 0 * rows * columns * depth;
#endif
}

static inline int least(int a, int b) { return a < b ? a : b; }
static inline double row_bytes(const AttentionShape* s) { return (double)s->D * sizeof(floatX); }
static inline double sum_bytes(const AttentionShape* s) {
    return (double)s->D * sizeof(float);
} // one row of sums

// The number of existing keys among `keys` keys from first_key on.
static inline int keys_there(int first_key, int keys, int T) {
    return first_key + keys <= T ? keys : first_key < T ? T - first_key : 0;
}

// For one head: the pairs of query and visible key, and the pairs of query and scored block.
static inline void count_pairs(double* pairs, double* scores, const AttentionShape* s) {
    *pairs = 0, *scores = 0;
    for (int t = 0; t < s->T; t++) {
        const int past = t / s->S;
        *pairs += t % s->S + 1 + (double)s->S * least(past, s->K - 1);
        *scores += past;
    }
}

// keys_forward_kernel, when it only makes centroids, reads every key of a complete block once.
// flashmoba_split_kernel turns each number of a centroid into FLASHMOBA_TERMS of floatX.
static inline Work centroids_work(const AttentionShape* s) {
    const int blocks = s->T / s->S;
    const double centroids = (double)s->B * s->G * blocks;
    const int has_terms = FLASHMOBA_TERMS > 1 && s->K > 1;
    Work w = {};
    if (centroids == 0) return w;
    w.launches = 1 + has_terms;
    w.loaded = centroids * s->S * row_bytes(s);
    w.words_read = has_terms * centroids * sum_bytes(s);
    w.words_written = centroids * (sum_bytes(s) + has_terms * FLASHMOBA_TERMS * row_bytes(s));
    return w;
}

// flashmoba_route_kernel: a thread block reads its queries once, and all terms of the centroids of the blocks
// before its last query, rounded up to tiles of COLUMNS but not beyond the last complete block. If there are
// no such blocks, it reads nothing.
template <int D> static inline Work router_work(const AttentionShape* s) {
    typedef FlashmobaRouteShape<D> shape;
    const double heads = (double)s->B * s->H;
    Work w = {};
    if (s->K == 1) return w;
    w.launches = 1;
    for (int first = 0; first < s->T; first += shape::QUERIES) {
        const int queries = least(s->T - first, shape::QUERIES), end_block = (first + queries - 1) / s->S;
        const int columns = ceil_div(end_block, shape::COLUMNS) * shape::COLUMNS;
        if (columns == 0) continue;
        w.copied += heads * (queries + FLASHMOBA_TERMS * least(columns, s->T / s->S)) * row_bytes(s);
        w.products += heads * FLASHMOBA_TERMS * products(shape::QUERIES, columns, D);
    }
    w.words_written = heads * s->T * (s->K - 1) * sizeof(int);
    return w;
}

// A query head of a group of heads: its lists, and the heads with which it shares its KV head.
typedef struct {
    const AttentionShape* shape;
    const FlashmobaLists* lists;     // the group's
    const int* lengths;              // (blocks) entries of its lists
    double entries;                  // of all its lists
    int is_first, is_last;           // in the group
    int shares_before, shares_after; // whether the neighbouring heads read the same KV head
    int unread; // KV heads directly before its own, or after the last, that no head reads
} GroupHead;

static inline int is_whole_head(const GroupHead* head) {
    return head->lists->start == 0 && head->lists->end == head->lists->T;
}

// Work items of a list; flashmoba_items() for the host.
static inline int count_items(int entries) { return entries > 0 ? ceil_div(entries, FLASHMOBA_ITEM) : 1; }

// flashmoba_count_kernel has one atomic for every entry. flashmoba_scan_tiles_kernel makes the prefix sums of the
// counts, and flashmoba_scan_blocks_kernel those of the totals. flashmoba_fill_kernel reads the selection again; for
// every entry it reads a count and the beginning of a list, and writes the entry.
static inline void add_lists(Work* w, const GroupHead* head) {
    const FlashmobaLists* x = head->lists;
    const double counts = (double)x->tiles * x->blocks * sizeof(int), entries = head->entries * sizeof(int);
    const double selection = (double)(x->end - x->start) * (x->K - 1) * sizeof(int);
    w->launches += 4 * head->is_first;
    w->atomics += head->entries;
    w->words_read += selection + counts + selection + 2 * entries;
    w->words_written += 2 * counts + counts + 2 * entries; // cleared and counted; scanned; filled
}

// flashmoba_forward_kernel: every part of a work item reads its keys and values once. For every entry it reads one
// row and writes one row; without entries it reads and writes nothing. A warp multiplies 16M rows by all
// keys, twice.
template <int D> static inline void add_forward(Work* w, const GroupHead* head) {
    enum { ROWS = 16 * FlashmobaForwardShape<D>::M };
    const FlashmobaLists* x = head->lists;
    const double row = row_bytes(head->shape);
    w->launches += head->is_first;
    for (int block = 0; block < x->blocks; block++)
        for (int item = 0; item < count_items(head->lengths[block]); item++) {
            const int entries = least(head->lengths[block] - item * FLASHMOBA_ITEM, FLASHMOBA_ITEM);
            const int loaded = entries > 0 ? 2 * keys_there(block * x->S, x->S, x->T) : 0;
            w->copied += (loaded + (double)x->parts * entries) * row + x->parts * entries * sizeof(int);
            w->stored += x->parts * entries * row;
            w->products += 2 * products(ceil_div(entries, ROWS) * ROWS, x->S, D);
            w->words_read += x->parts * sizeof(int2);
            w->words_written += x->parts * entries * sizeof(float);
        }
}

// flashmoba_merge_kernel reads the partials of all blocks of a query, their lse and the selection, and writes a
// row and its lse.
static inline void add_merge(Work* w, const GroupHead* head) {
    const FlashmobaLists* x = head->lists;
    const double queries = x->end - x->start, row = row_bytes(head->shape);
    w->launches += head->is_first;
    w->loaded += head->entries * x->parts * row;
    w->stored += queries * row;
    w->words_read += head->entries * x->parts * sizeof(float) + queries * (x->K - 1) * sizeof(int);
    w->words_written += queries * sizeof(float);
}

// attention_statistics_kernel reads a row of gradients, a row of outputs and its lse, and writes lse and
// delta.
static inline Work statistics_work(const AttentionShape* s) {
    const double heads = (double)s->B * s->H;
    Work w = {};
    w.launches = 1;
    w.words_read = heads * s->T * (2 * row_bytes(s) + sizeof(float));
    w.words_written = heads * attention_padded(s->T) * sizeof(float2);
    return w;
}

// Whether one work item computes the whole gradients of a block (flashmoba_is_whole), and whether the first item
// continues with sums of the group before (flashmoba_goes_on).
static inline int is_whole_block(const GroupHead* head, int block) {
    return is_whole_head(head) && !head->shares_before && !head->shares_after &&
           count_items(head->lengths[block]) == 1;
}
static inline int goes_on(const GroupHead* head) {
    return head->is_first && (head->lists->start > 0 || head->shares_before);
}

// flashmoba_backward_kernel: like the forward kernel, but with two rows read for every entry, whole tiles of
// QUERIES and five products. For keys and values it writes gradients, or sums if other work items add to
// them.
template <int D> static inline void add_backward(Work* w, const GroupHead* head) {
    enum { QUERIES = FlashmobaBackwardShape<D>::QUERIES };
    const FlashmobaLists* x = head->lists;
    const double row = row_bytes(head->shape), sum = sum_bytes(head->shape);
    w->launches += head->is_first;
    for (int block = 0; block < x->blocks; block++)
        for (int item = 0; item < count_items(head->lengths[block]); item++) {
            const int entries = least(head->lengths[block] - item * FLASHMOBA_ITEM, FLASHMOBA_ITEM);
            const int keys = keys_there(block * x->S, x->S, x->T), continues = item == 0 && goes_on(head);
            if (continues && entries == 0) continue;
            w->copied +=
                2.0 * (keys + x->parts * entries) * row + x->parts * entries * (sizeof(int) + sizeof(float2));
            w->stored += x->parts * entries * row;
            w->products += 5 * products(x->S, ceil_div(entries, QUERIES) * QUERIES, D);
            w->words_read += x->parts * sizeof(int2);
            if (continues) w->words_read += 2 * keys * sum;
            if (is_whole_block(head, block)) w->stored += 2 * keys * row;
            else w->words_written += 2.0 * (item == 0 ? keys : x->S) * sum;
        }
}

// flashmoba_merge_keys_kernel reads the sums of all work items of a block, if there is more than one or if the KV
// head has other query heads. It writes gradients, or sums for the next group. It writes zeros for KV heads
// that no head reads.
static inline void add_merge_keys(Work* w, const GroupHead* head) {
    const FlashmobaLists* x = head->lists;
    const int next_goes_on = x->end < x->T || (head->is_last && head->shares_after);
    const double row = row_bytes(head->shape), sum = sum_bytes(head->shape);
    w->launches += head->is_first;
    w->words_read += (x->blocks + 1.0) * sizeof(int);
    w->stored += 2.0 * head->unread * x->T * row;
    for (int block = 0; block < x->blocks; block++) {
        const int items = count_items(head->lengths[block]);
        const double rows = 2.0 * keys_there(block * x->S, x->S, x->T);
        if (is_whole_block(head, block) || (next_goes_on && x->heads == 1 && items == 1)) continue;
        w->loaded += rows * items * sum;
        if (!head->shares_after && x->end == x->T) w->stored += rows * row;
        if (next_goes_on) w->stored += rows * sum;
    }
}

// flashmoba_merge_queries_kernel reads the partial gradients of all blocks of a query and the selection, and
// writes a row.
static inline void add_merge_queries(Work* w, const GroupHead* head) {
    const FlashmobaLists* x = head->lists;
    const double queries = x->end - x->start, row = row_bytes(head->shape);
    w->launches += head->is_first;
    w->loaded += head->entries * x->parts * row;
    w->stored += queries * row;
    w->words_read += queries * (x->K - 1) * sizeof(int);
}

// ----------------------------------------------------------------------------
// All heads

// Counts the queries in each key block's list, for one head and its queries start..end-1. `lengths` has one
// entry for each key block; `selected` is (T, K-1).
// Every query is in the list of its own block and in the lists of the blocks that it selected.
static inline void count_lengths(int* lengths, const AttentionShape* s, const int* selected, int start,
                                 int end) {
    for (int block = 0; block * s->S < s->T; block++) lengths[block] = 0;
    for (int t = start; t < end; t++) {
        lengths[t / s->S]++;
        for (int i = 0; i < s->K - 1 && selected[(size_t)t * (s->K - 1) + i] >= 0; i++)
            lengths[selected[(size_t)t * (s->K - 1) + i]]++;
    }
}

static inline int kv_of_head(const AttentionShape* s, const int* kv_of_q, int h) {
    return kv_of_q ? kv_of_q[h] : (int)((long)h * s->G / s->H);
}

static inline GroupHead group_head(const AttentionShape* s, const int* kv_of_q, const FlashmobaLists* x,
                                   int i) {
    const int h = x->first_head + i % x->heads, g = kv_of_head(s, kv_of_q, h);
    const int before = h > 0 ? kv_of_head(s, kv_of_q, h - 1) : -1,
              after = h + 1 < s->H ? kv_of_head(s, kv_of_q, h + 1) : s->G;
    GroupHead head = {};
    head.shape = s, head.lists = x;
    head.is_first = i == 0, head.is_last = i % x->heads == x->heads - 1;
    head.shares_before = before == g, head.shares_after = after == g;
    head.unread = (before < g ? g - before - 1 : 0) + (h + 1 == s->H ? s->G - 1 - g : 0);
    return head;
}

// Calls function() with every head of every group of heads, of the forward or of the backward pass.
template <typename Function>
static inline void for_heads(const AttentionShape* s, const int* kv_of_q, const int* selected, int drawn,
                             int is_backward, Function function) {
    const FlashmobaGroupSize size = flashmoba_group_size(s, is_backward);
    int* lengths = (int*)malloc_or_fail(sizeof(int) * (size_t)ceil_div(s->T, s->S), "the lengths of lists");
    int counted[3] = {-1, -1, -1}; // the head, start and end that `lengths` belongs to
    const AttentionTensors none = {};
    for (FlashmobaGroup group = flashmoba_first_group(NULL, &none, s, &size, is_backward); group.heads > 0;
         flashmoba_next_group(&group, s, &size))
        for (int i = 0; i < group.heads; i++) {
            const FlashmobaLists* x = &group.lists;
            GroupHead head = group_head(s, kv_of_q, x, i);
            const int of[3] = {((x->first_sequence + i / x->heads) * s->H + x->first_head + i % x->heads) %
                                   drawn,
                               x->start, x->end};
            if (memcmp(of, counted, sizeof(of)) != 0)
                count_lengths(lengths, s, selected + (size_t)of[0] * s->T * (s->K - 1), x->start, x->end);
            memcpy(counted, of, sizeof(of));
            head.lengths = lengths;
            for (int block = 0; block < x->blocks; block++) head.entries += lengths[block];
            function(&head);
        }
    free(lengths);
}

template <int D>
static inline void count_work_of(Work works[NUM_STAGES], const AttentionShape* s, const int* kv_of_q,
                                 const int* selected, int drawn) {
    double pairs, scores;
    count_pairs(&pairs, &scores, s);
    for (int i = 0; i < NUM_STAGES; i++) works[i] = Work();
    works[CENTROIDS] = centroids_work(s);
    works[ROUTER] = router_work<D>(s);
    works[STATISTICS] = statistics_work(s);
    for_heads(s, kv_of_q, selected, drawn, 0, [&](const GroupHead* head) {
        add_lists(&works[LISTS], head);
        add_forward<D>(&works[FORWARD], head);
        add_merge(&works[MERGE], head);
    });
    for_heads(s, kv_of_q, selected, drawn, 1, [&](const GroupHead* head) {
        add_lists(&works[LISTS], head);
        add_backward<D>(&works[BACKWARD], head);
        add_merge_keys(&works[MERGE_KEYS], head);
        add_merge_queries(&works[MERGE_QUERIES], head);
    });
    works[ROUTER].useful = s->K > 1 ? 2 * scores * D * s->B * s->H : 0;
    works[FORWARD].useful = 4 * pairs * D * s->B * s->H;
    works[BACKWARD].useful = 10 * pairs * D * s->B * s->H;
}

// Counts the work of flashmoba_forward and flashmoba_backward; the lists of both passes count together. The
// selections (drawn, T, K-1) are those of the first heads of (B, H), and the other heads repeat them. A NULL
// map is the uniform map.
static inline void count_work(Work works[NUM_STAGES], const AttentionShape* s, const int* kv_of_q,
                              const int* selected, int drawn) {
    for_head_dim(s->D, [&](auto head_dim) { count_work_of<head_dim>(works, s, kv_of_q, selected, drawn); });
}

// ----------------------------------------------------------------------------
// Floors

// Lower bounds of the bytes that one call reads and writes. For each selected block of a query, the forward reads
// the query and writes a partial: a row and its lse. For each work item of up to FLASHMOBA_ITEM queries, it reads
// the keys and values once. For every 128 queries, the router reads the centroids before them once. With e bytes
// a number and n blocks, the bytes of a query head are:
//     router      eTD + (T/128)(n/2) eD + 2T(K-1)
//     forward     T(K-1)(2eD + 4) + items * 2eSD
//     merge       T(K-1)(eD + 4) + 4eTD          with the queries, keys and values of the own block, and the output
//     backward    twice the forward              with output gradients, and partial query gradients
typedef struct {
    double router, forward, merge, backward;
} Floors;

static inline Floors count_floors(const AttentionShape* s, const int* selected, int drawn) {
    const int blocks = ceil_div(s->T, s->S);
    const double T = s->T, routed = T * (s->K - 1), row = row_bytes(s), heads = (double)s->B * s->H;
    int* lengths = (int*)malloc_or_fail(sizeof(int) * (size_t)blocks, "the lengths of lists");
    double items = 0;
    for (int i = 0; i < drawn; i++) {
        count_lengths(lengths, s, selected + (size_t)i * s->T * (s->K - 1), 0, s->T);
        for (int block = 0; block < blocks; block++)
            items += (double)ceil_div(lengths[block] - keys_there(block * s->S, s->S, s->T), FLASHMOBA_ITEM) /
                     drawn;
    }
    free(lengths);
    Floors floors;
    floors.router = heads * (T * row + T / 128 * blocks / 2 * row + 2 * routed);
    floors.forward = heads * (routed * (2 * row + 4) + items * 2 * s->S * row);
    floors.merge = heads * (routed * (row + 4) + 4 * T * row);
    floors.backward = 2 * floors.forward;
    return floors;
}

#endif
