/*
Errors, and the checks made at the program's border (options, files, memory).

    if (T % 2 != 0) fail_usage("--sequence-length %d: must be even", T);     // exit code 2
    FILE* f = open_or_fail(path, "rb");                      // exit code 1; the message has path and reason
    float* x = (float*)malloc_or_fail(n * sizeof(float), "the logits");

Every failure prints one line on stderr, "PROGRAM: message". Exit code 2 means that the command line was
wrong, and 1 everything else. scratch_path_begin() registers a file or directory that is being written. If the
process ends before scratch_path_commit(), the registered path is removed, so that nothing half-written stays.
*/
#ifndef RUNTIME_CHECKS_H
#define RUNTIME_CHECKS_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef PATH_MAX
#define PATH_MAX 4096
#endif

// ----------------------------------------------------------------------------
// Failing

// The name at the beginning of every message; a program's main() sets it first.
static const char* program_name = "moba.c";

// 1 while the terminal shows a live line: a message then begins with a newline.
static int live_line_shown = 0;

// Set by runtime/comm.h if several ranks run: called before a failure is
// printed, and after it, to end all ranks.
static void (*failure_begin)(void) = NULL;
static void (*failure_end)(int exit_code) = NULL;

// Prints one line on stderr in one write, so that lines of several processes do not mix. Control characters,
// which file names may contain, become '?'.
__attribute__((format(printf, 1, 0))) static inline void message_line(const char* format, va_list arguments) {
    char line[4 * PATH_MAX];
    const int used = snprintf(line, sizeof(line), "%s%s: ", live_line_shown ? "\n" : "", program_name);
    const size_t room = sizeof(line) - (size_t)used - 1;
    vsnprintf(line + used, room, format, arguments);
    for (char* c = line + used; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    fputs(strcat(line, "\n"), stderr);
    live_line_shown = 0;
}

__attribute__((format(printf, 2, 0), noreturn)) static inline void
fail_with(int exit_code, const char* format, va_list arguments) {
    if (failure_begin) failure_begin();
    fflush(stdout);
    message_line(format, arguments);
    if (failure_end) failure_end(exit_code);
    exit(exit_code);
}

// Something outside the program is wrong (a file, memory, a device): one line, exit code 1.
__attribute__((format(printf, 1, 2), noreturn)) static inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_with(1, format, arguments);
}

// The command line asks for something impossible: one line naming option, value and rule, exit code 2.
__attribute__((format(printf, 1, 2), noreturn)) static inline void fail_usage(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_with(2, format, arguments);
}

// Prints a warning; the program goes on.
__attribute__((format(printf, 1, 2))) static inline void warn(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    message_line(format, arguments);
    va_end(arguments);
}

// ----------------------------------------------------------------------------
// Memory

// Returns uninitialised memory; `what` completes the message "out of memory: 12 MB for ...".
static inline void* malloc_or_fail(size_t bytes, const char* what) {
    void* memory = malloc(bytes ? bytes : 1);
    if (!memory) fail("out of memory: %.1f MB for %s", (double)bytes / 1e6, what);
    return memory;
}

static inline void* calloc_or_fail(size_t count, size_t bytes, const char* what) {
    void* memory = calloc(count ? count : 1, bytes ? bytes : 1);
    if (!memory) fail("out of memory: %.1f MB for %s", (double)count * (double)bytes / 1e6, what);
    return memory;
}

static inline void* realloc_or_fail(void* old, size_t bytes, const char* what) {
    void* memory = realloc(old, bytes ? bytes : 1);
    if (!memory) fail("out of memory: %.1f MB for %s", (double)bytes / 1e6, what);
    return memory;
}

// ----------------------------------------------------------------------------
// Files

// snprintf into a path buffer of PATH_MAX bytes; fails if the path does not fit.
__attribute__((format(printf, 2, 3))) static inline void path_format(char* path, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(path, PATH_MAX, format, arguments);
    va_end(arguments);
    if (length < 0 || length >= PATH_MAX) fail("path too long: %.80s...", path);
}

