/*
The sizes of a model, and the table of its parameters.

    ModelConfig config = model_config_from_descriptor("d12");
    config.vocab_size = 8192;
    model_config_complete(&config);                      // fills in the sizes that are still 0
    model_config_check(&config);                         // one line and exit code 2 if a size breaks a rule
    ParameterLayout layout = parameter_layout(&config);
    const Tensor* tensor = &layout.table.tensors[0];     // name, shape, offset of every tensor
    const floatX* o_proj = params + layout.layers[3].o_proj;  // the block of parameters starts at params

Allocation, initialisation, weight decay, checkpoints and export all read the table. Its names are those of
Hugging Face's LlamaForCausalLM. docs/math.md section 1 describes the model: RMSNorm, rotary positions,
grouped attention, SwiGLU, no biases.
*/
#ifndef RUNTIME_MODEL_H
#define RUNTIME_MODEL_H

#include <math.h>
#include "runtime/checks.h"
#include "runtime/precision.h"
#include "runtime/random.h"

// Bits of the kinds of attention in this build, by AttentionKind. `make ATTN=KIND` leaves out other kinds than dense.
#ifndef ATTENTION_MODULES
#define ATTENTION_MODULES 7
#endif

// `make ATTN= GQA= KCONV=` defines these three: the kinds that a new model has by default.
#if defined(ATTN_NAME) && defined(GQA_NAME) && defined(KCONV)
#define BUILD_CHOOSES_KINDS 1
#else
#define BUILD_CHOOSES_KINDS 0
#define ATTN_NAME "dense"
#define GQA_NAME "gqa"
#define KCONV 0
#endif

// Attention of the global layers: docs/math.md section 2.
typedef enum {
    ATTENTION_DENSE,
    ATTENTION_MOBA,      // block-sparse, by the original algorithm
    ATTENTION_FLASHMOBA, // the same function by gathered tiles
} AttentionKind;

static const char* const attention_names[] = {"dense", "moba", "flashmoba", NULL};

// How query heads share key/value heads: docs/math.md section 3.
typedef enum {
    GQA_STATIC,    // gqa: H/G consecutive query heads for each KV head
    GQA_KEY,       // kdgqa: by the norms of the keys
    GQA_DYNAMIC,   // dgqa: by a running average of these norms over the steps, or by their change
    GQA_PERTURBED, // pgqa: as gqa, with noise on attention's output while training
} GqaKind;
static const char* const gqa_names[] = {"gqa", "kdgqa", "dgqa", "pgqa", NULL};

// Sets of kinds: bit k is 1 if kind k belongs to the set.
enum {
    KINDS_WITH_BLOCKS = 1 << ATTENTION_MOBA | 1 << ATTENTION_FLASHMOBA, // a query chooses blocks of keys
    KINDS_BY_KEYS = 1 << GQA_KEY | 1 << GQA_DYNAMIC, // the map of query heads follows the keys
};

enum { PATTERN_MAX = 64, KCONV_MAX = 5 };

typedef struct {
    int layers;                    // L
    int channels;                  // C
    int heads;                     // H, query heads
    int kv_heads;                  // G, key/value heads
    int head_dim;                  // D
    int ffn;                       // F, the width of the feed-forward network
    int vocab_size;                // V
    int padded_vocab;              // Vp: V rounded up to a multiple of 128; columns V..Vp have no probability
    int sequence_length;           // T, the longest sequence that the model is trained on
    char pattern[PATTERN_MAX + 1]; // one letter per layer, repeated: G, D or S; see layer_kind
    int window;                    // W of the S layers: a query at t sees keys t-W+1..t
    int rope_global;               // G and D layers: 1 rotary positions, 0 none
    int rope_sliding;              // S layers: 1 rotary positions, 0 none
    AttentionKind attention;       // of the G layers
    int moba_block;                // S, keys of a block
    int moba_topk;                 // K, blocks that a query attends to, including its own
    float rope_theta;
    float norm_eps;
    int tied;    // 1: the output head is the embedding
    int kconv;   // taps of the key convolution in the G and D layers: 0 (none), 3 or 5
    GqaKind gqa; // of every layer
} ModelConfig;

