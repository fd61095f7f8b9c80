/*
Compares gqa.cuh, in the precision of the build, with dev/cpu/gqa.h in fp64 on the same inputs
(test/reference.h). Output, lse and gradients must be within the bounds of docs/math.md section 7, for sizes
that reach every branch. A repeated call must give the same bits. The kernels must write every element of the
outputs, and nothing else. The test runs on the emulator and on a GPU.

TEST_LONG=1 runs the full matrix.
*/
// attention_forward, attention_backward
#include "gqa.cuh"
// reference_attention_forward, reference_attention_backward
#include "test/reference.h"
// HeadMap, download, assert_error; cmocka
#include "test/device_attention.h"

// ----------------------------------------------------------------------------
// Cases

// More heads than a warp has lanes, and a group that begins beyond them.
static const HeadMap MANY = {40, 3, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                     0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2}};

typedef struct {
    const HeadMap* map;
    char words[96]; // what it is
    AttentionShape s;
    AttentionTensors x; // on the device; noise is NULL but where it is tested
    size_t qkv_count, out_count, lse_count;
    // on the host, floatX and what it holds exactly
    floatX *host_qkv, *host_dout;
    double *exact_qkv, *exact_dout;
    // x.qkv, x.dout and x.kv_of_q, to write to
    floatX *qkv, *dout;
    int* kv_of_q;
} Case;

static void upload(Case* c) {
    upload_rounded(c->qkv, c->host_qkv, c->exact_qkv, c->qkv_count);
    upload_rounded(c->dout, c->host_dout, c->exact_dout, c->out_count);
}

static Case new_case(const HeadMap* map, int B, int T, int D, int window) {
    Case c = {};
    c.map = map;
    c.s = {B, T, 0, map->H, map->G, D, window, 0, 0};
    c.qkv_count = (size_t)B * T * (c.s.H + 2 * c.s.G) * D;
    c.out_count = (size_t)B * T * c.s.H * D;
    c.lse_count = (size_t)B * c.s.H * T;
    c.host_qkv = new_floats(c.qkv_count), c.host_dout = new_floats(c.out_count);
    c.exact_qkv = new_doubles(c.qkv_count), c.exact_dout = new_doubles(c.out_count);
    c.qkv = (floatX*)forgotten(c.qkv_count * sizeof(floatX));
    c.x.dqkv = (floatX*)forgotten(c.qkv_count * sizeof(floatX));
    c.dout = (floatX*)forgotten(c.out_count * sizeof(floatX));
    c.x.out = (floatX*)forgotten(c.out_count * sizeof(floatX));
    c.x.lse = (float*)forgotten(c.lse_count * sizeof(float));
    c.kv_of_q = (int*)forgotten(c.s.H * sizeof(int));
    c.x.workspace = forgotten(attention_backward_workspace(&c.s));
    c.x.qkv = c.qkv, c.x.dout = c.dout, c.x.kv_of_q = c.kv_of_q;
    copy_to_device(c.kv_of_q, map->kv_of_q, c.s.H * sizeof(int), 0);
    fill_normal(c.exact_qkv, NULL, c.qkv_count, 1, (uint64_t)T);
    fill_normal(c.exact_dout, NULL, c.out_count, 1, (uint64_t)T + 1);
    snprintf(c.words, sizeof(c.words), "B %d T %d H %d G %d D %d window %d", B, T, c.s.H, c.s.G, D, window);
    upload(&c);
    return c;
}

static void free_case(Case* c) {
    free(c->host_qkv), free(c->host_dout), free(c->exact_qkv), free(c->exact_dout);
    device_free(c->qkv), device_free(c->x.dqkv), device_free(c->dout), device_free(c->x.out),
        device_free(c->x.lse);
    device_free(c->kv_of_q), device_free(c->x.workspace);
}

static void run_forward(Case* c, int start) {
    AttentionShape s = c->s;
    s.start = start;
    attention_forward(&c->x, &s, 0);
}

static void run_backward(Case* c) { attention_backward(&c->x, &c->s, 0); }

// ----------------------------------------------------------------------------
// Errors

