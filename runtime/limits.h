/*
Limits of a container, a job or a shell. The program reads them in advance: beyond a limit the kernel kills
the process, a file ends in the middle, or the OpenMP library aborts.

    const MemoryLimit limit = limits_memory("/proc/self/cgroup", "/sys/fs/cgroup", 2, limits_stacks(8));
    if (planned > limit.bytes) fail("%s are free (%s)", limits_bytes_text(text, limit.bytes), limit.name);
    const int threads = limits_try_threads(8, NULL);                  // 8, or the number that can be started
    const size_t bytes = limits_disk_free("runs/mine");               // SIZE_MAX: not known
    const size_t longest = limits_file_bytes();                       // SIZE_MAX: no limit

Both versions of control groups are read (Linux, Documentation/admin-guide/cgroup-v1/memory.rst and
cgroup-v2.rst). A group's limit is for all processes in it and in the groups below it, so the groups above a
process's own group count as well.
*/
#ifndef RUNTIME_LIMITS_H
#define RUNTIME_LIMITS_H

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include "runtime/checks.h"

// ----------------------------------------------------------------------------
// Memory

// Bytes of main memory that this process holds now (Linux).
static inline size_t memory_resident(void) {
    FILE* file = fopen("/proc/self/statm", "r");
    long total = 0, resident = 0;
    if (!file) return 0;
    if (fscanf(file, "%ld %ld", &total, &resident) != 2) resident = 0;
    fclose(file);
    return (size_t)resident * (size_t)sysconf(_SC_PAGESIZE);
}

// The value, in bytes, of a line "field N kB" of a file in /proc; 0 if there is none.
static inline size_t memory_proc_field(const char* path, const char* field) {
    FILE* file = fopen(path, "r");
    if (!file) return 0;
    char line[256];
    size_t kilobytes = 0, length = strlen(field);
    while (fgets(line, sizeof(line), file))
        if (!strncmp(line, field, length)) kilobytes = strtoul(line + length, NULL, 10);
    fclose(file);
    return kilobytes * 1024;
}

// The largest number of bytes of main memory that this process has held (Linux).
static inline size_t memory_peak(void) { return memory_proc_field("/proc/self/status", "VmHWM:"); }

// Bytes of main memory that are available without swapping; 0 if unknown.
static inline size_t memory_available(void) { return memory_proc_field("/proc/meminfo", "MemAvailable:"); }

// Writes 1500000000 bytes as "1.5 GB" and 90000 as "0.1 MB".
static inline const char* limits_bytes_text(char text[32], size_t bytes) {
    const int large = bytes >= 1000000000;
    snprintf(text, 32, "%.1f %s", (double)bytes / (large ? 1e9 : 1e6), large ? "GB" : "MB");
    return text;
}

typedef struct {
    size_t bytes;     // that this process may hold in total; SIZE_MAX: not known
    const char* name; // of the limit
} MemoryLimit;

// The number in a file of a control group; SIZE_MAX if there is none, for example the word "max".
static inline size_t limits_read_number(const char* directory, const char* name) {
    char path[PATH_MAX];
    unsigned long long number = 0;
    path_format(path, "%s/%s", directory, name);
    FILE* file = fopen(path, "r");
    const int good = file && fscanf(file, "%llu", &number) == 1;
    if (file) fclose(file);
    return good && number < 1ULL << 60 ? (size_t)number
                                       : SIZE_MAX; // version 1 has a huge number for no limit
}

// Bytes of a control group that the kernel frees before it kills a process: cached file pages, and caches of
// the kernel's own, such as those of directory entries.
static inline size_t limits_read_cache(const char* directory, const char* const keys[3]) {
    char path[PATH_MAX], key[64];
    unsigned long long value;
    size_t sum = 0;
    path_format(path, "%s/memory.stat", directory);
    FILE* file = fopen(path, "r");
    while (file && fscanf(file, "%63s %llu", key, &value) == 2)
        for (int i = 0; i < 3; i++)
            if (keys[i] && !strcmp(key, keys[i])) sum += (size_t)value;
    if (file) fclose(file);
    return sum;
}

// Bytes that the group of this directory may still allocate; SIZE_MAX if it has no limit.
static inline size_t limits_group_free(const char* directory) {
    // Version 1 does not tell the kernel's own caches.
    static const char* const cache[2][3] = {{"total_inactive_file", "total_active_file", NULL},
                                            {"inactive_file", "active_file", "slab_reclaimable"}};
    const int second = limits_read_number(directory, "memory.current") != SIZE_MAX;
    const size_t most = limits_read_number(directory, second ? "memory.max" : "memory.limit_in_bytes");
    const size_t used = limits_read_number(directory, second ? "memory.current" : "memory.usage_in_bytes");
    if (most == SIZE_MAX || used == SIZE_MAX) return SIZE_MAX;
    const size_t kept = limits_read_cache(directory, cache[second]);
    const size_t firm = used > kept ? used - kept : 0;
    return most > firm ? most - firm : 0;
}

// The least number of bytes that a group and the groups above it have left. In a container, the path of the
// group may be the host's and not exist; then the limit is that of `root`.
static inline size_t limits_groups_free(const char* root, const char* group) {
    char path[PATH_MAX];
    size_t least = SIZE_MAX;
    path_format(path, "%s%s", root, group);
    for (char* end = path + strlen(path); end >= path + strlen(root); end--) {
        if (*end && *end != '/') continue;
        *end = 0;
        const size_t free_here = limits_group_free(path);
        if (free_here < least) least = free_here;
    }
    return least;
}

// Whether "memory" is one of these names, which commas separate.
static inline int limits_names_memory(const char* names) {
    for (const char* at = strstr(names, "memory"); at; at = strstr(at + 1, "memory"))
        if ((at == names || at[-1] == ',') && (at[6] == 0 || at[6] == ',')) return 1;
    return 0;
}