static inline FILE* open_or_fail(const char* path, const char* mode) {
    FILE* file = fopen(path, mode);
    if (!file) fail("%s: %s", path, strerror(errno));
    struct stat info;
    if (fstat(fileno(file), &info) == 0 && S_ISDIR(info.st_mode))
        fail("%s: is a directory, not a file", path);
    return file;
}

static inline void write_or_fail(const void* data, size_t bytes, FILE* file, const char* path) {
    if (bytes && fwrite(data, 1, bytes, file) != bytes) fail("%s: cannot write: %s", path, strerror(errno));
}

// Flushes, syncs to the disk and closes: a full disk shows here at the latest.
static inline void close_written_or_fail(FILE* file, const char* path) {
    if (fflush(file) != 0) fail("%s: cannot write: %s", path, strerror(errno));
    if (fsync(fileno(file)) != 0 && errno != EINVAL && errno != EROFS)
        fail("%s: cannot sync: %s", path, strerror(errno));
    if (fclose(file) != 0) fail("%s: cannot close: %s", path, strerror(errno));
}

// Reads the rest of an open file into one buffer, with a closing 0 byte that
// *length does not count. The caller frees it.
static inline char* read_stream_or_fail(FILE* file, const char* path, size_t* length) {
    size_t capacity = 1 << 16, used = 0;
    char* text = (char*)malloc_or_fail(capacity, path);
    for (;;) {
        size_t got = fread(text + used, 1, capacity - used - 1, file);
        used += got;
        if (used + 1 < capacity) break;
        capacity *= 2;
        text = (char*)realloc_or_fail(text, capacity, path);
    }
    if (ferror(file)) {
        const int error = errno;
        free(text);
        fail("%s: cannot read: %s", path, strerror(error));
    }
    text[used] = 0;
    if (length) *length = used;
    return text;
}

// The same for a whole file.
static inline char* read_file_or_fail(const char* path, size_t* length) {
    FILE* file = open_or_fail(path, "rb");
    char* text = read_stream_or_fail(file, path, length);
    fclose(file);
    return text;
}

static inline int path_exists(const char* path) {
    struct stat info;
    return stat(path, &info) == 0;
}

// mkdir -p
static inline void make_directories_or_fail(const char* path) {
    char partial[PATH_MAX];
    path_format(partial, "%s", path);
    for (char* c = partial + 1;; c++) {
        if (*c != '/' && *c != 0) continue;
        char kept = *c;
        *c = 0;
        if (mkdir(partial, 0777) != 0 && errno != EEXIST)
            fail("%s: cannot make the directory: %s", partial, strerror(errno));
        *c = kept;
        if (kept == 0) break;
    }
    struct stat info;
    if (stat(path, &info) != 0 || !S_ISDIR(info.st_mode)) fail("%s: not a directory", path);
}

// mkdir -p of the directory above `path`.
static inline void make_parent_or_fail(const char* path) {
    char parent[PATH_MAX];
    path_format(parent, "%s", path);
    char* slash = strrchr(parent, '/');
    if (!slash || slash == parent) return;
    *slash = 0;
    make_directories_or_fail(parent);
}

// rm -rf of one file or one flat directory; a missing one is no error. It
// removes a symbolic link, not its target.
static inline void remove_path(const char* path) {
    struct stat info;
    DIR* directory = lstat(path, &info) == 0 && S_ISDIR(info.st_mode) ? opendir(path) : NULL;
    if (directory) {
        struct dirent* entry;
        while ((entry = readdir(directory))) {
            if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
            unlinkat(dirfd(directory), entry->d_name, 0);
        }
        closedir(directory);
        rmdir(path);
        return;
    }
    unlink(path);
}

// ----------------------------------------------------------------------------
// Scratch: a file or directory that is being written, and that must not stay if the process ends early

// One path at a time is enough: a program writes one file or one checkpoint directory at a time.
static char scratch_path[PATH_MAX];

