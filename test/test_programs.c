/*
Tests the built programs from end to end, as a user runs them: training, kills, resuming, comparing; errors
for bad input; memory against the plan; generation; the plot.

    BUILD=build build/test/test_programs          from the top of the tree

Each program runs as a separate process in a temporary directory, on tiny token shards that the test makes.
Files that must be equal are compared byte by byte.
*/
#define _GNU_SOURCE
#include "runtime/options.h" // option_table
#include "test/programs.h"   // run, must_end_well, must_equal, write_shard
#include <sys/mount.h>
#include <termios.h>

static char trainer[PATH_MAX + 256]; // the trainer with the options that all its runs share
static char with_kinds[PATH_MAX];    // the trainer that make ATTN=flashmoba GQA=kdgqa KCONV=3 builds
static char tokenizer[PATH_MAX];

// ----------------------------------------------------------------------------
// Files

// The run directory must hold no partial checkpoint and no other half-written file.
static void must_hold_nothing_partial(const char* output) {
    const Result* result = run("sh -c \"find %s -name '*.tmp' -o -name '*.partial' -o -name '*.old' -o -name "
                               "'.writable' 2>&1 | grep -v 'No such file'\"",
                               output);
    if (result->out[0]) print_error("left behind: %s\n", result->out);
    assert_string_equal(result->out, "");
}

enum { TRAIN_TOKENS = 20000, VAL_TOKENS = 2000 };

static void write_shards(void) {
    write_shard("train_0.bin", good_shard(TRAIN_TOKENS));
    write_shard("val.bin", good_shard(VAL_TOKENS));
    Shard shard = good_shard(5000);
    shard.magic = 20240801, shard.version = 7;
    write_shard("train_1.bin", shard);

    shard = good_shard(5000), shard.held = 4999;
    write_shard("truncated.bin", shard);
    shard = good_shard(5000), shard.held = 5001;
    write_shard("overlong.bin", shard);
    shard = good_shard(5000), shard.magic = 1718379891;
    write_shard("foreign.bin", shard);
    shard = good_shard(5000), shard.version = 2;
    write_shard("version.bin", shard);
    shard = good_shard(5000), shard.vocabulary = 50;
    write_shard("vocabulary.bin", shard);
    shard = good_shard(200), shard.bad_at = 77, shard.bad_token = VOCABULARY;
    write_shard("outside.bin", shard);
    write_shard("short.bin", good_shard(32));
    shell("printf 'short' > stub.bin; : > empty.bin; printf x > file; mkdir directory.bin");
}

// ----------------------------------------------------------------------------
// Training

#define MODEL "--layers 2 --channels 32 --heads 4 --kv-heads 2 --ffn 64 --vocab 97 -t 32"
#define DATA "-i 'train_*.bin' -j val.bin"
#define SETTINGS "-l 1e-2 -u 3 -v 6 -m 2 --log-every 1 -n 4"
enum { STEPS = 30 };

// The command line that most tests vary: 30 steps of 8 sequences, in micro-batches of 4.
static const char* command(const char* output, const char* more) {
    static char line[4096];
    print_to(line, sizeof(line), "%s " MODEL " " DATA " -b 4 -d 256 " SETTINGS " -x %d -o %s %s", trainer,
             STEPS, output, more);
    return line;
}

static const Result* train(const char* output, const char* more) {
    const Treatment nothing = {0};
    return run_treated(&nothing, command(output, more));
}

static void test_training_learns_and_repeats_bitwise(void** state) {
    (void)state;
    must_end_well(train("whole", ""));
    must_end_well(train("again", ""));
    must_be_same_run("whole", "again", STEPS);
    double losses[64], validations[64];
    assert_int_equal(read_metric(losses, 64, "whole", "loss"), STEPS);
    assert_int_equal(read_metric(validations, 64, "whole", "val_loss"), 1 + STEPS / 6);
    assert_true(fabs(validations[0] - log(VOCABULARY)) < 0.3);
    assert_true(validations[STEPS / 6] < validations[0] - 1);
    must_hold_nothing_partial("whole");
}

static void test_killed_at_any_moment_it_resumes_bitwise(void** state) {
    (void)state;
    enum { KILLS = 12, MOST_RUNS = 400 };
    unsigned random = 1;
    for (int i = 0, kills = 0; kills < KILLS; i++) {
        random = random * 1103515245 + 12345;
        const long drawn = (long)(random >> 16);
        Treatment treatment = {0};
        if (i % 2) { // kills the run after some more lines of metrics
            treatment.signal = SIGKILL;
            treatment.until_file = "killed/metrics.jsonl";
            treatment.until_lines = count_lines("killed/metrics.jsonl") + 1 + (int)(drawn % 5);
            treatment.after_ms = drawn / 5 % 10;
        } else { // kills the run during the start, or soon after it
            treatment.kill_after_ms = 1 + drawn % 150;
        }
        const Result* result = run_treated(&treatment, command("killed", "--resume"));
        if (result->exit_code == 0) { // the run finished before the signal
            must_be_same_run("whole", "killed", STEPS);
            shell("rm -rf killed");
        } else {
            if (result->exit_code != 128 + SIGKILL) print_error("%s", result->err);
            assert_int_equal(result->exit_code, 128 + SIGKILL);
            kills++;
        }
        assert_true(i < MOST_RUNS);
    }
    must_end_well(train("killed", "--resume"));
    must_be_same_run("whole", "killed", STEPS);
    must_hold_nothing_partial("killed");
}

static void test_a_signal_writes_a_checkpoint(void** state) {
    (void)state;
    for (int i = 0; i < STOP_SIGNALS; i++) {
        char output[32];
        print_to(output, sizeof(output), "signalled_%d", i);
        char metrics[64];
        print_to(metrics, sizeof(metrics), "%s/metrics.jsonl", output);
        Treatment treatment = {0};
        treatment.signal = stop_signals[i];
        treatment.until_file = metrics;
        treatment.until_lines = 5 + i;
        const Result* result = run_interrupted(&treatment, command(output, "-n 0"), output);
        if (result->exit_code != 128 + stop_signals[i]) print_error("%s%s\n", result->out, result->err);
        assert_int_equal(result->exit_code, 128 + stop_signals[i]);
        assert_non_null(strstr(result->out, "stopped after step "));
        assert_non_null(strstr(result->out, "--resume"));
        int stopped = atoi(strstr(result->out, "stopped after step ") + 19);
        assert_in_range(stopped, 1, STEPS - 1);
        char checkpoint[64];
        print_to(checkpoint, sizeof(checkpoint), "%s/step_%08d/model.safetensors", output, stopped);
        assert_true(exists(checkpoint));
        must_end_well(train(output, "--resume"));
        must_be_same_run("whole", output, STEPS);
    }
}

// oneDNN's matrix products keep their stack pointer in the heap while they compute. A
// signal handler on that stack crashes the run.
static void test_signals_are_taken_on_no_stack(void** state) {
    (void)state;
    char line[4096];
    print_to(line, sizeof(line), "env OMP_NUM_THREADS=4 %s", command("threads", "-x 1000000 -n 0"));
    const pid_t job = start(line, "threads.txt", "threads_err.txt");
    await_lines(job, "threads/metrics.jsonl", 10);
    must_take_signals_on_no_stack(job, 5); // four threads that compute, and one that waits for signals
    kill(job, SIGTERM);
    assert_int_equal(end_of(job), 128 + SIGTERM);
}

// A run ignores a signal that was already ignored when the program started.
static void test_nohup_ignores_the_terminal(void** state) {
    (void)state;
    const pid_t job = start(command("nohup", "-x 1000000 -n 0"), "nohup.txt", "nohup_err.txt");
    await_lines(job, "nohup/metrics.jsonl", 4);
    kill(job, SIGTERM);
    assert_int_equal(end_of(job), 128 + SIGTERM);
    char line[4096];
    print_to(line, sizeof(line), "nohup %s", command("nohup", "--resume -x 1000000 -n 0"));
    const pid_t deaf = start(line, "nohup.txt", "nohup_err.txt");
    const int lines = count_lines("nohup/metrics.jsonl");
    await_lines(deaf, "nohup/metrics.jsonl", lines + 3);
    kill(deaf, SIGHUP);
    await_lines(deaf, "nohup/metrics.jsonl", lines + 30);
    kill(deaf, SIGINT);
    assert_int_equal(end_of(deaf), 128 + SIGINT);
}

// A signal before the first step ends the process by the same signal. The process prints
// nothing and leaves no half-written file.
static void test_a_signal_before_training_ends_at_once(void** state) {
    (void)state;
    for (int i = 0; i < 24; i++) {
        const int number = stop_signals[i % STOP_SIGNALS];
        const pid_t job = start(command("early", "--resume"), "early.txt", "early_err.txt");
        sleep_ms(6 * i);
        kill(job, number);
        const int code = end_of(job);
        if (code) assert_int_equal(code, 128 + number);
        must_hold_nothing_partial("early");
        assert_int_equal(count_lines("early_err.txt"), 0);
    }
    must_end_well(train("early", "--resume"));
    must_be_same_run("whole", "early", STEPS);
}

