/*
CUDA's keywords and small types, for g++: kernels may use these without including CUDA's headers.

    __global__ void scale(float4* x, float by) { ... threadIdx.x + blockIdx.x * blockDim.x ... }

On a GPU, each block has its own static __shared__ arrays. Here blocks run one after the other, so one array
serves all blocks. It is thread_local for one reason: the linker then puts all such arrays into one segment,
which memory.h finds and fills with 0xFF before each block. So the program must have no other thread_local
variables. The address sanitizer guards only ordinary arrays, so in its builds they are ordinary, and memory.h
does not refill them.
*/
#ifndef DEV_SIMT_TYPES_H
#define DEV_SIMT_TYPES_H

#include <stddef.h>
#include <stdint.h>
#include "dev/simt/sanitizers.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef SIMT_ADDRESS
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Vectors are aligned to their size, as on the GPU: the undefined-behaviour sanitizer finds a misaligned
// access.
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// fibers.h sets these when it switches to another thread or block.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#endif
