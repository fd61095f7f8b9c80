/*
The device of DEVICE=cpu: main memory. The last argument of every operation is a stream_t, as in its CUDA
twin; here it has no meaning.
*/
#ifndef DEV_CPU_DEVICE_H
#define DEV_CPU_DEVICE_H

#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <omp.h>
#include "runtime/checks.h"
#include "runtime/precision.h"

typedef int stream_t;

#define DEVICE_NAME "cpu"
#define DEVICE_HAS_OWN_MEMORY 0 // 1: device_malloc() does not give main memory

// The maker's name of the device; "" on the CPU.
static inline const char* device_name(void) { return ""; }

// On a GPU: chooses the GPU of process `index` of the `count` processes on this machine. On the CPU the
// processes share the cores, so there is nothing to choose.
static inline void device_choose(int index, int count) { (void)index, (void)count; }

// Free bytes of the device's own memory; the CPU has none.
static inline size_t device_memory_free(void) { return 0; }

// Zeroed memory, aligned to a page. Large blocks ask for huge pages, which save page walks in strided reads.
static inline void* device_malloc(size_t bytes, const char* what) {
    const size_t huge_page = (size_t)2 << 20;
    size_t alignment = bytes >= huge_page ? huge_page : 4096;
    void* memory = NULL;
    if (posix_memalign(&memory, alignment, bytes ? bytes : 1) != 0)
        fail("out of memory: %.1f MB for %s", (double)bytes / 1e6, what);
    if (bytes >= huge_page) (void)madvise(memory, bytes, MADV_HUGEPAGE);
    memset(memory, 0, bytes);
    return memory;
}

static inline void device_free(void* memory) { free(memory); }

// Host memory that the device copies from and to while the host continues.
static inline void* host_malloc_pinned(size_t bytes, const char* what) { return malloc_or_fail(bytes, what); }
static inline void host_free_pinned(void* memory) { free(memory); }

static inline void device_zero(void* memory, size_t bytes, stream_t stream) {
    (void)stream;
    char* bytes_of = (char*)memory;
    const size_t chunk = (size_t)1 << 20;
#pragma omp parallel for schedule(static)
    for (size_t start = 0; start < bytes; start += chunk)
        memset(bytes_of + start, 0, bytes - start < chunk ? bytes - start : chunk);
}

static inline void copy_to_device(void* device, const void* host, size_t bytes, stream_t stream) {
    (void)stream;
    memcpy(device, host, bytes);
}

static inline void copy_to_host(void* host, const void* device, size_t bytes, stream_t stream) {
    (void)stream;
    memcpy(host, device, bytes);
}

static inline void copy_on_device(void* to, const void* from, size_t bytes, stream_t stream) {
    (void)stream;
    memcpy(to, from, bytes);
}

static inline stream_t stream_make(void) { return 0; }
static inline void stream_free(stream_t done) { (void)done; }
static inline void stream_synchronize(stream_t stream) { (void)stream; }

// A point in the order of the stream's work, and the seconds between two such points.
typedef double Mark;
static inline Mark mark_make(void) { return 0; }
static inline void mark_free(Mark done) { (void)done; }
static inline void mark(Mark* at, stream_t stream) {
    (void)stream;
    *at = omp_get_wtime();
}
static inline double seconds_between(Mark begun, Mark done) { return done - begun; }

// The CPU runs every operation at once, so it has no graphs to record. Check DEVICE_HAS_GRAPHS before these
// calls.
#define DEVICE_HAS_GRAPHS 0
typedef int Graph;
static inline void graph_record_begin(stream_t stream) { (void)stream; }
static inline void graph_record_end(Graph* graph, stream_t stream) { (void)graph, (void)stream; }
static inline void graph_launch(const Graph* graph, stream_t stream) { (void)graph, (void)stream; }
static inline void graph_free(Graph* graph) { (void)graph; }

// Gives the work between the two calls a name, for a profiler.
static inline void range_begin(const char* name) { (void)name; }
static inline void range_end(void) {}

#endif
