/*
Compares moba.cuh and kernels/moba_plain.cuh, in the precision of the build, with dev/cpu/moba.h in fp64 on
the same inputs (test/reference.h), for sizes that reach every branch. It compares the selection, and with the
same selection the output, lse and gradients, within the bounds of docs/math.md section 7. It also checks
properties that follow from the definition, that a repeated call gives the same bits, and the two algorithms
against each other. It runs on the emulator and on a GPU.

TEST_LONG=1 runs the full matrix.
*/
// flashmoba_forward, flashmoba_backward
#include "moba.cuh"
// keys_forward
#include "kernels/keys.cuh"
// moba_forward, moba_backward
#include "kernels/moba_plain.cuh"
// AttentionModule, attention_module
#include "runtime/attention.h"
// reference_flashmoba_forward, reference_flashmoba_backward
#include "test/reference.h"
// HeadMap, download, assert_error; cmocka
#include "test/device_attention.h"
// capture
#include "test/capture.h"

// ----------------------------------------------------------------------------
// Cases

static const AttentionModule* algorithm; // of the test that runs

static int use_flashmoba(void** state) {
    (void)state;
    algorithm = attention_module(ATTENTION_FLASHMOBA);
    return 0;
}

static int use_moba(void** state) {
    (void)state;
    algorithm = attention_module(ATTENTION_MOBA);
    return 0;
}

typedef struct {
    const HeadMap* map;
    char words[96]; // what it is
    AttentionShape s;
    AttentionTensors x; // on the device; noise is NULL but where it is tested
    size_t qkv_count, out_count, lse_count, selected_count, centroids_count;
    // on the host, floatX and what it holds exactly
    floatX *host_qkv, *host_dout;
    double *exact_qkv, *exact_dout;
    // x.qkv, x.dout, x.centroids and x.kv_of_q, to write to
    floatX *qkv, *dout;
    float* centroids;
    int* kv_of_q;
} Case;

static void upload(Case* c) {
    upload_rounded(c->qkv, c->host_qkv, c->exact_qkv, c->qkv_count);
    upload_rounded(c->dout, c->host_dout, c->exact_dout, c->out_count);
}

static Case new_case(const HeadMap* map, int B, int T, int D, int S, int K) {
    Case c = {};
    c.map = map;
    c.s = {B, T, 0, map->H, map->G, D, 0, S, K};
    c.qkv_count = (size_t)B * T * (c.s.H + 2 * c.s.G) * D;
    c.out_count = (size_t)B * T * c.s.H * D;
    c.lse_count = (size_t)B * c.s.H * T;
    c.selected_count = moba_selected_count(B, T, c.s.H, K);
    c.centroids_count = moba_centroids_count(B, T, c.s.G, D, S);
    c.host_qkv = new_floats(c.qkv_count), c.host_dout = new_floats(c.out_count);
    c.exact_qkv = new_doubles(c.qkv_count), c.exact_dout = new_doubles(c.out_count);
    c.qkv = (floatX*)forgotten(c.qkv_count * sizeof(floatX));
    c.x.dqkv = (floatX*)forgotten(c.qkv_count * sizeof(floatX));
    c.dout = (floatX*)forgotten(c.out_count * sizeof(floatX));
    c.x.out = (floatX*)forgotten(c.out_count * sizeof(floatX));
    c.x.lse = (float*)forgotten(c.lse_count * sizeof(float));
    c.centroids = (float*)forgotten(c.centroids_count * sizeof(float));
    c.x.selected = (int*)forgotten(c.selected_count * sizeof(int));
    c.kv_of_q = (int*)forgotten(c.s.H * sizeof(int));
    c.x.qkv = c.qkv, c.x.dout = c.dout, c.x.centroids = c.centroids, c.x.kv_of_q = c.kv_of_q;
    copy_to_device(c.kv_of_q, map->kv_of_q, c.s.H * sizeof(int), 0);
    fill_normal(c.exact_qkv, NULL, c.qkv_count, 1, (uint64_t)T);
    fill_normal(c.exact_dout, NULL, c.out_count, 1, (uint64_t)T + 1);
    snprintf(c.words, sizeof(c.words), "B %d T %d H %d G %d D %d S %d K %d", B, T, c.s.H, c.s.G, D, S, K);
    upload(&c);
    return c;
}

static void free_case(Case* c) {
    free(c->host_qkv), free(c->host_dout), free(c->exact_qkv), free(c->exact_dout);
    device_free(c->qkv), device_free(c->x.dqkv), device_free(c->dout), device_free(c->x.out),
        device_free(c->x.lse);
    device_free(c->centroids), device_free(c->x.selected), device_free(c->kv_of_q);
}

static void run_forward(Case* c, int start) {
    AttentionShape s = c->s;
    s.start = start;
    c->x.workspace = forgotten(algorithm->forward_workspace(&s));
    keys_forward(c->qkv, NULL, c->centroids, NULL, NULL, s.B, s.T, start, s.H, s.G, s.D, s.S, 0, 0);
    algorithm->forward(&c->x, &s, 0);
    stream_synchronize(0);
    device_free(c->x.workspace);
}

static void run_backward(Case* c) {
    c->x.workspace = forgotten(algorithm->backward_workspace(&c->s));
    algorithm->backward(&c->x, &c->s, 0);
    stream_synchronize(0);
    device_free(c->x.workspace);
}

static int* download_ints(const int* values, size_t count) {
    int* host = (int*)calloc_or_fail(count + 1, sizeof(int), "a test");
    copy_to_host(host, values, count * sizeof(int), 0);
    stream_synchronize(0);
    return host;
}

