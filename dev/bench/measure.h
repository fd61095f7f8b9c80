/*
Functions that the benchmarks share: numbers of the command line, random inputs (never zeros, which are
faster), enough sets of inputs that the next one is not in the cache, and medians of the times between marks
in the device's stream.

    int T = parse_number(argument, "tokens", 1);
    floatX* qkv = new_random(count);
    Mark begun = mark_make(), done = mark_make();
    mark(&begun, stream);
    attention_forward(...);
    mark(&done, stream);
    times[round] = seconds_between(begun, done);         // waits for the device
    double milliseconds = 1e3 * median(times, rounds);

    for (int i = 0; i < input_sets(bytes); i++) ...      // sets of inputs, `bytes` each
    PassSeconds seconds = time_passes(forward, backward, &inputs, input_sets(bytes), rounds);
*/
#ifndef DEV_BENCH_MEASURE_H
#define DEV_BENCH_MEASURE_H

#if defined(DEVICE_CPU)
#include "dev/cpu/device.h"
#else
#include "kernels/device.cuh"
#endif

// Rows and columns of a product that is large for the device. On the emulator it is small: there a run only
// shows that the benchmark works.
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

// Uniform random numbers in (-1, 1), in the device's memory; free them with device_free(). Within an array no
// pattern repeats: equal key blocks would have equal scores. On the CPU every call returns the same numbers.
#if defined(DEVICE_CPU)
static inline floatX* new_random(size_t count) {
    floatX* values = (floatX*)device_malloc(count * sizeof(floatX), "the inputs");
    uint32_t state = 12345;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = (floatX)(state >> 8) / (floatX)(1 << 23) - 1;
    }
    return values;
}
#else
// Element i is a hash of i and of the number of the call (the finalizer of MurmurHash3).
static __global__ void random_values_kernel(floatX* values, size_t count, unsigned seed) {
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        unsigned bits = (unsigned)i ^ (unsigned)(i >> 32) * 0x9E3779B9u ^ seed * 0x85EBCA6Bu;
        bits = (bits ^ bits >> 16) * 0x85EBCA6Bu;
        bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
        values[i] = (floatX)((float)((bits ^ bits >> 16) >> 8) / (float)(1 << 23) - 1);
    }
}

static inline floatX* new_random(size_t count) {
    static unsigned calls;
    floatX* values = (floatX*)device_malloc(count * sizeof(floatX), "the inputs");
    const size_t blocks = (count + 255) / 256, most = 4096;
    if (count > 0)
        launch(random_values_kernel, (unsigned)(blocks < most ? blocks : most), 256, 0, 0, values, count,
               ++calls);
    return values;
}
#endif

#if defined(DEVICE_CUDA)
// Size of the device's cache, which may hold data of the call before.
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

// The number of sets of inputs, each of `bytes` bytes. Calls use the sets in turn, so the cache holds nothing
// of the next set.
enum { MOST_INPUT_SETS = 16 };
static inline int input_sets(size_t bytes) {
    const size_t wanted = 1 + 2 * device_cache_bytes() / bytes;
    return wanted < MOST_INPUT_SETS ? (int)wanted : MOST_INPUT_SETS;
}

// The uniform map of H query heads to G KV heads, in the device's memory.
static inline int* new_head_map(int H, int G) {
    int* map = (int*)malloc_or_fail(sizeof(int) * (size_t)H, "the head map");
    int* on_device = (int*)device_malloc(sizeof(int) * (size_t)H, "the head map");
    for (int h = 0; h < H; h++) map[h] = (int)((long)h * G / H);
    copy_to_device(on_device, map, sizeof(int) * (size_t)H, 0);
    stream_synchronize(0);
    free(map);
    return on_device;
}

static inline int compare_doubles(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// Returns the median; sorts the values.
static inline double median(double* values, int count) {
    qsort(values, (size_t)count, sizeof(double), compare_doubles);
    return values[count / 2];
}

// ----------------------------------------------------------------------------
// Forward and backward

// A function that queues one pass with this set of inputs.
typedef void (*Pass)(void* inputs, int set);

typedef struct {
    double forward, backward; // seconds
} PassSeconds;

// Medians of `rounds` rounds, or of as many as fit in MOST_SECONDS, after one to three rounds that warm up.
enum { MOST_SECONDS = 10, LEAST_ROUNDS = 3 };
static inline PassSeconds time_passes(Pass forward, Pass backward, void* inputs, int sets, int rounds) {
    double* times = (double*)malloc_or_fail(sizeof(double) * 2 * (size_t)rounds, "the times");
    Mark begun = mark_make(), middle = mark_make(), done = mark_make();
    double spent = 0;
    int measured = 0;
    for (int call = 0; measured < rounds && (spent < MOST_SECONDS || measured < LEAST_ROUNDS); call++) {
        mark(&begun, 0);
        forward(inputs, call % sets);
        mark(&middle, 0);
        backward(inputs, call % sets);
        mark(&done, 0);
        const double seconds = seconds_between(begun, done);
        spent += seconds;
        // Three calls warm up, or only one if a call is long.
        if (call < (seconds < 1 ? 3 : 1)) continue;
        times[measured] = seconds_between(begun, middle);
        times[rounds + measured++] = seconds_between(middle, done);
    }
    PassSeconds result;
    result.forward = median(times, measured);
    result.backward = median(times + rounds, measured);
    mark_free(begun), mark_free(middle), mark_free(done);
    free(times);
    return result;
}

#endif
