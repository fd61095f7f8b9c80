/*
Tests the data loader: the order of the data, windows at the edges of shards, every error, the reader thread.
*/
#include "dataloader.h"
#include "test/capture.h"

// This include is last, because cmocka.h defines a macro `fail`.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

// ----------------------------------------------------------------------------
// Shards to read

static char folder[] = "/tmp/test_dataloader_XXXXXX";

static const char* in_folder(const char* name) {
    static char path[PATH_MAX];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

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

typedef struct {
    int token_bytes;
    int32_t magic, version, tokens, vocab_size, hash; // the fields of the header
    int held;                                         // tokens that the file really contains
    int extra_bytes;
    int first; // token i is (first + i) % modulus
    int modulus;
} ShardRecipe;

static ShardRecipe recipe(int token_bytes, int tokens, int first, int modulus) {
    ShardRecipe r = {token_bytes,
                     token_bytes == 2 ? SHARD_MAGIC_UINT16 : SHARD_MAGIC_UINT32,
                     token_bytes == 2 ? 1 : 7,
                     tokens,
                     0,
                     0,
                     tokens,
                     0,
                     first,
                     modulus};
    return r;
}

static void write_shard(const char* name, ShardRecipe r) {
    FILE* file = open_or_fail(in_folder(name), "wb");
    int32_t header[SHARD_HEADER_INTS] = {r.magic, r.version, r.tokens, r.vocab_size, r.hash};
    write_or_fail(header, sizeof(header), file, name);
    for (int i = 0; i < r.held; i++) {
        uint32_t token = ((uint32_t)r.first + (uint32_t)i) % (uint32_t)r.modulus;
        write_or_fail(&token, (size_t)r.token_bytes, file, name); // little endian: writes the low bytes
    }
    for (int i = 0; i < r.extra_bytes; i++) fputc(7, file);
    close_written_or_fail(file, name);
}

// Three shards of both kinds, written out of order. Token i of shard k is 1000 k + i. With T = 5, 20 tokens
// give 3 windows (19 = 3*5 + 4), 26 give 5 (exactly 25), 4 give none, and 7 give 1. So N = 9.
static void write_usual_shards(void) {
    write_shard("d.bin", recipe(2, 7, 3000, 60000));
    write_shard("b.bin", recipe(4, 26, 1000, 100000));
    write_shard("c.bin", recipe(4, 4, 2000, 100000));
    write_shard("a.bin", recipe(2, 20, 0, 60000));
}

static DataLoader* open_usual(int T, uint64_t seed, int shuffle) {
    return loader_open(in_folder("*.bin"), T, 70000, 0, seed, shuffle);
}

// ----------------------------------------------------------------------------
// Order

static void permutation_is_a_bijection(void** state) {
    (void)state;
    const uint64_t counts[] = {1, 2, 3, 4, 5, 16, 17, 97, 1000, 4096, 4097, 65537};
    for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
        uint64_t n = counts[c];
        for (uint64_t epoch = 0; epoch < 3; epoch++) {
            char* seen = (char*)calloc_or_fail(n, 1, "a test");
            for (uint64_t i = 0; i < n; i++) {
                uint64_t image = random_permutation(1234, epoch, i, n);
                assert_true(image < n);
                assert_int_equal(seen[image], 0);
                seen[image] = 1;
            }
            free(seen);
        }
    }
}