static int* download_selected(const Case* c) { return download_ints(c->x.selected, c->selected_count); }

// ----------------------------------------------------------------------------
// Errors

static double score(const Case* c, const double* centroids, int b, int h, int t, int block) {
    const int g = c->map->kv_of_q[h], stride = (c->s.H + 2 * c->s.G) * c->s.D;
    return dot(c->exact_qkv + ((size_t)b * c->s.T + t) * stride + (size_t)h * c->s.D,
               centroids + (((size_t)b * (c->s.T / c->s.S) + block) * c->s.G + g) * c->s.D, (size_t)c->s.D);
}

static int contains(const int* blocks, int count, int block) {
    for (int i = 0; i < count; i++)
        if (blocks[i] == block) return 1;
    return 0;
}

// Where a row's choices are not the reference's, the scores that they differ by are nearly equal, and not equal.
static void check_row(const Case* c, const int* chosen, const int* expected, const double* centroids, int b,
                      int h, int t) {
    const int choices = c->s.K - 1;
    double highest = -INFINITY, lowest = INFINITY;
    for (int block = 0; block < t / c->s.S; block++) {
        highest = fmax(highest, score(c, centroids, b, h, t, block));
        lowest = fmin(lowest, score(c, centroids, b, h, t, block));
    }
    for (int i = 0; i < choices; i++) {
        assert_int_equal(chosen[i] < 0, expected[i] < 0);
        assert_true(chosen[i] < t / c->s.S && (i == 0 || chosen[i] < 0 || chosen[i] < chosen[i - 1]));
        for (int j = 0; j < choices; j++) {
            if (contains(expected, choices, chosen[i]) || contains(chosen, choices, expected[j])) continue;
            const double gap =
                fabs(score(c, centroids, b, h, t, chosen[i]) - score(c, centroids, b, h, t, expected[j]));
            if (!(gap < 1e-5 * (highest - lowest)) || gap == 0)
                print_error("row %d of head %d chooses %d, not %d: scores %.3g apart of %.3g\n", t, h,
                            chosen[i], expected[j], gap, highest - lowest);
            assert_true(gap < 1e-5 * (highest - lowest) && gap > 0);
        }
    }
}

static void check_selection(const Case* c) {
    int* selected = download_selected(c);
    int* expected = (int*)calloc_or_fail(c->selected_count + 1, sizeof(int), "a test");
    double *centroids = download(c->centroids, c->centroids_count),
           *ref_centroids = new_doubles(c->centroids_count + 1);
    reference_flashmoba_select(expected, ref_centroids, c->exact_qkv, c->map->kv_of_q, &c->s);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < c->centroids_count; i++) {
        difference += (centroids[i] - ref_centroids[i]) * (centroids[i] - ref_centroids[i]);
        norm += ref_centroids[i] * ref_centroids[i];
    }
    assert_true(sqrt(difference) <= 1e-6 * sqrt(norm));
    for (size_t row = 0; row < (c->s.K > 1 ? c->lse_count : 0); row++)
        check_row(c, selected + row * (c->s.K - 1), expected + row * (c->s.K - 1), ref_centroids,
                  (int)(row / c->s.T / c->s.H), (int)(row / c->s.T % c->s.H), (int)(row % c->s.T));
    free(selected), free(expected), free(centroids), free(ref_centroids);
}

static void check_output(const Case* c, const double* ref_out, const double* ref_lse) {
    double *out = download(c->x.out, c->out_count), *lse = download(c->x.lse, c->lse_count);
    Error of_out = {}, of_lse = {};
    for (size_t i = 0; i < c->out_count; i++) add_error(&of_out, out[i], ref_out[i]);
    for (size_t i = 0; i < c->lse_count; i++) add_error(&of_lse, lse[i], ref_lse[i]);
    assert_error("out", c->words, &of_out, 0, c->s.T >= 16);
    assert_lse_error(c->words, &of_lse, c->lse_count);
    free(out), free(lse);
}

static void check_forward(const Case* c) {
    double *ref_out = new_doubles(c->out_count), *ref_lse = new_doubles(c->lse_count);
    int* selected = download_selected(c);
    reference_flashmoba_forward(ref_out, ref_lse, selected, c->exact_qkv, c->map->kv_of_q, &c->s);
    check_output(c, ref_out, ref_lse);
    free(ref_out), free(ref_lse), free(selected);
}

// The reference has the same inputs, among them selection, output and log-sum-exp of the device.
static void check_backward(const Case* c) {
    double *out = download(c->x.out, c->out_count), *lse = download(c->x.lse, c->lse_count);
    double *dqkv = download(c->x.dqkv, c->qkv_count), *ref_dqkv = new_doubles(c->qkv_count);
    int* selected = download_selected(c);
    reference_flashmoba_backward(ref_dqkv, c->exact_dout, out, lse, selected, c->exact_qkv, c->map->kv_of_q,
                                 &c->s);
    check_gradients(c->words, dqkv, ref_dqkv, (size_t)c->s.B * c->s.T, c->map, c->s.D, c->s.T >= 16);
    free(out), free(lse), free(dqkv), free(ref_dqkv), free(selected);
}

static void check_all(Case* c) {
    run_forward(c, 0);
    check_selection(c);
    check_forward(c);
    run_backward(c);
    check_backward(c);
}

static void check(const HeadMap* map, int B, int T, int D, int S, int K) {
    Case c = new_case(map, B, T, D, S, K);
    check_all(&c);
    free_case(&c);
}

// ----------------------------------------------------------------------------
// Tests

