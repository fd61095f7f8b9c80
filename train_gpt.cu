/*
train_gpt: trains a decoder language model (RMSNorm, rotary positions, grouped attention, SwiGLU) from token
shards.

    build/train_gpt -i 'data/train_*.bin' -j 'data/val_*.bin' \
        --tokenizer data/tokenizer.json -o runs/first

Read it from the top: the model's memory, its forward pass, its loss, its backward pass, its update,
generation, the training loop, and main(). The headers included below decide on which device an operation
runs. docs/math.md says what each operation computes. Shapes use its letters: B sequences, T tokens,
C channels, L layers, H query heads, G key/value heads, D head dimension, F feed-forward width, V vocabulary,
Vp padded vocabulary.

This file is C11 and C++17. gcc builds it as C for DEVICE=cpu, nvcc builds it for DEVICE=cuda, and g++ builds
it for DEVICE=simt, which runs the CUDA kernels on an emulator (dev/simt).
*/
#include <malloc.h>
#include <omp.h>
#include <time.h>
#include "runtime/checks.h"    // defines fail, fail_usage, malloc_or_fail
#include "runtime/precision.h" // defines floatX, float_acc
#include "runtime/signals.h"   // defines signals_start, signals_take, signals_stop
#include "runtime/random.h"    // defines random_uniform, random_stream
#include "runtime/model.h"     // defines ModelConfig, ParameterLayout, flops_per_token
#if defined(DEVICE_CPU)
#include "dev/cpu/device.h"     // defines stream_t, device_malloc, copy_to_device, copy_to_host
#include "dev/cpu/embedding.h"  // defines embedding_forward, embedding_backward
#include "dev/cpu/rmsnorm.h"    // defines rmsnorm_forward, residual_rmsnorm_forward, rmsnorm_backward
#include "dev/cpu/matmul.h"     // defines matmul_start, matmul_forward, matmul_backward
#include "dev/cpu/keynorm.h"    // defines key_rms, key_weight_norm
#include "dev/cpu/heads.h"      // defines heads_begin_step, heads_of_batch, heads_measure
#include "dev/cpu/rope.h"       // defines rope_table
#include "dev/cpu/keys.h"       // defines keys_forward, keys_backward
#include "dev/cpu/gqa.h"        // defines attention_forward, attention_backward
#include "dev/cpu/moba.h"       // defines moba_forward, moba_backward, flashmoba_forward, flashmoba_backward
#include "dev/cpu/swiglu.h"     // defines swiglu_forward, swiglu_backward
#include "dev/cpu/classifier.h" // defines fused_classifier
#include "dev/cpu/adamw.h"      // defines global_norm, adamw_update
#elif defined(DEVICE_CUDA) || defined(DEVICE_SIMT)
#include "kernels/device.cuh" // the same functions, on the GPU or on its emulator
#include "kernels/embedding.cuh"
#include "kernels/rmsnorm.cuh"
#include "kernels/matmul.cuh"
#include "kernels/keynorm.cuh"
#include "kernels/heads.cuh"
#include "kernels/rope.cuh"
#include "kernels/keys.cuh"
#include "gqa.cuh"
#include "moba.cuh"
#include "kernels/moba_plain.cuh"
#include "kernels/swiglu.cuh"
#include "kernels/classifier.cuh"
#include "kernels/adamw.cuh"
#else
#error "define DEVICE_CPU, DEVICE_CUDA or DEVICE_SIMT (make DEVICE=...)"
#endif
#include "runtime/attention.h"   // defines AttentionShape, AttentionTensors, attention_module
#include "runtime/comm.h"        // defines comm_start, comm_rank, comm_reduce_scatter, comm_all_gather
#include "runtime/allocation.h"  // defines HeadAllocation, allocation_start
#include "runtime/memory.h"      // defines Arena
#include "runtime/limits.h"      // defines limits_memory, limits_try_threads, limits_disk_free
#include "runtime/gpus.h"        // defines gpu_peak_flops
#include "runtime/schedule.h"    // defines learning_rate
#include "runtime/options.h"     // defines Options, options_parse
#include "runtime/sampling.h"    // defines sample_token
#include "runtime/weights.h"     // defines Weights, weights_upload
#include "runtime/checkpoint.h"  // defines checkpoint_save, checkpoint_load_model
#include "runtime/run_lock.h"    // defines run_lock
#include "runtime/metrics.h"     // defines Metrics
#include "runtime/selection.h"   // defines SelectionStats, selection_add
#include "tokenizer/tokenizer.h" // defines tokenizer_load, tokenizer_encode, tokenizer_decode
#include "dataloader.h"          // defines DataLoader, loader_next
#include "runtime/retrieval.h"   // defines retrieval_open, retrieval_evaluate

// ----------------------------------------------------------------------------
// The model and its memory

// Arrays that a layer's forward pass keeps for its backward pass. In generation they also serve the next
// token: the keys and values in `qkv` are the KV cache, and a layer with a key convolution also needs its
// `raw_keys`. With --recompute all layers share some of these arrays (plan_layer() says which), and each
// layer overwrites the values of the layer before.
typedef struct {
    floatX* residual;     // (B, T, C) the layer's input
    floatX* norm1;        // (B, T, C)
    float_acc* rstd1;     // (B, T)
    floatX* qkv;          // (B, T, H + 2G, D) after convolution and RoPE
    floatX* raw_keys;     // (B, T, G, D) before the convolution, in layers that have one
    floatX* attention;    // (B, T, H, D)
    floatX* noised;       // (B, T, H, D) attention plus noise, the input of Wo with pgqa
    float_acc* lse;       // (B, H, T)
    int* selected;        // (B, H, T, K-1) the past blocks that each query attends to, in layers with MoBA
    float_acc* centroids; // (B, T/S, G, D) the mean key of each block
    floatX* residual_mid; // (B, T, C) the residual stream between attention and feed-forward
    floatX* norm2;        // (B, T, C)
    float_acc* rstd2;     // (B, T)
    floatX* gate_up;      // (B, T, 2F)
    floatX* swiglu;       // (B, T, F)
} LayerActivations;

typedef struct {
    LayerActivations* layers; // L
    LayerActivations shared;  // the arrays that all layers share
    floatX* residual;         // (B, T, C) the last layer's output
    floatX* norm;             // (B, T, C)
    float_acc* rstd;          // (B, T)
    floatX* branch;           // (B, T, C) output of attention or feed-forward, for the residual stream
    floatX* logits;           // (logit_rows, Vp) a few rows at a time; their gradient overwrites them
    float_acc* losses;        // (B, T)
    int* tokens;              // (B, T)
    int* targets;             // (B, T)
    float_acc* rope;          // (T, D/2, 2)
    float_acc* key_norms;     // (B, G) of one layer: the statistic of each sequence's keys
    float_acc* key_sums;      // (L, G) their sums over a step; with --kd-source weights, the norms of Wk
    // gradients, shared by all layers
    floatX* dresidual;  // (B, T, C)
    floatX* dnorm;      // (B, T, C)
    floatX* dqkv;       // (B, T, H + 2G, D)
    floatX* dattention; // (B, T, H, D)
    floatX* dgate_up;   // (B, T, 2F)
    floatX* dswiglu;    // (B, T, F)
    void* workspace;    // scratch memory of one operation at a time
} Activations;

// A range of the flat parameters whose gradients become final at the same point of the backward pass: one
// layer's, the embedding's, or those of the tensors after the layers. A bucket has N equal shards, one for
// each of N ranks. Rank r sums the gradients of shard r over the ranks and, with --zero 1, updates shard r.
typedef struct {
    size_t first, count; // elements; both multiples of N * COMM_ALIGNMENT
} Bucket;

typedef struct {
    ModelConfig config;
    ParameterLayout layout;
    size_t padded;   // elements of params and grads: those of the table, rounded up to whole shards
    Bucket* buckets; // (L + 2) in the order in which the backward pass completes them; some may be empty
    int bucket_count;
    int sharded;    // 1: masters and moments hold only this rank's shards (ZeRO-1), one after the other
    int reduces;    // 1: the backward pass sums the gradients over all ranks
    int B, T;       // the largest batch that the activations hold
    int logit_rows; // rows of logits that are computed at once
    int training;   // 0: no gradients and no optimizer state are held
    Recompute recompute;
    // in the arenas `parameters`, `gradients` and `optimizer`
    floatX* params; // (padded)
    float_acc*
        masters; // (padded, or its N-th) params before rounding; NULL: params are float_acc, or no training
    float_acc* grads;      // (padded)
    float_acc* exp_avg;    // (padded, or its N-th) first moment of AdamW
    float_acc* exp_avg_sq; // (padded, or its N-th) second moment
    float_acc* decays;     // (padded / DECAY_BLOCK) 1 where weights decay, or 0
    float_acc* norm;       // (1) global norm of the gradient
    float_acc* squares;    // (L + 2) sums of squares of the buckets' gradients
    float_acc* partials;   // scratch of these sums
    Activations acts;
    Arena parameters, gradients, optimizer, activations;
    HeadAllocation heads;   // the KV head that each query head reads; its arrays are in device memory
    float_acc* host_losses; // (B, T) in pinned host memory, as are the next two
    float_acc* host_norm;   // (1)
    int* host_not_finite;   // (L) copy of heads.not_finite
    int warned;             // 1: do not warn (again) of a statistic that is not finite
    Mark* marks;            // (L, 2, 2) times of begin and end of a layer's attention, forward and backward
    stream_t stream;
} Model;

// The whole weights, for loading and saving. With sharded masters no rank holds all of them; the memory of
// the gradients then holds the whole masters for a moment between steps. gpt_gather_masters() fills it before
// a save, and gpt_keep_masters() takes this rank's shards from it after a load.
static Weights gpt_weights(const Model* model) {
    const Weights weights = {model->params, model->masters && model->sharded ? model->grads : model->masters};
    return weights;
}

// This rank's shard of a bucket, in elements of the flat parameters.
static Bucket gpt_shard(Bucket bucket) {
    const size_t count = bucket.count / (size_t)comm_size();
    const Bucket shard = {bucket.first + (size_t)comm_rank() * count, count};
    return shard;
}

// Offset of this rank's shard of a bucket in masters, exp_avg and exp_avg_sq. Buckets begin at multiples of N
// elements, so with ZeRO-1 the shards of one rank fill an N-th of the whole without gaps.
static size_t gpt_shard_state(const Model* model, Bucket bucket) {
    return model->sharded ? bucket.first / (size_t)comm_size() : gpt_shard(bucket).first;
}

// A bucket begins at its first tensor, rounded up to whole shards. The elements below that boundary belong to
// the next bucket, which the backward pass completes later.
static void gpt_plan_buckets(Model* model) {
    const int L = model->config.layers;
    const size_t unit = (size_t)comm_size() * COMM_ALIGNMENT;
    model->padded = (model->layout.table.elements + unit - 1) / unit * unit;
    model->bucket_count = L + 2;
    model->buckets = (Bucket*)malloc_or_fail((size_t)(L + 2) * sizeof(Bucket), "the gradients' table");
    size_t end = model->padded;
    for (int i = 0; i < L + 2; i++) {
        const size_t begin = i == 0      ? model->layout.final_norm
                             : i < L + 1 ? model->layout.layers[L - i].input_norm
                                         : model->layout.embedding;
        model->buckets[i].first = (begin + unit - 1) / unit * unit;
        if (model->buckets[i].first > end) model->buckets[i].first = end;
        model->buckets[i].count = end - model->buckets[i].first;
        end = model->buckets[i].first;
    }
}

// Logits are by far the widest activation. This is the upper bound, in bytes, of the logits held at once;
// exceeded only if 64 rows need more. On a GPU every part accumulates into the head's gradient, which reads
// and writes all of that gradient in memory; so the parts are larger there.
#define LOGIT_BYTES ((size_t)(DEVICE_HAS_OWN_MEMORY ? 1024 : 128) << 20)

static AttentionShape layer_shape(const ModelConfig* config, int layer, int B, int T, int start) {
    const AttentionShape shape = {B,
                                  T,
                                  start,
                                  config->heads,
                                  config->kv_heads,
                                  config->head_dim,
                                  layer_window(config, layer),
                                  config->moba_block,
                                  config->moba_topk};
    return shape;
}