static void check_forward(const Case* c, int start) {
    double *out = download(c->x.out, c->out_count), *lse = download(c->x.lse, c->lse_count);
    double *ref_out = new_doubles(c->out_count), *ref_lse = new_doubles(c->lse_count);
    reference_attention_forward(ref_out, ref_lse, c->exact_qkv, c->map->kv_of_q, &c->s);
    Error of_out = {}, of_lse = {};
    for (size_t i = 0; i < c->out_count; i++) {
        const int t = (int)(i / c->s.D / c->s.H % c->s.T);
        if (t >= start) add_error(&of_out, out[i], ref_out[i]);
        else assert_true(isnan(out[i]));
    }
    for (size_t i = 0; i < c->lse_count; i++) {
        if ((int)(i % c->s.T) >= start) add_error(&of_lse, lse[i], ref_lse[i]);
        else assert_true(isnan(lse[i]));
    }
    assert_error("out", c->words, &of_out, 0, 1);
    assert_lse_error(c->words, &of_lse, c->lse_count);
    free(out), free(lse), free(ref_out), free(ref_lse);
}

// The reference has the same inputs, among them the output and the log-sum-exp of the device.
static void check_backward(const Case* c, int rounded_only) {
    double *out = download(c->x.out, c->out_count), *lse = download(c->x.lse, c->lse_count);
    double *dqkv = download(c->x.dqkv, c->qkv_count), *ref_dqkv = new_doubles(c->qkv_count);
    reference_attention_backward(ref_dqkv, c->exact_dout, out, lse, c->exact_qkv, c->map->kv_of_q, &c->s);
    check_gradients(c->words, dqkv, ref_dqkv, (size_t)c->s.B * c->s.T, c->map, c->s.D, rounded_only);
    free(out), free(lse), free(dqkv), free(ref_dqkv);
}

static void check(const HeadMap* map, int B, int T, int D, int window) {
    Case c = new_case(map, B, T, D, window);
    run_forward(&c, 0);
    check_forward(&c, 0);
    run_backward(&c);
    check_backward(&c, T >= 16); // with fewer rows a single rounding decides
    free_case(&c);
}

// ----------------------------------------------------------------------------
// Tests

static void check_full_matrix(void) {
    const int Ts[] = {1, 2, 16, 31, 64, 65, 127, 128, 130, 200, 257, 400},
              windows[] = {0, 1, 3, 47, 63, 66, 129, 1000}, Ds[] = {32, 64, 128};
    int i = 0;
    for (int t = 0; t < 12; t++)
        for (int w = 0; w < 8; w++)
            for (int d = 0; d < 3; d++, i++)
                check(ALL_MAPS[(i + i / 8) % 8], 1 + i % 7 / 6, Ts[t], Ds[d], windows[w]);
}

static void test_shapes(void** state) {
    (void)state;
    static const struct {
        const HeadMap* map;
        int B, T, D, window;
    } shapes[] = {
        {&ONE, 1, 1, 64, 0},
        {&MHA, 2, 1, 32, 1},
        {&GQA, 1, 17, 128, 0},
        {&UNEVEN, 1, 65, 32, 0},
        {&FIRST_EMPTY, 2, 70, 64, 0},
        {&MIDDLE_EMPTY, 1, 33, 128, 3},
        {&LAST_EMPTY, 1, 129, 32, 64},
        {&MQA, 1, 300, 64, 0},
        {&ONE, 1, 300, 64, 100},
        {&MHA, 1, 270, 32, 1},
        {&ONE, 1, 290, 128, 0},
        {&ONE, 1, 290, 128, 150},
        {&ONE, 2, 128, 64, 128},
        {&ONE, 1, 256, 32, 0},
        // the first or last key of a tile is one that only one row of a warp sees, or does not see
        {&MHA, 1, 200, 64, 63},
        {&ONE, 1, 200, 64, 66},
        {&ONE, 1, 200, 128, 47},
        {&MANY, 1, 3, 32, 0},
    };
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        check(shapes[i].map, shapes[i].B, shapes[i].T, shapes[i].D, shapes[i].window);
    if (LONG_MATRIX) check_full_matrix();
}

// Scores of about +-1e4; small integers as inputs, which every precision holds.
static void test_large_scores(void** state) {
    (void)state;
    for (int window = 0; window <= 40; window += 40) {
        Case c = new_case(&MHA, 1, 150, 64, window);
        for (size_t i = 0; i < c.qkv_count; i++) c.exact_qkv[i] = rint(50 * c.exact_qkv[i]);
        upload(&c);
        run_forward(&c, 0);
        check_forward(&c, 0);
        double *lse = download(c.x.lse, c.lse_count), largest = 0;
        for (size_t i = 0; i < c.lse_count; i++) largest = fmax(largest, lse[i]);
        assert_true(largest > 5e3);
        free(lse);
        free_case(&c);
    }
}

