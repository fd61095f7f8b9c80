/*
Tests dev/simt, the emulator of CUDA's execution model: its errors and their messages, the orders of threads,
the moments of cp.async, the contents of unwritten memory, and the host's functions. test_layout.cu tests the
properties that it shares with a GPU, and test_broken.cu the bugs that it must find in kernels.
*/
#define PRECISION_FP32 // of floatX, which nothing here depends on
#include "kernels/ptx.cuh"
#include "kernels/vector.cuh"
#include "test/capture.h"
#include "test/device_array.h"

// last, as it has a macro `fail` of its own
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
extern "C" {
#include <cmocka.h>
}

// ----------------------------------------------------------------------------
// Errors: one message each, with block, thread, place and counts

static void assert_message(const char* expected) {
    (void)cudaGetLastError();
    const char* message = cudaGetErrorString(cudaErrorLaunchFailure);
    if (!strstr(message, expected)) fail_msg("\"%s\" is not in the message: %s", expected, message);
}

// Fails the launch, and asserts that the message has this part. A later launch has to work as if nothing had been.
template <class... P, class... A>
static void assert_launch_fails(const char* expected, void (*kernel)(P...), int threads, A... arguments) {
    assert_int_equal(try_launch(kernel, 2, (unsigned)threads, 4096, nullptr, arguments...),
                     cudaErrorLaunchFailure);
    assert_message(expected);
}

__global__ void write_indices(int* out) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    __shared__ int values[128];
    values[threadIdx.x] = i;
    __syncthreads();
    out[i] = values[(threadIdx.x + 1) % blockDim.x];
}

static void assert_launches_work() {
    DeviceArray<int> out(256);
    launch(write_indices, 2, 128, 0, nullptr, out.device);
    out.to_host();
    for (int i = 0; i < 256; i++) assert_int_equal(out.host[i], i / 128 * 128 + (i + 1) % 128);
}

__global__ void two_barriers(int* lines) {
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) lines[0] = __LINE__ + 1;
        __syncthreads();
    } else {
        if (threadIdx.x == 32) lines[1] = __LINE__ + 1;
        __syncthreads();
    }
}

static void divergent_barriers(void** state) {
    (void)state;
    DeviceArray<int> lines(2);
    assert_launch_fails("block (0,0,0): divergent barriers: ", two_barriers, 96, lines.device);
    lines.to_host();
    const char* message = simt::error_message;
    char first[200], second[200];
    snprintf(first, sizeof(first), "32 at __syncthreads (%s:%d) (thread 0 and others)", __FILE__,
             lines.host[0]);
    snprintf(second, sizeof(second), "64 at __syncthreads (%s:%d) (thread 32 and others)", __FILE__,
             lines.host[1]);
    if (!strstr(message, first) || !strstr(message, second))
        fail_msg("%s, %s: not in %s", first, second, message);
    assert_launches_work();
}

__global__ void some_leave(int stay) {
    if ((int)threadIdx.x >= stay) return;
    __syncthreads();
}

static void early_exit(void** state) {
    (void)state;
    assert_launch_fails(", 27 returned (thread 37 and others)", some_leave, 64, 37);
    assert_true(strstr(simt::error_message, "its threads wait for ever: 37 at __syncthreads (") != NULL);
    assert_launches_work();
    launch(some_leave, 2, 64, 0, nullptr, 64);
}

__global__ void lanes_leave(unsigned mask, int stay) {
    if ((int)threadIdx.x % 32 >= stay) return;
    __syncwarp(mask);
}

static void masks(void** state) {
    (void)state;
    // Reverse order: the lanes that leave have left before the others come.
    const simt::Options kept = simt::options;
    simt::options.order = simt::ORDER_REVERSE;
    assert_launch_fails("thread (63,0,0)", lanes_leave, 64, 0x7fffffffu, 32);
    assert_message("mask 7fffffff does not name the calling lane 31");
    assert_launch_fails("mask ffffffff names 2 lanes that have returned or do not exist (the first is 30)",
                        lanes_leave, 64, 0xffffffffu, 30);
    assert_launch_fails("mask ffffffff names 16 lanes that have returned or do not exist (the first is 16)",
                        lanes_leave, 16, 0xffffffffu, 32);
    // Forward order: the others wait already when the last two leave.
    simt::options.order = simt::ORDER_FORWARD;
    assert_launch_fails("its threads wait for ever: 30 at __syncwarp (", lanes_leave, 32, 0xffffffffu, 30);
    assert_message(", 2 returned (thread 30 and others)");
    launch(lanes_leave, 2, 32, 0, nullptr, 0x3fffffffu, 30);
    simt::options = kept;
    assert_launches_work();
}

