/*
Statistics of MoBA's top-k selection: its quality and its load. The host computes them from the queries, keys
and selected blocks of a forward pass outside training.

    SelectionStats stats;  selection_start(&stats);
    for each sequence:  selection_add(&stats, qkv, selected, map, T, H, G, D, S, K);
    cJSON* json = selection_json(&stats);

    rows            query rows sampled: SELECTION_ROWS rows of every query head and sequence, spread evenly
                    over the rows that have more complete past blocks than K-1
    captured        the part of dense attention that falls on the attended blocks, the query's own included
    captured_best   the same for the K-1 past blocks with the most dense attention: a perfect router
    captured_chance the same for K-1 past blocks drawn at random
    recall          the part of those K-1 best blocks that the router selected
    ages            distances of the selected blocks, of all rows: the parts at 1, 2-3, 4-7, ... blocks before
                    the query's block
    heaviest        length of the longest list, divided by T. A block has one list for each query head: the
                    queries that selected it
    mean_load       mean length of the lists, divided by T

"Dense attention" is the softmax over the whole past with the layer's own queries and keys (docs/math.md
section 2).
*/
#ifndef RUNTIME_SELECTION_H
#define RUNTIME_SELECTION_H

#include <assert.h>
#include <math.h>
#include "runtime/checks.h"
#include "runtime/json.h"
#include "runtime/precision.h"

enum { SELECTION_ROWS = 8, SELECTION_AGES = 24 };

typedef struct {
    double rows, captured, best, chance, recall; // sums over the sampled rows
    double choices, ages[SELECTION_AGES];        // selected blocks of all rows, in total and by age
    double heaviest;                             // length of the longest list, divided by T
    double lists, load;                          // number of lists, and the sum of their lengths divided by T
} SelectionStats;

static inline void selection_start(SelectionStats* stats) { memset(stats, 0, sizeof(*stats)); }

// Computes the dense attention (t + 1) of query t to the keys 0..t of a head and, if `products` is not NULL,
// the products of query and keys. `query` and `keys` are rows of one packed array, the keys `stride` apart.
static inline void dense_attention_row(double* attention, double* products, const floatX* query,
                                       const floatX* keys, size_t stride, int t, int D) {
    double greatest = -INFINITY, total = 0;
    for (int i = 0; i <= t; i++) {
        const floatX* key = keys + (size_t)i * stride;
        double sum = 0;
        for (int d = 0; d < D; d++) sum += (double)query[d] * (double)key[d];
        attention[i] = sum;
        if (products) products[i] = sum;
        if (sum > greatest) greatest = sum;
    }
    for (int i = 0; i <= t; i++) total += attention[i] = exp((attention[i] - greatest) / sqrt((double)D));
    for (int i = 0; i <= t; i++) attention[i] /= total;
}

// Marks the `most` entries of the greatest values; of equal values the later one wins, as in the router.
static inline void mark_greatest(char* marks, const double* values, int count, int most) {
    for (int j = 0; j < count; j++) marks[j] = 0;
    for (int k = 0; k < most && k < count; k++) {
        int best = -1;
        for (int j = 0; j < count; j++)
            if (!marks[j] && (best < 0 || values[j] >= values[best])) best = j;
        if (best < 0) break;
        marks[best] = 1;
    }
}

// Adds a sampled row: `attention` (t + 1) is its dense attention, `selected`
// (K-1) its selected blocks, -1 for none.
static inline void selection_add_row(SelectionStats* stats, const double* attention, const int* selected,
                                     int t, int S, int K) {
    const int eligible = t / S;
    double* mass = (double*)calloc_or_fail((size_t)eligible, sizeof(double), "attention of blocks");
    char* best = (char*)malloc_or_fail((size_t)eligible, "the best blocks");
    double current = 0, past = 0, taken = 0, most = 0;
    for (int i = 0; i < eligible * S; i++) mass[i / S] += attention[i];
    for (int i = eligible * S; i <= t; i++) current += attention[i];
    mark_greatest(best, mass, eligible, K - 1);
    for (int j = 0; j < eligible; j++) {
        past += mass[j];
        most += best[j] ? mass[j] : 0;
    }
    int both = 0;
    for (int k = 0; k < K - 1; k++) {
        if (selected[k] < 0) continue;
        taken += mass[selected[k]];
        both += best[selected[k]];
    }
    stats->rows++;
    stats->captured += current + taken;
    stats->best += current + most;
    stats->chance += current + past * (K - 1) / eligible;
    stats->recall += (double)both / (K - 1);
    free(mass);
    free(best);
}