// G: global attention of the model's kind. D: global dense attention. S: dense attention within a sliding window.
static inline char layer_kind(const ModelConfig* config, int layer) {
    return config->pattern[layer % (int)strlen(config->pattern)];
}
// The window of a layer's attention; 0 means every past key.
static inline int layer_window(const ModelConfig* config, int layer) {
    return layer_kind(config, layer) == 'S' ? config->window : 0;
}
static inline int layer_has_rope(const ModelConfig* config, int layer) {
    return layer_kind(config, layer) == 'S' ? config->rope_sliding : config->rope_global;
}
// The kind of a layer's attention.
static inline AttentionKind layer_attention(const ModelConfig* config, int layer) {
    return layer_kind(config, layer) == 'G' ? config->attention : ATTENTION_DENSE;
}
// 1 if each query of this attention chooses blocks of keys: --moba-block and --moba-topk are its settings.
static inline int attention_chooses_blocks(AttentionKind kind) { return KINDS_WITH_BLOCKS >> (int)kind & 1; }
static inline int layer_chooses_blocks(const ModelConfig* config, int layer) {
    return attention_chooses_blocks(layer_attention(config, layer));
}
static inline int model_chooses_blocks(const ModelConfig* config) {
    for (int l = 0; l < config->layers; l++)
        if (layer_chooses_blocks(config, l)) return 1;
    return 0;
}
// Taps of a layer's key convolution; 0: it has none.
static inline int layer_taps(const ModelConfig* config, int layer) {
    return layer_kind(config, layer) == 'S' ? 0 : config->kconv;
}
// 1 if the map of query heads follows the keys.
static inline int heads_are_key_driven(const ModelConfig* config) {
    return KINDS_BY_KEYS >> (int)config->gqa & 1;
}
// Heads of a packed row of queries, keys and values.
static inline int qkv_heads(const ModelConfig* config) { return config->heads + 2 * config->kv_heads; }

// The place of a name among names that end with NULL, or -1.
static inline int name_index(const char* const* names, const char* name) {
    for (int i = 0; names[i]; i++)
        if (!strcmp(names[i], name)) return i;
    return -1;
}

static inline int kconv_is_known(int kconv) { return kconv == 0 || kconv == 3 || kconv == 5; }

static inline int pattern_is_known(const char* pattern) {
    const size_t length = strlen(pattern);
    return length > 0 && length <= PATTERN_MAX && strspn(pattern, "GDS") == length;
}

// Sets the kinds that the build has as its defaults.
static inline void model_config_of_build(ModelConfig* config) {
    config->attention = (AttentionKind)name_index(attention_names, ATTN_NAME);
    config->gqa = (GqaKind)name_index(gqa_names, GQA_NAME);
    config->kconv = KCONV;
}

// 1 if this build has the operations of the kind.
static inline int attention_is_built(AttentionKind kind) { return ATTENTION_MODULES >> (int)kind & 1; }

// The sizes of a descriptor. "d12" is 12 layers, 64 x 12 channels, heads of 64 channels, and a feed-forward
// network of 8/3 C channels rounded up to a multiple of 64. Sizes that depend on others are left 0:
// model_config_complete() fills them in after the user's options have been set.
static inline ModelConfig model_config_from_descriptor(const char* descriptor) {
    ModelConfig config;
    memset(&config, 0, sizeof(config));
    char* end = NULL;
    long depth = descriptor[0] == 'd' ? strtol(descriptor + 1, &end, 10) : 0;
    if (!end || *end || depth < 1 || depth > 1024)
        fail_usage("--model %s: want dN with N from 1 to 1024, such as d12 (12 layers, 768 channels)",
                   descriptor);
    config.layers = (int)depth;
    config.channels = 64 * config.layers;
    strcpy(config.pattern, "G");
    config.window = 256;
    config.rope_global = config.rope_sliding = 1;
    config.moba_block = 128;
    config.moba_topk = 8;
    config.rope_theta = 10000.0f;
    config.norm_eps = 1e-5f;
    config.tied = 1;
    config.sequence_length = 1024;
    model_config_of_build(&config);
    return config;
}

