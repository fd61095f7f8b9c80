/*
Compares every CUDA operation except attention, in the precision of the build, with dev/cpu in fp64 on the
same inputs (test/reference.h). The cases are a table: operation x shape x width of access. The test runs on
the emulator and on a GPU.

For each case: outputs and gradients are within the bounds of docs/math.md section 7; a repeated call gives
the same bits; the kernel writes nothing outside of the outputs; NaN and Inf are at the same places as in the
reference.
*/
#include "test/numeric.h"
#include "test/capture.h"
#include "test/reference.h"
#include "kernels/device.cuh"
#include "kernels/embedding.cuh"
#include "kernels/rmsnorm.cuh"
#include "kernels/rope.cuh"
#include "kernels/swiglu.cuh"
#include "kernels/matmul.cuh"
#include "kernels/classifier.cuh"
#include "kernels/adamw.cuh"
#include "kernels/keynorm.cuh"
#include "kernels/keys.cuh"

// ----------------------------------------------------------------------------
// Arrays of an operation

enum { MAX_ARRAYS = 9, MAX_SHAPE = 8, MAX_SHAPES = 12 };

typedef enum { ACTIVATION, SUM, INDEX, WORKSPACE } Type; // floatX, float_acc, int, bytes
typedef enum { INPUT, OUTPUT, UPDATED } Role;            // an updated one is read and written

typedef struct {
    Type type;
    Role role;
    size_t count; // elements
    double scale; // of the normal numbers that fill it; below 0: their magnitudes, times this one's
    int limit;    // an index is 0..limit-1
    int run;      // 0: indices are random; else each stands in so many neighbours, the largest first
    size_t columns,
        used; // of every row of `columns`, what lies beyond the first `used` is Inf; columns 0: nothing
} Array;

typedef struct {
    const char* name;
    int (*describe)(Array* arrays, const int* shape); // returns how many arrays there are
    void (*device)(void* const* arrays, const int* shape);
    void (*reference)(void* const* arrays, const int* shape); // doubles, and ints; no workspace
    int shapes[MAX_SHAPES][MAX_SHAPE];                        // the first number of each is not 0
} Operation;

static Array array_of(Type type, Role role, size_t count, double scale) {
    Array array = {type, role, count, scale, 0, 0, 0, 0};
    return array;
}
static Array activation(Role role, size_t count) { return array_of(ACTIVATION, role, count, 1); }
static Array sum_of(Role role, size_t count) { return array_of(SUM, role, count, 1); }
static Array positive(Role role, size_t count) { return array_of(SUM, role, count, -1); }
static Array workspace_of(size_t bytes) { return array_of(WORKSPACE, OUTPUT, bytes, 0); }
static Array indices(size_t count, int limit) {
    Array array = {INDEX, INPUT, count, 0, limit, 0, 0, 0};
    return array;
}

static size_t element_bytes(Type type) {
    const size_t bytes[] = {sizeof(floatX), sizeof(float_acc), sizeof(int), 1};
    return bytes[type];
}

static double element(const void* values, Type type, size_t i) {
    return type == ACTIVATION ? (double)(float)((const floatX*)values)[i]
                              : (double)((const float_acc*)values)[i];
}

static void set_element(void* values, Type type, size_t i, double value) {
    if (type == ACTIVATION) ((floatX*)values)[i] = (floatX)(float)value;
    else ((float_acc*)values)[i] = (float_acc)value;
}

// ----------------------------------------------------------------------------
// The table

#define X(i) ((floatX*)arrays[i])
#define S(i) ((float_acc*)arrays[i])
#define D(i) ((double*)arrays[i])
#define I(i) ((int*)arrays[i])

// Embedding: rows, C, Vp
static int embedding_forward_arrays(Array* arrays, const int* shape) {
    const size_t rows = (size_t)shape[0], C = (size_t)shape[1], Vp = (size_t)shape[2];
    arrays[0] = activation(OUTPUT, rows * C);
    arrays[1] = indices(rows, shape[2]);
    arrays[2] = activation(INPUT, Vp * C);
    return 3;
}
static void embedding_forward_device(void* const* arrays, const int* shape) {
    embedding_forward(X(0), I(1), X(2), shape[0], shape[1], 0);
}
static void embedding_forward_reference(void* const* arrays, const int* shape) {
    reference_embedding_forward(D(0), I(1), D(2), shape[0], shape[1]);
}
static int embedding_backward_arrays(Array* arrays, const int* shape) {
    const size_t rows = (size_t)shape[0], C = (size_t)shape[1], Vp = (size_t)shape[2];
    arrays[0] = sum_of(UPDATED, Vp * C);
    arrays[1] = activation(INPUT, rows * C);
    arrays[2] = indices(rows, shape[2]);
    arrays[3] = workspace_of(embedding_backward_workspace(shape[0], shape[1]));
    return 4;
}
// Tokens whose sorted rows end where a chunk of them does, while row 0 has the token after. Shape: rows, C, Vp, run
static int embedding_backward_of_runs_arrays(Array* arrays, const int* shape) {
    const int count = embedding_backward_arrays(arrays, shape);
    arrays[2].run = shape[3];
    return count;
}
static void embedding_backward_device(void* const* arrays, const int* shape) {
    embedding_backward(S(0), X(1), I(2), arrays[3], shape[0], shape[1], 0);
}
static void embedding_backward_reference(void* const* arrays, const int* shape) {
    reference_embedding_backward(D(0), D(1), I(2), shape[0], shape[1]);
}

