/*
Matrix products by cuBLASLt, or by plain loops on the emulator. Sums are fp32 for every floatX. The twin of
dev/cpu/matmul.h. Matrices are row-major; weights have the layout of Hugging Face (out, in).

    matmul_start();                                                     // once, before the first product
    out (rows, out_channels)  =  inp (rows, in_channels)  x  weight (out_channels, in_channels)^T

fp32 is true fp32, never TF32. The gradient of a weight is fp32 and accumulates inside the product (beta = 1).

cuBLASLt chooses an algorithm once for each shape and alignment, and later products use the same one. So a
repeated step gives the same bits. If a product is split along its inner dimension, its partial sums are fp32.
*/
#ifndef KERNELS_MATMUL_CUH
#define KERNELS_MATMUL_CUH

#include "kernels/device.cuh"

#if defined(DEVICE_SIMT)
// matmul_start, multiply
#include "dev/simt/matmul.h"
#else
#include <cublasLt.h>

// ----------------------------------------------------------------------------
// cuBLASLt

// The workspace size that NVIDIA recommends for Hopper. A smaller one excludes some of the split products.
#define MATMUL_WORKSPACE_BYTES ((size_t)32 << 20)

// A product C (M,N) = op(A) op(B) + beta C of row-major matrices without gaps between rows. transA: A is
// stored as (K,M). transB: B is stored as (N,K).
typedef struct {
    int transA, transB, M, N, K;
    int accumulate;         // 1: beta is 1 and C is fp32; 0: beta is 0 and C is floatX
    unsigned alignments[3]; // of the addresses of A, B and C, in bytes
} MatmulShape;

typedef struct {
    MatmulShape shape;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} MatmulPlan;

// A model has some 20 shapes. If there are more than MATMUL_PLANS, a new plan replaces the oldest one.
enum { MATMUL_PLANS = 128 };

static struct {
    cublasLtHandle_t handle;
    void* workspace;
    MatmulPlan plans[MATMUL_PLANS];
    int count; // plans ever made
} matmul_library;

static inline void matmul_check(cublasStatus_t status, const char* doing) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail("cuBLASLt: cannot %s: %s", doing, cublasLtGetStatusString(status));
}

// Makes the library's handle and workspace at the start, so that the free memory that the trainer measures
// later does not include them.
static inline void matmul_start(void) {
    if (matmul_library.handle) return;
    matmul_check(cublasLtCreate(&matmul_library.handle), "start");
    matmul_library.workspace = device_malloc(MATMUL_WORKSPACE_BYTES, "matrix products");
}

// Bytes that the products need in addition to the memory that matmul_start() allocates.
static inline size_t matmul_scratch_bytes(void) { return 0; }

static inline void matmul_preference(cublasLtMatmulPreference_t preference,
                                     cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                     size_t bytes) {
    matmul_check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes),
                 "state a preference");
}

static inline void matmul_choose(MatmulPlan* plan) {
    cublasLtMatmulPreference_t preference;
    matmul_check(cublasLtMatmulPreferenceCreate(&preference), "make a preference");
    const size_t workspace = MATMUL_WORKSPACE_BYTES;
    const uint32_t in_fp32 = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const unsigned* alignments = plan->shape.alignments;
    matmul_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace));
    matmul_preference(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &in_fp32, sizeof(in_fp32));
    // cuBLASLt's A is our B: see matmul_plan_make()
    matmul_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignments[1], 4);
    matmul_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignments[0], 4);
    matmul_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignments[2], 4);
    matmul_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignments[2], 4);

    cublasLtMatmulHeuristicResult_t choice;
    int found = 0;
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(matmul_library.handle, plan->product, plan->a, plan->b, plan->c,
                                       plan->c, preference, 1, &choice, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0 || choice.state != CUBLAS_STATUS_SUCCESS)
        fail("cuBLASLt has no algorithm for a product of (%d,%d) and (%d,%d): %s", plan->shape.M,
             plan->shape.K, plan->shape.K, plan->shape.N, cublasLtGetStatusString(status));
    plan->algorithm = choice.algo;
    matmul_check(cublasLtMatmulPreferenceDestroy(preference), "free a preference");
}

static inline void matmul_plan_free(MatmulPlan* plan) {
    matmul_check(cublasLtMatmulDescDestroy(plan->product), "free a plan");
    matmul_check(cublasLtMatrixLayoutDestroy(plan->a), "free a plan");
    matmul_check(cublasLtMatrixLayoutDestroy(plan->b), "free a plan");
    matmul_check(cublasLtMatrixLayoutDestroy(plan->c), "free a plan");
}

