/*
All inline PTX of the project, as named functions. With nvcc each is one instruction. On the emulator their
bodies are in dev/simt/matrix.h and dev/simt/copy.h. test/test_layout.cu checks both against plain index
formulas.

bf16 tiles of A (16, 16) row major and B^T (8, 16) row major in shared memory, D (16, 8) in registers:

    unsigned a[4], b[4]; float d[4] = {0, 0, 0, 0};
    ldmatrix_x4(a, &A[lane % 16][lane / 16 * 8]);
    mma_m16n8k16_bf16(d, a, b[0], b[1]);

Fragments, of lane l with g = l / 4 and t = l % 4 * 2; a register holds two neighbours, the lower index in its
low half (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"):

    a[0..3]   A[g][t, t+1], A[g+8][t, t+1], A[g][t+8, t+9], A[g+8][t+8, t+9]
    b0, b1    B[t, t+1][g], B[t+8, t+9][g]
    d[0..3]   D[g][t], D[g][t+1], D[g+8][t], D[g+8][t+1]
*/
#ifndef KERNELS_PTX_CUH
#define KERNELS_PTX_CUH

#include "kernels/launch.cuh"

#if defined(DEVICE_SIMT)
#include "dev/simt/copy.h"
#include "dev/simt/matrix.h"

__device__ inline float exp2_approximate(float x) { return exp2f(x); }
__device__ inline unsigned compute_here(unsigned value) { return value; }
#else

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 m + i gives the address, a multiple of
// 16, of row i of matrix m; r[m] becomes elements [g][t, t+1] of matrix m.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

// The same, each matrix transposed: r[m] becomes elements [t, t+1][g] of matrix m.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

// d += a b: bf16 products, fp32 sums.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                  unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts an asynchronous copy of 16 bytes, which bypasses the L1 cache. Both addresses are multiples of 16.
// If valid is false, nothing is read and the 16 bytes become 0.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(valid ? 16 : 0)
        : "memory");
}

// The same for 4 and 8 bytes, through the L1 cache. Both addresses are multiples of 4 or 8.
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(valid ? 4 : 0)
        : "memory");
}

__device__ __forceinline__ void cp_async8(void* shared, const void* global, bool valid) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(valid ? 8 : 0)
        : "memory");
}

// Puts this thread's copies since its last commit into a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest `groups` groups of this thread are unfinished. It does not wait for copies
// that are in no group. Other threads see the copies only after a later barrier.
template <int groups> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// 2 to the power of x, with a relative error of at most 2^-22, in one instruction. Results below 2^-126
// become 0; exp2f() takes three more instructions for them.
__device__ __forceinline__ float exp2_approximate(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// Returns the same value, but hides its origin from the compiler. So the compiler computes addresses from it
// here, in every iteration, and not once before the loop: a loop that needs all registers for its sums has
// none for addresses.
__device__ __forceinline__ unsigned compute_here(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

#endif
#endif