// Fills in the sizes that are 0.
static inline void model_config_complete(ModelConfig* config) {
    if (!config->heads && config->head_dim) config->heads = config->channels / config->head_dim;
    if (!config->heads) config->heads = config->channels / 64 > 0 ? config->channels / 64 : 1;
    if (!config->head_dim && config->heads > 0 && config->channels % config->heads == 0)
        config->head_dim = config->channels / config->heads;
    if (!config->kv_heads) config->kv_heads = config->heads;
    if (!config->ffn) config->ffn = (config->channels * 8 / 3 + 63) / 64 * 64;
    config->padded_vocab = (config->vocab_size + 127) / 128 * 128;
}

static inline void check_range(const char* option, long value, long low, long high) {
    if (value < low || value > high) fail_usage("%s %ld: must be from %ld to %ld", option, value, low, high);
}

// Checks every rule for a model's sizes; fails with the option's name, its value and the rule.
static inline void model_config_check(const ModelConfig* config) {
    check_range("--layers", config->layers, 1, 1024);
    check_range("--channels", config->channels, 1, 1 << 17);
    check_range("--heads", config->heads, 1, 1024);
    if (config->head_dim == 0)
        fail_usage("--heads %d: must divide --channels %d, or give --head-dim", config->heads,
                   config->channels);
    check_range("--head-dim", config->head_dim, 1, 1024);
    check_range("--kv-heads", config->kv_heads, 1, config->heads);
    if (config->heads % config->kv_heads != 0)
        fail_usage("--kv-heads %d: must divide --heads %d", config->kv_heads, config->heads);
    check_range("--ffn", config->ffn, 1, 1 << 20);
    check_range("--vocab", config->vocab_size, 2, 1 << 24);
    check_range("--sequence-length", config->sequence_length, 1, 1 << 24);
    check_range("--window", config->window, 1, 1 << 24);
    check_range("--moba-block", config->moba_block, 1, 1 << 16);
    check_range("--moba-topk", config->moba_topk, 1, 1 << 10);
    if (!pattern_is_known(config->pattern))
        fail_usage("--pattern %s: want letters G (global attention), D (global and dense) and S (sliding "
                   "window), such "
                   "as SG",
                   config->pattern);
    if (!attention_is_built(config->attention))
        fail_usage("--attention %s: not in this build, which has %s; make builds a trainer with every kind",
                   attention_names[config->attention],
                   strcmp(ATTN_NAME, "dense") ? "dense and " ATTN_NAME : "dense alone");
    if (!kconv_is_known(config->kconv)) fail_usage("--kconv %d: want 0, 3 or 5", config->kconv);
    int any_rope = 0;
    for (int l = 0; l < config->layers; l++) any_rope |= layer_has_rope(config, l);
    if (any_rope && config->head_dim % 2 != 0)
        fail_usage("--head-dim %d: rotary positions need an even number (or --position none)",
                   config->head_dim);
    if (!(config->rope_theta > 0))
        fail_usage("--rope-theta %g: must be positive", (double)config->rope_theta);
    if (!(config->norm_eps > 0)) fail_usage("--norm-eps %g: must be positive", (double)config->norm_eps);
}

// ----------------------------------------------------------------------------
// The table of tensors

typedef enum { INIT_NORMAL, INIT_ONES, INIT_ZEROS } Initializer;

typedef struct {
    char name[96];       // Hugging Face's
    int dims;            // 1 or 2
    int shape[2];        // in a checkpoint: (rows, columns) or (elements)
    size_t offset;       // first element in the block of parameters
    size_t count;        // elements in a checkpoint: the product of shape
    size_t padded_count; // elements in the block: more than count if rows are padded (the vocabulary)
    Initializer initializer;
    float std;        // of INIT_NORMAL
    int weight_decay; // 1: the optimizer decays it (matrices), 0: it does not (gains, taps)
} Tensor;

