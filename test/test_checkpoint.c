/*
Tests checkpoints: a loaded checkpoint equals the saved one; a broken one is refused in one line; an
interrupted save leaves the checkpoint before it complete.

Code that ends the program runs in a forked child, and the test reads the child's stderr. Counted versions
replace the calls that change the disk, so that a save can be killed, or fail, at each of them in turn.
*/
#define _GNU_SOURCE
#include <ftw.h>
#include <omp.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <cmocka.h>
#undef fail // cmocka's macro; the program defines its own fail()
#define fail_test(...) (print_error(__VA_ARGS__), print_error("\n"), _fail(__FILE__, __LINE__))

// The headers define fail(), write_or_fail() and others. Below, they get the counted calls.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int disk_calls;   // number of calls so far
static int kill_at_call; // SIGKILL before this call; 0: never
static int fail_at_call; // this call and all later ones that need space return an error; 0: none

// Returns 1 if the call must fail. `needs_space`: a full disk refuses calls of this kind.
static int disk_call(int needs_space) {
    disk_calls++;
    if (disk_calls == kill_at_call) raise(SIGKILL);
    if (!needs_space || !fail_at_call || disk_calls < fail_at_call) return 0;
    errno = ENOSPC;
    return 1;
}

// The inodes of files and directories with changes that are not synced. The program must not rename them.
static ino_t unsynced[64];
static int unsynced_count;
static int renamed_unsynced;
static int sync_for_real; // off in most tests, because it takes nearly all of their time

static void changed(int file) {
    struct stat info;
    if (fstat(file, &info) != 0 || unsynced_count == 64) return;
    for (int i = 0; i < unsynced_count; i++)
        if (unsynced[i] == info.st_ino) return;
    unsynced[unsynced_count++] = info.st_ino;
}
static void synced(int file) {
    struct stat info;
    if (fstat(file, &info) != 0) return;
    for (int i = 0; i < unsynced_count; i++)
        if (unsynced[i] == info.st_ino) unsynced[i] = unsynced[--unsynced_count];
}

static int counted_rename(const char* from, const char* to) {
    size_t length = strlen(from);
    if (length > 4 && !strcmp(from + length - 4, ".tmp")) renamed_unsynced |= unsynced_count > 0;
    return disk_call(1) ? -1 : rename(from, to);
}
static int counted_mkdir(const char* path, mode_t mode) {
    if (disk_call(1)) return -1;
    if (mkdir(path, mode) != 0) return -1;
    int directory = strstr(path, ".tmp") ? open(path, O_RDONLY) : -1;
    if (directory >= 0) changed(directory), close(directory);
    return 0;
}
static int counted_fsync(int file) {
    if (disk_call(1)) return -1;
    synced(file);
    return sync_for_real ? fsync(file) : 0;
}
static int counted_unlink(const char* path) { return disk_call(0) ? -1 : unlink(path); }
static int counted_unlinkat(int at, const char* path, int flags) {
    return disk_call(0) ? -1 : unlinkat(at, path, flags);
}
static int counted_rmdir(const char* path) { return disk_call(0) ? -1 : rmdir(path); }
static FILE* counted_fopen(const char* path, const char* mode) {
    return disk_call(mode[0] == 'w') ? NULL : fopen(path, mode);
}
static size_t counted_fwrite(const void* data, size_t size, size_t count, FILE* file) {
    if (disk_call(1)) return 0;
    changed(fileno(file));
    return fwrite(data, size, count, file);
}

// A failure jumps here and does not end the process. Fuzzing makes thousands of
// failures, too many for a fork() each.
static jmp_buf* after_failure;
__attribute__((noreturn)) static void exit_or_jump(int code) {
    if (after_failure) longjmp(*after_failure, code);
    exit(code);
}
#define exit exit_or_jump
#define rename counted_rename
#define mkdir counted_mkdir
#define fsync counted_fsync
#define unlink counted_unlink
#define unlinkat counted_unlinkat
#define rmdir counted_rmdir
#define fopen counted_fopen
#define fwrite counted_fwrite
#include "dev/cpu/device.h"
#include "runtime/checkpoint.h"
#undef exit
#undef rename
#undef mkdir
#undef fsync
#undef unlink
#undef unlinkat
#undef rmdir
#undef fopen
#undef fwrite

static char root[PATH_MAX]; // the directory of all files of this test

static int remove_entry(const char* path, const struct stat* info, int kind, struct FTW* place) {
    (void)info, (void)kind, (void)place;
    return remove(path);
}
static void remove_tree(const char* path) { nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

// ----------------------------------------------------------------------------
// Children

typedef struct {
    int status; // from waitpid
    char error[8192];
} Outcome;

static int in_child;

// main() registers this exit handler before all others, so it runs after them. In a child it calls _exit(),
// which skips the leak check: a program that fails does not free its memory. In the parent it removes the files
// of this test.
static void leave_child(int status, void* unused) {
    (void)unused;
    if (in_child) _exit(status);
    remove_tree(root);
}

static Outcome run_child(void (*body)(void*), void* argument) {
    Outcome outcome;
    memset(&outcome, 0, sizeof(outcome));
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        in_child = 1;
        close(ends[0]);
        dup2(ends[1], 2);
        body(argument);
        exit(0);
    }
    close(ends[1]);
    size_t used = 0;
    ssize_t got;
    while ((got = read(ends[0], outcome.error + used, sizeof(outcome.error) - 1 - used)) > 0)
        used += (size_t)got;
    close(ends[0]);
    assert_int_equal(waitpid(child, &outcome.status, 0), child);
    return outcome;
}

// The child must print one line, "moba.c: ...", and exit with code 1.
static int is_clean_failure(const Outcome* outcome) {
    const char* newline = strchr(outcome->error, '\n');
    return WIFEXITED(outcome->status) && WEXITSTATUS(outcome->status) == 1 && newline && !newline[1] &&
           !strncmp(outcome->error, "moba.c: ", 8);
}
static int is_success(const Outcome* outcome) {
    return WIFEXITED(outcome->status) && WEXITSTATUS(outcome->status) == 0 && !outcome->error[0];
}

static void expect_success(void (*body)(void*), void* argument) {
    Outcome outcome = run_child(body, argument);
    if (!is_success(&outcome)) fail_test("want success, got status %d: %s", outcome.status, outcome.error);
}

static void expect_failure(void (*body)(void*), void* argument, const char* part) {
    Outcome outcome = run_child(body, argument);
    if (!is_clean_failure(&outcome) || !strstr(outcome.error, part))
        fail_test("want one line with \"%s\" and exit code 1; got status %x: %s", part, outcome.status,
                  outcome.error);
}

// ----------------------------------------------------------------------------
// Files

// Returns a new path below the root. It does not make the directory.
static const char* fresh(const char* name) {
    static char paths[4][PATH_MAX];
    static int next = 0;
    char* path = paths[next++ % 4];
    path_format(path, "%s/%s", root, name);
    remove_tree(path);
    return path;
}

static void write_bytes(const char* path, const void* data, size_t length) {
    FILE* file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, length, file), length);
    fclose(file);
}

static void write_text(const char* directory, const char* name, const char* text) {
    char path[PATH_MAX];
    path_format(path, "%s/%s", directory, name);
    write_bytes(path, text, strlen(text));
}

static int exists(const char* directory, const char* name) {
    char path[PATH_MAX];
    path_format(path, "%s/%s", directory, name);
    return path_exists(path);
}

// Returns the text with the first `from` replaced by `to`; the caller frees it.
static char* replaced(const char* text, const char* from, const char* to) {
    const char* place = strstr(text, from);
    if (!place) fail_test("\"%s\" is not in the text", from);
    char* result = (char*)malloc(strlen(text) + strlen(to) + 1);
    sprintf(result, "%.*s%s%s", (int)(place - text), text, to, place + strlen(from));
    return result;
}

static int directory_has(const char* directory, const char* part) {
    DIR* entries = opendir(directory);
    struct dirent* entry;
    int found = 0;
    while (entries && (entry = readdir(entries))) found |= strstr(entry->d_name, part) != NULL;
    if (entries) closedir(entries);
    return found;
}

// ----------------------------------------------------------------------------
// A run: everything that a checkpoint holds

typedef struct {
    ModelConfig config;
    ParameterLayout layout;
    TrainingState state;
    HeadAllocation heads;
    floatX* params;
    float_acc *exp_avg, *exp_avg_sq;
    const char* output;
    const char* tokenizer;
    int keep;
} Run;

static ModelConfig small_config(const char* pattern, int tied) {
    ModelConfig config = model_config_from_descriptor("d2");
    config.channels = 16;
    config.heads = 4;
    config.kv_heads = 2;
    config.ffn = 24;
    config.vocab_size = 50;
    config.sequence_length = 32;
    strcpy(config.pattern, pattern);
    config.tied = tied;
    model_config_complete(&config);
    model_config_check(&config);
    return config;
}

// Every value is a function of the step, so that the test can check a checkpoint by its own step number.
static void run_fill(Run* run, int step) {
    const TensorTable* table = &run->layout.table;
    for (size_t i = 0; i < table->elements; i++) {
        run->exp_avg[i] = (float_acc)random_normal(1, (uint64_t)step, i);
        run->exp_avg_sq[i] = (float_acc)(random_uniform(2, (uint64_t)step, i) * 1e-40); // subnormal in fp32
    }
    memset(run->params, 0, table->elements * sizeof(floatX));
    for (int t = 0; t < table->count; t++)
        for (size_t i = 0; i < table->tensors[t].count; i++)
            run->params[table->tensors[t].offset + i] =
                (floatX)random_normal(3, (uint64_t)step, table->tensors[t].offset + i);
    run->params[0] = (floatX)-0.0;
    HeadAllocation* heads = &run->heads;
    for (int i = 0; i < heads->L * heads->G; i++) {
        heads->statistic[i] = exp(100 * random_normal(4, (uint64_t)step, (uint64_t)i));
        heads->history[i] = i == step ? NAN : i == step + 1 ? 5e-324 : 1.0 / (step + i);
    }
    for (int l = 0; l < heads->L; l++) {
        heads->heads[2 * l] = (step + l) % 5;
        heads->heads[2 * l + 1] = 4 - (step + l) % 5;
        allocation_apply(heads, l);
        allocation_count_moves(heads, l);
        heads->measured[l] = (step + l) % 2;
        heads->windows[l] = step;
        heads->moved[l] = (1L << 52) + step;
    }
    TrainingState* state = &run->state;
    memset(state, 0, sizeof(*state));
    state->step = step;
    state->sequences_seen = (uint64_t)step * 0x123456789ABCDu;
    state->seed = UINT64_MAX - (uint64_t)step;
    state->total_batch = (1L << 52) + step;
    state->sequence_length = 32;
    strcpy(state->schedule, "cosine");
    state->learning_rate = 0.1 + 0.2 + step; // 0.30000000000000004 has no 15-digit form
    state->beta2 = nextafter(0.95, 1);
    state->epsilon = 5e-324;
    state->weight_decay = -0.0;
    state->val_loss = step % 2 ? NAN : 3.25;
    state->train_loss = INFINITY;
    state->data_fingerprint = UINT64_MAX - (uint64_t)step;
    state->data_shards = 3;
}

