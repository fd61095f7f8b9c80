/*
Times attention, forward and backward, and compares its rate with that of a matrix product in the same
process.

    attention --json attention.json

GFLOP/s count the useful work: for every pair of query and visible key, two products of 2 D operations in the
forward pass and five in the backward pass. The peak is a product of two 2048 x 2048 matrices. The program
measures it before every round, because other work on the machine slows both.
*/
#include <argp.h>
// attention_forward, attention_backward, gemm
#include "dev/cpu/gqa.h"
// parse_number, new_random, median
#include "dev/bench/measure.h"

static const AttentionShape default_shapes[] = {
    {1, 1024, 0, 8, 8, 64, 0, 0, 0}, {1, 1024, 0, 8, 2, 64, 0, 0, 0},  {1, 4096, 0, 8, 8, 64, 0, 0, 0},
    {1, 4096, 0, 8, 2, 64, 0, 0, 0}, {1, 4096, 0, 8, 1, 64, 0, 0, 0},  {1, 4096, 0, 8, 8, 64, 256, 0, 0},
    {1, 4096, 0, 8, 8, 32, 0, 0, 0}, {1, 4096, 0, 8, 8, 128, 0, 0, 0},
};

typedef struct {
    int rounds;
    AttentionShape shape; // T = 0: the default shapes
    const char* json_path;
} options_t;

static const struct argp_option option_table[] = {
    {"json", 'j', "FILE", 0, "Also write the results to FILE as JSON", 0},
    {"rounds", 'r', "N", 0, "Rounds, of which the median counts (default 5)", 0},
    {"tokens", 't', "T", 0, "One shape instead of the table: tokens, and with it", 0},
    {"query-heads", 'q', "H", 0, "query heads (default 8)", 0},
    {"kv-heads", 'k', "G", 0, "key/value heads (default 8)", 0},
    {"head-dimension", 'd', "D", 0, "head dimension (default 64)", 0},
    {"window", 'w', "W", 0, "sliding window, 0 for none (default 0)", 0},
    {0, 0, 0, 0, 0, 0},
};

