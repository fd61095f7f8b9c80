/*
The CUDA runtime's host functions that the program uses, with CUDA's names and values, and cudaLaunchKernelEx(). Streams, events
and graphs are in stream.h.

"Asynchronous" calls have finished when they return, except on a stream that is being recorded for a graph:
there they are only noted. The emulator checks that copies go between the kinds of memory that they name, that
a kernel's pointer arguments are device memory, and the limits of grid, block and shared memory. For a
recorded copy it also checks that the host's memory is pinned.
*/
#ifndef DEV_SIMT_RUNTIME_H
#define DEV_SIMT_RUNTIME_H

#include <map>
#include <tuple>
#include <type_traits>
#include <utility>
#include "dev/simt/counters.h"
#include "dev/simt/names.h"
#include "dev/simt/stream.h"

// ----------------------------------------------------------------------------
// Types

enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum { cudaHostAllocDefault = 0 };

struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int multiProcessorCount, major, minor, l2CacheSize;
    size_t sharedMemPerBlockOptin;
};

// ----------------------------------------------------------------------------
// Memory

inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    *total_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    *free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    *pointer = nullptr;
    if (simt::loses_recording("cudaMalloc")) return cudaErrorStreamCaptureUnsupported;
    size_t free_bytes, total_bytes;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    *pointer = bytes && bytes <= total_bytes ? simt::device_allocate(bytes) : nullptr;
    return simt::result(*pointer || !bytes ? cudaSuccess : cudaErrorMemoryAllocation);
}
template <class T> inline cudaError_t cudaMalloc(T** pointer, size_t bytes) {
    return cudaMalloc((void**)(void*)pointer, bytes);
}

inline cudaError_t cudaFree(void* pointer) {
    if (simt::loses_recording("cudaFree")) return cudaErrorStreamCaptureUnsupported;
    if (!pointer || simt::device_release(pointer)) return cudaSuccess;
    return simt::result(cudaErrorInvalidValue, "cudaFree(%p): not a pointer that cudaMalloc() gave", pointer);
}

namespace simt {
inline std::map<const char*, size_t> pinned; // address and bytes of pinned host memory

inline bool is_pinned(const void* memory, size_t bytes) {
    auto after = pinned.upper_bound((const char*)memory);
    if (after == pinned.begin()) return false;
    --after;
    return (const char*)memory + bytes <= after->first + after->second;
}
} // namespace simt

inline cudaError_t cudaMallocHost(void** pointer, size_t bytes, unsigned flags = cudaHostAllocDefault) {
    (void)flags;
    *pointer = nullptr;
    if (simt::loses_recording("cudaMallocHost")) return cudaErrorStreamCaptureUnsupported;
    *pointer = malloc(bytes ? bytes : 1);
    if (!*pointer) return simt::result(cudaErrorMemoryAllocation);
    memset(*pointer, 0xFF, bytes);
    simt::pinned[(const char*)*pointer] = bytes;
    return cudaSuccess;
}
template <class T>
inline cudaError_t cudaMallocHost(T** pointer, size_t bytes, unsigned flags = cudaHostAllocDefault) {
    return cudaMallocHost((void**)(void*)pointer, bytes, flags);
}
inline cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    return cudaMallocHost(pointer, bytes, flags);
}
inline cudaError_t cudaFreeHost(void* pointer) {
    if (simt::loses_recording("cudaFreeHost")) return cudaErrorStreamCaptureUnsupported;
    simt::pinned.erase((const char*)pointer);
    free(pointer);
    return cudaSuccess;
}

namespace simt {

inline cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const bool to_device = is_device_memory((uintptr_t)to, bytes),
               from_device = is_device_memory((uintptr_t)from, bytes);
    const cudaMemcpyKind actual = (cudaMemcpyKind)(to_device + 2 * from_device);
    static const char* const names[] = {"host to host", "host to device", "device to host",
                                        "device to device"};
    if (bytes == 0) return cudaSuccess;
    if (kind != cudaMemcpyDefault && kind != (from_device && to_device ? cudaMemcpyDeviceToDevice : actual))
        return result(cudaErrorInvalidValue, "cudaMemcpy of %zu bytes, %s: these addresses are %s", bytes,
                      names[kind], names[actual]);
    DeviceMemoryOpen open;
    memmove(to, from, bytes);
    return cudaSuccess;
}

inline cudaError_t set(void* memory, int value, size_t bytes) {
    if (bytes == 0) return cudaSuccess;
    if (!is_device_memory((uintptr_t)memory, bytes))
        return result(cudaErrorInvalidValue, "cudaMemset of %zu bytes at %p: not device memory", bytes,
                      memory);
    DeviceMemoryOpen open;
    memset(memory, value, bytes);
    return cudaSuccess;
}