// Held while scratch is begun, renamed or removed. A thread that ends the process takes it and keeps it, so
// that no other thread can begin new scratch or rename a part of a set. Do not call fail() while holding it:
// exit() removes the scratch, which takes the lock again.
static pthread_mutex_t scratch_mutex = PTHREAD_MUTEX_INITIALIZER;

static inline void scratch_lock(void) { pthread_mutex_lock(&scratch_mutex); }

static inline void scratch_unlock(void) { pthread_mutex_unlock(&scratch_mutex); }

// A spare descriptor, closed before the removal: removal must open the directory even
// if the process has no free descriptor.
static int scratch_reserve = -1;

// Removes the scratch. The caller holds the lock.
static inline void scratch_remove_locked(void) {
    if (scratch_reserve >= 0) close(scratch_reserve);
    scratch_reserve = -1;
    if (scratch_path[0]) remove_path(scratch_path);
    scratch_path[0] = 0;
}

static inline void scratch_path_remove(void) {
    scratch_lock();
    scratch_remove_locked();
    scratch_unlock();
}

// From here to scratch_path_commit(), `path` is removed at exit.
static inline void scratch_path_begin(const char* path) {
    static int registered = 0;
    if (strlen(path) >= PATH_MAX) fail("path too long: %.80s...", path);
    scratch_lock();
    if (!registered) atexit(scratch_path_remove);
    registered = 1;
    if (scratch_reserve < 0) scratch_reserve = open("/dev/null", O_RDONLY | O_CLOEXEC);
    strcpy(scratch_path, path);
    scratch_unlock();
}

// Opens a file for writing: the scratch itself, or a file in it. If a thread is
// ending the process, this waits for the end.
static inline FILE* scratch_open_or_fail(const char* path) {
    scratch_lock();
    FILE* file = fopen(path, "wb");
    const int reason = errno;
    scratch_unlock();
    if (!file) fail("%s: cannot write: %s", path, strerror(reason));
    return file;
}

// Makes the scratch directory, with the same lock.
static inline void scratch_make_directory_or_fail(const char* path) {
    scratch_lock();
    const int made = mkdir(path, 0777) == 0 || errno == EEXIST, reason = errno;
    scratch_unlock();
    if (!made) fail("%s: cannot make the directory: %s", path, strerror(reason));
}

// Forgets the path: another process will rename it.
static inline void scratch_path_forget(void) {
    scratch_lock();
    scratch_path[0] = 0;
    scratch_unlock();
}

// Renames the scratch to its final name and syncs the directory above it:
// the file is now complete on the disk.
static inline void scratch_path_commit(const char* final_path) {
    scratch_lock();
    const int renamed = rename(scratch_path, final_path) == 0, reason = errno;
    if (renamed) scratch_path[0] = 0;
    scratch_unlock();
    if (!renamed) fail("%s: cannot rename to %s: %s", scratch_path, final_path, strerror(reason));
    char parent[PATH_MAX];
    path_format(parent, "%s", final_path);
    char* slash = strrchr(parent, '/');
    if (slash) slash[slash == parent] = 0;
    int directory = open(slash ? parent : ".", O_RDONLY);
    if (directory >= 0) {
        (void)fsync(directory);
        close(directory);
    }
}

// Begins a file that keeps its old contents if the process ends early. The caller writes `partial`, then calls
// replacement_commit(). A pipe or a device is written directly, since a rename would replace it.
static inline void replacement_begin(char target[PATH_MAX], char partial[PATH_MAX], const char* path) {
    char resolved[PATH_MAX];
    struct stat info;
    const int exists = stat(path, &info) == 0, direct = exists && !S_ISREG(info.st_mode);
    // The rename must replace the file that a link points at, not the link.
    path_format(target, "%s", exists && !direct && realpath(path, resolved) ? resolved : path);
    path_format(partial, "%s", target);
    if (direct) return;
    path_format(partial, "%s.%d.partial", target, (int)getpid());
    scratch_path_begin(partial);
}

static inline void replacement_commit(const char* target, const char* partial) {
    if (strcmp(target, partial) != 0) scratch_path_commit(target);
}

#endif
