/*
Kernels for nvcc, or for g++ and the emulator: this file includes the CUDA headers or the emulator's, declares
shared memory and launches kernels.

    __global__ void scale(float* x, float by, int n) {
        SHARED_MEMORY(float, tile); // as many bytes as the launch says
        ...
    }
    launch(scale, (n + 255) / 256, 256, 256 * sizeof(float), stream, x, 2.0f, n);

No other file uses <<<>>> or extern __shared__. If CUDA refuses a launch, the program ends with one line that
names the launch. On the emulator, an error inside a kernel does the same.
*/
#ifndef KERNELS_LAUNCH_CUH
#define KERNELS_LAUNCH_CUH

// fail
#include "runtime/checks.h"

#if defined(DEVICE_SIMT)
#include "dev/simt/simt.h"
#define SHARED_MEMORY(type, name) type* name = (type*)simt::dynamic_shared_memory()
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#define SHARED_MEMORY(type, name)                                                                            \
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];                                  \
    type* name = (type*)dynamic_shared_memory
#else
#error "kernels need nvcc, or g++ with -DDEVICE_SIMT"
#endif

// Count the bytes that a thread reads from device memory and writes to it. Only the emulator counts.
#if defined(DEVICE_SIMT)
inline void count_loaded(size_t bytes) { simt::count(&simt::Counters::loaded, bytes); }
inline void count_stored(size_t bytes) { simt::count(&simt::Counters::stored, bytes); }
#else
__device__ __forceinline__ void count_loaded(size_t) {}
__device__ __forceinline__ void count_stored(size_t) {}
#endif

// Several arrays in dynamic shared memory, each at a multiple of 128 bytes. Under the address sanitizer a
// poisoned gap follows each array, so that the sanitizer finds an index beyond its end.
//
//     SHARED_MEMORY(char, rest);
//     float* a = carve<float>(rest, 100);
//     int* b = carve<int>(rest, 7);
//     launch(kernel, grid, block, carved_bytes<float>(100) + carved_bytes<int>(7), stream, ...);
#if defined(DEVICE_SIMT) && defined(SIMT_ADDRESS)
enum { SHARED_GAP = 128 };
#else
enum { SHARED_GAP = 0 };
#endif

template <class T> __host__ __device__ constexpr size_t carved_bytes(size_t count) {
    return (count * sizeof(T) + 127) / 128 * 128 + SHARED_GAP;
}

template <class T> __device__ __forceinline__ T* carve(char*& rest, size_t count) {
    T* array = (T*)rest;
    rest += carved_bytes<T>(count);
#if defined(DEVICE_SIMT)
    simt::poison(array + count, (size_t)(rest - (char*)(array + count)));
#endif
    return array;
}

// A grid, with the file and line of the launch. The compiler fills these in when a number or a dim3 is
// converted to a LaunchGrid.
struct LaunchGrid {
    dim3 size;
    const char* file;
    int line;
    LaunchGrid(dim3 size_, const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE())
        : size(size_), file(file_), line(line_) {}
    LaunchGrid(unsigned blocks, const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE())
        : size(blocks), file(file_), line(line_) {}
    LaunchGrid(int blocks, const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE())
        : size((unsigned)blocks), file(file_), line(line_) {}
};

// UNASKED: dynamic shared memory that a thread block may use without cudaFuncSetAttribute. CUDA allows 48 KB,
// including the static arrays of the kernel. MOST: the most that a thread block can have on every GPU from
// sm_80 on; sm_86 and sm_89 have the least. Kernels assert that they stay within MOST where they compute
// their shared memory.
constexpr size_t UNASKED_SHARED_BYTES = 40 * 1024, MOST_SHARED_BYTES = 99 * 1024;

// Launches a kernel and returns the error.
template <class... P, class... A>
inline cudaError_t try_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                              cudaStream_t stream, A... arguments) {
    if (shared_bytes > UNASKED_SHARED_BYTES) {
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

// A launch observer measures launches: launch() calls `before` and `after` around each one. NULL: no
// observer. `kernel` is the kernel's address; cudaFuncGetName() gives its name.
struct LaunchObserver {
    void (*before)(LaunchObserver* self, const void* kernel, cudaStream_t stream);
    void (*after)(LaunchObserver* self, const void* kernel, cudaStream_t stream);
};
inline LaunchObserver* launch_observer = NULL;

// Launches a kernel. Ends the program if CUDA refuses the launch.
template <class... P, class... A>
inline void launch(void (*kernel)(P...), LaunchGrid grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A... arguments) {
    if (launch_observer) launch_observer->before(launch_observer, (const void*)kernel, stream);
    cudaError_t error = try_launch(kernel, grid.size, block, shared_bytes, stream, arguments...);
    if (launch_observer) launch_observer->after(launch_observer, (const void*)kernel, stream);
    if (error != cudaSuccess)
        fail("the kernel launched at %s:%d failed: %s", grid.file, grid.line, cudaGetErrorString(error));
}

#endif