// The seconds of the first validation in a run.
static double seconds_of_validation(const char* output) {
    char path[256], text[8192];
    print_to(path, sizeof(path), "%s/timings.jsonl", output);
    read_text(text, sizeof(text), path);
    const char* spent = strstr(text, "\"spent\":");
    assert_non_null(spent);
    return strtod(spent + 8, NULL);
}

static int validations_of(const char* output) {
    double values[64];
    return read_metric(values, 64, output, "val_loss");
}

// Runs a line until its metrics have this many lines, and stops it a quarter of a validation later. Returns 1
// if the run stopped and logged no further validation.
static int is_stopped_in_validation(const char* line, int lines) {
    const pid_t job = start(line, "slow.txt", "slow_err.txt");
    await_lines(job, "slow/metrics.jsonl", lines);
    const int before = validations_of("slow");
    sleep_ms((long)(250 * seconds_of_validation("slow")));
    kill(job, SIGTERM);
    const int code = end_of(job);
    if (code == 0) return 0; // the signal came after the end
    assert_int_equal(code, 128 + SIGTERM);
    assert_true(exists("slow/latest"));
    return validations_of("slow") == before;
}

// The run does not log a validation that a signal interrupts; the resumed run repeats it. The signal comes
// after a step, at the start of a resumed run, and after the last step.
static void test_a_signal_breaks_off_a_validation(void** state) {
    (void)state;
    char line[4096];
    write_shard("long.bin", good_shard(600000));
    const char* slow = "-j long.bin -m 100000 -v 4 -x 6 -n 0";
    must_end_well(train("unbroken", slow));
    print_to(line, sizeof(line), "%s %s --resume", command("slow", ""), slow);
    int broken = is_stopped_in_validation(line, 6); // start, validation, four steps
    broken += is_stopped_in_validation(line, 6);
    broken += is_stopped_in_validation(line, 9); // and the validation of step 4, two steps
    assert_true(broken >= 1);                    // usually all three
    print_message("%d of 3 validations were broken off\n", broken);
    must_end_well(run_treated(&(Treatment){0}, line));
    must_be_same_run("unbroken", "slow", 6);
    must_equal("unbroken/step_00000006/state.json", "slow/step_00000006/state.json");
    must_equal("unbroken/main.log", "slow/main.log");
    must_hold_nothing_partial("slow");
}

// A signal also interrupts a sample.
static void test_a_signal_breaks_off_a_sample(void** state) {
    (void)state;
    char line[4096], text[65536];
    const char* sampling = "-j train_0.bin -t 2048 -b 1 -d 2048 -v 0 -x 4 -s 3 --sample-length 3000 -n 0";
    must_end_well(train("sampled", sampling));
    read_text(text, sizeof(text), "stdout.txt");
    const char* whole = strstr(text, "sample:");
    assert_non_null(whole);
    const size_t most = strcspn(strchr(whole, '\n') + 1, "\n");
    print_to(line, sizeof(line), "%s %s --resume", command("interrupted", ""), sampling);
    const pid_t job = start(line, "sample.txt", "sample_err.txt");
    for (text[0] = 0; !strstr(text, "sample:\n"); sleep_ms(2)) {
        assert_false(has_ended(job));
        if (exists("sample.txt")) read_text(text, sizeof(text), "sample.txt");
    }
    kill(job, SIGINT);
    assert_int_equal(end_of(job), 128 + SIGINT);
    read_text(text, sizeof(text), "sample.txt");
    assert_non_null(strstr(text, "stopped after step 3 of 4"));
    const size_t printed = strcspn(strstr(text, "sample:\n") + 8, "\n");
    print_message("%zu of %zu bytes were printed\n", printed, most);
    assert_true(printed < most);
    const Result* result = run_treated(&(Treatment){0}, line);
    must_end_well(result);
    assert_int_equal(strcspn(strstr(result->out, "sample:\n") + 8, "\n"), most);
    must_be_same_run("sampled", "interrupted", 4);
}

// Starts a run whose stdout is `out` or, if not NULL, the controlling terminal `terminal`.
static pid_t start_on(const char* output, int out, const char* terminal) {
    char line[4096];
    print_to(line, sizeof(line), "exec %s", command(output, "-x 1000000 -n 0"));
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        heed_signals();
        signal(SIGPIPE, SIG_DFL);
        setsid();
        if (terminal) out = open(terminal, O_RDWR); // becomes the session's controlling terminal
        if (dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(126);
        close(out);
        execl("/bin/sh", "sh", "-c", line, (char*)NULL);
        _exit(126);
    }
    return child;
}

// The reader of the output disappears: a terminal's window closes, or the other end of a pipe.
static void test_output_without_a_reader_writes_a_checkpoint(void** state) {
    (void)state;
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    pid_t job = start_on("no_reader", ends[1], NULL);
    close(ends[1]);
    await_lines(job, "no_reader/metrics.jsonl", 5);
    close(ends[0]);
    assert_int_equal(end_of(job), 128 + SIGPIPE);
    assert_true(exists("no_reader/latest"));
    must_end_well(train("no_reader", "--resume -x 1000000 -n 0 --max-seconds 0.05"));

    const int screen = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (screen < 0 || grantpt(screen) != 0 || unlockpt(screen) != 0) {
        print_message("SKIPPED: no pseudo-terminal can be had here\n");
        skip();
    }
    job = start_on("closed", -1, ptsname(screen));
    await_lines(job, "closed/metrics.jsonl", 5);
    close(screen);
    assert_int_equal(end_of(job), 128 + SIGHUP);
    assert_true(exists("closed/latest"));
    must_end_well(train("closed", "--resume -x 1000000 -n 0 --max-seconds 0.05"));
}

// If stdout is closed at the start, no file of the run may get its number. The run discards its output.
static void test_a_closed_stdout_is_no_file_of_the_run(void** state) {
    (void)state;
    char line[4096];
    print_to(line, sizeof(line), "%s <&-", command("mute", "-x 1000000 -n 0"));
    const pid_t job = start(line, "&-", "&-");
    await_lines(job, "mute/metrics.jsonl", 5);
    for (int i = 0; i < 3; i++) {
        char path[64], target[PATH_MAX] = "";
        print_to(path, sizeof(path), "/proc/%d/fd/%d", (int)job, i);
        assert_true(readlink(path, target, sizeof(target) - 1) > 0);
        assert_string_equal(target, "/dev/null");
    }
    kill(job, SIGTERM);
    assert_int_equal(end_of(job), 128 + SIGTERM);
}

// ----------------------------------------------------------------------------
// Two runs of one directory at once

// The second process fails, and names the process that holds the directory. It must
// not remove the first process's files.
static void test_a_directory_is_of_one_run(void** state) {
    (void)state;
    char pid[64];
    const pid_t first = start(command("shared", "-x 1000000 -n 0"), "shared.txt", "shared_err.txt");
    await_lines(first, "shared/metrics.jsonl", 6);
    shell("mkdir shared/step_00000007.tmp; touch shared/latest.tmp");
    print_to(pid, sizeof(pid), "pid %d on ", (int)first);
    static const char* const tries[] = {"", "--resume", "--overwrite"};
    static const char* const names[] = {"shared", "shared/../shared", "shared/"};
    for (int i = 0; i < 3; i++) { // each of them waits four seconds for the lock
        const Result* result = train(names[i], tries[i]);
        must_fail_with(result, 1, ": another run is at work there: ");
        must_fail_with(result, 1, pid);
        assert_non_null(strstr(result->out, "waiting for another run"));
    }
    must_end_well(train("shared", "--dry-run --resume"));
    assert_true(exists("shared/step_00000007.tmp") && exists("shared/latest.tmp"));
    assert_false(has_ended(first));
    const int lines = count_lines("shared/metrics.jsonl");
    await_lines(first, "shared/metrics.jsonl", lines + 3);
    // After a kill the process no longer holds the lock, but the lock file remains.
    kill(first, SIGKILL);
    assert_int_equal(end_of(first), 128 + SIGKILL);
    assert_true(exists("shared/lock"));
    must_end_well(train("shared", "--resume"));
    must_be_same_run("whole", "shared", STEPS);
    assert_false(exists("shared/lock"));
}

static void test_max_seconds_writes_a_checkpoint(void** state) {
    (void)state;
    int parts = 0;
    for (; parts < 200; parts++) { // makes at least one step
        const Result* result = train("timed", "-n 0 --resume --max-seconds 0.01");
        must_end_well(result);
        if (!strstr(result->out, "--max-seconds is over")) break;
    }
    assert_in_range(parts, 1, 199);
    must_be_same_run("whole", "timed", STEPS);
}