__global__ void different_operations(int* out) {
    if (threadIdx.x % 32 < 8) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
    else out[threadIdx.x] = __ballot_sync(0xffffffffu, 1) != 0;
}

__global__ void shuffle_from(int* out, unsigned mask, int lane, int width) {
    if (mask >> threadIdx.x % 32 & 1) out[threadIdx.x] = __shfl_sync(mask, 1, lane, width);
}

static void warp_operations(void** state) {
    (void)state;
    DeviceArray<int> out(32);
    const simt::Options kept = simt::options;
    simt::options.order = simt::ORDER_FORWARD;
    assert_launch_fails("thread (8,0,0): __ballot_sync (", different_operations, 32, out.device);
    assert_message("8 lanes of mask ffffffff are at __shfl_sync (");
    assert_launch_fails("reads lane 20, which mask 0000ffff does not name", shuffle_from, 32, out.device,
                        0xffffu, 20, 32);
    assert_launch_fails("width 12 is no power of two", shuffle_from, 32, out.device, 0xffffu, 0, 12);
    simt::options = kept;
}

__global__ void copy_from(const char* from, int offset, int shared_offset) {
    SHARED_MEMORY(char, bytes);
    cp_async16(bytes + shared_offset, from + offset, true);
    cp_async_commit();
    cp_async_wait<0>();
}

__global__ void copy_words_from(const char* from, int offset, int pairs) {
    SHARED_MEMORY(char, bytes);
    if (pairs) cp_async8(bytes, from + offset, true);
    else cp_async4(bytes, from + offset, true);
    cp_async_commit();
}

__global__ void copy_to(const char* from, char* to) { cp_async16(to, from, true); }

__global__ void load_from(const char* global, int offset) {
    SHARED_MEMORY(char, bytes);
    unsigned r[4];
    ldmatrix_x4(r, global ? global : bytes + offset);
}

__global__ void copy_for_ever(const char* from) {
    SHARED_MEMORY(char, bytes);
    for (int i = 0; i < 1000; i++) {
        cp_async16(bytes, from, true);
        cp_async_commit();
    }
}

static void addresses(void** state) {
    (void)state;
    DeviceArray<char> from(64), to(64);
    launch(copy_from, 1, 1, 64, nullptr, from.device, 48, 48);
    assert_launch_fails("must be multiples of 16", copy_from, 1, from.device, 8, 0);
    assert_launch_fails("must be multiples of 16", copy_from, 1, from.device, 0, 4);
    assert_launch_fails("is not device memory", copy_from, 1, from.device, 64, 0);
    for (int pairs = 0; pairs < 2; pairs++) {
        const int bytes = pairs ? 8 : 4;
        launch(copy_words_from, 1, 1, 64, nullptr, from.device, 64 - bytes, pairs);
        assert_launch_fails(pairs ? "must be multiples of 8" : "must be multiples of 4", copy_words_from, 1,
                            from.device, bytes / 2, pairs);
        assert_launch_fails("is not device memory", copy_words_from, 1, from.device, 64, pairs);
    }
    assert_launch_fails("is not shared memory", copy_to, 1, from.device, to.device);
    assert_launch_fails("row address", load_from, 32, (char*)nullptr, 8);
    assert_launch_fails("is not shared memory", load_from, 32, from.device, 0);
    assert_launch_fails("copies that nobody has waited for", copy_for_ever, 1, from.device);
    assert_launches_work();
}

#if !defined(SIMT_ADDRESS) && !defined(SIMT_THREAD)
__device__ static int descend(volatile int* depth, int levels) {
    volatile char room[1000];
    room[0] = (char)levels;
    if (levels == 0) return *depth;
    return descend(depth, levels - 1) + room[0];
}

__global__ void recurse(int* out, int levels) { out[0] = descend(out, levels); }
__global__ void read_address(int* out, size_t address) { out[0] = *(volatile int*)address; }

static void faults(void** state) {
    (void)state;
    DeviceArray<int> out(1);
    launch(recurse, 1, 1, 0, nullptr, out.device, 20);
    assert_launch_fails("block (0,0,0), thread (0,0,0): stack overflow", recurse, 1, out.device, 1000);
    assert_launch_fails("invalid memory access (address 0x10)", read_address, 1, out.device, (size_t)16);
    assert_launches_work();
}
#endif

