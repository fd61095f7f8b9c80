/*
The command `retrieval` writes a synthetic task for long contexts. A sample is filler text with key-value
pairs in it. Its last words ask for the value of one key, the needle; that value is the answer. The task is a
small version of S-NIAH (RULER, arXiv 2404.06654).

    build/retrieval -t tokenizer.json --lengths 256,1024 --pairs 4 --samples 20000 --output-prefix data/needle
    build/train_gpt -i 'data/needle_256_train_*.bin' -j 'data/needle_256_val_*.bin' \
        --tokenizer tokenizer.json -t 256 ...
    build/train_gpt --eval-retrieval data/needle --init-from runs/needle

It writes shards as the command `tokenizer` does (tokenizer/shards.h). docs/retrieval.md describes the files,
and runtime/retrieval.h reads them.

A sample of length T is T tokens: <|endoftext|>, filler with the pairs in it, the question, the answer. A
shard of N samples is N T + 1 tokens: the samples and a last <|endoftext|>. The loader's windows have T + 1
tokens at a stride of T, so each window is one sample and the first token of the next one, which is only a
target.

A hash of key and value decides whether a pair is for training or for evaluation. The hash does not depend on
the seed or the options, so no pair of any training shard is ever in an evaluation shard.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // memmem
#endif
#include <argp.h>
#include "runtime/checks.h"      // defines fail, fail_usage, scratch_path_begin
#include "runtime/json.h"        // defines json_add_whole, json_add_double
#include "runtime/random.h"      // defines random_uniform, random_stream
#include "tokenizer/output.h"    // defines standard_files_reserve
#include "tokenizer/shards.h"    // defines ShardSet
#include "tokenizer/stop.h"      // defines stop_on_signals
#include "tokenizer/tokenizer.h" // defines Tokenizer, TokenBuffer

enum { MOST_LENGTHS = 32, MOST_DEPTHS = 101, MOST_PAIRS = 1000, WORD_BYTES = 64 };

typedef struct {
    const char *tokenizer, *filler, *output_prefix, *template_text;
    const char *key_alphabet, *value_alphabet;
    int lengths[MOST_LENGTHS], length_count;
    double depths[MOST_DEPTHS];
    int depth_count;
    int key_length, value_length; // characters
    int pairs;                    // in a sample, including the needle
    long samples;                 // of training, for each length
    long evaluation_samples;      // for each length and depth
    uint64_t seed;
    int quiet;
} Settings;

// ----------------------------------------------------------------------------
// Random draws: each sample has its own sequence of draws

typedef struct {
    uint64_t seed, stream, next;
} Draws;

static Draws draws_of_sample(uint64_t seed, const char* split, int length, long sample) {
    char name[64];
    snprintf(name, sizeof(name), "retrieval %s %d", split, length);
    Draws draws = {seed, random_stream(name), (uint64_t)sample << 24};
    return draws;
}

static double draw_uniform(Draws* draws) { return random_uniform(draws->seed, draws->stream, draws->next++); }

// Draws one of 0..count-1.
static int draw_below(Draws* draws, int count) { return (int)(draw_uniform(draws) * count); }

// ----------------------------------------------------------------------------
// Filler: generated sentences, or pieces of a text

static const char* const filler_words[][12] = {
    {"old", "quiet", "green", "small", "heavy", "early", "distant", "plain", "narrow", "warm", "bright",
     "slow"},
    {"river", "garden", "window", "teacher", "village", "road", "letter", "engine", "mountain", "market",
     "bridge", "winter"},
    {"follows", "remembers", "crosses", "leaves", "watches", "carries", "reaches", "changes", "joins",
     "needs", "passes", "holds"},
};

static void append_text(ByteBuffer* text, const char* words) {
    byte_buffer_append(text, words, strlen(words));
}

static void filler_sentence(ByteBuffer* text, Draws* draws) {
    static const int order[] = {0, 1, 2, 0, 1}; // the old river follows the green road
    append_text(text, " The");
    for (int i = 0; i < 5; i++) {
        if (i == 3) append_text(text, " the");
        append_text(text, " ");
        append_text(text, filler_words[order[i]][draw_below(draws, 12)]);
    }
    append_text(text, ".");
}

// The inputs of all samples.
typedef struct {
    const Settings* settings;
    Tokenizer* tokenizer;
    int32_t end_of_text;
    TokenBuffer file; // the tokens of --filler
    // The template's parts: before the key, between key and value, after the value. A space
    // directly before the key or the value is not in the part: it is encoded with the key
    // (key_space) or the value (value_space).
    char before[WORD_BYTES], between[WORD_BYTES], after[WORD_BYTES];
    int key_space, value_space;
} Generator;

// Draws exactly `count` tokens of filler. From a file, training uses the first nine
// tenths and evaluation the last tenth.
static void draw_filler(TokenBuffer* out, const Generator* generator, int count, int split, Draws* draws) {
    out->count = 0;
    if (generator->settings->filler) {
        const size_t border = generator->file.count / 10 * 9;
        const size_t first = split == SHARD_TRAIN ? 0 : border;
        const size_t held = split == SHARD_TRAIN ? border : generator->file.count - border;
        if (held < (size_t)count)
            fail("%s: too short: %zu tokens for %s, a sample needs %d", generator->settings->filler, held,
                 split == SHARD_TRAIN ? "training" : "evaluation", count);
        size_t start = first + (size_t)(draw_uniform(draws) * (double)(held - (size_t)count + 1));
        token_buffer_append(out, generator->file.ids + start, (size_t)count);
        return;
    }
    ByteBuffer text = {NULL, 0, 0};
    while (out->count < (size_t)count) {
        text.count = out->count = 0;
        for (int i = 0; i < count / 4 + 1; i++) filler_sentence(&text, draws);
        tokenizer_encode(generator->tokenizer, text.data, text.count, 0, out);
    }
    out->count = (size_t)count;
    byte_buffer_free(&text);
}

// ----------------------------------------------------------------------------
// Pairs

typedef struct {
    char key[WORD_BYTES], value[WORD_BYTES];
} Pair;

// The split that a pair belongs to. One pair in eight belongs to evaluation.
static int pair_split(const Pair* pair) {
    char text[2 * WORD_BYTES + 1];
    snprintf(text, sizeof(text), "%.63s=%.63s", pair->key, pair->value);
    uint64_t bits[2];
    random_bits(bits, 0, random_stream("retrieval split"), random_stream(text));
    return bits[0] % 8 == 0 ? SHARD_VALIDATION : SHARD_TRAIN;
}

static void draw_word(char* word, const char* alphabet, int length, Draws* draws) {
    const int letters = (int)strlen(alphabet);
    for (int i = 0; i < length; i++) word[i] = alphabet[draw_below(draws, letters)];
    word[length] = 0;
}

// Draws pairs of one split, without a repeated key or value.
static void draw_pairs(Pair* pairs, const Settings* settings, int split, Draws* draws) {
    int tries = 0;
    for (int i = 0; i < settings->pairs;) {
        draw_word(pairs[i].key, settings->key_alphabet, settings->key_length, draws);
        draw_word(pairs[i].value, settings->value_alphabet, settings->value_length, draws);
        int usable = pair_split(&pairs[i]) == split;
        for (int j = 0; j < i && usable; j++)
            usable = strcmp(pairs[i].key, pairs[j].key) && strcmp(pairs[i].value, pairs[j].value);
        if (usable) i++;
        else if (++tries > 100000)
            fail_usage("--pairs %d: alphabets and lengths give too few keys or values", settings->pairs);
    }
}

// ----------------------------------------------------------------------------
// Samples

// The tokens of the template with one pair filled in. The value's tokens are
// value_at .. value_at + value_count - 1.
typedef struct {
    TokenBuffer tokens;
    size_t value_at, value_count;
} Statement;

static void encode_part(const Generator* generator, TokenBuffer* out, int space, const char* text) {
    char spaced[WORD_BYTES + 2];
    snprintf(spaced, sizeof(spaced), "%s%s", space ? " " : "", text);
    tokenizer_encode(generator->tokenizer, spaced, strlen(spaced), 0, out);
}

// Encodes the statement of a pair, part by part, so that a value has the same
// tokens in its statement and as the answer.
static void state_pair(Statement* statement, const Generator* generator, const Pair* pair) {
    TokenBuffer* out = &statement->tokens;
    out->count = 0;
    encode_part(generator, out, 0, generator->before);
    encode_part(generator, out, generator->key_space, pair->key);
    encode_part(generator, out, 0, generator->between);
    statement->value_at = out->count;
    encode_part(generator, out, generator->value_space, pair->value);
    statement->value_count = out->count - statement->value_at;
    encode_part(generator, out, 0, generator->after);
}

typedef struct {
    TokenBuffer tokens; // (length)
    Pair pair;          // the needle's
    int needle_offset, needle_tokens, answer_offset, answer_tokens;
} Sample;

// Workspace of one sample.
typedef struct {
    Pair pairs[MOST_PAIRS];
    Statement statements[MOST_PAIRS];
    int side[MOST_PAIRS]; // of each distractor (a pair that is not the needle): 0 before, 1 after the needle
    TokenBuffer filler;
} Workspace;

// Divides the distractors between the two sides of the needle, by their room.
// Returns 0 if they do not fit, else 1.
static int choose_sides(Workspace* work, int pairs, int room[2], Draws* draws) {
    for (int i = 1; i < pairs; i++) {
        const int needed = (int)work->statements[i].tokens.count;
        const int possible[2] = {room[0] >= needed, room[1] >= needed};
        if (!possible[0] && !possible[1]) return 0;
        int side = draw_uniform(draws) * (room[0] + room[1]) < room[0] ? 0 : 1;
        if (!possible[side]) side = 1 - side;
        work->side[i] = side;
        room[side] -= needed;
    }
    return 1;
}

// Appends one side: its distractors in their order, at random places in `filler` tokens of filler. The filler
// starts at index *used of work->filler.
static void append_side(Sample* sample, Workspace* work, int pairs, int side, int filler, size_t* used,
                        Draws* draws) {
    int left = 0;
    for (int i = 1; i < pairs; i++) left += work->side[i] == side;
    for (int i = 1; i < pairs; i++) {
        if (work->side[i] != side) continue;
        // The smallest of `left` uniform random places.
        int gap = (int)((filler + 1) * (1 - pow(draw_uniform(draws), 1.0 / left--)));
        token_buffer_append(&sample->tokens, work->filler.ids + *used, (size_t)gap);
        *used += (size_t)gap;
        filler -= gap;
        token_buffer_append(&sample->tokens, work->statements[i].tokens.ids,
                            work->statements[i].tokens.count);
    }
    token_buffer_append(&sample->tokens, work->filler.ids + *used, (size_t)filler);
    *used += (size_t)filler;
}

static int count_text(const ByteBuffer* text, const ByteBuffer* wanted) {
    int count = 0;
    const char *at = text->data, *end = text->data + text->count;
    while ((at = (const char*)memmem(at, (size_t)(end - at), wanted->data, wanted->count))) {
        count++;
        at++;
    }
    return count;
}

// 1 if the text that states the key occurs exactly twice: in the statement and in the question. It must not
// occur in the filler or across a border of the filler.
static int key_is_unique(const Generator* generator, const Sample* sample) {
    ByteBuffer text = {NULL, 0, 0}, wanted = {NULL, 0, 0};
    tokenizer_decode(generator->tokenizer, sample->tokens.ids, sample->tokens.count, &text);
    append_text(&wanted, generator->before);
    append_text(&wanted, generator->key_space ? " " : "");
    append_text(&wanted, sample->pair.key);
    append_text(&wanted, generator->between);
    int count = count_text(&text, &wanted);
    byte_buffer_free(&text);
    byte_buffer_free(&wanted);
    return count == 2;
}

// One attempt to make a sample with the needle at `depth`: 0 is after the first token, 1 before the question.
// Returns 0 if the pairs do not fit or the key is not unique.
static int try_sample(Sample* sample, Workspace* work, const Generator* generator, int length, double depth,
                      int split, Draws* draws) {
    const int pairs = generator->settings->pairs;
    draw_pairs(work->pairs, generator->settings, split, draws);
    for (int i = 0; i < pairs; i++) state_pair(&work->statements[i], generator, &work->pairs[i]);
    const Statement* needle = &work->statements[0];
    const int question = (int)(needle->value_at + needle->value_count); // the statement up to its value
    const int rest = length - 1 - question - (int)needle->tokens.count;
    if (rest < 0) return 0;
    const int before = (int)(depth * rest + 0.5);
    int room[2] = {before, rest - before};
    if (!choose_sides(work, pairs, room, draws)) return 0;
    draw_filler(&work->filler, generator, room[0] + room[1], split, draws);

    size_t used = 0;
    sample->pair = work->pairs[0];
    sample->tokens.count = 0;
    token_buffer_append(&sample->tokens, &generator->end_of_text, 1);
    append_side(sample, work, pairs, 0, room[0], &used, draws);
    sample->needle_offset = (int)sample->tokens.count;
    sample->needle_tokens = (int)needle->tokens.count;
    token_buffer_append(&sample->tokens, needle->tokens.ids, needle->tokens.count);
    append_side(sample, work, pairs, 1, room[1], &used, draws);
    sample->answer_offset = (int)(sample->tokens.count + needle->value_at);
    sample->answer_tokens = (int)needle->value_count;
    token_buffer_append(&sample->tokens, needle->tokens.ids, (size_t)question);
    return key_is_unique(generator, sample);
}

static void make_sample(Sample* sample, Workspace* work, const Generator* generator, int length, double depth,
                        int split, Draws* draws) {
    for (int tries = 0; tries < 1000; tries++)
        if (try_sample(sample, work, generator, length, depth, split, draws)) return;
    fail_usage("--lengths %d: too short for %d pairs, with the needle at depth %g", length,
               generator->settings->pairs, depth);
}

// ----------------------------------------------------------------------------
// Files

static void write_index_line(FILE* index, const char* path, const Sample* sample, long sequence, int length,
                             double depth, int pairs) {
    cJSON* line = cJSON_CreateObject();
    json_add_whole(line, "length", length);
    json_add_whole(line, "sequence", sequence);
    json_add_double(line, "depth", depth);
    json_add_whole(line, "pairs", pairs);
    json_add_whole(line, "needle_offset", sample->needle_offset);
    json_add_whole(line, "needle_tokens", sample->needle_tokens);
    json_add_whole(line, "answer_offset", sample->answer_offset);
    json_add_whole(line, "answer_tokens", sample->answer_tokens);
    cJSON_AddStringToObject(line, "key", sample->pair.key);
    cJSON_AddStringToObject(line, "value", sample->pair.value);
    char* text = cJSON_PrintUnformatted(line);
    if (!text) fail("out of memory: a line of %s", path);
    write_or_fail(text, strlen(text), index, path);
    write_or_fail("\n", 1, index, path);
    cJSON_free(text);
    cJSON_Delete(line);
}

// Writes the shards of one length. The needle is at a random depth in training samples, and
// at the given depths in evaluation samples.
static void write_length(ShardSet* shards, const Generator* generator, Workspace* work, int length,
                         FILE* index, const char* index_path) {
    const Settings* settings = generator->settings;
    Sample sample;
    memset(&sample, 0, sizeof(sample));
    for (long i = 0; i < settings->samples; i++) {
        Draws draws = draws_of_sample(settings->seed, "train", length, i);
        double depth = draw_uniform(&draws);
        make_sample(&sample, work, generator, length, depth, SHARD_TRAIN, &draws);
        shard_set_write(shards, SHARD_TRAIN, sample.tokens.ids, sample.tokens.count);
    }
    const long evaluation = settings->evaluation_samples * settings->depth_count;
    for (long i = 0; i < evaluation; i++) {
        Draws draws = draws_of_sample(settings->seed, "evaluation", length, i);
        double depth = settings->depths[i % settings->depth_count];
        make_sample(&sample, work, generator, length, depth, SHARD_VALIDATION, &draws);
        shard_set_write(shards, SHARD_VALIDATION, sample.tokens.ids, sample.tokens.count);
        write_index_line(index, index_path, &sample, i, length, depth, settings->pairs);
    }
    if (settings->samples) shard_set_write(shards, SHARD_TRAIN, &generator->end_of_text, 1);
    shard_set_write(shards, SHARD_VALIDATION, &generator->end_of_text, 1);
    token_buffer_free(&sample.tokens);
    if (!settings->quiet)
        fprintf(stderr, "%s: %ld training and %ld evaluation samples of %d tokens\n", shards->prefix,
                settings->samples, evaluation, length);
}

// Writes all files in one scratch directory and publishes them together, the index last.
static void write_all(const Generator* generator) {
    const Settings* settings = generator->settings;
    char scratch[PATH_MAX], prefix[PATH_MAX], index_scratch[PATH_MAX], index_path[PATH_MAX];
    ShardSet* sets =
        (ShardSet*)malloc_or_fail(sizeof(ShardSet) * (size_t)settings->length_count, "the shards");
    Workspace* work = (Workspace*)calloc_or_fail(1, sizeof(Workspace), "samples");
    shard_scratch_begin(scratch, settings->output_prefix);
    path_format(index_path, "%s_index.jsonl", settings->output_prefix);
    path_format(index_scratch, "%s/index.jsonl", scratch);
    FILE* index = scratch_open_or_fail(index_scratch);
    for (int i = 0; i < settings->length_count; i++) {
        const int length = settings->lengths[i];
        path_format(prefix, "%s_%d", settings->output_prefix, length);
        shard_set_begin(&sets[i], scratch, prefix, tokenizer_vocab_size(generator->tokenizer),
                        tokenizer_hash(generator->tokenizer), INT32_MAX);
        write_length(&sets[i], generator, work, length, index, index_path);
        shard_set_finish(&sets[i]);
    }
    close_written_or_fail(index, index_path);
    shard_sets_publish(sets, settings->length_count, index_scratch, index_path);
    for (int i = 0; i < settings->pairs; i++) token_buffer_free(&work->statements[i].tokens);
    token_buffer_free(&work->filler);
    free(work);
    free(sets);
}

// ----------------------------------------------------------------------------
// The command line

enum {
    KEY_LENGTHS = 256,
    KEY_DEPTHS,
    KEY_SAMPLES,
    KEY_EVALUATION_SAMPLES,
    KEY_PAIRS,
    KEY_FILLER,
    KEY_TEMPLATE,
    KEY_KEY_ALPHABET,
    KEY_KEY_LENGTH,
    KEY_VALUE_ALPHABET,
    KEY_VALUE_LENGTH,
    KEY_SEED,
    KEY_OUTPUT_PREFIX
};

static const struct argp_option settings_table[] = {
    {"tokenizer", 't', "FILE", 0, "Tokenizer (required)", 1},
    {"output-prefix", KEY_OUTPUT_PREFIX, "DIR/NAME", 0,
     "Write DIR/NAME_LENGTH_train_000000.bin, DIR/NAME_LENGTH_val_000000.bin and DIR/NAME_index.jsonl "
     "(required)",
     1},
    {"lengths", KEY_LENGTHS, "T,...", 0, "Tokens of a sample. Default: 256,512,1024", 1},
    {"depths", KEY_DEPTHS, "F,...", 0,
     "Where evaluation samples have their needle, from 0, the beginning, to 1. Default: 0,0.25,0.5,0.75,1",
     1},
    {"samples", KEY_SAMPLES, "N", 0, "Training samples of each length. Default: 10000", 1},
    {"evaluation-samples", KEY_EVALUATION_SAMPLES, "N", 0,
     "Evaluation samples of each length and depth. Default: 50", 1},
    {"pairs", KEY_PAIRS, "N", 0, "Pairs in a sample, with the one asked for. Default: 4", 1},
    {"filler", KEY_FILLER, "FILE", 0, "Text between the pairs. Default: sentences made up here", 1},
    {"template", KEY_TEMPLATE, "TEXT", 0,
     "How a pair is stated; the question is its part up to {value}. Default: ' The code of {key} is "
     "{value}.'",
     1},
    {"key-alphabet", KEY_KEY_ALPHABET, "CHARS", 0, "Default: a to z", 1},
    {"key-length", KEY_KEY_LENGTH, "N", 0, "Characters of a key. Default: 4", 1},
    {"value-alphabet", KEY_VALUE_ALPHABET, "CHARS", 0, "Default: 0 to 9", 1},
    {"value-length", KEY_VALUE_LENGTH, "N", 0, "Characters of a value. Default: 4", 1},
    {"seed", KEY_SEED, "N", 0, "Default: 1337", 1},
    {"quiet", 'q', 0, 0, "Say nothing", 1},
    {0, 0, 0, 0, 0, 0},
};

static long parse_whole(const char* option, const char* text, long low, long high) {
    char* end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || *end || errno || value < low || value > high)
        fail_usage("--%s %s: must be a whole number from %ld to %ld", option, text, low, high);
    return value;
}

// Reads numbers separated by commas, each in low..high; returns their number.
static int parse_list(double* values, int most, const char* option, const char* list, double low,
                      double high) {
    int count = 0;
    for (const char* text = list;; text++) {
        char* end;
        double value = strtod(text, &end);
        if (end == text || (*end && *end != ',') || !(value >= low && value <= high))
            fail_usage("--%s %s: want numbers from %g to %g, separated by commas", option, list, low, high);
        if (count == most) fail_usage("--%s: at most %d", option, most);
        for (int i = 0; i < count; i++)
            if (values[i] == value) fail_usage("--%s %s: %g is there twice", option, list, value);
        values[count++] = value;
        text = end;
        if (!*text) return count;
    }
}

static void parse_lengths(Settings* settings, const char* list) {
    double values[MOST_LENGTHS];
    settings->length_count = parse_list(values, MOST_LENGTHS, "lengths", list, 8, 1 << 24);
    for (int i = 0; i < settings->length_count; i++) {
        settings->lengths[i] = (int)values[i];
        if (values[i] != settings->lengths[i]) fail_usage("--lengths %s: want whole numbers", list);
    }
}

static const char* parse_alphabet(const char* option, const char* text) {
    if (!text[0] || strlen(text) > 200) fail_usage("--%s: want 1 to 200 characters", option);
    for (const char* c = text; *c; c++) {
        if (*c <= ' ' || *c > '~') fail_usage("--%s %s: want printable ASCII, no spaces", option, text);
        if (strchr(c + 1, *c)) fail_usage("--%s %s: %c is there twice", option, text, *c);
    }
    return text;
}

static error_t settings_parse(int key, char* text, struct argp_state* state) {
    Settings* settings = (Settings*)state->input;
    switch (key) {
    case 't':
        settings->tokenizer = text;
        break;
    case KEY_OUTPUT_PREFIX:
        settings->output_prefix = text;
        break;
    case KEY_LENGTHS:
        parse_lengths(settings, text);
        break;
    case KEY_DEPTHS:
        settings->depth_count = parse_list(settings->depths, MOST_DEPTHS, "depths", text, 0, 1);
        break;
    case KEY_SAMPLES:
        settings->samples = parse_whole("samples", text, 0, INT_MAX);
        break;
    case KEY_EVALUATION_SAMPLES:
        settings->evaluation_samples = parse_whole("evaluation-samples", text, 1, 1 << 24);
        break;
    case KEY_PAIRS:
        settings->pairs = (int)parse_whole("pairs", text, 1, MOST_PAIRS);
        break;
    case KEY_FILLER:
        settings->filler = text;
        break;
    case KEY_TEMPLATE:
        settings->template_text = text;
        break;
    case KEY_KEY_ALPHABET:
        settings->key_alphabet = parse_alphabet("key-alphabet", text);
        break;
    case KEY_KEY_LENGTH:
        settings->key_length = (int)parse_whole("key-length", text, 1, WORD_BYTES - 2);
        break;
    case KEY_VALUE_ALPHABET:
        settings->value_alphabet = parse_alphabet("value-alphabet", text);
        break;
    case KEY_VALUE_LENGTH:
        settings->value_length = (int)parse_whole("value-length", text, 1, WORD_BYTES - 2);
        break;
    case KEY_SEED:
        settings->seed = (uint64_t)parse_whole("seed", text, 0, LONG_MAX);
        break;
    case 'q':
        settings->quiet = 1;
        break;
    case ARGP_KEY_ARG:
        fail_usage("%s: not an option", text);
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

// Copies text..end without a closing space (unless may_end_in_space); returns whether it dropped a space.
static int copy_part(char part[WORD_BYTES], const char* text, const char* end, const char* whole,
                     int may_end_in_space) {
    size_t length = (size_t)(end - text);
    if (length >= WORD_BYTES)
        fail_usage("--template %s: no part may have more than %d bytes", whole, WORD_BYTES - 1);
    memcpy(part, text, length);
    part[length] = 0;
    if (may_end_in_space || !length || part[length - 1] != ' ') return 0;
    part[length - 1] = 0;
    return 1;
}

static void parse_template(Generator* generator) {
    const char *whole = generator->settings->template_text, *key = strstr(whole, "{key}");
    const char* value = key ? strstr(key + 5, "{value}") : NULL;
    if (!value) fail_usage("--template %s: must have {key} and, behind it, {value}", whole);
    generator->key_space = copy_part(generator->before, whole, key, whole, 0);
    generator->value_space = copy_part(generator->between, key + 5, value, whole, 0);
    copy_part(generator->after, value + 7, value + strlen(value), whole, 1);
    if (!generator->between[0] && !generator->value_space)
        fail_usage("--template %s: something must stand between {key} and {value}", whole);
}

static void check_settings(const Settings* settings) {
    const char* prefix = settings->output_prefix;
    if (!settings->tokenizer || !prefix)
        fail_usage("%s is required (needed are --tokenizer FILE and --output-prefix DIR/NAME; --help lists "
                   "the options)",
                   settings->tokenizer ? "--output-prefix DIR/NAME" : "--tokenizer FILE");
    if (!*prefix || prefix[strlen(prefix) - 1] == '/')
        fail_usage("--output-prefix %s: must end in a name", prefix);
    const long evaluation = settings->evaluation_samples * settings->depth_count;
    const long most = settings->samples > evaluation ? settings->samples : evaluation;
    for (int i = 0; i < settings->length_count; i++)
        if (most > (INT32_MAX - 1) / settings->lengths[i])
            fail_usage("--samples %ld: a shard holds %d samples of %d tokens", most,
                       (INT32_MAX - 1) / settings->lengths[i], settings->lengths[i]);
}

int main(int argc, char** argv) {
    program_name = "retrieval";
    standard_files_reserve();
    stop_on_signals();
    static Settings settings;
    settings.template_text = " The code of {key} is {value}.";
    settings.key_alphabet = "abcdefghijklmnopqrstuvwxyz";
    settings.value_alphabet = "0123456789";
    settings.key_length = settings.value_length = 4;
    settings.pairs = 4;
    settings.samples = 10000;
    settings.evaluation_samples = 50;
    settings.seed = 1337;
    parse_lengths(&settings, "256,512,1024");
    settings.depth_count = parse_list(settings.depths, MOST_DEPTHS, "depths", "0,0.25,0.5,0.75,1", 0, 1);
    const struct argp parser = {
        settings_table, settings_parse, 0, "Plants key-value pairs in filler text.", 0, 0, 0};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, 0, &settings);
    check_settings(&settings);

    static Generator generator;
    generator.settings = &settings;
    parse_template(&generator);
    generator.tokenizer = tokenizer_load(settings.tokenizer);
    generator.end_of_text = tokenizer_special_id(generator.tokenizer, "<|endoftext|>");
    if (generator.end_of_text < 0)
        fail("%s: has no special token <|endoftext|>, which goes before every sample", settings.tokenizer);
    if (settings.filler) {
        size_t bytes;
        char* text = read_file_or_fail(settings.filler, &bytes);
        tokenizer_encode(generator.tokenizer, text, bytes, 0, &generator.file);
        free(text);
    }
    write_all(&generator);
    token_buffer_free(&generator.file);
    tokenizer_free(generator.tokenizer);
    return 0;
}
