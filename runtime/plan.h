/*
The memory and the disk space that a run needs, shown and checked before it starts.

    ModelPlan plan = {&table, &parameters, &gradients, &optimizer, &activations, B, T, sharded, recompute};
    plan_print(&run, &plan);             // model, data, steps and memory
    if (plan_bytes(&run, &plan) > plan_available_memory().bytes) ...
    plan_check_disk(&run, &plan);        // fails if a checkpoint has no room

The arenas have been planned, not allocated (runtime/memory.h). docs/memory.md lists their arrays. Include
dev/cpu/matmul.h or kernels/matmul.cuh before this header: it calls matmul_scratch_bytes().
*/
#ifndef RUNTIME_PLAN_H
#define RUNTIME_PLAN_H

#include "runtime/memory.h" // defines Arena
#include "runtime/run.h"    // defines Run

typedef struct {
    const TensorTable* table; // of the weights
    const Arena *parameters, *gradients, *optimizer, *activations;
    int B, T;    // of a micro-batch
    int sharded; // 1: the optimizer state is sharded over the ranks (ZeRO-1)
    Recompute recompute;
} ModelPlan;

// Returns the total bytes of the four arenas: parameters, gradients, optimizer state and activations.
static inline size_t plan_model_bytes(const ModelPlan* plan) {
    return plan->parameters->bytes + plan->gradients->bytes + plan->optimizer->bytes +
           plan->activations->bytes;
}

// Bytes of main memory in addition to the model's four arenas: the process and its libraries as they are now,
// batches, and buffers for writing a checkpoint.
static inline size_t plan_other_bytes(const Run* run, const ModelPlan* plan) {
    const size_t rows = (size_t)plan->B * plan->T,
                 total = (size_t)run->sequences_per_rank * (size_t)run->config.sequence_length;
    size_t bytes = run->resident + matmul_scratch_bytes() + loader_bytes(run->train, run->options.batch);
    bytes += total * (2 * sizeof(int) + sizeof(float_acc)); // a step's tokens, targets and losses
    bytes += rows * sizeof(float_acc);                      // losses of a validation batch
    bytes += comm_bytes();
    if (run->val) bytes += rows * 2 * sizeof(int); // a validation batch
    if (run->init_from[0] && checkpoint_read_config(run->init_from).kv_heads > run->config.kv_heads)
        bytes += checkpoint_pooled_bytes(run->init_from, &run->config);
    if (run->options.output) { // the buffer for writing a checkpoint
        const size_t weights = plan->table->elements * sizeof(float_acc);
        bytes += weights < CHECKPOINT_CHUNK ? weights : CHECKPOINT_CHUNK;
    }
    return bytes;
}

// Bytes of one rank that must fit into the memory that holds the model. If that is main
// memory, it must hold everything else as well.
static inline size_t plan_bytes(const Run* run, const ModelPlan* plan) {
    return plan_model_bytes(plan) + (DEVICE_HAS_OWN_MEMORY ? 0 : plan_other_bytes(run, plan));
}

static inline void plan_print(const Run* run, const ModelPlan* plan) {
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
           (double)table_parameter_count(plan->table) / 1e6,
           flops_per_token(config, config->sequence_length) / 1e6);
    if (comm_size() > 1)
        printf("ranks    %d, %d of them on this host; optimizer state %s\n", comm_size(), comm_local_size(),
               plan->sharded ? "sharded over them (--zero 1)" : "whole on each (--zero 0)");
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
    printf("memory   recompute %s\n", recompute_names[plan->recompute]);
    arena_print(plan->parameters);
    arena_print(plan->gradients);
    arena_print(plan->optimizer);
    arena_print(plan->activations);
    printf("  %-34s %10.1f MB%s\n", "program, libraries, data", (double)plan_other_bytes(run, plan) / 1e6,
           DEVICE_HAS_OWN_MEMORY ? " of main memory, not in the peak" : "");
    printf("  %-34s %10.1f MB\n", "planned peak", (double)plan_bytes(run, plan) / 1e6);
    fflush(stdout);
}

// A guess of the GPU memory that CUDA's libraries and the kernels' code take
// at their first use, after the plan.
#define GPU_LIBRARY_BYTES ((size_t)512 << 20)

// The memory that this process can have: the device's, or main memory if the device has none of its own.
static inline MemoryLimit plan_available_memory(void) {
    // This starts all OpenMP threads before the measurement, so the process's memory already includes their
    // stacks. Only the loader's thread starts later.
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
static inline void plan_check_model(const ModelPlan* plan) {
    const MemoryLimit limit = plan_available_memory();
    const size_t bytes = plan_model_bytes(plan) + (DEVICE_HAS_OWN_MEMORY ? 0 : memory_resident());
    char wanted[32], available[32];
    if (bytes > limit.bytes)
        fail("the model takes %s and %s are free (%s)", limits_bytes_text(wanted, bytes),
             limits_bytes_text(available, limit.bytes), limit.name);
}

// Fails before training if the file system has no room for one checkpoint, or if one of its files exceeds the
// file size limit. With --overwrite, missing room is no error: the run deletes the old checkpoints before it
// writes. Prints a line if not all checkpoints of the run fit.
static inline void plan_check_disk(const Run* run, const ModelPlan* plan) {
    const Options* options = &run->options;
    const size_t weights = table_parameter_count(plan->table) * sizeof(float_acc),
                 state = 2 * plan->table->elements * sizeof(float_acc);
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

#endif
