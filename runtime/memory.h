/*
An arena: plans memory before it allocates it. It collects reservations, shows them, and allocates one block
for all.

    Arena arena = {"activations"};
    arena_reserve(&arena, (void**)&out, rows * C * sizeof(floatX), "residual stream");  // no allocation yet
    printf("%zu bytes\n", arena.bytes);
    arena_allocate(&arena);                                               // now `out` points into the block

The plan shows reservations with the same label as one line.
*/
#ifndef RUNTIME_MEMORY_H
#define RUNTIME_MEMORY_H

#include <assert.h>
#include "runtime/checks.h"
#include "runtime/device.h" // defines device_malloc

typedef struct {
    void** pointer; // receives the address
    size_t offset;  // from the start of the block, a multiple of ARENA_ALIGNMENT
    size_t bytes;
    const char* label; // static text
} Reservation;

typedef struct {
    const char* name;
    const char* remedy; // a hint that makes the arena smaller, for the out-of-memory message; may be NULL
    Reservation* reservations;
    int count;
    size_t bytes; // of the whole block
    void* block;
} Arena;

#define ARENA_ALIGNMENT 256 // bytes: whole cache lines for every device

static inline void arena_reserve(Arena* arena, void** pointer, size_t bytes, const char* label) {
    size_t size = (size_t)(arena->count + 1) * sizeof(Reservation);
    arena->reservations = (Reservation*)realloc_or_fail(arena->reservations, size, "the memory plan");
    Reservation* reservation = &arena->reservations[arena->count++];
    reservation->pointer = pointer;
    reservation->offset = arena->bytes;
    reservation->bytes = bytes;
    reservation->label = label;
    arena->bytes += (bytes + ARENA_ALIGNMENT - 1) / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
}

// Reserves the same memory for several pointers. The first call with the caller's pointer `shared` reserves
// the memory; `pointer` of every call receives its address.
static inline void arena_reserve_shared(Arena* arena, void** pointer, void** shared, size_t bytes,
                                        const char* label) {
    int at = 0;
    while (at < arena->count && arena->reservations[at].pointer != shared) at++;
    if (at == arena->count) arena_reserve(arena, shared, bytes, label);
    assert(arena->reservations[at].bytes == bytes);
    const size_t offset = arena->reservations[at].offset;
    arena_reserve(arena, pointer, 0, label);
    arena->reservations[arena->count - 1].offset = offset;
}

// Allocates the block in device memory, zeroed, and sets the pointers. Include
// the device's header before this one.
static inline void arena_allocate(Arena* arena) {
    char what[256];
    snprintf(what, sizeof(what), arena->remedy ? "%s (%s)" : "%s", arena->name, arena->remedy);
    arena->block = device_malloc(arena->bytes, what);
    for (int i = 0; i < arena->count; i++)
        *arena->reservations[i].pointer = (char*)arena->block + arena->reservations[i].offset;
}

static inline void arena_free(Arena* arena) {
    device_free(arena->block);
    free(arena->reservations);
    memset(arena, 0, sizeof(*arena));
}

static inline void arena_print(const Arena* arena) {
    printf("  %-34s %10.1f MB\n", arena->name, (double)arena->bytes / 1e6);
    for (int i = 0; i < arena->count; i++) {
        const char* label = arena->reservations[i].label;
        size_t bytes = 0;
        int first = 1;
        for (int j = 0; j < arena->count; j++) {
            if (strcmp(arena->reservations[j].label, label) != 0) continue;
            bytes += arena->reservations[j].bytes;
            first = first && j >= i;
        }
        if (first) printf("    %-32s %10.1f MB\n", label, (double)bytes / 1e6);
    }
}

#endif
