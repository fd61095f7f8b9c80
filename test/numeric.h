/*
Functions that the tests of operations and of the model share: random inputs, the relative error of a vector,
and gradients by central differences of a reference, which is in double precision in every build.
*/
#ifndef TEST_NUMERIC_H
#define TEST_NUMERIC_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#ifdef __cplusplus
extern "C" { // cmocka.h has no extern "C" of its own
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif
#undef fail // cmocka's macro; here fail() is the function of runtime/checks.h
#include "runtime/checks.h"
#include "runtime/precision.h"
#include "runtime/random.h"

// docs/math.md section 7 gives these bounds: for analytic gradients of the fp64 build, and for
// the fp32 build against double precision.
#ifdef PRECISION_FP64
#define FORWARD_BOUND 1e-12
#define GRADIENT_BOUND 1e-6
#else
#define FORWARD_BOUND 1e-5
#define GRADIENT_BOUND 1e-5
#endif

static inline double* new_doubles(size_t count) {
    return (double*)calloc_or_fail(count, sizeof(double), "a test");
}
static inline floatX* new_floats(size_t count) {
    return (floatX*)calloc_or_fail(count, sizeof(floatX), "a test");
}

// Fills both arrays with the same normal random numbers, which floatX represents exactly.
static inline void fill_normal(double* exact, floatX* values, size_t count, double scale, uint64_t seed) {
    for (size_t i = 0; i < count; i++) {
        float value = (float)(scale * random_normal(seed, random_stream("test"), i));
        if (exact) exact[i] = (double)value;
        if (values) values[i] = (floatX)value;
    }
}

// |a - b| / |b| in the Euclidean norm, or |a| if b is zero.
static inline double relative_error(const floatX* a, const double* b, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return sqrt(norm > 0 ? difference / norm : difference);
}

static inline void assert_close(const char* what, const floatX* a, const double* b, size_t count,
                                double bound) {
    double error = relative_error(a, b, count);
    if (!(error <= bound)) print_error("%s: relative error %.3g exceeds %.3g\n", what, error, bound);
    assert_true(error <= bound);
}

// d loss / d values[i] by central differences of fourth order: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h.
typedef double (*LossFunction)(void* context);
static inline double central_difference(LossFunction loss, void* context, double* value) {
    const double h = 2e-4, kept = *value;
    double at[4];
    const double offsets[4] = {-2 * h, -h, h, 2 * h};
    for (int i = 0; i < 4; i++) {
        *value = kept + offsets[i];
        at[i] = loss(context);
    }
    *value = kept;
    return (8 * (at[2] - at[1]) - (at[3] - at[0])) / (12 * h);
}

static inline double dot(const double* a, const double* b, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

#endif