// A large score that is the same with all keys: what is summed up in the first tiles keeps its weight to the last one.
static void test_many_tiles(void** state) {
    (void)state;
    const int T = 6000, D = 32;
    Case c = new_case(&ONE, 1, T, D, 0);
    for (size_t i = 0; i < c.qkv_count; i++)
        if (i / D % 3 < 2) c.exact_qkv[i] = i / D % 3 == 0 ? 11 : 13;
    upload(&c);
    run_forward(&c, T - 1);
    double *out = download(c.x.out, c.out_count), *lse = download(c.x.lse, c.lse_count);
    Error of_out = {}, of_lse = {};
    for (size_t i = c.out_count - D; i < c.out_count; i++) {
        double mean = 0;
        for (size_t t = 0; t < (size_t)T; t++) mean += c.exact_qkv[(3 * t + 2) * D + i % D] / T;
        add_error(&of_out, out[i], mean);
    }
    add_error(&of_lse, lse[T - 1], 11 * 13 * sqrt(D) + log(T));
    assert_error("out", c.words, &of_out, 0, 1);
    assert_lse_error(c.words, &of_lse, 1);
    free(out), free(lse);
    free_case(&c);
}

// Rows start..T-1 alone are those of the whole; no other row is touched.
static void test_start(void** state) {
    (void)state;
    const int starts[] = {1, 100, 192, 259}, windows[] = {0, 70};
    for (int i = 0; i < 8; i++) {
        Case c = new_case(&UNEVEN, 1, 260, 32, windows[i / 4]);
        run_forward(&c, starts[i % 4]);
        check_forward(&c, starts[i % 4]);
        free_case(&c);
    }
}

// One more token with the keys and values of all before it: the bits of the same row of the whole.
static void test_decoding(void** state) {
    (void)state;
    const int Ds[] = {32, 64, 128};
    for (int d = 0; d < 3; d++) {
        Case c = new_case(&GQA, 1, 150, Ds[d], 0);
        run_forward(&c, 0);
        double* whole = download(c.x.out, c.out_count);
        forget(c.x.out, c.out_count * sizeof(floatX));
        run_forward(&c, c.s.T - 1);
        double* row = download(c.x.out, c.out_count);
        const size_t at = (size_t)(c.s.T - 1) * c.s.H * c.s.D;
        assert_memory_equal(row + at, whole + at, (size_t)c.s.H * c.s.D * sizeof(double));
        free(whole), free(row);
        free_case(&c);
    }
}

// Output and log-sum-exp with noise are the bits of those without; what is noised is that output; from any row on.
static void test_noise(void** state) {
    (void)state;
    static const struct {
        const HeadMap* map;
        int B, T, D, window, start;
    } shapes[] = {
        {&ONE, 1, 1, 64, 0, 0},    {&UNEVEN, 2, 65, 32, 0, 0}, {&MQA, 1, 150, 64, 40, 130},
        {&GQA, 2, 140, 128, 0, 3}, {&MHA, 1, 17, 128, 5, 16},
    };
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        Case c = new_case(shapes[i].map, shapes[i].B, shapes[i].T, shapes[i].D, shapes[i].window);
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
        Case c = new_case(&MQA, 1, 140, Ds[d], d == 1 ? 100 : 0);
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

static void test_head_dimensions(void** state) {
    (void)state;
    for (int D = 1; D <= 256; D++) {
        const AttentionShape s = {1, 1, 0, 1, 1, D, 0, 0, 0};
        assert_int_equal(attention_supports(&s), D == 32 || D == 64 || D == 128);
    }
}

// The argument: a pattern that the names of tests must match.
int main(int argc, char** argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),          cmocka_unit_test(test_large_scores),
        cmocka_unit_test(test_start),           cmocka_unit_test(test_decoding),
        cmocka_unit_test(test_noise),           cmocka_unit_test(test_repeatable),
        cmocka_unit_test(test_head_dimensions), cmocka_unit_test(test_many_tiles),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    reference_start();
    return cmocka_run_group_tests_name("attention on the device, " PRECISION_NAME, tests, NULL, NULL);
}
