/*
Tests the trainer with several ranks, started by mpirun on this machine: equal curves for any number of ranks,
the sharded optimizer state, resuming with another number of ranks, and ranks that are killed.

    BUILD=build build/test/test_distributed      from the top of the tree
    TEST_LONG=1                                  more kills; TEST_LONG=rest: only these

Curves of different numbers of ranks differ only in the order of sums, and must agree to 1e-5. Runs with the
same number of ranks must agree to the last bit. Without mpirun the test prints that it is skipped.
*/
#define _GNU_SOURCE
#include "dev/cpu/device.h" // defines stream_t, for comm.h
#include "runtime/comm.h"   // defines comm_start
#include "runtime/random.h" // defines random_uniform
#include "test/capture.h"   // defines capture
#include "test/programs.h"  // defines run, must_end_well, must_equal, write_shard

// Twelve sequences a step: with 1, 2, 3 or 4 ranks, and one or more micro-batches on each.
#define MODEL                                                                                                \
    "--layers 2 --channels 64 --heads 2 --kv-heads 1 --ffn 128 --vocab 97 -t 64 --pattern GS --window 24"
#define RUN "-i train.bin -j val.bin -d 768 -l 1e-2 -u 3 -v 6 -m 2 --log-every 1 -n 4 --keep 0"
enum { STEPS = 12, RANKS = 4 };

static char build[PATH_MAX];   // the directory of the programs
static char trainer[PATH_MAX]; // the CPU trainer

static void find_trainer(char path[PATH_MAX], const char* name) {
    char wanted[PATH_MAX];
    print_to(wanted, sizeof(wanted), "%s/train_gpt_%s", build, name);
    if (!realpath(wanted, path)) print_error("%s: %s (make test builds it)\n", wanted, strerror(errno));
    assert_int_equal(access(path, X_OK), 0);
}

static const char* mpirun(int ranks) {
    static char command[64];
    print_to(command, sizeof(command), "mpirun --oversubscribe -np %d", ranks);
    return command;
}

// Trains with this many ranks; 0: without mpirun.
static const Result* train(const char* program, int ranks, const char* output, const char* more) {
    const Result* result = run("%s %s " MODEL " " RUN " -x %d -o %s %s", ranks ? mpirun(ranks) : "", program,
                               STEPS, output, more);
    if (result->exit_code != 0) print_error("%s, %d ranks: %s\n", output, ranks, result->err);
    assert_int_equal(result->exit_code, 0);
    return result;
}

// Rounding in earlier steps moves every weight. The norm of the gradient depends on all of
// them, so it differs more than the losses.
static void must_follow_in_all(const char* output, const char* yardstick, double bound) {
    must_follow(output, yardstick, "loss", 0, bound);
    must_follow(output, yardstick, "val_loss", 0, bound);
    must_follow(output, yardstick, "grad_norm", 0, 10 * bound);
}

// Compares weights, metrics and the optimizer slices of all ranks bitwise.
static void must_be_equal(const char* a, const char* b, int ranks) {
    char left[256], right[256];
    print_to(left, sizeof(left), "%s/metrics.jsonl", a);
    print_to(right, sizeof(right), "%s/metrics.jsonl", b);
    must_equal(left, right);
    for (int rank = -1; rank < ranks; rank++) {
        char name[64] = "model.safetensors";
        if (rank >= 0) print_to(name, sizeof(name), "optimizer-%05d-of-%05d.safetensors", rank, ranks);
        print_to(left, sizeof(left), "%s/step_%08d/%s", a, STEPS, name);
        print_to(right, sizeof(right), "%s/step_%08d/%s", b, STEPS, name);
        must_equal(left, right);
    }
}

// ----------------------------------------------------------------------------
// The same curves

