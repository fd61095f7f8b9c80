/*
Threads of the kernels: the lanes of a warp, and grids that have enough threads for a number of elements.

    const int lane = lane_of_warp(), warp = warp_of_block();
    const float other = __shfl_xor_sync(ALL_LANES, value, 1);
    launch(kernel, ceil_div(rows, WARP), WARP, 0, stream, ...);        // host: a lane for each row
    launch(kernel, flat_grid(count, 1), FLAT_BLOCK, 0, stream, ...);   // host: a thread for each element
*/
#ifndef KERNELS_THREADS_CUH
#define KERNELS_THREADS_CUH

#include <type_traits>
// __global__ and all else of CUDA
#include "kernels/launch.cuh"

enum { WARP = 32 };
#define ALL_LANES 0xffffffffu

static __device__ __forceinline__ unsigned lane_of_warp(void) { return threadIdx.x % WARP; }
static __device__ __forceinline__ int warp_of_block(void) { return threadIdx.x / WARP; }

// a / b, rounded up; both are positive. The result has the type of a. Two kernels spell this out, because the
// call changes the code that the compiler makes: attention_forward_kernel and flashmoba_route_kernel.
template <class T> __host__ __device__ constexpr T ceil_div(T a, std::common_type_t<T> b) {
    return (a + b - 1) / b;
}

// The grid of a kernel that gives each thread `width` of `count` elements, by blocks of FLAT_BLOCK threads.
enum { FLAT_BLOCK = 256 };
static inline dim3 flat_grid(size_t count, int width) {
    return dim3((unsigned)ceil_div(count, FLAT_BLOCK * (size_t)width));
}

#endif
