/*
Calculates how training scales from one GPU to many, from the step time of one GPU and the links between GPUs.

    build/scaling                                     GPT-2's size (d12) on 8 to 1024 H100s
    build/scaling --model d24 --batch 16 --step-ms 212 --update-ms 4       measured times of build/bench/step
    build/scaling --network 100 --gpus-per-node 4     nodes of 4 GPUs whose cards together have 100 GB/s
    build/scaling --report docs/results/scaling.md    writes the tables on record, with published figures

The model of a step. Every GPU computes its micro-batches. In the last one, it sends the gradients of a bucket
(a layer, the embedding, an untied head) as soon as the backward pass has computed them, one bucket after the
other, while the backward pass continues. After the backward pass the GPU waits for the remaining transfers,
and then updates. With ZeRO-1 (Rajbhandari et al., arXiv 1910.02054) every GPU updates its own part of a
bucket; while all GPUs gather this bucket, it updates its part of the next one.

Not modelled: GPUs and nodes that are slower than others, jitter of the host, the network's switches and other
users, the three numbers a step that hosts exchange by MPI (the loss, and whether to stop), validation,
checkpoints, and the lower efficiency of a GPU with a smaller micro-batch. Published runs lose more with every
doubling of their nodes than the calculation does. This additional loss is fitted, and applied in the columns
named "expected".
*/
#include <argp.h>
#include "runtime/gpus.h"
#include "runtime/model.h"

// The model of a collective. A ring moves S bytes among N GPUs in N-1 steps of S/N:
//
//     seconds = base + (N - nodes) nvlink_latency + (nodes - 1) network_latency + (N-1)/N S/bandwidth
//
// for a reduce-scatter or an all-gather, and twice that for an all-reduce. A node runs one ring for each
// network card. So within a node the bandwidth is NVLink's, and across nodes the smaller of NVLink's and that
// of all cards of a node together. An all-reduce may use a double tree instead, with log2(nodes) steps across
// nodes and 0.82 of the bandwidth. moba.c has one small all-reduce a step, for the gradient's norm;
// everything large is a reduce-scatter or an all-gather, for which NCCL has no trees. NCCL chooses its
// algorithms by the same formula and constants: github.com/NVIDIA/nccl, src/graph/tuning.cc. A running
// collective uses some processors of the GPU, so computation beside it is slower.

// ----------------------------------------------------------------------------
// The machines

typedef struct {
    const char* name;
    int gpus_per_node;
    double nvlink;  // GB/s of rings through a GPU within its node
    double network; // GB/s of all network cards of a node together, in one direction
    double memory;  // GB/s of a GPU's memory
} Cluster;

// NCCL's constants: seconds to start a collective, seconds of a step within a node and between nodes, and the
// usable part of the bandwidth with this protocol. Rings choose between two protocols, Simple and LL128;
// trees use LL128.
typedef struct {
    double base, nvlink, network, bandwidth;
} Protocol;

static const Protocol ring_protocols[2] = {{8.4e-6, 3.4e-6, 9.6e-6, 1}, {10e-6, 1.9e-6, 4e-6, 0.92}};
static const Protocol tree_protocol = {4.4e-6, 1.2e-6, 8.5e-6, 0.9 * 0.915};

// The part of a GPU's processors that a running collective uses. On 8 A100, which have 108 processors each,
// NCCL uses 24 channels, and each channel one processor (log in github.com/NVIDIA/nccl-tests/issues/100).
static const double contention = 24.0 / 108;

// NVLink: NCCL's maintainers state 370 GB/s for rings on H100 (nccl-tests issue 212); NCCL expects at most
// 235 GB/s of A100 (tuning.cc); V100 has six links of 25 GB/s, of which the protocol again takes a fifth: 120
// GB/s. Network: 46 to 48 GB/s for each card of 400 Gb/s (nccl-tests issue 290), and the same 94 % for other
// cards. Memory: data sheets.
static const Cluster h100 = {"H100", 8, 370, 8 * 47, 3350};
static const Cluster a100 = {"A100", 8, 235, 0.94 * 200, 1555};
static const Cluster v100 = {"V100", 8, 120, 0.94 * 50, 900};

static int nodes_of(const Cluster* cluster, int gpus) {
    return (gpus + cluster->gpus_per_node - 1) / cluster->gpus_per_node;
}

// Bytes a second of the rings among all GPUs.
static double ring_bandwidth(const Cluster* cluster, int gpus) {
    const double narrowest = cluster->network < cluster->nvlink ? cluster->network : cluster->nvlink;
    return 1e9 * (nodes_of(cluster, gpus) > 1 ? narrowest : cluster->nvlink);
}

