/*
A run of the trainer: its options, model, data and place in the training, and the checks that these fit together.

    static Run run;
    run.options = options_parse(argc, argv);
    run_find_checkpoints(&run);           // --resume, --init-from
    run_choose_model(&run);               // run.config; loads the tokenizer
    run_open_data(&run);                  // run.train, run.val, the number of steps
    run_agree(&run, argc, argv);          // all ranks have the same build, arguments and data
    run_prepare_output(&run);             // rank 0: the directory, its lock, the copy of the tokenizer

On an error, each function prints one line and ends the process with exit code 1 or 2 (runtime/checks.h).
Before run_prepare_output(), only run_find_checkpoints() changes files, and only in an existing run directory:
rank 0 locks the directory and, with --resume, removes half-written files.
*/
#ifndef RUNTIME_RUN_H
#define RUNTIME_RUN_H

#include <omp.h>
#include "dataloader.h"          // defines DataLoader, loader_open
#include "runtime/attention.h"   // defines layer_shape, attention_module
#include "runtime/checkpoint.h"  // defines TrainingState, checkpoint_latest, checkpoint_read_config
#include "runtime/comm.h"        // defines comm_rank, comm_must_agree
#include "runtime/gpus.h"        // defines gpu_peak_flops
#include "runtime/limits.h"      // defines limits_try_threads
#include "runtime/metrics.h"     // defines Metrics, metrics_describe_number
#include "runtime/options.h"     // defines Options
#include "runtime/run_lock.h"    // defines run_lock
#include "runtime/schedule.h"    // defines Schedule
#include "runtime/signals.h"     // defines signals_stop
#include "tokenizer/tokenizer.h" // defines Tokenizer

typedef struct {
    Options options;
    ModelConfig config;
    char resume_from[PATH_MAX];    // the checkpoint to resume, or ""
    char init_from[PATH_MAX];      // the checkpoint whose weights to start with, or ""
    char tokenizer_path[PATH_MAX]; // "": no tokenizer
    Tokenizer* tokenizer;          // NULL: no tokenizer
    DataLoader* train;
    DataLoader* val;         // NULL: no validation data
    long sequences_per_step; // of all ranks
    long sequences_per_rank; // in one step
    int steps;
    Schedule schedule;
    size_t resident; // bytes of main memory in use before the model is allocated
    TrainingState state;
    char changes[CHANGES_BYTES]; // settings and data that differ from the resumed checkpoint's; "": none
    // Pinned host memory for the transfers of a step. Every micro-batch has its own place, so the host can
    // queue a whole step without waiting for a copy to finish.
    int* tokens;       // (sequences_per_rank, T)
    int* targets;      // (sequences_per_rank, T)
    float_acc* losses; // (sequences_per_rank, T)
    // With --cuda-graph
    Graph graph;
    int recorded_step; // the step that `graph` holds; -1: none
} Run;

// The signal that asks the run to stop; 0: none. A signal to one rank counts
// for all: all ranks call this together.
static inline int stop_wanted(void) { return comm_max(signals_stop()); }

// Returns the tokenizer's vocabulary size, or the model's if there is no tokenizer. A published model may have
// more embedding rows than tokens. These rows take part in the softmax, but sampling ignores them.
static inline int known_tokens(const ModelConfig* config, const Tokenizer* tokenizer) {
    return tokenizer ? tokenizer_vocab_size(tokenizer) : config->vocab_size;
}

// Tests whether the run can start its threads; the OpenMP library would abort otherwise. All ranks hold their
// test threads at once, because a limit can cover the whole machine.
static inline void run_check_threads(void) {
    const int needed = omp_get_max_threads(); // this thread is one of OpenMP's; the loader's thread adds one
    const int possible = limits_try_threads(needed, comm_barrier);
    if (possible == needed) return;
    char remedy[64] = "";
    if (possible > 0) snprintf(remedy, sizeof(remedy), "; OMP_NUM_THREADS=%d needs no more", possible);
    fail("%d threads are needed and %d can be started: a limit of processes (ulimit -u, or pids.max of a "
         "container) "
         "or of memory%s",
         needed, possible, remedy);
}

// ----------------------------------------------------------------------------
// Options, checkpoints and the model

