/*
The command line of train_gpt: one table of options, read by glibc's argp.

    Options options = options_parse(argc, argv);         // prints help, or fails with exit code 2
    ModelConfig config = options_model(&options, base);  // base: a descriptor's sizes or a checkpoint's
    options_check_kinds(&options, &config);              // fails for an option without effect on this model

A one-letter option has the letter of llm.c's option with the same meaning, if llm.c has one. The parser checks each value alone.
model_config_check() and the functions of runtime/run.h check rules that involve several options.
*/
#ifndef RUNTIME_OPTIONS_H
#define RUNTIME_OPTIONS_H

#include <argp.h>
#include <float.h>
#include <getopt.h>
#include "runtime/allocation.h"
#include "runtime/checks.h"
#include "runtime/model.h"
#include "runtime/schedule.h"

// The activations that the backward pass computes again. Each level includes the levels before it.
typedef enum {
    RECOMPUTE_NONE,
    RECOMPUTE_MLP,   // gate, up and swiglu
    RECOMPUTE_LAYER, // also norms, queries, keys, values, the residual between attention and feed-forward
    RECOMPUTE_LEVELS
} Recompute;
static const char* const recompute_names[] = {"none", "mlp", "layer", NULL};

// Keys of the options without a letter.
enum {
    KEY_HELP = '?', // so that -? is --help
    KEY_LAYERS = 256,
    KEY_CHANNELS,
    KEY_HEADS,
    KEY_KV_HEADS,
    KEY_HEAD_DIM,
    KEY_FFN,
    KEY_VOCAB,
    KEY_ATTENTION,
    KEY_QUERY_HEADS,
    KEY_KCONV,
    KEY_PATTERN,
    KEY_WINDOW,
    KEY_MOBA_BLOCK,
    KEY_MOBA_TOPK,
    KEY_MOBA_WORKSPACE,
    KEY_POSITION,
    KEY_ROPE_THETA,
    KEY_NORM_EPS,
    KEY_TIED,
    KEY_UNTIED,
    KEY_INIT_FROM,
    KEY_KD_SOURCE,
    KEY_KD_WINDOW,
    KEY_KD_BETA,
    KEY_KD_MIN_HEADS,
    KEY_DGQA_KIND,
    KEY_PGQA_NOISE,
    KEY_TOKENIZER,
    KEY_DECAY_FRACTION,
    KEY_BETA1,
    KEY_BETA2,
    KEY_EPS,
    KEY_CLIP,
    KEY_ZERO,
    KEY_RECOMPUTE,
    KEY_CUDA_GRAPH,
    KEY_RESUME,
    KEY_OVERWRITE,
    KEY_KEEP,
    KEY_MAX_SECONDS,
    KEY_SEED,
    KEY_DRY_RUN,
    KEY_LOG_EVERY,
    KEY_TEMPERATURE,
    KEY_TOP_K,
    KEY_TOP_P,
    KEY_PROMPT,
    KEY_GENERATE,
    KEY_WRITE_LOGITS,
    KEY_TOKENS,
    KEY_EVAL_RETRIEVAL,
    KEY_ALLOW_OTHER_DATA,
    KEY_USAGE,
    OPTION_KEYS
};

typedef struct {
    // Model. 0 or NULL: not given.
    const char* model;
    int layers, channels, heads, kv_heads, head_dim, ffn, vocab_size, window, moba_block, moba_topk;
    int attention, gqa, kconv; // -1: not given
    size_t moba_workspace;     // bytes
    const char* pattern;
    const char* position;
    float rope_theta, norm_eps;
    int tied; // -1: not given
    const char* init_from;
    // Heads
    AllocationSettings heads_by_keys; // of kdgqa and dgqa
    double pgqa_noise;
    // Data
    const char* train_data;
    const char* val_data;
    const char* tokenizer;
    int batch, sequence_length;
    long total_batch;
    // Optimizer
    long steps; // -1: one epoch
    double learning_rate, final_lr_fraction, decay_fraction;
    int warmup; // steps
    ScheduleKind schedule;
    double beta1, beta2, eps, weight_decay, clip;
    int zero; // 1: the optimizer state is sharded over the processes (ZeRO-1)
    // Memory and speed
    Recompute recompute;
    int cuda_graph;
    // Output, checkpoints, start and end
    const char* output;
    int resume, overwrite;
    int allow_other_data; // 1: a resume may use other training data
    long checkpoint_every;
    int keep;
    double max_seconds;
    uint64_t seed;
    int dry_run;
    // Validation and logs
    long val_every, val_batches, log_every;
    // Sampling
    long sample_every;
    int sample_length, top_k;
    double temperature, top_p;
    const char* prompt;
    int generate;
    const char* write_logits;
    const char* tokens;
    const char* eval_retrieval;
    char given[OPTION_KEYS]; // 1 at the key of every option that the command line has
} Options;

