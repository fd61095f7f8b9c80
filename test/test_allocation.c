/*
Tests the allocation of query heads to KV heads: the table of docs/math.md section 3, calculated by hand;
properties that hold for every input; and dgqa's history over many steps.
*/
#include "test/numeric.h"
#include "test/capture.h"
#include "runtime/allocation.h"

#define MOST 1024

// ----------------------------------------------------------------------------
// By hand

typedef struct {
    int G, H;
    double n[6];
    int free_range[6], ratio[6], least_one[6]; // kdgqa with min 0, ratios of n with min 0, kdgqa with min 1
} Oracle;

static const Oracle oracles[] = {
    {4, 8, {1, 2, 3, 4}, {0, 1, 3, 4}, {1, 2, 2, 3}, {1, 1, 3, 3}},
    {4, 8, {4, 3, 2, 1}, {4, 3, 1, 0}, {3, 2, 2, 1}, {3, 3, 1, 1}},
    {2, 8, {3, 7}, {0, 8}, {2, 6}, {1, 7}},
    {3, 6, {1, 2, 5}, {0, 1, 5}, {1, 2, 3}, {1, 1, 4}},
    {4, 12, {5, 5, 5, 6}, {0, 0, 0, 12}, {3, 3, 3, 3}, {1, 1, 1, 9}},
    {4, 8, {2, 2, 4, 4}, {0, 0, 4, 4}, {1, 1, 3, 3}, {1, 1, 3, 3}},
    {6, 12, {10, 11, 12, 13, 14, 15}, {0, 1, 2, 2, 3, 4}, {2, 2, 2, 2, 2, 2}, {1, 1, 2, 2, 3, 3}},
    {5, 10, {0, 1, 1, 1, 1}, {2, 2, 2, 2, 2}, {2, 2, 2, 2, 2}, {2, 2, 2, 2, 2}},
    // A missing query head goes to the first of the smallest groups.
    {3, 3, {2, 2, 11}, {0, 0, 3}, {1, 0, 2}, {1, 1, 1}},
    // Uniform: one group, one query head for each group, or equal numbers in all groups.
    {1, 7, {3}, {7}, {7}, {7}},
    {4, 4, {1, 2, 3, 4}, {0, 1, 1, 2}, {0, 1, 1, 2}, {1, 1, 1, 1}},
    {3, 8, {2, 2, 2}, {3, 3, 2}, {3, 3, 2}, {3, 3, 2}},
    {3, 8, {0, 0, 0}, {3, 3, 2}, {3, 3, 2}, {3, 3, 2}},
};

static void must_be(const char* what, const Oracle* oracle, const int* got, const int* want) {
    for (int g = 0; g < oracle->G; g++) {
        if (got[g] != want[g])
            print_error("%s, n = %g, %g, ...: group %d has %d heads, want %d\n", what, oracle->n[0],
                        oracle->n[1], g, got[g], want[g]);
        assert_int_equal(got[g], want[g]);
    }
}

static void test_oracles(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof(oracles) / sizeof(oracles[0]); i++) {
        const Oracle* oracle = &oracles[i];
        double weights[6];
        int heads[6];
        weights_of_range(weights, oracle->n, oracle->G);
        assert_int_equal(allocate_heads(heads, weights, oracle->G, oracle->H, 0), 1);
        must_be("kdgqa, min 0", oracle, heads, oracle->free_range);
        assert_int_equal(allocate_heads(heads, weights, oracle->G, oracle->H, 1), 1);
        must_be("kdgqa, min 1", oracle, heads, oracle->least_one);
        assert_int_equal(allocate_heads(heads, oracle->n, oracle->G, oracle->H, 0), 1);
        must_be("ratio", oracle, heads, oracle->ratio);
    }
}

static void test_map(void** state) {
    (void)state;
    const int heads[4] = {1, 1, 3, 3}, with_empty[5] = {0, 3, 0, 2, 0};
    const int want[8] = {0, 1, 2, 2, 2, 3, 3, 3}, want_with_empty[5] = {1, 1, 1, 3, 3};
    int map[8];
    map_from_allocation(map, heads, 4);
    assert_memory_equal(map, want, sizeof(want));
    map_from_allocation(map, with_empty, 5);
    assert_memory_equal(map, want_with_empty, sizeof(want_with_empty));
}

// ----------------------------------------------------------------------------
// Properties for every input

static double uniform(uint64_t stream, uint64_t i) { return random_uniform(11, stream, i); }