static void refused_launches(void** state) {
    (void)state;
    int on_the_host = 0;
    DeviceArray<int> out(256);
    assert_int_equal(try_launch(write_indices, 2, 128, 0, nullptr, &on_the_host), cudaErrorInvalidValue);
    assert_message("not device memory");
    assert_int_equal(try_launch(write_indices, 2, 1025, 0, nullptr, out.device),
                     cudaErrorInvalidConfiguration);
    assert_message("a block of (1025,1,1) threads");
    assert_int_equal(try_launch(write_indices, 0, 128, 0, nullptr, out.device),
                     cudaErrorInvalidConfiguration);
    assert_message("a grid of (0,1,1) blocks");
    assert_int_equal(try_launch(write_indices, dim3(1, 65536), 128, 0, nullptr, out.device),
                     cudaErrorInvalidConfiguration);
    assert_int_equal(try_launch(write_indices, 1, 128, 227 * 1024 + 1, nullptr, out.device),
                     cudaErrorInvalidConfiguration);
    assert_message("232449 bytes of shared memory");
    assert_int_equal(cudaPeekAtLastError(), cudaSuccess); // assert_message() took it
    launch(write_indices, 2, 128, 227 * 1024, nullptr, out.device);
}

static int line_of_launch = __LINE__ + 1;
static void launch_that_fails(void*) { launch(some_leave, 1, 64, 0, nullptr, 1); }

static void launch_ends_the_program(void** state) {
    (void)state;
    const struct Captured captured = capture(launch_that_fails, NULL);
    if (captured.exit_code != 1) print_error("%s", captured.text);
    assert_int_equal(captured.exit_code, 1);
    char expected[200];
    snprintf(expected, sizeof(expected),
             "the kernel launched at %s:%d failed: block (0,0,0): its threads wait", __FILE__,
             line_of_launch);
    if (!strstr(captured.text, expected)) fail_msg("%s: not in: %s", expected, captured.text);
}

// ----------------------------------------------------------------------------
// Orders

__global__ void note_turns(int* turns, int* count) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    turns[i] = atomicAdd(count, 1);
}

static std::vector<int> turns_of(simt::Order order, uint64_t seed) {
    const simt::Options kept = simt::options;
    simt::options.order = order;
    simt::options.seed = seed;
    DeviceArray<int> turns(3 * 64), count(1);
    count.to_device();
    launch(note_turns, 3, 64, 0, nullptr, turns.device, count.device);
    simt::options = kept;
    turns.to_host();
    return turns.host;
}

static void orders(void** state) {
    (void)state;
    const std::vector<int> forward = turns_of(simt::ORDER_FORWARD, 1),
                           reverse = turns_of(simt::ORDER_REVERSE, 1);
    const std::vector<int> random = turns_of(simt::ORDER_RANDOM, 1);
    std::vector<bool> seen(3 * 64);
    for (int i = 0; i < 3 * 64; i++) {
        assert_int_equal(forward[i], i);
        assert_int_equal(reverse[i], 3 * 64 - 1 - i);
        assert_true(random[i] >= 0 && random[i] < 3 * 64 && !seen[random[i]]);
        seen[random[i]] = true;
    }
    assert_true(random != forward && random != reverse);
    assert_true(random == turns_of(simt::ORDER_RANDOM, 1));
    assert_true(random != turns_of(simt::ORDER_RANDOM, 2));
    // Every thread of a block comes first with one seed or another.
    std::vector<bool> first(64);
    int missing = 64;
    for (uint64_t seed = 1; seed < 2000 && missing; seed++) {
        const std::vector<int> turns = turns_of(simt::ORDER_RANDOM, seed);
        for (int i = 0; i < 64; i++)
            if (turns[i] % 64 == 0 && !first[i]) first[i] = true, missing--;
    }
    assert_int_equal(missing, 0);
}

// ----------------------------------------------------------------------------
// Memory that nobody has written

__global__ void read_unwritten(unsigned* out, const unsigned* global) {
    SHARED_MEMORY(unsigned, dynamic);
    __shared__ unsigned array[32];
    const int i = (int)threadIdx.x;
    unsigned* here = out + 96 * blockIdx.x;
    here[i] = dynamic[i];
    here[32 + i] = array[i];
    here[64 + i] = global[i];
    dynamic[i] = array[i] = 5; // the next block has to find it unwritten again
}

static void unwritten_memory(void** state) {
    (void)state;
    DeviceArray<unsigned> out(2 * 96), global(32);
    launch(read_unwritten, 2, 32, 32 * sizeof(unsigned), nullptr, out.device, global.device);
    out.to_host();
    for (int i = 0; i < 2 * 96; i++) {
#ifdef SIMT_ADDRESS
        if (i % 96 / 32 == 1) continue; // static arrays are not refilled in this build
#endif
        assert_int_equal(out.host[i], 0xffffffffu);
    }
}