// Seconds of a reduce-scatter or an all-gather of `bytes` bytes in all.
static double ring_seconds(const Cluster* cluster, int gpus, double bytes) {
    if (gpus == 1) return 0;
    const int nodes = nodes_of(cluster, gpus);
    double least = INFINITY;
    for (int p = 0; p < 2; p++) {
        const Protocol with = ring_protocols[p];
        const double seconds = with.base + (gpus - nodes) * with.nvlink + (nodes - 1) * with.network +
                               bytes * (gpus - 1) / gpus / (with.bandwidth * ring_bandwidth(cluster, gpus));
        if (seconds < least) least = seconds;
    }
    return least;
}

// Seconds of an all-reduce by a double tree.
static double tree_seconds(const Cluster* cluster, int gpus, double bytes) {
    if (gpus == 1) return 0;
    const int nodes = nodes_of(cluster, gpus);
    const Protocol with = tree_protocol;
    return with.base + 2 * ((double)gpus / nodes - 1) * with.nvlink + 2 * log2(nodes) * with.network +
           2 * bytes * (gpus - 1) / gpus / (with.bandwidth * ring_bandwidth(cluster, gpus));
}

// Seconds of an all-reduce by the faster of ring and tree.
static double all_reduce_seconds(const Cluster* cluster, int gpus, double bytes) {
    const double ring = 2 * ring_seconds(cluster, gpus, bytes), tree = tree_seconds(cluster, gpus, bytes);
    return ring < tree ? ring : tree;
}

// ----------------------------------------------------------------------------
// The work of one GPU, bucket by bucket in the order of forward

enum { MOST_BUCKETS = 1 + 1024 + 1 };

typedef struct {
    int buckets;
    double elements[MOST_BUCKETS]; // parameters
    double forward[MOST_BUCKETS];  // seconds of a micro-batch
    double backward[MOST_BUCKETS];
    double update; // seconds of the optimizer over all parameters
    int micro_batches;
    int gradient_bytes, parameter_bytes; // of one element on the wire
} Work;

// How the GPUs hold parameters and optimizer state, and which collectives move the gradients.
typedef enum {
    ZERO_0,     // every GPU holds everything; reduce-scatter and all-gather of gradients
    ZERO_1,     // optimizer sharded: reduce-scatter of gradients, all-gather of updated parameters
    FULL_SHARD, // parameters sharded too, gathered before forward and backward: only in published runs
} Sharding;

// The buckets of a model: the embedding, `layers` equal layers, and a head. A tied head has no bucket of its
// own: its gradient is part of the embedding's. seconds: forward and backward of a micro-batch. head_share:
// the head's part of the operations.
static Work work_of_model(int layers, double layer_elements, double embedding_elements, int tied,
                          double head_share, double seconds) {
    Work work;
    memset(&work, 0, sizeof(work));
    work.buckets = layers + 2;
    work.elements[0] = embedding_elements;
    work.elements[layers + 1] = tied ? 0 : embedding_elements;
    for (int b = 1; b <= layers + 1; b++) {
        const double share = b <= layers ? (1 - head_share) / layers : head_share;
        if (b <= layers) work.elements[b] = layer_elements;
        work.forward[b] = seconds * share / 3; // backward has two products for each one in forward
        work.backward[b] = seconds * share * 2 / 3;
    }
    work.micro_batches = 1;
    work.gradient_bytes = 4;
    work.parameter_bytes = 2;
    return work;
}

static double all_elements(const Work* work) {
    double sum = 0;
    for (int b = 0; b < work->buckets; b++) sum += work->elements[b];
    return sum;
}

// The time when `seconds` of computing end that begin now, while a collective runs until `busy`.
static double compute_until(double now, double seconds, double busy) {
    const double slow = 1 - contention;
    if (now >= busy) return now + seconds;
    if (seconds <= (busy - now) * slow) return now + seconds / slow;
    return busy + seconds - (busy - now) * slow;
}

// The two clocks of a GPU: its computing, and the one queue of its collectives.
typedef struct {
    double compute, link;
} Clocks;

static double send(Clocks* clocks, double seconds) {
    const double begins = clocks->compute > clocks->link ? clocks->compute : clocks->link;
    return clocks->link = begins + seconds;
}

// Computing and collectives wait for each other.
static void meet(Clocks* clocks) {
    if (clocks->compute < clocks->link) clocks->compute = clocks->link;
    clocks->link = clocks->compute;
}