static void test_micro_batches_give_the_same_losses(void** state) {
    (void)state;
    double reference[64], losses[64];
    static const int batches[] = {1, 2, 4, 8};
    for (int i = 0; i < 4; i++) {
        char output[32];
        print_to(output, sizeof(output), "micro_%d", batches[i]);
        must_end_well(
            run("%s " MODEL " " DATA " -b %d -d 256 " SETTINGS " -x 12 -o %s", trainer, batches[i], output));
        int count = read_metric(i ? losses : reference, 64, output, "loss");
        assert_int_equal(count, 12);
        for (int k = 0; i && k < count; k++)
            if (fabs(losses[k] - reference[k]) > 1e-5 * reference[k])
                fail_msg("batch %d, step %d: loss %.9g, with batch 1 %.9g", batches[i], k + 1, losses[k],
                         reference[k]);
        count = read_metric(losses, 64, output, "val_loss");
        assert_int_equal(count, 3);
    }
}

// Runs the command of the last hint, as a user would.
static const Result* follow_the_hint(const Result* result) {
    const char* hint = strstr(result->out, "---> HINT: ");
    char line[4096];
    assert_non_null(hint);
    hint += strlen("---> HINT: ");
    const char* end = strstr(hint, " continues a text\n");
    if (!end) end = strstr(hint, " samples from the model\n");
    assert_non_null(end);
    print_to(line, sizeof(line), "%.*s", (int)(end - hint), hint);
    return run("%s", line);
}

// A hint's command works, and no hint names a checkpoint that does not exist.
static void test_hints_can_be_followed(void** state) {
    (void)state;
    must_end_well(follow_the_hint(train("hinted", "-u 0 -x 1")));
    must_end_well(follow_the_hint(train("\"hinted it's \\$HOME\"", "-u 0 -x 1")));
    const Result* result = train("no_steps", "-u 0 -x 0");
    must_end_well(result);
    assert_null(strstr(result->out, "HINT"));
    result = run("%s " MODEL " " DATA " -b 4 -x 1", trainer);
    must_end_well(result);
    assert_null(strstr(result->out, "HINT"));
    assert_non_null(strstr(result->out, "nothing of this run is kept: --output DIR"));
    result = train("no_time", "-u 0 --max-seconds 1e-9"); // --max-seconds stops it before its first step
    must_end_well(result);
    assert_non_null(strstr(result->out, "stopped after step 0"));
    assert_null(strstr(result->out, "HINT"));
    result = train("no_time", "--resume -x 2 -n 1 -u 0");
    must_end_well(result);
    assert_null(strstr(result->out, "nothing of this run is kept"));
    // After divergence, a run points to the last checkpoint only if there is one.
    result = train("diverged", "-l 1000 -u 0 -k constant --clip 0 -c 100 -n 0 -x 300");
    assert_int_equal(result->exit_code, 1);
    assert_non_null(strstr(result->err, "has diverged"));
    assert_null(strstr(result->err, "-nan"));
    assert_null(strstr(result->err, "--resume"));
    assert_false(exists("diverged/latest"));
}

// With --recompute, backward computes the same numbers again. A resumed run may also change the level.
static void test_recompute_changes_no_bit(void** state) {
    (void)state;
    must_end_well(train("recomputed_mlp", "--recompute mlp"));
    must_be_same_run("whole", "recomputed_mlp", STEPS);
    shell("mkdir recomputed; cp -r whole/step_00000012 recomputed; cp whole/metrics.jsonl "
          "whole/timings.jsonl recomputed");
    must_end_well(train("recomputed", "--recompute layer --resume"));
    must_be_same_run("whole", "recomputed", STEPS);
}

// Makes the run `output` from the files that "whole" had after 12 steps.
static void copy_after_12_steps(const char* output) {
    shell("rm -rf %s; mkdir %s; cp -r whole/step_00000012 %s; cp whole/metrics.jsonl whole/timings.jsonl %s",
          output, output, output, output);
}

// A run that resumes with these options must end with the same bytes as "whole".
static void must_go_on_alike(const char* options) {
    copy_after_12_steps("goes_on");
    must_end_well(train("goes_on", options));
    must_be_same_run("whole", "goes_on", STEPS);
}

// A run refuses to resume with other tokens, or with the same tokens in another order. It
// accepts the same tokens under other file names.
static void test_a_resume_has_the_same_data(void** state) {
    (void)state;
    shell("rm -rf same swapped edited; mkdir same swapped edited; cp train_0.bin same/x.bin; cp train_1.bin "
          "same/y.bin; "
          "cp train_0.bin swapped/y.bin; cp train_1.bin swapped/x.bin; cp train_0.bin train_1.bin edited; "
          "printf '\\1' | dd of=edited/train_0.bin bs=1 seek=13024 conv=notrunc status=none");
    must_go_on_alike("--resume -i 'same/*.bin'");
    static const char* const others[] = {"train_0.bin", "'swapped/*.bin'", "'edited/*.bin'", "'*[01l].bin'"};
    char options[256];
    for (int i = 0; i < 4; i++) {
        copy_after_12_steps("other");
        print_to(options, sizeof(options), "--resume -i %s", others[i]);
        must_fail_with(train("other", options), 1, "--allow-other-data");
        assert_false(exists("other/step_00000016"));
        print_to(options, sizeof(options), "--resume --allow-other-data -i %s", others[i]);
        const Result* result = train("other", options);
        must_end_well(result);
        assert_non_null(
            strstr(result->out, "changed since the checkpoint: other --train-data (2 shards of 25000"));
        must_end_well(run("grep -q '\"changes\":\"other --train-data' other/timings.jsonl"));
    }
    // The state of an older version has no fingerprint of its data.
    copy_after_12_steps("other");
    shell("sed -i 's/\"format_version\":\t2/\"format_version\":\t1/' other/step_00000012/state.json");
    const Result* result = train("other", "--resume");
    must_end_well(result);
    assert_non_null(strstr(result->out, "does not tell its data"));
    must_be_same_run("whole", "other", STEPS);
}

// A run accepts other settings and reports them: on the terminal, in timings.jsonl and in metrics.jsonl. The
// tokens in metrics.jsonl are the tokens that the model has seen.
static void test_a_resume_tells_what_it_changes(void** state) {
    (void)state;
    static const char* const cases[][2] = {
        {"-c 0.2", "--weight-decay 0.1 to 0.2"},
        {"-u 5", "--warmup 3 to 5"},
        {"--beta1 0.8", "--beta1 0.9 to 0.8"},
        {"--beta2 0.99", "--beta2 0.95 to 0.99"},
        {"--eps 1e-7", "--eps 1e-08 to 1e-07"},
        {"--clip 0", "--clip 1 to 0"},
        {"-l 1e-3", "--learning-rate 0.01 to 0.001"},
        {"-q 0.5", "--final-lr-fraction 0.1 to 0.5"},
        {"-k wsd --decay-fraction 0.5", "--schedule cosine to wsd, --decay-fraction 0.2 to 0.5"},
        {"-x 20", "--steps 30 to 20"},
        {"-j train_1.bin", "other --val-data"},
        {"-d 128", "--total-batch 256 to 128"},
    };
    char options[256], wanted[256];
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        copy_after_12_steps("changed");
        print_to(options, sizeof(options), "--resume %s", cases[i][0]);
        const Result* result = train("changed", options);
        must_end_well(result);
        print_to(wanted, sizeof(wanted), "changed since the checkpoint: %s\n", cases[i][1]);
        if (!strstr(result->out, wanted)) print_error("want %s", wanted);
        assert_non_null(strstr(result->out, wanted));
        print_to(wanted, sizeof(wanted), "\"changes\":\"%s\"", cases[i][1]);
        must_end_well(run("grep -qF '%s' changed/timings.jsonl", wanted));
        if (cases[i][0][1] != 'j')
            must_end_well(run("grep -q '\"event\":\"resume\",\"step\":12' changed/metrics.jsonl"));
    }
    double tokens[64];
    const int count = read_metric(tokens, 64, "changed", "tokens"); // the values of the last case
    assert_true(tokens[count - 1] == 12 * 256 + 18 * 128);
    assert_true(tokens[0] == 0);
    // If nothing has changed, the run reports nothing.
    copy_after_12_steps("changed");
    const Result* result = train("changed", "--resume");
    must_end_well(result);
    assert_null(strstr(result->out, "changed since"));
    assert_int_equal(run("grep -q changes changed/timings.jsonl")->exit_code, 1);
}

static void test_dry_run_leaves_nothing(void** state) {
    (void)state;
    const Result* result = train("dry", "--dry-run");
    must_end_well(result);
    assert_non_null(strstr(result->out, "planned peak"));
    assert_non_null(strstr(result->out, "MFLOP a token"));
    assert_false(exists("dry"));
}

static void test_a_run_is_not_overwritten_by_accident(void** state) {
    (void)state;
    const Result* result = train("whole", "");
    assert_int_equal(result->exit_code, 2);
    assert_non_null(strstr(result->err, "--overwrite"));
    must_be_same_run("whole", "again", STEPS);
    must_end_well(train("again", "--overwrite -x 5"));
    assert_false(exists("again/step_00000030"));
    assert_true(exists("again/step_00000005"));
}