static const struct argp_option option_table[] = {
    {0, 0, 0, 0, "Model", 0},
    {"model", 'e', "dN", 0,
     "descriptor: N layers, 64 N channels, heads of 64 (default d12); the options below change it", 0},
    {"layers", KEY_LAYERS, "L", 0, "layers", 0},
    {"channels", KEY_CHANNELS, "C", 0, "channels of the residual stream", 0},
    {"heads", KEY_HEADS, "H", 0, "query heads (default C/64)", 0},
    {"kv-heads", KEY_KV_HEADS, "G", 0, "key/value heads (default H: multi-head attention)", 0},
    {"head-dim", KEY_HEAD_DIM, "D", 0, "head dimension (default C/H)", 0},
    {"ffn", KEY_FFN, "F", 0, "width of the feed-forward network (default 8/3 C, up to a multiple of 64)", 0},
    {"vocab", KEY_VOCAB, "V", 0, "vocabulary (default: the tokenizer's, or what the shards say)", 0},
    {"attention", KEY_ATTENTION, "KIND", 0,
     "attention of the G layers: %s (default: the checkpoint's, or dense)", 0},
    {"query-heads", KEY_QUERY_HEADS, "KIND", 0,
     "how query heads share KV heads: %s (default: the checkpoint's, or gqa)", 0},
    {"kconv", KEY_KCONV, "N", 0,
     "width of the convolution on the keys of the G and D layers: 0 (none), 3 or 5 (default: the "
     "checkpoint's, or "
     "0)",
     0},
    {"pattern", KEY_PATTERN, "LETTERS", 0,
     "a letter a layer, repeated: G global, D global and dense whatever --attention says, S sliding window "
     "(default G)",
     0},
    {"window", KEY_WINDOW, "W", 0, "window of the S layers in tokens (default 256)", 0},
    {"moba-block", KEY_MOBA_BLOCK, "S", 0, "moba, flashmoba: keys of a block (default 128)", 0},
    {"moba-topk", KEY_MOBA_TOPK, "K", 0,
     "moba, flashmoba: blocks that a query attends to, its own among them (default 8)", 0},
    {"moba-workspace", KEY_MOBA_WORKSPACE, "MB", 0,
     "flashmoba: MB (1048576 bytes) for lists and partial rows of the heads that a GPU computes at a time "
     "(default 1024)",
     0},
    {"position", KEY_POSITION, "KINDS", 0, "rope, none, or by letter: S=rope,G=none (default rope)", 0},
    {"rope-theta", KEY_ROPE_THETA, "X", 0, "base of the rotary angles (default 10000)", 0},
    {"norm-eps", KEY_NORM_EPS, "X", 0, "epsilon of RMSNorm (default 1e-5)", 0},
    {"tied", KEY_TIED, 0, 0, "the output head is the embedding (default)", 0},
    {"untied", KEY_UNTIED, 0, 0, "the output head is a matrix of its own", 0},
    {"init-from", KEY_INIT_FROM, "DIR", 0,
     "start from the weights of this checkpoint, ours or Hugging Face's", 0},

    {0, 0, 0, 0, "Query heads by keys (--query-heads kdgqa, dgqa, pgqa)", 0},
    {"kd-source", KEY_KD_SOURCE, "NAME", 0,
     "kdgqa, dgqa: the keys that are measured: lagged (the step before's; default), forward (the "
     "micro-batch's own, so results depend on --batch), weights (no data) or, as controls, random (a map "
     "drawn once) or shuffled (at every step)",
     0},
    {"kd-min-heads", KEY_KD_MIN_HEADS, "N", 0,
     "kdgqa, dgqa: query heads that every KV head has at least (default 1)", 0},
    {"kd-window", KEY_KD_WINDOW, "N", 0, "dgqa: steps between two allocations (default 100)", 0},
    {"kd-beta", KEY_KD_BETA, "X", 0, "dgqa: what a window keeps of the running average (default 0.9)", 0},
    {"dgqa-kind", KEY_DGQA_KIND, "NAME", 0,
     "dgqa: by the running average (ema, default) or by the last change (diff)", 0},
    {"pgqa-noise", KEY_PGQA_NOISE, "X", 0,
     "pgqa: noise on attention's output, in standard deviations of it (default 1)", 0},

    {0, 0, 0, 0, "Data", 0},
    {"train-data", 'i', "GLOB", 0, "token shards to train on", 0},
    {"val-data", 'j', "GLOB", 0, "token shards for the validation loss", 0},
    {"tokenizer", KEY_TOKENIZER, "FILE", 0,
     "tokenizer.json of these shards, kept in checkpoints, used to show samples", 0},
    {"batch", 'b', "B", 0, "sequences of a micro-batch (default 4)", 0},
    {"sequence-length", 't', "T", 0, "tokens of a sequence (default 1024)", 0},
    {"total-batch", 'd', "TOKENS", 0,
     "tokens of an optimizer step (default B T of every process, or what the resumed run has); gradients "
     "accumulate over micro-batches",
     0},

    {0, 0, 0, 0, "Optimizer (AdamW)", 0},
    {"steps", 'x', "N", 0, "optimizer steps; -1: one pass over the data (default)", 0},
    {"learning-rate", 'l', "X", 0, "peak learning rate (default 3e-4)", 0},
    {"schedule", 'k', "NAME", 0, "cosine, linear, constant or wsd (default cosine)", 0},
    {"warmup", 'u', "N", 0, "steps of linear warm-up (default 0)", 0},
    {"final-lr-fraction", 'q', "X", 0, "the last learning rate as a fraction of the peak (default 0.1)", 0},
    {"decay-fraction", KEY_DECAY_FRACTION, "X", 0, "wsd: the part of the steps that decays (default 0.2)", 0},
    {"beta1", KEY_BETA1, "X", 0, "decay of the first moment (default 0.9)", 0},
    {"beta2", KEY_BETA2, "X", 0, "decay of the second moment (default 0.95)", 0},
    {"eps", KEY_EPS, "X", 0, "epsilon, from 1e-20 on (default 1e-8)", 0},
    {"weight-decay", 'c', "X", 0, "decay of matrices, not of norm gains (default 0.1)", 0},
    {"clip", KEY_CLIP, "X", 0, "largest gradient norm; 0: no clipping (default 1)", 0},
    {"zero", KEY_ZERO, "0|1", 0,
     "of many processes: 1 shards the optimizer's state over them; the result is the same (default 0)", 0},

    {0, 0, 0, 0, "Memory and speed", 0},
    {"recompute", KEY_RECOMPUTE, "LEVEL", 0,
     "what backward computes again instead of keeping it: none (default), mlp (the feed-forward network) or "
     "layer (all but "
     "attention); less memory, the same result",
     0},
    {"cuda-graph", KEY_CUDA_GRAPH, 0, 0,
     "record a step's kernels while the one before runs, and launch them as one; the same result (not on the "
     "CPU)",
     0},

    {0, 0, 0, 0, "Life of a run", 0},
    {"output", 'o', "DIR", 0, "directory of checkpoints, metrics.jsonl, timings.jsonl and main.log", 0},
    {"checkpoint-every", 'n', "N", 0, "steps between checkpoints; 0: only the last (default)", 0},
    {"keep", KEY_KEEP, "N", 0, "checkpoints kept; 0: all (default)", 0},
    {"resume", KEY_RESUME, 0, 0,
     "go on from the newest checkpoint of --output, or start where there is none yet", 0},
    {0, 'y', "0|1", 0, "-y 1 is --resume", 0},
    {"allow-other-data", KEY_ALLOW_OTHER_DATA, 0, 0,
     "--resume goes on though the training data are not those of the checkpoint: the order of all sequences "
     "changes",
     0},
    {"overwrite", KEY_OVERWRITE, 0, 0, "delete the run that --output holds, and start anew", 0},
    {"max-seconds", KEY_MAX_SECONDS, "X", 0, "write a checkpoint and stop after this time", 0},
    {"seed", KEY_SEED, "N", 0, "of weights, data order and samples (default 1337)", 0},
    {"dry-run", KEY_DRY_RUN, 0, 0, "show model, memory plan, operations and data, and stop", 0},

    {0, 0, 0, 0, "Watching", 0},
    {"val-every", 'v', "N", 0, "steps between validations; 0: none (default 100)", 0},
    {"val-batches", 'm', "N", 0, "validation reads this many total batches (default 20)", 0},
    {"log-every", KEY_LOG_EVERY, "N", 0,
     "steps between lines where the output is not a terminal (default 10)", 0},
    {"sample-every", 's', "N", 0, "steps between samples; 0: none (default)", 0},
    {"sample-length", 'g', "N", 0, "tokens of a sample (default 64)", 0},
    {"temperature", KEY_TEMPERATURE, "X", 0, "of sampling; 0: always the likeliest token (default 1)", 0},
    {"top-k", KEY_TOP_K, "N", 0, "sample among the N likeliest tokens; 0: all (default)", 0},
    {"top-p", KEY_TOP_P, "X", 0,
     "sample among the likeliest tokens that make up this probability (default 1)", 0},
    {"prompt", KEY_PROMPT, "TEXT", 0, "beginning of the samples (needs --tokenizer)", 0},
    {"generate", KEY_GENERATE, 0, 0, "no training: continue --prompt with the model of --init-from, and stop",
     0},
    {"write-logits", KEY_WRITE_LOGITS, "FILE", 0,
     "no training: write the logits (T, V) of --tokens as float32, and stop", 0},
    {"tokens", KEY_TOKENS, "IDS", 0, "token ids for --write-logits, separated by commas", 0},
    {"eval-retrieval", KEY_EVAL_RETRIEVAL, "PREFIX", 0,
     "no training: print how often the model of --init-from solves the samples of build/retrieval, and stop; "
     "with --output, also to retrieval.json in there",
     0},

    {0, 0, 0, 0, "Help", 0},
    {"help", KEY_HELP, 0, 0, "this list", 0},
    {"usage", KEY_USAGE, 0, 0, "all options in a few lines", 0},
    {0, 0, 0, 0, 0, 0},
};