// RMSNorm: rows, C
static int rmsnorm_forward_arrays(Array* arrays, const int* shape) {
    const size_t rows = (size_t)shape[0], C = (size_t)shape[1];
    arrays[0] = activation(OUTPUT, rows * C);
    arrays[1] = sum_of(OUTPUT, rows);
    arrays[2] = activation(INPUT, rows * C);
    arrays[3] = activation(INPUT, C);
    return 4;
}
static void rmsnorm_forward_device(void* const* arrays, const int* shape) {
    rmsnorm_forward(X(0), S(1), X(2), X(3), shape[0], shape[1], 1e-5f, 0);
}
static void rmsnorm_forward_reference(void* const* arrays, const int* shape) {
    reference_rmsnorm_forward(D(0), D(1), D(2), D(3), shape[0], shape[1], 1e-5f);
}
static int residual_rmsnorm_arrays(Array* arrays, const int* shape) {
    const size_t rows = (size_t)shape[0], C = (size_t)shape[1];
    arrays[0] = activation(OUTPUT, rows * C);
    arrays[1] = activation(OUTPUT, rows * C);
    arrays[2] = sum_of(OUTPUT, rows);
    arrays[3] = activation(INPUT, rows * C);
    arrays[4] = activation(INPUT, rows * C);
    arrays[5] = activation(INPUT, C);
    return 6;
}
static void residual_rmsnorm_device(void* const* arrays, const int* shape) {
    residual_rmsnorm_forward(X(0), X(1), S(2), X(3), X(4), X(5), shape[0], shape[1], 1e-5f, 0);
}
// The norm is that of the sum as it is stored.
static void residual_rmsnorm_reference(void* const* arrays, const int* shape) {
    const size_t count = (size_t)shape[0] * shape[1];
    double* zeros = new_doubles(count);
    for (size_t i = 0; i < count; i++) D(0)[i] = (double)(float)(floatX)(float)(D(3)[i] + D(4)[i]);
    reference_residual_rmsnorm_forward(D(0), D(1), D(2), D(0), zeros, D(5), shape[0], shape[1], 1e-5f);
    free(zeros);
}
static int rmsnorm_backward_arrays(Array* arrays, const int* shape) {
    const size_t rows = (size_t)shape[0], C = (size_t)shape[1];
    arrays[0] = activation(UPDATED, rows * C);
    arrays[1] = sum_of(UPDATED, C);
    arrays[2] = activation(INPUT, rows * C);
    arrays[3] = activation(INPUT, rows * C);
    arrays[4] = activation(INPUT, C);
    arrays[5] = positive(INPUT, rows);
    arrays[6] = workspace_of(rmsnorm_backward_workspace(shape[0], shape[1]));
    return 7;
}
static void rmsnorm_backward_device(void* const* arrays, const int* shape) {
    rmsnorm_backward(X(0), S(1), X(2), X(3), X(4), S(5), arrays[6], shape[0], shape[1], 0);
}
static void rmsnorm_backward_reference(void* const* arrays, const int* shape) {
    reference_rmsnorm_backward(D(0), D(1), D(2), D(3), D(4), D(5), shape[0], shape[1]);
}

// SwiGLU: rows, F
static int swiglu_forward_arrays(Array* arrays, const int* shape) {
    const size_t count = (size_t)shape[0] * shape[1];
    arrays[0] = activation(OUTPUT, count);
    arrays[1] = array_of(ACTIVATION, INPUT, 2 * count, 3);
    return 2;
}
static void swiglu_forward_device(void* const* arrays, const int* shape) {
    swiglu_forward(X(0), X(1), shape[0], shape[1], 0);
}
static void swiglu_forward_reference(void* const* arrays, const int* shape) {
    reference_swiglu_forward(D(0), D(1), shape[0], shape[1]);
}
static int swiglu_backward_arrays(Array* arrays, const int* shape) {
    const size_t count = (size_t)shape[0] * shape[1];
    arrays[0] = activation(OUTPUT, 2 * count);
    arrays[1] = activation(INPUT, count);
    arrays[2] = array_of(ACTIVATION, INPUT, 2 * count, 3);
    return 3;
}
static void swiglu_backward_device(void* const* arrays, const int* shape) {
    swiglu_backward(X(0), X(1), X(2), shape[0], shape[1], 0);
}
static void swiglu_backward_reference(void* const* arrays, const int* shape) {
    reference_swiglu_backward(D(0), D(1), D(2), shape[0], shape[1]);
}

// Matrix products: rows, in, out
static int matmul_forward_arrays(Array* arrays, const int* shape) {
    const size_t rows = (size_t)shape[0], in = (size_t)shape[1], out = (size_t)shape[2];
    arrays[0] = activation(OUTPUT, rows * out);
    arrays[1] = activation(INPUT, rows * in);
    arrays[2] = activation(INPUT, out * in);
    return 3;
}
static void matmul_forward_device(void* const* arrays, const int* shape) {
    matmul_forward(X(0), X(1), X(2), shape[0], shape[1], shape[2], 0);
}
static void matmul_forward_reference(void* const* arrays, const int* shape) {
    reference_matmul_forward(D(0), D(1), D(2), shape[0], shape[1], shape[2]);
}
static int matmul_backward_arrays(Array* arrays, const int* shape) {
    const size_t rows = (size_t)shape[0], in = (size_t)shape[1], out = (size_t)shape[2];
    arrays[0] = activation(OUTPUT, rows * in);
    arrays[1] = sum_of(UPDATED, out * in);
    arrays[2] = activation(INPUT, rows * out);
    arrays[3] = activation(INPUT, rows * in);
    arrays[4] = activation(INPUT, out * in);
    return 5;
}
static void matmul_backward_device(void* const* arrays, const int* shape) {
    matmul_backward(X(0), S(1), X(2), X(3), X(4), shape[0], shape[1], shape[2], 0);
}
static void matmul_backward_reference(void* const* arrays, const int* shape) {
    reference_matmul_backward(D(0), D(1), D(2), D(3), D(4), shape[0], shape[1], shape[2]);
}

