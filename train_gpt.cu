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
#include "kernels/swiglu.cuh"
#include "kernels/classifier.cuh"
#include "kernels/adamw.cuh"
#else
#error "define DEVICE_CPU, DEVICE_CUDA or DEVICE_SIMT (make DEVICE=...)"
#endif
#include "runtime/attention.h" // defines attention_module: the kinds of gqa.cuh, moba.cuh, kernels/moba_plain.cuh
#include "runtime/comm.h"      // defines comm_start, comm_rank, comm_reduce_scatter, comm_all_gather
#include "runtime/allocation.h"  // defines HeadAllocation, allocation_start
#include "runtime/memory.h"      // defines Arena
#include "runtime/limits.h"      // defines limits_memory, limits_try_threads, limits_disk_free
#include "runtime/schedule.h"    // defines learning_rate
#include "runtime/options.h"     // defines Options, options_parse
#include "runtime/weights.h"     // defines Weights, weights_upload
#include "runtime/run.h"         // defines Run, run_choose_model, run_open_data
#include "runtime/plan.h"        // defines ModelPlan, plan_print
#include "runtime/generate.h"    // defines LanguageModel, generate_sample
#include "runtime/checkpoint.h"  // defines checkpoint_save, checkpoint_load_model
#include "runtime/metrics.h"     // defines Metrics
#include "runtime/selection.h"   // defines SelectionStats, selection_add
#include "tokenizer/tokenizer.h" // defines tokenizer_load, tokenizer_encode, tokenizer_decode
#include "dataloader.h"          // defines DataLoader, loader_next

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

