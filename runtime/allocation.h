/*
The KV head that each query head reads (docs/math.md section 3; Khan et al., "Beyond Uniform Query
Distribution", arXiv 2408.08454). A statistic of the keys gives weights, weights give an allocation, and an
allocation gives a map.

    HeadAllocation heads;
    allocation_start(&heads, settings, L, H, G);             // uniform: H/G query heads for each KV head
    allocation_begin_step(&heads, l, step);                  // the map of layer l, from the last statistic
    allocation_measure(&heads, l, sums, sequences, step);    // the statistic of this step, for later steps
    const int* kv_of_q = heads.map + l * H;                  // the map that attention takes

The allocation of a layer, (G), holds the number of query heads of each KV head; its sum is H. The map, (H),
holds the KV head of each query head and never decreases.

The functions for one layer are written once, for the host and for kernels (dev/cpu/heads.h,
kernels/heads.cuh). They allocate nothing, print nothing and read no other layer. They compute in double from
their arguments alone, so that every rank and device gets the same bits from the same numbers. Two rules serve
this. A product plus a number is always an explicit fma(), since a compiler may fuse the two or not. A share
is converted to float before it is rounded, so that two shares that differ only by the rounding of doubles
become an exact tie.
*/
#ifndef RUNTIME_ALLOCATION_H
#define RUNTIME_ALLOCATION_H

#include <assert.h>
#include <math.h>
#include "runtime/checks.h"
#include "runtime/precision.h"
#include "runtime/random.h" // defines HOST_AND_DEVICE

// ----------------------------------------------------------------------------
// From weights to an allocation

// As even as possible; the first H % G groups get one more.
HOST_AND_DEVICE static inline void allocate_uniform(int* heads, int G, int H) {
    for (int g = 0; g < G; g++) heads[g] = H / G + (g < H % G);
}

HOST_AND_DEVICE static inline int first_largest(const int* values, int count) {
    int at = 0;
    for (int i = 1; i < count; i++) at = values[i] > values[at] ? i : at;
    return at;
}

HOST_AND_DEVICE static inline int first_smallest(const int* values, int count) {
    int at = 0;
    for (int i = 1; i < count; i++) at = values[i] < values[at] ? i : at;
    return at;
}

