/*
Tests the retrieval task: reads the output of build/retrieval window by window; runs runtime/retrieval.h on a
scripted model; and trains a small model that learns the task, from end to end.

    BUILD=build build/test/test_retrieval          from the top of the tree
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // memmem
#endif
#include "runtime/retrieval.h"
#include "tokenizer/tokenizer.h"
#include "test/capture.h"

#include <signal.h>

// This include is last, because cmocka.h defines a macro `fail`.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

static char programs[PATH_MAX]; // the build directory
static char top[PATH_MAX];
static int vocabulary; // the number of tokens in small.json
static char directory[] = "/tmp/test_retrieval_XXXXXX";

// Runs a line of sh. Its output goes to out.txt and err.txt.
__attribute__((format(printf, 1, 2))) static int run(const char* format, ...) {
    char line[4096], whole[8192];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    snprintf(whole, sizeof(whole), "( %s ) > out.txt 2> err.txt", line);
    int status = system(whole);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#define must_run(...)                                                                                        \
    do {                                                                                                     \
        if (run(__VA_ARGS__) != 0) fail_msg("failed: %s", read_file_or_fail("err.txt", NULL));               \
    } while (0)

static int count_text(const char* text, size_t length, const char* wanted) {
    int count = 0;
    const char* end = text + length;
    while ((text = (const char*)memmem(text, (size_t)(end - text), wanted, strlen(wanted)))) {
        count++;
        text++;
    }
    return count;
}

// ----------------------------------------------------------------------------
// The generator

typedef struct {
    Tokenizer* tokenizer;
    DataLoader* loader;
    int T;
    int* tokens; // (T + 1), the last window that was read
} Shards;

static Shards shards_open(const char* tokenizer, const char* prefix, const char* split, int T) {
    Shards shards = {tokenizer_load(tokenizer), NULL, T, NULL};
    char pattern[PATH_MAX];
    path_format(pattern, "%s_%d_%s_*.bin", prefix, T, split);
    shards.loader = loader_open(pattern, T, tokenizer_vocab_size(shards.tokenizer),
                                tokenizer_hash(shards.tokenizer), 0, 0);
    shards.tokens = (int*)malloc_or_fail((size_t)(2 * T + 1) * sizeof(int), "a window");
    return shards;
}

static void shards_close(Shards* shards) {
    loader_close(shards->loader);
    tokenizer_free(shards->tokenizer);
    free(shards->tokens);
}

static void shards_read(Shards* shards, int sequence) {
    int* targets = shards->tokens + shards->T + 1;
    assert_int_equal(loader_read(shards->loader, (uint64_t)sequence, 1, shards->tokens, targets), 1);
    shards->tokens[shards->T] = targets[shards->T - 1];
}

// Returns the text of tokens first..end-1 of the window; the caller frees it.
static ByteBuffer shards_text(const Shards* shards, int first, int end) {
    ByteBuffer text = {NULL, 0, 0};
    tokenizer_decode(shards->tokenizer, shards->tokens + first, (size_t)(end - first), &text);
    byte_buffer_append(&text, "", 1);
    text.count--;
    return text;
}

static void assert_text(const Shards* shards, int first, int end, const char* wanted) {
    ByteBuffer text = shards_text(shards, first, end);
    assert_string_equal(text.data, wanted);
    byte_buffer_free(&text);
}

// Checks one sample against its line of the index, with the default template.
static void check_sample(Shards* shards, const cJSON* line, int pairs) {
    const int T = (int)json_get(line, "length")->valuedouble,
              sequence = (int)json_get(line, "sequence")->valuedouble;
    const int needle = (int)json_get(line, "needle_offset")->valuedouble;
    const int needle_tokens = (int)json_get(line, "needle_tokens")->valuedouble;
    const int answer = (int)json_get(line, "answer_offset")->valuedouble;
    const int answer_tokens = (int)json_get(line, "answer_tokens")->valuedouble;
    const double depth = json_get(line, "depth")->valuedouble;
    const char *key = json_text(json_get(line, "key")), *value = json_text(json_get(line, "value"));
    const int end_of_text = tokenizer_special_id(shards->tokenizer, "<|endoftext|>");
    char statement[256], question[256], spaced[64];
    snprintf(statement, sizeof(statement), " The code of %s is %s.", key, value);
    snprintf(question, sizeof(question), " The code of %s is", key);
    snprintf(spaced, sizeof(spaced), " %s", value);
    shards_read(shards, sequence);

    assert_int_equal(shards->tokens[0], end_of_text);
    assert_int_equal(shards->tokens[T], end_of_text);
    for (int t = 1; t < T; t++) assert_int_not_equal(shards->tokens[t], end_of_text);
    assert_text(shards, needle, needle + needle_tokens, statement);
    assert_int_equal(answer + answer_tokens, T);
    assert_text(shards, answer, T, spaced);
    const int asked = needle_tokens - 1; // tokens of question and answer: the statement without its full stop
    for (int i = 0; i < asked; i++)
        assert_int_equal(shards->tokens[T - asked + i], shards->tokens[needle + i]);
    assert_text(shards, T - asked, answer, question);
    const double rest = T - 1 - asked - needle_tokens;
    if (fabs(needle - 1 - depth * rest) > 0.5001)
        fail_msg("needle at %d of %g, depth %g", needle - 1, rest, depth);

    ByteBuffer text = shards_text(shards, 1, T);
    assert_int_equal(count_text(text.data, text.count, statement), 1);
    assert_int_equal(count_text(text.data, text.count, question), 2);
    assert_int_equal(count_text(text.data, text.count, " The code of "), pairs + 1);
    byte_buffer_free(&text);
}

static void check_task(const char* tokenizer, const char* prefix, const int* lengths, int length_count,
                       int pairs, int each) {
    char path[PATH_MAX];
    path_format(path, "%s_index.jsonl", prefix);
    char* text = read_file_or_fail(path, NULL);
    char* line = text;
    for (int i = 0; i < length_count; i++) {
        Shards shards = shards_open(tokenizer, prefix, "val", lengths[i]);
        assert_int_equal(loader_sequences(shards.loader), each);
        assert_int_equal(loader_tokens(shards.loader), each * lengths[i] + 1);
        for (int k = 0; k < each; k++) {
            cJSON* sample = cJSON_Parse(line);
            assert_non_null(sample);
            assert_int_equal(json_get(sample, "length")->valueint, lengths[i]);
            assert_int_equal(json_get(sample, "sequence")->valueint, k);
            check_sample(&shards, sample, pairs);
            cJSON_Delete(sample);
            line = strchr(line, '\n') + 1;
        }
        shards_close(&shards);
    }
    assert_int_equal(*line, 0);
    free(text);
}

static void samples_are_what_the_index_says(void** state) {
    (void)state;
    const int lengths[] = {80, 200};
    must_run("%s/retrieval -t small.json --lengths 80,200 --pairs 1 --depths 0,0.3,1 --samples 10 "
             "--evaluation-samples 7 "
             "--output-prefix made/one",
             programs);
    check_task("small.json", "made/one", lengths, 2, 1, 21);
    const int longer[] = {700};
    must_run("%s/retrieval -t small.json --lengths 700 --pairs 9 --samples 10 --evaluation-samples 5 "
             "--filler filler.txt "
             "--key-length 9 --value-length 3 --output-prefix made/nine",
             programs);
    check_task("small.json", "made/nine", longer, 1, 9, 25);
    // A tokenizer with 32-bit shards, in which a value takes several tokens.
    must_run("%s/retrieval -t %s/test/fixtures/tokenizer/cl100k.json --lengths 200 --samples 10 --pairs 2 "
             "--value-length "
             "11 --output-prefix made/wide",
             programs, top);
    char tokenizer[PATH_MAX];
    path_format(tokenizer, "%s/test/fixtures/tokenizer/cl100k.json", top);
    check_task(tokenizer, "made/wide", lengths + 1, 1, 2, 250);
}

static void training_windows_are_samples_too(void** state) {
    (void)state;
    must_run("%s/retrieval -t small.json --lengths 128 --samples 300 --pairs 2 --output-prefix made/train",
             programs);
    Shards shards = shards_open("small.json", "made/train", "train", 128);
    assert_int_equal(loader_sequences(shards.loader), 300);
    const int end_of_text = tokenizer_special_id(shards.tokenizer, "<|endoftext|>");
    double depths = 0;
    for (int s = 0; s < 300; s++) {
        shards_read(&shards, s);
        assert_int_equal(shards.tokens[0], end_of_text);
        assert_int_equal(shards.tokens[128], end_of_text);
        ByteBuffer text = shards_text(&shards, 1, 128);
        // The last question must ask for a statement that occurs once, with the same value.
        const char* question = text.data + text.count - 13;
        while (memcmp(question, " The code of ", 13) != 0) question--;
        char statement[128];
        snprintf(statement, sizeof(statement), "%s.", question);
        assert_int_equal(count_text(text.data, text.count, statement), 1);
        depths += (double)(strstr(text.data, statement) - text.data) / (double)(question - text.data) / 300;
        byte_buffer_free(&text);
    }
    assert_true(depths > 0.3 && depths < 0.6);
    shards_close(&shards);
}

// This filler mentions the key q, so no sample may ask for q.
static void a_key_that_the_filler_has_is_not_used(void** state) {
    (void)state;
    must_run("yes ' The code of q is 7.' | head -n 2000 > speaking.txt");
    must_run("%s/retrieval -t small.json --lengths 96 --samples 0 --pairs 1 --key-alphabet pq --key-length 1 "
             "--filler "
             "speaking.txt --output-prefix made/speaking",
             programs);
    char* text = read_file_or_fail("made/speaking_index.jsonl", NULL);
    assert_int_equal(count_text(text, strlen(text), "\"key\":\"p\""), 250);
    free(text);
}

// Finds the pairs "K=V" in the windows, with K from a to j and V from 0 to 9, and
// marks them in a table of 100.
static void mark_pairs(int* marks, const char* prefix, const char* split) {
    Shards shards = shards_open("small.json", prefix, split, 64);
    for (int s = 0; s < (int)loader_sequences(shards.loader); s++) {
        shards_read(&shards, s);
        ByteBuffer text = shards_text(&shards, 1, 64);
        for (char* at = text.data; (at = strstr(at, " code of ")); at++)
            if (at[14]) marks[10 * (at[9] - 'a') + (at[14] - '0')] = 1;
        byte_buffer_free(&text);
    }
    shards_close(&shards);
}

static void training_and_evaluation_share_no_pair(void** state) {
    (void)state;
    for (int seed = 1; seed <= 2; seed++)
        must_run(
            "%s/retrieval -t small.json --lengths 64 --pairs 1 --samples 3000 --evaluation-samples 100 "
            "--key-alphabet abcdefghij --key-length 1 --value-length 1 --seed %d --output-prefix made/seed%d",
            programs, seed, seed);
    int train[100] = {0}, evaluation[100] = {0}, trained = 0, evaluated = 0;
    for (int seed = 1; seed <= 2; seed++) {
        char prefix[32];
        snprintf(prefix, sizeof(prefix), "made/seed%d", seed);
        mark_pairs(train, prefix, "train");
        mark_pairs(evaluation, prefix, "val");
    }
    for (int i = 0; i < 100; i++) {
        assert_false(train[i] && evaluation[i]);
        trained += train[i];
        evaluated += evaluation[i];
    }
    print_message("%d pairs in training, %d in evaluation\n", trained, evaluated);
    assert_int_equal(trained + evaluated, 100); // every pair was drawn, and belongs to one split
    assert_true(evaluated >= 5 && evaluated <= 20);
}

static void the_seed_decides(void** state) {
    (void)state;
    for (int i = 0; i < 3; i++)
        must_run("%s/retrieval -t small.json --lengths 96,128 --pairs 2 --samples 50 --seed %d "
                 "--output-prefix same/run%d",
                 programs, i == 2 ? 8 : 7, i);
    static const char* const files[] = {"96_train_000000.bin", "96_val_000000.bin", "128_train_000000.bin",
                                        "128_val_000000.bin", "index.jsonl"};
    for (int f = 0; f < 5; f++) {
        must_run("cmp same/run0_%s same/run1_%s", files[f], files[f]);
        assert_int_equal(run("cmp same/run0_%s same/run2_%s", files[f], files[f]), 1);
    }
}

static void bad_command_lines_and_files(void** state) {
    (void)state;
    static const struct {
        const char *arguments, *words;
        int code;
    } cases[] = {
        {"--output-prefix x", "--tokenizer FILE is required", 2},
        {"-t small.json", "--output-prefix DIR/NAME is required", 2},
        {"-t small.json --output-prefix x --lengths 20", "too short for 4 pairs", 2},
        {"-t small.json --output-prefix x --lengths 64,64", "twice", 2},
        {"-t small.json --output-prefix x --depths 0,1.5", "--depths", 2},
        {"-t small.json --output-prefix x --pairs 11 --key-length 1 --key-alphabet ab", "too few keys", 2},
        {"-t small.json --output-prefix x --template 'no places'", "must have {key}", 2},
        {"-t small.json --output-prefix x --key-alphabet aa", "there twice", 2},
        {"-t small.json --output-prefix x --filler short.txt", "short.txt: too short", 1},
        {"-t absent.json --output-prefix x", "absent.json", 1},
    };
    must_run("echo one two three > short.txt");
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int code = run("%s/retrieval %s --samples 3", programs, cases[i].arguments);
        char* text = read_file_or_fail("err.txt", NULL);
        if (code != cases[i].code || !strstr(text, cases[i].words))
            fail_msg("%s: exit code %d: %s", cases[i].arguments, code, text);
        free(text);
        assert_int_equal(run("ls x*"), 2); // no file remains
    }
}

static void a_stop_keeps_the_earlier_run(void** state) {
    (void)state;
    must_run("%s/retrieval -t small.json --lengths 128,160 --samples 20 --output-prefix kept/run", programs);
    must_run("cat kept/* > kept.before");
    for (int i = 0; i < 3; i++) {
        static const int signals[] = {SIGTERM, SIGHUP, SIGALRM};
        // The command makes too many samples to finish soon. The test waits for the scratch directory.
        must_run("%s/retrieval -t small.json --lengths 160,128 --samples 10000000 --output-prefix kept/run & "
                 "n=0; until ls -d kept/*.partial || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done; "
                 "kill -%d $!; wait $!; test $? = %d",
                 programs, signals[i], 128 + signals[i]);
        must_run("cat kept/* | cmp - kept.before");
    }
    // A directory has the name of the second length's shard.
    must_run("rm kept/run_160_val_000000.bin; mkdir kept/run_160_val_000000.bin; cat kept/run_128_* "
             "kept/*index* > kept.before");
    assert_int_equal(
        run("%s/retrieval -t small.json --lengths 128,160 --seed 5 --samples 20 --output-prefix kept/run",
            programs),
        1);
    must_run("cat kept/run_128_* kept/*index* | cmp - kept.before && ! ls -d kept/*.partial");
}

// ----------------------------------------------------------------------------
// Evaluation

// A model that knows the text, except for the answers that the script makes wrong.
typedef struct {
    const int* tokens;
    int forwards, most_rows;
    int wrong_from; // from this sample on, in evaluation order, the second answer token is wrong; -1: none
    int wrong_to;
    int first_row; // number of samples evaluated before this batch
    int rows;
} Script;

static void script_forward(void* context, const int* tokens, int rows, int T) {
    Script* script = (Script*)context;
    (void)T;
    script->tokens = tokens;
    script->first_row += script->rows;
    script->rows = rows;
    script->forwards++;
    if (rows > script->most_rows) script->most_rows = rows;
}

static int script_likeliest(void* context, int row, int T, int position) {
    const Script* script = (const Script*)context;
    assert_true(position < T - 1); // the window contains the token to find
    const int sample = script->first_row + row, token = script->tokens[(size_t)row * T + position + 1];
    if (sample >= script->wrong_from && sample < script->wrong_to && position == T - 2) return token + 1;
    return token;
}

static void a_scripted_model(void** state) {
    (void)state;
    // Values take several tokens, because no vocabulary here merges X and 9.
    must_run("%s/retrieval -t small.json --lengths 96,160 --pairs 1 --depths 0,1 --evaluation-samples 10 "
             "--samples 0 "
             "--value-alphabet X9 --value-length 12 --output-prefix task/scripted",
             programs);
    for (int batch = 1; batch <= 7; batch += 3) {
        Retrieval* task = retrieval_open("task/scripted");
        assert_int_equal(task->count, 40);
        assert_int_equal(task->longest, 160);
        Script script = {NULL, 0, 0, 10,
                         24,   0, 0}; // half of length 96, and 2 samples of each depth of length 160
        const RetrievalModel model = {&script, script_forward, script_likeliest};
        retrieval_evaluate(task, &model, vocabulary, 0, batch);
        assert_int_equal(script.most_rows, batch);
        assert_int_equal(script.forwards, 2 * ((20 + batch - 1) / batch));
        assert_int_equal(task->cell_count, 4);
        static const int lengths[] = {96, 96, 160, 160}, right[] = {5, 5, 8, 8};
        for (int c = 0; c < 4; c++) {
            const RetrievalCell* cell = &task->cells[c];
            assert_int_equal(cell->length, lengths[c]);
            assert_true(cell->depth == c % 2);
            assert_int_equal(cell->samples, 10);
            assert_int_equal(cell->right, right[c]);
            assert_true(cell->tokens >= 20); // in a wrong answer, all tokens but the last are right
            assert_int_equal(cell->tokens - cell->tokens_right, cell->samples - cell->right);
        }
        char text[1024] = "";
        FILE* out = fmemopen(text, sizeof(text), "w");
        retrieval_print(task, out);
        fclose(out);
        assert_string_equal(text, "   depth      0      1    all\n"
                                  "      96  0.500  0.500  0.500\n"
                                  "     160  0.800  0.800  0.800\n");
        cJSON* json = retrieval_json(task, "none");
        char* line = cJSON_PrintUnformatted(json);
        assert_non_null(strstr(line, "\"samples\":40,\"right\":26,\"accuracy\":0.65"));
        assert_non_null(
            strstr(line, "{\"length\":160,\"depth\":0.0,\"samples\":10,\"right\":8,\"accuracy\":0.8"));
        cJSON_free(line);
        cJSON_Delete(json);
        retrieval_close(task);
    }
}

static void open_and_evaluate(void* prefix) {
    Script script = {NULL, 0, 0, 0, 0, 0, 0};
    const RetrievalModel model = {&script, script_forward, script_likeliest};
    Retrieval* task = retrieval_open((const char*)prefix);
    retrieval_evaluate(task, &model, vocabulary, 0, 4);
    retrieval_close(task);
}

static void bad_indices(void** state) {
    (void)state;
    static const struct {
        const char *text, *words;
    } cases[] = {
        {"", "has no samples"},
        {"{\"length\":96}\n", "line 1: sequence must be"},
        {"not json\n", "line 1: not valid JSON"},
        {"{\"length\":96,\"sequence\":0,\"depth\":0,\"answer_offset\":95,\"answer_tokens\":2}\n",
         "not within"},
        {"{\"length\":96,\"sequence\":0,\"depth\":2,\"answer_offset\":95,\"answer_tokens\":1}\n",
         "depth must be"},
        {"{\"length\":96,\"sequence\":0,\"depth\":0,\"answer_offset\":95,\"answer_tokens\":1}", "cut off"},
        {"{\"length\":96,\"sequence\":20,\"depth\":0,\"answer_offset\":95,\"answer_tokens\":1}\n",
         "have only 20"},
        {"{\"length\":97,\"sequence\":0,\"depth\":0,\"answer_offset\":95,\"answer_tokens\":1}\n",
         "no file matches"},
    };
    must_run("cp task/scripted_96_val_000000.bin task/bad_96_val_000000.bin");
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        FILE* file = open_or_fail("task/bad_index.jsonl", "wb");
        write_or_fail(cases[i].text, strlen(cases[i].text), file, "task/bad_index.jsonl");
        fclose(file);
        struct Captured result = capture(open_and_evaluate, (void*)"task/bad");
        if (result.exit_code != 1 || !strstr(result.text, cases[i].words))
            fail_msg("case %zu: exit code %d: %s", i, result.exit_code, result.text);
    }
    assert_int_equal(capture(open_and_evaluate, (void*)"task/absent").exit_code, 1);
}

// ----------------------------------------------------------------------------
// From end to end

static double number_of(const cJSON* object, const char* key) {
    double value = NAN;
    if (!json_get_double(json_get(object, key), &value)) fail_msg("no number %s", key);
    return value;
}

static double evaluate(const char* options) {
    must_run("%s/train_gpt --eval-retrieval task/learn --init-from learned -o result %s", programs, options);
    cJSON* json = json_read_object("result/retrieval.json");
    double accuracy = number_of(json, "accuracy");
    assert_int_equal(cJSON_GetArraySize(json_get(json, "cells")), 3);
    cJSON_Delete(json);
    return accuracy;
}

// The answer is one of 26 letters. A model that has learnt only the format finds 1 in 26.
static void a_small_model_learns(void** state) {
    (void)state;
    must_run(
        "%s/retrieval -t small.json --lengths 32 --pairs 1 --template ' Code {key}: {value}.' --key-length 1 "
        "--value-length 1 --key-alphabet ABCDEFGHIJKLMNOPQRSTUVWXYZ --value-alphabet "
        "abcdefghijklmnopqrstuvwxyz "
        "--samples 20000 --evaluation-samples 60 --depths 0,0.5,1 --output-prefix task/learn",
        programs);
    const char* model =
        "--layers 2 --channels 64 --heads 4 -t 32 -b 32 -d 1024 -l 3e-3 -u 50 --weight-decay 0 -v 0 "
        "--tokenizer small.json -i task/learn_32_train_000000.bin -o learned";
    must_run("%s/train_gpt %s -x 800", programs, model);
    double accuracy = evaluate("-b 16");
    print_message("accuracy %.3f\n", accuracy);
    assert_true(accuracy > 0.3);
    must_run("cp out.txt table.txt; cp result/retrieval.json first.json");
    assert_true(evaluate("-b 16") == accuracy);
    must_run("cmp out.txt table.txt && cmp first.json result/retrieval.json");
    // A build with other kinds evaluates the checkpoint as what it is.
    must_run("%s/train_gpt_cpu_flashmoba_kdgqa_kconv3_fp32 --eval-retrieval task/learn --init-from learned "
             "-o result",
             programs);
    cJSON* json = json_read_object("result/retrieval.json");
    assert_true(fabs(number_of(json, "accuracy") - accuracy) < 0.02);
    cJSON_Delete(json);
    assert_true(fabs(evaluate("-b 7") - accuracy) < 0.02); // another batch size rounds differently
}

static void evaluation_needs_a_model(void** state) {
    (void)state;
    assert_int_equal(run("%s/train_gpt --eval-retrieval task/learn --vocab 300", programs), 2);
    char* text = read_file_or_fail("err.txt", NULL);
    assert_non_null(strstr(text, "--eval-retrieval: needs --init-from"));
    free(text);
}

// ----------------------------------------------------------------------------
// Start and end

static void write_texts(void) {
    FILE* file = open_or_fail("filler.txt", "wb");
    static const char* const words[] = {"ice", "stone", "over",  "under", "a",
                                        "the", "sea",   "field", "cold",  "runs"};
    for (int i = 0; i < 20000; i++)
        fprintf(file, "%s%s", words[(int)(10 * random_uniform(5, 5, (uint64_t)i))], i % 9 == 8 ? ".\n" : " ");
    fclose(file);
    file = open_or_fail("text.txt", "wb");
    for (int i = 0; i < 300; i++)
        fprintf(
            file,
            " The old river follows the quiet garden. The green window remembers the small teacher. The "
            "heavy "
            "village crosses the early road. The distant letter leaves the plain engine. The narrow mountain "
            "watches the warm market. The bright bridge carries the slow winter. The old road reaches "
            "changes "
            "joins needs passes holds the code. Code");
    fclose(file);
}

static int begin(void** state) {
    (void)state;
    const char* build = getenv("BUILD");
    if (!getcwd(top, sizeof(top)) || !realpath(build ? build : "build", programs)) return -1;
    if (!mkdtemp(directory) || chdir(directory) != 0) return -1;
    write_texts();
    must_run("%s/tokenizer train --vocab-size 384 -o small.json text.txt", programs);
    Tokenizer* tokenizer = tokenizer_load("small.json");
    vocabulary = tokenizer_vocab_size(tokenizer);
    tokenizer_free(tokenizer);
    return 0;
}

static int end(void** state) {
    (void)state;
    char line[PATH_MAX + 16];
    snprintf(line, sizeof(line), "rm -rf %s", directory);
    return chdir(top) == 0 ? system(line) : -1;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(samples_are_what_the_index_says),
        cmocka_unit_test(training_windows_are_samples_too),
        cmocka_unit_test(a_key_that_the_filler_has_is_not_used),
        cmocka_unit_test(training_and_evaluation_share_no_pair),
        cmocka_unit_test(the_seed_decides),
        cmocka_unit_test(bad_command_lines_and_files),
        cmocka_unit_test(a_stop_keeps_the_earlier_run),
        cmocka_unit_test(a_scripted_model),
        cmocka_unit_test(bad_indices),
        cmocka_unit_test(a_small_model_learns),
        cmocka_unit_test(evaluation_needs_a_model),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
