/*
Tests every operation except attention (which has its own test). It compares the output with a plain
definition in double precision, and the gradients with central differences of that definition, in fp64 and in
fp32.
*/
#include "test/numeric.h"
#include "dev/cpu/device.h"
#include "dev/cpu/embedding.h"
#include "dev/cpu/rmsnorm.h"
#include "dev/cpu/matmul.h"
#include "dev/cpu/rope.h"
#include "dev/cpu/swiglu.h"
#include "dev/cpu/classifier.h"
#include "dev/cpu/adamw.h"
#include "dev/cpu/keyconv.h"
#include "dev/cpu/keynorm.h"
#include "dev/cpu/noise.h"

// An operation of up to three inputs, with the sizes that its definition needs.
typedef struct Operation Operation;
struct Operation {
    const char* name;
    int inputs;
    size_t sizes[3];
    size_t output_size;
    int shape[6];
    void (*define)(double* out, double* const* in, const int* shape);
    void (*forward)(floatX* out, floatX* const* in, const int* shape);
    void (*backward)(floatX* const* din, const floatX* dout, floatX* const* in, const int* shape);
};

typedef struct {
    const Operation* operation;
    double* in[3];
    double* out;
    double* weights; // the loss is <weights, out>
} DefinedLoss;

static double defined_loss(void* context) {
    DefinedLoss* c = (DefinedLoss*)context;
    c->operation->define(c->out, c->in, c->operation->shape);
    return dot(c->out, c->weights, c->operation->output_size);
}

static void check_operation(const Operation* operation) {
    DefinedLoss loss;
    floatX *in[3], *din[3], *out = new_floats(operation->output_size),
                            *dout = new_floats(operation->output_size);
    loss.operation = operation;
    loss.out = new_doubles(operation->output_size);
    loss.weights = new_doubles(operation->output_size);
    fill_normal(loss.weights, dout, operation->output_size, 1, 99);
    for (int i = 0; i < operation->inputs; i++) {
        in[i] = new_floats(operation->sizes[i]);
        din[i] = new_floats(operation->sizes[i]);
        loss.in[i] = new_doubles(operation->sizes[i]);
        fill_normal(loss.in[i], in[i], operation->sizes[i], 1, (uint64_t)i);
    }
    operation->forward(out, in, operation->shape);
    defined_loss(&loss);
    assert_close(operation->name, out, loss.out, operation->output_size, FORWARD_BOUND);

    operation->backward(din, dout, in, operation->shape);
    for (int i = 0; i < operation->inputs; i++) {
        double* numeric = new_doubles(operation->sizes[i]);
        for (size_t j = 0; j < operation->sizes[i]; j++)
            numeric[j] = central_difference(defined_loss, &loss, &loss.in[i][j]);
        char what[64];
        snprintf(what, sizeof(what), "%s, gradient of input %d", operation->name, i);
        assert_close(what, din[i], numeric, operation->sizes[i], GRADIENT_BOUND);
        free(numeric);
    }
    for (int i = 0; i < operation->inputs; i++) {
        free(in[i]);
        free(din[i]);
        free(loss.in[i]);
    }
    free(out);
    free(dout);
    free(loss.out);
    free(loss.weights);
}

// ----------------------------------------------------------------------------
// RMSNorm: shape = rows, C

static void define_rmsnorm(double* out, double* const* in, const int* shape) {
    const int C = shape[1];
    for (int row = 0; row < shape[0]; row++) {
        double sum = 0;
        for (int c = 0; c < C; c++) sum += in[0][row * C + c] * in[0][row * C + c];
        for (int c = 0; c < C; c++) out[row * C + c] = in[0][row * C + c] / sqrt(sum / C + 1e-5f) * in[1][c];
    }
}

static void rmsnorm_forward_case(floatX* out, floatX* const* in, const int* shape) {
    float_acc* rstd = new_floats((size_t)shape[0]);
    rmsnorm_forward(out, rstd, in[0], in[1], shape[0], shape[1], 1e-5f, 0);
    free(rstd);
}

static void rmsnorm_backward_case(floatX* const* din, const floatX* dout, floatX* const* in,
                                  const int* shape) {
    float_acc* rstd = new_floats((size_t)shape[0]);
    floatX* out = new_floats((size_t)shape[0] * shape[1]);
    rmsnorm_forward(out, rstd, in[0], in[1], shape[0], shape[1], 1e-5f, 0);
    rmsnorm_backward(din[0], din[1], dout, in[0], in[1], rstd, NULL, shape[0], shape[1], 0);
    free(rstd);
    free(out);
}

static void define_residual_rmsnorm(double* out, double* const* in, const int* shape) {
    const size_t count = (size_t)shape[0] * shape[1];
    double* sum = new_doubles(count);
    for (size_t i = 0; i < count; i++) sum[i] = in[0][i] + in[1][i];
    double* const normed[2] = {sum, in[2]};
    define_rmsnorm(out, normed, shape);
    free(sum);
}