static void test_any_number_of_ranks_trains_the_same(void** state) {
    (void)state;
    train(trainer, 1, "one", "-b 3");
    must_be_equal("one", "single", 1);
    for (int ranks = 2; ranks <= RANKS; ranks++) {
        char output[32], again[32], sharded[32];
        print_to(output, sizeof(output), "ranks_%d", ranks);
        print_to(again, sizeof(again), "ranks_%d_again", ranks);
        print_to(sharded, sizeof(sharded), "ranks_%d_sharded", ranks);
        train(trainer, ranks, output, "-b 1");
        must_follow_in_all(output, "single", 1e-5);
        train(trainer, ranks, again, "-b 1");
        must_be_equal(again, output, ranks);
        train(trainer, ranks, sharded, "-b 1 --zero 1");
        must_be_equal(sharded, output, ranks);
    }
}

// The default total batch is one micro-batch of each rank.
static void test_the_default_batch_is_of_all_ranks(void** state) {
    (void)state;
    const Result* result = run("%s %s " MODEL " -i train.bin -b 2 -x 1 --dry-run", mpirun(3), trainer);
    must_end_well(result);
    assert_non_null(strstr(result->out, "1 of 384 tokens: 3 x (2, 64)"));
    assert_non_null(strstr(result->out, "ranks    3, 3 of them on this host"));
    assert_null(strstr(strstr(result->out, "ranks    3") + 1, "ranks    3")); // only one rank prints
}

#define FLASHMOBA "--attention flashmoba --moba-block 16 --moba-topk 2 "
static const char* const variants[] = {
    FLASHMOBA "--query-heads kdgqa --kconv 3 --kd-source lagged",
    FLASHMOBA "--query-heads kdgqa --kconv 3 --kd-source forward",
    "--query-heads dgqa --kconv 5 --kd-window 3 --dgqa-kind diff",
    FLASHMOBA "--query-heads pgqa --kconv 5",
};

// The maps of query heads depend on the keys of all ranks, and the noise on a sequence's place in the step.
static void test_variants_train_the_same(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof(variants) / sizeof(variants[0]); i++) {
        char more[256], yardstick[32], output[32], sharded[32];
        print_to(yardstick, sizeof(yardstick), "variant_%zu", i);
        print_to(output, sizeof(output), "variant_%zu_ranks", i);
        print_to(sharded, sizeof(sharded), "variant_%zu_sharded", i);
        // With the batch's own keys as the source, a map comes from the micro-batches of all ranks together.
        print_to(more, sizeof(more), "--channels 128 --heads 4 --kv-heads 2 %s -b 6", variants[i]);
        train(trainer, 0, yardstick, more);
        more[strlen(more) - 1] = '3';
        train(trainer, 2, output, more);
        must_follow_in_all(output, yardstick, 1e-5);
        print_to(more + strlen(more), sizeof(more) - strlen(more), " --zero 1");
        train(trainer, 2, sharded, more);
        must_be_equal(sharded, output, 2);
    }
}

// The CUDA program on the emulator in bf16. Its master weights are sharded too.
static void test_the_cuda_program_by_two(void** state) {
    (void)state;
    char path[PATH_MAX];
    static const char* const precisions[] = {"fp32", "bf16"};
    static const double bounds[] = {1e-5, 1e-3};
    for (int i = 0; i < 2; i++) {
        char name[64], single[32], two[32], sharded[32];
        print_to(name, sizeof(name), "simt_%s", precisions[i]);
        print_to(single, sizeof(single), "simt_%s", precisions[i]);
        print_to(two, sizeof(two), "simt_%s_two", precisions[i]);
        print_to(sharded, sizeof(sharded), "simt_%s_sharded", precisions[i]);
        find_trainer(path, name);
        train(path, 0, single, "-d 128 -b 2");
        train(path, 2, two, "-d 128 -b 1");
        must_follow_in_all(two, single, bounds[i]);
        train(path, 2, sharded, "-d 128 -b 1 --zero 1");
        must_be_equal(sharded, two, 2);
    }
}

// ----------------------------------------------------------------------------
// Checkpoints and memory

