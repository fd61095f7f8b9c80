/*
Which key/value head each query head reads (docs/math.md section 3; Khan et al., "Beyond Uniform Query Distribution",
arXiv 2408.08454): from a statistic of the keys to weights, from weights to an allocation, from an allocation to a map.

    HeadAllocation heads;
    allocation_start(&heads, settings, L, H, G);                  // uniform: H/G query heads each
    allocation_update(&heads, l, n, step);                        // the map of layer l for this step, from its n (G)
    allocation_remember(&heads, l, n, step);                      // afterwards: what later steps need of n
    heads.map + l * H                                             // what attention takes

The allocation of a layer says how many query heads each key/value head has, (G) summing to H; its map names the key/value
head of each query head, (H) and never decreasing. Everything here runs on the host, in double, and depends on nothing but its
arguments, so that every rank that sees the same numbers comes to the same map. Only the product that is rounded is first made
a float: what is a tie up to the noise of a double is then exactly one.
*/
#ifndef RUNTIME_ALLOCATION_H
#define RUNTIME_ALLOCATION_H

#include <assert.h>
#include <math.h>
#include "runtime/checks.h"
#include "runtime/random.h"

// ----------------------------------------------------------------------------
// From weights to an allocation

// As even as possible; what is left over goes to the first groups.
static inline void allocate_uniform(int* heads, int G, int H) {
    for (int g = 0; g < G; g++) heads[g] = H / G + (g < H % G);
}

static inline int first_largest(const int* values, int count) {
    int at = 0;
    for (int i = 1; i < count; i++) at = values[i] > values[at] ? i : at;
    return at;
}

static inline int first_smallest(const int* values, int count) {
    int at = 0;
    for (int i = 1; i < count; i++) at = values[i] < values[at] ? i : at;
    return at;
}

// Hands H query heads out in proportion to the weights, every group at least `least` of them (least * G <= H). Weights are
// not negative. Returns 0, and leaves `heads` as it is, where one of them is not a number or infinite; else 1.
static inline int allocate_heads(int* heads,            // (G)
                                 const double* weights, // (G)
                                 int G, int H, int least) {
    assert(least >= 0 && least * G <= H);
    double largest = 0;
    int all_equal = 1;
    for (int g = 0; g < G; g++) {
        if (!isfinite(weights[g])) return 0;
        assert(weights[g] >= 0);
        largest = weights[g] > largest ? weights[g] : largest;
        all_equal = all_equal && weights[g] == weights[0];
    }
    allocate_uniform(heads, G, H);
    if (all_equal) return 1;
    // Relative to the largest, the sum can neither overflow nor vanish.
    double sum = 0;
    for (int g = 0; g < G; g++) sum += weights[g] / largest;
    int total = 0;
    for (int g = 0; g < G; g++) total += heads[g] = (int)nearbyintf((float)(weights[g] / largest / sum * H));
    for (; total > H; total--) heads[first_largest(heads, G)]--;
    for (; total < H; total++) heads[first_smallest(heads, G)]++;
    for (int g = 0; g < G; g++) {
        for (; heads[g] < least; heads[g]++) heads[first_largest(heads, G)]--;
    }
    return 1;
}

// [1,1,3,3] becomes 0,1,2,2,2,3,3,3.
static inline void map_from_allocation(int* map,         // (H)
                                       const int* heads, // (G)
                                       int G) {
    for (int g = 0, h = 0; g < G; g++)
        for (int i = 0; i < heads[g]; i++) map[h++] = g;
}

// ----------------------------------------------------------------------------
// From a statistic to weights

// How far each head is from the weakest, in units of the strongest: a shift or a scale of n changes nothing. All equal:
// all 0. NaN where n is not finite.
static inline void weights_of_range(double* weights, const double* n, int G) {
    double low = n[0], high = n[0];
    for (int g = 0; g < G; g++) {
        if (!isfinite(n[g])) low = NAN;
        low = n[g] < low ? n[g] : low;
        high = n[g] > high ? n[g] : high;
    }
    for (int g = 0; g < G; g++) weights[g] = high > low || isnan(low) ? (n[g] - low) / (high - low) : 0;
}

// ----------------------------------------------------------------------------
// A model's allocations, and what they are made from