static Run run_make(ModelConfig config) {
    Run run;
    memset(&run, 0, sizeof(run));
    run.config = config;
    run.layout = parameter_layout(&config);
    size_t elements = run.layout.table.elements;
    run.params = (floatX*)device_malloc(elements * sizeof(floatX), "parameters");
    allocation_start(&run.heads, allocation_defaults(0), config.layers, config.heads, config.kv_heads);
    run.exp_avg = (float_acc*)device_malloc(elements * sizeof(float_acc), "moments");
    run.exp_avg_sq = (float_acc*)device_malloc(elements * sizeof(float_acc), "moments");
    return run;
}

static void run_free(Run* run) {
    device_free(run->params);
    device_free(run->exp_avg);
    device_free(run->exp_avg_sq);
    allocation_free(&run->heads);
    parameter_layout_free(&run->layout);
}

static Weights weights_of(const Run* run) {
    const Weights weights = {run->params, NULL};
    return weights;
}

static StateRange whole_state(const Run* run) {
    const StateRange whole = {0, run->layout.table.elements, 0};
    return whole;
}

static void run_save(void* argument) {
    Run* run = (Run*)argument;
    const StateRange whole = whole_state(run);
    checkpoint_save(run->output, &run->config, &run->layout.table, &run->state, &run->heads, weights_of(run),
                    run->exp_avg, run->exp_avg_sq, &whole, 1, run->tokenizer, run->keep, 0);
}

static void load_optimizer_only(void* argument) {
    Run* run = (Run*)argument;
    const StateRange whole = whole_state(run);
    checkpoint_load_optimizer(run->output, &run->layout.table, run->exp_avg, run->exp_avg_sq, &whole, 1, 0);
}

// Loads the checkpoint in the directory `run->output` itself.
static void run_load(void* argument) {
    Run* run = (Run*)argument;
    checkpoint_check_same_model(run->output, &run->config);
    run->state = checkpoint_load_state(run->output);
    checkpoint_load_heads(run->output, &run->heads);
    checkpoint_load_model(run->output, &run->layout.table, weights_of(run), 0);
    load_optimizer_only(run);
}

static void run_fill_and_save(Run* run, int step) {
    run_fill(run, step);
    run_save(run);
}

static int same_state(const TrainingState* a, const TrainingState* b) {
    for (int i = 0; i < STATE_FIELDS; i++) {
        const void* left = (const char*)a + state_fields[i].offset;
        const void* right = (const char*)b + state_fields[i].offset;
        if (state_fields[i].type == STATE_DOUBLE && isnan(*(const double*)left) &&
            isnan(*(const double*)right))
            continue;
        if (!memcmp(left, right, state_fields[i].size)) continue;
        print_error("%s differs\n", state_fields[i].name);
        return 0;
    }
    return 1;
}

static void assert_same_heads(const HeadAllocation* a, const HeadAllocation* b) {
    const size_t groups = (size_t)a->L * a->G, layers = (size_t)a->L;
    assert_memory_equal(a->heads, b->heads, groups * sizeof(int));
    assert_memory_equal(a->map, b->map, layers * a->H * sizeof(int));
    assert_memory_equal(a->statistic, b->statistic, groups * sizeof(double));
    for (size_t i = 0; i < groups; i++)
        assert_true(a->history[i] == b->history[i] || (isnan(a->history[i]) && isnan(b->history[i])));
    assert_memory_equal(a->counted, b->counted, layers * a->H * sizeof(int));
    assert_memory_equal(a->measured, b->measured, layers * sizeof(int));
    assert_memory_equal(a->windows, b->windows, layers * sizeof(int));
    assert_memory_equal(a->moved, b->moved, layers * sizeof(long));
}

// The checkpoint at `path` must equal, bit by bit, the values that run_fill() makes
// for its step. Returns the step.
static int assert_whole(const char* path, const ModelConfig* config) {
    Run loaded = run_make(*config), want = run_make(*config);
    loaded.output = path;
    run_load(&loaded);
    run_fill(&want, loaded.state.step);
    size_t elements = want.layout.table.elements;
    assert_true(same_state(&loaded.state, &want.state));
    assert_same_heads(&loaded.heads, &want.heads);
    assert_memory_equal(loaded.params, want.params, elements * sizeof(floatX));
    assert_memory_equal(loaded.exp_avg, want.exp_avg, elements * sizeof(float_acc));
    assert_memory_equal(loaded.exp_avg_sq, want.exp_avg_sq, elements * sizeof(float_acc));
    int step = loaded.state.step;
    run_free(&loaded);
    run_free(&want);
    return step;
}

// Returns the step of the latest checkpoint, which must be complete, or -1 if there is none.
static int latest_whole_step(const char* output, const ModelConfig* config) {
    char path[PATH_MAX];
    return checkpoint_latest(output, path) ? assert_whole(path, config) : -1;
}

// Every directory with a checkpoint's name must be complete, not only the latest.
static void assert_all_whole(const char* output, const ModelConfig* config) {
    char path[PATH_MAX];
    int* steps;
    int count = checkpoint_list_steps(output, "", &steps);
    for (int i = 0; i < count; i++) {
        path_format(path, "%s/" CHECKPOINT_NAME_FORMAT, output, steps[i]);
        assert_int_equal(assert_whole(path, config), steps[i]);
    }
    free(steps);
}

// ----------------------------------------------------------------------------
// Numbers

// The result must be the nearer of the two bf16 neighbours by exact comparison, and the even one at a tie.
static void assert_bf16(double value) {
    uint16_t got = bf16_from_double(value);
    uint16_t below = (uint16_t)(got - 1), above = (uint16_t)(got + 1);
    double distance = fabs(bf16_to_double(got) - value);
    if (isinf(bf16_to_double(got))) {
        assert_true(fabs(value) >= 0x1.FFp127);
        return;
    }
    uint16_t neighbours[2] = {below, above};
    for (int i = 0; i < 2; i++) {
        if ((neighbours[i] ^ got) & 0x8000) continue; // the other side of zero
        double other = bf16_to_double(neighbours[i]);
        if (isinf(other)) other = copysign(0x1p128, other);
        double other_distance = fabs(other - value);
        assert_true(distance < other_distance || (distance == other_distance && !(got & 1)));
    }
}

static void test_bf16(void** unused) {
    (void)unused;
    for (uint32_t bits = 0; bits < 0x7F80;
         bits += 7) { // every 7th finite value, and the values beside its upper tie
        double low = bf16_to_double((uint16_t)bits), high = bf16_to_double((uint16_t)(bits + 1));
        if (isinf(high)) high = 0x1p128;
        double tie = (low + high) / 2;
        assert_int_equal(bf16_from_double(low), bits);
        assert_int_equal(bf16_from_double(-low), bits | 0x8000);
        assert_bf16(tie);
        assert_bf16(nextafter(tie, 0));
        assert_bf16(nextafter(tie, INFINITY));
        assert_bf16(-nextafter(tie, INFINITY));
        assert_bf16(low + (high - low) * random_uniform(1, 2, bits));
    }
    assert_true(isnan(bf16_to_double(bf16_from_double(NAN))));
    assert_int_equal(bf16_from_double(INFINITY), 0x7F80);
    assert_int_equal(bf16_from_double(1e-300), 0);
}

static void test_conversions(void** unused) {
    (void)unused;
    char path[PATH_MAX];
    path_format(path, "%s/conversions.safetensors", root);
    double values[3000], back[3000];
    float single[3000];
    for (int i = 0; i < 3000; i++) values[i] = random_normal(1, 1, (uint64_t)i), single[i] = (float)values[i];
    const Dtype types[3] = {DTYPE_F64, DTYPE_F32, DTYPE_BF16};
    SafetensorsWriter writer;
    safetensors_create(&writer, path);
    safetensors_metadata(&writer, "with \"quotes\"", "a\nb");
    for (int i = 0; i < 3; i++) safetensors_declare(&writer, dtype_name(types[i]), types[i], 2, 30, 100);
    safetensors_declare(&writer, "nothing", DTYPE_F32, 1, 0, 0);
    for (int i = 0; i < 3; i++) { // writes in pieces of either type
        safetensors_write(&writer, values, DTYPE_F64, 1100);
        safetensors_write(&writer, values + 1100, DTYPE_F64, 1900);
    }
    safetensors_finish(&writer);
    SafetensorsFile file;
    safetensors_open(&file, path);
    assert_string_equal(safetensors_get_metadata(&file, "with \"quotes\""), "a\nb");
    assert_int_equal(file.count, 4);
    assert_int_equal(file.data_start % 8, 0);
    assert_null(safetensors_find(&file, "F16"));
    for (int t = 0; t < 3; t++) {
        safetensors_read(&file, safetensors_find(&file, dtype_name(types[t])), 7, 2990, back, DTYPE_F64);
        for (int i = 0; i < 2990; i++) {
            double want = t == 0   ? values[i + 7]
                          : t == 1 ? (double)single[i + 7]
                                   : bf16_to_double(bf16_from_double(values[i + 7]));
            assert_true(back[i] == want);
        }
    }
    safetensors_close(&file);
}