static inline void run_check_graph(const Options* options) {
    if (!options->cuda_graph) return;
    if (!DEVICE_HAS_GRAPHS)
        fail_usage("--cuda-graph: of builds with DEVICE=cuda or simt; this one is DEVICE=%s", DEVICE_NAME);
    if (!comm_can_be_recorded())
        fail_usage("--cuda-graph: not under mpirun with this build, whose gradients the host adds up");
}

// Whether this process trains, and so writes checkpoints and metrics to a run's directory.
static inline int run_is_to_train(const Options* options) {
    return !options->dry_run && !options->generate && !options->write_logits && !options->eval_retrieval;
}

static inline void run_find_checkpoints(Run* run) {
    const Options* options = &run->options;
    if (options->resume && !options->output) fail_usage("--resume: needs --output, the directory of the run");
    if (options->resume && options->overwrite) fail_usage("--resume: goes against --overwrite");
    if (options->output && !options->eval_retrieval) checkpoint_check_output(options->output);
    if (options->output && run_is_to_train(options) && comm_rank() == 0 && is_directory(options->output)) {
        run_lock(options->output);
        if (options->resume) checkpoint_clean(options->output);
    }
    comm_barrier();
    if (options->resume && checkpoint_latest(options->output, run->resume_from)) {
        run->state = checkpoint_load_state(run->resume_from);
        return;
    }
    run->resume_from[0] = 0;
    if (options->init_from) checkpoint_resolve(options->init_from, run->init_from);
}

// Checks the options that a mode without training needs.
static inline void run_check_mode(const Run* run) {
    const Options* options = &run->options;
    const char* mode = options->generate         ? "--generate"
                       : options->write_logits   ? "--write-logits"
                       : options->eval_retrieval ? "--eval-retrieval"
                                                 : NULL;
    if (!mode) return;
    if (!run->init_from[0]) fail_usage("%s: needs --init-from, the model to run", mode);
    if (comm_size() > 1) fail_usage("%s: runs in one process, not in %d", mode, comm_size());
    if (options->write_logits && !options->tokens) fail_usage("--write-logits: needs --tokens");
}

// Takes the model's sizes from a checkpoint or a descriptor; the user's options then override them. Loads the
// tokenizer and checks that model, build, tokenizer and checkpoint match.
static inline void run_choose_model(Run* run) {
    Options* options = &run->options;
    const char* directory = run->resume_from[0] ? run->resume_from : run->init_from;
    // Training may start (--init-from) from a model with another kind of attention or sequence length; the
    // weights' shapes are checked when they are read. Resume, --generate and --write-logits require the
    // checkpoint's model to match exactly.
    const int must_match = run->resume_from[0] || options->generate || options->write_logits;
    ModelConfig base;
    if (directory[0] && !options->model) {
        base = checkpoint_read_config(directory);
        // New training from these weights takes the kinds of make ATTN= GQA= KCONV=, if the build has them.
        if (BUILD_CHOOSES_KINDS && !must_match && !options->eval_retrieval) model_config_of_build(&base);
    } else {
        char descriptor[16] = "d12";
        if (options->layers) snprintf(descriptor, sizeof(descriptor), "d%d", options->layers);
        base = model_config_from_descriptor(options->model ? options->model : descriptor);
    }
    run->config = options_model(options, base);

    if (options->tokenizer) path_format(run->tokenizer_path, "%s", options->tokenizer);
    else if (directory[0]) path_format(run->tokenizer_path, "%s/tokenizer.json", directory);
    if (options->tokenizer || path_exists(run->tokenizer_path))
        run->tokenizer = tokenizer_load(run->tokenizer_path);
    else run->tokenizer_path[0] = 0;
    if (options->prompt && !run->tokenizer) fail_usage("--prompt: needs --tokenizer, to read it");

    int* V = &run->config.vocab_size;
    if (!*V && run->tokenizer) *V = tokenizer_vocab_size(run->tokenizer);
    if (!*V && options->train_data) *V = loader_peek_vocabulary(options->train_data);
    if (!*V)
        fail_usage(
            "--vocab: neither a tokenizer nor the shards tell the vocabulary; give --vocab or --tokenizer");
    if (known_tokens(&run->config, run->tokenizer) > *V)
        fail("%s: a vocabulary of %d tokens, the model's has %d", run->tokenizer_path,
             (int)tokenizer_vocab_size(run->tokenizer), *V);
    model_config_complete(&run->config);
    model_config_check(&run->config);
    options_check_kinds(options, &run->config);
    if (!attention_supports_head_dim(run->config.head_dim))
        fail_usage("--heads %d: heads of %d channels; on device %s they have 32, 64 or 128",
                   run->config.heads, run->config.head_dim, DEVICE_NAME);
    for (int l = 0; l < run->config.layers; l++) {
        const AttentionShape shape = layer_shape(&run->config, l, 1, run->config.sequence_length, 0);
        if (!attention_module(layer_attention(&run->config, l))->supports(&shape))
            fail_usage("--moba-block %d --moba-topk %d: on device %s blocks have 16, 32, 64, 128, 256 or 512 "
                       "keys, and a "
                       "query attends to at most 64 of them",
                       run->config.moba_block, run->config.moba_topk, DEVICE_NAME);
    }
    const int least = options->heads_by_keys.least, G = run->config.kv_heads, H = run->config.heads;
    if (heads_are_key_driven(&run->config) && least * G > H)
        fail_usage("--kd-min-heads %d: %d KV heads would need %d query heads, --heads is %d", least, G,
                   least * G, H);
    if (!directory[0]) return;
    if (must_match) checkpoint_check_same_model(directory, &run->config);
    char path[PATH_MAX];
    path_format(path, "%s/tokenizer.json", directory);
    if (!options->tokenizer || !path_exists(path)) return;
    Tokenizer* theirs = tokenizer_load(path);
    if (tokenizer_hash(theirs) != tokenizer_hash(run->tokenizer))
        fail("%s: not the tokenizer that %s was trained with", run->tokenizer_path, directory);
    tokenizer_free(theirs);
}