// The name of an option as a user types it, for messages.
static inline const char* option_name(int key) {
    static char name[64];
    for (const struct argp_option* option = option_table; option->name || option->key || option->doc;
         option++) {
        if (option->key != key) continue;
        if (option->name) snprintf(name, sizeof(name), "--%s", option->name);
        else snprintf(name, sizeof(name), "-%c", key);
    }
    return name;
}

static inline long option_integer(int key, const char* text, long low, long high) {
    char* end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || *end || errno) fail_usage("%s %s: want a whole number", option_name(key), text);
    if (value < low || value > high)
        fail_usage("%s %s: must be from %ld to %ld", option_name(key), text, low, high);
    return value;
}

// Reads a number that is 0 or at least the smallest normal float: the program uses settings as floats, and a
// smaller number would silently become 0.
static inline double option_number(int key, const char* text, double low, double high) {
    char* end;
    errno = 0;
    double value = strtod(text, &end);
    const int rounded = errno == ERANGE; // 1e-400 reads as 0
    if (end == text || *end || isnan(value)) fail_usage("%s %s: want a number", option_name(key), text);
    if (value < low || value > high)
        fail_usage("%s %s: must be from %g to %g", option_name(key), text, low, high);
    if ((value != 0 || rounded) && fabs(value) < (double)FLT_MIN)
        fail_usage("%s %s: too small for a float, whose least is %.2g", option_name(key), text,
                   (double)FLT_MIN);
    return value;
}

