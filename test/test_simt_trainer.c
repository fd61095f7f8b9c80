/*
Compares the CUDA program with the CPU program: the same steps from the same checkpoint over the same data,
and checkpoints that move between them.

    BUILD=build build/test/test_simt_trainer                     from the top of the tree: the emulator (DEVICE=simt)
    BUILD=build DEVICE=cuda build/test/test_simt_trainer         the GPU of this machine

TEST_LONG=1 adds every combination of attention, grouping and taps, in fp32; TEST_LONG=rest runs only these.
The device must write the same bits with and without --cuda-graph and --recompute.

The reference is the CPU in fp32. The fp32 build of the other device computes the same in another order, and
must stay within 1e-4 of the reference's losses over 20 steps. The bf16 build rounds every activation to 8
bits, and must stay within 2 %.
*/
#define _GNU_SOURCE
#include "runtime/safetensors.h" // defines safetensors_open, safetensors_read
#include "test/programs.h"       // defines run, must_end_well, must_equal, write_shard

// The model has both kinds of layers and query heads that share KV heads. The micro-batch is half of a step.
#define MODEL                                                                                                \
    "--layers 2 --channels 64 --heads 2 --kv-heads 1 --ffn 128 --vocab 97 -t 64 --pattern GS --window 24"
#define FLASHMOBA "--attention flashmoba"
#define RUN "-i train.bin -j val.bin -b 2 -d 256 -l 1e-2 -u 3 -v 12 -m 1 --log-every 1 -n 4 --keep 0"
// The device runs resume from the CPU run's checkpoint of step FIRST, which includes its optimizer. The CPU
// resumes from their checkpoints of step BACK.
enum { FIRST = 4, BACK = 20, STEPS = 24 };

typedef struct {
    const char* precision;
    double bound; // relative bound for losses and logits
    char trainer[PATH_MAX];
} Build;

static char build[PATH_MAX];        // the directory of the programs
static const char* device = "simt"; // the device of the runs that follow the CPU's
static char cpu[PATH_MAX];          // the CPU trainer, which is the reference
static Build builds[2] = {{"fp32", 1e-4, ""}, {"bf16", 2e-2, ""}};

typedef struct {
    const char *attention, *gqa;
    int kconv;
    const char* pattern; // NULL: the pattern of all tests
} Variant;

// Finds the trainer for a device. Returns 0 if it exists.
static int find_program(char path[PATH_MAX], const char* on_device, const char* precision) {
    char name[2 * PATH_MAX];
    print_to(name, sizeof(name), "%s/train_gpt_%s_%s", build, on_device, precision);
    if (realpath(name, path) && access(path, X_OK) == 0) return 0;
    print_error("%s: %s (run this from the top of the tree, after make test)\n", name, strerror(errno));
    return -1;
}

static void train(const char* trainer, const char* output, const char* more) {
    must_end_well(run("%s " MODEL " " RUN " -x %d -o %s %s", trainer, STEPS, output, more));
}

// Makes the run `output` from a copy of the checkpoint and the metrics of another run at `step`.
static void fork_run(const char* output, const char* of, int step) {
    shell("mkdir %s; cp -r %s/step_%08d %s; cp %s/metrics.jsonl %s/timings.jsonl %s", output, of, step,
          output, of, of, output);
}

// The mean of the last `count` values must be close to the mean of another run's values.
static void must_follow_on_average(const char* output, const char* yardstick, const char* key, int count,
                                   double bound) {
    double got[64], want[64], off = 0, sum = 0;
    const int steps = read_metric(got, 64, output, key);
    assert_int_equal(steps, read_metric(want, 64, yardstick, key));
    assert_true(steps >= count);
    for (int i = steps - count; i < steps; i++) {
        off += got[i] - want[i];
        sum += want[i];
    }
    print_message("%s: mean of %s within %.2g of %s\n", output, key, fabs(off / sum), yardstick);
    assert_true(fabs(off / sum) <= bound);
}