// ----------------------------------------------------------------------------
// Data

// Largest number of tokens in a micro-batch. Up to this limit, no product of sizes overflows.
#define MOST_TOKENS (1L << 28)

static inline void run_open_data(Run* run) {
    Options* options = &run->options;
    const int T = run->config.sequence_length, B = options->batch;
    if ((long)B * T > MOST_TOKENS)
        fail_usage(
            "--batch %d: with --sequence-length %d a micro-batch of %ld tokens; at most %ld are computed "
            "at once",
            B, T, (long)B * T, MOST_TOKENS);
    const long N = comm_size(), least = N * B * T;
    // Without --total-batch, a resumed run uses the total batch of its checkpoint, even with another number of
    // processes.
    if (!options->total_batch) options->total_batch = run->state.total_batch;
    if (!options->total_batch) options->total_batch = least;
    if (options->total_batch % least != 0 && N == 1)
        fail_usage("--total-batch %ld: must be a multiple of --batch %d x --sequence-length %d = %ld tokens",
                   options->total_batch, B, T, least);
    if (options->total_batch % least != 0)
        fail_usage("--total-batch %ld: must be a multiple of %ld processes x --batch %d x --sequence-length "
                   "%d = %ld tokens",
                   options->total_batch, N, B, T, least);
    run->sequences_per_step = options->total_batch / T;
    run->sequences_per_rank = run->sequences_per_step / N;
    uint32_t hash = run->tokenizer ? tokenizer_hash(run->tokenizer) : 0;
    const int known = known_tokens(&run->config, run->tokenizer);
    run->train = loader_open(options->train_data, T, known, hash, options->seed, 1);
    if (options->val_data) {
        if (!hash) hash = loader_tokenizer_hash(run->train);
        run->val = loader_open(options->val_data, T, known, hash, options->seed, 0);
    }
    // The default number of steps ends one pass over the data. It subtracts the sequences already seen, because
    // earlier steps may have used another total batch.
    const uint64_t all = loader_sequences(run->train), seen = run->state.sequences_seen;
    const uint64_t one_epoch =
        (uint64_t)run->state.step + (all > seen ? all - seen : 0) / (uint64_t)run->sequences_per_step;
    if (options->steps < 0 && one_epoch == 0)
        fail_usage("--total-batch %ld: larger than the %llu tokens of one pass over the data; give --steps",
                   options->total_batch, (unsigned long long)(loader_sequences(run->train) * (uint64_t)T));
    if (options->steps < 0 && one_epoch > INT_MAX)
        fail_usage("--steps: one pass over the data is too many; give --steps");
    run->steps = options->steps < 0 ? (int)one_epoch : (int)options->steps;
    if (options->warmup > run->steps)
        fail_usage("--warmup %d: more than the %d steps of the run", options->warmup, run->steps);
    run->schedule.kind = options->schedule;
    run->schedule.max_lr = options->learning_rate;
    run->schedule.warmup = options->warmup;
    run->schedule.steps = run->steps;
    run->schedule.final_fraction = options->final_lr_fraction;
    run->schedule.decay_fraction = options->decay_fraction;
}