// Classifier: rows, V, Vp. What is in the padding must not matter.
static int classifier_arrays(Array* arrays, const int* shape) {
    arrays[0] = array_of(ACTIVATION, UPDATED, (size_t)shape[0] * shape[2], 3);
    arrays[0].columns = (size_t)shape[2];
    arrays[0].used = (size_t)shape[1];
    arrays[1] = sum_of(OUTPUT, (size_t)shape[0]);
    arrays[2] = indices((size_t)shape[0], shape[1]);
    return 3;
}
static int classifier_loss_arrays(Array* arrays, const int* shape) {
    const int count = classifier_arrays(arrays, shape);
    arrays[0].role = INPUT;
    return count;
}
static void classifier_loss_device(void* const* arrays, const int* shape) {
    fused_classifier(X(0), S(1), I(2), 0, shape[0], shape[1], shape[2], 0, 0);
}
static void classifier_loss_reference(void* const* arrays, const int* shape) {
    reference_fused_classifier(D(0), D(1), I(2), 0, shape[0], shape[1], shape[2], 0);
}
static void classifier_gradient_device(void* const* arrays, const int* shape) {
    fused_classifier(X(0), S(1), I(2), 0.375f, shape[0], shape[1], shape[2], 1, 0);
}
static void classifier_gradient_reference(void* const* arrays, const int* shape) {
    reference_fused_classifier(D(0), D(1), I(2), 0.375, shape[0], shape[1], shape[2], 1);
}

// So far apart that exp() overflows unless the row's own maximum is taken off.
static int classifier_of_large_logits_arrays(Array* arrays, const int* shape) {
    const int count = classifier_arrays(arrays, shape);
    arrays[0].scale = 100;
    return count;
}

// Norm of the gradient, in two parts: count
static int global_norm_arrays(Array* arrays, const int* shape) {
    arrays[0] = sum_of(OUTPUT, 1);
    arrays[1] = sum_of(INPUT, (size_t)shape[0]);
    arrays[2] = workspace_of(global_norm_partials((size_t)shape[0]) * sizeof(float_acc));
    arrays[3] = workspace_of(2 * sizeof(float_acc));
    return 4;
}
static void global_norm_device(void* const* arrays, const int* shape) {
    const size_t count = (size_t)shape[0], half = (count + 1) / 2;
    const int parts = count > half ? 2 : 1;
    sum_of_squares(S(3), S(2), S(1), half, 0);
    if (parts == 2) sum_of_squares(S(3) + 1, S(2), S(1) + half, count - half, 0);
    global_norm(S(0), S(3), parts, 0);
}
static void global_norm_reference(void* const* arrays, const int* shape) {
    reference_global_norm(D(0), D(1), (size_t)shape[0]);
}

// AdamW: count, clip, step
static AdamW adamw_settings(const int* shape) {
    AdamW settings = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, shape[1] ? 0.25f : 0, shape[2]};
    return settings;
}
static int adamw_arrays(Array* arrays, const int* shape) {
    const size_t count = (size_t)shape[0];
    arrays[0] = activation(UPDATED, count);
    arrays[1] = sum_of(UPDATED, count);
    arrays[2] = positive(UPDATED, count);
    arrays[3] = sum_of(INPUT, count);
    arrays[4] = positive(INPUT, 1);
    arrays[5] = positive(INPUT, decay_blocks(count)); // not only 0 and 1
    return 6;
}
static void adamw_device(void* const* arrays, const int* shape) {
    adamw_update(X(0), NULL, S(1), S(2), S(3), S(4), S(5), (size_t)shape[0], adamw_settings(shape), 0);
}
static void adamw_reference(void* const* arrays, const int* shape) {
    reference_adamw_update(D(0), D(1), D(2), D(3), D(4), D(5), (size_t)shape[0], adamw_settings(shape));
}
static int adamw_masters_arrays(Array* arrays, const int* shape) {
    const int count = adamw_arrays(arrays, shape);
    arrays[0].role = OUTPUT; // what the copy held before has no part in it
    arrays[count] = sum_of(UPDATED, (size_t)shape[0]);
    return count + 1;
}
static void adamw_masters_device(void* const* arrays, const int* shape) {
    adamw_update(X(0), S(6), S(1), S(2), S(3), S(4), S(5), (size_t)shape[0], adamw_settings(shape), 0);
}
static void adamw_masters_reference(void* const* arrays, const int* shape) {
    reference_adamw_update(D(6), D(1), D(2), D(3), D(4), D(5), (size_t)shape[0], adamw_settings(shape));
    memcpy(D(0), D(6), (size_t)shape[0] * sizeof(double));
}

