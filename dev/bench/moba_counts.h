/*
What flashmoba does at any length, by formula: matrix products, bytes, atomics and launches of each of its stages, and the least
that any kernels could do. No GPU and no emulator is needed, so lengths are those of the real thing.

    int* lengths = drawn_lengths(&shape, DRAW_UNIFORM, 1);               // or lengths_of_selection(...)
    Work works[NUM_STAGES];
    count_work(works, &shape, lengths, 1);                               // 1 head stands for all
    Floors floors = count_floors(&shape, lengths, 1);

Each formula below follows one kernel of moba.cuh, with the sizes of tiles that the kernel is compiled with;
test/test_moba_counts.cu compares them with what the emulator counts (dev/simt/counters.h), exactly. It counts the bytes of
rows; those of single words (indices, log-sum-exps, statistics) are by formula only, each word once for every kernel that uses it.

A floor is docs/math.md's work in the least bytes: every row that a choice needs read and its result written once, scores
read nowhere. Its sources are the paper (arXiv 2511.11571, section 4) and counting; count_floors() has the formulas.
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
    BACKWARD_KEYS,
    MERGE_KEYS,
    BACKWARD_QUERIES,
    MERGE_QUERIES,
    NUM_STAGES
};
enum { FORWARD_STAGES = STATISTICS };

// The stage of a kernel whose (mangled) name has one of these parts; NUM_STAGES for a kernel of something else.
static inline int stage_of_kernel(const char* name) {
    static const struct {
        const char* part;
        int stage;
    } kernels[] = {{"moba_centroids_kernel", CENTROIDS},
                   {"moba_split_kernel", CENTROIDS},
                   {"moba_route_kernel", ROUTER},
                   {"moba_count_kernel", LISTS},
                   {"moba_scan_tiles_kernel", LISTS},
                   {"moba_scan_blocks_kernel", LISTS},
                   {"moba_fill_kernel", LISTS},
                   {"moba_forward_kernel", FORWARD},
                   {"moba_merge_kernel", MERGE},
                   {"attention_statistics_kernel", STATISTICS},
                   {"moba_backward_keys_kernel", BACKWARD_KEYS},
                   {"moba_merge_keys_kernel", MERGE_KEYS},
                   {"moba_backward_queries_kernel", BACKWARD_QUERIES},
                   {"moba_merge_queries_kernel", MERGE_QUERIES}};
    for (size_t i = 0; i < sizeof(kernels) / sizeof(kernels[0]); i++)
        if (strstr(name, kernels[i].part)) return kernels[i].stage;
    return NUM_STAGES;
}

static const char* const stage_names[NUM_STAGES] = {
    "centroids",  "router",        "lists",      "forward",          "merge",
    "statistics", "backward keys", "merge keys", "backward queries", "merge queries"};

// ----------------------------------------------------------------------------
// Lists: how many queries attend to each block

typedef enum { DRAW_UNIFORM, DRAW_RECENT, DRAW_SINK, DRAW_OLDEST, NUM_DRAWS } Draw;
static const char* const draw_names[NUM_DRAWS] = {"uniform", "recent", "sink", "oldest"};

static inline uint64_t draw_bits(uint64_t* state) { // xorshift64*
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Dull;
}

// The choices of a query that has `past` complete blocks before its own, more than it may choose: the first block (sink) or the
// first ones (oldest) for certain, the others with equal chance or, recent, with one that falls as 1 / distance.
static inline void draw_choices(int* chosen, int choices, int past, Draw draw, uint64_t* state) {
    const int certain = draw == DRAW_OLDEST ? choices : draw == DRAW_SINK;
    for (int i = 0; i < choices; i++) {
        const double chance = (double)(draw_bits(state) >> 11) / (double)((uint64_t)1 << 53);
        int block = i < certain ? i : (int)(chance * past);
        if (draw == DRAW_RECENT) block = past - (int)pow(past, chance);
        for (int other = 0; other < i; other++)
            if (chosen[other] == block)
                block = (block + past - 1) % past, other = -1; // taken: the next older one
        chosen[i] = block;
    }
}

// Entries of the lists of one head, (blocks): every query is one of its own block, and of the blocks that it chooses.
static inline int* drawn_lengths(const moba_shape_t* s, Draw draw, uint64_t seed) {
    int* lengths = (int*)calloc_or_fail((size_t)ceil_div(s->T, s->S), sizeof(int), "the lengths of lists");
    uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
    for (int t = 0; t < s->T; t++) {
        const int past = t / s->S, choices = past < s->K - 1 ? past : s->K - 1;
        int chosen[64];
        lengths[past]++;
        if (past > choices) draw_choices(chosen, choices, past, draw, &state);
        for (int i = 0; i < choices; i++) lengths[past > choices ? chosen[i] : i]++;
    }
    return lengths;
}

// The same of what the router chose, (T, K-1) of one head.
static inline int* lengths_of_selection(const moba_shape_t* s, const int* selected) {
    int* lengths = (int*)calloc_or_fail((size_t)ceil_div(s->T, s->S), sizeof(int), "the lengths of lists");
    for (int t = 0; t < s->T; t++) {
        lengths[t / s->S]++;
        for (int i = 0; i < s->K - 1 && selected[(size_t)t * (s->K - 1) + i] >= 0; i++)
            lengths[selected[(size_t)t * (s->K - 1) + i]]++;
    }
    return lengths;
}

// ----------------------------------------------------------------------------
// Work

typedef struct {
    double launches;
    double products;                  // mma.m16n8k16
    double copied;                    // bytes of rows: by cp.async,
    double loaded, stored;            // and by load(), store() and store_rows()
    double words_read, words_written; // bytes that are no rows
    double atomics;
    double useful; // operations that the definition asks for
} Work;

enum { OPERATIONS_OF_PRODUCT = 2 * 16 * 8 * 16 };
static inline double bytes_read(const Work* w) { return w->copied + w->loaded + w->words_read; }
static inline double bytes_written(const Work* w) { return w->stored + w->words_written; }

// Products of (rows, depth) and (depth, columns); the fp32 build has none.
static inline double products(double rows, double columns, double depth) {
#if defined(PRECISION_BF16)
    return rows / 16 * (columns / 8) * (depth / 16);
#else
    return 0 * rows * columns * depth;
#endif
}

static inline int least(int a, int b) { return a < b ? a : b; }

// Keys that an item's part of a block has: the last block may lack some.
static inline int keys_of_part(const moba_lists_t* x, int block, int part) {
    const int missing = block * x->S + (part + 1) * x->keys - x->T;
    return missing <= 0 ? x->keys : missing < x->keys ? x->keys - missing : 0;
}

// Pairs of a query and a key that it sees, and of a query and a block that it scores, of one head.
static inline void count_pairs(double* pairs, double* scores, const moba_shape_t* s) {
    *pairs = 0, *scores = 0;
    for (int t = 0; t < s->T; t++) {
        const int past = t / s->S;
        *pairs += t % s->S + 1 + (double)s->S * least(past, s->K - 1);
        *scores += past;
    }
}

// The shape, its lists' layout, and the lengths of the lists of `drawn` heads, which stand for all.
typedef struct {
    const moba_shape_t* shape;
    moba_lists_t lists; // of one head
    const int* lengths; // (drawn, blocks)
    int drawn;
    double each;          // heads that each drawn one stands for
    double heads;         // of all sequences
    double entries;       // of all lists
    double row;           // bytes of D numbers
    double pairs, scores; // of all heads
    double groups[2];     // of heads, in the forward and in the backward
} Counting;

static inline double count_groups(const moba_shape_t* s, int is_backward) {
    int sequences, heads;
    moba_group_size(&sequences, &heads, s, is_backward);
    return (double)ceil_div(s->B, sequences) * ceil_div(s->H, heads);
}

static inline Counting begin_counting(const moba_shape_t* s, const int* lengths, int drawn) {
    Counting c = {};
    moba_group_t group;
    moba_lay_out(&group, NULL, s, 1, 0);
    c.shape = s, c.lists = group.lists, c.lengths = lengths, c.drawn = drawn;
    c.heads = (double)s->B * s->H, c.each = c.heads / drawn;
    c.row = (double)(sizeof(floatX) * (size_t)s->D);
    for (int i = 0; i < drawn * c.lists.blocks; i++) c.entries += c.each * lengths[i];
    count_pairs(&c.pairs, &c.scores, s);
    c.pairs *= c.heads, c.scores *= c.heads;
    for (int is_backward = 0; is_backward < 2; is_backward++)
        c.groups[is_backward] = count_groups(s, is_backward);
    return c;
}

// moba_centroids_kernel: every key of a complete block, once. moba_split_kernel: a word becomes MOBA_TERMS of floatX.
static inline Work centroids_work(const Counting* c) {
    const moba_shape_t* s = c->shape;
    const double centroids = (double)s->B * s->G * (s->T / s->S);
    const int has_terms = MOBA_TERMS > 1 && s->K > 1;
    Work w = {};
    if (centroids == 0) return w;
    w.launches = 1 + has_terms;
    w.loaded = centroids * s->S * c->row;
    w.words_written = centroids * s->D * (sizeof(float) + has_terms * MOBA_TERMS * sizeof(floatX));
    w.words_read = has_terms * centroids * s->D * sizeof(float);
    return w;
}

// moba_route_kernel: a block of threads reads its queries once and the centroids before the last of them, in all their terms and
// rounded up to tiles of COLUMNS; the tile that begins beyond the last complete block ends there.
template <int D> static inline Work router_work(const Counting* c) {
    typedef moba_route_shape<D> shape;
    const moba_shape_t* s = c->shape;
    Work w = {};
    if (s->K == 1) return w;
    w.launches = 1;
    for (int first = 0; first < s->T; first += shape::QUERIES) {
        const int queries = least(s->T - first, shape::QUERIES), end_block = (first + queries - 1) / s->S;
        const int columns = ceil_div(end_block, shape::COLUMNS) * shape::COLUMNS;
        w.copied += c->heads * (queries + MOBA_TERMS * least(columns, s->T / s->S)) * c->row;
        w.products += c->heads * MOBA_TERMS * products(shape::QUERIES, columns, D);
    }
    w.words_written = c->heads * s->T * (s->K - 1) * sizeof(int);
    w.useful = 2 * c->scores * D;
    return w;
}

// moba_count_kernel: an atomic for every entry. moba_scan_tiles_kernel goes over the counts, moba_scan_blocks_kernel over the
// totals; moba_fill_kernel reads the selection again and has a count, a beginning and an entry for every choice.
static inline Work lists_work(const Counting* c, int is_backward) {
    const moba_shape_t* s = c->shape;
    const double counts = c->heads * c->lists.tiles * c->lists.blocks * sizeof(int);
    const double selection = c->heads * s->T * (s->K - 1) * sizeof(int), entries = c->entries * sizeof(int);
    Work w = {};
    w.launches = 4 * c->groups[is_backward];
    w.atomics = c->entries;
    w.words_read = selection + counts + selection + 2 * entries;
    w.words_written = 2 * counts + counts + 2 * entries; // cleared and counted; scanned; filled
    return w;
}

// Calls with every item and part of the drawn lists: the entries of the item, and the keys of the part.
template <typename Function> static inline void for_items(const Counting* c, Function function) {
    for (int i = 0; i < c->drawn * c->lists.blocks; i++)
        for (int first = 0; first < c->lengths[i]; first += MOBA_ITEM)
            for (int part = 0; part < c->lists.parts; part++)
                function(least(c->lengths[i] - first, MOBA_ITEM),
                         keys_of_part(&c->lists, i % c->lists.blocks, part));
}

// moba_forward_kernel: an item reads its keys and values once and a row for every entry, and writes one. A warp multiplies 16M
// rows by all keys, twice.
template <int D> static inline Work forward_work(const Counting* c) {
    enum { ROWS = 16 * moba_forward_shape<D>::M };
    Work w = {};
    w.launches = c->groups[0];
    w.useful = 4 * c->pairs * D;
    for_items(c, [&](int entries, int keys) {
        w.copied += c->each * (2 * keys + entries) * c->row;
        w.stored += c->each * entries * c->row;
        w.products += c->each * 2 * products(ceil_div(entries, ROWS) * ROWS, c->lists.keys, D);
        w.words_read += c->each * (entries * sizeof(int) + sizeof(int2));
        w.words_written += c->each * entries * sizeof(float);
    });
    return w;
}

// moba_merge_kernel: the rows of all choices, their log-sum-exps and the selection; a row and a log-sum-exp.
static inline Work merge_work(const Counting* c) {
    const moba_shape_t* s = c->shape;
    Work w = {};
    w.launches = c->groups[0];
    w.loaded = c->entries * c->lists.parts * c->row;
    w.stored = c->heads * s->T * c->row;
    w.words_read = c->entries * c->lists.parts * sizeof(float) + c->heads * s->T * (s->K - 1) * sizeof(int);
    w.words_written = c->heads * s->T * sizeof(float);
    return w;
}

// attention_statistics_kernel: a row of gradients and one of outputs become a log-sum-exp and a delta.
static inline Work statistics_work(const Counting* c) {
    const moba_shape_t* s = c->shape;
    Work w = {};
    w.launches = 1;
    w.words_read = c->heads * s->T * (2 * c->row + sizeof(float));
    w.words_written = c->heads * attention_padded(s->T) * sizeof(float2);
    return w;
}

// moba_backward_keys_kernel: as the forward, with two rows for every entry, whole tiles of QUERIES, four products, and sums in fp32
// for the keys and values of the item.
template <int D> static inline Work backward_keys_work(const Counting* c) {
    enum { QUERIES = moba_keys_shape<D>::QUERIES };
    Work w = {};
    w.launches = c->groups[1];
    w.useful = 2 * 4 * c->pairs * D;
    for_items(c, [&](int entries, int keys) {
        w.copied += c->each * 2 * (keys + entries) * c->row;
        w.products += c->each * 4 * products(c->lists.keys, ceil_div(entries, QUERIES) * QUERIES, D);
        w.words_read += c->each * (entries * (sizeof(int) + sizeof(float2)) + sizeof(int2));
        w.words_written += c->each * 2 * c->lists.keys * D * sizeof(float);
    });
    return w;
}

// moba_merge_keys_kernel: the sums of every item of the keys that there are; gradients of keys and values. Of one group of heads
// only: a KV head that two groups share is carried from one to the other, which is not counted.
static inline Work merge_keys_work(const Counting* c) {
    const moba_shape_t* s = c->shape;
    const double row = (double)s->D * sizeof(float);
    Work w = {};
    w.launches = c->groups[1];
    for_items(c, [&](int, int keys) { w.loaded += c->each * 2 * keys * row; });
    w.stored = 2.0 * s->B * s->G * s->T * c->row;
    w.words_read = c->groups[1] * c->heads * c->lists.blocks * 2 * sizeof(int);
    return w;
}

// moba_backward_queries_kernel: as the forward, with two rows for every entry and three products, two of which the keys' kernel has
// computed already.
template <int D> static inline Work backward_queries_work(const Counting* c) {
    enum { ROWS = 16 * moba_queries_shape<D>::M };
    Work w = {};
    w.launches = c->groups[1];
    w.useful = 2 * c->pairs * D;
    for_items(c, [&](int entries, int keys) {
        w.copied += c->each * 2 * (keys + entries) * c->row;
        w.stored += c->each * entries * c->row;
        w.products += c->each * 3 * products(ceil_div(entries, ROWS) * ROWS, c->lists.keys, D);
        w.words_read += c->each * (entries * (sizeof(int) + sizeof(float2)) + sizeof(int2));
    });
    return w;
}

// moba_merge_queries_kernel
static inline Work merge_queries_work(const Counting* c) {
    const moba_shape_t* s = c->shape;
    Work w = {};
    w.launches = c->groups[1];
    w.loaded = c->entries * c->lists.parts * c->row;
    w.stored = c->heads * s->T * c->row;
    w.words_read = c->heads * s->T * (s->K - 1) * sizeof(int);
    return w;
}

static inline Work add_work(Work a, Work b) {
    a.launches += b.launches, a.products += b.products, a.copied += b.copied, a.loaded += b.loaded;
    a.stored += b.stored, a.words_read += b.words_read, a.words_written += b.words_written;
    a.atomics += b.atomics, a.useful += b.useful;
    return a;
}

template <int D> static inline void count_work_of(Work works[NUM_STAGES], const Counting* c) {
    works[CENTROIDS] = centroids_work(c);
    works[ROUTER] = router_work<D>(c);
    works[LISTS] = add_work(lists_work(c, 0), lists_work(c, 1));
    works[FORWARD] = forward_work<D>(c);
    works[MERGE] = merge_work(c);
    works[STATISTICS] = statistics_work(c);
    works[BACKWARD_KEYS] = backward_keys_work<D>(c);
    works[MERGE_KEYS] = merge_keys_work(c);
    works[BACKWARD_QUERIES] = backward_queries_work<D>(c);
    works[MERGE_QUERIES] = merge_queries_work(c);
}

// What flashmoba_forward and flashmoba_backward do. `lengths` (drawn, blocks) are those of heads that stand for all of the shape.
static inline void count_work(Work works[NUM_STAGES], const moba_shape_t* s, const int* lengths, int drawn) {
    const Counting c = begin_counting(s, lengths, drawn);
    if (s->D == 32) count_work_of<32>(works, &c);
    if (s->D == 64) count_work_of<64>(works, &c);
    if (s->D == 128) count_work_of<128>(works, &c);
}

// ----------------------------------------------------------------------------
// Floors

// Least bytes, in words_read and words_written together, and useful operations, of one call. A routed choice needs its query read
// and a row of results written and a log-sum-exp; a list of blocks cut into items of MOBA_ITEM queries needs its keys and
// values once for each. With e bytes a number, n blocks and 128 queries for every reading of the centroids, of a query head:
//     router      eTD + (T/128)(n/2) eD + 2T(K-1)
//     forward     T(K-1)(2eD + 4) + items * 2eSD
//     merge       T(K-1)(eD + 4) + 4eTD          with the queries, keys and values of the own block, and the output
//     backward    twice the forward              with gradients beside queries
typedef struct {
    double router, forward, merge, backward; // bytes
} Floors;

static inline Floors count_floors(const moba_shape_t* s, const int* lengths, int drawn) {
    const Counting c = begin_counting(s, lengths, drawn);
    const double T = s->T, routed = T * (s->K - 1), n = c.lists.blocks;
    double items = 0;
    for (int i = 0; i < drawn * c.lists.blocks; i++) {
        const int block = i % c.lists.blocks, own = least(s->S, s->T - block * s->S);
        items += (double)ceil_div(lengths[i] - own, MOBA_ITEM) / drawn;
    }
    Floors floors;
    floors.router = c.heads * (T * c.row + T / 128 * n / 2 * c.row + 2 * routed);
    floors.forward = c.heads * (routed * (2 * c.row + 4) + items * 2 * s->S * c.row);
    floors.merge = c.heads * (routed * (c.row + 4) + 4 * T * c.row);
    floors.backward = 2 * floors.forward;
    return floors;
}

#endif