// Bytes that the control groups of a process leave; SIZE_MAX if they have no limit. cgroup_file:
// /proc/self/cgroup or a file like it, with lines NUMBER:CONTROLLERS:GROUP; root: the directory whose
// subdirectories are the groups.
static inline size_t limits_control_groups(const char* cgroup_file, const char* root) {
    char line[PATH_MAX], tree[PATH_MAX];
    size_t least = SIZE_MAX;
    FILE* file = fopen(cgroup_file, "r");
    while (file && fgets(line, sizeof(line), file)) {
        line[strcspn(line, "\n")] = 0;
        char *names = strchr(line, ':'), *group = names ? strchr(++names, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        if (*names && !limits_names_memory(names)) continue;
        path_format(tree, *names ? "%s/memory" : "%s", root); // version 2 lists no controllers
        const size_t left = limits_groups_free(tree, group);
        if (left < least) least = left;
    }
    if (file) fclose(file);
    return least;
}

// Lowers the limit to `bytes`, if that is less.
static inline void limits_take_less(MemoryLimit* limit, size_t bytes, const char* name) {
    if (bytes >= limit->bytes) return;
    limit->bytes = bytes;
    limit->name = name;
}

// Applies a shell's limit of mapped memory, given by the line `field` of /proc/self/status. `stacks`: bytes
// of the stacks of future threads, which count as well.
static inline void limits_take_mapped(MemoryLimit* limit, const struct rlimit* most, const char* field,
                                      size_t stacks, const char* name) {
    const size_t used = memory_proc_field("/proc/self/status", field) + stacks, all = (size_t)most->rlim_cur;
    if (most->rlim_cur != RLIM_INFINITY)
        limits_take_less(limit, (all > used ? all - used : 0) + memory_resident(), name);
}

// The main memory that this process may hold, including the memory that it already holds. `sharers` processes
// of this machine share the free memory equally; `stacks`: bytes of address space for future threads.
static inline MemoryLimit limits_memory(const char* cgroup_file, const char* root, int sharers,
                                        size_t stacks) {
    MemoryLimit limit = {SIZE_MAX, "not known"};
    const size_t machine = memory_available(), group = limits_control_groups(cgroup_file, root),
                 resident = memory_resident();
    if (machine) limits_take_less(&limit, machine / (size_t)sharers + resident, "memory of this machine");
    if (group != SIZE_MAX)
        limits_take_less(&limit, group / (size_t)sharers + resident, "memory limit of this container or job");
    struct rlimit most;
    if (getrlimit(RLIMIT_AS, &most) == 0)
        limits_take_mapped(&limit, &most, "VmSize:", stacks, "limit of virtual memory, ulimit -v");
    if (getrlimit(RLIMIT_DATA, &most) == 0)
        limits_take_mapped(&limit, &most, "VmData:", stacks, "limit of data, ulimit -d");
    return limit;
}

// ----------------------------------------------------------------------------
// Threads

static pthread_mutex_t limits_gate = PTHREAD_MUTEX_INITIALIZER; // held while the test threads must stay

static inline void* limits_wait_at_gate(void* unused) {
    pthread_mutex_lock(&limits_gate);
    pthread_mutex_unlock(&limits_gate);
    return unused;
}

// Starts up to `wanted` threads, calls while_there() (NULL: nothing) and ends them. Returns the number that
// it could start under the limits of the user (ulimit -u), of the control group (pids.max) and of memory.
static inline int limits_try_threads(int wanted, void (*while_there)(void)) {
    pthread_t* threads = (pthread_t*)malloc_or_fail((size_t)wanted * sizeof(pthread_t), "a list of threads");
    sigset_t all, kept;
    int count = 0;
    sigfillset(&all);
    pthread_mutex_lock(&limits_gate);
    pthread_sigmask(SIG_SETMASK, &all, &kept); // the test threads must not receive signals
    while (count < wanted && pthread_create(&threads[count], NULL, limits_wait_at_gate, NULL) == 0) count++;
    pthread_sigmask(SIG_SETMASK, &kept, NULL);
    if (while_there) while_there();
    pthread_mutex_unlock(&limits_gate);
    for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
    free(threads);
    return count;
}

// Bytes of address space for the stacks of this many threads.
static inline size_t limits_stacks(int threads) {
    pthread_attr_t attributes;
    size_t bytes = 0;
    if (pthread_attr_init(&attributes) != 0) return 0;
    (void)pthread_attr_getstacksize(&attributes, &bytes);
    pthread_attr_destroy(&attributes);
    return bytes * (size_t)threads;
}

// ----------------------------------------------------------------------------
// Files

// The limit of a file's size in bytes; SIZE_MAX: no limit.
static inline size_t limits_file_bytes(void) {
    struct rlimit most;
    if (getrlimit(RLIMIT_FSIZE, &most) != 0 || most.rlim_cur == RLIM_INFINITY) return SIZE_MAX;
    return (size_t)most.rlim_cur;
}

// Bytes that are free for this user on the file system of `given`, which need not exist yet.
static inline size_t limits_disk_free(const char* given) {
    char path[PATH_MAX];
    struct statvfs info;
    path_format(path, "%s", given);
    while (statvfs(path, &info) != 0) {
        char* slash = strrchr(path, '/');
        if (!slash && !strcmp(path, ".")) return SIZE_MAX;
        if (slash && slash != path) *slash = 0;
        else path_format(path, "%s", slash && path[1] ? "/" : ".");
    }
    return info.f_blocks ? (size_t)info.f_bavail * info.f_frsize : SIZE_MAX;
}

#endif
