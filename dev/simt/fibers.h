/*
One fiber per CUDA thread, and the barriers of a block.

A launch runs its blocks one after the other. The threads of a block run one at a time. A thread runs until it
waits in a barrier or a warp operation (warp.h), or returns; then the next ready thread runs, in the order of
SIMT_ORDER. If no thread is ready and some threads still wait, the block is stuck, and the error says how many
threads wait at which place.

An error inside a kernel (kernel_error) ends the launch: the emulator abandons the other fibers of the block,
and cudaGetErrorString() returns the message.

A switch of fibers saves the registers that a function call preserves; a core makes 30 to 40 million switches
a second, measured on a busy machine. Each stack has a guard page below it. In plain builds a fault in a
kernel becomes a kernel error too; sanitizer builds report faults themselves.
*/
#ifndef DEV_SIMT_FIBERS_H
#define DEV_SIMT_FIBERS_H

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include "dev/simt/memory.h"

#ifndef __x86_64__
#error "dev/simt switches fibers by x86-64 instructions; build DEVICE=cpu on this processor"
#endif

// Pushes the caller's registers on its stack, stores its stack pointer in *save, and continues on the stack
// `load`.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.weak simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch_stack, . - simt_switch_stack
)");

namespace simt {

// ----------------------------------------------------------------------------
// Options, from the environment; a test may also set them between launches

enum Order { ORDER_FORWARD, ORDER_REVERSE, ORDER_RANDOM };
enum Async { ASYNC_LAZY, ASYNC_EAGER, ASYNC_MIXED };

struct Options {
    Order order;   // which ready thread runs next, and in which order blocks run
    Async async;   // when cp.async copies: at the wait, at once, or at random for each copy
    uint64_t seed; // seed of the random order and of the random copies
};

// The index of the variable's value among these names, which are separated by |; 0 if it is not set.
inline int option_from_environment(const char* variable, const char* names) {
    const char* value = getenv(variable);
    if (!value || !*value) return 0;
    int index = 0;
    for (const char* name = names; name; name = strchr(name, '|'), index++) {
        if (*name == '|') name++;
        size_t length = strcspn(name, "|");
        if (strlen(value) == length && !strncmp(value, name, length)) return index;
    }
    fprintf(stderr, "%s=%s: must be one of %s\n", variable, value, names);
    exit(2);
}

inline Options options_from_environment() {
    Options options;
    options.order = (Order)option_from_environment("SIMT_ORDER", "forward|reverse|random");
    options.async = (Async)option_from_environment("SIMT_ASYNC", "lazy|eager|mixed");
    const char* seed = getenv("SIMT_SEED");
    const bool by_chance = options.order == ORDER_RANDOM || options.async == ASYNC_MIXED;
    options.seed = seed ? strtoull(seed, nullptr, 10) : by_chance ? (uint64_t)time(nullptr) : 1;
    if (by_chance) fprintf(stderr, "simt: random with SIMT_SEED=%llu\n", (unsigned long long)options.seed);
    return options;
}
inline Options options = options_from_environment();

inline uint64_t random_state = 1;
SIMT_INTERNAL inline unsigned random_bits() { // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (unsigned)(random_state * 0x2545F4914F6CDD1Dull >> 32);
}

// ----------------------------------------------------------------------------
// Threads, warps, the block

// A place in a kernel's source where a thread calls a collective operation. A function that declares SIMT_PLACE
// as its last parameters receives the file and line of its caller.
struct Place {
    const char* operation;
    const char* file;
    int line;
};
#define SIMT_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

SIMT_INTERNAL inline bool same_place(const Place& a, const Place& b) {
    return a.line == b.line && a.operation == b.operation && (a.file == b.file || !strcmp(a.file, b.file));
}

enum { MAX_THREADS = 1024, WARP = 32, MAX_WARPS = MAX_THREADS / WARP };
#if defined(SIMT_ADDRESS) || defined(SIMT_THREAD)
enum { STACK_BYTES = 256 * 1024 };
#else
enum { STACK_BYTES = 64 * 1024 };
#endif
enum { GUARD_BYTES = 4096 };

struct Fiber {
    void* stack_pointer;  // valid while the fiber does not run
    unsigned char* stack; // lowest address; the guard page is below
    size_t stack_bytes;
    void* fake_stack; // for the address sanitizer
    void* sanitized;  // the thread sanitizer's own fiber
};

enum State { READY, WAITING, RETURNED };

// A copy by cp.async that the thread has not waited for yet (copy.h).
struct PendingCopy {
    void* to;
    const void* from;
    unsigned group, bytes;
    bool valid, done;
};
enum { MAX_PENDING = 256 };

struct Thread {
    Fiber* fiber;
    uint3 index; // threadIdx
    int warp, lane;
    State state;
    Place place;                      // the place where it waits
    PendingCopy pending[MAX_PENDING]; // a ring
    unsigned first_pending, pending_end, open_group;
};

// Whether the thread has issued copies since its last commit.
inline bool has_open_copies(const Thread* thread) {
    return thread->first_pending != thread->pending_end &&
           thread->pending[(thread->pending_end - 1) % MAX_PENDING].group == thread->open_group;
}

// The value of one lane.
struct alignas(16) Payload {
    unsigned char bytes[48];
};

// A Meeting collects the values of all lanes of one mask in one collective operation. Two buffers alternate,
// because a fast lane may write its next value before a slow lane has read the old ones.
struct Meeting {
    unsigned mask, arrived, generation;
    Place place;
    Payload payload[2][WARP];
    char order[2];
};
enum { MAX_MEETINGS = 32 };

struct Warp {
    unsigned lanes, ready, returned; // bit masks
    int meeting_count;
    Meeting meetings[MAX_MEETINGS];
};

// The predicates at a barrier: whether any is true, whether all are, and how many.
struct Predicates {
    int any, all, count;
};

struct Block {
    int thread_count, warp_count, live;
    int warp;             // the warp of the thread that ran last
    unsigned ready_warps; // bit mask of the warps that have ready lanes

