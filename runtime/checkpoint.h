/*
Checkpoints: a run on disk. A checkpoint is complete or absent. docs/checkpoints.md describes the files.

    checkpoint_clean("out");                           // at start: removes half-written files of a killed run
    const StateRange whole = {0, layout.table.elements, 0};
    checkpoint_save("out", &config, &layout.table, &state, &heads, weights, exp_avg, exp_avg_sq, &whole, 1,
                    tokenizer, 3, stream);

    char path[PATH_MAX];                               // at --resume
    if (checkpoint_latest("out", path)) {
        checkpoint_check_same_model(path, &config);
        TrainingState state = checkpoint_load_state(path);
        checkpoint_load_heads(path, &heads);
        checkpoint_load_model(path, &layout.table, weights, stream);
        checkpoint_load_optimizer(path, &layout.table, exp_avg, exp_avg_sq, &whole, 1, stream);
    }

    checkpoint_resolve("out", path);                   // a checkpoint, an output directory or a saved Llama
    ModelConfig config = checkpoint_read_config(path);

Parameters and optimizer state are in device memory: this file accesses them only by copy_to_host(),
copy_to_device() and device_zero(), and copies pieces of CHECKPOINT_CHUNK bytes. An error of reading or writing
ends the program with one line and exit code 1.
*/
#ifndef RUNTIME_CHECKPOINT_H
#define RUNTIME_CHECKPOINT_H

#include "runtime/allocation.h"
// comm_rank, comm_barrier
#include "runtime/comm.h"
#include "runtime/model.h"
#include "runtime/safetensors.h"
#include "runtime/weights.h"

#define CHECKPOINT_VERSION 2
#define CHANGES_BYTES 1024                  // size of the text that lists a resumed run's changes
#define CHECKPOINT_CHUNK ((size_t)16 << 20) // bytes of host memory that saving and loading need

// ----------------------------------------------------------------------------
// state.json: the progress of a run, and its settings

typedef struct {
    int step;                // optimizer steps done
    uint64_t sequences_seen; // training sequences, of all ranks
    uint64_t seed;
    long total_batch;    // tokens a step
    int sequence_length; // T
    // schedule and optimizer
    char schedule[16]; // cosine, linear, constant, wsd
    long max_steps;
    long warmup_steps;
    double learning_rate;
    double final_lr_fraction; // of the learning rate, at the end of the schedule
    double decay_fraction;    // of max_steps: the last part of a wsd schedule
    double beta1, beta2, epsilon, weight_decay;
    double grad_clip; // largest gradient norm; 0: not clipped
    // results
    double train_loss; // of the last step
    double val_loss;   // the last one measured; nan before the first
    int unmeasured;    // 1: a signal came before `step`'s validation and sample were done; a resume does them
    // the data, by loader_fingerprint(); 0: none, or not known
    uint64_t data_fingerprint, data_tokens, val_fingerprint;
    int data_shards;
} TrainingState;

// The table that writing and reading share. A new member of TrainingState needs one line
// in it, with the first format version that has the member (raise CHECKPOINT_VERSION to
// it). From older checkpoints it is read as 0. A missing `unmeasured` is always read as 0:
// the first checkpoints of version 2 lack it.
typedef enum { STATE_INT, STATE_LONG, STATE_UINT64, STATE_DOUBLE, STATE_TEXT } StateType;
typedef struct {
    const char* name;
    StateType type;
    size_t offset;      // in TrainingState
    size_t size;        // bytes
    int since;          // first format version that has it
    const char* option; // of STATE_OPTION, or NULL
} StateField;