// Makes the run `output` from a copy of the checkpoint and the metrics of another run at `step`.
static void fork_run(const char* output, const char* of, int step) {
    shell("rm -rf %s; mkdir %s; cp -r %s/step_%08d %s; cp %s/metrics.jsonl %s/timings.jsonl %s", output,
          output, of, step, output, of, of, output);
}

// 4 ranks with shards, then 2 with whole copies, then 3 with shards must give the
// curve of an uninterrupted run.
static void test_a_run_goes_on_by_other_ranks(void** state) {
    (void)state;
    fork_run("by_2", "ranks_4_sharded", 4);
    train(trainer, 2, "by_2", "-b 2 --resume");
    fork_run("by_3", "by_2", 8);
    train(trainer, 3, "by_3", "-b 4 --resume --zero 1");
    must_follow_in_all("by_3", "single", 1e-5);
    fork_run("by_1", "by_2", 8);
    train(trainer, 0, "by_1", "-b 12 --resume");
    must_follow_in_all("by_1", "single", 1e-5);
    // With the same number of ranks as before, the run is bitwise the same, with shards or with whole copies.
    fork_run("by_4", "ranks_4_sharded", 4);
    train(trainer, 4, "by_4", "-b 1 --resume");
    must_be_equal("by_4", "ranks_4", 4);
    // In bf16 the master weights are sharded too, and the parameters are rounded copies of them.
    char path[PATH_MAX];
    find_trainer(path, "simt_bf16");
    fork_run("simt_by_2", "simt_bf16_two", 8);
    train(path, 2, "simt_by_2", "-d 128 -b 1 --resume --zero 1");
    must_be_equal("simt_by_2", "simt_bf16_two", 2);
    fork_run("simt_by_1", "simt_bf16_sharded", 8);
    train(path, 0, "simt_by_1", "-d 128 -b 2 --resume");
    must_follow_in_all("simt_by_1", "simt_bf16_sharded", 1e-3);
}

// Reads the number in MB that follows `name` in the output of a program.
static double printed(const char* text, const char* name) {
    const char* at = strstr(text, name);
    assert_non_null(at);
    return strtod(at + strlen(name), NULL);
}

// With 4 ranks and --zero 1, each rank holds a quarter of the moments. The plan and the measured
// memory must both show it. The comparison leaves out the plan's figure for program and
// libraries, which varies by one or two megabytes.
static void test_shards_take_less_memory(void** state) {
    (void)state;
    double planned[2], peak[2], optimizer[2];
    for (int zero = 0; zero < 2; zero++) {
        const Result* result =
            run("%s %s --layers 4 --channels 512 --vocab 97 -t 32 -i train.bin -b 1 -x 3 --zero %d",
                mpirun(4), trainer, zero);
        must_end_well(result);
        planned[zero] =
            printed(result->out, "planned peak") - printed(result->out, "program, libraries, data");
        optimizer[zero] = printed(result->out, "  optimizer");
        peak[zero] = printed(result->out, "peak memory");
    }
    print_message(
        "model %.1f and %.1f MB, of these the optimizer %.1f and %.1f; measured in all %.1f and %.1f\n",
        planned[0], planned[1], optimizer[0], optimizer[1], peak[0], peak[1]);
    assert_true(optimizer[1] < optimizer[0] * 0.27 && optimizer[0] > 50);
    assert_true(fabs((planned[0] - planned[1]) - (optimizer[0] - optimizer[1])) < 0.5);
    assert_true(peak[0] - peak[1] > 0.9 * (optimizer[0] - optimizer[1]));
}

// ----------------------------------------------------------------------------
// Runs that end early

// The process id of the rank-th child of `parent`; 0 if it does not exist yet.
static pid_t child_of(pid_t parent, int rank) {
    char path[64], text[1024];
    print_to(path, sizeof(path), "/proc/%d/task/%d/children", (int)parent, (int)parent);
    read_text(text, sizeof(text), path);
    char* at = text;
    long child = 0;
    for (int i = 0; i <= rank; i++) {
        char* end;
        child = strtol(at, &end, 10);
        if (end == at) return 0;
        at = end;
    }
    return (pid_t)child;
}