    int arrived; // threads at the barrier
    bool divergent;
    Place place;
    Predicates so_far, passed; // at this barrier, and at the last completed one
    unsigned generation;
    char barrier_order[2], start_order, end_order;

    void (*run)(void*); // the kernel with its arguments
    void* arguments;
};

// The thread sanitizer treats a reused fiber as the same thread, so it misses races between two blocks on the
// same fibers. Each block therefore picks one of two fiber sets at random.
#ifdef SIMT_THREAD
enum { FIBER_SETS = 2 };
#else
enum { FIBER_SETS = 1 };
#endif
inline Fiber fibers[FIBER_SETS][MAX_THREADS];

inline Thread threads[MAX_THREADS];
inline Warp warps[MAX_WARPS];
inline Block block;
inline Fiber host;               // the host thread, which launches
inline Thread* current;          // the thread that runs; null in the host
inline char error_message[1024]; // message of the last kernel that failed
inline bool failed;              // true after an error in this block

inline uint64_t switches; // for measurements

// ----------------------------------------------------------------------------
// Switching

// Continues with `next`, or with the host if `next` is null.
SIMT_INTERNAL inline void switch_to(Thread* next) {
    Thread* previous = current;
    if (next == previous) return;
    Fiber* from = previous ? previous->fiber : &host;
    Fiber* to = next ? next->fiber : &host;
    switches++;
    current = next;
    if (next) {
        threadIdx = next->index;
        block.warp = next->warp;
    }
#ifdef SIMT_ADDRESS
    bool ends = previous && previous->state == RETURNED;
    __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#endif
#ifdef SIMT_THREAD
    __tsan_switch_to_fiber(to->sanitized, __tsan_switch_to_fiber_no_sync);
#endif
    simt_switch_stack(&from->stack_pointer, to->stack_pointer);
#ifdef SIMT_ADDRESS
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// Chooses one bit of a mask that is not empty, by the order of threads.
SIMT_INTERNAL inline int choose(unsigned mask) {
    if (options.order == ORDER_FORWARD) return __builtin_ctz(mask);
    if (options.order == ORDER_REVERSE) return 31 - __builtin_clz(mask);
    for (unsigned skipped = random_bits() % (unsigned)__builtin_popcount(mask); skipped > 0; skipped--)
        mask &= mask - 1;
    return __builtin_ctz(mask);
}

// The next thread to run, or null if all threads wait or have returned. In a fixed order a warp runs as long
// as it can.
SIMT_INTERNAL inline Thread* next_ready() {
    if (!block.ready_warps) return nullptr;
    int warp = block.warp;
    if (options.order == ORDER_RANDOM || !(block.ready_warps >> warp & 1)) warp = choose(block.ready_warps);
    return &threads[warp * WARP + choose(warps[warp].ready)];
}

SIMT_INTERNAL inline void make_ready(int warp, unsigned lanes) {
    warps[warp].ready |= lanes;
    if (warps[warp].ready) block.ready_warps |= 1u << warp;
    for (unsigned left = lanes; left; left &= left - 1)
        threads[warp * WARP + __builtin_ctz(left)].state = READY;
}

SIMT_INTERNAL inline void leave_ready(Thread* thread, State state) {
    thread->state = state;
    Warp* warp = &warps[thread->warp];
    warp->ready &= ~(1u << thread->lane);
    if (!warp->ready) block.ready_warps &= ~(1u << thread->warp);
}

// The running thread waits at this place until make_ready().
SIMT_INTERNAL inline void wait_at(const Place& place) {
    current->place = place;
    leave_ready(current, WAITING);
    switch_to(next_ready());
}

// The last thread to arrive calls this. Now all arrived threads are ready, so it lets the scheduler choose the
// next one. In forward order the caller just continues.
SIMT_INTERNAL inline void draw_again() {
    if (options.order != ORDER_FORWARD) switch_to(next_ready());
}

// ----------------------------------------------------------------------------
// Errors

SIMT_INTERNAL inline void append_error(const char* format, ...) {
    size_t used = strlen(error_message);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_message + used, sizeof(error_message) - used, format, arguments);
    va_end(arguments);
}

SIMT_INTERNAL inline void begin_error() {
    error_message[0] = 0;
    append_error("block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
    failed = true;
}

// Called inside a kernel: the launch fails with this message, preceded by block and thread.
__attribute__((format(printf, 1, 2), noreturn)) SIMT_INTERNAL inline void kernel_error(const char* format,
                                                                                       ...) {
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    begin_error();
    append_error(", thread (%u,%u,%u): %s", current->index.x, current->index.y, current->index.z, message);
    release(&block.end_order);
    switch_to(nullptr);
    abort();
}

// Reports a stuck block, in which no thread is ready and some wait. The message
// counts the threads at each place.
SIMT_INTERNAL inline void report_stuck() {
    begin_error();
    append_error(block.divergent ? ": divergent barriers" : ": its threads wait for ever");
    const char* separator = ": ";
    for (int i = 0; i < block.thread_count; i++) {
        const Thread* first = &threads[i];
        int count = 0;
        bool seen = false;
        for (int j = 0; j < block.thread_count && !seen; j++) {
            const Thread* other = &threads[j];
            bool same = other->state == first->state &&
                        (first->state == RETURNED || same_place(other->place, first->place));
            count += same;
            seen = same && j < i;
        }
        if (seen) continue;
        if (first->state == RETURNED) append_error("%s%d returned", separator, count);
        else
            append_error("%s%d at %s (%s:%d)", separator, count, first->place.operation, first->place.file,
                         first->place.line);
        append_error(count > 1 ? " (thread %d and others)" : " (thread %d)", i);
        separator = ", ";
    }
}

#if !defined(SIMT_ADDRESS) && !defined(SIMT_THREAD)
inline const void* fault_address;

inline void fault_in_kernel() {
    const unsigned char* stack = current->fiber->stack;
    const unsigned char* address = (const unsigned char*)fault_address;
    if (address >= stack - GUARD_BYTES && address < stack)
        kernel_error("stack overflow: more than %d KB of local variables", STACK_BYTES / 1024);
    kernel_error("invalid memory access (address %p)", fault_address);
}

// The signal handler: the thread continues in fault_in_kernel(), at the top of its own stack, whose contents
// are no longer needed.
inline void on_fault(int number, siginfo_t* info, void* context) {
    if (!current) { // a fault of the host while it runs blocks
        signal(number, SIG_DFL);
        return;
    }
    fault_address = info->si_addr;
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    registers[REG_RSP] = (greg_t)(current->fiber->stack + STACK_BYTES - 8);
    registers[REG_RIP] = (greg_t)fault_in_kernel;
}

// Catches faults while an object of this type lives. Its destructor restores the earlier handlers (test
// frameworks have some).
struct CatchFaults {
    stack_t kept_stack;
    struct sigaction kept[2];
    CatchFaults() {
        static char alternate[64 * 1024];
        stack_t stack = {};
        stack.ss_sp = alternate;
        stack.ss_size = sizeof(alternate);
        sigaltstack(&stack, &kept_stack);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &kept[0]);
        sigaction(SIGBUS, &action, &kept[1]);
    }
    ~CatchFaults() {
        sigaction(SIGSEGV, &kept[0], nullptr);
        sigaction(SIGBUS, &kept[1], nullptr);
        sigaltstack(&kept_stack, nullptr);
    }
};
#endif

// ----------------------------------------------------------------------------
// The block's barrier

// Waits until all threads of the block call this barrier at the same source line, and returns their combined
// predicates. If threads arrive at different lines, the block is stuck.
SIMT_INTERNAL inline Predicates barrier(int predicate, const Place& place) {
    if (block.arrived == 0) block.place = place;
    else if (!same_place(block.place, place))
        block.divergent = true; // the block gets stuck, and report_stuck() says where its threads are
    block.so_far.any |= predicate != 0;
    block.so_far.all &= predicate != 0;
    block.so_far.count += predicate != 0;
    // Barriers alternate between two synchronisation objects of the thread sanitizer. With one object, a fast
    // thread's release at the next barrier would seem to precede a slow thread's acquire here.
    char* order = &block.barrier_order[block.generation % 2];
    release(order);
    if (++block.arrived < block.thread_count || block.divergent) {
        wait_at(place);
    } else {
        block.passed = block.so_far;
        block.so_far = {0, 1, 0};
        block.arrived = 0;
        block.generation++;
        for (int w = 0; w < block.warp_count; w++) make_ready(w, warps[w].lanes);
        draw_again();
    }
    acquire(order);
    return block.passed;
}

// ----------------------------------------------------------------------------
// Running

// Every fiber begins here.
SIMT_INTERNAL inline void fiber_main() {
#ifdef SIMT_ADDRESS
    // The first fiber that runs in a block saves the address and size of the host's stack for the address
    // sanitizer.
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!host.stack) {
        host.stack = (unsigned char*)bottom;
        host.stack_bytes = bytes;
    }
#endif
    acquire(&block.start_order);
    block.run(block.arguments);
    if (has_open_copies(current))
        kernel_error("the thread ends with copies by cp.async that it never committed: no wait covers them");
    release(&block.end_order);
    warps[current->warp].returned |= 1u << current->lane;
    block.live--;
    leave_ready(current, RETURNED);
    switch_to(next_ready());
    abort();
}

