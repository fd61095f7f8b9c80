/*
Times block-sparse attention on a GPU, forward and backward, stage by stage, and dense attention on the same
inputs in the same run. It compares the rates with those of matrix products and copies. The twin for CPUs is
moba.c.

    build/bench/moba_cuda_bf16 --json moba.json               # lengths, block sizes, hard inputs
    build/bench/moba_cuda_bf16 --tokens 65536 --input sink    # one shape
    dev/bench/peers.py --moba moba.json                       # PyTorch's and FlashMoBA's times for these
    build/bench/moba_simt_bf16 --count --tokens 65536         # no times: the work of each stage, by formula

The lengths are those of the paper's figure (arXiv 2511.11571): 2 sequences, 16 heads of 128, blocks of 128
keys, 8 blocks a query. A shape that does not fit in the device's memory runs with one sequence, or fewer
heads, and its line says so. TFLOP/s count the useful work: the products over the pairs of query and visible
key (two in the forward pass, five in the backward pass) and the router's scores. A launch observer times the
stages in separate calls, so their sum differs a little from the time of a call.
*/
#include <argp.h>
#include "moba.cuh"                // defines flashmoba_forward, flashmoba_backward
#include "kernels/moba_plain.cuh"  // defines moba_forward, moba_backward
#include "kernels/keys.cuh"        // defines keys_forward
#include "dev/bench/ceilings.h"    // defines product_rate, copy_rate
#include "dev/bench/measure.h"     // defines parse_number, new_random, time_passes
#include "dev/bench/moba_counts.h" // defines count_work, count_floors
#include "runtime/attention.h"     // defines attention_module, attention_names

typedef enum { INPUT_RANDOM, INPUT_SINK, INPUT_OLDEST, NUM_INPUTS } Input;
static const char* const input_names[NUM_INPUTS] = {"random", "sink", "oldest"};

enum { FLASHMOBA, DENSE, MOBA, NUM_ALGORITHMS };

typedef struct {
    AttentionShape shape; // T = 0: the tables
    Input input;
    Draw draw;
    int rounds, count;
    int most[NUM_ALGORITHMS]; // longest sequence to time each algorithm with, in tokens
    const char* json;
} Settings;

static const struct argp_option settings_table[] = {
    {"json", 'j', "FILE", 0, "Also write the results to FILE as JSON", 0},
    {"rounds", 'r', "N", 0, "Rounds, of which the median counts (default 20)", 0},
    {"tokens", 't', "T", 0, "One shape instead of the tables: tokens, and with it", 0},
    {"batch", 'B', "B", 0, "sequences (default 2)", 0},
    {"query-heads", 'q', "H", 0, "query heads (default 16)", 0},
    {"kv-heads", 'g', "G", 0, "key/value heads (default: as many as query heads)", 0},
    {"head-dimension", 'd', "D", 0, "head dimension (default 128)", 0},
    {"block-size", 's', "S", 0, "keys of a block (default 128)", 0},
    {"blocks", 'k', "K", 0, "attended blocks of a query, its own among them (default 8)", 0},
    {"workspace", 'w', "MB", 0, "flashmoba's lists, partial rows and sums (default 1024)", 0},
    {"input", 'i', "random|sink|oldest", 0,
     "sink: all queries choose the first block; oldest: all choose the oldest blocks (default random)", 0},
    {"dense", 'e', "T", 0, "Time dense attention up to T tokens (default 131072)", 0},
    {"plain", 'p', "T", 0, "Time the plain algorithm up to T tokens (default 65536)", 0},
    {"count", 'c', 0, 0, "Count operations and bytes by formula instead of timing", 0},
    {"select", 'S', "uniform|recent|sink|oldest", 0, "Of --count: what queries choose (default uniform)", 0},
    {0, 0, 0, 0, 0, 0},
};

static int parse_name(const char* text, const char* option, const char* const* names, int count) {
    for (int i = 0; i < count; i++)
        if (strcmp(text, names[i]) == 0) return i;
    char known[128] = "";
    for (int i = 0; i < count; i++) {
        if (i > 0) strcat(known, ", ");
        strcat(known, names[i]);
    }
    fail_usage("--%s %s: must be one of %s", option, text, known);
}

