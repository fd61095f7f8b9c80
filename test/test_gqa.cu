/*
gqa.cuh against dev/cpu/gqa.h in fp64 on the same inputs (test/reference.h), in the precision of the build: output,
log-sum-exp and gradients within the bounds of docs/math.md section 6, for sizes that reach every branch; the same bits when
repeated; every element of the outputs written and nothing else. Runs on the emulator and on a GPU.

TEST_LONG=1 runs the full matrix.
*/
// attention_forward, attention_backward
#include "gqa.cuh"
// reference_attention_forward, reference_attention_backward
#include "test/reference.h"
// new_doubles, fill_normal; cmocka
#include "test/numeric.h"

static const int LONG_MATRIX = getenv("TEST_LONG") != NULL;

// Relative errors, in the Euclidean norm. A log-sum-exp is fp32 in every build.
#if defined(PRECISION_BF16)
static const double BOUND = 1e-2;
#else
static const double BOUND = 1e-5;
#endif
static const double LSE_BOUND = 1e-5;

// ----------------------------------------------------------------------------
// Cases

enum { MAX_HEADS = 40 };

typedef struct {
    int H, G;
    int kv_of_q[MAX_HEADS];
} HeadMap;

static const HeadMap ONE = {1, 1, {0}}, MHA = {2, 2, {0, 1}}, GQA = {4, 2, {0, 0, 1, 1}},
                     MQA = {3, 1, {0, 0, 0}}, UNEVEN = {8, 4, {0, 1, 2, 2, 2, 3, 3, 3}},
                     FIRST_EMPTY = {3, 3, {1, 1, 2}}, MIDDLE_EMPTY = {3, 4, {0, 0, 3}},
                     LAST_EMPTY = {4, 3, {0, 1, 1, 1}},
                     // more heads than a warp has lanes, and a group that begins beyond them
    MANY = {40, 3, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2}};

typedef struct {
    int B, T, H, G, D, window;
    size_t qkv_count, out_count, lse_count;
    // on the host, floatX and what it holds exactly
    floatX *host_qkv, *host_dout;
    double *exact_qkv, *exact_dout;
    // on the device
    floatX *qkv, *dout, *out, *dqkv;
    float* lse;
    int* kv_of_q;
    void* workspace;
} Case;

static void upload(Case* c) {
    for (size_t i = 0; i < c->qkv_count; i++) c->host_qkv[i] = (floatX)(float)c->exact_qkv[i];
    for (size_t i = 0; i < c->out_count; i++) c->host_dout[i] = (floatX)(float)c->exact_dout[i];
    for (size_t i = 0; i < c->qkv_count; i++) c->exact_qkv[i] = (double)(float)c->host_qkv[i];
    for (size_t i = 0; i < c->out_count; i++) c->exact_dout[i] = (double)(float)c->host_dout[i];
    copy_to_device(c->qkv, c->host_qkv, c->qkv_count * sizeof(floatX), 0);
    copy_to_device(c->dout, c->host_dout, c->out_count * sizeof(floatX), 0);
}

// Bytes that no kernel has written: NaN in every type.
static void forget(void* memory, size_t bytes) {
    device_check(cudaMemset(memory, 0xFF, bytes), "clear memory");
}

static Case new_case(const HeadMap* map, int B, int T, int D, int window) {
    Case c = {};
    c.B = B, c.T = T, c.H = map->H, c.G = map->G, c.D = D, c.window = window;
    c.qkv_count = (size_t)B * T * (c.H + 2 * c.G) * D;
    c.out_count = (size_t)B * T * c.H * D;
    c.lse_count = (size_t)B * c.H * T;
    c.host_qkv = new_floats(c.qkv_count), c.host_dout = new_floats(c.out_count);
    c.exact_qkv = new_doubles(c.qkv_count), c.exact_dout = new_doubles(c.out_count);
    c.qkv = (floatX*)device_malloc(c.qkv_count * sizeof(floatX), "a test");
    c.dqkv = (floatX*)device_malloc(c.qkv_count * sizeof(floatX), "a test");
    c.dout = (floatX*)device_malloc(c.out_count * sizeof(floatX), "a test");
    c.out = (floatX*)device_malloc(c.out_count * sizeof(floatX), "a test");
    c.lse = (float*)device_malloc(c.lse_count * sizeof(float), "a test");
    c.kv_of_q = (int*)device_malloc(c.H * sizeof(int), "a test");
    const size_t bytes = attention_backward_workspace(B, T, c.H, c.G, D);
    c.workspace = device_malloc(bytes, "a test");
    forget(c.workspace, bytes);
    forget(c.out, c.out_count * sizeof(floatX));
    forget(c.lse, c.lse_count * sizeof(float));
    forget(c.dqkv, c.qkv_count * sizeof(floatX));
    copy_to_device(c.kv_of_q, map->kv_of_q, c.H * sizeof(int), 0);
    fill_normal(c.exact_qkv, NULL, c.qkv_count, 1, (uint64_t)T);
    fill_normal(c.exact_dout, NULL, c.out_count, 1, (uint64_t)T + 1);
    upload(&c);
    return c;
}