static void check_full_matrix(void) {
    const int Ts[] = {1, 16, 31, 65, 128, 200, 400, 700}, Ss[] = {16, 32, 64, 128, 256, 512},
              Ks[] = {1, 2, 5, 10, 64}, Ds[] = {32, 64, 128};
    for (int i = 0; i < 8 * 6 * 5; i++)
        check(ALL_MAPS[(i + i / 8) % 8], 1 + i % 7 / 6, Ts[i % 8], Ds[i % 3], Ss[i / 8 % 6], Ks[i / 48]);
}

static void test_shapes(void** state) {
    (void)state;
    static const struct {
        const HeadMap* map;
        int B, T, D, S, K;
    } shapes[] = {
        {&ONE, 1, 1, 64, 16, 3},           {&MHA, 2, 70, 32, 16, 1},
        {&GQA, 1, 100, 64, 16, 3},         {&UNEVEN, 1, 75, 32, 32, 9},
        {&FIRST_EMPTY, 2, 150, 64, 64, 2}, {&MIDDLE_EMPTY, 1, 90, 128, 16, 4},
        {&LAST_EMPTY, 1, 270, 32, 128, 2}, {&ONE, 1, 520, 64, 256, 2},
        {&ONE, 1, 300, 128, 128, 2},       {&ONE, 1, 1060, 32, 512, 2},
        {&ONE, 1, 600, 32, 16, 10},        {&ONE, 1, 520, 32, 16, 18},
        {&ONE, 1, 520, 32, 16, 30},        {&MHA, 1, 64, 64, 64, 4},
        {&ONE, 1, 257, 32, 16, 1},
    };
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        check(shapes[i].map, shapes[i].B, shapes[i].T, shapes[i].D, shapes[i].S, shapes[i].K);
    if (LONG_MATRIX) check_full_matrix();
}

// The first component of every query is 4; keys first..end-1 have 3 there, all others 0. (The larger what all keys of a block have
// in common, the larger the error of the queries' gradients: there the gradients of the scores, which are rounded to floatX,
// should cancel.)
static void favour(Case* c, int first, int end) {
    const int row = (c->s.H + 2 * c->s.G) * c->s.D;
    for (int t = 0; t < c->s.T; t++)
        for (int head = 0; head < c->s.H + c->s.G; head++)
            c->exact_qkv[(size_t)t * row + (size_t)head * c->s.D] = head < c->s.H           ? 4
                                                                    : t >= first && t < end ? 3
                                                                                            : 0;
    upload(c);
}

// A block that all later queries choose is more than one item; the gradients of its keys are the sums of all, of one head or of
// three, and of the pieces of a head when it goes in pieces.
static void test_hot_block(void** state) {
    (void)state;
    const HeadMap* maps[] = {&ONE, &MQA, &TWO};
    const size_t kept = moba_workspace_bound;
    for (int i = 0; i < 3; i++) {
        const int T = i < 2 ? FLASHMOBA_ITEM + 120 : 2 * FLASHMOBA_ITEM + 700;
        Case c = new_case(maps[i], 1, T, 32, 32, 2);
        const AttentionShape shape = c.s;
        if (i == 2) moba_workspace_bound = flashmoba_group_bytes(&shape, 1, FLASHMOBA_ITEM + 512, 1);
        assert_int_equal(flashmoba_group_size(&shape, 1).queries, i < 2 ? T : FLASHMOBA_ITEM + 512);
        favour(&c, 32, 64);
        check_all(&c);
        int* selected = download_selected(&c);
        for (int t = 64; t < c.s.T; t++) assert_int_equal(selected[t], 1);
        free(selected);
        free_case(&c);
    }
    moba_workspace_bound = kept;
}

// Groups of one head, of two, of three, through KV heads that begin in one group and end in another, with fewer left for the last.
static void test_groups_of_heads(void** state) {
    (void)state;
    const HeadMap* maps[] = {&MQA, &UNEVEN, &FIRST_EMPTY, &MIDDLE_EMPTY, &LAST_EMPTY, &GQA, &ONE};
    const size_t kept = moba_workspace_bound;
    for (int i = 0; i < 7; i++) {
        const AttentionShape shape = {2, 70, 0, maps[i]->H, maps[i]->G, 32, 0, 16, 3};
        const int heads = 1 + i % 3;
        moba_workspace_bound = heads == 1 ? 1 : (size_t)heads * flashmoba_group_bytes(&shape, 1, 70, 1);
        const FlashmobaGroupSize size = flashmoba_group_size(&shape, 1);
        assert_true(size.sequences == 1 && size.heads == (heads < shape.H ? heads : shape.H));
        check(maps[i], 2, 70, 32, 16, 3);
    }
    moba_workspace_bound = kept;
}

// All heads of one sequence, then of two, and one sequence is left for the last group.
static void test_groups_of_sequences(void** state) {
    (void)state;
    const size_t kept = moba_workspace_bound;
    for (int sequences = 1; sequences <= 2; sequences++) {
        const AttentionShape shape = {3, 70, 0, GQA.H, GQA.G, 32, 0, 16, 3};
        moba_workspace_bound = (size_t)(sequences * GQA.H + 1) * flashmoba_group_bytes(&shape, 1, 70, 1);
        const FlashmobaGroupSize size = flashmoba_group_size(&shape, 1);
        assert_true(size.sequences == sequences && size.heads == GQA.H);
        check(&GQA, 3, 70, 32, 16, 3);
    }
    moba_workspace_bound = kept;
}