static void residual_rmsnorm_forward_case(floatX* out, floatX* const* in, const int* shape) {
    const size_t count = (size_t)shape[0] * shape[1];
    float_acc* rstd = new_floats((size_t)shape[0]);
    floatX* sum = new_floats(count);
    residual_rmsnorm_forward(sum, out, rstd, in[0], in[1], in[2], shape[0], shape[1], 1e-5f, 0);
    for (size_t i = 0; i < count; i++) assert_true(sum[i] == in[0][i] + in[1][i]);
    free(rstd);
    free(sum);
}

static void residual_rmsnorm_backward_case(floatX* const* din, const floatX* dout, floatX* const* in,
                                           const int* shape) {
    const size_t count = (size_t)shape[0] * shape[1];
    floatX* sum = new_floats(count);
    for (size_t i = 0; i < count; i++) sum[i] = in[0][i] + in[1][i];
    floatX *const summed[2] = {sum, in[2]}, *const dsummed[2] = {din[0], din[2]};
    rmsnorm_backward_case(dsummed, dout, summed, shape);
    memcpy(din[1], din[0], count * sizeof(floatX));
    free(sum);
}

static void test_rmsnorm(void** state) {
    (void)state;
    const int widths[] = {2, 5, 64, 97,
                          130}; // not 1: the norm would be a sign, and its gradient would cancel
    for (int i = 0; i < 5; i++) {
        size_t C = (size_t)widths[i], rows = 3;
        Operation norm = {"rmsnorm",
                          2,
                          {rows * C, C, 0},
                          rows * C,
                          {3, widths[i]},
                          define_rmsnorm,
                          rmsnorm_forward_case,
                          rmsnorm_backward_case};
        check_operation(&norm);
        Operation residual = {"residual_rmsnorm",
                              3,
                              {rows * C, rows * C, C},
                              rows * C,
                              {3, widths[i]},
                              define_residual_rmsnorm,
                              residual_rmsnorm_forward_case,
                              residual_rmsnorm_backward_case};
        check_operation(&residual);
    }
}

// ----------------------------------------------------------------------------
// Matrix product: shape = rows, in, out

static void define_matmul(double* out, double* const* in, const int* shape) {
    for (int r = 0; r < shape[0]; r++)
        for (int o = 0; o < shape[2]; o++)
            out[r * shape[2] + o] = dot(in[0] + r * shape[1], in[1] + o * shape[1], (size_t)shape[1]);
}
static void matmul_forward_case(floatX* out, floatX* const* in, const int* shape) {
    matmul_forward(out, in[0], in[1], shape[0], shape[1], shape[2], 0);
}
static void matmul_backward_case(floatX* const* din, const floatX* dout, floatX* const* in,
                                 const int* shape) {
    matmul_backward(din[0], din[1], dout, in[0], in[1], shape[0], shape[1], shape[2], 0);
}

static void test_matmul(void** state) {
    (void)state;
    const int shapes[][3] = {{1, 1, 1}, {7, 5, 3}, {1, 33, 17}, {19, 16, 64}, {33, 40, 23}};
    for (int i = 0; i < 5; i++) {
        size_t rows = (size_t)shapes[i][0], in = (size_t)shapes[i][1], out = (size_t)shapes[i][2];
        Operation operation = {"matmul",
                               2,
                               {rows * in, out * in, 0},
                               rows * out,
                               {shapes[i][0], shapes[i][1], shapes[i][2]},
                               define_matmul,
                               matmul_forward_case,
                               matmul_backward_case};
        check_operation(&operation);
    }
}

// ----------------------------------------------------------------------------
// RoPE: shape = B, T, H, G, D

static void define_rope(double* out, double* const* in, const int* shape) {
    const int B = shape[0], T = shape[1], H = shape[2], G = shape[3], D = shape[4], heads = H + 2 * G;
    for (int row = 0; row < B * T; row++) {
        for (int head = 0; head < heads; head++) {
            const double* x = in[0] + ((size_t)row * heads + head) * D;
            double* y = out + ((size_t)row * heads + head) * D;
            for (int i = 0; i < D; i++) y[i] = x[i];
            for (int i = 0; i < D / 2 && head < H + G; i++) {
                double angle = row % T * pow(10000, -2.0 * i / D);
                y[i] = x[i] * cos(angle) - x[i + D / 2] * sin(angle);
                y[i + D / 2] = x[i] * sin(angle) + x[i + D / 2] * cos(angle);
            }
        }
    }
}
static size_t rope_size(const int* shape) {
    return (size_t)shape[0] * shape[1] * (shape[2] + 2 * shape[3]) * shape[4];
}
static void rope_case(floatX* x, const int* shape, int backward) {
    float_acc* table = new_floats((size_t)shape[1] * shape[4]);
    rope_table(table, shape[1], shape[4], 10000);
    (backward ? rope_backward : rope_forward)(x, table, shape[0], shape[1], shape[2], shape[3], shape[4], 0);
    free(table);
}
static void rope_forward_case(floatX* out, floatX* const* in, const int* shape) {
    memcpy(out, in[0], rope_size(shape) * sizeof(floatX));
    rope_case(out, shape, 0);
}
static void rope_backward_case(floatX* const* din, const floatX* dout, floatX* const* in, const int* shape) {
    (void)in;
    memcpy(din[0], dout, rope_size(shape) * sizeof(floatX));
    rope_case(din[0], shape, 1);
}

