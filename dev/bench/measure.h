/*
What the benchmarks share: numbers of their command lines, random inputs (never zeros: those are faster), and the median of what
the device's marks in time measure.

    int T = parse_number(argument, "tokens", 1);
    floatX* qkv = new_random(count);
    Mark begun = mark_make(), done = mark_make();
    mark(&begun, stream);
    attention_forward(...);
    mark(&done, stream);
    times[round] = seconds_between(begun, done);         // waits for the device
    double milliseconds = 1e3 * median(times, rounds);
*/
#ifndef DEV_BENCH_MEASURE_H
#define DEV_BENCH_MEASURE_H

#if defined(DEVICE_CPU)
#include "dev/cpu/device.h"
#else
#include "kernels/device.cuh"
#endif
#include "runtime/safetensors.h" // defines convert_values

// Rows and columns of a product that is large for the device; on the emulator, which only shows that a benchmark works, small.
#if defined(DEVICE_CPU)
enum { LARGE_PRODUCT = 2048 };
#elif defined(DEVICE_SIMT)
enum { LARGE_PRODUCT = 64 };
#else
enum { LARGE_PRODUCT = 8192 };
#endif

// ----------------------------------------------------------------------------
// Inputs

// A whole number from `minimum` to 2^24; exit code 2 for anything else.
static inline int parse_number(const char* text, const char* name, int minimum) {
    char* end;
    errno = 0;
    const long value = strtol(text, &end, 10);
    if (errno || *end || end == text || value < minimum || value > 1 << 24)
        fail_usage("--%s %s: must be a number from %d to %d", name, text, minimum, 1 << 24);
    return (int)value;
}

// Uniform in (-1, 1), the same million over and over, in the device's memory; device_free() frees.
static inline floatX* new_random(size_t count) {
    const size_t million = (size_t)1 << 20;
    const size_t period = count < million ? count : million;
    floatX* values = (floatX*)device_malloc(count * sizeof(floatX), "the inputs");
    float_acc* wide = (float_acc*)malloc_or_fail(period * sizeof(float_acc), "the inputs");
    floatX* narrow = (floatX*)malloc_or_fail(period * sizeof(floatX), "the inputs");
    uint32_t state = 12345;
    for (size_t i = 0; i < period; i++) {
        state = state * 1664525u + 1013904223u;
        wide[i] = (float_acc)(state >> 8) / (float_acc)(1 << 23) - 1;
    }
    convert_values(narrow, dtype_of_size(sizeof(floatX)), wide, dtype_of_size(sizeof(float_acc)), period);
    for (size_t first = 0; first < count; first += period)
        copy_to_device(values + first, narrow,
                       (count - first < period ? count - first : period) * sizeof(floatX), 0);
    stream_synchronize(0);
    free(wide);
    free(narrow);
    return values;
}

#if defined(DEVICE_CUDA)
// Bytes that may still be in the device's cache from the call before.
static inline size_t device_cache_bytes(void) {
    int device = 0, bytes = 0;
    device_check(cudaGetDevice(&device), "find the device");
    device_check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device),
                 "ask for the size of the cache");
    return (size_t)bytes;
}
#else
static inline size_t device_cache_bytes(void) { return 0; }
#endif

static inline int compare_doubles(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// Sorts the values.
static inline double median(double* values, int count) {
    qsort(values, (size_t)count, sizeof(double), compare_doubles);
    return values[count / 2];
}

#endif