// A head in pieces, the later ones of which have queries for blocks of the earlier ones: the same choices and outputs, bit by
// bit, and gradients within the bounds.
static void test_pieces(void** state) {
    (void)state;
    const HeadMap* maps[] = {&MHA, &GQA, &MIDDLE_EMPTY, &LAST_EMPTY};
    const int sizes[][3] = {{32, 16, 3}, {64, 64, 2}, {32, 256, 2}, {128, 32, 1}};
    const size_t kept = moba_workspace_bound;
    for (int i = 0; i < 4; i++) {
        const int D = sizes[i][0], S = sizes[i][1], K = sizes[i][2];
        Case c = new_case(maps[i], 1 + i % 2, 600, D, S, K);
        run_forward(&c, 0);
        double *out = download(c.x.out, c.out_count), *lse = download(c.x.lse, c.lse_count);
        moba_workspace_bound = 1;
        const AttentionShape shape = {c.s.B, c.s.T, 0, c.s.H, c.s.G, D, 0, S, K};
        assert_int_equal(flashmoba_group_size(&shape, 0).queries, FLASHMOBA_LIST_QUERIES);
        forget(c.x.out, c.out_count * sizeof(floatX)), forget(c.x.lse, c.lse_count * sizeof(float));
        check_all(&c);
        moba_workspace_bound = kept;
        double *in_pieces = download(c.x.out, c.out_count), *lse_in_pieces = download(c.x.lse, c.lse_count);
        assert_memory_equal(out, in_pieces, c.out_count * sizeof(double));
        assert_memory_equal(lse, lse_in_pieces, c.lse_count * sizeof(double));
        free(out), free(lse), free(in_pieces), free(lse_in_pieces);
        free_case(&c);
    }
}

// The workspace stays within its bound when heads are split. When all heads fit, one group has them all.
static void test_workspace(void** state) {
    (void)state;
    assert_int_equal(moba_workspace_bound, (size_t)1 << 30);
    const int longest = sizeof(floatX) == 2 ? 1 << 19 : 1 << 17;
    for (int T = 1 << 13; T <= longest; T *= 2)
        for (int is_backward = 0; is_backward < 2; is_backward++) {
            const AttentionShape shape = {2, T, 0, 16, 16, 128, 0, 128, 8};
            const FlashmobaGroupSize size = flashmoba_group_size(&shape, is_backward);
            const size_t bytes = flashmoba_workspace_bytes(&shape, is_backward);
            if (getenv("SHOW"))
                print_message("T %d %s: %d x %d heads, %d queries, %.0f MB\n", T,
                              is_backward ? "backward" : "forward", size.sequences, size.heads, size.queries,
                              (double)bytes / 1e6);
            assert_true(bytes <= moba_workspace_bound);
            assert_true(size.queries == T || size.sequences * size.heads == 1);
            assert_true(T > 1 << 15 || size.queries == T);
        }
    const AttentionShape small = {3, 200, 0, 4, 2, 64, 0, 16, 3};
    const FlashmobaGroupSize size = flashmoba_group_size(&small, 1);
    assert_true(size.sequences == 3 && size.heads == 4 && size.queries == 200);
}

// A workspace sized for a batch also serves fewer and shorter sequences.
static void test_workspace_of_shorter_sequences(void** state) {
    (void)state;
    moba_workspace_bound = (size_t)1 << 20;
    int more_heads = 0;
    for (int is_backward = 0; is_backward < 2; is_backward++) {
        const AttentionShape planned = {3, 1100, 0, 4, 4, 64, 0, 16, 3};
        const size_t bytes = flashmoba_workspace_bytes(&planned, is_backward);
        for (int B = 1; B <= planned.B; B++)
            for (int T = 1; T <= planned.T; T++) {
                AttentionShape shape = planned;
                shape.B = B, shape.T = T;
                const FlashmobaGroupSize size = flashmoba_group_size(&shape, is_backward);
                more_heads += size.heads > flashmoba_group_size(&planned, is_backward).heads;
                assert_true(flashmoba_group_bytes(&shape, size.sequences * size.heads, size.queries,
                                                  is_backward) <= bytes);
            }
    }
    assert_true(more_heads > 0);
    moba_workspace_bound = (size_t)1 << 30;
}

// Some of the blocks before a query's own, the newest first, then -1; more often than not as many as it may choose.
static void draw_choices(int* chosen, int choices, int past, uint64_t* state) {
    for (int i = 0; i < choices; i++) {
        *state = *state * 6364136223846793005ull + 1442695040888963407ull;
        past -= 1 + (int)(*state >> 62);
        chosen[i] = max(-1, past);
    }
}