// Draws G, H, least and n of the i-th random problem. n has many scales, ties, zeros and outliers.
static void draw_problem(uint64_t i, int* G, int* H, int* least, double* n) {
    const int most = i % 50 == 0 ? MOST : i % 5 == 0 ? 64 : 16;
    *H = 1 + (int)(uniform(1, i) * most);
    *G = 1 + (int)(uniform(2, i) * *H);
    const int choices = *H / *G + 1;
    *least = (int)(uniform(3, i) * choices);
    const int kind = (int)(uniform(4, i) * 4);
    for (int g = 0; g < *G; g++) {
        uint64_t at = i * MOST + (uint64_t)g;
        n[g] = kind == 0   ? uniform(5, at)
               : kind == 1 ? floor(5 * uniform(5, at))
               : kind == 2 ? exp(20 * random_normal(11, 6, at))
                           : 1 + 0.01 * random_normal(11, 6, at);
    }
}

enum { PROBLEMS = 8000 };

static void must_be_valid(const int* heads, int G, int H, int least) {
    static int map[MOST];
    int sum = 0;
    for (int g = 0; g < G; g++) {
        assert_true(heads[g] >= least);
        sum += heads[g];
    }
    assert_int_equal(sum, H);
    map_from_allocation(map, heads, G);
    assert_true(map[0] >= 0 && map[H - 1] < G);
    for (int h = 1; h < H; h++) assert_true(map[h] >= map[h - 1]);
}

static void test_every_allocation_is_valid(void** state) {
    (void)state;
    static double n[MOST], weights[MOST];
    static int heads[MOST];
    for (uint64_t i = 0; i < PROBLEMS; i++) {
        int G, H, least;
        draw_problem(i, &G, &H, &least, n);
        assert_int_equal(allocate_heads(heads, n, G, H, least), 1);
        must_be_valid(heads, G, H, least);
        weights_of_range(weights, n, G);
        assert_int_equal(allocate_heads(heads, weights, G, H, least), 1);
        must_be_valid(heads, G, H, least);
    }
}

// Returns 1 if a share is so close to a half that the last digits of n decide its rounding.
static int is_near_a_tie(const double* weights, int G, int H) {
    double sum = 0;
    for (int g = 0; g < G; g++) sum += weights[g];
    for (int g = 0; g < G; g++) {
        double share = weights[g] / sum * H;
        if (fabs(share - floor(share) - 0.5) < 1e-5 && share != floor(share) + 0.5) return 1;
    }
    return 0;
}

static void test_scales_and_shifts_change_nothing(void** state) {
    (void)state;
    static double n[MOST], other[MOST], weights[MOST];
    static int heads[MOST], again[MOST];
    int compared = 0;
    for (uint64_t i = 0; i < PROBLEMS; i++) {
        int G, H, least;
        draw_problem(i, &G, &H, &least, n);
        const double scale = exp(10 * random_normal(11, 7, i));
        double high = 0;
        for (int g = 0; g < G; g++) high = n[g] > high ? n[g] : high;
        // A shift much larger than n would round n away.
        const double shift = high * uniform(8, i);
        if (!is_near_a_tie(n, G, H)) {
            for (int g = 0; g < G; g++) other[g] = scale * n[g];
            allocate_heads(heads, n, G, H, least);
            allocate_heads(again, other, G, H, least);
            assert_memory_equal(heads, again, (size_t)G * sizeof(int));
            compared++;
        }
        weights_of_range(weights, n, G);
        if (is_near_a_tie(weights, G, H)) continue;
        allocate_heads(heads, weights, G, H, least);
        for (int g = 0; g < G; g++) other[g] = scale * n[g] + scale * shift;
        weights_of_range(weights, other, G);
        allocate_heads(again, weights, G, H, least);
        assert_memory_equal(heads, again, (size_t)G * sizeof(int));
        compared++;
    }
    assert_true(compared > PROBLEMS);
}

// The order of the groups does not matter if rounding and repair never choose among equals. That needs
// distinct shares, and a repair that changes only counts that occur once. The test ensures the second by
// comparing only problems without a repair: their rounded shares sum to H and reach the minimum.
static void test_permutation_equivariance(void** state) {
    (void)state;
    static double n[MOST], permuted[MOST];
    static int heads[MOST], again[MOST];
    int compared = 0;
    for (uint64_t i = 0; i < PROBLEMS; i++) {
        int G, H, least, total = 0, reached = 1;
        double sum = 0;
        draw_problem(i, &G, &H, &least, n);
        for (int g = 0; g < G; g++) sum += n[g];
        for (int g = 0; g < G; g++) {
            int rounded =
                sum > 0 ? (int)nearbyintf((float)(n[g] / sum * H)) : -1; // sum 0: uniform, without shares
            total += rounded;
            reached = reached && rounded >= least;
        }
        if (total != H || !reached || is_near_a_tie(n, G, H)) continue;
        allocate_heads(heads, n, G, H, least);
        for (int g = 0; g < G; g++) permuted[g] = n[random_permutation(11, i, (uint64_t)g, (uint64_t)G)];
        allocate_heads(again, permuted, G, H, least);
        int all_equal = 1;
        for (int g = 1; g < G; g++) all_equal = all_equal && n[g] == n[0];
        for (int g = 0; g < G && !all_equal; g++)
            assert_int_equal(again[g], heads[random_permutation(11, i, (uint64_t)g, (uint64_t)G)]);
        compared++;
    }
    assert_true(compared > PROBLEMS / 20);
}

