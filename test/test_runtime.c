/*
Tests the host-side headers of runtime/: learning-rate schedules, sampling, metrics, peak rates of GPUs, and
the statistics of MoBA's selections.
*/
// _GNU_SOURCE declares posix_openpt(), for the tests of the terminal.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "runtime/checks.h"
#include "runtime/gpus.h"
#include "runtime/limits.h"
#include "runtime/metrics.h"
#include "runtime/random.h"
#include "runtime/sampling.h"
#include "runtime/schedule.h"
#include "runtime/selection.h"
#include "runtime/signals.h"
#include "test/capture.h"
#include <sys/file.h>
#include <sys/resource.h>

// Simulates flock(): it fails with this error, or works normally if the error is 0.
static int lock_error = 0;
static int flock_or_fail(int file, int operation) {
    errno = lock_error;
    return lock_error ? -1 : flock(file, operation);
}
// run_lock() does not really pause here; the test counts its pauses. After three seconds, a test may end the
// holder of the lock, and then pauses are real.
static double paused_seconds = 0;
static pid_t ends_after_a_pause = 0;
static int pause_at_once(const struct timespec* wanted, struct timespec* left) {
    (void)left;
    paused_seconds += (double)wanted->tv_sec + 1e-9 * (double)wanted->tv_nsec;
    if (!ends_after_a_pause || paused_seconds < 3) return 0;
    kill(ends_after_a_pause, SIGKILL);
    return nanosleep(wanted, NULL);
}
#define flock flock_or_fail
#define nanosleep pause_at_once
#include "runtime/run_lock.h"
#undef nanosleep
#undef flock

// This include is last, because cmocka.h defines a macro `fail`.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

// ----------------------------------------------------------------------------
// Failures

// Each write() to this pipe stays one packet. A failure must be one write, so that
// lines of many processes do not mix.
static void a_failure_is_one_write(void** state) {
    (void)state;
    int ends[2];
    char text[256];
    assert_int_equal(pipe2(ends, O_DIRECT), 0);
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        live_line_shown = 1;
        fail_usage("--batch %d: %s", 0, "must be more");
    }
    const ssize_t got = read(ends[0], text, sizeof(text) - 1);
    assert_true(got > 0);
    text[got] = 0;
    assert_string_equal(text, "\nmoba.c: --batch 0: must be more\n");
    assert_int_equal(waitpid(child, NULL, 0), child);
    close(ends[0]);
    close(ends[1]);
}

// A message that is too long is truncated, but remains one line.
static void fail_at_length(void* text) { fail_usage("%s", (const char*)text); }
static void a_long_failure_is_a_line(void** state) {
    (void)state;
    static char text[5 * PATH_MAX];
    memset(text, 'x', sizeof(text) - 1);
    FILE* kept = tmpfile();
    assert_non_null(kept);
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        dup2(fileno(kept), STDERR_FILENO);
        fail_at_length(text);
    }
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_int_equal(fseek(kept, -1, SEEK_END), 0);
    assert_int_equal(ftell(kept), 4 * PATH_MAX - 2);
    assert_int_equal(fgetc(kept), '\n');
    fclose(kept);
}

// ----------------------------------------------------------------------------
// Signals. Each test sends signals to a child, which reports its progress with single bytes.

static int child_says; // the child's end of the pipe

static void say(char what) {
    const ssize_t wrote = write(child_says, &what, 1);
    if (wrote != 1) _exit(99);
}

static void must_say(int child, char what) {
    char said = 0;
    assert_int_equal(read(child, &said, 1), 1);
    assert_int_equal(said, what);
}

// Starts the child. *says receives the read end of its pipe.
static pid_t start_child(void (*what)(void), int* says) {
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        const struct rlimit no_core = {0, 0};
        setrlimit(RLIMIT_CORE, &no_core);
        for (int i = 0; i < SIGNALS_HANDLED; i++) signal(signals_handled[i], SIG_DFL);
        child_says = ends[1];
        what();
        _exit(98);
    }
    close(ends[1]);
    *says = ends[0];
    return child;
}

static int status_of(pid_t child, int says) {
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    close(says);
    return status;
}

// Waits until the waiting thread has taken every pending signal.
static void wait_until_none_is_pending(void) {
    sigset_t pending;
    do {
        sleep(0);
        sigpending(&pending);
        for (int i = 0; i < SIGNALS_HANDLED; i++)
            if (sigismember(&pending, signals_handled[i]))
                sigemptyset(&pending), sigaddset(&pending, SIGKILL);
    } while (sigismember(&pending, SIGKILL));
}

static void train_until_a_signal(void) {
    signals_start();
    signals_take();
    say('r');
    while (!signals_stop()) sched_yield();
}

static void stop_in_order(void) {
    train_until_a_signal();
    _exit(signals_stop());
}

static void stop_at_length(void) {
    train_until_a_signal();
    say('s');
    for (;;) pause();
}

static void is_not_training(void) {
    signals_start();
    say('r');
    for (;;) pause();
}

static char half_written[PATH_MAX];

static void is_loading(void) {
    scratch_path_begin(half_written);
    fclose(open_or_fail(half_written, "wb"));
    is_not_training();
}

static void has_trained(void) {
    signals_start();
    signals_take();
    signals_release();
    say('r');
    for (;;) pause();
}

static void a_signal_is_a_wish_to_stop_while_training(void** state) {
    (void)state;
    for (int i = 0; i < SIGNALS_HANDLED; i++) {
        const int number = signals_handled[i];
        int says;
        pid_t child = start_child(stop_in_order, &says);
        must_say(says, 'r');
        kill(child, number);
        int status = status_of(child, says);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), number);
        // Before and after the training loop, the signal ends the process.
        path_format(half_written, "/tmp/half_written_%d", (int)getpid());
        void (*const idle[])(void) = {is_loading, has_trained};
        for (int k = 0; k < 2; k++) {
            child = start_child(idle[k], &says);
            must_say(says, 'r');
            kill(child, number);
            status = status_of(child, says);
            assert_true(WIFSIGNALED(status) && WTERMSIG(status) == number);
            assert_false(path_exists(half_written));
        }
    }
}

// timeout(1) sends its signal twice in quick succession.
static void the_same_moment_again(void) {
    signals_same_seconds = 1000;
    train_until_a_signal();
    kill(getpid(), SIGTERM);
    kill(getpid(), SIGHUP);
    wait_until_none_is_pending();
    _exit(signals_stop());
}

static void at_once_the_second_time(void) {
    signals_same_seconds = 0;
    stop_at_length();
}

static void a_second_signal_ends_the_process(void** state) {
    (void)state;
    int says;
    pid_t child = start_child(the_same_moment_again, &says);
    must_say(says, 'r');
    kill(child, SIGTERM);
    int status = status_of(child, says);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == SIGTERM);
    child = start_child(at_once_the_second_time, &says);
    must_say(says, 'r');
    kill(child, SIGTERM);
    must_say(says, 's');
    kill(child, SIGXCPU); // the system repeats it every second
    kill(child, SIGINT);
    status = status_of(child, says);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT);
}

static void ignores_the_terminal(void) {
    signal(SIGHUP, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    stop_in_order();
}

static void ignored_signals_stay_ignored(void** state) {
    (void)state;
    int says;
    const pid_t child = start_child(ignores_the_terminal, &says);
    must_say(says, 'r');
    kill(child, SIGHUP);
    kill(child, SIGINT);
    kill(child, SIGUSR1);
    const int status = status_of(child, says);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == SIGUSR1);
}

static void time_is_over(void) { _exit(77); }

static void waits_for_a_clock(void) {
    signals_on_alarm(time_is_over);
    train_until_a_signal();
    if (signals_stop() != SIGALRM) _exit(1); // kill() sent it, not the clock
    alarm(1);
    for (;;) pause();
}