static void free_case(Case* c) {
    free(c->host_qkv), free(c->host_dout), free(c->exact_qkv), free(c->exact_dout);
    device_free(c->qkv), device_free(c->dqkv), device_free(c->dout), device_free(c->out), device_free(c->lse);
    device_free(c->kv_of_q), device_free(c->workspace);
}

static void run_forward(Case* c, int start) {
    attention_forward(c->out, c->lse, c->qkv, c->kv_of_q, c->workspace, c->B, c->T, start, c->H, c->G, c->D,
                      c->window, 0);
}

static void run_backward(Case* c) {
    attention_backward(c->dqkv, c->dout, c->out, c->lse, c->qkv, c->kv_of_q, c->workspace, c->B, c->T, c->H,
                       c->G, c->D, c->window, 0);
}

// What the device holds, as doubles.
template <typename Element> static double* download(const Element* values, size_t count) {
    Element* host = (Element*)malloc_or_fail(count * sizeof(Element), "a test");
    double* exact = new_doubles(count);
    copy_to_host(host, values, count * sizeof(Element), 0);
    stream_synchronize(0);
    for (size_t i = 0; i < count; i++) exact[i] = (double)(float)host[i];
    free(host);
    return exact;
}

// ----------------------------------------------------------------------------
// Errors

// One of the parts of dqkv (or all of out): the squares of its difference from the reference, of the difference that
// rounding alone makes, and of the reference.
typedef struct {
    double difference, rounding, norm;
} Error;

static void add_error(Error* error, double value, double reference) {
    const double rounded = (double)(float)(floatX)(float)reference;
    error->difference += (value - reference) * (value - reference);
    error->rounding += (rounded - reference) * (rounded - reference);
    error->norm += reference * reference;
}

// `noise` is what may be left where a gradient is 0 but for cancellation: the norm of another one that is not.
static void assert_error(const char* what, const Case* c, const Error* error, double noise,
                         int rounded_only) {
    const double difference = sqrt(error->difference), rounding = sqrt(error->rounding),
                 norm = sqrt(error->norm);
    int good = difference <= BOUND * norm + 2e-6 * noise;
#if defined(PRECISION_BF16)
    if (rounded_only) good = good && difference <= 2 * rounding + 1e-5 * noise;
#endif
    (void)rounded_only;
    if (getenv("SHOW") || !good)
        print_error("%s: error %.3g of %.3g, %.3g by rounding: B %d T %d H %d G %d D %d window %d\n", what,
                    difference, norm, rounding, c->B, c->T, c->H, c->G, c->D, c->window);
    assert_true(good);
}

static void check_forward(const Case* c, const HeadMap* map, int start) {
    double *out = download(c->out, c->out_count), *lse = download(c->lse, c->lse_count);
    double *ref_out = new_doubles(c->out_count), *ref_lse = new_doubles(c->lse_count);
    reference_attention_forward(ref_out, ref_lse, c->exact_qkv, map->kv_of_q, c->B, c->T, 0, c->H, c->G, c->D,
                                c->window);
    Error of_out = {}, of_lse = {};
    for (size_t i = 0; i < c->out_count; i++) {
        const int t = (int)(i / c->D / c->H % c->T);
        if (t >= start) add_error(&of_out, out[i], ref_out[i]);
        else assert_true(isnan(out[i]));
    }
    for (size_t i = 0; i < c->lse_count; i++) {
        if ((int)(i % c->T) >= start) add_error(&of_lse, lse[i], ref_lse[i]);
        else assert_true(isnan(lse[i]));
    }
    assert_error("out", c, &of_out, 0, 1);
    const double lse_error = sqrt(of_lse.difference), lse_norm = sqrt(of_lse.norm + (double)c->lse_count);
    if (!(lse_error <= LSE_BOUND * lse_norm))
        print_error("lse: error %.3g of %.3g: T %d D %d window %d\n", lse_error, lse_norm, c->T, c->D,
                    c->window);
    assert_true(lse_error <= LSE_BOUND * lse_norm);
    free(out), free(lse), free(ref_out), free(ref_lse);
}

