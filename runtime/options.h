/*
The command line of train_gpt: one table of options, read by glibc's argp.

    Options options = options_parse(argc, argv);       // prints help, or fails with exit code 2
    ModelConfig config = options_model(&options, base);  // base: a descriptor's sizes or a checkpoint's

Single letters are llm.c's where the meaning is the same. The parser refuses a value of the wrong form.
model_config_check() and the program's start check the rules that join several options.
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
static const char* const recompute_names[RECOMPUTE_LEVELS] = {"none", "mlp", "layer"};

typedef struct {
    // Model. 0 or NULL: not given.
    const char* model;
    int layers, channels, heads, kv_heads, head_dim, ffn, vocab_size, window, moba_block, moba_topk;
    size_t moba_workspace; // bytes
    const char* pattern;
    const char* position;
    float rope_theta, norm_eps;
    int tied; // -1: not given
    const char* init_from;
    // Heads
    AllocationSettings heads_by_keys; // of GQA=kdgqa and dgqa
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
} Options;

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
    KEY_USAGE
};

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
    {"pattern", KEY_PATTERN, "LETTERS", 0,
     "a letter a layer, repeated: G global, S sliding window (default G)", 0},
    {"window", KEY_WINDOW, "W", 0, "window of the S layers in tokens (default 256)", 0},
    {"moba-block", KEY_MOBA_BLOCK, "S", 0,
     "keys of a block, in builds of ATTN=moba and flashmoba (default 128)", 0},
    {"moba-topk", KEY_MOBA_TOPK, "K", 0, "blocks that a query attends to, its own among them (default 8)", 0},
    {"moba-workspace", KEY_MOBA_WORKSPACE, "MB", 0,
     "MB (1048576 bytes) for lists and partial rows of the heads that a GPU computes at a time (default "
     "1024)",
     0},
    {"position", KEY_POSITION, "KINDS", 0, "rope, none, or by letter: S=rope,G=none (default rope)", 0},
    {"rope-theta", KEY_ROPE_THETA, "X", 0, "base of the rotary angles (default 10000)", 0},
    {"norm-eps", KEY_NORM_EPS, "X", 0, "epsilon of RMSNorm (default 1e-5)", 0},
    {"tied", KEY_TIED, 0, 0, "the output head is the embedding (default)", 0},
    {"untied", KEY_UNTIED, 0, 0, "the output head is a matrix of its own", 0},
    {"init-from", KEY_INIT_FROM, "DIR", 0,
     "start from the weights of this checkpoint, ours or Hugging Face's", 0},

    {0, 0, 0, 0, "Query heads by keys (builds of GQA=kdgqa, dgqa, pgqa)", 0},
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

// Reads the name of a file, or another text that must not be empty.
static inline const char* option_text(int key, const char* text) {
    if (!text[0]) fail_usage("%s: is empty", option_name(key));
    return text;
}

// Fails if the option belongs to a variant (a bit of `variants`) that this
// build is not: it would have no effect.
static inline void option_needs_variant(int key, int variants, const char* names) {
    if (!(1 << gqa_of_build() & variants))
        fail_usage("%s: of builds with GQA=%s; this one is GQA=%s", option_name(key), names, GQA_NAME);
}

static inline int option_choice(int key, const char* text, const char* const* names, int count) {
    char rule[128] = "";
    for (int i = 0; i < count; i++) {
        if (!strcmp(text, names[i])) return i;
        snprintf(rule + strlen(rule), sizeof(rule) - strlen(rule), "%s%s", i ? " or " : "", names[i]);
    }
    fail_usage("%s %s: want %s", option_name(key), text, rule);
}

// Reads the options of the key-driven variants.
static inline void option_parse_heads(AllocationSettings* heads, int key, const char* text) {
    const int dynamic_only = key == KEY_KD_WINDOW || key == KEY_KD_BETA || key == KEY_DGQA_KIND;
    if (dynamic_only) option_needs_variant(key, 1 << GQA_DYNAMIC, "dgqa");
    else option_needs_variant(key, 1 << GQA_KEY | 1 << GQA_DYNAMIC, "kdgqa or dgqa");
    if (key == KEY_KD_SOURCE)
        heads->source = (StatisticSource)option_choice(key, text, statistic_source_names, STATISTIC_SOURCES);
    if (key == KEY_KD_MIN_HEADS) heads->least = (int)option_integer(key, text, 0, 1024);
    if (key == KEY_KD_WINDOW) heads->window = (int)option_integer(key, text, 1, INT_MAX);
    if (key == KEY_KD_BETA) heads->beta = option_number(key, text, 0, 1);
    if (key == KEY_DGQA_KIND) heads->kind = (DgqaKind)option_choice(key, text, dgqa_kind_names, 2);
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
        help_print_words(option->doc, column);
    }
    printf("\nExit codes: 0 done, 1 something outside was wrong, 2 the command line was.\n"
           "See README.md for examples.\n");
    if (fflush(stdout) != 0) fail("the help cannot be written: %s", strerror(errno));
}

static inline error_t option_parse(int key, char* text, struct argp_state* state) {
    Options* options = (Options*)state->input;
    const long many = 1L << 40, millions = 1L << 24;
    switch (key) {
    case 'e':
        options->model = option_text(key, text);
        break;
    case KEY_LAYERS:
        options->layers = (int)option_integer(key, text, 1, 1024);
        break;
    case KEY_CHANNELS:
        options->channels = (int)option_integer(key, text, 1, 1 << 17);
        break;
    case KEY_HEADS:
        options->heads = (int)option_integer(key, text, 1, 1024);
        break;
    case KEY_KV_HEADS:
        options->kv_heads = (int)option_integer(key, text, 1, 1024);
        break;
    case KEY_HEAD_DIM:
        options->head_dim = (int)option_integer(key, text, 1, 1024);
        break;
    case KEY_FFN:
        options->ffn = (int)option_integer(key, text, 1, 1 << 20);
        break;
    case KEY_VOCAB:
        options->vocab_size = (int)option_integer(key, text, 2, millions);
        break;
    case KEY_PATTERN:
        options->pattern = option_text(key, text);
        break;
    case KEY_WINDOW:
        options->window = (int)option_integer(key, text, 1, millions);
        break;
    case KEY_MOBA_BLOCK:
    case KEY_MOBA_TOPK:
    case KEY_MOBA_WORKSPACE:
        if (attention_of_build() == ATTENTION_DENSE)
            fail_usage("%s: of builds with ATTN=moba or flashmoba; this one is ATTN=dense", option_name(key));
        if (key == KEY_MOBA_WORKSPACE && attention_of_build() == ATTENTION_MOBA)
            fail_usage("%s: of builds with ATTN=flashmoba; this one is ATTN=moba", option_name(key));
        if (key == KEY_MOBA_BLOCK) options->moba_block = (int)option_integer(key, text, 1, 1 << 16);
        else if (key == KEY_MOBA_TOPK) options->moba_topk = (int)option_integer(key, text, 1, 1 << 10);
        else options->moba_workspace = (size_t)option_integer(key, text, 1, 1 << 20) << 20;
        break;
    case KEY_POSITION:
        options->position = option_text(key, text);
        break;
    case KEY_ROPE_THETA:
        options->rope_theta = (float)option_number(key, text, 1, 1e12);
        break;
    case KEY_NORM_EPS:
        options->norm_eps = (float)option_number(key, text, 1e-12, 1);
        break;
    case KEY_TIED:
        options->tied = 1;
        break;
    case KEY_UNTIED:
        options->tied = 0;
        break;
    case KEY_INIT_FROM:
        options->init_from = option_text(key, text);
        break;
    case KEY_KD_SOURCE:
    case KEY_KD_WINDOW:
    case KEY_KD_BETA:
    case KEY_KD_MIN_HEADS:
    case KEY_DGQA_KIND:
        option_parse_heads(&options->heads_by_keys, key, text);
        break;
    case KEY_PGQA_NOISE:
        option_needs_variant(key, 1 << GQA_PERTURBED, "pgqa");
        options->pgqa_noise = option_number(key, text, 0, 1e6);
        break;
    case 'i':
        options->train_data = option_text(key, text);
        break;
    case 'j':
        options->val_data = option_text(key, text);
        break;
    case KEY_TOKENIZER:
        options->tokenizer = option_text(key, text);
        break;
    case 'b':
        options->batch = (int)option_integer(key, text, 1, 1 << 20);
        break;
    case 't':
        options->sequence_length = (int)option_integer(key, text, 1, millions);
        break;
    case 'd':
        options->total_batch = option_integer(key, text, 1, many);
        break;
    case 'x':
        options->steps = option_integer(key, text, -1, INT_MAX);
        break;
    case 'l':
        options->learning_rate = option_number(key, text, 0, 1e3);
        break;
    case 'k':
        options->schedule = schedule_kind_from_name(text);
        break;
    case 'u':
        options->warmup = (int)option_integer(key, text, 0, INT_MAX);
        break;
    case 'q':
        options->final_lr_fraction = option_number(key, text, 0, 1);
        break;
    case KEY_DECAY_FRACTION:
        options->decay_fraction = option_number(key, text, 0, 1);
        break;
    case KEY_BETA1:
        options->beta1 = option_number(key, text, 0, 0.9999999);
        break;
    case KEY_BETA2:
        options->beta2 = option_number(key, text, 0, 0.9999999);
        break;
    case KEY_EPS:
        // When a second moment underflows to 0, eps is the divisor: a smaller one
        // gives huge steps, and 0 gives 0/0.
        options->eps = option_number(key, text, 1e-20, 1);
        break;
    case 'c':
        options->weight_decay = option_number(key, text, 0, 100);
        break;
    case KEY_CLIP:
        options->clip = option_number(key, text, 0, 1e9);
        break;
    case KEY_ZERO:
        options->zero = (int)option_integer(key, text, 0, 1);
        break;
    case KEY_RECOMPUTE:
        options->recompute = (Recompute)option_choice(key, text, recompute_names, RECOMPUTE_LEVELS);
        break;
    case KEY_CUDA_GRAPH:
        options->cuda_graph = 1;
        break;
    case 'o':
        options->output = option_text(key, text);
        break;
    case 'n':
        options->checkpoint_every = option_integer(key, text, 0, INT_MAX);
        break;
    case KEY_KEEP:
        options->keep = (int)option_integer(key, text, 0, INT_MAX);
        break;
    case KEY_RESUME:
        options->resume = 1;
        break;
    case 'y':
        options->resume = (int)option_integer(key, text, 0, 1);
        break;
    case KEY_ALLOW_OTHER_DATA:
        options->allow_other_data = 1;
        break;
    case KEY_OVERWRITE:
        options->overwrite = 1;
        break;
    case KEY_MAX_SECONDS:
        options->max_seconds = option_number(key, text, 0, 1e9);
        break;
    case KEY_SEED:
        options->seed = (uint64_t)option_integer(key, text, 0, LONG_MAX);
        break;
    case KEY_DRY_RUN:
        options->dry_run = 1;
        break;
    case 'v':
        options->val_every = option_integer(key, text, 0, INT_MAX);
        break;
    case 'm':
        options->val_batches = option_integer(key, text, 1, INT_MAX);
        break;
    case KEY_LOG_EVERY:
        options->log_every = option_integer(key, text, 1, INT_MAX);
        break;
    case 's':
        options->sample_every = option_integer(key, text, 0, INT_MAX);
        break;
    case 'g':
        options->sample_length = (int)option_integer(key, text, 1, millions);
        break;
    case KEY_TEMPERATURE:
        options->temperature = option_number(key, text, 0, 1e6);
        break;
    case KEY_TOP_K:
        options->top_k = (int)option_integer(key, text, 0, INT_MAX);
        break;
    case KEY_TOP_P:
        options->top_p = option_number(key, text, 0, 1);
        break;
    case KEY_PROMPT:
        options->prompt = text;
        break;
    case KEY_GENERATE:
        options->generate = 1;
        break;
    case KEY_WRITE_LOGITS:
        options->write_logits = option_text(key, text);
        break;
    case KEY_TOKENS:
        options->tokens = text;
        break;
    case KEY_EVAL_RETRIEVAL:
        options->eval_retrieval = option_text(key, text);
        break;
    case KEY_HELP:
        options_print_help();
        exit(0);
    case KEY_USAGE:
        argp_state_help(state, stdout, ARGP_HELP_USAGE | ARGP_HELP_EXIT_OK);
        break;
    case ARGP_KEY_ARG:
        fail_usage("%s: not an option (every argument is --name value; see --help)", text);
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
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
    options.tied = -1;
    options.heads_by_keys = allocation_defaults(gqa_of_build() == GQA_DYNAMIC);
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

// "rope" and "none" apply to every layer, "S=rope,G=none" to the layers of each letter.
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

// Returns the sizes of `base`, overridden by the user's options and completed. The vocabulary may still be 0.
// model_config_check() checks them.
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

#endif