// Seconds to wait for an event that must happen, even on a busy machine.
enum { PATIENCE = 300 };

// Waits for the job for at most this many seconds. Returns 1 if it has ended.
static int ends_within(pid_t job, int* status, double seconds) {
    for (const double since = now(); now() - since < seconds; sleep_ms(5))
        if (waitpid(job, status, WNOHANG) == job) return 1;
    return 0;
}

// Resumes the run and kills one rank, chosen by `number`, during the start or some milliseconds after a new line
// of metrics. Waits for the job to end. Returns 0 if the run finished first.
static int kill_one(int number) {
    enum { KILLED_RANKS = 3 };
    char line[4096], err[8192], wanted[64];
    const int rank = (int)(random_uniform(7, 1, (uint64_t)number) * KILLED_RANKS), new_lines = number % 4;
    const double wait = random_uniform(7, 2, (uint64_t)number) * (new_lines ? 0.15 : 0.6);
    const int until = count_lines("killed/metrics.jsonl") + new_lines;
    print_to(line, sizeof(line), "%s %s " MODEL " " RUN " -n 1 -x %d -o killed -b 1 --zero 1 --resume",
             mpirun(KILLED_RANKS), trainer, STEPS);
    const pid_t job = start(line, "stdout.txt", "stderr.txt");
    pid_t victim = 0;
    int status;
    for (const double since = now(); !victim && now() - since < PATIENCE; sleep_ms(5))
        victim = child_of(job, rank);
    assert_true(victim > 0);
    while (new_lines && count_lines("killed/metrics.jsonl") < until)
        if (ends_within(job, &status, 0.01)) return 0;
    if (ends_within(job, &status, wait)) return 0;
    (void)kill(victim, SIGKILL);
    const int ended = ends_within(job, &status, PATIENCE);
    if (!ended) kill(job, SIGKILL);
    assert_true(ended);
    if (WEXITSTATUS(status) == 0) return 0; // the rank had finished its work
    assert_int_equal(WEXITSTATUS(status), 128 + SIGKILL);
    read_text(err, sizeof(err), "stderr.txt");
    // On a busy machine, mpirun sometimes reports a failed process without its rank.
    print_to(wanted, sizeof(wanted), "process rank %d with PID", rank);
    const int told = strstr(err, wanted) || strstr(err, "1 process returned");
    if (!told) print_error("%s\n", err);
    assert_true(told);
    return 1;
}

// Kills random ranks at random moments and resumes each time. The finished run must equal a run that was never
// killed.
static void test_a_killed_rank_ends_the_job(void** state) {
    (void)state;
    const int kills = getenv("TEST_LONG") ? 45 : 5;
    int runs = 0;
    if (!exists("ranks_3")) train(trainer, 3, "ranks_3", "-b 1");
    for (int killed = 0; killed < kills; runs++) {
        assert_true(runs < 10 * kills);
        killed += kill_one(runs);
        if (exists("killed/step_00000012") || runs % 10 == 9 || killed == kills) {
            train(trainer, 3, "killed", "-b 1 --zero 1 --resume");
            must_be_equal("killed", "ranks_3", 3);
            shell("rm -rf killed");
        }
    }
    print_message("%d of %d runs were killed before their end\n", kills, runs);
}