// Every list has its queries in their order, whatever the number of choices, of whole sequences and of rows from start on.
static void test_lists(void** state) {
    (void)state;
    static const int shapes[][4] = {{2400, 0, 16, 8},  {700, 0, 16, 1},   {700, 300, 32, 2},
                                    {520, 511, 16, 5}, {1100, 0, 16, 33}, {1300, 257, 16, 64}};
    for (int i = 0; i < 6; i++) {
        const AttentionShape s = {2, shapes[i][0], shapes[i][1], 2, 1, 32, 0, shapes[i][2], shapes[i][3]};
        const int choices = s.K - 1, heads = s.B * s.H;
        const size_t selected_count = moba_selected_count(s.B, s.T, s.H, s.K);
        int* chosen = (int*)calloc_or_fail(selected_count + 1, sizeof(int), "a test");
        int* selected = (int*)forgotten((selected_count + 1) * sizeof(int));
        uint64_t random = (uint64_t)i;
        for (int row = 0; row < heads * s.T; row++)
            draw_choices(chosen + (size_t)row * choices, choices, row % s.T / s.S, &random);
        copy_to_device(selected, chosen, selected_count * sizeof(int), 0);
        const FlashmobaGroupSize size = flashmoba_group_size(&s, 0);
        char* memory = (char*)forgotten(flashmoba_workspace_bytes(&s, 0));
        AttentionTensors tensors = {};
        tensors.selected = selected;
        const FlashmobaGroup group = flashmoba_first_group(memory, &tensors, &s, &size, 0);
        const FlashmobaLists* x = &group.lists;
        assert_int_equal(group.heads, heads);
        flashmoba_build_lists(x, 0);
        int* begins = download_ints(x->begins, (size_t)heads * (x->blocks + 1));
        int* entries = download_ints(x->entries, (size_t)heads * x->queries * s.K);
        for (int head = 0; head < heads; head++) {
            int at = 0;
            for (int block = 0; block < x->blocks; block++) {
                assert_int_equal(begins[head * (x->blocks + 1) + block], at);
                for (int t = s.start; t < s.T; t++)
                    for (int choice = 0; choice < s.K; choice++) {
                        const int of_choice =
                            choice == 0 ? t / s.S : chosen[((size_t)head * s.T + t) * choices + choice - 1];
                        if (of_choice != block) continue;
                        assert_int_equal(entries[(size_t)head * x->queries * s.K + at++],
                                         (int)((unsigned)choice << MOBA_TOKEN_BITS) | t);
                    }
            }
            assert_int_equal(begins[head * (x->blocks + 1) + x->blocks], at);
        }
        free(chosen), free(begins), free(entries);
        device_free(selected), device_free(memory);
    }
}

// Tile after tile of centroids, most of which have nothing for a row; then with scores that are all negative.
static void test_many_centroids(void** state) {
    (void)state;
    for (int negative = 0; negative < 2; negative++) {
        Case c = new_case(&MHA, 1, 2100, 32, 16, 3);
        const int row = (c.s.H + 2 * c.s.G) * c.s.D;
        for (int t = 0; t < c.s.T && negative; t++)
            for (int head = 0; head < c.s.H + c.s.G; head++)
                c.exact_qkv[(size_t)t * row + (size_t)head * c.s.D] = head < c.s.H ? 8 : -4;
        upload(&c);
        run_forward(&c, 0);
        check_selection(&c);
        free_case(&c);
    }
}

// A newer block is better, but for one query of every 16, for which it is one of the first 32 blocks, each of them once: of all
// that a warp compares with the oldest tile of centroids one score is higher than what it has.
static void test_one_improves(void** state) {
    (void)state;
    const int S = 16, first = 1024;
    Case c = new_case(&ONE, 1, first + 32 * 16, 64, S, 2);
    for (int t = 0; t < c.s.T; t++) {
        double *query = c.exact_qkv + (size_t)t * 3 * c.s.D, *key = query + c.s.D;
        const int block = t / S, warp = (t - first) / 16;
        for (int d = 0; d < c.s.D; d++)
            query[d] = d == 0, key[d] = d == 0 ? block : block < 32 && d == 1 + block;
        if (t >= first && t % 16 == warp % 16) query[1 + warp] = 128;
    }
    upload(&c);
    run_forward(&c, 0);
    int* selected = download_selected(&c);
    for (int t = 0; t < c.s.T; t++) {
        const int warp = (t - first) / 16;
        assert_int_equal(selected[t], t >= first && t % 16 == warp % 16 ? warp : t / S - 1);
    }
    free(selected);
    free_case(&c);
}

// A size that the kernels do not have is an error, in the forward pass and in the backward pass.
static void forward_with_many_blocks(void* nothing) {
    (void)nothing;
    const AttentionTensors x = {};
    const AttentionShape s = {1, 64, 0, 1, 1, 64, 0, 16, 65};
    algorithm->forward(&x, &s, 0);
}

static void backward_with_large_blocks(void* nothing) {
    (void)nothing;
    const AttentionTensors x = {};
    const AttentionShape s = {1, 64, 0, 1, 1, 64, 0, 1024, 2};
    algorithm->backward(&x, &s, 0);
}

static void test_refused(void** state) {
    (void)state;
    const struct Captured forward = capture(forward_with_many_blocks, NULL);
    assert_int_equal(forward.exit_code, 1);
    assert_non_null(strstr(forward.text, "blocks of 16 keys, 65 of them a query"));
    const struct Captured backward = capture(backward_with_large_blocks, NULL);
    assert_int_equal(backward.exit_code, 1);
    assert_non_null(strstr(backward.text, "blocks of 1024 keys, 2 of them a query"));
}

// Memory of 7 rows of 8 elements. Row 3 is the first row of the tile, so the tile has 4 rows.
enum { ROWS = 7, ROW_STRIDE = 8, FIRST_ROW = 3, ROWS_READ = 10 };

static __global__ void addresses_kernel(int* addresses, floatX* memory) {
    const NeighbourRows<floatX> rows = neighbours(memory, ROW_STRIDE, 1, ROWS).from(FIRST_ROW - 1);
    for (int row = 0; row < ROWS_READ; row++) addresses[row] = (int)(rows.at(row) - memory);
}

// The copy of a row behind the last one reads the last row, so it never leaves its memory.
static void test_rows_behind_the_last(void** state) {
    (void)state;
    floatX* memory = (floatX*)forgotten(ROWS * ROW_STRIDE * sizeof(floatX));
    int* addresses = (int*)forgotten(ROWS_READ * sizeof(int));
    launch(addresses_kernel, 1, 1, 0, 0, addresses, memory);
    int* host = download_ints(addresses, ROWS_READ);
    for (int i = 0; i < ROWS_READ; i++)
        assert_int_equal(host[i], ROW_STRIDE * (FIRST_ROW + i < ROWS ? FIRST_ROW + i : ROWS - 1));
    free(host);
    device_free(addresses), device_free(memory);
}