// Norms of the keys: B, T, H, G, D, C
static int key_rms_arrays(Array* arrays, const int* shape) {
    arrays[0] = sum_of(OUTPUT, (size_t)shape[0] * shape[3]);
    arrays[1] = positive(UPDATED, (size_t)shape[3]);
    arrays[2] = activation(INPUT, (size_t)shape[0] * shape[1] * (shape[2] + 2 * shape[3]) * shape[4]);
    return 3;
}
static void key_rms_device(void* const* arrays, const int* shape) {
    key_rms(S(0), S(1), X(2), shape[0], shape[1], shape[2], shape[3], shape[4], 0);
}
static void key_rms_reference(void* const* arrays, const int* shape) {
    reference_key_rms(D(0), D(1), D(2), shape[0], shape[1], shape[2], shape[3], shape[4]);
}
static int key_weight_norm_arrays(Array* arrays, const int* shape) {
    arrays[0] = sum_of(OUTPUT, (size_t)shape[3]);
    arrays[1] = activation(INPUT, (size_t)shape[3] * shape[4] * shape[5]);
    arrays[2] = activation(INPUT, (size_t)shape[5]);
    return 3;
}
static void key_weight_norm_device(void* const* arrays, const int* shape) {
    key_weight_norm(S(0), X(1), X(2), shape[3], shape[4], shape[5], 0);
}
static void key_weight_norm_reference(void* const* arrays, const int* shape) {
    reference_key_weight_norm(D(0), D(1), D(2), shape[3], shape[4], shape[5]);
}

// Keys: B, T, H, G, D, taps, positions, S. The forward begins at token 2, so that earlier keys are from an earlier call. Centroids are
// of rounded keys: in bf16 test_moba_kernels.cu has them.
static int keys_start(const int* shape) { return shape[1] > 2 ? 2 : 0; }
static int keys_have_centroids(const int* shape) { return shape[7] && sizeof(floatX) == sizeof(float); }
static int keys_forward_arrays(Array* arrays, const int* shape) {
    const size_t B = (size_t)shape[0], T = (size_t)shape[1], G = (size_t)shape[3], D = (size_t)shape[4];
    arrays[0] = activation(UPDATED, B * T * (shape[2] + 2 * G) * D);
    arrays[1] = activation(UPDATED, B * T * G * D);
    arrays[2] = activation(INPUT, (shape[5] ? shape[5] : 1) * G * D);
    arrays[3] = sum_of(INPUT, T * D);
    arrays[4] = sum_of(UPDATED, shape[7] ? B * (T / shape[7]) * G * D : 1);
    return 5;
}
static void keys_forward_device(void* const* arrays, const int* shape) {
    keys_forward(X(0), X(1), keys_have_centroids(shape) ? S(4) : NULL, shape[5] ? X(2) : NULL,
                 shape[6] ? S(3) : NULL, shape[0], shape[1], keys_start(shape), shape[2], shape[3], shape[4],
                 shape[7], shape[5], 0);
}
static void keys_forward_reference(void* const* arrays, const int* shape) {
    reference_keys_forward(D(0), D(1), keys_have_centroids(shape) ? D(4) : NULL, shape[5] ? D(2) : NULL,
                           shape[6] ? D(3) : NULL, shape[0], shape[1], keys_start(shape), shape[2], shape[3],
                           shape[4], shape[7], shape[5]);
}
static int keys_backward_arrays(Array* arrays, const int* shape) {
    const size_t B = (size_t)shape[0], T = (size_t)shape[1], G = (size_t)shape[3], D = (size_t)shape[4];
    arrays[0] = activation(UPDATED, B * T * (shape[2] + 2 * G) * D);
    arrays[1] = sum_of(UPDATED, (shape[5] ? shape[5] : 1) * G * D);
    arrays[2] = activation(INPUT, B * T * G * D);
    arrays[3] = activation(INPUT, (shape[5] ? shape[5] : 1) * G * D);
    arrays[4] = sum_of(INPUT, T * D);
    arrays[5] = workspace_of(keys_backward_workspace(shape[0], shape[1], shape[3], shape[4], shape[5]));
    return 6;
}
static void keys_backward_device(void* const* arrays, const int* shape) {
    keys_backward(X(0), S(1), X(2), shape[5] ? X(3) : NULL, shape[6] ? S(4) : NULL, arrays[5], shape[0],
                  shape[1], shape[2], shape[3], shape[4], shape[5], 0);
}
static void keys_backward_reference(void* const* arrays, const int* shape) {
    reference_keys_backward(D(0), D(1), D(2), shape[5] ? D(3) : NULL, shape[6] ? D(4) : NULL, shape[0],
                            shape[1], shape[2], shape[3], shape[4], shape[5]);
}

#undef X
#undef S
#undef D
#undef I

// The first two shapes of each are also run with NaN and Inf: one of rows that are whole packs, one of rows that are not.
// Among the others: one element; rows wider than a warp, than four packs a thread, than a block; more rows than blocks, tiles
// or chunks hold; one token for all rows.
#define EMBEDDING_SHAPES                                                                                     \
    {                                                                                                        \
        {33, 16, 5}, {70, 13, 50}, {1, 1, 1}, {64, 8, 2}, {2500, 24, 40}, {1100, 7, 1}, { 5, 1032, 3 }       \
    }
#define RMSNORM_SHAPES                                                                                       \
    {                                                                                                        \
        {3, 16}, {3, 5}, {1, 1}, {9, 768}, {2, 97}, {3, 1104}, {2, 2056}, {3, 2051}, {4100, 8}, { 1, 16384 } \
    }
#define SWIGLU_SHAPES                                                                                        \
    {                                                                                                        \
        {5, 64}, {3, 7}, {1, 1}, {3, 101}, { 9, 352 }                                                        \
    }
#define MATMUL_SHAPES                                                                                        \
    {                                                                                                        \
        {16, 24, 8}, {7, 5, 3}, {1, 1, 1}, {33, 40, 23}, {130, 72, 200}, {1, 64, 300}, { 300, 64, 1 }        \
    }
