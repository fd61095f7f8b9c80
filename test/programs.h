/*
For tests that run the built programs: starts processes, checks their results and files, and makes token
shards.

    const Result* result = run("%s -x 3 -o first", trainer);     // a line of sh; the next call overwrites it
    must_end_well(result);
    must_fail_with(run("%s -b 0", trainer), 2, "--batch 0");
    must_be_same_run("first", "second", 3);
    pid_t job = start("build/train_gpt ...", "out.txt", "err.txt");   // beside the test

Include it after the tree's other headers, because cmocka.h defines a macro fail(). Files that must be equal
are compared byte by byte.
*/
#ifndef TEST_PROGRAMS_H
#define TEST_PROGRAMS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// snprintf() for output that must fit.
__attribute__((format(printf, 3, 4))) static inline void print_to(char* out, size_t size, const char* format,
                                                                  ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(out, size, format, arguments);
    va_end(arguments);
    assert_true(length >= 0 && (size_t)length < size);
}

// ----------------------------------------------------------------------------
// Running a program

typedef struct {
    int exit_code;   // 128 + the signal if one ended the process
    double peak;     // bytes of resident memory
    char out[65536]; // its stdout, cut at this length
    char err[8192];
} Result;

// Actions on the process while it runs. All zero: no action.
typedef struct {
    long kill_after_ms; // SIGKILL this long after its start; 0: none
    int signal;         // sent once `until_file` has `until_lines` lines; 0: none
    const char* until_file;
    int until_lines;
    long after_ms;     // delay between that line and the signal
    rlim_t file_bytes; // maximum size of a file that it writes; 0: no limit
} Treatment;

static inline void read_text(char* text, size_t size, const char* path) {
    FILE* file = fopen(path, "rb");
    assert_non_null(file);
    text[fread(text, 1, size - 1, file)] = 0;
    fclose(file);
}

static inline int count_lines(const char* path) {
    FILE* file = fopen(path, "rb");
    int lines = 0, c;
    while (file && (c = fgetc(file)) != EOF) lines += c == '\n';
    if (file) fclose(file);
    return lines;
}

static inline void sleep_ms(long ms) {
    struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&wait, NULL);
}

static inline double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

// The signals by which a run stops.
static const int stop_signals[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU};
enum { STOP_SIGNALS = sizeof(stop_signals) / sizeof(stop_signals[0]) };

// Call this in the child, before exec. If nohup or a script's background started the test, it ignores some
// signals, and its children would inherit that. SIGXCPU writes a core if the limit allows it, so the limit
// becomes 0.
static inline void heed_signals(void) {
    const struct rlimit no_core = {0, 0};
    (void)setrlimit(RLIMIT_CORE, &no_core);
    for (int i = 0; i < STOP_SIGNALS; i++) signal(stop_signals[i], SIG_DFL);
}

// Returns 1 if the process has ended. A later wait still gets its status.
static inline int has_ended(pid_t child) {
    siginfo_t info;
    memset(&info, 0, sizeof(info));
    waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT);
    return info.si_pid != 0;
}

// Waits until the file has this many lines; fails if the process ends before.
static inline void await_lines(pid_t child, const char* path, int lines) {
    while (count_lines(path) < lines) {
        assert_false(has_ended(child));
        sleep_ms(5);
    }
}

static inline void treat(pid_t child, const Treatment* treatment) {
    if (treatment->kill_after_ms) {
        sleep_ms(treatment->kill_after_ms);
        kill(child, SIGKILL);
    }
    while (treatment->signal && !has_ended(child)) {
        if (count_lines(treatment->until_file) >= treatment->until_lines) {
            sleep_ms(treatment->after_ms);
            kill(child, treatment->signal);
            break;
        }
        sleep_ms(2);
    }
}

// Runs a line of sh. The result is static: the next call overwrites it.
static inline const Result* run_treated(const Treatment* treatment, const char* line) {
    static Result result;
    char command[16384];
    print_to(command, sizeof(command), "exec %s", line);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        heed_signals();
        int out = open("stdout.txt", O_WRONLY | O_CREAT | O_TRUNC, 0666);
        int err = open("stderr.txt", O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (dup2(out, 1) < 0 || dup2(err, 2) < 0) _exit(126);
        if (treatment->file_bytes) {
            struct rlimit limit = {treatment->file_bytes, treatment->file_bytes};
            if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(126);
        }
        execl("/bin/sh", "sh", "-c", command, (char*)NULL);
        _exit(126);
    }
    treat(child, treatment);
    int status;
    struct rusage usage;
    assert_int_equal(wait4(child, &status, 0, &usage), child);
    result.exit_code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    result.peak = (double)usage.ru_maxrss * 1024;
    read_text(result.out, sizeof(result.out), "stdout.txt");
    read_text(result.err, sizeof(result.err), "stderr.txt");
    return &result;
}