// The order of the windows of one long shard, given by the first token of each.
static void epochs_are_different_permutations(void** state) {
    (void)state;
    enum { N = 97, T = 3 };
    write_shard("a.bin", recipe(2, N * T + 2, 0, 60000));
    DataLoader* loader = open_usual(T, 42, 1);
    assert_int_equal(loader_sequences(loader), N);
    assert_int_equal(loader_tokens(loader), N * T + 2);
    int order[3][N], tokens[T], targets[T];
    for (int e = 0; e < 3; e++) {
        int seen[N] = {0};
        for (int i = 0; i < N; i++) {
            assert_int_equal(loader_read(loader, (uint64_t)(e * N + i), 1, tokens, targets), 1);
            assert_int_equal(tokens[0] % T, 0);
            order[e][i] = tokens[0] / T;
            assert_int_equal(seen[order[e][i]]++, 0);
        }
    }
    int moved = 0, fixed = 0;
    for (int i = 0; i < N; i++) {
        moved += order[0][i] != order[1][i] && order[1][i] != order[2][i] && order[0][i] != order[2][i];
        fixed += order[0][i] == i;
    }
    assert_true(moved > 80); // about 94 are expected
    assert_true(fixed < 10); // about 1 is expected

    // Another seed gives another order. Seeking backwards gives the same order again, and a late epoch works.
    DataLoader* other = open_usual(T, 43, 1);
    int same = 0;
    for (int i = N - 1; i >= 0; i--) {
        loader_read(loader, (uint64_t)i, 1, tokens, targets);
        assert_int_equal(tokens[0] / T, order[0][i]);
        loader_read(other, (uint64_t)i, 1, tokens, targets);
        same += tokens[0] / T == order[0][i];
    }
    assert_true(same < 10);
    assert_int_equal(loader_read(loader, 1000000007u * (uint64_t)N + 5, 1, tokens, targets), 1);
    loader_close(other);
    loader_close(loader);
}

// Runs depend on this order. If a new version changed it, it could not resume the runs of earlier versions.
static void the_order_is_this_one(void** state) {
    (void)state;
    const uint64_t order[2][9] = {{3, 6, 5, 1, 0, 2, 4, 7, 8}, {6, 0, 7, 1, 2, 3, 4, 5, 8}};
    write_usual_shards();
    DataLoader* loader = open_usual(5, 7, 1);
    for (uint64_t s = 0; s < 18; s++) assert_int_equal(loader_window(loader, s), order[s / 9][s % 9]);
    loader_close(loader);
}

static void batch_size_does_not_matter(void** state) {
    (void)state;
    write_usual_shards();
    enum { T = 5, COUNT = 60 };
    int tokens[COUNT * T], targets[COUNT * T], part_tokens[COUNT * T], part_targets[COUNT * T];
    DataLoader* loader = open_usual(T, 7, 1);
    assert_int_equal(loader_read(loader, 0, COUNT, tokens, targets), COUNT); // a little more than 6 epochs
    for (int batch = 1; batch <= COUNT; batch++) {
        for (int s = 0; s < COUNT; s += batch) {
            int count = batch < COUNT - s ? batch : COUNT - s;
            loader_read(loader, (uint64_t)s, count, part_tokens + s * T, part_targets + s * T);
        }
        assert_memory_equal(part_tokens, tokens, sizeof(tokens));
        assert_memory_equal(part_targets, targets, sizeof(targets));
    }
    loader_close(loader);
}

// ----------------------------------------------------------------------------
// Windows

static void windows_end_at_shard_borders(void** state) {
    (void)state;
    write_usual_shards();
    enum { T = 5, N = 9 };
    const int first[N] = {0, 5, 10, 1000, 1005, 1010, 1015, 1020, 3000};
    DataLoader* loader = open_usual(T, 0, 0);
    assert_int_equal(loader_sequences(loader), N);
    assert_int_equal(loader_tokens(loader), 20 + 26 + 4 + 7);
    int tokens[(N + 2) * T], targets[(N + 2) * T];
    for (int i = 0; i < (N + 2) * T; i++) tokens[i] = targets[i] = -9;
    assert_int_equal(loader_read(loader, 0, N + 2, tokens, targets), N); // plain order does not wrap around
    for (int i = 0; i < (N + 2) * T; i++) {
        assert_int_equal(tokens[i], i < N * T ? first[i / T] + i % T : -9);
        assert_int_equal(targets[i], i < N * T ? first[i / T] + i % T + 1 : -9);
    }
    assert_int_equal(loader_read(loader, N, 3, tokens, targets), 0);
    assert_int_equal(loader_read(loader, UINT64_MAX / 2, 3, tokens, targets), 0);
    assert_int_equal(loader_read(loader, N - 1, 3, tokens, targets), 1);
    loader_close(loader);
}

