/*
CUDA's execution model on a CPU: kernels compiled by g++, one fiber per CUDA thread. It stands where cuda_runtime.h and
cuda_bf16.h stand under nvcc (kernels/launch.cuh chooses), and needs nothing of the CUDA toolkit.

    g++ -std=c++17 -DDEVICE_SIMT -fno-strict-aliasing -Wno-unknown-pragmas -x c++ program.cu
    SIMT_ORDER=forward|reverse|random  SIMT_SEED=7  SIMT_ASYNC=lazy|eager|mixed  SIMT_LAUNCHES=launches.txt  ./program

What it finds, beyond wrong results
    always              barriers that not all threads reach, lanes missing from a warp operation, wrong masks, invalid
                        addresses of cp.async and ldmatrix, host pointers given to kernels; what nobody wrote is NaN
    another order       most missing barriers: whoever reads runs before whoever writes. A random order prints its seed
    another SIMT_ASYNC  missing waits of cp.async, stages overwritten too early
    -fsanitize=address  accesses outside device and shared memory, host code that touches device memory
    -fsanitize=undefined  misaligned vectors
    -fsanitize=thread   missing barriers even where the result is right, and races between blocks
Each is one error: the launch returns it, and cudaGetErrorString() tells place, block, thread and counts.

Of streams that are recorded for a graph it finds what no recording may do (stream.h).

What it does not show: speed, bank conflicts, overlapping streams, the weak order of memory, and the inline PTX itself (the
functions of kernels/ptx.cuh have bodies of their own here; test/test_layout.cu compares both with the same formulas).

    sanitizers.h   which accesses belong to which thread, what may be touched
    types.h        qualifiers, dim3, vectors, threadIdx       bf16.h   __nv_bfloat16
    memory.h       device and shared memory                   math.h   device functions, atomics
    fibers.h       threads, their order, __syncthreads        warp.h   shuffles, votes, __syncwarp
    matrix.h       mma, ldmatrix                              copy.h   cp.async
    errors.h, stream.h, runtime.h      the host's functions: streams, events and graphs; memory, launch
    counters.h, names.h                what kernels have done, and what they are called

A program launches from one thread. Kernels declare shared memory by SHARED_MEMORY() or static __shared__ arrays, and nothing
else in the program is thread_local (types.h says why).
*/
#ifndef DEV_SIMT_SIMT_H
#define DEV_SIMT_SIMT_H

#include "dev/simt/bf16.h"
#include "dev/simt/math.h"
#include "dev/simt/warp.h"
#include "dev/simt/runtime.h"

#endif
