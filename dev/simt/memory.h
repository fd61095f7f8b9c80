/*
The GPU's two memories: device memory, with one host allocation for each cudaMalloc(), and a block's shared
memory. Unwritten memory holds 0xFF bytes: NaN as float, -1 as integer.

Under the address sanitizer, device memory is poisoned while no kernel and no copy runs (DeviceMemoryOpen), so
the sanitizer catches host code that accesses it. Shared memory is allocated for every block, at its exact
size.
*/
#ifndef DEV_SIMT_MEMORY_H
#define DEV_SIMT_MEMORY_H

#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "dev/simt/types.h"

namespace simt {

// ----------------------------------------------------------------------------
// Device memory

struct Allocation {
    char* begin;
    size_t bytes;
};
enum { MAX_ALLOCATIONS = 65536 };
inline Allocation allocations[MAX_ALLOCATIONS]; // sorted by address
inline int allocation_count;
inline int device_memory_open; // the number of kernels and copies that run now

// The number of allocations that begin at or before this address.
SIMT_INTERNAL inline int allocations_up_to(const void* address) {
    int low = 0, high = allocation_count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (allocations[middle].begin <= (const char*)address) low = middle + 1;
        else high = middle;
    }
    return low;
}

// The allocation that contains all these bytes, or null.
SIMT_INTERNAL inline Allocation* device_allocation(const void* address, size_t bytes) {
    int i = allocations_up_to(address) - 1;
    if (i < 0) return nullptr;
    size_t offset = (size_t)((const char*)address - allocations[i].begin);
    return offset < allocations[i].bytes && bytes <= allocations[i].bytes - offset ? &allocations[i]
                                                                                   : nullptr;
}

// The address is a number because this function reads no memory; the bytes may be unwritten.
SIMT_INTERNAL inline bool is_device_memory(uintptr_t address, size_t bytes) {
    return device_allocation((const void*)address, bytes);
}

inline void* device_allocate(size_t bytes) {
    void* memory;
    if (allocation_count == MAX_ALLOCATIONS || posix_memalign(&memory, 256, bytes) != 0) return nullptr;
    memset(memory, 0xFF, bytes);
    int i = allocations_up_to(memory);
    memmove(&allocations[i + 1], &allocations[i], (size_t)(allocation_count++ - i) * sizeof(allocations[0]));
    allocations[i] = {(char*)memory, bytes};
    if (!device_memory_open) poison(memory, bytes);
    return memory;
}

// Returns false if device_allocate() did not give this address.
inline bool device_release(void* memory) {
    int i = allocations_up_to(memory) - 1;
    if (i < 0 || allocations[i].begin != memory) return false;
    const Allocation released = allocations[i];
    memmove(&allocations[i], &allocations[i + 1], (size_t)(--allocation_count - i) * sizeof(allocations[0]));
    unpoison(released.begin, released.bytes);
    free(released.begin);
    return true;
}

// Device memory may be accessed while an object of this type lives.
struct DeviceMemoryOpen {
    DeviceMemoryOpen() {
        if (device_memory_open++ == 0)
            for (int i = 0; i < allocation_count; i++) unpoison(allocations[i].begin, allocations[i].bytes);
    }
    ~DeviceMemoryOpen() {
        if (--device_memory_open == 0)
            for (int i = 0; i < allocation_count; i++) poison(allocations[i].begin, allocations[i].bytes);
    }
};

// ----------------------------------------------------------------------------
// Shared memory

enum { MAX_SHARED_BYTES = 227 * 1024 }; // the maximum of a block on sm_90

struct SharedMemory {
    char* dynamic; // the running block's dynamic shared memory
    size_t bytes;
    char* arrays; // all static __shared__ arrays of the program
    size_t array_bytes;
};
inline SharedMemory shared;

SIMT_INTERNAL inline void* dynamic_shared_memory() { return shared.dynamic; }

#ifndef SIMT_ADDRESS
// dl_iterate_phdr() reports the main program first; its thread_local segment holds exactly the __shared__
// arrays (types.h).
inline int note_shared_arrays(dl_phdr_info* program, size_t, void*) {
    for (int i = 0; i < program->dlpi_phnum; i++)
        if (program->dlpi_phdr[i].p_type == PT_TLS) {
            shared.arrays = (char*)program->dlpi_tls_data;
            shared.array_bytes = program->dlpi_phdr[i].p_memsz;
        }
    return 1;
}
#endif

// Called before a launch.
inline void shared_memory_begin(size_t bytes) {
    shared.bytes = bytes;
#ifndef SIMT_ADDRESS
    dl_iterate_phdr(note_shared_arrays, nullptr);
#endif
}

// Called before a block: makes all shared memory unwritten.
inline void shared_memory_fresh() {
#ifdef SIMT_ADDRESS
    free(shared.dynamic); // the sanitizer knows the exact end of a heap block
    if (posix_memalign((void**)&shared.dynamic, 128, shared.bytes) != 0) abort();
#else
    forget_accesses(shared.arrays, shared.array_bytes);
    memset(shared.arrays, 0xFF, shared.array_bytes);
    // One mapping, followed by a page that faults. The thread sanitizer gets a new mapping for each block,
    // because it takes a new mapping as new memory.
    enum { PAGE = 4096, MAPPED = (MAX_SHARED_BYTES + PAGE - 1) / PAGE * PAGE };
    static char* mapping = nullptr;
#ifndef SIMT_THREAD
    if (!mapping)
#endif
    {
        mapping = (char*)mmap(mapping, MAPPED + PAGE, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | (mapping ? MAP_FIXED : 0), -1, 0);
        if (mapping == MAP_FAILED || mprotect(mapping + MAPPED, PAGE, PROT_NONE) != 0) abort();
    }
    shared.dynamic = mapping + MAPPED - (shared.bytes + 127) / 128 * 128;
#endif
    memset(shared.dynamic, 0xFF, shared.bytes);
}

// Whether an address can be shared memory. If the static arrays are not known (under the address sanitizer),
// every address outside device memory can be.
SIMT_INTERNAL inline bool may_be_shared(const void* address, size_t bytes) {
    const char* p = (const char*)address;
    if (p >= shared.dynamic && p + bytes <= shared.dynamic + shared.bytes) return true;
#ifdef SIMT_ADDRESS
    return !device_allocation(address, bytes);
#else
    return p >= shared.arrays && p + bytes <= shared.arrays + shared.array_bytes;
#endif
}

} // namespace simt

#endif