// The reference has the same inputs, among them the output and the log-sum-exp of the device.
static void check_backward(const Case* c, const HeadMap* map, int rounded_only) {
    double *out = download(c->out, c->out_count), *lse = download(c->lse, c->lse_count);
    double *dqkv = download(c->dqkv, c->qkv_count), *ref_dqkv = new_doubles(c->qkv_count);
    reference_attention_backward(ref_dqkv, c->exact_dout, out, lse, c->exact_qkv, map->kv_of_q, c->B, c->T,
                                 c->H, c->G, c->D, c->window);
    Error errors[3] = {};
    for (size_t i = 0; i < c->qkv_count; i++) {
        const int head = (int)(i / c->D % (c->H + 2 * c->G));
        add_error(&errors[head < c->H ? 0 : head < c->H + c->G ? 1 : 2], dqkv[i], ref_dqkv[i]);
        if (head < c->H) continue;
        int used = 0;
        for (int h = 0; h < c->H; h++) used += map->kv_of_q[h] == (head - c->H) % c->G;
        if (!used) assert_true(dqkv[i] == 0);
    }
    const double noise = sqrt(errors[2].norm);
    assert_error("dq", c, &errors[0], noise, rounded_only);
    assert_error("dk", c, &errors[1], noise, rounded_only);
    assert_error("dv", c, &errors[2], 0, rounded_only);
    free(out), free(lse), free(dqkv), free(ref_dqkv);
}

static void check(const HeadMap* map, int B, int T, int D, int window) {
    Case c = new_case(map, B, T, D, window);
    run_forward(&c, 0);
    check_forward(&c, map, 0);
    run_backward(&c);
    check_backward(&c, map, T >= 16); // with fewer rows a single rounding decides
    free_case(&c);
}

// ----------------------------------------------------------------------------
// Tests

static void check_full_matrix(void) {
    const HeadMap* maps[] = {&ONE, &MHA, &GQA, &MQA, &UNEVEN, &FIRST_EMPTY, &MIDDLE_EMPTY, &LAST_EMPTY};
    const int Ts[] = {1, 2, 16, 31, 64, 65, 127, 128, 130, 200, 257, 400},
              windows[] = {0, 1, 3, 47, 63, 66, 129, 1000}, Ds[] = {32, 64, 128};
    int i = 0;
    for (int t = 0; t < 12; t++)
        for (int w = 0; w < 8; w++)
            for (int d = 0; d < 3; d++, i++)
                check(maps[(i + i / 8) % 8], 1 + i % 7 / 6, Ts[t], Ds[d], windows[w]);
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
        check_forward(&c, &MHA, 0);
        double *lse = download(c.lse, c.lse_count), largest = 0;
        for (size_t i = 0; i < c.lse_count; i++) largest = fmax(largest, lse[i]);
        assert_true(largest > 5e3);
        free(lse);
        free_case(&c);
    }
}

// Rows start..T-1 alone are those of the whole; no other row is touched.
static void test_start(void** state) {
    (void)state;
    const int starts[] = {1, 100, 192, 259}, windows[] = {0, 70};
    for (int i = 0; i < 8; i++) {
        Case c = new_case(&UNEVEN, 1, 260, 32, windows[i / 4]);
        run_forward(&c, starts[i % 4]);
        check_forward(&c, &UNEVEN, starts[i % 4]);
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
        double* whole = download(c.out, c.out_count);
        forget(c.out, c.out_count * sizeof(floatX));
        run_forward(&c, c.T - 1);
        double* row = download(c.out, c.out_count);
        const size_t at = (size_t)(c.T - 1) * c.H * c.D;
        assert_memory_equal(row + at, whole + at, (size_t)c.H * c.D * sizeof(double));
        free(whole), free(row);
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
            out[run] = download(c.out, c.out_count), lse[run] = download(c.lse, c.lse_count);
            dqkv[run] = download(c.dqkv, c.qkv_count);
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
    for (int D = 1; D <= 256; D++)
        assert_int_equal(attention_supports_head_dim(D), D == 32 || D == 64 || D == 128);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),     cmocka_unit_test(test_large_scores),
        cmocka_unit_test(test_start),      cmocka_unit_test(test_decoding),
        cmocka_unit_test(test_repeatable), cmocka_unit_test(test_head_dimensions),
    };
    reference_start();
    return cmocka_run_group_tests_name("attention on the device, " PRECISION_NAME, tests, NULL, NULL);
}