// ----------------------------------------------------------------------------
// Saving and loading

static void test_round_trip(void** unused) {
    (void)unused;
    const char* patterns[] = {"G", "SG"};
    for (int p = 0; p < 2; p++)
        for (int tied = 0; tied < 2; tied++) {
            Run run = run_make(small_config(patterns[p], tied));
            run.output = fresh("round_trip");
            sync_for_real = 1;
            unsynced_count = renamed_unsynced = 0;
            run_fill_and_save(&run, 7);
            run_fill_and_save(&run, 8);
            assert_false(renamed_unsynced);
            sync_for_real = 0;
            assert_int_equal(latest_whole_step(run.output, &run.config), 8);
            char path[PATH_MAX];
            checkpoint_resolve(run.output, path);
            ModelConfig config = checkpoint_read_config(path);
            assert_int_equal(config.padded_vocab, 128);
            assert_string_equal(config.pattern, patterns[p]);
            checkpoint_resolve(path, path);
            cJSON* json;
            char config_path[PATH_MAX];
            path_format(config_path, "%s/config.json", path);
            json = json_read_object(config_path);
            assert_string_equal(json_get(json, "model_type")->valuestring, p ? "moba" : "llama");
            assert_string_equal(json_get(json, "architectures")->child->valuestring,
                                p ? "MobaForCausalLM" : "LlamaForCausalLM");
            cJSON_Delete(json);
            run_free(&run);
        }
}

// Loading overwrites the padding, so earlier contents of memory do not remain.
static void test_padding(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 0));
    run.output = fresh("padding");
    run_fill_and_save(&run, 1);
    char path[PATH_MAX];
    assert_true(checkpoint_latest(run.output, path));
    memset(run.params, 0x55, run.layout.table.elements * sizeof(floatX));
    checkpoint_load_model(path, &run.layout.table, weights_of(&run), 0);
    const size_t tensors[2] = {run.layout.embedding, run.layout.head};
    for (int t = 0; t < 2; t++)
        for (size_t i = 50 * 16; i < 128 * 16; i++) assert_true(run.params[tensors[t] + i] == 0);
    SafetensorsFile file; // the file does not contain the padding
    path_format(path + strlen(path), "/model.safetensors");
    safetensors_open(&file, path);
    assert_int_equal(safetensors_find(&file, "lm_head.weight")->shape[0], 50);
    safetensors_close(&file);
    run_free(&run);
}

static void test_keep(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.output = fresh("keep");
    run.keep = 2;
    char path[PATH_MAX];
    assert_false(checkpoint_latest(run.output, path));
    for (int step = 10; step <= 50; step += 10) {
        run_fill_and_save(&run, step);
        assert_int_equal(latest_whole_step(run.output, &run.config), step);
    }
    assert_true(exists(run.output, "step_00000050") && exists(run.output, "step_00000040"));
    assert_false(directory_has(run.output, "step_00000030") || directory_has(run.output, "step_00000020"));
    run_fill_and_save(&run, 50); // saves over the existing checkpoint
    assert_int_equal(latest_whole_step(run.output, &run.config), 50);
    assert_true(exists(run.output, "step_00000040"));
    run.keep = 1;
    run_fill_and_save(&run, 45); // resumed from 40: saving 45 must not remove 50
    assert_int_equal(latest_whole_step(run.output, &run.config), 45);
    assert_true(exists(run.output, "step_00000050"));
    assert_false(exists(run.output, "step_00000040"));
    run.keep = 0;
    for (int step = 46; step <= 48; step++) run_fill_and_save(&run, step);
    assert_true(exists(run.output, "step_00000045") && exists(run.output, "step_00000046"));
    assert_false(directory_has(run.output, ".tmp") || directory_has(run.output, ".old"));
    run_free(&run);
}

// The test makes each state that a kill can leave behind.
static void test_clean(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.output = fresh("clean");
    run_fill_and_save(&run, 10);
    run_fill_and_save(&run, 20);
    char path[PATH_MAX], other[PATH_MAX];
    path_format(path, "%s/step_00000020", run.output);
    path_format(other, "%s/step_00000020.old", run.output);
    assert_int_equal(rename(path, other), 0);
    assert_int_equal(latest_whole_step(run.output, &run.config), 20); // found but not moved
    assert_true(exists(run.output, "step_00000020.old"));
    path_format(path, "%s/step_00000030.tmp", run.output);
    assert_int_equal(mkdir(path, 0777), 0);
    write_text(path, "model.safetensors", "half");
    write_text(run.output, "latest.tmp", "step");
    write_text(run.output, "mine.tmp", "the user's");
    checkpoint_clean(run.output);
    assert_true(exists(run.output, "step_00000020") && exists(run.output, "mine.tmp"));
    assert_false(directory_has(run.output, ".old") || directory_has(run.output, "0.tmp") ||
                 exists(run.output, "latest.tmp"));
    assert_int_equal(mkdir(other, 0777), 0); // a complete new checkpoint beside a half-removed old one
    checkpoint_clean(run.output);
    assert_false(directory_has(run.output, ".old"));
    assert_int_equal(latest_whole_step(run.output, &run.config), 20);
    path_format(path, "%s/latest", run.output); // a kill during the first save, before `latest`
    assert_int_equal(unlink(path), 0);
    assert_int_equal(latest_whole_step(run.output, &run.config), 20);
    run_free(&run);
}

static void call_latest(void* output) {
    char path[PATH_MAX];
    checkpoint_latest((const char*)output, path);
}
static void call_resolve(void* given) {
    char path[PATH_MAX];
    checkpoint_resolve((const char*)given, path);
}

static void test_latest_errors(void** unused) {
    (void)unused;
    char output[PATH_MAX];
    path_format(output, "%s", fresh("latest"));
    expect_failure(call_resolve, output, "No such file");
    assert_int_equal(mkdir(output, 0777), 0);
    expect_failure(call_resolve, output, "no checkpoint");
    const char* texts[] = {"", "step_1\n", "../step_00000001\n", "step_00000001\nstep_00000002\n",
                           "step_99999999999\n"};
    for (int i = 0; i < 5; i++) {
        write_text(output, "latest", texts[i]);
        expect_failure(call_latest, output, "want one line with the name of a checkpoint");
    }
    write_text(output, "latest", "step_00000001\n");
    expect_failure(call_latest, output, "names step_00000001, which is not there, and no other checkpoint");
    char path[PATH_MAX];
    path_format(path, "%s/step_00000003", output);
    assert_int_equal(mkdir(path, 0777), 0);
    expect_failure(call_latest, output, "into this file, such as step_00000003, the newest one there");
    // Without `latest`, the newest directory, or link to a directory, is the latest checkpoint.
    write_text(output, "step_00000009", "no directory");
    path_format(path, "%s/latest", output);
    assert_int_equal(unlink(path), 0);
    assert_true(checkpoint_latest(output, path));
    assert_non_null(strstr(path, "/step_00000003"));
    path_format(path, "%s/moved", output);
    assert_int_equal(mkdir(path, 0777), 0);
    path_format(path, "%s/step_00000005", output);
    assert_int_equal(symlink("moved", path), 0);
    assert_true(checkpoint_latest(output, path));
    assert_non_null(strstr(path, "/step_00000005"));
    // Names of checkpoints without a directory must not count as a new run.
    assert_int_equal(unlink(path), 0);
    path_format(path, "%s/step_00000003", output);
    assert_int_equal(rmdir(path), 0);
    expect_failure(call_latest, output, "step_00000009: is not a directory");
}

static void test_tokenizer(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    char path[PATH_MAX];
    path_format(path, "%s/tokenizer.json", root);
    run.tokenizer = path;
    const char* texts[] = {
        "{\"added_tokens\": [{\"id\": 3, \"content\": \"x\"}, {\"id\": 49, \"content\": \"<|endoftext|>\"}]}",
        "{\"added_tokens\": [{\"id\": 50, \"content\": \"<|endoftext|>\"}]}", "{}"};
    for (int i = 0; i < 3; i++) {
        write_bytes(path, texts[i], strlen(texts[i]));
        run.output = fresh("tokenizer");
        run_fill_and_save(&run, 1);
        char copy[PATH_MAX];
        path_format(copy, "%s/step_00000001/tokenizer.json", run.output);
        char* text = read_file_or_fail(copy, NULL);
        assert_string_equal(text, texts[i]);
        free(text);
        path_format(copy, "%s/step_00000001/config.json", run.output);
        cJSON* json = json_read_object(copy);
        const cJSON* end = json_get(json, "eos_token_id");
        assert_true(i == 0 ? end->valueint == 49 : cJSON_IsNull(end));
        cJSON_Delete(json);
    }
    run.tokenizer = "/nonexistent/tokenizer.json";
    expect_failure(run_save, &run, "/nonexistent/tokenizer.json");
    assert_false(directory_has(run.output, ".tmp"));
    run_free(&run);
}

// ----------------------------------------------------------------------------
// Loading refuses broken files

static const char* const checkpoint_files[5] = {"model.safetensors", "optimizer-00000-of-00001.safetensors",
                                                "config.json", "state.json", "heads.json"};

static void test_cut_short(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.output = fresh("cut");
    run_fill_and_save(&run, 1);
    char directory[PATH_MAX], path[PATH_MAX];
    path_format(directory, "%s/step_00000001", run.output);
    run.output = directory;
    for (int f = 0; f < 5; f++) {
        size_t length;
        path_format(path, "%s/%s", directory, checkpoint_files[f]);
        char* bytes = read_file_or_fail(path, &length);
        for (size_t cut = 0; cut < length - 1;
             cut += cut < 16 ? 1 : length / 23) { // JSON ends with a newline, which may be missing
            write_bytes(path, bytes, cut);
            expect_failure(run_load, &run, checkpoint_files[f]);
        }
        bytes = (char*)realloc(bytes, length + 2);
        memcpy(bytes + length, "x", 2);
        write_bytes(path, bytes, length + 1); // one byte too many
        expect_failure(run_load, &run, checkpoint_files[f]);
        write_bytes(path, bytes, length);
        expect_success(run_load, &run);
        assert_int_equal(unlink(path), 0);
        expect_failure(run_load, &run, f == 1 ? "no optimizer" : checkpoint_files[f]);
        write_bytes(path, bytes, length);
        free(bytes);
    }
    run_free(&run);
}