// cuBLASLt is column-major. A row-major matrix in column-major order is its transpose, so cuBLASLt computes
// C^T (N,M) = op(B)^T op(A)^T.
static inline void matmul_plan_make(MatmulPlan* plan, MatmulShape shape) {
    const cudaDataType_t element = sizeof(floatX) == sizeof(float) ? CUDA_R_32F : CUDA_R_16BF;
    const cublasOperation_t opB = shape.transB ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t opA = shape.transA ? CUBLAS_OP_T : CUBLAS_OP_N;
    plan->shape = shape;
    matmul_check(cublasLtMatmulDescCreate(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "plan a product");
    matmul_check(
        cublasLtMatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSA, &opB, sizeof(opB)),
        "plan a product");
    matmul_check(
        cublasLtMatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSB, &opA, sizeof(opA)),
        "plan a product");
    const int columnsB = shape.transB ? shape.K : shape.N, rowsB = shape.transB ? shape.N : shape.K;
    const int columnsA = shape.transA ? shape.M : shape.K, rowsA = shape.transA ? shape.K : shape.M;
    matmul_check(cublasLtMatrixLayoutCreate(&plan->a, element, (uint64_t)columnsB, (uint64_t)rowsB, columnsB),
                 "plan a product");
    matmul_check(cublasLtMatrixLayoutCreate(&plan->b, element, (uint64_t)columnsA, (uint64_t)rowsA, columnsA),
                 "plan a product");
    matmul_check(cublasLtMatrixLayoutCreate(&plan->c, shape.accumulate ? CUDA_R_32F : element,
                                            (uint64_t)shape.N, (uint64_t)shape.M, shape.N),
                 "plan a product");
    matmul_choose(plan);
}

static inline const MatmulPlan* matmul_plan(MatmulShape shape) {
    const int made = matmul_library.count < MATMUL_PLANS ? matmul_library.count : (int)MATMUL_PLANS;
    for (int i = 0; i < made; i++)
        if (!memcmp(&matmul_library.plans[i].shape, &shape, sizeof(shape))) return &matmul_library.plans[i];
    MatmulPlan* plan = &matmul_library.plans[matmul_library.count % MATMUL_PLANS];
    if (matmul_library.count >= MATMUL_PLANS) matmul_plan_free(plan);
    matmul_library.count++;
    matmul_plan_make(plan, shape);
    return plan;
}

// The largest power of two that divides an address, at most 256: cuBLASLt does not use more.
static inline unsigned alignment_of(const void* pointer) {
    unsigned alignment = 256;
    while ((uintptr_t)pointer % alignment) alignment /= 2;
    return alignment;
}

// C (M,N) = op(A) op(B), or C += op(A) op(B) in fp32.
static inline void multiply(void* C, const floatX* A, const floatX* B, int transA, int transB, int M, int N,
                            int K, int accumulate, stream_t stream) {
    const MatmulShape shape = {
        transA, transB, M, N, K, accumulate, {alignment_of(A), alignment_of(B), alignment_of(C)}};
    const float alpha = 1, beta = accumulate ? 1 : 0;
    const MatmulPlan* plan = matmul_plan(shape);
    matmul_check(cublasLtMatmul(matmul_library.handle, plan->product, &alpha, B, plan->a, A, plan->b, &beta,
                                C, plan->c, C, plan->c, &plan->algorithm, matmul_library.workspace,
                                MATMUL_WORKSPACE_BYTES, stream),
                 "multiply");
}
#endif

// ----------------------------------------------------------------------------
// The model's products

static inline void matmul_forward(floatX* out,          // (rows, out_channels)
                                  const floatX* inp,    // (rows, in_channels)
                                  const floatX* weight, // (out_channels, in_channels)
                                  int rows, int in_channels, int out_channels, stream_t stream) {
    multiply(out, inp, weight, 0, 1, rows, out_channels, in_channels, 0, stream);
}

// dinp is overwritten, dweight accumulates (over micro-batches and over the uses of a tied weight).
static inline void matmul_backward(floatX* dinp,         // (rows, in_channels)
                                   float_acc* dweight,   // (out_channels, in_channels)
                                   const floatX* dout,   // (rows, out_channels)
                                   const floatX* inp,    // (rows, in_channels)
                                   const floatX* weight, // (out_channels, in_channels)
                                   int rows, int in_channels, int out_channels, stream_t stream) {
    multiply(dinp, dout, weight, 0, 0, rows, in_channels, out_channels, 0, stream);
    multiply(dweight, dout, inp, 1, 0, out_channels, in_channels, rows, 1, stream);
}

#endif