#define CLASSIFIER_SHAPES                                                                                    \
    {                                                                                                        \
        {2, 13, 128}, {5, 7, 9}, {1, 1, 1}, {4, 128, 128}, {3, 300, 301}, {2, 5001, 5120}, {17, 50, 56}, {   \
            1, 40000, 40064                                                                                  \
        }                                                                                                    \
    }
#define KEYS_SHAPES                                                                                          \
    {                                                                                                        \
        {2, 6, 2, 1, 16, 3, 1}, {2, 35, 3, 2, 6, 5, 0, 16}, {1, 1, 1, 1, 2, 3, 1},                           \
            {3, 150, 1, 2, 32, 5, 1, 32}, {1, 260, 1, 9, 128, 3, 0}, {2, 70, 3, 2, 64, 0, 1, 64}, {          \
            1, 40, 1, 2, 32, 0, 0, 16                                                                        \
        }                                                                                                    \
    }
#define ADAMW_SHAPES                                                                                         \
    {                                                                                                        \
        {64, 1, 1}, {37, 0, 1}, {1, 1, 2}, {2056, 1, 100}, { 1003, 1, 3 }                                    \
    }

static const Operation operations[] = {
    {"embedding_forward", embedding_forward_arrays, embedding_forward_device, embedding_forward_reference,
     EMBEDDING_SHAPES},
    {"embedding_backward", embedding_backward_arrays, embedding_backward_device, embedding_backward_reference,
     EMBEDDING_SHAPES},
    {"embedding_backward_of_runs",
     embedding_backward_of_runs_arrays,
     embedding_backward_device,
     embedding_backward_reference,
     {{128, 16, 2, 64}, {192, 13, 2, 96}, {96, 8, 3, 32}, {200, 5, 7, 33}}},
    {"rmsnorm_forward", rmsnorm_forward_arrays, rmsnorm_forward_device, rmsnorm_forward_reference,
     RMSNORM_SHAPES},
    {"residual_rmsnorm_forward", residual_rmsnorm_arrays, residual_rmsnorm_device, residual_rmsnorm_reference,
     RMSNORM_SHAPES},
    {"rmsnorm_backward", rmsnorm_backward_arrays, rmsnorm_backward_device, rmsnorm_backward_reference,
     RMSNORM_SHAPES},
    {"swiglu_forward", swiglu_forward_arrays, swiglu_forward_device, swiglu_forward_reference, SWIGLU_SHAPES},
    {"swiglu_backward", swiglu_backward_arrays, swiglu_backward_device, swiglu_backward_reference,
     SWIGLU_SHAPES},
    {"matmul_forward", matmul_forward_arrays, matmul_forward_device, matmul_forward_reference, MATMUL_SHAPES},
    {"matmul_backward", matmul_backward_arrays, matmul_backward_device, matmul_backward_reference,
     MATMUL_SHAPES},
    {"fused_classifier_loss", classifier_loss_arrays, classifier_loss_device, classifier_loss_reference,
     CLASSIFIER_SHAPES},
    {"fused_classifier_gradient", classifier_arrays, classifier_gradient_device,
     classifier_gradient_reference, CLASSIFIER_SHAPES},
    {"fused_classifier_of_large_logits",
     classifier_of_large_logits_arrays,
     classifier_gradient_device,
     classifier_gradient_reference,
     {{2, 13, 128}, {5, 7, 9}, {40, 1500, 1536}, {9, 600, 601}}},
    {"global_norm",
     global_norm_arrays,
     global_norm_device,
     global_norm_reference,
     {{64}, {37}, {1}, {GLOBAL_NORM_CHUNK}, {GLOBAL_NORM_CHUNK + 1}, {600 * 1024 + 3}}},
    {"adamw_update", adamw_arrays, adamw_device, adamw_reference, ADAMW_SHAPES},
    {"adamw_update_of_masters", adamw_masters_arrays, adamw_masters_device, adamw_masters_reference,
     ADAMW_SHAPES},
    {"key_rms",
     key_rms_arrays,
     key_rms_device,
     key_rms_reference,
     {{2, 5, 2, 3, 16, 1},
      {2, 7, 1, 2, 5, 1},
      {1, 1, 1, 1, 1, 1},
      {3, 300, 2, 1, 32, 1},
      {1, 2500, 1, 2, 32, 1},
      {1, 9, 1, 40, 7, 1}}},
    {"key_weight_norm",
     key_weight_norm_arrays,
     key_weight_norm_device,
     key_weight_norm_reference,
     {{1, 1, 1, 2, 8, 24}, {1, 1, 1, 3, 5, 7}, {1, 1, 1, 1, 1, 1}, {1, 1, 1, 2, 64, 96}}},
    {"keys_forward", keys_forward_arrays, keys_forward_device, keys_forward_reference, KEYS_SHAPES},
    {"keys_backward", keys_backward_arrays, keys_backward_device, keys_backward_reference, KEYS_SHAPES},
};
enum { OPERATIONS = sizeof(operations) / sizeof(operations[0]) };

// ----------------------------------------------------------------------------
// Running one

// The arrays of one operation and shape, as its inputs are and as the reference leaves them.
typedef struct {
    const Operation* operation;
    const int* shape;
    Array arrays[MAX_ARRAYS];
    int count;
    void* inputs[MAX_ARRAYS];   // as the device gets them
    void* expected[MAX_ARRAYS]; // doubles; ints as they are
} Case;