static void test_rope(void** state) {
    (void)state;
    const int shapes[][5] = {{1, 1, 1, 1, 2}, {2, 7, 3, 1, 6}, {1, 9, 4, 2, 16}, {3, 3, 2, 2, 34}};
    for (int i = 0; i < 4; i++) {
        size_t size = rope_size(shapes[i]);
        Operation operation = {"rope",
                               1,
                               {size, 0, 0},
                               size,
                               {shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3], shapes[i][4]},
                               define_rope,
                               rope_forward_case,
                               rope_backward_case};
        check_operation(&operation);
    }
}

// ----------------------------------------------------------------------------
// SwiGLU: shape = rows, F

static void define_swiglu(double* out, double* const* in, const int* shape) {
    const int F = shape[1];
    for (int i = 0; i < shape[0] * F; i++) {
        double gate = in[0][i / F * 2 * F + i % F], up = in[0][i / F * 2 * F + F + i % F];
        out[i] = gate / (1 + exp(-gate)) * up;
    }
}
static void swiglu_forward_case(floatX* out, floatX* const* in, const int* shape) {
    swiglu_forward(out, in[0], shape[0], shape[1], 0);
}
static void swiglu_backward_case(floatX* const* din, const floatX* dout, floatX* const* in,
                                 const int* shape) {
    swiglu_backward(din[0], dout, in[0], shape[0], shape[1], 0);
}

static void test_swiglu(void** state) {
    (void)state;
    const int widths[] = {1, 7, 64, 101};
    for (int i = 0; i < 4; i++) {
        size_t size = 3 * (size_t)widths[i];
        Operation operation = {"swiglu",
                               1,
                               {2 * size, 0, 0},
                               size,
                               {3, widths[i]},
                               define_swiglu,
                               swiglu_forward_case,
                               swiglu_backward_case};
        check_operation(&operation);
    }
}

// Gates far from zero saturate the sigmoid. Nothing may overflow.
static void test_swiglu_saturates(void** state) {
    (void)state;
    const floatX gate_up[4] = {-1e4f, 1e4f, 2, 3}, dout[2] = {1, 1};
    floatX out[2], dgate_up[4];
    swiglu_forward(out, gate_up, 1, 2, 0);
    swiglu_backward(dgate_up, dout, gate_up, 1, 2, 0);
    const double want[2] = {0, 3e4}, dwant[4] = {0, 3, 0, 1e4};
    assert_close("out", out, want, 2, 1e-6);
    assert_close("gradient", dgate_up, dwant, 4, 1e-6);
}

// ----------------------------------------------------------------------------
// Classifier: shape = rows, V, Vp

static int target_of(int row, int V) { return (row * 7 + 3) % V; }

static void define_classifier(double* out, double* const* in, const int* shape) {
    const int V = shape[1], Vp = shape[2];
    for (int row = 0; row < shape[0]; row++) {
        double sum = 0;
        for (int v = 0; v < V; v++) sum += exp(in[0][row * Vp + v]);
        out[row] = log(sum) - in[0][row * Vp + target_of(row, V)];
    }
}

// The operation multiplies all gradients by one number, dout. The test has a dout for each
// row, so it calls the operation row by row.
static void classifier_rows(floatX* losses, floatX* logits, const floatX* dout, const int* shape) {
    for (int row = 0; row < shape[0]; row++) {
        int target = target_of(row, shape[1]);
        fused_classifier(logits + (size_t)row * shape[2], losses + row, &target, dout ? dout[row] : 0, 1,
                         shape[1], shape[2], dout != NULL, 0);
    }
}
static void classifier_forward_case(floatX* out, floatX* const* in, const int* shape) {
    classifier_rows(out, in[0], NULL, shape);
}
static void classifier_backward_case(floatX* const* din, const floatX* dout, floatX* const* in,
                                     const int* shape) {
    floatX* losses = new_floats((size_t)shape[0]);
    memcpy(din[0], in[0], (size_t)shape[0] * shape[2] * sizeof(floatX));
    classifier_rows(losses, din[0], dout, shape);
    free(losses);
}