// STATE_OPTION: a setting that a resumed run may change by this option.
#define STATE_OPTION(type, member, since, option)                                                            \
    { #member, type, offsetof(TrainingState, member), sizeof(((TrainingState*)0)->member), since, option }
#define STATE_FIELD(type, member, since) STATE_OPTION(type, member, since, NULL)
static const StateField state_fields[] = {
    STATE_FIELD(STATE_INT, step, 1),
    STATE_FIELD(STATE_UINT64, sequences_seen, 1),
    STATE_FIELD(STATE_UINT64, seed, 1),
    STATE_OPTION(STATE_LONG, total_batch, 1, "--total-batch"),
    STATE_FIELD(STATE_INT, sequence_length, 1),
    STATE_OPTION(STATE_TEXT, schedule, 1, "--schedule"),
    STATE_OPTION(STATE_LONG, max_steps, 1, "--steps"),
    STATE_OPTION(STATE_LONG, warmup_steps, 1, "--warmup"),
    STATE_OPTION(STATE_DOUBLE, learning_rate, 1, "--learning-rate"),
    STATE_OPTION(STATE_DOUBLE, final_lr_fraction, 1, "--final-lr-fraction"),
    STATE_OPTION(STATE_DOUBLE, decay_fraction, 1, "--decay-fraction"),
    STATE_OPTION(STATE_DOUBLE, beta1, 1, "--beta1"),
    STATE_OPTION(STATE_DOUBLE, beta2, 1, "--beta2"),
    STATE_OPTION(STATE_DOUBLE, epsilon, 1, "--eps"),
    STATE_OPTION(STATE_DOUBLE, weight_decay, 1, "--weight-decay"),
    STATE_OPTION(STATE_DOUBLE, grad_clip, 1, "--clip"),
    STATE_FIELD(STATE_DOUBLE, train_loss, 1),
    STATE_FIELD(STATE_DOUBLE, val_loss, 1),
    STATE_FIELD(STATE_INT, unmeasured, 2),
    STATE_FIELD(STATE_UINT64, data_fingerprint, 2),
    STATE_FIELD(STATE_UINT64, data_tokens, 2),
    STATE_FIELD(STATE_UINT64, val_fingerprint, 2),
    STATE_FIELD(STATE_INT, data_shards, 2),
};
#define STATE_FIELDS ((int)(sizeof(state_fields) / sizeof(state_fields[0])))

static inline void checkpoint_write_state(const char* path, const TrainingState* state) {
    cJSON* json = cJSON_CreateObject();
    cJSON_AddNumberToObject(json, "format_version", CHECKPOINT_VERSION);
    for (int i = 0; i < STATE_FIELDS; i++) {
        const StateField* field = &state_fields[i];
        const void* value = (const char*)state + field->offset;
        switch (field->type) {
        case STATE_INT:
            json_add_whole(json, field->name, *(const int*)value);
            break;
        case STATE_LONG:
            json_add_whole(json, field->name, *(const long*)value);
            break;
        case STATE_UINT64:
            json_add_uint64(json, field->name, *(const uint64_t*)value);
            break;
        case STATE_DOUBLE:
            json_add_double(json, field->name, *(const double*)value);
            break;
        case STATE_TEXT:
            cJSON_AddStringToObject(json, field->name, (const char*)value);
            break;
        }
    }
    json_write_file(path, json);
    cJSON_Delete(json);
}

static inline void checkpoint_parse_field(void* value, const StateField* field, const cJSON* item,
                                          const char* path) {
    uint64_t whole = 0;
    const char* text = json_text(item);
    int good = 0;
    switch (field->type) {
    case STATE_INT:
        good = json_get_whole(item, &whole) && whole <= INT_MAX;
        if (good) *(int*)value = (int)whole;
        break;
    case STATE_LONG:
        good = json_get_whole(item, &whole);
        if (good) *(long*)value = (long)whole;
        break;
    case STATE_UINT64:
        good = json_get_uint64(item, (uint64_t*)value);
        break;
    case STATE_DOUBLE:
        good = json_get_double(item, (double*)value);
        break;
    case STATE_TEXT:
        good = text && strlen(text) < field->size;
        if (good) strcpy((char*)value, text);
        break;
    }
    static const char* const wanted[] = {"a whole number from 0 to 2147483647", "a whole number from 0",
                                         "decimal digits in quotes", "a number", "a short text"};
    if (!good) fail("%s: %s must be %s", path, field->name, wanted[field->type]);
}

static inline TrainingState checkpoint_load_state(const char* directory) {
    char path[PATH_MAX];
    path_format(path, "%s/state.json", directory);
    cJSON* json = json_read_object(path);
    uint64_t version;
    if (!json_get_whole(json_get(json, "format_version"), &version) || version < 1)
        fail("%s: no format_version: not a training state", path);
    if (version > CHECKPOINT_VERSION)
        fail("%s: written by a newer version of this program (format %llu, this one reads up to %d)", path,
             (unsigned long long)version, CHECKPOINT_VERSION);
    TrainingState state;
    memset(&state, 0, sizeof(state));
    for (int i = 0; i < STATE_FIELDS; i++) {
        const StateField* field = &state_fields[i];
        if (field->since > (int)version) continue;
        const cJSON* item = json_get(json, field->name);
        if (!item && field->offset == offsetof(TrainingState, unmeasured)) continue;
        if (!item) fail("%s: %s is missing", path, field->name);
        checkpoint_parse_field((char*)&state + field->offset, field, item, path);
    }
    cJSON_Delete(json);
    return state;
}

// Writes a setting in the form that its option takes.
static inline void state_field_text(char text[48], const StateField* field, const TrainingState* state) {
    const void* value = (const char*)state + field->offset;
    if (field->type == STATE_LONG) snprintf(text, 48, "%ld", *(const long*)value);
    if (field->type == STATE_DOUBLE) snprintf(text, 48, "%.9g", *(const double*)value);
    if (field->type == STATE_TEXT) snprintf(text, 48, "%s", (const char*)value);
}

// Appends to a list of changes, separated by commas.
__attribute__((format(printf, 2, 3))) static inline void changes_add(char changes[CHANGES_BYTES],
                                                                     const char* format, ...) {
    const size_t used = strlen(changes);
    va_list arguments;
    va_start(arguments, format);
    if (used) snprintf(changes + used, CHANGES_BYTES - used, ", ");
    vsnprintf(changes + strlen(changes), CHANGES_BYTES - strlen(changes), format, arguments);
    va_end(arguments);
}

// Appends the settings that differ between two states: "--clip 1 to 0.5".
static inline void checkpoint_changed_settings(char changes[CHANGES_BYTES], const TrainingState* before,
                                               const TrainingState* now) {
    for (int i = 0; i < STATE_FIELDS; i++) {
        const StateField* field = &state_fields[i];
        char old_text[48], new_text[48];
        if (!field->option) continue;
        state_field_text(old_text, field, before);
        state_field_text(new_text, field, now);
        if (strcmp(old_text, new_text) != 0)
            changes_add(changes, "%s %s to %s", field->option, old_text, new_text);
    }
}

// ----------------------------------------------------------------------------
// heads.json: the allocation of query heads, and the statistics for the next maps (kdgqa and dgqa)

static inline void checkpoint_write_heads(const char* path, const HeadAllocation* heads) {
    cJSON* json = cJSON_CreateObject();
    cJSON* layers = cJSON_AddArrayToObject(json, "layers");
    for (int l = 0; l < heads->L; l++) {
        const size_t first = (size_t)l * heads->G;
        cJSON* layer = cJSON_CreateObject();
        cJSON_AddItemToArray(layers, layer);
        cJSON_AddItemToObject(layer, "heads", cJSON_CreateIntArray(heads->heads + first, heads->G));
        json_add_whole(layer, "measured", heads->measured[l]);
        json_add_doubles(layer, "statistic", heads->statistic + first, heads->G);
        json_add_whole(layer, "windows", heads->windows[l]);
        json_add_doubles(layer, "history", heads->history + first, heads->G);
        json_add_whole(layer, "moved", heads->moved[l]);
    }
    json_write_file(path, json);
    cJSON_Delete(json);
}

static inline const cJSON* heads_get_row(const cJSON* layer, const char* key, int count, const char* path) {
    const cJSON* row = json_get(layer, key);
    if (!cJSON_IsArray(row) || cJSON_GetArraySize(row) != count)
        fail("%s: every layer must have %s, a list of %d numbers", path, key, count);
    return row->child;
}

static inline uint64_t heads_get_whole(const cJSON* item, const char* key, uint64_t most, const char* path) {
    uint64_t value = 0;
    if (!json_get_whole(item, &value) || value > most)
        fail("%s: %s must be whole numbers from 0 to %llu", path, key, (unsigned long long)most);
    return value;
}

static inline void heads_get_doubles(double* values, const cJSON* layer, const char* key, int count,
                                     const char* path) {
    const cJSON* item = heads_get_row(layer, key, count, path);
    for (int i = 0; i < count; i++, item = item->next)
        if (!json_get_double(item, &values[i])) fail("%s: %s must be numbers", path, key);
}

// Fills in the allocation of a model with heads->L layers, H query heads and G KV heads.
// The caller has called allocation_start().
static inline void checkpoint_load_heads(const char* directory, HeadAllocation* heads) {
    char path[PATH_MAX];
    path_format(path, "%s/heads.json", directory);
    cJSON* json = json_read_object(path);
    const cJSON* layers = json_get(json, "layers");
    if (!cJSON_IsArray(layers) || cJSON_GetArraySize(layers) != heads->L)
        fail("%s: want layers, a list of the model's %d", path, heads->L);
    const cJSON* layer = layers->child;
    for (int l = 0; l < heads->L; l++, layer = layer->next) {
        const size_t first = (size_t)l * heads->G;
        const cJSON* item = heads_get_row(layer, "heads", heads->G, path);
        int sum = 0;
        for (int g = 0; g < heads->G; g++, item = item->next)
            sum += heads->heads[first + g] = (int)heads_get_whole(item, "heads", (uint64_t)heads->H, path);
        if (sum != heads->H)
            fail("%s: layer %d gives %d query heads out, the model has %d", path, l, sum, heads->H);
        map_from_allocation(heads->map + (size_t)l * heads->H, heads->heads + first, heads->G);
        heads->measured[l] = (int)heads_get_whole(json_get(layer, "measured"), "measured", 1, path);
        heads->windows[l] = (int)heads_get_whole(json_get(layer, "windows"), "windows", INT_MAX, path);
        heads->moved[l] = (long)heads_get_whole(json_get(layer, "moved"), "moved", 1ULL << 53, path);
        heads_get_doubles(heads->statistic + first, layer, "statistic", heads->G, path);
        heads_get_doubles(heads->history + first, layer, "history", heads->G, path);
    }
    memcpy(heads->counted, heads->map, (size_t)heads->L * heads->H * sizeof(int));
    cJSON_Delete(json);
}

// ----------------------------------------------------------------------------
// config.json: the model, by Hugging Face's names

typedef struct {
    const char* key;
    size_t offset; // of an int in ModelConfig
    int low, high; // accepted values
    int missing;   // the value if the file has none (LlamaConfig's default); -1: the file must have one
} ConfigField;

static const ConfigField config_fields[] = {
    {"hidden_size", offsetof(ModelConfig, channels), 1, 1 << 17, -1},
    {"intermediate_size", offsetof(ModelConfig, ffn), 1, 1 << 20, -1},
    {"num_hidden_layers", offsetof(ModelConfig, layers), 1, 1024, -1},
    {"num_attention_heads", offsetof(ModelConfig, heads), 1, 1024, -1},
    {"num_key_value_heads", offsetof(ModelConfig, kv_heads), 1, 1024, 0}, // num_attention_heads
    {"head_dim", offsetof(ModelConfig, head_dim), 1, 1024, 0},            // hidden_size / num_attention_heads
    {"vocab_size", offsetof(ModelConfig, vocab_size), 2, 1 << 24, -1},
    {"max_position_embeddings", offsetof(ModelConfig, sequence_length), 1, 1 << 24, 2048},
};
#define CONFIG_FIELDS ((int)(sizeof(config_fields) / sizeof(config_fields[0])))

// 1 if transformers' LlamaForCausalLM accepts the model and computes the same function.
static inline int model_is_llama(const ModelConfig* config) {
    if (config->gqa != GQA_STATIC || config->kconv) return 0;
    if (config->channels % config->heads != 0) return 0; // LlamaConfig refuses it, even with a head_dim
    for (int l = 0; l < config->layers; l++)
        if (layer_kind(config, l) == 'S' || layer_attention(config, l) != ATTENTION_DENSE ||
            !layer_has_rope(config, l))
            return 0;
    return 1;
}

// The number of the token "<|endoftext|>" in a tokenizer.json; -1 if there is none below vocab_size.
static inline int tokenizer_end_of_text(const char* tokenizer_path, int vocab_size) {
    cJSON* tokenizer = json_read_object(tokenizer_path);
    const cJSON* added = json_get(tokenizer, "added_tokens");
    uint64_t id = UINT64_MAX;
    for (const cJSON* token = added ? added->child : NULL; token; token = token->next) {
        const char* content = json_text(json_get(token, "content"));
        if (content && !strcmp(content, "<|endoftext|>") && json_get_whole(json_get(token, "id"), &id)) break;
    }
    cJSON_Delete(tokenizer);
    return id < (uint64_t)vocab_size ? (int)id : -1;
}

static inline void checkpoint_write_config(const char* path, const ModelConfig* config,
                                           const char* tokenizer_path) {
    const int llama = model_is_llama(config);
    const char* architecture = llama ? "LlamaForCausalLM" : "MobaForCausalLM";
    cJSON* json = cJSON_CreateObject();
    cJSON_AddItemToObject(json, "architectures", cJSON_CreateStringArray(&architecture, 1));
    cJSON_AddStringToObject(json, "model_type", llama ? "llama" : "moba");
    for (int i = 0; i < CONFIG_FIELDS; i++)
        cJSON_AddNumberToObject(json, config_fields[i].key,
                                *(const int*)((const char*)config + config_fields[i].offset));
    json_add_float(json, "rms_norm_eps", config->norm_eps);
    json_add_float(json, "rope_theta", config->rope_theta);
    cJSON_AddBoolToObject(json, "tie_word_embeddings", config->tied);
    cJSON_AddStringToObject(json, "hidden_act", "silu");
    cJSON_AddFalseToObject(json, "attention_bias");
    cJSON_AddFalseToObject(json, "mlp_bias");
    json_add_float(json, "initializer_range", 0.02f);
    // The type of the weights in the file: float32 in a bf16 build too, since the masters are saved.
    cJSON_AddStringToObject(json, "torch_dtype", sizeof(float_acc) == 8 ? "float64" : "float32");
    // Written as null if there is no such token: transformers would otherwise assume 1 and 2.
    int end_of_text = tokenizer_path ? tokenizer_end_of_text(tokenizer_path, config->vocab_size) : -1;
    cJSON_AddItemToObject(json, "bos_token_id",
                          end_of_text < 0 ? cJSON_CreateNull() : cJSON_CreateNumber(end_of_text));
    cJSON_AddItemToObject(json, "eos_token_id",
                          end_of_text < 0 ? cJSON_CreateNull() : cJSON_CreateNumber(end_of_text));
    cJSON* moba = cJSON_AddObjectToObject(json, "moba");
    cJSON_AddStringToObject(moba, "attn", attention_names[config->attention]);
    cJSON_AddStringToObject(moba, "gqa", gqa_names[config->gqa]);
    cJSON_AddNumberToObject(moba, "kconv", config->kconv);
    cJSON_AddStringToObject(moba, "pattern", config->pattern);
    cJSON_AddNumberToObject(moba, "window", config->window);
    if (attention_chooses_blocks(config->attention)) {
        cJSON_AddNumberToObject(moba, "block", config->moba_block);
        cJSON_AddNumberToObject(moba, "topk", config->moba_topk);
    }
    cJSON_AddBoolToObject(moba, "rope_global", config->rope_global);
    cJSON_AddBoolToObject(moba, "rope_sliding", config->rope_sliding);
    json_write_file(path, json);
    cJSON_Delete(json);
}

// Fails unless `key` is absent or has the value `wanted`, the only one that this program computes.
static inline void config_want_text(const cJSON* json, const char* key, const char* wanted,
                                    const char* path) {
    const cJSON* item = json_get(json, key);
    if (!item || cJSON_IsNull(item)) return;
    const char* text = json_text(item);
    if (!text || strcmp(text, wanted))
        fail("%s: %s is %s, but only %s is computed here", path, key, text ? json_shown(text) : "not a text",
             wanted);
}

static inline void config_want_off(const cJSON* json, const char* key, const char* path) {
    const cJSON* item = json_get(json, key);
    if (item && !cJSON_IsNull(item) && !cJSON_IsFalse(item))
        fail("%s: %s is set, and this program does not compute that", path, key);
}

static inline int config_get_int(const cJSON* json, const char* key, int low, int high, int missing,
                                 const char* path) {
    const cJSON* item = json_get(json, key);
    uint64_t value;
    if (!item || cJSON_IsNull(item)) {
        if (missing < 0) fail("%s: %s is missing", path, key);
        return missing;
    }
    if (!json_get_whole(item, &value) || value < (uint64_t)low || value > (uint64_t)high)
        fail("%s: %s must be a whole number from %d to %d", path, key, low, high);
    return (int)value;
}

static inline float config_get_positive(const cJSON* json, const char* key, double missing,
                                        const char* path) {
    const cJSON* item = json_get(json, key);
    if (!item || cJSON_IsNull(item)) return (float)missing;
    if (!cJSON_IsNumber(item) || !((float)item->valuedouble > 0) || !isfinite((float)item->valuedouble))
        fail("%s: %s must be a positive number", path, key);
    return (float)item->valuedouble;
}

static inline int config_get_bool(const cJSON* json, const char* key, int missing, const char* path) {
    const cJSON* item = json_get(json, key);
    if (!item || cJSON_IsNull(item)) return missing;
    if (!cJSON_IsBool(item)) fail("%s: %s must be true or false", path, key);
    return cJSON_IsTrue(item);
}

// Fails unless the factor `key` is absent or 1.
static inline void config_want_one(const cJSON* json, const char* key, const char* path) {
    const cJSON* item = json_get(json, key);
    if (item && !cJSON_IsNull(item) && !(cJSON_IsNumber(item) && item->valuedouble == 1))
        fail("%s: %s is not 1, and this program does not compute that", path, key);
}

// Rotary positions: transformers up to version 4 writes rope_theta and
// rope_scaling, from 5 on rope_parameters.
static inline void config_read_rope(ModelConfig* config, const cJSON* json, const char* path) {
    const char* const scaling_keys[] = {"rope_scaling", "rope_parameters"};
    config->rope_theta = config_get_positive(json, "rope_theta", 10000.0, path);
    config_want_one(json, "partial_rotary_factor", path);
    for (int i = 0; i < 2; i++) {
        const cJSON* rope = json_get(json, scaling_keys[i]);
        if (!rope || cJSON_IsNull(rope)) continue;
        if (!cJSON_IsObject(rope)) fail("%s: %s is not an object", path, scaling_keys[i]);
        config_want_text(rope, "rope_type", "default", path);
        config_want_text(rope, "type", "default", path);
        config_want_one(rope, "partial_rotary_factor", path);
        if (!json_get(rope, "rope_type") && !json_get(rope, "type")) config_want_one(rope, "factor", path);
        config->rope_theta = config_get_positive(rope, "rope_theta", (double)config->rope_theta, path);
    }
}

// Reads a kind in the "moba" object, one of `names`.
static inline int config_get_kind(const cJSON* moba, const char* key, const char* const* names,
                                  const char* path) {
    const char* text = json_text(json_get(moba, key));
    const int kind = text ? name_index(names, text) : -1;
    if (kind < 0)
        fail("%s: moba.%s is %s, which this program does not know", path, key,
             text ? json_shown(text) : "not a text");
    return kind;
}

// Reads the "moba" object. A plain Llama has none: all its layers have dense
// global attention and rotary positions.
static inline void config_read_moba(ModelConfig* config, const cJSON* json, const char* path) {
    strcpy(config->pattern, "G");
    config->window = 256;
    config->attention = ATTENTION_DENSE;
    config->gqa = GQA_STATIC;
    config->kconv = 0;
    config->moba_block = 128;
    config->moba_topk = 8;
    config->rope_global = config->rope_sliding = 1;
    const cJSON* moba = json_get(json, "moba");
    if (!moba) return;
    const char* pattern = json_text(json_get(moba, "pattern"));
    config->attention = (AttentionKind)config_get_kind(moba, "attn", attention_names, path);
    config->gqa = (GqaKind)config_get_kind(moba, "gqa", gqa_names, path);
    if (!pattern || !pattern_is_known(pattern))
        fail("%s: moba.pattern must be 1 to %d letters G, D and S", path, (int)PATTERN_MAX);
    strcpy(config->pattern, pattern);
    config->kconv = config_get_int(moba, "kconv", 0, KCONV_MAX, 0, path);
    if (!kconv_is_known(config->kconv)) fail("%s: moba.kconv must be 0, 3 or 5", path);
    config->window = config_get_int(moba, "window", 1, 1 << 24, 256, path);
    config->moba_block = config_get_int(moba, "block", 1, 1 << 16, config->moba_block, path);
    config->moba_topk = config_get_int(moba, "topk", 1, 1 << 10, config->moba_topk, path);
    config->rope_global = config_get_bool(moba, "rope_global", 1, path);
    config->rope_sliding = config_get_bool(moba, "rope_sliding", 1, path);
}

// Checks the rules that join several sizes, as model_config_check() does, but with the names of the file.
static inline void config_check_sizes(ModelConfig* config, const char* path) {
    if (!config->kv_heads) config->kv_heads = config->heads;
    if (!config->head_dim && config->channels % config->heads != 0)
        fail("%s: num_attention_heads %d does not divide hidden_size %d, and there is no head_dim", path,
             config->heads, config->channels);
    if (!config->head_dim) config->head_dim = config->channels / config->heads;
    if (config->head_dim > 1024) fail("%s: heads of %d channels; at most 1024", path, config->head_dim);
    if (config->kv_heads > config->heads || config->heads % config->kv_heads != 0)
        fail("%s: num_key_value_heads %d does not divide num_attention_heads %d", path, config->kv_heads,
             config->heads);
    int any_rope = 0;
    for (int l = 0; l < config->layers; l++) any_rope |= layer_has_rope(config, l);
    if (any_rope && config->head_dim % 2 != 0)
        fail("%s: head_dim %d: rotary positions need an even number", path, config->head_dim);
}

// Reads the model's sizes and kinds from a checkpoint, or from a directory saved by transformers.
static inline ModelConfig checkpoint_read_config(const char* directory) {
    char path[PATH_MAX];
    path_format(path, "%s/config.json", directory);
    cJSON* json = json_read_object(path);
    const char* type = json_text(json_get(json, "model_type"));
    if (!type) fail("%s: no model_type: not a model's configuration", path);
    if (strcmp(type, "llama") && strcmp(type, "moba"))
        fail("%s: model_type %s, but only llama and this program's own models (moba) are read", path,
             json_shown(type));
    if (!strcmp(type, "moba") && !cJSON_IsObject(json_get(json, "moba")))
        fail("%s: model_type moba, but no object moba that says which", path);
    config_want_text(json, "hidden_act", "silu", path);
    config_want_off(json, "attention_bias", path);
    config_want_off(json, "mlp_bias", path);
    config_want_off(json, "quantization_config", path);

    ModelConfig config;
    memset(&config, 0, sizeof(config));
    for (int i = 0; i < CONFIG_FIELDS; i++) {
        const ConfigField* field = &config_fields[i];
        int value = config_get_int(json, field->key, field->low, field->high, field->missing, path);
        *(int*)((char*)&config + field->offset) = value;
    }
    config.norm_eps = config_get_positive(json, "rms_norm_eps", 1e-6, path);
    config.tied = config_get_bool(json, "tie_word_embeddings", 0, path);
    config_read_rope(&config, json, path);
    config_read_moba(&config, json, path);
    config_check_sizes(&config, path);
    model_config_complete(&config);
    cJSON_Delete(json);
    return config;
}

static inline void same_number(const char* directory, const char* option, double saved, double wanted) {
    if (saved != wanted)
        fail("%s: its model has %s %.9g, this run asks for %.9g", directory, option, saved, wanted);
}

static inline void same_text(const char* directory, const char* option, const char* saved,
                             const char* wanted) {
    if (strcmp(saved, wanted))
        fail("%s: its model has %s %s, this run asks for %s", directory, option, saved, wanted);
}

// Fails at the first difference between the checkpoint's model and the wanted one, in a size or in a kind.
static inline void checkpoint_check_same_model(const char* directory, const ModelConfig* want) {
    const ModelConfig saved = checkpoint_read_config(directory);
    same_number(directory, "--layers", saved.layers, want->layers);
    same_number(directory, "--channels", saved.channels, want->channels);
    same_number(directory, "--heads", saved.heads, want->heads);
    same_number(directory, "--kv-heads", saved.kv_heads, want->kv_heads);
    same_number(directory, "--head-dim", saved.head_dim, want->head_dim);
    same_number(directory, "--ffn", saved.ffn, want->ffn);
    same_number(directory, "--vocab", saved.vocab_size, want->vocab_size);
    same_number(directory, "--sequence-length", saved.sequence_length, want->sequence_length);
    same_number(directory, "--tied", saved.tied, want->tied);
    same_number(directory, "--norm-eps", json_float_as_double(saved.norm_eps),
                json_float_as_double(want->norm_eps));
    same_number(directory, "--rope-theta", json_float_as_double(saved.rope_theta),
                json_float_as_double(want->rope_theta));
    for (int l = 0; l < want->layers; l++) {
        if (layer_kind(&saved, l) != layer_kind(want, l))
            same_text(directory, "--pattern", saved.pattern, want->pattern);
        same_number(directory, "--window", layer_window(&saved, l), layer_window(want, l));
        if (layer_has_rope(&saved, l) != layer_has_rope(want, l))
            fail("%s: its layer %d has %s, this run asks for %s (--position)", directory, l,
                 layer_has_rope(&saved, l) ? "rotary positions" : "no positions",
                 layer_has_rope(want, l) ? "rotary positions" : "none");
    }
    same_text(directory, "--attention", attention_names[saved.attention], attention_names[want->attention]);
    if (attention_chooses_blocks(want->attention)) {
        same_number(directory, "--moba-block", saved.moba_block, want->moba_block);
        same_number(directory, "--moba-topk", saved.moba_topk, want->moba_topk);
    }
    same_text(directory, "--query-heads", gqa_names[saved.gqa], gqa_names[want->gqa]);
    same_number(directory, "--kconv", saved.kconv, want->kconv);
}

// ----------------------------------------------------------------------------
// model.safetensors

static inline int all_values_finite(const float_acc* values, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!isfinite(values[i])) return 0;
    return 1;
}

