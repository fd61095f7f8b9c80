/*
The device of DEVICE=cuda and DEVICE=simt: a GPU, or the emulated one. The twin of dev/cpu/device.h.

    floatX* out = (floatX*)device_malloc(rows * C * sizeof(floatX), "activations");   // zeroed
    copy_to_device(tokens, host_tokens, rows * sizeof(int), stream);                  // queued, like kernels
    copy_to_host(losses, device_losses, rows * sizeof(float), stream);
    stream_synchronize(stream);                                                       // losses is complete

A copy is asynchronous if its host memory is from host_malloc_pinned(). Do not change this memory until
stream_synchronize() has returned.
*/
#ifndef KERNELS_DEVICE_CUH
#define KERNELS_DEVICE_CUH

#include <math.h>
#include <string.h>
// launch, and CUDA's or the emulator's run-time
#include "kernels/launch.cuh"
#include "runtime/checks.h"
#include "runtime/precision.h"
#if !defined(DEVICE_SIMT)
#include <nvtx3/nvToolsExt.h>
#endif

typedef cudaStream_t stream_t;

#if defined(DEVICE_SIMT)
#define DEVICE_NAME "simt"
enum { DEVICE_IS_EMULATED = 1 };
#else
#define DEVICE_NAME "cuda"
enum { DEVICE_IS_EMULATED = 0 };
#endif
#define DEVICE_HAS_OWN_MEMORY 1 // device_malloc() does not allocate main memory

// Ends the program if a call of the CUDA runtime failed. `doing` completes the sentence "CUDA: cannot ...".
static inline void device_check(cudaError_t error, const char* doing) {
    if (error != cudaSuccess) fail("CUDA: cannot %s: %s", doing, cudaGetErrorString(error));
}

// The manufacturer's name of the device.
static inline const char* device_name(void) {
    static cudaDeviceProp properties;
    int device = 0;
    device_check(cudaGetDevice(&device), "find the device");
    device_check(cudaGetDeviceProperties(&properties, device), "ask for the device's properties");
    return properties.name;
}

// Chooses the GPU of this process, which is number `index` of the `count` processes on this machine. Each
// process needs its own GPU. The launcher may have set CUDA_VISIBLE_DEVICES so that a process sees only its
// own. The emulator has no limit.
static inline void device_choose(int index, int count) {
    int devices = 0;
    device_check(cudaGetDeviceCount(&devices), "count the GPUs");
    if (DEVICE_IS_EMULATED) return;
    const int is_only_one = devices == 1 && getenv("CUDA_VISIBLE_DEVICES");
    if (count > devices && !is_only_one)
        fail("%d processes on this machine, which has %d GPUs: each needs one", count, devices);
    device_check(cudaSetDevice(is_only_one ? 0 : index), "choose a GPU");
}

// Free bytes of the device's memory.
static inline size_t device_memory_free(void) {
    size_t available = 0, total = 0;
    device_check(cudaMemGetInfo(&available, &total), "ask for the free memory");
    return available;
}

// Allocates zeroed device memory. Any stream may use it at once. `what` names it in an error.
static inline void* device_malloc(size_t bytes, const char* what) {
    void* memory = NULL;
    cudaError_t error = cudaMalloc(&memory, bytes ? bytes : 1);
    if (error == cudaErrorMemoryAllocation)
        fail("out of memory: %.1f MB for %s, and %.1f MB of the device's memory are free",
             (double)bytes / 1e6, what, (double)device_memory_free() / 1e6);
    device_check(error, "allocate memory");
    device_check(cudaMemset(memory, 0, bytes), "clear memory");
    device_check(cudaDeviceSynchronize(), "clear memory");
    return memory;
}

static inline void device_free(void* memory) { device_check(cudaFree(memory), "free memory"); }

// Allocates pinned host memory: the device copies from and to it while the host continues.
static inline void* host_malloc_pinned(size_t bytes, const char* what) {
    void* memory = NULL;
    cudaError_t error = cudaMallocHost(&memory, bytes ? bytes : 1);
    if (error == cudaErrorMemoryAllocation)
        fail("out of memory: %.1f MB of pinned main memory for %s", (double)bytes / 1e6, what);
    device_check(error, "allocate pinned memory");
    return memory;
}

static inline void host_free_pinned(void* memory) { device_check(cudaFreeHost(memory), "free memory"); }

static inline void device_zero(void* memory, size_t bytes, stream_t stream) {
    device_check(cudaMemsetAsync(memory, 0, bytes, stream), "clear memory");
}

