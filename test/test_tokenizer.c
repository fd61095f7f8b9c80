/*
Tests tokenizer/: the library in this process, and the command build/tokenizer (or $TOKENIZER). Run it from
the top of the tree. test/compare_tokenizer.py --record recorded the fixtures in test/fixtures/tokenizer.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // memmem
#endif
#include "runtime/checks.h"      // read_file_or_fail, path_format
#include "tokenizer/tokenizer.h" // the library under test

#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#include <setjmp.h>
#include <cmocka.h> // after all other headers: it makes fail a macro

#define FIXTURES "test/fixtures/tokenizer/"
static const char END_OF_TEXT[] = "<|endoftext|>";
static const char cl100k[] = FIXTURES "cl100k.json";
static char directory[PATH_MAX]; // the directory of this run, removed at the end

// ----------------------------------------------------------------------------
// Help

static uint64_t random_state = 1;

static uint32_t random_below(uint32_t limit) { // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 0x2545f4914f6cdd1du) >> 32) % limit;
}

// Returns a path in this run's directory. It stays valid for the next three calls.
static const char* scratch_file(const char* name) {
    static char paths[4][PATH_MAX];
    static int next;
    char* path = paths[next++ % 4];
    path_format(path, "%s/%s", directory, name);
    return path;
}

static void write_file(const char* path, const void* data, size_t bytes) {
    FILE* file = open_or_fail(path, "wb");
    write_or_fail(data, bytes, file, path);
    assert_int_equal(fclose(file), 0);
}

static void write_text(const char* path, const char* text) { write_file(path, text, strlen(text)); }

typedef struct {
    int exit_code; // -1: a signal ended it
    char errors[4096];
} Outcome;

static void pause_shortly(void) {
    const struct timespec pause = {0, 10000000};
    nanosleep(&pause, NULL);
}

// Kills a child that runs for too long, and fails the test.
static Outcome finish_child(pid_t child, const char* errors_path) {
    Outcome outcome;
    int status;
    size_t length;
    pid_t ended = 0;
    for (int i = 0; i < 30000 && (ended = waitpid(child, &status, WNOHANG)) == 0; i++) pause_shortly();
    if (ended == 0) {
        kill(child, SIGKILL);
        ended = waitpid(child, &status, 0);
    }
    assert_int_equal(ended, child);
    outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    char* errors = read_file_or_fail(errors_path, &length);
    snprintf(outcome.errors, sizeof(outcome.errors), "%s", errors);
    free(errors);
    return outcome;
}

static pid_t fork_with_errors(const char* errors_path) {
    pid_t child = fork();
    if (child != 0) return child;
    int errors = open(errors_path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    int nothing = open("/dev/null", O_RDWR);
    if (errors < 0 || dup2(errors, STDERR_FILENO) < 0 || dup2(nothing, STDOUT_FILENO) < 0 ||
        dup2(nothing, STDIN_FILENO) < 0)
        _exit(99);
    for (int number = STDERR_FILENO + 1; number < 256; number++) close(number); // some tests count open files
    return 0;
}

static const char* tokenizer_program(void) {
    const char* program = getenv("TOKENIZER");
    return program ? program : "build/tokenizer";
}

// Runs the command with arguments that are separated by spaces. %s is the directory of this run.
static Outcome run_command(const char* format, ...) {
    char line[4 * PATH_MAX], *arguments[32] = {NULL};
    int count = 0;
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof(line), format, values);
    va_end(values);
    arguments[count++] = (char*)tokenizer_program();
    for (char* word = strtok(line, " "); word && count < 31; word = strtok(NULL, " "))
        arguments[count++] = word;
    char errors[PATH_MAX];
    path_format(errors, "%s", scratch_file("errors"));
    pid_t child = fork_with_errors(errors);
    if (child == 0) {
        execv(arguments[0], arguments);
        _exit(98);
    }
    return finish_child(child, errors);
}

// Runs a line of sh. $T is the command, $D the directory of this run, and $J a tokenizer.json.
static Outcome run_shell(const char* line) {
    char errors[PATH_MAX];
    path_format(errors, "%s", scratch_file("errors"));
    pid_t child = fork_with_errors(errors);
    if (child == 0) {
        setenv("T", tokenizer_program(), 1);
        setenv("D", directory, 1);
        setenv("J", FIXTURES "cl100k.json", 1);
        execl("/bin/sh", "sh", "-c", line, (char*)NULL);
        _exit(98);
    }
    return finish_child(child, errors);
}

// Loads a file in a child, because a malformed file ends the process. A tokenizer that loads must also work.
static Outcome load_in_child(const char* path) {
    char errors[PATH_MAX];
    path_format(errors, "%s", scratch_file("errors"));
    pid_t child = fork_with_errors(errors);
    if (child != 0) return finish_child(child, errors);
    Tokenizer* t = tokenizer_load(path);
    const char text[] = "Hello, <|endoftext|>\xff w\xc3\xb6rld 123456\r\n  !";
    TokenBuffer tokens = {NULL, 0, 0};
    ByteBuffer decoded = {NULL, 0, 0};
    tokenizer_encode(t, text, sizeof(text), 1, &tokens);
    tokenizer_decode(t, tokens.ids, tokens.count, &decoded);
    _exit(decoded.count == sizeof(text) && !memcmp(decoded.data, text, sizeof(text)) ? 0 : 97);
}

static int lines_of(const char* text) {
    int lines = 0;
    for (; *text; text++) lines += *text == '\n';
    return lines;
}

static void assert_refused(Outcome outcome, int exit_code, const char* message) {
    if (outcome.exit_code == exit_code && lines_of(outcome.errors) == 1 && strstr(outcome.errors, message))
        return;
    fail_msg("wanted exit code %d and one line with \"%s\", got %d and: %s", exit_code, message,
             outcome.exit_code, outcome.errors);
}

static void assert_success(Outcome outcome) {
    if (outcome.exit_code != 0) fail_msg("exit code %d: %s", outcome.exit_code, outcome.errors);
}

static Tokenizer* train_on(const char* text, size_t bytes, const char* pattern, int32_t vocab_size) {
    static const char* const specials[] = {END_OF_TEXT};
    WordCounts counts;
    WordSplitter splitter;
    word_counts_init(&counts);
    word_splitter_init(&splitter, split_pattern_by_name(pattern));
    word_counts_add_text(&counts, &splitter, text, bytes);
    TokenizerTraining training = {vocab_size, 1, specials, 1, NULL};
    Tokenizer* t = tokenizer_train(&counts, split_pattern_by_name(pattern), &training);
    word_counts_free(&counts);
    word_splitter_free(&splitter);
    return t;
}

static void assert_round_trip(Tokenizer* t, const char* text, size_t bytes) {
    for (int allow_special = 0; allow_special < 2; allow_special++) {
        TokenBuffer tokens = {NULL, 0, 0};
        ByteBuffer decoded = {NULL, 0, 0};
        size_t count = tokenizer_encode(t, text, bytes, allow_special, &tokens);
        tokenizer_decode(t, tokens.ids, tokens.count, &decoded);
        assert_int_equal(count, tokens.count);
        assert_int_equal(decoded.count, bytes);
        if (bytes) assert_memory_equal(decoded.data, text, bytes);
        token_buffer_free(&tokens);
        byte_buffer_free(&decoded);
    }
}

static void assert_same_encoding(Tokenizer* a, Tokenizer* b, const char* text, size_t bytes) {
    TokenBuffer x = {NULL, 0, 0}, y = {NULL, 0, 0};
    tokenizer_encode(a, text, bytes, 1, &x);
    tokenizer_encode(b, text, bytes, 1, &y);
    assert_int_equal(x.count, y.count);
    if (x.count) assert_memory_equal(x.ids, y.ids, x.count * sizeof(int32_t));
    token_buffer_free(&x);
    token_buffer_free(&y);
}

// Makes random bytes: many are ASCII, and many are complete or broken pieces of UTF-8.
static size_t random_text(char* text, size_t most) {
    static const char* const pieces[] = {"'s",
                                         "é",
                                         "漢字",
                                         "👍🏽",
                                         "\xff",
                                         "\xc3",
                                         "\xe6\xbc",
                                         "\xed\xa0\x80",
                                         "\r\n",
                                         "  ",
                                         "123",
                                         "\xcc\x81",
                                         "\xf4\x90\x80\x80",
                                         "<|endoftext|>",
                                         "\xc0\x80",
                                         "\t",
                                         "ſ",
                                         "\xc2\x85",
                                         "𞀰",
                                         "\xf0\x9f"};
    size_t wanted = random_below((uint32_t)most), used = 0;
    uint32_t kind = random_below(3);
    while (used < wanted) {
        const char* piece = pieces[random_below(sizeof(pieces) / sizeof(pieces[0]))];
        size_t length = strlen(piece);
        if (kind == 0 || used + length > wanted) text[used++] = (char)random_below(256);
        else if (kind == 1 && random_below(2)) text[used++] = (char)('a' + random_below(4));
        else {
            for (size_t i = 0; i < length; i++) text[used++] = piece[i];
        }
    }
    return used;
}

static char* fixture_texts(size_t* bytes) {
    return read_file_or_fail(FIXTURES "cl100k.encodings.jsonl", bytes);
}

// ----------------------------------------------------------------------------
// Splitting and round trips

static void words_are_the_text(void** state) {
    (void)state;
    char text[400];
    for (int pattern = 0; pattern < SPLIT_PATTERN_COUNT; pattern++) {
        WordSplitter splitter;
        word_splitter_init(&splitter, split_pattern(pattern));
        for (int round = 0; round < 3000; round++) {
            size_t bytes = random_text(text, sizeof(text)), length;
            const char *word, *expected = text;
            word_splitter_begin(&splitter, text, bytes);
            while (word_splitter_next(&splitter, &word, &length)) {
                assert_ptr_equal(word, expected);
                assert_true(length > 0);
                // A word is either UTF-8 or stray bytes
                size_t valid = utf8_valid_prefix(word, length);
                assert_true(valid == length || valid == 0);
                expected = word + length;
            }
            assert_ptr_equal(expected, text + bytes);
        }
        word_splitter_free(&splitter);
    }
}

static void utf8_is_told_from_other_bytes(void** state) {
    (void)state;
    static const struct {
        const char* text;
        int length;
    } cases[] = {{"a", 1},
                 {"\x7f", 1},
                 {"\xc2\x80", 2},
                 {"\xdf\xbf", 2},
                 {"\xe0\xa0\x80", 3},
                 {"\xed\x9f\xbf", 3},
                 {"\xee\x80\x80", 3},
                 {"\xef\xbf\xbf", 3},
                 {"\xf0\x90\x80\x80", 4},
                 {"\xf4\x8f\xbf\xbf", 4},
                 {"\x80", 0},
                 {"\xbf", 0},
                 {"\xc0\x80", 0},
                 {"\xc1\xbf", 0},
                 {"\xc2", 0},
                 {"\xc2\x41", 0},
                 {"\xe0\x9f\xbf", 0},
                 {"\xed\xa0\x80", 0},
                 {"\xed\xbf\xbf", 0},
                 {"\xe2\x82", 0},
                 {"\xe2\x82\x41", 0},
                 {"\xf0\x8f\xbf\xbf", 0},
                 {"\xf4\x90\x80\x80", 0},
                 {"\xf5\x80\x80\x80", 0},
                 {"\xf0\x9f\x98", 0},
                 {"\xff", 0},
                 {"\xfe", 0}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        assert_int_equal(utf8_sequence_length(cases[i].text, strlen(cases[i].text)), cases[i].length);
    assert_int_equal(utf8_sequence_length("", 0), 0);
    assert_int_equal(utf8_valid_prefix("abcdefgh\xc3\xa9ijklmnop\xff", 19), 18);
}

static size_t write_utf8(char* text, uint32_t c) {
    unsigned char bytes[4] = {(unsigned char)(0xf0 | c >> 18), (unsigned char)(0x80 | (c >> 12 & 63)),
                              (unsigned char)(0x80 | (c >> 6 & 63)), (unsigned char)(0x80 | (c & 63))};
    size_t length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    if (length == 1) bytes[3] = (unsigned char)c;
    if (length == 2) bytes[2] = (unsigned char)(0xc0 | c >> 6);
    if (length == 3) bytes[1] = (unsigned char)(0xe0 | c >> 12);
    memcpy(text, bytes + 4 - length, length);
    return length;
}

// Returns whether the pattern keeps the code point in one word with `before`, a member of a class.
static int splitter_joins(WordSplitter* splitter, char before, uint32_t c) {
    char text[5] = {before};
    const char* word;
    size_t length, bytes = 1 + write_utf8(text + 1, c);
    word_splitter_begin(splitter, text, bytes);
    return word_splitter_next(splitter, &word, &length) && length == bytes;
}

// Compares the classes of all code points with those recorded from Hugging Face. PCRE2's own
// classes have another version of Unicode.
static void classes_of_hugging_face(void** state) {
    (void)state;
    static const char* const names[] = {"letter", "number", "space"};
    static const char before[] = {'a', '1', '\t'};
    static unsigned char member[3][0x110000];
    FILE* file = open_or_fail(FIXTURES "classes.txt", "rb");
    char name[16];
    unsigned first, last;
    while (fscanf(file, "%15s %x %x", name, &first, &last) == 3)
        for (int class_index = 0; class_index < 3; class_index++)
            for (unsigned c = first; c <= last && !strcmp(name, names[class_index]); c++)
                member[class_index][c] = 1;
    assert_true(feof(file));
    fclose(file);
    WordSplitter splitter;
    word_splitter_init(&splitter, split_pattern_by_name("gpt2"));
    int letters = 0;
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xd800 && c < 0xe000) continue;
        letters += member[0][c];
        for (int class_index = 0; class_index < 3; class_index++)
            if (splitter_joins(&splitter, before[class_index], c) != member[class_index][c])
                fail_msg("U+%04X: %s in one of the two only", c, names[class_index]);
    }
    assert_true(letters > 100000);
    word_splitter_free(&splitter);
}

static void any_bytes_round_trip(void** state) {
    (void)state;
    char text[400];
    const char* const patterns[] = {"cl100k", "gpt2"};
    size_t bytes;
    char* corpus = fixture_texts(&bytes);
    for (int p = 0; p < 2; p++) {
        Tokenizer* t = train_on(corpus, bytes, patterns[p], 1000);
        assert_round_trip(t, "", 0);
        assert_round_trip(t, corpus, bytes);
        for (int b = 0; b < 256; b++) {
            text[0] = (char)b;
            assert_round_trip(t, text, 1);
        }
        for (int round = 0; round < 3000; round++)
            assert_round_trip(t, text, random_text(text, sizeof(text)));
        tokenizer_free(t);
    }
    free(corpus);
}

static void special_tokens_are_text_unless_allowed(void** state) {
    (void)state;
    Tokenizer* t = train_on("hello hello hello", 17, "cl100k", 262);
    int32_t end = tokenizer_special_id(t, END_OF_TEXT);
    const char text[] = "hello<|endoftext|><|endoftext|> hello<|endoftext";
    TokenBuffer tokens = {NULL, 0, 0};
    assert_int_equal(tokenizer_special_id(t, "<|none|>"), -1);
    assert_int_equal(end, tokenizer_vocab_size(t) - 1);
    tokenizer_encode(t, text, strlen(text), 0, &tokens);
    for (size_t i = 0; i < tokens.count; i++) assert_int_not_equal(tokens.ids[i], end);
    tokens.count = 0;
    tokenizer_encode(t, text, strlen(text), 1, &tokens);
    int found = 0;
    for (size_t i = 0; i < tokens.count; i++) found += tokens.ids[i] == end;
    assert_int_equal(found, 2);
    size_t length = 0;
    assert_memory_equal(tokenizer_token_bytes(t, end, &length), END_OF_TEXT, strlen(END_OF_TEXT));
    assert_int_equal(length, strlen(END_OF_TEXT));
    assert_null(tokenizer_token_bytes(t, -1, &length));
    assert_null(tokenizer_token_bytes(t, tokenizer_vocab_size(t), &length));
    token_buffer_free(&tokens);
    tokenizer_free(t);
}

// ----------------------------------------------------------------------------
// Encoding against the definition

// The definition, in O(n^2). Among all neighbours that can merge, the merge of lowest rank
// comes first, and the leftmost one at a tie.
static size_t naive_encode_word(const Tokenizer* t, const char* word, size_t length, int32_t* ids) {
    assert(length > 0);
    for (size_t i = 0; i < length; i++) ids[i] = t->byte_ids[(unsigned char)word[i]];
    for (;;) {
        const Merge* best = NULL;
        size_t place = 0;
        for (size_t i = 0; i + 1 < length; i++)
            for (size_t m = 0; m < t->merge_count; m++) {
                const Merge* merge = &t->merges[m];
                if (merge->left != ids[i] || merge->right != ids[i + 1]) continue;
                if (best && best->rank <= merge->rank) continue;
                best = merge;
                place = i;
            }
        if (!best) return length;
        ids[place] = best->result;
        memmove(ids + place + 1, ids + place + 2, (length - place - 2) * sizeof(int32_t));
        length--;
    }
}

static void assert_naive_encoding(Tokenizer* t, const char* text, size_t bytes) {
    WordSplitter splitter;
    TokenBuffer expected = {NULL, 0, 0}, tokens = {NULL, 0, 0};
    int32_t* ids = (int32_t*)malloc_or_fail((bytes + 1) * sizeof(int32_t), "a word");
    const char* word;
    size_t length;
    word_splitter_init(&splitter, t->pattern);
    word_splitter_begin(&splitter, text, bytes);
    while (word_splitter_next(&splitter, &word, &length)) {
        int32_t whole = t->ignore_merges ? vocabulary_find(t, word, length) : -1;
        if (whole >= 0) token_buffer_append(&expected, &whole, 1);
        else token_buffer_append(&expected, ids, naive_encode_word(t, word, length, ids));
    }
    for (int again = 0; again < 2; again++) { // the second round reads the cache
        tokens.count = 0;
        tokenizer_encode(t, text, bytes, 0, &tokens);
        assert_int_equal(tokens.count, expected.count);
        if (tokens.count) assert_memory_equal(tokens.ids, expected.ids, tokens.count * sizeof(int32_t));
    }
    free(ids);
    token_buffer_free(&expected);
    token_buffer_free(&tokens);
    word_splitter_free(&splitter);
}

static void encoding_follows_the_definition(void** state) {
    (void)state;
    char text[3000];
    for (int round = 0; round < 60; round++) {
        // Few different letters give many overlapping merges
        uint32_t letters = 1 + random_below(5);
        for (size_t i = 0; i < sizeof(text); i++)
            text[i] = random_below(12) ? (char)('a' + random_below(letters)) : ' ';
        Tokenizer* t = train_on(text, sizeof(text), round % 2 ? "gpt2" : "cl100k", 300);
        for (size_t i = 0; i < sizeof(text); i++)
            text[i] = random_below(round % 3 ? 30 : 8) ? (char)('a' + random_below(letters)) : ' ';
        assert_naive_encoding(t, text, 600);
        memset(text, 'a', 301);
        assert_naive_encoding(t, text, 301);
        tokenizer_free(t);
    }
    size_t bytes;
    char* corpus = fixture_texts(&bytes);
    Tokenizer* t = train_on(corpus, bytes, "cl100k", 500);
    for (int round = 0; round < 30; round++) assert_naive_encoding(t, text, random_text(text, 400));
    tokenizer_free(t);
    free(corpus);
}

static double processor_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// One word of a million bytes. The naive algorithm would take 10^12 steps.
static void very_long_words_are_fast(void** state) {
    (void)state;
    static const char* const units[] = {"a", "ab", " ", "\n", "\xff", "\xcc\x81", "漢", "!", "x\xff"};
    size_t bytes = 1 << 20;
    char* text = (char*)malloc_or_fail(bytes, "a long word");
    for (size_t u = 0; u < sizeof(units) / sizeof(units[0]); u++) {
        size_t length = strlen(units[u]);
        for (size_t i = 0; i < bytes; i++) text[i] = units[u][i % length];
        Tokenizer* t = train_on(text, 5000, "cl100k", 280);
        double started = processor_seconds();
        assert_round_trip(t, text, bytes);
        if (processor_seconds() - started > 30)
            fail_msg("%s: a word of 1 MB took %.0f s", units[u], processor_seconds() - started);
        tokenizer_free(t);
    }
    free(text);
}

// ----------------------------------------------------------------------------
// Training

// The rule, with new counts for every merge: the most frequent pair, then the
// smaller left id, then the smaller right id.
static void naive_training_step(const int32_t* ids, const size_t* lengths, size_t words, int32_t limit,
                                int64_t* pair_counts, int32_t* left, int32_t* right) {
    memset(pair_counts, 0, (size_t)limit * (size_t)limit * sizeof(int64_t));
    for (size_t w = 0; w < words; ids += lengths[w], w++)
        for (size_t i = 0; i + 1 < lengths[w]; i++) pair_counts[ids[i] * limit + ids[i + 1]]++;
    int64_t best = 0;
    for (int32_t a = 0; a < limit; a++)
        for (int32_t b = 0; b < limit; b++)
            if (pair_counts[a * limit + b] > best) {
                best = pair_counts[a * limit + b];
                *left = a;
                *right = b;
            }
    assert_true(best > 0);
}

static size_t naive_merge(int32_t* ids, size_t length, int32_t left, int32_t right, int32_t result) {
    size_t kept = 0;
    for (size_t i = 0; i < length; i++) {
        int found = i + 1 < length && ids[i] == left && ids[i + 1] == right;
        ids[kept++] = found ? result : ids[i];
        i += (size_t)found;
    }
    return kept;
}

static void training_follows_the_rule(void** state) {
    (void)state;
    enum { TEXT = 1500, MERGES = 40, LIMIT = 256 + MERGES };
    static char text[TEXT];
    static int32_t ids[TEXT];
    static size_t lengths[TEXT];
    int64_t* counts = (int64_t*)malloc_or_fail(LIMIT * LIMIT * sizeof(int64_t), "pairs");
    for (int round = 0; round < 6; round++) {
        for (size_t i = 0; i < TEXT; i++)
            text[i] = random_below(6) ? (char)('a' + random_below(3 + round)) : ' ';
        Tokenizer* t = train_on(text, TEXT, "cl100k", LIMIT + 1);
        WordSplitter splitter;
        size_t words = 0, used = 0, length;
        const char* word;
        word_splitter_init(&splitter, t->pattern);
        word_splitter_begin(&splitter, text, TEXT);
        while (word_splitter_next(&splitter, &word, &length)) {
            for (size_t i = 0; i < length; i++) ids[used++] = t->byte_ids[(unsigned char)word[i]];
            lengths[words++] = length;
        }
        word_splitter_free(&splitter);
        assert_int_equal(t->merge_count, MERGES);
        for (int m = 0; m < MERGES; m++) {
            int32_t left = -1, right = -1;
            naive_training_step(ids, lengths, words, LIMIT, counts, &left, &right);
            assert_int_equal(t->merges[m].left, left);
            assert_int_equal(t->merges[m].right, right);
            size_t from = 0, to = 0;
            for (size_t w = 0; w < words; w++) {
                size_t before = lengths[w];
                memmove(ids + to, ids + from, before * sizeof(int32_t));
                lengths[w] = naive_merge(ids + to, before, left, right, 256 + m);
                from += before;
                to += lengths[w];
            }
        }
        tokenizer_free(t);
    }
    free(counts);
}

static void training_does_not_depend_on_threads(void** state) {
    (void)state;
    char threads[16], *first = NULL;
    size_t first_length = 0, length;
    for (int n = 1; n <= 4; n++) {
        snprintf(threads, sizeof(threads), "%d", n);
        assert_success(run_command("train -q --threads %s --vocab-size 900 -o %s runtime tokenizer test",
                                   threads, scratch_file("threads.json")));
        char* json = read_file_or_fail(scratch_file("threads.json"), &length);
        if (first) {
            assert_int_equal(length, first_length);
            assert_memory_equal(json, first, length);
            free(json);
        } else {
            first = json;
            first_length = length;
        }
    }
    free(first);
}

static void training_does_not_make_special_tokens(void** state) {
    (void)state;
    static const char* const specials[] = {"hello"};
    WordCounts counts;
    word_counts_init(&counts);
    word_counts_add(&counts, "hello", 5, 100);
    word_counts_add(&counts, "helloyou", 8, 100);
    TokenizerTraining training = {300, 1, specials, 1, NULL};
    Tokenizer* t = tokenizer_train(&counts, split_pattern_by_name("cl100k"), &training);
    TokenBuffer tokens = {NULL, 0, 0};
    tokenizer_encode(t, "hello", 5, 0, &tokens);
    assert_true(tokens.count > 1);
    tokens.count = 0;
    tokenizer_encode(t, "hello", 5, 1, &tokens);
    assert_int_equal(tokens.count, 1);
    assert_int_equal(tokens.ids[0], tokenizer_special_id(t, "hello"));
    token_buffer_free(&tokens);
    word_counts_free(&counts);
    tokenizer_free(t);
}

// ----------------------------------------------------------------------------
// Formats

static void assert_recorded_ids(Tokenizer* t, const cJSON* line, const char* key, int allow_special) {
    const cJSON* text = cJSON_GetObjectItemCaseSensitive(line, "text");
    const cJSON* ids = cJSON_GetObjectItemCaseSensitive(line, key);
    TokenBuffer tokens = {NULL, 0, 0};
    tokenizer_encode(t, text->valuestring, strlen(text->valuestring), allow_special, &tokens);
    assert_int_equal(tokens.count, cJSON_GetArraySize(ids));
    size_t i = 0;
    for (const cJSON* id = ids->child; id; id = id->next) assert_int_equal(tokens.ids[i++], id->valueint);
    token_buffer_free(&tokens);
}

static void recorded_encodings_of_hugging_face(void** state) {
    (void)state;
    static const char* const names[] = {"cl100k", "gpt2"};
    for (int n = 0; n < 2; n++) {
        char path[PATH_MAX], *line = NULL;
        size_t capacity = 0;
        int lines = 0;
        path_format(path, FIXTURES "%s.json", names[n]);
        Tokenizer* t = tokenizer_load(path);
        assert_string_equal(t->pattern->name, names[n]);
        path_format(path, FIXTURES "%s.encodings.jsonl", names[n]);
        FILE* file = open_or_fail(path, "rb");
        for (; getline(&line, &capacity, file) >= 0; lines++) {
            cJSON* recorded = cJSON_Parse(line);
            assert_non_null(recorded);
            assert_recorded_ids(t, recorded, "ids", 0);
            assert_recorded_ids(t, recorded, "ids_special", 1);
            cJSON_Delete(recorded);
        }
        assert_true(lines > 80);
        fclose(file);
        free(line);
        tokenizer_free(t);
    }
}

static void append_base64(ByteBuffer* out, const char* bytes, size_t length) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < length; i += 3) {
        uint32_t bits = 0;
        size_t here = length - i < 3 ? length - i : 3;
        for (size_t k = 0; k < 3; k++) bits = bits << 8 | (k < here ? (unsigned char)bytes[i + k] : 0);
        char four[4];
        for (size_t k = 0; k < 4; k++) four[k] = k <= here ? digits[bits >> (18 - 6 * k) & 63] : '=';
        byte_buffer_append(out, four, 4);
    }
}

static const char* write_tiktoken(const Tokenizer* t, const char* name) {
    ByteBuffer out = {NULL, 0, 0};
    char number[32];
    for (int32_t id = 0; id < t->size; id++) {
        if (t->tokens[id].kind & TOKEN_ADDED) continue;
        append_base64(&out, vocabulary_bytes(t, id), t->tokens[id].length);
        byte_buffer_append(&out, number, (size_t)snprintf(number, sizeof(number), " %d\n", id));
    }
    const char* path = scratch_file(name);
    write_file(path, out.data, out.count);
    byte_buffer_free(&out);
    return path;
}

// Writes vocab.json and merges.txt from a tokenizer.json.
static void write_gpt2_files(const char* json_path) {
    char* text = read_file_or_fail(json_path, NULL);
    cJSON* root = cJSON_Parse(text);
    cJSON* model = cJSON_GetObjectItemCaseSensitive(root, "model");
    char* vocabulary = cJSON_PrintUnformatted(cJSON_GetObjectItemCaseSensitive(model, "vocab"));
    write_text(scratch_file("vocab.json"), vocabulary);
    FILE* merges = open_or_fail(scratch_file("merges.txt"), "wb");
    fprintf(merges, "#version: 0.2\n");
    for (cJSON* m = cJSON_GetObjectItemCaseSensitive(model, "merges")->child; m; m = m->next)
        fprintf(merges, "%s\n", m->valuestring);
    assert_int_equal(fclose(merges), 0);
    free(vocabulary);
    free(text);
    cJSON_Delete(root);
}

static void three_formats_give_the_same(void** state) {
    (void)state;
    size_t bytes;
    char text[400], *corpus = fixture_texts(&bytes);
    Tokenizer* t = train_on(corpus, bytes, "gpt2", 1200);
    const char* json = scratch_file("small.json");
    tokenizer_save_json(t, json);
    write_gpt2_files(json);
    Tokenizer* from_json = tokenizer_load(json);
    Tokenizer* from_gpt2 = tokenizer_load(directory);
    Tokenizer* from_merges = tokenizer_load(scratch_file("merges.txt"));
    Tokenizer* from_ranks = tokenizer_load(write_tiktoken(t, "small.tiktoken"));
    from_ranks->pattern = t->pattern; // rank files contain no pattern; the loader assumes cl100k
    Tokenizer* all[] = {from_json, from_gpt2, from_merges, from_ranks};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(tokenizer_vocab_size(all[i]), tokenizer_vocab_size(t));
        assert_int_equal(tokenizer_special_id(all[i], END_OF_TEXT), tokenizer_special_id(t, END_OF_TEXT));
        if (i < 3) assert_int_equal(tokenizer_hash(all[i]), tokenizer_hash(t));
        assert_same_encoding(t, all[i], corpus, bytes);
        for (int round = 0; round < 300; round++)
            assert_same_encoding(t, all[i], text, random_text(text, sizeof(text)));
    }
    for (int i = 0; i < 4; i++) tokenizer_free(all[i]);
    tokenizer_free(t);
    free(corpus);
}

static void rank_files_merge_by_rank(void** state) {
    (void)state;
    size_t bytes;
    char text[400], *corpus = fixture_texts(&bytes);
    Tokenizer* trained = train_on(corpus, bytes, "cl100k", 600);
    Tokenizer* t = tokenizer_load(write_tiktoken(trained, "ranks.tiktoken"));
    assert_true(t->merge_count > trained->merge_count); // every split of a token, not only the trained one
    tokenizer_save_json(t, scratch_file("ranks.json"));
    Tokenizer* again = tokenizer_load(scratch_file("ranks.json"));
    assert_int_equal(tokenizer_hash(again), tokenizer_hash(t));
    for (int round = 0; round < 40; round++) {
        size_t length = random_text(text, sizeof(text));
        assert_naive_encoding(t, text, length);
        assert_same_encoding(t, again, text, length);
    }
    tokenizer_free(again);
    tokenizer_free(t);
    tokenizer_free(trained);
    free(corpus);
}

static const char* changed_fixture(const char* from, const char* to);

// "!~!" is a token that no merge makes. With ignore_merges, a whole word may become
// this token; a part of a word never may.
static void words_that_are_tokens_ignore_merges(void** state) {
    (void)state;
    static const char* const models[] = {"\"ignore_merges\":false,\"vocab\":{\"!~!\":900,",
                                         "\"ignore_merges\":true,\"vocab\":{\"!~!\":900,"};
    for (int ignore = 0; ignore < 2; ignore++) {
        Tokenizer* t = tokenizer_load(changed_fixture("\"ignore_merges\":false,\"vocab\":{", models[ignore]));
        TokenBuffer tokens = {NULL, 0, 0};
        assert_int_equal(tokenizer_encode(t, "!~!", 3, 0, &tokens), ignore ? 1 : 3);
        if (ignore) assert_int_equal(tokens.ids[0], 900);
        assert_true(tokenizer_encode(t, "!~!~", 4, 0, &tokens) > 1);
        token_buffer_free(&tokens);
        tokenizer_free(t);
    }
}

static void fingerprints_differ(void** state) {
    (void)state;
    const char text[] = "the cat sat on the mat with the other cat";
    Tokenizer* a = train_on(text, strlen(text), "cl100k", 270);
    Tokenizer* b = train_on(text, strlen(text), "gpt2", 270);
    Tokenizer* c = train_on(text, strlen(text), "cl100k", 271);
    Tokenizer* again = train_on(text, strlen(text), "cl100k", 270);
    assert_int_equal(tokenizer_hash(a), tokenizer_hash(again));
    assert_int_not_equal(tokenizer_hash(a), tokenizer_hash(b));
    assert_int_not_equal(tokenizer_hash(a), tokenizer_hash(c));
    assert_true(tokenizer_hash(a) > 0 && tokenizer_hash(a) < 0x80000000u);
    tokenizer_free(a);
    tokenizer_free(b);
    tokenizer_free(c);
    tokenizer_free(again);
}

// Returns a copy of the recorded tokenizer.json with the first `from` replaced by `to`.
static const char* changed_fixture(const char* from, const char* to) {
    size_t bytes;
    char* json = read_file_or_fail(FIXTURES "cl100k.json", &bytes);
    char* place = strstr(json, from);
    if (!place) fail_msg("the fixture has no %s", from);
    assert(place); // tells the analyzer that fail_msg does not return
    ByteBuffer changed = {NULL, 0, 0};
    byte_buffer_append(&changed, json, (size_t)(place - json));
    byte_buffer_append(&changed, to, strlen(to));
    byte_buffer_append(&changed, place + strlen(from), bytes - (size_t)(place - json) - strlen(from));
    const char* path = scratch_file("changed.json");
    write_file(path, changed.data, changed.count);
    byte_buffer_free(&changed);
    free(json);
    return path;
}

static void malformed_json_is_refused(void** state) {
    (void)state;
    static const char* const cases[][3] = {
        {"{", "", "not JSON"},
        {"\"model\"", "\"modem\"", "no \"model\""},
        {"\"BPE\"", "\"Unigram\"", "model.type is Unigram"},
        {"\"vocab\":{", "\"vocab\":[],\"x\":{", "the vocabulary is not a JSON object"},
        {"\"vocab\"", "\"vocabulary\"", "no \"vocab\""},
        {"\"merges\":[", "\"merges\":3,\"x\":[", "model.merges is not a JSON array"},
        {"\"merges\"", "\"mergers\"", "no \"merges\""},
        {"\"merges\":[", "\"merges\":[\"a\",", "merge 0, \"a\", is not two tokens"},
        {"\"merges\":[", "\"merges\":[\"a b c\",", "is not two tokens"},
        {"\"merges\":[", "\"merges\":[[\"a\"],", "merge 0 is neither"},
        {"\"merges\":[", "\"merges\":[[\"!\",\"~\"],", "its result \"!~\" is not in the vocabulary"},
        {"\"merges\":[", "\"merges\":[[\"!~\",\"a\"],", "\"!~\" is not in the vocabulary"},
        {"\"merges\":[", "\"merges\":[[\"\",\"a\"],", "\"\" is not in the vocabulary"},
        {"\"!\":1,", "\"!\":2,", "two tokens have the id 2"},
        {"\"!\":1,", "\"!\":1,\"!\":950,", "the ids 1 and 950 have the same bytes"},
        {"\"!\":1,", "\"!\":-1,", "the id of \"!\""},
        {"\"!\":1,", "\"!\":1.5,", "the id of \"!\""},
        {"\"!\":1,", "\"!\":\"1\",", "the id of \"!\""},
        {"\"!\":1,", "\"!\":1e12,", "the id of \"!\""},
        {"\"!\":1,", "", "\"!\" is not in the vocabulary"},
        {"\"!\":1,", "\"!\":1,\"\xe6\xbc\xa2\":950,", "has a character outside the byte alphabet"},
        {"\"!\":1,", "\"!\":1,\"\xd4\x80\":950,", "has a character outside the byte alphabet"},
        {"\"!\":1,", "\"!\":1,\"\":950,", "is empty"},
        {"\"dropout\":null", "\"dropout\":0.1", "model.dropout"},
        {"\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"##\"",
         "continuing_subword_prefix"},
        {"\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}", "\"normalizer\" is not supported"},
        {"\"truncation\":null", "\"truncation\":{\"max_length\":5}", "\"truncation\" is not supported"},
        {"\"padding\":null", "\"padding\":{}", "\"padding\" is not supported"},
        {"\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"WordPiece\"",
         "the decoder is not ByteLevel"},
        {"\"type\":\"Split\"", "\"type\":\"Whitespace\"", "does not start with Split"},
        {"\"type\":\"Sequence\"", "\"type\":\"Metaspace\"", "only ByteLevel"},
        {"\\\\p{N}{1,3}", "\\\\p{N}{1,2}", "is not supported"},
        {"\"Regex\"", "\"String\"", "no pattern.Regex"},
        {"\"Isolated\"", "\"MergedWithNext\"", "behavior"},
        {"\"Isolated\",\"invert\":false", "\"Removed\",\"invert\":false", "behavior"},
        {"\"add_prefix_space\":false", "\"add_prefix_space\":true", "add_prefix_space"},
        {"\"use_regex\":false", "\"use_regex\":true", "ByteLevel with use_regex"},
        {"\"pre_tokenizer\"", "\"pre\"", "pre_tokenizer is missing"},
        {"\"id\":0", "\"id\":7", "has the id 0 in the vocabulary, not 7"},
        {"\"id\":0", "\"id\":\"0\"", "has no valid id"},
        {"\"content\":\"<|endoftext|>\"", "\"content\":\"<|end|>\"", "has the id 0 of another token"},
        {"\"content\":\"<|endoftext|>\"", "\"contents\":\"<|end|>\"", "has no content"},
        {"\"added_tokens\":[", "\"added_tokens\":[{\"id\":5000,\"content\":\"<x>\",\"special\":true},",
         "its id 5000 is not the next"},
        {"\"lstrip\":false", "\"lstrip\":true", "lstrip is not supported"},
        {"\"added_tokens\":[", "\"added_tokens\":5,\"x\":[", "added_tokens is not a JSON array"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        assert_refused(load_in_child(changed_fixture(cases[i][0], cases[i][1])), 1, cases[i][2]);
    assert_int_equal(load_in_child(FIXTURES "cl100k.json").exit_code, 0);
}

static void malformed_other_files_are_refused(void** state) {
    (void)state;
    static const char* const cases[][2] = {{"", "no token is the single byte"},
                                           {"IQ==\n", "is not a token in base64, a space and its rank"},
                                           {"IQ== x\n", "the rank is not"},
                                           {"IQ== 99999999999999999999\n", "the rank is not"},
                                           {"IQ== -1\n", "the rank is not"},
                                           {"IQ== 16777216\n", "is not between 0 and"},
                                           {"I$== 1\n", "not in base64"},
                                           {"IQ= 1\n", "not in base64"},
                                           {" 1\n", "not in base64"},
                                           {"IQ== 1\nIg== 1\n", "two tokens have the id 1"},
                                           {"IQ== 1\nIQ== 2\n", "the same bytes"}};
    char path[PATH_MAX];
    path_format(path, "%s", scratch_file("malformed.tiktoken"));
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        write_text(path, cases[i][0]);
        assert_refused(load_in_child(path), 1, cases[i][1]);
    }
    assert_refused(load_in_child(scratch_file("nothing")), 1, "No such file");
    char empty[PATH_MAX];
    path_format(empty, "%s/empty", directory);
    make_directories_or_fail(empty);
    assert_refused(load_in_child(empty), 1, "holds neither");
    write_text(scratch_file("empty/vocab.json"), "{}");
    assert_refused(load_in_child(empty), 1, "merges.txt: No such file");
    write_text(scratch_file("empty/tokenizer.json"), "[1, 2");
    assert_refused(load_in_child(empty), 1, "not JSON");
    write_file(scratch_file("empty/tokenizer.json"), "{\0}", 3);
    assert_refused(load_in_child(empty), 1, "a byte 0");
}

// ----------------------------------------------------------------------------
// Fuzzing: a damaged file must load and work, or give one line of error. It must never crash

static void damage(ByteBuffer* file) {
    static const char* const words[] = {"null",    "-1",      "1e999", "[]",   "{}", "\"\"",
                                        "\\u0000", "\\ud800", "true",  "\xff", "\n", " "};
    for (uint32_t changes = 1 + random_below(3); changes > 0; changes--) {
        size_t at = random_below((uint32_t)file->count), span = random_below(20);
        const char* word = words[random_below(sizeof(words) / sizeof(words[0]))];
        if (at + span > file->count) span = file->count - at;
        switch (random_below(6)) {
        case 0:
            file->data[at] = (char)random_below(256);
            break;
        case 1:
            file->data[at] ^= (char)(1 << random_below(8));
            break;
        case 2:
            file->count = at + 1;
            break;
        case 3: // removes some bytes
            memmove(file->data + at, file->data + at + span, file->count - at - span);
            file->count -= span;
            if (file->count == 0) file->data[file->count++] = '{';
            break;
        case 4:
            memcpy(file->data + at, word, strlen(word) < file->count - at ? strlen(word) : file->count - at);
            break;
        default:
            memmove(file->data + at, file->data + random_below((uint32_t)(file->count - span) + 1), span);
        }
    }
}

static void fuzz(const char* original, const char* target, const char* load, int rounds) {
    size_t bytes;
    char* text = read_file_or_fail(original, &bytes);
    ByteBuffer file = {NULL, 0, 0};
    int loaded = 0, refused = 0;
    for (int round = 0; round < rounds; round++) {
        file.count = 0;
        byte_buffer_append(&file, text, bytes);
        damage(&file);
        write_file(target, file.data, file.count);
        Outcome outcome = load_in_child(load);
        loaded += outcome.exit_code == 0;
        refused += outcome.exit_code == 1;
        if (outcome.exit_code == 0 || (outcome.exit_code == 1 && !strncmp(outcome.errors, "moba.c: ", 8)))
            continue;
        fail_msg("%s, round %d: exit code %d: %s", original, round, outcome.exit_code, outcome.errors);
    }
    assert_true(refused > 0);
    assert_int_equal(loaded + refused, rounds);
    byte_buffer_free(&file);
    free(text);
}

static void damaged_files_never_crash(void** state) {
    (void)state;
    char path[PATH_MAX], original[PATH_MAX];
    path_format(path, "%s", scratch_file("damaged.json"));
    fuzz(FIXTURES "cl100k.json", path, path, 400);
    Tokenizer* t = tokenizer_load(FIXTURES "gpt2.json");
    path_format(original, "%s", write_tiktoken(t, "original.tiktoken"));
    path_format(path, "%s", scratch_file("damaged.tiktoken"));
    fuzz(original, path, path, 200);
    tokenizer_save_json(t, scratch_file("gpt2.json"));
    write_gpt2_files(scratch_file("gpt2.json"));
    tokenizer_free(t);
    char* vocabulary = read_file_or_fail(scratch_file("vocab.json"), NULL);
    write_text(scratch_file("vocab.original"), vocabulary);
    char* merges = read_file_or_fail(scratch_file("merges.txt"), NULL);
    write_text(scratch_file("merges.original"), merges);
    path_format(path, "%s", scratch_file("vocab.json"));
    fuzz(scratch_file("vocab.original"), path, path, 200);
    write_text(scratch_file("vocab.json"), vocabulary);
    path_format(path, "%s", scratch_file("merges.txt"));
    fuzz(scratch_file("merges.original"), path, path, 200);
    free(vocabulary);
    free(merges);
}

// ----------------------------------------------------------------------------
// The command

static const struct {
    int split;
    const char* name;
} splits[] = {{0, "train"}, {1, "val"}};

// Reads the tokens of PREFIX_SPLIT_*.bin, and checks them against the headers. Returns the number of shards.
static int read_shards(const char* name, int split, const Tokenizer* t, TokenBuffer* tokens) {
    for (int index = 0;; index++) {
        char file[PATH_MAX];
        path_format(file, "%s/%s_%s_%06d.bin", directory, name, splits[split].name, index);
        if (!path_exists(file)) return index;
        size_t bytes;
        char* data = read_file_or_fail(file, &bytes);
        int32_t header[256];
        memcpy(header, data, sizeof(header));
        size_t width = header[0] == 20240520 ? 2 : 4;
        assert_int_equal(header[0], tokenizer_vocab_size(t) <= 65536 ? 20240520 : 20240801);
        assert_int_equal(header[1], width == 2 ? 1 : 7);
        assert_int_equal(header[3], tokenizer_vocab_size(t));
        assert_int_equal(header[4], tokenizer_hash(t));
        for (int i = 5; i < 256; i++) assert_int_equal(header[i], 0);
        assert_int_equal(bytes, 1024 + width * (size_t)header[2]);
        for (int32_t i = 0; i < header[2]; i++) {
            int32_t id = 0;
            memcpy(&id, data + 1024 + width * (size_t)i, width);
            token_buffer_append(tokens, &id, 1);
        }
        free(data);
    }
}

// Writes documents d0 to d<count - 1> into a directory. *expected receives the tokens that they should give.
static void write_documents(Tokenizer* t, const char* name, int count, TokenBuffer* expected) {
    char folder[PATH_MAX], path[PATH_MAX], text[3000];
    path_format(folder, "%s/%s", directory, name);
    make_directories_or_fail(folder);
    int32_t end = tokenizer_special_id(t, END_OF_TEXT);
    for (int d = 0; d < count; d++) {
        path_format(path, "%s/d%03d", folder, d);
        size_t bytes = 1 + random_text(text, sizeof(text) - 1);
        text[bytes - 1] = '.';
        write_file(path, text, bytes);
        token_buffer_append(expected, &end, 1);
        tokenizer_encode(t, text, bytes, 0, expected);
    }
}

static void assert_tokens_equal(const TokenBuffer* a, const TokenBuffer* b) {
    assert_int_equal(a->count, b->count);
    if (a->count) assert_memory_equal(a->ids, b->ids, a->count * sizeof(int32_t));
}

static void shards_hold_the_documents(void** state) {
    (void)state;
    Tokenizer* t = tokenizer_load(FIXTURES "cl100k.json");
    TokenBuffer expected = {NULL, 0, 0}, train = {NULL, 0, 0}, validation = {NULL, 0, 0};
    write_documents(t, "documents", 40, &expected);
    assert_success(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --include-binary --output-prefix %s/all --validation-fraction 0 "
                               "--shard-tokens 1000 %s/documents",
                               directory, directory));
    assert_int_equal(read_shards("all", 0, t, &train), (expected.count + 999) / 1000);
    assert_int_equal(read_shards("all", 1, t, &validation), 0);
    assert_tokens_equal(&train, &expected);
    // Only whole documents go to validation, about the requested fraction, and no token is lost
    assert_success(
        run_command("prepare -q -t " FIXTURES
                    "cl100k.json --include-binary --output-prefix %s/all --validation-fraction 0.2 "
                    "--threads 3 %s/documents",
                    directory, directory));
    train.count = 0;
    assert_int_equal(read_shards("all", 0, t, &train), 1); // nothing remains of the earlier, larger set
    assert_int_equal(read_shards("all", 1, t, &validation), 1);
    assert_int_equal(train.count + validation.count, expected.count);
    assert_true(validation.count * 5 <= expected.count && validation.count * 10 > expected.count);
    int32_t end = tokenizer_special_id(t, END_OF_TEXT);
    int documents = 0;
    for (size_t i = 0; i < train.count; i++) documents += train.ids[i] == end;
    for (size_t i = 0; i < validation.count; i++) documents += validation.ids[i] == end;
    assert_int_equal(documents, 40);
    assert_int_equal(train.ids[0], end);
    assert_int_equal(validation.ids[0], end);
    // The same result with a separate directory
    train.count = validation.count = 0;
    assert_success(
        run_command("prepare -q -t " FIXTURES
                    "cl100k.json --include-binary --output-prefix %s/all --validation %s/documents "
                    "%s/documents",
                    directory, directory, directory));
    read_shards("all", 0, t, &train);
    read_shards("all", 1, t, &validation);
    assert_tokens_equal(&train, &expected);
    assert_tokens_equal(&validation, &expected);
    token_buffer_free(&expected);
    token_buffer_free(&train);
    token_buffer_free(&validation);
    tokenizer_free(t);
}

static void one_document_is_cut(void** state) {
    (void)state;
    Tokenizer* t = tokenizer_load(FIXTURES "cl100k.json");
    TokenBuffer expected = {NULL, 0, 0}, tokens = {NULL, 0, 0};
    write_documents(t, "single", 1, &expected);
    assert_success(
        run_command("prepare -q -t " FIXTURES
                    "cl100k.json --include-binary --output-prefix %s/one --validation-fraction 0.1 "
                    "%s/single",
                    directory, directory));
    read_shards("one", 0, t, &tokens);
    assert_int_equal(tokens.count, expected.count - expected.count / 10);
    read_shards("one", 1, t, &tokens);
    assert_tokens_equal(&tokens, &expected);
    token_buffer_free(&expected);
    token_buffer_free(&tokens);
    tokenizer_free(t);
}

static void large_vocabularies_take_32_bits(void** state) {
    (void)state;
    ByteBuffer ranks = {NULL, 0, 0};
    char number[32];
    for (int id = 0; id < 256 + 65536; id++) { // every byte and every pair of bytes
        char bytes[2] = {(char)(id < 256 ? id : (id - 256) >> 8), (char)(id - 256)};
        append_base64(&ranks, bytes, id < 256 ? 1 : 2);
        byte_buffer_append(&ranks, number, (size_t)snprintf(number, sizeof(number), " %d\n", id));
    }
    write_file(scratch_file("large.tiktoken"), ranks.data, ranks.count);
    Tokenizer* t = tokenizer_load(scratch_file("large.tiktoken"));
    TokenBuffer expected = {NULL, 0, 0}, tokens = {NULL, 0, 0};
    write_documents(t, "large", 3, &expected);
    assert_success(run_command("prepare -q -t %s/large.tiktoken --include-binary --output-prefix %s/big "
                               "--validation-fraction 0 %s/large",
                               directory, directory, directory));
    assert_int_equal(read_shards("big", 0, t, &tokens), 1);
    assert_tokens_equal(&tokens, &expected);
    byte_buffer_free(&ranks);
    token_buffer_free(&expected);
    token_buffer_free(&tokens);
    tokenizer_free(t);
}

static void prepare_and_expect(Tokenizer* t, const char* options, const char* const* documents, int count) {
    TokenBuffer expected = {NULL, 0, 0}, tokens = {NULL, 0, 0};
    int32_t end = tokenizer_special_id(t, END_OF_TEXT);
    for (int d = 0; d < count; d++) {
        token_buffer_append(&expected, &end, 1);
        tokenizer_encode(t, documents[d], strlen(documents[d]), 0, &expected);
    }
    assert_success(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/kinds --validation-fraction 0 %s",
                               directory, options));
    read_shards("kinds", 0, t, &tokens);
    assert_tokens_equal(&tokens, &expected);
    token_buffer_free(&expected);
    token_buffer_free(&tokens);
}

static void kinds_of_documents(void** state) {
    (void)state;
    static const char* const three[] = {"one\nédition", "two", "three <|endoftext|>"};
    static const char* const cut[] = {"one\n"};
    Tokenizer* t = tokenizer_load(FIXTURES "cl100k.json");
    char options[3 * PATH_MAX];
    write_text(scratch_file("lines.jsonl"),
               "{\"text\": \"one\\n\\u00e9dition\", \"id\": 1}\n\n{\"text\":\"\"}\n"
               "{\"id\": 2, \"text\": \"two\"}\n{\"text\": \"three <|endoftext|>\"}");
    prepare_and_expect(t, scratch_file("lines.jsonl"), three, 3);
    write_text(scratch_file("separated"), "one\nédition\n--\ntwo\n--\n\n--\nthree <|endoftext|>");
    snprintf(options, sizeof(options), "--separator \\n--\\n %s", scratch_file("separated"));
    prepare_and_expect(t, options, three, 3);
    write_text(scratch_file("list"), scratch_file("lines.jsonl"));
    snprintf(options, sizeof(options), "--files-from %s", scratch_file("list"));
    prepare_and_expect(t, options, three, 3);
    snprintf(options, sizeof(options), "--max-bytes 5 %s",
             scratch_file("lines.jsonl")); // the fifth byte is the first half of an é
    prepare_and_expect(t, options, cut, 1);
    write_text(scratch_file("wrong.jsonl"), "{\"text\": \"a\"}\n{\"txt\": \"a\"}\n");
    assert_refused(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/wrong %s/wrong.jsonl",
                               directory, directory),
                   1, "line 2 has no text under the key \"text\"; its keys are: txt");
    tokenizer_free(t);
}

// Prepares one *.jsonl, and expects these documents and this warning; "": no warning.
static void expect_of_lines(Tokenizer* t, const char* lines, const char* const* documents, int count,
                            const char* warning) {
    char options[3 * PATH_MAX];
    write_text(scratch_file("odd.jsonl"), lines);
    snprintf(options, sizeof(options), "%s", scratch_file("odd.jsonl"));
    prepare_and_expect(t, options, documents, count);
    char* errors = read_file_or_fail(scratch_file("errors"), NULL);
    assert_int_equal(lines_of(errors), *warning ? 1 : 0);
    if (!strstr(errors, warning)) fail_msg("wanted \"%s\", got: %s", warning, errors);
    free(errors);
}

static void odd_lines_do_not_end_the_run(void** state) {
    (void)state;
    static const char* const replaced[] = {"a\xef\xbf\xbdz", "b"};
    static const char* const both[] = {"\xef\xbf\xbd\xef\xbf\xbd", "\xef\xbf\xbd\xf0\x9f\x98\x80"};
    static const char* const plain[] = {"a", "b"};
    static const char* const escaped[] = {"a\\ud83d\\u0000"};
    static const char warning[] =
        "half a surrogate pair, which is read as U+FFFD: 1; the first is line 1 of ";
    Tokenizer* t = tokenizer_load(FIXTURES "cl100k.json");
    expect_of_lines(t, "{\"text\": \"a\\ud83dz\"}\n{\"text\": \"b\"}\n", replaced, 2, warning);
    expect_of_lines(t, "{\"text\": \"a\\uDE00z\"}\n{\"text\": \"b\"}\n", replaced, 2, warning);
    expect_of_lines(t, "{\"text\": \"a\\u0000z\"}\n{\"text\": \"b\"}\n", replaced, 2, warning);
    expect_of_lines(t, "{\"text\": \"\\ude00\\ud83d\"}\n{\"text\": \"\\ud83d\\uD83D\\ude00\"}", both, 2,
                    "U+FFFD: 2; the first is line 1 of ");
    expect_of_lines(t, "{\"text\": \"a\\\\ud83d\\\\u0000\"}", escaped, 1, "");
    expect_of_lines(t, "\xef\xbb\xbf{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}\r\n", plain, 2, "");
    expect_of_lines(t, "\xef\xbb\xbf\n{\"text\": \"a\"}\n{\"text\": \"b\"}", plain, 2, "");
    expect_of_lines(t, "{\"text\": \"a\"}\n{\"text\": null}\n{\"text\": \"b\"}", plain, 2,
                    "\"text\" is null: 1; the first is line 2 of ");
    tokenizer_free(t);
}

static void broken_lines_are_named(void** state) {
    (void)state;
    static const char* const cases[][2] = {
        {"{\"text\": \"a\\u00g0b\"}", "line 1 is not JSON"}, // cJSON would end the text at the a
        {"{\"text\": \"a\"}\n{\"text\": \"a\\ud8", "line 2 is not JSON"},
        {"{\"text\": \"a\\", "line 1 is not JSON"},
        {"{\"text\": 3}", "line 1 has no text under the key \"text\", but another kind of value"},
        {"[\"text\"]", "line 1 has no text under the key \"text\""},
        {"\n\n\"text\"", "line 3 has no text under the key \"text\""}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        write_text(scratch_file("broken.jsonl"), cases[i][0]);
        assert_refused(run_shell("$T prepare -q -t $J --output-prefix $D/broken $D/broken.jsonl"), 1,
                       cases[i][1]);
    }
}

static void options_that_match_nothing_are_told(void** state) {
    (void)state;
    write_text(scratch_file("plain"), "one two\r\n\r\nthree");
    write_text(scratch_file("lines.jsonl"), "{\"text\": \"one\"}");
    assert_refused(run_shell("$T train -q -o $D/told.json --separator '\\n\\n' $D/plain"), 0,
                   "--separator: is nowhere in the text");
    assert_refused(run_shell("$T train -q -o $D/told.json --separator x $D/lines.jsonl"), 0,
                   "--separator: does not apply to *.jsonl");
    assert_refused(run_shell("$T train -q -o $D/told.json --text-key body $D/plain"), 0,
                   "--text-key body: no file");
    Outcome outcome = run_shell("$T train -q -o $D/told.json --separator '\\r\\n\\r\\n' $D/plain");
    assert_success(outcome);
    assert_string_equal(outcome.errors, "");
}

// ----------------------------------------------------------------------------
// Files that are not text

static void make_mixed_directory(void) {
    static const unsigned char gzip[] = {0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xcb, 0x48, 0xe4, 2, 0, 0x7a};
    struct sockaddr_un address = {AF_UNIX, ""};
    assert_success(run_shell(
        "rm -rf $D/mixed; mkdir -p $D/mixed/.git $D/mixed/sub && cd $D/mixed && echo one >a && echo two "
        ">sub/b && "
        "echo x >.git/config && echo x >.hidden && ln -s a link && ln -s . loop && "
        "ln -s nowhere dangling && mkfifo fifo && : >empty && printf 'tr\\350s bien, caf\\351' >c"));
    write_file(scratch_file("mixed/d.gz"), gzip, sizeof(gzip));
    write_file(scratch_file("mixed/e.png"), "\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16);
    write_text(scratch_file("mixed/f"),
               "\xcf\xf0\xe8\xe2\xe5\xf2 \xec\xe8\xf0"); // Cyrillic, one byte for each letter
    int server = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%.80s/mixed/socket", directory);
    assert_int_equal(bind(server, (struct sockaddr*)&address, sizeof(address)), 0);
    close(server);
}

static void directories_are_read_without_what_is_no_text(void** state) {
    (void)state;
    static const char* const texts[] = {"one\n", "tr\xe8s bien, caf\xe9", "two\n"};
    static const char* const skipped[] = {
        ".git: a hidden directory", ".hidden: a hidden file",    "d.gz: gzip data", "dangling: a link",
        "e.png: a PNG image",       "f: binary or not UTF-8",    "link: a link",    "loop: a link",
        "fifo: not a regular file", "socket: not a regular file"};
    enum { SKIPPED = (int)(sizeof(skipped) / sizeof(skipped[0])) };
    Tokenizer* t = tokenizer_load(FIXTURES "cl100k.json");
    make_mixed_directory();
    prepare_and_expect(t, scratch_file("mixed"), texts, 3);
    char* errors = read_file_or_fail(scratch_file("errors"), NULL);
    assert_int_equal(lines_of(errors), SKIPPED);
    for (int i = 0; i < SKIPPED; i++)
        if (!strstr(errors, skipped[i])) fail_msg("\"%s\" is not in: %s", skipped[i], errors);
    free(errors);
    write_file(scratch_file("mixed/z"), "\0", 1); // one more file than the warning lists
    prepare_and_expect(t, scratch_file("mixed"), texts, 3);
    errors = read_file_or_fail(scratch_file("errors"), NULL);
    assert_int_equal(lines_of(errors), SKIPPED + 1);
    assert_non_null(strstr(errors, "skipped 11 files and directories in all; 4 files are read"));
    free(errors);
    tokenizer_free(t);
}

// The command lists the directory, then waits for the pipe. It must skip a file that disappears meanwhile.
static void files_may_disappear(void** state) {
    (void)state;
    static const char* const texts[] = {"first", "stays\n"};
    char options[3 * PATH_MAX], fifo[PATH_MAX];
    Tokenizer* t = tokenizer_load(FIXTURES "cl100k.json");
    path_format(fifo, "%s", scratch_file("first_fifo"));
    assert_success(run_shell(
        "mkdir $D/losing && echo goes >$D/losing/a && echo stays >$D/losing/b && mkfifo $D/first_fifo"));
    pid_t writer = fork();
    if (writer == 0) { // opening the pipe waits for the command
        alarm(60);
        FILE* file = fopen(fifo, "wb");
        if (!file || unlink(scratch_file("losing/a")) != 0) _exit(1);
        fputs("first", file);
        _exit(fclose(file) != 0);
    }
    snprintf(options, sizeof(options), "%s %s", fifo, scratch_file("losing"));
    prepare_and_expect(t, options, texts, 2);
    assert_int_equal(waitpid(writer, NULL, 0), writer);
    char* errors = read_file_or_fail(scratch_file("errors"), NULL);
    assert_non_null(strstr(errors, "losing/a: No such file"));
    free(errors);
    tokenizer_free(t);
}

static void named_files_must_be_text(void** state) {
    (void)state;
    make_mixed_directory();
    assert_refused(run_shell("$T train -q -o $D/named.json $D/mixed/a $D/mixed/d.gz"), 1,
                   "d.gz: is gzip data");
    assert_refused(run_shell("$T train -q -o $D/named.json /dev/stdin <$D/mixed/d.gz"), 1, "is gzip data");
    assert_refused(run_shell("cat $D/mixed/d.gz | $T train -q -o $D/named.json /dev/stdin"), 1,
                   "is gzip data");
    assert_refused(run_shell("printf '%s/mixed/a\\n%s/mixed/d.gz\\n' $D $D >$D/list;"
                             "$T train -q -o $D/named.json --files-from $D/list"),
                   0, "skipped");
    assert_refused(run_shell(": >$D/list; $T train -q -o $D/named.json --files-from $D/list"), 1,
                   "names no file to read");
    assert_success(run_shell("$T train -q -o $D/named.json --include-binary $D/mixed/d.gz"));
    assert_success(run_shell("$T encode -t $J $D/mixed/d.gz | $T decode -t $J | cmp - $D/mixed/d.gz"));
    assert_refused(run_shell("mkdir -p $D/hollow; $T train -q -o $D/named.json $D/hollow"), 1,
                   "no file to read in this directory");
    assert_refused(run_shell("$T train -q -o $D/named.json \"$D/*.none\""), 1, "without quotes");
    assert_refused(run_shell("$T train -q -o $D/named.json \"$D/two\nlines\""), 1, "two?lines");
}

// A failed or interrupted run must leave no part of its output.
static int files_named(const char* part) {
    DIR* folder = opendir(directory);
    int found = 0;
    for (struct dirent* entry; (entry = readdir(folder));) found += strstr(entry->d_name, part) != NULL;
    closedir(folder);
    return found;
}

static void nothing_half_written_stays(void** state) {
    (void)state;
    write_text(scratch_file("half.jsonl"), "{\"text\": \"a\"}\nno JSON\n");
    assert_refused(run_command("prepare -q -t " FIXTURES "cl100k.json --output-prefix %s/half %s/half.jsonl",
                               directory, directory),
                   1, "line 2 is not JSON");
    assert_int_equal(files_named("half"), 1);
    write_text(scratch_file("nothing.txt"), "");
    assert_refused(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/empty_set %s/nothing.txt",
                               directory, directory),
                   1, "all files are empty");
    assert_int_equal(files_named("empty_set"), 0);
    assert_int_equal(files_named("partial"), 0);
}

static void missing_directories_are_made(void** state) {
    (void)state;
    assert_success(run_shell(
        "$T train -q -o $D/made/by/train/t.json runtime/checks.h && "
        "$T prepare -q -t $D/made/by/train/t.json --output-prefix $D/made/by/prepare/x runtime/checks.h && "
        "$T encode -t $J -o $D/made/by/encode/x runtime/checks.h && "
        "$T export -t $J -o $D/made/by/export/x.json && cd $D/made/by && "
        "test -s train/t.json -a -s prepare/x_train_000000.bin -a -s encode/x -a -s export/x.json"));
    assert_refused(run_shell("$T train -q -o $D/made/by/encode/x/t.json runtime/checks.h"), 1,
                   "not a directory");
    assert_refused(run_shell("$T train -q -o $D/made runtime/checks.h"), 1, "is a directory");
    assert_refused(run_shell("$T train -q -o $D/made/ runtime/checks.h"), 2, "must name a file");
    assert_refused(run_shell("mkdir $D/made/x_val_000000.bin;"
                             "$T prepare -q -t $J --output-prefix $D/made/x runtime/checks.h"),
                   1, "x_val_000000.bin: is a directory");
    assert_success(
        run_shell("cd $D/made && test ! -e x_train_000000.bin && test -z \"$(find . -name '*partial*')\""));
}

static void output_that_cannot_be_written(void** state) {
    (void)state;
    static const char* const cases[][2] = {
        {"$T encode -t $J runtime/checks.h >/dev/full", "standard output: cannot write: No space left"},
        {"$T decode -t $J >/dev/full", ""}, // no ids give no text
        {"$T info $J >/dev/full", "standard output: cannot write: No space left"},
        {"$T --help >/dev/full", "standard output: cannot write: No space left"},
        {"$T info $J >&-", "standard output: cannot write: Bad file"},
        {"$T encode -t $J runtime/checks.h >&-", "standard output: cannot write: Bad file"},
        {"$T encode -t $J <&-", "standard input: cannot read: Bad file"},
        {"ulimit -f 1; $T encode -t $J -o $D/unfit runtime/*.h", "unfit: cannot write: File too large"},
        {"ulimit -f 1; $T train -q -o $D/unfit runtime/*.h", "unfit: cannot write: File too large"},
        {"ulimit -f 3; $T prepare -q -t $J --output-prefix $D/unfit runtime", "cannot write: File too large"},
        {"ulimit -n 5; $T prepare -q -t $J --output-prefix $D/unfit runtime/json.h", "Too many open files"},
        {"ulimit -n 4; $T prepare -q -t $J --output-prefix $D/unfit runtime", "Too many open files"},
        {"$T train -q -o /proc/unfit runtime", "/proc/unfit"},
        {"$T prepare -q -t $J --output-prefix /proc/unfit/x runtime",
         "/proc/unfit: cannot make the directory"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        if (*cases[i][1]) assert_refused(run_shell(cases[i][0]), 1, cases[i][1]);
        else assert_success(run_shell(cases[i][0]));
    }
    assert_int_equal(files_named("unfit"), 0);
    // If standard error is closed, no message may go into a shard.
    assert_success(run_shell("$T prepare -t $J --output-prefix $D/open runtime 2>/dev/null && "
                             "$T prepare -t $J --output-prefix $D/closed runtime >&- 2>&- && "
                             "cmp $D/open_train_000000.bin $D/closed_train_000000.bin && "
                             "$T prepare -t $J --output-prefix $D/closed runtime <&- >&- 2>&- && "
                             "cmp $D/open_train_000000.bin $D/closed_train_000000.bin"));
    // A link must still point to its file, and a pipe must stay a pipe.
    assert_success(run_shell(
        "echo old >$D/target; ln -sf target $D/pointer; $T encode -t $J -o $D/pointer runtime/checks.h;"
        "test -L $D/pointer && ! grep -q old $D/target"));
    assert_success(
        run_shell("mkfifo $D/pipe; cat $D/pipe >$D/got & $T encode -t $J -o $D/pipe runtime/checks.h; wait;"
                  "test -p $D/pipe && cmp $D/got $D/target"));
    // Another name for standard output must not truncate its file.
    assert_success(run_shell("echo before >$D/log; $T encode -t $J -o /dev/stdout runtime/checks.h >>$D/log;"
                             "head -n 1 $D/log | grep -q before && test $(wc -c <$D/log) -gt 1000"));
    // If the reader of the output leaves early, the command ends without a message. A
    // closed pipe for messages does not stop it.
    Outcome early =
        run_shell("($T encode -t $J runtime/*.h; echo $? >$D/code) | true; test $(cat $D/code) = 141");
    assert_success(early);
    assert_string_equal(early.errors, "");
    assert_success(
        run_shell("($T prepare -t $J --output-prefix $D/unheard runtime; echo $? >$D/code) 2>&1 | true;"
                  "test $(cat $D/code) = 0 -a -s $D/unheard_train_000000.bin"));
}

// ----------------------------------------------------------------------------
// Signals

// Starts the command. NULL ends the arguments. `output` is the write end for the
// command's standard output, or -1.
static pid_t start_command(const char* errors, int output, const char* const* arguments) {
    int kept = output >= 0 ? dup2(output, 300) : -1; // a number that the child does not close
    pid_t child = fork_with_errors(errors);
    if (child == 0 && kept >= 0) dup2(kept, STDOUT_FILENO);
    if (kept >= 0) close(kept);
    if (child != 0) return child;
    execv(tokenizer_program(), (char* const*)arguments);
    _exit(98);
}

// Returns the signals that a thread blocks, from /proc.
static uint64_t blocked_signals(const char* status_path) {
    unsigned long long blocked = 0;
    char line[256];
    FILE* status = fopen(status_path, "rb");
    while (status && fgets(line, sizeof(line), status))
        if (sscanf(line, "SigBlk: %llx", &blocked) == 1) break;
    if (status) fclose(status);
    return blocked;
}

// Waits until the child blocks its signals. Before that, a signal would end it without a message.
static void wait_until_ready(pid_t child) {
    char path[PATH_MAX];
    path_format(path, "/proc/%d/status", (int)child);
    for (int i = 0; i < 6000 && !(blocked_signals(path) >> (SIGTERM - 1) & 1); i++) pause_shortly();
}

static void wait_for_file(const char* part) {
    for (int i = 0; i < 6000 && files_named(part) == 0; i++) pause_shortly();
}

// One word of 8 MB keeps one call of the encoder busy, and one line without a space keeps the trainer busy.
static void write_long_documents(void) {
    enum { BYTES = 8 << 20 };
    char* text = (char*)malloc_or_fail(BYTES, "a long document");
    for (int i = 0; i < BYTES; i++) text[i] = (char)('a' + random_below(26));
    write_file(scratch_file("long_word"), text, BYTES);
    for (int i = 0; i < BYTES; i++) text[i] = i % 7 == 6 ? ' ' : (char)('a' + random_below(26));
    write_file(scratch_file("long_text"), text, BYTES);
    free(text);
}

static void signals_end_any_work(void** state) {
    (void)state;
    static const struct {
        int number;
        const char *name, *partial; // this file shows that the work has begun; NULL: any time
        const char* arguments[9];   // a leading % is this run's directory
    } cases[] = {
        {SIGTERM,
         "SIGTERM",
         "stop.",
         {"prepare", "-q", "-t", cl100k, "--output-prefix", "%/stop", "%/long_word"}},
        {SIGINT,
         "SIGINT",
         "stop.",
         {"prepare", "-q", "-t", cl100k, "--output-prefix", "%/stop", "%/long_text"}},
        {SIGHUP, "SIGHUP", "stop.", {"train", "-q", "--vocab-size", "1M", "-o", "%/stop", "%/long_text"}},
        {SIGQUIT, "SIGQUIT", "stop.", {"train", "-q", "-o", "%/stop", "%/long_word"}},
        {SIGALRM, "SIGALRM", "stop.", {"encode", "-t", cl100k, "-o", "%/stop", "%/long_word"}},
        {SIGUSR1, "SIGUSR1", NULL, {"encode", "-t", cl100k, "%/long_text"}}, // the output pipe is full
        {SIGTERM, "SIGTERM", NULL, {"train", "-q", "-o", "%/stop", "%/fifo"}},
        {SIGINT, "SIGINT", NULL, {"train", "-q", "-o", "%/stop", "--files-from", "%/fifo"}},
        {SIGHUP, "SIGHUP", NULL, {"encode", "-t", "%/fifo", "-o", "%/stop"}},
        {SIGTERM, "SIGTERM", NULL, {"encode", "-t", cl100k, "-o", "%/fifo", "%/long_text"}},
    };
    int full[2];
    char paths[9][PATH_MAX], errors[PATH_MAX], line[64];
    path_format(errors, "%s", scratch_file("errors"));
    write_long_documents();
    assert_int_equal(mkfifo(scratch_file("fifo"), 0666), 0);
    assert_int_equal(pipe(full), 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const char* arguments[11] = {tokenizer_program()};
        for (int a = 0; a < 9 && cases[i].arguments[a]; a++) {
            const char* text = cases[i].arguments[a];
            path_format(paths[a], "%s%s", *text == '%' ? directory : "", text + (*text == '%'));
            arguments[a + 1] = paths[a];
        }
        pid_t child = start_command(errors, full[1], arguments);
        if (cases[i].partial) wait_for_file(cases[i].partial);
        else wait_until_ready(child);
        assert_int_equal(kill(child, cases[i].number), 0);
        snprintf(line, sizeof(line), "tokenizer: stopped by %s\n", cases[i].name);
        assert_refused(finish_child(child, errors), 128 + cases[i].number, line);
        assert_int_equal(files_named("stop"), 0);
    }
    close(full[0]);
    close(full[1]);
}

static void every_thread_but_one_has_signals_blocked(void** state) {
    (void)state;
    const uint64_t wanted =
        1ull << (SIGINT - 1) | 1ull << (SIGTERM - 1) | 1ull << (SIGHUP - 1) | 1ull << (SIGALRM - 1);
    char errors[PATH_MAX], prefix[PATH_MAX], text[PATH_MAX], path[PATH_MAX];
    path_format(errors, "%s", scratch_file("errors"));
    write_long_documents();
    path_format(prefix, "%s", scratch_file("blocked"));
    path_format(text, "%s", scratch_file("long_text"));
    const char* arguments[] = {tokenizer_program(), "prepare", "-q", "-t", cl100k, "--output-prefix", prefix,
                               "--threads",         "3",       text, text, NULL};
    pid_t child = start_command(errors, -1, arguments);
    int threads = 0;
    for (int i = 0; i < 6000 && threads < 4; i++) { // the waiting thread and the three threads of OpenMP
        pause_shortly();
        threads = 0;
        path_format(path, "/proc/%d/task", (int)child);
        DIR* tasks = opendir(path);
        for (struct dirent* entry; tasks && (entry = readdir(tasks));) {
            if (entry->d_name[0] == '.') continue;
            path_format(path, "/proc/%d/task/%s/status", (int)child, entry->d_name);
            // sigwait() unblocks its signals while it waits, but only in its own thread
            threads += (blocked_signals(path) & wanted) == wanted;
        }
        if (tasks) closedir(tasks);
        threads++;
    }
    kill(child, SIGTERM);
    assert_int_equal(finish_child(child, errors).exit_code, 128 + SIGTERM);
    assert_int_equal(threads, 4);
}

static void nohup_is_respected(void** state) {
    (void)state;
    char errors[PATH_MAX], prefix[PATH_MAX], fifo[PATH_MAX];
    path_format(errors, "%s", scratch_file("errors"));
    path_format(prefix, "%s", scratch_file("nohup"));
    path_format(fifo, "%s", scratch_file("nohup_fifo"));
    assert_int_equal(mkfifo(fifo, 0666), 0);
    const char* arguments[] = {tokenizer_program(), "prepare", "-q", "-t", cl100k,
                               "--output-prefix",   prefix,    fifo, NULL};
    signal(SIGHUP, SIG_IGN);
    pid_t child = start_command(errors, -1, arguments);
    signal(SIGHUP, SIG_DFL);
    wait_until_ready(child);
    assert_int_equal(kill(child, SIGHUP), 0);
    int writer = -1; // opening it fails until there is a reader
    for (int i = 0; i < 6000 && (writer = open(fifo, O_WRONLY | O_NONBLOCK)) < 0; i++) pause_shortly();
    assert_int_equal(write(writer, "one two three", 13), 13);
    close(writer);
    assert_success(finish_child(child, errors));
    assert_true(path_exists(scratch_file("nohup_train_000000.bin")));
}

// Returns the number of files in the scratch directory of `child` for $D/earlier.
static int scratch_files(pid_t child) {
    char path[PATH_MAX];
    int count = 0;
    path_format(path, "%s/earlier.%d.partial", directory, (int)child);
    DIR* folder = opendir(path);
    for (struct dirent* entry; folder && (entry = readdir(folder));) count += entry->d_name[0] != '.';
    if (folder) closedir(folder);
    return count;
}

// Stops a run that opens one shard after another, at twenty moments. No scratch file may remain, and the
// earlier shards must. A run may end before its signal; then it must succeed without a message about a stop.
static void interruption_keeps_earlier_shards(void** state) {
    (void)state;
    static const char* const earlier =
        "$T prepare -q -t $J --output-prefix $D/earlier --shard-tokens 20k tokenizer";
    char errors[PATH_MAX], prefix[PATH_MAX];
    path_format(errors, "%s", scratch_file("errors"));
    path_format(prefix, "%s", scratch_file("earlier"));
    const char* arguments[] = {
        tokenizer_program(), "prepare", "-q",      "-t",        cl100k, "--output-prefix", prefix,
        "--shard-tokens",    "50",      "runtime", "tokenizer", NULL};
    assert_success(run_shell(earlier));
    assert_success(run_shell("cat $D/earlier_* >$D/before"));
    for (int i = 0; i < 20; i++) {
        pid_t child = start_command(errors, -1, arguments);
        for (int waits = 0; waits < 6000 && scratch_files(child) <= 20 * i; waits++) {
            siginfo_t ended;
            ended.si_pid = 0;
            waitid(P_PID, (id_t)child, &ended, WEXITED | WNOHANG | WNOWAIT);
            if (ended.si_pid) break;
            pause_shortly();
        }
        kill(child, SIGTERM);
        Outcome outcome = finish_child(child, errors);
        if (outcome.exit_code == 0) assert_success(run_shell(earlier));
        else assert_refused(outcome, 128 + SIGTERM, "stopped by SIGTERM");
        assert_int_equal(files_named("partial"), 0);
        assert_success(run_shell("cat $D/earlier_* | cmp - $D/before"));
    }
}

static void command_line_errors(void** state) {
    (void)state;
    const char* json = FIXTURES "cl100k.json";
    assert_refused(run_command("train --vocab-size 256 runtime"), 2,
                   "--vocab-size 256: must be at least 257");
    assert_refused(run_command("train --vocab-size 12x runtime"), 2,
                   "--vocab-size 12x: must be a whole number");
    assert_refused(run_command("train --vocab-size 99999999999 runtime"), 2, "must be a whole number");
    assert_refused(run_command("train --pattern o200k runtime"), 2,
                   "--pattern o200k: must be cl100k or gpt2");
    assert_refused(run_command("train --special x runtime"), 2, "--special x: must be");
    assert_refused(run_command("train --special ab --special ab runtime"), 2, "is given twice");
    assert_refused(run_command("train --special ab --no-special runtime"), 2, "exclude each other");
    assert_refused(run_command("train"), 2, "no FILE to train on");
    assert_refused(run_shell("$T prepare"), 2, "--output-prefix DIR/NAME is required, and FILEs");
    assert_refused(run_shell("T=$(realpath $T); mkdir -p $D/hollow; cd $D/hollow; $T encode"), 2,
                   "--tokenizer FILE: needed");
    assert_refused(run_command("train %s/no_such_file", directory), 1, "No such file");
    assert_refused(run_command("prepare -t %s runtime", json), 2, "--output-prefix DIR/NAME is required");
    assert_refused(run_command("prepare -t %s --output-prefix %s/ runtime", json, directory), 2,
                   "must end in a name");
    assert_refused(run_command("prepare -t %s --output-prefix x --validation-fraction 1 runtime", json), 2,
                   "--validation-fraction 1: must be a number");
    assert_refused(run_command("prepare -t %s --output-prefix x --shard-tokens 3G runtime", json), 2,
                   "--shard-tokens 3G");
    assert_refused(
        run_command("prepare -t %s --output-prefix x --validation-fraction 0.1 --validation test runtime",
                    json),
        2, "exclude each other");
    assert_int_equal(run_command("train --no-such-option").exit_code, 2);
    assert_int_equal(run_command("no-such-command").exit_code, 2);
    assert_int_equal(run_command("%s", "").exit_code, 2);
    assert_int_equal(run_command("--help").exit_code, 0);
    assert_int_equal(run_command("train --help").exit_code, 0);
    assert_success(run_command("info %s", json));
}

static void encode_and_decode_files(void** state) {
    (void)state;
    char text[2000];
    char* back;
    const char* json = FIXTURES "cl100k.json";
    for (int binary = 0; binary < 2; binary++) {
        const char* option = binary ? "--binary" : "";
        size_t bytes = random_text(text, sizeof(text)), length;
        write_file(scratch_file("text"), text, bytes);
        assert_success(run_command("encode -t %s %s -o %s/ids %s/text", json, option, directory, directory));
        assert_success(run_command("decode -t %s %s -o %s/back %s/ids", json, option, directory, directory));
        back = read_file_or_fail(scratch_file("back"), &length);
        assert_int_equal(length, bytes);
        if (bytes) assert_memory_equal(back, text, bytes);
        free(back);
    }
    write_text(scratch_file("ids"), "1 2 3000");
    assert_refused(run_command("decode -t %s %s/ids", json, directory), 1, "token 2 is 3000");
    write_text(scratch_file("ids"), "1 two");
    assert_refused(run_command("decode -t %s %s/ids", json, directory), 1, "byte 2");
    write_text(scratch_file("ids"), "123");
    assert_refused(run_command("decode --binary -t %s %s/ids", json, directory), 1, "no multiple of 2");
}

// ----------------------------------------------------------------------------

static int make_directory(void** state) {
    (void)state;
    path_format(directory, "/tmp/test_tokenizer.XXXXXX");
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void** state) {
    (void)state;
    char line[PATH_MAX + 16];
    snprintf(line, sizeof(line), "rm -rf '%s'", directory);
    return system(line);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(utf8_is_told_from_other_bytes),
        cmocka_unit_test(words_are_the_text),
        cmocka_unit_test(classes_of_hugging_face),
        cmocka_unit_test(any_bytes_round_trip),
        cmocka_unit_test(special_tokens_are_text_unless_allowed),
        cmocka_unit_test(encoding_follows_the_definition),
        cmocka_unit_test(very_long_words_are_fast),
        cmocka_unit_test(training_follows_the_rule),
        cmocka_unit_test(training_does_not_depend_on_threads),
        cmocka_unit_test(training_does_not_make_special_tokens),
        cmocka_unit_test(recorded_encodings_of_hugging_face),
        cmocka_unit_test(three_formats_give_the_same),
        cmocka_unit_test(rank_files_merge_by_rank),
        cmocka_unit_test(words_that_are_tokens_ignore_merges),
        cmocka_unit_test(fingerprints_differ),
        cmocka_unit_test(malformed_json_is_refused),
        cmocka_unit_test(malformed_other_files_are_refused),
        cmocka_unit_test(damaged_files_never_crash),
        cmocka_unit_test(shards_hold_the_documents),
        cmocka_unit_test(one_document_is_cut),
        cmocka_unit_test(large_vocabularies_take_32_bits),
        cmocka_unit_test(kinds_of_documents),
        cmocka_unit_test(odd_lines_do_not_end_the_run),
        cmocka_unit_test(broken_lines_are_named),
        cmocka_unit_test(options_that_match_nothing_are_told),
        cmocka_unit_test(directories_are_read_without_what_is_no_text),
        cmocka_unit_test(files_may_disappear),
        cmocka_unit_test(named_files_must_be_text),
        cmocka_unit_test(nothing_half_written_stays),
        cmocka_unit_test(missing_directories_are_made),
        cmocka_unit_test(output_that_cannot_be_written),
        cmocka_unit_test(signals_end_any_work),
        cmocka_unit_test(every_thread_but_one_has_signals_blocked),
        cmocka_unit_test(nohup_is_respected),
        cmocka_unit_test(interruption_keeps_earlier_shards),
        cmocka_unit_test(command_line_errors),
        cmocka_unit_test(encode_and_decode_files),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, make_directory, remove_directory);
}