static void the_vocabulary_can_be_asked_before(void** state) {
    (void)state;
    ShardRecipe said = recipe(2, 100, 0, 8192);
    write_shard("b.bin", said);
    assert_int_equal(loader_peek_vocabulary(in_folder("*.bin")), 0);
    said.vocab_size = 8192;
    write_shard("a.bin", said);
    assert_int_equal(loader_peek_vocabulary(in_folder("*.bin")), 8192);
}

static void one_window_is_the_whole_shard(void** state) {
    (void)state;
    for (int kind = 2; kind <= 4; kind += 2) {
        // Longer than a chunk of the reader, and exactly some chunks long.
        const int lengths[] = {2, 4096, 4097, 8192, 8193, 10000};
        for (size_t l = 0; l < sizeof(lengths) / sizeof(lengths[0]); l++) {
            int length = lengths[l], T = length - 1;
            write_shard("a.bin", recipe(kind, length, 11, 60000));
            int* tokens = (int*)malloc_or_fail((size_t)T * sizeof(int), "a test");
            int* targets = (int*)malloc_or_fail((size_t)T * sizeof(int), "a test");
            DataLoader* loader = open_usual(T, 3, 1);
            assert_int_equal(loader_sequences(loader), 1);
            assert_int_equal(loader_read(loader, 17, 1, tokens, targets), 1);
            for (int t = 0; t < T; t++) {
                assert_int_equal(tokens[t], 11 + t);
                assert_int_equal(targets[t], 12 + t);
            }
            loader_close(loader);
            free(tokens);
            free(targets);
        }
    }
}

static void wide_tokens_and_the_last_of_the_vocabulary(void** state) {
    (void)state;
    write_shard("a.bin", recipe(4, 10, 128246, 200000));
    write_shard("b.bin", recipe(2, 10, 65526, 65536));
    int tokens[18], targets[18];
    DataLoader* loader = loader_open(in_folder("*.bin"), 9, 128256, 0, 0, 0);
    assert_int_equal(loader_read(loader, 0, 2, tokens, targets), 2);
    assert_int_equal(targets[8], 128255);
    assert_int_equal(targets[17], 65535);
    loader_close(loader);
}

static int open_files(void) {
    DIR* directory = opendir("/proc/self/fd");
    if (!directory) return 0; // without /proc, all counts are equal
    int count = 0;
    while (readdir(directory)) count++;
    closedir(directory);
    return count;
}

static void many_shards_and_odd_names(void** state) {
    (void)state;
    enum { SHARDS = LOADER_OPEN_FILES + 40 };
    char name[64];
    for (int i = 0; i < SHARDS; i++) {
        snprintf(name, sizeof(name), "s%04d.bin", i);
        write_shard(name, recipe(2, 4, 4 * i, 60000));
    }
    int files_before = open_files();
    DataLoader* loader = open_usual(3, 5, 0);
    int files_open = open_files();
    assert_true(files_open - files_before <= LOADER_OPEN_FILES);
    assert_int_equal(loader_sequences(loader), SHARDS);
    int tokens[3], targets[3];
    for (int i = 0; i < SHARDS; i++) {
        assert_int_equal(loader_read(loader, (uint64_t)i, 1, tokens, targets), 1);
        assert_int_equal(tokens[0], 4 * i);
    }
    assert_int_equal(open_files(), files_open);
    assert_true(loader_bytes(loader, 2) - loader_bytes(loader, 0) == 4 * 2 * 3 * sizeof(int));
    loader_close(loader);
    assert_int_equal(open_files(), files_before);

    write_shard("[x].odd", recipe(2, 4, 1, 60000));
    loader = loader_open(in_folder("[x].odd"), 3, 60000, 0, 0, 0);
    assert_int_equal(loader_sequences(loader), 1);
    loader_close(loader);
}