static void test_it_follows_the_cpu(void** state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        fork_run(builds[i].precision, "cpu", FIRST);
        train(builds[i].trainer, builds[i].precision, "--resume");
        must_follow(builds[i].precision, "cpu", "loss", STEPS - FIRST, builds[i].bound);
        must_follow(builds[i].precision, "cpu", "val_loss", 2, builds[i].bound);
    }
    // The model must have learnt in these steps, because constant losses would agree trivially.
    double losses[64];
    assert_int_equal(read_metric(losses, 64, "bf16", "loss"), STEPS);
    assert_true(losses[STEPS - 1] < losses[FIRST] - 0.5);
}

static void test_the_cpu_goes_on_from_its_checkpoint(void** state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        char output[32];
        print_to(output, sizeof(output), "cpu_from_%s", builds[i].precision);
        fork_run(output, builds[i].precision, BACK);
        train(cpu, output, "--resume");
        must_follow(output, builds[i].precision, "loss", STEPS - BACK, builds[i].bound);
    }
}

static void test_a_resume_is_bitwise(void** state) {
    (void)state;
    fork_run("resumed", "bf16", BACK);
    train(builds[1].trainer, "resumed", "--resume");
    must_be_same_run("bf16", "resumed", STEPS);
}

// Neither graphs nor recomputation in backward may change a bit.
static void test_graphs_and_recompute_are_bitwise(void** state) {
    (void)state;
    static const char* const options[] = {"--cuda-graph", "--recompute mlp",
                                          "--recompute layer --cuda-graph"};
    for (int i = 0; i < 3; i++) {
        char output[32], more[64];
        print_to(output, sizeof(output), "bitwise_%d", i);
        print_to(more, sizeof(more), "--resume %s", options[i]);
        fork_run(output, "cpu", FIRST);
        train(builds[1].trainer, output, more);
        must_be_same_run("bf16", output, STEPS);
    }
}

// A step with a learning rate of 0 changes no weight: the saved masters must equal the loaded ones bitwise.
static void test_weights_move_unchanged(void** state) {
    (void)state;
    static const char* const sources[] = {"cpu", "bf16", "fp32"};
    for (int from = 0; from < 3; from++) {
        const Build* to = &builds[from == 1 ? 0 : 1]; // always to the other precision
        char output[32], source[64], moved[64];
        print_to(output, sizeof(output), "%s_from_%s", to->precision, sources[from]);
        must_end_well(run("%s " MODEL " -i train.bin -b 4 -l 0 -x 1 --init-from %s -o %s", to->trainer,
                          sources[from], output));
        print_to(source, sizeof(source), "%s/step_%08d/model.safetensors", sources[from], STEPS);
        print_to(moved, sizeof(moved), "%s/step_%08d/model.safetensors", output, 1);
        must_equal(source, moved);
    }
}

// The logits that a program computes from the CPU's last checkpoint; the caller frees them.
static float* logits_of(const char* trainer, const char* name, uint64_t* count) {
    must_end_well(
        run("%s --write-logits %s --tokens 1,8,43,23,30,50,61,17,88,55 --init-from cpu", trainer, name));
    SafetensorsFile file;
    safetensors_open(&file, name);
    const SafetensorsEntry* entry = safetensors_find(&file, "logits");
    assert_non_null(entry);
    *count = safetensors_count(entry);
    assert_int_equal(*count, 10 * VOCABULARY);
    float* values = (float*)malloc((size_t)*count * sizeof(float));
    assert_non_null(values);
    safetensors_read(&file, entry, 0, *count, values, DTYPE_F32);
    safetensors_close(&file);
    return values;
}

static void test_logits_are_those_of_the_cpu(void** state) {
    (void)state;
    uint64_t count;
    float* want = logits_of(cpu, "cpu.safetensors", &count);
    for (int i = 0; i < 2; i++) {
        char name[32];
        print_to(name, sizeof(name), "%s.safetensors", builds[i].precision);
        float* got = logits_of(builds[i].trainer, name, &count);
        double off = 0, norm = 0;
        for (uint64_t k = 0; k < count; k++) {
            off += pow((double)got[k] - (double)want[k], 2);
            norm += pow((double)want[k], 2);
        }
        print_message("%s: logits within %.2g\n", builds[i].precision, sqrt(off / norm));
        assert_true(sqrt(off / norm) <= builds[i].bound);
        free(got);
    }
    free(want);
}