static double gradient_seconds(const Work* work, const Cluster* cluster, int gpus, Sharding sharding, int b) {
    const double bytes = work->elements[b] * work->gradient_bytes;
    if (bytes == 0) return 0;
    return (sharding == ZERO_0 ? 2 : 1) * ring_seconds(cluster, gpus, bytes);
}

// Gathers the parameters of a bucket; returns the time of their arrival.
static double gather(Clocks* clocks, const Work* work, const Cluster* cluster, int gpus, int b) {
    return send(clocks, ring_seconds(cluster, gpus, work->elements[b] * work->parameter_bytes));
}

// A micro-batch with sharded parameters: the GPUs gather the parameters of a bucket while the bucket before
// it computes.
static void full_shard_micro_batch(Clocks* clocks, const Work* work, const Cluster* cluster, int gpus) {
    const int last = work->buckets - 1;
    double ready = gather(clocks, work, cluster, gpus, 0);
    for (int b = 0; b <= last; b++) {
        if (clocks->compute < ready) clocks->compute = ready;
        if (b < last) ready = gather(clocks, work, cluster, gpus, b + 1);
        clocks->compute = compute_until(clocks->compute, work->forward[b], clocks->link);
    }
    ready = gather(clocks, work, cluster, gpus, last);
    for (int b = last; b >= 0; b--) {
        if (clocks->compute < ready) clocks->compute = ready;
        if (b > 0) ready = gather(clocks, work, cluster, gpus, b - 1);
        clocks->compute = compute_until(clocks->compute, work->backward[b], clocks->link);
        send(clocks, gradient_seconds(work, cluster, gpus, FULL_SHARD, b));
    }
}

// Seconds of a step on `gpus` GPUs, each with the same work.
static double step_seconds(const Work* work, const Cluster* cluster, int gpus, Sharding sharding) {
    Clocks clocks = {0, 0};
    for (int m = 0; m < work->micro_batches; m++) {
        if (sharding == FULL_SHARD) {
            full_shard_micro_batch(&clocks, work, cluster, gpus);
            continue;
        }
        for (int b = 0; b < work->buckets; b++) clocks.compute += work->forward[b];
        for (int b = work->buckets - 1; b >= 0; b--) {
            clocks.compute = compute_until(clocks.compute, work->backward[b], clocks.link);
            if (m == work->micro_batches - 1)
                send(&clocks, gradient_seconds(work, cluster, gpus, sharding, b));
        }
    }
    meet(&clocks);
    clocks.link = clocks.compute +=
        all_reduce_seconds(cluster, gpus, 4.0 * work->buckets); // the gradient's norm
    const int parts = sharding == ZERO_1 || sharding == FULL_SHARD ? gpus : 1;
    const double elements = all_elements(work);
    for (int b = 0; b < work->buckets; b++) {
        if (work->elements[b] == 0) continue;
        clocks.compute =
            compute_until(clocks.compute, work->update * work->elements[b] / elements / parts, clocks.link);
        if (sharding == ZERO_1) gather(&clocks, work, cluster, gpus, b);
    }
    meet(&clocks);
    return clocks.compute;
}

// ----------------------------------------------------------------------------
// Published figures

// Throughput of one GPU in a run on `gpus` GPUs: tokens (or examples) a second.
typedef struct {
    int gpus;
    double rate;
} Published;

typedef struct {
    const char *name, *source;
    const Cluster* cluster;
    int layers;
    double layer_elements, embedding_elements, head_share;
    double per_gpu; // tokens (or examples) of a GPU in a step
    int gradient_bytes, parameter_bytes;
    Sharding sharding;
    int count;
    Published figures[5]; // the calculation starts from the first
} Run;

// MPT (mosaicml/llm-foundry, scripts/train/benchmarking/README.md): 12 C^2 a layer, vocabulary 50368, tied, learned positions of
// 2048 tokens, nodes of 8 A100 40 GB with 1600 Gb/s or of 8 H100; runs of one micro-batch a step, whose size does not change.
#define MPT(name, where, cluster, L, C, batch, gradient_bytes, ...)                                          \
    {                                                                                                        \
        name, where, &cluster, L, 12.0 * C *C, (50368.0 + 2048) * C,                                         \
            50368.0 / (50368.0 + 12.0 * C * L + 2048.0 * L), batch * 2048.0, gradient_bytes, 2, FULL_SHARD,  \
            __VA_ARGS__                                                                                      \
    }
