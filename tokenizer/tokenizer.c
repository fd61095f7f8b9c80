/*
The command `tokenizer`: trains, encodes, decodes, and prepares text as token shards. `tokenizer --help` lists
the commands, `tokenizer COMMAND --help` their options. docs/tokenizer.md has examples.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // memmem
#endif
#include "runtime/checks.h"      // fail, fail_usage, scratch_path_*
#include "tokenizer/documents.h" // DocumentReader, DocumentBatch
#include "tokenizer/output.h"    // OutputFile, standard_files_reserve
#include "tokenizer/shards.h"    // ShardSet
#include "tokenizer/stop.h"      // stop_on_signals
#include "tokenizer/tokenizer.h" // Tokenizer

#include <argp.h>
#include <omp.h>
#include <time.h>

enum { BATCH_BYTES = 16 << 20 };

// ----------------------------------------------------------------------------
// Progress on stderr: one live line on a terminal, else a plain line every ten seconds

typedef struct {
    const char* what;
    int quiet, terminal;
    double started, shown;
} Progress;

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static Progress progress_begin(const char* what, int quiet) {
    Progress progress = {what, quiet, isatty(STDERR_FILENO), seconds_now(), 0};
    progress.shown = progress.terminal ? 0 : progress.started;
    return progress;
}

static void progress_show(Progress* progress, double part, int last, const char* note) {
    double now = seconds_now(), elapsed = now - progress->started;
    if (progress->quiet || (!last && now - progress->shown < (progress->terminal ? 0.1 : 10))) return;
    progress->shown = now;
    char bar[25], remaining[32] = "";
    part = part > 1 ? 1 : part > 0 ? part : 0; // NaN if the size of the input is unknown
    for (int i = 0; i < 24; i++) bar[i] = i < part * 24 ? '#' : '.';
    bar[24] = 0;
    if (!last && part > 0.02)
        snprintf(remaining, sizeof(remaining), ", %.0f s left", elapsed / part - elapsed);
    if (progress->terminal)
        fprintf(stderr, "\r\033[K%s [%s] %3.0f%% %s%s", progress->what, bar, part * 100, note, remaining);
    else fprintf(stderr, "%s %3.0f%% %s%s", progress->what, part * 100, note, remaining);
    if (last || !progress->terminal) fprintf(stderr, " (%.1f s)\n", elapsed);
    live_line_shown = progress->terminal && !last;
}

// ----------------------------------------------------------------------------
// Options: every command takes some of these

typedef struct {
    const char** names;
    size_t count, capacity;
} NameList;

static void name_list_add(NameList* list, const char* name) {
    list->names =
        (const char**)array_reserve((void*)list->names, &list->capacity, list->count + 1, sizeof(char*));
    list->names[list->count++] = name;
}

typedef struct {
    const char* command; // "tokenizer train"
    const char *tokenizer, *output, *output_prefix, *text_key;
    char* separator;
    const SplitPattern* pattern;
    const char** specials;
    int special_count, no_specials;
    int64_t vocab_size, min_count, max_bytes, shard_tokens;
    double validation_fraction;              // -1: not given
    NameList names, lists, validation_names; // as the user gave them
    FileList files, validation_files;        // the files of these names; gather_files() fills them
    int allow_special, binary, include_binary, quiet, threads;
} Options;

enum {
    OPTION_VOCAB_SIZE = 256,
    OPTION_PATTERN,
    OPTION_SPECIAL,
    OPTION_NO_SPECIAL,
    OPTION_MIN_COUNT,
    OPTION_MAX_BYTES,
    OPTION_SEPARATOR,
    OPTION_TEXT_KEY,
    OPTION_FILES_FROM,
    OPTION_OUTPUT_PREFIX,
    OPTION_SHARD_TOKENS,
    OPTION_VALIDATION_FRACTION,
    OPTION_VALIDATION,
    OPTION_ALLOW_SPECIAL,
    OPTION_BINARY,
    OPTION_INCLUDE_BINARY,
    OPTION_THREADS
};

// Reads a whole number; k, M and G stand for 10^3, 10^6 and 10^9.
static int64_t parse_number(const char* option, const char* text, int64_t least, int64_t most) {
    char* end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    int64_t unit = 1;
    if (*end == 'k' || *end == 'K') unit = 1000;
    else if (*end == 'M') unit = 1000000;
    else if (*end == 'G') unit = 1000000000;
    int malformed = end == text || end[unit > 1] != 0 || errno;
    if (malformed || number > most / unit || number * unit < least)
        fail_usage("%s %s: must be a whole number from %lld to %lld (k, M and G stand for 10^3, 10^6, 10^9)",
                   option, text, (long long)least, (long long)most);
    return number * unit;
}

static double parse_fraction(const char* option, const char* text) {
    char* end;
    double fraction = strtod(text, &end);
    if (end == text || *end || !(fraction >= 0 && fraction < 1))
        fail_usage("%s %s: must be a number from 0 up to, but not, 1", option, text);
    return fraction;
}

// Reads a separator; the command line has \n, \r, \t and \\ as two characters.
static char* parse_separator(const char* text) {
    char *separator = (char*)malloc_or_fail(strlen(text) + 1, "the separator"), *out = separator;
    for (; *text; text++) {
        char escaped = *text == '\\' ? text[1] : 0;
        if (escaped == 'n') *out++ = '\n';
        else if (escaped == 'r') *out++ = '\r';
        else if (escaped == 't') *out++ = '\t';
        else if (escaped == '\\') *out++ = '\\';
        else *out++ = *text;
        if (escaped && strchr("nrt\\", escaped)) text++;
    }
    *out = 0;
    if (!separator[0]) fail_usage("--separator: must not be empty");
    return separator;
}

static void parse_special(Options* options, const char* text) {
    size_t length = strlen(text);
    if (length < 2 || utf8_valid_prefix(text, length) != length)
        fail_usage("--special %s: must be UTF-8 text of at least two bytes", text);
    for (int s = 0; s < options->special_count; s++)
        if (!strcmp(options->specials[s], text)) fail_usage("--special %s: is given twice", text);
    options->specials = (const char**)realloc_or_fail(
        (void*)options->specials, sizeof(char*) * (size_t)(options->special_count + 1), "the special tokens");
    options->specials[options->special_count++] = text;
}

static const SplitPattern* parse_pattern(const char* text) {
    const SplitPattern* pattern = split_pattern_by_name(text);
    if (!pattern) fail_usage("--pattern %s: must be cl100k or gpt2", text);
    return pattern;
}

static error_t parse_option(int key, char* argument, struct argp_state* state) {
    Options* options = (Options*)state->input;
    switch (key) {
    case 't':
        options->tokenizer = argument;
        break;
    case 'o':
        options->output = argument;
        break;
    case 'q':
        options->quiet = 1;
        break;
    case OPTION_VOCAB_SIZE:
        options->vocab_size = parse_number("--vocab-size", argument, 256, VOCABULARY_MAX_ID);
        break;
    case OPTION_PATTERN:
        options->pattern = parse_pattern(argument);
        break;
    case OPTION_SPECIAL:
        parse_special(options, argument);
        break;
    case OPTION_NO_SPECIAL:
        options->no_specials = 1;
        break;
    case OPTION_MIN_COUNT:
        options->min_count = parse_number("--min-count", argument, 1, INT64_MAX);
        break;
    case OPTION_MAX_BYTES:
        options->max_bytes = parse_number("--max-bytes", argument, 1, INT64_MAX);
        break;
    case OPTION_SEPARATOR:
        options->separator = parse_separator(argument);
        break;
    case OPTION_TEXT_KEY:
        options->text_key = argument;
        break;
    case OPTION_FILES_FROM:
        name_list_add(&options->lists, argument);
        break;
    case OPTION_OUTPUT_PREFIX:
        options->output_prefix = argument;
        break;
    case OPTION_SHARD_TOKENS:
        options->shard_tokens = parse_number("--shard-tokens", argument, 1, INT32_MAX);
        break;
    case OPTION_VALIDATION_FRACTION:
        options->validation_fraction = parse_fraction("--validation-fraction", argument);
        break;
    case OPTION_VALIDATION:
        name_list_add(&options->validation_names, argument);
        break;
    case OPTION_ALLOW_SPECIAL:
        options->allow_special = 1;
        break;
    case OPTION_BINARY:
        options->binary = 1;
        break;
    case OPTION_INCLUDE_BINARY:
        options->include_binary = 1;
        break;
    case OPTION_THREADS:
        options->threads = (int)parse_number("--threads", argument, 1, 1024);
        break;
    case ARGP_KEY_ARG:
        name_list_add(&options->names, argument);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

#define OPTIONS_INPUT                                                                                        \
    {"files-from", OPTION_FILES_FROM, "LIST", 0, "Read also the files named in LIST, one on each line", 2},  \
        {"separator",                                                                                        \
         OPTION_SEPARATOR,                                                                                   \
         "TEXT",                                                                                             \
         0,                                                                                                  \
         "Cut files into documents at TEXT (\\n, \\r and \\t are understood). Default: a file is a "         \
         "document",                                                                                         \
         2},                                                                                                 \
        {"text-key", OPTION_TEXT_KEY, "KEY", 0, "The key of the text in *.jsonl. Default: text", 2},         \
        {"max-bytes", OPTION_MAX_BYTES, "N", 0, "Stop after N bytes of text", 2},                            \
        {"include-binary", OPTION_INCLUDE_BINARY, 0, 0, "Take files that are no text, too", 2},              \
        {"threads", OPTION_THREADS, "N", 0, "Default: one for each processor", 3}, {                         \
        "quiet", 'q', 0, 0, "No progress on stderr", 3                                                       \
    }
#define OPTION_TOKENIZER_FILE                                                                                \
    {                                                                                                        \
        "tokenizer", 't', "FILE", 0,                                                                         \
            "tokenizer.json, GPT-2's vocab.json, a .tiktoken file, or a directory. Default: tokenizer.json", \
            1                                                                                                \
    }

// Finds the files of the user's lists and names. With takes_binary, it includes files that are no text.
static void gather_files(Options* options, int takes_binary) {
    FileList *files = &options->files, *validation = &options->validation_files;
    files->takes_binary = validation->takes_binary = takes_binary;
    for (size_t i = 0; i < options->lists.count; i++) file_list_add_from(files, options->lists.names[i]);
    for (size_t i = 0; i < options->names.count; i++) file_list_add(files, options->names.names[i]);
    file_list_report(files);
    for (size_t i = 0; i < options->validation_names.count; i++)
        file_list_add(validation, options->validation_names.names[i]);
    file_list_report(validation);
}

// Fails if the command line names no input.
static void check_names(const Options* options, const char* purpose) {
    if (options->names.count + options->lists.count == 0)
        fail_usage("no FILE to %s: name text files, directories or *.jsonl; `%s --help` lists the options",
                   purpose, options->command);
}

static void check_output(const char* output) {
    if (output && (!*output || output[strlen(output) - 1] == '/'))
        fail_usage("--output %s: must name a file", output);
}

// ----------------------------------------------------------------------------
// train

static const struct argp_option train_options[] = {
    {"vocab-size", OPTION_VOCAB_SIZE, "N", 0, "With the 256 bytes and the special tokens. Default: 8192", 1},
    {"pattern", OPTION_PATTERN, "NAME", 0, "How text is cut into words: cl100k (default) or gpt2", 1},
    {"special", OPTION_SPECIAL, "TOKEN", 0, "A special token; may be repeated. Default: <|endoftext|>", 1},
    {"no-special", OPTION_NO_SPECIAL, 0, 0, "No special token at all", 1},
    {"min-count", OPTION_MIN_COUNT, "N", 0, "Merge no pair that is there less than N times. Default: 2", 1},
    {"output", 'o', "FILE", 0, "Default: tokenizer.json", 1},
    OPTIONS_INPUT,
    {0, 0, 0, 0, 0, 0}};

static Progress merge_progress;

static void show_merges(int64_t merges, int64_t wanted) {
    char note[64];
    if (merges % 64 && merges != wanted) return; // reading the clock costs time
    snprintf(note, sizeof(note), "%lld of %lld", (long long)merges, (long long)wanted);
    progress_show(&merge_progress, (double)merges / (double)wanted, merges == wanted, note);
}

// Adds the words of all documents to *counts; returns the bytes of text.
static int64_t count_words(const Options* options, WordCounts* counts) {
    int threads = omp_get_max_threads();
    WordCounts* own = (WordCounts*)calloc_or_fail((size_t)threads, sizeof(WordCounts), "the counts of words");
    WordSplitter* splitters =
        (WordSplitter*)calloc_or_fail((size_t)threads, sizeof(WordSplitter), "the splitters");
    for (int i = 0; i < threads; i++) word_splitter_init(&splitters[i], options->pattern);
    DocumentReader reader;
    DocumentBatch batch = {{NULL, 0, 0}, NULL, 0, 0};
    Progress progress = progress_begin("words ", options->quiet);
    int64_t bytes = 0;
    char note[64] = "";
    document_reader_init(&reader, &options->files, options->separator, options->text_key, options->max_bytes);
    while (document_reader_batch(&reader, BATCH_BYTES, &batch)) {
#pragma omp parallel for schedule(dynamic)
        for (size_t d = 0; d < batch.count; d++) {
            size_t length;
            const char* text = document_batch_text(&batch, d, &length);
            int thread = omp_get_thread_num();
            word_counts_add_text(&own[thread], &splitters[thread], text, length);
        }
        bytes += (int64_t)batch.text.count;
        snprintf(note, sizeof(note), "%.1f MB", (double)bytes / 1e6);
        progress_show(&progress, part_read(&reader), 0, note);
    }
    for (int i = 0; i < threads; i++) {
        word_counts_add_counts(counts, &own[i]);
        word_counts_free(&own[i]);
        word_splitter_free(&splitters[i]);
    }
    progress_show(&progress, 1, 1, note);
    document_reader_report(&reader);
    document_batch_free(&batch);
    document_reader_free(&reader);
    free(own);
    free(splitters);
    return bytes;
}

static void run_train(Options* options) {
    static const char* end_of_text = "<|endoftext|>";
    if (options->no_specials && options->special_count)
        fail_usage("--no-special and --special exclude each other");
    if (!options->no_specials && !options->special_count) parse_special(options, end_of_text);
    if (options->vocab_size < 256 + options->special_count)
        fail_usage("--vocab-size %lld: must be at least %d, the 256 bytes and the special tokens",
                   (long long)options->vocab_size, 256 + options->special_count);
    check_names(options, "train on");
    check_output(options->output);
    gather_files(options, options->include_binary);
    OutputFile output;
    output_file_open(&output, options->output ? options->output : "tokenizer.json");
    WordCounts counts;
    word_counts_init(&counts);
    int64_t bytes = count_words(options, &counts);
    if (bytes == 0) fail("no text to train on: all files are empty");
    merge_progress = progress_begin("merges", options->quiet);
    TokenizerTraining training = {(int32_t)options->vocab_size, options->min_count, options->specials,
                                  options->special_count, show_merges};
    Tokenizer* t = tokenizer_train(&counts, options->pattern, &training);
    if (tokenizer_vocab_size(t) < options->vocab_size && !options->quiet)
        fprintf(stderr,
                "%s%s: the vocabulary is %d, less than --vocab-size %lld: no more pair is there %lld times\n",
                merge_progress.terminal ? "\n" : "", program_name, tokenizer_vocab_size(t),
                (long long)options->vocab_size, (long long)options->min_count);
    tokenizer_write_json(t, output.file, output.name);
    output_file_close(&output);
    if (!options->quiet)
        fprintf(stderr, "%s: vocabulary %d, from %.1f MB of text with %zu different words\n", output.name,
                tokenizer_vocab_size(t), (double)bytes / 1e6, counts.count);
    word_counts_free(&counts);
    tokenizer_free(t);
}

// ----------------------------------------------------------------------------
// encode, decode

static const struct argp_option encode_options[] = {
    OPTION_TOKENIZER_FILE,
    {"output", 'o', "FILE", 0, "Default: standard output", 1},
    {"allow-special", OPTION_ALLOW_SPECIAL, 0, 0, "Text that spells a special token becomes that token", 1},
    {"binary", OPTION_BINARY, 0, 0,
     "Ids as little-endian uint16 (uint32 when the vocabulary is larger than 65536) instead of decimal "
     "numbers",
     1},
    {0, 0, 0, 0, 0, 0}};

static const struct argp_option decode_options[] = {
    OPTION_TOKENIZER_FILE,
    {"output", 'o', "FILE", 0, "Default: standard output", 1},
    {"binary", OPTION_BINARY, 0, 0, "The input is what encode --binary writes", 1},
    {0, 0, 0, 0, 0, 0}};

static Tokenizer* load_tokenizer(const Options* options) {
    if (!options->tokenizer && !path_exists("tokenizer.json"))
        fail_usage(
            "--tokenizer FILE: needed, since there is no tokenizer.json here; `%s --help` lists the options",
            options->command);
    return tokenizer_load(options->tokenizer ? options->tokenizer : "tokenizer.json");
}

// Reads all input files, one after the other, or standard input.
static ByteBuffer read_input(const Options* options) {
    ByteBuffer input = {NULL, 0, 0};
    const FileList* list = &options->files;
    if (!list->count && isatty(STDIN_FILENO)) warn("reads from the terminal, up to Ctrl-D");
    for (size_t i = 0; i < (list->count ? list->count : 1); i++) {
        size_t length;
        char* text = list->count ? read_file_or_fail(list->files[i].path, &length)
                                 : read_stream_or_fail(stdin, "standard input", &length);
        byte_buffer_append(&input, text, length);
        free(text);
    }
    return input;
}

static void run_encode(Options* options) {
    check_output(options->output);
    Tokenizer* t = load_tokenizer(options);
    gather_files(options, 1);
    OutputFile file;
    output_file_open(&file, options->output);
    ByteBuffer input = read_input(options), output = {NULL, 0, 0};
    TokenBuffer tokens = {NULL, 0, 0};
    size_t width = tokenizer_vocab_size(t) <= 65536 ? 2 : 4;
    char number[16];
    tokenizer_encode(t, input.data, input.count, options->allow_special, &tokens);
    for (size_t i = 0; i < tokens.count; i++) {
        if (options->binary) {
            byte_buffer_append(&output, (const char*)&tokens.ids[i],
                               width); // little-endian: the low bytes first
            continue;
        }
        int length = snprintf(number, sizeof(number), "%s%d", i ? " " : "", tokens.ids[i]);
        byte_buffer_append(&output, number, (size_t)length);
    }
    if (!options->binary) byte_buffer_append(&output, "\n", 1);
    output_file_write(&file, output.data, output.count);
    output_file_close(&file);
    byte_buffer_free(&input);
    byte_buffer_free(&output);
    token_buffer_free(&tokens);
    tokenizer_free(t);
}

static void parse_binary_ids(const ByteBuffer* input, size_t width, TokenBuffer* tokens) {
    if (input->count % width) fail("the input has %zu bytes, no multiple of %zu", input->count, width);
    for (size_t i = 0; i < input->count; i += width) {
        int32_t id = 0;
        memcpy(&id, input->data + i, width);
        token_buffer_append(tokens, &id, 1);
    }
}

static void parse_decimal_ids(const ByteBuffer* input, TokenBuffer* tokens) {
    size_t at = 0;
    for (;;) {
        while (at < input->count && strchr(" \t\r\n,", input->data[at]) && input->data[at]) at++;
        if (at == input->count) return;
        int64_t id = 0;
        size_t start = at;
        for (; at < input->count && input->data[at] >= '0' && input->data[at] <= '9' && id <= INT32_MAX; at++)
            id = 10 * id + (input->data[at] - '0');
        if (at == start || id > INT32_MAX) fail("the input is not a list of token ids: byte %zu", start);
        int32_t narrow = (int32_t)id;
        token_buffer_append(tokens, &narrow, 1);
    }
}

static void run_decode(Options* options) {
    check_output(options->output);
    Tokenizer* t = load_tokenizer(options);
    gather_files(options, 1);
    OutputFile file;
    output_file_open(&file, options->output);
    ByteBuffer input = read_input(options), output = {NULL, 0, 0};
    TokenBuffer tokens = {NULL, 0, 0};
    if (options->binary) parse_binary_ids(&input, tokenizer_vocab_size(t) <= 65536 ? 2 : 4, &tokens);
    else parse_decimal_ids(&input, &tokens);
    tokenizer_decode(t, tokens.ids, tokens.count, &output);
    output_file_write(&file, output.data, output.count);
    output_file_close(&file);
    byte_buffer_free(&input);
    byte_buffer_free(&output);
    token_buffer_free(&tokens);
    tokenizer_free(t);
}

// ----------------------------------------------------------------------------
// prepare

static const struct argp_option prepare_options[] = {
    OPTION_TOKENIZER_FILE,
    {"output-prefix", OPTION_OUTPUT_PREFIX, "DIR/NAME", 0,
     "Write DIR/NAME_train_000000.bin and so on (required)", 1},
    {"shard-tokens", OPTION_SHARD_TOKENS, "N", 0, "Tokens in a shard. Default: 100M", 1},
    {"validation-fraction", OPTION_VALIDATION_FRACTION, "F", 0,
     "The part of the tokens that goes to validation shards, in whole documents where there are several. "
     "Default: 0.05",
     1},
    {"validation", OPTION_VALIDATION, "FILE", 0,
     "Validate on this file or directory instead; may be repeated", 1},
    OPTIONS_INPUT,
    {0, 0, 0, 0, 0, 0}};

// Divides documents between training and validation, in their order. A document goes to validation if
// validation then has at most `fraction` of all tokens so far. The last document is held back: if no document
// was small enough for validation, the end of the last one becomes the validation data.
typedef struct {
    ShardSet* shards;
    double fraction;
    int64_t train_tokens, validation_tokens;
    TokenBuffer held;
} DocumentDivider;

static void divider_write(DocumentDivider* divider, int split, const int32_t* ids, size_t count) {
    shard_set_write(divider->shards, split, ids, count);
    if (split == SHARD_TRAIN) divider->train_tokens += (int64_t)count;
    else divider->validation_tokens += (int64_t)count;
}

static void divider_release(DocumentDivider* divider) {
    double validation = (double)divider->validation_tokens + (double)divider->held.count;
    int to_validation = validation <= divider->fraction * (validation + (double)divider->train_tokens);
    divider_write(divider, to_validation && divider->held.count ? SHARD_VALIDATION : SHARD_TRAIN,
                  divider->held.ids, divider->held.count);
    divider->held.count = 0;
}

static void divider_add(DocumentDivider* divider, const TokenBuffer* document) {
    divider_release(divider);
    token_buffer_append(&divider->held, document->ids, document->count);
}

static void divider_finish(DocumentDivider* divider) {
    double all = (double)divider->train_tokens + (double)divider->held.count;
    size_t validation = (size_t)(divider->fraction * all);
    if (divider->validation_tokens > 0 || validation >= divider->held.count) {
        divider_release(divider);
    } else { // no document was small enough: cut the last one
        size_t train = divider->held.count - validation;
        divider_write(divider, SHARD_TRAIN, divider->held.ids, train);
        divider_write(divider, SHARD_VALIDATION, divider->held.ids + train, validation);
    }
    token_buffer_free(&divider->held);
}

// The state of `prepare`.
typedef struct {
    const Options* options;
    const Tokenizer* tokenizer;
    int32_t end_of_text;
    int threads;
    TokenizerEncoder** encoders; // (threads)
    TokenBuffer* tokens;         // one for each document of a batch
    size_t token_capacity;
    int64_t documents, bytes;
} Preparation;

// Encodes a batch in parallel, with <|endoftext|> before every document. Text
// that spells a special token stays text.
static void encode_batch(Preparation* work, const DocumentBatch* batch) {
    size_t before = work->token_capacity;
    work->tokens =
        (TokenBuffer*)array_reserve(work->tokens, &work->token_capacity, batch->count, sizeof(TokenBuffer));
    if (work->token_capacity > before)
        memset(work->tokens + before, 0, (work->token_capacity - before) * sizeof(TokenBuffer));
#pragma omp parallel for schedule(dynamic)
    for (size_t d = 0; d < batch->count; d++) {
        size_t length;
        const char* text = document_batch_text(batch, d, &length);
        work->tokens[d].count = 0;
        token_buffer_append(&work->tokens[d], &work->end_of_text, 1);
        tokenizer_encode_with(work->encoders[omp_get_thread_num()], text, length, 0, &work->tokens[d]);
    }
    work->documents += (int64_t)batch->count;
    work->bytes += (int64_t)batch->text.count;
}

// Encodes all documents of `files` into the shards, divided by `fraction`.
static void prepare_files(Preparation* work, ShardSet* shards, const FileList* files, double fraction,
                          int validation_only) {
    const Options* options = work->options;
    DocumentReader reader;
    DocumentBatch batch = {{NULL, 0, 0}, NULL, 0, 0};
    DocumentDivider divider = {shards, fraction, 0, 0, {NULL, 0, 0}};
    Progress progress = progress_begin(validation_only ? "validation" : "documents", options->quiet);
    int64_t documents_before = work->documents;
    char note[96] = "";
    document_reader_init(&reader, files, options->separator, options->text_key, options->max_bytes);
    while (document_reader_batch(&reader, BATCH_BYTES, &batch)) {
        encode_batch(work, &batch);
        for (size_t d = 0; d < batch.count; d++) {
            if (validation_only)
                shard_set_write(shards, SHARD_VALIDATION, work->tokens[d].ids, work->tokens[d].count);
            else divider_add(&divider, &work->tokens[d]);
        }
        snprintf(note, sizeof(note), "%lld documents, %.1f MB",
                 (long long)(work->documents - documents_before), (double)work->bytes / 1e6);
        progress_show(&progress, part_read(&reader), 0, note);
    }
    divider_finish(&divider);
    progress_show(&progress, 1, 1, note);
    document_reader_report(&reader);
    document_batch_free(&batch);
    document_reader_free(&reader);
}

static void check_prepare_options(Options* options) {
    const char* prefix = options->output_prefix;
    if (!prefix)
        fail_usage(
            "--output-prefix DIR/NAME is required, and FILEs to prepare; `%s --help` lists the options",
            options->command);
    if (!*prefix || prefix[strlen(prefix) - 1] == '/')
        fail_usage("--output-prefix %s: must end in a name, such as %s%stext", prefix, prefix,
                   *prefix ? "" : "data/");
    check_names(options, "prepare");
    if (options->validation_names.count && options->validation_fraction > 0)
        fail_usage("--validation and --validation-fraction exclude each other");
    if (options->validation_names.count) options->validation_fraction = 0;
    if (options->validation_fraction < 0) options->validation_fraction = 0.05;
}

static void run_prepare(Options* options) {
    check_prepare_options(options);
    Tokenizer* t = load_tokenizer(options);
    Preparation work = {
        options, t, tokenizer_special_id(t, "<|endoftext|>"), omp_get_max_threads(), NULL, NULL, 0, 0, 0};
    if (work.end_of_text < 0)
        fail("%s: has no special token <|endoftext|>, which goes before every document", t->origin);
    work.encoders =
        (TokenizerEncoder**)malloc_or_fail((size_t)work.threads * sizeof(TokenizerEncoder*), "encoders");
    for (int i = 0; i < work.threads; i++) work.encoders[i] = tokenizer_encoder_new(t);
    gather_files(options, options->include_binary);
    char scratch[PATH_MAX];
    ShardSet shards;
    shard_scratch_begin(scratch, options->output_prefix);
    shard_set_begin(&shards, scratch, options->output_prefix, tokenizer_vocab_size(t), tokenizer_hash(t),
                    options->shard_tokens);
    prepare_files(&work, &shards, &options->files, options->validation_fraction, 0);
    if (!work.documents) fail("no text to prepare: all files are empty");
    if (options->validation_files.count) prepare_files(&work, &shards, &options->validation_files, 0, 1);
    shard_sets_publish(&shards, 1, NULL, NULL);
    int64_t tokens = shards.tokens[SHARD_TRAIN] + shards.tokens[SHARD_VALIDATION];
    for (int split = 0; split < SHARD_SPLITS && !options->quiet; split++)
        fprintf(stderr, "%s_%s_*.bin: %lld tokens in %d %s\n", options->output_prefix,
                shard_split_name(split), (long long)shards.tokens[split], shards.counts[split],
                shards.counts[split] == 1 ? "shard" : "shards");
    if (!options->quiet)
        fprintf(stderr, "%lld documents, %.1f MB, %.2f bytes a token\n", (long long)work.documents,
                (double)work.bytes / 1e6, (double)work.bytes / (double)tokens);
    for (int i = 0; i < work.threads; i++) tokenizer_encoder_free(work.encoders[i]);
    for (size_t d = 0; d < work.token_capacity; d++) token_buffer_free(&work.tokens[d]);
    free(work.encoders);
    free(work.tokens);
    tokenizer_free(t);
}

// ----------------------------------------------------------------------------
// info

static const struct argp_option info_options[] = {OPTION_TOKENIZER_FILE, {0, 0, 0, 0, 0, 0}};

static void run_info(Options* options) {
    if (options->names.count > 1) fail_usage("%s: one tokenizer at a time", options->command);
    if (options->names.count) options->tokenizer = options->names.names[0];
    Tokenizer* t = load_tokenizer(options);
    int32_t tokens = 0;
    size_t longest = 0;
    for (int32_t id = 0; id < t->size; id++) {
        if (t->tokens[id].kind != TOKEN_NONE) tokens++;
        if (t->tokens[id].length > longest) longest = t->tokens[id].length;
    }
    printf("file            %s\n", t->origin);
    printf("vocabulary size %d\n", tokenizer_vocab_size(t));
    if (tokens < t->size) printf("unused ids      %d\n", t->size - tokens);
    printf("merges          %zu\n", t->merge_count);
    printf("pattern         %s\n", t->pattern->name);
    printf("longest token   %zu bytes\n", longest);
    printf("fingerprint     %u\n", tokenizer_hash(t));
    for (int32_t id = 0; id < t->size; id++) {
        if (!(t->tokens[id].kind & TOKEN_ADDED)) continue;
        printf("added token     %d %.*s\n", id, (int)t->tokens[id].length, vocabulary_bytes(t, id));
    }
    tokenizer_free(t);
}

static const struct argp_option export_options[] = {
    OPTION_TOKENIZER_FILE,
    {"output", 'o', "FILE", 0, "The tokenizer.json to write (required)", 1},
    {0, 0, 0, 0, 0, 0}};

static void run_export(Options* options) {
    if (!options->output)
        fail_usage("--output FILE is required; `%s --help` lists the options", options->command);
    check_output(options->output);
    Tokenizer* t = load_tokenizer(options);
    tokenizer_save_json(t, options->output);
    tokenizer_free(t);
}

// ----------------------------------------------------------------------------
// The command line

typedef struct {
    const char* name;
    const char* arguments;
    const char* description;
    const struct argp_option* options;
    void (*run)(Options* options);
} Command;

static const Command commands[] = {
    {"train", "FILE...", "Trains a byte-level BPE tokenizer and writes it as tokenizer.json.", train_options,
     run_train},
    {"encode", "[FILE...]", "Prints the token ids of the files, or of standard input.", encode_options,
     run_encode},
    {"decode", "[FILE...]", "Prints the text of token ids, from the files or from standard input.",
     decode_options, run_decode},
    {"prepare", "FILE...",
     "Writes text as token shards for training and validation. A FILE may be a directory. Each document "
     "starts with "
     "<|endoftext|>.",
     prepare_options, run_prepare},
    {"export", "", "Writes any tokenizer that can be read as tokenizer.json.", export_options, run_export},
    {"info", "[FILE]", "Says what a tokenizer is.", info_options, run_info},
};

enum { COMMAND_COUNT = (int)(sizeof(commands) / sizeof(commands[0])) };

static void print_help(FILE* out) {
    fprintf(out, "Usage: tokenizer COMMAND [OPTION...] [FILE...]\nByte-level BPE tokenizer.\n\n");
    for (int i = 0; i < COMMAND_COUNT; i++)
        fprintf(out, "  %-8s %s\n", commands[i].name, commands[i].description);
    fprintf(out, "\n`tokenizer COMMAND --help` lists the options of a command.\n");
}

static void run_command(const Command* command, int count, char** arguments) {
    char name[64];
    snprintf(name, sizeof(name), "tokenizer %s", command->name);
    Options options;
    memset(&options, 0, sizeof(options));
    options.command = name;
    options.pattern = split_pattern_by_name("cl100k");
    options.vocab_size = 8192;
    options.min_count = 2;
    options.max_bytes = INT64_MAX;
    options.shard_tokens = 100000000;
    options.validation_fraction = -1;
    struct argp argp;
    memset(&argp, 0, sizeof(argp));
    argp.options = command->options;
    argp.parser = parse_option;
    argp.args_doc = command->arguments;
    argp.doc = command->description;
    arguments[0] = name;
    argp_parse(&argp, count, arguments, 0, NULL, &options);
    if (options.threads) omp_set_num_threads(options.threads);
    command->run(&options);
    file_list_free(&options.files);
    file_list_free(&options.validation_files);
    free((void*)options.names.names);
    free((void*)options.lists.names);
    free((void*)options.validation_names.names);
    free(options.separator);
    free((void*)options.specials);
}

static void flush_standard_output(void) {
    OutputFile output;
    output_file_open(&output, NULL);
    output_file_close(&output);
}

int main(int count, char** arguments) {
    program_name = "tokenizer";
    standard_files_reserve();
    stop_on_signals();
    argp_err_exit_status = 2;
    const char* name = count > 1 ? arguments[1] : "";
    if (!strcmp(name, "--help") || !strcmp(name, "-?") || !strcmp(name, "help")) {
        print_help(stdout);
        flush_standard_output();
        return 0;
    }
    for (int i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(commands[i].name, name) != 0) continue;
        run_command(&commands[i], count - 1, arguments + 1);
        flush_standard_output();
        return 0;
    }
    if (*name) warn("%s is no command", name);
    print_help(stderr);
    return 2;
}