// Whether a recorded copy may use this memory.
inline bool stays_in_place(const void* memory, size_t bytes) {
    return is_device_memory((uintptr_t)memory, bytes) || is_pinned(memory, bytes);
}

} // namespace simt

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (simt::loses_recording("cudaMemcpy")) return cudaErrorStreamCaptureUnsupported;
    return simt::copy(to, from, bytes, kind);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    if (simt::records(stream) && !(simt::stays_in_place(to, bytes) && simt::stays_in_place(from, bytes)))
        return simt::lose_recording(cudaErrorStreamCaptureUnsupported, "cudaMemcpyAsync",
                                    "the host's side of the copy is not pinned");
    return simt::enqueue(stream, simt::NODE_COPY, [=] { return simt::copy(to, from, bytes, kind); });
}

inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
    if (simt::loses_recording("cudaMemset")) return cudaErrorStreamCaptureUnsupported;
    return simt::set(memory, value, bytes);
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr) {
    return simt::enqueue(stream, simt::NODE_SET, [=] { return simt::set(memory, value, bytes); });
}

// ----------------------------------------------------------------------------
// The device: one, a small GPU of compute capability 9.0

enum { SIMT_MULTIPROCESSORS = 4 }; // few, because the grids of some kernels grow with it

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return simt::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    (void)device;
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = SIMT_MULTIPROCESSORS;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = simt::MAX_SHARED_BYTES;
        break;
    }
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    (void)device;
    *properties = cudaDeviceProp();
    snprintf(properties->name, sizeof(properties->name), "CUDA emulated on a CPU");
    size_t free_bytes;
    cudaMemGetInfo(&free_bytes, &properties->totalGlobalMem);
    properties->multiProcessorCount = SIMT_MULTIPROCESSORS;
    properties->major = 9;
    properties->l2CacheSize = 1 << 20;
    properties->sharedMemPerBlockOptin = simt::MAX_SHARED_BYTES;
    return cudaSuccess;
}

template <class... P> inline cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) {
    return cudaSuccess;
}

inline cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
    *name = simt::function_name(kernel);
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// Launch

namespace simt {

template <class T> inline bool is_valid_argument(const T& value) {
    if constexpr (std::is_pointer_v<T>) return !value || is_device_memory((uintptr_t)value, 1);
    else return true;
}

// A kernel with its converted arguments.
template <class... P> struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
};

template <class... P> inline void call(void* launched) {
    const Call<P...>* c = (Call<P...>*)launched;
    std::apply(c->kernel, c->arguments);
}

// With SIMT_LAUNCHES=FILE, appends a line for every launch: the kernel, the threads of a block and the bytes
// of its dynamic shared memory.
inline void log_launch(const void* kernel, dim3 threads_of_block, size_t shared_bytes) {
    static FILE* const log = getenv("SIMT_LAUNCHES") ? fopen(getenv("SIMT_LAUNCHES"), "a") : nullptr;
    if (log)
        fprintf(log, "%s %u %zu\n", function_name(kernel),
                threads_of_block.x * threads_of_block.y * threads_of_block.z, shared_bytes);
}

template <class... P>
inline cudaError_t run(Call<P...> launched, dim3 grid, dim3 threads_of_block, size_t shared_bytes) {
    const bool valid =
        std::apply([](const P&... value) { return (is_valid_argument(value) && ...); }, launched.arguments);
    if (!valid) return result(cudaErrorInvalidValue, "a pointer argument of the kernel is not device memory");
    count(&Counters::launches, 1);
    log_launch((const void*)launched.kernel, threads_of_block, shared_bytes);
    const bool good = run_grid(grid, threads_of_block, shared_bytes, call<P...>, &launched);
    return result(good ? cudaSuccess : cudaErrorLaunchFailure);
}

inline cudaError_t check_configuration(const cudaLaunchConfig_t* c) {
    const dim3 g = c->gridDim, b = c->blockDim;
    if (!b.x || !b.y || !b.z || (uint64_t)b.x * b.y * b.z > MAX_THREADS || b.z > 64)
        return result(cudaErrorInvalidConfiguration, "a block of (%u,%u,%u) threads: 1 to 1024 are possible",
                      b.x, b.y, b.z);
    if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        return result(cudaErrorInvalidConfiguration,
                      "a grid of (%u,%u,%u) blocks: (1,1,1) to (2147483647,65535,65535) are possible", g.x,
                      g.y, g.z);
    if (c->dynamicSmemBytes > MAX_SHARED_BYTES)
        return result(cudaErrorInvalidConfiguration, "%zu bytes of shared memory: %d are possible",
                      c->dynamicSmemBytes, MAX_SHARED_BYTES);
    if (current) return result(cudaErrorInvalidConfiguration, "a launch inside a kernel");
    return cudaSuccess;
}

} // namespace simt

template <class... P, class... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                                      A&&... arguments) {
    cudaError_t error = simt::check_configuration(config);
    if (error != cudaSuccess) return error;
    const simt::Call<P...> launched = {kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
    const dim3 grid = config->gridDim, block = config->blockDim;
    const size_t shared_bytes = config->dynamicSmemBytes;
    return simt::enqueue(config->stream, simt::NODE_KERNEL,
                         [=] { return simt::run(launched, grid, block, shared_bytes); });
}

#endif
