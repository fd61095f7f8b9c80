/*
The device of DEVICE=cuda and DEVICE=simt: a GPU, or the emulated one. The twin of dev/cpu/device.h.

    floatX* out = (floatX*)device_malloc(rows * C * sizeof(floatX), "activations");   // zeroed
    copy_to_device(tokens, host_tokens, rows * sizeof(int), stream);                  // queued, as kernels are
    copy_to_host(losses, device_losses, rows * sizeof(float), stream);
    stream_synchronize(stream);                                                       // now losses are there

A copy is asynchronous where the host's side is from host_malloc_pinned(); its memory must then stay as it is until the stream
has been waited for.
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
#define DEVICE_HAS_OWN_MEMORY 1 // what device_malloc() gives is not main memory

// Ends the program where a call of the run-time failed; `doing` completes the sentence "CUDA: cannot ...".
static inline void device_check(cudaError_t error, const char* doing) {
    if (error != cudaSuccess) fail("CUDA: cannot %s: %s", doing, cudaGetErrorString(error));
}

// What the maker calls it.
static inline const char* device_name(void) {
    static cudaDeviceProp properties;
    int device = 0;
    device_check(cudaGetDevice(&device), "find the device");
    device_check(cudaGetDeviceProperties(&properties, device), "ask for the device's properties");
    return properties.name;
}

// Makes this the process of number `index` of the `count` on this machine: each has a GPU of its own, which the launcher may have
// made the only one that it sees. Every one can be emulated.
static inline void device_choose(int index, int count) {
    int devices = 0;
    device_check(cudaGetDeviceCount(&devices), "count the GPUs");
    if (DEVICE_IS_EMULATED) return;
    const int is_only_one = devices == 1 && getenv("CUDA_VISIBLE_DEVICES");
    if (count > devices && !is_only_one)
        fail("%d processes on this machine, which has %d GPUs: each needs one", count, devices);
    device_check(cudaSetDevice(is_only_one ? 0 : index), "choose a GPU");
}

// Bytes that are free in the device's memory.
static inline size_t device_memory_free(void) {
    size_t available = 0, total = 0;
    device_check(cudaMemGetInfo(&available, &total), "ask for the free memory");
    return available;
}

// Zeroed memory of the device, for any stream.
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

// Memory of the host that the device copies from and to while the host goes on.
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

// A stream of one's own, which neither waits for the default stream nor has it wait: what is queued on it can be recorded.
static inline stream_t stream_make(void) {
    stream_t made;
    device_check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "make a stream");
    return made;
}

static inline void stream_free(stream_t done) { device_check(cudaStreamDestroy(done), "free a stream"); }

// Waits for all that is queued; what went wrong in a kernel shows here.
static inline void stream_synchronize(stream_t stream) {
    device_check(cudaStreamSynchronize(stream), "finish what was queued");
}

// A moment in the order of the stream's work, which nothing waits for until two are compared, and the seconds between them.
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
    // In a graph the event is to be recorded whenever the graph runs; elsewhere CUDA refuses the flag.
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
// Graphs: what is queued once as a whole

#define DEVICE_HAS_GRAPHS 1

// Zeroed, it has nothing recorded.
typedef struct {
    cudaGraphExec_t executable;
} Graph;

// Between the two, what the caller queues on the stream is recorded and not done; copies are of pinned memory, and the host waits
// for nothing. The stream may have work to do that was queued before. The kernels of the libraries must have run once, for at
// their first call they load code and take memory.
//
// The arguments of kernels are part of the recording, so what changes from step to step needs a recording each. One of the same
// work in the same order then replaces the arguments of the executable graph that is there, which is cheaper than to make one;
// a launch of it that still runs keeps the old ones.
static inline void graph_record_begin(stream_t stream) {
    device_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "record a graph");
}

static inline void graph_record_end(Graph* graph, stream_t stream) {
    cudaGraph_t recorded;
    device_check(cudaStreamEndCapture(stream, &recorded), "record a graph");
    cudaGraphExecUpdateResultInfo info;
    if (graph->executable && cudaGraphExecUpdate(graph->executable, recorded, &info) != cudaSuccess) {
        (void)cudaGetLastError(); // no failure: this is how one learns that other work was recorded
        stream_synchronize(stream);
        device_check(cudaGraphExecDestroy(graph->executable), "free a graph");
        graph->executable = NULL;
    }
    if (!graph->executable)
        device_check(cudaGraphInstantiate(&graph->executable, recorded, 0), "make a graph executable");
    device_check(cudaGraphDestroy(recorded), "free a graph");
}

// Queues what was recorded.
static inline void graph_launch(const Graph* graph, stream_t stream) {
    device_check(cudaGraphLaunch(graph->executable, stream), "launch a graph");
}

static inline void graph_free(Graph* graph) {
    if (graph->executable) device_check(cudaGraphExecDestroy(graph->executable), "free a graph");
    graph->executable = NULL;
}

// Names what is queued between the two, for a profiler that looks on.
#if defined(DEVICE_SIMT)
static inline void range_begin(const char* name) { (void)name; }
static inline void range_end(void) {}
#else
static inline void range_begin(const char* name) { nvtxRangePushA(name); }
static inline void range_end(void) { nvtxRangePop(); }
#endif

#endif
