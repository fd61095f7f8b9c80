/*
Matrix products: oneDNN's dnnl_sgemm in fp32, plain loops in fp64. Matrices are row-major; weights have
Hugging Face's shape (out, in).

    out (rows, out_channels)  =  inp (rows, in_channels)  x  weight (out_channels, in_channels)^T
*/
#ifndef DEV_CPU_MATMUL_H
#define DEV_CPU_MATMUL_H

#include "dev/cpu/device.h"
#if defined(GEMM_UNKIND)
#include "dev/cpu/gemm_unkind.h" // defines gemm_unkind
#elif !defined(PRECISION_FP64)
#include <oneapi/dnnl/dnnl.h>
#endif

// C (M,N) = op(A) op(B) + beta C, row-major with leading dimensions; transA means that A is stored (K,M).
// Inside a parallel region it runs on the calling thread alone; attention uses it this way. Callers may rely
// on this: the same call with the same sizes gives the same bits, and the bits of a row of C depend on that
// row of op(A) and on op(B), not on the other rows of A. They may not rely on more: another M, another number
// of threads or another place of the row may change the order of the sums.
static inline void gemm(int transA, int transB, int M, int N, int K, const floatX* A, int lda,
                        const floatX* B, int ldb, floatX beta, floatX* C, int ldc) {
#if defined(GEMM_UNKIND)
    gemm_unkind(transA, transB, M, N, K, A, lda, B, ldb, beta, C, ldc);
#elif defined(PRECISION_FP64)
    const double work = (double)M * N * K; // small products are faster on one thread
#pragma omp parallel for schedule(static) if (work > 1e5 && !omp_in_parallel())
    for (int m = 0; m < M; m++) {
        floatX* row = C + (size_t)m * ldc;
        for (int n = 0; n < N; n++) row[n] = beta == 0 ? 0 : beta * row[n];
        for (int k = 0; k < K && !transB; k++) {
            const floatX a = transA ? A[(size_t)k * lda + m] : A[(size_t)m * lda + k];
            const floatX* from = B + (size_t)k * ldb;
#pragma omp simd
            for (int n = 0; n < N; n++) row[n] += a * from[n];
        }
        for (int n = 0; n < N && transB; n++) {
            const floatX* from = B + (size_t)n * ldb;
            floatX sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int k = 0; k < K; k++)
                sum += (transA ? A[(size_t)k * lda + m] : A[(size_t)m * lda + k]) * from[k];
            row[n] += sum;
        }
    }
#else
    if (M == 0 || N == 0) return;
    dnnl_status_t status =
        dnnl_sgemm(transA ? 'T' : 'N', transB ? 'T' : 'N', M, N, K, 1.0f, A, lda, B, ldb, beta, C, ldc);
    if (status != dnnl_success) fail("dnnl_sgemm (%d,%d,%d) failed with status %d", M, N, K, (int)status);
#endif
}

// Computes one small product of each kind, so that the library loads, compiles its kernels and starts its
// threads now. The program sees the memory that this takes before it makes its memory plan.
static inline void matmul_start(void) {
    enum { SIZE = 1024 };
    floatX* matrices = (floatX*)calloc_or_fail((size_t)3 * SIZE * SIZE, sizeof(floatX), "a product");
    floatX *a = matrices, *b = a + SIZE * SIZE, *c = b + SIZE * SIZE;
    for (int kind = 0; kind < 3; kind++)
        gemm(kind == 2, kind == 0, SIZE, SIZE, SIZE, a, SIZE, b, SIZE, 0, c, SIZE);
    free(matrices);
}

// Additional bytes that the library's products use on each thread, for packed copies of their operands
// (measured).
#if defined(PRECISION_FP64)
#define MATMUL_SCRATCH_BYTES ((size_t)0)
#else
#define MATMUL_SCRATCH_BYTES ((size_t)2 << 20)
#endif
static inline size_t matmul_scratch_bytes(void) {
    return MATMUL_SCRATCH_BYTES * (size_t)omp_get_max_threads();
}

static inline void matmul_forward(floatX* out,          // (rows, out_channels)
                                  const floatX* inp,    // (rows, in_channels)
                                  const floatX* weight, // (out_channels, in_channels)
                                  int rows, int in_channels, int out_channels, stream_t stream) {
    (void)stream;
    gemm(0, 1, rows, out_channels, in_channels, inp, in_channels, weight, in_channels, 0, out, out_channels);
}

// dinp is overwritten, dweight accumulates (over micro-batches and over the uses of a tied weight).
static inline void matmul_backward(floatX* dinp,         // (rows, in_channels)
                                   float_acc* dweight,   // (out_channels, in_channels)
                                   const floatX* dout,   // (rows, out_channels)
                                   const floatX* inp,    // (rows, in_channels)
                                   const floatX* weight, // (out_channels, in_channels)
                                   int rows, int in_channels, int out_channels, stream_t stream) {
    (void)stream;
    gemm(0, 0, rows, in_channels, out_channels, dout, out_channels, weight, in_channels, 0, dinp,
         in_channels);
    gemm(1, 0, out_channels, in_channels, rows, dout, out_channels, inp, in_channels, 1, dweight,
         in_channels);
}

#endif