// Blocks with the same keys have the same scores, and the newest of them are chosen; also where these are -INFINITY.
static void test_ties(void** state) {
    (void)state;
    const int Ks[] = {2, 4, 12, 20, 4};
    for (int i = 0; i < 5; i++) {
        Case c = new_case(&GQA, 1, 700, 32, 16, Ks[i]);
        const int row = (c.s.H + 2 * c.s.G) * c.s.D;
        for (int t = 16; t < c.s.T; t++)
            memcpy(c.exact_qkv + (size_t)t * row + c.s.H * c.s.D,
                   c.exact_qkv + (size_t)(t % 16) * row + c.s.H * c.s.D, sizeof(double) * c.s.G * c.s.D);
        for (int t = 0; t < c.s.T && i == 4; t++)
            for (int head = 0; head < c.s.H + c.s.G; head++)
                c.exact_qkv[(size_t)t * row + head * c.s.D] = head < c.s.H ? 0x1p20 : -0x1p120;
        upload(&c);
        run_forward(&c, 0);
        int* selected = download_selected(&c);
        for (size_t at = 0; at < c.selected_count; at++) {
            const int choices = c.s.K - 1, t = (int)(at / choices % c.s.T), choice = (int)(at % choices);
            assert_int_equal(selected[at], max(-1, t / c.s.S - 1 - choice));
        }
        free(selected);
        free_case(&c);
    }
}

// A block whose score is not a number is not chosen.
static void test_nan(void** state) {
    (void)state;
    Case c = new_case(&ONE, 1, 200, 64, 16, 5);
    c.exact_qkv[(size_t)(3 * 16 + 5) * 3 * c.s.D + c.s.D] = NAN;
    upload(&c);
    run_forward(&c, 0);
    int* selected = download_selected(&c);
    for (int t = 0; t < c.s.T; t++) {
        int count = 0;
        for (int i = 0; i < 4; i++) count += selected[t * 4 + i] >= 0;
        assert_false(contains(selected + t * 4, 4, 3));
        assert_int_equal(count, min(4, t / 16 - (t / 16 > 3)));
    }
    free(selected);
    free_case(&c);
}

// K S >= T: dense causal attention. T <= S: the own block alone.
static void test_all_blocks(void** state) {
    (void)state;
    const int sizes[][3] = {{100, 16, 7}, {64, 64, 1}, {130, 32, 64}, {60, 512, 3}};
    for (int i = 0; i < 4; i++) {
        Case c = new_case(&UNEVEN, 1, sizes[i][0], 32, sizes[i][1], sizes[i][2]);
        run_forward(&c, 0);
        double *ref_out = new_doubles(c.out_count), *ref_lse = new_doubles(c.lse_count);
        reference_attention_forward(ref_out, ref_lse, c.exact_qkv, c.map->kv_of_q, &c.s);
        check_output(&c, ref_out, ref_lse);
        free(ref_out), free(ref_lse);
        free_case(&c);
    }
}

// Another token at the end changes no bit of earlier rows.
static void test_later_token(void** state) {
    (void)state;
    const int Ds[] = {32, 64, 128};
    for (int d = 0; d < 3; d++) {
        Case c = new_case(&GQA, 1, 96, Ds[d], 16, 3);
        const size_t row = (size_t)(c.s.H + 2 * c.s.G) * c.s.D;
        run_forward(&c, 0);
        double* before = download(c.x.out, c.out_count);
        for (size_t i = c.qkv_count - row; i < c.qkv_count; i++) c.exact_qkv[i] = 3 - c.exact_qkv[i];
        upload(&c);
        run_forward(&c, 0);
        double* after = download(c.x.out, c.out_count);
        const size_t last = c.out_count - (size_t)c.s.H * c.s.D;
        assert_memory_equal(before, after, last * sizeof(double));
        assert_memory_not_equal(before + last, after + last, sizeof(double) * c.s.H * c.s.D);
        free(before), free(after);
        free_case(&c);
    }
}

// Rows start..T-1 alone have the bits of the whole, in pieces of a head too; no other row is touched.
static void test_start(void** state) {
    (void)state;
    const int starts[] = {1, 64, 263, 299, 1, 263};
    const size_t kept_bound = moba_workspace_bound;
    for (int i = 0; i < 6; i++) {
        Case c = new_case(&UNEVEN, 1, 300, 32, 32, 3);
        run_forward(&c, 0);
        double *out = download(c.x.out, c.out_count), *lse = download(c.x.lse, c.lse_count);
        int* selected = download_selected(&c);
        device_check(cudaMemset(c.x.out, 0xFF, c.out_count * sizeof(floatX)), "clear memory");
        device_check(cudaMemset(c.x.lse, 0xFF, c.lse_count * sizeof(float)), "clear memory");
        device_check(cudaMemset(c.x.selected, 0x7F, c.selected_count * sizeof(int)), "clear memory");
        const size_t kept = (size_t)(starts[i] / c.s.S) * c.s.G * c.s.D;
        device_check(cudaMemset(c.centroids + kept, 0xFF, (c.centroids_count - kept) * sizeof(float)),
                     "clear memory");
        if (i >= 4) moba_workspace_bound = 1;
        run_forward(&c, starts[i]);
        moba_workspace_bound = kept_bound;
        double *rows = download(c.x.out, c.out_count), *row_lse = download(c.x.lse, c.lse_count);
        int* row_selected = download_selected(&c);
        for (size_t at = 0; at < c.out_count; at++)
            assert_true((int)(at / c.s.D / c.s.H) < starts[i] ? isnan(rows[at]) : rows[at] == out[at]);
        for (size_t at = 0; at < c.lse_count; at++)
            assert_true((int)(at % c.s.T) < starts[i] ? isnan(row_lse[at]) : row_lse[at] == lse[at]);
        for (size_t at = 0; at < c.selected_count; at++)
            assert_int_equal(row_selected[at],
                             (int)(at / (c.s.K - 1) % c.s.T) < starts[i] ? 0x7F7F7F7F : selected[at]);
        free(out), free(lse), free(selected), free(rows), free(row_lse), free(row_selected);
        free_case(&c);
    }
}

