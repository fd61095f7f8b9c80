/*
Times block-sparse attention, forward and backward, and dense attention on the same inputs in the same
process.

    moba --tokens 32768 --json moba.json

A round is flashmoba, dense, flashmoba. The ratio is dense over the mean of the two flashmoba runs, because
other work on the machine slows both. The plain algorithm runs once, for lengths up to --plain. "kept" is the
memory that a layer keeps after its forward pass beyond dense attention: the selection, which the backward
pass reads, and the centroids, which it does not. It is also given as a share of dense attention's memory
(qkv, out, lse). All layers share the workspaces.
*/
#include <argp.h>
// moba_forward, flashmoba_forward and its stages, attention_forward, gemm
#include "dev/cpu/moba.h"
// parse_number, new_random, median
#include "dev/bench/measure.h"

static const int default_tokens[] = {4096, 8192, 16384};

typedef struct {
    AttentionShape shape; // T = 0: the default lengths
    int rounds, plain;
    const char* json_path;
} options_t;

static const struct argp_option option_table[] = {
    {"json", 'j', "FILE", 0, "Also write the results to FILE as JSON", 0},
    {"rounds", 'r', "N", 0, "Rounds, of which the median counts (default 1)", 0},
    {"tokens", 't', "T", 0, "One length instead of 4096, 8192 and 16384", 0},
    {"query-heads", 'q', "H", 0, "Query heads (default 8)", 0},
    {"kv-heads", 'k', "G", 0, "Key/value heads (default 8)", 0},
    {"head-dimension", 'd', "D", 0, "Head dimension (default 64)", 0},
    {"block-size", 's', "S", 0, "Keys of a block (default 128)", 0},
    {"blocks", 'b', "K", 0, "Attended blocks of a query, its own among them (default 8)", 0},
    {"plain", 'p', "T", 0, "Time the plain algorithm up to T tokens (default 4096)", 0},
    {0, 0, 0, 0, 0, 0},
};