SIMT_INTERNAL inline void prepare_fiber(Fiber* fiber) {
    if (!fiber->stack) {
        void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) {
            fprintf(stderr, "simt: out of memory for the stacks of threads\n");
            exit(1);
        }
        fiber->stack = (unsigned char*)memory + GUARD_BYTES;
        fiber->stack_bytes = STACK_BYTES;
    }
#ifdef SIMT_THREAD
    if (!fiber->sanitized) fiber->sanitized = __tsan_create_fiber(0); // slow, so later blocks use it again
#endif
    fiber->fake_stack = nullptr;
    // simt_switch_stack() pops six registers and then the address to continue at. One more word aligns the
    // stack as after a call.
    void** top = (void**)(fiber->stack + STACK_BYTES);
    *--top = nullptr;
    *--top = (void*)fiber_main;
    for (int r = 0; r < 6; r++) *--top = nullptr;
    fiber->stack_pointer = top;
}

SIMT_INTERNAL inline void prepare_thread(int i, Fiber* fiber) {
    Thread* thread = &threads[i];
    prepare_fiber(fiber);
    thread->fiber = fiber;
    thread->index.x = (unsigned)i % blockDim.x;
    thread->index.y = (unsigned)i / blockDim.x % blockDim.y;
    thread->index.z = (unsigned)i / (blockDim.x * blockDim.y);
    thread->warp = i / WARP;
    thread->lane = i % WARP;
    thread->first_pending = thread->pending_end = thread->open_group = 0;
    warps[thread->warp].lanes |= 1u << thread->lane;
}