// mpirun passes SIGUSR1 to the ranks. They finish the step and write a checkpoint,
// from which the run can resume.
static void test_a_signal_stops_all(void** state) {
    (void)state;
    char line[4096], out[65536];
    print_to(line, sizeof(line), "%s %s " MODEL " " RUN " -x 100000 -n 0 -o stopped -b 1", mpirun(2),
             trainer);
    const pid_t job = start(line, "stdout.txt", "stderr.txt");
    int status;
    await_lines(job, "stopped/metrics.jsonl", 6);
    for (int rank = 0; rank < 2; rank++) must_take_signals_on_no_stack(child_of(job, rank), 2);
    kill(job, SIGUSR1);
    assert_int_equal(waitpid(job, &status, 0), job);
    assert_int_equal(WEXITSTATUS(status), 128 + SIGUSR1);
    read_text(out, sizeof(out), "stdout.txt");
    assert_non_null(strstr(out, "stopped after step"));
    assert_true(exists("stopped/latest"));
    must_end_well(run("%s %s " MODEL " " RUN " -x 100000 -n 0 -o stopped -b 1 --resume --max-seconds 0.2",
                      mpirun(3), trainer));
}

// The run spends nearly all of its time in validations, so the signal arrives during one.
// All ranks must interrupt it, even if only the second rank receives the signal. The
// resumed run must equal an uninterrupted one.
static void test_a_signal_stops_a_validation_of_all(void** state) {
    (void)state;
    const char* slow = MODEL " " RUN " -j train.bin -m 100000 -v 1 -s 5 -x 20 -b 1";
    char line[4096];
    must_end_well(run("%s %s %s -o unbroken", mpirun(3), trainer, slow));
    for (int i = 0; i < 3; i++) {
        print_to(line, sizeof(line), "%s %s %s -o broken --resume", mpirun(3), trainer, slow);
        const pid_t job = start(line, "stdout.txt", "stderr.txt");
        await_lines(job, "broken/metrics.jsonl", 4 + 2 * i); // the start, then validations and steps
        sleep_ms(20);
        kill(i == 1 ? child_of(job, 1) : job, SIGUSR1);
        assert_int_equal(end_of(job), 128 + SIGUSR1);
        assert_true(exists("broken/latest"));
    }
    must_end_well(run("%s %s %s -o broken --resume", mpirun(3), trainer, slow));
    must_equal("broken/metrics.jsonl", "unbroken/metrics.jsonl");
    must_equal("broken/step_00000020/model.safetensors", "unbroken/step_00000020/model.safetensors");
}

// ----------------------------------------------------------------------------
// Starts that must fail

// The job must fail with this exit code, and report the error once, in a line that contains this text.
static void job_must_fail(const Result* result, int exit_code, const char* says) {
    const char* at = strstr(result->err, says);
    if (result->exit_code != exit_code || !at) print_error("%s", result->err);
    assert_int_equal(result->exit_code, exit_code);
    assert_non_null(at);
    assert_null(strstr(at + 1, says));
}

static void test_bad_calls_are_told_once(void** state) {
    (void)state;
    char host[64], speaker[96]; // mpirun's own messages contain the host's name alone
    assert_int_equal(gethostname(host, sizeof(host)), 0);
    print_to(speaker, sizeof(speaker), "rank 0 on %s: --batch 0", host);
    job_must_fail(run("%s %s -b 0", mpirun(3), trainer), 2, speaker);
    job_must_fail(run("%s %s " MODEL " -i train.bin -b 2 -d 128", mpirun(2), trainer), 2,
                  "--total-batch 128: must be a multiple of 2 processes x --batch 2 x --sequence-length 64 = "
                  "256 tokens");
    job_must_fail(run("%s %s --generate --init-from single", mpirun(2), trainer), 2,
                  "--generate: runs in one process, not in 2");
    job_must_fail(run("%s %s " MODEL " -i train.bin -b 1 -x 1 --zero 2", mpirun(2), trainer), 2, "--zero 2");
    assert_int_equal(run("%s %s " MODEL " -i train.bin -b 1 -x 1 -o single", mpirun(2), trainer)->exit_code,
                     2);
}