// ----------------------------------------------------------------------------
// The reader thread

static void open_with_few_files(void* pattern) {
    const struct rlimit few = {32, 32};
    if (setrlimit(RLIMIT_NOFILE, &few) != 0) exit(3);
    DataLoader* loader = loader_open((const char*)pattern, 5, 70000, 0, 1, 1);
    int tokens[5], targets[5];
    for (uint64_t s = 0; s < loader_sequences(loader); s++) loader_read(loader, s, 1, tokens, targets);
    loader_close(loader);
}

// A process that may open only 32 files reads 100 shards.
static void few_open_files(void** state) {
    (void)state;
    for (int i = 0; i < 100; i++) {
        char name[16];
        snprintf(name, sizeof(name), "%03d.bin", i);
        write_shard(name, recipe(2, 20, i, 60000));
    }
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        open_with_few_files((void*)in_folder("*.bin"));
        exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static uint64_t fingerprint_of(const char* pattern) {
    DataLoader* loader = loader_open(in_folder(pattern), 5, 100000, 0, 1, 1);
    const uint64_t fingerprint = loader_fingerprint(loader);
    loader_close(loader);
    return fingerprint;
}

static void move(const char* from, const char* to) {
    char old_path[PATH_MAX];
    path_format(old_path, "%s", in_folder(from));
    assert_int_equal(rename(old_path, in_folder(to)), 0);
}

// The fingerprint depends on the tokens and their order, but not on names and kinds of files.
static void fingerprint_tells_data_apart(void** state) {
    (void)state;
    const int many = 3 * FINGERPRINT_PIECE + 77;
    write_shard("a.bin", recipe(2, many, 0, 60000));
    write_shard("b.bin", recipe(4, 26, 1000, 100000));
    const uint64_t whole = fingerprint_of("*.bin");
    assert_true(whole != 0);
    assert_true(fingerprint_of("*.bin") == whole);
    move("a.bin", "aa.bin"); // keeps the order
    assert_true(fingerprint_of("*.bin") == whole);
    move("aa.bin", "c.bin"); // changes the order
    assert_true(fingerprint_of("*.bin") != whole);
    move("c.bin", "a.bin");
    write_shard("a.bin", recipe(4, many, 0, 60000)); // the same tokens as 32-bit numbers
    assert_true(fingerprint_of("*.bin") == whole);
    assert_true(fingerprint_of("a.bin") != whole);
    write_shard("c.bin", recipe(2, 0, 0, 60000)); // one more shard, without tokens
    assert_true(fingerprint_of("*.bin") != whole);
    unlink(in_folder("c.bin"));
    for (int at = 0; at < many; at += FINGERPRINT_PIECE / 2 + 1) { // changes one token in every piece
        FILE* file = open_or_fail(in_folder("a.bin"), "r+b");
        const uint32_t token = 99999;
        fseek(file, SHARD_HEADER_BYTES + 4L * at, SEEK_SET);
        write_or_fail(&token, 4, file, "a.bin");
        close_written_or_fail(file, "a.bin");
        assert_true(fingerprint_of("*.bin") != whole);
        write_shard("a.bin", recipe(4, many, 0, 60000));
    }
    write_shard("a.bin", recipe(4, many - 1, 0, 60000));
    assert_true(fingerprint_of("*.bin") != whole);
}

static void reader_equals_loader_read(void** state) {
    (void)state;
    write_usual_shards();
    enum { T = 5, ACCUMULATION = 3 };
    int want_tokens[8 * T], want_targets[8 * T];
    const int *tokens, *targets;
    DataLoader* loader = open_usual(T, 99, 1);
    for (int ranks = 1; ranks <= 4; ranks++) {
        for (int batch = 1; batch <= 2; batch++) {
            uint64_t S = (uint64_t)(ACCUMULATION * ranks * batch);
            for (int rank = 0; rank < ranks; rank++) {
                const uint64_t first_step = 2;
                loader_start(loader, first_step * S + (uint64_t)(rank * batch), (uint64_t)(ranks * batch),
                             batch);
                for (uint64_t step = first_step; step < first_step + 20; step++) {
                    for (int i = 0; i < ACCUMULATION; i++) {
                        uint64_t first = step * S + (uint64_t)((i * ranks + rank) * batch);
                        assert_int_equal(loader_next(loader, &tokens, &targets), batch);
                        loader_read(loader, first, batch, want_tokens, want_targets);
                        assert_memory_equal(tokens, want_tokens, (size_t)batch * T * sizeof(int));
                        assert_memory_equal(targets, want_targets, (size_t)batch * T * sizeof(int));
                    }
                }
            }
        }
    }
    loader_close(loader);

    // Data without a shuffle end with a short batch, and then with empty batches.
    loader = open_usual(T, 0, 0);
    loader_start(loader, 0, 4, 4);
    const int rows[] = {4, 4, 1, 0, 0};
    for (int i = 0; i < 5; i++) assert_int_equal(loader_next(loader, &tokens, &targets), rows[i]);
    loader_close(loader);
}

// The buffer in use keeps its contents, however slow the consumer is.
static void buffer_holds_until_the_next_call(void** state) {
    (void)state;
    write_usual_shards();
    enum { T = 5, B = 3 };
    int want_tokens[B * T], want_targets[B * T];
    const int *tokens, *targets;
    DataLoader* loader = open_usual(T, 1, 1);
    loader_start(loader, 0, B, B);
    for (uint64_t i = 0; i < 30; i++) {
        loader_next(loader, &tokens, &targets);
        usleep(2000);
        loader_read(loader, i * B, B, want_tokens, want_targets);
        assert_memory_equal(tokens, want_tokens, sizeof(want_tokens));
        assert_memory_equal(targets, want_targets, sizeof(want_targets));
    }
    loader_close(loader);
    for (int i = 0; i < 200; i++) { // stops at any moment
        loader = open_usual(T, 1, 1);
        loader_start(loader, 0, B, B);
        if (i % 2) loader_next(loader, &tokens, &targets);
        loader_close(loader);
    }
}

static void* read_everything(void* argument) {
    const DataLoader* loader = (const DataLoader*)argument;
    int tokens[5], targets[5];
    intptr_t sum = 0;
    for (uint64_t s = 0; s < 2000; s++) {
        loader_read(loader, s, 1, tokens, targets);
        for (int t = 0; t < 5; t++) sum += tokens[t] * (intptr_t)(s + 1) + targets[t];
    }
    return (void*)sum;
}

static void loader_read_is_thread_safe(void** state) {
    (void)state;
    write_usual_shards();
    DataLoader* loader = open_usual(5, 8, 1);
    const int *tokens, *targets;
    loader_start(loader, 0, 2, 2);
    pthread_t threads[4];
    void *sums[4], *alone = read_everything(loader);
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, read_everything, loader), 0);
    for (int i = 0; i < 500; i++) assert_int_equal(loader_next(loader, &tokens, &targets), 2);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], &sums[i]);
        assert_ptr_equal(sums[i], alone);
    }
    loader_close(loader);
}