// Generation adds one token at a time and reads the keys and values of earlier tokens from the cache. It is
// greedy, so that the device makes no difference.
static void test_generation_is_that_of_the_cpu(void** state) {
    (void)state;
    const char* line = "%s --generate --init-from cpu --temperature 0 --sample-length 12";
    char want[256];
    const Result* result = run(line, cpu);
    must_end_well(result);
    print_to(want, sizeof(want), "%s", result->out);
    assert_true(strlen(want) > 12);
    result = run(line, builds[0].trainer);
    must_end_well(result);
    assert_string_equal(result->out, want);
}

// Before it allocates, the program refuses a batch that cannot fit, and names the option that helps.
static void test_too_large_a_batch_is_refused(void** state) {
    (void)state;
    const Result* result =
        run("%s --layers 12 --channels 768 --vocab 97 -t 1024 -b 131072 -d 134217728 -i train.bin -x 1",
            builds[1].trainer);
    assert_non_null(strstr(result->out, "planned peak"));
    must_fail_with(result, 1, "takes");
    assert_non_null(strstr(result->err, "; --batch "));
}

// It also refuses a head dimension for which the kernels have no tiles.
static void test_other_head_dimensions_are_refused(void** state) {
    (void)state;
    must_fail_with(
        run("%s --layers 1 --channels 48 --heads 3 -t 32 -b 1 -i train.bin -x 1", builds[1].trainer), 2,
        "--heads 3: heads of 16 channels");
}

// ----------------------------------------------------------------------------
// The other variants

// These variants run in fp32 and bf16. TEST_LONG adds all other combinations in fp32.
static const Variant some_variants[] = {
    {"flashmoba", "kdgqa", 3, NULL},
    {"flashmoba", "pgqa", 5, NULL},
    {"dense", "dgqa", 5, NULL},
    {"moba", "gqa", 3, NULL},
    {"flashmoba", "gqa", 3, "--layers 4 --pattern DGGD"},
};
enum { SOME_VARIANTS = sizeof(some_variants) / sizeof(some_variants[0]) };

static int is_one_of_some(const Variant* v) {
    for (int i = 0; i < SOME_VARIANTS; i++) {
        const Variant* other = &some_variants[i];
        if (!other->pattern && !strcmp(v->attention, other->attention) && !strcmp(v->gqa, other->gqa) &&
            v->kconv == other->kconv)
            return 1;
    }
    return 0;
}

// Here maps change, routers choose blocks, and taps are no longer zero, all from the CPU's checkpoint
// of step FIRST. With a learning rate of 1e-2, even the CPU does not reproduce its own curve. A
// learning rate of 1e-2 (1 + 1e-6) changes a choice between blocks of nearly equal scores after ten
// steps, and the loss by up to 5e-3 after twenty.
static void must_follow_the_cpu(const Variant* v, int precisions) {
    char model[512], more[1024], yardstick[64], output[80], again[96];
    const char* pattern = v->pattern ? v->pattern : "";
    const int chooses = strcmp(v->attention, "dense") != 0;
    print_to(
        model, sizeof(model),
        "--attention %s --query-heads %s --kconv %d --channels 128 --heads 4 --kv-heads 2 -l 1e-3 %s%s%s%s",
        v->attention, v->gqa, v->kconv, pattern, chooses ? " --moba-block 16 --moba-topk 2" : "",
        !strcmp(v->gqa, "dgqa") ? " --kd-window 3 --dgqa-kind diff" : "",
        !strcmp(v->gqa, "kdgqa") ? " --kd-source forward" : "");
    print_to(yardstick, sizeof(yardstick), "%s_%s_%d", v->attention, v->gqa, v->kconv);
    train(cpu, yardstick, model);
    for (int i = 0; i < precisions; i++) {
        print_to(output, sizeof(output), "%s_%s", yardstick, builds[i].precision);
        fork_run(output, yardstick, FIRST);
        print_to(model + strlen(model), sizeof(model) - strlen(model), " --resume");
        train(builds[i].trainer, output, model);
        // In bf16, rounding to 8 bits changes choices between nearly equal scores and norms. So the two runs
        // agree in the mean of the curve, but not step by step.
        if (i == 0) must_follow(output, yardstick, "loss", STEPS - FIRST, builds[i].bound);
        else must_follow_on_average(output, yardstick, "loss", STEPS - FIRST, builds[i].bound);

        print_to(again, sizeof(again), "%s_again", output);
        print_to(more, sizeof(more), "%s --recompute layer --cuda-graph", model);
        fork_run(again, yardstick, FIRST);
        train(builds[i].trainer, again, more);
        must_be_same_run(output, again, STEPS);
        shell("rm -rf %s %s", output, again);
    }
    shell("rm -rf %s", yardstick);
}