enum { ALL_KINDS = -1 }; // a set of kinds, as in runtime/model.h

// The names of the kinds in the set, with " or " between them.
static inline const char* option_names(const char* const* names, int kinds) {
    static char joined[256];
    joined[0] = 0;
    for (int i = 0; names[i]; i++)
        if (kinds >> i & 1)
            snprintf(joined + strlen(joined), sizeof(joined) - strlen(joined), "%s%s",
                     joined[0] ? " or " : "", names[i]);
    return joined;
}

// The place of `text` among the names.
static inline int option_choice(int key, const char* text, const char* const* names) {
    const int place = name_index(names, text);
    if (place < 0) fail_usage("%s %s: want %s", option_name(key), text, option_names(names, ALL_KINDS));
    return place;
}

// ----------------------------------------------------------------------------
// Values: for each option the member of Options that it sets, and the accepted values

typedef enum {
    OPTION_INT,
    OPTION_LONG,
    OPTION_UINT64,    // from `low` to LONG_MAX
    OPTION_MEGABYTES, // a size_t in bytes; the option is in units of 1048576 bytes
    OPTION_DOUBLE,
    OPTION_FLOAT,
    OPTION_TEXT,     // must not be empty
    OPTION_ANY_TEXT, // may be empty
    OPTION_NAME,     // an int or enum: the place of the value in `names`
    OPTION_SET,      // an int that the option, which has no value, sets to `low`
} OptionType;

typedef struct {
    int key;
    OptionType type;
    size_t offset;            // of the member in Options
    double low, high;         // accepted values
    const char* const* names; // of OPTION_NAME; the last one is NULL
} OptionField;

#define FIELD(key, type, member, low, high)                                                                  \
    { key, type, offsetof(Options, member), low, high, NULL }
#define NAME_FIELD(key, member, names)                                                                       \
    { key, OPTION_NAME, offsetof(Options, member), 0, 0, names }
#define TEXT_FIELD(key, member)                                                                              \
    { key, OPTION_TEXT, offsetof(Options, member), 0, 0, NULL }