// DistributedDataParallel (pytorch/pytorch, benchmarks/distributed/ddp/README.md): convolutional networks in fp32, 32 examples a
// GPU, buckets of 25 MB; nodes of 8 V100 with 4 x 100 Gb/s. The first figure is one GPU with the wrapper.
#define DDP(name, parameters, ...)                                                                           \
    {                                                                                                        \
        name, "PyTorch", &v100, (int)(parameters * 4 / 25e6) + 1,                                            \
            parameters / ((int)(parameters * 4 / 25e6) + 1), 0, 0, 32, 4, 4, ZERO_0, __VA_ARGS__             \
    }

static const Run published[] = {
    DDP("ResNet-50", 25.56e6, 3, {{1, 319}, {8, 307}, {16, 306}}),
    DDP("ResNet-101", 44.55e6, 3, {{1, 187}, {8, 179}, {16, 178}}),
    DDP("ResNeXt-101", 88.79e6, 3, {{1, 75}, {8, 71}, {16, 71}}),
    MPT("MPT 125M", "MosaicML", a100, 12, 768, 26, 2, 4,
        {{16, 130535}, {32, 127122}, {64, 125234}, {128, 123936}}),
    MPT("MPT 350M", "MosaicML", a100, 24, 1024, 18, 2, 4,
        {{16, 55413}, {32, 53811}, {64, 52689}, {128, 51934}}),
    MPT("MPT 760M", "MosaicML", a100, 24, 1536, 12, 2, 4,
        {{16, 29607}, {32, 29648}, {64, 29344}, {128, 28940}}),
    MPT("MPT 1B", "MosaicML", a100, 24, 2048, 10, 2, 2, {{64, 19001}, {128, 18647}}),
    MPT("MPT 3B", "MosaicML", a100, 32, 2560, 6, 2, 3, {{32, 9914}, {64, 9736}, {128, 9538}}),
    MPT("MPT 7B", "MosaicML", a100, 32, 4096, 18, 2, 3, {{32, 3725}, {64, 3665}, {128, 3623}}),
    MPT("MPT 13B", "MosaicML", a100, 40, 5120, 16, 2, 2, {{64, 1976}, {128, 1972}}),
    MPT("MPT 760M, H100", "MosaicML", h100, 24, 1536, 24, 4, 2, {{16, 68551}, {32, 67971}}),
    MPT("MPT 1B, H100", "MosaicML", h100, 24, 2048, 20, 4, 3, {{16, 46037}, {32, 45130}, {64, 44402}}),
    MPT("MPT 13B, H100", "MosaicML", h100, 40, 5120, 2, 4, 4,
        {{8, 4792}, {16, 4767}, {32, 4811}, {64, 4800}}),
};
enum { RUNS = sizeof(published) / sizeof(published[0]) };

// Bus bandwidth of NCCL's reduce-scatter on nodes of 8 H100, GB/s: github.com/NVIDIA/nccl/issues/1229. It
// does not say how many bytes; the same user's issue 1211 has 8 GB.
static const Published reduce_scatter[] = {{32, 360},  {64, 345},  {128, 320},
                                           {256, 300}, {512, 280}, {1024, 260}};
enum { BANDWIDTHS = sizeof(reduce_scatter) / sizeof(reduce_scatter[0]) };

static double bus_bandwidth(const Cluster* cluster, int gpus, double bytes) {
    return bytes * (gpus - 1) / gpus / ring_seconds(cluster, gpus, bytes) / 1e9;
}

static Work work_of_run(const Run* run, double seconds) {
    Work work =
        work_of_model(run->layers, run->layer_elements, run->embedding_elements, 1, run->head_share, seconds);
    work.gradient_bytes = run->gradient_bytes;
    work.parameter_bytes = run->parameter_bytes;
    work.update = all_elements(&work) * 28 / (run->cluster->memory * 1e9);
    return work;
}

static double rate_of_run(const Run* run, int gpus, double seconds) {
    const Work work = work_of_run(run, seconds);
    return run->per_gpu / step_seconds(&work, run->cluster, gpus, run->sharding);
}

// Seconds of forward and backward for which the calculation gives the first published figure, by bisection.
static double fitted_seconds(const Run* run) {
    double low = 0, high = run->per_gpu / run->figures[0].rate;
    for (int i = 0; i < 60; i++) {
        const double middle = (low + high) / 2;
        if (rate_of_run(run, run->figures[0].gpus, middle) > run->figures[0].rate) low = middle;
        else high = middle;
    }
    return high;
}