// ----------------------------------------------------------------------------
// cp.async

__global__ void look_at_copy(unsigned* seen, const unsigned* from, int words) {
    SHARED_MEMORY(unsigned, to);
    const int last = words - 1;
    for (int i = 0; i < 5; i++) to[i] = 1;
    if (words == 1) cp_async4(to, from, true);
    else if (words == 2) cp_async8(to, from, true);
    else cp_async16(to, from, true);
    seen[0] = to[last];
    cp_async_wait<0>(); // not committed: in no group that a wait could wait for
    seen[1] = to[last];
    cp_async_commit();
    cp_async_wait<1>();
    seen[2] = to[last];
    cp_async_wait<0>();
    seen[3] = to[last];
    seen[4] = to[words];
}

static void moments_of_copies(void** state) {
    (void)state;
    const simt::Options kept = simt::options;
    DeviceArray<unsigned> seen(5), from(5);
    for (int i = 0; i < 5; i++) from.host[i] = 7;
    from.to_device();
    int early = 0;
    for (int round = 0; round < 40; round++) {
        simt::options.async = round == 0   ? simt::ASYNC_LAZY
                              : round == 1 ? simt::ASYNC_EAGER
                                           : simt::ASYNC_MIXED;
        simt::options.seed = (uint64_t)round;
        launch(look_at_copy, 1, 1, 5 * sizeof(unsigned), nullptr, seen.device, from.device,
               round == 0 ? 4 : 1 << round % 3);
        seen.to_host();
        if (round == 0) assert_int_equal(seen.host[0], 0xffffffffu);
        if (round == 1) assert_int_equal(seen.host[0], 7);
        for (int i = 1; i < 3; i++) assert_int_equal(seen.host[i], seen.host[0]);
        assert_int_equal(seen.host[3], 7);
        assert_int_equal(seen.host[4], 1); // what is beside it
        early += round > 1 && seen.host[0] == 7;
    }
    assert_true(early > 5 && early < 33);
    simt::options = kept;
}

// ----------------------------------------------------------------------------
// The host's functions