// A model of about 10 M parameters: compares the peak memory of the process with the
// plan that it prints at the start.
static void test_peak_memory_is_as_planned(void** state) {
    (void)state;
    write_shard("large.bin", good_shard(30000));
    const Result* result =
        run("%s --layers 6 --channels 320 --heads 5 --kv-heads 5 --vocab 4096 -t 256 -b 4 -i train_1.bin -j "
            "train_1.bin -x 3 -v 1 -m 2 -o memory",
            trainer);
    // train_1.bin names another vocabulary; a shard with vocabulary 0 names none.
    assert_int_equal(result->exit_code, 1);
    Shard shard = good_shard(30000);
    shard.vocabulary = 0;
    write_shard("large.bin", shard);
    double planned[3];
    for (int level = 0; level < 3; level++) {
        static const char* const levels[] = {"none", "mlp", "layer"};
        result =
            run("%s --layers 6 --channels 320 --heads 5 --vocab 4096 -t 256 -b 4 -i large.bin -j large.bin "
                "-x 3 -v 1 -m 2 --recompute %s -o memory_%s",
                trainer, levels[level], levels[level]);
        must_end_well(result);
        const char* line = strstr(result->out, "planned peak");
        assert_non_null(line);
        planned[level] = 1e6 * strtod(line + strlen("planned peak"), NULL);
        print_message("recompute %s: planned %.1f MB, held %.1f MB\n", levels[level], planned[level] / 1e6,
                      result->peak / 1e6);
#ifdef __SANITIZE_ADDRESS__
        print_message("SKIPPED: the address sanitizer's own memory is not in the plan\n");
        skip();
#endif
        assert_true(fabs(result->peak - planned[level]) < 0.05 * planned[level]);
        assert_true(level == 0 || planned[level] < 0.9 * planned[level - 1]);
    }
}

// ----------------------------------------------------------------------------
// Generation

// Replaces the trained weights by random ones from -1 to 1. Attention is sharp then,
// and each position matters.
static void randomize_weights(const char* path) {
    FILE* file = fopen(path, "r+b");
    assert_non_null(file);
    uint64_t header, random = 1;
    assert_int_equal(fread(&header, 8, 1, file), 1);
    fseek(file, 0, SEEK_END);
    long count = (ftell(file) - 8 - (long)header) / 4;
    fseek(file, 8 + (long)header, SEEK_SET);
    for (long i = 0; i < count; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        float value = (float)(random >> 40) / (float)(1 << 23) - 1;
        fwrite(&value, 4, 1, file);
    }
    fclose(file);
}

static const char generate[] = "%s --generate --init-from wild --temperature %s --sample-length 24 --seed %d";

// Replaces the weights of the model in `output`. Then compares greedy generation, which adds one token at a
// time to a cache, with the logits of the whole sequence.
static void must_generate_what_the_logits_say(const char* output) {
    shell("rm -rf wild; cp -r %s wild", output);
    randomize_weights("wild/step_00000030/model.safetensors");
    const Result* result = run(generate, trainer, "0", 7);
    must_end_well(result);
    int tokens[64] = {0}, count = 1;
    char list[1024] = "0";
    for (char *at = (char*)result->out, *end; count < 64; at = end) {
        tokens[count] = (int)strtol(at, &end, 10);
        if (end == at) break;
        print_to(list + strlen(list), 8, ",%d", tokens[count++]);
    }
    assert_int_equal(count, 25);
    must_end_well(run("%s --init-from wild --write-logits logits --tokens %s", trainer, list));

    FILE* file = fopen("logits", "rb");
    assert_non_null(file);
    uint64_t header;
    assert_int_equal(fread(&header, 8, 1, file), 1);
    fseek(file, (long)header, SEEK_CUR);
    for (int t = 0; t + 1 < count; t++) {
        float logits[VOCABULARY];
        assert_int_equal(fread(logits, sizeof(logits), 1, file), 1);
        int best = 0;
        for (int v = 1; v < VOCABULARY; v++)
            if (logits[v] > logits[best]) best = v;
        assert_int_equal(best, tokens[t + 1]);
    }
    fclose(file);
}

static void test_generation_is_that_of_the_logits(void** state) {
    (void)state;
    must_generate_what_the_logits_say("whole");
    char first[65536];
    const Result* result = run(generate, trainer, "1", 7);
    must_end_well(result);
    print_to(first, sizeof(first), "%s", result->out);
    assert_string_equal(run(generate, trainer, "1", 7)->out, first);
    assert_string_not_equal(run(generate, trainer, "1", 8)->out, first);
}

// ----------------------------------------------------------------------------
// The other variants: each resumes bitwise and generates what its logits say

typedef struct {
    const char *kinds, *options;
    int layers;
    int choosing;  // number of layers that choose blocks
    int has_heads; // 1: its checkpoints contain an allocation of heads
    int moves;     // 1: the allocation changes. Averaged norms here give a uniform one
} Variant;

static const Variant variants[] = {
#define KDGQA "--query-heads kdgqa --kconv 3"
    {KDGQA, "--pattern SG --window 8", 2, 0, 1, 1},
    {KDGQA, "--kd-source forward --kd-min-heads 0", 2, 0, 1, 1},
    {KDGQA, "--kd-source weights", 2, 0, 1, 1},
    {KDGQA, "--kd-source shuffled", 2, 0, 1, 1},
    {"--query-heads dgqa --kconv 5", "--kd-window 3", 2, 0, 1, 0},
    {"--query-heads dgqa --kconv 5", "--kd-window 3 --dgqa-kind diff --kd-source forward", 2, 0, 1, 1},
    {"--query-heads pgqa --kconv 3", "--pattern GS --window 8 --position S=rope,G=none", 2, 0, 0, 0},
    {"--attention flashmoba " KDGQA, "--moba-block 16 --moba-topk 2 -t 64", 2, 2, 1, 1},
    {"--attention flashmoba --kconv 3", "--layers 4 --pattern DGGD --moba-block 16 --moba-topk 2 -t 64", 4, 2,
     0, 0},
};

// Checks the router's telemetry in the metrics of a run, which must have this many lines of it.
static void must_tell_what_was_chosen(const char* run, int lines) {
    double captured[64], best[64], chance[64], recall[64], heaviest[64], mean[64];
    assert_int_equal(read_metric(captured, 64, run, "captured"), lines);
    assert_int_equal(read_metric(best, 64, run, "captured_best"), lines);
    assert_int_equal(read_metric(chance, 64, run, "captured_chance"), lines);
    assert_int_equal(read_metric(recall, 64, run, "recall"), lines);
    assert_int_equal(read_metric(heaviest, 64, run, "heaviest"), lines);
    assert_int_equal(read_metric(mean, 64, run, "mean_load"), lines);
    for (int i = 0; i < lines; i++) {
        assert_true(captured[i] > 0 && captured[i] <= best[i] && best[i] <= 1 && chance[i] < best[i]);
        assert_true(recall[i] > 0 && recall[i] <= 1);
        assert_true(mean[i] > 0 && mean[i] <= heaviest[i] && heaviest[i] <= 1);
    }
}

static void test_variants(void** state) {
    (void)state;
    char kept[PATH_MAX], more[512], left[256], right[256];
    print_to(kept, sizeof(kept), "%s", trainer);
    for (size_t i = 0; i < sizeof(variants) / sizeof(variants[0]); i++) {
        const Variant* v = &variants[i];
        print_to(trainer, sizeof(trainer), "%s %s", kept, v->kinds);
        shell("rm -rf one two");
        // The variant's options come last, so that they override the common ones.
        print_to(more, sizeof(more), "%s --heads 8 --kv-heads 4 -n 7", v->options);
        must_end_well(train("one", more));
        double losses[64];
        assert_int_equal(read_metric(losses, 64, "one", "loss"), STEPS);
        assert_true(losses[STEPS - 1] < losses[0] - 1);
        for (int cut = 0; cut < 3; cut++) {
            Treatment treatment = {0};
            treatment.signal =
                cut == 1 ? SIGTERM : SIGKILL; // SIGTERM adds a checkpoint between the regular ones
            treatment.until_file = "two/metrics.jsonl";
            treatment.until_lines = 10 + 8 * cut;
            print_to(more, sizeof(more), "%s --heads 8 --kv-heads 4 -n 7 --resume", v->options);
            run_treated(&treatment, command("two", more));
        }
        must_end_well(train("two", more));
        must_be_same_run("one", "two", STEPS);
        print_to(more, sizeof(more), "%s --heads 8 --kv-heads 4 -n 7 --recompute layer --overwrite",
                 v->options);
        must_end_well(train("two", more));
        must_be_same_run("one", "two", STEPS);
        double moved[512];
        const int lines = read_metric(moved, 512, "one", "moved");
        assert_int_equal(lines,
                         v->has_heads ? v->layers * (1 + STEPS / 6) : 0); // one for each layer and validation
        if (v->has_heads) {
            print_to(left, sizeof(left), "one/step_%08d/heads.json", STEPS);
            print_to(right, sizeof(right), "two/step_%08d/heads.json", STEPS);
            must_equal(left, right);
            assert_int_equal(moved[0], 0);
            assert_int_equal(moved[lines - 1] + moved[lines - 2] > 0, v->moves);
        }
        must_tell_what_was_chosen("one", v->choosing * (1 + STEPS / 6));
        must_generate_what_the_logits_say("one");
        print_to(trainer, sizeof(trainer), "%s", kept);
        must_generate_what_the_logits_say(
            "one"); // the checkpoint has the kinds, so the command needs no options for them
    }
}