// ----------------------------------------------------------------------------
// A resumed run, and runs of several ranks

// Compares the data with the checkpoint's. Other data would have another order: some
// sequences would come twice and others never.
static inline void check_same_data(Run* run, const TrainingState* before) {
    const TrainingState* now = &run->state;
    const Options* options = &run->options;
    if (!before->data_fingerprint) {
        printf("%s/state.json does not tell its data: they may have changed since\n", run->resume_from);
        return;
    }
    if (before->data_fingerprint != now->data_fingerprint) {
        if (!options->allow_other_data)
            fail("--train-data %s: other data (%d shards, %llu tokens) than %s has seen (%d shards, %llu "
                 "tokens): "
                 "all sequences would come in another order; --allow-other-data goes on with them",
                 options->train_data, now->data_shards, (unsigned long long)now->data_tokens,
                 run->resume_from, before->data_shards, (unsigned long long)before->data_tokens);
        changes_add(run->changes, "other --train-data (%d shards of %llu tokens to %d of %llu)",
                    before->data_shards, (unsigned long long)before->data_tokens, now->data_shards,
                    (unsigned long long)now->data_tokens);
    }
    if (before->val_fingerprint != now->val_fingerprint)
        changes_add(run->changes, !now->val_fingerprint ? "no --val-data" : "other --val-data");
}

// A resumed run must have the seed of its checkpoint and, without --allow-other-data, the training data.
// Other settings may change; run->changes lists the changes.
static inline void run_check_resume(Run* run, const TrainingState* before) {
    const Options* options = &run->options;
    if (before->seed != options->seed)
        fail("--seed %llu: %s was begun with seed %llu", (unsigned long long)options->seed, run->resume_from,
             (unsigned long long)before->seed);
    if (before->step > run->steps)
        fail_usage("--steps %d: %s has done %d already", run->steps, run->resume_from, before->step);
    check_same_data(run, before);
    checkpoint_changed_settings(run->changes, before, &run->state);
}

static inline void agree_on_shards(const char* what, const DataLoader* loader) {
    comm_must_agree(what, "of %d shards", loader ? loader->shard_count : 0);
    for (int i = 0; loader && i < loader->shard_count; i++) {
        const TokenShard* shard = &loader->shards[i];
        comm_must_agree(what, "%s of %u tokens, vocabulary %d, tokenizer %08x, hash of some tokens %016llx",
                        shard->path, shard->tokens, shard->vocab_size, shard->tokenizer_hash,
                        (unsigned long long)shard_fingerprint(shard));
    }
}

// Fails if ranks have different builds, arguments or checkpoints, or see different data files.
static inline void run_agree(const Run* run, int argc, char** argv) {
    const ModelConfig* config = &run->config;
    if (comm_size() == 1) return;
    comm_must_agree("the build", "DEVICE=%s PRECISION=%s", DEVICE_NAME, PRECISION_NAME);
    comm_must_agree("the number of arguments", "%d", argc - 1);
    for (int i = 1; i < argc; i++) {
        char name[64];
        snprintf(name, sizeof(name), "argument %d, after %.32s,", i, i > 1 ? argv[i - 1] : "the program");
        comm_must_agree(name, "%s", argv[i]);
    }
    comm_must_agree("the model",
                    "%d layers, %d channels, %d heads of %d, %d kv heads, ffn %d, vocabulary %d, T %d, "
                    "pattern %s, attention %s, "
                    "query heads %s, kconv %d",
                    config->layers, config->channels, config->heads, config->head_dim, config->kv_heads,
                    config->ffn, config->vocab_size, config->sequence_length, config->pattern,
                    attention_names[config->attention], gqa_names[config->gqa], config->kconv);
    comm_must_agree("the checkpoint to resume", "%s", run->resume_from[0] ? run->resume_from : "none");
    comm_must_agree("the checkpoint to start from", "%s", run->init_from[0] ? run->init_from : "none");
    comm_must_agree("the tokenizer's hash", "%08x", run->tokenizer ? tokenizer_hash(run->tokenizer) : 0);
    agree_on_shards("the training data", run->train);
    agree_on_shards("the validation data", run->val);
    comm_barrier(); // a rank that does not agree fails before this, so no other rank goes on
}