// This fiber stopped inside a kernel. Its stack still has bytes that the address sanitizer poisoned. For the
// thread sanitizer, its accesses must happen before the host's next accesses.
SIMT_INTERNAL inline void abandon_fiber(Fiber* fiber) {
    unpoison(fiber->stack, STACK_BYTES);
#ifdef SIMT_THREAD
    __tsan_switch_to_fiber(fiber->sanitized, __tsan_switch_to_fiber_no_sync);
    __tsan_switch_to_fiber(host.sanitized, 0); // a switch that orders
    __tsan_destroy_fiber(fiber->sanitized);
    fiber->sanitized = nullptr;
#endif
}

// Returns false if the block failed; error_message then says why.
SIMT_INTERNAL inline bool run_block() {
    const int last_warp = (block.thread_count - 1) / WARP;
    block.live = block.thread_count;
    block.warp_count = last_warp + 1;
    block.warp = options.order == ORDER_REVERSE ? last_warp : 0;
    block.ready_warps = 0;
    block.arrived = 0;
    block.so_far = {0, 1, 0};
    block.divergent = false;
    failed = false;
    host.stack = nullptr;
    for (int w = 0; w < block.warp_count; w++)
        warps[w].lanes = warps[w].ready = warps[w].returned = 0, warps[w].meeting_count = 0;
    Fiber* set = fibers[random_bits() % FIBER_SETS];
    for (int i = 0; i < block.thread_count; i++) prepare_thread(i, &set[i]);
    for (int w = 0; w < block.warp_count; w++) make_ready(w, warps[w].lanes);
#ifdef SIMT_THREAD
    host.sanitized = __tsan_get_current_fiber();
#endif
    release(&block.start_order);
    switch_to(next_ready());
    if (!failed && block.live) report_stuck();
    for (int i = 0; i < block.thread_count && failed; i++) abandon_fiber(&set[i]);
    return !failed;
}