typedef struct {
    Tensor* tensors;
    int count;
    size_t elements; // of the whole block, with padding and alignment
} TensorTable;

// The offset of each tensor in the block of parameters, in elements. Matrices that multiply the same input
// are adjacent: q, k and v form one matrix of (H + 2G) D rows, gate and up one matrix of 2F rows.
typedef struct {
    size_t input_norm;   // (C)
    size_t qkv_proj;     // ((H + 2G) D, C)
    size_t k_conv;       // (taps, G D) in layers with a key convolution
    size_t o_proj;       // (C, H D)
    size_t post_norm;    // (C)
    size_t gate_up_proj; // (2F, C)
    size_t down_proj;    // (C, F)
} LayerParameters;

typedef struct {
    TensorTable table;
    size_t embedding;        // (Vp, C)
    LayerParameters* layers; // L
    size_t final_norm;       // (C)
    size_t head;             // (Vp, C); the embedding when tied
} ParameterLayout;

// Makes the next tensor start at a multiple of 64 elements: at least a cache line for every type.
static inline void table_align(TensorTable* table) { table->elements = (table->elements + 63) / 64 * 64; }

__attribute__((format(printf, 7, 8))) static inline size_t table_add(TensorTable* table, int rows,
                                                                     int columns, int padded_rows,
                                                                     Initializer initializer, float std,
                                                                     const char* name, ...) {
    table->tensors =
        (Tensor*)realloc_or_fail(table->tensors, (size_t)(table->count + 1) * sizeof(Tensor), "tensor table");
    Tensor* tensor = &table->tensors[table->count++];
    memset(tensor, 0, sizeof(*tensor));
    va_list arguments;
    va_start(arguments, name);
    vsnprintf(tensor->name, sizeof(tensor->name), name, arguments);
    va_end(arguments);
    tensor->dims = columns ? 2 : 1;
    tensor->shape[0] = rows;
    tensor->shape[1] = columns;
    size_t row_size = columns ? (size_t)columns : 1;
    tensor->offset = table->elements;
    tensor->count = (size_t)rows * row_size;
    tensor->padded_count = (size_t)padded_rows * row_size;
    tensor->initializer = initializer;
    tensor->std = std;
    tensor->weight_decay = columns != 0;
    table->elements += tensor->padded_count;
    return tensor->offset;
}

static inline size_t table_add_gain(TensorTable* table, int channels, const char* prefix, const char* name) {
    table_align(table);
    return table_add(table, channels, 0, channels, INIT_ONES, 0, "%s%s.weight", prefix, name);
}

static inline size_t table_add_matrix(TensorTable* table, int rows, int columns, float std,
                                      const char* prefix, const char* name) {
    return table_add(table, rows, columns, rows, INIT_NORMAL, std, "%s%s.weight", prefix, name);
}

static inline LayerParameters table_add_layer(TensorTable* table, const ModelConfig* config, int l) {
    const int C = config->channels, D = config->head_dim, F = config->ffn;
    const float std = 0.02f, residual_std = 0.02f / sqrtf(2.0f * (float)config->layers);
    char prefix[48];
    snprintf(prefix, sizeof(prefix), "model.layers.%d.", l);
    LayerParameters layer;
    layer.input_norm = table_add_gain(table, C, prefix, "input_layernorm");
    table_align(table);
    layer.qkv_proj = table_add_matrix(table, config->heads * D, C, std, prefix, "self_attn.q_proj");
    table_add_matrix(table, config->kv_heads * D, C, std, prefix, "self_attn.k_proj");
    table_add_matrix(table, config->kv_heads * D, C, std, prefix, "self_attn.v_proj");
    table_align(table);
    layer.k_conv = table->elements;
    if (layer_taps(config, l)) {
        table_add(table, layer_taps(config, l), config->kv_heads * D, layer_taps(config, l), INIT_ZEROS, 0,
                  "%sself_attn.k_conv.weight", prefix);
        table->tensors[table->count - 1].weight_decay = 0; // taps of 0 are no convolution
        table_align(table);
    }
    layer.o_proj = table_add_matrix(table, C, config->heads * D, residual_std, prefix, "self_attn.o_proj");
    layer.post_norm = table_add_gain(table, C, prefix, "post_attention_layernorm");
    table_align(table);
    layer.gate_up_proj = table_add_matrix(table, F, C, std, prefix, "mlp.gate_proj");
    table_add_matrix(table, F, C, std, prefix, "mlp.up_proj");
    table_align(table);
    layer.down_proj = table_add_matrix(table, C, F, residual_std, prefix, "mlp.down_proj");
    return layer;
}