static Case new_case(const Operation* operation, const int* shape) {
    Case c;
    memset(&c, 0, sizeof(c));
    c.operation = operation;
    c.shape = shape;
    c.count = operation->describe(c.arrays, shape);
    for (int i = 0; i < c.count; i++) {
        const Array* array = &c.arrays[i];
        c.inputs[i] = malloc_or_fail(array->count * element_bytes(array->type), "a test");
        memset(c.inputs[i], 0xFF, array->count * element_bytes(array->type)); // NaN, until it is written
        if (array->role == OUTPUT) continue;
        for (size_t j = 0; j < array->count; j++) {
            const double z = random_normal((uint64_t)i, random_stream(operation->name), j);
            const double value = array->scale < 0 ? fabs(array->scale * z) : array->scale * z;
            const int padding = array->columns && j % array->columns >= array->used;
            if (array->type == INDEX)
                ((int*)c.inputs[i])[j] = array->run ? (int)(array->count - 1 - j) / array->run
                                                    : (int)(fabs(z) * 1e6) % array->limit;
            else set_element(c.inputs[i], array->type, j, padding ? INFINITY : value);
        }
    }
    return c;
}

static void case_expect(Case* c) {
    for (int i = 0; i < c->count; i++) {
        const Array* array = &c->arrays[i];
        if (array->type == WORKSPACE) continue;
        if (array->type == INDEX) {
            c->expected[i] = c->inputs[i];
            continue;
        }
        double* values = new_doubles(array->count);
        for (size_t j = 0; j < array->count; j++) values[j] = element(c->inputs[i], array->type, j);
        c->expected[i] = values;
    }
    c->operation->reference(c->expected, c->shape);
}

static void free_case(Case* c) {
    for (int i = 0; i < c->count; i++) {
        if (c->expected[i] != c->inputs[i]) free(c->expected[i]);
        free(c->inputs[i]);
    }
}

// Runs the operation on the device. `shift` elements are left free before each array (but a workspace, which begins where the
// device's memory does), so that rows are not aligned to 16 bytes; what is written there shows. The caller frees the results.
static void run_case(const Case* c, int shift, void** results) {
    char* memory[MAX_ARRAYS];
    void* arrays[MAX_ARRAYS];
    for (int i = 0; i < c->count; i++) {
        const Array* array = &c->arrays[i];
        const size_t bytes = array->count * element_bytes(array->type);
        const size_t before = array->type == WORKSPACE ? 0 : (size_t)shift * element_bytes(array->type);
        char* content = (char*)malloc_or_fail(before + bytes, "a test");
        memset(content, 0xFF, before);
        memcpy(content + before, c->inputs[i], bytes);
        memory[i] = (char*)device_malloc(before + bytes, "a test");
        copy_to_device(memory[i], content, before + bytes, 0);
        stream_synchronize(0);
        free(content);
        arrays[i] = memory[i] + before;
    }
    c->operation->device(arrays, c->shape);
    for (int i = 0; i < c->count; i++) {
        const Array* array = &c->arrays[i];
        const size_t bytes = array->count * element_bytes(array->type);
        const size_t before = (size_t)((char*)arrays[i] - memory[i]);
        char* content = (char*)malloc_or_fail(before + bytes, "a test");
        copy_to_host(content, memory[i], before + bytes, 0);
        stream_synchronize(0);
        for (size_t j = 0; j < before; j++) assert_int_equal((unsigned char)content[j], 0xFF);
        if (array->role == INPUT) assert_memory_equal(content + before, c->inputs[i], bytes);
        results[i] = malloc_or_fail(bytes, "a test");
        memcpy(results[i], content + before, bytes);
        free(content);
        device_free(memory[i]);
    }
}

static int is_result(const Array* array) {
    return array->role != INPUT && (array->type == ACTIVATION || array->type == SUM);
}

// ----------------------------------------------------------------------------
// Tests

// |a - b| / |b| in the Euclidean norm; |a| where b is zero.
static double relative_difference(const void* a, Type type, const double* b, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        const double apart = element(a, type, i) - b[i];
        difference += apart * apart;
        norm += b[i] * b[i];
    }
    return sqrt(norm > 0 ? difference / norm : difference);
}

// docs/math.md section 7: 1e-5 in fp32; in bf16 twice the error of the exact result's rounding, and never above 1e-2.
static double bound_of(const Array* array, const double* expected) {
    if (array->type == SUM || sizeof(floatX) == sizeof(float)) return 1e-5;
    floatX* rounded_result = new_floats(array->count);
    for (size_t i = 0; i < array->count; i++) rounded_result[i] = (floatX)(float)expected[i];
    const double rounding = relative_difference(rounded_result, ACTIVATION, expected, array->count);
    free(rounded_result);
    return 2 * rounding > 1e-2 ? 1e-2 : 2 * rounding + 1e-7;
}

static void assert_case_close(const Case* c, int shift, void* const* results) {
    for (int i = 0; i < c->count; i++) {
        const Array* array = &c->arrays[i];
        if (!is_result(array)) continue;
        const double* expected = (const double*)c->expected[i];
        const double bound = bound_of(array, expected);
        const double error = relative_difference(results[i], array->type, expected, array->count);
        if (!(error <= bound))
            print_error("%s(%d, %d, %d, %d, %d, %d), array %d, shift %d: relative error %.3g exceeds %.3g\n",
                        c->operation->name, c->shape[0], c->shape[1], c->shape[2], c->shape[3], c->shape[4],
                        c->shape[5], i, shift, error, bound);
        assert_true(error <= bound);
    }
}