static error_t settings_parse(int key, char* text, struct argp_state* state) {
    Settings* settings = (Settings*)state->input;
    AttentionShape* shape = &settings->shape;
    switch (key) {
    case 'j':
        settings->json = text;
        return 0;
    case 'r':
        settings->rounds = parse_number(text, "rounds", LEAST_ROUNDS);
        return 0;
    case 't':
        shape->T = parse_number(text, "tokens", 1);
        return 0;
    case 'B':
        shape->B = parse_number(text, "batch", 1);
        return 0;
    case 'q':
        shape->H = parse_number(text, "query-heads", 1);
        return 0;
    case 'g':
        shape->G = parse_number(text, "kv-heads", 1);
        return 0;
    case 'd':
        shape->D = parse_number(text, "head-dimension", 1);
        return 0;
    case 's':
        shape->S = parse_number(text, "block-size", 1);
        return 0;
    case 'k':
        shape->K = parse_number(text, "blocks", 1);
        return 0;
    case 'w':
        moba_set_workspace_bound((size_t)parse_number(text, "workspace", 1) << 20);
        return 0;
    case 'i':
        settings->input = (Input)parse_name(text, "input", input_names, NUM_INPUTS);
        return 0;
    case 'e':
        settings->most[DENSE] = parse_number(text, "dense", 0);
        return 0;
    case 'p':
        settings->most[MOBA] = parse_number(text, "plain", 0);
        return 0;
    case 'c':
        settings->count = 1;
        return 0;
    case 'S':
        settings->draw = (Draw)parse_name(text, "select", draw_names, NUM_DRAWS);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void check_shape(const AttentionShape* s) {
    if (s->G > s->H) fail_usage("--kv-heads %d: must not exceed --query-heads %d", s->G, s->H);
    if (!attention_supports_head_dim(s->D)) fail_usage("--head-dimension %d: must be 32, 64 or 128", s->D);
    if (s->S < 16 || s->S > 512 || (s->S & (s->S - 1)) != 0)
        fail_usage("--block-size %d: must be 16, 32, 64, 128, 256 or 512", s->S);
    if (s->K > 64) fail_usage("--blocks %d: must not exceed 64", s->K);
}

// ----------------------------------------------------------------------------
// The algorithms

static const AttentionKind kinds[NUM_ALGORITHMS] = {ATTENTION_FLASHMOBA, ATTENTION_DENSE, ATTENTION_MOBA};

typedef struct {
    floatX *qkv, *dqkv, *out, *dout;
} Buffers;

typedef struct {
    AttentionShape shape;
    Input input;
    AttentionKind kind; // the one that is timed
    Buffers sets[MOST_INPUT_SETS];
    int count;
    float *lse, *centroids;
    int *selected, *kv_of_q;
    void* workspace;
} Inputs;

// The tensors of a set. All sets share the arrays that are not in Buffers.
static AttentionTensors tensors_of(const Inputs* inputs, int set) {
    const Buffers* of = &inputs->sets[set];
    AttentionTensors x = {};
    x.out = of->out, x.lse = inputs->lse, x.selected = inputs->selected, x.centroids = inputs->centroids;
    x.qkv = of->qkv, x.kv_of_q = inputs->kv_of_q, x.workspace = inputs->workspace;
    x.dqkv = of->dqkv, x.dout = of->dout;
    return x;
}

static void forward_pass(void* context, int set) {
    const Inputs* inputs = (const Inputs*)context;
    const AttentionShape* s = &inputs->shape;
    const AttentionTensors x = tensors_of(inputs, set);
    if (attention_chooses_blocks(inputs->kind))
        keys_forward(inputs->sets[set].qkv, NULL, inputs->centroids, NULL, NULL, s->B, s->T, 0, s->H, s->G,
                     s->D, s->S, 0, 0);
    attention_module(inputs->kind)->forward(&x, s, 0);
}

static void backward_pass(void* context, int set) {
    const Inputs* inputs = (const Inputs*)context;
    const AttentionTensors x = tensors_of(inputs, set);
    attention_module(inputs->kind)->backward(&x, &inputs->shape, 0);
}

// Bytes of a workspace for both passes.
static size_t workspace_bytes(const AttentionShape* s, AttentionKind kind) {
    const size_t forward = attention_module(kind)->forward_workspace(s),
                 backward = attention_module(kind)->backward_workspace(s);
    return forward > backward ? forward : backward;
}

// ----------------------------------------------------------------------------
// Inputs

// All queries have a large component along one axis, and so have the keys of the first blocks; the other keys
// have 0 there. The other components are random, and their mean over a block is small beside it. So every
// query selects the first blocks.
static __global__ void aim_kernel(floatX* qkv, // (B, T, H + 2G, D)
                                  size_t tokens, int T, int H, int G, int D, int first_keys) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, token = i / (H + G);
    const int head = (int)(i % (H + G));
    if (token >= tokens) return;
    const bool is_aimed = head < H || (int)(token % T) < first_keys;
    qkv[(token * (H + 2 * G) + head) * D] = (floatX)(is_aimed ? 4.0f : 0.0f);
}

static size_t qkv_count(const AttentionShape* s) { return (size_t)s->B * s->T * (s->H + 2 * s->G) * s->D; }
static size_t out_count(const AttentionShape* s) { return (size_t)s->B * s->T * s->H * s->D; }

static size_t kept_bytes(const AttentionShape* s) {
    return (size_t)s->B * s->H * s->T * sizeof(float) +
           moba_selected_count(s->B, s->T, s->H, s->K) * sizeof(int) +
           moba_centroids_count(s->B, s->T, s->G, s->D, s->S) * sizeof(float);
}

// Bytes of one call of an algorithm: its inputs and outputs, the arrays kept between forward and backward,
// its workspace.
static size_t call_bytes(const AttentionShape* s, AttentionKind kind) {
    const size_t kept =
        attention_chooses_blocks(kind) ? kept_bytes(s) : (size_t)s->B * s->H * s->T * sizeof(float);
    return 2 * (qkv_count(s) + out_count(s)) * sizeof(floatX) + kept + workspace_bytes(s, kind);
}

static Inputs new_inputs(const AttentionShape* s, Input input) {
    const size_t tokens = (size_t)s->B * s->T, of_heads = tokens * (s->H + s->G);
    Inputs inputs = {};
    inputs.shape = *s, inputs.input = input;
    inputs.count = input_sets((qkv_count(s) + out_count(s)) * sizeof(floatX));
    for (int i = 0; i < inputs.count; i++) {
        Buffers* x = &inputs.sets[i];
        x->qkv = new_random(qkv_count(s)), x->dqkv = new_random(qkv_count(s));
        x->out = new_random(out_count(s)), x->dout = new_random(out_count(s));
        if (input != INPUT_RANDOM)
            launch(aim_kernel, flat_grid(of_heads, 1), FLAT_BLOCK, 0, 0, x->qkv, tokens, s->T, s->H, s->G,
                   s->D, s->S * (input == INPUT_SINK ? 1 : s->K - 1));
    }
    inputs.lse = (float*)device_malloc(tokens * s->H * sizeof(float), "log-sum-exps");
    inputs.centroids = (float*)device_malloc(
        moba_centroids_count(s->B, s->T, s->G, s->D, s->S) * sizeof(float), "centroids");
    inputs.selected =
        (int*)device_malloc(moba_selected_count(s->B, s->T, s->H, s->K) * sizeof(int), "a selection");
    inputs.kv_of_q = new_head_map(s->H, s->G);

    return inputs;
}

static void free_inputs(Inputs* inputs) {
    for (int i = 0; i < inputs->count; i++) {
        Buffers* x = &inputs->sets[i];
        device_free(x->qkv), device_free(x->dqkv), device_free(x->out), device_free(x->dout);
    }
    device_free(inputs->lse), device_free(inputs->centroids), device_free(inputs->selected);
    device_free(inputs->kv_of_q);
}

// Reduces the sequences, then the heads, until inputs and flashmoba's workspace fit in the free memory.
// Returns 0 if even one head does not fit.
static int fit_shape(AttentionShape* s) {
    for (;;) {
        const size_t set = 2 * (qkv_count(s) + out_count(s)) * sizeof(floatX);
        const size_t bytes =
            (size_t)input_sets(set / 2) * set + kept_bytes(s) + workspace_bytes(s, ATTENTION_FLASHMOBA);
        if (bytes < device_memory_free() / 20 * 19) return 1;
        if (s->B > 1) s->B /= 2;
        else if (s->H > 1 && s->H % 2 == 0) s->H /= 2, s->G = s->G > 1 ? s->G / 2 : 1;
        else return 0;
    }
}

// ----------------------------------------------------------------------------
// Stages

enum { MOST_LAUNCHES = 8192 };
typedef struct {
    LaunchObserver observer;
    int launches, stages[MOST_LAUNCHES];
    Mark begun[MOST_LAUNCHES], done[MOST_LAUNCHES];
} StageTimes;

static void before_launch(LaunchObserver* self, const void* kernel, cudaStream_t stream) {
    StageTimes* times = (StageTimes*)self;
    const char* name;
    if (times->launches == MOST_LAUNCHES) return;
    device_check(cudaFuncGetName(&name, kernel), "find the name of a kernel");
    times->stages[times->launches] = stage_of_kernel(name);
    mark(&times->begun[times->launches], stream);
}

static void after_launch(LaunchObserver* self, const void* kernel, cudaStream_t stream) {
    StageTimes* times = (StageTimes*)self;
    (void)kernel;
    if (times->launches < MOST_LAUNCHES) mark(&times->done[times->launches++], stream);
}

// Times the stages of flashmoba, inputs->kind: medians of a few calls.
enum { STAGE_ROUNDS = 5 };
static void time_stages(double seconds[NUM_STAGES], Inputs* inputs) {
    static StageTimes times; // kept with its events for all calls
    double of_rounds[NUM_STAGES][STAGE_ROUNDS] = {};
    if (!times.observer.before)
        for (int i = 0; i < MOST_LAUNCHES; i++) times.begun[i] = mark_make(), times.done[i] = mark_make();
    times.observer.before = before_launch, times.observer.after = after_launch;
    for (int round = 0; round < STAGE_ROUNDS; round++) {
        times.launches = 0;
        launch_observer = &times.observer;
        forward_pass(inputs, round % inputs->count);
        backward_pass(inputs, round % inputs->count);
        launch_observer = NULL;
        stream_synchronize(0);
        for (int i = 0; i < times.launches; i++)
            of_rounds[times.stages[i]][round] += seconds_between(times.begun[i], times.done[i]);
    }
    for (int stage = 0; stage < NUM_STAGES; stage++) seconds[stage] = median(of_rounds[stage], STAGE_ROUNDS);
}

// ----------------------------------------------------------------------------
// Measuring

typedef struct {
    PassSeconds seconds;
    double bytes; // of one call
} Timing;

typedef struct {
    AttentionShape shape; // the shape that was run
    Input input;
    Timing timings[NUM_ALGORITHMS]; // 0 seconds: not run
    double stages[NUM_STAGES];      // seconds
    Work works[NUM_STAGES];
} Result;

// Copies the selection of one head to the host.
static int* download_selection(const Inputs* x) {
    const size_t count = (size_t)x->shape.T * (x->shape.K - 1);
    int* selected = (int*)malloc_or_fail(sizeof(int) * (count + 1), "a selection");
    copy_to_host(selected, x->selected, sizeof(int) * count, 0);
    stream_synchronize(0);
    return selected;
}

// Ends the program if a query did not select the blocks that the input was made for, although it could.
static void check_choices(const Inputs* x, const int* selected) {
    const AttentionShape* s = &x->shape;
    const int aimed = x->input == INPUT_SINK ? 1 : x->input == INPUT_OLDEST ? s->K - 1 : 0;
    for (int t = aimed * s->S; aimed && s->K > 1 && t < s->T; t++)
        for (int block = 0; block < aimed; block++) {
            int is_chosen = 0;
            for (int i = 0; i < s->K - 1; i++) is_chosen |= selected[(size_t)t * (s->K - 1) + i] == block;
            if (!is_chosen)
                fail("input %s: query %d has not chosen block %d", input_names[x->input], t, block);
        }
}

static void measure_stages(Result* result, Inputs* inputs) {
    time_stages(result->stages, inputs);
    int* selected = download_selection(inputs);
    check_choices(inputs, selected);
    count_work(result->works, &inputs->shape, NULL, selected, 1);
    free(selected);
}

static Result measure(const AttentionShape* s, Input input, const Settings* settings) {
    Inputs inputs = new_inputs(s, input);
    Result result = {};
    result.shape = *s, result.input = input;
    for (int i = 0; i < NUM_ALGORITHMS; i++) {
        const size_t bytes = workspace_bytes(s, kinds[i]);
        Timing* timing = &result.timings[i];
        timing->bytes = (double)call_bytes(s, kinds[i]);
        if (s->T > settings->most[i] || bytes > device_memory_free() / 20 * 19) continue;
        inputs.kind = kinds[i];
        inputs.workspace = device_malloc(bytes, "a workspace");
        timing->seconds = time_passes(forward_pass, backward_pass, &inputs, inputs.count, settings->rounds);
        if (i == FLASHMOBA) measure_stages(&result, &inputs);
        device_free(inputs.workspace);
    }
    free_inputs(&inputs);
    return result;
}

static double sum_of_useful(const Work works[NUM_STAGES], int first, int end) {
    double sum = 0;
    for (int i = first; i < end; i++) sum += works[i].useful;
    return sum;
}

// ----------------------------------------------------------------------------
// Reporting times

typedef struct {
    double product, copy; // the device's ceilings: operations and bytes a second
} Ceilings;

static void print_stages(const Result* r, const Ceilings* ceilings) {
    printf("%31s", "");
    for (int i = 0; i < NUM_STAGES; i++) printf(" %13s", stage_names[i]);
    printf("\n%31s", "ms");
    for (int i = 0; i < NUM_STAGES; i++) printf(" %13.3f", 1e3 * r->stages[i]);
    printf("\n%31s", "products, % of the ceiling");
    for (int i = 0; i < NUM_STAGES; i++)
        printf(" %13.1f",
               100 * r->works[i].products * OPERATIONS_OF_PRODUCT / r->stages[i] / ceilings->product);
    printf("\n%31s", "bytes, % of the ceiling");
    for (int i = 0; i < NUM_STAGES; i++)
        printf(" %13.1f", 100 * bytes_moved(&r->works[i]) / r->stages[i] / ceilings->copy);
    printf("\n");
}

static void print_header(const char* title) {
    printf("\n%s\n", title);
    printf("                                        flashmoba: ms         useful TFLOP/s      dense: ms      "
           "     flashmoba"
           "      moba  flashmoba       MB of a call\n");
    printf("   B      T   H   G   D   S  K input   forward  backward   forward backward   forward  backward  "
           " is faster"
           "        ms  is faster  flashmoba     dense      moba\n");
}

// Prints the milliseconds of forward and backward, and their ratio to flashmoba's.
static void print_dense(const PassSeconds* dense, const PassSeconds* flashmoba) {
    if (dense->forward == 0) printf(" %31s", "not run");
    else
        printf(" %9.3f %9.3f %11.2f", 1e3 * dense->forward, 1e3 * dense->backward,
               (dense->forward + dense->backward) / (flashmoba->forward + flashmoba->backward));
}

static void print_moba(const PassSeconds* plain, const PassSeconds* flashmoba) {
    const double both = plain->forward + plain->backward;
    if (both == 0) printf(" %20s", "not run");
    else printf(" %9.3f %10.2f", 1e3 * both, both / (flashmoba->forward + flashmoba->backward));
}

static void print_result(const Result* r, const Ceilings* ceilings) {
    const AttentionShape* s = &r->shape;
    const PassSeconds* flashmoba = &r->timings[FLASHMOBA].seconds;
    printf("%4d %6d %3d %3d %3d %3d %2d %-6s %9.3f %9.3f %9.1f %8.1f", s->B, s->T, s->H, s->G, s->D, s->S,
           s->K, input_names[r->input], 1e3 * flashmoba->forward, 1e3 * flashmoba->backward,
           1e-12 * sum_of_useful(r->works, 0, STATISTICS) / flashmoba->forward,
           1e-12 * sum_of_useful(r->works, STATISTICS, NUM_STAGES) / flashmoba->backward);
    print_dense(&r->timings[DENSE].seconds, flashmoba);
    print_moba(&r->timings[MOBA].seconds, flashmoba);
    for (int i = 0; i < NUM_ALGORITHMS; i++) printf(" %9.1f", 1e-6 * r->timings[i].bytes);
    printf("\n");
    print_stages(r, ceilings);
    fflush(stdout);
}

static void write_shape(FILE* json, const AttentionShape* s) {
    fprintf(json, "\"B\": %d, \"T\": %d, \"H\": %d, \"G\": %d, \"D\": %d, \"S\": %d, \"K\": %d", s->B, s->T,
            s->H, s->G, s->D, s->S, s->K);
}

static void write_result(FILE* json, const Result* r, int is_first) {
    fprintf(json, "%s\n    {", is_first ? "" : ",");
    write_shape(json, &r->shape);
    fprintf(json, ", \"input\": \"%s\"", input_names[r->input]);
    for (int i = 0; i < NUM_ALGORITHMS; i++) {
        const Timing* timing = &r->timings[i];
        fprintf(json, ", \"%s\": {\"bytes\": %.0f", attention_names[kinds[i]], timing->bytes);
        if (timing->seconds.forward > 0)
            fprintf(json, ", \"forward_ms\": %.5f, \"backward_ms\": %.5f", 1e3 * timing->seconds.forward,
                    1e3 * timing->seconds.backward);
        fprintf(json, "}");
    }
    fprintf(json, ", \"stages\": {");
    for (int i = 0; i < NUM_STAGES; i++)
        fprintf(json, "%s\"%s\": {\"ms\": %.5f, \"products\": %.0f, \"useful\": %.0f, \"bytes\": %.0f}",
                i ? ", " : "", stage_names[i], 1e3 * r->stages[i], r->works[i].products, r->works[i].useful,
                bytes_moved(&r->works[i]));
    fprintf(json, "}}");
}

// ----------------------------------------------------------------------------
// The tables

#if defined(DEVICE_SIMT) // small sizes, which only show that the tables work
static const int lengths[] = {256, 512};
enum { SWEEP_TOKENS = 256, HARD_TOKENS = 512 };
static const AttentionShape usual_shape = {1, 0, 0, 2, 2, 32, 0, 32, 4};
#else
static const int lengths[] = {8192, 16384, 32768, 65536, 131072, 262144, 524288};
enum { SWEEP_TOKENS = 32768, HARD_TOKENS = 65536 };
static const AttentionShape usual_shape = {2, 0, 0, 16, 16, 128, 0, 128, 8};
#endif
enum { NUM_LENGTHS = sizeof(lengths) / sizeof(lengths[0]) };

typedef struct {
    const Settings* settings;
    Ceilings ceilings;
    FILE* json;
    int results;
} Report;

static void report_shape(Report* report, AttentionShape shape, Input input) {
    const AttentionShape wanted = shape;
    if (!fit_shape(&shape)) {
        printf("%4d %6d %3d: not run: %.1f MB for one head, more than are free\n", wanted.B, wanted.T,
               wanted.H, 1e-6 * (double)call_bytes(&shape, ATTENTION_FLASHMOBA));
        return;
    }
    if (shape.B != wanted.B || shape.H != wanted.H)
        printf("%d tokens: %d sequence(s) of %d heads instead of %d of %d, as memory allows\n", shape.T,
               shape.B, shape.H, wanted.B, wanted.H);
    const Result result = measure(&shape, input, report->settings);
    print_result(&result, &report->ceilings);
    if (report->json) write_result(report->json, &result, report->results == 0);
    report->results++;
}

static void report_tables(Report* report) {
    AttentionShape shape = usual_shape;
    print_header("Length");
    for (int i = 0; i < NUM_LENGTHS; i++) {
        shape.T = lengths[i];
        report_shape(report, shape, INPUT_RANDOM);
    }
    print_header("Inputs that are hard: all queries choose one block, and all choose the oldest ones");
    shape.T = HARD_TOKENS;
    for (int input = INPUT_RANDOM; input < NUM_INPUTS; input++) report_shape(report, shape, (Input)input);
    print_header("Size of blocks and their number");
    shape.T = SWEEP_TOKENS, shape.D = least(64, shape.D);
    for (shape.S = 16; shape.S <= 128; shape.S *= 2)
        for (shape.K = 4; shape.K <= 16; shape.K *= 2) report_shape(report, shape, INPUT_RANDOM);
}

static void report_times(const Settings* settings) {
    Report report = {settings, {0, 0}, settings->json ? open_or_fail(settings->json, "w") : NULL, 0};
    matmul_start();
    report.ceilings.product = product_rate(LARGE_PRODUCT), report.ceilings.copy = copy_rate(LARGE_COPY);
    printf("%s %s, %s; medians of %d rounds; a matrix product of %d reaches %.1f TFLOP/s, a copy %.1f GB/s\n",
           DEVICE_NAME, device_name(), PRECISION_NAME, settings->rounds, LARGE_PRODUCT,
           1e-12 * report.ceilings.product, 1e-9 * report.ceilings.copy);
    if (report.json)
        fprintf(report.json,
                "{\"device\": \"%s\", \"gpu\": \"%s\", \"precision\": \"%s\", \"rounds\": %d, "
                "\"matmul_tflops\": %.2f, "
                "\"copy_gbs\": %.2f, \"results\": [",
                DEVICE_NAME, device_name(), PRECISION_NAME, settings->rounds, 1e-12 * report.ceilings.product,
                1e-9 * report.ceilings.copy);
    if (settings->shape.T) {
        print_header("One shape");
        report_shape(&report, settings->shape, settings->input);
    } else {
        report_tables(&report);
    }
    if (!report.json) return;
    fprintf(report.json, "\n]}\n");
    close_written_or_fail(report.json, settings->json);
}

// ----------------------------------------------------------------------------
// Counting

// Rates that an H100 may reach with mma.sync and in copies (docs/results/kernels.md). The least time of a
// stage is the longer of its two times.
static const double ASSUMED_PRODUCTS = 600e12, ASSUMED_BYTES = 3.35e12;

static double least_seconds(const Work* w) {
    const double products = w->products * OPERATIONS_OF_PRODUCT / ASSUMED_PRODUCTS,
                 bytes = bytes_moved(w) / ASSUMED_BYTES;
    return products > bytes ? products : bytes;
}

static void print_work(const char* name, const Work* w, double floor, double seconds) {
    printf("%-14s %8.0f %10.2f %8.3f %8.3f %9.1f %9.1f", name, w->launches, 1e-6 * w->products,
           1e-12 * w->products * OPERATIONS_OF_PRODUCT, 1e-12 * w->useful, 1e-6 * bytes_read(w),
           1e-6 * bytes_written(w));
    if (floor > 0) printf(" %9.1f %6.2f", 1e-6 * floor, bytes_moved(w) / floor);
    else printf(" %16s", "");
    printf(" %10.3f %9.3f\n", 1e-6 * w->atomics, 1e3 * seconds);
}

static void write_work(FILE* json, const char* name, const Work* w, double floor, double seconds) {
    fprintf(json,
            "\n      {\"name\": \"%s\", \"launches\": %.0f, \"products\": %.0f, \"useful\": %.0f, \"read\": "
            "%.0f, "
            "\"written\": %.0f, \"floor\": %.0f, \"atomics\": %.0f, \"least_ms\": %.5f}",
            name, w->launches, w->products, w->useful, bytes_read(w), bytes_written(w), floor, w->atomics,
            1e3 * seconds);
}

static Work sum_of_work(const Work* works, int first, int end, double* seconds) {
    Work sum = {};
    *seconds = 0;
    for (int i = first; i < end; i++) {
        const Work* w = &works[i];
        sum.launches += w->launches, sum.products += w->products, sum.useful += w->useful,
            sum.atomics += w->atomics;
        sum.copied += w->copied, sum.loaded += w->loaded, sum.stored += w->stored;
        sum.words_read += w->words_read, sum.words_written += w->words_written;
        *seconds += least_seconds(w);
    }
    return sum;
}

static void report_count(const AttentionShape* s, Draw draw, FILE* json) {
    Work works[NUM_STAGES];
    int* selected = drawn_selection(s, draw, 1);
    count_work(works, s, NULL, selected, 1);
    const Floors floors = count_floors(s, selected, 1);
    free(selected);
    double of_stages[NUM_STAGES] = {};
    of_stages[ROUTER] = floors.router, of_stages[FORWARD] = floors.forward, of_stages[MERGE] = floors.merge;
    printf("\n%s, B %d, T %d, H %d, G %d, D %d, S %d, K %d, %s selection, at most %.0f MB of workspace\n",
           PRECISION_NAME, s->B, s->T, s->H, s->G, s->D, s->S, s->K, draw_names[draw],
           (double)moba_workspace_bound / (1 << 20));
    printf("               launches   products  TFLOP:                  MB:                               "
           "atomics    least\n");
    printf("                         (million)     done   useful      read   written     floor    is  "
           "(million)       ms\n");
    if (json) {
        fprintf(json, "\n    {");
        write_shape(json, s);
        fprintf(json, ", \"workspace\": %zu, \"selection\": \"%s\", \"stages\": [", moba_workspace_bound,
                draw_names[draw]);
    }
    for (int i = 0; i < NUM_STAGES; i++) {
        print_work(stage_names[i], &works[i], of_stages[i], least_seconds(&works[i]));
        if (json) write_work(json, stage_names[i], &works[i], of_stages[i], least_seconds(&works[i]));
        if (json) fprintf(json, ",");
    }
    double seconds;
    const Work backward = sum_of_work(works, STATISTICS, NUM_STAGES, &seconds);
    print_work("backward, all", &backward, floors.backward, seconds);
    if (json) write_work(json, "backward, all", &backward, floors.backward, seconds), fprintf(json, ",");
    const double floor = floors.router + floors.forward + floors.merge + floors.backward;
    const Work all = sum_of_work(works, 0, NUM_STAGES, &seconds);
    print_work("all", &all, floor, seconds);
    if (json) write_work(json, "all", &all, floor, seconds), fprintf(json, "]}");
}

static void report_counts(const Settings* settings) {
    static const int long_lengths[] = {8192, 16384, 32768, 65536, 131072, 262144, 524288};
    FILE* json = settings->json ? open_or_fail(settings->json, "w") : NULL;
    AttentionShape shape = settings->shape;
    printf("by formula; least: the longer of products at %.0f TFLOP/s and bytes at %.2f TB/s\n",
           1e-12 * ASSUMED_PRODUCTS, 1e-12 * ASSUMED_BYTES);
    if (json)
        fprintf(json,
                "{\"precision\": \"%s\", \"assumed_tflops\": %.1f, \"assumed_tbs\": %.2f, \"counts\": [",
                PRECISION_NAME, 1e-12 * ASSUMED_PRODUCTS, 1e-12 * ASSUMED_BYTES);
    const int count = shape.T ? 1 : (int)(sizeof(long_lengths) / sizeof(long_lengths[0]));
    for (int i = 0; i < count; i++) {
        if (!settings->shape.T) shape.T = long_lengths[i];
        if (json && i > 0) fprintf(json, ",");
        report_count(&shape, settings->draw, json);
    }
    if (!json) return;
    fprintf(json, "\n]}\n");
    close_written_or_fail(json, settings->json);
}

int main(int argc, char** argv) {
    program_name = "moba";
    Settings settings = {{2, 0, 0, 16, 0, 128, 0, 128, 8}, INPUT_RANDOM, DRAW_UNIFORM, 20, 0,
                         {1 << 24, 131072, 65536},         NULL};
    const struct argp parser = {
        settings_table, settings_parse, NULL, "Times block-sparse attention on this machine's GPU.",
        NULL,           NULL,           NULL};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, NULL, &settings);
    if (settings.shape.G == 0) settings.shape.G = settings.shape.H;
    check_shape(&settings.shape);
    if (settings.count) report_counts(&settings);
    else report_times(&settings);
    return 0;
}