static inline ParameterLayout parameter_layout(const ModelConfig* config) {
    ParameterLayout layout;
    memset(&layout, 0, sizeof(layout));
    TensorTable* table = &layout.table;
    const int V = config->vocab_size, Vp = config->padded_vocab, C = config->channels;
    layout.embedding = table_add(table, V, C, Vp, INIT_NORMAL, 0.02f, "model.embed_tokens.weight");
    layout.layers =
        (LayerParameters*)malloc_or_fail((size_t)config->layers * sizeof(LayerParameters), "layer table");
    for (int l = 0; l < config->layers; l++) layout.layers[l] = table_add_layer(table, config, l);
    layout.final_norm = table_add_gain(table, C, "model.", "norm");
    table_align(table);
    layout.head =
        config->tied ? layout.embedding : table_add(table, V, C, Vp, INIT_NORMAL, 0.02f, "lm_head.weight");
    table_align(table);
    return layout;
}

static inline void parameter_layout_free(ParameterLayout* layout) {
    free(layout->table.tensors);
    free(layout->layers);
}

// Parameters of the model as a checkpoint holds them, without padding.
static inline size_t table_parameter_count(const TensorTable* table) {
    size_t count = 0;
    for (int i = 0; i < table->count; i++) count += table->tensors[i].count;
    return count;
}

// Writes a tensor's initial values; the padding stays as it is (zero). `values` is in host memory,
// padded_count long.
static inline void tensor_initialize(float_acc* values, const Tensor* tensor, uint64_t seed) {
    uint64_t stream = random_stream(tensor->name);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < tensor->count; i++) {
        float value = tensor->initializer == INIT_ONES ? 1.0f : 0.0f;
        if (tensor->initializer == INIT_NORMAL) value = tensor->std * (float)random_normal(seed, stream, i);
        values[i] = value;
    }
}

// ----------------------------------------------------------------------------
// Cost

// The keys that a query of a layer sees, averaged over the positions of a sequence of T tokens.
static inline double keys_per_query(const ModelConfig* config, int layer, int T) {
    const double window = layer_window(config, layer), block = config->moba_block;
    if (window > 0 && window < T) return window - window * (window - 1) / (2.0 * T);
    if (!layer_chooses_blocks(config, layer)) return (T + 1) / 2.0;
    double sum = 0;
    for (int t = 0; t < T; t++) {
        int past = t / config->moba_block, chosen = config->moba_topk - 1;
        sum += t % config->moba_block + 1 + block * (past < chosen ? past : chosen);
    }
    return sum / T;
}

// Useful floating-point operations of one training token: 6 for each weight of a matrix
// product (2 forward, 4 backward), and 12 H D for each key that its queries see. It counts
// neither the router nor recomputed activations.
static inline double flops_per_token(const ModelConfig* config, int T) {
    double weights = (double)config->vocab_size * config->channels, attention = 0;
    for (int l = 0; l < config->layers; l++) {
        double C = config->channels, query_width = (double)config->heads * config->head_dim;
        weights += (double)qkv_heads(config) * config->head_dim * C + query_width * C + 3.0 * config->ffn * C;
        attention += 12.0 * query_width * keys_per_query(config, l, T);
    }
    return 6.0 * weights + attention;
}

#endif