static void copies_of_the_host(void** state) {
    (void)state;
    DeviceArray<int> a(8), b(8);
    int first[8] = {1, 2, 3, 4, 5, 6, 7, 8}, second[8];
    assert_int_equal(cudaMemcpy(a.device, first, sizeof(first), cudaMemcpyDefault), cudaSuccess);
    assert_int_equal(cudaMemcpyAsync(b.device, a.device, sizeof(first), cudaMemcpyDefault, nullptr),
                     cudaSuccess);
    assert_int_equal(cudaMemcpy(second, b.device, sizeof(first), cudaMemcpyDefault), cudaSuccess);
    assert_memory_equal(first, second, sizeof(first));
    assert_int_equal(cudaMemset(a.device, 0, sizeof(first)), cudaSuccess);
    assert_int_equal(cudaMemcpy(b.device, a.device, 4 * sizeof(int), cudaMemcpyDeviceToDevice), cudaSuccess);
    assert_int_equal(cudaMemcpy(second, b.device, sizeof(first), cudaMemcpyDeviceToHost), cudaSuccess);
    for (int i = 0; i < 8; i++) assert_int_equal(second[i], i < 4 ? 0 : first[i]);

    assert_int_equal(cudaMemcpy(a.device, first, sizeof(first), cudaMemcpyDeviceToHost),
                     cudaErrorInvalidValue);
    assert_message("device to host: these addresses are host to device");
    assert_int_equal(cudaMemcpy(second, first, sizeof(first), cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(a.device + 4, first, sizeof(first), cudaMemcpyHostToDevice),
                     cudaErrorInvalidValue);
    assert_int_equal(cudaMemset(a.device, 0, sizeof(first) + 1), cudaErrorInvalidValue);
    assert_int_equal(cudaMemset(first, 0, sizeof(first)), cudaErrorInvalidValue);
    void* volatile not_ours = first; // so that the compiler does not warn of what is tested here
    assert_int_equal(cudaFree(not_ours), cudaErrorInvalidValue);
    assert_int_equal(cudaFree(a.device + 1), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
}

// ----------------------------------------------------------------------------
// Recording. What graphs do where all is well, test_kernels.cu tests of the emulator and of a GPU; here is what is refused.

typedef struct {
    cudaStream_t stream, other, blocking;
    cudaEvent_t event;  // recorded before the recording
    int *device, *more; // (8)
    int* pinned;        // (8)
} Recorded;

__global__ void store_number(int* to, int number) { *to = number; }

static void wait_for_stream(Recorded* r) { (void)cudaStreamSynchronize(r->stream); }
static void wait_for_device(Recorded*) { (void)cudaDeviceSynchronize(); }
static void take_memory(Recorded*) {
    int* memory = (int*)&memory;
    assert_int_equal(cudaMalloc(&memory, 4), cudaErrorStreamCaptureUnsupported);
    assert_null(memory);
}
static void free_memory(Recorded* r) { (void)cudaFree(r->more); }
static void take_pinned_memory(Recorded*) {
    int* memory = (int*)&memory;
    assert_int_equal(cudaMallocHost(&memory, 4), cudaErrorStreamCaptureUnsupported);
    assert_null(memory);
}
static void free_pinned_memory(Recorded* r) { (void)cudaFreeHost(r->pinned); }
static void copy_and_wait(Recorded* r) { (void)cudaMemcpy(r->device, r->more, 4, cudaMemcpyDeviceToDevice); }
static void set_and_wait(Recorded* r) { (void)cudaMemset(r->device, 0, 4); }
static void copy_from_pageable(Recorded* r) {
    static int pageable;
    (void)cudaMemcpyAsync(r->device, &pageable, 4, cudaMemcpyHostToDevice, r->stream);
}
static void copy_beyond_pinned(Recorded* r) {
    (void)cudaMemcpyAsync(r->device, r->pinned + 1, 8 * sizeof(int), cudaMemcpyHostToDevice, r->stream);
}
static void wait_for_earlier_event(Recorded* r) { (void)cudaStreamWaitEvent(r->stream, r->event); }
static void launch_a_graph(Recorded* r) {
    simt_graph_exec nothing;
    (void)cudaGraphLaunch(&nothing, r->stream);
}
static void fork_stream(Recorded* r) {
    cudaEvent_t event;
    cudaEventCreate(&event);
    assert_int_equal(cudaEventRecord(event, r->stream), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(r->other, event), cudaSuccess);
    launch(store_number, 1, 1, 0, r->other, r->device + 1, 7);
    cudaEventDestroy(event);
}
static void join_stream(Recorded* r) {
    cudaEvent_t event;
    cudaEventCreate(&event);
    assert_int_equal(cudaEventRecord(event, r->other), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(r->stream, event), cudaSuccess);
    cudaEventDestroy(event);
}
static void fork_without_end(Recorded* r) { fork_stream(r); }
static void fork_and_go_on(Recorded* r) {
    fork_stream(r);
    join_stream(r);
    launch(store_number, 1, 1, 0, r->other, r->device + 1, 7);
}

static const struct {
    void (*use)(Recorded*);
    const char* says;
} broken_recordings[] = {
    {wait_for_stream, "cudaStreamSynchronize while a stream is recorded for a graph"},
    {wait_for_device, "cudaDeviceSynchronize while"},
    {take_memory, "cudaMalloc while"},
    {free_memory, "cudaFree while"},
    {take_pinned_memory, "cudaMallocHost while"},
    {free_pinned_memory, "cudaFreeHost while"},
    {copy_and_wait, "cudaMemcpy while"},
    {set_and_wait, "cudaMemset while"},
    {copy_from_pageable, "cudaMemcpyAsync while a stream is recorded for a graph: the host's side"},
    {copy_beyond_pinned, "the host's side of the copy is not pinned"},
    {wait_for_earlier_event, "the event is not of the recording"},
    {launch_a_graph, "cudaGraphLaunch while"},
    {fork_without_end,
     "cudaStreamEndCapture while a stream is recorded for a graph: nobody waits for all of"},
    {fork_and_go_on, "nobody waits for all of a stream that joined it"},
};

// Records store_number() around `use`; the graph, or null where the recording was lost.
static cudaGraph_t record(Recorded* r, cudaStreamCaptureMode mode, void (*use)(Recorded*)) {
    assert_int_equal(cudaStreamBeginCapture(r->stream, mode), cudaSuccess);
    launch(store_number, 1, 1, 0, r->stream, r->device, 5);
    use(r);
    (void)try_launch(store_number, 1, 1, 0, r->stream, r->device + 2, 6);
    cudaGraph_t graph;
    const cudaError_t error = cudaStreamEndCapture(r->stream, &graph);
    assert_int_equal(error == cudaSuccess, graph != nullptr);
    return graph;
}

static void nothing(Recorded*) {}
static void fork_and_join(Recorded* r) {
    fork_stream(r);
    join_stream(r);
}

static Recorded new_recorded() {
    Recorded r;
    cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&r.other, cudaStreamNonBlocking);
    cudaStreamCreate(&r.blocking);
    cudaEventCreate(&r.event);
    cudaEventRecord(r.event, r.stream);
    cudaMalloc(&r.device, 8 * sizeof(int));
    cudaMalloc(&r.more, 8 * sizeof(int));
    cudaMallocHost(&r.pinned, 8 * sizeof(int));
    return r;
}

static void free_recorded(Recorded* r) {
    cudaStreamDestroy(r->stream);
    cudaStreamDestroy(r->other);
    cudaStreamDestroy(r->blocking);
    cudaEventDestroy(r->event);
    assert_int_equal(cudaFree(r->device), cudaSuccess);
    assert_int_equal(cudaFree(r->more), cudaSuccess);
    assert_int_equal(cudaFreeHost(r->pinned), cudaSuccess);
}

// The graph does what was recorded, and only when it is launched.
static void must_store(Recorded* r, cudaGraph_t graph, const int* want) {
    cudaGraphExec_t executable;
    int after[3];
    assert_non_null(graph);
    assert_int_equal(cudaGraphInstantiate(&executable, graph), cudaSuccess);
    assert_int_equal(cudaMemset(r->device, 0, sizeof(after)), cudaSuccess);
    assert_int_equal(cudaGraphLaunch(executable, r->stream), cudaSuccess);
    assert_int_equal(cudaMemcpy(after, r->device, sizeof(after), cudaMemcpyDeviceToHost), cudaSuccess);
    assert_memory_equal(after, want, sizeof(after));
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
}

static void broken_uses_of_recordings(void** state) {
    (void)state;
    Recorded r = new_recorded();
    const int plain[3] = {5, 0, 6}, forked[3] = {5, 7, 6};
    for (size_t i = 0; i < sizeof(broken_recordings) / sizeof(broken_recordings[0]); i++) {
        assert_null(record(&r, cudaStreamCaptureModeThreadLocal, broken_recordings[i].use));
        assert_message(broken_recordings[i].says);
        must_store(&r, record(&r, cudaStreamCaptureModeThreadLocal, nothing), plain);
    }
    must_store(&r, record(&r, cudaStreamCaptureModeThreadLocal, fork_and_join), forked);
    // A relaxed recording lets the host take memory.
    must_store(&r,
               record(&r, cudaStreamCaptureModeRelaxed,
                      [](Recorded* of) {
                          int* memory = nullptr;
                          assert_int_equal(cudaMalloc(&memory, 4), cudaSuccess);
                          assert_int_equal(cudaFree(memory), cudaSuccess);
                          assert_int_equal(cudaStreamSynchronize(of->other), cudaSuccess);
                      }),
               plain);
    free_recorded(&r);
}

static void moments_of_recordings(void** state) {
    (void)state;
    Recorded r = new_recorded();
    cudaGraph_t graph;
    cudaStreamCaptureStatus status;
    float milliseconds;
    assert_int_equal(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
                     cudaErrorStreamCaptureUnsupported);
    assert_int_equal(cudaStreamEndCapture(r.stream, &graph), cudaErrorStreamCaptureUnmatched);
    assert_int_equal(cudaEventRecordWithFlags(r.event, r.stream, cudaEventRecordExternal),
                     cudaErrorInvalidValue);

    assert_int_equal(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    assert_int_equal(cudaStreamBeginCapture(r.other, cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
    cudaStreamIsCapturing(r.stream, &status);
    assert_int_equal(status, cudaStreamCaptureStatusActive);
    cudaStreamIsCapturing(r.other, &status);
    assert_int_equal(status, cudaStreamCaptureStatusNone);
    // Other streams go on, and so does the default stream, for which this one does not wait.
    launch(store_number, 1, 1, 0, nullptr, r.device, 8);
    launch(store_number, 1, 1, 0, r.other, r.device + 1, 9);
    assert_int_equal(cudaEventRecord(r.event, r.stream), cudaSuccess);
    assert_int_equal(cudaEventSynchronize(r.event), cudaErrorCapturedEvent);
    assert_int_equal(cudaEventElapsedTime(&milliseconds, r.event, r.event), cudaErrorCapturedEvent);
    assert_message("the event is a place in a recording and has no time");
    assert_int_equal(cudaStreamEndCapture(r.other, &graph), cudaErrorStreamCaptureUnmatched);
    assert_int_equal(cudaStreamEndCapture(r.stream, &graph), cudaSuccess);
    assert_int_equal(cudaEventRecord(r.event, r.stream), cudaSuccess);
    assert_int_equal(cudaEventSynchronize(r.event), cudaSuccess);
    cudaGraphDestroy(graph);
    int stored[2];
    assert_int_equal(cudaMemcpy(stored, r.device, sizeof(stored), cudaMemcpyDeviceToHost), cudaSuccess);
    assert_true(stored[0] == 8 && stored[1] == 9);

    // A stream that waits for the default stream, and it for that one, cannot be recorded beside it.
    assert_int_equal(cudaStreamBeginCapture(r.blocking, cudaStreamCaptureModeGlobal), cudaSuccess);
    assert_int_equal(try_launch(store_number, 1, 1, 0, nullptr, r.device, 8), cudaErrorStreamCaptureImplicit);
    assert_message("work on the default stream while a stream is recorded for a graph");
    cudaStreamIsCapturing(r.blocking, &status);
    assert_int_equal(status, cudaStreamCaptureStatusInvalidated);
    assert_int_equal(cudaStreamEndCapture(r.blocking, &graph), cudaErrorStreamCaptureInvalidated);

    // Only the same work can be updated.
    cudaGraph_t longer = record(&r, cudaStreamCaptureModeGlobal, fork_and_join);
    graph = record(&r, cudaStreamCaptureModeGlobal, nothing);
    cudaGraphExec_t executable;
    cudaGraphExecUpdateResultInfo info;
    assert_int_equal(cudaGraphInstantiate(&executable, graph), cudaSuccess);
    assert_int_equal(cudaGraphExecUpdate(executable, longer, &info), cudaErrorGraphExecUpdateFailure);
    assert_int_equal(info.result, cudaGraphExecUpdateErrorTopologyChanged);
    longer->nodes.pop_back();
    longer->nodes[1].kind = simt::NODE_SET;
    assert_int_equal(cudaGraphExecUpdate(executable, longer, &info), cudaErrorGraphExecUpdateFailure);
    assert_int_equal(info.result, cudaGraphExecUpdateErrorNodeTypeChanged);
    assert_int_equal(cudaGraphExecUpdate(executable, graph, &info), cudaSuccess);
    // What has been freed since it was recorded is found when the graph runs.
    assert_int_equal(cudaFree(r.device), cudaSuccess);
    assert_int_equal(cudaGraphLaunch(executable, r.stream), cudaErrorInvalidValue);
    assert_message("a pointer argument of the kernel is not device memory");
    assert_int_equal(cudaMalloc(&r.device, 4), cudaSuccess);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaGraphDestroy(longer);
    free_recorded(&r);
}

static void many_allocations(void** state) {
    (void)state;
    enum { N = 300 };
    int* pointers[N];
    for (int i = 0; i < N; i++)
        assert_int_equal(cudaMalloc((void**)&pointers[i], (size_t)(i + 1) * 4), cudaSuccess);
    for (int i = 0; i < N; i++) {
        const int k = i * 7 % N; // 7 and 300 have no common divisor: each once
        int value = 0;
        assert_int_equal(cudaMemcpy(pointers[k] + k, &i, 4, cudaMemcpyHostToDevice), cudaSuccess);
        assert_int_equal(cudaMemcpy(pointers[k] + k + 1, &i, 4, cudaMemcpyHostToDevice),
                         cudaErrorInvalidValue);
        assert_int_equal(cudaMemcpy(&value, pointers[k] + k, 4, cudaMemcpyDeviceToHost), cudaSuccess);
        assert_int_equal(value, i);
        assert_int_equal(cudaFree(pointers[k]), cudaSuccess);
        assert_int_equal(cudaFree(pointers[k]), cudaErrorInvalidValue);
    }
    void* nothing = &pointers;
    assert_int_equal(cudaMalloc(&nothing, 0), cudaSuccess);
    assert_null(nothing);
    assert_int_equal(cudaMalloc(&nothing, (size_t)1 << 60), cudaErrorMemoryAllocation);
    assert_int_equal(cudaFree(nullptr), cudaSuccess);
    cudaGetLastError();
}

static void options_of_the_environment(void** state) {
    (void)state;
    setenv("SIMT_TEST", "reverse", 1);
    assert_int_equal(simt::option_from_environment("SIMT_TEST", "forward|reverse|random"), 1);
    setenv("SIMT_TEST", "random", 1);
    assert_int_equal(simt::option_from_environment("SIMT_TEST", "forward|reverse|random"), 2);
    unsetenv("SIMT_TEST");
    assert_int_equal(simt::option_from_environment("SIMT_TEST", "forward|reverse|random"), 0);
    setenv("SIMT_TEST", "rev", 1);
    const struct Captured captured =
        capture([](void*) { simt::option_from_environment("SIMT_TEST", "forward|reverse"); }, NULL);
    unsetenv("SIMT_TEST");
    assert_int_equal(captured.exit_code, 2);
    assert_string_equal(captured.text, "SIMT_TEST=rev: must be one of forward|reverse\n");
}

// ----------------------------------------------------------------------------
// What kernels have done, and what they are called

enum { COUNTED_BLOCKS = 3, COUNTED_THREADS = 64, COUNTED_COPIES = 48 };

// Two products and one load of matrices for a warp; copies, some of them of nothing; an atomic in every thread.
__global__ void counted_work(const char* from, int* sum) {
    SHARED_MEMORY(char, bytes);
    cp_async16(bytes + threadIdx.x * 16, from + threadIdx.x * 16, threadIdx.x < COUNTED_COPIES);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    unsigned a[4];
    float d[4] = {0, 0, 0, 0};
    ldmatrix_x4(a, bytes + threadIdx.x * 16);
    mma_m16n8k16_bf16(d, a, a[0], a[1]);
    mma_m16n8k16_bf16(d, a, a[2], a[3]);
    atomicAdd(sum, 1);
    Values<4> values = load<4>((const float*)from);
    values.at[0] = d[0];
    if (threadIdx.x == 0) store((float*)sum + 4 + 4 * blockIdx.x, values);
}

static void counters(void** state) {
    (void)state;
    DeviceArray<char> from(COUNTED_THREADS * 16);
    DeviceArray<int> sum(4 + 4 * COUNTED_BLOCKS);
    from.to_device(), sum.to_device();
    const simt::Counters before = simt::counters;
    launch(counted_work, COUNTED_BLOCKS, COUNTED_THREADS, COUNTED_THREADS * 16, nullptr, from.device,
           sum.device);
    const int warps = COUNTED_BLOCKS * COUNTED_THREADS / 32;
    assert_int_equal(simt::counters.launches - before.launches, 1);
    assert_int_equal(simt::counters.products - before.products, 2 * warps);
    assert_int_equal(simt::counters.matrices - before.matrices, warps);
    assert_int_equal(simt::counters.copied - before.copied, COUNTED_BLOCKS * COUNTED_COPIES * 16);
    assert_int_equal(simt::counters.atomics - before.atomics, COUNTED_BLOCKS * COUNTED_THREADS);
    assert_int_equal(simt::counters.loaded - before.loaded, COUNTED_BLOCKS * COUNTED_THREADS * 16);
    assert_int_equal(simt::counters.stored - before.stored, COUNTED_BLOCKS * 16);
}

struct NamesOfLaunches {
    LaunchObserver observer;
    const char* before;
    const char* after;
};

static void observed_launches(void** state) {
    (void)state;
    NamesOfLaunches names = {{[](LaunchObserver* self, const void* kernel, cudaStream_t) {
                                  cudaFuncGetName(&((NamesOfLaunches*)self)->before, kernel);
                              },
                              [](LaunchObserver* self, const void* kernel, cudaStream_t) {
                                  cudaFuncGetName(&((NamesOfLaunches*)self)->after, kernel);
                              }},
                             nullptr,
                             nullptr};
    DeviceArray<int> out(256);
    launch_observer = &names.observer;
    launch(write_indices, 2, 128, 0, nullptr, out.device);
    launch_observer = nullptr;
    assert_string_equal(names.before, "_Z13write_indicesPi");
    assert_string_equal(names.after, names.before);
    names.before = nullptr;
    launch(write_indices, 2, 128, 0, nullptr, out.device);
    assert_null(names.before);
    assert_string_equal(simt::function_name(&out), "?");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(divergent_barriers),
        cmocka_unit_test(early_exit),
        cmocka_unit_test(masks),
        cmocka_unit_test(warp_operations),
        cmocka_unit_test(addresses),
#if !defined(SIMT_ADDRESS) && !defined(SIMT_THREAD)
        cmocka_unit_test(faults),
#endif
        cmocka_unit_test(refused_launches),
        cmocka_unit_test(launch_ends_the_program),
        cmocka_unit_test(orders),
        cmocka_unit_test(unwritten_memory),
        cmocka_unit_test(moments_of_copies),
        cmocka_unit_test(copies_of_the_host),
        cmocka_unit_test(broken_uses_of_recordings),
        cmocka_unit_test(moments_of_recordings),
        cmocka_unit_test(many_allocations),
        cmocka_unit_test(options_of_the_environment),
        cmocka_unit_test(counters),
        cmocka_unit_test(observed_launches),
    };
    program_name = "test_simt";
    simt::options = {simt::ORDER_FORWARD, simt::ASYNC_LAZY, 1}; // whatever the environment says
    return cmocka_run_group_tests(tests, NULL, NULL);
}