static void test_variants_follow_the_cpu(void** state) {
    (void)state;
    for (int i = 0; i < SOME_VARIANTS; i++) must_follow_the_cpu(&some_variants[i], 2);
}

static void test_all_other_variants_follow_the_cpu(void** state) {
    (void)state;
    static const char* const attentions[] = {"dense", "moba", "flashmoba"};
    static const char* const gqas[] = {"gqa", "kdgqa", "dgqa", "pgqa"};
    static const int taps[] = {0, 3, 5};
    for (int i = 0; i < 36; i++) {
        const Variant v = {attentions[i % 3], gqas[i / 3 % 4], taps[i / 12], NULL};
        if (!is_one_of_some(&v)) must_follow_the_cpu(&v, 1);
    }
}

// Reads the query heads of every KV head from heads.json of a checkpoint, layer after layer.
static int read_heads(int heads[16], const char* output, int step) {
    char path[256];
    static char text[1 << 14];
    print_to(path, sizeof(path), "%s/step_%08d/heads.json", output, step);
    read_text(text, sizeof(text), path);
    int count = 0;
    for (const char* at = text; (at = strstr(at, "\"heads\":")); at++) {
        char* number = strchr(at, '[') + 1;
        for (const char* end = strchr(number, ']'); number < end; number += strspn(number, ", \t\n")) {
            assert_true(count < 16);
            heads[count++] = (int)strtol(number, &number, 10);
        }
    }
    return count;
}

// For every source of the maps, the device must make the same maps as the CPU while they change. A run that
// resumes from a checkpoint with graphs of whole steps must write the same bits.
static void test_heads_of_every_source(void** state) {
    (void)state;
    static const char* const sources[] = {"lagged", "forward", "weights", "random", "shuffled"};
    enum { SOME_STEPS = 6, KEPT = 3 };
    char line[512];
    for (size_t i = 0; i < sizeof(sources) / sizeof(sources[0]); i++) {
        print_to(
            line, sizeof(line),
            "--layers 2 --channels 128 --heads 4 --kv-heads 4 --ffn 64 --vocab 97 -t 32 -b 2 -d 128 "
            "-l 1e-2 -u 1 -i train.bin -x %d -n %d --keep 0 " FLASHMOBA
            " --query-heads kdgqa --kconv 3 --moba-block 16 --moba-topk 2 --kd-min-heads 0 --kd-source %s",
            SOME_STEPS, KEPT, sources[i]);
        must_end_well(run("%s %s -o heads_cpu", cpu, line));
        must_end_well(run("%s %s -o heads_device", builds[0].trainer, line));
        int want[16], got[16], moved = 0;
        for (int step = KEPT; step <= SOME_STEPS; step += KEPT) {
            assert_int_equal(read_heads(want, "heads_cpu", step), 8);
            assert_int_equal(read_heads(got, "heads_device", step), 8);
            assert_memory_equal(got, want, 8 * sizeof(int));
            for (int k = 0; k < 8; k++) moved += want[k] != 1;
        }
        if (!moved) print_error("%s: no query head has moved\n", sources[i]);
        assert_true(moved > 0);
        fork_run("heads_again", "heads_device", KEPT);
        must_end_well(run("%s %s -o heads_again --resume --cuda-graph", builds[0].trainer, line));
        must_be_same_run("heads_device", "heads_again", SOME_STEPS);
        must_equal("heads_device/step_00000006/heads.json", "heads_again/step_00000006/heads.json");
        shell("rm -rf heads_cpu heads_device heads_again");
    }
}

