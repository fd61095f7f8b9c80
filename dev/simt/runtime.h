/*
The CUDA runtime's host functions that the program uses, with CUDA's names and values, and cudaLaunchKernelEx().

Everything happens at once: streams and events are only names, and "asynchronous" calls have finished when they return. What
is checked: that copies go between the memories they name, that a kernel's pointer arguments are device memory, and the limits of
grid, block and shared memory.
*/
#ifndef DEV_SIMT_RUNTIME_H
#define DEV_SIMT_RUNTIME_H

#include <time.h>
#include <tuple>
#include <type_traits>
#include <utility>
#include "dev/simt/counters.h"
#include "dev/simt/fibers.h"
#include "dev/simt/names.h"

// ----------------------------------------------------------------------------
// Types

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719
};
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
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum { cudaHostAllocDefault = 0 };

struct simt_stream {};
struct simt_event {
    double milliseconds;
};
typedef simt_stream* cudaStream_t;
typedef simt_event* cudaEvent_t;

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
// Errors

namespace simt {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// An error that carries a message of its own.
__attribute__((format(printf, 2, 3))) inline cudaError_t result(cudaError_t error, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_message, sizeof(error_message), format, arguments);
    va_end(arguments);
    return result(error);
}
} // namespace simt

inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline cudaError_t cudaGetLastError() {
    cudaError_t error = simt::last_error;
    simt::last_error = cudaSuccess;
    return error;
}

// For a failed launch or copy: what was wrong, of the last that failed.
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    default:
        return simt::error_message;
    }
}

// ----------------------------------------------------------------------------
// Memory

inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    *total_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    *free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    size_t free_bytes, total_bytes;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    *pointer = bytes && bytes <= total_bytes ? simt::device_allocate(bytes) : nullptr;
    return simt::result(*pointer || !bytes ? cudaSuccess : cudaErrorMemoryAllocation);
}
template <class T> inline cudaError_t cudaMalloc(T** pointer, size_t bytes) {
    return cudaMalloc((void**)(void*)pointer, bytes);
}

inline cudaError_t cudaFree(void* pointer) {
    if (!pointer || simt::device_release(pointer)) return cudaSuccess;
    return simt::result(cudaErrorInvalidValue, "cudaFree(%p): not a pointer that cudaMalloc() gave", pointer);
}

inline cudaError_t cudaMallocHost(void** pointer, size_t bytes, unsigned flags = cudaHostAllocDefault) {
    (void)flags;
    *pointer = malloc(bytes ? bytes : 1);
    if (*pointer) memset(*pointer, 0xFF, bytes);
    return simt::result(*pointer ? cudaSuccess : cudaErrorMemoryAllocation);
}
template <class T>
inline cudaError_t cudaMallocHost(T** pointer, size_t bytes, unsigned flags = cudaHostAllocDefault) {
    return cudaMallocHost((void**)(void*)pointer, bytes, flags);
}
inline cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    return cudaMallocHost(pointer, bytes, flags);
}
inline cudaError_t cudaFreeHost(void* pointer) {
    free(pointer);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const bool to_device = simt::is_device_memory((uintptr_t)to, bytes),
               from_device = simt::is_device_memory((uintptr_t)from, bytes);
    const cudaMemcpyKind actual = (cudaMemcpyKind)(to_device + 2 * from_device);
    static const char* const names[] = {"host to host", "host to device", "device to host",
                                        "device to device"};
    if (bytes == 0) return cudaSuccess;
    if (kind != cudaMemcpyDefault && kind != (from_device && to_device ? cudaMemcpyDeviceToDevice : actual))
        return simt::result(cudaErrorInvalidValue, "cudaMemcpy of %zu bytes, %s: these addresses are %s",
                            bytes, names[kind], names[actual]);
    simt::DeviceMemoryOpen open;
    memmove(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    (void)stream;
    return cudaMemcpy(to, from, bytes, kind);
}

inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
    if (bytes == 0) return cudaSuccess;
    if (!simt::is_device_memory((uintptr_t)memory, bytes))
        return simt::result(cudaErrorInvalidValue, "cudaMemset of %zu bytes at %p: not device memory", bytes,
                            memory);
    simt::DeviceMemoryOpen open;
    memset(memory, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr) {
    (void)stream;
    return cudaMemset(memory, value, bytes);
}

// ----------------------------------------------------------------------------
// Streams and events

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    *stream = new simt_stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return cudaStreamCreate(stream);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
    *event = new simt_event();
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = nullptr) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->milliseconds = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = (float)(end->milliseconds - begin->milliseconds);
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// The device: one, a small GPU of compute capability 9.0

enum { SIMT_MULTIPROCESSORS = 4 }; // few, so that kernels whose grid follows from it stay quick

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

template <class... P, size_t... i>
inline void call(void (*kernel)(P...), const std::tuple<P...>& arguments, std::index_sequence<i...>) {
    kernel(std::get<i>(arguments)...);
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

namespace simt {

// SIMT_LAUNCHES=FILE: of every launch the kernel, the threads of a block and their bytes of dynamic shared memory, a line each.
inline void log_launch(const void* kernel, const cudaLaunchConfig_t* c) {
    static FILE* const log = getenv("SIMT_LAUNCHES") ? fopen(getenv("SIMT_LAUNCHES"), "a") : nullptr;
    if (log)
        fprintf(log, "%s %u %zu\n", function_name(kernel), c->blockDim.x * c->blockDim.y * c->blockDim.z,
                c->dynamicSmemBytes);
}

} // namespace simt

template <class... P, class... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                                      A&&... arguments) {
    cudaError_t error = simt::check_configuration(config);
    if (error != cudaSuccess) return error;
    struct Call {
        void (*kernel)(P...);
        std::tuple<P...> arguments;
    } launched = {kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
    const bool valid = std::apply([](const P&... value) { return (simt::is_valid_argument(value) && ...); },
                                  launched.arguments);
    if (!valid)
        return simt::result(cudaErrorInvalidValue, "a pointer argument of the kernel is not device memory");
    simt::count(&simt::Counters::launches, 1);
    simt::log_launch((const void*)kernel, config);
    const bool good = simt::run_grid(
        config->gridDim, config->blockDim, config->dynamicSmemBytes,
        [](void* pointer) {
            simt::call(((Call*)pointer)->kernel, ((Call*)pointer)->arguments,
                       std::index_sequence_for<P...>());
        },
        &launched);
    return simt::result(good ? cudaSuccess : cudaErrorLaunchFailure);
}

#endif
