/*
The lock of a run's directory: one process at a time trains in it.

    run_lock("runs/mine");           // before the first change in the directory; further calls do nothing

Where another process holds the lock, run_lock() fails with a line that says which one, on which host, and
since when. The lock is flock() on the file `lock` in the directory: the system releases it when the process
ends in any way. The process removes the file at exit. A run that was killed leaves the file behind, without
the lock.

On a file system without locks, run_lock() warns and the run goes on. A file server may keep the lock of a
host that crashed; then the user must delete the file.
*/
#ifndef RUNTIME_RUN_LOCK_H
#define RUNTIME_RUN_LOCK_H

#include <sys/file.h>
#include <time.h>
#include "runtime/checks.h" // defines fail, warn, path_format

// A killed process may still end while the next one starts, and the ranks of a killed mpirun need seconds for
// it. So run_lock() tries again for up to 4 seconds, and after the first second says that it waits.
enum { RUN_LOCK_TRIES = 80, RUN_LOCK_SILENT_TRIES = 20, RUN_LOCK_PAUSE_MS = 50 };

typedef struct {
    int held;
    int file; // stays open for as long as the process lives
    char path[PATH_MAX];
} RunLock;

static RunLock run_lock_of_process;

// Whether `path` still names the open file. Its holder may have deleted it, and
// another process may have made a new one.
static inline int run_lock_is_named(int file, const char* path) {
    struct stat open_one, named;
    return fstat(file, &open_one) == 0 && stat(path, &named) == 0 && open_one.st_ino == named.st_ino &&
           open_one.st_dev == named.st_dev;
}

static inline void run_lock_remove(void) {
    if (run_lock_is_named(run_lock_of_process.file, run_lock_of_process.path))
        unlink(run_lock_of_process.path);
}

// Reads the line that the holder of the lock has written.
static inline void run_lock_read(int file, char* text, size_t size) {
    const ssize_t got = pread(file, text, size - 1, 0);
    text[got > 0 ? got : 0] = 0;
    for (char* c = text; *c; c++)
        if (*c < ' ' || *c > '~') *c = *c == '\n' ? 0 : '?';
    if (!text[0]) snprintf(text, size, "a process that has not said its name yet");
}

// Writes the holder's line. An error, for example of a full disk, does not matter.
static inline void run_lock_sign(int file) {
    char host[128] = "?", since[64], line[256];
    const time_t now = time(NULL);
    (void)gethostname(host, sizeof(host) - 1);
    strftime(since, sizeof(since), "%Y-%m-%d %H:%M:%S", localtime(&now));
    const int length = snprintf(line, sizeof(line), "pid %ld on %s since %s\n", (long)getpid(), host, since);
    if (ftruncate(file, 0) == 0) (void)!pwrite(file, line, (size_t)length, 0);
}

// Opens the file to sign it, or where another user owns it, to read it: flock() needs no more.
static inline int run_lock_open(const char* path, int* may_sign) {
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    *may_sign = file >= 0;
    if (file < 0 && errno == EACCES) {
        file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0) errno = EACCES; // also where there is no file: then the directory refuses a new one
    }
    return file;
}

// Returns the locked file, or -1 and errno. EWOULDBLOCK: another process holds the
// lock, and `holder` receives its line.
static inline int run_lock_try(const char* path, char* holder, size_t size) {
    for (;;) {
        int may_sign;
        const int file = run_lock_open(path, &may_sign);
        if (file < 0) return -1;
        if (flock(file, LOCK_EX | LOCK_NB) == 0) {
            const int named = run_lock_is_named(file, path);
            // A killed run of another user left the file, which tells a wrong holder: a new one replaces it.
            // In a directory with the sticky bit (EPERM) the file stays and serves as the lock.
            const int removed = named && !may_sign ? unlink(path) : 0, error = errno;
            if (named && (may_sign || (removed != 0 && error == EPERM))) return file;
            close(file);
            errno = error;
            if (removed != 0) return -1;
            continue;
        }
        const int error = errno;
        run_lock_read(file, holder, size);
        close(file);
        errno = error;
        return -1;
    }
}

// Takes the lock of an existing directory. Only the run's process that writes to the directory calls it.
static inline void run_lock(const char* directory) {
    RunLock* lock = &run_lock_of_process;
    char holder[256] = "";
    if (lock->held) return;
    path_format(lock->path, "%s/lock", directory);
    for (int i = 0; i < RUN_LOCK_TRIES; i++) {
        const struct timespec pause = {0, RUN_LOCK_PAUSE_MS * 1000000L};
        lock->file = run_lock_try(lock->path, holder, sizeof(holder));
        if (lock->file >= 0 || errno != EWOULDBLOCK) break;
        if (i == RUN_LOCK_SILENT_TRIES) {
            printf("--output %s: waiting for another run, which may be ending: %s\n", directory, holder);
            fflush(stdout);
        }
        if (i + 1 < RUN_LOCK_TRIES) nanosleep(&pause, NULL);
        errno = EWOULDBLOCK;
    }
    if (lock->file < 0 && errno == EWOULDBLOCK)
        fail("--output %s: another run is at work there: %s; if that one is dead, delete %s", directory,
             holder, lock->path);
    if (lock->file < 0 && (errno == EACCES || errno == EPERM || errno == EROFS || errno == EISDIR))
        fail("%s: %s", lock->path, strerror(errno));
    if (lock->file < 0) {
        warn("warning: %s: cannot be locked: %s; see to it that no other run uses %s", lock->path,
             strerror(errno), directory);
        return;
    }
    run_lock_sign(lock->file);
    lock->held = 1;
    atexit(run_lock_remove);
}

#endif