// Writes an array of device memory, in pieces, through one host buffer. If it is the tensor named `weight`
// (not NULL), every value must be finite.
static inline void checkpoint_write_values(SafetensorsWriter* writer, const void* device, Dtype dtype,
                                           size_t count, const char* weight, stream_t stream) {
    const size_t size = dtype_size(dtype), step = CHECKPOINT_CHUNK / size;
    char* host = (char*)malloc_or_fail((count < step ? count : step) * size, "a piece of a checkpoint");
    for (size_t i = 0; i < count; i += step) {
        size_t n = count - i < step ? count - i : step;
        copy_to_host(host, (const char*)device + i * size, n * size, stream);
        stream_synchronize(stream);
        if (weight && !all_values_finite((const float_acc*)(const void*)host, n))
            fail("%s: not written: a value of %s is NaN or infinite: training has diverged; lower "
                 "--learning-rate or lengthen --warmup",
                 writer->path, weight);
        safetensors_write(writer, host, dtype, n);
    }
    free(host);
}

static inline void checkpoint_read_values(const SafetensorsFile* file, const SafetensorsEntry* entry,
                                          size_t first, size_t count, void* device, Dtype dtype,
                                          stream_t stream) {
    const size_t size = dtype_size(dtype), step = CHECKPOINT_CHUNK / size;
    char* host = (char*)malloc_or_fail((count < step ? count : step) * size, "a piece of a checkpoint");
    for (size_t i = 0; i < count; i += step) {
        size_t n = count - i < step ? count - i : step;
        safetensors_read(file, entry, first + i, n, host, dtype);
        copy_to_device((char*)device + i * size, host, n * size, stream);
        stream_synchronize(stream);
    }
    free(host);
}