// config.json stores the kinds of a checkpoint. A run that resumes it may omit their
// options, but must not contradict them.
static void test_kinds_come_from_the_checkpoint(void** state) {
    (void)state;
    const char* kinds =
        "--attention moba --query-heads dgqa --kconv 5 --moba-block 16 --moba-topk 2 --kd-window 4 -t 64";
    char more[512];
    must_end_well(train("kinds_whole", kinds));
    shell(
        "mkdir kinds; cp -r kinds_whole/step_%08d kinds_whole/metrics.jsonl kinds_whole/timings.jsonl kinds",
        STEPS - 10);
    must_end_well(train("kinds", "--resume -t 64 --kd-window 4"));
    must_be_same_run("kinds", "kinds_whole", STEPS);
    static const struct {
        const char *option, *says;
    } wrong[] = {
        {"--attention flashmoba", "its model has --attention moba, this run asks for flashmoba"},
        {"--query-heads gqa", "its model has --query-heads dgqa, this run asks for gqa"},
        {"--kconv 3", "its model has --kconv 5, this run asks for 3"},
        {"--pattern D", "its model has --pattern G, this run asks for D"},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        print_to(more, sizeof(more), "--resume -t 64 %s", wrong[i].option);
        must_fail_with(train("kinds", more), 1, wrong[i].says);
        must_fail_with(run("%s --generate --init-from kinds %s", trainer, wrong[i].option), 1, wrong[i].says);
    }
    must_fail_with(
        train("kinds", "--resume -t 64 --kd-source lagged --pgqa-noise 2"), 2,
        "--pgqa-noise: has an effect with --query-heads pgqa only, and this model has --query-heads dgqa");
    // A new run may start from these weights with another kind of attention.
    must_end_well(train("other_kind", "--init-from kinds -t 64 --attention dense --query-heads gqa -x 4"));
    must_end_well(run("grep -q '\"attn\":.*\"dense\"' other_kind/step_00000004/config.json"));
}

// make ATTN=flashmoba GQA=kdgqa KCONV=3 builds a trainer with these defaults.
// Besides them it has only dense attention. Two binaries may round differently, and rounding may change a choice of
// blocks, so the losses of two runs agree to 2 %.
static void test_a_build_with_kinds(void** state) {
    (void)state;
    char kept[PATH_MAX], line[512];
    double losses[64];
    const char* blocks = "--moba-block 16 --moba-topk 2 -t 64";
    print_to(kept, sizeof(kept), "%s", trainer);
    print_to(line, sizeof(line), "--attention flashmoba --query-heads kdgqa --kconv 3 %s", blocks);
    must_end_well(train("by_options", line));
    print_to(trainer, sizeof(trainer), "%s", with_kinds);
    must_end_well(train("by_build", blocks));
    assert_int_equal(read_metric(losses, 64, "by_build", "loss"), STEPS);
    must_follow("by_build", "by_options", "loss", STEPS, 0.02);
    must_end_well(run("grep -q '\"kconv\":.*3' by_build/step_%08d/config.json", STEPS));
    print_to(line, sizeof(line), "--attention moba %s", blocks);
    must_fail_with(train("never", line), 2,
                   "--attention moba: not in this build, which has dense and flashmoba; make builds a "
                   "trainer with every kind");
    // It resumes a dense checkpoint as a dense model.
    shell("mkdir dense_cut; cp -r whole/step_%08d whole/metrics.jsonl whole/timings.jsonl dense_cut",
          STEPS - 10);
    must_end_well(train("dense_cut", "--resume"));
    assert_int_equal(read_metric(losses, 64, "dense_cut", "loss"), STEPS);
    must_follow("dense_cut", "whole", "loss", STEPS, 0.02);
    must_generate_what_the_logits_say("whole");
    print_to(trainer, sizeof(trainer), "%s", kept);
}

// ----------------------------------------------------------------------------
// Help

// Returns the next line of the help that is a title (" Model") or begins an option
// ("  -b, --batch=B"), or "".
static const char* next_entry(const char** text) {
    static char line[256];
    while (**text) {
        const size_t length = strcspn(*text, "\n");
        const char* start = *text;
        const size_t blanks = strspn(start, " ");
        *text += length + (start[length] == '\n');
        if (blanks != 1 && !(start[blanks] == '-' && (blanks == 2 || blanks == 6))) continue;
        print_to(line, sizeof(line), "%.*s", (int)length, start);
        return line;
    }
    return "";
}

// All options of a title must follow it, in the order of the table.
static void test_help_follows_the_table(void** state) {
    (void)state;
    const Result* result = run("%s --help", trainer);
    must_end_well(result);
    const char* text = result->out;
    for (const struct argp_option* option = option_table; option->name || option->key || option->doc;
         option++) {
        const char* line = next_entry(&text);
        char want[128];
        if (!option->name && !option->key) print_to(want, sizeof(want), " %s", option->doc);
        else if (!option->name) print_to(want, sizeof(want), "  -%c %s ", option->key, option->arg);
        else if (option->key >= 256)
            print_to(want, sizeof(want), "      --%s%s%s", option->name, option->arg ? "=" : "",
                     option->arg ? option->arg : "");
        else
            print_to(want, sizeof(want), "  -%c, --%s%s%s", option->key, option->name, option->arg ? "=" : "",
                     option->arg ? option->arg : "");
        if (strncmp(line, want, strlen(want)) != 0) print_error("want \"%s\", got \"%s\"\n", want, line);
        assert_memory_equal(line, want, strlen(want));
    }
    assert_string_equal(next_entry(&text), "");
    for (const char* line = result->out; *line; line += strcspn(line, "\n") + 1)
        assert_in_range(strcspn(line, "\n"), 0, 79);
    must_fail_with(run("sh -c '%s --help > /dev/full'", trainer), 1, "cannot be written");
    must_fail_with(run("%s", trainer), 2, "--train-data: needed to train");
    must_fail_with(run("%s --vocab 97", trainer), 2, "--help");
}

// ----------------------------------------------------------------------------
// Bad input

typedef struct {
    const char* options; // follow the common options, and override them
    int exit_code;
    const char* says[3]; // texts on the one line of stderr: the option or file, and the rule
} BadInput;