// Output and log-sum-exp with noise are the bits of those without; what is noised is that output; from any row on.
static void test_noise(void** state) {
    (void)state;
    static const struct {
        const HeadMap* map;
        int B, T, D, S, K, start;
    } shapes[] = {
        {&ONE, 1, 1, 64, 16, 2, 0},
        {&UNEVEN, 2, 65, 32, 16, 3, 0},
        {&GQA, 1, 70, 64, 32, 1, 33},
        {&MQA, 2, 37, 128, 16, 2, 36},
    };
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        Case c = new_case(shapes[i].map, shapes[i].B, shapes[i].T, shapes[i].D, shapes[i].S, shapes[i].K);
        floatX* noised = (floatX*)forgotten(c.out_count * sizeof(floatX));
        const AttentionNoise noise = {noised, 0.75f, 5, noise_stream(3, 2), 7};
        run_forward(&c, 0);
        double *out = download(c.x.out, c.out_count), *lse = download(c.x.lse, c.lse_count);
        c.x.noise = &noise;
        forget(c.x.out, c.out_count * sizeof(floatX)), forget(c.x.lse, c.lse_count * sizeof(float));
        run_forward(&c, 0);
        double *same_out = download(c.x.out, c.out_count), *same_lse = download(c.x.lse, c.lse_count);
        assert_memory_equal(same_out, out, c.out_count * sizeof(double));
        assert_memory_equal(same_lse, lse, c.lse_count * sizeof(double));
        check_noised(c.words, c.x.out, &noise, c.s.B, c.s.T, 0, c.s.H, c.s.D);
        forget(noised, c.out_count * sizeof(floatX));
        run_forward(&c, shapes[i].start);
        check_noised(c.words, c.x.out, &noise, c.s.B, c.s.T, shapes[i].start, c.s.H, c.s.D);
        free(same_out), free(same_lse);
        free(out), free(lse);
        device_free(noised);
        free_case(&c);
    }
}

static void test_repeatable(void** state) {
    (void)state;
    const int Ds[] = {32, 64, 128};
    for (int d = 0; d < 3; d++) {
        Case c = new_case(&MQA, 1, 140, Ds[d], 32, 3);
        double *out[2], *lse[2], *dqkv[2];
        for (int run = 0; run < 2; run++) {
            run_forward(&c, 0);
            run_backward(&c);
            out[run] = download(c.x.out, c.out_count), lse[run] = download(c.x.lse, c.lse_count);
            dqkv[run] = download(c.x.dqkv, c.qkv_count);
        }
        assert_memory_equal(out[0], out[1], c.out_count * sizeof(double));
        assert_memory_equal(lse[0], lse[1], c.lse_count * sizeof(double));
        assert_memory_equal(dqkv[0], dqkv[1], c.qkv_count * sizeof(double));
        for (int run = 0; run < 2; run++) free(out[run]), free(lse[run]), free(dqkv[run]);
        free_case(&c);
    }
}

// moba and flashmoba give the same selection, and results as close to each other as to the reference. Inputs are
// multiples of 1/4, so scores are exact in any order.
static void test_moba_is_flashmoba(void** state) {
    (void)state;
    static const int shapes[][5] = {{2, 150, 64, 32, 3}, {1, 300, 32, 16, 6}, {1, 90, 128, 64, 2}};
    for (int i = 0; i < 3; i++) {
        const int B = shapes[i][0], T = shapes[i][1], D = shapes[i][2], S = shapes[i][3], K = shapes[i][4];
        Case c = new_case(&UNEVEN, B, T, D, S, K);
        for (size_t at = 0; at < c.qkv_count; at++) c.exact_qkv[at] = rint(4 * c.exact_qkv[at]) / 4;
        upload(&c);
        double *out[2], *lse[2], *dqkv[2];
        int* selected[2];
        for (int which = 0; which < 2; which++) {
            algorithm = attention_module(which == 0 ? ATTENTION_FLASHMOBA : ATTENTION_MOBA);
            run_forward(&c, 0);
            run_backward(&c);
            out[which] = download(c.x.out, c.out_count), lse[which] = download(c.x.lse, c.lse_count);
            dqkv[which] = download(c.x.dqkv, c.qkv_count), selected[which] = download_selected(&c);
        }
        assert_memory_equal(selected[0], selected[1], c.selected_count * sizeof(int));
        Error of_out = {}, of_lse = {};
        for (size_t at = 0; at < c.out_count; at++) add_error(&of_out, out[1][at], out[0][at]);
        for (size_t at = 0; at < c.lse_count; at++) add_error(&of_lse, lse[1][at], lse[0][at]);
        assert_error("out", c.words, &of_out, 0, 0);
        assert_lse_error(c.words, &of_lse, c.lse_count);
        check_gradients(c.words, dqkv[1], dqkv[0], (size_t)B * T, c.map, D, 0);
        for (int which = 0; which < 2; which++)
            free(out[which]), free(lse[which]), free(dqkv[which]), free(selected[which]);
        free_case(&c);
    }
}