// Bytes of workspace that the attention of a layer needs; forward and backward use the same workspace.
static size_t attention_workspace(const ModelConfig* config, int layer, int B, int T, int training) {
    const AttentionModule* module = attention_module(layer_attention(config, layer));
    const AttentionShape shape = layer_shape(config, layer, B, T, 0);
    const size_t forward = module->forward_workspace(&shape),
                 backward = training ? module->backward_workspace(&shape) : 0;
    return backward > forward ? backward : forward;
}

// Reserves an array of layer l; `member` is its offset in LayerActivations. From the --recompute level
// `again` on, the backward pass computes the array again, so that all layers share one array.
static void reserve_in_layer(Model* model, int l, size_t member, size_t bytes, const char* label,
                             Recompute again) {
    Activations* acts = &model->acts;
    void** array = (void**)((char*)&acts->layers[l] + member);
    void** shared = (void**)((char*)&acts->shared + member);
    if (model->recompute >= again) arena_reserve_shared(&model->activations, array, shared, bytes, label);
    else arena_reserve(&model->activations, array, bytes, label);
}

// Reserves the activations of layer l. The last argument of ARRAY is the first --recompute level that does
// not keep the array. Every level keeps
// - the layer's input, from which everything else can be computed;
// - the selected blocks: where two scores are nearly equal, a second selection could choose another block,
//   and the gradient would be that of another function;
// - attention's output and lse: attention is the part whose cost per token grows with T;
// - the noised output of pgqa: computing it again would draw a random number for each element.
static void plan_layer(Model* model, int l) {
    const ModelConfig* config = &model->config;
    const int B = model->B, T = model->T;
    const Recompute never = RECOMPUTE_LEVELS;
    const size_t rows = (size_t)B * T, C = config->channels, H = config->heads, G = config->kv_heads,
                 D = config->head_dim, F = config->ffn, x = sizeof(floatX), acc = sizeof(float_acc);
#define ARRAY(name, bytes, label, again)                                                                     \
    reserve_in_layer(model, l, offsetof(LayerActivations, name), bytes, label, again)
    if (layer_chooses_blocks(config, l)) {
        const size_t chosen = moba_selected_count(B, T, (int)H, config->moba_topk),
                     means = moba_centroids_count(B, T, (int)G, (int)D, config->moba_block);
        ARRAY(selected, chosen * sizeof(int), "chosen blocks", never);
        ARRAY(centroids, means * acc, "chosen blocks", RECOMPUTE_LAYER);
    }
    ARRAY(residual, rows * C * x, "residual stream", never);
    ARRAY(norm1, rows * C * x, "norms", RECOMPUTE_LAYER);
    ARRAY(rstd1, rows * acc, "norms", RECOMPUTE_LAYER);
    ARRAY(qkv, rows * (H + 2 * G) * D * x, "queries, keys, values", RECOMPUTE_LAYER);
    if (layer_taps(config, l)) ARRAY(raw_keys, rows * G * D * x, "queries, keys, values", RECOMPUTE_LAYER);
    ARRAY(attention, rows * H * D * x, "attention", never);
    if (model->training && config->gqa == GQA_PERTURBED) ARRAY(noised, rows * H * D * x, "attention", never);
    ARRAY(lse, rows * H * acc, "attention", never);
    ARRAY(residual_mid, rows * C * x, "residual stream", RECOMPUTE_LAYER);
    ARRAY(norm2, rows * C * x, "norms", RECOMPUTE_LAYER);
    ARRAY(rstd2, rows * acc, "norms", RECOMPUTE_LAYER);
    ARRAY(gate_up, rows * 2 * F * x, "feed-forward", RECOMPUTE_MLP);
    ARRAY(swiglu, rows * F * x, "feed-forward", RECOMPUTE_MLP);
#undef ARRAY
}

// Plans the place of every array; allocates nothing but small tables. A model that is not trained has no
// --recompute: generation uses its layers' activations as a cache.
static void gpt_plan(Model* model, const ModelConfig* config, int B, int T, int training, Recompute recompute,
                     int zero) {
    assert(training || recompute == RECOMPUTE_NONE);
    memset(model, 0, sizeof(*model));
    model->config = *config;
    model->layout = parameter_layout(&model->config);
    gpt_plan_buckets(model);
    model->sharded = zero && comm_size() > 1;
    model->B = B;
    model->T = T;
    model->training = training;
    model->recompute = recompute;
    const size_t rows = (size_t)B * T, elements = model->padded;
    const size_t state = model->sharded ? elements / (size_t)comm_size() : elements;
    const size_t C = config->channels, H = config->heads, G = config->kv_heads, D = config->head_dim,
                 F = config->ffn;
    const size_t Vp = config->padded_vocab, L = config->layers;
    size_t most_rows = LOGIT_BYTES / (Vp * sizeof(floatX)) / 64 * 64;
    model->logit_rows = (int)(most_rows < 64 ? 64 : most_rows);
    if ((size_t)model->logit_rows > rows) model->logit_rows = (int)rows;

    const char* fewer_weights = "fewer --layers or --channels take less";
    model->parameters.name = "parameters";
    model->parameters.remedy = fewer_weights;
    arena_reserve(&model->parameters, (void**)&model->params, elements * sizeof(floatX), "parameters");
    if (training) {
        model->gradients.name = "gradients";
        model->gradients.remedy = fewer_weights;
        arena_reserve(&model->gradients, (void**)&model->grads, elements * sizeof(float_acc), "gradients");
        model->optimizer.name = "optimizer";
        model->optimizer.remedy = fewer_weights;
        if (weights_need_masters())
            arena_reserve(&model->optimizer, (void**)&model->masters, state * sizeof(float_acc),
                          "master weights");
        arena_reserve(&model->optimizer, (void**)&model->exp_avg, state * sizeof(float_acc), "first moment");
        arena_reserve(&model->optimizer, (void**)&model->exp_avg_sq, state * sizeof(float_acc),
                      "second moment");
        arena_reserve(&model->optimizer, (void**)&model->decays, decay_blocks(elements) * sizeof(float_acc),
                      "weight decay");
        arena_reserve(&model->optimizer, (void**)&model->norm, sizeof(float_acc), "gradient norm");
        arena_reserve(&model->optimizer, (void**)&model->squares,
                      (size_t)model->bucket_count * sizeof(float_acc), "gradient norm");
        arena_reserve(&model->optimizer, (void**)&model->partials,
                      global_norm_partials(elements) * sizeof(float_acc), "gradient norm");
    }

    Arena* arena = &model->activations;
    arena->name = "activations";
    arena->remedy = "a smaller --batch or --recompute takes less, and trains the same";
    Activations* acts = &model->acts;
    acts->layers = (LayerActivations*)calloc_or_fail(L, sizeof(LayerActivations), "the layers' table");
    size_t workspace = 0;
    for (int l = 0; l < (int)L; l++) {
        const size_t scratch = attention_workspace(config, l, B, T, training);
        if (scratch > workspace) workspace = scratch;
        plan_layer(model, l);
    }
    arena_reserve(arena, (void**)&acts->residual, rows * C * sizeof(floatX), "residual stream");
    arena_reserve(arena, (void**)&acts->norm, rows * C * sizeof(floatX), "norms");
    arena_reserve(arena, (void**)&acts->rstd, rows * sizeof(float_acc), "norms");
    arena_reserve(arena, (void**)&acts->branch, rows * C * sizeof(floatX), "residual stream");
    arena_reserve(arena, (void**)&acts->logits, (size_t)model->logit_rows * Vp * sizeof(floatX), "logits");
    arena_reserve(arena, (void**)&acts->losses, rows * sizeof(float_acc), "logits");
    arena_reserve(arena, (void**)&acts->tokens, rows * sizeof(int), "tokens and tables");
    arena_reserve(arena, (void**)&acts->targets, rows * sizeof(int), "tokens and tables");
    arena_reserve(arena, (void**)&acts->rope, (size_t)T * D * sizeof(float_acc), "tokens and tables");
    arena_reserve(arena, &model->heads.block, allocation_bytes((int)L, (int)H, (int)G), "tokens and tables");
    arena_reserve(arena, (void**)&acts->key_norms, B * G * sizeof(float_acc), "tokens and tables");
    arena_reserve(arena, (void**)&acts->key_sums, L * G * sizeof(float_acc), "tokens and tables");
    if (training) {
        const size_t norm = rmsnorm_backward_workspace((int)rows, (int)C);
        const size_t embedding = embedding_backward_workspace((int)rows, (int)C);
        for (int l = 0; l < (int)L; l++) {
            const size_t keys = keys_backward_workspace(B, T, (int)G, (int)D, layer_taps(config, l));
            if (keys > workspace) workspace = keys;
        }
        if (norm > workspace) workspace = norm;
        if (embedding > workspace) workspace = embedding;
    }
    arena_reserve(arena, &acts->workspace, workspace, "workspace");
    if (!training) return;
    arena_reserve(arena, (void**)&acts->dresidual, rows * C * sizeof(floatX), "activation gradients");
    arena_reserve(arena, (void**)&acts->dnorm, rows * C * sizeof(floatX), "activation gradients");
    arena_reserve(arena, (void**)&acts->dqkv, rows * (H + 2 * G) * D * sizeof(floatX),
                  "activation gradients");
    arena_reserve(arena, (void**)&acts->dattention, rows * H * D * sizeof(floatX), "activation gradients");
    arena_reserve(arena, (void**)&acts->dgate_up, rows * 2 * F * sizeof(floatX), "activation gradients");
    arena_reserve(arena, (void**)&acts->dswiglu, rows * F * sizeof(floatX), "activation gradients");
}

// Bytes of the device's memory.
static inline size_t model_bytes(const Model* model) {
    return model->parameters.bytes + model->gradients.bytes + model->optimizer.bytes +
           model->activations.bytes;
}

// Copies the allocation of query heads to host memory; the caller frees the copy by allocation_free().
static HeadAllocation gpt_read_heads(const Model* model) {
    HeadAllocation heads;
    const HeadAllocation* of_device = &model->heads;
    allocation_start(&heads, of_device->settings, of_device->L, of_device->H, of_device->G);
    copy_to_host(heads.block, of_device->block, allocation_bytes(heads.L, heads.H, heads.G), model->stream);
    stream_synchronize(model->stream);
    return heads;
}

static void gpt_write_heads(const Model* model, const HeadAllocation* heads) {
    copy_to_device(model->heads.block, heads->block, allocation_bytes(heads->L, heads->H, heads->G),
                   model->stream);
}

// Fills `decays`. Tensors without weight decay (gains, taps) begin and end at
// multiples of DECAY_BLOCK elements.
static void gpt_upload_decays(Model* model) {
    const TensorTable* table = &model->layout.table;
    const size_t blocks = decay_blocks(model->padded);
    float_acc* decays = (float_acc*)calloc_or_fail(blocks, sizeof(float_acc), "weight decay");
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        const size_t end = decay_blocks(tensor->offset + tensor->padded_count);
        for (size_t block = tensor->offset / DECAY_BLOCK; block < end && tensor->weight_decay; block++)
            decays[block] = 1;
    }
    copy_to_device(model->decays, decays, blocks * sizeof(float_acc), model->stream);
    stream_synchronize(model->stream);
    free(decays);
}

// Loads a checkpoint's allocation of query heads.
static inline void gpt_load_heads(Model* model, const char* directory) {
    HeadAllocation heads = gpt_read_heads(model);
    checkpoint_load_heads(directory, &heads);
    gpt_write_heads(model, &heads);
    stream_synchronize(model->stream);
    allocation_free(&heads);
}