static const OptionField option_fields[] = {
    TEXT_FIELD('e', model),
    FIELD(KEY_LAYERS, OPTION_INT, layers, 1, 1024),
    FIELD(KEY_CHANNELS, OPTION_INT, channels, 1, 1 << 17),
    FIELD(KEY_HEADS, OPTION_INT, heads, 1, 1024),
    FIELD(KEY_KV_HEADS, OPTION_INT, kv_heads, 1, 1024),
    FIELD(KEY_HEAD_DIM, OPTION_INT, head_dim, 1, 1024),
    FIELD(KEY_FFN, OPTION_INT, ffn, 1, 1 << 20),
    FIELD(KEY_VOCAB, OPTION_INT, vocab_size, 2, 1 << 24),
    NAME_FIELD(KEY_ATTENTION, attention, attention_names),
    NAME_FIELD(KEY_QUERY_HEADS, gqa, gqa_names),
    FIELD(KEY_KCONV, OPTION_INT, kconv, 0, KCONV_MAX),
    TEXT_FIELD(KEY_PATTERN, pattern),
    FIELD(KEY_WINDOW, OPTION_INT, window, 1, 1 << 24),
    FIELD(KEY_MOBA_BLOCK, OPTION_INT, moba_block, 1, 1 << 16),
    FIELD(KEY_MOBA_TOPK, OPTION_INT, moba_topk, 1, 1 << 10),
    FIELD(KEY_MOBA_WORKSPACE, OPTION_MEGABYTES, moba_workspace, 1, 1 << 20),
    TEXT_FIELD(KEY_POSITION, position),
    FIELD(KEY_ROPE_THETA, OPTION_FLOAT, rope_theta, 1, 1e12),
    FIELD(KEY_NORM_EPS, OPTION_FLOAT, norm_eps, 1e-12, 1),
    FIELD(KEY_TIED, OPTION_SET, tied, 1, 1),
    FIELD(KEY_UNTIED, OPTION_SET, tied, 0, 0),
    TEXT_FIELD(KEY_INIT_FROM, init_from),

    NAME_FIELD(KEY_KD_SOURCE, heads_by_keys.source, statistic_source_names),
    FIELD(KEY_KD_MIN_HEADS, OPTION_INT, heads_by_keys.least, 0, 1024),
    FIELD(KEY_KD_WINDOW, OPTION_INT, heads_by_keys.window, 1, INT_MAX),
    FIELD(KEY_KD_BETA, OPTION_DOUBLE, heads_by_keys.beta, 0, 1),
    NAME_FIELD(KEY_DGQA_KIND, heads_by_keys.kind, dgqa_kind_names),
    FIELD(KEY_PGQA_NOISE, OPTION_DOUBLE, pgqa_noise, 0, 1e6),

    TEXT_FIELD('i', train_data),
    TEXT_FIELD('j', val_data),
    TEXT_FIELD(KEY_TOKENIZER, tokenizer),
    FIELD('b', OPTION_INT, batch, 1, 1 << 20),
    FIELD('t', OPTION_INT, sequence_length, 1, 1 << 24),
    FIELD('d', OPTION_LONG, total_batch, 1, 1L << 40),

    FIELD('x', OPTION_LONG, steps, -1, INT_MAX),
    FIELD('l', OPTION_DOUBLE, learning_rate, 0, 1e3),
    NAME_FIELD('k', schedule, schedule_names),
    FIELD('u', OPTION_INT, warmup, 0, INT_MAX),
    FIELD('q', OPTION_DOUBLE, final_lr_fraction, 0, 1),
    FIELD(KEY_DECAY_FRACTION, OPTION_DOUBLE, decay_fraction, 0, 1),
    FIELD(KEY_BETA1, OPTION_DOUBLE, beta1, 0, 0.9999999),
    FIELD(KEY_BETA2, OPTION_DOUBLE, beta2, 0, 0.9999999),
    // If a second moment underflows to 0, Adam divides by eps. So eps must be at least 1e-20: smaller values
    // give huge steps, and 0 gives 0/0.
    FIELD(KEY_EPS, OPTION_DOUBLE, eps, 1e-20, 1),
    FIELD('c', OPTION_DOUBLE, weight_decay, 0, 100),
    FIELD(KEY_CLIP, OPTION_DOUBLE, clip, 0, 1e9),
    FIELD(KEY_ZERO, OPTION_INT, zero, 0, 1),

    NAME_FIELD(KEY_RECOMPUTE, recompute, recompute_names),
    FIELD(KEY_CUDA_GRAPH, OPTION_SET, cuda_graph, 1, 1),

    TEXT_FIELD('o', output),
    FIELD('n', OPTION_LONG, checkpoint_every, 0, INT_MAX),
    FIELD(KEY_KEEP, OPTION_INT, keep, 0, INT_MAX),
    FIELD(KEY_RESUME, OPTION_SET, resume, 1, 1),
    FIELD('y', OPTION_INT, resume, 0, 1),
    FIELD(KEY_ALLOW_OTHER_DATA, OPTION_SET, allow_other_data, 1, 1),
    FIELD(KEY_OVERWRITE, OPTION_SET, overwrite, 1, 1),
    FIELD(KEY_MAX_SECONDS, OPTION_DOUBLE, max_seconds, 0, 1e9),
    FIELD(KEY_SEED, OPTION_UINT64, seed, 0, 0),
    FIELD(KEY_DRY_RUN, OPTION_SET, dry_run, 1, 1),

    FIELD('v', OPTION_LONG, val_every, 0, INT_MAX),
    FIELD('m', OPTION_LONG, val_batches, 1, INT_MAX),
    FIELD(KEY_LOG_EVERY, OPTION_LONG, log_every, 1, INT_MAX),
    FIELD('s', OPTION_LONG, sample_every, 0, INT_MAX),
    FIELD('g', OPTION_INT, sample_length, 1, 1 << 24),
    FIELD(KEY_TEMPERATURE, OPTION_DOUBLE, temperature, 0, 1e6),
    FIELD(KEY_TOP_K, OPTION_INT, top_k, 0, INT_MAX),
    FIELD(KEY_TOP_P, OPTION_DOUBLE, top_p, 0, 1),
    FIELD(KEY_PROMPT, OPTION_ANY_TEXT, prompt, 0, 0),
    FIELD(KEY_GENERATE, OPTION_SET, generate, 1, 1),
    TEXT_FIELD(KEY_WRITE_LOGITS, write_logits),
    FIELD(KEY_TOKENS, OPTION_ANY_TEXT, tokens, 0, 0),
    TEXT_FIELD(KEY_EVAL_RETRIEVAL, eval_retrieval),
};
#undef FIELD
#undef NAME_FIELD
#undef TEXT_FIELD