static void call_open(void* path) {
    SafetensorsFile file;
    safetensors_open(&file, (const char*)path);
    safetensors_close(&file);
}

static void write_safetensors(const char* path, const char* header, size_t data) {
    uint64_t length = strlen(header);
    char* bytes = (char*)calloc(1, 8 + length + data);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, length);
    write_bytes(path, bytes, 8 + length + data);
    free(bytes);
}

#define ENTRY(name, dtype, shape, offsets)                                                                   \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void test_bad_headers(void** unused) {
    (void)unused;
    char path[PATH_MAX];
    path_format(path, "%s/bad.safetensors", root);
    static const struct {
        const char* header;
        size_t data;
        const char* message; // NULL: the file is good
    } cases[] = {
        {"{}  ", 0, NULL},
        {"{" ENTRY("a", "F32", "[2,1]", "[0,8]") "," ENTRY("b", "BF16", "[]", "[8,10]") "}", 10, NULL},
        {"{" ENTRY("b", "F64", "[1]", "[8,16]") "," ENTRY("a", "F64", "[1]", "[0,8]") "}", 16, NULL},
        {"{" ENTRY("a", "F32", "[0,5]", "[0,0]") ",\"__metadata__\":{\"k\":\"v\"}}", 0, NULL},
        {"[]", 0, "not a JSON object"},
        {" {}", 0, "not a JSON object"},
        {"{]", 0, "not valid JSON"},
        {"{} x", 0, "text after its end"},
        {"{\"a\":3}", 0, "tensor a: no dtype"},
        {"{\"a\":[1]}", 0, "tensor a: no dtype"},
        {"{" ENTRY("a", "F16", "[2]", "[0,4]") "}", 4, "tensor a: dtype F16"},
        {"{" ENTRY("a", "F\\n", "[2]", "[0,4]") "}", 4, "tensor a: dtype F?"},
        {"{" ENTRY("a\\nb", "F32", "[2]", "[0,8]") "}", 8, "control character"},
        {"{" ENTRY("", "F32", "[2]", "[0,8]") "}", 8, "a name has 1 to 255"},
        {"{" ENTRY("a", "F32", "2", "[0,8]") "}", 8, "tensor a: shape is not a list"},
        {"{" ENTRY("a", "F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]") "}", 8, "tensor a: shape is not a list"},
        {"{" ENTRY("a", "F32", "[-2]", "[0,8]") "}", 8, "tensor a: shape holds"},
        {"{" ENTRY("a", "F32", "[1.5]", "[0,8]") "}", 8, "tensor a: shape holds"},
        {"{" ENTRY("a", "F32", "[1e300]", "[0,8]") "}", 8, "tensor a: shape holds"},
        {"{" ENTRY("a", "F32", "[\"2\"]", "[0,8]") "}", 8, "tensor a: shape holds"},
        {"{" ENTRY("a", "F32", "[4611686018427387904,1]", "[0,8]") "}", 8, "tensor a: shape holds"},
        {"{" ENTRY("a", "F32", "[4503599627370496,4503599627370496]", "[0,0]") "}", 0,
         "tensor a: shape too large"},
        {"{" ENTRY("a", "F32", "[2]", "[0]") "}", 8, "tensor a: data_offsets are not"},
        {"{" ENTRY("a", "F32", "[2]", "[0,8,9]") "}", 8, "tensor a: data_offsets are not"},
        {"{" ENTRY("a", "F32", "[2]", "[8,0]") "}", 8, "tensor a: data_offsets are not"},
        {"{" ENTRY("a", "F32", "[2]", "[-8,0]") "}", 8, "tensor a: data_offsets are not"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "tensor a: data_offsets are not"},
        {"{" ENTRY("a", "F32", "[2]", "[0,12]") "}", 12,
         "tensor a: data_offsets span 12 bytes, but (2) of F32 takes 8"},
        {"{" ENTRY("a", "F32", "[2]", "[0,8]") "}", 7, "tensor a: ends at byte 8"},
        {"{" ENTRY("a", "F32", "[2]", "[0,8]") "}", 9, "1 bytes after the last tensor"},
        {"{" ENTRY("a", "F32", "[2]", "[4,12]") "}", 12,
         "tensor a: begins at byte 4 of the data, after a gap"},
        {"{" ENTRY("a", "F32", "[2]", "[0,8]") "," ENTRY("b", "F32", "[2]", "[4,12]") "}", 12,
         "tensor b: begins at byte 4 of the data, inside"},
        {"{" ENTRY("a", "F32", "[2]", "[0,8]") "," ENTRY("a", "F32", "[2]", "[8,16]") "}", 16,
         "tensor a: listed twice"},
        {"{\"__metadata__\":3}", 0, "__metadata__ is not an object"},
        {"{\"__metadata__\":{\"k\":3}}", 0, "__metadata__: k is not a string"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        write_safetensors(path, cases[i].header, cases[i].data);
        if (cases[i].message) expect_failure(call_open, path, cases[i].message);
        else expect_success(call_open, path);
    }
    const uint64_t lengths[] = {0, 1, 100, 100000001, UINT64_MAX, UINT64_MAX - 8, (uint64_t)1 << 63};
    for (int i = 0; i < 7; i++) {
        char bytes[18] = "........{}        ";
        memcpy(bytes, &lengths[i], 8);
        write_bytes(path, bytes, 18);
        expect_failure(call_open, path,
                       lengths[i] == 100 ? "cut short: a header of 100"
                                         : "not a safetensors file: a header of");
    }
    expect_failure(call_open, root, "is a directory");
}

static void call_config(void* directory) { (void)checkpoint_read_config((const char*)directory); }
static void call_heads(void* directory) { // heads.json of small_config()
    HeadAllocation heads;
    allocation_start(&heads, allocation_defaults(0), 2, 4, 2);
    checkpoint_load_heads((const char*)directory, &heads);
    allocation_free(&heads);
}
static void call_state(void* directory) { (void)checkpoint_load_state((const char*)directory); }

typedef struct {
    const char *from, *to, *message;
} Edit;

// Makes each edit of the file, and expects its message; NULL: success.
static void expect_edits(const char* directory, const char* name, void (*read)(void*), const Edit* edits,
                         int count) {
    char path[PATH_MAX];
    path_format(path, "%s/%s", directory, name);
    char* text = read_file_or_fail(path, NULL);
    for (int i = 0; i < count; i++) {
        char* edited = replaced(text, edits[i].from, edits[i].to);
        write_text(directory, name, edited);
        if (edits[i].message) expect_failure(read, (void*)directory, edits[i].message);
        else expect_success(read, (void*)directory);
        free(edited);
    }
    write_text(directory, name, text);
    free(text);
}

