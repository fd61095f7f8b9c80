/*
gemm_unkind: a matrix product for tests. It rounds as differently from call to call as a library is allowed
to.

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

// Neighbouring columns whose sums have the same order.
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

// The sums of one row for UNKIND_COLUMNS columns. `order` chooses the first term, the direction, the number
// of partial sums that take turns, and whether the old value of C is added first or last.
static inline void unkind_sums(floatX* sums,    // (UNKIND_COLUMNS)
                               const floatX* a, // (K), elements `a_step` apart
                               const floatX* b, // (K, UNKIND_COLUMNS)
                               const floatX* old, int K, size_t a_step, uint64_t order) {
    enum { COLUMNS = UNKIND_COLUMNS, PARTS = 8 };
    const int parts = 1 << (order & 3), forward = (order >> 2) & 1, old_first = (order >> 3) & 1;
    const int shift = K > 0 ? (int)((order >> 8) % (uint64_t)K) : 0;
    floatX part_sums[PARTS][COLUMNS];
    for (int part = 0; part < parts; part++)
        for (int n = 0; n < COLUMNS; n++) part_sums[part][n] = 0;
    for (int i = 0; i < K; i++) {
        const int step = forward ? i : K - 1 - i, k = step + shift < K ? step + shift : step + shift - K;
        const floatX x = a[(size_t)k * a_step], *row = b + (size_t)k * COLUMNS;
        floatX* part = part_sums[i & (parts - 1)];
        for (int n = 0; n < COLUMNS; n++) part[n] += x * row[n];
    }
    for (int n = 0; n < COLUMNS; n++) sums[n] = old_first ? old[n] : 0;
    for (int i = 0; i < parts; i++)
        for (int n = 0; n < COLUMNS; n++) sums[n] += part_sums[(i + (int)(order >> 4 & 7)) & (parts - 1)][n];
    for (int n = 0; n < COLUMNS && !old_first; n++) sums[n] += old[n];
}

// As gemm() of matmul.h.
static inline void gemm_unkind(int transA, int transB, int M, int N, int K, const floatX* A, int lda,
                               const floatX* B, int ldb, floatX beta, floatX* C, int ldc) {
    enum { COLUMNS = UNKIND_COLUMNS };
    uint64_t shape = unkind_hash(unkind_seed(), (uint64_t)(omp_in_parallel() ? 1 : omp_get_max_threads()));
    const int words[] = {transA, transB, M, N, K, lda, ldb, ldc};
    for (int i = 0; i < 8; i++) shape = unkind_hash(shape, (uint64_t)words[i]);
#pragma omp parallel for schedule(static) if (!omp_in_parallel() && (double)M * N * K > 1e5)
    for (int first = 0; first < N; first += COLUMNS) {
        const int columns = N - first < COLUMNS ? N - first : COLUMNS;
        floatX* b = (floatX*)calloc_or_fail((size_t)K * COLUMNS, sizeof(floatX), "some columns of a product");
        for (int k = 0; k < K; k++)
            for (int n = 0; n < columns; n++)
                b[(size_t)k * COLUMNS + n] =
                    transB ? B[(size_t)(first + n) * ldb + k] : B[(size_t)k * ldb + first + n];
        for (int m = 0; m < M; m++) {
            floatX *c = C + (size_t)m * ldc + first, old[COLUMNS] = {0}, sums[COLUMNS];
            for (int n = 0; n < columns && beta != 0; n++) old[n] = beta * c[n];
            unkind_sums(sums, A + (transA ? (size_t)m : (size_t)m * lda), b, old, K, transA ? (size_t)lda : 1,
                        unkind_hash(unkind_hash(shape, (uint64_t)m), (uint64_t)first));
            for (int n = 0; n < columns; n++) c[n] = sums[n];
        }
        free(b);
    }
}

#endif