// Reads the value `text` of an option into its member of Options.
static inline void option_set(Options* options, const OptionField* field, const char* text) {
    char* member = (char*)options + field->offset;
    const int key = field->key;
    if (field->type >= OPTION_INT && field->type <= OPTION_MEGABYTES) {
        const long high = field->type == OPTION_UINT64 ? LONG_MAX : (long)field->high;
        const long value = option_integer(key, text, (long)field->low, high);
        const int narrow = (int)value;
        const size_t bytes = (size_t)value << 20;
        if (field->type == OPTION_INT) memcpy(member, &narrow, sizeof(narrow));
        else if (field->type == OPTION_MEGABYTES) memcpy(member, &bytes, sizeof(bytes));
        else memcpy(member, &value, sizeof(value)); // LONG and UINT64 have 8 bytes
    } else if (field->type == OPTION_DOUBLE || field->type == OPTION_FLOAT) {
        const double value = option_number(key, text, field->low, field->high);
        const float narrow = (float)value;
        if (field->type == OPTION_FLOAT) memcpy(member, &narrow, sizeof(narrow));
        else memcpy(member, &value, sizeof(value));
    } else if (field->type == OPTION_TEXT || field->type == OPTION_ANY_TEXT) {
        if (field->type == OPTION_TEXT && !text[0]) fail_usage("%s: is empty", option_name(key));
        memcpy(member, &text, sizeof(text));
    } else {
        const int value =
            field->type == OPTION_NAME ? option_choice(key, text, field->names) : (int)field->low;
        memcpy(member, &value, sizeof(value));
    }
}

// ----------------------------------------------------------------------------
// Help: printed here, since argp would sort the options by name

enum { HELP_COLUMN = 29, HELP_WIDTH = 79 };

// Prints words from HELP_COLUMN on; the current line already has `column` characters.
static inline void help_print_words(const char* text, int column) {
    if (column >= HELP_COLUMN) column = (putchar('\n'), 0);
    while (*text) {
        const int length = (int)strcspn(text, " ");
        if (column > HELP_COLUMN && column + 1 + length > HELP_WIDTH) column = (putchar('\n'), 0);
        if (column > HELP_COLUMN) column += printf(" %.*s", length, text);
        else column += printf("%*s%.*s", HELP_COLUMN - column, "", length, text);
        text += length + (text[length] == ' ');
    }
    putchar('\n');
}

// Prints every title with the options that follow it in the table.
static inline void options_print_help(void) {
    printf("Usage: train_gpt [OPTION...]\nTrains a decoder language model from token shards.\n");
    for (const struct argp_option* option = option_table; option->name || option->key || option->doc;
         option++) {
        int column = 0;
        if (!option->name && !option->key) {
            printf("\n %s\n", option->doc);
            continue;
        }
        if (option->key < KEY_LAYERS) column += printf("  -%c", option->key);
        else column += printf("    ");
        if (option->name) column += printf("%s--%s", option->key < KEY_LAYERS ? ", " : "  ", option->name);
        if (option->arg) column += printf(option->name ? "=%s" : " %s", option->arg);
        char doc[512]; // %s in an option's text stands for the names of its kinds
        snprintf(doc, sizeof(doc), "%s", option->doc);
        if (option->key == KEY_ATTENTION)
            snprintf(doc, sizeof(doc), option->doc, option_names(attention_names, ALL_KINDS));
        if (option->key == KEY_QUERY_HEADS)
            snprintf(doc, sizeof(doc), option->doc, option_names(gqa_names, ALL_KINDS));
        help_print_words(doc, column);
    }
    printf("\nExit codes: 0 done, 1 something outside was wrong, 2 the command line was.\n"
           "See README.md for examples.\n");
    if (fflush(stdout) != 0) fail("the help cannot be written: %s", strerror(errno));
}

static inline error_t option_parse(int key, char* text, struct argp_state* state) {
    Options* options = (Options*)state->input;
    for (size_t i = 0; i < sizeof(option_fields) / sizeof(option_fields[0]); i++) {
        if (option_fields[i].key != key) continue;
        options->given[key] = 1;
        option_set(options, &option_fields[i], text);
        return 0;
    }
    if (key == KEY_HELP) {
        options_print_help();
        exit(0);
    }
    if (key == KEY_USAGE) argp_state_help(state, stdout, ARGP_HELP_USAGE | ARGP_HELP_EXIT_OK);
    if (key == ARGP_KEY_ARG)
        fail_usage("%s: not an option (every argument is --name value; see --help)", text);
    return key == KEY_USAGE ? 0 : ARGP_ERR_UNKNOWN;
}