static void test_bad_config(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.output = fresh("config");
    run_fill_and_save(&run, 1);
    char directory[PATH_MAX];
    path_format(directory, "%s/step_00000001", run.output);
    static const Edit edits[] = {
        {"\"llama\"", "\"gpt2\"", "model_type gpt2"},
        {"\"llama\"", "3", "no model_type"},
        {"\"llama\"", "\"a\\nb\"", "model_type a?b"},
        {"\"llama\"", "\"moba\"", NULL},
        {"\"silu\"", "\"gelu\"", "hidden_act is gelu"},
        {"\"attention_bias\":\tfalse", "\"attention_bias\":true", "attention_bias is set"},
        {"\"mlp_bias\":\tfalse", "\"mlp_bias\":true", "mlp_bias is set"},
        {"\"mlp_bias\":\tfalse", "\"quantization_config\":{}", "quantization_config is set"},
        {"\"hidden_size\":\t16", "\"hidden_size\":0", "hidden_size must be a whole number from 1"},
        {"\"hidden_size\":\t16", "\"hidden_size\":1e9", "hidden_size must be a whole number from 1"},
        {"\"hidden_size\":\t16", "\"hidden_size\":\"16\"", "hidden_size must be a whole number from 1"},
        {"\"hidden_size\":\t16", "\"x\":16", "hidden_size is missing"},
        {"\"hidden_size\":\t16", "\"hidden_size\":18", NULL}, // head_dim is still 4
        {"\"head_dim\":\t4", "\"head_dim\":null", NULL},
        {"\"head_dim\":\t4", "\"head_dim\":3", "head_dim 3: rotary positions need an even number"},
        {"\"num_attention_heads\":\t4", "\"num_attention_heads\":3",
         "num_key_value_heads 2 does not divide num_attention_heads 3"},
        {"\"num_key_value_heads\":\t2", "\"num_key_value_heads\":8", "num_key_value_heads 8 does not divide"},
        {"\"head_dim\":\t4,\n\t\"vocab_size\"", "\"hidden_size\":18,\"vocab_size\"",
         NULL}, // the first value counts
        {"\"rms_norm_eps\":\t1e-05", "\"rms_norm_eps\":-1", "rms_norm_eps must be a positive number"},
        {"\"rms_norm_eps\":\t1e-05", "\"rms_norm_eps\":1e-99", "rms_norm_eps must be a positive number"},
        {"\"rope_theta\":\t10000.0", "\"rope_theta\":1e99", "rope_theta must be a positive number"},
        {"\"rope_theta\":\t10000.0", "\"rope_scaling\":{\"rope_type\":\"llama3\"}", "rope_type is llama3"},
        {"\"rope_theta\":\t10000.0", "\"rope_scaling\":{\"type\":\"linear\"}", "type is linear"},
        {"\"rope_theta\":\t10000.0", "\"rope_scaling\":{\"factor\":8.0}", "factor is not 1"},
        {"\"rope_theta\":\t10000.0", "\"rope_scaling\":{\"rope_type\":\"default\",\"factor\":8.0}", NULL},
        {"\"rope_theta\":\t10000.0", "\"rope_scaling\":null", NULL},
        {"\"rope_theta\":\t10000.0", "\"partial_rotary_factor\":0.5", "partial_rotary_factor is not 1"},
        {"\"rope_theta\":\t10000.0", "\"partial_rotary_factor\":1.0", NULL},
        {"\"rope_theta\":\t10000.0", "\"rope_parameters\":{\"partial_rotary_factor\":0.5}",
         "partial_rotary_factor is not 1"},
        {"\"rope_theta\":\t10000.0", "\"rope_parameters\":5", "rope_parameters is not an object"},
        {"\"tie_word_embeddings\":\ttrue", "\"tie_word_embeddings\":1",
         "tie_word_embeddings must be true or false"},
        {"\"pattern\":\t\"G\"", "\"pattern\":\"GX\"", "moba.pattern"},
        {"\"pattern\":\t\"G\"", "\"pattern\":\"\"", "moba.pattern"},
        {"\"window\":\t256", "\"window\":0", "window must be"},
        {"\"kconv\":\t0", "\"kconv\":-1", "kconv must be"},
        {"\"attn\":\t\"dense\"", "\"attn\":\"sparse\"", "moba.attn is sparse, which"},
        {"\"gqa\":\t\"gqa\"", "\"gqa\":7", "moba.gqa is not a text, which"},
        {"\"kconv\":\t0", "\"kconv\":4", "kconv must be 0, 3 or 5"},
        {"\"moba\":", "\"moba\":3,\"other\":", "moba.attn is not a text, which"},
    };
    expect_edits(directory, "config.json", call_config, edits, sizeof(edits) / sizeof(edits[0]));
    static const Edit state_edits[] = {
        {"\"format_version\":\t2", "\"format_version\":3", "written by a newer version"},
        {"\"format_version\":\t2", "\"x\":1", "no format_version"},
        {"\"format_version\":\t2", "\"format_version\":1", NULL},
        {"\"unmeasured\"", "\"x\"", NULL},
        {"\"data_fingerprint\"", "\"x\"", "data_fingerprint is missing"},
        {"\"data_fingerprint\":\t\"", "\"data_fingerprint\":\"-", "data_fingerprint must be decimal digits"},
        {"\"step\":\t1", "\"step\":-1", "step must be a whole number from 0"},
        {"\"step\":\t1", "\"step\":4294967296", "step must be a whole number from 0"},
        {"\"step\":\t1", "\"x\":1", "step is missing"},
        {"\"seed\":\t\"1", "\"seed\":\"1844674407370955161", "seed must be decimal digits"},
        {"\"seed\":\t\"", "\"seed\":\"-", "seed must be decimal digits"},
        {"\"seed\":\t\"", "\"seed\":\"x", "seed must be decimal digits"},
        {"\"cosine\"", "\"a schedule with a long name\"", "schedule must be a short text"},
        {"\"train_loss\":\t\"inf\"", "\"train_loss\":\"many\"", "train_loss must be a number"},
        {"\"train_loss\":\t\"inf\"", "\"train_loss\":1e999", "train_loss must be a number"},
        {"\"train_loss\":\t\"inf\"", "\"train_loss\":[]", "train_loss must be a number"},
        {"{", "{\"later\":3,", NULL},
    };
    expect_edits(directory, "state.json", call_state, state_edits,
                 sizeof(state_edits) / sizeof(state_edits[0]));
    static const Edit heads_edits[] = {
        {"\"layers\"", "\"lagers\"", "want layers, a list of the model's 2"},
        {"\"layers\":\t[", "\"layers\":\t[{},", "want layers, a list of the model's 2"},
        {"\"heads\":\t[1, 3]", "\"heads\":[1,2]", "layer 0 gives 3 query heads out, the model has 4"},
        {"\"heads\":\t[1, 3]", "\"heads\":[1,1,2]", "every layer must have heads, a list of 2 numbers"},
        {"\"heads\":\t[1, 3]", "\"heads\":[-1,5]", "heads must be whole numbers from 0 to 4"},
        {"\"heads\":\t[1, 3]", "\"heads\":[5,-1]", "heads must be whole numbers from 0 to 4"},
        {"\"heads\":\t[1, 3]", "\"heads\":[4,0]", NULL},
        {"\"measured\":\t1", "\"measured\":2", "measured must be whole numbers from 0 to 1"},
        {"\"windows\":\t1", "\"windows\":0.5", "windows must be whole numbers"},
        {"\"moved\":\t4", "\"moved\":-4", "moved must be whole numbers"},
        {"\"history\":\t[1.0", "\"history\":[\"one\"", "history must be numbers"},
        {"\"history\":\t[1.0", "\"history\":[1,1", "every layer must have history, a list of 2 numbers"},
    };
    expect_edits(directory, "heads.json", call_heads, heads_edits,
                 sizeof(heads_edits) / sizeof(heads_edits[0]));
    run_free(&run);
}

static const char* mismatched_directory;
static void call_same_model(void* config) {
    checkpoint_check_same_model(mismatched_directory, (const ModelConfig*)config);
}

static void test_other_model(void** unused) {
    (void)unused;
    Run run = run_make(small_config("SG", 1));
    run.output = fresh("other");
    run_fill_and_save(&run, 1);
    char directory[PATH_MAX];
    path_format(directory, "%s/step_00000001", run.output);
    mismatched_directory = directory;
    ModelConfig want = run.config;
    expect_success(call_same_model, &want);
#define DIFFERENT(member, value, message)                                                                    \
    want = run.config;                                                                                       \
    want.member = value;                                                                                     \
    expect_failure(call_same_model, &want, message)
    DIFFERENT(layers, 3, "--layers 2, this run asks for 3");
    DIFFERENT(channels, 32, "--channels 16, this run asks for 32");
    DIFFERENT(heads, 8, "--heads 4, this run asks for 8");
    DIFFERENT(kv_heads, 4, "--kv-heads 2, this run asks for 4");
    DIFFERENT(head_dim, 8, "--head-dim 4, this run asks for 8");
    DIFFERENT(ffn, 25, "--ffn 24, this run asks for 25");
    DIFFERENT(vocab_size, 51, "--vocab 50, this run asks for 51");
    DIFFERENT(sequence_length, 16, "--sequence-length 32, this run asks for 16");
    DIFFERENT(tied, 0, "--tied 1, this run asks for 0");
    DIFFERENT(norm_eps, 1e-6f, "--norm-eps 1e-05, this run asks for 1e-06");
    DIFFERENT(rope_theta, 5e5f, "--rope-theta 10000, this run asks for 500000");
    DIFFERENT(window, 8, "--window 256, this run asks for 8");
    DIFFERENT(rope_global, 0, "layer 1 has rotary positions, this run asks for none");
    DIFFERENT(rope_sliding, 0, "layer 0 has rotary positions, this run asks for none");
    want = run.config;
    strcpy(want.pattern, "G");
    expect_failure(call_same_model, &want, "--pattern SG, this run asks for G");
    strcpy(want.pattern, "SGSG"); // the same layers as "SG" repeated
    expect_success(call_same_model, &want);
    static const Edit edits[] = {
        {"\"dense\"", "\"flashmoba\"", "--attention flashmoba, this run asks for dense"},
        {"\"gqa\":\t\"gqa\"", "\"gqa\":\"pgqa\"", "--query-heads pgqa, this run asks for gqa"},
        {"\"kconv\":\t0", "\"kconv\":3", "--kconv 3, this run asks for 0"},
    };
    want = run.config;
    char path[PATH_MAX];
    path_format(path, "%s/config.json", directory);
    char* text = read_file_or_fail(path, NULL);
    for (int i = 0; i < 3; i++) {
        char* edited = replaced(text, edits[i].from, edits[i].to);
        write_text(directory, "config.json", edited);
        expect_failure(call_same_model, &want, edits[i].message);
        free(edited);
    }
    free(text);
    run_free(&run);
}

static void load_model_only(void* argument) {
    Run* run = (Run*)argument;
    checkpoint_load_model(run->output, &run->layout.table, weights_of(run), 0);
}

// A file with other tensors than the model's.
static void test_other_tensors(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    char directory[PATH_MAX], path[PATH_MAX];
    path_format(directory, "%s", fresh("tensors"));
    make_directories_or_fail(directory);
    path_format(path, "%s/config.json", directory);
    checkpoint_write_config(path, &run.config, NULL);
    path_format(path, "%s/model.safetensors", directory);
    run.output = directory;
    run_fill(&run, 1);
    TensorTable table = run.layout.table;
    Tensor* tensor = &table.tensors[5];
    const Tensor kept = *tensor;
    for (int change = 0; change < 5; change++) {
        if (change == 0)
            strcpy(tensor->name, "model.layers.0.self_attn.k_norm.weight"), tensor->count = kept.count;
        if (change == 1) tensor->shape[0] *= 2, tensor->shape[1] /= 2;
        if (change == 2) tensor->dims = 1, tensor->shape[0] = (int)tensor->count;
        if (change == 4) strcpy(tensor->name, "model.layers.0.self_attn.rotary_emb.inv_freq");
        checkpoint_write_model(path, &table, weights_of(&run), 0);
        *tensor = kept;
        char message[256];
        snprintf(message, sizeof(message),
                 change == 0 || change == 4 ? "tensor %s is missing" : "tensor %s has shape", kept.name);
        if (change == 3) expect_success(load_model_only, &run);
        else expect_failure(load_model_only, &run, message);
    }
    checkpoint_write_model(path, &table, weights_of(&run), 0);
    ModelConfig untied =
        run.config; // a tied model accepts an output head that equals its embedding; an untied one needs it
    untied.tied = 0;
    Run other = run_make(untied);
    other.output = directory;
    expect_failure(load_model_only, &other, "tensor lm_head.weight is missing");
    checkpoint_write_model(path, &other.layout.table, weights_of(&other), 0);
    expect_success(load_model_only, &run);
    floatX* head = other.params + other.layout.head;
    const size_t values = (size_t)untied.vocab_size * (size_t)untied.channels;
    head[values - 1] = (floatX)1e-30; // one element of the head differs
    checkpoint_write_model(path, &other.layout.table, weights_of(&other), 0);
    expect_failure(load_model_only, &run, "lm_head.weight is not its embedding");
    expect_success(load_model_only, &other);
    head[values - 1] = 0;
    strcpy(other.layout.table.tensors[0].name, "other.weight"); // the file has one tensor too many
    strcpy(other.layout.table.tensors[other.layout.table.count - 1].name, "model.embed_tokens.weight");
    checkpoint_write_model(path, &other.layout.table, weights_of(&other), 0);
    expect_failure(load_model_only, &run, "tensor other.weight is not one of the model's");
    unlink(path);
    write_text(directory, "model.safetensors.index.json", "{}");
    expect_failure(load_model_only, &run, "a model in several files is not read");
    run_free(&run);
    run_free(&other);
}