// ----------------------------------------------------------------------------
// Output

// Makes the run's directory ready. It refuses to change an existing run without --resume or --overwrite.
static inline void run_prepare_output(Run* run) {
    const Options* options = &run->options;
    if (!options->output) return;
    make_directories_or_fail(options->output);
    run_lock(options->output);
    char path[PATH_MAX];
    path_format(path, "%s/metrics.jsonl", options->output);
    char latest[PATH_MAX];
    const int begun = checkpoint_latest(options->output, latest);
    if ((begun || path_exists(path)) && !options->resume && !options->overwrite)
        fail_usage("--output %s: holds a run; go on with --resume, delete it with --overwrite, or name "
                   "another directory",
                   options->output);
    if (begun && options->resume && !run->resume_from[0])
        fail("--output %s: another run has begun there since this one looked for a checkpoint; start again",
             options->output);
    checkpoint_clean(options->output);
    if (options->overwrite) {
        checkpoint_remove_all(options->output);
        remove_path(path);
    }
    // The run keeps its own copy of the tokenizer. Every checkpoint gets a copy of that.
    path_format(path, "%s/tokenizer.json", options->output);
    if (run->tokenizer) {
        tokenizer_save_json(run->tokenizer, path);
        path_format(run->tokenizer_path, "%s", path);
    }
}

// Fills in the settings that a checkpoint's state.json stores. The training loop updates the run's progress.
static inline void run_describe_state(Run* run) {
    const Options* options = &run->options;
    TrainingState* state = &run->state;
    state->seed = options->seed;
    state->total_batch = options->total_batch;
    state->sequence_length = run->config.sequence_length;
    snprintf(state->schedule, sizeof(state->schedule), "%s", schedule_names[options->schedule]);
    state->max_steps = run->steps;
    state->warmup_steps = run->schedule.warmup;
    state->learning_rate = options->learning_rate;
    state->final_lr_fraction = options->final_lr_fraction;
    state->decay_fraction = options->decay_fraction;
    state->beta1 = options->beta1;
    state->beta2 = options->beta2;
    state->epsilon = options->eps;
    state->weight_decay = options->weight_decay;
    state->grad_clip = options->clip;
    state->data_fingerprint = loader_fingerprint(run->train);
    state->data_tokens = loader_tokens(run->train);
    state->data_shards = run->train->shard_count;
    state->val_fingerprint = run->val ? loader_fingerprint(run->val) : 0;
    if (run->state.step == 0) state->train_loss = state->val_loss = NAN;
}

static inline void describe_heads(MetricsOptions* to, const AllocationSettings* heads) {
    metrics_describe_text(to, "kd_source", statistic_source_names[heads->source]);
    metrics_describe_number(to, "kd_min_heads", heads->least);
    if (!heads->dynamic) return;
    metrics_describe_text(to, "dgqa_kind", dgqa_kind_names[heads->kind]);
    metrics_describe_number(to, "kd_window", heads->window);
    metrics_describe_number(to, "kd_beta", heads->beta);
}

