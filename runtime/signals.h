/*
Signals that end a run: the first one is a request to stop, which the training loop reads between two steps.

    signals_start();                 // first in main(), before there is a second thread
    signals_take();                  // from here on a signal is a request to stop
    if (signals_stop()) ...          // the number of the signal that came; 0: none
    signals_release();               // from here on a signal ends the process at once again

Every thread blocks these signals, and one thread waits for them. There is no handler: oneDNN's generated
matrix products keep their stack pointer inside heap memory, so a handler that runs on an interrupted thread's
stack overwrites the heap.

A signal that comes more than signals_same_seconds after the first one ends the process at once, by its
default action. Until then it counts as the first one sent again: timeout(1), and a shell whose terminal
closes, send theirs twice. A signal that was ignored when the program started (by nohup, or in the background
of a script) stays ignored. While a run trains, SIGPIPE is ignored. A pipe for stdout whose reader has gone is
a request to stop instead.
*/
#ifndef RUNTIME_SIGNALS_H
#define RUNTIME_SIGNALS_H

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include "runtime/checks.h" // defines fail, scratch_path, scratch_lock

// SIGXCPU is the soft limit of processor time (ulimit -S -t). SIGQUIT is not
// here: it ends the process at once.
static const int signals_handled[] = {SIGHUP, SIGINT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM, SIGXCPU};
enum { SIGNALS_HANDLED = sizeof(signals_handled) / sizeof(signals_handled[0]) };
static double signals_same_seconds = 1;

typedef struct {
    sigset_t set;        // the signals that the waiting thread waits for
    int taken;           // 1: a signal is a request to stop; 0: it ends the process
    int stop;            // the first signal since signals_take(); 0: none
    int watches_output;  // 1: stdout without a reader is a request to stop
    void (*alarm)(void); // called when alarm()'s time is over; NULL: SIGALRM is like the other signals
} Signals;

static Signals signals;

// Ends the process by the signal's default action, so that its parent sees 128 + the signal. It removes a
// half-written file, but no directory: the main thread may be creating another file in it.
__attribute__((noreturn)) static inline void signals_end(int number) {
    sigset_t one;
    scratch_lock(); // kept to the end: no other thread can rename a file any more
    if (scratch_path[0]) unlink(scratch_path);
    sigemptyset(&one);
    sigaddset(&one, number);
    signal(number, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &one, NULL);
    raise(number);
    _exit(128 + number);
}

static inline double signals_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// The thread that waits. The system sends SIGXCPU every second, so SIGXCPU never counts as a second signal.
static inline void* signals_wait(void* unused) {
    double first = 0; // the time of the first request to stop
    for (;;) {
        siginfo_t info;
        const int number = sigwaitinfo(&signals.set, &info);
        if (number < 0) continue; // interrupted: the process was suspended and continues
        void (*expired)(void) = __atomic_load_n(&signals.alarm, __ATOMIC_ACQUIRE);
        if (number == SIGALRM && info.si_code == SI_KERNEL && expired) {
            expired();
        } else if (!__atomic_load_n(&signals.taken, __ATOMIC_ACQUIRE)) {
            signals_end(number);
        } else if (first == 0) {
            first = signals_clock();
            __atomic_store_n(&signals.stop, number, __ATOMIC_RELEASE);
        } else if (number != SIGXCPU && signals_clock() - first > signals_same_seconds) {
            signals_end(number);
        }
    }
    return unused;
}

static inline void signals_start(void) {
    pthread_t thread;
    sigemptyset(&signals.set);
    for (int i = 0; i < SIGNALS_HANDLED; i++) {
        struct sigaction now;
        if (sigaction(signals_handled[i], NULL, &now) == 0 && now.sa_handler != SIG_IGN)
            sigaddset(&signals.set, signals_handled[i]);
    }
    pthread_sigmask(SIG_BLOCK, &signals.set, NULL); // later threads inherit the mask
    const int error = pthread_create(&thread, NULL, signals_wait, NULL);
    if (error) fail("the thread that waits for signals cannot be started: %s", strerror(error));
    pthread_detach(thread);
}

static inline void signals_take(void) {
    struct sigaction now;
    if (sigaction(SIGPIPE, NULL, &now) == 0 && now.sa_handler == SIG_DFL) {
        signals.watches_output = 1;
        signal(SIGPIPE, SIG_IGN);
    }
    __atomic_store_n(&signals.taken, 1, __ATOMIC_RELEASE);
}

static inline void signals_release(void) { __atomic_store_n(&signals.taken, 0, __ATOMIC_RELEASE); }

// Whether stdout is a pipe or a socket whose other end is closed.
static inline int signals_output_is_gone(void) {
    struct pollfd output = {STDOUT_FILENO, POLLOUT, 0};
    struct stat info;
    return poll(&output, 1, 0) > 0 && (output.revents & (POLLERR | POLLHUP)) &&
           fstat(STDOUT_FILENO, &info) == 0 && (S_ISFIFO(info.st_mode) || S_ISSOCK(info.st_mode));
}

// Returns the signal that asks the run to stop, or 0. If the reader of stdout has gone, it returns SIGPIPE. An
// earlier signal wins: Ctrl-C also ends the reader. Only the main thread calls it.
static inline int signals_stop(void) {
    int stop = __atomic_load_n(&signals.stop, __ATOMIC_ACQUIRE);
    if (!stop && signals.watches_output && signals_output_is_gone())
        __atomic_compare_exchange_n(&signals.stop, &stop, SIGPIPE, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return __atomic_load_n(&signals.stop, __ATOMIC_ACQUIRE);
}

// Sets the function that the waiting thread calls when alarm()'s time is over; NULL: none.
static inline void signals_on_alarm(void (*expired)(void)) {
    __atomic_store_n(&signals.alarm, expired, __ATOMIC_RELEASE);
}

#endif