static const BadInput bad_inputs[] = {
    // shards
    {"-i missing.bin", 1, {"missing.bin", "no file matches", ""}},
    {"-i 'missing_*.bin'", 1, {"missing_*.bin", "no file matches", ""}},
    {"-i truncated.bin", 1, {"truncated.bin", "4999 of 5000 tokens", ""}},
    {"-i overlong.bin", 1, {"overlong.bin", "2 bytes longer", ""}},
    {"-i foreign.bin", 1, {"foreign.bin", "not a token shard", "20240520"}},
    {"-i version.bin", 1, {"version.bin", "version 2", "must be 1"}},
    {"-i stub.bin", 1, {"stub.bin", "5 bytes", "1024"}},
    {"-i empty.bin", 1, {"empty.bin", "0 bytes", "1024"}},
    {"-i directory.bin", 1, {"directory.bin", "not a regular file", ""}},
    {"-i short.bin", 1, {"short.bin", "32 + 1", ""}},
    {"-i vocabulary.bin", 1, {"vocabulary.bin", "vocabulary of 50", "97"}},
    {"-i outside.bin", 1, {"outside.bin", "token 97 at offset 77", "vocabulary of 97"}},
    {"-j outside.bin", 1, {"outside.bin", "token 97 at offset 77", "vocabulary of 97"}},
    {"-j truncated.bin", 1, {"truncated.bin", "4999 of 5000 tokens", ""}},
    // sizes that must divide each other
    {"-d 250", 2, {"--total-batch 250", "multiple", "128"}},
    {"-d 64", 2, {"--total-batch 64", "multiple", "128"}},
    {"--heads 5 --kv-heads 5", 2, {"--heads 5", "--channels 32", "divide"}},
    {"--kv-heads 3", 2, {"--kv-heads 3", "--heads 4", "divide"}},
    {"--kv-heads 8", 2, {"--kv-heads 8", "from 1 to 4", ""}},
    {"--head-dim 7", 2, {"--head-dim 7", "even", ""}},
    // values
    {"--layers 0", 2, {"--layers 0", "from 1", ""}},
    {"--layers two", 2, {"--layers two", "whole number", ""}},
    {"--layers 2x", 2, {"--layers 2x", "whole number", ""}},
    {"--layers ''", 2, {"--layers", "whole number", ""}},
    {"-b 0", 2, {"--batch 0", "from 1", ""}},
    {"-b 99999999999999999999", 2, {"--batch 99999999999999999999", "", ""}},
    {"-b 1048576 -t 16777216", 2, {"--batch 1048576", "--sequence-length 16777216", "at most 268435456"}},
    {"-l -1", 2, {"--learning-rate -1", "from 0", ""}},
    {"-l nan", 2, {"--learning-rate nan", "number", ""}},
    {"-l inf", 2, {"--learning-rate inf", "from 0 to 1000", ""}},
    {"-l 1e300", 2, {"--learning-rate 1e300", "from 0 to 1000", ""}},
    {"-l 1e-300", 2, {"--learning-rate 1e-300", "too small", ""}},
    {"-l 1e-40", 2, {"--learning-rate 1e-40", "too small", ""}},
    {"-l 1e-400", 2, {"--learning-rate 1e-400", "too small", ""}},
    {"-l -1e-400", 2, {"--learning-rate -1e-400", "too small", ""}},
    {"-l 1e400", 2, {"--learning-rate 1e400", "from 0 to 1000", ""}},
    {"-l ''", 2, {"--learning-rate", "number", ""}},
    {"--eps 0", 2, {"--eps 0", "from 1e-20", ""}},
    {"--eps -1e-8", 2, {"--eps -1e-8", "from 1e-20", ""}},
    {"--eps 1e-40", 2, {"--eps 1e-40", "from 1e-20", ""}},
    {"--beta2 1", 2, {"--beta2 1", "from 0", ""}},
    {"--beta2 1e-300", 2, {"--beta2 1e-300", "too small", ""}},
    {"--clip -1", 2, {"--clip -1", "from 0", ""}},
    {"--clip 1e-50", 2, {"--clip 1e-50", "too small", ""}},
    {"-c nan", 2, {"--weight-decay nan", "number", ""}},
    {"-q 1.5", 2, {"--final-lr-fraction 1.5", "from 0 to 1", ""}},
    {"--rope-theta 0", 2, {"--rope-theta 0", "from 1", ""}},
    {"--norm-eps 0", 2, {"--norm-eps 0", "from 1e-12", ""}},
    {"--temperature -1", 2, {"--temperature -1", "from 0", ""}},
    {"--temperature 1e-300", 2, {"--temperature 1e-300", "too small", ""}},
    {"--top-k -1", 2, {"--top-k -1", "from 0", ""}},
    {"--beta1 1", 2, {"--beta1 1", "from 0", ""}},
    {"--recompute all", 2, {"--recompute all", "none or mlp or layer", ""}},
    {"--cuda-graph", 2, {"--cuda-graph", "DEVICE=cuda or simt", "DEVICE=cpu"}},
    {"--schedule sine", 2, {"--schedule sine", "cosine", ""}},
    {"--model x12", 2, {"--model x12", "dN", ""}},
    {"--model d", 2, {"--model d", "dN", ""}},
    {"--pattern GX", 2, {"--pattern GX", "S (sliding window)", ""}},
    {"--position turn", 2, {"--position turn", "rope", ""}},
    {"--warmup 31", 2, {"--warmup 31", "30 steps", ""}},
    {"--steps -2", 2, {"--steps -2", "from -1", ""}},
    {"--seed -1", 2, {"--seed -1", "from 0", ""}},
    {"--top-p 2", 2, {"--top-p 2", "from 0 to 1", ""}},
    {"-y 2", 2, {"-y 2", "from 0 to 1", ""}},
    // options
    {"--layer-count 3", 2, {"--layer-count", "unknown option", ""}},
    {"-Z", 2, {"-Z", "unknown option", ""}},
    {"-Z3", 2, {"-Z", "unknown option", ""}},
    {"--l 3", 2, {"--l", "unknown option", ""}},
    {"--resume=1", 2, {"--resume", "takes no value", ""}},
    {"--layers", 2, {"--layers", "needs a value", ""}},
    {"-b", 2, {"-b", "needs a value", ""}},
    {"word", 2, {"word", "not an option", ""}},
    {"-i train_0.bin train_1.bin", 2, {"train_1.bin", "quotes", "--train-data 'train_*.bin'"}},
    {"-j x/a_10.bin x/a_1.bin x/a_210.bin -v 1", 2, {"x/a_1.bin", "quotes", "--val-data 'x/a_*.bin'"}},
    {"--train-data aa aaa", 2, {"aaa", "quotes", "--train-data 'aa*'"}},
    {"-b 4 word", 2, {"word", "not an option", ""}},
    {"-i ''", 2, {"--train-data", "empty", ""}},
    {"-o ''", 2, {"--output", "empty", ""}},
    {"--pattern ''", 2, {"--pattern", "empty", ""}},
    {"-- word", 2, {"word", "not an option", ""}},
    {"--attention sparse", 2, {"--attention sparse", "dense or moba or flashmoba", ""}},
    {"--query-heads mha", 2, {"--query-heads mha", "gqa or kdgqa or dgqa or pgqa", ""}},
    {"--kconv 4", 2, {"--kconv 4", "0, 3 or 5", ""}},
    {"--kconv 7", 2, {"--kconv 7", "from 0 to 5", ""}},
    {"--schedule step", 2, {"--schedule step", "cosine or linear or constant or wsd", ""}},
    {"--moba-topk 3", 2, {"--moba-topk", "--attention moba or flashmoba", "--attention dense"}},
    {"--attention moba --moba-workspace 9",
     2,
     {"--moba-workspace", "--attention flashmoba only", "--attention moba"}},
    {"--kd-source lagged", 2, {"--kd-source", "--query-heads kdgqa or dgqa", "--query-heads gqa"}},
    {"--query-heads kdgqa --kd-window 5", 2, {"--kd-window", "--query-heads dgqa", "--query-heads kdgqa"}},
    {"--pgqa-noise 1", 2, {"--pgqa-noise", "--query-heads pgqa", "--query-heads gqa"}},
    {"--prompt hello", 2, {"--prompt", "--tokenizer", ""}},
    {"--generate", 2, {"--generate", "--init-from", ""}},
    {"--resume --overwrite", 2, {"--resume", "--overwrite", ""}},
    {"--tokenizer missing.json", 1, {"missing.json", "No such file", ""}},
    {"--tokenizer file", 1, {"file", "", ""}},
    // output
    {"-o file/run", 1, {"file", "", ""}},
    {"-o file", 1, {"file", "not a directory", ""}},
    {"-o /proc/run", 1, {"/proc/run", "cannot make the directory", ""}},
    // checkpoints
    {"--init-from missing", 1, {"missing", "", ""}},
    {"--init-from file", 1, {"file", "", ""}},
    {"--init-from whole --channels 64", 1, {"whole/step_00000030", "has shape", "64"}},
    {"--resume -o whole -t 16", 1, {"whole/step_00000030", "--sequence-length 32", "16"}},
    {"--init-from cut_model", 1, {"cut_model/step_00000030/model.safetensors", "", ""}},
    {"--resume -o cut_model", 1, {"cut_model/step_00000030/model.safetensors", "", ""}},
    {"--resume -o cut_optimizer", 1, {"cut_optimizer/step_00000030/optimizer-00000-of-00001", "", ""}},
    {"--resume -o no_optimizer", 1, {"no_optimizer/step_00000030", "optimizer", ""}},
    {"--resume -o cut_state", 1, {"cut_state/step_00000030/state.json", "", ""}},
    {"--resume -o cut_config", 1, {"cut_config/step_00000030/config.json", "", ""}},
    {"--resume -o whole_copy --layers 3", 1, {"whole_copy/step_00000030", "--layers 2", "3"}},
    {"--resume -o whole_copy --seed 5", 1, {"--seed 5", "1337", ""}},
    {"--resume -o whole_copy -x 20", 2, {"--steps 20", "30", ""}},
    {"--resume -o bad_latest", 1, {"bad_latest", "", ""}},
    {"--resume -o outside_latest", 1, {"outside_latest/latest", "beside it", ""}},
    {"--init-from outside_latest", 1, {"outside_latest/latest", "beside it", ""}},
    {"-o whole_copy/step_00000030",
     2,
     {"--output whole_copy/step_00000030", "name of a checkpoint", "whole_copy"}},
    {"--resume -o whole_copy/step_00000030/", 2, {"--output whole_copy", "name of a checkpoint", ""}},
    {"-o whole_copy/step_00000030/new", 2, {"--output whole_copy", "lies in the checkpoint", ""}},
    {"--init-from whole_copy/step_00000030/model.safetensors",
     1,
     {"a file", "lies in: whole_copy/step_00000030", ""}},
    {"--init-from whole_copy/latest", 1, {"whole_copy/latest", "a file", "lies in: whole_copy"}},
};