// Adds all selected blocks of one query head and sequence: their ages, and the lengths of the blocks' lists.
static inline void selection_add_choices(SelectionStats* stats, const int* selected, // (T, K-1)
                                         int T, int S, int K) {
    const int blocks = T / S;
    int* load = (int*)calloc_or_fail((size_t)blocks + 1, sizeof(int), "loads of blocks");
    for (int t = 0; t < T; t++) {
        for (int k = 0; k < K - 1; k++) {
            const int block = selected[(size_t)t * (K - 1) + k];
            if (block < 0) continue;
            assert(block < t / S);
            int bin = 0;
            while ((t / S - block) >> (bin + 1)) bin++;
            stats->ages[bin]++;
            stats->choices++;
            load[block]++;
        }
    }
    for (int j = 0; j < (T - 1) / S; j++) { // the blocks that some query could select
        const double part = (double)load[j] / T;
        stats->heaviest = part > stats->heaviest ? part : stats->heaviest;
        stats->load += part;
        stats->lists++;
    }
    free(load);
}

// Adds one sequence of one layer. Needs K > 1. A sequence of at most K blocks
// adds no rows: the router skips nothing.
static inline void selection_add(SelectionStats* stats,
                                 const floatX* qkv,   // (T, H + 2G, D)
                                 const int* selected, // (H, T, K-1)
                                 const int* kv_of_q,  // (H)
                                 int T, int H, int G, int D, int S, int K) {
    assert(K > 1);
    const size_t width = (size_t)(H + 2 * G) * D;
    const int first = K * S; // the first row with more than K-1 complete past blocks
    double* attention = (double*)malloc_or_fail((size_t)T * sizeof(double), "a row of attention");
    for (int h = 0; h < H; h++) {
        const int* chosen = selected + (size_t)h * T * (K - 1);
        const floatX* keys = qkv + (size_t)(H + kv_of_q[h]) * D;
        selection_add_choices(stats, chosen, T, S, K);
        for (int r = 0; r < SELECTION_ROWS && first < T; r++) {
            const int t = first + (int)((r + 0.5) / SELECTION_ROWS * (T - first));
            dense_attention_row(attention, NULL, qkv + (size_t)t * width + (size_t)h * D, keys, width, t, D);
            selection_add_row(stats, attention, chosen + (size_t)t * (K - 1), t, S, K);
        }
    }
    free(attention);
}

// The members listed at the top, as means. Without sampled rows, the members about them are left out.
static inline cJSON* selection_json(const SelectionStats* stats) {
    cJSON* json = cJSON_CreateObject();
    json_add_whole(json, "rows", (long)stats->rows);
    if (stats->rows > 0) {
        json_add_double(json, "captured", stats->captured / stats->rows);
        json_add_double(json, "captured_best", stats->best / stats->rows);
        json_add_double(json, "captured_chance", stats->chance / stats->rows);
        json_add_double(json, "recall", stats->recall / stats->rows);
    }
    double ages[SELECTION_AGES];
    int bins = 0;
    for (int i = 0; i < SELECTION_AGES; i++) {
        ages[i] = stats->choices > 0 ? stats->ages[i] / stats->choices : 0;
        if (stats->ages[i] > 0) bins = i + 1;
    }
    json_add_doubles(json, "ages", ages, bins);
    json_add_double(json, "heaviest", stats->heaviest);
    json_add_double(json, "mean_load", stats->lists > 0 ? stats->load / stats->lists : 0);
    return json;
}

#endif
