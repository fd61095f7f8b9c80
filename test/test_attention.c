/*
Compares attention with a reference that follows the formulas: one row of scores at a time, in double.

In the fp64 build the tiled code must equal the reference to rounding, and the reference's gradients must
equal central differences. The fp32 build must be within 1e-5 of the reference on the same inputs
(docs/math.md section 7).
*/
// attention_forward, attention_backward; before cmocka.h, which makes fail() a macro of its own
#include "dev/cpu/gqa.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
// head_maps
#include "test/head_maps.h"

#if defined(PRECISION_FP64)
#define TOLERANCE 1e-12
#else
#define TOLERANCE 1e-5
#endif

// ----------------------------------------------------------------------------
// Cases

// Inputs, what attention computes from them, and what the reference computes.
typedef struct {
    AttentionShape s;
    AttentionTensors x;
    size_t qkv_count, out_count, lse_count;
    floatX *qkv, *dout; // x.qkv and x.dout, to write to
    double *ref_out, *ref_lse, *ref_dqkv;
} attention_case_t;

static uint64_t random_state = 1;

// Uniform in -1..1.
static double draw(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 33) / (double)(1u << 30) - 1.0;
}

static floatX* new_floats(size_t count) { return (floatX*)malloc_or_fail(count * sizeof(floatX), "a test"); }

static double* new_doubles(size_t count) { return (double*)malloc_or_fail(count * sizeof(double), "a test"); }

static void fill_nan(floatX* values, size_t count) {
    for (size_t i = 0; i < count; i++) values[i] = (floatX)NAN;
}

static attention_case_t new_case(const head_map_t* map, int B, int T, int D, int window) {
    const AttentionShape s = {B, T, 0, map->H, map->G, D, window, 0, 0};
    attention_case_t c;
    memset(&c, 0, sizeof(c));
    c.s = s;
    c.qkv_count = (size_t)B * T * (c.s.H + 2 * c.s.G) * D;
    c.out_count = (size_t)B * T * c.s.H * D;
    c.lse_count = (size_t)B * c.s.H * T;
    c.qkv = new_floats(c.qkv_count);
    c.dout = new_floats(c.out_count);
    c.x.out = new_floats(c.out_count);
    c.x.dqkv = new_floats(c.qkv_count);
    c.x.lse = new_floats(c.lse_count);
    c.x.qkv = c.qkv, c.x.dout = c.dout, c.x.kv_of_q = map->kv_of_q;
    c.ref_out = new_doubles(c.out_count);
    c.ref_lse = new_doubles(c.lse_count);
    c.ref_dqkv = new_doubles(c.qkv_count);
    for (size_t i = 0; i < c.qkv_count; i++) c.qkv[i] = (floatX)(2 * draw());
    for (size_t i = 0; i < c.out_count; i++) c.dout[i] = (floatX)draw();
    fill_nan(c.x.out, c.out_count);
    fill_nan(c.x.lse, c.lse_count);
    fill_nan(c.x.dqkv, c.qkv_count);
    return c;
}

static void free_case(attention_case_t* c) {
    free(c->qkv), free(c->dout), free(c->x.out), free(c->x.dqkv), free(c->x.lse);
    free(c->ref_out), free(c->ref_lse), free(c->ref_dqkv);
}

// Exactly the bytes asked for, none of them a number.
static void* new_workspace(size_t bytes) { return memset(malloc_or_fail(bytes, "a workspace"), 0xff, bytes); }

static void run_forward_from(attention_case_t* c, int start) {
    AttentionShape s = c->s;
    s.start = start;
    c->x.workspace = new_workspace(attention_forward_workspace(&s));
    attention_forward(&c->x, &s, 0);
    free(c->x.workspace);
}

static void run_forward(attention_case_t* c) { run_forward_from(c, 0); }

static void run_backward(attention_case_t* c) {
    c->x.workspace = new_workspace(attention_backward_workspace(&c->s));
    attention_backward(&c->x, &c->s, 0);
    free(c->x.workspace);
}

