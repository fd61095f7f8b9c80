/*
The formulas of dev/bench/moba_counts.h against what the emulator counts while the kernels run: the same numbers, exactly, for sizes
that reach every branch. And what they say of lengths that the emulator cannot run.
*/
// count_work, count_floors
#include "dev/bench/moba_counts.h"
// fill_normal; cmocka
#include "test/numeric.h"

// ----------------------------------------------------------------------------
// Counted while the kernels run

struct StageCounters {
    LaunchObserver observer;
    simt::Counters begun;
    simt::Counters stages[NUM_STAGES];
};

static void before_launch(LaunchObserver* self, const void*, cudaStream_t) {
    ((StageCounters*)self)->begun = simt::counters;
}

static void after_launch(LaunchObserver* self, const void* kernel, cudaStream_t) {
    StageCounters* counters = (StageCounters*)self;
    const simt::Counters &begun = counters->begun, &now = simt::counters;
    const int stage = stage_of_kernel(simt::function_name(kernel));
    if (stage == NUM_STAGES) print_error("%s: of no stage\n", simt::function_name(kernel));
    assert_true(stage < NUM_STAGES);
    simt::Counters* sum = &counters->stages[stage];
    sum->launches += now.launches - begun.launches;
    sum->products += now.products - begun.products;
    sum->copied += now.copied - begun.copied;
    sum->loaded += now.loaded - begun.loaded;
    sum->stored += now.stored - begun.stored;
    sum->atomics += now.atomics - begun.atomics;
}

typedef struct {
    moba_shape_t shape;
    int sink; // every query's first choice is block 0
} Case;

static void* new_array(size_t bytes) { return device_malloc(bytes, "a test"); }

static floatX* random_rows(const Case* c, size_t heads, uint64_t seed) {
    const moba_shape_t* s = &c->shape;
    const size_t count = (size_t)s->B * s->T * heads * s->D, row = heads * s->D;
    floatX *host = new_floats(count), *device = (floatX*)new_array(count * sizeof(floatX));
    fill_normal(NULL, host, count, 1, seed);
    for (size_t i = 0; c->sink && i < count; i += s->D) {
        const int head = (int)(i % row / s->D), t = (int)(i / row % s->T);
        host[i] = (floatX)(head < s->H || t < s->S ? 16.0f : 0.0f);
    }
    copy_to_device(device, host, count * sizeof(floatX), 0);
    stream_synchronize(0);
    free(host);
    return device;
}

// Runs forward and backward; the lengths of the lists of all heads.
static int* run_counted(StageCounters* counters, const Case* c) {
    const moba_shape_t* s = &c->shape;
    const size_t heads = (size_t)s->B * s->H, rows = heads * s->T, blocks = (size_t)ceil_div(s->T, s->S);
    const size_t choices = moba_selected_count(s->B, s->T, s->H, s->K);
    floatX *qkv = random_rows(c, s->H + 2 * s->G, 1), *dout = random_rows(c, s->H, 2);
    floatX* out = (floatX*)new_array(rows * s->D * sizeof(floatX));
    floatX* dqkv = (floatX*)new_array((size_t)s->B * s->T * (s->H + 2 * s->G) * s->D * sizeof(floatX));
    float* lse = (float*)new_array(rows * sizeof(float));
    float* centroids = (float*)new_array(moba_centroids_count(s->B, s->T, s->G, s->D, s->S) * sizeof(float));
    int *selected = (int*)new_array(choices * sizeof(int)), *kv_of_q = (int*)new_array(s->H * sizeof(int));
    int* map = (int*)calloc_or_fail(s->H, sizeof(int), "a test");
    for (int h = 0; h < s->H; h++) map[h] = h * s->G / s->H;
    copy_to_device(kv_of_q, map, s->H * sizeof(int), 0);

    void* workspace = new_array(flashmoba_forward_workspace(s->B, s->T, s->H, s->G, s->D, s->S, s->K));
    memset(counters, 0, sizeof(*counters));
    counters->observer.before = before_launch, counters->observer.after = after_launch;
    launch_observer = &counters->observer;
    flashmoba_forward(out, lse, selected, centroids, qkv, kv_of_q, workspace, s->B, s->T, 0, s->H, s->G, s->D,
                      s->S, s->K, 0);
    device_free(workspace);
    workspace = new_array(flashmoba_backward_workspace(s->B, s->T, s->H, s->G, s->D, s->S, s->K));
    flashmoba_backward(dqkv, dout, out, lse, selected, qkv, kv_of_q, workspace, s->B, s->T, s->H, s->G, s->D,
                       s->S, s->K, 0);
    launch_observer = NULL;

    int* chosen = (int*)calloc_or_fail(choices + 1, sizeof(int), "a test");
    int* lengths = (int*)calloc_or_fail(heads * blocks, sizeof(int), "a test");
    copy_to_host(chosen, selected, choices * sizeof(int), 0);
    stream_synchronize(0);
    for (size_t head = 0; head < heads; head++) {
        int* of_head = lengths_of_selection(s, chosen + head * s->T * (s->K - 1));
        memcpy(lengths + head * blocks, of_head, blocks * sizeof(int));
        free(of_head);
    }
    free(map), free(chosen);
    device_free(qkv), device_free(dout), device_free(out), device_free(dqkv), device_free(lse);
    device_free(centroids), device_free(selected), device_free(kv_of_q), device_free(workspace);
    return lengths;
}