static inline void checkpoint_write_model(const char* path, const TensorTable* table, Weights weights,
                                          stream_t stream) {
    const float_acc* values = weights_exact(weights);
    SafetensorsWriter writer;
    safetensors_create(&writer, path);
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        safetensors_declare(&writer, tensor->name, DTYPE_FLOAT_ACC, tensor->dims, (uint64_t)tensor->shape[0],
                            (uint64_t)tensor->shape[1]);
    }
    for (int i = 0; i < table->count; i++) // without the rows of padding, which are a tensor's last rows
        checkpoint_write_values(&writer, values + table->tensors[i].offset, DTYPE_FLOAT_ACC,
                                table->tensors[i].count, table->tensors[i].name, stream);
    safetensors_finish(&writer);
}

static inline const Tensor* table_find(const TensorTable* table, const char* name) {
    for (int i = 0; i < table->count; i++)
        if (!strcmp(table->tensors[i].name, name)) return &table->tensors[i];
    return NULL;
}

// Tensors that a Llama's file may hold in addition to the table's: a head that repeats a tied embedding
// (checkpoint_check_tied_head), and the rotary frequencies that old versions of transformers saved.
static inline int checkpoint_may_ignore(const char* name) {
    return !strcmp(name, "lm_head.weight") || strstr(name, ".rotary_emb.inv_freq");
}

// Whether the file may lack this tensor: the taps of a layer without a key convolution, which are then zero.
static inline int checkpoint_may_lack(const char* name, const ModelConfig* saved) {
    int layer;
    if (!strstr(name, ".k_conv.") || sscanf(name, "model.layers.%d.", &layer) != 1) return 0;
    return layer_taps(saved, layer) == 0;
}

// Fails if the file has a tied embedding and a head that is not its copy: without
// that head it would be another model.
static inline void checkpoint_check_tied_head(const SafetensorsFile* file, const TensorTable* table) {
    const SafetensorsEntry *head = safetensors_find(file, "lm_head.weight"),
                           *embedding = safetensors_find(file, "model.embed_tokens.weight");
    if (!head || table_find(table, "lm_head.weight")) return;
    const uint64_t count = safetensors_count(embedding);
    int same = safetensors_count(head) == count;
    enum { PIECE = 8192 };
    float_acc pieces[2][PIECE];
    for (uint64_t i = 0; same && i < count; i += PIECE) {
        const size_t n = (size_t)(count - i < (uint64_t)PIECE ? count - i : (uint64_t)PIECE);
        safetensors_read(file, head, i, n, pieces[0], DTYPE_FLOAT_ACC);
        safetensors_read(file, embedding, i, n, pieces[1], DTYPE_FLOAT_ACC);
        for (size_t k = 0; k < n; k++) same = same && pieces[0][k] == pieces[1][k];
    }
    if (!same)
        fail("%s: its lm_head.weight is not its embedding, though tie_word_embeddings is true; set that to "
             "false "
             "in config.json to use this head, or take the tensor out of the file",
             file->path);
}

// Fails unless file and table have the same tensors with the same shapes.
static inline void checkpoint_check_tensors(const SafetensorsFile* file, const TensorTable* table,
                                            const ModelConfig* saved) {
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        const SafetensorsEntry* entry = safetensors_find(file, tensor->name);
        if (!entry && checkpoint_may_lack(tensor->name, saved)) continue;
        if (!entry) fail("%s: tensor %s is missing", file->path, tensor->name);
        SafetensorsEntry want = *entry;
        want.dims = tensor->dims;
        for (int d = 0; d < tensor->dims; d++) want.shape[d] = (uint64_t)tensor->shape[d];
        if (entry->dims != want.dims ||
            memcmp(entry->shape, want.shape, (size_t)want.dims * sizeof(uint64_t)))
            fail("%s: tensor %s has shape %s, but the model's is %s", file->path, tensor->name,
                 safetensors_shape_text(entry), safetensors_shape_text(&want));
    }
    for (int i = 0; i < file->count; i++)
        if (!table_find(table, file->entries[i].name) && !checkpoint_may_ignore(file->entries[i].name))
            fail("%s: tensor %s is not one of the model's", file->path, json_shown(file->entries[i].name));
}