static void test_classifier(void** state) {
    (void)state;
    const int sizes[][2] = {{2, 2}, {5, 8}, {100, 128}, {129, 256}};
    for (int i = 0; i < 4; i++) {
        size_t size = 4 * (size_t)sizes[i][1];
        Operation operation = {"classifier",
                               1,
                               {size, 0, 0},
                               4,
                               {4, sizes[i][0], sizes[i][1]},
                               define_classifier,
                               classifier_forward_case,
                               classifier_backward_case};
        check_operation(&operation);
    }
}

// The losses must be equal with and without gradients. Large logits must not
// overflow, and padding must not count.
static void test_classifier_edges(void** state) {
    (void)state;
    floatX logits[2][4] = {{1e4f, 1e4f - 1, -1e4f, 1e8f}, {1e4f, 1e4f - 1, -1e4f, 1e8f}};
    float_acc losses[2];
    int target = 1;
    fused_classifier(logits[0], &losses[0], &target, 1, 1, 3, 4, 0, 0);
    fused_classifier(logits[1], &losses[1], &target, 1, 1, 3, 4, 1, 0);
    assert_true(fabs((double)losses[0] - 1.31326168752) <
                1e-6 * 1e3); // log(1 + e); near 1e4 a float has few digits after the point
    assert_true(fabs((double)losses[0] - (double)losses[1]) < 1e-6);
    assert_true(fabs((double)logits[1][0] - 0.73105857863) < 1e-6);
    assert_true(fabs((double)logits[1][1] + 0.73105857863) < 1e-6);
    assert_true(logits[1][2] == 0 && logits[1][3] == 0);
}

// ----------------------------------------------------------------------------
// Embedding: shape = rows, C, V; tokens repeat

static void define_embedding(double* out, double* const* in, const int* shape) {
    for (int i = 0; i < shape[0] * shape[1]; i++)
        out[i] = in[0][target_of(i / shape[1], shape[2]) * shape[1] + i % shape[1]];
}
static int* embedding_tokens(const int* shape) {
    int* tokens = (int*)malloc_or_fail((size_t)shape[0] * sizeof(int), "tokens");
    for (int row = 0; row < shape[0]; row++) tokens[row] = target_of(row, shape[2]);
    return tokens;
}
static void embedding_forward_case(floatX* out, floatX* const* in, const int* shape) {
    int* tokens = embedding_tokens(shape);
    embedding_forward(out, tokens, in[0], shape[0], shape[1], 0);
    free(tokens);
}
static void embedding_backward_case(floatX* const* din, const floatX* dout, floatX* const* in,
                                    const int* shape) {
    (void)in;
    int* tokens = embedding_tokens(shape);
    embedding_backward(din[0], dout, tokens, NULL, shape[0], shape[1], 0);
    free(tokens);
}

static void test_embedding(void** state) {
    (void)state;
    const int widths[] = {1, 63, 64, 65, 200};
    for (int i = 0; i < 5; i++) {
        size_t C = (size_t)widths[i];
        Operation operation = {"embedding",
                               1,
                               {5 * C, 0, 0},
                               11 * C,
                               {11, widths[i], 5},
                               define_embedding,
                               embedding_forward_case,
                               embedding_backward_case};
        check_operation(&operation);
    }
}

// ----------------------------------------------------------------------------
// Key convolution: shape = B, T, H, G, D, taps

static void define_keyconv(double* out, double* const* in, const int* shape) {
    const int B = shape[0], T = shape[1], H = shape[2], G = shape[3], D = shape[4], width = (H + 2 * G) * D;
    memcpy(out, in[0], (size_t)B * T * width * sizeof(double));
    for (int row = 0; row < B * T; row++) {
        for (int c = 0; c < G * D; c++) {
            double sum = 0;
            for (int l = 0; l < shape[5] && l <= row % T; l++)
                sum += in[1][l * G * D + c] * in[0][(row - l) * width + H * D + c];
            out[row * width + H * D + c] += sum / (1 + exp(-sum));
        }
    }
}
static size_t keyconv_keys(const int* shape) { return (size_t)shape[0] * shape[1] * shape[3] * shape[4]; }
static void keyconv_forward_case(floatX* out, floatX* const* in, const int* shape) {
    floatX* raw = new_floats(keyconv_keys(shape));
    memcpy(out, in[0], rope_size(shape) * sizeof(floatX));
    keyconv_forward(out, raw, in[1], shape[0], shape[1], 0, shape[2], shape[3], shape[4], shape[5], 0);
    free(raw);
}
static void keyconv_backward_case(floatX* const* din, const floatX* dout, floatX* const* in,
                                  const int* shape) {
    floatX *raw = new_floats(keyconv_keys(shape)), *qkv = new_floats(rope_size(shape));
    memcpy(qkv, in[0], rope_size(shape) * sizeof(floatX));
    keyconv_forward(qkv, raw, in[1], shape[0], shape[1], 0, shape[2], shape[3], shape[4], shape[5], 0);
    memcpy(din[0], dout, rope_size(shape) * sizeof(floatX));
    keyconv_backward(din[0], din[1], raw, in[1], NULL, shape[0], shape[1], shape[2], shape[3], shape[4],
                     shape[5], 0);
    free(raw);
    free(qkv);
}