// What keys_forward leaves, of sequences that grow to T tokens by way of `ends`: (qkv), (raw), (centroids).
static void run_keys(double* results[3], Case* c, int taps, const float* angles, const floatX* weight,
                     const int* ends, int calls) {
    const size_t keys = (size_t)c->s.B * c->s.T * c->s.G * c->s.D;
    floatX* raw = (floatX*)forgotten(keys * sizeof(floatX));
    upload(c);
    forget(c->centroids, c->centroids_count * sizeof(float));
    for (int i = 0; i < calls; i++)
        keys_forward(c->qkv, raw, c->centroids, taps ? weight : NULL, angles, c->s.B, ends[i],
                     i > 0 ? ends[i - 1] : 0, c->s.H, c->s.G, c->s.D, c->s.S, taps, 0);
    results[0] = download(c->qkv, c->qkv_count), results[1] = download(raw, keys);
    results[2] = download(c->centroids, c->centroids_count);
    device_free(raw);
}

// Centroids are the means of the keys as they are stored, after convolution and positions.
static void check_centroids(const Case* c, const double* qkv, const double* centroids) {
    const int blocks = c->s.T / c->s.S, width = c->s.G * c->s.D, stride = (c->s.H + 2 * c->s.G) * c->s.D;
    for (size_t i = 0; i < c->centroids_count; i++) {
        const size_t block = i / width % blocks, b = i / width / blocks, channel = i % width;
        double mean = 0;
        for (size_t t = 0; t < (size_t)c->s.S; t++)
            mean +=
                qkv[(b * c->s.T + block * c->s.S + t) * stride + (size_t)c->s.H * c->s.D + channel] / c->s.S;
        assert_true(fabs(centroids[i] - mean) <= 1e-6);
    }
}

// A sequence that grows has the bits of one that is there at once.
static void test_keys(void** state) {
    (void)state;
    static const int shapes[][5] = {{1, 100, 64, 32, 3},
                                    {2, 90, 32, 16, 5},
                                    {1, 300, 128, 128, 0},
                                    {1, 40, 64, 64, 3},
                                    {1, 66, 32, 16, 5}};
    for (int i = 0; i < 5; i++) {
        const int B = shapes[i][0], T = shapes[i][1], D = shapes[i][2], S = shapes[i][3], taps = shapes[i][4];
        const int grown[] = {T / 3, T / 3 + 1, T / 3 + 4, T - 1, T}, whole[] = {T};
        Case c = new_case(&UNEVEN, B, T, D, S, 2);
        const size_t counts[] = {c.qkv_count, taps ? (size_t)B * T * c.s.G * D : 0, c.centroids_count};
        float* table = (float*)calloc_or_fail((size_t)T * D, sizeof(float), "a test");
        float* angles = (float*)forgotten((size_t)T * D * sizeof(float));
        floatX* weight = (floatX*)forgotten((size_t)5 * c.s.G * D * sizeof(floatX));
        rope_table(table, T, D, 100);
        copy_to_device(angles, table, (size_t)T * D * sizeof(float), 0);
        copy_to_device(weight, c.host_dout, (size_t)taps * c.s.G * D * sizeof(floatX), 0);
        for (int positions = 0; positions < 2; positions++) {
            double *at_once[3], *in_turn[3];
            run_keys(at_once, &c, taps, positions ? angles : NULL, weight, whole, 1);
            check_centroids(&c, at_once[0], at_once[2]);
            // Rows of several sequences change places when they grow.
            run_keys(in_turn, &c, taps, positions ? angles : NULL, weight, B == 1 ? grown : whole,
                     B == 1 ? 5 : 1);
            for (int which = 0; which < 3; which++) {
                assert_memory_equal(at_once[which], in_turn[which], counts[which] * sizeof(double));
                free(at_once[which]), free(in_turn[which]);
            }
        }
        free(table);
        device_free(angles), device_free(weight);
        free_case(&c);
    }
}

// A test of each algorithm, and its name.
#define FLASHMOBA(test)                                                                                      \
    { "test_" #test, test_##test, use_flashmoba, NULL, NULL }
#define MOBA(test)                                                                                           \
    { "test_moba_" #test, test_##test, use_moba, NULL, NULL }

// With an argument: the tests whose names match it.
int main(int argc, char** argv) {
    const struct CMUnitTest tests[] = {
        FLASHMOBA(shapes),
        FLASHMOBA(hot_block),
        FLASHMOBA(groups_of_heads),
        FLASHMOBA(groups_of_sequences),
        FLASHMOBA(pieces),
        FLASHMOBA(workspace),
        FLASHMOBA(workspace_of_shorter_sequences),
        FLASHMOBA(lists),
        FLASHMOBA(many_centroids),
        FLASHMOBA(one_improves),
        FLASHMOBA(refused),
        FLASHMOBA(ties),
        FLASHMOBA(nan),
        FLASHMOBA(all_blocks),
        FLASHMOBA(later_token),
        FLASHMOBA(start),
        FLASHMOBA(noise),
        FLASHMOBA(repeatable),
        MOBA(shapes),
        MOBA(hot_block),
        MOBA(refused),
        MOBA(ties),
        MOBA(nan),
        MOBA(all_blocks),
        MOBA(later_token),
        MOBA(start),
        MOBA(noise),
        MOBA(repeatable),
        cmocka_unit_test(test_moba_is_flashmoba),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_rows_behind_the_last),
    };
    reference_start();
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("mixture of block attention on the device, " PRECISION_NAME, tests,
                                       NULL, NULL);
}