// Opens a directory's model.safetensors and checks the name and shape of every tensor. The file may be this
// program's, or a Llama that transformers saved in one file.
static inline void checkpoint_open_model(SafetensorsFile* file, const char* directory,
                                         const TensorTable* table) {
    char path[PATH_MAX], index_path[PATH_MAX];
    path_format(path, "%s/model.safetensors", directory);
    path_format(index_path, "%s/model.safetensors.index.json", directory);
    if (!path_exists(path) && path_exists(index_path))
        fail("%s: a model in several files is not read; save it as one (max_shard_size in transformers)",
             index_path);
    safetensors_open(file, path);
    const ModelConfig saved = checkpoint_read_config(directory);
    checkpoint_check_tensors(file, table, &saved);
    checkpoint_check_tied_head(file, table);
}

// Reads a part of a weight from the file and converts it. Fails if a value is not
// finite, since it would make every result NaN.
static inline void checkpoint_read_weight(const SafetensorsFile* file, const SafetensorsEntry* entry,
                                          uint64_t first, size_t count, float_acc* values) {
    safetensors_read(file, entry, first, count, values, DTYPE_FLOAT_ACC);
    if (!all_values_finite(values, count))
        fail("%s: a value of %s is NaN or infinite", file->path, json_shown(entry->name));
}

// Fills the weights (table->elements, in device memory). Rows of padding become zero, and so do the taps of a
// layer that has no key convolution in the checkpoint's model. Elements between tensors stay as they are.
static inline void checkpoint_load_model(const char* directory, const TensorTable* table, Weights weights,
                                         stream_t stream) {
    const size_t step = CHECKPOINT_CHUNK / sizeof(float_acc);
    float_acc* values = (float_acc*)malloc_or_fail(CHECKPOINT_CHUNK, "a piece of a checkpoint");
    SafetensorsFile file;
    checkpoint_open_model(&file, directory, table);
    for (int t = 0; t < table->count; t++) {
        const Tensor* tensor = &table->tensors[t];
        const SafetensorsEntry* entry = safetensors_find(&file, tensor->name);
        if (!entry) weights_zero(weights, tensor->offset, tensor->count, stream);
        for (size_t i = 0; entry && i < tensor->count; i += step) {
            const size_t n = tensor->count - i < step ? tensor->count - i : step;
            checkpoint_read_weight(&file, entry, i, n, values);
            weights_upload(weights, tensor->offset + i, values, n, stream);
        }
        weights_zero(weights, tensor->offset + tensor->count, tensor->padded_count - tensor->count, stream);
    }
    stream_synchronize(stream);
    safetensors_close(&file);
    free(values);
}

// Computes the mean of each group of heads: pooled (G, width) from values (H, width). Group
// g has the next heads[g] rows of `values`.
static inline void pool_heads(float_acc* pooled, const float_acc* values, const int* heads, int G,
                              size_t width) {
    for (int g = 0; g < G; values += (size_t)heads[g] * width, g++) {
        for (size_t i = 0; i < width; i++) {
            double sum = 0;
            for (int h = 0; h < heads[g]; h++) sum += (double)values[(size_t)h * width + i];
            pooled[(size_t)g * width + i] = (float_acc)(heads[g] ? sum / heads[g] : 0);
        }
    }
}

// As checkpoint_load_model(), from a model with more KV heads than config has (Ainslie et al., arXiv
// 2305.13245). The key projection, value projection and taps of a group are the means of its heads';
// everything else is copied. The groups are uniform, as every allocation is at its start. Holds one tensor of
// the checkpoint's model at a time.
static inline void checkpoint_load_pooled(const char* directory, const ModelConfig* config,
                                          const TensorTable* table, Weights weights, stream_t stream) {
    ModelConfig whole = *config;
    whole.kv_heads = checkpoint_read_config(directory).kv_heads;
    ParameterLayout layout = parameter_layout(&whole);
    SafetensorsFile file;
    checkpoint_open_model(&file, directory, &layout.table);
    int* heads = (int*)malloc_or_fail((size_t)config->kv_heads * sizeof(int), "the allocation of heads");
    allocate_uniform(heads, config->kv_heads, whole.kv_heads);
    for (int i = 0; i < table->count; i++) {
        const Tensor *to = &table->tensors[i], *from = &layout.table.tensors[i];
        float_acc* values =
            (float_acc*)calloc_or_fail(from->padded_count, sizeof(float_acc), "a tensor to convert");
        const SafetensorsEntry* entry = safetensors_find(&file, from->name);
        if (entry) checkpoint_read_weight(&file, entry, 0, from->count, values);
        if (strstr(to->name, "self_attn.k_proj") || strstr(to->name, "self_attn.v_proj")) {
            pool_heads(values, values, heads, config->kv_heads, (size_t)config->head_dim * config->channels);
        } else if (strstr(to->name, "self_attn.k_conv")) { // (taps, heads D): one row of heads for each tap
            for (int tap = 0; tap < to->shape[0]; tap++)
                pool_heads(values + (size_t)tap * to->shape[1], values + (size_t)tap * from->shape[1], heads,
                           config->kv_heads, (size_t)config->head_dim);
        }
        weights_upload(weights, to->offset, values, to->padded_count, stream);
        free(values);
    }
    free(heads);
    safetensors_close(&file);
    parameter_layout_free(&layout);
}

// Bytes of host memory that checkpoint_load_pooled() needs: the largest tensor of the checkpoint's model.
static inline size_t checkpoint_pooled_bytes(const char* directory, const ModelConfig* config) {
    ModelConfig whole = *config;
    whole.kv_heads = checkpoint_read_config(directory).kv_heads;
    ParameterLayout layout = parameter_layout(&whole);
    size_t most = 0;
    for (int i = 0; i < layout.table.count; i++)
        if (layout.table.tensors[i].padded_count > most) most = layout.table.tensors[i].padded_count;
    parameter_layout_free(&layout);
    return most * sizeof(float_acc);
}

// ----------------------------------------------------------------------------
// optimizer-RRRRR-of-NNNNN.safetensors: slices of the flat optimizer state, one for each rank

// A vector of optimizer state: all ranks together have table->elements elements of it.
typedef struct {
    const char* name;
    float_acc* values; // device memory
} OptimizerVector;

// A fingerprint of the tensors' places in the flat state: two tables with the same
// fingerprint give every element the same place.
static inline void table_fingerprint(const TensorTable* table, char text[17]) {
    uint64_t hash = random_stream("layout");
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        char line[192];
        snprintf(line, sizeof(line), "%016llx %s %zu %d %d %zu", (unsigned long long)hash, tensor->name,
                 tensor->offset, tensor->shape[0], tensor->shape[1], tensor->padded_count);
        hash = random_stream(line);
    }
    snprintf(text, 17, "%016llx", (unsigned long long)(hash ^ table->elements));
}

// Elements first .. first + count - 1 of the whole state, which start at index `at` of a rank's vectors.
typedef struct {
    uint64_t first, count, at;
} StateRange;

// Writes the metadata `key`: one number of every range, the one at offset `member` of StateRange.
static inline void optimizer_describe_ranges(SafetensorsWriter* writer, const char* key,
                                             const StateRange* ranges, int range_count, size_t member) {
    const size_t longest = 21; // digits of a number, and a space
    char* text = (char*)malloc_or_fail((size_t)range_count * longest + 1, "the list of a slice's ranges");
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < range_count; i++) {
        const uint64_t value = *(const uint64_t*)(const void*)((const char*)&ranges[i] + member);
        used += (size_t)sprintf(text + used, i ? " %llu" : "%llu", (unsigned long long)value);
    }
    safetensors_metadata(writer, key, text);
    free(text);
}

// Writes a slice: these ranges of the state, one after the other.
static inline void checkpoint_write_optimizer(const char* path, const TensorTable* table,
                                              const OptimizerVector* vectors, int vector_count,
                                              const StateRange* ranges, int range_count, stream_t stream) {
    char text[24];
    uint64_t count = 0;
    SafetensorsWriter writer;
    safetensors_create(&writer, path);
    snprintf(text, sizeof(text), "%zu", table->elements);
    safetensors_metadata(&writer, "elements", text);
    optimizer_describe_ranges(&writer, "offset", ranges, range_count, offsetof(StateRange, first));
    optimizer_describe_ranges(&writer, "count", ranges, range_count, offsetof(StateRange, count));
    table_fingerprint(table, text);
    safetensors_metadata(&writer, "layout", text);
    for (int i = 0; i < range_count; i++) count += ranges[i].count;
    for (int v = 0; v < vector_count; v++)
        safetensors_declare(&writer, vectors[v].name, DTYPE_FLOAT_ACC, 1, count, 0);
    for (int v = 0; v < vector_count; v++)
        for (int i = 0; i < range_count; i++)
            checkpoint_write_values(&writer, vectors[v].values + ranges[i].at, DTYPE_FLOAT_ACC,
                                    ranges[i].count, NULL, stream);
    safetensors_finish(&writer);
}

// The place of a range of the state in the files.
typedef struct {
    StateRange range; // `at` is its index in the tensors of the slice
    int slice;        // the rank in the file's name
} StatePiece;

static inline int state_piece_compare(const void* a, const void* b) {
    const StateRange *left = &((const StatePiece*)a)->range, *right = &((const StatePiece*)b)->range;
    if (left->first != right->first) return left->first < right->first ? -1 : 1;
    return left->count < right->count ? -1 : left->count > right->count;
}