static error_t parse_option(int key, char* argument, struct argp_state* state) {
    options_t* options = (options_t*)state->input;
    AttentionShape* shape = &options->shape;
    switch (key) {
    case 'j':
        options->json_path = argument;
        return 0;
    case 'r':
        options->rounds = parse_number(argument, "rounds", 1);
        return 0;
    case 't':
        shape->T = parse_number(argument, "tokens", 1);
        return 0;
    case 'q':
        shape->H = parse_number(argument, "query-heads", 1);
        return 0;
    case 'k':
        shape->G = parse_number(argument, "kv-heads", 1);
        return 0;
    case 'd':
        shape->D = parse_number(argument, "head-dimension", 1);
        return 0;
    case 's':
        shape->S = parse_number(argument, "block-size", 1);
        return 0;
    case 'b':
        shape->K = parse_number(argument, "blocks", 1);
        return 0;
    case 'p':
        options->plain = parse_number(argument, "plain", 0);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

// ----------------------------------------------------------------------------
// Measuring

typedef struct {
    AttentionTensors x;
    floatX *qkv, *dout; // x.qkv, x.dout, x.centroids and x.kv_of_q, to write to
    float_acc* centroids;
    int* kv_of_q;
} buffers_t;

enum { ROUTER, LOCAL_FORWARD, ROUTED_FORWARD, LOCAL_BACKWARD, ROUTED_BACKWARD, NUM_STAGES };
static const char* stage_names[NUM_STAGES] = {"router", "local_forward", "routed_forward", "local_backward",
                                              "routed_backward"};

typedef struct {
    double dense, flashmoba, plain, ratio; // seconds; plain is 0 if it was not timed
    double stages[NUM_STAGES];
    double kept_bytes, kept_share; // of a layer, beyond dense attention
    double workspace_bytes, dense_workspace_bytes;
    double peak, of_peak; // operations a second of large products; flashmoba's rate as a share of it
} result_t;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t dense_workspace(const AttentionShape* s) {
    return larger(attention_forward_workspace(s), attention_backward_workspace(s));
}

static size_t flashmoba_workspace(const AttentionShape* s) {
    return larger(flashmoba_forward_workspace(s), flashmoba_backward_workspace(s));
}

static size_t plain_workspace(const AttentionShape* s) {
    return larger(moba_forward_workspace(s), moba_backward_workspace(s));
}

static buffers_t new_buffers(const AttentionShape* s, int with_plain) {
    const size_t qkv = (size_t)s->T * (s->H + 2 * s->G) * s->D, out = (size_t)s->T * s->H * s->D;
    buffers_t buffers;
    AttentionTensors* x = &buffers.x;
    memset(&buffers, 0, sizeof(buffers));
    x->qkv = buffers.qkv = new_random(qkv), x->dqkv = new_random(qkv);
    x->out = new_random(out), x->dout = buffers.dout = new_random(out);
    x->lse = new_random((size_t)s->H * s->T);
    x->centroids = buffers.centroids = new_random(moba_centroids_count(1, s->T, s->G, s->D, s->S));
    x->selected =
        (int*)device_malloc(moba_selected_count(1, s->T, s->H, s->K) * sizeof(int), "the selection");
    const size_t workspace = larger(dense_workspace(s), flashmoba_workspace(s));
    x->workspace = device_malloc(larger(workspace, with_plain ? plain_workspace(s) : 0), "a workspace");
    x->kv_of_q = buffers.kv_of_q = (int*)malloc_or_fail(sizeof(int) * (size_t)s->H, "the head map");
    for (int h = 0; h < s->H; h++) buffers.kv_of_q[h] = (int)((long)h * s->G / s->H);
    return buffers;
}

static void free_buffers(buffers_t* buffers) {
    const AttentionTensors* x = &buffers->x;
    device_free(buffers->qkv), device_free(x->dqkv), device_free(x->out), device_free(buffers->dout);
    device_free(x->lse), device_free(buffers->centroids), device_free(x->selected), device_free(x->workspace);
    free(buffers->kv_of_q);
}

static double time_dense(const buffers_t* buffers, const AttentionShape* s) {
    const double start = omp_get_wtime();
    attention_forward(&buffers->x, s, 0);
    attention_backward(&buffers->x, s, 0);
    return omp_get_wtime() - start;
}

static double time_plain(const buffers_t* buffers, const AttentionShape* s) {
    const double start = omp_get_wtime();
    moba_centroids(buffers->centroids, buffers->qkv, s);
    moba_forward(&buffers->x, s, 0);
    moba_backward(&buffers->x, s, 0);
    return omp_get_wtime() - start;
}

// Runs flashmoba_forward and flashmoba_backward stage by stage. Adds to the times of the stages; returns
// their sum.
static double time_flashmoba(double* stages, const buffers_t* buffers, const AttentionShape* s) {
    const AttentionTensors* x = &buffers->x;
    double at[NUM_STAGES + 1];
    at[0] = omp_get_wtime();
    moba_centroids(buffers->centroids, buffers->qkv, s);
    if (s->K > 1) flashmoba_route(x, s);
    at[1] = omp_get_wtime();
    flashmoba_local_forward(x, s);
    at[2] = omp_get_wtime();
    if (s->K > 1) flashmoba_routed_forward(x, s);
    at[3] = omp_get_wtime();
    attention_delta(flashmoba_delta(x), x, s);
    flashmoba_local_backward(x, s);
    at[4] = omp_get_wtime();
    if (s->K > 1) flashmoba_routed_backward(x, s);
    at[5] = omp_get_wtime();
    for (int i = 0; i < NUM_STAGES; i++) stages[i] += at[i + 1] - at[i];
    return at[NUM_STAGES] - at[0];
}

enum { PEAK_SIZE = 2048 };

// Operations a second of one large matrix product.
static double measure_peak(void) {
    const size_t count = (size_t)PEAK_SIZE * PEAK_SIZE;
    floatX *a = new_random(count), *b = new_random(count), *c = new_random(count);
    double seconds = 0;
    for (int i = 0; i < 2; i++) { // the first round warms up
        const double start = omp_get_wtime();
        gemm(0, 1, PEAK_SIZE, PEAK_SIZE, PEAK_SIZE, a, PEAK_SIZE, b, PEAK_SIZE, 0, c, PEAK_SIZE);
        seconds = omp_get_wtime() - start;
    }
    device_free(a), device_free(b), device_free(c);
    return 2.0 * PEAK_SIZE * PEAK_SIZE * PEAK_SIZE / seconds;
}

// Operations of the seven products over the pairs of query and visible key, and of the router's scores.
static double useful_operations(const AttentionShape* s) {
    double pairs = 0, scores = 0;
    for (int t = 0; t < s->T; t++) {
        const int past = t / s->S;
        pairs += t % s->S + 1 + (double)s->S * min_int(past, s->K - 1);
        scores += past;
    }
    return 2.0 * s->D * s->H * (7 * pairs + scores);
}

static result_t measure(const AttentionShape* s, int rounds, int with_plain) {
    buffers_t buffers = new_buffers(s, with_plain);
    result_t result;
    memset(&result, 0, sizeof(result));
    double* times = (double*)malloc_or_fail(sizeof(double) * 3 * (size_t)rounds, "the times");
    double *dense = times, *flashmoba = times + rounds, *ratio = times + 2 * rounds,
           ignored[NUM_STAGES] = {0};
    time_flashmoba(ignored, &buffers, s); // warms up
    for (int r = 0; r < rounds; r++) {
        flashmoba[r] = time_flashmoba(result.stages, &buffers, s) / 2;
        dense[r] = time_dense(&buffers, s);
        flashmoba[r] += time_flashmoba(result.stages, &buffers, s) / 2;
        ratio[r] = dense[r] / flashmoba[r];
    }
    for (int i = 0; i < NUM_STAGES; i++) result.stages[i] /= 2 * rounds;
    result.dense = median(dense, rounds);
    result.flashmoba = median(flashmoba, rounds);
    result.ratio = median(ratio, rounds);
    if (with_plain) result.plain = time_plain(&buffers, s);
    result.peak = measure_peak();
    result.of_peak = useful_operations(s) / result.flashmoba / result.peak;
    result.kept_bytes = (double)moba_selected_count(1, s->T, s->H, s->K) * sizeof(int) +
                        (double)moba_centroids_count(1, s->T, s->G, s->D, s->S) * sizeof(float_acc);
    result.kept_share = result.kept_bytes / ((double)s->T * s->D * (2 * s->H + 2 * s->G) * sizeof(floatX) +
                                             (double)s->H * s->T * sizeof(float_acc));
    result.workspace_bytes = (double)flashmoba_workspace(s);
    result.dense_workspace_bytes = (double)dense_workspace(s);
    free(times);
    free_buffers(&buffers);
    return result;
}

// ----------------------------------------------------------------------------
// Reporting

static void print_result(int T, const result_t* r) {
    printf("%6d %9.1f %9.1f %6.2f", T, 1e3 * r->dense, 1e3 * r->flashmoba, r->ratio);
    if (r->plain > 0) printf(" %9.1f", 1e3 * r->plain);
    if (r->plain <= 0) printf(" %9s", "-");
    for (int i = 0; i < NUM_STAGES; i++) printf(" %7.1f", 1e3 * r->stages[i]);
    printf(" %7.1f %7.2f %5.1f %7.1f %7.1f\n", 100 * r->of_peak, 1e-6 * r->kept_bytes, 100 * r->kept_share,
           1e-6 * r->workspace_bytes, 1e-6 * r->dense_workspace_bytes);
    fflush(stdout);
}

static void write_result(FILE* json, int T, const result_t* r, int is_first) {
    fprintf(json, "%s\n    {\"T\": %d, \"dense_ms\": %.3f, \"flashmoba_ms\": %.3f, \"ratio\": %.3f, ",
            is_first ? "" : ",", T, 1e3 * r->dense, 1e3 * r->flashmoba, r->ratio);
    if (r->plain > 0) fprintf(json, "\"moba_ms\": %.3f, ", 1e3 * r->plain);
    for (int i = 0; i < NUM_STAGES; i++)
        fprintf(json, "\"%s_ms\": %.3f, ", stage_names[i], 1e3 * r->stages[i]);
    fprintf(json,
            "\"peak_gflops\": %.2f, \"of_peak\": %.4f, \"kept_bytes\": %.0f, \"kept_share\": %.4f, "
            "\"workspace_bytes\": %.0f, \"dense_workspace_bytes\": %.0f}",
            1e-9 * r->peak, r->of_peak, r->kept_bytes, r->kept_share, r->workspace_bytes,
            r->dense_workspace_bytes);
}

int main(int argc, char** argv) {
    program_name = "moba";
    options_t options = {{1, 0, 0, 8, 8, 64, 0, 128, 8}, 1, 4096, NULL};
    const struct argp parser = {
        option_table, parse_option, NULL, "Times block-sparse attention on this machine.", NULL, NULL, NULL};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, NULL, &options);
    AttentionShape shape = options.shape;
    if (shape.G > shape.H) fail_usage("--kv-heads %d: must not exceed --query-heads %d", shape.G, shape.H);

    FILE* json = options.json_path ? open_or_fail(options.json_path, "w") : NULL;
    if (json)
        fprintf(json,
                "{\"precision\": \"%s\", \"threads\": %d, \"rounds\": %d, \"H\": %d, \"G\": %d, \"D\": %d, "
                "\"S\": %d, \"K\": %d, \"results\": [",
                PRECISION_NAME, omp_get_max_threads(), options.rounds, shape.H, shape.G, shape.D, shape.S,
                shape.K);
    printf("%d threads, %s, B 1, H %d, G %d, D %d, S %d, K %d; milliseconds of forward and backward\n",
           omp_get_max_threads(), PRECISION_NAME, shape.H, shape.G, shape.D, shape.S, shape.K);
    printf("                                            of flashmoba: forward        backward         %% of  "
           "kept "
           "by a layer   workspace of\n");
    printf(
        "     T     dense flashmoba  ratio      moba  router   local  routed   local  routed    peak      MB"
        "     %%    it MB  dense\n");
    const int num_lengths = shape.T ? 1 : (int)(sizeof(default_tokens) / sizeof(default_tokens[0]));
    for (int i = 0; i < num_lengths; i++) {
        if (options.shape.T == 0) shape.T = default_tokens[i];
        const result_t result = measure(&shape, options.rounds, shape.T <= options.plain);
        print_result(shape.T, &result);
        if (json) write_result(json, shape.T, &result, i == 0);
    }
    if (json) {
        fprintf(json, "\n]}\n");
        close_written_or_fail(json, options.json_path);
    }
    return 0;
}
