/*
An emulator of CUDA's execution model on a CPU: g++ compiles the kernels, and each CUDA thread is a fiber. It
replaces cuda_runtime.h and cuda_bf16.h (kernels/launch.cuh chooses), and needs nothing of the CUDA toolkit.

    g++ -std=c++17 -DDEVICE_SIMT -fno-strict-aliasing -Wno-unknown-pragmas -x c++ program.cu
    SIMT_ORDER=forward|reverse|random  SIMT_SEED=7  SIMT_ASYNC=lazy|eager|mixed  SIMT_LAUNCHES=launches.txt  ./program

Beyond wrong results it finds:
    always              barriers that not all threads reach, lanes missing from a warp operation, wrong masks,
                        invalid addresses of cp.async and ldmatrix, host pointers given to kernels; unwritten
                        memory is NaN
    another order       most missing barriers: the reader runs before the writer. random prints its seed
    another SIMT_ASYNC  missing waits of cp.async, stages overwritten too early
    -fsanitize=address  accesses outside device and shared memory, host code that accesses device memory
    -fsanitize=undefined  misaligned vectors
    -fsanitize=thread   missing barriers even if the result is right, and races between blocks
    recorded streams    calls that are not allowed while a stream is recorded for a graph (stream.h)
The launch returns the error, and cudaGetErrorString() tells place, block, thread and counts.

It does not show speed, bank conflicts, overlapping streams, the weak order of memory, or errors in the inline
PTX (the functions of kernels/ptx.cuh have separate bodies here; test/test_layout.cu compares both with the
same formulas).

A program launches from only one thread. Kernels declare shared memory by SHARED_MEMORY() or static __shared__
arrays, and nothing else in the program is thread_local (types.h says why).
*/
#ifndef DEV_SIMT_SIMT_H
#define DEV_SIMT_SIMT_H

// The files of the emulator:
//
//     sanitizers.h   tells the sanitizers which thread runs, and which memory it may access
//     types.h        CUDA's keywords, dim3, vectors, threadIdx
//     bf16.h         __nv_bfloat16
//     memory.h       device memory and shared memory
//     math.h         device functions and atomics
//     fibers.h       threads, their order, __syncthreads()
//     warp.h         shuffles, votes, __syncwarp()
//     matrix.h       mma and ldmatrix
//     copy.h         cp.async
//     errors.h       errors of host functions
//     stream.h       streams, events, graphs
//     runtime.h      host functions for memory, copies and launches
//     counters.h     counters of the kernels' work
//     names.h        names of kernels
//     matmul.h       matrix products, in place of cuBLASLt

#include "dev/simt/bf16.h"
#include "dev/simt/math.h"
#include "dev/simt/warp.h"
#include "dev/simt/runtime.h"

#endif