// ----------------------------------------------------------------------------
// Errors

typedef struct {
    const char* pattern;
    int T, vocab_size;
    uint32_t hash;
    int read; // 0: only open, 1: loader_read() everything, 2: reader thread, 3: start it but never ask
} Attempt;

static void attempt(void* argument) {
    const Attempt* a = (const Attempt*)argument;
    DataLoader* loader = loader_open(a->pattern, a->T, a->vocab_size, a->hash, 1, 0);
    int* tokens = (int*)malloc_or_fail((size_t)a->T * sizeof(int), "a test");
    int* targets = (int*)malloc_or_fail((size_t)a->T * sizeof(int), "a test");
    const int *next_tokens, *next_targets;
    if (a->read == 1)
        for (uint64_t s = 0; s < loader_sequences(loader); s++) loader_read(loader, s, 1, tokens, targets);
    if (a->read >= 2) loader_start(loader, 0, 1, 1);
    if (a->read == 2)
        while (loader_next(loader, &next_tokens, &next_targets)) {}
    if (a->read == 3) { // waits until the thread has found the error
        pthread_mutex_lock(&loader->lock);
        while (!loader->failed) pthread_cond_wait(&loader->changed, &loader->lock);
        pthread_mutex_unlock(&loader->lock);
    }
    loader_close(loader);
    free(tokens);
    free(targets);
}

