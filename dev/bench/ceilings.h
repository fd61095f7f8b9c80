/*
The rates of a large matrix product and of a copy: the ceilings that a benchmark compares its rates with,
measured in the same run.

    const double product = product_rate(LARGE_PRODUCT);   // operations a second
    const double copy = copy_rate(LARGE_COPY);            // bytes a second, read and written
*/
#ifndef DEV_BENCH_CEILINGS_H
#define DEV_BENCH_CEILINGS_H

#include "kernels/matmul.cuh"  // defines matmul_forward
#include "dev/bench/measure.h" // defines new_random, Mark, median

// Bytes of a copy, too many for any cache; few on the emulator.
#if defined(DEVICE_SIMT)
static const size_t LARGE_COPY = 1 << 16;
#else
static const size_t LARGE_COPY = (size_t)1 << 30;
#endif

enum { CEILING_ROUNDS = 10 };

static inline double product_rate(int size) {
    const size_t count = (size_t)size * (size_t)size;
    floatX *a = new_random(count), *b = new_random(count), *c = new_random(count);
    double times[CEILING_ROUNDS];
    Mark begun = mark_make(), done = mark_make();
    for (int round = -2; round < CEILING_ROUNDS; round++) {
        mark(&begun, 0);
        matmul_forward(c, a, b, size, size, size, 0);
        mark(&done, 0);
        const double seconds = seconds_between(begun, done);
        if (round >= 0) times[round] = seconds;
    }
    mark_free(begun), mark_free(done);
    device_free(a), device_free(b), device_free(c);
    return 2.0 * size * size * size / median(times, CEILING_ROUNDS);
}

static inline double copy_rate(size_t bytes) {
    floatX *from = new_random(bytes / sizeof(floatX)), *to = new_random(bytes / sizeof(floatX));
    double times[CEILING_ROUNDS];
    Mark begun = mark_make(), done = mark_make();
    for (int round = -2; round < CEILING_ROUNDS; round++) {
        mark(&begun, 0);
        device_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, 0), "copy on the device");
        mark(&done, 0);
        const double seconds = seconds_between(begun, done);
        if (round >= 0) times[round] = seconds;
    }
    mark_free(begun), mark_free(done);
    device_free(from), device_free(to);
    return 2.0 * (double)bytes / median(times, CEILING_ROUNDS);
}

#endif