static const int keyconv_shapes[][6] = {{1, 1, 1, 1, 1, 3}, {1, 2, 2, 1, 3, 5},  {2, 7, 2, 2, 6, 3},
                                        {2, 9, 3, 1, 5, 5}, {1, 4, 1, 3, 11, 5}, {3, 5, 4, 2, 16, 3}};
#define KEYCONV_SHAPES ((int)(sizeof(keyconv_shapes) / sizeof(keyconv_shapes[0])))

static void test_keyconv(void** state) {
    (void)state;
    for (int i = 0; i < KEYCONV_SHAPES; i++) {
        const int* shape = keyconv_shapes[i];
        size_t size = rope_size(shape);
        Operation operation = {"keyconv",
                               2,
                               {size, (size_t)shape[5] * shape[3] * shape[4], 0},
                               size,
                               {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]},
                               define_keyconv,
                               keyconv_forward_case,
                               keyconv_backward_case};
        check_operation(&operation);
    }
}

// Zero taps must not change the keys, but they have a gradient. A second backward doubles it.
static void test_keyconv_of_zero_taps(void** state) {
    (void)state;
    enum { B = 2, T = 6, H = 2, G = 2, D = 4, TAPS = 3, WIDTH = (H + 2 * G) * D, KEYS = G * D };
    floatX qkv[B * T * WIDTH], kept[B * T * WIDTH], raw[B * T * KEYS], dqkv[B * T * WIDTH];
    const floatX taps[TAPS * KEYS] = {0};
    float_acc dtaps[TAPS * KEYS] = {0}, once[TAPS * KEYS];
    fill_normal(NULL, qkv, B * T * WIDTH, 1, 1);
    fill_normal(NULL, dqkv, B * T * WIDTH, 1, 2);
    memcpy(kept, qkv, sizeof(qkv));
    keyconv_forward(qkv, raw, taps, B, T, 0, H, G, D, TAPS, 0);
    assert_memory_equal(qkv, kept, sizeof(qkv));
    memcpy(kept, dqkv, sizeof(dqkv));
    keyconv_backward(dqkv, dtaps, raw, taps, NULL, B, T, H, G, D, TAPS, 0);
    assert_memory_equal(dqkv, kept, sizeof(dqkv));
    for (int i = 0; i < TAPS * KEYS; i++) assert_true(dtaps[i] != 0);
    memcpy(once, dtaps, sizeof(once));
    keyconv_backward(dqkv, dtaps, raw, taps, NULL, B, T, H, G, D, TAPS, 0);
    for (int i = 0; i < TAPS * KEYS; i++) assert_true(fabs((double)(dtaps[i] - 2 * once[i])) <= 1e-5);
}

// Rows that a few calls add to a sequence must equal, bitwise, the rows of one call, whatever the later rows
// contain. A changed key changes the next `taps` rows and no other.
static void test_keyconv_incremental_and_causal(void** state) {
    (void)state;
    for (int i = 0; i < KEYCONV_SHAPES; i++) {
        const int T = keyconv_shapes[i][1], H = keyconv_shapes[i][2], G = keyconv_shapes[i][3],
                  D = keyconv_shapes[i][4], taps = keyconv_shapes[i][5];
        const int width = (H + 2 * G) * D, keys = G * D;
        floatX *inp = new_floats((size_t)T * width), *whole = new_floats((size_t)T * width),
               *grown = new_floats((size_t)T * width), *raw = new_floats((size_t)T * keys),
               *weight = new_floats((size_t)taps * keys);
        fill_normal(NULL, inp, (size_t)T * width, 1, 1);
        fill_normal(NULL, weight, (size_t)taps * keys, 1, 2);
        const size_t row = (size_t)width * sizeof(floatX);
        memcpy(whole, inp, T * row);
        keyconv_forward(whole, raw, weight, 1, T, 0, H, G, D, taps, 0);
        for (int stride = 1; stride <= 3; stride++) {
            memset(grown, 0xff, T * row);
            memset(raw, 0xff, (size_t)T * keys * sizeof(floatX));
            for (int done = 0; done < T; done += stride) {
                int now = done + stride < T ? done + stride : T;
                memcpy(grown + (size_t)done * width, inp + (size_t)done * width, (now - done) * row);
                keyconv_forward(grown, raw, weight, 1, now, done, H, G, D, taps, 0);
            }
            assert_memory_equal(grown, whole, T * row);
        }
        for (int changed = 0; changed < T; changed++) {
            memcpy(grown, inp, T * row);
            for (int c = 0; c < keys; c++) grown[(size_t)changed * width + (size_t)H * D + c] += 1;
            keyconv_forward(grown, raw, weight, 1, T, 0, H, G, D, taps, 0);
            for (int t = 0; t < T; t++) {
                int differs = memcmp(grown + (size_t)t * width, whole + (size_t)t * width, row) != 0;
                assert_int_equal(differs, t >= changed && t < changed + taps);
            }
        }
        free(inp);
        free(whole);
        free(grown);
        free(raw);
        free(weight);
    }
}