static void the_clock_is_no_signal(void** state) {
    (void)state;
    int says;
    const pid_t child = start_child(waits_for_a_clock, &says);
    must_say(says, 'r');
    kill(child, SIGALRM);
    const int status = status_of(child, says);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 77);
}

static int pipe_is_ignored;

static void writes_to_nobody(void) {
    int ends[2];
    signal(SIGPIPE, pipe_is_ignored ? SIG_IGN : SIG_DFL);
    if (pipe(ends) != 0 || dup2(ends[1], STDOUT_FILENO) < 0) _exit(99);
    signals_start();
    signals_take();
    if (signals_stop()) _exit(1); // stdout still has a reader
    close(ends[0]);
    (void)!write(STDOUT_FILENO, "x", 1);
    _exit(signals_stop());
}

static void output_without_a_reader_is_a_wish_to_stop(void** state) {
    (void)state;
    for (pipe_is_ignored = 0; pipe_is_ignored < 2; pipe_is_ignored++) {
        int says;
        const pid_t child = start_child(writes_to_nobody, &says);
        const int status = status_of(child, says);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == (pipe_is_ignored ? 0 : SIGPIPE));
    }
}

// ----------------------------------------------------------------------------
// Schedules

static void assert_close(double a, double b, double tolerance) {
    if (!(fabs(a - b) <= tolerance)) fail_msg("%.17g is not %.17g within %g", a, b, tolerance);
}

static void schedules_by_hand(void** state) {
    (void)state;
    Schedule s = {SCHEDULE_COSINE, 1.0, 10, 110, 0.1, SCHEDULE_DECAY_FRACTION};
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_WSD; kind++) {
        s.kind = (ScheduleKind)kind;
        for (int step = 0; step < 10; step++) assert_close(learning_rate(&s, step), (step + 1) / 10.0, 1e-15);
        assert_close(learning_rate(&s, 10), 1.0, 1e-15);
        double end = kind == SCHEDULE_CONSTANT ? 1.0 : 0.1;
        assert_close(learning_rate(&s, 110), end, 1e-15);
        assert_close(learning_rate(&s, 5000), end, 1e-15);
        for (int step = 10; step < 110; step++) // it never rises, and never falls below the end
            assert_true(learning_rate(&s, step + 1) <= learning_rate(&s, step) &&
                        learning_rate(&s, step) >= end);
        s.max_lr = 3e-4; // the rate is proportional to max_lr
        double scaled = learning_rate(&s, 95);
        s.max_lr = 1.0;
        assert_close(scaled, 3e-4 * learning_rate(&s, 95), 1e-18);
    }
    s.kind = SCHEDULE_COSINE;
    assert_close(learning_rate(&s, 60), 0.55, 1e-15);                           // half of the way
    assert_close(learning_rate(&s, 35), 0.1 + 0.9 * 0.8535533905932737, 1e-15); // (1 + cos(pi/4)) / 2
    assert_close(learning_rate(&s, 109), 0.1 + 0.9 * 0.00024671981713422, 1e-12);
    s.kind = SCHEDULE_LINEAR;
    assert_close(learning_rate(&s, 60), 0.55, 1e-15);
    assert_close(learning_rate(&s, 35), 0.775, 1e-15);
    s.kind = SCHEDULE_CONSTANT;
    assert_close(learning_rate(&s, 109), 1.0, 0.0);
    s.kind = SCHEDULE_WSD; // decays over 22 steps, from step 88 on
    assert_int_equal(schedule_decay_start(&s), 88);
    assert_close(learning_rate(&s, 88), 1.0, 0.0);
    assert_close(learning_rate(&s, 89), 0.1 + 0.9 * (1 - sqrt(1 / 22.0)), 1e-15);
    assert_close(learning_rate(&s, 99), 0.1 + 0.9 * (1 - sqrt(0.5)), 1e-15);
}

static void schedules_at_the_edges(void** state) {
    (void)state;
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_WSD; kind++) {
        for (int steps = 1; steps <= 12; steps++) {
            for (int warmup = 0; warmup <= 14; warmup++) {
                Schedule s = {(ScheduleKind)kind, 1.0, warmup, steps, 0.0, 0.5};
                for (int step = 0; step <= steps + 2; step++) {
                    double lr = learning_rate(&s, step);
                    assert_true(lr >= 0.0 && lr <= 1.0);
                    assert_true(step >= steps || lr > 0.0); // every step has a positive rate
                    if (step < warmup) assert_close(lr, (step + 1.0) / warmup, 1e-15);
                }
            }
        }
    }
    Schedule s = {SCHEDULE_WSD, 1.0, 9, 10, 0.0, 0.2}; // the warm-up overlaps the decay
    assert_int_equal(schedule_decay_start(&s), 9);
    Schedule odd = {SCHEDULE_WSD, 1.0, 0, 7, 0.0, 0.2}; // 5.6 steps before the decay, rounded down
    assert_int_equal(schedule_decay_start(&odd), 5);
    Schedule whole = {SCHEDULE_WSD, 1.0, 0, 5, 0.0, 0.8}; // (1 - 0.8) * 5 is a little below 1
    assert_int_equal(schedule_decay_start(&whole), 1);
}

// ----------------------------------------------------------------------------
// Sampling

enum { SMALL = 12 };

// Calculates the probabilities after temperature, top-k and top-p in the simplest way, by sorting.
static void brute_probabilities(double* p, const float* logits, int n, float temperature, int top_k,
                                float top_p) {
    int order[SMALL], count = 0;
    double weight[SMALL], top = -INFINITY;
    for (int i = 0; i < n; i++) {
        p[i] = 0.0;
        if (isnan(logits[i])) continue;
        order[count++] = i;
        if (logits[i] > top) top = logits[i];
    }
    for (int i = 1; i < count; i++) // stable insertion sort
        for (int j = i; j > 0 && logits[order[j]] > logits[order[j - 1]]; j--) {
            int swap = order[j];
            order[j] = order[j - 1];
            order[j - 1] = swap;
        }
    if (top_k > 0 && top_k < count) count = top_k;
    double total = 0.0, mass = 0.0;
    for (int i = 0; i < count; i++)
        total += weight[i] = exp(((double)logits[order[i]] - top) / (double)temperature);
    int kept = 0;
    while (kept < count && (kept == 0 || top_p >= 1.0f || mass < (double)top_p * total))
        mass += weight[kept++];
    for (int i = 0; i < kept; i++) p[order[i]] = weight[i] / mass;
}

static float random_logit(uint64_t seed, uint64_t i) {
    float x = (float)(3.0 * random_normal(seed, 1, i));
    if (seed % 3 == 0) x = roundf(x);                                  // ties
    if (seed % 5 == 0 && random_uniform(seed, 2, i) < 0.2) x = NAN;    // missing values
    if (seed % 7 == 0 && random_uniform(seed, 3, i) < 0.2) x = -1e30f; // a probability of zero
    return x;
}

// Over a fine grid of `uniform`, the frequency of each token must match its probability: the sampler divides
// [0, 1) into one interval for each token.
static void sampling_against_brute_force(void** state) {
    (void)state;
    const float temperatures[] = {0.3f, 1.0f, 2.5f}, top_ps[] = {1.0f, 0.9f, 0.5f, 0.1f, 1e-6f, 0.0f};
    const int top_ks[] = {0, 1, 3, SMALL - 1, SMALL, SMALL + 5, -1};
    enum { GRID = 500 };
    int workspace[SMALL];
    for (uint64_t seed = 1; seed <= 40; seed++) {
        float logits[SMALL];
        for (uint64_t i = 0; i < SMALL; i++) logits[i] = random_logit(seed, i);
        logits[seed % SMALL] = 1.0f; // at least one number
        for (int t = 0; t < 3; t++)
            for (int k = 0; k < 7; k++)
                for (int q = 0; q < 6; q++) {
                    double p[SMALL];
                    int hits[SMALL] = {0}, changes = 0, before = -1;
                    brute_probabilities(p, logits, SMALL, temperatures[t], top_ks[k], top_ps[q]);
                    for (int g = 0; g < GRID; g++) {
                        int token = sample_token(logits, SMALL, temperatures[t], top_ks[k], top_ps[q],
                                                 (g + 0.5) / GRID, workspace);
                        assert_true(token >= 0 && token < SMALL);
                        hits[token]++;
                        changes += token != before;
                        before = token;
                    }
                    assert_true(changes <= SMALL);
                    for (int i = 0; i < SMALL; i++) {
                        assert_true(hits[i] == 0 || p[i] > 0.0);
                        assert_close(hits[i] / (double)GRID, p[i], 1.01 / GRID);
                    }
                }
    }
}