// A shape for which the kernels are not compiled is a usage error.
static void test_other_blocks_are_refused(void** state) {
    (void)state;
    const char* path = builds[1].trainer;
    must_fail_with(run("%s " MODEL " " FLASHMOBA " -i train.bin -x 1 --moba-block 24", path), 2,
                   "--moba-block 24 --moba-topk 8: on device");
    must_fail_with(run("%s " MODEL " " FLASHMOBA " -i train.bin -x 1 --moba-topk 65", path), 2,
                   "--moba-topk 65: on device");
}

// The MB that the plan has for workspaces of 4096 tokens with this --moba-workspace.
static double planned_workspace(const char* trainer, int bound) {
    const Result* result = run(
        "%s " FLASHMOBA
        " --layers 1 --channels 64 --heads 2 --vocab 97 -i train.bin -b 1 -d 4096 -t 4096 --moba-block 16 "
        "--moba-topk 8 --dry-run --moba-workspace %d",
        trainer, bound);
    must_end_well(result);
    const char* line = strstr(result->out, "workspace ");
    assert_non_null(line);
    return atof(line + strlen("workspace "));
}

// The bounds allow lists and partial rows of all heads, of one head, or of a part of one head's queries.
static void test_the_workspace_of_moba_is_bounded(void** state) {
    (void)state;
    const char* path = builds[1].trainer;
    const double all = planned_workspace(path, 1024), some = planned_workspace(path, 4),
                 least = planned_workspace(path, 1);
    print_message("%.1f, %.1f and %.1f MB\n", all, some, least);
    assert_true(least < some && some < all);
    assert_true(all < 16 && some < 5 && least < 2);
    must_fail_with(run("%s -i train.bin --moba-workspace 0", path), 2,
                   "--moba-workspace 0: must be from 1 to");
    must_fail_with(run("%s -i train.bin --moba-workspace 64", cpu), 2,
                   "--moba-workspace: has an effect with --attention flashmoba only");
}

// ----------------------------------------------------------------------------

static int set_up(void** state) {
    (void)state;
    if (getenv("DEVICE")) device = getenv("DEVICE");
    if (!realpath(getenv("BUILD") ? getenv("BUILD") : "build", build)) return -1;
    if (find_program(cpu, "cpu", "fp32")) return -1;
    for (int i = 0; i < 2; i++)
        if (find_program(builds[i].trainer, device, builds[i].precision)) return -1;
    if (enter_directory() != 0) return -1;
    write_shard("train.bin", good_shard(20000));
    write_shard("val.bin", good_shard(400));
    train(cpu, "cpu", "");
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_it_follows_the_cpu),
        cmocka_unit_test(test_the_cpu_goes_on_from_its_checkpoint),
        cmocka_unit_test(test_a_resume_is_bitwise),
        cmocka_unit_test(test_graphs_and_recompute_are_bitwise),
        cmocka_unit_test(test_weights_move_unchanged),
        cmocka_unit_test(test_logits_are_those_of_the_cpu),
        cmocka_unit_test(test_generation_is_that_of_the_cpu),
        cmocka_unit_test(test_too_large_a_batch_is_refused),
        cmocka_unit_test(test_other_head_dimensions_are_refused),
        cmocka_unit_test(test_variants_follow_the_cpu),
        cmocka_unit_test(test_heads_of_every_source),
        cmocka_unit_test(test_the_workspace_of_moba_is_bounded),
        cmocka_unit_test(test_other_blocks_are_refused),
    };
    const struct CMUnitTest long_tests[] = {
        cmocka_unit_test(test_all_other_variants_follow_the_cpu),
    };
    const char* wanted = getenv("TEST_LONG");
    int failed = 0;
    if (!wanted || strcmp(wanted, "rest") != 0)
        failed += cmocka_run_group_tests(tests, set_up, leave_directory);
    if (wanted) failed += cmocka_run_group_tests(long_tests, set_up, leave_directory);
    return failed;
}