static void test_keyconv_is_the_same_for_any_number_of_threads(void** state) {
    (void)state;
    enum { B = 3, T = 50, H = 1, G = 3, D = 11, TAPS = 5, WIDTH = (H + 2 * G) * D, KEYS = G * D };
    static floatX qkv[B * T * WIDTH], raw[B * T * KEYS], dqkv[B * T * WIDTH], dkept[B * T * WIDTH];
    floatX weight[TAPS * KEYS];
    float_acc dweight[TAPS * KEYS], kept[TAPS * KEYS];
    fill_normal(NULL, weight, TAPS * KEYS, 1, 3);
    const int threads = omp_get_max_threads();
    for (int n = 1; n <= 5; n++) {
        omp_set_num_threads(n);
        fill_normal(NULL, qkv, B * T * WIDTH, 1, 1);
        fill_normal(NULL, dqkv, B * T * WIDTH, 1, 2);
        memset(dweight, 0, sizeof(dweight));
        keyconv_forward(qkv, raw, weight, B, T, 0, H, G, D, TAPS, 0);
        keyconv_backward(dqkv, dweight, raw, weight, NULL, B, T, H, G, D, TAPS, 0);
        if (n > 1) assert_memory_equal(dweight, kept, sizeof(kept));
        if (n > 1) assert_memory_equal(dqkv, dkept, sizeof(dkept));
        memcpy(kept, dweight, sizeof(kept));
        memcpy(dkept, dqkv, sizeof(dkept));
    }
    omp_set_num_threads(threads);
}

// ----------------------------------------------------------------------------
// Norms of keys

static void test_key_rms(void** state) {
    (void)state;
    enum { B = 3, T = 7, H = 2, G = 4, D = 5, WIDTH = (H + 2 * G) * D };
    double exact[B * T * WIDTH], want[B * G];
    floatX qkv[B * T * WIDTH];
    float_acc rms[B * G], sums[G] = {0}, halves[G] = {0};
    fill_normal(exact, qkv, B * T * WIDTH, 1, 1);
    key_rms(rms, sums, qkv, B, T, H, G, D, 0);
    for (int b = 0; b < B; b++) {
        for (int g = 0; g < G; g++) {
            double sum = 0;
            for (int t = 0; t < T; t++) {
                const double* key = exact + (b * T + t) * WIDTH + (H + g) * D;
                sum += dot(key, key, D);
            }
            want[b * G + g] = sqrt(sum / (T * D));
        }
    }
    assert_close("key_rms", rms, want, B * G, FORWARD_BOUND);
    // A sequence's number must not depend on other sequences.
    float_acc alone[G];
    key_rms(alone, halves, qkv, 1, T, H, G, D, 0);
    key_rms(alone, halves, qkv + (size_t)T * WIDTH, 1, T, H, G, D, 0);
    assert_memory_equal(alone, rms + G, sizeof(alone));
    key_rms(rms, halves, qkv + (size_t)2 * T * WIDTH, 1, T, H, G, D, 0);
    assert_memory_equal(sums, halves, sizeof(sums));
    for (int g = 0; g < G; g++)
        assert_true(fabs((double)sums[g] - want[g] - want[G + g] - want[2 * G + g]) < 1e-5);
    qkv[(T + 3) * WIDTH + (H + 2) * D] = NAN;
    key_rms(rms, sums, qkv, B, T, H, G, D, 0);
    for (int i = 0; i < B * G; i++) assert_int_equal(rms[i] != rms[i], i == G + 2);
}

static void test_key_weight_norm(void** state) {
    (void)state;
    enum { G = 3, D = 4, C = 7 };
    double exact[G * D * C], exact_gain[C], want[G] = {0};
    floatX wk[G * D * C], gain[C];
    float_acc norm[G];
    fill_normal(exact, wk, G * D * C, 1, 1);
    fill_normal(exact_gain, gain, C, 1, 2);
    for (int i = 0; i < G * D * C; i++) want[i / (D * C)] += pow(exact[i] * exact_gain[i % C], 2);
    for (int g = 0; g < G; g++) want[g] = sqrt(want[g]);
    key_weight_norm(norm, wk, gain, G, D, C, 0);
    assert_close("key_weight_norm", norm, want, G, FORWARD_BOUND);
}

// ----------------------------------------------------------------------------
// Noise on the output of attention