// The plan of the model's memory, for runtime/plan.h.
static inline ModelPlan gpt_memory(const Model* model) {
    const ModelPlan plan = {&model->layout.table, &model->parameters, &model->gradients, &model->optimizer,
                            &model->activations,  model->B,           model->T,          model->sharded,
                            model->recompute};
    return plan;
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

// The model as runtime/generate.h uses it
static void generate_next_logits(void* context, float* logits, const int* tokens, int T, int start,
                                 floatX* scratch) {
    gpt_next_logits((Model*)context, logits, tokens, T, start, scratch);
}

static void generate_forward(void* context, const int* tokens, int B, int T) {
    gpt_forward((Model*)context, tokens, B, T, 0, NULL);
}

static void generate_read_logits(void* context, floatX* logits, size_t row) {
    gpt_read_logits((Model*)context, logits, row);
}

static LanguageModel gpt_language_model(Model* model) {
    const LanguageModel language = {model,
                                    &model->config,
                                    model->B,
                                    model->T,
                                    generate_next_logits,
                                    generate_forward,
                                    generate_read_logits};
    return language;
}

// ----------------------------------------------------------------------------
// The parts of a run, and the checks that they fit together

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

// ----------------------------------------------------------------------------
// Memory that the run needs, checked before it starts

// Fails, before anything is allocated, if the plan does not fit. The message names the
// largest --batch that fits or, if none does, a higher --recompute level and the largest
// --batch with it: a smaller batch costs less time.
static void check_plan_fits(const Run* run, const ModelPlan* plan) {
    const Options* options = &run->options;
    const size_t planned = plan_bytes(run, plan);
    const MemoryLimit limit = plan_available_memory();
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
            const ModelPlan smaller_plan = gpt_memory(&smaller);
            const size_t bytes = plan_bytes(run, &smaller_plan);
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
    const LanguageModel language = gpt_language_model(model);
    return generate_sample(&language, run->tokenizer, options, "sample", (uint64_t)step);
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

// Trains from the run's current step to its end, or until a signal or --max-seconds stops it.
static void train(Model* model, Run* run) {
    const Options* options = &run->options;
    static Metrics metrics;
    signals_take();
    run_start_metrics(&metrics, run);
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
            if (run_has_checkpoint(options))
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
                 run_has_checkpoint(options) ? ", and go on from the last checkpoint by --resume" : "");
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

// --generate, --write-logits and --eval-retrieval: loads the model of --init-from, runs it, and is done.
static void use_model(Run* run) {
    const Options* options = &run->options;
    Retrieval* task = options->eval_retrieval ? retrieval_open(options->eval_retrieval) : NULL;
    static Model model;
    gpt_plan(&model, &run->config, task ? options->batch : 1,
             task ? task->longest : run->config.sequence_length, 0, RECOMPUTE_NONE, 0);
    const ModelPlan plan = gpt_memory(&model);
    plan_check_model(&plan);
    gpt_allocate(&model);
    load_model(&model, run, run->init_from);
    const LanguageModel language = gpt_language_model(&model);
    if (options->generate) (void)generate_sample(&language, run->tokenizer, options, "generate", 0);
    else if (options->write_logits) generate_logits(&language, options);
    else generate_answers(&language, task, options, run->init_from, run->tokenizer);
    if (task) retrieval_close(task);
    gpt_free(&model);
    tokenizer_free(run->tokenizer);
}

// Plans the model's memory and shows the plan. Fails if the memory or the disk is too small for the run.
static void plan_model(Model* model, Run* run) {
    const Options* options = &run->options;
    run->resident = memory_resident();
    gpt_plan(model, &run->config, options->batch, run->config.sequence_length, 1, options->recompute,
             options->zero);
    const ModelPlan plan = gpt_memory(model);
    plan_print(run, &plan);
    check_plan_fits(run, &plan);
    plan_check_disk(run, &plan);
}

// Allocates the model, and fills it from the checkpoint to resume, from the weights of --init-from, or with fresh weights.
static void start_model(Model* model, Run* run) {
    const Options* options = &run->options;
    comm_barrier(); // all ranks of a host have compared the free memory before one of them allocates
    gpt_allocate(model);
    model->heads.settings = options->heads_by_keys;
    model->heads.settings.seed = options->seed;
    model->warned = comm_rank() > 0; // rank 0 warns for all
    if (run->resume_from[0]) {
        load_model(model, run, run->resume_from);
        load_optimizer(model, run->resume_from);
        printf("resuming %s: step %d of %d\n", run->resume_from, run->state.step, run->steps);
    } else {
        if (options->resume)
            printf("--resume: no checkpoint in %s yet, starting at step 0\n", options->output);
        if (run->init_from[0]) load_model(model, run, run->init_from);
        else gpt_initialize(model, options->seed);
    }
    agree_on_weights(model, run);
    comm_barrier(); // all ranks have read their checkpoint before --overwrite deletes it
}

// Settings of the process, made before anything else.
static void prepare_process(char** argv) {
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
}

int main(int argc, char** argv) {
    static Run run;
    static Model model;
    prepare_process(argv);
    run.options = options_parse(argc, argv);
    const Options* options = &run.options;
    if (options->moba_workspace) moba_set_workspace_bound(options->moba_workspace);
    run_check_graph(options);
    run_check_threads();
    run_find_checkpoints(&run);
    run_check_mode(&run);
    run_choose_model(&run);
    matmul_start();
    if (options->generate || options->write_logits || options->eval_retrieval) {
        use_model(&run);
        return 0;
    }

    run_open_data(&run);
    run_agree(&run, argc, argv);
    const TrainingState before = run.state;
    run_describe_state(&run);
    if (run.resume_from[0]) run_check_resume(&run, &before);
    plan_model(&model, &run);
    if (options->dry_run) return 0;
    start_model(&model, &run);
    if (comm_rank() == 0) run_prepare_output(&run);
    comm_barrier();

    if (!options->output)
        printf("nothing of this run is kept: --output DIR writes checkpoints and metrics\n");
    train(&model, &run);

    printf("peak memory %.1f MB\n", (double)memory_peak() / 1e6);
    if (run_has_checkpoint(options)) run_hint_generation(&run, argv[0]);
    loader_close(run.train);
    loader_close(run.val);
    tokenizer_free(run.tokenizer);
    gpt_free(&model);
    return 0;
}

#endif