// The loss of published runs beyond the calculation, for every doubling of the nodes: the mean over the runs
// that begin with more than one GPU, each from its first figure to its last.
static double loss_per_doubling(void) {
    double sum = 0;
    int count = 0;
    for (int r = 0; r < RUNS; r++) {
        const Run* run = &published[r];
        const Published first = run->figures[0], last = run->figures[run->count - 1];
        if (first.gpus == 1) continue;
        const double predicted = rate_of_run(run, last.gpus, fitted_seconds(run));
        sum += log(predicted / last.rate) / log2((double)last.gpus / first.gpus);
        count++;
    }
    return sum / count;
}

// ----------------------------------------------------------------------------
// The tables

typedef struct {
    const char *model, *report;
    Cluster cluster;
    int vocabulary, sequence_length, batch, micro_batches;
    long total_batch; // tokens of a step in the strong scaling
    double mfu, peak; // for the step's time, if it is not measured
    double step_ms,
        update_ms; // measured: forward and backward of a micro-batch, and the update; 0: calculated
    double loss;   // loss beyond the calculation, for every doubling of the nodes
} Settings;

static ModelConfig config_of(const Settings* settings) {
    ModelConfig config = model_config_from_descriptor(settings->model);
    config.vocab_size = settings->vocabulary;
    config.sequence_length = settings->sequence_length;
    model_config_complete(&config);
    model_config_check(&config);
    return config;
}

static Work work_of_settings(const Settings* settings) {
    const ModelConfig config = config_of(settings);
    ParameterLayout layout = parameter_layout(&config);
    const double elements = (double)layout.table.elements,
                 embedding = (double)config.padded_vocab * config.channels;
    parameter_layout_free(&layout);
    const double flops = flops_per_token(&config, config.sequence_length);
    const double tokens = (double)settings->batch * config.sequence_length;
    const double seconds = settings->step_ms > 0 ? settings->step_ms * 1e-3
                                                 : flops * tokens / (settings->mfu * settings->peak * 1e12);
    const double embeddings = config.tied ? embedding : 2 * embedding;
    // The last norm is in the bucket of an untied head, or has this bucket alone.
    Work work = work_of_model(config.layers, (elements - embeddings) / config.layers, embedding, config.tied,
                              6.0 * config.vocab_size * config.channels / flops, seconds);
    work.elements[config.layers + 1] += config.channels;
    work.micro_batches = settings->micro_batches;
    // AdamW reads the gradient, two moments and the master, and writes the latter three and the bf16 weight.
    work.update = settings->update_ms > 0 ? settings->update_ms * 1e-3
                                          : elements * 30 / (0.85 * settings->cluster.memory * 1e9);
    return work;
}

// The work of one of `gpus` GPUs that share a total batch: whole micro-batches if there are enough sequences,
// else one smaller micro-batch. Returns 0 if the sequences do not divide evenly.
static int share_of_total(Work* work, const Settings* settings, const Work* whole, int gpus) {
    const long sequences = settings->total_batch / settings->sequence_length;
    if (sequences % gpus != 0) return 0;
    const long own = sequences / gpus;
    if (own % settings->batch != 0 && own > settings->batch) return 0;
    *work = *whole;
    work->micro_batches = own > settings->batch ? (int)(own / settings->batch) : 1;
    const double smaller = own < settings->batch ? (double)own / settings->batch : 1;
    for (int b = 0; b < work->buckets; b++) {
        work->forward[b] *= smaller;
        work->backward[b] *= smaller;
    }
    return 1;
}

static double expected(const Settings* settings, int gpus, double efficiency) {
    return efficiency * pow(1 - settings->loss, log2(nodes_of(&settings->cluster, gpus)));
}

static void print_row(FILE* out, const Settings* settings, const Work* work, int gpus, double alone,
                      double tokens) {
    const double step0 = step_seconds(work, &settings->cluster, gpus, ZERO_0);
    const double step = step_seconds(work, &settings->cluster, gpus, ZERO_1);
    fprintf(out, "| %d | %d | %.1f | %.1f %% | %.1f %% | **%.1f %%** | %.3g M |\n", gpus,
            nodes_of(&settings->cluster, gpus), step * 1e3, 100 * alone / step0, 100 * alone / step,
            100 * expected(settings, gpus, alone / step), expected(settings, gpus, tokens / step) / 1e6);
}

static const char table_head[] =
    "| GPUs | nodes | step, ms | ZeRO-0 | ZeRO-1 | ZeRO-1, expected | tokens/s, expected |\n"
    "|---|---|---|---|---|---|---|\n";