static void test_ranks_that_differ_are_found(void** state) {
    (void)state;
    char other[PATH_MAX], more[512];
    find_trainer(other, "cpu_flashmoba_kdgqa_kconv3_fp32");
    const char* line = MODEL " -i train.bin -b 1 -d 384 -x 1 -o never";
    job_must_fail(run("%s %s %s : -np 1 %s %s --seed 5", mpirun(2), trainer, line, trainer, line), 1,
                  "the number of arguments is");
    job_must_fail(run("%s %s %s -u 0 : -np 1 %s %s -u 1", mpirun(2), trainer, line, trainer, line), 1,
                  ", after -u, is 1, but on rank 0 it is 0");
    job_must_fail(run("%s %s %s : -np 1 %s %s", mpirun(2), trainer, line, other, line), 1, "rank 2 on");
    shell("mkdir -p here there; cp train.bin here");
    job_must_fail(
        run("%s -wdir here %s %s : -np 1 -wdir there %s %s", mpirun(2), trainer, line, trainer, line), 1,
        "train.bin: no file matches");
    shell("cp short.bin there/train.bin");
    job_must_fail(
        run("%s -wdir here %s %s : -np 1 -wdir there %s %s", mpirun(2), trainer, line, trainer, line), 1,
        "the training data is train.bin of 5000 tokens");
    // The data have the same length but one other token. Then the weights, or the
    // moments, differ under the same name.
    shell("cp train.bin there; printf '\\1\\1' | dd of=there/train.bin bs=1 seek=1100 conv=notrunc 2>dd.txt");
    job_must_fail(
        run("%s -wdir here %s %s : -np 1 -wdir there %s %s", mpirun(2), trainer, line, trainer, line), 1,
        "the training data is train.bin of 20000 tokens");
    shell(
        "cp train.bin there; cp -r single/step_00000004 here/start; cp -r single/step_00000008 there/start");
    print_to(more, sizeof(more), "%s --init-from start", line);
    job_must_fail(
        run("%s -wdir here %s %s : -np 1 -wdir there %s %s", mpirun(2), trainer, more, trainer, more), 1,
        "the hash of the weights is");
    shell(
        "mkdir here/run there/run; cp -r single/step_00000004 here/run; cp -r single/step_00000004 there/run;"
        "cp single/step_00000008/optimizer* there/run/step_00000004");
    print_to(more, sizeof(more), MODEL " -i train.bin -b 1 -d 768 -x 12 -o run --resume");
    job_must_fail(
        run("%s -wdir here %s %s : -np 1 -wdir there %s %s", mpirun(2), trainer, more, trainer, more), 1,
        "the hash of the optimizer's state is");
    assert_false(exists("never") || exists("here/never") || exists("there/never"));
}

// One rank never calls MPI. The others must not wait for it forever.
static void test_a_start_that_hangs_is_given_up(void** state) {
    (void)state;
    const double since = now();
    job_must_fail(run("env MOBA_START_SECONDS=2 %s %s -b 1 : -np 1 sleep 1000", mpirun(1), trainer), 1,
                  ": the start is not done after 2 s: another rank is not there");
    assert_true(now() - since < PATIENCE);
}

// If srun starts mpirun's daemons, the environment has srun's own number of processes.
static void test_the_nearest_launcher_counts(void** state) {
    (void)state;
    const Result* result =
        run("env SLURM_STEP_NUM_TASKS=4 %s %s " MODEL " -i train.bin -b 1 --dry-run", mpirun(2), trainer);
    must_end_well(result);
    assert_non_null(strstr(result->out, "ranks    2"));
}

// Connections to many ranks need many open files.
static void test_few_files_are_no_bound(void** state) {
    (void)state;
    must_end_well(
        run("%s sh -c 'ulimit -Sn 12; exec %s " MODEL " -i train.bin -b 1 --dry-run'", mpirun(2), trainer));
}