// Allocates the planned memory. The weights are zero until gpt_initialize() or a checkpoint fills them.
static void gpt_allocate(Model* model) {
    model->stream = stream_make();
    arena_allocate(&model->parameters);
    if (model->training) {
        arena_allocate(&model->gradients);
        arena_allocate(&model->optimizer);
        gpt_upload_decays(model);
    }
    arena_allocate(&model->activations);
    size_t rows = (size_t)model->B * model->T, angles = (size_t)model->T * model->config.head_dim;
    model->host_losses = (float_acc*)host_malloc_pinned(rows * sizeof(float_acc), "losses");
    model->host_norm = (float_acc*)host_malloc_pinned(sizeof(float_acc), "the gradient's norm");
    model->marks = (Mark*)calloc_or_fail((size_t)model->config.layers * 4, sizeof(Mark), "marks in time");
    for (int i = 0; i < model->config.layers * 4; i++) model->marks[i] = mark_make();
    float_acc* table = (float_acc*)malloc_or_fail(angles * sizeof(float_acc), "rotary angles");
    rope_table(table, model->T, model->config.head_dim, model->config.rope_theta);
    copy_to_device(model->acts.rope, table, angles * sizeof(float_acc), model->stream);
    stream_synchronize(model->stream);
    free(table);
    const int L = model->config.layers, H = model->config.heads, G = model->config.kv_heads;
    HeadAllocation heads;
    allocation_start(&heads, allocation_defaults(model->config.gqa == GQA_DYNAMIC), L, H, G);
    model->heads = allocation_at(model->heads.block, heads.settings, L, H, G);
    model->host_not_finite = (int*)host_malloc_pinned((size_t)L * sizeof(int), "statistics of the keys");
    gpt_write_heads(model, &heads);
    stream_synchronize(model->stream);
    allocation_free(&heads);
}

// After a load into gpt_weights(): copies this rank's shards of the masters from the gradients' memory.
static inline void gpt_keep_masters(Model* model) {
    for (int i = 0; i < model->bucket_count && model->masters && model->sharded; i++) {
        const Bucket bucket = model->buckets[i], shard = gpt_shard(bucket);
        copy_on_device(model->masters + gpt_shard_state(model, bucket), model->grads + shard.first,
                       shard.count * sizeof(float_acc), model->stream);
    }
    stream_synchronize(model->stream);
}

// Before a save of gpt_weights(): gathers the masters of all ranks in the gradients' memory.
static inline void gpt_gather_masters(Model* model) {
    for (int i = 0; i < model->bucket_count && model->masters && model->sharded; i++) {
        const Bucket bucket = model->buckets[i], shard = gpt_shard(bucket);
        copy_on_device(model->grads + shard.first, model->masters + gpt_shard_state(model, bucket),
                       shard.count * sizeof(float_acc), model->stream);
        comm_all_gather(model->grads + bucket.first, bucket.count * sizeof(float_acc), model->stream);
    }
    comm_wait(model->stream);
    comm_synchronize(model->stream);
}

static void gpt_initialize(Model* model, uint64_t seed) {
    const TensorTable* table = &model->layout.table;
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        float_acc* values = (float_acc*)calloc_or_fail(tensor->padded_count, sizeof(float_acc), tensor->name);
        tensor_initialize(values, tensor, seed);
        weights_upload(gpt_weights(model), tensor->offset, values, tensor->padded_count, model->stream);
        free(values);
    }
    gpt_keep_masters(model);
}

// The ranges of optimizer state that this rank owns (ZeRO-1) or, without sharding, writes to a checkpoint:
// its shards in ascending order, neighbours merged. Returns their number, at most L + 2.
static inline int gpt_state_ranges(const Model* model, StateRange* ranges) {
    const size_t elements = model->layout.table.elements;
    int count = 0;
    for (int i = model->bucket_count - 1; i >= 0; i--) {
        const Bucket shard = gpt_shard(model->buckets[i]);
        const size_t end = shard.first + shard.count < elements ? shard.first + shard.count : elements;
        if (shard.first >= end) continue;
        const StateRange range = {shard.first, end - shard.first, gpt_shard_state(model, model->buckets[i])};
        StateRange* before = &ranges[count - 1];
        if (count > 0 && before->first + before->count == range.first &&
            before->at + before->count == range.at)
            before->count += range.count;
        else ranges[count++] = range;
    }
    return count;
}

static void gpt_free(Model* model) {
    arena_free(&model->parameters);
    if (model->training) {
        arena_free(&model->gradients);
        arena_free(&model->optimizer);
    }
    arena_free(&model->activations);
    parameter_layout_free(&model->layout);
    free(model->acts.layers);
    free(model->buckets);
    host_free_pinned(model->host_losses);
    host_free_pinned(model->host_norm);
    host_free_pinned(model->host_not_finite);
    for (int i = 0; i < model->config.layers * 4; i++) mark_free(model->marks[i]);
    free(model->marks);
    stream_free(model->stream);
}

// ----------------------------------------------------------------------------
// Attention, of the kind that the layer has

// Settings of a training pass. Evaluation and generation pass NULL in its place.
typedef struct {
    uint64_t seed;
    int step;           // optimizer steps done
    long sequence;      // index, within the step, of the batch's first sequence
    double noise_alpha; // of pgqa
} TrainingPass;

// In a training pass of pgqa, fills *noise with the settings of the noise and returns it; else returns NULL.
static const AttentionNoise* layer_noise(AttentionNoise* noise, const Model* model, int l,
                                         const TrainingPass* pass) {
    if (!pass || model->config.gqa != GQA_PERTURBED) return NULL;
    noise->noised = model->acts.layers[l].noised;
    noise->alpha = (float)pass->noise_alpha;
    noise->seed = pass->seed;
    noise->draws = noise_stream(pass->step, l);
    noise->first_sequence = (uint64_t)pass->sequence;
    return noise;
}

// The arrays of a layer's attention.
static AttentionTensors layer_tensors(const Model* model, int l) {
    const LayerActivations* layer = &model->acts.layers[l];
    AttentionTensors tensors;
    memset(&tensors, 0, sizeof(tensors));
    tensors.out = layer->attention;
    tensors.lse = layer->lse;
    tensors.selected = layer->selected;
    tensors.centroids = layer->centroids;
    tensors.qkv = layer->qkv;
    tensors.kv_of_q = model->heads.map + (size_t)l * model->config.heads;
    tensors.workspace = model->acts.workspace;
    return tensors;
}

// Writes attention, lse and, with MoBA, selected; in a training pass of pgqa also noised.
static void layer_attention_forward(Model* model, int l, int B, int T, int start, const TrainingPass* pass) {
    const AttentionShape shape = layer_shape(&model->config, l, B, T, start);
    AttentionTensors tensors = layer_tensors(model, l);
    AttentionNoise noise;
    tensors.noise = layer_noise(&noise, model, l, pass);
    mark(&model->marks[4 * l], model->stream);
    attention_module(layer_attention(&model->config, l))->forward(&tensors, &shape, model->stream);
    mark(&model->marks[4 * l + 1], model->stream);
}

// Computes dqkv from dattention.
static void layer_attention_backward(Model* model, int l, int B, int T) {
    const AttentionShape shape = layer_shape(&model->config, l, B, T, 0);
    AttentionTensors tensors = layer_tensors(model, l);
    tensors.dqkv = model->acts.dqkv;
    tensors.dout = model->acts.dattention;
    mark(&model->marks[4 * l + 2], model->stream);
    attention_module(layer_attention(&model->config, l))->backward(&tensors, &shape, model->stream);
    mark(&model->marks[4 * l + 3], model->stream);
}

// ----------------------------------------------------------------------------
// Query heads that follow the keys (docs/math.md section 3). Maps of query heads change between steps or,
// with --kd-source forward, within a training pass. Evaluation and generation never change them. All of this
// runs on the device, in stream order: during a step the host neither waits for a statistic nor reads a map.

// Makes the maps of a step: from the keys of the step before, from the current weights, or from random
// numbers. With --kd-source forward it only clears the sums.
static void gpt_begin_step(Model* model, int step) {
    const ModelConfig* config = &model->config;
    const int C = config->channels, H = config->heads, G = config->kv_heads, D = config->head_dim;
    const StatisticSource source = model->heads.settings.source;
    float_acc* sums = model->acts.key_sums;
    if (!heads_are_key_driven(config)) return;
    device_zero(sums, (size_t)config->layers * G * sizeof(float_acc), model->stream);
    if (source == SOURCE_FORWARD) return;
    for (int l = 0; l < config->layers && source == SOURCE_WEIGHTS; l++) {
        const LayerParameters* weights = &model->layout.layers[l];
        key_weight_norm(sums + (size_t)l * G, model->params + weights->qkv_proj + (size_t)H * D * C,
                        model->params + weights->input_norm, G, D, C, model->stream);
    }
    if (source == SOURCE_WEIGHTS) heads_measure(&model->heads, sums, 1, step, model->stream);
    heads_begin_step(&model->heads, step, model->stream);
}

// Measures the keys that the projection of layer l has written. With --kd-source forward,
// it also makes this pass's map from them.
static void gpt_measure_keys(Model* model, int l, int B, int T, int step) {
    const int H = model->config.heads, G = model->config.kv_heads, D = model->config.head_dim;
    Activations* acts = &model->acts;
    key_rms(acts->key_norms, acts->key_sums + (size_t)l * G, acts->layers[l].qkv, B, T, H, G, D,
            model->stream);
    if (model->heads.settings.source != SOURCE_FORWARD) return;
    // The mean over the sequences of all ranks: the all-reduce sums each row over the ranks, and
    // heads_of_batch() sums the rows.
    comm_all_reduce(acts->key_norms, (size_t)B * G, model->stream);
    comm_wait(model->stream);
    heads_of_batch(&model->heads, l, acts->key_norms, B, B * comm_size(), step, model->stream);
}

// Computes the statistic of a step, the mean over its sequences. Later steps make their maps from it.
static void gpt_end_step(Model* model, int step, long sequences) {
    const HeadAllocation* heads = &model->heads;
    if (!heads_are_key_driven(&model->config)) return;
    if (allocation_needs_keys(&heads->settings)) {
        comm_all_reduce(model->acts.key_sums, (size_t)heads->L * heads->G, model->stream);
        comm_wait(model->stream);
        heads_measure(heads, model->acts.key_sums, sequences, step, model->stream);
    }
    copy_to_host(model->host_not_finite, heads->not_finite, (size_t)heads->L * sizeof(int), model->stream);
}

// Warns, once in a run, of a statistic that was not finite. Call this after a synchronisation of the stream.
static inline void gpt_check_heads(Model* model) {
    if (heads_are_key_driven(&model->config))
        allocation_warn(&model->warned, model->host_not_finite, model->config.layers);
}

// ----------------------------------------------------------------------------
// Forward: first the parts of a layer that the backward pass repeats with --recompute, then the whole pass.
// Each part computes rows start..T-1 of its outputs. Both passes call the same function with the same
// numbers, so they get the same bits.

// Computes the queries, keys and values of layer l from norm1. In a training pass that measures the keys,
// `step` is the step's number; else it is -1.
static void layer_qkv_forward(Model* model, int l, int B, int T, int start, int step) {
    const ModelConfig* config = &model->config;
    const int C = config->channels, H = config->heads, G = config->kv_heads, D = config->head_dim;
    const int rows = B * (T - start), QKV = qkv_heads(config) * D;
    const size_t first = start;
    const LayerActivations* layer = &model->acts.layers[l];
    const LayerParameters* weights = &model->layout.layers[l];
    const floatX* params = model->params;
    matmul_forward(layer->qkv + first * QKV, layer->norm1 + first * C, params + weights->qkv_proj, rows, C,
                   QKV, model->stream);
    if (step >= 0) gpt_measure_keys(model, l, B, T, step);
    const int taps = layer_taps(config, l);
    keys_forward(layer->qkv, layer->raw_keys, layer->centroids, taps ? params + weights->k_conv : NULL,
                 layer_has_rope(config, l) ? model->acts.rope : NULL, B, T, start, H, G, D,
                 config->moba_block, taps, model->stream);
}

// Computes residual_mid and norm2 from `heads`, attention's output with or without noise.
static void layer_output_forward(Model* model, int l, const floatX* heads, int B, int T, int start) {
    const ModelConfig* config = &model->config;
    const int C = config->channels, width = config->heads * config->head_dim, rows = B * (T - start);
    const size_t first = start;
    const LayerActivations* layer = &model->acts.layers[l];
    const LayerParameters* weights = &model->layout.layers[l];
    floatX* branch = model->acts.branch + first * C;
    matmul_forward(branch, heads + first * width, model->params + weights->o_proj, rows, width, C,
                   model->stream);
    residual_rmsnorm_forward(layer->residual_mid + first * C, layer->norm2 + first * C, layer->rstd2 + first,
                             layer->residual + first * C, branch, model->params + weights->post_norm, rows, C,
                             config->norm_eps, model->stream);
}

