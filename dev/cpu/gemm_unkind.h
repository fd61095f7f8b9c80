/*
gemm_unkind: a matrix product for tests, whose rounding is as unhelpful as a library's may be.

    make BUILD=build/unkind UNKIND=1 build/unkind/test/test_model_fp32 && GEMM_SEED=3 build/unkind/test/test_model_fp32

A library rounds a sum differently from one shape, thread count or processor to the next. The rest of the program may rely on
one thing only: the same call with the same shape gives every element the same bits, whatever the other rows hold. This
product keeps exactly that promise. Otherwise it draws the order of every sum from a hash of the seed, the shape, the number of
threads, and the place of the row and of the column. docs/math.md section 6 lists the results that are bitwise nevertheless.
*/
#ifndef DEV_CPU_GEMM_UNKIND_H
#define DEV_CPU_GEMM_UNKIND_H

#include <stdlib.h>
#include "dev/cpu/device.h"

// Columns that share the order of their sums.
enum { UNKIND_COLUMNS = 8 };

// Mixes a word into the hash (splitmix64; Steele, Lea and Flood, 2014).
static inline uint64_t unkind_hash(uint64_t hash, uint64_t word) {
    hash += word + 0x9E3779B97F4A7C15u;
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9u;
    hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBu;
    return hash ^ (hash >> 31);
}

static inline uint64_t unkind_seed(void) {
    const char* seed = getenv("GEMM_SEED");
    return seed ? strtoull(seed, NULL, 10) : 1;
}

// The sums of one row for up to UNKIND_COLUMNS columns. `order` chooses the first term, the direction, the number of partial
// sums that take turns, and whether the old value of C is added first or last.
static inline void unkind_sums(floatX* c,       // (columns) in and out
                               const floatX* a, // (K), elements `a_step` apart
                               const floatX* b, // (K, columns): element (k, n) at b[k * b_row + n * b_column]
                               int K, size_t a_step, size_t b_row, size_t b_column, int columns, floatX beta,
                               uint64_t order) {
    const int parts = 1 << (order & 3), forward = (order >> 2) & 1, old_first = (order >> 3) & 1;
    const int shift = K > 0 ? (int)((order >> 8) % (uint64_t)K) : 0;
    floatX sums[8][UNKIND_COLUMNS] = {{0}};
    for (int i = 0; i < K; i++) {
        const int step = forward ? i : K - 1 - i, k = step + shift < K ? step + shift : step + shift - K;
        const floatX x = a[k * a_step];
        for (int n = 0; n < columns; n++) sums[i % parts][n] += x * b[k * b_row + n * b_column];
    }
    for (int n = 0; n < columns; n++) {
        const floatX old = beta == 0 ? 0 : beta * c[n];
        floatX sum = old_first ? old : 0;
        for (int part = 0; part < parts; part++) sum += sums[(part + (order >> 4)) % (uint64_t)parts][n];
        c[n] = old_first ? sum : sum + old;
    }
}

// As gemm() of matmul.h.
static inline void gemm_unkind(int transA, int transB, int M, int N, int K, const floatX* A, int lda,
                               const floatX* B, int ldb, floatX beta, floatX* C, int ldc) {
    const int shared = omp_in_parallel() || (double)M * N * K < 1e5;
    uint64_t shape = unkind_hash(unkind_seed(), (uint64_t)(omp_in_parallel() ? 1 : omp_get_max_threads()));
    const int words[] = {transA, transB, M, N, K, lda, ldb, ldc};
    for (int i = 0; i < 8; i++) shape = unkind_hash(shape, (uint64_t)words[i]);
#pragma omp parallel for schedule(static) if (!shared)
    for (int m = 0; m < M; m++) {
        const uint64_t row = unkind_hash(shape, (uint64_t)m);
        for (int n = 0; n < N; n += UNKIND_COLUMNS) {
            const int columns = N - n < UNKIND_COLUMNS ? N - n : UNKIND_COLUMNS;
            unkind_sums(C + (size_t)m * ldc + n, A + (transA ? (size_t)m : (size_t)m * lda),
                        B + (transB ? (size_t)n * ldb : (size_t)n), K, transA ? (size_t)lda : 1,
                        transB ? 1 : (size_t)ldb, transB ? (size_t)ldb : 1, columns, beta,
                        unkind_hash(row, (uint64_t)n));
        }
    }
}

#endif