// Finds the option that an argument such as "--batch=4", "-b" or "-b4" means. Returns its entry, or NULL if
// there is none or more than one. *value becomes the beginning of a value in the same argument, or NULL.
static inline const struct argp_option* option_find(const char* argument, const char** value) {
    const int is_long = argument[1] == '-';
    const size_t length = strcspn(argument + 2, "=");
    const struct argp_option* found = NULL;
    int matches = 0;
    for (const struct argp_option* option = option_table; option->name || option->key || option->doc;
         option++) {
        if (!is_long && option->key == argument[1]) found = option;
        if (!is_long || !option->name || strncmp(option->name, argument + 2, length) != 0) continue;
        found = option;
        if (strlen(option->name) == length) matches = -1000; // an exact name wins over abbreviations
        if (++matches < 0) break;
    }
    *value =
        is_long ? (argument[2 + length] ? argument + 3 + length : NULL) : (argument[2] ? argument + 2 : NULL);
    return matches > 1 ? NULL : found;
}

// Guesses the pattern that the shell has expanded to these files: their common
// beginning, a star, their common end.
static inline void option_guess_pattern(char pattern[PATH_MAX], char** files, int count) {
    size_t begin = strlen(files[0]), end = begin;
    for (int i = 1; i < count; i++) {
        const size_t length = strlen(files[i]);
        size_t same = 0;
        while (same < begin && files[i][same] == files[0][same]) same++;
        begin = same;
        for (same = 0; same < end && same < length; same++)
            if (files[i][length - 1 - same] != files[0][strlen(files[0]) - 1 - same]) break;
        end = same;
    }
    for (int i = 0; i < count; i++) // the two parts must not overlap in the shortest name
        if (begin + end > strlen(files[i])) end = strlen(files[i]) - begin;
    path_format(pattern, "%.*s*%s", (int)begin, files[0], files[0] + strlen(files[0]) - end);
}

// Fails for the word argv[at], which belongs to no option. Words right after the value of -i or -j come from
// a pattern without quotes, which the shell has expanded.
static inline void reject_word(int argc, char** argv, int at, const struct argp_option* before) {
    char pattern[PATH_MAX];
    int end = at;
    if (!before || (before->key != 'i' && before->key != 'j'))
        fail_usage("%s: not an option (every argument is --name value; see --help)", argv[at]);
    while (end < argc && argv[end][0] != '-') end++;
    option_guess_pattern(pattern, argv + at - 1, end - at + 1);
    fail_usage("%s: another file after --%s %s: the shell has expanded a pattern; put it in quotes, such as "
               "--%s '%s'",
               argv[at], before->name, argv[at - 1], before->name, pattern);
}

// Fails with one line for an unknown option, as for every other error. argp would print two lines.
static inline void reject_unknown_options(int argc, char** argv) {
    const struct argp_option* before = NULL; // the option whose value was the last argument
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (argv[i][0] != '-' || !argv[i][1]) reject_word(argc, argv, i, before);
        const char* value;
        const struct argp_option* option = option_find(argv[i], &value);
        if (!option) fail_usage("%s: unknown option (see --help)", argv[i]);
        if (!option->arg && value) fail_usage("%s: takes no value", argv[i]);
        before = option->arg && !value ? option : NULL;
        if (before && ++i == argc) fail_usage("%s: needs a value", argv[i - 1]);
    }
}

static inline Options options_parse(int argc, char** argv) {
    static Options options;
    memset(&options, 0, sizeof(options));
    options.tied = options.attention = options.gqa = options.kconv = -1;
    options.heads_by_keys = allocation_defaults(0);
    options.pgqa_noise = 1;
    options.batch = 4;
    options.steps = -1;
    options.learning_rate = 3e-4;
    options.schedule = SCHEDULE_COSINE;
    options.final_lr_fraction = 0.1;
    options.decay_fraction = 0.2;
    options.beta1 = 0.9;
    options.beta2 = 0.95;
    options.eps = 1e-8;
    options.weight_decay = 0.1;
    options.clip = 1;
    options.seed = 1337;
    options.val_every = 100;
    options.val_batches = 20;
    options.log_every = 10;
    options.sample_length = 64;
    options.temperature = 1;
    options.top_p = 1;
    static const struct argp parser = {option_table, option_parse, 0, 0, 0, 0, 0};
    argp_err_exit_status = 2;
    reject_unknown_options(argc, argv);
    argp_parse(&parser, argc, argv, ARGP_NO_HELP, 0, &options);
    if (!options.train_data && !options.generate && !options.write_logits && !options.eval_retrieval)
        fail_usage("--train-data: needed to train: a pattern of token shards, in quotes (see --help)");
    return options;
}

// ----------------------------------------------------------------------------
// From options to the model's sizes