// Computes gate_up and swiglu from norm2.
static void layer_hidden_forward(Model* model, int l, int B, int T, int start) {
    const int C = model->config.channels, F = model->config.ffn, rows = B * (T - start);
    const size_t first = start;
    const LayerActivations* layer = &model->acts.layers[l];
    matmul_forward(layer->gate_up + first * 2 * F, layer->norm2 + first * C,
                   model->params + model->layout.layers[l].gate_up_proj, rows, C, 2 * F, model->stream);
    swiglu_forward(layer->swiglu + first * F, layer->gate_up + first * 2 * F, rows, F, model->stream);
}

// Computes norm1 and qkv of layer l again, if later layers of the forward pass have overwritten them.
static void layer_qkv_again(Model* model, int l, int B, int T) {
    if (model->recompute < RECOMPUTE_LAYER) return;
    const LayerActivations* layer = &model->acts.layers[l];
    rmsnorm_forward(layer->norm1, layer->rstd1, layer->residual,
                    model->params + model->layout.layers[l].input_norm, B * T, model->config.channels,
                    model->config.norm_eps, model->stream);
    layer_qkv_forward(model, l, B, T, 0, -1);
}

// The input of Wo in a training pass.
static const floatX* layer_heads(const Model* model, int l) {
    const LayerActivations* layer = &model->acts.layers[l];
    return model->config.gqa == GQA_PERTURBED ? layer->noised : layer->attention;
}

// Computes again all activations of layer l that later layers have overwritten in the training pass. Nothing
// has overwritten those of the last layer.
static void layer_again(Model* model, int l, int B, int T) {
    if (l + 1 == model->config.layers) return;
    layer_qkv_again(model, l, B, T);
    if (model->recompute >= RECOMPUTE_LAYER) layer_output_forward(model, l, layer_heads(model, l), B, T, 0);
    if (model->recompute >= RECOMPUTE_MLP) layer_hidden_forward(model, l, B, T, 0);
}

// Runs tokens (B, T) through the layers and the final norm. With start > 0 (B = 1 only), earlier calls have
// computed rows 0..start-1, keys and values included, and this call computes rows start..T-1. Generation adds
// a token in this way; it needs layers that keep their keys and values (no --recompute layer). Outside
// training, pass is NULL: the maps of query heads then stay as they are, and there is no noise.
static void gpt_forward(Model* model, const int* tokens, int B, int T, int start, const TrainingPass* pass) {
    assert(B <= model->B && (size_t)B * T <= (size_t)model->B * model->T && T <= model->T);
    assert(start == 0 || (B == 1 && !pass && model->recompute < RECOMPUTE_LAYER));
    const ModelConfig* config = &model->config;
    const int C = config->channels, F = config->ffn;
    const int rows = B * (T - start);
    const size_t first = start; // the first row computed, of every activation
    const int measured =
        pass && heads_are_key_driven(config) && allocation_needs_keys(&model->heads.settings);
    const float eps = config->norm_eps;
    const floatX* params = model->params;
    Activations* acts = &model->acts;
    stream_t stream = model->stream;

    range_begin("forward");
    copy_to_device(acts->tokens + first, tokens + first, (size_t)rows * sizeof(int), stream);
    floatX* residual = acts->layers[0].residual;
    const LayerParameters* weights = &model->layout.layers[0];
    embedding_forward(residual + first * C, acts->tokens + first, params + model->layout.embedding, rows, C,
                      stream);
    rmsnorm_forward(acts->layers[0].norm1 + first * C, acts->layers[0].rstd1 + first, residual + first * C,
                    params + weights->input_norm, rows, C, eps, stream);

    for (int l = 0; l < config->layers; l++) {
        LayerActivations* layer = &acts->layers[l];
        weights = &model->layout.layers[l];
        const int last_layer = l + 1 == config->layers;

        // attention
        layer_qkv_forward(model, l, B, T, start, measured ? pass->step : -1);
        layer_attention_forward(model, l, B, T, start, pass);
        layer_output_forward(model, l, pass ? layer_heads(model, l) : layer->attention, B, T, start);

        // feed-forward, and the norm after it: the next layer's first norm, or the final norm
        layer_hidden_forward(model, l, B, T, start);
        matmul_forward(acts->branch + first * C, layer->swiglu + first * F, params + weights->down_proj, rows,
                       F, C, stream);
        floatX* next_residual = last_layer ? acts->residual : acts->layers[l + 1].residual;
        floatX* next_norm = last_layer ? acts->norm : acts->layers[l + 1].norm1;
        float_acc* next_rstd = last_layer ? acts->rstd : acts->layers[l + 1].rstd1;
        size_t next_gain = last_layer ? model->layout.final_norm : model->layout.layers[l + 1].input_norm;
        residual_rmsnorm_forward(next_residual + first * C, next_norm + first * C, next_rstd + first,
                                 layer->residual_mid + first * C, acts->branch + first * C,
                                 params + next_gain, rows, C, eps, stream);
    }
    range_end();
}

// Computes the losses, in nats, of the rows that gpt_forward() left in acts.norm, and queues their copy to
// host memory: `losses` (B, T) is complete after the next synchronisation of the stream. With gradients, it
// also computes dnorm and accumulates the head's gradient, both scaled by dloss. Logits are computed, used
// and overwritten logit_rows rows at a time, so all of them never exist at once.
static void gpt_classify(Model* model, float_acc* losses, const int* targets, int B, int T,
                         int with_gradients, float_acc dloss) {
    const int C = model->config.channels, V = model->config.vocab_size, Vp = model->config.padded_vocab,
              rows = B * T;
    const floatX* head = model->params + model->layout.head;
    Activations* acts = &model->acts;
    stream_t stream = model->stream;

    range_begin("head and loss");
    copy_to_device(acts->targets, targets, (size_t)rows * sizeof(int), stream);
    for (int first = 0; first < rows; first += model->logit_rows) {
        const int some = rows - first < model->logit_rows ? rows - first : model->logit_rows;
        const floatX* norm = acts->norm + (size_t)first * C;
        matmul_forward(acts->logits, norm, head, some, C, Vp, stream);
        fused_classifier(acts->logits, acts->losses + first, acts->targets + first, dloss, some, V, Vp,
                         with_gradients, stream);
        if (with_gradients)
            matmul_backward(acts->dnorm + (size_t)first * C, model->grads + model->layout.head, acts->logits,
                            norm, head, some, C, Vp, stream);
    }
    copy_to_host(losses, acts->losses, (size_t)rows * sizeof(float_acc), stream);
    range_end();
}

static double sum_of_losses(const float_acc* losses, int rows) {
    double sum = 0;
    for (int row = 0; row < rows; row++) sum += (double)losses[row];
    return sum;
}

// gpt_classify() followed by a synchronisation. Returns the sum of the losses.
static inline double gpt_loss(Model* model, const int* targets, int B, int T, int with_gradients,
                              float_acc dloss) {
    gpt_classify(model, model->host_losses, targets, B, T, with_gradients, dloss);
    stream_synchronize(model->stream);
    return sum_of_losses(model->host_losses, B * T);
}

// ----------------------------------------------------------------------------
// Backward

// Queues the sum of bucket i's gradients over the ranks, if this pass reduces. With ZeRO-1 each rank gets its
// shard of the sum, else the whole sum.
static void gpt_reduce(const Model* model, int i) {
    const Bucket bucket = model->buckets[i];
    if (!model->reduces || bucket.count == 0) return;
    comm_reduce_scatter(model->grads + bucket.first, bucket.count, model->stream);
    if (!model->sharded)
        comm_all_gather(model->grads + bucket.first, bucket.count * sizeof(float_acc), model->stream);
}

// Computes the gradients of all parameters from dnorm, which gpt_classify() left, and accumulates them in
// grads. It is the reverse of a forward pass with a TrainingPass.
static void gpt_backward(Model* model, int B, int T) {
    const ModelConfig* config = &model->config;
    const int C = config->channels, H = config->heads, G = config->kv_heads, D = config->head_dim,
              F = config->ffn;
    const int rows = B * T, QKV = qkv_heads(config) * D;
    const floatX* params = model->params;
    float_acc* grads = model->grads;
    Activations* acts = &model->acts;
    stream_t stream = model->stream;

    range_begin("backward");
    device_zero(acts->dresidual, (size_t)rows * C * sizeof(floatX), stream);
    rmsnorm_backward(acts->dresidual, grads + model->layout.final_norm, acts->dnorm, acts->residual,
                     params + model->layout.final_norm, acts->rstd, acts->workspace, rows, C, stream);
    gpt_reduce(model, 0);
    for (int l = config->layers - 1; l >= 0; l--) {
        const LayerParameters* weights = &model->layout.layers[l];
        const LayerActivations* layer = &acts->layers[l];
        layer_again(model, l, B, T);

        // feed-forward
        matmul_backward(acts->dswiglu, grads + weights->down_proj, acts->dresidual, layer->swiglu,
                        params + weights->down_proj, rows, F, C, stream);
        swiglu_backward(acts->dgate_up, acts->dswiglu, layer->gate_up, rows, F, stream);
        matmul_backward(acts->dnorm, grads + weights->gate_up_proj, acts->dgate_up, layer->norm2,
                        params + weights->gate_up_proj, rows, C, 2 * F, stream);
        rmsnorm_backward(acts->dresidual, grads + weights->post_norm, acts->dnorm, layer->residual_mid,
                         params + weights->post_norm, layer->rstd2, acts->workspace, rows, C, stream);

        // attention
        // The gradient of Wo needs Wo's input, the noised output. The noise passes the gradient on
        // unchanged, so attention's backward pass needs the output without noise.
        matmul_backward(acts->dattention, grads + weights->o_proj, acts->dresidual, layer_heads(model, l),
                        params + weights->o_proj, rows, H * D, C, stream);
        layer_attention_backward(model, l, B, T);
        const int taps = layer_taps(config, l);
        keys_backward(acts->dqkv, taps ? grads + weights->k_conv : NULL, layer->raw_keys,
                      taps ? params + weights->k_conv : NULL, layer_has_rope(config, l) ? acts->rope : NULL,
                      acts->workspace, B, T, H, G, D, taps, stream);
        matmul_backward(acts->dnorm, grads + weights->qkv_proj, acts->dqkv, layer->norm1,
                        params + weights->qkv_proj, rows, C, QKV, stream);
        rmsnorm_backward(acts->dresidual, grads + weights->input_norm, acts->dnorm, layer->residual,
                         params + weights->input_norm, layer->rstd1, acts->workspace, rows, C, stream);
        gpt_reduce(model, config->layers - l);
    }
    embedding_backward(grads + model->layout.embedding, acts->dresidual, acts->tokens, acts->workspace, rows,
                       C, stream);
    gpt_reduce(model, config->layers + 1);
    // Without a reduction there is nothing to wait for, and a recorded graph
    // must not wait for work before it.
    if (model->reduces) comm_wait(stream);
    range_end();
}

static void gpt_zero_gradients(Model* model) {
    device_zero(model->grads, model->padded * sizeof(float_acc), model->stream);
}

// Computes the global norm of the gradient. Each rank sums the squares of its own
// shards; an all-reduce adds the ranks' sums up.
static void gpt_gradient_norm(Model* model) {
    for (int i = 0; i < model->bucket_count; i++) {
        const Bucket shard = gpt_shard(model->buckets[i]);
        if (shard.count > 0)
            sum_of_squares(model->squares + i, model->partials, model->grads + shard.first, shard.count,
                           model->stream);
    }
    comm_all_reduce(model->squares, (size_t)model->bucket_count, model->stream);
    comm_wait(model->stream);
    global_norm(model->norm, model->squares, model->bucket_count, model->stream);
}

