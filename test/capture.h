/*
Runs a function that ends its process in a child process, and captures the exit code and the text on stderr.

    struct Captured c = capture(open_a_broken_shard, &arguments);
    assert_int_equal(c.exit_code, 1);
    assert_string_equal(c.text, "moba.c: ...\n");
*/
#ifndef TEST_CAPTURE_H
#define TEST_CAPTURE_H

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

struct Captured {
    int exit_code;   // of the child, or -1 if a signal ended it
    char text[8192]; // the child's stderr, up to this length
};

// A deadlocked child ends after five minutes, which gives -1. Other children need less time, even on a busy
// machine.
static inline struct Captured capture(void (*function)(void*), void* argument) {
    struct Captured captured = {-1, ""};
    int ends[2];
    fflush(NULL);
    if (pipe(ends) != 0) abort();
    pid_t child = fork();
    if (child < 0) abort();
    if (child == 0) {
        close(ends[0]);
        dup2(ends[1], STDERR_FILENO);
        alarm(300);
        function(argument);
        exit(0);
    }
    close(ends[1]);
    size_t used = 0;
    ssize_t got;
    while (used + 1 < sizeof(captured.text) &&
           (got = read(ends[0], captured.text + used, sizeof(captured.text) - used - 1)) > 0)
        used += (size_t)got;
    captured.text[used] = 0;
    close(ends[0]);
    int status;
    if (waitpid(child, &status, 0) != child) abort();
    if (WIFEXITED(status)) captured.exit_code = WEXITSTATUS(status);
    return captured;
}

#endif