static inline int position_is_rope(const char* whole, const char* kind, size_t length) {
    if (length == 4 && !strncmp(kind, "rope", 4)) return 1;
    if (length == 4 && !strncmp(kind, "none", 4)) return 0;
    fail_usage("--position %s: want rope, none, or by letter such as S=rope,G=none", whole);
}

// "rope" and "none" apply to every layer, "S=rope,G=none" to the layers of each letter. D layers follow G.
static inline void set_position(ModelConfig* config, const char* text) {
    if (!strchr(text, '=')) {
        config->rope_global = config->rope_sliding = position_is_rope(text, text, strlen(text));
        return;
    }
    for (const char* part = text; *part;) {
        size_t length = strcspn(part, ",");
        int* rope = part[0] == 'G' ? &config->rope_global : part[0] == 'S' ? &config->rope_sliding : NULL;
        if (!rope || length < 2 || part[1] != '=')
            fail_usage("--position %s: want rope, none, or by letter such as S=rope,G=none", text);
        *rope = position_is_rope(text, part + 2, length - 2);
        part += length + (part[length] == ',');
    }
}

// Copies `base`, applies the user's options, and fills in sizes that are still 0. The vocabulary may remain 0.
// The caller then calls model_config_check().
static inline ModelConfig options_model(const Options* options, ModelConfig base) {
    ModelConfig config = base;
    if (options->layers) config.layers = options->layers;
    if (options->channels) config.channels = options->channels;
    if (options->heads) config.heads = options->heads;
    if (options->kv_heads) config.kv_heads = options->kv_heads;
    if (options->head_dim) config.head_dim = options->head_dim;
    if (options->ffn) config.ffn = options->ffn;
    if (options->vocab_size) config.vocab_size = options->vocab_size;
    if (options->window) config.window = options->window;
    if (options->attention >= 0) config.attention = (AttentionKind)options->attention;
    if (options->gqa >= 0) config.gqa = (GqaKind)options->gqa;
    if (options->kconv >= 0) config.kconv = options->kconv;
    if (options->moba_block) config.moba_block = options->moba_block;
    if (options->moba_topk) config.moba_topk = options->moba_topk;
    if (options->sequence_length) config.sequence_length = options->sequence_length;
    if (options->rope_theta != 0) config.rope_theta = options->rope_theta;
    if (options->norm_eps != 0) config.norm_eps = options->norm_eps;
    if (options->tied >= 0) config.tied = options->tied;
    if (options->pattern) {
        if (strlen(options->pattern) > PATTERN_MAX)
            fail_usage("--pattern %s: longer than %d letters", options->pattern, PATTERN_MAX);
        strcpy(config.pattern, options->pattern);
    }
    if (options->position) set_position(&config, options->position);
    model_config_complete(&config);
    return config;
}

// An option, and the kinds with which it has an effect.
typedef struct {
    int key;
    int attentions, gqas; // sets of kinds
} OptionKinds;

static const OptionKinds option_kinds[] = {
    {KEY_MOBA_BLOCK, KINDS_WITH_BLOCKS, ALL_KINDS},
    {KEY_MOBA_TOPK, KINDS_WITH_BLOCKS, ALL_KINDS},
    {KEY_MOBA_WORKSPACE, 1 << ATTENTION_FLASHMOBA, ALL_KINDS},
    {KEY_KD_SOURCE, ALL_KINDS, KINDS_BY_KEYS},
    {KEY_KD_MIN_HEADS, ALL_KINDS, KINDS_BY_KEYS},
    {KEY_KD_WINDOW, ALL_KINDS, 1 << GQA_DYNAMIC},
    {KEY_KD_BETA, ALL_KINDS, 1 << GQA_DYNAMIC},
    {KEY_DGQA_KIND, ALL_KINDS, 1 << GQA_DYNAMIC},
    {KEY_PGQA_NOISE, ALL_KINDS, 1 << GQA_PERTURBED},
};

// Fails if the model's kind is not in the set of kinds with which option `key` has an effect.
static inline void option_must_fit(int key, const char* kind_option, const char* const* names, int kind,
                                   int kinds) {
    if (kinds >> kind & 1) return;
    fail_usage("%s: has an effect with %s %s only, and this model has %s %s", option_name(key), kind_option,
               option_names(names, kinds), kind_option, names[kind]);
}

// Fails if the user gave an option that has no effect with the model's kinds. Sets heads_by_keys.dynamic to 1
// for dgqa, else to 0.
static inline void options_check_kinds(Options* options, const ModelConfig* config) {
    for (size_t i = 0; i < sizeof(option_kinds) / sizeof(option_kinds[0]); i++) {
        const OptionKinds* option = &option_kinds[i];
        if (!options->given[option->key]) continue;
        option_must_fit(option->key, "--attention", attention_names, (int)config->attention,
                        option->attentions);
        option_must_fit(option->key, "--query-heads", gqa_names, (int)config->gqa, option->gqas);
    }
    options->heads_by_keys.dynamic = config->gqa == GQA_DYNAMIC;
}

#endif