// The attempt must exit with code 1 and print only the line "moba.c: FOLDER/..."
// that `format` describes; %s is the folder.
static void expect_error(Attempt a, const char* format) {
    char expected[8192] = "moba.c: ", *place = expected + strlen(expected);
    for (const char* c = format; *c; c++) {
        if (c[0] == '%' && c[1] == 's') {
            place += sprintf(place, "%s", folder);
            c++;
        } else {
            *place++ = *c;
        }
    }
    strcpy(place, "\n");
    struct Captured captured = capture(attempt, &a);
    assert_string_equal(captured.text, expected);
    assert_int_equal(captured.exit_code, 1);
}

static void every_error_is_one_line(void** state) {
    (void)state;
    char pattern[PATH_MAX];
    snprintf(pattern, sizeof(pattern), "%s/*.bin", folder);
    Attempt a = {pattern, 5, 8192, 0, 0};
    expect_error(a, "%s/*.bin: no file matches");
    a.pattern = "";
    expect_error(a, ": no file matches");
    a.pattern = "/nonexistent/x.bin";
    expect_error(a, "/nonexistent/x.bin: no file matches");
    a.pattern = pattern;

    ShardRecipe good = recipe(2, 100, 0, 8192), r;
    write_shard("a.bin", good); // a good shard that is always there; errors must name only b.bin

    assert_int_equal(symlink("nowhere", in_folder("b.bin")), 0);
    expect_error(a, "%s/b.bin: No such file or directory");
    unlink(in_folder("b.bin"));
    assert_int_equal(mkdir(in_folder("b.bin"), 0777), 0);
    expect_error(a, "%s/b.bin: not a regular file");
    rmdir(in_folder("b.bin"));
    assert_int_equal(mkfifo(in_folder("b.bin"), 0666), 0);
    expect_error(a, "%s/b.bin: not a regular file");
    unlink(in_folder("b.bin"));
    if (geteuid() != 0) {
        write_shard("b.bin", good);
        chmod(in_folder("b.bin"), 0);
        expect_error(a, "%s/b.bin: Permission denied");
        unlink(in_folder("b.bin"));
    }

    FILE* file = open_or_fail(in_folder("b.bin"), "wb");
    fclose(file);
    expect_error(a, "%s/b.bin: 0 bytes, too short for the header of 1024 bytes of a token shard");
    write_shard("b.bin", good);
    assert_int_equal(truncate(in_folder("b.bin"), 1023), 0);
    expect_error(a, "%s/b.bin: 1023 bytes, too short for the header of 1024 bytes of a token shard");

    r = good, r.magic = 20240326;
    write_shard("b.bin", r);
    expect_error(a,
                 "%s/b.bin: not a token shard: it begins with 20240326, not with 20240520 (uint16 tokens) or "
                 "20240801 (uint32 tokens)");
    r = good, r.version = 7;
    write_shard("b.bin", r);
    expect_error(a, "%s/b.bin: token shard of version 7, must be 1 for magic 20240520");
    r = recipe(4, 100, 0, 8192), r.version = 1;
    write_shard("b.bin", r);
    expect_error(a, "%s/b.bin: token shard of version 1, must be 7 for magic 20240801");

    r = good, r.held = 40;
    write_shard("b.bin", r);
    expect_error(a, "%s/b.bin: truncated: it holds 40 of 100 tokens");
    r = good, r.held = 99, r.extra_bytes = 1;
    write_shard("b.bin", r);
    expect_error(a, "%s/b.bin: truncated: it holds 99 of 100 tokens");
    r = good, r.extra_bytes = 3;
    write_shard("b.bin", r);
    expect_error(a, "%s/b.bin: 3 bytes longer than the 100 tokens its header says");
    r = good, r.tokens = -5;
    write_shard("b.bin", r);
    expect_error(a, "%s/b.bin: its header says -5 tokens");

    r = good, r.vocab_size = 50257;
    write_shard("b.bin", r);
    expect_error(a, "%s/b.bin: written with a vocabulary of 50257 tokens, the model's has 8192");
    r = good, r.hash = 0x1234abcd;
    write_shard("b.bin", r);
    a.hash = 0xfedc0001u;
    expect_error(a,
                 "%s/b.bin: written with another tokenizer: its hash is 1234abcd, the given tokenizer's is "
                 "fedc0001");
    a.hash = 0;
    r = good, r.hash = 0x0bad0bad;
    write_shard("c.bin", r);
    expect_error(a, "%s/c.bin: written with another tokenizer than %s/b.bin: their hashes are 0bad0bad and "
                    "1234abcd");
    unlink(in_folder("c.bin"));

    // A shard may give its vocabulary, its tokenizer or both, if they are right.
    r = good, r.hash = 0x1234abcd, r.vocab_size = 8192;
    write_shard("b.bin", r);
    a.read = 1;
    a.hash = 0x1234abcd;
    assert_int_equal(capture(attempt, &a).exit_code, 0);
    a.hash = 0;
    assert_int_equal(capture(attempt, &a).exit_code, 0);

    a.read = 0;
    a.T = 100;
    expect_error(
        a, "%s/*.bin: no shard holds the 100 + 1 tokens of one sequence and its last target; the longest, "
           "%s/a.bin, holds 100");
    r = recipe(4, 0, 0, 8192);
    write_shard("b.bin", r); // an empty shard beside others is no error
    a.T = 99;
    assert_int_equal(capture(attempt, &a).exit_code, 0);
}