// The program must print one line on stderr that begins with its name and contains every
// text of `bad`. No partial file may remain.
static int is_answered_well(const BadInput* bad, const Result* result) {
    const char* end = strchr(result->err, '\n');
    int good = result->exit_code == bad->exit_code && end && !end[1];
    good = good && !strncmp(result->err, "train_gpt: ", 11);
    for (int i = 0; i < 3; i++) good = good && strstr(result->err, bad->says[i]) != NULL;
    if (!good)
        print_error("%s\n  exit code %d, want %d: %s\n", bad->options, result->exit_code, bad->exit_code,
                    result->err);
    return good;
}

static void damage_checkpoints(void) {
    static const char* const copies[] = {"cut_model",  "cut_optimizer", "no_optimizer", "cut_state",
                                         "cut_config", "whole_copy",    "bad_latest"};
    for (int i = 0; i < 7; i++) shell("cp -r whole %s", copies[i]);
    shell("truncate -s -1 cut_model/step_00000030/model.safetensors");
    shell("truncate -s -1 cut_optimizer/step_00000030/optimizer-00000-of-00001.safetensors");
    shell("rm no_optimizer/step_00000030/optimizer-00000-of-00001.safetensors");
    shell("truncate -s -9 cut_state/step_00000030/state.json");
    shell("truncate -s -9 cut_config/step_00000030/config.json");
    shell("echo step_00000099 > bad_latest/latest");
    shell("cp -r whole outside_latest; echo ../whole/step_00000030 > outside_latest/latest");
}

static void test_bad_input_gets_one_clear_line(void** state) {
    (void)state;
    damage_checkpoints();
    int wrong = 0;
    const int count = (int)(sizeof(bad_inputs) / sizeof(bad_inputs[0]));
    for (int i = 0; i < count; i++) {
        shell("rm -rf bad");
        const Result* result = train("bad", bad_inputs[i].options);
        wrong += !is_answered_well(&bad_inputs[i], result);
        // Errors in the data may leave metrics. All other errors must come before
        // the run makes its directory.
        if (exists("bad") && !strstr(bad_inputs[i].options, "outside")) {
            print_error("%s: made the output directory\n", bad_inputs[i].options);
            wrong++;
        }
        if (exists("bad")) must_hold_nothing_partial("bad");
    }
    shell("rm -rf bad");
    assert_int_equal(wrong, 0);
    // A mode without training must name the missing option. It must not ask for the
    // vocabulary, which comes from the checkpoint.
    must_fail_with(run("%s --generate", trainer), 2, "--generate: needs --init-from");
    must_fail_with(run("%s --write-logits x --tokens 1", trainer), 2, "--write-logits: needs --init-from");
    must_fail_with(run("%s --write-logits x --init-from whole", trainer), 2,
                   "--write-logits: needs --tokens");
    must_fail_with(run("%s --eval-retrieval x", trainer), 2, "--eval-retrieval: needs --init-from");
}

static void test_tokenizers_data_and_checkpoints_must_fit(void** state) {
    (void)state;
    shell("seq 1 3000 | tr '\\n' ' ' > one.txt; seq -f 'line %%g' 7000 9000 > two.txt");
    static const char* const names[] = {"one", "two"};
    for (int i = 0; i < 2; i++) {
        must_end_well(run("%s train -q --vocab-size 300 -o %s.json %s.txt", tokenizer, names[i], names[i]));
        must_end_well(run("%s prepare -q -t %s.json --output-prefix %s %s.txt", tokenizer, names[i], names[i],
                          names[i]));
    }
    must_end_well(run("%s train -q --vocab-size 280 -o small.json one.txt", tokenizer));
    const char* small = "--layers 1 --channels 32 --heads 2 -t 16 -b 2 -x 2 -v 0";
    must_end_well(run("%s %s -i 'one_train_*.bin' --tokenizer one.json -o fits", trainer, small));
    assert_true(exists("fits/step_00000002/tokenizer.json"));
    must_end_well(run("%s --generate --init-from fits --prompt '1 2 3' --sample-length 3", trainer));

    static const BadInput cases[] = {
        {"-i 'two_train_*.bin' --tokenizer one.json -o unfit", 1, {"two_train_", "another tokenizer", ""}},
        {"-i 'one_train_*.bin' -j 'two_val_*.bin' -o unfit", 1, {"two_val_", "another tokenizer", ""}},
        {"-i 'one_train_*.bin' --tokenizer small.json -o unfit", 1, {"one_train_", "300", "280"}},
        {"-i 'one_train_*.bin' --init-from fits --tokenizer small.json -o unfit",
         1,
         {"small.json", "not the tokenizer", "fits"}},
        {"-i 'one_train_*.bin' --init-from fits --tokenizer two.json -o unfit",
         1,
         {"two.json", "not the tokenizer", "fits"}},
        {"-i train_0.bin --init-from fits -o unfit", 1, {"train_0.bin", "97", "300"}},
        {"-i train_0.bin --vocab 97 --tokenizer one.json -o unfit", 1, {"one.json", "300", "97"}},
        {"-i train_0.bin --vocab 320 --tokenizer one.json -o unfit", 1, {"train_0.bin", "97", "300"}},
        {"-i padded.bin --vocab 320 --tokenizer one.json -x 20 -o unread",
         1,
         {"padded.bin", "token 300", "vocabulary of 300"}},
        {"-i 'one_train_*.bin' --init-from less -o unfit", 1, {"less/tokenizer.json", "300", "299"}},
    };
    // A shard with a token from the padding, and a config.json whose vocabulary is
    // smaller than the tokenizer's.
    Shard shard = good_shard(200);
    shard.vocabulary = 0, shard.bad_at = 7, shard.bad_token = 300;
    write_shard("padded.bin", shard);
    shell(
        "cp -r fits/step_00000002 less; sed -i 's/\"vocab_size\":.*/\"vocab_size\":299,/' less/config.json");
    int wrong = 0;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        wrong += !is_answered_well(&cases[i], run("%s %s %s", trainer, small, cases[i].options));
    assert_int_equal(wrong, 0);
    assert_false(exists("unfit"));
}

// The program prints tokens without text as numbers: here, from "300 " to "319 ".
static int shows_a_padded_token(const char* text) {
    for (; *text; text++)
        if (text[0] == '3' && (text[1] == '0' || text[1] == '1') && isdigit((unsigned char)text[2]) &&
            text[3] == ' ')
            return 1;
    return 0;
}

// The model has more rows than the tokenizer has tokens. The program trains, resumes and reads it. Sampling
// never chooses a row of the padding, even if that row is by far the most likely one.
static void test_padded_vocabulary(void** state) {
    (void)state;
    const char* padded =
        "--layers 1 --channels 32 --heads 2 -t 16 -b 2 -v 0 -i 'one_train_*.bin' -j 'one_val_*.bin'";
    const Result* result = run("%s %s --vocab 320 --tokenizer one.json -x 2 -v 1 -o padded", trainer, padded);
    must_end_well(result);
    assert_non_null(
        strstr(result->out, "the tokenizer has 300 tokens: the vocabulary's last 20 are padding"));
    must_end_well(run("%s %s -x 4 --resume -o padded", trainer, padded));
    // The norm's gain and all rows of the padding are large, so that one of these 20
    // rows always has the highest logit.
    const char* path = "padded/step_00000004/model.safetensors";
    randomize_weights(path);
    FILE* file = fopen(path, "r+b");
    uint64_t header;
    assert_int_equal(fread(&header, 8, 1, file), 1);
    fseek(file, 8 + (long)header + 300L * 32 * 4, SEEK_SET); // the embedding is the first tensor
    for (int i = 0; i < 20 * 32; i++) {
        const float value = (i / 32 % 2 ? 1e4f : -1e4f) * (float)(1 + i % 32);
        fwrite(&value, 4, 1, file);
    }
    fclose(file);
    for (int i = 0; i < 15; i++) {
        static const char* const temperatures[] = {"0", "1", "100"};
        result =
            run("%s --generate --init-from padded --sample-length 15 --seed %d --temperature %s --top-k 400",
                trainer, i / 3, temperatures[i % 3]);
        must_end_well(result);
        assert_false(shows_a_padded_token(result->out));
    }
    must_end_well(run("%s --write-logits logits --tokens 1,319 --init-from padded", trainer));
    // Without a tokenizer, the program does not know which rows are padding.
    shell("rm padded/step_00000004/tokenizer.json padded/tokenizer.json");
    result = run("%s --generate --init-from padded --sample-length 15", trainer);
    must_end_well(result);
    assert_true(shows_a_padded_token(result->out));
    must_end_well(run("%s --generate --init-from padded --tokenizer one.json --sample-length 3", trainer));
    must_fail_with(run("%s %s --init-from padded", trainer, padded), 1, "--tokenizer tells the size");
    must_end_well(run("%s %s --init-from padded --tokenizer one.json -x 1", trainer, padded));
}

