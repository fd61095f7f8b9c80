/*
Tests of tokenizer/: the library in this process, the command as build/tokenizer (or $TOKENIZER). Run from the
root of the tree. Fixtures in test/fixtures/tokenizer were recorded by test/compare_tokenizer.py --record.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // memmem
#endif
#include "runtime/checks.h"      // read_file_or_fail, path_format
#include "tokenizer/tokenizer.h" // what is tested

#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include <setjmp.h>
#include <cmocka.h> // behind all others: it makes fail a macro

#define FIXTURES "test/fixtures/tokenizer/"
static const char END_OF_TEXT[] = "<|endoftext|>";
static char directory[PATH_MAX]; // of this run, removed at the end

// ----------------------------------------------------------------------------
// Help

static uint64_t random_state = 1;

static uint32_t random_below(uint32_t limit) { // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 0x2545f4914f6cdd1du) >> 32) % limit;
}

// A path in the directory of this run, valid for the next three calls.
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
    int exit_code; // -1: killed by a signal
    char errors[4096];
} Outcome;

static Outcome finish_child(pid_t child, const char* errors_path) {
    Outcome outcome;
    int status;
    size_t length;
    assert_int_equal(waitpid(child, &status, 0), child);
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
    return 0;
}

// Runs the command with its arguments in one string, cut at spaces; %s is the directory of this run.
static Outcome run_command(const char* format, ...) {
    char line[4 * PATH_MAX], *arguments[32] = {NULL};
    int count = 0;
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof(line), format, values);
    va_end(values);
    const char* program = getenv("TOKENIZER");
    arguments[count++] = (char*)(program ? program : "build/tokenizer");
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

// Loads a file in a child, since a malformed one ends the process. A tokenizer that loads must also work.
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

// Random bytes, of which many are ASCII, many pieces of UTF-8 whole and broken.
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
                // no word mixes UTF-8 and stray bytes
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

// Whether the pattern keeps the code point in one word with a member of the class before it.
static int splitter_joins(WordSplitter* splitter, char before, uint32_t c) {
    char text[5] = {before};
    const char* word;
    size_t length, bytes = 1 + write_utf8(text + 1, c);
    word_splitter_begin(splitter, text, bytes);
    return word_splitter_next(splitter, &word, &length) && length == bytes;
}

// All code points against the classes recorded from Hugging Face's: PCRE2's own are of another Unicode version.
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

// The definition, in O(n^2): of all neighbours that can merge the lowest rank merges, the leftmost among equals.
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
    for (int again = 0; again < 2; again++) { // the second time from the cache
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
        // few letters: many overlapping merges
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

// Of the processor: how busy the machine is with other things does not matter.
static double seconds_used(void) {
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// One word of a million bytes: the naive way would take 10^12 steps.
static void very_long_words_are_fast(void** state) {
    (void)state;
    static const char* const units[] = {"a", "ab", " ", "\n", "\xff", "\xcc\x81", "漢", "!", "x\xff"};
    size_t bytes = 1 << 20;
    char* text = (char*)malloc_or_fail(bytes, "a long word");
    for (size_t u = 0; u < sizeof(units) / sizeof(units[0]); u++) {
        size_t length = strlen(units[u]);
        for (size_t i = 0; i < bytes; i++) text[i] = units[u][i % length];
        Tokenizer* t = train_on(text, 5000, "cl100k", 280);
        double started = seconds_used();
        assert_round_trip(t, text, bytes);
        if (seconds_used() - started > 120)
            fail_msg("%s: a word of 1 MB took %.0f s", units[u], seconds_used() - started);
        tokenizer_free(t);
    }
    free(text);
}

// ----------------------------------------------------------------------------
// Training

// The rule, counted anew for every merge: the most frequent pair, then the smaller left id, then the smaller right.
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

// vocab.json and merges.txt, taken out of a tokenizer.json
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
    from_ranks->pattern = t->pattern; // rank files do not say it; cl100k is taken
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
    assert_true(t->merge_count > trained->merge_count); // all ways to cut a token, not only the trained one
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

// "!~!" is a token that no merge makes: a whole word becomes it with ignore_merges only, a part of a word never.
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

// A copy of the recorded tokenizer.json with the first `from` replaced by `to`.
static const char* changed_fixture(const char* from, const char* to) {
    size_t bytes;
    char* json = read_file_or_fail(FIXTURES "cl100k.json", &bytes);
    char* place = strstr(json, from);
    if (!place) fail_msg("the fixture has no %s", from);
    assert(place); // fail_msg does not return, which the analyzer cannot know
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
// Fuzzing: a damaged file loads and works, or is refused in one line; it never crashes

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
        case 3: // some bytes less
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

// The tokens of PREFIX_SPLIT_*.bin, checked against their headers; returns the number of shards.
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

// Writes documents d0 to d<count - 1> into a directory, and the tokens they should give into *expected.
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
                               "cl100k.json --output-prefix %s/all --validation-fraction 0 "
                               "--shard-tokens 1000 %s/documents",
                               directory, directory));
    assert_int_equal(read_shards("all", 0, t, &train), (expected.count + 999) / 1000);
    assert_int_equal(read_shards("all", 1, t, &validation), 0);
    assert_tokens_equal(&train, &expected);
    // whole documents to validation, about the fraction, and nothing lost
    assert_success(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/all --validation-fraction 0.2 "
                               "--threads 3 %s/documents",
                               directory, directory));
    train.count = 0;
    assert_int_equal(read_shards("all", 0, t, &train), 1); // the larger set before has left none
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
    // the same by a separate directory
    train.count = validation.count = 0;
    assert_success(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/all --validation %s/documents "
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
    assert_success(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/one --validation-fraction 0.1 "
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
    for (int id = 0; id < 256 + 65536; id++) { // every byte, every pair of bytes
        char bytes[2] = {(char)(id < 256 ? id : (id - 256) >> 8), (char)(id - 256)};
        append_base64(&ranks, bytes, id < 256 ? 1 : 2);
        byte_buffer_append(&ranks, number, (size_t)snprintf(number, sizeof(number), " %d\n", id));
    }
    write_file(scratch_file("large.tiktoken"), ranks.data, ranks.count);
    Tokenizer* t = tokenizer_load(scratch_file("large.tiktoken"));
    TokenBuffer expected = {NULL, 0, 0}, tokens = {NULL, 0, 0};
    write_documents(t, "large", 3, &expected);
    assert_success(
        run_command("prepare -q -t %s/large.tiktoken --output-prefix %s/big --validation-fraction 0 %s/large",
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
             scratch_file("lines.jsonl")); // the fifth byte is half an é
    prepare_and_expect(t, options, cut, 1);
    write_text(scratch_file("wrong.jsonl"), "{\"text\": \"a\"}\n{\"txt\": \"a\"}\n");
    assert_refused(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/wrong %s/wrong.jsonl",
                               directory, directory),
                   1, "line 2 has no text under the key \"text\"");
    write_text(scratch_file("wrong.jsonl"), "{\"text\": \"a\\u0000b\"}\n");
    assert_refused(run_command("prepare -q -t " FIXTURES
                               "cl100k.json --output-prefix %s/wrong %s/wrong.jsonl",
                               directory, directory),
                   1, "\\u0000 is not supported");
    tokenizer_free(t);
}

// Nothing of an output stays when a run fails or is interrupted.
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
    assert_refused(run_command("train -q -o %s/no/such/place.json runtime", directory), 1, "No such file");
    assert_int_equal(files_named("partial"), 0);
}

static void interruption_leaves_nothing(void** state) {
    (void)state;
    const char* program = getenv("TOKENIZER") ? getenv("TOKENIZER") : "build/tokenizer";
    char prefix[PATH_MAX], list[PATH_MAX];
    path_format(prefix, "%s/stopped", directory);
    path_format(list, "%s/stopped_list", directory);
    FILE* file = open_or_fail(list, "wb"); // far more than it gets the time to read
    for (int i = 0; i < 200000; i++) fprintf(file, "%scl100k.encodings.jsonl\n", FIXTURES);
    assert_int_equal(fclose(file), 0);
    char errors[PATH_MAX];
    path_format(errors, "%s", scratch_file("errors"));
    pid_t child = fork_with_errors(errors);
    if (child == 0) {
        execl(program, program, "prepare", "-q", "-t", FIXTURES "cl100k.json", "--output-prefix", prefix,
              "--files-from", list, (char*)NULL);
        _exit(98);
    }
    struct timespec pause = {0, 10000000};
    for (int i = 0; i < 12000 && files_named("stopped_train") + files_named("partial") == 0; i++)
        nanosleep(&pause, NULL);
    kill(child, SIGTERM);
    assert_refused(finish_child(child, errors), 1, "interrupted");
    assert_int_equal(files_named("stopped"), 1); // the list
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
    assert_refused(run_command("train"), 2, "no FILE");
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
    static const char* const folders[] = {"empty", "documents", "single", "large"};
    char path[PATH_MAX];
    for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++) {
        path_format(path, "%s/%s", directory, folders[i]);
        remove_path(path);
    }
    remove_path(directory);
    return 0;
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
        cmocka_unit_test(nothing_half_written_stays),
        cmocka_unit_test(interruption_leaves_nothing),
        cmocka_unit_test(command_line_errors),
        cmocka_unit_test(encode_and_decode_files),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, make_directory, remove_directory);
}