static inline void copy_to_device(void* device, const void* host, size_t bytes, stream_t stream) {
    device_check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "copy to the device");
}

static inline void copy_to_host(void* host, const void* device, size_t bytes, stream_t stream) {
    device_check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "copy to the host");
}

static inline void copy_on_device(void* to, const void* from, size_t bytes, stream_t stream) {
    device_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "copy in its memory");
}

// Makes a stream with no synchronisation with the default stream, so that its work can be recorded in a
// graph.
static inline stream_t stream_make(void) {
    stream_t made;
    device_check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "make a stream");
    return made;
}

static inline void stream_free(stream_t done) { device_check(cudaStreamDestroy(done), "free a stream"); }

// Waits for all queued work. Reports an error that occurred in a kernel.
static inline void stream_synchronize(stream_t stream) {
    device_check(cudaStreamSynchronize(stream), "finish what was queued");
}

// A mark is a point in the stream's order of work. mark() does not wait. seconds_between() waits until the
// stream has reached `done`, and returns the time between the two marks.
typedef cudaEvent_t Mark;
static inline Mark mark_make(void) {
    Mark made;
    device_check(cudaEventCreate(&made), "make an event");
    return made;
}
static inline void mark_free(Mark done) { device_check(cudaEventDestroy(done), "free an event"); }
static inline void mark(Mark* at, stream_t stream) {
    cudaStreamCaptureStatus status;
    device_check(cudaStreamIsCapturing(stream, &status), "ask whether a stream is recorded");
    // In a graph, the external flag records the event on every run of the graph. Outside a graph CUDA refuses
    // the flag.
    const unsigned flags =
        status == cudaStreamCaptureStatusNone ? cudaEventRecordDefault : cudaEventRecordExternal;
    device_check(cudaEventRecordWithFlags(*at, stream, flags), "record an event");
}
static inline double seconds_between(Mark begun, Mark done) {
    float milliseconds = 0;
    device_check(cudaEventSynchronize(done), "wait for an event");
    device_check(cudaEventElapsedTime(&milliseconds, begun, done), "compare events");
    return 1e-3 * (double)milliseconds;
}

// ----------------------------------------------------------------------------
// Graphs: a recorded sequence of work that is queued by one call

#define DEVICE_HAS_GRAPHS 1

// A zeroed Graph has no recording.
typedef struct {
    cudaGraphExec_t executable;
} Graph;

// Between graph_record_begin() and graph_record_end(), the work that the caller queues on the stream is
// recorded and not executed. Copies must use pinned memory, and the host must not wait for the stream.
// Earlier work may still be in the stream. Every library kernel must have run once before, because its first
// call loads code and allocates memory.
//
// The arguments of kernels are part of the recording, so if they change from step to step, record every step.
// If the new recording has the same work in the same order, it only updates the arguments of the executable
// graph, which is cheaper than a new one. A launch that is still running keeps the old arguments.
static inline void graph_record_begin(stream_t stream) {
    device_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "record a graph");
}

static inline void graph_record_end(Graph* graph, stream_t stream) {
    cudaGraph_t recorded;
    device_check(cudaStreamEndCapture(stream, &recorded), "record a graph");
    cudaGraphExecUpdateResultInfo info;
    if (graph->executable && cudaGraphExecUpdate(graph->executable, recorded, &info) != cudaSuccess) {
        (void)cudaGetLastError(); // not a failure: the recording has other work than the old graph
        stream_synchronize(stream);
        device_check(cudaGraphExecDestroy(graph->executable), "free a graph");
        graph->executable = NULL;
    }
    if (!graph->executable)
        device_check(cudaGraphInstantiate(&graph->executable, recorded, 0), "make a graph executable");
    device_check(cudaGraphDestroy(recorded), "free a graph");
}

// Queues the recorded work.
static inline void graph_launch(const Graph* graph, stream_t stream) {
    device_check(cudaGraphLaunch(graph->executable, stream), "launch a graph");
}

static inline void graph_free(Graph* graph) {
    if (graph->executable) device_check(cudaGraphExecDestroy(graph->executable), "free a graph");
    graph->executable = NULL;
}

// Names the work that is queued between range_begin() and range_end(), for a profiler (NVTX).
#if defined(DEVICE_SIMT)
static inline void range_begin(const char* name) { (void)name; }
static inline void range_end(void) {}
#else
static inline void range_begin(const char* name) { nvtxRangePushA(name); }
static inline void range_end(void) { nvtxRangePop(); }
#endif

#endif