// A rank that cannot write its part ends the job. It must not remove the parts of other ranks,
// because a new run may already be writing them.
static void test_a_rank_removes_its_own_part_alone(void** state) {
    (void)state;
    const char* line = MODEL " " RUN " -x 4 -b 1 -o limited";
    job_must_fail(run("%s --mca btl self,tcp %s %s : -np 1 sh -c 'ulimit -f 100; exec %s %s'", mpirun(1),
                      trainer, line, trainer, line),
                  1, "optimizer-00001-of-00002.safetensors: cannot write: File too large");
    assert_true(exists("limited/step_00000004.tmp"));
    assert_false(exists("limited/step_00000004.tmp/optimizer-00001-of-00002.safetensors"));
    assert_false(exists("limited/latest"));
    train(trainer, 2, "limited", "-b 1 --resume");
    must_be_equal("limited", "ranks_2", 2);
}

static void start_as_one_of_two(void* name) {
    setenv((const char*)name, "2", 1);
    comm_start();
}

// This test is built without MPI, so comm_start() must refuse to run as one rank of
// several. Otherwise every rank would train alone.
static void test_a_build_for_one_process_says_so(void** state) {
    (void)state;
    static const char* const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 3; i++) {
        const struct Captured captured = capture(start_as_one_of_two, (void*)names[i]);
        assert_int_equal(captured.exit_code, 1);
        assert_non_null(
            strstr(captured.text, "started as one of 2 processes, but this build is for one: install MPI"));
    }
    assert_int_equal(comm_size(), 1);
}

// The trainer has MPI, but a launcher that MPI does not know started it.
static void test_a_launcher_without_mpi_is_refused(void** state) {
    (void)state;
    must_fail_with(run("env SLURM_STEP_NUM_TASKS=2 %s -b 1", trainer), 1, "but MPI knows of 1");
}

// ----------------------------------------------------------------------------

static int set_up(void** state) {
    (void)state;
    if (!realpath(getenv("BUILD") ? getenv("BUILD") : "build", build)) return -1;
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    // A waiting rank leaves its core to the others. The test's own TMPDIR separates
    // mpirun's files from those of other jobs.
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    if (enter_directory() != 0) return -1;
    setenv("TMPDIR", directory, 1);
    write_shard("train.bin", good_shard(20000));
    write_shard("short.bin", good_shard(5000));
    write_shard("val.bin", good_shard(3000));
    find_trainer(trainer, "cpu_fp32");
    train(trainer, 0, "single", "-b 3");
    return 0;
}

int main(void) {
    const struct CMUnitTest alone[] = {
        cmocka_unit_test(test_a_build_for_one_process_says_so),
    };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_number_of_ranks_trains_the_same),
        cmocka_unit_test(test_the_default_batch_is_of_all_ranks),
        cmocka_unit_test(test_variants_train_the_same),
        cmocka_unit_test(test_the_cuda_program_by_two),
        cmocka_unit_test(test_a_run_goes_on_by_other_ranks),
        cmocka_unit_test(test_shards_take_less_memory),
        cmocka_unit_test(test_a_killed_rank_ends_the_job),
        cmocka_unit_test(test_a_signal_stops_all),
        cmocka_unit_test(test_a_signal_stops_a_validation_of_all),
        cmocka_unit_test(test_bad_calls_are_told_once),
        cmocka_unit_test(test_ranks_that_differ_are_found),
        cmocka_unit_test(test_a_start_that_hangs_is_given_up),
        cmocka_unit_test(test_the_nearest_launcher_counts),
        cmocka_unit_test(test_few_files_are_no_bound),
        cmocka_unit_test(test_a_rank_removes_its_own_part_alone),
        cmocka_unit_test(test_a_launcher_without_mpi_is_refused),
    };
    const char* wanted = getenv("TEST_LONG");
    if (wanted && !strcmp(wanted, "rest")) cmocka_set_test_filter("test_a_killed_rank_ends_the_job");
    const int failed = cmocka_run_group_tests(alone, NULL, NULL);
    if (system("mpirun --version >/dev/null 2>&1") != 0) {
        printf("SKIPPED: nothing was run as several processes: no mpirun here (scripts/install.sh)\n");
        return failed;
    }
    return failed + cmocka_run_group_tests(tests, set_up, leave_directory);
}
