/*
Compares the formulas of dev/bench/moba_counts.h with the emulator's counters while the kernels run: the
numbers must be exactly equal, for sizes that reach every branch. It also checks the formulas for lengths that
the emulator cannot run.
*/
// count_work, count_floors
#include "dev/bench/moba_counts.h"
// keys_forward
#include "kernels/keys.cuh"
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
    AttentionShape shape;
    int kv_of_q[4];
    int sink; // every query's first choice is block 0
} Case;

static void* new_array(size_t bytes) { return device_malloc(bytes, "a test"); }

static floatX* random_rows(const Case* c, size_t heads, uint64_t seed) {
    const AttentionShape* s = &c->shape;
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

// Runs forward and backward; the selection of all heads.
static int* run_counted(StageCounters* counters, const Case* c) {
    const AttentionShape* s = &c->shape;
    const size_t rows = (size_t)s->B * s->H * s->T;
    const size_t choices = moba_selected_count(s->B, s->T, s->H, s->K);
    floatX *qkv = random_rows(c, s->H + 2 * s->G, 1), *dout = random_rows(c, s->H, 2);
    floatX* out = (floatX*)new_array(rows * s->D * sizeof(floatX));
    floatX* dqkv = (floatX*)new_array((size_t)s->B * s->T * (s->H + 2 * s->G) * s->D * sizeof(floatX));
    float* lse = (float*)new_array(rows * sizeof(float));
    float* centroids = (float*)new_array(moba_centroids_count(s->B, s->T, s->G, s->D, s->S) * sizeof(float));
    int *selected = (int*)new_array(choices * sizeof(int)), *kv_of_q = (int*)new_array(s->H * sizeof(int));
    copy_to_device(kv_of_q, c->kv_of_q, s->H * sizeof(int), 0);

    AttentionTensors x = {};
    x.out = out, x.lse = lse, x.selected = selected, x.centroids = centroids, x.qkv = qkv;
    x.kv_of_q = kv_of_q, x.dqkv = dqkv, x.dout = dout;
    x.workspace = new_array(flashmoba_forward_workspace(s));
    memset(counters, 0, sizeof(*counters));
    counters->observer.before = before_launch, counters->observer.after = after_launch;
    launch_observer = &counters->observer;
    keys_forward(qkv, NULL, centroids, NULL, NULL, s->B, s->T, 0, s->H, s->G, s->D, s->S, 0, 0);
    flashmoba_forward(&x, s, 0);
    device_free(x.workspace);
    x.workspace = new_array(flashmoba_backward_workspace(s));
    flashmoba_backward(&x, s, 0);
    launch_observer = NULL;

    int* chosen = (int*)calloc_or_fail(choices + 1, sizeof(int), "a test");
    copy_to_host(chosen, selected, choices * sizeof(int), 0);
    stream_synchronize(0);
    device_free(qkv), device_free(dout), device_free(out), device_free(dqkv), device_free(lse);
    device_free(centroids), device_free(selected), device_free(kv_of_q), device_free(x.workspace);
    return chosen;
}

static int differs(const char* what, int stage, const AttentionShape* s, uint64_t counted, double formula) {
    if ((double)counted == formula) return 0;
    print_error("%s, %s: %llu counted, %.3f by formula: B %d T %d H %d G %d D %d S %d K %d\n",
                stage_names[stage], what, (unsigned long long)counted, formula, s->B, s->T, s->H, s->G, s->D,
                s->S, s->K);
    return 1;
}

static void check_case(const Case* c) {
    StageCounters counters;
    Work works[NUM_STAGES];
    int* selected = run_counted(&counters, c);
    count_work(works, &c->shape, c->kv_of_q, selected, c->shape.B * c->shape.H);
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
    assert_int_equal(differences, 0);
    if (c->sink) assert_int_equal(selected[(size_t)c->shape.T * (c->shape.K - 1) - 1], 0);
    free(selected);
}

static void formulas_are_what_is_counted(void** state) {
    (void)state;
    static const Case cases[] = {
        {{1, 256, 0, 2, 2, 64, 0, 32, 4}, {0, 1}, 0}, // whole blocks and tiles
        {{2, 333, 0, 4, 2, 64, 0, 64, 3},
         {0, 0, 1, 1},
         0},                                              // the last block and the last tiles lack rows; GQA
        {{1, 200, 0, 3, 1, 128, 0, 16, 8}, {0, 0, 0}, 0}, // small blocks, many choices
        {{1, 150, 0, 4, 5, 32, 0, 16, 3}, {1, 1, 3, 3}, 0}, // KV heads that nobody reads
        {{1, 700, 0, 1, 1, 32, 0, 256, 2}, {0}, 0},         // blocks of two parts
        {{1, 600, 0, 2, 2, 32, 0, 512, 3}, {0, 1}, 0},      // the last block has a part without keys
        {{1, 1300, 0, 1, 1, 32, 0, 128, 5}, {0}, 1},        // a block that everyone chooses: two items
        {{1, 100, 0, 2, 2, 128, 0, 128, 4}, {0, 1}, 0},     // one block, not complete
        {{1, 1, 0, 1, 1, 64, 0, 16, 2}, {0}, 0},            // one token
        {{2, 130, 0, 2, 2, 64, 0, 64, 1}, {0, 1}, 0},       // no choice
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) check_case(&cases[i]);
}

// With little workspace heads go one by one, and piece by piece; with more, some together.
static void groups_of_heads(void** state) {
    (void)state;
    static const Case cases[] = {{{2, 150, 0, 3, 3, 32, 0, 32, 3}, {0, 1, 2}, 0},
                                 {{1, 900, 0, 4, 2, 32, 0, 64, 4}, {0, 0, 1, 1}, 0},
                                 {{1, 1100, 0, 2, 1, 32, 0, 16, 2}, {0, 0}, 1}};
    const size_t kept = moba_workspace_bound;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        for (int heads = 0; heads < 3; heads++) {
            moba_workspace_bound =
                heads ? flashmoba_group_bytes(&cases[i].shape, heads, cases[i].shape.T, 1) : 1;
            check_case(&cases[i]);
        }
    moba_workspace_bound = kept;
}

// A piece of a head, not the last, in which a list is long enough for two items.
static void pieces_with_two_items(void** state) {
    (void)state;
    const Case c = {{1, 2 * 1280, 0, 1, 1, 32, 0, 16, 2}, {0}, 1};
    const size_t kept = moba_workspace_bound;
    moba_workspace_bound = flashmoba_group_bytes(&c.shape, 1, c.shape.T / 2, 1);
    assert_int_equal(flashmoba_group_size(&c.shape, 1).queries, c.shape.T / 2);
    check_case(&c);
    moba_workspace_bound = kept;
}

// ----------------------------------------------------------------------------
// What they say

// Every query has K choices, as soon as there are so many blocks, and different ones.
static void drawn_selections(void** state) {
    (void)state;
    const AttentionShape s = {1, 2000, 0, 1, 1, 64, 0, 32, 6};
    int lengths[63], chosen_once = 0, by_equal_chance = 0;
    for (int draw = 0; draw < NUM_DRAWS; draw++) {
        int* selected = drawn_selection(&s, (Draw)draw, 3);
        for (int t = 0; t < s.T; t++)
            for (int i = 0; i < s.K - 1; i++) {
                const int* chosen = selected + (size_t)t * (s.K - 1);
                assert_true(i < t / s.S ? chosen[i] >= 0 && chosen[i] < t / s.S : chosen[i] == -1);
                for (int j = 0; j < i; j++) chosen_once += chosen[i] < 0 || chosen[i] != chosen[j];
            }
        count_lengths(lengths, &s, selected, 0, s.T);
        free(selected);
        if (draw == DRAW_SINK) assert_int_equal(lengths[0], s.T);
        if (draw == DRAW_OLDEST)
            for (int i = 0; i < s.K - 1; i++) assert_int_equal(lengths[i], s.T - i * s.S);
        // An old block is chosen less when near ones are preferred.
        if (draw == DRAW_UNIFORM) by_equal_chance = lengths[1];
        if (draw == DRAW_RECENT) assert_true(lengths[1] < by_equal_chance * 3 / 4);
    }
    assert_int_equal(chosen_once, NUM_DRAWS * s.T * (s.K - 1) * (s.K - 2) / 2);
}

#if defined(PRECISION_BF16)
static const AttentionShape LONG = {1, 1 << 16, 0, 1, 1, 128, 0, 128, 8};

static double routed_forward_of_floor(Draw draw) {
    int* selected = drawn_selection(&LONG, draw, 1);
    Work works[NUM_STAGES];
    count_work(works, &LONG, NULL, selected, 1);
    const Floors floors = count_floors(&LONG, selected, 1);
    free(selected);
    return bytes_moved(&works[FORWARD]) / floors.forward;
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
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(formulas_are_what_is_counted),
        cmocka_unit_test(groups_of_heads),
        cmocka_unit_test(pieces_with_two_items),
        cmocka_unit_test(drawn_selections),
#if defined(PRECISION_BF16) // tiles of fp32 are small, to check with
        cmocka_unit_test(routed_forward_is_near_its_floor),
#endif
    };
    program_name = "test_moba_counts";
    return cmocka_run_group_tests(tests, NULL, NULL);
}