static error_t parse_option(int key, char* argument, struct argp_state* state) {
    options_t* options = (options_t*)state->input;
    switch (key) {
    case 'j':
        options->json_path = argument;
        return 0;
    case 'r':
        options->rounds = parse_number(argument, "rounds", 1);
        return 0;
    case 't':
        options->shape.T = parse_number(argument, "tokens", 1);
        return 0;
    case 'q':
        options->shape.H = parse_number(argument, "query-heads", 1);
        return 0;
    case 'k':
        options->shape.G = parse_number(argument, "kv-heads", 1);
        return 0;
    case 'd':
        options->shape.D = parse_number(argument, "head-dimension", 1);
        return 0;
    case 'w':
        options->shape.window = parse_number(argument, "window", 0);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

// ----------------------------------------------------------------------------
// Measuring

enum { PEAK_SIZE = 2048 };

// Operations a second of one large matrix product.
static double measure_peak(floatX* out, const floatX* a, const floatX* b) {
    const double start = omp_get_wtime();
    gemm(0, 1, PEAK_SIZE, PEAK_SIZE, PEAK_SIZE, a, PEAK_SIZE, b, PEAK_SIZE, 0, out, PEAK_SIZE);
    return 2.0 * PEAK_SIZE * PEAK_SIZE * PEAK_SIZE / (omp_get_wtime() - start);
}

typedef struct {
    double forward_seconds, backward_seconds;          // medians
    double rate;                                       // useful operations a second of both
    double peak;                                       // operations a second of the large product
    double of_peak, forward_of_peak, backward_of_peak; // medians of the quotients of each round
} result_t;

static double visible_pairs(const AttentionShape* shape) {
    double pairs = 0;
    for (int t = 0; t < shape->T; t++) pairs += t - first_visible_key(t, shape->window) + 1;
    return pairs;
}

static result_t measure(const AttentionShape* shape, int rounds, floatX* peak_out, const floatX* a,
                        const floatX* b) {
    const int T = shape->T, H = shape->H, G = shape->G, D = shape->D;
    const size_t qkv_count = (size_t)T * (H + 2 * G) * D, out_count = (size_t)T * H * D;
    floatX *qkv = new_random(qkv_count), *dout = new_random(out_count);
    void* forward_workspace = device_malloc(attention_forward_workspace(shape), "a workspace");
    void* backward_workspace = device_malloc(attention_backward_workspace(shape), "a workspace");
    int* kv_of_q = (int*)malloc_or_fail(sizeof(int) * (size_t)H, "the head map");
    for (int h = 0; h < H; h++) kv_of_q[h] = (int)((long)h * G / H);
    AttentionTensors x;
    memset(&x, 0, sizeof(x));
    x.out = new_random(out_count), x.lse = new_random((size_t)H * T), x.dqkv = new_random(qkv_count);
    x.qkv = qkv, x.kv_of_q = kv_of_q, x.dout = dout;

    double* times = (double*)malloc_or_fail(sizeof(double) * 6 * (size_t)rounds, "the times");
    double *forward = times, *backward = times + rounds, *peak = times + 2 * rounds;
    double *of_peak = times + 3 * rounds, *forward_of_peak = times + 4 * rounds,
           *backward_of_peak = times + 5 * rounds;
    const double operations = 4 * visible_pairs(shape) * D * H;
    for (int round = -1; round < rounds; round++) { // round -1 warms up
        const int r = round < 0 ? 0 : round;
        peak[r] = measure_peak(peak_out, a, b);
        x.workspace = forward_workspace;
        const double start = omp_get_wtime();
        attention_forward(&x, shape, 0);
        x.workspace = backward_workspace;
        const double middle = omp_get_wtime();
        attention_backward(&x, shape, 0);
        forward[r] = middle - start;
        backward[r] = omp_get_wtime() - middle;
        forward_of_peak[r] = operations / forward[r] / peak[r];
        backward_of_peak[r] = 2.5 * operations / backward[r] / peak[r];
        of_peak[r] = 3.5 * operations / (forward[r] + backward[r]) / peak[r];
    }
    result_t result;
    result.forward_seconds = median(forward, rounds);
    result.backward_seconds = median(backward, rounds);
    result.rate = 3.5 * operations / (result.forward_seconds + result.backward_seconds);
    result.peak = median(peak, rounds);
    result.of_peak = median(of_peak, rounds);
    result.forward_of_peak = median(forward_of_peak, rounds);
    result.backward_of_peak = median(backward_of_peak, rounds);
    device_free(qkv), device_free(dout), device_free(x.dqkv), device_free(x.out), device_free(x.lse);
    device_free(forward_workspace), device_free(backward_workspace), free(kv_of_q), free(times);
    return result;
}

// ----------------------------------------------------------------------------
// Reporting

static void print_result(const AttentionShape* s, const result_t* r) {
    printf("%6d %4d %4d %4d %7d %11.2f %11.2f %9.1f %9.1f %7.1f %7.1f %7.1f\n", s->T, s->H, s->G, s->D,
           s->window, 1e3 * r->forward_seconds, 1e3 * r->backward_seconds, 1e-9 * r->rate, 1e-9 * r->peak,
           100 * r->forward_of_peak, 100 * r->backward_of_peak, 100 * r->of_peak);
    fflush(stdout);
}

static void write_result(FILE* json, const AttentionShape* s, const result_t* r, int is_first) {
    fprintf(json,
            "%s\n    {\"T\": %d, \"H\": %d, \"G\": %d, \"D\": %d, \"window\": %d, \"forward_ms\": %.4f, "
            "\"backward_ms\": %.4f, \"gflops\": %.2f, \"peak_gflops\": %.2f, \"forward_of_peak\": %.4f, "
            "\"backward_of_peak\": %.4f, \"of_peak\": %.4f}",
            is_first ? "" : ",", s->T, s->H, s->G, s->D, s->window, 1e3 * r->forward_seconds,
            1e3 * r->backward_seconds, 1e-9 * r->rate, 1e-9 * r->peak, r->forward_of_peak,
            r->backward_of_peak, r->of_peak);
}

int main(int argc, char** argv) {
    program_name = "attention";
    options_t options = {5, {1, 0, 0, 8, 8, 64, 0, 0, 0}, NULL};
    const struct argp parser = {option_table, parse_option, NULL, "Times attention on this machine.",
                                NULL,         NULL,         NULL};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, NULL, &options);
    if (options.shape.G > options.shape.H)
        fail_usage("--kv-heads %d: must not exceed --query-heads %d", options.shape.G, options.shape.H);

    const AttentionShape* shapes = options.shape.T ? &options.shape : default_shapes;
    const int num_shapes = options.shape.T ? 1 : (int)(sizeof(default_shapes) / sizeof(default_shapes[0]));
    const size_t peak_count = (size_t)PEAK_SIZE * PEAK_SIZE;
    floatX *a = new_random(peak_count), *b = new_random(peak_count), *peak_out = new_random(peak_count);
    FILE* json = options.json_path ? open_or_fail(options.json_path, "w") : NULL;
    if (json) {
        fprintf(json, "{\"precision\": \"%s\", \"threads\": %d, \"rounds\": %d, \"results\": [",
                PRECISION_NAME, omp_get_max_threads(), options.rounds);
    }
    printf("%d threads, %s, B = 1; medians of %d rounds\n", omp_get_max_threads(), PRECISION_NAME,
           options.rounds);
    printf("                                                             useful      peak      %% of the "
           "peak\n");
    printf("     T    H    G    D  window  forward ms backward ms   GFLOP/s   GFLOP/s forward backw'd    "
           "both\n");
    for (int i = 0; i < num_shapes; i++) {
        const result_t result = measure(&shapes[i], options.rounds, peak_out, a, b);
        print_result(&shapes[i], &result);
        if (json) write_result(json, &shapes[i], &result, i == 0);
    }
    if (json) {
        fprintf(json, "\n]}\n");
        close_written_or_fail(json, options.json_path);
    }
    device_free(a), device_free(b), device_free(peak_out);
    return 0;
}