static void print_tables(FILE* out, const Settings* settings) {
    const ModelConfig config = config_of(settings);
    const Work work = work_of_settings(settings);
    Work own;
    if (!share_of_total(&own, settings, &work, 1))
        fail_usage("--total-batch %ld: must be a multiple of --batch %d x --sequence-length %d = %ld tokens",
                   settings->total_batch, settings->batch, settings->sequence_length,
                   (long)settings->batch * settings->sequence_length);
    const double tokens = (double)settings->batch * settings->micro_batches * config.sequence_length;
    const double alone = step_seconds(&work, &settings->cluster, 1, ZERO_0);
    fprintf(out,
            "%s: %.0f M parameters, T %d; one GPU: %.1f ms for %d x %d sequences and %.1f ms for the update "
            "(%s), %.0f "
            "tokens/s\n\n",
            settings->model, all_elements(&work) / 1e6, config.sequence_length, 1e3 * (alone - work.update),
            settings->micro_batches, settings->batch, 1e3 * work.update,
            settings->step_ms > 0 ? "measured" : "calculated", tokens / alone);
    fprintf(out, "Weak scaling: %.0f tokens a GPU and step.\n\n%s", tokens, table_head);
    for (int gpus = settings->cluster.gpus_per_node; gpus <= 1024; gpus *= 2)
        print_row(out, settings, &work, gpus, alone, tokens * gpus);
    fprintf(out, "\nStrong scaling: %ld tokens a step.\n\n%s", settings->total_batch, table_head);
    const double whole = step_seconds(&own, &settings->cluster, 1, ZERO_0);
    for (int gpus = settings->cluster.gpus_per_node; gpus <= 1024; gpus *= 2)
        if (share_of_total(&own, settings, &work, gpus))
            print_row(out, settings, &own, gpus, whole / gpus, (double)settings->total_batch);
    fputc('\n', out);
}

static void print_published(FILE* out) {
    fprintf(out, "| run | GPUs | published, a GPU | predicted | error |\n|---|---|---|---|---|\n");
    for (int r = 0; r < RUNS; r++) {
        const Run* run = &published[r];
        const double seconds = fitted_seconds(run);
        for (int i = 0; i < run->count; i++) {
            const Published figure = run->figures[i];
            const double predicted = rate_of_run(run, figure.gpus, seconds);
            if (i == 0)
                fprintf(out, "| %s (%s) | %d | %.0f | start | |\n", run->name, run->source, figure.gpus,
                        figure.rate);
            else
                fprintf(out, "| | %d | %.0f | %.0f | %+.1f %% |\n", figure.gpus, figure.rate, predicted,
                        100 * (predicted / figure.rate - 1));
        }
    }
    fprintf(out,
            "\n| reduce-scatter of 8 GB, H100 | published, GB/s | predicted | error |\n|---|---|---|---|\n");
    for (int i = 0; i < BANDWIDTHS; i++) {
        const double predicted = bus_bandwidth(&h100, reduce_scatter[i].gpus, 8e9);
        fprintf(out, "| %d GPUs | %.0f | %.0f | %+.1f %% |\n", reduce_scatter[i].gpus, reduce_scatter[i].rate,
                predicted, 100 * (predicted / reduce_scatter[i].rate - 1));
    }
    fputc('\n', out);
}