// Reads the next number of a list separated by spaces; fails if there is none.
static inline uint64_t optimizer_next_number(const char** text, const SafetensorsFile* file,
                                             const char* key) {
    char* end = NULL;
    errno = 0;
    unsigned long long value = *text && isdigit((unsigned char)**text) ? strtoull(*text, &end, 10) : 0;
    if (!end || (*end && *end != ' ') || errno)
        fail("%s: its metadata has no number \"%s\"", file->path, key);
    *text = *end ? end + 1 : end;
    return (uint64_t)value;
}

static inline uint64_t optimizer_metadata_number(const SafetensorsFile* file, const char* key) {
    const char* text = safetensors_get_metadata(file, key);
    const uint64_t value = optimizer_next_number(&text, file, key);
    if (*text) fail("%s: its metadata has no number \"%s\"", file->path, key);
    return value;
}

// Opens a slice and checks it by itself. Returns the number of elements that it holds.
static inline uint64_t optimizer_slice_open(SafetensorsFile* file, const char* directory, int rank, int total,
                                            const TensorTable* table, const OptimizerVector* vectors,
                                            int vector_count) {
    char path[PATH_MAX], fingerprint[17];
    path_format(path, "%s/optimizer-%05d-of-%05d.safetensors", directory, rank, total);
    safetensors_open(file, path);
    table_fingerprint(table, fingerprint);
    const char* layout = safetensors_get_metadata(file, "layout");
    if (!layout || strcmp(layout, fingerprint) ||
        optimizer_metadata_number(file, "elements") != table->elements)
        fail("%s: made for another layout of the parameters", path);
    uint64_t held = 0;
    for (int v = 0; v < vector_count; v++) {
        const SafetensorsEntry* entry = safetensors_find(file, vectors[v].name);
        if (!entry) fail("%s: tensor %s is missing", path, vectors[v].name);
        if (v == 0) held = safetensors_count(entry);
        if (entry->dims != 1 || entry->shape[0] != held)
            fail("%s: tensor %s has shape %s, want (%llu)", path, vectors[v].name,
                 safetensors_shape_text(entry), (unsigned long long)held);
    }
    if (file->count != vector_count)
        fail("%s: %d tensors, but this run's optimizer has %d", path, file->count, vector_count);
    return held;
}

// Appends the ranges of an open slice of `held` elements to the list, which may be
// reallocated. A slice without "count" is one range.
static inline void optimizer_slice_ranges(StatePiece** pieces, int* piece_count, const SafetensorsFile* file,
                                          int rank, uint64_t held, const TensorTable* table) {
    const char *offsets = safetensors_get_metadata(file, "offset"),
               *counts = safetensors_get_metadata(file, "count");
    uint64_t at = 0;
    for (int more = !counts || *counts; more; more = counts && *counts) {
        StatePiece piece;
        StateRange* range = &piece.range;
        piece.slice = rank;
        range->first = optimizer_next_number(&offsets, file, "offset");
        range->count = counts ? optimizer_next_number(&counts, file, "count") : held;
        range->at = at;
        at += range->count;
        if (range->first > table->elements || range->count > table->elements - range->first)
            fail("%s: elements %llu to %llu of a state of %zu", file->path, (unsigned long long)range->first,
                 (unsigned long long)(range->first + range->count), table->elements);
        const size_t bytes = (size_t)(*piece_count + 1) * sizeof(StatePiece);
        *pieces = (StatePiece*)realloc_or_fail(*pieces, bytes, "the optimizer's slices");
        (*pieces)[(*piece_count)++] = piece;
    }
    if (at != held)
        fail("%s: ranges of %llu elements, but tensors of %llu", file->path, (unsigned long long)at,
             (unsigned long long)held);
}

// The N of optimizer-RRRRR-of-NNNNN.safetensors. It must be the same in every name of the directory.
static inline int optimizer_slice_total(const char* directory) {
    DIR* entries = opendir(directory);
    if (!entries) fail("%s: %s", directory, strerror(errno));
    int total = 0;
    struct dirent* entry;
    while ((entry = readdir(entries))) {
        int rank, of, length = 0;
        if (sscanf(entry->d_name, "optimizer-%5d-of-%5d.safetensors%n", &rank, &of, &length) != 2 ||
            (size_t)length != strlen(entry->d_name) || of < 1)
            continue;
        if (total && of != total)
            fail("%s: optimizer files of %d ranks and of %d ranks side by side", directory, total, of);
        total = of;
    }
    closedir(entries);
    if (!total) fail("%s: no optimizer-*.safetensors: weights only, not a run to resume", directory);
    return total;
}

// Lists every range of every slice in ascending order; together they must cover the state
// exactly once. The caller frees the list.
static inline int optimizer_pieces(StatePiece** pieces, const char* directory, int total,
                                   const TensorTable* table, const OptimizerVector* vectors,
                                   int vector_count) {
    int count = 0;
    *pieces = NULL;
    for (int rank = 0; rank < total; rank++) {
        SafetensorsFile file;
        const uint64_t held =
            optimizer_slice_open(&file, directory, rank, total, table, vectors, vector_count);
        optimizer_slice_ranges(pieces, &count, &file, rank, held, table);
        safetensors_close(&file);
    }
    if (count > 0) qsort(*pieces, (size_t)count, sizeof(StatePiece), state_piece_compare);
    uint64_t end = 0;
    for (int i = 0; i < count; i++) {
        const StateRange* range = &(*pieces)[i].range;
        if (range->first != end)
            fail("%s/optimizer-%05d-of-%05d.safetensors: begins at element %llu of the optimizer state, but "
                 "the slice "
                 "before ends at %llu",
                 directory, (*pieces)[i].slice, total, (unsigned long long)range->first,
                 (unsigned long long)end);
        end = range->first + range->count;
    }
    if (end != table->elements)
        fail("%s: the optimizer's slices end at element %llu of %zu", directory, (unsigned long long)end,
             table->elements);
    return count;
}

// Reads the elements that `piece` of an open slice and the wanted range have in common.
static inline void optimizer_read_piece(const SafetensorsFile* file, const StateRange* piece,
                                        const StateRange* want, const OptimizerVector* vectors,
                                        int vector_count, stream_t stream) {
    const uint64_t end = piece->first + piece->count, want_end = want->first + want->count;
    const uint64_t from = piece->first > want->first ? piece->first : want->first,
                   to = end < want_end ? end : want_end;
    for (int v = 0; v < vector_count && from < to; v++)
        checkpoint_read_values(file, safetensors_find(file, vectors[v].name),
                               piece->at + (from - piece->first), to - from,
                               vectors[v].values + want->at + (from - want->first), DTYPE_FLOAT_ACC, stream);
}

// Reads these ranges of the state, whatever the number of slices on disk. Before it reads any value, it
// checks every slice, and that all slices together cover the state exactly once.
static inline void checkpoint_read_optimizer(const char* directory, const TensorTable* table,
                                             const OptimizerVector* vectors, int vector_count,
                                             const StateRange* ranges, int range_count, stream_t stream) {
    const int total = optimizer_slice_total(directory);
    StatePiece* pieces;
    const int count = optimizer_pieces(&pieces, directory, total, table, vectors, vector_count);
    for (int rank = 0; rank < total; rank++) {
        SafetensorsFile file;
        (void)optimizer_slice_open(&file, directory, rank, total, table, vectors, vector_count);
        for (int i = 0; i < count; i++)
            for (int k = 0; k < range_count && pieces[i].slice == rank; k++)
                optimizer_read_piece(&file, &pieces[i].range, &ranges[k], vectors, vector_count, stream);
        safetensors_close(&file);
    }
    free(pieces);
}

// Reads these ranges of both moments to device memory.
static inline void checkpoint_load_optimizer(const char* directory, const TensorTable* table,
                                             float_acc* exp_avg, float_acc* exp_avg_sq,
                                             const StateRange* ranges, int range_count, stream_t stream) {
    const OptimizerVector vectors[2] = {{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}};
    checkpoint_read_optimizer(directory, table, vectors, 2, ranges, range_count, stream);
}

// ----------------------------------------------------------------------------
// The output directory: step_00001000/, step_00002000/, ..., latest
//
// checkpoint_save() writes step_X.tmp and renames it to step_X. If there is an old step_X, it is named
// step_X.old until the new one has its name. So at every moment step_X is complete or absent; while a save
// replaces it, step_X.old is complete whenever step_X is absent. `latest` is a file with one line, the
// directory's name. Unlike a symbolic link, rename() can replace it on every filesystem, and it survives
// copies by programs that do not know links.

#define CHECKPOINT_NAME_FORMAT "step_%08d"

// The step X of a name that is step_X followed by exactly `suffix`; -1 for any other name.
static inline int checkpoint_step_of_name(const char* name, const char* suffix) {
    if (strncmp(name, "step_", 5)) return -1;
    size_t digits = strspn(name + 5, "0123456789");
    if (digits < 8 || digits > 10 || strcmp(name + 5 + digits, suffix)) return -1;
    long step = strtol(name + 5, NULL, 10);
    char canonical[32];
    snprintf(canonical, sizeof(canonical), CHECKPOINT_NAME_FORMAT, (int)step);
    return step <= INT_MAX && !strncmp(name, canonical, 5 + digits) ? (int)step : -1;
}