// Saving and loading refuse a number that is not finite, because it would turn all other weights into NaN.
static void test_weights_that_are_not_finite(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    char directory[PATH_MAX], path[PATH_MAX];
    static const double values[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        run.output = fresh("finite");
        path_format(directory, "%s/step_00000001", run.output);
        run_fill_and_save(&run, 1);
        run_fill(&run, 2);
        run.params[run.layout.layers[1].down_proj + 5] = (floatX)values[i];
        expect_failure(run_save, &run, "mlp.down_proj.weight is NaN or infinite");
        assert_false(directory_has(run.output, "step_00000002"));
        assert_int_equal(latest_whole_step(run.output, &run.config), 1);
        // Writes the same number into the file.
        path_format(path, "%s/model.safetensors", directory);
        const float bad = (float)values[i];
        FILE* file = fopen(path, "r+b");
        assert_non_null(file);
        fseek(file, -(long)sizeof(bad), SEEK_END);
        fwrite(&bad, sizeof(bad), 1, file);
        fclose(file);
        run.output = directory;
        expect_failure(load_model_only, &run, "is NaN or infinite");
    }
    run_free(&run);
}

// transformers accepts any head_dim in a Llama, but the channels must be a multiple of the heads.
static void test_label(void** unused) {
    (void)unused;
    static const struct {
        int channels, heads, head_dim, llama;
    } cases[] = {{16, 4, 4, 1}, {16, 4, 8, 1}, {18, 4, 4, 0}, {16, 6, 4, 0}, {24, 6, 2, 1}};
    char path[PATH_MAX];
    path_format(path, "%s", fresh("label.json"));
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        ModelConfig config = small_config("G", 1);
        config.channels = cases[i].channels;
        config.heads = cases[i].heads;
        config.head_dim = cases[i].head_dim;
        model_config_check(&config);
        checkpoint_write_config(path, &config, NULL);
        char* text = read_file_or_fail(path, NULL);
        assert_int_equal(strstr(text, "LlamaForCausalLM") != NULL, cases[i].llama);
        assert_int_equal(strstr(text, "\"llama\"") != NULL, cases[i].llama);
        free(text);
    }
}

// If a layer had a window, it had no key convolution, and loading sets its taps to zero. If it had a
// convolution, the file must contain its taps.
static void test_convolution_of_more_layers(void** unused) {
    (void)unused;
    ModelConfig config = small_config("SG", 1);
    config.kconv = 3;
    Run run = run_make(config);
    char directory[PATH_MAX], path[PATH_MAX];
    path_format(directory, "%s", fresh("taps"));
    make_directories_or_fail(directory);
    path_format(path, "%s/config.json", directory);
    checkpoint_write_config(path, &config, NULL);
    path_format(path, "%s/model.safetensors", directory);
    run_fill(&run, 1);
    checkpoint_write_model(path, &run.layout.table, weights_of(&run), 0);
    strcpy(config.pattern, "G");
    Run whole = run_make(config);
    whole.output = directory;
    const size_t first = whole.layout.layers[0].k_conv, second = whole.layout.layers[1].k_conv;
    whole.params[first] = 7;
    expect_success(load_model_only, &whole); // in a child process
    load_model_only(&whole);
    for (int i = 0; i < 3 * 8; i++) {
        assert_true(whole.params[first + (size_t)i] == 0);
        assert_true(whole.params[second + (size_t)i] == run.params[run.layout.layers[1].k_conv + (size_t)i]);
    }
    run_free(&run); // now the file lacks taps of a layer that needs them
    run = run_make(small_config("SG", 1));
    run_fill(&run, 1);
    checkpoint_write_model(path, &run.layout.table, weights_of(&run), 0);
    expect_failure(load_model_only, &whole, "tensor model.layers.1.self_attn.k_conv.weight is missing");
    run_free(&run);
    run_free(&whole);
}

static void test_changed_settings(void** unused) {
    (void)unused;
    TrainingState before, now;
    memset(&before, 0, sizeof(before));
    strcpy(before.schedule, "cosine");
    before.weight_decay = 0.1;
    before.beta2 = 0.95;
    before.max_steps = 50;
    now = before;
    char changes[CHANGES_BYTES] = "";
    checkpoint_changed_settings(changes, &before, &now);
    assert_string_equal(changes, "");
    now.step = 7, now.train_loss = 3, now.data_tokens = 5; // these are not settings
    now.weight_decay = 0.2, now.max_steps = 60;
    strcpy(now.schedule, "wsd");
    checkpoint_changed_settings(changes, &before, &now);
    assert_string_equal(changes, "--schedule cosine to wsd, --steps 50 to 60, --weight-decay 0.1 to 0.2");
    for (int i = 0; i < 100; i++) changes_add(changes, "%s", "a change too many");
    assert_int_equal(strlen(changes), CHANGES_BYTES - 1);
}

static void call_check_output(void* output) { checkpoint_check_output((const char*)output); }

// Expects exit code 2 and the message.
static void expect_bad_output(const char* output, const char* part) {
    Outcome outcome = run_child(call_check_output, (void*)output);
    if (!WIFEXITED(outcome.status) || WEXITSTATUS(outcome.status) != 2 || !strstr(outcome.error, part))
        fail_test("%s: want \"%s\", got %s", output, part, outcome.error);
}

// Directories of a run inside another run, and names that lead into one.
static void test_names_inside_a_run(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.output = fresh("inside");
    run_fill_and_save(&run, 1);
    char path[PATH_MAX], other[PATH_MAX];
    static const char* const named[] = {"step_00000001", "step_00000001/", "step_00000002",
                                        "step_00000002.tmp", "step_00000001.old"};
    for (int i = 0; i < 5; i++) {
        path_format(path, "%s/%s", run.output, named[i]);
        expect_bad_output(path, "has the name of a checkpoint");
        assert_non_null(strstr(run_child(call_check_output, path).error, run.output));
    }
    path_format(path, "%s/step_00000001/a/b", run.output);
    expect_bad_output(path, "lies in the checkpoint");
    path_format(path, "%s/link", run.output);
    assert_int_equal(symlink("step_00000001", path), 0);
    expect_bad_output(path, "holds a model");
    path_format(path, "%s/link/new", run.output);
    expect_bad_output(path, "lies in the checkpoint");
    path_format(path, "%s/step_00000001/..", run.output);
    expect_success(call_check_output, path);
    path_format(path, "%s/new", run.output);
    expect_success(call_check_output, path);
    expect_success(call_check_output, (void*)run.output);
    expect_success(call_check_output, (void*)"not/there/yet");
    // A file with the name of a directory.
    path_format(path, "%s/step_00000001/model.safetensors", run.output);
    path_format(other, "name the directory that it lies in: %s/step_00000001\n", run.output);
    expect_failure(call_resolve, path, other);
    path_format(path, "%s/latest", run.output);
    path_format(other, "name the directory that it lies in: %s\n", run.output);
    expect_failure(call_resolve, path, other);
    // Loading follows a link to a checkpoint, but nothing ever removes the link's target.
    path_format(path, "%s/step_00000003", run.output);
    write_text(run.output, "step_00000003", "a file");
    write_text(run.output, "latest", "step_00000003\n");
    expect_failure(call_resolve, (void*)run.output, "names step_00000003, which is not a directory; write");
    assert_int_equal(unlink(path), 0);
    assert_int_equal(symlink("step_00000001", path), 0);
    checkpoint_resolve(run.output, other);
    assert_string_equal(other, path);
    checkpoint_remove(run.output, 3);
    assert_true(exists(run.output, "step_00000003"));
    remove_path(path);
    assert_false(exists(run.output, "step_00000003"));
    assert_true(exists(run.output, "step_00000001/state.json"));
    run_free(&run);
}

// Files of the user may have the names of a checkpoint's files. Beside a run, they must not stop it.
static void test_files_of_the_user(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    char top[PATH_MAX], path[PATH_MAX];
    path_format(top, "%s", fresh("user"));
    path_format(path, "%s/run", top);
    run.output = path;
    make_directories_or_fail(path);
    write_text(top, "state.json", "{}");
    write_text(path, "state.json", "{}");
    write_text(path, "config.json", "{}");
    expect_success(call_check_output, path);
    run_fill_and_save(&run, 1);
    expect_success(call_check_output, path);
    expect_success(call_resolve, path);
    write_text(path, "model.safetensors", "mine");
    expect_success(call_check_output, path);
    // The program still refuses a model's directory, and a checkpoint's directory under another name.
    write_text(top, "model.safetensors", "a model");
    expect_bad_output(path, "lies in the checkpoint");
    write_text(top, "config.json", "{}");
    expect_bad_output(top, "holds a model");
    run_free(&run);
}

static void enter_removed_directory(void* output) {
    const char* gone = fresh("gone");
    make_directories_or_fail(gone);
    if (chdir(gone) != 0 || rmdir(gone) != 0) fail("cannot remove the current directory");
    alarm(120); // ends an endless loop
    call_check_output(output);
}

static void test_current_directory_is_gone(void** unused) {
    (void)unused;
    expect_failure(enter_removed_directory, (void*)"run", "the current directory: No such file");
    expect_failure(enter_removed_directory, (void*)"a/b/run", "the current directory: No such file");
    expect_success(enter_removed_directory, (void*)"/not/there/yet");
}

static void write_slice(const Run* run, int rank, int total, size_t first, size_t end) {
    char path[PATH_MAX];
    path_format(path, "%s/optimizer-%05d-of-%05d.safetensors", run->output, rank, total);
    const OptimizerVector vectors[2] = {{"exp_avg", run->exp_avg}, {"exp_avg_sq", run->exp_avg_sq}};
    const StateRange range = {first, end - first, first};
    checkpoint_write_optimizer(path, &run->layout.table, vectors, 2, &range, 1, 0);
}