// Writes docs/results/scaling.md, for which all options except --report have their defaults.
static void write_report(Settings* settings, FILE* out) {
    fprintf(
        out,
        "# Scaling from 8 to 1024 GPUs: a calculation\n\n"
        "Written by `make scaling && build/scaling --report docs/results/scaling.md`. **No GPU has run any "
        "of it**: "
        "these are predictions from a step time that\n"
        "is itself calculated, and from published link speeds. `dev/scaling.c` says how, and with what "
        "constants. "
        "With the times of your own GPU:\n"
        "`build/scaling --step-ms ... --update-ms ...`, from what `build/bench/step` prints.\n\n"
        "## Against published figures\n\n"
        "The first figure of a run gives the time of its computing; the rest is predicted. Examples a second "
        "for "
        "the convolutional networks of PyTorch's DDP\n"
        "benchmark (fp32 gradients in buckets, overlapped: what moba.c does), tokens a second for MosaicML's "
        "MPT "
        "(FSDP: parameters sharded, too, which takes 1.5\n"
        "times the bytes). Sources: pytorch/pytorch, benchmarks/distributed/ddp/README.md; "
        "mosaicml/llm-foundry, "
        "scripts/train/benchmarking/README.md (runs of\n"
        "one micro-batch a step, which does not change with the GPUs; left out is MPT 1B on 32 A100, a fifth "
        "slower than on 16 and on 64); NVIDIA/nccl, issue 1229.\n\n");
    print_published(out);
    fprintf(out,
            "The calculation is too hopeful nearly everywhere: at these sizes almost all communication hides "
            "behind "
            "backward, and what published runs still lose with\n"
            "more nodes (stragglers, jitter, busy switches) is not in it. It is %.1f %% for every doubling "
            "of the nodes, "
            "the mean of the MPT runs from their first\n"
            "figure to their last, and is taken off in the columns \"expected\" (`--loss`). Those are "
            "therefore fitted to "
            "the MPT rows and no independent check of them.\n\n",
            100 * settings->loss);
    fprintf(out,
            "## moba.c on nodes of 8 H100, 8 x 400 Gb/s\n\n"
            "bf16 parameters, fp32 gradients on the wire, buckets by layers. The time of a step on one GPU "
            "is calculated "
            "from %.0f %% of %.0f TFLOP/s, which is what MPT\n"
            "1B reaches on H100 in the table's source; moba.c may reach more or less. Efficiency: against "
            "one GPU.\n\n",
            100 * settings->mfu, settings->peak);
    static const struct {
        const char* model;
        int batch;
        long total_batch;
    } models[] = {{"d12", 32, 1 << 21}, {"d24", 16, 1 << 21}, {"d32", 8, 1 << 22}};
    for (size_t i = 0; i < sizeof(models) / sizeof(models[0]); i++) {
        settings->model = models[i].model;
        settings->batch = models[i].batch;
        settings->total_batch = models[i].total_batch;
        print_tables(out, settings);
    }
    Settings slow = *settings;
    slow.model = "d12";
    slow.batch = 32;
    slow.total_batch = 1 << 21;
    slow.cluster.network = 0.94 * 12.5;
    fprintf(out, "The same nodes with one card of 100 Gb/s each, where the network is what counts.\n\n");
    print_tables(out, &slow);
    fprintf(out,
            "## What it says\n\n"
            "- Within some nodes either way of keeping the optimizer's state costs a few percent; "
            "ZeRO-1 is the faster one, "
            "since every GPU updates only its part.\n"
            "- A small model on hundreds of GPUs is a matter of latency: a step of a ring takes 2 to 10 "
            "us, a ring has as many "
            "as GPUs, and every layer is a bucket. There ZeRO-1\n"
            "falls behind, because its gathers after the update hide behind nothing; fewer, larger "
            "buckets would help both.\n"
            "- Where the network is slow, micro-batches do more than anything else: all but the last "
            "send nothing. With eight of "
            "them a step on the nodes with 100 Gb/s goes from\n"
            "62 %% to 93 %% on 16 GPUs (ZeRO-1): `build/scaling --network 11.75 --micro-batches 8`.\n\n"
            "## What is not modelled\n\n"
            "- GPUs and nodes that are slower than the rest, jitter of hosts, the topology and load of "
            "the network: only as "
            "the mean loss of published runs.\n"
            "- That a GPU computes a small micro-batch less efficiently: strong scaling beyond one "
            "micro-batch a GPU is "
            "worse than shown.\n"
            "- In-network sums of NVLink and InfiniBand (NVLS, SHARP), with which NCCL may be faster "
            "than shown.\n"
            "- The three numbers that hosts exchange by MPI in every step: the loss, and whether to stop.\n"
            "- Validation, samples and checkpoints; starting up, and starting again after a failure.\n");
}

// ----------------------------------------------------------------------------
// The command line

static Settings settings_default(void) {
    Settings settings;
    memset(&settings, 0, sizeof(settings));
    settings.model = "d12";
    settings.cluster = h100;
    settings.vocabulary = 50304;
    settings.sequence_length = 1024;
    settings.batch = 32;
    settings.micro_batches = 1;
    settings.total_batch = 1 << 21;
    settings.mfu = 0.41;
    settings.peak = gpu_peak_flops("NVIDIA H100 80GB HBM3", "bf16") / 1e12;
    settings.loss = loss_per_doubling();
    return settings;
}

#ifndef SCALING_NO_MAIN // a test includes this file for its functions

enum {
    KEY_MICRO = 1000,
    KEY_MFU,
    KEY_PEAK,
    KEY_STEP,
    KEY_UPDATE,
    KEY_NODE,
    KEY_NVLINK,
    KEY_NETWORK,
    KEY_MEMORY,
    KEY_LOSS,
    KEY_REPORT
};

