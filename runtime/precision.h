/*
The two number types of the program, chosen by the build flag PRECISION.

    floatX      parameters, activations and their gradients: bf16, fp32 or fp64
    float_acc   gradients of parameters, optimizer moments, log-sum-exps and every sum: fp64 if floatX is
                fp64, else fp32

fp64 is for gradient checks and as the reference for the other builds. bf16 is for GPUs: it is a C++ type,
which the host only copies and converts (runtime/weights.h).
*/
#ifndef RUNTIME_PRECISION_H
#define RUNTIME_PRECISION_H

#include <stddef.h>

#if defined(PRECISION_FP64)
typedef double floatX;
typedef double float_acc;
#define PRECISION_NAME "fp64"
#elif defined(PRECISION_BF16)
#include "kernels/launch.cuh" // defines __nv_bfloat16
typedef __nv_bfloat16 floatX;
typedef float float_acc;
#define PRECISION_NAME "bf16"
#elif defined(PRECISION_FP32)
typedef float floatX;
typedef float float_acc;
#define PRECISION_NAME "fp32"
#else
#error "define PRECISION_BF16, PRECISION_FP32 or PRECISION_FP64 (make PRECISION=...)"
#endif

#endif