static void test_slices(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1)), want = run_make(small_config("G", 1));
    const size_t n = run.layout.table.elements;
    run.output = fresh("slices");
    make_directories_or_fail(run.output);
    want.output = run.output;
    run_fill(&want, 1);
    expect_failure(load_optimizer_only, &run, "no optimizer-*.safetensors");
    write_slice(&want, 0, 4, 0, 1000);
    write_slice(&want, 1, 4, 1500, n); // another order than the ranks'; one slice is empty
    write_slice(&want, 2, 4, 1000, 1000);
    expect_failure(load_optimizer_only, &run, "optimizer-00003-of-00004.safetensors: No such file");
    write_slice(&want, 3, 4, 1000, 1500);
    load_optimizer_only(&run);
    assert_memory_equal(run.exp_avg, want.exp_avg, n * sizeof(float_acc));
    assert_memory_equal(run.exp_avg_sq, want.exp_avg_sq, n * sizeof(float_acc));

    float_acc part[700]; // elements 900..1599, from three slices
    const OptimizerVector vectors[2] = {{"exp_avg_sq", part}, {"exp_avg", run.exp_avg}};
    const StateRange middle = {900, 700, 0}, whole = whole_state(&run), shifted = {1, n, 0};
    checkpoint_read_optimizer(run.output, &run.layout.table, vectors, 2, &middle, 1, 0);
    assert_memory_equal(part, want.exp_avg_sq + 900, sizeof(part));
    assert_memory_equal(run.exp_avg, want.exp_avg + 900, sizeof(part));

    write_slice(&want, 3, 4, 1000, 1499);
    expect_failure(load_optimizer_only, &run, "but the slice before ends at 1499");
    write_slice(&want, 3, 4, 1000, 1501);
    expect_failure(load_optimizer_only, &run,
                   "begins at element 1500 of the optimizer state, but the slice before ends at 1501");
    write_slice(&want, 3, 4, 1000, 1500);
    write_slice(&want, 1, 4, 1500, n - 1);
    expect_failure(load_optimizer_only, &run, "slices end at element");
    write_slice(&want, 1, 4, 1500, n);
    write_slice(&want, 1, 3, 1500, n);
    expect_failure(load_optimizer_only, &run, "side by side");
    run.output = want.output = fresh("slices");
    make_directories_or_fail(run.output);
    write_slice(&want, 0, 1, 0, n);
    expect_success(load_optimizer_only, &run);
    run.layout.table.tensors[3].offset += 64; // the same number of elements at another offset
    expect_failure(load_optimizer_only, &run, "made for another layout");
    run.layout.table.tensors[3].offset -= 64;
    char path[PATH_MAX];
    path_format(path, "%s/optimizer-00000-of-00001.safetensors", run.output);
    const OptimizerVector three[3] = {
        {"exp_avg", want.exp_avg}, {"exp_avg_sq", want.exp_avg_sq}, {"master", want.exp_avg}};
    checkpoint_write_optimizer(path, &run.layout.table, three, 3, &whole, 1, 0);
    expect_failure(load_optimizer_only, &run, "3 tensors, but this run's optimizer has 2");
    checkpoint_write_optimizer(path, &run.layout.table, three, 1, &whole, 1, 0);
    expect_failure(load_optimizer_only, &run, "tensor exp_avg_sq is missing");
    checkpoint_write_optimizer(path, &run.layout.table, three, 2, &shifted, 1, 0);
    expect_failure(load_optimizer_only, &run, "of a state of");
    run_free(&run);
    run_free(&want);
}

// ----------------------------------------------------------------------------
// Failures while saving

static rlim_t file_limit;
static void save_with_file_limit(void* run) {
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {file_limit, file_limit};
    setrlimit(RLIMIT_FSIZE, &limit);
    run_save(run);
}

// Tries every limit on file size up to the size of the largest file.
static void test_file_limit(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.output = fresh("limit");
    run_fill_and_save(&run, 1);
    run_fill(&run, 2);
    size_t largest = 2 * run.layout.table.elements * sizeof(float_acc);
    for (file_limit = 0; file_limit < largest; file_limit += 1 + file_limit / 2) {
        expect_failure(save_with_file_limit, &run, "File too large");
        assert_int_equal(latest_whole_step(run.output, &run.config), 1);
        assert_false(directory_has(run.output, ".tmp") || directory_has(run.output, "00002"));
    }
    file_limit = 2 * largest;
    expect_success(save_with_file_limit, &run);
    assert_int_equal(latest_whole_step(run.output, &run.config), 2);
    run_free(&run);
}

typedef struct {
    const char* path;
    const floatX* logits;
} LogitsFile;

static void write_logits_with_limit(void* argument) {
    const LogitsFile* file = (const LogitsFile*)argument;
    const int tokens[4] = {1, 2, 3, 4};
    const struct rlimit limit = {file_limit, file_limit};
    signal(SIGXFSZ, SIG_IGN);
    if (file_limit) setrlimit(RLIMIT_FSIZE, &limit);
    logits_write(file->path, file->logits, tokens, 4, 256, 256);
}

static void replace_json_with_limit(void* path) {
    const struct rlimit limit = {file_limit, file_limit};
    cJSON* json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "text", "longer than the limit");
    signal(SIGXFSZ, SIG_IGN);
    if (file_limit) setrlimit(RLIMIT_FSIZE, &limit);
    json_replace_file((const char*)path, json);
    cJSON_Delete(json);
}

// If a result cannot be written, the old file must stay complete, with no other file beside it.
static void test_results_replace_the_old_file(void** unused) {
    (void)unused;
    static floatX logits[4 * 256];
    char directory[PATH_MAX], path[PATH_MAX], link_path[PATH_MAX];
    path_format(directory, "%s", fresh("results"));
    make_directories_or_fail(directory);
    path_format(path, "%s/result", directory);
    path_format(link_path, "%s/link", directory);
    assert_int_equal(symlink("result", link_path), 0);
    const LogitsFile file = {link_path, logits};
    void* const arguments[2] = {(void*)&file, link_path};
    void (*const writers[2])(void*) = {write_logits_with_limit, replace_json_with_limit};
    for (int w = 0; w < 2; w++) {
        size_t length;
        write_text(directory, "result", "old");
        file_limit = 8;
        expect_failure(writers[w], arguments[w], "File too large");
        char* text = read_file_or_fail(path, NULL);
        assert_string_equal(text, "old");
        free(text);
        assert_false(directory_has(directory, ".partial"));
        file_limit = 0;
        expect_success(writers[w], arguments[w]);
        free(read_file_or_fail(path, &length));
        struct stat info;
        assert_true(length > 8 && lstat(link_path, &info) == 0 && S_ISLNK(info.st_mode));
        assert_false(directory_has(directory, ".partial"));
    }
    const LogitsFile device = {"/dev/null", logits};
    struct stat info;
    expect_success(write_logits_with_limit, (void*)&device);
    assert_true(stat("/dev/null", &info) == 0 && S_ISCHR(info.st_mode));
}

// Uses a real full disk, if the test may mount one.
static void save_on_full_disk(void* argument) {
    Run* run = (Run*)argument;
    char directory[PATH_MAX], output[PATH_MAX];
    path_format(directory, "%s", fresh("disk"));
    make_directories_or_fail(directory);
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("none", directory, "tmpfs", 0, "size=256k") != 0)
        fail("cannot mount");
    path_format(output, "%s/out", directory);
    run->output = output;
    run_fill_and_save(run, 1);
    pid_t child = fork();
    if (child == 0) {
        run_fill_and_save(run, 2);
        run_fill_and_save(run, 3);
        exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    int step = latest_whole_step(output, &run->config);
    if (step < 1 || directory_has(output, ".tmp")) fail("the checkpoint before is gone");
    exit(WEXITSTATUS(status));
}

static void test_full_disk(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    Outcome outcome = run_child(save_on_full_disk, &run);
    run_free(&run);
    if (strstr(outcome.error, "cannot mount")) {
        print_message("SKIPPED: no tmpfs may be mounted here\n");
        skip();
    }
    if (!is_clean_failure(&outcome) || !strstr(outcome.error, "No space left"))
        fail_test("got: %s", outcome.error);
}

static void save_as_nobody(void* run) {
    if (geteuid() == 0 && setuid(65534) != 0) fail("cannot become another user");
    run_save(run);
}

static void test_unwritable(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    char path[PATH_MAX];
    path_format(path, "%s/file", root);
    write_bytes(path, "x", 1);
    run.output = path;
    run_fill(&run, 1);
    expect_failure(run_save, &run, "not a directory");
    path_format(path, "%s/file/below", root);
    expect_failure(run_save, &run, "Not a directory");
    run.output = fresh("unwritable");
    run_fill_and_save(&run, 1);
    run_fill(&run, 2);
    chmod(root, 0755);
    chmod(run.output, 0555);
    expect_failure(save_as_nobody, &run, "Permission denied");
    chmod(run.output, 0755);
    assert_int_equal(latest_whole_step(run.output, &run.config), 1);
    run_free(&run);
}

static int call_number;
static int* calls_of_child; // shared with the children: the number of calls of a successful save
static void save_and_fail(void* run) {
    disk_calls = 0;
    fail_at_call = call_number;
    run_save(run);
    *calls_of_child = disk_calls;
}
static void save_and_die(void* run) {
    disk_calls = 0;
    kill_at_call = call_number;
    run_save(run);
}