// Random and shuffled are controls: maps as uneven as the others, which no key has a part in, drawn once or at every step.
typedef enum {
    SOURCE_LAGGED,
    SOURCE_FORWARD,
    SOURCE_WEIGHTS,
    SOURCE_RANDOM,
    SOURCE_SHUFFLED,
    STATISTIC_SOURCES
} StatisticSource;
typedef enum { DGQA_EMA, DGQA_DIFF } DgqaKind;
static const char* const statistic_source_names[STATISTIC_SOURCES] = {"lagged", "forward", "weights",
                                                                      "random", "shuffled"};
static const char* const dgqa_kind_names[] = {"ema", "diff"};

typedef struct {
    int dynamic; // 0: kdgqa, from the range of n at every step; 1: dgqa, from n's history at every window
    StatisticSource source; // where n comes from
    DgqaKind kind;          // dgqa: a running average, or the change since the last window
    int window;             // dgqa: steps
    double beta;            // dgqa's average: what is kept of it at a window
    int least;              // query heads that every key/value head has at least
    uint64_t seed;          // of random numbers as the source
} AllocationSettings;

static inline AllocationSettings allocation_defaults(int dynamic) {
    AllocationSettings settings;
    settings.dynamic = dynamic;
    settings.source = SOURCE_LAGGED;
    settings.kind = DGQA_EMA;
    settings.window = 100;
    settings.beta = 0.9;
    settings.least = 1;
    settings.seed = 0;
    return settings;
}

// All that later steps depend on; a checkpoint holds every array.
typedef struct {
    AllocationSettings settings;
    int L, H, G;
    int* heads;        // (L, G) the allocation
    int* map;          // (L, H) what follows from it
    double* statistic; // (L, G) n of the last step
    double* history;   // (L, G) dgqa: the running average, or n of the last window
    int* measured;     // (L) 1 when statistic holds a step's, 0 before the first
    int* windows;      // (L) values of n that history was made from; 0: it has none
    long* moved;       // (L) query heads that changed their key/value head, since the start of the run
    int warned;        // 1 after the first warning of an n that is not finite
} HeadAllocation;

static inline void allocation_start(HeadAllocation* a, AllocationSettings settings, int L, int H, int G) {
    const char* what = "the allocation of heads";
    memset(a, 0, sizeof(*a));
    a->settings = settings;
    a->L = L;
    a->H = H;
    a->G = G;
    a->heads = (int*)calloc_or_fail((size_t)L * G, sizeof(int), what);
    a->map = (int*)calloc_or_fail((size_t)L * H, sizeof(int), what);
    a->statistic = (double*)calloc_or_fail((size_t)L * G, sizeof(double), what);
    a->history = (double*)calloc_or_fail((size_t)L * G, sizeof(double), what);
    a->measured = (int*)calloc_or_fail((size_t)L, sizeof(int), what);
    a->windows = (int*)calloc_or_fail((size_t)L, sizeof(int), what);
    a->moved = (long*)calloc_or_fail((size_t)L, sizeof(long), what);
    for (int l = 0; l < L; l++) {
        allocate_uniform(a->heads + (size_t)l * G, G, H);
        map_from_allocation(a->map + (size_t)l * H, a->heads + (size_t)l * G, G);
    }
}

static inline void allocation_free(HeadAllocation* a) {
    free(a->heads);
    free(a->map);
    free(a->statistic);
    free(a->history);
    free(a->measured);
    free(a->windows);
    free(a->moved);
}

// Gives layer l the allocation `heads` (G).
static inline void allocation_set(HeadAllocation* a, int l, const int* heads) {
    int *map = a->map + (size_t)l * a->H, *mine = a->heads + (size_t)l * a->G;
    int* before = (int*)malloc_or_fail((size_t)a->H * sizeof(int), "a map of heads");
    memcpy(before, map, (size_t)a->H * sizeof(int));
    memcpy(mine, heads, (size_t)a->G * sizeof(int));
    map_from_allocation(map, mine, a->G);
    for (int h = 0; h < a->H; h++) a->moved[l] += map[h] != before[h];
    free(before);
}

// dgqa takes a new map at the steps 0, W, 2W, ...; kdgqa at every step.
static inline int allocation_is_due(const AllocationSettings* settings, int step) {
    return !settings->dynamic || step % settings->window == 0;
}