// Runs the blocks in the order of SIMT_ORDER; for the random order a seeded shuffle places each block.
SIMT_INTERNAL inline bool run_blocks(unsigned* block_order, unsigned blocks) {
    random_state = options.seed * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
    if (!random_state) random_state = 1;
    for (unsigned i = 0; i < blocks; i++)
        block_order[i] = options.order == ORDER_REVERSE ? blocks - 1 - i : i;
    for (unsigned i = blocks - 1; options.order == ORDER_RANDOM && i > 0; i--) {
        unsigned j = random_bits() % (i + 1), kept = block_order[i];
        block_order[i] = block_order[j];
        block_order[j] = kept;
    }
    for (unsigned i = 0; i < blocks; i++) {
        unsigned b = block_order[i];
        blockIdx.x = b % gridDim.x;
        blockIdx.y = b / gridDim.x % gridDim.y;
        blockIdx.z = b / (gridDim.x * gridDim.y);
        shared_memory_fresh();
        if (!run_block()) return false;
    }
    return true;
}

// Runs a whole launch; returns false if a block failed.
SIMT_INTERNAL inline bool run_grid(dim3 grid, dim3 threads_of_block, size_t shared_bytes, void (*run)(void*),
                                   void* arguments) {
    DeviceMemoryOpen open;
#if !defined(SIMT_ADDRESS) && !defined(SIMT_THREAD)
    CatchFaults catching;
#endif
    gridDim = grid;
    blockDim = threads_of_block;
    block.thread_count = (int)(blockDim.x * blockDim.y * blockDim.z);
    block.run = run;
    block.arguments = arguments;
    shared_memory_begin(shared_bytes);
    unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    unsigned* block_order = (unsigned*)malloc(blocks * sizeof(unsigned));
    if (!block_order) abort();
    bool good = run_blocks(block_order, blocks);
    acquire(&block.end_order);
    free(block_order);
    return good;
}

} // namespace simt

#endif
