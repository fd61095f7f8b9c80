/*
Functions that the tests of attention's kernels share (test_gqa.cu, test_moba_kernels.cu): bounds, maps,
inputs that floatX holds exactly, and errors compared with the error of rounding alone. Include it after the
header with the kernels, because it uses their device.

TEST_LONG=1 in the environment selects the full matrix.
*/
#ifndef TEST_DEVICE_ATTENTION_H
#define TEST_DEVICE_ATTENTION_H

#include "kernels/noise.cuh"
// reference_attention_noise
#include "test/reference.h"
// new_doubles, fill_normal; cmocka
#include "test/numeric.h"

static const int LONG_MATRIX = getenv("TEST_LONG") != NULL;

// Bounds of the relative error, in the Euclidean norm. lse is fp32 in every build.
#if defined(PRECISION_BF16)
static const double BOUND = 1e-2;
#else
static const double BOUND = 1e-5;
#endif
static const double LSE_BOUND = 1e-5;

// ----------------------------------------------------------------------------
// Maps of heads

enum { MAX_HEADS = 40 };

typedef struct {
    int H, G;
    int kv_of_q[MAX_HEADS];
} HeadMap;

static const HeadMap ONE = {1, 1, {0}}, TWO = {2, 1, {0, 0}}, MHA = {2, 2, {0, 1}},
                     GQA = {4, 2, {0, 0, 1, 1}}, MQA = {3, 1, {0, 0, 0}},
                     UNEVEN = {8, 4, {0, 1, 2, 2, 2, 3, 3, 3}}, FIRST_EMPTY = {3, 3, {1, 1, 2}},
                     MIDDLE_EMPTY = {3, 4, {0, 0, 3}}, LAST_EMPTY = {4, 3, {0, 1, 1, 1}};
static const HeadMap* const ALL_MAPS[8] = {&ONE,    &MHA,         &GQA,          &MQA,
                                           &UNEVEN, &FIRST_EMPTY, &MIDDLE_EMPTY, &LAST_EMPTY};

// ----------------------------------------------------------------------------
// Memory of the device

// Uploads `exact` as floatX, and sets `exact` to the rounded values that the device then holds.
static void upload_rounded(floatX* device, floatX* host, double* exact, size_t count) {
    for (size_t i = 0; i < count; i++) {
        host[i] = (floatX)(float)exact[i];
        exact[i] = (double)(float)host[i];
    }
    copy_to_device(device, host, count * sizeof(floatX), 0);
}

// Fills memory with bytes that stand for "unwritten": NaN as a float, and no block as an int.
static void forget(void* memory, size_t bytes) {
    device_check(cudaMemset(memory, 0xFF, bytes), "clear memory");
}

static void* forgotten(size_t bytes) {
    void* memory = device_malloc(bytes, "a test");
    forget(memory, bytes);
    return memory;
}

// The device's values, as doubles.
template <typename Element> static double* download(const Element* values, size_t count) {
    Element* host = (Element*)calloc_or_fail(count + 1, sizeof(Element), "a test");
    double* exact = new_doubles(count + 1);
    copy_to_host(host, values, count * sizeof(Element), 0);
    stream_synchronize(0);
    for (size_t i = 0; i < count; i++) exact[i] = (double)(float)host[i];
    free(host);
    return exact;
}

// ----------------------------------------------------------------------------
// Errors

// For one part of dqkv (or for out): the sums of squares of its difference from the reference, of the
// difference that rounding the reference makes, and of the reference.
typedef struct {
    double difference, rounding, norm;
} Error;

static void add_error(Error* error, double value, double reference) {
    const double rounded = (double)(float)(floatX)(float)reference;
    error->difference += (value - reference) * (value - reference);
    error->rounding += (rounded - reference) * (rounded - reference);
    error->norm += reference * reference;
}

// `noise` allows for gradients that cancel to almost 0: it is the norm of another gradient, which does not
// cancel. `which` describes the case.
static void assert_error(const char* what, const char* which, const Error* error, double noise,
                         int rounded_only) {
    const double difference = sqrt(error->difference), rounding = sqrt(error->rounding),
                 norm = sqrt(error->norm);
    int good = difference <= BOUND * norm + 2e-6 * noise;
#if defined(PRECISION_BF16)
    if (rounded_only) good = good && difference <= 2 * rounding + 1e-5 * noise;
#endif
    (void)rounded_only;
    if (getenv("SHOW") || !good)
        print_error("%s: error %.3g of %.3g, %.3g by rounding: %s\n", what, difference, norm, rounding,
                    which);
    assert_true(good);
}

// Checks the lse of `count` rows.
static void assert_lse_error(const char* which, const Error* error, size_t count) {
    const double difference = sqrt(error->difference), norm = sqrt(error->norm + (double)count);
    if (!(difference <= LSE_BOUND * norm))
        print_error("lse: error %.3g of %.3g: %s\n", difference, norm, which);
    assert_true(difference <= LSE_BOUND * norm);
}

// Checks the rows of noised (B, T, H, D) from `start` on: they must be the device's own output with the
// reference's noise. The kernel must write no other row.
static void check_noised(const char* which, const floatX* out, const AttentionNoise* noise, int B, int T,
                         int start, int H, int D) {
    const size_t count = (size_t)B * T * H * D;
    double *exact = download(out, count), *noised = download(noise->noised, count),
           *want = new_doubles(count);
    reference_attention_noise(want, exact, B, T, H, D, noise->alpha, noise->seed, noise->draws,
                              (long)noise->first_sequence);
    Error error = {};
    for (size_t i = 0; i < count; i++) {
        if ((int)(i / D / H % T) >= start) add_error(&error, noised[i], want[i]);
        else assert_true(isnan(noised[i]));
    }
    assert_error("noised", which, &error, 0, 1);
    free(exact), free(noised), free(want);
}

// Compares the gradients of queries, keys and values, (rows, H + 2G, D), with the reference's. The gradients
// of a KV head that no query head reads must be 0.
static void check_gradients(const char* which, const double* dqkv, const double* reference, size_t rows,
                            const HeadMap* map, int D, int rounded_only) {
    const int heads = map->H + 2 * map->G;
    Error errors[3] = {};
    for (size_t i = 0; i < rows * heads * D; i++) {
        const int head = (int)(i / D % heads);
        add_error(&errors[head < map->H ? 0 : head < map->H + map->G ? 1 : 2], dqkv[i], reference[i]);
        if (head < map->H) continue;
        int used = 0;
        for (int h = 0; h < map->H; h++) used += map->kv_of_q[h] == (head - map->H) % map->G;
        if (!used) assert_true(dqkv[i] == 0);
    }
    const double noise = sqrt(errors[2].norm);
    assert_error("dq", which, &errors[0], noise, rounded_only);
    assert_error("dk", which, &errors[1], noise, rounded_only);
    assert_error("dv", which, &errors[2], 0, rounded_only);
}

#endif