// Allocates H query heads in proportion to the weights, at least `least` to every group
// (least * G <= H). Weights must not be negative. Returns 0, and leaves `heads` as it
// is, if a weight is NaN or infinite; else 1.
HOST_AND_DEVICE static inline int allocate_heads(int* heads,            // (G)
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

// weights[g] = (n[g] - min n) / (max n - min n). A shift or a positive scale of n changes nothing. If all n
// are equal, all weights are 0; if an n is not finite, all weights are NaN.
HOST_AND_DEVICE static inline void weights_of_range(double* weights, const double* n, int G) {
    double low = n[0], high = n[0];
    for (int g = 0; g < G; g++) {
        if (!isfinite(n[g])) low = NAN;
        low = n[g] < low ? n[g] : low;
        high = n[g] > high ? n[g] : high;
    }
    for (int g = 0; g < G; g++) weights[g] = high > low || isnan(low) ? (n[g] - low) / (high - low) : 0;
}

// ----------------------------------------------------------------------------
// A model's allocations, and their sources

// Random and shuffled are controls: maps as uneven as the others, but from random numbers, not from keys.
// They are drawn once (random) or at every step (shuffled).
typedef enum {
    SOURCE_LAGGED,
    SOURCE_FORWARD,
    SOURCE_WEIGHTS,
    SOURCE_RANDOM,
    SOURCE_SHUFFLED,
    STATISTIC_SOURCES
} StatisticSource;
typedef enum { DGQA_EMA, DGQA_DIFF } DgqaKind;
static const char* const statistic_source_names[] = {"lagged", "forward",  "weights",
                                                     "random", "shuffled", NULL};
static const char* const dgqa_kind_names[] = {"ema", "diff", NULL};

typedef struct {
    int dynamic; // 0: kdgqa, from the range of n at every step; 1: dgqa, from n's history at every window
    StatisticSource source; // of n
    DgqaKind kind;          // dgqa: a running average, or the change since the last window
    int window;             // dgqa: steps
    double beta;            // dgqa: factor of the old average at a window
    int least;              // smallest number of query heads of a KV head
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

// The state that later steps depend on. The arrays are parts of one block, in host or device memory. A
// checkpoint holds all arrays except `map` and the last three. `map` follows from `heads`, and `counted`
// equals `map` at the end of a step.
typedef struct {
    AllocationSettings settings;
    int L, H, G;
    void* block;
    double* statistic; // (L, G) n of the last step
    double* history;   // (L, G) dgqa: the running average, or n of the last window
    long* moved;       // (L) how often a step gave a query head another KV head than the step before
    int* heads;        // (L, G) the allocation
    int* map;          // (L, H) the map, from the allocation
    int* measured;     // (L) 1: `statistic` holds a step's; 0: no step has ended yet
    int* windows;      // (L) number of windows whose n is in `history`; 0: it is empty
    int* counted;      // (L, H) the map of the last step that `moved` has counted
    int* not_finite;   // (L) 1 + the first step whose n was not finite; 0: n was always finite
    double* weights;   // (L, G) scratch
} HeadAllocation;

static inline size_t allocation_bytes(int L, int H, int G) {
    const size_t layer =
        3 * (size_t)G * sizeof(double) + sizeof(long) + ((size_t)G + 2 * (size_t)H + 3) * sizeof(int);
    return (size_t)L * layer;
}

// An allocation whose arrays are in `block`, which has allocation_bytes() bytes.
static inline HeadAllocation allocation_at(void* block, AllocationSettings settings, int L, int H, int G) {
    HeadAllocation a;
    const size_t groups = (size_t)L * G;
    a.settings = settings;
    a.L = L;
    a.H = H;
    a.G = G;
    a.block = block;
    a.statistic = (double*)block;
    a.history = a.statistic + groups;
    a.weights = a.history + groups;
    a.moved = (long*)(a.weights + groups);
    a.heads = (int*)(a.moved + L);
    a.map = a.heads + groups;
    a.measured = a.map + (size_t)L * H;
    a.windows = a.measured + L;
    a.counted = a.windows + L;
    a.not_finite = a.counted + (size_t)L * H;
    return a;
}

static inline void allocation_start(HeadAllocation* a, AllocationSettings settings, int L, int H, int G) {
    *a = allocation_at(calloc_or_fail(1, allocation_bytes(L, H, G), "the allocation of heads"), settings, L,
                       H, G);
    for (int l = 0; l < L; l++) {
        allocate_uniform(a->heads + (size_t)l * G, G, H);
        map_from_allocation(a->map + (size_t)l * H, a->heads + (size_t)l * G, G);
    }
    memcpy(a->counted, a->map, (size_t)L * H * sizeof(int));
}

static inline void allocation_free(HeadAllocation* a) { free(a->block); }

// ----------------------------------------------------------------------------
// The work of a step for one layer

// Makes the map of layer l from its allocation.
HOST_AND_DEVICE static inline void allocation_apply(const HeadAllocation* a, int l) {
    const int* heads = a->heads + (size_t)l * a->G;
    int* map = a->map + (size_t)l * a->H;
    for (int g = 0, h = 0; g < a->G; g++) {
        for (const int end = h + heads[g]; h < end; h++) map[h] = g;
    }
}

// Counts the query heads that moved. Call it once a step, after the step's last map:
// maps between two micro-batches do not count.
HOST_AND_DEVICE static inline void allocation_count_moves(const HeadAllocation* a, int l) {
    const int* map = a->map + (size_t)l * a->H;
    int* counted = a->counted + (size_t)l * a->H;
    for (int h = 0; h < a->H; h++) {
        a->moved[l] += map[h] != counted[h];
        counted[h] = map[h];
    }
}

// dgqa takes a new map at the steps 0, W, 2W, ...; kdgqa at every step.
HOST_AND_DEVICE static inline int allocation_is_due(const AllocationSettings* settings, int step) {
    return !settings->dynamic || step % settings->window == 0;
}

// Computes dgqa's new history (G) at a window whose statistic is n: the running average, which starts at the
// first n (ema), or n itself (diff).
HOST_AND_DEVICE static inline void allocation_history(double* out, const HeadAllocation* a, int l,
                                                      const double* n) {
    const AllocationSettings* settings = &a->settings;
    const double* history = a->history + (size_t)l * a->G;
    for (int g = 0; g < a->G; g++) {
        if (settings->kind == DGQA_DIFF || a->windows[l] == 0) out[g] = n[g];
        else out[g] = fma(settings->beta, history[g], (1 - settings->beta) * n[g]);
    }
}

// Computes the weights of layer l from the statistic n (G). Returns 0 if there are none and the map stays:
// dgqa's differences need an earlier window, and at least one must not be 0.
HOST_AND_DEVICE static inline int allocation_weights(double* weights, const HeadAllocation* a, int l,
                                                     const double* n) {
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

HOST_AND_DEVICE static inline int all_finite(const double* values, int count) {
    for (int i = 0; i < count; i++)
        if (!isfinite(values[i])) return 0;
    return 1;
}

// Makes layer l's map for this step from its statistic n (G). If n is not finite, the map stays.
HOST_AND_DEVICE static inline void allocation_update(const HeadAllocation* a, int l, const double* n,
                                                     int step) {
    double* weights = a->weights + (size_t)l * a->G;
    if (!allocation_is_due(&a->settings, step)) return;
    if (!all_finite(n, a->G)) {
        if (a->not_finite[l] == 0) a->not_finite[l] = step + 1;
    } else if (allocation_weights(weights, a, l, n) &&
               allocate_heads(a->heads + (size_t)l * a->G, weights, a->G, a->H, a->settings.least)) {
        allocation_apply(a, l);
    }
}

// Adds n (G) to dgqa's history, once a window, after the maps of its step were
// made. It skips an n that is not finite.
HOST_AND_DEVICE static inline void allocation_remember(const HeadAllocation* a, int l, const double* n,
                                                       int step) {
    const AllocationSettings* settings = &a->settings;
    if (!settings->dynamic || !allocation_is_due(settings, step) || !all_finite(n, a->G)) return;
    allocation_history(a->history + (size_t)l * a->G, a, l, n);
    a->windows[l]++;
}

// The statistic with SOURCE_RANDOM (the same numbers at every step) and
// SOURCE_SHUFFLED (new ones): uniform random numbers.
HOST_AND_DEVICE static inline void allocation_random(double* n, // (G)
                                                     const HeadAllocation* a, int l, int step) {
    const uint64_t draw = a->settings.source == SOURCE_SHUFFLED ? (uint64_t)step : 0;
    const uint64_t stream = random_stream("random map") + draw, first = (uint64_t)l * (uint64_t)a->G;
    for (int g = 0; g < a->G; g++) n[g] = random_uniform(a->settings.seed, stream, first + (uint64_t)g);
}

// At the start of a step: makes the map of layer l from the last statistic or from random numbers.
HOST_AND_DEVICE static inline void allocation_begin_step(const HeadAllocation* a, int l, int step) {
    const StatisticSource source = a->settings.source;
    double* n = a->statistic + (size_t)l * a->G;
    if (source == SOURCE_RANDOM || source == SOURCE_SHUFFLED) {
        allocation_random(n, a, l, step);
        a->measured[l] = 1;
    }
    if (!a->measured[l]) return;
    allocation_update(a, l, n, step);
    allocation_count_moves(a, l);
    allocation_remember(a, l, n, step);
}

// Within a forward pass, with SOURCE_FORWARD: makes the map of layer l from this batch
// alone. `norms` holds the statistics of its sequences. If they are sums over ranks,
// `sequences` counts the sequences of all ranks.
HOST_AND_DEVICE static inline void allocation_of_batch(const HeadAllocation* a, int l,
                                                       const float_acc* norms, // (B, G)
                                                       int B, long sequences, int step) {
    double* n = a->statistic + (size_t)l * a->G;
    for (int g = 0; g < a->G; g++) {
        double sum = 0;
        for (int b = 0; b < B; b++) sum += (double)norms[(size_t)b * a->G + g];
        n[g] = sum / (double)sequences;
    }
    allocation_update(a, l, n, step);
}

// At the end of a step: computes its statistic, the mean over its sequences. With SOURCE_FORWARD, it also
// counts the moves and updates the history, since allocation_of_batch() does neither.
HOST_AND_DEVICE static inline void allocation_measure(const HeadAllocation* a, int l,
                                                      const float_acc* sums, // (G) over the sequences
                                                      long sequences, int step) {
    double* n = a->statistic + (size_t)l * a->G;
    for (int g = 0; g < a->G; g++) n[g] = (double)sums[g] / (double)sequences;
    a->measured[l] = 1;
    if (a->settings.source != SOURCE_FORWARD) return;
    allocation_count_moves(a, l);
    allocation_remember(a, l, n, step);
}

// ----------------------------------------------------------------------------
// Functions for the host

// Whether a training pass must measure its keys.
static inline int allocation_needs_keys(const AllocationSettings* settings) {
    return settings->source == SOURCE_LAGGED || settings->source == SOURCE_FORWARD;
}

// KV heads of layer l that no query head reads.
static inline int allocation_empty(const HeadAllocation* a, int l) {
    int empty = 0;
    for (int g = 0; g < a->G; g++) empty += a->heads[(size_t)l * a->G + g] == 0;
    return empty;
}

// Prints one warning in a run, for the first n that was not finite.
static inline void allocation_warn(int* warned, const int* not_finite, int L) {
    int first = 0;
    for (int l = 1; l < L; l++)
        if (not_finite[l] && (!not_finite[first] || not_finite[l] < not_finite[first])) first = l;
    if (*warned || !not_finite[first]) return;
    *warned = 1;
    fprintf(stderr, "%s: warning: step %d, layer %d: the norm of the keys is not finite; query heads stay\n",
            program_name, not_finite[first], first);
}

#endif
