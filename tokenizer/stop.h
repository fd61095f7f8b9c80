/*
Signals that end the tokenizer's programs at any moment.

    int main(int argc, char** argv) {
        program_name = "tokenizer";
        stop_on_signals();           // first, while there is one thread

One thread waits for the signals; all other threads block them. The waiting thread removes the partial output
(runtime/checks.h, scratch_path_begin), prints one line, and ends the process with exit code 128 + signal. So
a stop works whatever the other threads do: encode a large document, read from a pipe or write to one.

A signal that was ignored at the start (by nohup) stays ignored. A second signal kills the process at once,
but not in the first STOP_GRACE_MS milliseconds: timeout(1) and mpirun send the first signal twice.
*/
#ifndef TOKENIZER_STOP_H
#define TOKENIZER_STOP_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE // sigset_t's functions, poll
#endif
#include "runtime/checks.h" // scratch_lock, scratch_remove_locked, program_name

#include <poll.h>
#include <signal.h>
#include <time.h>

enum { STOP_SIGNALS = 8, STOP_GRACE_MS = 300 };

typedef struct {
    int number;
    const char* name;
} StopSignal;

static inline const StopSignal* stop_signal(int index) {
    static const StopSignal signals[STOP_SIGNALS] = {
        {SIGINT, "SIGINT"},   {SIGTERM, "SIGTERM"}, {SIGHUP, "SIGHUP"},   {SIGQUIT, "SIGQUIT"},
        {SIGALRM, "SIGALRM"}, {SIGUSR1, "SIGUSR1"}, {SIGUSR2, "SIGUSR2"}, {SIGXCPU, "SIGXCPU"}};
    return &signals[index];
}

// Prints the signal's name, unless stderr is a full pipe: nobody reads that, and the write would wait.
static inline void stop_say(int number) {
    char line[128];
    const char* name = "a signal";
    for (int i = 0; i < STOP_SIGNALS; i++)
        if (stop_signal(i)->number == number) name = stop_signal(i)->name;
    int length = snprintf(line, sizeof(line), "%s%s: stopped by %s\n", live_line_shown ? "\n" : "",
                          program_name, name);
    struct pollfd writable = {STDERR_FILENO, POLLOUT, 0};
    if (poll(&writable, 1, 0) != 1 || !(writable.revents & POLLOUT)) return;
    if (write(STDERR_FILENO, line, (size_t)length) < 0) return;
}

// Lets further signals kill the process after STOP_GRACE_MS, even if the removal takes longer.
static inline void* stop_allow_kill(void* set) {
    const struct timespec grace = {0, STOP_GRACE_MS * 1000000L};
    nanosleep(&grace, NULL);
    pthread_sigmask(SIG_UNBLOCK, (const sigset_t*)set, NULL);
    for (;;) pause();
    return NULL;
}

static inline void* stop_wait(void* set) {
    int number = 0;
    pthread_t thread;
    while (sigwait((const sigset_t*)set, &number) != 0) continue;
    (void)pthread_create(&thread, NULL, stop_allow_kill, set);
    scratch_lock(); // never unlocked
    scratch_remove_locked();
    stop_say(number);
    _exit(128 + number);
}

// Call this first in main(). A write to a closed pipe or beyond the limit of a file's size then gives no
// signal but an error, and the code that writes reports it and removes the partial output.
static inline void stop_on_signals(void) {
    static sigset_t set;
    sigemptyset(&set);
    for (int i = 0; i < STOP_SIGNALS; i++) {
        struct sigaction action;
        if (sigaction(stop_signal(i)->number, NULL, &action) == 0 && action.sa_handler != SIG_IGN)
            sigaddset(&set, stop_signal(i)->number);
    }
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    pthread_t thread;
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (pthread_create(&thread, NULL, stop_wait, &set) != 0) {
        // Without a thread to wait for them, the signals must at least end the program.
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
        return;
    }
    pthread_detach(thread);
}

#endif