// A repair with distinct counts: if the groups are reversed, so is the allocation. Calculated by hand.
static void test_repair_without_ties_is_equivariant(void** state) {
    (void)state;
    const double n[3] = {0, 1, 9}, reversed[3] = {9, 1, 0};
    int heads[3], again[3];
    allocate_heads(heads, n, 3, 20, 1);
    allocate_heads(again, reversed, 3, 20, 1);
    const int want[3] = {1, 2, 17};
    assert_memory_equal(heads, want, sizeof(want));
    for (int g = 0; g < 3; g++) assert_int_equal(heads[g], again[2 - g]);
}

static void test_what_is_not_finite_keeps_the_allocation(void** state) {
    (void)state;
    const double bad[3] = {NAN, INFINITY, -INFINITY};
    for (int k = 0; k < 3; k++) {
        for (int at = 0; at < 3; at++) {
            double n[3] = {1, 2, 3}, weights[3];
            int heads[3] = {7, 0, 2};
            const int before[3] = {7, 0, 2};
            n[at] = bad[k];
            assert_int_equal(allocate_heads(heads, n, 3, 9, 1), 0);
            weights_of_range(weights, n, 3);
            assert_int_equal(allocate_heads(heads, weights, 3, 9, 1), 0);
            assert_memory_equal(heads, before, sizeof(before));
        }
    }
    const double equal[3] = {5, 5, NAN};
    double weights[3];
    weights_of_range(weights, equal, 3);
    for (int g = 0; g < 3; g++) assert_true(isnan(weights[g]));
}

// Numbers at the ends of the range of doubles must work like all others.
static void test_extreme_numbers(void** state) {
    (void)state;
    const double scales[4] = {1e308, 1e-308, 5e-324, 1e154};
    for (int k = 0; k < 4; k++) {
        const double n[2] = {scales[k], 0};
        int heads[2] = {0, 0};
        assert_int_equal(allocate_heads(heads, n, 2, 8, 1), 1);
        assert_int_equal(heads[0], 7);
        assert_int_equal(heads[1], 1);
    }
    const double large[4] = {1e308, 1e308, 1e308, 0.5e308};
    int heads[4];
    allocate_heads(heads, large, 4, 7, 0);
    const int want[4] = {2, 2, 2, 1};
    assert_memory_equal(heads, want, sizeof(want));
}

// ----------------------------------------------------------------------------
// Layers over time

static HeadAllocation start(int dynamic, DgqaKind kind, int window) {
    HeadAllocation a;
    AllocationSettings settings = allocation_defaults(dynamic);
    settings.kind = kind;
    settings.window = window;
    settings.least = 0;
    allocation_start(&a, settings, 2, 8, 4);
    return a;
}

static void step_with(HeadAllocation* a, int step, const double* n) {
    allocation_update(a, 1, n, step);
    allocation_count_moves(a, 1);
    allocation_remember(a, 1, n, step);
}

static void must_have(const HeadAllocation* a, int n0, int n1, int n2, int n3) {
    const int want[4] = {n0, n1, n2, n3}, uniform_layer[4] = {2, 2, 2, 2};
    assert_memory_equal(a->heads + 4, want, sizeof(want));
    assert_memory_equal(a->heads, uniform_layer, sizeof(want)); // the other layer has its own allocation
    int map[8];
    map_from_allocation(map, want, 4);
    assert_memory_equal(a->map + 8, map, sizeof(map));
}

