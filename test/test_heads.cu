/*
Compares kernels/heads.cuh with the functions of runtime/allocation.h on the host, with the same numbers:
after every call the whole state must have the same bits. It tests every source and kind over many steps, with
ordinary statistics and others (ties, zeros, very small or large numbers, NaN, Inf). It runs on the emulator
and on a GPU, where it also shows that host and device calculate alike.
*/
#include "kernels/heads.cuh"
// cmocka
#include "test/numeric.h"

static const int STEPS = getenv("TEST_LONG") ? 40 : 9;

// ----------------------------------------------------------------------------
// The same state twice

enum { GUARD = 64 }; // bytes after the block, which nobody may touch

typedef struct {
    HeadAllocation host, device;
    size_t bytes;
    float* host_numbers;   // (rows, G) sums or norms
    float* device_numbers; // the same
    char words[128];       // what it is
} Twins;

static Twins new_twins(const AllocationSettings* settings, int L, int H, int G, int rows) {
    Twins twins;
    allocation_start(&twins.host, *settings, L, H, G);
    twins.bytes = allocation_bytes(L, H, G);
    void* block = device_malloc(twins.bytes + GUARD, "a test"); // zeroed
    copy_to_device(block, twins.host.block, twins.bytes, 0);
    twins.device = allocation_at(block, *settings, L, H, G);
    const size_t numbers = (size_t)rows * G * sizeof(float);
    twins.host_numbers = (float*)calloc_or_fail(1, numbers, "a test");
    twins.device_numbers = (float*)device_malloc(numbers, "a test");
    snprintf(twins.words, sizeof(twins.words),
             "L %d H %d G %d least %d, dynamic %d, source %s, kind %s, window %d", L, H, G, settings->least,
             settings->dynamic, statistic_source_names[settings->source], dgqa_kind_names[settings->kind],
             settings->window);
    return twins;
}

static void free_twins(Twins* twins) {
    allocation_free(&twins->host);
    free(twins->host_numbers);
    device_free(twins->device.block);
    device_free(twins->device_numbers);
}

static void upload_numbers(const Twins* twins, int rows) {
    copy_to_device(twins->device_numbers, twins->host_numbers, (size_t)rows * twins->host.G * sizeof(float),
                   0);
}

static void must_be_same(const char* what, const Twins* twins, int step, const void* a, const void* b,
                         size_t bytes) {
    if (memcmp(a, b, bytes) != 0) print_error("step %d, %s: %s\n", step, what, twins->words);
    assert_memory_equal(a, b, bytes);
}

// What the device holds; free(block) ends it.
static HeadAllocation read_device(const Twins* twins) {
    const HeadAllocation* a = &twins->host;
    char* block = (char*)malloc_or_fail(twins->bytes + GUARD, "a test");
    copy_to_host(block, twins->device.block, twins->bytes + GUARD, 0);
    stream_synchronize(0);
    for (size_t i = twins->bytes; i < twins->bytes + GUARD; i++) assert_int_equal(block[i], 0);
    return allocation_at(block, a->settings, a->L, a->H, a->G);
}

// All arrays but the scratch.
static void compare(const Twins* twins, int step) {
    const HeadAllocation *a = &twins->host, b = read_device(twins);
    const size_t layers = (size_t)a->L, groups = layers * a->G, heads = layers * a->H;
    // What is not a number has other bits on a GPU.
    for (size_t i = 0; i < groups; i++)
        if (isnan(a->statistic[i]) && isnan(b.statistic[i])) b.statistic[i] = a->statistic[i];
    must_be_same("statistic", twins, step, b.statistic, a->statistic, groups * sizeof(double));
    must_be_same("history", twins, step, b.history, a->history, groups * sizeof(double));
    must_be_same("moved", twins, step, b.moved, a->moved, layers * sizeof(long));
    must_be_same("counted", twins, step, b.counted, a->counted, heads * sizeof(int));
    must_be_same("heads", twins, step, b.heads, a->heads, groups * sizeof(int));
    must_be_same("map", twins, step, b.map, a->map, heads * sizeof(int));
    must_be_same("measured", twins, step, b.measured, a->measured, layers * sizeof(int));
    must_be_same("windows", twins, step, b.windows, a->windows, layers * sizeof(int));
    must_be_same("not finite", twins, step, b.not_finite, a->not_finite, layers * sizeof(int));
    free(b.block);
}

// ----------------------------------------------------------------------------
// Statistics, ordinary and not

enum { ORDINARY, TIES, SCALES, EQUAL, ZEROS, DOMINATED, TINY, NOT_FINITE, KINDS_OF_NUMBERS };

static double uniform(uint64_t i) { return random_uniform(3, random_stream("heads"), i); }

static void fill_row(float* row, int G, uint64_t draw) {
    const int kind = (int)(uniform(draw) * KINDS_OF_NUMBERS);
    const int odd = (int)(uniform(draw + 1) * G);
    for (int g = 0; g < G; g++) {
        const double u = uniform(draw + 2 + (uint64_t)g);
        row[g] = kind == TIES     ? floorf((float)(4 * u))
                 : kind == SCALES ? expf((float)(60 * u - 30))
                 : kind == EQUAL  ? 0.7f
                 : kind == ZEROS  ? 0
                 : kind == TINY   ? (float)(u * 1e-44)
                                  : (float)(1 + 0.1 * u);
    }
    if (kind == DOMINATED) row[odd] = 1e30f;
    if (kind == NOT_FINITE) row[odd] = uniform(draw + 1) < 0.5 ? NAN : INFINITY;
}

