/*
RMSNorm (Zhang and Sennrich, arXiv 1910.07467), alone and after a residual addition.

    out = x * rstd * weight        rstd = 1 / sqrt(mean(x^2) + eps)
*/
#ifndef DEV_CPU_RMSNORM_H
#define DEV_CPU_RMSNORM_H

#include "dev/cpu/device.h"

static inline float_acc rmsnorm_row(floatX* out, const floatX* x, const floatX* weight, int C, float eps) {
    float_acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += x[c] * x[c];
    float_acc rstd = (float_acc)1 / (float_acc)sqrt((double)(sum / C + eps));
#pragma omp simd
    for (int c = 0; c < C; c++) out[c] = x[c] * rstd * weight[c];
    return rstd;
}

static inline void rmsnorm_forward(floatX* out,          // (rows, C)
                                   float_acc* rstd,      // (rows)
                                   const floatX* inp,    // (rows, C)
                                   const floatX* weight, // (C)
                                   int rows, int C, float eps, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++)
        rstd[row] = rmsnorm_row(out + (size_t)row * C, inp + (size_t)row * C, weight, C, eps);
}

// sum = residual + branch, out = RMSNorm(sum), in one pass over memory.
static inline void residual_rmsnorm_forward(floatX* sum,            // (rows, C)
                                            floatX* out,            // (rows, C)
                                            float_acc* rstd,        // (rows)
                                            const floatX* residual, // (rows, C)
                                            const floatX* branch,   // (rows, C)
                                            const floatX* weight,   // (C)
                                            int rows, int C, float eps, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        size_t at = (size_t)row * C;
#pragma omp simd
        for (int c = 0; c < C; c++) sum[at + c] = residual[at + c] + branch[at + c];
        rstd[row] = rmsnorm_row(out + at, sum + at, weight, C, eps);
    }
}

// Bytes of the workspace of rmsnorm_backward.
static inline size_t rmsnorm_backward_workspace(int rows, int C) {
    (void)rows, (void)C;
    return 0;
}

// dinp accumulates, because it is the gradient of the residual stream; dweight accumulates too.
static inline void rmsnorm_backward(floatX* dinp,          // (rows, C)
                                    float_acc* dweight,    // (C)
                                    const floatX* dout,    // (rows, C)
                                    const floatX* inp,     // (rows, C)
                                    const floatX* weight,  // (C)
                                    const float_acc* rstd, // (rows)
                                    void* workspace, int rows, int C, stream_t stream) {
    (void)workspace, (void)stream;
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        size_t at = (size_t)row * C;
        float_acc dot = 0, r = rstd[row];
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < C; c++) dot += dout[at + c] * weight[c] * inp[at + c];
        float_acc slope = dot * r * r / C;
#pragma omp simd
        for (int c = 0; c < C; c++) dinp[at + c] += r * (dout[at + c] * weight[c] - inp[at + c] * slope);
    }
    // The channels are divided among the threads, so the order of each sum does not depend on the number of
    // threads.
    const int slice = 64;
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += slice) {
        int width = first + slice < C ? slice : C - first;
        float_acc sum[64] = {0};
        for (int row = 0; row < rows; row++) {
            size_t at = (size_t)row * C + first;
#pragma omp simd
            for (int c = 0; c < width; c++) sum[c] += dout[at + c] * inp[at + c] * rstd[row];
        }
        for (int c = 0; c < width; c++) dweight[first + c] += sum[c];
    }
}

#endif