static void test_kdgqa_follows_every_step(void** state) {
    (void)state;
    HeadAllocation a = start(0, DGQA_EMA, 3);
    static const double up[4] = {1, 2, 3, 4}, down[4] = {4, 3, 2, 1}, bad[4] = {1, NAN, 3, 4};
    must_have(&a, 2, 2, 2, 2);
    step_with(&a, 0, up);
    must_have(&a, 0, 1, 3, 4);
    assert_int_equal(a.moved[1], 6); // 0,0,1,1,2,2,3,3 becomes 1,2,2,2,3,3,3,3
    assert_int_equal(allocation_empty(&a, 1), 1);
    step_with(&a, 1, down);
    must_have(&a, 4, 3, 1, 0);
    step_with(&a, 2, bad);
    must_have(&a, 4, 3, 1, 0);
    step_with(&a, 3, bad); // the first occurrence is kept
    assert_int_equal(a.not_finite[1], 3);
    assert_int_equal(a.not_finite[0], 0);
    allocation_free(&a);
}

// The controls: the seed and the layer determine the numbers, and the step only if the source uses it.
static void test_random_numbers_as_the_source(void** state) {
    (void)state;
    HeadAllocation a = start(0, DGQA_EMA, 1);
    double first[4], again[4], other_layer[4], other_seed[4];
    double other_step[4];
    a.settings.source = SOURCE_SHUFFLED;
    allocation_random(other_step, &a, 0, 7);
    a.settings.source = SOURCE_RANDOM;
    allocation_random(first, &a, 0, 0);
    allocation_random(again, &a, 0, 7);
    allocation_random(other_layer, &a, 1, 0);
    a.settings.seed = 1;
    allocation_random(other_seed, &a, 0, 0);
    assert_memory_equal(first, again, sizeof(first));
    for (int g = 0; g < 4; g++) {
        assert_true(first[g] > 0 && first[g] < 1);
        assert_true(first[g] != other_layer[g] && first[g] != other_seed[g] && first[g] != other_step[g]);
    }
    allocation_free(&a);
}

// beta 0.9, window 2: the average starts with the first n, and ignores the steps between two windows.
static void test_dgqa_ema(void** state) {
    (void)state;
    HeadAllocation a = start(1, DGQA_EMA, 2);
    static const double up[4] = {1, 2, 3, 4}, down[4] = {401, 301, 201, 101}, bad[4] = {1, 2, INFINITY, 4};
    step_with(&a, 0, up);
    must_have(&a, 1, 2, 2, 3);
    step_with(&a, 1, down);
    must_have(&a, 1, 2, 2, 3);
    step_with(&a, 2, bad);
    must_have(&a, 1, 2, 2, 3);
    assert_int_equal(a.windows[1], 1);
    step_with(&a, 4, down); // 0.9 of the average, 0.1 of the new n: 41, 31.9, 22.8, 13.7 of 109.4
    must_have(&a, 3, 2, 2, 1);
    assert_true(fabs(a.history[4] - 41) < 1e-12 && fabs(a.history[7] - 13.7) < 1e-12);
    assert_int_equal(a.windows[1], 2);
    allocation_free(&a);
}

static void test_dgqa_diff(void** state) {
    (void)state;
    HeadAllocation a = start(1, DGQA_DIFF, 5);
    static const double first[4] = {1, 2, 3, 4}, second[4] = {2, 4, 6, 8}, third[4] = {2, 4, 6, 15};
    step_with(&a, 0, first);
    must_have(&a, 2, 2, 2, 2); // no earlier window exists
    step_with(&a, 5, second);  // 1, 2, 3, 4
    must_have(&a, 1, 2, 2, 3);
    step_with(&a, 10, second); // no difference
    must_have(&a, 1, 2, 2, 3);
    step_with(&a, 15, third); // only the last window counts
    must_have(&a, 0, 0, 0, 8);
    allocation_free(&a);
}

// Before the first step there is no statistic, and the map does not change. Later
// the map comes from the previous step.
static void test_lagged_maps(void** state) {
    (void)state;
    HeadAllocation a = start(0, DGQA_EMA, 1);
    static const float_acc sums[4] = {5, 6, 7, 8};
    allocation_begin_step(&a, 1, 0);
    must_have(&a, 2, 2, 2, 2);
    assert_int_equal(a.measured[1], 0);
    allocation_measure(&a, 1, sums, 4, 0);
    assert_int_equal(a.measured[0], 0);
    assert_int_equal(a.measured[1], 1);
    for (int g = 0; g < 4; g++) assert_true(a.statistic[4 + g] == (double)sums[g] / 4 && a.statistic[g] == 0);
    must_have(&a, 2, 2, 2, 2);
    allocation_begin_step(&a, 1, 1);
    must_have(&a, 0, 1, 3, 4);
    allocation_free(&a);
}