static void fill_numbers(const Twins* twins, int rows, int step) {
    const int G = twins->host.G;
    for (int row = 0; row < rows; row++)
        fill_row(twins->host_numbers + (size_t)row * G, G, ((uint64_t)step << 32) + (uint64_t)row * 4096);
    upload_numbers(twins, rows);
}

// ----------------------------------------------------------------------------
// Steps, as the trainer makes them

static void measure(const Twins* twins, long sequences, int step) {
    const HeadAllocation* a = &twins->host;
    for (int l = 0; l < a->L; l++)
        allocation_measure(a, l, twins->host_numbers + (size_t)l * a->G, sequences, step);
    heads_measure(&twins->device, twins->device_numbers, sequences, step, 0);
    compare(twins, step);
}

static void begin_step(const Twins* twins, int step) {
    for (int l = 0; l < twins->host.L; l++) allocation_begin_step(&twins->host, l, step);
    heads_begin_step(&twins->device, step, 0);
    compare(twins, step);
}

// Of batches of three sequences, on two ranks.
static void maps_of_batches(const Twins* twins, int step) {
    enum { B = 3, SEQUENCES = 6 };
    const int L = twins->host.L;
    for (int l = 0; l < L; l++) {
        fill_numbers(twins, B, step * L + l);
        allocation_of_batch(&twins->host, l, twins->host_numbers, B, SEQUENCES, step);
        heads_of_batch(&twins->device, l, twins->device_numbers, B, SEQUENCES, step, 0);
    }
    compare(twins, step);
}

// Returns how many query heads have moved.
static long run_steps(const AllocationSettings* settings, int L, int H, int G, int steps) {
    const int rows = L > 3 ? L : 3;
    Twins twins = new_twins(settings, L, H, G, rows);
    for (int step = 0; step < steps; step++) {
        if (settings->source == SOURCE_WEIGHTS) {
            fill_numbers(&twins, L, step);
            measure(&twins, 1, step);
        }
        if (settings->source == SOURCE_FORWARD) maps_of_batches(&twins, step);
        else begin_step(&twins, step);
        if (!allocation_needs_keys(settings)) continue;
        fill_numbers(&twins, L, step);
        measure(&twins, 40, step);
    }
    long moved = 0;
    for (int l = 0; l < L; l++) moved += twins.host.moved[l];
    free_twins(&twins);
    return moved;
}

static const struct {
    int L, H, G, least;
} sizes[] = {
    {1, 8, 4, 0},   {3, 7, 1, 1}, // one group
    {2, 6, 6, 1},                 // a head for each: nothing can move
    {33, 10, 4, 1},               // H no multiple of G, layers of two warps
    {70, 32, 8, 2}, {12, 16, 16, 0}, {2, 64, 40, 0},
};

static void test_every_source_and_kind(void** state) {
    (void)state;
    for (int source = 0; source < STATISTIC_SOURCES; source++) {
        for (int kind = 0; kind < 3; kind++) {
            AllocationSettings settings = allocation_defaults(kind > 0);
            settings.source = (StatisticSource)source;
            settings.kind = kind == 2 ? DGQA_DIFF : DGQA_EMA;
            settings.seed = 12;
            long total = 0;
            for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
                settings.window = 1 + (int)i % 3;
                settings.least = sizes[i].least;
                const long moved = run_steps(&settings, sizes[i].L, sizes[i].H, sizes[i].G, STEPS);
                if (sizes[i].least * sizes[i].G == sizes[i].H || sizes[i].G == 1) assert_int_equal(moved, 0);
                total += moved;
            }
            // The same random numbers at every step never differ.
            assert_int_equal(total > 0, source != SOURCE_RANDOM || settings.kind != DGQA_DIFF);
        }
    }
}

// Worked out by hand, without the host's functions.
static void test_oracle(void** state) {
    (void)state;
    AllocationSettings settings = allocation_defaults(0);
    settings.least = 0;
    Twins twins = new_twins(&settings, 2, 8, 4, 2);
    const float sums[8] = {4, 8, 12, 16, 8, 6, 4, 2};
    memcpy(twins.host_numbers, sums, sizeof(sums));
    upload_numbers(&twins, 2);
    heads_measure(&twins.device, twins.device_numbers, 4, 0, 0);
    heads_begin_step(&twins.device, 1, 0);
    const HeadAllocation got = read_device(&twins);
    const int heads[8] = {0, 1, 3, 4, 4, 3, 1, 0};
    const int map[16] = {1, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 2};
    const double statistic[8] = {1, 2, 3, 4, 2, 1.5, 1, 0.5};
    const long moved[2] = {6, 6}; // from 0,0,1,1,2,2,3,3
    assert_memory_equal(got.heads, heads, sizeof(heads));
    assert_memory_equal(got.map, map, sizeof(map));
    assert_memory_equal(got.statistic, statistic, sizeof(statistic));
    assert_memory_equal(got.moved, moved, sizeof(moved));
    free(got.block);
    free_twins(&twins);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_source_and_kind),
        cmocka_unit_test(test_oracle),
    };
    return cmocka_run_group_tests_name("heads by keys on the device", tests, NULL, NULL);
}