static void add_noise(floatX* noised, const floatX* out, int B, int T, int H, int D, float alpha,
                      uint64_t seed, uint64_t draws, uint64_t first_sequence) {
    const AttentionNoise noise = {noised, alpha, seed, draws, first_sequence};
    attention_noise(&noise, out, B, T, 0, H, D);
}

static void test_attention_noise(void** state) {
    (void)state;
    enum { B = 4, T = 16, H = 3, D = 64, COUNT = B * T * H * D };
    static floatX out[COUNT], noised[COUNT], again[COUNT];
    static double z[COUNT];
    fill_normal(NULL, out, COUNT, 3, 1);
    const uint64_t draws = noise_stream(5, 2);
    add_noise(noised, out, B, T, H, D, 0, 42, draws, 0);
    assert_memory_equal(noised, out, sizeof(out)); // alpha 0
    add_noise(noised, out, B, T, H, D, 0.5f, 42, draws, 0);
    double mean = 0, square = 0, fourth = 0, neighbours = 0;
    for (int row = 0; row < COUNT / D; row++) {
        double average = 0, variance = 0;
        for (int d = 0; d < D; d++) average += (double)out[row * D + d] / D;
        for (int d = 0; d < D; d++) variance += pow((double)out[row * D + d] - average, 2) / D;
        for (int d = 0; d < D; d++) {
            int i = row * D + d;
            z[i] = ((double)out[i] - (double)noised[i]) / (0.5 * sqrt(variance));
            assert_true(fabs(z[i] - random_normal(42, draws, (uint64_t)i)) < 2e-5);
            mean += z[i] / COUNT;
            square += z[i] * z[i] / COUNT;
            fourth += pow(z[i], 4) / COUNT;
            if (i) neighbours += z[i] * z[i - 1] / COUNT;
        }
    }
    // The bounds are four standard deviations of each statistic.
    assert_true(fabs(mean) < 4 / sqrt(COUNT) && fabs(neighbours) < 4 / sqrt(COUNT));
    assert_true(fabs(square - 1) < 4 * sqrt(2.0 / COUNT) && fabs(fourth - 3) < 4 * sqrt(96.0 / COUNT));

    // A sequence has the same noise at any place in a micro-batch. Another step,
    // layer or seed gives other noise.
    add_noise(again, out + COUNT / B, 1, T, H, D, 0.5f, 42, draws, 1);
    assert_memory_equal(again, noised + COUNT / B, sizeof(out) / B);
    const uint64_t others[3] = {noise_stream(6, 2), noise_stream(5, 3), draws};
    for (int k = 0; k < 3; k++) {
        add_noise(again, out, B, T, H, D, 0.5f, k == 2 ? 43 : 42, others[k], 0);
        double correlation = 0;
        for (int i = 0; i < COUNT; i++) correlation += z[i] * ((double)out[i] - (double)again[i]) / COUNT;
        assert_true(fabs(correlation) < 4 * 1.6 / sqrt(COUNT)); // 0.5 std(out) is about 1.5
    }
    for (int step = 0; step < 50; step++)
        for (int layer = 0; layer < 50; layer++)
            assert_int_equal(noise_stream(step, layer) == draws, step == 5 && layer == 2);
    for (int i = 0; i < D; i++) out[i] = 2; // a row without spread has no noise
    add_noise(noised, out, 1, 1, 1, D, 1, 42, draws, 0);
    assert_memory_equal(noised, out, D * sizeof(floatX));
}

// ----------------------------------------------------------------------------
// Accumulation: a second backward doubles the gradients that accumulate

static void test_accumulation(void** state) {
    (void)state;
    enum { ROWS = 3, C = 10, OUT = 4 };
    floatX inp[ROWS * C], dout[ROWS * C], weight[OUT * C], dinp[ROWS * C] = {0}, once[ROWS * C];
    float_acc rstd[ROWS], dgain[C] = {0}, dgain_once[C], dweight[OUT * C] = {0}, dweight_once[OUT * C];
    floatX gain[C], dproduct[ROWS * OUT];
    fill_normal(NULL, inp, ROWS * C, 1, 1);
    fill_normal(NULL, dout, ROWS * C, 1, 2);
    fill_normal(NULL, weight, OUT * C, 1, 3);
    fill_normal(NULL, gain, C, 1, 4);
    fill_normal(NULL, dproduct, ROWS * OUT, 1, 5);
    fill_normal(NULL, rstd, ROWS, 1, 6);

    rmsnorm_backward(dinp, dgain, dout, inp, gain, rstd, NULL, ROWS, C, 0);
    memcpy(once, dinp, sizeof(once));
    memcpy(dgain_once, dgain, sizeof(dgain_once));
    rmsnorm_backward(dinp, dgain, dout, inp, gain, rstd, NULL, ROWS, C, 0);
    for (int i = 0; i < ROWS * C; i++) assert_true(fabs((double)(dinp[i] - 2 * once[i])) <= 1e-5);
    for (int c = 0; c < C; c++) assert_true(fabs((double)(dgain[c] - 2 * dgain_once[c])) <= 1e-5);

    matmul_backward(dinp, dweight, dproduct, inp, weight, ROWS, C, OUT, 0);
    memcpy(once, dinp, sizeof(once));
    memcpy(dweight_once, dweight, sizeof(dweight_once));
    matmul_backward(dinp, dweight, dproduct, inp, weight, ROWS, C, OUT, 0);
    assert_memory_equal(dinp, once, sizeof(once)); // a matrix product overwrites dinp
    for (int i = 0; i < OUT * C; i++) assert_true(fabs((double)(dweight[i] - 2 * dweight_once[i])) <= 1e-5);
}