// AdamW over `count` elements from `first` on, whose masters and moments begin at offset `state`.
static void gpt_update_range(Model* model, size_t first, size_t state, size_t count, AdamW settings) {
    adamw_update(model->params + first, model->masters ? model->masters + state : NULL,
                 model->exp_avg + state, model->exp_avg_sq + state, model->grads + first, model->norm,
                 model->decays + first / DECAY_BLOCK, count, settings, model->stream);
}

// One step of AdamW over all parameters or, with ZeRO-1, over this rank's shards; an all-gather then gives
// every rank all new parameters. It also queues the copy of the gradient norm, before clipping, to host_norm.
static void gpt_update(Model* model, AdamW settings) {
    range_begin("update");
    gpt_gradient_norm(model);
    if (!model->sharded) gpt_update_range(model, 0, 0, model->padded, settings);
    for (int i = model->bucket_count - 1; i >= 0 && model->sharded;
         i--) { // in the order in which the next forward pass needs them
        const Bucket bucket = model->buckets[i], shard = gpt_shard(bucket);
        if (bucket.count == 0) continue;
        gpt_update_range(model, shard.first, gpt_shard_state(model, bucket), shard.count, settings);
        comm_all_gather(model->params + bucket.first, bucket.count * sizeof(floatX), model->stream);
    }
    comm_wait(model->stream);
    copy_to_host(model->host_norm, model->norm, sizeof(float_acc), model->stream);
    range_end();
}

// ----------------------------------------------------------------------------
// Generation

// Computes the logits (Vp) of one row that gpt_forward() left in acts.norm, and copies them to host memory.
static void gpt_read_logits(Model* model, floatX* logits, size_t row) {
    const int C = model->config.channels, Vp = model->config.padded_vocab;
    matmul_forward(model->acts.logits, model->acts.norm + row * C, model->params + model->layout.head, 1, C,
                   Vp, model->stream);
    copy_to_host(logits, model->acts.logits, (size_t)Vp * sizeof(floatX), model->stream);
    stream_synchronize(model->stream);
}

// Computes the logits (V) of the token that follows T tokens of one sequence. The last call had the first
// `start` of them. Where layers do not keep their keys and values, this call runs all T tokens again.
static void gpt_next_logits(Model* model, float* logits, const int* tokens, int T, int start,
                            floatX* scratch) {
    if (model->recompute >= RECOMPUTE_LAYER) start = 0;
    gpt_forward(model, tokens, 1, T, start, NULL);
    gpt_read_logits(model, scratch, (size_t)T - 1);
    convert_values(logits, DTYPE_F32, scratch, DTYPE_FLOATX, (size_t)model->config.vocab_size);
}

#ifndef TRAIN_GPT_NO_MAIN // a test includes this file for the model alone

// The number of tokens that the tokenizer has. Published models often have a few more rows in their
// embedding. These rows take part in the softmax, as in training, but are never sampled.
static int known_tokens(const ModelConfig* config, const Tokenizer* tokenizer) {
    return tokenizer ? tokenizer_vocab_size(tokenizer) : config->vocab_size;
}

// The signal that asks the run to stop; 0: none. A signal to one rank counts
// for all: all ranks call this together.
static int stop_wanted(void) { return comm_max(signals_stop()); }

// Prints the text of a token to stdout, or its number if there is no tokenizer.
static void print_token(const Tokenizer* tokenizer, int token) {
    size_t length = 0;
    const char* bytes = tokenizer ? tokenizer_token_bytes(tokenizer, token, &length) : NULL;
    if (bytes) (void)fwrite(bytes, 1, length, stdout);
    else printf("%d ", token);
    fflush(stdout);
}

// Continues the prompt by up to --sample-length tokens and prints both. It ends early at the model's sequence
// length or at the end-of-text token. `name` and `number` key the random stream, so a sample does not depend
// on earlier samples. Returns 0 if a signal interrupted it, else 1.
static int gpt_sample(Model* model, Tokenizer* tokenizer, const Options* options, const char* name,
                      uint64_t number) {
    const int V = known_tokens(&model->config, tokenizer), most = model->T;
    const int end_of_text = tokenizer ? tokenizer_special_id(tokenizer, "<|endoftext|>") : -1;
    TokenBuffer prompt = {NULL, 0, 0};
    int32_t first = end_of_text >= 0 ? end_of_text : 0;
    token_buffer_append(&prompt, &first, 1);
    if (options->prompt) tokenizer_encode(tokenizer, options->prompt, strlen(options->prompt), 1, &prompt);
    if (prompt.count >= (size_t)most)
        fail("--prompt: %zu tokens, the model's sequences have %d", prompt.count, most);

    int* tokens = (int*)malloc_or_fail((size_t)most * sizeof(int), "a sample");
    float* logits =
        (float*)malloc_or_fail((size_t)model->config.vocab_size * sizeof(float), "a sample's logits");
    floatX* scratch =
        (floatX*)malloc_or_fail((size_t)model->config.padded_vocab * sizeof(floatX), "a sample's logits");
    int* workspace = (int*)malloc_or_fail(sampling_workspace_bytes(V), "sampling");
    int count = 0, done = 0, stopped = 0;
    for (size_t i = 0; i < prompt.count; i++) {
        tokens[count++] = prompt.ids[i];
        if (i > 0) print_token(tokenizer, prompt.ids[i]);
    }
    uint64_t stream = random_stream(name) ^ number;
    for (int i = 0; i < options->sample_length && count < most; i++) {
        if ((stopped = stop_wanted() != 0)) break;
        gpt_next_logits(model, logits, tokens, count, done, scratch);
        done = count;
        double uniform = random_uniform(options->seed, stream, (uint64_t)i);
        int token = sample_token(logits, V, (float)options->temperature, options->top_k,
                                 (float)options->top_p, uniform, workspace);
        if (token < 0) fail("the model's logits are not numbers");
        if (token == end_of_text) break;
        tokens[count++] = token;
        print_token(tokenizer, token);
    }
    printf("\n");
    token_buffer_free(&prompt);
    free(tokens);
    free(logits);
    free(scratch);
    free(workspace);
    return !stopped;
}

// Runs the model over --tokens and writes all logits, for a comparison with other programs.
static void write_logits(Model* model, const Options* options) {
    const int V = model->config.vocab_size, Vp = model->config.padded_vocab;
    int* tokens = (int*)malloc_or_fail((size_t)model->T * sizeof(int), "tokens");
    int T = 0;
    for (const char* text = options->tokens; *text;) {
        char* end;
        long token = strtol(text, &end, 10);
        if (end == text || (*end && *end != ','))
            fail_usage("--tokens %s: want ids separated by commas", options->tokens);
        if (token < 0 || token >= V) fail_usage("--tokens: %ld is outside the vocabulary of %d", token, V);
        if (T == model->T) fail_usage("--tokens: more than the %d tokens of the model's sequences", model->T);
        tokens[T++] = (int)token;
        text = end + (*end == ',');
    }
    if (T == 0) fail_usage("--tokens: want at least one id");
    gpt_forward(model, tokens, 1, T, 0, NULL);
    floatX* logits = (floatX*)malloc_or_fail((size_t)T * Vp * sizeof(floatX), "logits");
    for (int t = 0; t < T; t++) gpt_read_logits(model, logits + (size_t)t * Vp, (size_t)t);
    logits_write(options->write_logits, logits, tokens, T, V, Vp);
    free(tokens);
    free(logits);
}

// ----------------------------------------------------------------------------
// The retrieval task

typedef struct {
    Model* model;
    int known; // tokens of the tokenizer
} RetrievalContext;

static void retrieval_forward(void* context, const int* tokens, int rows, int T) {
    gpt_forward(((RetrievalContext*)context)->model, tokens, rows, T, 0, NULL);
}

// The most likely token after one position of the batch that
// retrieval_forward() ran; of equals the lowest number.
static int retrieval_likeliest(void* context, int row, int T, int position) {
    Model* model = ((RetrievalContext*)context)->model;
    const int V = ((RetrievalContext*)context)->known;
    floatX* scratch = (floatX*)malloc_or_fail((size_t)model->config.padded_vocab * sizeof(floatX), "logits");
    float_acc* logits = (float_acc*)malloc_or_fail((size_t)V * sizeof(float_acc), "logits");
    gpt_read_logits(model, scratch, (size_t)row * T + position);
    convert_values(logits, DTYPE_FLOAT_ACC, scratch, DTYPE_FLOATX, (size_t)V);
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    free(logits);
    free(scratch);
    return best;
}

// Runs the task and prints its accuracy by length and depth as a table and as a line of JSON. With --output
// it also writes the JSON to retrieval.json there.
static void eval_retrieval(Model* model, Retrieval* task, const Options* options, const char* checkpoint,
                           const Tokenizer* tokenizer) {
    RetrievalContext context = {model, known_tokens(&model->config, tokenizer)};
    const RetrievalModel subject = {&context, retrieval_forward, retrieval_likeliest};
    retrieval_evaluate(task, &subject, context.known, tokenizer ? tokenizer_hash(tokenizer) : 0, model->B);
    retrieval_print(task, stdout);
    cJSON* json = retrieval_json(task, checkpoint);
    char* line = cJSON_PrintUnformatted(json);
    if (!line) fail("out of memory: the result as JSON");
    printf("%s\n", line);
    cJSON_free(line);
    if (options->output) {
        char path[PATH_MAX];
        make_directories_or_fail(options->output);
        path_format(path, "%s/retrieval.json", options->output);
        json_replace_file(path, json);
    }
    cJSON_Delete(json);
}

// ----------------------------------------------------------------------------
// The parts of a run, and the checks that they fit together

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

static void check_graph(const Options* options) {
    if (!options->cuda_graph) return;
    if (!DEVICE_HAS_GRAPHS)
        fail_usage("--cuda-graph: of builds with DEVICE=cuda or simt; this one is DEVICE=%s", DEVICE_NAME);
    if (!comm_can_be_recorded())
        fail_usage("--cuda-graph: not under mpirun with this build, whose gradients the host adds up");
}

// Whether this process trains, and so writes checkpoints and metrics to a run's directory.
static int is_to_train(const Options* options) {
    return !options->dry_run && !options->generate && !options->write_logits && !options->eval_retrieval;
}