static void test_operation(void** state) {
    const Operation* operation = (const Operation*)*state;
    for (int s = 0; s < MAX_SHAPES && operation->shapes[s][0]; s++) {
        Case c = new_case(operation, operation->shapes[s]);
        case_expect(&c);
        for (int shift = 0; shift < 2; shift++) {
            void *results[MAX_ARRAYS], *again[MAX_ARRAYS];
            run_case(&c, shift, results);
            assert_case_close(&c, shift, results);
            run_case(&c, shift, again);
            for (int i = 0; i < c.count; i++) {
                const size_t bytes = c.arrays[i].count * element_bytes(c.arrays[i].type);
                if (is_result(&c.arrays[i])) assert_memory_equal(results[i], again[i], bytes);
                free(results[i]);
                free(again[i]);
            }
        }
        free_case(&c);
    }
}

static const char* class_of(double value) {
    if (isnan(value)) return "NaN";
    if (isinf(value)) return value > 0 ? "Inf" : "-Inf";
    return "a number";
}

// One element of one input is not a number: what comes out is NaN, Inf or a number wherever the reference's is.
static void check_not_a_number(const Operation* operation, const int* shape, int input, double value) {
    Case c = new_case(operation, shape);
    void* results[MAX_ARRAYS];
    set_element(c.inputs[input], c.arrays[input].type, c.arrays[input].count / 2, value);
    case_expect(&c);
    run_case(&c, 0, results);
    for (int i = 0; i < c.count; i++) {
        const Array* array = &c.arrays[i];
        for (size_t j = 0; is_result(array) && j < array->count; j++) {
            const char* expected = class_of(((const double*)c.expected[i])[j]);
            const char* is = class_of(element(results[i], array->type, j));
            if (strcmp(expected, is) != 0)
                print_error("%s, %g in array %d: element %zu of array %d is %s, not %s\n", operation->name,
                            value, input, j, i, is, expected);
            assert_string_equal(is, expected);
        }
        free(results[i]);
    }
    free_case(&c);
}

static void test_not_a_number(void** state) {
    const Operation* operation = (const Operation*)*state;
    const double values[] = {NAN, INFINITY, -INFINITY};
    for (int s = 0; s < 2; s++) {
        Array arrays[MAX_ARRAYS];
        const int count = operation->describe(arrays, operation->shapes[s]);
        for (int i = 0; i < count; i++)
            for (int k = 0; k < 3; k++)
                if (arrays[i].role != OUTPUT && (arrays[i].type == ACTIVATION || arrays[i].type == SUM))
                    check_not_a_number(operation, operation->shapes[s], i, values[k]);
    }
}

// The table that the device gets is made on the host.
static void test_rope_table(void** state) {
    (void)state;
    const int T = 9, D = 6;
    float_acc table[T * D];
    double expected[T * D];
    rope_table(table, T, D, 500);
    reference_rope_table(expected, T, D, 500);
    for (int i = 0; i < T * D; i++) assert_true(fabs((double)table[i] - expected[i]) <= 1e-7);
}

// ----------------------------------------------------------------------------
// Memory

static void ask_for_too_much(void* unused) {
    (void)unused;
    device_malloc((size_t)1 << 50, "the whole library of Babel");
}

// Before anything else has used the device, for a process that has cannot fork and go on using it.
static void test_out_of_memory(void** state) {
    (void)state;
    struct Captured captured = capture(ask_for_too_much, NULL);
    assert_int_equal(captured.exit_code, 1);
    assert_non_null(
        strstr(captured.text, "out of memory: 1125899906.8 MB for the whole library of Babel, and "));
    double available = -1;
    assert_int_equal(sscanf(strstr(captured.text, ", and "), ", and %lf MB", &available), 1);
    assert_true(available > 0 && available < 1e7);
}

static void test_memory(void** state) {
    (void)state;
    enum { COUNT = 1000, ZEROED = 300 };
    int* device = (int*)device_malloc(COUNT * sizeof(int), "a test");
    int* host = (int*)host_malloc_pinned(COUNT * sizeof(int), "a test");
    memset(host, 0xFF, COUNT * sizeof(int));
    copy_to_host(host, device, COUNT * sizeof(int), 0);
    stream_synchronize(0);
    for (int i = 0; i < COUNT; i++) assert_int_equal(host[i], 0);
    for (int i = 0; i < COUNT; i++) host[i] = i + 1;
    copy_to_device(device, host, COUNT * sizeof(int), 0);
    device_zero(device + 1, ZEROED * sizeof(int), 0);
    stream_synchronize(0);
    memset(host, 0xFF, COUNT * sizeof(int));
    copy_to_host(host, device, COUNT * sizeof(int), 0);
    stream_synchronize(0);
    for (int i = 0; i < COUNT; i++) assert_int_equal(host[i], i > 0 && i <= ZEROED ? 0 : i + 1);
    assert_true(device_memory_free() > 0);
    assert_true(strlen(device_name()) > 0);
    host_free_pinned(host);
    device_free(device);
}

// ----------------------------------------------------------------------------
// Graphs

__global__ void add_kernel(float* to, const float* from, float number) {
    to[threadIdx.x] = from[threadIdx.x] + number;
}

enum { ROWS = 16, CHANNELS = 32 };

// What is recorded below: host to device, `adds` kernels one after the other, back to the host; and a matrix product.
typedef struct {
    float *host, *device;           // (CHANNELS) pinned, in
    float *sum, *host_sum;          // (CHANNELS) out, pinned
    floatX *inp, *weight, *product; // (ROWS, CHANNELS), (CHANNELS, CHANNELS), (ROWS, CHANNELS)
    floatX* host_product;           // (ROWS, CHANNELS) pinned
    Mark begun, done;
    stream_t stream;
} GraphWork;