// Saves step 3 over checkpoints 1 and 2 with --keep 2, or saves step 2 again. The disk is
// full from the n-th call on, for every n.
static void test_failure_at_each_call(void** unused) {
    (void)unused;
    calls_of_child = (int*)mmap(NULL, sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    Run run = run_make(small_config("G", 1));
    run.keep = 2;
    for (int step = 2; step <= 3; step++) {
        Outcome outcome;
        int failures = 0;
        for (call_number = 1;; call_number++) {
            run.output = fresh("fail_at");
            run_fill_and_save(&run, 1);
            run_fill_and_save(&run, 2);
            run_fill(&run, step);
            outcome = run_child(save_and_fail, &run);
            int latest = latest_whole_step(run.output, &run.config);
            if (is_success(&outcome)) {
                assert_int_equal(latest, step);
                if (call_number > *calls_of_child) break;
                continue;
            }
            if (!is_clean_failure(&outcome)) fail_test("call %d: %s", call_number, outcome.error);
            assert_non_null(strstr(outcome.error, "No space left"));
            assert_int_equal(latest, 2);
            assert_false(directory_has(run.output, ".tmp"));
            failures++;
        }
        assert_true(failures > 30);
    }
    run_free(&run);
}

// The same with a kill before the n-th call. The latest checkpoint must be complete, and the
// next save must remove half-written files.
static void test_kill_at_each_call(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.keep = 2;
    for (int step = 2; step <= 3; step++)
        for (call_number = 1;; call_number++) {
            run.output = fresh("kill_at");
            run_fill_and_save(&run, 1);
            run_fill_and_save(&run, 2);
            run_fill(&run, step);
            Outcome outcome = run_child(save_and_die, &run);
            int latest = latest_whole_step(run.output, &run.config);
            assert_true(latest == 2 || latest == step);
            assert_all_whole(run.output, &run.config);
            run_fill_and_save(&run, 4);
            assert_int_equal(latest_whole_step(run.output, &run.config), 4);
            assert_false(directory_has(run.output, ".tmp") || directory_has(run.output, ".old"));
            if (is_success(&outcome)) break;
            assert_true(WIFSIGNALED(outcome.status) && WTERMSIG(outcome.status) == SIGKILL);
        }
    run_free(&run);
}

static void remove_all_and_die(void* run) {
    disk_calls = 0;
    kill_at_call = call_number;
    checkpoint_remove_all(((Run*)run)->output);
}

// Kills --overwrite before the n-th call. Directories that still have their names must be complete, and the
// next --overwrite must remove everything.
static void test_kill_at_each_call_of_removal(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.keep = 0;
    for (call_number = 1;; call_number++) {
        run.output = fresh("kill_removal");
        for (int step = 1; step <= 3; step++) run_fill_and_save(&run, step);
        Outcome outcome = run_child(remove_all_and_die, &run);
        assert_all_whole(run.output, &run.config);
        checkpoint_remove_all(run.output);
        assert_false(directory_has(run.output, "step_") || directory_has(run.output, "latest"));
        if (is_success(&outcome)) break;
        assert_true(WIFSIGNALED(outcome.status) && WTERMSIG(outcome.status) == SIGKILL);
    }
    assert_true(call_number > 15);
    run_free(&run);
}

// Kills an endless loop of saves at 50 random moments. If the machine is so busy
// that no save completes, it tries more often.
static void test_kill_at_random(void** unused) {
    (void)unused;
    Run run = run_make(small_config("G", 1));
    run.keep = 2;
    run.output = fresh("kill");
    int before = -1;
    for (int i = 0; i < 50 || (before <= 3 && i < 5000); i++) {
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            in_child = 1;
            int step = before < 0 ? 0 : before;
            for (;; step++) run_fill_and_save(&run, step), run_fill_and_save(&run, step);
        }
        struct timespec delay = {0, (long)(random_uniform(5, 0, (uint64_t)i) * 6e7)};
        nanosleep(&delay, NULL);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        int latest = latest_whole_step(run.output, &run.config);
        assert_true(latest >= before);
        assert_all_whole(run.output, &run.config);
        before = latest;
    }
    assert_true(before > 3);
    run_fill_and_save(&run, before + 1);
    assert_false(directory_has(run.output, ".tmp") || directory_has(run.output, ".old"));
    run_free(&run);
}

// ----------------------------------------------------------------------------
// Fuzz

typedef struct {
    const char *directory, *name;
    size_t reach; // changes affect only bytes before this one
    void (*read)(void*);
    void* argument;
    int rounds;
} Fuzz;

// Changes, removes or doubles a few of the bytes. `length` becomes the new length.
static char* fuzz_bytes(const char* bytes, size_t* length, size_t reach, uint64_t seed, int round) {
    static const char interesting[] = "{}[]\",:0-9eE.tfn\\ \n\0\x7f\xff";
    char* changed = (char*)malloc(*length + 64);
    memcpy(changed, bytes, *length);
    double draws[4];
    int changes = 1 + round % 3;
    for (int c = 0; c < changes; c++) {
        for (int d = 0; d < 4; d++) draws[d] = random_uniform(seed, (uint64_t)round, (uint64_t)(4 * c + d));
        size_t place = (size_t)(draws[0] * (double)reach), size = (size_t)(draws[1] * 12);
        if (place + size >= *length) continue;
        if (draws[2] < 0.5) changed[place] = interesting[(int)(draws[3] * (double)(sizeof(interesting) - 1))];
        else if (draws[2] < 0.7) changed[place] ^= (char)(1 << (int)(draws[3] * 8));
        else if (draws[2] < 0.85) {
            memmove(changed + place, changed + place + size, *length - place - size);
            *length -= size;
        } else {
            memmove(changed + place + size, changed + place, *length - place);
            *length += size;
        }
    }
    return changed;
}

// Reads the file once. Returns the reader's exit code if it failed, or 0. It is a separate function, so that
// longjmp() restores no register with a variable of the caller.
static __attribute__((noinline)) int read_or_fail_back(const Fuzz* fuzz) {
    static jmp_buf jump;
    after_failure = &jump;
    const int code = setjmp(jump);
    if (code == 0) fuzz->read(fuzz->argument);
    after_failure = NULL;
    return code;
}

// Runs in a child. Each round reads one changed file. The reader must succeed, or
// fail with code 1 and one line.
static void fuzz_rounds(void* argument) {
    const Fuzz* fuzz = (const Fuzz*)argument;
    static char path[PATH_MAX], line[8192];
    size_t original_length;
    path_format(path, "%s/%s", fuzz->directory, fuzz->name);
    char* bytes = read_file_or_fail(path, &original_length);
    FILE* messages = tmpfile();
    int real_stderr = dup(2), first_free = dup(2);
    static volatile int round, refused;
    for (round = 0; round < fuzz->rounds; round++) {
        size_t length = original_length, reach = fuzz->reach < length ? fuzz->reach : length;
        char* changed_bytes = fuzz_bytes(bytes, &length, reach, random_stream(fuzz->name), round);
        write_bytes(path, changed_bytes, length);
        free(changed_bytes);
        assert_int_equal(ftruncate(fileno(messages), 0), 0);
        lseek(fileno(messages), 0, SEEK_SET);
        dup2(fileno(messages), 2);
        int code = read_or_fail_back(fuzz);
        dup2(real_stderr, 2);
        for (int file = first_free; file < first_free + 8; file++) close(file); // left open by the reader
        ssize_t got = pread(fileno(messages), line, sizeof(line) - 1, 0);
        line[got > 0 ? got : 0] = 0;
        const char* newline = strchr(line, '\n');
        int clean = code == 0 ? !line[0] : code == 1 && newline && !newline[1];
        if (!clean) fprintf(stderr, "%s, round %d: code %d: %s\n", fuzz->name, round, code, line), _exit(3);
        refused += code != 0;
    }
    if (refused < fuzz->rounds / 4) fprintf(stderr, "only %d rounds refused\n", refused), _exit(3);
    write_bytes(path, bytes, original_length);
    free(bytes);
}

static void test_fuzz(void** unused) {
    (void)unused;
    Run run = run_make(small_config("SG", 1));
    run.output = fresh("fuzz");
    run_fill_and_save(&run, 1);
    char directory[PATH_MAX];
    path_format(directory, "%s/step_00000001", run.output);
    run.output = directory;
    Fuzz cases[] = {{directory, "model.safetensors", 2048, load_model_only, &run, 1500},
                    {directory, "optimizer-00000-of-00001.safetensors", 320, load_optimizer_only, &run, 1500},
                    {directory, "config.json", SIZE_MAX, call_config, directory, 1500},
                    {directory, "state.json", SIZE_MAX, call_state, directory, 1500},
                    {directory, "heads.json", SIZE_MAX, call_heads, directory, 1500}};
    for (int i = 0; i < 5; i++) expect_success(fuzz_rounds, &cases[i]);
    run_free(&run);
}

int main(void) {
    on_exit(leave_child, NULL);
    omp_set_num_threads(1); // a child of fork() lacks OpenMP's threads and must not wait for them
    const char* temporary = getenv("TMPDIR"); // memory if possible: a disk is five times slower
    if (!temporary) temporary = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    path_format(root, "%s/test_checkpoint.XXXXXX", temporary);
    if (!mkdtemp(root)) fail("%s: cannot make the directory: %s", root, strerror(errno));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_conversions),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_padding),
        cmocka_unit_test(test_keep),
        cmocka_unit_test(test_clean),
        cmocka_unit_test(test_latest_errors),
        cmocka_unit_test(test_tokenizer),
        cmocka_unit_test(test_cut_short),
        cmocka_unit_test(test_bad_headers),
        cmocka_unit_test(test_bad_config),
        cmocka_unit_test(test_other_model),
        cmocka_unit_test(test_other_tensors),
        cmocka_unit_test(test_weights_that_are_not_finite),
        cmocka_unit_test(test_label),
        cmocka_unit_test(test_convolution_of_more_layers),
        cmocka_unit_test(test_changed_settings),
        cmocka_unit_test(test_names_inside_a_run),
        cmocka_unit_test(test_files_of_the_user),
        cmocka_unit_test(test_current_directory_is_gone),
        cmocka_unit_test(test_slices),
        cmocka_unit_test(test_file_limit),
        cmocka_unit_test(test_results_replace_the_old_file),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_unwritable),
        cmocka_unit_test(test_failure_at_each_call),
        cmocka_unit_test(test_kill_at_each_call),
        cmocka_unit_test(test_kill_at_each_call_of_removal),
        cmocka_unit_test(test_kill_at_random),
        cmocka_unit_test(test_fuzz),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed;
}