// Runs a line that writes into `output`. The signal must reach the run. On a busy machine, a short run may
// end first; then this function repeats it from the start.
static inline const Result* run_interrupted(const Treatment* treatment, const char* line,
                                            const char* output) {
    char command[16384], remove[PATH_MAX];
    print_to(command, sizeof(command), "%s", line);
    print_to(remove, sizeof(remove), "rm -rf %s", output);
    const Result* result = run_treated(treatment, command);
    for (int i = 0; i < 100 && result->exit_code == 0; i++) {
        assert_int_equal(system(remove), 0);
        result = run_treated(treatment, command);
    }
    return result;
}

__attribute__((format(printf, 1, 2))) static inline const Result* run(const char* format, ...) {
    char line[8192];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    const Treatment nothing = {0};
    return run_treated(&nothing, line);
}

// Starts a line of sh and does not wait for it.
static inline pid_t start(const char* line, const char* out, const char* err) {
    char command[16384];
    print_to(command, sizeof(command), "exec %s >%s 2>%s", line, out, err);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        heed_signals();
        execl("/bin/sh", "sh", "-c", command, (char*)NULL);
        _exit(126);
    }
    return child;
}

// Waits for a process that start() returned. Returns its exit code, or 128 + the signal if one ended it.
static inline int end_of(pid_t child) {
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

// Checks that the process has no handler for the signals that stop a run, because a handler would use the
// stack of the code that it interrupts. All threads must block these signals except the thread that waits for
// them, which /proc shows as not blocking them.
static inline void must_take_signals_on_no_stack(pid_t process, int least_threads) {
    char path[320], text[8192];
    unsigned long long stopping = 0, blocked, caught;
    int threads = 0, waiting = 0;
    for (int i = 0; i < STOP_SIGNALS; i++) stopping |= 1ull << (stop_signals[i] - 1);
    print_to(path, sizeof(path), "/proc/%d/task", (int)process);
    DIR* tasks = opendir(path);
    assert_non_null(tasks);
    for (struct dirent* task; (task = readdir(tasks));) {
        if (task->d_name[0] == '.') continue;
        print_to(path, sizeof(path), "/proc/%d/task/%s/status", (int)process, task->d_name);
        read_text(text, sizeof(text), path);
        assert_int_equal(sscanf(strstr(text, "SigBlk:"), "SigBlk: %llx", &blocked), 1);
        assert_int_equal(sscanf(strstr(text, "SigCgt:"), "SigCgt: %llx", &caught), 1);
        assert_true((caught & stopping) == 0);
        threads++;
        if ((blocked & stopping) == stopping) continue;
        assert_true((blocked & stopping) == 0 && atoi(task->d_name) != (int)process);
        waiting++;
    }
    closedir(tasks);
    assert_true(waiting <= 1 && threads >= least_threads);
}

static inline void must_end_well(const Result* result) {
    if (result->exit_code != 0) print_error("exit code %d: %s\n", result->exit_code, result->err);
    assert_int_equal(result->exit_code, 0);
    assert_string_equal(result->err, "");
}

static inline void must_fail_with(const Result* result, int exit_code, const char* says) {
    if (result->exit_code != exit_code || !strstr(result->err, says)) print_error("%s", result->err);
    assert_int_equal(result->exit_code, exit_code);
    assert_non_null(strstr(result->err, says));
    assert_ptr_equal(strchr(result->err, '\n'), result->err + strlen(result->err) - 1);
}

// Runs a line of sh that prepares files.
__attribute__((format(printf, 1, 2))) static inline void shell(const char* format, ...) {
    char line[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    if (system(line) != 0) print_error("failed: %s\n", line);
    assert_int_equal(system("true"), 0);
}

// ----------------------------------------------------------------------------
// Files

static inline int exists(const char* path) {
    struct stat info;
    return lstat(path, &info) == 0;
}

static inline void must_equal(const char* a, const char* b) {
    const Result* result = run("cmp %s %s", a, b);
    if (result->exit_code) print_error("%s and %s differ: %s%s\n", a, b, result->out, result->err);
    assert_int_equal(result->exit_code, 0);
}

// Compares the parts of two runs that are deterministic.
static inline void must_be_same_run(const char* a, const char* b, int steps) {
    static const char* const parts[] = {"model.safetensors", "optimizer-00000-of-00001.safetensors"};
    char left[256], right[256];
    for (int i = 0; i < 2; i++) {
        print_to(left, sizeof(left), "%s/step_%08d/%s", a, steps, parts[i]);
        print_to(right, sizeof(right), "%s/step_%08d/%s", b, steps, parts[i]);
        must_equal(left, right);
    }
    print_to(left, sizeof(left), "%s/metrics.jsonl", a);
    print_to(right, sizeof(right), "%s/metrics.jsonl", b);
    must_equal(left, right);
}

// Reads the values of "key" in metrics.jsonl, in order.
static inline int read_metric(double* values, int most, const char* output, const char* key) {
    char path[256], wanted[64];
    static char text[1 << 20];
    print_to(path, sizeof(path), "%s/metrics.jsonl", output);
    print_to(wanted, sizeof(wanted), "\"%s\":", key);
    read_text(text, sizeof(text), path);
    int count = 0;
    for (char* at = text; count < most && (at = strstr(at, wanted)); at++)
        values[count++] = strtod(at + strlen(wanted), NULL);
    return count;
}

// The last `count` values of a metric, or all values if it is 0, must be close to the values of another run.
static inline void must_follow(const char* output, const char* yardstick, const char* key, int count,
                               double bound) {
    double got[64], want[64], worst = 0;
    const int values = read_metric(got, 64, output, key);
    assert_int_equal(values, read_metric(want, 64, yardstick, key));
    assert_true(values > 0 && values >= count);
    for (int i = count ? values - count : 0; i < values; i++) {
        const double off = fabs(got[i] / want[i] - 1);
        if (!(off <= bound))
            fail_msg("%s: %s %d is %.9g, %s has %.9g", output, key, i, got[i], yardstick, want[i]);
        worst = fmax(worst, off);
    }
    print_message("%s: %s within %.2g of %s\n", output, key, worst, yardstick);
}

// ----------------------------------------------------------------------------
// Token shards

enum { VOCABULARY = 97 };

typedef struct {
    int magic, version, tokens, vocabulary, hash; // the fields of the header
    int held;                                     // tokens that the file really contains
    int bad_at, bad_token;                        // place and value of one wrong token; bad_at -1: none
} Shard;

// Writes a text that a model can learn: two tokens follow each token much more often than all others.
static inline void write_shard(const char* path, Shard shard) {
    FILE* file = fopen(path, "wb");
    assert_non_null(file);
    int32_t header[256] = {shard.magic, shard.version, shard.tokens, shard.vocabulary, shard.hash};
    fwrite(header, sizeof(header), 1, file);
    uint64_t random = 12345 + (uint64_t)path[0];
    int token = 1;
    for (int i = 0; i < shard.held; i++) {
        uint32_t wide = (uint32_t)(i == shard.bad_at ? shard.bad_token : token);
        uint16_t narrow = (uint16_t)wide;
        if (shard.magic == 20240801) fwrite(&wide, 4, 1, file);
        else fwrite(&narrow, 2, 1, file);
        random = random * 6364136223846793005u + 1442695040888963407u;
        int choice = (int)(random >> 60);
        token = choice < 9 ? (token * 5 + 3) % VOCABULARY : choice < 15 ? (token + 7) % VOCABULARY : choice;
    }
    fclose(file);
}

static inline Shard good_shard(int tokens) {
    Shard shard = {20240520, 1, tokens, VOCABULARY, 0, tokens, -1, 0};
    return shard;
}

// ----------------------------------------------------------------------------
// The test's directory

static char top[PATH_MAX]; // the top of the source tree
static char directory[64]; // enter_directory() makes it; KEEP in the environment keeps it

// Changes from the top of the tree into a new directory for the test, and sets the
// environment of its programs. Returns 0 on success.
static inline int enter_directory(void) {
    print_to(directory, sizeof(directory), "/tmp/test_of_programs_XXXXXX");
    if (!realpath(".", top) || !mkdtemp(directory) || chdir(directory) != 0) return -1;
    // Threads that spin while they wait are slow on a busy machine.
    setenv("OMP_WAIT_POLICY", "passive", 0);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 0); // memory that a failing program still holds is not a leak
    setenv("LC_ALL", "C", 1);
    return 0;
}

static inline int leave_directory(void** state) {
    (void)state;
    if (chdir(top) != 0) return -1;
    if (!getenv("KEEP")) shell("rm -rf %s", directory);
    return 0;
}

#endif