static void tokens_outside_the_vocabulary(void** state) {
    (void)state;
    char pattern[PATH_MAX];
    snprintf(pattern, sizeof(pattern), "%s/*.bin", folder);
    write_shard("a.bin", recipe(2, 1000, 0, 8192));
    write_shard("b.bin", recipe(2, 1241, 49066, 65536)); // token 1234 has the value 50300
    Attempt a = {pattern, 10, 50300, 0, 1};
    expect_error(a, "%s/b.bin: token 50300 at offset 1234 is outside the vocabulary of 50300");
    a.read = 2; // the reader thread prints the same line once
    for (int i = 0; i < 20; i++)
        expect_error(a, "%s/b.bin: token 50300 at offset 1234 is outside the vocabulary of 50300");
    write_shard("a.bin", recipe(4, 1000, 50300, 60000));
    a.read = 2;
    expect_error(a, "%s/a.bin: token 50300 at offset 0 is outside the vocabulary of 50300");
    a.read = 3; // the thread found the error, but nobody asked for the batch
    assert_int_equal(capture(attempt, &a).exit_code, 0);

    // The loader checks targets like all tokens. It does not check tokens after the last window.
    write_shard("a.bin", recipe(2, 21, 0, 60000));
    unlink(in_folder("b.bin"));
    Attempt last = {pattern, 10, 20, 0, 1};
    expect_error(last, "%s/a.bin: token 20 at offset 20 is outside the vocabulary of 20");
    write_shard("a.bin", recipe(2, 22, 0, 60000));
    last.vocab_size = 21;
    assert_int_equal(capture(attempt, &last).exit_code, 0);
    write_shard("a.bin", recipe(4, 12, 0x7ffffffa, 0x7fffffff)); // larger than any int vocabulary
    expect_error(last, "%s/a.bin: token 2147483642 at offset 0 is outside the vocabulary of 21");
}

