/*
The matrix products of DEVICE=simt: plain loops on the host, in place of cuBLASLt on a GPU
(kernels/matmul.cuh). Sums are fp32, each in the order of the inner dimension, for any number of threads.
*/
#ifndef DEV_SIMT_MATMUL_H
#define DEV_SIMT_MATMUL_H

#include "kernels/device.cuh"

// On a GPU the library computes no products before matmul_start(); multiply() here checks the same rule.
static int matmul_started = 0;
static inline void matmul_start(void) { matmul_started = 1; }
static inline size_t matmul_scratch_bytes(void) { return 0; }

// The part of C that one call of multiply_tile computes. Loops over its columns become SIMD instructions,
// independent of the compiler's other optimisations.
enum { SIMT_TILE_ROWS = 4, SIMT_TILE_COLUMNS = 64 };

// Computes one tile, from row m and column n of C on. B is op(B), converted to float, with rows of `stride`
// elements.
static inline void multiply_tile(void* C, const floatX* A, const float* B, int transA, int m, int n, int M,
                                 int N, int K, int stride, int accumulate) {
    const int rows = M - m < SIMT_TILE_ROWS ? M - m : (int)SIMT_TILE_ROWS;
    const int columns = N - n < SIMT_TILE_COLUMNS ? N - n : (int)SIMT_TILE_COLUMNS;
    float sums[SIMT_TILE_ROWS][SIMT_TILE_COLUMNS] = {};
    for (int k = 0; k < K; k++) {
        const float* from = B + (size_t)k * stride + n;
        for (int r = 0; r < rows; r++) {
            const float a = (float)A[transA ? (size_t)k * M + m + r : (size_t)(m + r) * K + k];
#pragma omp simd
            for (int c = 0; c < SIMT_TILE_COLUMNS; c++) sums[r][c] += a * from[c];
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) {
            const size_t at = (size_t)(m + r) * N + n + c;
            if (accumulate) ((float*)C)[at] += sums[r][c];
            else ((floatX*)C)[at] = (floatX)sums[r][c];
        }
    }
}

static inline void multiply_now(void* C, const floatX* A, const floatX* B, int transA, int transB, int M,
                                int N, int K, int accumulate) {
    const simt::DeviceMemoryOpen open;
    const int stride = (N + SIMT_TILE_COLUMNS - 1) / SIMT_TILE_COLUMNS * SIMT_TILE_COLUMNS;
    const int tile_rows = (M + SIMT_TILE_ROWS - 1) / SIMT_TILE_ROWS;
    float* widened = (float*)calloc_or_fail((size_t)K * stride, sizeof(float), "a matrix product");
#if !defined(__SANITIZE_THREAD__) // the thread sanitizer does not know OpenMP's barriers
#pragma omp parallel
#endif
    {
#if !defined(__SANITIZE_THREAD__)
#pragma omp for schedule(static)
#endif
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++)
                widened[(size_t)k * stride + n] = (float)B[transB ? (size_t)n * K + k : (size_t)k * N + n];
#if !defined(__SANITIZE_THREAD__)
#pragma omp for schedule(static)
#endif
        for (int tile = 0; tile < tile_rows; tile++)
            for (int n = 0; n < N; n += SIMT_TILE_COLUMNS)
                multiply_tile(C, A, widened, transA, tile * SIMT_TILE_ROWS, n, M, N, K, stride, accumulate);
    }
    free(widened);
}

// C (M,N) = op(A) op(B), or C += op(A) op(B) in fp32; row-major, transA means that A is stored (K,M).
static inline void multiply(void* C, const floatX* A, const floatX* B, int transA, int transB, int M, int N,
                            int K, int accumulate, stream_t stream) {
    if (!matmul_started) fail("a matrix product before matmul_start()");
    device_check(simt::enqueue(stream, simt::NODE_KERNEL,
                               [=] {
                                   multiply_now(C, A, B, transA, transB, M, N, K, accumulate);
                                   return cudaSuccess;
                               }),
                 "multiply");
}

#endif