// ----------------------------------------------------------------------------
// The reference

static double reference_dot(const floatX* a, const floatX* b, int D) {
    double sum = 0;
    for (int d = 0; d < D; d++) sum += (double)a[d] * (double)b[d];
    return sum;
}

// One query of one head: its output and log-sum-exp, and what it adds to the gradients of the sequence.
static void reference_row(const attention_case_t* c, double* probs, int b, int h, int t) {
    const int D = c->s.D, stride = (c->s.H + 2 * c->s.G) * D;
    const int first = c->s.window == 0 || c->s.window > t ? 0 : t - c->s.window + 1;
    const size_t sequence = (size_t)b * c->s.T * stride;
    const size_t q = sequence + (size_t)t * stride + (size_t)h * D;
    const size_t k = sequence + (size_t)(c->s.H + c->x.kv_of_q[h]) * D, v = k + (size_t)c->s.G * D;
    const size_t o = (((size_t)b * c->s.T + t) * c->s.H + h) * D;
    double largest = -INFINITY, sum = 0, delta = 0;
    for (int s = first; s <= t; s++) {
        probs[s] = reference_dot(c->qkv + q, c->qkv + k + (size_t)s * stride, D) / sqrt((double)D);
        largest = fmax(largest, probs[s]);
    }
    for (int s = first; s <= t; s++) sum += probs[s] = exp(probs[s] - largest);
    for (int s = first; s <= t; s++) probs[s] /= sum;
    c->ref_lse[((size_t)b * c->s.H + h) * c->s.T + t] = largest + log(sum);
    for (int d = 0; d < D; d++) {
        double output = 0;
        for (int s = first; s <= t; s++) output += probs[s] * (double)c->qkv[v + (size_t)s * stride + d];
        c->ref_out[o + d] = output;
        delta += output * (double)c->dout[o + d];
    }
    for (int s = first; s <= t; s++) {
        const size_t row = (size_t)s * stride;
        const double dprob = reference_dot(c->dout + o, c->qkv + v + row, D);
        const double dscore = probs[s] * (dprob - delta) / sqrt((double)D);
        for (int d = 0; d < D; d++) {
            c->ref_dqkv[q + d] += dscore * (double)c->qkv[k + row + d];
            c->ref_dqkv[k + row + d] += dscore * (double)c->qkv[q + d];
            c->ref_dqkv[v + row + d] += probs[s] * (double)c->dout[o + d];
        }
    }
}

static void run_reference(attention_case_t* c) {
    double* probs = new_doubles(c->s.T);
    for (size_t i = 0; i < c->qkv_count; i++) c->ref_dqkv[i] = 0;
    for (int b = 0; b < c->s.B; b++)
        for (int h = 0; h < c->s.H; h++)
            for (int t = 0; t < c->s.T; t++) reference_row(c, probs, b, h, t);
    free(probs);
}