static void queue_graph_work(GraphWork* work, int adds, float number) {
    mark(&work->begun, work->stream);
    copy_to_device(work->device, work->host, CHANNELS * sizeof(float), work->stream);
    device_zero(work->sum, CHANNELS * sizeof(float), work->stream);
    device_zero(work->product, ROWS * CHANNELS * sizeof(floatX), work->stream);
    for (int i = 0; i < adds; i++)
        launch(add_kernel, 1, CHANNELS, 0, work->stream, work->sum, i ? work->sum : work->device, number);
    copy_to_host(work->host_sum, work->sum, CHANNELS * sizeof(float), work->stream);
    matmul_forward(work->product, work->inp, work->weight, ROWS, CHANNELS, CHANNELS, work->stream);
    copy_to_host(work->host_product, work->product, ROWS * CHANNELS * sizeof(floatX), work->stream);
    mark(&work->done, work->stream);
}

static void must_have_added(GraphWork* work, float want) {
    stream_synchronize(work->stream);
    for (int i = 0; i < CHANNELS; i++) assert_true(work->host_sum[i] == (float)i + want);
    for (int i = 0; i < ROWS * CHANNELS; i++) assert_true((float)work->host_product[i] == CHANNELS * 0.5f);
    assert_true(seconds_between(work->begun, work->done) >= 0);
    memset(work->host_sum, 0, CHANNELS * sizeof(float));
    memset(work->host_product, 0, ROWS * CHANNELS * sizeof(floatX));
}

// Recorded work is done when the graph is launched, with the arguments of the last recording and the inputs of that moment.
// A recording of other work takes the place of the one before.
static void test_graph(void** state) {
    (void)state;
    matmul_start();
    GraphWork work;
    const size_t product = ROWS * CHANNELS * sizeof(floatX), row = CHANNELS * sizeof(float);
    work.stream = stream_make();
    work.host = (float*)host_malloc_pinned(row, "a test");
    work.host_sum = (float*)host_malloc_pinned(row, "a test");
    work.host_product = (floatX*)host_malloc_pinned(product, "a test");
    work.device = (float*)device_malloc(row, "a test");
    work.sum = (float*)device_malloc(row, "a test");
    work.inp = (floatX*)device_malloc(product, "a test");
    work.product = (floatX*)device_malloc(product, "a test");
    work.weight = (floatX*)device_malloc(CHANNELS * CHANNELS * sizeof(floatX), "a test");
    work.begun = mark_make();
    work.done = mark_make();
    for (int i = 0; i < ROWS * CHANNELS; i++) work.host_product[i] = (floatX)1.0f;
    copy_to_device(work.inp, work.host_product, product, work.stream);
    stream_synchronize(work.stream);
    for (int i = 0; i < ROWS * CHANNELS; i++) work.host_product[i] = (floatX)0.5f;
    for (int part = 0; part < CHANNELS / ROWS; part++)
        copy_to_device(work.weight + part * ROWS * CHANNELS, work.host_product, product, work.stream);
    for (int i = 0; i < CHANNELS; i++) work.host[i] = (float)i;
    queue_graph_work(&work, 2, 1); // as it is, and so that everything is loaded
    must_have_added(&work, 2);

    Graph graph = {NULL};
    for (int i = 0; i < CHANNELS; i++) work.host[i] = -1;
    for (int round = 0; round < 4; round++) {
        const int adds = round < 2 ? 2 : 3;
        graph_record_begin(work.stream);
        queue_graph_work(&work, adds, (float)round);
        graph_record_end(&graph, work.stream);
        stream_synchronize(work.stream);
        assert_true(work.host_sum[1] == 0);
        for (int repeat = 0; repeat < 2; repeat++) {
            for (int i = 0; i < CHANNELS; i++) work.host[i] = (float)(i + repeat);
            graph_launch(&graph, work.stream);
            must_have_added(&work, (float)(adds * round + repeat));
        }
    }
    graph_free(&graph);
    mark_free(work.begun);
    mark_free(work.done);
    device_free(work.device);
    device_free(work.sum);
    device_free(work.inp);
    device_free(work.product);
    device_free(work.weight);
    host_free_pinned(work.host);
    host_free_pinned(work.host_sum);
    host_free_pinned(work.host_product);
    stream_free(work.stream);
}

// With an argument: the operations whose names match it, such as 'rmsnorm*'.
int main(int argc, char** argv) {
    const struct CMUnitTest memory_tests[] = {
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_graph),
    };
    struct CMUnitTest tests[2 * OPERATIONS + 1];
    char names[OPERATIONS][64];
    memset(tests, 0, sizeof(tests));
    for (int i = 0; i < OPERATIONS; i++) {
        snprintf(names[i], sizeof(names[i]), "%s_not_a_number", operations[i].name);
        tests[i].name = operations[i].name;
        tests[i].test_func = test_operation;
        tests[OPERATIONS + i].name = names[i];
        tests[OPERATIONS + i].test_func = test_not_a_number;
        tests[i].initial_state = tests[OPERATIONS + i].initial_state = (void*)&operations[i];
    }
    tests[2 * OPERATIONS].name = "rope_table";
    tests[2 * OPERATIONS].test_func = test_rope_table;
    reference_start();
    const int failed = cmocka_run_group_tests(memory_tests, NULL, NULL);
    matmul_start();
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return failed + cmocka_run_group_tests(tests, NULL, NULL);
}