// Whether `path` is a directory itself: a removal must not follow a link.
static inline int is_directory(const char* path) {
    struct stat info;
    return lstat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

// Whether `path` is a directory, or a link to one: a user may have moved a checkpoint to another disk.
static inline int leads_to_directory(const char* path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

// The steps of the directory's names step_X + suffix, ascending. The caller frees them.
static inline int checkpoint_list_steps(const char* output, const char* suffix, int** steps) {
    int count = 0;
    *steps = NULL;
    DIR* directory = opendir(output);
    struct dirent* entry;
    while (directory && (entry = readdir(directory))) {
        int step = checkpoint_step_of_name(entry->d_name, suffix);
        if (step < 0) continue;
        *steps = (int*)realloc_or_fail(*steps, (size_t)(count + 1) * sizeof(int), "the list of checkpoints");
        int place = count++;
        for (; place > 0 && (*steps)[place - 1] > step; place--) (*steps)[place] = (*steps)[place - 1];
        (*steps)[place] = step;
    }
    if (directory) closedir(directory);
    return count;
}

// Removes the files that a killed process left half-written, and renames a step_X.old back to
// step_X if step_X is absent. Only the process that writes to `output` may call it: another one
// could interfere between two renames of the writer.
static inline void checkpoint_clean(const char* output) {
    char path[PATH_MAX], name[PATH_MAX];
    int* steps;
    int count = checkpoint_list_steps(output, ".tmp", &steps);
    for (int i = 0; i < count; i++) {
        path_format(path, "%s/" CHECKPOINT_NAME_FORMAT ".tmp", output, steps[i]);
        remove_path(path);
    }
    free(steps);
    count = checkpoint_list_steps(output, ".old", &steps);
    for (int i = 0; i < count; i++) {
        path_format(path, "%s/" CHECKPOINT_NAME_FORMAT ".old", output, steps[i]);
        path_format(name, "%s/" CHECKPOINT_NAME_FORMAT, output, steps[i]);
        if (path_exists(name)) remove_path(path);
        else if (rename(path, name) != 0) fail("%s: cannot rename to %s: %s", path, name, strerror(errno));
    }
    free(steps);
    path_format(path, "%s/latest.tmp", output);
    unlink(path);
}

// Finds step_X, or step_X.old if a process was killed while it replaced
// step_X; returns 0 if neither is there.
static inline int checkpoint_find_step(const char* output, int step, char path[PATH_MAX]) {
    path_format(path, "%s/" CHECKPOINT_NAME_FORMAT, output, step);
    if (leads_to_directory(path)) return 1;
    path_format(path, "%s/" CHECKPOINT_NAME_FORMAT ".old", output, step);
    return leads_to_directory(path);
}

// Returns the highest step with a directory, or -1. *named receives the highest step that any name has, or -1.
static inline int checkpoint_newest(const char* output, int* named) {
    static const char* const suffixes[] = {"", ".old"};
    int newest = -1;
    *named = -1;
    for (int s = 0; s < 2; s++) {
        int* steps;
        const int count = checkpoint_list_steps(output, suffixes[s], &steps);
        for (int i = 0; i < count; i++) {
            char path[PATH_MAX];
            if (steps[i] > *named) *named = steps[i];
            if (steps[i] > newest && checkpoint_find_step(output, steps[i], path)) newest = steps[i];
        }
        free(steps);
    }
    return newest;
}

static inline int checkpoint_name_exists(const char* output, const char* name) {
    char path[PATH_MAX];
    path_format(path, "%s/%s", output, name);
    return path_exists(path);
}

// Fails because `latest` names a checkpoint that cannot be used.
__attribute__((noreturn)) static inline void checkpoint_refuse_latest(const char* output, const char* name) {
    const char* problem = checkpoint_name_exists(output, name) ? "a directory" : "there";
    int named;
    const int newest = checkpoint_newest(output, &named);
    if (newest < 0)
        fail("%s/latest: names %s, which is not %s, and no other checkpoint is there", output, name, problem);
    fail("%s/latest: names %s, which is not %s; write the name of another checkpoint into this file, such "
         "as " CHECKPOINT_NAME_FORMAT ", the newest one there",
         output, name, problem, newest);
}

// Finds the newest checkpoint of an output directory: returns 1 and its path, or 0 if there is none. Without
// the file `latest` (the run was killed in its first save) it is the checkpoint of the highest step. Fails if
// there are names of checkpoints but no directory: a run from step 0 would replace what has these names.
static inline int checkpoint_latest(const char* output, char path[PATH_MAX]) {
    char latest[PATH_MAX];
    path_format(latest, "%s/latest", output);
    if (path_exists(latest)) {
        size_t length;
        char* name = read_file_or_fail(latest, &length);
        if (length && name[length - 1] == '\n') name[--length] = 0;
        int step = strlen(name) == length ? checkpoint_step_of_name(name, "") : -1;
        if (step < 0)
            fail("%s: want one line with the name of a checkpoint beside it, such as step_00001000", latest);
        if (!checkpoint_find_step(output, step, path)) checkpoint_refuse_latest(output, name);
        free(name);
        return 1;
    }
    int named;
    const int newest = checkpoint_newest(output, &named);
    if (newest < 0 && named >= 0)
        fail("%s/" CHECKPOINT_NAME_FORMAT ": is not a directory, and no other checkpoint is there", output,
             named);
    return newest >= 0 && checkpoint_find_step(output, newest, path);
}

// Whether the directory holds weights by a name of Hugging Face's.
static inline int checkpoint_has_weights(const char* directory) {
    return checkpoint_name_exists(directory, "model.safetensors") ||
           checkpoint_name_exists(directory, "model.safetensors.index.json");
}

// Whether the directory is the output of a run.
static inline int checkpoint_holds_run(const char* directory) {
    int named;
    return checkpoint_name_exists(directory, "latest") ||
           checkpoint_name_exists(directory, "metrics.jsonl") || checkpoint_newest(directory, &named) >= 0;
}

// Whether the directory itself is a checkpoint, and not one that holds a state.json of the user.
static inline int checkpoint_is_checkpoint(const char* directory) {
    const char* slash = strrchr(directory, '/');
    return checkpoint_name_exists(directory, "state.json") && !checkpoint_holds_run(directory) &&
           (checkpoint_has_weights(directory) || (slash && checkpoint_step_of_name(slash + 1, "") >= 0));
}

// Finds the checkpoint that a user means by `given`: that directory itself if it has a config.json (a
// checkpoint, or a model saved by transformers), else the latest checkpoint in it. Fails if there is neither.
// The config.json of a run's directory is the user's own if no weights are beside it.
static inline void checkpoint_resolve(const char* given, char path[PATH_MAX]) {
    char directory[PATH_MAX], config_path[PATH_MAX];
    path_format(directory, "%s", given); // the caller may pass one buffer for both
    path_format(config_path, "%s/config.json", directory);
    if (path_exists(config_path) && (checkpoint_has_weights(directory) || !checkpoint_holds_run(directory))) {
        path_format(path, "%s", directory);
        return;
    }
    struct stat info;
    if (stat(directory, &info) != 0) fail("%s: %s", directory, strerror(errno));
    if (!S_ISDIR(info.st_mode)) {
        char* slash = strrchr(directory, '/');
        if (slash) *slash = 0;
        fail("%s: a file; name the directory that it lies in: %s", given,
             !slash               ? "."
             : slash == directory ? "/"
                                  : directory);
    }
    if (!checkpoint_latest(directory, path))
        fail("%s: no checkpoint: neither a config.json nor a step_* directory in it", directory);
}

// Fails if the output directory is inside a checkpoint or has the name of one: the run that owns the
// surrounding directory would take it for its own checkpoint. Files of the user's own with the names
// config.json and state.json are no checkpoint.
static inline void checkpoint_check_output(const char* output) {
    char path[PATH_MAX], real[PATH_MAX];
    path_format(path, "%s", output);
    for (size_t end = strlen(path); end > 1 && path[end - 1] == '/';) path[--end] = 0;
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    static const char* const suffixes[] = {"", ".tmp", ".old"};
    for (int i = 0; i < 3; i++)
        if (checkpoint_step_of_name(name, suffixes[i]) >= 0)
            fail_usage("--output %s: has the name of a checkpoint; name the directory of the run: %.*s",
                       output, slash ? (int)(slash - path) : 1, slash ? path : ".");
    if (checkpoint_name_exists(path, "config.json") && checkpoint_has_weights(path) &&
        !checkpoint_holds_run(path))
        fail_usage("--output %s: holds a model (config.json); name another directory", output);
    // Checks the existing part of the path, and every directory above it.
    while (!realpath(path, real)) {
        if (!strcmp(path, ".") || !strcmp(path, "/"))
            fail("the current directory: %s; change to another one", strerror(errno));
        char* last = strrchr(path, '/');
        if (last && last != path) *last = 0;
        else path_format(path, "%s", last ? "/" : ".");
    }
    for (char* last = real + strlen(real); last; last = strrchr(real, '/')) {
        *last = 0;
        if (checkpoint_is_checkpoint(real))
            fail_usage("--output %s: lies in the checkpoint %s", output, real);
    }
}

static inline void checkpoint_write_latest(const char* output, int step) {
    char path[PATH_MAX], name[32];
    path_format(path, "%s/latest.tmp", output);
    snprintf(name, sizeof(name), CHECKPOINT_NAME_FORMAT "\n", step);
    scratch_path_begin(path);
    FILE* file = open_or_fail(path, "wb");
    write_or_fail(name, strlen(name), file, path);
    close_written_or_fail(file, path);
    path_format(path, "%s/latest", output);
    scratch_path_commit(path);
}

// Removes a checkpoint. It renames the directory first, so that nobody finds a
// checkpoint without some of its files.
static inline void checkpoint_remove(const char* output, int step) {
    char path[PATH_MAX], doomed[PATH_MAX];
    path_format(path, "%s/" CHECKPOINT_NAME_FORMAT, output, step);
    path_format(doomed, "%s/" CHECKPOINT_NAME_FORMAT ".tmp", output, step);
    if (is_directory(path) && rename(path, doomed) == 0) remove_path(doomed);
}

// Removes old checkpoints: keeps the one just saved (`step`) and the keep - 1 before it; keep 0 keeps all. It
// also keeps steps beyond `step`, which exist if the run was resumed from an earlier checkpoint.
static inline void checkpoint_remove_older(const char* output, int step, int keep) {
    int* steps;
    int count = checkpoint_list_steps(output, "", &steps), older = 0;
    while (older < count && steps[older] < step) older++;
    for (int i = 0; keep > 0 && i < older - (keep - 1); i++) checkpoint_remove(output, steps[i]);
    free(steps);
}

// Deletes every checkpoint of an output directory.
static inline void checkpoint_remove_all(const char* output) {
    char path[PATH_MAX];
    checkpoint_clean(output);
    int* steps;
    int count = checkpoint_list_steps(output, "", &steps);
    path_format(path, "%s/latest", output);
    unlink(path);
    for (int i = 0; i < count; i++) {
        checkpoint_remove(output, steps[i]);
        path_format(path, "%s/" CHECKPOINT_NAME_FORMAT, output, steps[i]);
        if (path_exists(path)) fail("%s: cannot be removed", path);
    }
    free(steps);
}

static inline void checkpoint_copy_file(const char* to, const char* from) {
    FILE* in = open_or_fail(from, "rb");
    FILE* out = open_or_fail(to, "wb");
    char piece[1 << 16];
    size_t got;
    while ((got = fread(piece, 1, sizeof(piece), in)) > 0) write_or_fail(piece, got, out, to);
    if (ferror(in)) fail("%s: cannot read: %s", from, strerror(errno));
    fclose(in);
    close_written_or_fail(out, to);
}

static inline void checkpoint_sync_directory(const char* path) {
    int directory = open(path, O_RDONLY);
    if (directory < 0) fail("%s: %s", path, strerror(errno));
    if (fsync(directory) != 0 && errno != EINVAL && errno != EROFS)
        fail("%s: cannot sync: %s", path, strerror(errno));
    close(directory);
}

// Renames the finished step_X.tmp to step_X.
static inline void checkpoint_commit(const char* output, int step) {
    char path[PATH_MAX], old[PATH_MAX];
    path_format(path, "%s/" CHECKPOINT_NAME_FORMAT, output, step);
    path_format(old, "%s/" CHECKPOINT_NAME_FORMAT ".old", output, step);
    if (path_exists(path) && rename(path, old) != 0)
        fail("%s: cannot rename to %s: %s", path, old, strerror(errno));
    scratch_path_commit(path);
    remove_path(old);
}

// Writes the files that are the same for all ranks. Rank 0 calls it.
static inline void checkpoint_write_shared(const char* scratch, const ModelConfig* config,
                                           const TensorTable* table, const TrainingState* state,
                                           const HeadAllocation* heads, Weights weights,
                                           const char* tokenizer_path, stream_t stream) {
    char path[PATH_MAX];
    path_format(path, "%s/model.safetensors", scratch);
    checkpoint_write_model(path, table, weights, stream);
    path_format(path, "%s/heads.json", scratch);
    if (heads) checkpoint_write_heads(path, heads);
    path_format(path, "%s/config.json", scratch);
    checkpoint_write_config(path, config, tokenizer_path);
    path_format(path, "%s/tokenizer.json", scratch);
    if (tokenizer_path) checkpoint_copy_file(path, tokenizer_path);
    path_format(path, "%s/state.json", scratch);
    checkpoint_write_state(path, state);
}

// Writes OUTPUT/step_X of state->step, makes `latest` name it, then removes older checkpoints beyond `keep`
// (0: removes none). All ranks call it together, each with the ranges of optimizer state that it writes. Rank
// 0 renames the directory when all ranks have synced their files. An error, or a kill at any moment, leaves
// earlier checkpoints and `latest` as they were.
// - heads: NULL if the map of query heads follows from the sizes.
// - weights (table->elements), exp_avg and exp_avg_sq (by the ranges' `at`): in device memory.
// - tokenizer_path: a tokenizer.json to copy, or NULL.
static inline void checkpoint_save(const char* output, const ModelConfig* config, const TensorTable* table,
                                   const TrainingState* state, const HeadAllocation* heads, Weights weights,
                                   const float_acc* exp_avg, const float_acc* exp_avg_sq,
                                   const StateRange* ranges, int range_count, const char* tokenizer_path,
                                   int keep, stream_t stream) {
    const int first = comm_rank() == 0;
    char scratch[PATH_MAX], path[PATH_MAX];
    path_format(scratch, "%s/" CHECKPOINT_NAME_FORMAT ".tmp", output, state->step);
    if (first) {
        make_directories_or_fail(output);
        checkpoint_clean(output);
    }
    // On a failure, rank 0 removes the directory, and every other rank only its own file: a slow rank may
    // fail after a new run has begun to write the directory.
    path_format(path, "%s/optimizer-%05d-of-%05d.safetensors", scratch, comm_rank(), comm_size());
    scratch_path_begin(first ? scratch : path);
    if (first && mkdir(scratch, 0777) != 0)
        fail("%s: cannot make the directory: %s", scratch, strerror(errno));
    comm_barrier();

    // The casts drop const; checkpoint_write_optimizer() does not change the values.
    const OptimizerVector vectors[2] = {{"exp_avg", (float_acc*)exp_avg},
                                        {"exp_avg_sq", (float_acc*)exp_avg_sq}};
    checkpoint_write_optimizer(path, table, vectors, 2, ranges, range_count, stream);
    if (first) checkpoint_write_shared(scratch, config, table, state, heads, weights, tokenizer_path, stream);
    comm_barrier();

    if (!first) {
        scratch_path_forget();
        return;
    }
    checkpoint_sync_directory(scratch);
    checkpoint_commit(output, state->step);
    checkpoint_write_latest(output, state->step);
    checkpoint_remove_older(output, state->step, keep);
}

// ----------------------------------------------------------------------------
// Logits in a file, to compare with another program's

// Writes a safetensors file with one tensor "logits" (T, V), fp32, and the metadata "tokens":
// T numbers separated by spaces. logits: host memory, rows `stride` elements apart (V, or
// Vp); the first V of each row are written. An old file stays if the process ends early.
static inline void logits_write(const char* path, const floatX* logits, const int* tokens, int T, int V,
                                int stride) {
    char* text = (char*)malloc_or_fail((size_t)T * 12 + 1, "a list of tokens");
    size_t used = 0;
    for (int t = 0; t < T; t++) used += (size_t)sprintf(text + used, t ? " %d" : "%d", tokens[t]);
    char target[PATH_MAX], partial[PATH_MAX];
    replacement_begin(target, partial, path);
    SafetensorsWriter writer;
    safetensors_create(&writer, partial);
    safetensors_metadata(&writer, "tokens", text);
    safetensors_declare(&writer, "logits", DTYPE_F32, 2, (uint64_t)T, (uint64_t)V);
    for (int t = 0; t < T; t++)
        safetensors_write(&writer, logits + (size_t)t * (size_t)stride, DTYPE_FLOATX, (uint64_t)V);
    safetensors_finish(&writer);
    replacement_commit(target, partial);
    free(text);
}

// Reads such a file; the caller frees both lists. logits: (T, V).
static inline void logits_read(const char* path, float** logits, int** tokens, int* T, int* V) {
    SafetensorsFile file;
    safetensors_open(&file, path);
    const SafetensorsEntry* entry = safetensors_find(&file, "logits");
    const char* text = safetensors_get_metadata(&file, "tokens");
    if (!entry || entry->dims != 2 || !text)
        fail("%s: want a tensor logits (T, V) and metadata tokens", path);
    *T = (int)entry->shape[0];
    *V = (int)entry->shape[1];
    *logits = (float*)malloc_or_fail((size_t)safetensors_count(entry) * sizeof(float), "logits");
    safetensors_read(&file, entry, 0, safetensors_count(entry), *logits, DTYPE_F32);
    *tokens = (int*)malloc_or_fail((size_t)*T * sizeof(int), "a list of tokens");
    for (int t = 0; t < *T; t++) {
        char* end;
        (*tokens)[t] = (int)strtol(text, &end, 10);
        if (end == text) fail("%s: %d tokens for %d rows of logits", path, t, *T);
        text = end;
    }
    safetensors_close(&file);
}

#endif