static int differs(const char* what, int stage, const moba_shape_t* s, uint64_t counted, double formula) {
    if ((double)counted == formula) return 0;
    print_error("%s, %s: %llu counted, %.3f by formula: B %d T %d H %d G %d D %d S %d K %d\n",
                stage_names[stage], what, (unsigned long long)counted, formula, s->B, s->T, s->H, s->G, s->D,
                s->S, s->K);
    return 1;
}

static void check_case(const Case* c) {
    StageCounters counters;
    Work works[NUM_STAGES];
    int* lengths = run_counted(&counters, c);
    count_work(works, &c->shape, lengths, c->shape.B * c->shape.H);
    int differences = 0;
    for (int i = 0; i < NUM_STAGES; i++) {
        const simt::Counters* counted = &counters.stages[i];
        const Work* formula = &works[i];
        differences += differs("launches", i, &c->shape, counted->launches, formula->launches);
        differences += differs("products", i, &c->shape, counted->products, formula->products);
        differences += differs("bytes copied", i, &c->shape, counted->copied, formula->copied);
        differences += differs("bytes loaded", i, &c->shape, counted->loaded, formula->loaded);
        differences += differs("bytes stored", i, &c->shape, counted->stored, formula->stored);
        differences += differs("atomics", i, &c->shape, counted->atomics, formula->atomics);
    }
    if (c->sink && c->shape.K > 1) assert_int_equal(lengths[0], c->shape.T);
    assert_int_equal(differences, 0);
    free(lengths);
}

static void formulas_are_what_is_counted(void** state) {
    (void)state;
    static const Case cases[] = {
        {{1, 256, 0, 2, 2, 64, 32, 4}, 0},   // whole blocks and tiles
        {{2, 333, 0, 4, 2, 64, 64, 3}, 0},   // the last block and the last tiles lack rows; GQA
        {{1, 200, 0, 3, 1, 128, 16, 8}, 0},  // small blocks, many choices
        {{1, 700, 0, 1, 1, 32, 256, 2}, 0},  // blocks of two parts
        {{1, 600, 0, 2, 2, 32, 512, 3}, 0},  // the last block has a part without keys
        {{1, 1300, 0, 1, 1, 32, 128, 5}, 1}, // a block that everyone chooses: two items
        {{1, 100, 0, 2, 2, 128, 128, 4}, 0}, // one block, not complete
        {{1, 1, 0, 1, 1, 64, 16, 2}, 0},     // one token
        {{2, 130, 0, 2, 2, 64, 64, 1}, 0},   // no choice
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) check_case(&cases[i]);
}

// With little workspace heads go one by one.
static void groups_of_heads(void** state) {
    (void)state;
    const size_t bound = moba_workspace_bound;
    const Case c = {{2, 150, 0, 3, 3, 32, 32, 3}, 0};
    moba_workspace_bound = 1;
    check_case(&c);
    moba_workspace_bound = bound;
}

// ----------------------------------------------------------------------------
// What they say

static const moba_shape_t LONG = {1, 1 << 16, 0, 1, 1, 128, 128, 8};

// Every query has K choices, as soon as there are so many blocks.
static void drawn_lists(void** state) {
    (void)state;
    const moba_shape_t s = {1, 2000, 0, 1, 1, 64, 32, 6};
    const int blocks = ceil_div(s.T, s.S);
    int expected = 0, by_equal_chance = 0;
    for (int t = 0; t < s.T; t++) expected += 1 + least(t / s.S, s.K - 1);
    for (int draw = 0; draw < NUM_DRAWS; draw++) {
        int *lengths = drawn_lengths(&s, (Draw)draw, 3), total = 0;
        for (int i = 0; i < blocks; i++) total += lengths[i];
        assert_int_equal(total, expected);
        if (draw == DRAW_SINK) assert_int_equal(lengths[0], s.T);
        if (draw == DRAW_OLDEST)
            for (int i = 0; i < s.K - 1; i++) assert_int_equal(lengths[i], s.T - i * s.S);
        // An old block is chosen less when near ones are preferred.
        if (draw == DRAW_UNIFORM) by_equal_chance = lengths[1];
        if (draw == DRAW_RECENT) assert_true(lengths[1] < by_equal_chance * 3 / 4);
        free(lengths);
    }
}

static double routed_forward_of_floor(Draw draw) {
    int* lengths = drawn_lengths(&LONG, draw, 1);
    Work works[NUM_STAGES];
    count_work(works, &LONG, lengths, 1);
    const Floors floors = count_floors(&LONG, lengths, 1);
    free(lengths);
    return (bytes_read(&works[FORWARD]) + bytes_written(&works[FORWARD])) / floors.forward;
}

// The routed forward at 64K tokens moves little more than it must, the own block's choice included.
static void routed_forward_is_near_its_floor(void** state) {
    (void)state;
    for (int draw = 0; draw < NUM_DRAWS; draw++) {
        const double ratio = routed_forward_of_floor((Draw)draw);
        if (!(ratio > 1 && ratio <= 1.3)) print_error("%s: %.3f of the floor\n", draw_names[draw], ratio);
        assert_true(ratio > 1 && ratio <= 1.3);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(formulas_are_what_is_counted),
        cmocka_unit_test(groups_of_heads),
        cmocka_unit_test(drawn_lists),
        cmocka_unit_test(routed_forward_is_near_its_floor),
    };
    program_name = "test_moba_counts";
    return cmocka_run_group_tests(tests, NULL, NULL);
}