// |a - b| / |b| in the Euclidean norm; NaN where any element is.
static double relative_error(const floatX* a, const double* b, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

static void assert_error_below(double error, double tolerance, const char* what, const attention_case_t* c) {
    if (error <= tolerance) return; // false for NaN
    fail_msg("%s: relative error %.3g > %.3g with B %d T %d H %d G %d D %d window %d", what, error, tolerance,
             c->s.B, c->s.T, c->s.H, c->s.G, c->s.D, c->s.window);
}

// ----------------------------------------------------------------------------
// Tests

static void check_against_reference(const head_map_t* map, int B, int T, int D, int window) {
    attention_case_t c = new_case(map, B, T, D, window);
    run_forward(&c);
    run_backward(&c);
    run_reference(&c);
    assert_error_below(relative_error(c.x.out, c.ref_out, c.out_count), TOLERANCE, "out", &c);
    assert_error_below(relative_error(c.x.lse, c.ref_lse, c.lse_count), TOLERANCE, "lse", &c);
    // One token alone has gradient 0 of query and key; the rest is then rounding, measured by what dout brings in.
    const size_t stride = (size_t)(c.s.H + 2 * c.s.G) * D;
    for (size_t i = 0; i < c.qkv_count; i++) {
        assert_true(isfinite((double)c.x.dqkv[i]));
        if (T == 1 && i % stride < (size_t)(c.s.H + c.s.G) * D) {
            assert_true(fabs((double)c.x.dqkv[i] - c.ref_dqkv[i]) <= TOLERANCE * D);
            c.x.dqkv[i] = 0, c.ref_dqkv[i] = 0;
        }
    }
    assert_error_below(relative_error(c.x.dqkv, c.ref_dqkv, c.qkv_count), TOLERANCE, "dqkv", &c);
    free_case(&c);
}

static void test_shapes(void** state) {
    (void)state;
    const int Ts[] = {1, 2, 17, 64, 65, 127, 200, 257}, Ds[] = {8, 32, 64, 80},
              windows[] = {0, 1, 3, 64, 1000};
    int i = 0;
    for (int t = 0; t < 8; t++) {
        for (int m = 0; m < NUM_HEAD_MAPS; m++) {
            for (int w = 0; w < 5; w++, i++) {
                // Large ones with every fourth map; head dimensions and batch sizes take turns.
                if (Ts[t] > 100 && (m + t) % 4) continue;
                check_against_reference(&head_maps[m], Ts[t] > 100 ? 1 : 1 + i % 3, Ts[t],
                                        Ds[(i + i / 4) % 4], windows[w]);
            }
        }
    }
}

static void test_odd_head_dimensions(void** state) {
    (void)state;
    const int Ds[] = {1, 3, 7, 17, 33, 129};
    for (int d = 0; d < 6; d++) {
        check_against_reference(&head_maps[6], 2, 70, Ds[d], 0);
        check_against_reference(&head_maps[4], 1, 150, Ds[d], 20);
    }
}

// Windows around the tile sizes, long enough that whole tiles fall out of the band on both sides.
static void test_windows_and_tiles(void** state) {
    (void)state;
    const int windows[] = {2, 63, 65, 127, 128, 191, 192, 193, 255, 256, 599, 600, 601};
    for (int w = 0; w < 13; w++) check_against_reference(&head_maps[3], 1, 600, 8, windows[w]);
}

#if defined(PRECISION_FP64)
static double weighted_sum_of_outputs(attention_case_t* c) {
    run_forward(c);
    double sum = 0;
    for (size_t i = 0; i < c->out_count; i++) sum += c->dout[i] * c->x.out[i];
    return sum;
}

static void test_central_differences(void** state) {
    (void)state;
    // Thousands of tiny calls: threads would mostly wait for each other, and the bits are the same (test_bitwise).
    const int threads_before = omp_get_max_threads();
    omp_set_num_threads(1);
    // B, T, D, window; the last two cross the border of a tile.
    const int shapes[][4] = {{2, 9, 4, 0}, {1, 17, 8, 3}, {1, 9, 8, 1}, {1, 67, 1, 0}, {1, 67, 1, 20}};
    for (int m = 0; m < NUM_HEAD_MAPS; m++) {
        for (int s = 0; s < 5; s++) {
            const int* shape = shapes[s];
            if (shape[1] > 17 && m % 3) continue; // the long ones with some of the maps
            attention_case_t c = new_case(&head_maps[m], shape[0], shape[1], shape[2], shape[3]);
            run_forward(&c);
            run_backward(&c);
            const double step = 1e-5;
            for (size_t i = 0; i < c.qkv_count; i++) {
                const double value = c.qkv[i];
                c.qkv[i] = value + step;
                const double above = weighted_sum_of_outputs(&c);
                c.qkv[i] = value - step;
                const double below = weighted_sum_of_outputs(&c);
                c.qkv[i] = value;
                c.ref_dqkv[i] = (above - below) / (2 * step);
            }
            assert_error_below(relative_error(c.x.dqkv, c.ref_dqkv, c.qkv_count), 1e-6, "central differences",
                               &c);
            free_case(&c);
        }
    }
    omp_set_num_threads(threads_before);
}
#endif

// Scores of about +-1e4, small integers in the inputs so that they are exact in every precision.
static void test_large_scores(void** state) {
    (void)state;
    for (int window = 0; window <= 40; window += 40) {
        attention_case_t c = new_case(&head_maps[4], 1, 200, 64, window);
        for (size_t i = 0; i < c.qkv_count; i++) c.qkv[i] = (floatX)rint(100 * (double)c.qkv[i]);
        run_forward(&c);
        run_backward(&c);
        run_reference(&c);
        double largest = 0;
        for (size_t i = 0; i < c.lse_count; i++) largest = fmax(largest, c.ref_lse[i]);
        assert_true(largest > 1e4);
        assert_error_below(relative_error(c.x.out, c.ref_out, c.out_count), TOLERANCE, "out", &c);
        assert_error_below(relative_error(c.x.lse, c.ref_lse, c.lse_count), TOLERANCE, "lse", &c);
        // A probability made again from a log-sum-exp of 1e4 has 1e4 times the rounding.
        assert_error_below(relative_error(c.x.dqkv, c.ref_dqkv, c.qkv_count), 1e4 * TOLERANCE, "dqkv", &c);
        free_case(&c);
    }
}

// Rows start..T-1 alone are those of the whole, and no other row is touched.
static void test_start(void** state) {
    (void)state;
    const int T = 257, starts[] = {0, 1, 100, 192, 255, 256}, windows[] = {0, 3, 64};
    for (int i = 0; i < 18; i++) {
        const int start = starts[i % 6];
        attention_case_t c = new_case(&head_maps[4 + i % 4], 1 + i % 2, T, 16, windows[i / 6]);
        run_reference(&c);
        run_forward_from(&c, start);
        for (int b = 0; b < c.s.B; b++) {
            const size_t rows = (size_t)b * T * c.s.H * c.s.D, done = (size_t)start * c.s.H * c.s.D;
            for (size_t j = 0; j < done; j++) assert_true(isnan((double)c.x.out[rows + j]));
            assert_error_below(relative_error(c.x.out + rows + done, c.ref_out + rows + done,
                                              (size_t)(T - start) * c.s.H * c.s.D),
                               TOLERANCE, "out from start", &c);
            for (int h = 0; h < c.s.H; h++) {
                const size_t row = ((size_t)b * c.s.H + h) * T;
                for (int t = 0; t < start; t++) assert_true(isnan((double)c.x.lse[row + t]));
                assert_error_below(relative_error(c.x.lse + row + start, c.ref_lse + row + start, T - start),
                                   TOLERANCE, "lse from start", &c);
            }
        }
        free_case(&c);
    }
}

// The same bits on every run and for every number of threads, whichever way the backward divides its work.
static void test_bitwise(void** state) {
    (void)state;
    const int threads_before = omp_get_max_threads(), windows[] = {0, 100};
    for (int m = 0; m < NUM_HEAD_MAPS; m++) {
        for (int w = 0; w < 2; w++) {
            attention_case_t c = new_case(&head_maps[m], 1, 530, 8, windows[w]);
            floatX* out = new_floats(c.out_count);
            floatX* lse = new_floats(c.lse_count);
            floatX* dqkv = new_floats(c.qkv_count);
            for (int threads = 1; threads <= 9; threads += 2) {
                omp_set_num_threads(threads);
                fill_nan(c.x.out, c.out_count);
                fill_nan(c.x.lse, c.lse_count);
                fill_nan(c.x.dqkv, c.qkv_count);
                run_forward(&c);
                run_backward(&c);
                if (threads == 1) {
                    memcpy(out, c.x.out, c.out_count * sizeof(floatX));
                    memcpy(lse, c.x.lse, c.lse_count * sizeof(floatX));
                    memcpy(dqkv, c.x.dqkv, c.qkv_count * sizeof(floatX));
                }
                assert_memory_equal(out, c.x.out, c.out_count * sizeof(floatX));
                assert_memory_equal(lse, c.x.lse, c.lse_count * sizeof(floatX));
                assert_memory_equal(dqkv, c.x.dqkv, c.qkv_count * sizeof(floatX));
            }
            free(out), free(lse), free(dqkv);
            free_case(&c);
        }
    }
    omp_set_num_threads(threads_before);
}

// Another token at position t changes the outputs of t..t+window-1 and not a bit of any other.
static void test_no_token_reaches_back(void** state) {
    (void)state;
    const int T = 260, changed[] = {0, 1, 63, 64, 130, 259}, windows[] = {0, 1, 3, 64, 200};
    for (int w = 0; w < 5; w++) {
        attention_case_t c = new_case(&head_maps[5], 1, T, 16, windows[w]);
        floatX* before = new_floats(c.out_count);
        const size_t out_row = (size_t)c.s.H * c.s.D, qkv_row = (size_t)(c.s.H + 2 * c.s.G) * c.s.D;
        run_forward(&c);
        memcpy(before, c.x.out, c.out_count * sizeof(floatX));
        for (int i = 0; i < 6; i++) {
            for (size_t j = 0; j < qkv_row; j++) c.qkv[changed[i] * qkv_row + j] += (floatX)draw();
            run_forward(&c);
            for (int t = 0; t < T; t++) {
                const int sees = t >= changed[i] && (c.s.window == 0 || t < changed[i] + c.s.window);
                const int same =
                    !memcmp(before + t * out_row, c.x.out + t * out_row, out_row * sizeof(floatX));
                assert_int_equal(same, !sees);
            }
            memcpy(before, c.x.out, c.out_count * sizeof(floatX));
        }
        free(before);
        free_case(&c);
    }
}

static void test_empty_groups_have_gradient_zero(void** state) {
    (void)state;
    for (int m = 5; m < NUM_HEAD_MAPS; m++) {
        attention_case_t c = new_case(&head_maps[m], 2, 65, 8, 0);
        run_forward(&c);
        run_backward(&c);
        for (int g = 0; g < c.s.G; g++) {
            int heads = 0;
            for (int h = 0; h < c.s.H; h++) heads += c.x.kv_of_q[h] == g;
            for (int row = 0; row < 2 * c.s.B * c.s.T; row++) {
                const floatX* token = c.x.dqkv + (size_t)(row / 2) * (c.s.H + 2 * c.s.G) * c.s.D;
                const floatX* gradient = token + (size_t)(c.s.H + row % 2 * c.s.G + g) * c.s.D;
                int zeros = 0;
                for (int d = 0; d < c.s.D; d++) zeros += gradient[d] == 0;
                if (heads == 0) assert_int_equal(zeros, c.s.D);
            }
        }
        free_case(&c);
    }
}

static void test_workspace_is_linear(void** state) {
    (void)state;
    const AttentionShape one_token = {1, 1, 0, 8, 2, 64, 0, 0, 0},
                         short_rows = {2, 1024, 0, 8, 2, 64, 0, 0, 0},
                         long_rows = {2, 4096, 0, 8, 2, 64, 0, 0, 0};
    const size_t base = attention_backward_workspace(&one_token);
    const size_t small = attention_backward_workspace(&short_rows) - base;
    const size_t large = attention_backward_workspace(&long_rows) - base;
    assert_true(large < 5 * small);
    // Twice the size of the output, one number a row, and the threads' tiles.
    assert_true(large < 2 * (size_t)2 * 4096 * 8 * 65 * sizeof(floatX));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_odd_head_dimensions),
        cmocka_unit_test(test_windows_and_tiles),
#if defined(PRECISION_FP64)
        cmocka_unit_test(test_central_differences),
#endif
        cmocka_unit_test(test_large_scores),
        cmocka_unit_test(test_start),
        cmocka_unit_test(test_bitwise),
        cmocka_unit_test(test_no_token_reaches_back),
        cmocka_unit_test(test_empty_groups_have_gradient_zero),
        cmocka_unit_test(test_workspace_is_linear),
    };
    return cmocka_run_group_tests_name("attention " PRECISION_NAME, tests, NULL, NULL);
}