// What dgqa's history (G) becomes at a window whose statistic is n: the running average, which starts at the first n, or n.
static inline void allocation_history(double* out, const HeadAllocation* a, int l, const double* n) {
    const AllocationSettings* settings = &a->settings;
    const double* history = a->history + (size_t)l * a->G;
    for (int g = 0; g < a->G; g++) {
        if (settings->kind == DGQA_DIFF || a->windows[l] == 0) out[g] = n[g];
        else out[g] = settings->beta * history[g] + (1 - settings->beta) * n[g];
    }
}

// The weights of layer l for the statistic n (G). Returns 0 where there are none and the map stays: the differences of dgqa
// need a window before, and are no weights where nothing differs.
static inline int allocation_weights(double* weights, const HeadAllocation* a, int l, const double* n) {
    const double* history = a->history + (size_t)l * a->G;
    if (!a->settings.dynamic) {
        weights_of_range(weights, n, a->G);
        return 1;
    }
    allocation_history(weights, a, l, n);
    if (a->settings.kind == DGQA_EMA) return 1;
    int any = 0;
    for (int g = 0; g < a->G && a->windows[l] > 0; g++) {
        weights[g] = fabs(n[g] - history[g]);
        any = any || weights[g] != 0;
    }
    return any;
}

static inline int all_finite(const double* values, int count) {
    for (int i = 0; i < count; i++)
        if (!isfinite(values[i])) return 0;
    return 1;
}

// Layer l's map for this step, from its statistic n (G). Where n is not finite the map stays, with one warning in a run.
static inline void allocation_update(HeadAllocation* a, int l, const double* n, int step) {
    if (!allocation_is_due(&a->settings, step)) return;
    double* weights = (double*)malloc_or_fail((size_t)a->G * sizeof(double), "weights of heads");
    int* heads = (int*)malloc_or_fail((size_t)a->G * sizeof(int), "an allocation of heads");
    if (!all_finite(n, a->G)) {
        if (!a->warned)
            fprintf(stderr,
                    "%s: warning: step %d, layer %d: the norm of the keys is not finite; query heads stay\n",
                    program_name, step + 1, l);
        a->warned = 1;
    } else if (allocation_weights(weights, a, l, n) &&
               allocate_heads(heads, weights, a->G, a->H, a->settings.least)) {
        allocation_set(a, l, heads);
    }
    free(weights);
    free(heads);
}

// Takes n (G) into the history of dgqa, once a window, after the maps of its step were made. What is not finite is left out.
static inline void allocation_remember(HeadAllocation* a, int l, const double* n, int step) {
    const AllocationSettings* settings = &a->settings;
    if (!settings->dynamic || !allocation_is_due(settings, step) || !all_finite(n, a->G)) return;
    allocation_history(a->history + (size_t)l * a->G, a, l, n);
    a->windows[l]++;
}

// The statistic of a step that is over: the mean over its sequences.
static inline void allocation_end_step(HeadAllocation* a,
                                       const double* sums, // (L, G) over the sequences
                                       long sequences) {
    for (int i = 0; i < a->L * a->G; i++) a->statistic[i] = sums[i] / (double)sequences;
    for (int l = 0; l < a->L; l++) a->measured[l] = 1;
}

// What stands in the place of the statistic with SOURCE_RANDOM, the same at every step, and SOURCE_SHUFFLED: uniform numbers.
static inline void allocation_random(double* n, // (G)
                                     const HeadAllocation* a, int l, int step) {
    const uint64_t draw = a->settings.source == SOURCE_SHUFFLED ? (uint64_t)step : 0;
    const uint64_t stream = random_stream("random map") + draw, first = (uint64_t)l * (uint64_t)a->G;
    for (int g = 0; g < a->G; g++) n[g] = random_uniform(a->settings.seed, stream, first + (uint64_t)g);
}

// Whether the keys of a training pass are measured.
static inline int allocation_needs_keys(const AllocationSettings* settings) {
    return settings->source == SOURCE_LAGGED || settings->source == SOURCE_FORWARD;
}

// Key/value heads of layer l that no query head reads.
static inline int allocation_empty(const HeadAllocation* a, int l) {
    int empty = 0;
    for (int g = 0; g < a->G; g++) empty += a->heads[(size_t)l * a->G + g] == 0;
    return empty;
}

#endif