static const struct argp_option settings_table[] = {
    {0, 0, 0, 0, "The training", 1},
    {"model", 'e', "dN", 0, "descriptor (default d12)", 1},
    {"vocab", 'V', "V", 0, "vocabulary (default 50304)", 1},
    {"sequence-length", 't', "T", 0, "tokens of a sequence (default 1024)", 1},
    {"batch", 'b', "B", 0, "sequences of a micro-batch (default 32)", 1},
    {"micro-batches", KEY_MICRO, "N", 0, "of a step, for weak scaling (default 1)", 1},
    {"total-batch", 'd', "TOKENS", 0, "of a step, for strong scaling (default 2097152)", 1},
    {0, 0, 0, 0, "One GPU", 2},
    {"step-ms", KEY_STEP, "MS", 0, "forward and backward of a micro-batch, measured (default: by --mfu)", 2},
    {"update-ms", KEY_UPDATE, "MS", 0,
     "the optimizer, measured (default: 30 bytes a parameter at 85 % of --memory)", 2},
    {"mfu", KEY_MFU, "X", 0, "part of the peak that computing reaches (default 0.41)", 2},
    {"peak", KEY_PEAK, "TFLOPS", 0, "of a GPU (default 989.4: H100)", 2},
    {"memory", KEY_MEMORY, "GB/s", 0, "of a GPU (default 3350)", 2},
    {0, 0, 0, 0, "Between GPUs", 3},
    {"gpus-per-node", KEY_NODE, "N", 0, "(default 8)", 3},
    {"nvlink", KEY_NVLINK, "GB/s", 0, "of rings within a node (default 370)", 3},
    {"network", KEY_NETWORK, "GB/s", 0, "of a node, all its cards (default 376)", 3},
    {"loss", KEY_LOSS, "X", 0,
     "lost for every doubling of the nodes beyond the calculation (default: as published runs do)", 3},
    {"report", KEY_REPORT, "FILE", 0, "write the tables on record there, with published figures", 3},
    {0, 0, 0, 0, 0, 0},
};

static double parse_number(const char* option, const char* text, double low, double high) {
    char* end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= low && value <= high))
        fail_usage("--%s %s: must be from %g to %g", option, text, low, high);
    return value;
}

static error_t settings_parse(int key, char* text, struct argp_state* state) {
    Settings* settings = (Settings*)state->input;
    switch (key) {
    case 'e':
        settings->model = text;
        break;
    case 'V':
        settings->vocabulary = (int)parse_number("vocab", text, 2, 1 << 24);
        break;
    case 't':
        settings->sequence_length = (int)parse_number("sequence-length", text, 1, 1 << 24);
        break;
    case 'b':
        settings->batch = (int)parse_number("batch", text, 1, 1 << 20);
        break;
    case KEY_MICRO:
        settings->micro_batches = (int)parse_number("micro-batches", text, 1, 1 << 20);
        break;
    case 'd':
        settings->total_batch = (long)parse_number("total-batch", text, 1, 1e12);
        break;
    case KEY_STEP:
        settings->step_ms = parse_number("step-ms", text, 1e-3, 1e9);
        break;
    case KEY_UPDATE:
        settings->update_ms = parse_number("update-ms", text, 1e-3, 1e9);
        break;
    case KEY_MFU:
        settings->mfu = parse_number("mfu", text, 1e-3, 1);
        break;
    case KEY_PEAK:
        settings->peak = parse_number("peak", text, 1e-3, 1e6);
        break;
    case KEY_MEMORY:
        settings->cluster.memory = parse_number("memory", text, 1, 1e6);
        break;
    case KEY_NODE:
        settings->cluster.gpus_per_node = (int)parse_number("gpus-per-node", text, 1, 1024);
        break;
    case KEY_NVLINK:
        settings->cluster.nvlink = parse_number("nvlink", text, 1e-3, 1e6);
        break;
    case KEY_NETWORK:
        settings->cluster.network = parse_number("network", text, 1e-3, 1e6);
        break;
    case KEY_LOSS:
        settings->loss = parse_number("loss", text, 0, 0.5);
        break;
    case KEY_REPORT:
        settings->report = text;
        break;
    case ARGP_KEY_ARG:
        fail_usage("%s: not an option", text);
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

int main(int argc, char** argv) {
    program_name = "scaling";
    Settings settings = settings_default();
    const struct argp parser = {
        settings_table, settings_parse, 0, "Calculates how training scales to many GPUs.", 0, 0, 0};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, 0, &settings);
    if (!settings.report) {
        print_tables(stdout, &settings);
        return 0;
    }
    FILE* out = open_or_fail(settings.report, "w");
    write_report(&settings, out);
    close_written_or_fail(out, settings.report);
    return 0;
}

#endif