// Before training, the program detects a limit on file size that is too small for a checkpoint.
// It also detects a shell's limit on memory.
static void test_limits_are_seen_before_training(void** state) {
    (void)state;
    for (rlim_t bytes = 500; bytes < 200000; bytes *= 5) { // the error message itself goes to a file
        Treatment treatment = {0};
        treatment.file_bytes = bytes;
        const Result* result = run_treated(&treatment, command("full", "> /dev/null"));
        BadInput wanted = {"full disk", 1, {"--output full", "a checkpoint has a file of", "ulimit -f"}};
        assert_true(is_answered_well(&wanted, result));
        assert_false(exists("full"));
    }
    must_end_well(train("full", ""));
    must_be_same_run("whole", "full", STEPS);
#ifndef __SANITIZE_ADDRESS__ // the address sanitizer maps terabytes
    char line[4096];
    print_to(line, sizeof(line), "sh -c \"ulimit -v 1500000; OMP_NUM_THREADS=1 exec %s\"",
             command("virtual", "--layers 24 --channels 512 --heads 8 -t 512 -b 16 -d 8192"));
    const Treatment nothing = {0};
    must_fail_with(run_treated(&nothing, line), 1, "ulimit -v");
    assert_false(exists("virtual"));
    // The program must count the stacks of 16 threads, 1 GB in all, only once.
    print_to(line, sizeof(line), "sh -c \"ulimit -s 65536; ulimit -v 1700000; OMP_NUM_THREADS=16 exec %s\"",
             command("virtual", "--dry-run"));
    must_end_well(run_treated(&nothing, line));
    shell("rm -rf large; mkdir large; cp whole/step_00000030/* large");
    shell(
        "sed -i 's/\"max_position_embeddings\":.*/\"max_position_embeddings\":10000000,/' large/config.json");
    must_fail_with(
        run("sh -c 'ulimit -v 1500000; OMP_NUM_THREADS=1 exec %s --generate --init-from large -t 10000000'",
            trainer),
        1, "ulimit -v");
#endif
}

// The limit on file size is too small for metrics.jsonl. When the run fails, no half-written file may remain.
static void test_a_full_disk_leaves_no_partial_checkpoint(void** state) {
    (void)state;
    Treatment treatment = {0};
    treatment.file_bytes = 12000; // more than any file of this model, less than 200 lines of metrics
    BadInput wanted = {"full disk", 1, {"full/", "cannot write", "File too large"}};
    shell("rm -rf full");
    const Result* result =
        run_treated(&treatment, command("full", "--layers 1 --channels 2 --heads 1 --kv-heads 1 --ffn 1 "
                                                "-x 200 > /dev/null"));
    assert_true(is_answered_well(&wanted, result));
    must_hold_nothing_partial("full");
}

static void test_a_full_file_system_leaves_no_partial_checkpoint(void** state) {
    (void)state;
    mkdir("small", 0777);
    if (mount("tmpfs", "small", "tmpfs", 0, "size=300k") != 0) {
        print_message("SKIPPED: a small file system cannot be mounted: %s\n", strerror(errno));
        skip();
    }
    const Result* result = train("small/run", "--channels 64 --ffn 128");
    BadInput too_large = {"full file system", 1, {"--output small/run", "a checkpoint takes", "are free"}};
    int good = is_answered_well(&too_large, result) && !exists("small/run");
    result = train("small/run", "");
    good = good && strstr(result->out, "8 checkpoints of") && strstr(result->out, "--keep");
    BadInput wanted = {"full file system", 1, {"small/run", "No space left on device", ""}};
    good = is_answered_well(&wanted, result) && good;
    shell("cp -r small/run rescued");
    // A finished run writes no checkpoint, so it needs no room for one.
    good = mount("tmpfs", "small", "tmpfs", MS_REMOUNT, "size=400k") == 0 && good;
    shell("rm -rf small/*; mkdir small/done; cd whole; cp -r step_%08d latest *.jsonl *.log ../small/done",
          STEPS);
    result = train("small/done", "--resume");
    good = result->exit_code == 0 && good;
    if (result->exit_code != 0) print_error("%s", result->err);
    umount("small");
    assert_true(good);
    must_hold_nothing_partial("rescued");
    // The run resumes from the files that were complete.
    must_end_well(train("rescued", "--resume"));
    must_be_same_run("whole", "rescued", STEPS);
}

// ----------------------------------------------------------------------------
// Scripts

static void test_plot(void** state) {
    (void)state;
    must_fail_with(run("%s/scripts/plot.sh -o curves", top), 2, "no run given");
    must_fail_with(run("%s/scripts/plot.sh whole", top), 2, "--output");
    must_fail_with(run("%s/scripts/plot.sh whole --colour -o curves", top), 2, "--colour: unknown option");
    if (run("gnuplot --version")->exit_code != 0) {
        print_message("SKIPPED: gnuplot is missing\n");
        skip();
    }
    must_fail_with(run("%s/scripts/plot.sh nowhere -o curves", top), 1, "nowhere: no such directory");
    shell("mkdir hollow; mkdir young; head -n 1 whole/metrics.jsonl > young/metrics.jsonl");
    must_fail_with(run("%s/scripts/plot.sh whole hollow -o curves", top), 1, "hollow: holds no run");
    must_fail_with(run("%s/scripts/plot.sh young -o curves", top), 1, "has no loss yet");
    assert_false(exists("curves.png"));
    must_end_well(
        run("%s/scripts/plot.sh 'a \"name\", it'\\''s=whole' killed --output sub/curves --title 'x_1'", top));
    char head[64];
    read_text(head, sizeof(head), "sub/curves.png");
    assert_memory_equal(head, "\x89PNG", 4);
    must_end_well(run("grep -q 'validation loss' sub/curves.svg"));
    // Without timings the plot has no seconds, and only its first panel.
    shell("cp -r whole untimed; rm untimed/timings.jsonl");
    must_end_well(run("%s/scripts/plot.sh untimed -o untimed_curves", top));
}

// ----------------------------------------------------------------------------
// All tests

static int set_up(void** state) {
    (void)state;
    const char* build = getenv("BUILD") ? getenv("BUILD") : "build";
    char path[PATH_MAX];
    print_to(path, sizeof(path), "%s/train_gpt_cpu_flashmoba_kdgqa_kconv3_fp32", build);
    if (!realpath(path, with_kinds)) {
        print_error("%s: %s (make test builds it)\n", path, strerror(errno));
        return -1;
    }
    print_to(path, sizeof(path), "%s/train_gpt_cpu_fp32", build);
    if (!realpath(path, trainer)) {
        print_error("%s: %s (run this from the top of the tree, after make)\n", path, strerror(errno));
        return -1;
    }
    print_to(path, sizeof(path), "%s/tokenizer", build);
    if (!realpath(path, tokenizer) || enter_directory() != 0) return -1;
    write_shards();
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_training_learns_and_repeats_bitwise),
        cmocka_unit_test(test_killed_at_any_moment_it_resumes_bitwise),
        cmocka_unit_test(test_a_signal_writes_a_checkpoint),
        cmocka_unit_test(test_signals_are_taken_on_no_stack),
        cmocka_unit_test(test_nohup_ignores_the_terminal),
        cmocka_unit_test(test_a_signal_before_training_ends_at_once),
        cmocka_unit_test(test_a_signal_breaks_off_a_validation),
        cmocka_unit_test(test_a_signal_breaks_off_a_sample),
        cmocka_unit_test(test_output_without_a_reader_writes_a_checkpoint),
        cmocka_unit_test(test_a_closed_stdout_is_no_file_of_the_run),
        cmocka_unit_test(test_a_directory_is_of_one_run),
        cmocka_unit_test(test_max_seconds_writes_a_checkpoint),
        cmocka_unit_test(test_micro_batches_give_the_same_losses),
        cmocka_unit_test(test_hints_can_be_followed),
        cmocka_unit_test(test_recompute_changes_no_bit),
        cmocka_unit_test(test_a_resume_has_the_same_data),
        cmocka_unit_test(test_a_resume_tells_what_it_changes),
        cmocka_unit_test(test_dry_run_leaves_nothing),
        cmocka_unit_test(test_help_follows_the_table),
        cmocka_unit_test(test_bad_input_gets_one_clear_line),
        cmocka_unit_test(test_tokenizers_data_and_checkpoints_must_fit),
        cmocka_unit_test(test_padded_vocabulary),
        cmocka_unit_test(test_limits_are_seen_before_training),
        cmocka_unit_test(test_a_full_disk_leaves_no_partial_checkpoint),
        cmocka_unit_test(test_a_full_file_system_leaves_no_partial_checkpoint),
        cmocka_unit_test(test_generation_is_that_of_the_logits),
        cmocka_unit_test(test_variants),
        cmocka_unit_test(test_kinds_come_from_the_checkpoint),
        cmocka_unit_test(test_a_build_with_kinds),
        cmocka_unit_test(test_plot),
        cmocka_unit_test(test_a_run_is_not_overwritten_by_accident),
        cmocka_unit_test(test_peak_memory_is_as_planned),
    };
    return cmocka_run_group_tests(tests, set_up, leave_directory);
}