static void find_checkpoints(Run* run) {
    const Options* options = &run->options;
    if (options->resume && !options->output) fail_usage("--resume: needs --output, the directory of the run");
    if (options->resume && options->overwrite) fail_usage("--resume: goes against --overwrite");
    if (options->output && !options->eval_retrieval) checkpoint_check_output(options->output);
    if (options->output && is_to_train(options) && comm_rank() == 0 && is_directory(options->output)) {
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
static void check_mode(const Run* run) {
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

// Decides the model's sizes, which the user's options override: a checkpoint's or a descriptor's. Loads the
// tokenizer, and checks that model, build, tokenizer and checkpoint fit together.
static void choose_model(Run* run) {
    Options* options = &run->options;
    const char* directory = run->resume_from[0] ? run->resume_from : run->init_from;
    // Training may start (--init-from) from a model with another kind of attention or sequence length; the
    // weights' shapes are checked when they are read. Resume, --generate and --write-logits require the
    // checkpoint's model to match exactly.
    const int must_match = run->resume_from[0] || options->generate || options->write_logits;
    ModelConfig base;
    if (directory[0] && !options->model) {
        base = checkpoint_read_config(directory);
        // A build with kinds of its own starts new training with them, even from weights of another kind.
        if (BUILD_CHOOSES_KINDS && !must_match) model_config_of_build(&base);
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

// Upper bound of the tokens of a micro-batch: no memory holds more, and no
// product of sizes overflows with fewer.
#define MOST_TOKENS (1L << 28)

static void open_data(Run* run) {
    Options* options = &run->options;
    const int T = run->config.sequence_length, B = options->batch;
    if ((long)B * T > MOST_TOKENS)
        fail_usage(
            "--batch %d: with --sequence-length %d a micro-batch of %ld tokens; at most %ld are computed "
            "at once",
            B, T, (long)B * T, MOST_TOKENS);
    const long N = comm_size(), least = N * B * T;
    // Without --total-batch, a resumed run keeps the checkpoint's, whatever the number of processes.
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
    // One pass over the data, counted from the sequences seen: earlier steps
    // may have had another total batch.
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

// Compares the data with the checkpoint's. Other data would have another order: some
// sequences would come twice and others never.
static void check_same_data(Run* run, const TrainingState* before) {
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
static void check_resume(Run* run, const TrainingState* before) {
    const Options* options = &run->options;
    if (before->seed != options->seed)
        fail("--seed %llu: %s was begun with seed %llu", (unsigned long long)options->seed, run->resume_from,
             (unsigned long long)before->seed);
    if (before->step > run->steps)
        fail_usage("--steps %d: %s has done %d already", run->steps, run->resume_from, before->step);
    check_same_data(run, before);
    checkpoint_changed_settings(run->changes, before, &run->state);
}

static void agree_on_shards(const char* what, const DataLoader* loader) {
    comm_must_agree(what, "of %d shards", loader ? loader->shard_count : 0);
    for (int i = 0; loader && i < loader->shard_count; i++) {
        const TokenShard* shard = &loader->shards[i];
        comm_must_agree(what, "%s of %u tokens, vocabulary %d, tokenizer %08x, hash of some tokens %016llx",
                        shard->path, shard->tokens, shard->vocab_size, shard->tokenizer_hash,
                        (unsigned long long)shard_fingerprint(shard));
    }
}

// Fails if ranks have different builds, arguments or checkpoints, or see different data files.
static void agree_on_run(const Run* run, int argc, char** argv) {
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

// The hash of an array in device memory, which is copied to host memory a piece at a time.
static uint64_t hash_of_device(const void* values, size_t bytes, stream_t stream) {
    const size_t most = DEVICE_HAS_OWN_MEMORY ? (size_t)1 << 20 : bytes;
    char* copy = DEVICE_HAS_OWN_MEMORY ? (char*)malloc_or_fail(most, "a piece of the weights") : NULL;
    uint64_t hash = 0;
    for (size_t at = 0; at < bytes; at += most) {
        const size_t some = bytes - at < most ? bytes - at : most;
        const char* piece = (const char*)values + at;
        if (copy) {
            copy_to_host(copy, piece, some, stream);
            stream_synchronize(stream);
        }
        hash = hash_more(hash, copy ? copy : piece, some);
    }
    free(copy);
    return hash;
}

// Fails if ranks have different weights or, without ZeRO-1, different optimizer states.
// Files of the same name may differ between machines, and ranks that begin with a
// difference would keep it without any other sign.
static void agree_on_weights(const Model* model, const Run* run) {
    const size_t whole = model->padded * sizeof(float_acc);
    if (comm_size() == 1) return;
    comm_must_agree("the step to go on from", "%d", run->state.step);
    comm_must_agree(
        "the hash of the weights", "%016llx",
        (unsigned long long)hash_of_device(model->params, model->padded * sizeof(floatX), model->stream));
    if (model->sharded || !run->resume_from[0]) return;
    const float_acc* const arrays[] = {model->masters, model->exp_avg, model->exp_avg_sq};
    for (int i = 0; i < 3; i++)
        if (arrays[i])
            comm_must_agree("the hash of the optimizer's state", "%016llx",
                            (unsigned long long)hash_of_device(arrays[i], whole, model->stream));
}

// Loads the weights of a checkpoint, and the map of query heads that they were trained with. A checkpoint
// with more KV heads than the model is converted: a KV head becomes the mean of a group. Without a stored
// map, or after a conversion, query heads start in uniform groups.
static void load_model(Model* model, const Run* run, const char* directory) {
    const int theirs = checkpoint_read_config(directory).kv_heads, G = run->config.kv_heads;
    if (theirs > G)
        checkpoint_load_pooled(directory, &run->config, &model->layout.table, gpt_weights(model),
                               model->stream);
    else checkpoint_load_model(directory, &model->layout.table, gpt_weights(model), model->stream);
    gpt_keep_masters(model);
    if (theirs > G) printf("converted %d KV heads to %d, by the mean of each group\n", theirs, G);
    char path[PATH_MAX];
    path_format(path, "%s/heads.json", directory);
    if (!heads_are_key_driven(&run->config) || theirs > G || !path_exists(path)) return;
    gpt_load_heads(model, directory);
}

static void load_optimizer(Model* model, const char* directory) {
    const TensorTable* table = &model->layout.table;
    StateRange whole = {0, table->elements, 0}, *ranges = &whole;
    int count = 1;
    if (model->sharded) {
        ranges = (StateRange*)malloc_or_fail((size_t)model->bucket_count * sizeof(StateRange),
                                             "a checkpoint's ranges");
        count = gpt_state_ranges(model, ranges);
    }
    checkpoint_load_optimizer(directory, table, model->exp_avg, model->exp_avg_sq, ranges, count,
                              model->stream);
    if (model->sharded) free(ranges);
}

// Makes the run's directory ready. It refuses to change an existing run without --resume or --overwrite.
static void prepare_output(Run* run) {
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

// ----------------------------------------------------------------------------
// Memory, disk space and threads that the run needs, checked before it starts

// Bytes of main memory in addition to the model's four arenas: the process and its libraries as they are now,
// batches, and buffers for writing a checkpoint.
static size_t other_bytes(const Run* run, const Model* model) {
    const size_t rows = (size_t)model->B * model->T,
                 total = (size_t)run->sequences_per_rank * (size_t)run->config.sequence_length;
    size_t bytes = run->resident + matmul_scratch_bytes() + loader_bytes(run->train, run->options.batch);
    bytes += total * (2 * sizeof(int) + sizeof(float_acc)); // a step's tokens, targets and losses
    bytes += rows * sizeof(float_acc);                      // losses of a validation batch
    bytes += comm_bytes();
    if (run->val) bytes += rows * 2 * sizeof(int); // a validation batch
    if (run->init_from[0] && checkpoint_read_config(run->init_from).kv_heads > run->config.kv_heads)
        bytes += checkpoint_pooled_bytes(run->init_from, &run->config);
    if (run->options.output) { // the buffer for writing a checkpoint
        const size_t weights = model->layout.table.elements * sizeof(float_acc);
        bytes += weights < CHECKPOINT_CHUNK ? weights : CHECKPOINT_CHUNK;
    }
    return bytes;
}

// Bytes of one rank that must fit into the memory that holds the model. If that is main
// memory, it must hold everything else as well.
static size_t planned_bytes(const Run* run, const Model* model) {
    return model_bytes(model) + (DEVICE_HAS_OWN_MEMORY ? 0 : other_bytes(run, model));
}

static void print_plan(const Run* run, const Model* model) {
    const ModelConfig* config = &run->config;
    const Options* options = &run->options;
    printf("model    %d layers (%s), %d channels, %d heads of %d, %d kv heads, ffn %d, vocabulary %d, T %d, "
           "%s head\n",
           config->layers, config->pattern, config->channels, config->heads, config->head_dim,
           config->kv_heads, config->ffn, config->vocab_size, config->sequence_length,
           config->tied ? "tied" : "untied");
    if (known_tokens(config, run->tokenizer) < config->vocab_size)
        printf("         the tokenizer has %d tokens: the vocabulary's last %d are padding\n",
               known_tokens(config, run->tokenizer),
               config->vocab_size - known_tokens(config, run->tokenizer));
    printf("         %.2f M parameters, %.2f MFLOP a token\n",
           (double)table_parameter_count(&model->layout.table) / 1e6,
           flops_per_token(config, config->sequence_length) / 1e6);
    if (comm_size() > 1)
        printf("ranks    %d, %d of them on this host; optimizer state %s\n", comm_size(), comm_local_size(),
               model->sharded ? "sharded over them (--zero 1)" : "whole on each (--zero 0)");
    printf("build    device %s, attention %s, heads %s, kconv %d, %s, %d threads\n", DEVICE_NAME,
           attention_names[config->attention], gqa_names[config->gqa], config->kconv, PRECISION_NAME,
           omp_get_max_threads());
    const double peak = gpu_peak_flops(device_name(), PRECISION_NAME);
    if (peak > 0) printf("         %s, at most %.0f TFLOP/s\n", device_name(), peak / 1e12);
    else if (device_name()[0])
        printf("         %s, whose peak in %s is unknown: no MFU\n", device_name(), PRECISION_NAME);
    printf("data     %s: %llu tokens, %llu sequences", options->train_data,
           (unsigned long long)loader_tokens(run->train), (unsigned long long)loader_sequences(run->train));
    if (run->val) printf("; validation %llu tokens", (unsigned long long)loader_tokens(run->val));
    printf("\nsteps    %d of %ld tokens: %ld x (%d, %d), %.2f passes over the data\n", run->steps,
           options->total_batch, run->sequences_per_step / options->batch, options->batch,
           config->sequence_length,
           ((double)run->state.sequences_seen +
            (double)(run->steps - run->state.step) * (double)run->sequences_per_step) /
               (double)loader_sequences(run->train));
    printf("memory   recompute %s\n", recompute_names[model->recompute]);
    arena_print(&model->parameters);
    arena_print(&model->gradients);
    arena_print(&model->optimizer);
    arena_print(&model->activations);
    printf("  %-34s %10.1f MB%s\n", "program, libraries, data", (double)other_bytes(run, model) / 1e6,
           DEVICE_HAS_OWN_MEMORY ? " of main memory, not in the peak" : "");
    printf("  %-34s %10.1f MB\n", "planned peak", (double)planned_bytes(run, model) / 1e6);
    fflush(stdout);
}

// A guess of the GPU memory that CUDA's libraries and the kernels' code take
// at their first use, after the plan.
#define GPU_LIBRARY_BYTES ((size_t)512 << 20)

// The memory that this process can have: the device's, or main memory if the device has none of its own.
static MemoryLimit available_memory(void) {
    // OpenMP's threads start here at the latest, so that their stacks are in the memory that the process has.
    // Only the loader's thread is still to come.
#pragma omp parallel
    (void)omp_get_thread_num();
    MemoryLimit limit =
        limits_memory("/proc/self/cgroup", "/sys/fs/cgroup", comm_local_size(), limits_stacks(1));
    if (!DEVICE_HAS_OWN_MEMORY) return limit;
    const size_t unused = device_memory_free();
    limit.bytes = unused ? unused - (unused < GPU_LIBRARY_BYTES ? unused : GPU_LIBRARY_BYTES) : SIZE_MAX;
    limit.name = "memory of the device";
    return limit;
}

// For the modes without training: fails if the model does not fit. There is no micro-batch to make smaller.
static void check_model_fits(const Model* model) {
    const MemoryLimit limit = available_memory();
    const size_t bytes = model_bytes(model) + (DEVICE_HAS_OWN_MEMORY ? 0 : memory_resident());
    char wanted[32], available[32];
    if (bytes > limit.bytes)
        fail("the model takes %s and %s are free (%s)", limits_bytes_text(wanted, bytes),
             limits_bytes_text(available, limit.bytes), limit.name);
}

// Fails, before anything is allocated, if the plan does not fit. The message names the
// largest --batch that fits or, if none does, a higher --recompute level and the largest
// --batch with it: a smaller batch costs less time.
static void check_plan_fits(const Run* run, const Model* model) {
    const Options* options = &run->options;
    const size_t planned = planned_bytes(run, model);
    const MemoryLimit limit = available_memory();
    const size_t available = limit.bytes;
    if (planned <= available) return;
    char plan_text[32], free_text[32], text[32];
    limits_bytes_text(plan_text, planned);
    limits_bytes_text(free_text, available);
    for (int level = options->recompute; level < RECOMPUTE_LEVELS; level++) {
        const int same = level == (int)options->recompute;
        for (int B = options->batch - same; B >= 1; B--) {
            if (run->sequences_per_rank % B != 0) continue;
            Model smaller;
            gpt_plan(&smaller, &run->config, B, run->config.sequence_length, 1, (Recompute)level,
                     options->zero);
            size_t bytes = planned_bytes(run, &smaller);
            if (bytes <= available)
                fail("the plan takes %s and %s are free (%s); --batch %d%s%s takes %s and trains the same "
                     "(gradients accumulate)",
                     plan_text, free_text, limit.name, B, same ? "" : " --recompute ",
                     same ? "" : recompute_names[level], limits_bytes_text(text, bytes));
        }
    }
    fail("the plan takes %s and %s are free (%s), and neither a smaller --batch nor --recompute fits: "
         "choose fewer --layers or --channels, or a shorter --sequence-length",
         plan_text, free_text, limit.name);
}

// Fails before training if one checkpoint does not fit on its file system, or one of its files exceeds the
// limit of a file's size. Prints a line if not all checkpoints of the run fit.
static void check_disk(const Run* run, const Model* model) {
    const Options* options = &run->options;
    const size_t weights = table_parameter_count(&model->layout.table) * sizeof(float_acc),
                 state = 2 * model->layout.table.elements * sizeof(float_acc);
    const size_t slice = state / (size_t)comm_size(), largest = weights > slice ? weights : slice;
    if (!options->output || comm_rank() > 0) return;
    // A finished run that is resumed writes no checkpoint.
    if (run->resume_from[0] && run->state.step == run->steps && !run->state.unmeasured) return;
    if (largest > limits_file_bytes())
        fail("--output %s: a checkpoint has a file of %.3f MB, and files may have %.3f MB (ulimit -f)",
             options->output, (double)largest / 1e6, (double)limits_file_bytes() / 1e6);
    const size_t one = weights + state, unused = limits_disk_free(options->output);
    if (one > unused && !options->overwrite) // --overwrite makes room first
        fail("--output %s: a checkpoint takes %.3f MB, and %.3f MB are free on its file system",
             options->output, (double)one / 1e6, (double)unused / 1e6);
    const long every = options->checkpoint_every, left = run->steps - run->state.step;
    long count = every > 0 ? (left + every - 1) / every : 1;
    if (options->keep > 0 && count > options->keep) count = options->keep + 1L; // removal follows the write
    if ((double)count * (double)one > (double)unused)
        printf("--output %s: %ld checkpoints of %.3f MB, and %.3f MB are free on its file system; fewer by "
               "--checkpoint-every or --keep\n",
               options->output, count, (double)one / 1e6, (double)unused / 1e6);
}

// Fails if the run's threads cannot be started: the OpenMP library would end the process
// without cleaning up. All ranks start their threads before any rank ends its own, since a
// limit counts the ranks of a machine together.
static void check_threads(void) {
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
// The training loop

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// Computes the mean loss over the first --val-batches total batches of the validation data, or over all of it
// if there is less. Ranks take turns; the tokens are the same whatever the micro-batch and the number of
// ranks. Returns 0 if a signal interrupted it, else 1 and the loss.
static int validate(Model* model, const Run* run, double* loss) {
    const int T = run->config.sequence_length, B = run->options.batch;
    uint64_t count = (uint64_t)run->options.val_batches * (uint64_t)run->sequences_per_step;
    if (count > loader_sequences(run->val)) count = loader_sequences(run->val);
    int* tokens = (int*)malloc_or_fail((size_t)2 * B * T * sizeof(int), "a validation batch");
    double sum = 0;
    int stopped = 0;
    const uint64_t stride = (uint64_t)B * (uint64_t)comm_size();
    for (uint64_t turn = 0; turn < count; turn += stride) {
        const uint64_t first = turn + (uint64_t)B * (uint64_t)comm_rank();
        if ((stopped = stop_wanted() != 0)) break;
        if (first >= count) continue; // the last turn may have no sequence for this rank
        int rows = count - first < (uint64_t)B ? (int)(count - first) : B;
        loader_read(run->val, first, rows, tokens, tokens + (size_t)B * T);
        gpt_forward(model, tokens, rows, T, 0, NULL);
        sum += gpt_loss(model, tokens + (size_t)B * T, rows, T, 0, 0);
    }
    free(tokens);
    if (stopped) return 0;
    comm_sum(&sum, 1);
    *loss = sum / ((double)count * T);
    return 1;
}

// Seconds that the attention of all layers took in the last forward and backward pass. Call this after a
// synchronisation of the stream.
static double gpt_attention_seconds(const Model* model) {
    double sum = 0;
    for (int i = 0; i < model->config.layers * 2; i++)
        sum += seconds_between(model->marks[2 * i], model->marks[2 * i + 1]);
    return sum;
}

// Allocates pinned memory from which a step's batches are copied to the device,
// and to which its losses are copied.
static void allocate_staging(Run* run) {
    run->recorded_step = -1;
    const size_t places = (size_t)run->sequences_per_rank * (size_t)run->config.sequence_length;
    run->tokens = (int*)host_malloc_pinned(places * sizeof(int), "a step's tokens");
    run->targets = (int*)host_malloc_pinned(places * sizeof(int), "a step's targets");
    run->losses = (float_acc*)host_malloc_pinned(places * sizeof(float_acc), "a step's losses");
}

static void free_staging(Run* run) {
    host_free_pinned(run->tokens);
    host_free_pinned(run->targets);
    host_free_pinned(run->losses);
    graph_free(&run->graph);
}

// Copies this rank's part of the next total batch from the loader to pinned memory.
static void stage_batches(Run* run) {
    const size_t T = (size_t)run->config.sequence_length, batch = (size_t)run->options.batch * T;
    for (size_t place = 0; place < (size_t)run->sequences_per_rank * T; place += batch) {
        const int *tokens, *targets;
        loader_next(run->train, &tokens, &targets);
        memcpy(run->tokens + place, tokens, batch * sizeof(int));
        memcpy(run->targets + place, targets, batch * sizeof(int));
    }
}

// Queues the work of a step. The queued work depends on the step's number alone: not on the batches, which
// are read from pinned memory when the step runs, and not on anything that the device computes. So a step can
// be recorded as a graph in advance.
static void queue_step(Model* model, const Run* run, int step) {
    const Options* options = &run->options;
    const int T = run->config.sequence_length, B = options->batch;
    const float_acc dloss = (float_acc)(1 / (double)options->total_batch);
    gpt_zero_gradients(model);
    gpt_begin_step(model, step);
    for (long first = 0; first < run->sequences_per_rank; first += B) {
        const size_t place = (size_t)first * (size_t)T;
        const TrainingPass pass = {options->seed, step, first * comm_size() + (long)comm_rank() * B,
                                   options->pgqa_noise};
        model->reduces = first + B == run->sequences_per_rank;
        gpt_forward(model, run->tokens + place, B, T, 0, &pass);
        gpt_classify(model, run->losses + place, run->targets + place, B, T, 1, dloss);
        gpt_backward(model, B, T);
    }
    gpt_end_step(model, step, run->sequences_per_step);
    AdamW settings;
    settings.learning_rate = (float)learning_rate(&run->schedule, step);
    settings.beta1 = (float)options->beta1;
    settings.beta2 = (float)options->beta2;
    settings.eps = (float)options->eps;
    settings.weight_decay = (float)options->weight_decay;
    settings.clip = (float)options->clip;
    settings.step = step + 1;
    gpt_update(model, settings);
}

// Records a step as a graph while the device runs the step before. Recording costs the host as much as
// queueing, plus a comparison of each kernel's arguments with the last graph's. But the device is busy
// meanwhile, and when the recorded step is next, the device waits for one launch only.
static void record_step(Model* model, Run* run, int step) {
    range_begin("record");
    graph_record_begin(model->stream);
    queue_step(model, run, step);
    graph_record_end(&run->graph, model->stream);
    run->recorded_step = step;
    range_end();
}

// Runs one optimizer step over the next total batch, whose micro-batches go to the ranks in turn. Returns the
// mean loss and, through *norm, the gradient's norm. *attention becomes the seconds of attention, estimated
// as those of the last micro-batch times the number of micro-batches. The host queues the whole step on the
// stream and synchronises once, at the end. The first step of a run is never a graph: libraries and kernels
// are loaded at their first call, and loading cannot be recorded.
static double train_step(Model* model, Run* run, int step, double* norm, double* attention) {
    const int rows = run->options.batch * run->config.sequence_length;
    const long batches = run->sequences_per_rank / run->options.batch;
    range_begin("step");
    stage_batches(run);
    if (run->recorded_step == step) graph_launch(&run->graph, model->stream);
    else queue_step(model, run, step);
    if (run->options.cuda_graph && step + 1 < run->steps) record_step(model, run, step + 1);
    comm_synchronize(model->stream);
    // Returns the blocks that libraries freed to the system. Else gaps between
    // blocks add up to more than the plan.
    malloc_trim(0);
    gpt_check_heads(model);
    range_end();
    *norm = (double)*model->host_norm;
    *attention = gpt_attention_seconds(model) * (double)batches;
    double sum = 0;
    for (long batch = 0; batch < batches; batch++) sum += sum_of_losses(run->losses + batch * rows, rows);
    comm_sum(&sum, 1);
    return sum / (double)run->options.total_batch;
}

static void save_checkpoint(Model* model, Run* run, Metrics* metrics, int step) {
    double started = seconds_now();
    HeadAllocation heads = gpt_read_heads(model);
    run->state.step = step;
    metrics_sync(metrics);
    gpt_gather_masters(model);
    StateRange* ranges = (StateRange*)malloc_or_fail((size_t)model->bucket_count * sizeof(StateRange),
                                                     "a checkpoint's ranges");
    const int range_count = gpt_state_ranges(model, ranges);
    checkpoint_save(run->options.output, &run->config, &model->layout.table, &run->state,
                    heads_are_key_driven(&run->config) ? &heads : NULL, gpt_weights(model), model->exp_avg,
                    model->exp_avg_sq, ranges, range_count,
                    run->tokenizer_path[0] ? run->tokenizer_path : NULL, run->options.keep, model->stream);
    free(ranges);
    allocation_free(&heads);
    metrics_event(metrics, "checkpoint", step, seconds_now() - started);
}

static void describe_heads(MetricsOptions* to, const AllocationSettings* heads) {
    metrics_describe_text(to, "kd_source", statistic_source_names[heads->source]);
    metrics_describe_number(to, "kd_min_heads", heads->least);
    if (!heads->dynamic) return;
    metrics_describe_text(to, "dgqa_kind", dgqa_kind_names[heads->kind]);
    metrics_describe_number(to, "kd_window", heads->window);
    metrics_describe_number(to, "kd_beta", heads->beta);
}

static void start_metrics(Metrics* metrics, const Run* run) {
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
static void log_member(Metrics* metrics, int step, const char* key, cJSON* value) {
    char* text = cJSON_PrintUnformatted(value);
    if (!text) fail("out of memory: the line of %s in metrics.jsonl", key);
    metrics_member(metrics, step, key, text);
    cJSON_free(text);
    cJSON_Delete(value);
}

// Logs the allocation of query heads after `step` steps. For every layer: the statistic of the last step, the
// number of query heads of each KV head, how many times a query head changed its KV head from one step to the
// next, and how many KV heads no query head reads.
static void log_heads(Metrics* metrics, const Model* model, int step) {
    HeadAllocation heads = gpt_read_heads(model);
    cJSON* layers = cJSON_CreateArray();
    for (int l = 0; l < heads.L; l++) {
        const size_t first = (size_t)l * heads.G;
        cJSON* layer = cJSON_CreateObject();
        json_add_doubles(layer, "statistic", heads.statistic + first, heads.G);
        cJSON_AddItemToObject(layer, "allocation", cJSON_CreateIntArray(heads.heads + first, heads.G));
        json_add_whole(layer, "moved", heads.moved[l]);
        json_add_whole(layer, "empty", allocation_empty(&heads, l));
        cJSON_AddItemToArray(layers, layer);
    }
    log_member(metrics, step, "heads", layers);
    allocation_free(&heads);
}

// Logs statistics of the router's choices after `step` steps, layer by layer
// (runtime/selection.h). It runs the first sequences of the validation data once more. Returns 0,
// and logs nothing, if a signal interrupted it; else 1.
static int log_selection(Metrics* metrics, Model* model, const Run* run, int step) {
    enum { SEQUENCES = 4 };
    const ModelConfig* config = &model->config;
    const int T = config->sequence_length, H = config->heads, G = config->kv_heads, D = config->head_dim,
              S = config->moba_block, K = config->moba_topk, L = config->layers;
    const size_t values = (size_t)T * qkv_heads(config) * D, choices = moba_selected_count(1, T, H, K);
    int* tokens = (int*)malloc_or_fail((size_t)2 * T * sizeof(int), "a sequence");
    floatX* qkv = (floatX*)malloc_or_fail(values * sizeof(floatX), "queries and keys");
    int* selected = (int*)malloc_or_fail(choices * sizeof(int), "chosen blocks");
    SelectionStats* stats = (SelectionStats*)calloc_or_fail((size_t)L, sizeof(SelectionStats), "choices");
    HeadAllocation heads = gpt_read_heads(model);
    int stopped = 0;
    for (uint64_t s = 0; s < SEQUENCES && s < loader_sequences(run->val); s++) {
        if ((stopped = stop_wanted() != 0)) break;
        loader_read(run->val, s, 1, tokens, tokens + T);
        gpt_forward(model, tokens, 1, T, 0, NULL);
        for (int l = 0; l < L; l++) {
            if (!layer_chooses_blocks(config, l)) continue;
            const LayerActivations* layer = &model->acts.layers[l];
            layer_qkv_again(model, l, 1, T);
            copy_to_host(qkv, layer->qkv, values * sizeof(floatX), model->stream);
            copy_to_host(selected, layer->selected, choices * sizeof(int), model->stream);
            stream_synchronize(model->stream);
            selection_add(&stats[l], qkv, selected, heads.map + (size_t)l * H, T, H, G, D, S, K);
        }
    }
    cJSON* layers = cJSON_CreateArray();
    for (int l = 0; l < L && !stopped; l++) {
        if (!layer_chooses_blocks(config, l)) continue;
        cJSON* json = selection_json(&stats[l]);
        json_add_whole(json, "layer", l);
        cJSON_AddItemToArray(layers, json);
    }
    if (stopped) cJSON_Delete(layers);
    else log_member(metrics, step, "moba", layers);
    free(tokens);
    free(qkv);
    free(selected);
    free(stats);
    allocation_free(&heads);
    return !stopped;
}

// Whether a hint may name a checkpoint: a run of no steps, or without --output, has none.
static int has_checkpoint(const Options* options) {
    char latest[PATH_MAX];
    return options->output && checkpoint_latest(options->output, latest);
}

// Prints a word for use in a shell, in quotes if it needs them.
static void print_word(const char* word) {
    const int plain = !word[strcspn(word, " \t\n\"'\\$`&|;<>()[]{}*?!#~=%")];
    if (plain) printf("%s", word);
    for (const char* c = plain ? "" : word; *c; c++) {
        if (c == word) putchar('\'');
        if (*c == '\'') printf("'\\''");
        else putchar(*c);
        if (!c[1]) putchar('\'');
    }
}

static void hint_generation(const Run* run, const char* program) {
    printf("---> HINT: ");
    print_word(program);
    printf(" --generate --init-from ");
    print_word(run->options.output);
    printf(run->tokenizer ? " --prompt 'some text' continues a text\n" : " samples from the model\n");
}

// Whether `step` is one of every `every` steps, or the last one; never if `every` is 0.
static int is_due(long every, int step, int last) { return every > 0 && (step % every == 0 || last); }

enum { RANK_0_IS_DONE = 1000 }; // larger than the number of any signal

// The measurements that rank 0 makes alone. Returns 0 if a signal interrupted them.
static int measure_alone(Model* model, const Run* run, Metrics* metrics, int step, int validating,
                         int sampling) {
    const Options* options = &run->options;
    if (validating && heads_are_key_driven(&run->config)) log_heads(metrics, model, step);
    // Without --output there is no metrics.jsonl to log to, so the forward passes
    // of log_selection() are not needed.
    if (validating && run->val && options->output && model_chooses_blocks(&run->config) &&
        run->config.moba_topk > 1 && !log_selection(metrics, model, run, step))
        return 0;
    if (!sampling) return 1;
    metrics_message(metrics, "step %d  sample:", step);
    return gpt_sample(model, run->tokenizer, options, "sample", (uint64_t)step);
}

// Runs the validation with its logs, and a sample, if they are due after `step` steps.
// Returns 0 if a signal came before their end; the checkpoint then records that
// (`unmeasured`), and the resumed run does all of them.
static int measure(Model* model, Run* run, Metrics* metrics, int step, int last) {
    const int validating = is_due(run->options.val_every, step, last),
              sampling = step > 0 && is_due(run->options.sample_every, step, last);
    if (!validating && !sampling) return 1;
    if (stop_wanted()) return 0;
    if (validating && run->val) {
        const double begun = seconds_now();
        double loss;
        if (!validate(model, run, &loss)) return 0;
        run->state.val_loss = loss;
        metrics_validation(metrics, step, loss, seconds_now() - begun);
    }
    int stopped = 0;
    if (comm_rank() == 0) {
        stopped = !measure_alone(model, run, metrics, step, validating, sampling);
        if (!stopped) comm_max(RANK_0_IS_DONE);
        return !stopped;
    }
    // Every stop_wanted() of rank 0 needs one of each other rank, until rank 0 sends RANK_0_IS_DONE.
    while (!(stopped = stop_wanted())) {}
    return stopped == RANK_0_IS_DONE;
}

// Fills in the settings that a checkpoint's state.json stores. The training loop updates the run's progress.
static void describe_state(Run* run) {
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

// Trains from the run's current step to its end, or until a signal or --max-seconds stops it.
static void train(Model* model, Run* run) {
    const Options* options = &run->options;
    static Metrics metrics;
    signals_take();
    start_metrics(&metrics, run);
    if (run->changes[0]) metrics_changes(&metrics, run->state.step, run->changes);
    allocate_staging(run);
    loader_start(run->train, run->state.sequences_seen + (uint64_t)(comm_rank() * options->batch),
                 (uint64_t)comm_size() * (uint64_t)options->batch, options->batch);
    const double started = seconds_now();
    const int first_step = run->state.step;
    // A resumed run does not repeat the measurements and the checkpoint of
    // its first step, unless `unmeasured`.
    int fresh = run->resume_from[0] == 0 || run->state.unmeasured;

    for (int step = first_step;; step++) {
        const int last = step == run->steps;
        // When one rank is out of time, all stop.
        const int out_of_time =
            comm_max(options->max_seconds > 0 && seconds_now() - started >= options->max_seconds);
        if (fresh) run->state.unmeasured = !measure(model, run, &metrics, step, last);
        int stop_signal = stop_wanted();
        if (fresh && options->output && step > 0 &&
            (is_due(options->checkpoint_every, step, last) || last || stop_signal || out_of_time)) {
            save_checkpoint(model, run, &metrics, step);
            stop_signal = stop_wanted(); // a signal during the save stops the run before another step
        }
        const int finished = last && !run->state.unmeasured;
        if (finished || stop_signal || out_of_time) {
            metrics_finish(&metrics);
            if (finished) break;
            printf("stopped after step %d of %d%s\n", step, run->steps,
                   stop_signal ? "" : ": --max-seconds is over");
            if (has_checkpoint(options))
                printf("---> HINT: the same command with --resume goes on from here\n");
            if (stop_signal) {
                free_staging(run); // frees the graph: NCCL's shutdown would wait for ever for it
                exit(128 + stop_signal);
            }
            break;
        }
        fresh = 1;

        double begun = seconds_now(), norm = 0, attention = 0, rate = learning_rate(&run->schedule, step);
        double loss = train_step(model, run, step, &norm, &attention);
        run->state.sequences_seen += (uint64_t)run->sequences_per_step;
        run->state.train_loss = loss;
        if (!isfinite(loss) || !isfinite(norm)) {
            metrics_finish(&metrics);
            // Without fabs(), a NaN may be printed as "-nan".
            fail("step %d: the loss is %g and the gradient's norm %g: training has diverged; lower "
                 "--learning-rate %g or lengthen --warmup%s",
                 step + 1, isnan(loss) ? fabs(loss) : loss, fabs(norm), options->learning_rate,
                 has_checkpoint(options) ? ", and go on from the last checkpoint by --resume" : "");
        }
        metrics_step(&metrics, step + 1, loss, norm, rate, seconds_now() - begun, attention);
    }
    signals_release();
    free_staging(run);
}

// A waiting OpenMP thread spins for some milliseconds; on a core that another program shares, this slows both
// down. The library reads GOMP_SPINCOUNT before main(), so the program sets it and starts itself once more.
static void yield_while_waiting(char** argv) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv("/proc/self/exe", argv); // if this fails, the program goes on with the library's default
}

// Opens /dev/null in the place of a closed stdin, stdout or stderr. Else the first file that the program
// opens would get its number, and printed text would go into that file.
static void open_standard_files(void) {
    int file;
    do file = open("/dev/null", O_RDWR);
    while (file >= 0 && file <= STDERR_FILENO);
    if (file > STDERR_FILENO) close(file);
}

int main(int argc, char** argv) {
    program_name = "train_gpt";
    open_standard_files();
    yield_while_waiting(argv);
    signals_start();
    comm_start();
    // Otherwise the C library keeps a heap for every thread, and freed
    // memory, of a size that no plan can know.
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    // Beyond the limit of a file's size, write() then returns an error, and the
    // program cleans up and reports it.
    signal(SIGXFSZ, SIG_IGN);
    static Run run;
    run.options = options_parse(argc, argv);
    if (run.options.moba_workspace) moba_set_workspace_bound(run.options.moba_workspace);
    const Options* options = &run.options;
    check_graph(options);
    check_threads();
    find_checkpoints(&run);
    check_mode(&run);
    choose_model(&run);
    const int T = run.config.sequence_length;
    static Model model;

    matmul_start();
    if (options->generate || options->write_logits || options->eval_retrieval) {
        Retrieval* task = options->eval_retrieval ? retrieval_open(options->eval_retrieval) : NULL;
        gpt_plan(&model, &run.config, task ? options->batch : 1, task ? task->longest : T, 0, RECOMPUTE_NONE,
                 0);
        check_model_fits(&model);
        gpt_allocate(&model);
        load_model(&model, &run, run.init_from);
        if (options->generate) (void)gpt_sample(&model, run.tokenizer, options, "generate", 0);
        else if (options->write_logits) write_logits(&model, options);
        else eval_retrieval(&model, task, options, run.init_from, run.tokenizer);
        if (task) retrieval_close(task);
        gpt_free(&model);
        tokenizer_free(run.tokenizer);
        return 0;
    }

    open_data(&run);
    agree_on_run(&run, argc, argv);
    const TrainingState before = run.state;
    describe_state(&run);
    if (run.resume_from[0]) check_resume(&run, &before);
    run.resident = memory_resident();
    gpt_plan(&model, &run.config, options->batch, T, 1, options->recompute, options->zero);
    print_plan(&run, &model);
    check_plan_fits(&run, &model);
    check_disk(&run, &model);
    if (options->dry_run) return 0;
    comm_barrier(); // all ranks of a host have compared the free memory before one of them allocates
    gpt_allocate(&model);
    model.heads.settings = options->heads_by_keys;
    model.heads.settings.seed = options->seed;
    model.warned = comm_rank() > 0; // rank 0 warns for all
    if (run.resume_from[0]) {
        load_model(&model, &run, run.resume_from);
        load_optimizer(&model, run.resume_from);
        printf("resuming %s: step %d of %d\n", run.resume_from, run.state.step, run.steps);
    } else {
        if (options->resume)
            printf("--resume: no checkpoint in %s yet, starting at step 0\n", options->output);
        if (run.init_from[0]) load_model(&model, &run, run.init_from);
        else gpt_initialize(&model, options->seed);
    }
    agree_on_weights(&model, &run);
    comm_barrier(); // all ranks have read their checkpoint before --overwrite deletes it
    if (comm_rank() == 0) prepare_output(&run);
    comm_barrier();

    if (!options->output)
        printf("nothing of this run is kept: --output DIR writes checkpoints and metrics\n");
    train(&model, &run);

    printf("peak memory %.1f MB\n", (double)memory_peak() / 1e6);
    if (has_checkpoint(options)) hint_generation(&run, argv[0]);
    loader_close(run.train);
    loader_close(run.val);
    tokenizer_free(run.tokenizer);
    gpt_free(&model);
    return 0;
}

#endif