static inline void run_start_metrics(Metrics* metrics, const Run* run) {
    const Options* options = &run->options;
    const ModelConfig* config = &run->config;
    static MetricsOptions to;
    memset(&to, 0, sizeof(to));
    to.directory = comm_rank() == 0 ? options->output : NULL;
    to.quiet = comm_rank() > 0;
    to.resume_step = run->state.step;
    to.unmeasured = run->state.unmeasured;
    to.total_steps = run->steps;
    to.log_every = (int)options->log_every;
    to.tokens_per_step = (uint64_t)options->total_batch;
    to.tokens_before = run->state.sequences_seen * (uint64_t)config->sequence_length;
    to.flops_per_step = flops_per_token(config, config->sequence_length) * (double)options->total_batch;
    to.peak_flops = gpu_peak_flops(device_name(), PRECISION_NAME) * comm_size();
    metrics_describe_text(&to, "attn", attention_names[config->attention]);
    metrics_describe_text(&to, "gqa", gqa_names[config->gqa]);
    metrics_describe_number(&to, "kconv", config->kconv);
    if (heads_are_key_driven(config)) describe_heads(&to, &options->heads_by_keys);
    if (config->gqa == GQA_PERTURBED) metrics_describe_number(&to, "pgqa_noise", options->pgqa_noise);
    metrics_describe_text(&to, "precision", PRECISION_NAME);
    metrics_describe_number(&to, "layers", config->layers);
    metrics_describe_number(&to, "channels", config->channels);
    metrics_describe_number(&to, "heads", config->heads);
    metrics_describe_number(&to, "kv_heads", config->kv_heads);
    metrics_describe_number(&to, "head_dim", config->head_dim);
    metrics_describe_number(&to, "ffn", config->ffn);
    metrics_describe_number(&to, "vocab", config->vocab_size);
    metrics_describe_text(&to, "pattern", config->pattern);
    metrics_describe_number(&to, "window", config->window);
    if (attention_chooses_blocks(config->attention)) {
        metrics_describe_number(&to, "moba_block", config->moba_block);
        metrics_describe_number(&to, "moba_topk", config->moba_topk);
    }
    metrics_describe_number(&to, "sequence_length", config->sequence_length);
    metrics_describe_number(&to, "batch", options->batch);
    metrics_describe_number(&to, "total_batch", (double)options->total_batch);
    metrics_describe_number(&to, "steps", run->steps);
    metrics_describe_text(&to, "schedule", schedule_names[options->schedule]);
    metrics_describe_number(&to, "learning_rate", options->learning_rate);
    metrics_describe_number(&to, "warmup", options->warmup);
    metrics_describe_number(&to, "final_lr_fraction", options->final_lr_fraction);
    if (options->schedule == SCHEDULE_WSD)
        metrics_describe_number(&to, "decay_fraction", options->decay_fraction);
    metrics_describe_number(&to, "beta1", options->beta1);
    metrics_describe_number(&to, "beta2", options->beta2);
    metrics_describe_number(&to, "eps", options->eps);
    metrics_describe_number(&to, "weight_decay", options->weight_decay);
    metrics_describe_number(&to, "clip", options->clip);
    metrics_describe_number(&to, "seed", (double)options->seed);
    metrics_start(metrics, &to);
}

// Writes a line of metrics.jsonl with the member `key`: `value`, and frees `value`.
static inline void log_member(Metrics* metrics, int step, const char* key, cJSON* value) {
    char* text = cJSON_PrintUnformatted(value);
    if (!text) fail("out of memory: the line of %s in metrics.jsonl", key);
    metrics_member(metrics, step, key, text);
    cJSON_free(text);
    cJSON_Delete(value);
}

// Returns 1 if --output contains a checkpoint that a printed hint can use.
static inline int run_has_checkpoint(const Options* options) {
    char latest[PATH_MAX];
    return options->output && checkpoint_latest(options->output, latest);
}

// Prints a word for use in a shell, in quotes if it needs them.
static inline void print_word(const char* word) {
    const int plain = !word[strcspn(word, " \t\n\"'\\$`&|;<>()[]{}*?!#~=%")];
    if (plain) printf("%s", word);
    for (const char* c = plain ? "" : word; *c; c++) {
        if (c == word) putchar('\'');
        if (*c == '\'') printf("'\\''");
        else putchar(*c);
        if (!c[1]) putchar('\'');
    }
}

static inline void run_hint_generation(const Run* run, const char* program) {
    printf("---> HINT: ");
    print_word(program);
    printf(" --generate --init-from ");
    print_word(run->options.output);
    printf(run->tokenizer ? " --prompt 'some text' continues a text\n" : " samples from the model\n");
}

#endif