// A batch's map comes from the batch's mean. The history takes the mean of the step,
// only once, at the step's end.
static void test_maps_of_a_batch(void** state) {
    (void)state;
    HeadAllocation a = start(1, DGQA_EMA, 2);
    static const float_acc norms[8] = {1, 2, 4, 8, 3, 6, 8, 8}, sums[4] = {40, 30, 20, 10};
    a.settings.source = SOURCE_FORWARD;
    allocation_begin_step(&a, 1, 0);
    allocation_of_batch(&a, 1, norms, 2, 2, 0); // the mean is 2, 4, 6, 8
    must_have(&a, 1, 2, 2, 3);
    assert_int_equal(a.windows[1], 0);
    allocation_of_batch(&a, 1, norms, 1, 1, 0);
    must_have(&a, 1, 1, 2, 4);
    allocation_measure(&a, 1, sums, 10, 0);
    assert_int_equal(a.windows[1], 1);
    for (int g = 0; g < 4; g++) assert_true(a.history[4 + g] == 4 - g);
    allocation_of_batch(&a, 1, norms, 2, 2, 1); // between two windows
    allocation_measure(&a, 1, sums, 10, 1);
    must_have(&a, 1, 1, 2, 4);
    assert_int_equal(a.windows[1], 1);
    // At the next window: 0.9 of 4, 3, 2, 1, and 0.1 of 2, 4, 6, 8, which two ranks measured.
    static const float_acc of_two_ranks[4] = {4, 8, 12, 16};
    allocation_of_batch(&a, 1, of_two_ranks, 1, 2, 2); // 3.8, 3.1, 2.4, 1.7 of 11
    must_have(&a, 3, 2, 2, 1);
    assert_int_equal(a.windows[1], 1);
    allocation_free(&a);
}

// A move is a change from one step to the next, even if micro-batches in between had other maps.
static void test_moves_count_steps(void** state) {
    (void)state;
    HeadAllocation a = start(0, DGQA_EMA, 1);
    static const float_acc up[4] = {1, 2, 3, 4}, down[4] = {4, 3, 2, 1}, sums[4] = {40, 30, 20, 10};
    a.settings.source = SOURCE_FORWARD;
    for (int step = 0; step < 3; step++) {
        for (int batch = 0; batch < 5; batch++) {
            allocation_of_batch(&a, 1, batch % 2 ? down : up, 1, 1, step);
            assert_int_equal(a.moved[1], step ? 6 : 0);
        }
        must_have(&a, 0, 1, 3, 4);
        allocation_measure(&a, 1, sums, 10, step);
        assert_int_equal(a.moved[1], 6); // from 0,0,1,1,2,2,3,3 in the first step, unchanged later
    }
    allocation_of_batch(&a, 1, down, 1, 1, 3);
    allocation_measure(&a, 1, sums, 10, 3);
    assert_int_equal(a.moved[1], 6 + 8); // 1,2,2,2,3,3,3,3 becomes 0,0,0,0,1,1,1,2
    assert_int_equal(a.moved[0], 0);
    allocation_free(&a);
}

// A run prints one warning, with its step and layer, however often the event occurs.
static void warn_twice(void* nothing) {
    (void)nothing;
    const int fine[3] = {0, 0, 0}, bad[3] = {0, 8, 7}, worse[3] = {9, 8, 7};
    int warned = 0;
    allocation_warn(&warned, fine, 3);
    allocation_warn(&warned, bad, 3);
    allocation_warn(&warned, worse, 3);
}

static void test_one_warning(void** state) {
    (void)state;
    struct Captured captured = capture(warn_twice, NULL);
    assert_int_equal(captured.exit_code, 0);
    assert_non_null(strstr(captured.text, "step 7, layer 2"));
    assert_ptr_equal(strchr(captured.text, '\n'), captured.text + strlen(captured.text) - 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_oracles),
        cmocka_unit_test(test_map),
        cmocka_unit_test(test_every_allocation_is_valid),
        cmocka_unit_test(test_scales_and_shifts_change_nothing),
        cmocka_unit_test(test_permutation_equivariance),
        cmocka_unit_test(test_repair_without_ties_is_equivariant),
        cmocka_unit_test(test_what_is_not_finite_keeps_the_allocation),
        cmocka_unit_test(test_extreme_numbers),
        cmocka_unit_test(test_kdgqa_follows_every_step),
        cmocka_unit_test(test_random_numbers_as_the_source),
        cmocka_unit_test(test_dgqa_ema),
        cmocka_unit_test(test_dgqa_diff),
        cmocka_unit_test(test_lagged_maps),
        cmocka_unit_test(test_maps_of_a_batch),
        cmocka_unit_test(test_moves_count_steps),
        cmocka_unit_test(test_one_warning),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