static void sampling_frequencies(void** state) {
    (void)state;
    enum { V = 50, DRAWS = 200000 };
    static float logits[V];
    static int hits[V], workspace[V];
    for (uint64_t i = 0; i < V; i++) logits[i] = (float)random_normal(5, 5, i);
    for (uint64_t draw = 0; draw < DRAWS; draw++)
        hits[sample_token(logits, V, 0.9f, 0, 1.0f, random_uniform(11, 12, draw), workspace)]++;
    double total = 0.0, chi2 = 0.0;
    for (int i = 0; i < V; i++) total += exp((double)logits[i] / (double)0.9f);
    for (int i = 0; i < V; i++) {
        double expected = DRAWS * exp((double)logits[i] / (double)0.9f) / total;
        chi2 += (hits[i] - expected) * (hits[i] - expected) / expected;
    }
    assert_true(chi2 > 20.0 && chi2 < 95.0); // 49 degrees of freedom: outside with a chance of about 1e-4
}

static void sampling_edges(void** state) {
    (void)state;
    int workspace[8];
    const double below_one = 1.0 - 0x1p-53;
    float logits[8] = {0, 2, 5, 5, NAN, 5, -INFINITY, 1};
    for (double u = 0.0; u < 1.0; u += 0.1) {
        assert_int_equal(sample_token(logits, 8, 0.0f, 0, 1.0f, u, workspace), 2);  // lowest index of a tie
        assert_int_equal(sample_token(logits, 8, 1.0f, 1, 1.0f, u, workspace), 2);  // top_k is 1
        assert_int_equal(sample_token(logits, 8, 1.0f, 0, 1e-9f, u, workspace), 2); // top_p is tiny
        assert_int_equal(sample_token(logits, 8, 1e-30f, 2, 1.0f, u, workspace), u < 0.5 ? 2 : 3);
    }
    const int ks[] = {0, 3, 100};
    for (int k = 0; k < 3; k++) {
        assert_true(sample_token(logits, 8, 1.0f, ks[k], 1.0f, 0.0, workspace) >= 0);
        int token = sample_token(logits, 8, 1.0f, ks[k], 1.0f, below_one, workspace);
        assert_true(token >= 0 && token != 4 && token != 6);
    }
    float last[3] = {-INFINITY, 0,
                     1}; // rounding puts the draw at the very end; the token must still have weight
    assert_true(sample_token(last, 3, 1.0f, 0, 1.0f, 1.0, workspace) > 0);
    float infinite[4] = {1, INFINITY, 2, INFINITY};
    assert_int_equal(sample_token(infinite, 4, 1.0f, 0, 0.5f, 0.9, workspace), 1);
    int seen[4] = {0};
    for (int g = 0; g < 10; g++) seen[sample_token(infinite, 4, 1.0f, 0, 1.0f, g / 10.0, workspace)]++;
    assert_int_equal(seen[1], 5);
    assert_int_equal(seen[3], 5);
    float none[3] = {NAN, NAN, NAN}, masked[3] = {-INFINITY, NAN, -INFINITY};
    assert_int_equal(sample_token(none, 3, 1.0f, 0, 1.0f, 0.5, workspace), -1);
    assert_int_equal(sample_token(none, 3, 0.0f, 0, 1.0f, 0.5, workspace), -1);
    assert_int_equal(sample_token(masked, 3, 0.0f, 0, 1.0f, 0.5, workspace), 0);
    assert_true(sample_token(masked, 3, 1.0f, 0, 1.0f, 0.5, workspace) % 2 == 0);
    assert_int_equal(sample_token(logits, 1, 1.0f, 0, 0.9f, below_one, workspace), 0);
    assert_int_equal(sampling_workspace_bytes(8), sizeof(workspace));
}

// ----------------------------------------------------------------------------
// Metrics

static char folder[] = "/tmp/test_runtime_XXXXXX";

