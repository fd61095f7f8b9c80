/*
What the benchmarks share: numbers of their command lines, random inputs (never zeros: those are faster), and the median.

    int T = parse_number(argument, "tokens", 1);
    floatX* qkv = new_random(count);
    double milliseconds = median(times, rounds);
*/
#ifndef DEV_BENCH_MEASURE_H
#define DEV_BENCH_MEASURE_H

#include "dev/cpu/device.h"

// A whole number from `minimum` to 2^24; exit code 2 for anything else.
static inline int parse_number(const char* text, const char* name, int minimum) {
    char* end;
    errno = 0;
    const long value = strtol(text, &end, 10);
    if (errno || *end || end == text || value < minimum || value > 1 << 24)
        fail_usage("--%s %s: must be a number from %d to %d", name, text, minimum, 1 << 24);
    return (int)value;
}

// Uniform in (-1, 1), in the device's memory; device_free() frees.
static inline floatX* new_random(size_t count) {
    floatX* values = (floatX*)device_malloc(count * sizeof(floatX), "the inputs");
    uint32_t state = 12345;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = (floatX)(state >> 8) / (floatX)(1 << 23) - 1;
    }
    return values;
}

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