static void shrink_and_read(void* argument) {
    DataLoader* loader = open_usual(5, 1, 0);
    int tokens[5], targets[5];
    if (truncate(in_folder("a.bin"), 1024 + 40) != 0) exit(9);
    loader_read(loader, 3, 1, tokens, targets); // tokens 15..20, of which the last byte is missing
    (void)argument;
}

static void a_shard_that_shrinks(void** state) {
    (void)state;
    write_shard("a.bin", recipe(2, 21, 0, 60000));
    struct Captured captured = capture(shrink_and_read, NULL);
    char expected[PATH_MAX + 128];
    snprintf(expected, sizeof(expected),
             "moba.c: %s/a.bin: cannot read 12 bytes at byte 1054: the file has become shorter\n", folder);
    assert_string_equal(captured.text, expected);
    assert_int_equal(captured.exit_code, 1);
}

// If a header bit that the loader reads is flipped, the loader must print one clear
// line. Other bits have no effect.
static void flipped_header_bits(void** state) {
    (void)state;
    ShardRecipe good = recipe(2, 100, 0, 8192);
    good.vocab_size = 8193; // two bits are set: one flip does not give 0, which means "not known"
    good.hash = 0x5a5a5a5a;
    Attempt a = {in_folder("a.bin"), 5, 8193, 0x5a5a5a5a, 1};
    write_shard("a.bin", good);
    unsigned char header[SHARD_HEADER_BYTES];
    FILE* file = open_or_fail(in_folder("a.bin"), "r+b");
    assert_int_equal(fread(header, 1, sizeof(header), file), sizeof(header));
    for (int bit = 0; bit < 5 * 32 + 24; bit++) {
        int place = bit < 5 * 32 ? bit / 8 : 20 + 41 * (bit - 5 * 32); // after the fields, a few single bytes
        unsigned char flipped = (unsigned char)(header[place] ^ 1 << bit % 8);
        fseek(file, place, SEEK_SET);
        fputc(flipped, file);
        fflush(file);
        struct Captured captured = capture(attempt, &a);
        size_t length = strlen(captured.text);
        assert_int_equal(captured.exit_code, bit < 5 * 32 ? 1 : 0);
        if (bit < 5 * 32) {
            assert_ptr_equal(strchr(captured.text, '\n'), captured.text + length - 1);
            assert_non_null(strstr(captured.text, "a.bin: "));
        } else {
            assert_int_equal(length, 0);
        }
        fseek(file, place, SEEK_SET);
        fputc(header[place], file);
        fflush(file);
    }
    fclose(file);
}

#define in_own_folder(test) cmocka_unit_test_setup_teardown(test, setup_folder, remove_folder)

int main(void) {
    const struct CMUnitTest tests[] = {
        in_own_folder(few_open_files),
        in_own_folder(fingerprint_tells_data_apart),
        cmocka_unit_test(permutation_is_a_bijection),
        in_own_folder(epochs_are_different_permutations),
        in_own_folder(the_order_is_this_one),
        in_own_folder(batch_size_does_not_matter),
        in_own_folder(windows_end_at_shard_borders),
        in_own_folder(the_vocabulary_can_be_asked_before),
        in_own_folder(one_window_is_the_whole_shard),
        in_own_folder(wide_tokens_and_the_last_of_the_vocabulary),
        in_own_folder(many_shards_and_odd_names),
        in_own_folder(reader_equals_loader_read),
        in_own_folder(buffer_holds_until_the_next_call),
        in_own_folder(loader_read_is_thread_safe),
        in_own_folder(every_error_is_one_line),
        in_own_folder(tokens_outside_the_vocabulary),
        in_own_folder(a_shard_that_shrinks),
        in_own_folder(flipped_header_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