static int setup_folder(void** state) {
    (void)state;
    strcpy(folder + strlen(folder) - 6, "XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void** state) {
    (void)state;
    remove_path(folder);
    return path_exists(folder) ? -1 : 0;
}

static char* contents(const char* name) {
    char path[PATH_MAX];
    path_format(path, "%s/%s", folder, name);
    return read_file_or_fail(path, NULL);
}

static void append(const char* name, const char* text) {
    char path[PATH_MAX];
    path_format(path, "%s/%s", folder, name);
    FILE* file = open_or_fail(path, "ab");
    write_or_fail(text, strlen(text), file, path);
    close_written_or_fail(file, path);
}

static MetricsOptions run_options(int resume_step, int log_every) {
    MetricsOptions o;
    memset(&o, 0, sizeof(o));
    o.directory = folder;
    o.resume_step = resume_step;
    o.tokens_before = 1000 * (uint64_t)resume_step;
    o.total_steps = 20;
    o.log_every = log_every;
    o.tokens_per_step = 1000;
    o.quiet = 1;
    metrics_describe_text(&o, "model", "d\"1\\2\n");
    metrics_describe_number(&o, "seed", 1234567890123.0);
    metrics_describe_number(&o, "lr", 3e-4);
    return o;
}

// These losses print the same as floats and as doubles.
static double loss_of(int step) { return round(256.0 / sqrt(step + 1.0)) / 64.0; }

// Trains from step `first` to step `last` and validates every 5 steps: before a step, as a
// training loop does, and after the last one. validate_again: like a resumed loop, it
// repeats the validation at its first step.
static void run_steps(Metrics* m, int first, int last, int validate_again) {
    for (int step = first; step <= last; step++) {
        if ((step % 5 == 0 && (step > first || step == 0 || validate_again)) || step == 20)
            metrics_validation(m, step, loss_of(step) / 4.0, 0.25);
        if (step == last) break;
        metrics_step(m, step + 1, loss_of(step), 1.0 / (step + 3), 3e-4 * (20 - step) / 20, 0.125, 0.03125);
    }
}

// Returns the number of lines of a text.
static int line_count(const char* text) {
    int lines = 0;
    for (; *text; text++) lines += *text == '\n';
    return lines;
}

// The files must have a line for every step, even if the display shows few of them.
static void metrics_lines(void** state) {
    (void)state;
    MetricsOptions o = run_options(0, 10);
    o.flops_per_step = 1e9;
    o.peak_flops = 1e12;
    Metrics* m = (Metrics*)malloc_or_fail(sizeof(Metrics), "a test");
    metrics_start(m, &o);
    run_steps(m, 0, 20, 0);
    metrics_event(m, "checkpoint", 20, 1.5);
    metrics_sync(m);
    metrics_finish(m);
    char* text = contents("metrics.jsonl");
    assert_int_equal(line_count(text), 1 + 20 + 5);
    assert_ptr_equal(
        text,
        strstr(text,
               "{\"event\":\"start\",\"model\":\"d\\\"1\\\\2\\u000a\",\"seed\":1234567890123,\"lr\":0.0003}\n"
               "{\"step\":0,\"tokens\":0,\"val_loss\":1}\n"
               "{\"step\":1,\"tokens\":1000,\"loss\":4,\"grad_norm\":0.3333333333333333,\"lr\":0.0003}\n"
               "{\"step\":2,\"tokens\":2000,\"loss\":2.828125,\"grad_norm\":0.25,\"lr\":0.000285}\n"));
    assert_non_null(
        strstr(text, "{\"step\":20,\"tokens\":20000,\"loss\":0.890625,\"grad_norm\":0.045454545454545456,"
                     "\"lr\":1.4999999999999999e-05}\n"
                     "{\"step\":20,\"tokens\":20000,\"val_loss\":0.21875}\n"));
    free(text);
    text = contents("main.log");
    assert_int_equal(line_count(text), 20 + 5);
    assert_ptr_equal(text, strstr(text, "s:0 tel:1.0000\n"
                                        "s:0 trl:4.0000 lr:0.000300 norm:0.33\n"));
    assert_non_null(strstr(text, "s:9 trl:1.2656 lr:0.000165 norm:0.08\n"
                                 "s:10 tel:0.3008\n"));
    free(text);
    text = contents("timings.jsonl");
    assert_non_null(strstr(text, ",\"tokens_per_second\":8000.0,\"step_ms\":125.000,\"attention_ms\":31.250,"
                                 "\"flops_per_second\":8e+09,\"mfu\":0.0080}\n"));
    assert_non_null(strstr(text, "{\"event\":\"checkpoint\",\"step\":20,\"seconds\":0.0"));
    assert_non_null(strstr(text, "\"spent\":1.500}\n"));
    free(text);
    free(m);
}

static void metrics_numbers_read_back(void** state) {
    (void)state;
    char text[METRICS_NUMBER_BYTES];
    for (uint64_t i = 0; i < 20000; i++) {
        uint64_t bits[2];
        random_bits(bits, 3, 4, i);
        double x;
        float f;
        memcpy(&x, &bits[0], sizeof(x));
        memcpy(&f, &bits[1], sizeof(f));
        if (isfinite(x)) {
            metrics_number(text, x);
            double back = strtod(text, NULL);
            assert_memory_equal(&back, &x, sizeof(x));
        }
        if (isfinite(f)) {
            metrics_number(text, (double)f);
            float back = strtof(text, NULL);
            assert_memory_equal(&back, &f, sizeof(f));
        }
    }
    metrics_number(text, NAN);
    assert_string_equal(text, "null");
    metrics_number(text, -INFINITY);
    assert_string_equal(text, "-1e999");
    metrics_number(text, 0.0);
    assert_string_equal(text, "0");
}

// A kill comes some steps after the checkpoint, with a half-written line. The resumed run must
// write the same bytes as an uninterrupted run.
static void metrics_resume_is_seamless(void** state) {
    (void)state;
    Metrics* m = (Metrics*)malloc_or_fail(sizeof(Metrics), "a test");
    const int log_everys[] = {1, 3};
    for (int l = 0; l < 2; l++) {
        MetricsOptions o = run_options(0, log_everys[l]);
        metrics_start(m, &o);
        run_steps(m, 0, 20, 0);
        metrics_finish(m);
        char *metrics = contents("metrics.jsonl"), *log = contents("main.log");
        for (int checkpoint = 1; checkpoint <= 20; checkpoint += 3 + l) {
            for (int killed = checkpoint; killed <= 20; killed += 3 + checkpoint % 7) {
                o = run_options(0, log_everys[l]);
                metrics_start(m, &o);
                run_steps(m, 0, killed, 0);
                m->clock_start -= 100.0; // simulates the elapsed time
                metrics_event(m, "checkpoint", checkpoint, 0.0);
                m->clock_start -= 1000.0;
                metrics_event(m, "checkpoint", killed + 1, 0.0);
                metrics_finish(m);
                append("metrics.jsonl", "{\"step\":1,\"tok");
                append("timings.jsonl", "{\"step\":1,\"tokens\":1000,\"seconds\":777777");
                append("main.log", "s:1 tr");

                o = run_options(checkpoint, log_everys[l]);
                metrics_start(m, &o);
                assert_close(m->seconds_before, 100.0, 5.0);
                run_steps(m, checkpoint, 20, killed % 2);
                metrics_finish(m);
                char *again = contents("metrics.jsonl"), *log_again = contents("main.log");
                assert_string_equal(again, metrics);
                assert_string_equal(log_again, log);
                free(again);
                free(log_again);
            }
        }
        free(metrics);
        free(log);
    }
    char path[PATH_MAX];
    path_format(path, "%s/metrics.jsonl.partial", folder);
    assert_false(path_exists(path));
    free(m);
}

// The token counts are the tokens seen so far, even if a resume changed the size of
// a step. timings.jsonl reports the change.
static void metrics_count_tokens_seen(void** state) {
    (void)state;
    Metrics* m = (Metrics*)malloc_or_fail(sizeof(Metrics), "a test");
    MetricsOptions o = run_options(0, 1);
    metrics_start(m, &o);
    run_steps(m, 0, 5, 0);
    metrics_finish(m);
    o = run_options(5, 1);
    o.tokens_per_step = 400;
    metrics_start(m, &o);
    metrics_changes(m, 5, "--total-batch 1000 to 400, \"quoted\"");
    run_steps(m, 5, 20, 1);
    metrics_member(m, 20, "heads", "[]");
    metrics_finish(m);
    char* text = contents("metrics.jsonl");
    assert_non_null(strstr(text, "{\"step\":5,\"tokens\":5000,\"loss\""));
    assert_non_null(strstr(text, "{\"step\":5,\"tokens\":5000,\"val_loss\""));
    assert_non_null(strstr(text, "{\"step\":6,\"tokens\":5400,\"loss\""));
    assert_non_null(strstr(text, "{\"step\":20,\"tokens\":11000,\"val_loss\""));
    assert_non_null(strstr(text, "{\"step\":20,\"tokens\":11000,\"heads\""));
    free(text);
    text = contents("timings.jsonl");
    assert_non_null(strstr(text, "{\"event\":\"changes\",\"step\":5,"));
    assert_non_null(strstr(text, "\"changes\":\"--total-batch 1000 to 400, \\\"quoted\\\"\"}\n"));
    assert_non_null(strstr(text, "{\"step\":6,\"tokens\":5400,"));
    free(text);
    free(m);
}

// If a signal interrupts the measurements after step 3, a resume removes their lines. It keeps the lines
// of the step itself and of earlier steps.
static void metrics_of_a_step_to_measure_again(void** state) {
    (void)state;
    Metrics* m = (Metrics*)malloc_or_fail(sizeof(Metrics), "a test");
    for (int unmeasured = 0; unmeasured < 2; unmeasured++) {
        MetricsOptions o = run_options(0, 1);
        metrics_start(m, &o);
        for (int step = 1; step <= 3; step++) {
            metrics_step(m, step, 1.0, 1.0, 1e-3, 0.1, 0.01);
            metrics_validation(m, step, 1.5, 0.1);
            metrics_member(m, step, "heads", "[]");
        }
        metrics_finish(m);
        o = run_options(3, 1);
        o.unmeasured = unmeasured;
        metrics_start(m, &o);
        assert_int_equal(m->last_validation, unmeasured ? 2 : 3);
        metrics_finish(m);
        char *metrics = contents("metrics.jsonl"), *timings = contents("timings.jsonl"),
             *log = contents("main.log");
        assert_non_null(strstr(metrics, "{\"step\":2,\"tokens\":2000,\"heads\":[]}"));
        assert_non_null(strstr(metrics, "{\"step\":3,\"tokens\":3000,\"loss\":"));
        assert_non_null(strstr(timings, "{\"step\":3,"));
        assert_non_null(strstr(log, "s:2 trl"));
        const char* const dropped[] = {strstr(metrics, "{\"step\":3,\"tokens\":3000,\"val_loss\":"),
                                       strstr(metrics, "{\"step\":3,\"tokens\":3000,\"heads\":"),
                                       strstr(log, "s:3 tel")};
        for (int i = 0; i < 3; i++) assert_int_equal(dropped[i] == NULL, unmeasured);
        free(metrics);
        free(timings);
        free(log);
    }
    free(m);
}

static void metrics_resume_oddities(void** state) {
    (void)state;
    Metrics* m = (Metrics*)malloc_or_fail(sizeof(Metrics), "a test");
    // There is no run to resume, so the files begin here.
    MetricsOptions o = run_options(4, 1);
    metrics_start(m, &o);
    run_steps(m, 4, 6, 0);
    metrics_finish(m);
    char* text = contents("metrics.jsonl");
    assert_ptr_equal(strstr(text, "{\"event\":\"start\","), text);
    assert_non_null(strstr(text, "\n{\"step\":5,"));
    free(text);
    // Another description: the files get it once, however often a run resumes with
    // it. An earlier resume removes it.
    for (int i = 0; i < 3; i++) {
        o = run_options(6, 1);
        metrics_describe_text(&o, "more", "}\"step\":3,");
        metrics_start(m, &o);
        metrics_finish(m);
    }
    text = contents("metrics.jsonl");
    char* resumed = strstr(text, "{\"event\":\"resume\",\"step\":6,\"model\":");
    assert_non_null(resumed);
    assert_null(strstr(resumed + 8, "\"event\""));
    free(text);
    o = run_options(5, 1);
    metrics_start(m, &o);
    metrics_finish(m);
    text = contents("metrics.jsonl");
    assert_null(strstr(text, "resume"));
    free(text);
    // Invalid lines, trailing zeros as after a power cut, and lines without content.
    append("metrics.jsonl", "\n\nrubbish\n{\n}\n{\"step\":}\n{\"event\":\"x\"}\n{\"step\":3,\"x\":1}\n{"
                            "\"step\":99,}\n{\"step\":2,\"cut\n");
    o = run_options(5, 1);
    metrics_start(m, &o);
    metrics_finish(m);
    text = contents("metrics.jsonl");
    assert_null(strstr(text, "rubbish"));
    assert_null(strstr(text, "\"step\":99"));
    assert_null(strstr(text, "cut"));
    assert_non_null(strstr(text, "{\"step\":3,\"x\":1}\n"));
    free(text);
    // Zeros in the middle, as after a power cut: between two lines, before a line, and inside one.
    char path[PATH_MAX];
    path_format(path, "%s/metrics.jsonl", folder);
    FILE* zeros = open_or_fail(path, "ab");
    static const char damaged[] = "{\"step\":3,\"x\":2}\n\0\0\0\n\0\0{\"step\":3,\"x\":3}\n"
                                  "{\"step\":3,\"to\0\0rn\"}\n{\"step\":3,\"x\":4}\n\0\0";
    write_or_fail(damaged, sizeof(damaged), zeros, path);
    close_written_or_fail(zeros, path);
    o = run_options(5, 1);
    metrics_start(m, &o);
    metrics_finish(m);
    text = contents("metrics.jsonl");
    assert_non_null(strstr(text, "{\"step\":3,\"x\":2}\n{\"step\":3,\"x\":3}\n{\"step\":3,\"x\":4}\n"));
    assert_null(strstr(text, "rn"));
    free(text);
    // A run without a description, and a run without files.
    memset(&o, 0, sizeof(o));
    o.quiet = 1;
    metrics_start(m, &o);
    run_steps(m, 0, 20, 0);
    metrics_sync(m);
    metrics_finish(m);
    o.directory = folder;
    metrics_start(m, &o);
    metrics_finish(m);
    text = contents("metrics.jsonl");
    assert_string_equal(text, "{\"event\":\"start\"}\n");
    free(text);
    free(m);
}

static void write_to_a_full_disk(void* name) {
    char path[PATH_MAX];
    path_format(path, "%s/%s", folder, (const char*)name);
    unlink(path);
    if (symlink("/dev/full", path) != 0) exit(9);
    static Metrics m;
    MetricsOptions o = run_options(0, 1);
    metrics_start(&m, &o);
    run_steps(&m, 0, 20, 0);
}

static void metrics_on_a_full_disk(void** state) {
    (void)state;
    const char* names[] = {"metrics.jsonl", "timings.jsonl", "main.log"};
    for (int i = 0; i < 3; i++) {
        struct Captured c = capture(write_to_a_full_disk, (void*)names[i]);
        char expected[PATH_MAX + 64], path[PATH_MAX];
        path_format(path, "%s/%s", folder, names[i]);
        snprintf(expected, sizeof(expected), "moba.c: %s: cannot write: No space left on device\n", path);
        assert_string_equal(c.text, expected);
        assert_int_equal(c.exit_code, 1);
        unlink(path);
    }
}

static void describe_too_much(void* unused) {
    (void)unused;
    static MetricsOptions o;
    for (int i = 0; i < 100; i++)
        metrics_describe_text(&o, "key", "a value of some fifty bytes, again and again ....");
    assert_true(strlen(o.description) < METRICS_DESCRIPTION_BYTES);
    for (int i = 0; i < 100; i++)
        metrics_describe_text(&o, "key", "a value of some fifty bytes, again and again ....");
}

static void metrics_description_is_bounded(void** state) {
    (void)state;
    struct Captured c = capture(describe_too_much, NULL);
    assert_string_equal(c.text, "moba.c: the run's description is longer than 8192 bytes at \"key\"\n");
    assert_int_equal(c.exit_code, 1);
}

// ----------------------------------------------------------------------------
// GPUs

// A name with only the beginning or the end of a known one is another GPU, with another peak.
static void gpu_peaks_are_known_or_not_given(void** state) {
    (void)state;
    assert_true(gpu_peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12);
    assert_true(gpu_peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12);
    assert_true(gpu_peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12);
    assert_true(gpu_peak_flops("NVIDIA GeForce RTX 4090", "bf16") == 165.2e12);
    static const char* const unknown[] = {"",
                                          "NVIDIA",
                                          "NVIDIA H100",
                                          "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
                                          "NVIDIA H200 NVL",
                                          "NVIDIA GeForce RTX 4090 Laptop GPU",
                                          "NVIDIA GeForce RTX 4090 D",
                                          "GeForce RTX 4090",
                                          "NVIDIA L40"};
    for (size_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++)
        assert_true(gpu_peak_flops(unknown[i], "bf16") == 0);
    assert_true(gpu_peak_flops("NVIDIA H200", "fp32") == 0);
}

// ----------------------------------------------------------------------------
// The terminal

// In a file, metrics show a plain line every log_every steps.
static void metrics_in_a_file(void** state) {
    (void)state;
    char* text = NULL;
    size_t length = 0;
    char path[PATH_MAX];
    path_format(path, "%s/shown", folder);
    MetricsOptions o = run_options(0, 10);
    o.directory = NULL;
    o.quiet = 0;
    o.terminal = open_or_fail(path, "wb");
    o.flops_per_step = 1e9;
    Metrics* m = (Metrics*)malloc_or_fail(sizeof(Metrics), "a test");
    metrics_start(m, &o);
    assert_false(m->live);
    run_steps(m, 0, 20, 0);
    metrics_message(m, "a message, %d", 7);
    metrics_finish(m);
    fclose(o.terminal);
    text = read_file_or_fail(path, &length);
    assert_null(strchr(text, '\r'));
    assert_null(strchr(text, '\033'));
    assert_int_equal(line_count(text), 5 + 3 + 1); // validations, steps 1, 10, 20, the message
    assert_non_null(
        strstr(text, "step 10/20  loss 1.2656  norm 0.08  lr 1.65e-04  8.00k tok/s  8.0 GFLOP/s  ETA 0s\n"));
    assert_non_null(strstr(text, "step 5/20  validation loss 0.4102  (0.2 s)\n"));
    assert_non_null(strstr(text, "\na message, 7\n"));
    free(text);
    free(m);
}

// Checks the output for a terminal of 60 columns, and the text that such a terminal would show in the end.
static void metrics_on_a_terminal(void** state) {
    (void)state;
    int screen = posix_openpt(O_RDWR | O_NOCTTY);
    if (screen < 0 || grantpt(screen) != 0 || unlockpt(screen) != 0) {
        print_message("SKIPPED: no pseudo-terminal can be had here\n");
        skip();
    }
    struct winsize size = {24, 60, 0, 0};
    ioctl(screen, TIOCSWINSZ, &size);
    int program = open(ptsname(screen), O_RDWR | O_NOCTTY);
    if (program < 0) {
        print_message("SKIPPED: the pseudo-terminal cannot be opened: %s\n", strerror(errno));
        skip();
    }
    MetricsOptions o = run_options(0, 5);
    o.directory = NULL;
    o.quiet = 0;
    o.terminal = fdopen(program, "w");
    Metrics* m = (Metrics*)malloc_or_fail(sizeof(Metrics), "a test");
    metrics_start(m, &o);
    assert_true(m->live);
    metrics_message(m, "hello");
    run_steps(m, 0, 20, 0);
    metrics_message(m, "goodbye");
    metrics_finish(m);
    fputs("$ ", o.terminal);
    fflush(o.terminal);
    char got[16384], row[128] = "", rows[64][128];
    ssize_t length = 0;
    while (length < 2 || memcmp(got + length - 2, "$ ", 2) != 0) { // read() may return a part of it
        ssize_t more = read(screen, got + length, sizeof(got) - (size_t)length);
        assert_true(more > 0);
        length += more;
    }
    int column = 0, count = 0;
    for (ssize_t i = 0; i < length && count < 64; i++) {
        if (got[i] == '\r') {
            column = 0;
        } else if (got[i] == '\n') {
            strcpy(rows[count++], row);
            memset(row, 0, sizeof(row));
        } else if (!strncmp(got + i, "\033[K", 3)) {
            memset(row + column, 0, sizeof(row) - (size_t)column);
            i += 2;
        } else {
            assert_true(column < 59); // the last column stays empty
            row[column++] = got[i];
        }
    }
    assert_int_equal(count, 1 + 5 + 1 + 1); // hello, validations, goodbye, the last progress line
    assert_string_equal(rows[0], "hello");
    assert_string_equal(rows[2], "step 5/20  validation loss 0.4102  (0.2 s)");
    assert_string_equal(rows[6], "goodbye");
    assert_ptr_equal(strstr(rows[7], "20/20  loss 0.8906  norm 0.05  lr 1.50e-05  8.00k tok/s  "), rows[7]);
    assert_string_equal(row, "$ ");
    fclose(o.terminal);
    close(screen);
    free(m);
}

static void metrics_short_forms(void** state) {
    (void)state;
    char text[METRICS_NUMBER_BYTES];
    const double numbers[] = {0, 7.4, 999, 999.6, 1234, 99960, 999600, 1234567, 4.2e13};
    const char* shorts[] = {"0", "7", "999", "1.00k", "1.23k", "100k", "1.00M", "1.23M", "42.0T"};
    for (int i = 0; i < 9; i++) {
        metrics_short(text, numbers[i]);
        assert_string_equal(text, shorts[i]);
    }
    const double durations[] = {0, 59.4, 59.6, 3599, 3723, 86399, 86400 * 3 + 3600 * 4, INFINITY};
    const char* spoken[] = {"0s", "59s", "1m00s", "59m59s", "1h02m", "23h59m", "3d04h", "0s"};
    for (int i = 0; i < 8; i++) {
        metrics_duration(text, durations[i]);
        assert_string_equal(text, spoken[i]);
    }
}

// ----------------------------------------------------------------------------
// Statistics of MoBA's selections

// One head of dimension 1, calculated by hand. Its keys are so far apart that the softmax puts everything on
// one block. Blocks have 2 keys, K = 2, and the sampled rows are 4..7, each twice.
static void selection_by_hand(void** state) {
    (void)state;
    enum { T = 8, S = 2, K = 2 };
    floatX qkv[T * 3];
    const floatX keys[T] = {60, 0, 0, 0, 0, 0, 0, 0};
    for (int t = 0; t < T; t++) {
        qkv[3 * t] = 1;
        qkv[3 * t + 1] = keys[t];
        qkv[3 * t + 2] = 0;
    }
    const int right[T] = {-1, -1, 0, 0, 0, 0, 0, 0}, wrong[T] = {-1, -1, 0, 0, 1, 1, 2, 0}, map[1] = {0};
    SelectionStats stats;
    selection_start(&stats);
    selection_add(&stats, qkv, right, map, T, 1, 1, 1, S, K);
    assert_int_equal((int)stats.rows, SELECTION_ROWS);
    assert_close(stats.captured, SELECTION_ROWS, 1e-12);
    assert_close(stats.best, SELECTION_ROWS, 1e-12);
    assert_close(stats.recall, SELECTION_ROWS, 0);
    assert_close(stats.chance, 4 / 2.0 + 4 / 3.0, 1e-12); // chances among two blocks, then among three
    assert_close(stats.ages[0], 2, 0);                    // rows 2 and 3: the previous block
    assert_close(stats.ages[1], 4, 0);                    // two and three blocks earlier
    assert_close(stats.heaviest, 6.0 / T, 0);
    assert_close(stats.load / stats.lists, 2.0 / T, 1e-15);
    selection_start(&stats);
    selection_add(&stats, qkv, wrong, map, T, 1, 1, 1, S, K);
    assert_close(stats.captured, 2, 1e-12); // only row 7
    assert_close(stats.best, SELECTION_ROWS, 1e-12);
    assert_close(stats.recall, 2, 0);
    assert_close(stats.ages[0], 5, 0);
    assert_close(stats.ages[1], 1, 0);
    assert_close(stats.heaviest, 3.0 / T, 0);
}

// Random grouped heads. The test calculates each row's attention and its best blocks in another way.
// If K S reaches T, there are no statistics.
static void selection_of_heads(void** state) {
    (void)state;
    enum { T = 75, H = 4, G = 2, D = 3, S = 8, K = 3, W = (H + 2 * G) * D };
    floatX qkv[T * W];
    int selected[H * T * (K - 1)];
    const int map[H] = {0, 0, 0, 1};
    for (int i = 0; i < T * W; i++) qkv[i] = (floatX)random_normal(5, 1, (uint64_t)i);
    for (int i = 0; i < H * T; i++) { // selects the second and third block before the own block
        const int past = i % T / S;
        selected[2 * i] = past > 1 ? past - 2 : -1;
        selected[2 * i + 1] = past > 2 ? past - 3 : -1;
    }
    SelectionStats stats;
    selection_start(&stats);
    selection_add(&stats, qkv, selected, map, T, H, G, D, S, K);
    double captured = 0, best = 0, recall = 0;
    for (int row = 0; row < H * SELECTION_ROWS; row++) {
        const int h = row / SELECTION_ROWS,
                  t = K * S + (int)((row % SELECTION_ROWS + 0.5) / SELECTION_ROWS * (T - K * S));
        double mass[T / S + 1] = {0}, total = 0;
        for (int i = 0; i <= t; i++) {
            double score = 0;
            for (int d = 0; d < D; d++)
                score += (double)qkv[t * W + h * D + d] * (double)qkv[i * W + (H + map[h]) * D + d];
            mass[i / S] += exp(score / sqrt(D));
            total += exp(score / sqrt(D));
        }
        const int own = t / S, chosen[2] = {own - 2, own - 3};
        double pair = 0;
        int most[2] = {0, 1};
        for (int i = 0; i < own; i++)
            for (int j = i + 1; j < own; j++)
                if (mass[i] + mass[j] > pair) {
                    pair = mass[i] + mass[j];
                    most[0] = i;
                    most[1] = j;
                }
        captured += (mass[own] + mass[chosen[0]] + mass[chosen[1]]) / total;
        best += (mass[own] + pair) / total;
        for (int k = 0; k < 2; k++) recall += (chosen[k] == most[0]) + (chosen[k] == most[1]);
    }
    assert_int_equal((int)stats.rows, H * SELECTION_ROWS);
    assert_close(stats.captured, captured, 1e-9);
    assert_close(stats.best, best, 1e-9);
    assert_close(stats.recall, recall / 2, 1e-12);
    assert_true(stats.captured < stats.best && stats.recall > 0);

    selection_start(&stats);
    selection_add(&stats, qkv, selected, map, K * S, 1, 1, D, S, K); // any data will do
    assert_int_equal((int)stats.rows, 0);
}

// ----------------------------------------------------------------------------
// The lock of a run's directory

static void lock_folder(void* unused) {
    (void)unused;
    run_lock(folder);
    run_lock(folder); // the same process may lock again
}

static void hold_the_lock(void) {
    run_lock(folder);
    say('l');
    for (;;) pause();
}

static void a_directory_has_one_lock(void** state) {
    (void)state;
    char path[PATH_MAX], who[64];
    int says;
    path_format(path, "%s/lock", folder);
    assert_int_equal(capture(lock_folder, NULL).exit_code, 0);
    assert_false(path_exists(path)); // the exit removes it
    const pid_t holder = start_child(hold_the_lock, &says);
    must_say(says, 'l');
    struct Captured refused = capture(lock_folder, NULL);
    assert_int_equal(refused.exit_code, 1);
    snprintf(who, sizeof(who), "another run is at work there: pid %d on ", (int)holder);
    assert_non_null(strstr(refused.text, who));
    assert_non_null(strstr(refused.text, " since 2"));
    assert_ptr_equal(strchr(refused.text, '\n') + 1, refused.text + strlen(refused.text));
    // The user may delete the lock file.
    unlink(path);
    assert_int_equal(capture(lock_folder, NULL).exit_code, 0);
    kill(holder, SIGKILL);
    (void)status_of(holder, says);
}

static void a_dead_holder_has_no_lock(void** state) {
    (void)state;
    char path[PATH_MAX];
    int says;
    path_format(path, "%s/lock", folder);
    const pid_t holder = start_child(hold_the_lock, &says);
    must_say(says, 'l');
    kill(holder, SIGKILL);
    (void)status_of(holder, says);
    assert_true(path_exists(path));
    const struct Captured next = capture(lock_folder, NULL);
    assert_int_equal(next.exit_code, 0);
    assert_string_equal(next.text, "");
}

// Also reads stdout. The exit code is the time that run_lock() waited, in tenths of a second.
static void wait_for_the_lock(void* unused) {
    (void)unused;
    dup2(STDERR_FILENO, STDOUT_FILENO);
    run_lock(folder);
    exit(paused_seconds < 10 ? (int)(10 * paused_seconds + 0.5) : 255);
}

// The ranks of a killed mpirun hold the lock for some seconds longer.
static void an_ending_holder_is_waited_for(void** state) {
    (void)state;
    int says;
    const pid_t holder = start_child(hold_the_lock, &says);
    must_say(says, 'l');
    ends_after_a_pause = holder;
    const struct Captured waited = capture(wait_for_the_lock, NULL);
    ends_after_a_pause = 0;
    assert_in_range(waited.exit_code, 30, 99);
    assert_non_null(strstr(waited.text, "waiting for another run"));
    assert_ptr_equal(strchr(waited.text, '\n') + 1, waited.text + strlen(waited.text));
    (void)status_of(holder, says);
}

// Acts as a user who may read the lock file but not write it. Root may write
// everything, so it becomes another user.
static void lock_folder_as_another(void* unused) {
    if (getuid() == 0 && setuid(65534) != 0) exit(9);
    lock_folder(unused);
}

static void hold_the_lock_as_another(void) {
    char path[PATH_MAX];
    path_format(path, "%s/lock", folder);
    const int file = open(path, O_RDONLY);
    if (file < 0 || flock(file, LOCK_EX) != 0) _exit(97);
    say('l');
    for (;;) pause();
}

static void a_lock_of_another_user(void** state) {
    (void)state;
    char path[PATH_MAX];
    int says;
    path_format(path, "%s/lock", folder);
    static const mode_t modes[] = {0777, 01777}; // the sticky bit keeps the file of root
    for (int i = 0; i < 2; i++) {
        FILE* file = open_or_fail(path, "wb");
        write_or_fail("pid 7 on host\n", 14, file, path);
        close_written_or_fail(file, path);
        assert_int_equal(chmod(path, 0444) || chmod(folder, modes[i]), 0);
        const pid_t holder = start_child(hold_the_lock_as_another, &says);
        must_say(says, 'l');
        const struct Captured refused = capture(lock_folder_as_another, NULL);
        assert_int_equal(refused.exit_code, 1);
        assert_non_null(strstr(refused.text, "another run is at work there: pid 7 on host;"));
        kill(holder, SIGKILL);
        (void)status_of(holder, says);
        const struct Captured next = capture(lock_folder_as_another, NULL);
        assert_string_equal(next.text, "");
        assert_int_equal(next.exit_code, 0);
        unlink(path);
    }
    if (getuid() == 0) { // the directory is root's, and no other user may write there
        assert_int_equal(chmod(folder, 0755), 0);
        const struct Captured refused = capture(lock_folder_as_another, NULL);
        assert_int_equal(refused.exit_code, 1);
        assert_non_null(strstr(refused.text, "/lock: Permission denied"));
    }
}

static void a_file_system_without_locks_is_warned_of(void** state) {
    (void)state;
    static const int errors[] = {ENOLCK, ENOSYS, EOPNOTSUPP};
    for (int i = 0; i < 3; i++) {
        lock_error = errors[i];
        const struct Captured warned = capture(lock_folder, NULL);
        assert_int_equal(warned.exit_code, 0);
        assert_non_null(strstr(warned.text, "warning: "));
        assert_non_null(strstr(warned.text, strerror(errors[i])));
    }
    lock_error = 0;
}

static int remove_tree(void** state) {
    char line[PATH_MAX];
    path_format(line, "rm -rf %s/*", folder);
    return system(line) ? -1 : remove_folder(state);
}

#define in_own_tree(test) cmocka_unit_test_setup_teardown(test, setup_folder, remove_tree)
#define in_own_folder(test) cmocka_unit_test_setup_teardown(test, setup_folder, remove_folder)

// ----------------------------------------------------------------------------
// Limits

static const char* at(const char* name) {
    static char paths[2][PATH_MAX];
    static int next = 0;
    char* path = paths[next++ % 2];
    path_format(path, "%s/%s", folder, name);
    return path;
}

// Writes a file, with its directories, in a tree that replaces /sys/fs/cgroup.
static void put(const char* name, const char* text) {
    char path[PATH_MAX], parent[PATH_MAX];
    path_format(path, "%s", at(name));
    path_format(parent, "%s", path);
    *strrchr(parent, '/') = 0;
    make_directories_or_fail(parent);
    FILE* file = open_or_fail(path, "wb");
    write_or_fail(text, strlen(text), file, path);
    close_written_or_fail(file, path);
}

static size_t left_in(const char* root, const char* groups) {
    char tree[PATH_MAX];
    put("groups", groups);
    path_format(tree, "%s", at(root));
    return limits_control_groups(at("groups"), tree);
}

// Version 2: the limits of a group and of its parents, less the memory in use.
// Cached files do not count as used.
static void limits_of_version_2(void** state) {
    (void)state;
    put("two/job/step/memory.max", "max\n");
    put("two/job/step/memory.current", "1000\n");
    assert_true(left_in("two", "0::/job/step\n") == SIZE_MAX);
    put("two/job/memory.max", "10000\n");
    put("two/job/memory.current", "7000\n");
    assert_int_equal(left_in("two", "0::/job/step\n"), 3000);
    put("two/job/memory.stat", "anon 5000\ninactive_file 1500\nactive_file 500\nfile 1\n");
    assert_int_equal(left_in("two", "0::/job/step\n"), 5000);
    put("two/job/memory.stat",
        "anon 5000\ninactive_file 1500\nslab_reclaimable 400\nslab_unreclaimable 70\nactive_file 100\n");
    assert_int_equal(left_in("two", "0::/job/step\n"), 5000);
    put("two/job/step/memory.max", "2500\n");
    assert_int_equal(left_in("two", "0::/job/step\n"), 1500);
    put("two/job/step/memory.current", "2600\n"); // briefly above its limit, which can happen
    assert_int_equal(left_in("two", "0::/job/step\n"), 0);
    assert_int_equal(left_in("two", "0::/job\n"), 5000);
    assert_true(left_in("two", "0::/\n") == SIZE_MAX);
    // In a container, the group may have the host's name, and its limit is at the root.
    put("two/memory.max", "4000\n");
    put("two/memory.current", "100\n");
    assert_int_equal(left_in("two", "0::/docker/0123abc\n"), 3900);
    assert_int_equal(left_in("two", "0::/\n"), 3900);
}

// Version 1: only the groups of the memory controller count. An unlimited group has a huge number.
static void limits_of_version_1(void** state) {
    (void)state;
    put("one/memory/slurm/job/memory.limit_in_bytes", "9000\n");
    put("one/memory/slurm/job/memory.usage_in_bytes", "4000\n");
    put("one/memory/slurm/job/memory.stat",
        "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 200\n");
    put("one/memory/memory.limit_in_bytes", "9223372036854771712\n");
    put("one/memory/memory.usage_in_bytes", "50000\n");
    put("one/cpu/slurm/job/memory.limit_in_bytes", "5\n");
    put("one/cpu/slurm/job/memory.usage_in_bytes", "1\n");
    assert_int_equal(left_in("one", "5:cpu:/slurm/job\n4:memory:/slurm/job\n0::/\n"), 5300);
    assert_int_equal(left_in("one", "4:hugetlb,memory:/slurm/job/task_0\n"), 5300);
    assert_true(left_in("one", "4:cpu:/slurm/job\n") == SIZE_MAX);
    assert_true(left_in("one", "4:memoryless:/slurm/job\n") == SIZE_MAX);
    assert_true(left_in("one", "4:memory:/\n") == SIZE_MAX);
    assert_true(left_in("one", "") == SIZE_MAX);
    assert_true(left_in("one", "nonsense\n:\n") == SIZE_MAX);
    assert_true(limits_control_groups(at("not there"), at("one")) == SIZE_MAX);
}

// The smallest limit is named, and each of two processes may use half of the free memory.
static void the_least_limit_is_named(void** state) {
    (void)state;
    put("small/memory.max", "3000000\n");
    put("small/memory.current", "1000000\n");
    put("groups", "0::/\n");
    char groups[PATH_MAX], root[PATH_MAX];
    path_format(groups, "%s", at("groups"));
    path_format(root, "%s", at("small"));
    MemoryLimit limit = limits_memory(groups, root, 2, 0);
    assert_string_equal(limit.name, "memory limit of this container or job");
    assert_close((double)limit.bytes, 1e6 + (double)memory_resident(), 1e6);
    struct rlimit kept, most;
    getrlimit(RLIMIT_AS, &kept);
    most = kept;
    most.rlim_cur = (rlim_t)memory_proc_field("/proc/self/status", "VmSize:") + (64 << 20);
    assert_int_equal(setrlimit(RLIMIT_AS, &most), 0);
    limit = limits_memory(at("not there"), root, 1, 0);
    const MemoryLimit with_stacks = limits_memory(at("not there"), root, 1, 32 << 20);
    assert_int_equal(setrlimit(RLIMIT_AS, &kept), 0);
    assert_string_equal(limit.name, "limit of virtual memory, ulimit -v");
    assert_close((double)limit.bytes - (double)memory_resident(), 64 << 20, 4 << 20);
    assert_close((double)limit.bytes - (double)with_stacks.bytes, 32 << 20, 4 << 20);
}

static void bytes_have_a_fitting_unit(void** state) {
    (void)state;
    char text[32];
    assert_string_equal(limits_bytes_text(text, 0), "0.0 MB");
    assert_string_equal(limits_bytes_text(text, 40 << 20), "41.9 MB");
    assert_string_equal(limits_bytes_text(text, 1500000000), "1.5 GB");
}

static void start_threads_with_a_limit(void* nothing) {
    (void)nothing;
    const struct rlimit few = {1, 1};
    if (setrlimit(RLIMIT_NPROC, &few) != 0) exit(3);
    if (getuid() == 0 && setuid(65534) != 0) exit(3); // no limit applies to root
    fprintf(stderr, "%d threads\n", limits_try_threads(8, NULL));
    _exit(0); // exit() would let the address sanitizer start a thread for its leak check
}

static int seen_by_threads = 0;
static void look(void) { seen_by_threads++; }

static void threads_are_tried(void** state) {
    (void)state;
    assert_int_equal(limits_try_threads(3, look), 3);
    assert_int_equal(seen_by_threads, 1);
    const struct Captured captured = capture(start_threads_with_a_limit, NULL);
    assert_int_equal(captured.exit_code, 0);
    assert_string_equal(captured.text, "0 threads\n");
    assert_true(limits_stacks(4) == 4 * limits_stacks(1));
}

static void files_have_room(void** state) {
    (void)state;
    assert_true(limits_disk_free(folder) > 0);
    assert_true(limits_disk_free(at("not/there/yet")) == limits_disk_free(folder) ||
                limits_disk_free(at("not/there/yet")) > 0);
    assert_true(limits_disk_free("not/there/yet") < SIZE_MAX);
    assert_true(limits_disk_free("/not/there/yet") < SIZE_MAX);
    assert_true(limits_disk_free("/proc/run") == SIZE_MAX); // without blocks it cannot store files
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_failure_is_one_write),
        cmocka_unit_test(a_long_failure_is_a_line),
        cmocka_unit_test(a_signal_is_a_wish_to_stop_while_training),
        cmocka_unit_test(a_second_signal_ends_the_process),
        cmocka_unit_test(ignored_signals_stay_ignored),
        cmocka_unit_test(the_clock_is_no_signal),
        cmocka_unit_test(output_without_a_reader_is_a_wish_to_stop),
        in_own_folder(a_directory_has_one_lock),
        in_own_folder(a_dead_holder_has_no_lock),
        in_own_folder(an_ending_holder_is_waited_for),
        in_own_folder(a_lock_of_another_user),
        in_own_folder(a_file_system_without_locks_is_warned_of),
        cmocka_unit_test(schedules_by_hand),
        cmocka_unit_test(schedules_at_the_edges),
        cmocka_unit_test(sampling_against_brute_force),
        cmocka_unit_test(sampling_frequencies),
        cmocka_unit_test(sampling_edges),
        in_own_folder(metrics_lines),
        cmocka_unit_test(metrics_numbers_read_back),
        in_own_folder(metrics_resume_is_seamless),
        in_own_folder(metrics_count_tokens_seen),
        in_own_folder(metrics_of_a_step_to_measure_again),
        in_own_folder(metrics_resume_oddities),
        in_own_folder(metrics_on_a_full_disk),
        cmocka_unit_test(metrics_description_is_bounded),
        in_own_folder(metrics_in_a_file),
        cmocka_unit_test(metrics_on_a_terminal),
        cmocka_unit_test(metrics_short_forms),
        cmocka_unit_test(selection_by_hand),
        cmocka_unit_test(selection_of_heads),
        cmocka_unit_test(gpu_peaks_are_known_or_not_given),
        in_own_tree(limits_of_version_2),
        in_own_tree(limits_of_version_1),
        in_own_tree(the_least_limit_is_named),
        cmocka_unit_test(bytes_have_a_fitting_unit),
        cmocka_unit_test(threads_are_tried),
        in_own_tree(files_have_room),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