// ----------------------------------------------------------------------------
// AdamW and the norm for clipping

static void test_global_norm(void** state) {
    (void)state;
    const size_t counts[] = {1, 1000, GLOBAL_NORM_CHUNK, GLOBAL_NORM_CHUNK + 1, 3 * GLOBAL_NORM_CHUNK + 17};
    for (int i = 0; i < 5; i++) {
        double* exact = new_doubles(counts[i]);
        float_acc* grads = new_floats(counts[i]);
        float_acc* partials = new_floats(global_norm_partials(counts[i]));
        fill_normal(exact, grads, counts[i], 1, 7);
        float_acc norm;
        const size_t half = counts[i] / 2; // one part is empty if there is only one element
        float_acc sums[2];
        sum_of_squares(&sums[0], partials, grads, half, 0);
        sum_of_squares(&sums[1], partials, grads + half, counts[i] - half, 0);
        global_norm(&norm, sums, 2, 0);
        double want = sqrt(dot(exact, exact, counts[i]));
        assert_true(fabs((double)norm - want) <= 1e-6 * want);
        free(exact);
        free(grads);
        free(partials);
    }
}

static void test_adamw(void** state) {
    (void)state;
    enum { COUNT = 2 * DECAY_BLOCK + 37 };
    const float_acc decays[3] = {1, 0, 1};
    const float clips[] = {0, 1, 1e6f};
    for (int k = 0; k < 3; k++) {
        floatX params[COUNT], copy[COUNT];
        float_acc m[COUNT] = {0}, v[COUNT] = {0}, grads[COUNT], norm;
        float_acc masters[COUNT], master_m[COUNT] = {0}, master_v[COUNT] = {0};
        double p_exact[COUNT], m_exact[COUNT] = {0}, v_exact[COUNT] = {0}, g_exact[COUNT];
        fill_normal(p_exact, params, COUNT, 1, 8);
        memcpy(masters, params, sizeof(masters));
        for (int step = 1; step <= 5; step++) {
            fill_normal(g_exact, grads, COUNT, 1, 100 + (uint64_t)step);
            double length = sqrt(dot(g_exact, g_exact, COUNT));
            double scale = clips[k] > 0 && length > clips[k] ? clips[k] / length : 1;
            norm = (float_acc)length;
            AdamW settings = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, clips[k], step};
            adamw_update(params, NULL, m, v, grads, &norm, decays, COUNT, settings, 0);
            memset(copy, 0xFF, sizeof(copy)); // the copy's earlier contents must have no effect
            adamw_update(copy, masters, master_m, master_v, grads, &norm, decays, COUNT, settings, 0);
            assert_memory_equal(copy, params, sizeof(params));
            assert_memory_equal(masters, params, sizeof(params));
            for (int i = 0; i < COUNT; i++) {
                double g = g_exact[i] * scale, beta1 = settings.beta1, beta2 = settings.beta2;
                m_exact[i] = beta1 * m_exact[i] + (1 - beta1) * g;
                v_exact[i] = beta2 * v_exact[i] + (1 - beta2) * g * g;
                double m_hat = m_exact[i] / (1 - pow(beta1, step)),
                       v_hat = v_exact[i] / (1 - pow(beta2, step));
                double rate = settings.learning_rate,
                       decay = settings.weight_decay * (double)decays[i / DECAY_BLOCK];
                p_exact[i] -= rate * (m_hat / (sqrt(v_hat) + settings.eps) + decay * p_exact[i]);
            }
        }
        // The settings are floats in both builds, so 1 - beta loses a few digits in the fp64 build too.
        assert_close("adamw", params, p_exact, COUNT, 1e-6);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_swiglu_saturates),
        cmocka_unit_test(test_classifier),
        cmocka_unit_test(test_classifier_edges),
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_keyconv),
        cmocka_unit_test(test_keyconv_of_zero_taps),
        cmocka_unit_test(test_keyconv_incremental_and_causal),
        cmocka_unit_test(test_keyconv_is_the_same_for_any_number_of_threads),
        cmocka_unit_test(test_key_rms),
        cmocka_unit_test(test_key_weight_norm),
        cmocka_unit_test(test_attention_noise),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_global_norm),
        cmocka_unit_test(test_adamw),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
