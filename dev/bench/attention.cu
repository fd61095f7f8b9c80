/*
Times attention on a GPU, forward and backward, and compares its rate with that of a matrix product in the
same run.

    build/bench/attention_cuda_bf16 --json attention.json
    dev/bench/peers.py --attention attention.json       # PyTorch's times for the same shapes, beside these

Each shape has 16384 tokens and 2048 channels of queries. TFLOP/s count the useful work: for every pair of
query and visible key, two products of 2 D operations in the forward pass and five in the backward pass. Calls
use several sets of inputs in turn, so the cache holds nothing of the next set. The twin for CPUs is
attention.c.
*/
#include <argp.h>
#include "kernels/device.cuh"
#include "gqa.cuh"              // defines attention_forward, attention_backward
#include "dev/bench/ceilings.h" // defines product_rate
#include "dev/bench/measure.h"  // defines parse_number, new_random, time_passes

static const AttentionShape default_shapes[] = {
    {8, 2048, 0, 32, 32, 64, 0, 0, 0},  {4, 4096, 0, 32, 32, 64, 0, 0, 0},
    {2, 8192, 0, 32, 32, 64, 0, 0, 0},  {1, 16384, 0, 32, 32, 64, 0, 0, 0},
    {8, 2048, 0, 16, 16, 128, 0, 0, 0}, {4, 4096, 0, 16, 16, 128, 0, 0, 0},
    {2, 8192, 0, 16, 16, 128, 0, 0, 0}, {1, 16384, 0, 16, 16, 128, 0, 0, 0},
    {2, 8192, 0, 32, 8, 64, 0, 0, 0},   {2, 8192, 0, 32, 32, 64, 1024, 0, 0},
    {16, 1024, 0, 32, 32, 64, 0, 0, 0},
};

typedef struct {
    int rounds;
    AttentionShape shape; // T = 0: the default shapes
    const char* json;
} Settings;

static const struct argp_option settings_table[] = {
    {"json", 'j', "FILE", 0, "Also write the results to FILE as JSON", 0},
    {"rounds", 'r', "N", 0, "Rounds, of which the median counts (default 20)", 0},
    {"tokens", 't', "T", 0, "One shape instead of the table: tokens, and with it", 0},
    {"batch", 'b', "B", 0, "sequences (default 1)", 0},
    {"query-heads", 'q', "H", 0, "query heads (default 32)", 0},
    {"kv-heads", 'k', "G", 0, "key/value heads (default 32)", 0},
    {"head-dimension", 'd', "D", 0, "head dimension (default 64)", 0},
    {"window", 'w', "W", 0, "sliding window, 0 for none (default 0)", 0},
    {0, 0, 0, 0, 0, 0},
};

static error_t settings_parse(int key, char* text, struct argp_state* state) {
    Settings* settings = (Settings*)state->input;
    switch (key) {
    case 'j':
        settings->json = text;
        return 0;
    case 'r':
        settings->rounds = parse_number(text, "rounds", 1);
        return 0;
    case 't':
        settings->shape.T = parse_number(text, "tokens", 1);
        return 0;
    case 'b':
        settings->shape.B = parse_number(text, "batch", 1);
        return 0;
    case 'q':
        settings->shape.H = parse_number(text, "query-heads", 1);
        return 0;
    case 'k':
        settings->shape.G = parse_number(text, "kv-heads", 1);
        return 0;
    case 'd':
        settings->shape.D = parse_number(text, "head-dimension", 1);
        return 0;
    case 'w':
        settings->shape.window = parse_number(text, "window", 0);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

// ----------------------------------------------------------------------------
// Measuring

static double visible_pairs(const AttentionShape* shape) {
    const double T = shape->T, W = shape->window > 0 && shape->window < shape->T ? shape->window : T;
    return W * (W + 1) / 2 + (T - W) * W;
}

// The tensors of one call, and those of them that are inputs, to free them.
typedef struct {
    AttentionTensors x;
    floatX *qkv, *dout;
} Buffers;

typedef struct {
    const AttentionShape* shape;
    Buffers sets[MOST_INPUT_SETS];
    int count;
    void* workspace;
    int* kv_of_q;
} Inputs;

static Inputs new_inputs(const AttentionShape* s) {
    const size_t rows = (size_t)s->B * (size_t)s->T, qkv = rows * (size_t)(s->H + 2 * s->G) * (size_t)s->D,
                 out = rows * (size_t)s->H * (size_t)s->D;
    Inputs inputs;
    inputs.shape = s;
    inputs.count = input_sets((qkv + out) * sizeof(floatX));
    const size_t forward_bytes = attention_forward_workspace(s),
                 backward_bytes = attention_backward_workspace(s);
    inputs.workspace =
        device_malloc(forward_bytes > backward_bytes ? forward_bytes : backward_bytes, "a workspace");
    inputs.kv_of_q = new_head_map(s->H, s->G);
    for (int i = 0; i < inputs.count; i++) {
        Buffers* buffers = &inputs.sets[i];
        AttentionTensors* x = &buffers->x;
        memset(x, 0, sizeof(*x));
        x->qkv = buffers->qkv = new_random(qkv), x->dqkv = new_random(qkv);
        x->out = new_random(out), x->dout = buffers->dout = new_random(out);
        x->lse = (float_acc*)device_malloc(rows * (size_t)s->H * sizeof(float_acc), "log-sum-exps");
        x->kv_of_q = inputs.kv_of_q, x->workspace = inputs.workspace;
    }
    return inputs;
}

static void free_inputs(Inputs* inputs) {
    for (int i = 0; i < inputs->count; i++) {
        Buffers* buffers = &inputs->sets[i];
        const AttentionTensors* x = &buffers->x;
        device_free(buffers->qkv), device_free(x->dqkv), device_free(x->out), device_free(buffers->dout);
        device_free(x->lse);
    }
    device_free(inputs->workspace), device_free(inputs->kv_of_q);
}

static void forward_pass(void* context, int set) {
    const Inputs* inputs = (const Inputs*)context;
    attention_forward(&inputs->sets[set].x, inputs->shape, 0);
}

static void backward_pass(void* context, int set) {
    const Inputs* inputs = (const Inputs*)context;
    attention_backward(&inputs->sets[set].x, inputs->shape, 0);
}

typedef struct {
    PassSeconds seconds;
    double rate, forward_rate, backward_rate; // useful operations a second
} Timing;

static Timing measure(const AttentionShape* shape, int rounds) {
    Inputs inputs = new_inputs(shape);
    const double operations = 4 * visible_pairs(shape) * shape->D * shape->H * shape->B;
    Timing timing;
    timing.seconds = time_passes(forward_pass, backward_pass, &inputs, inputs.count, rounds);
    timing.forward_rate = operations / timing.seconds.forward;
    timing.backward_rate = 2.5 * operations / timing.seconds.backward;
    timing.rate = 3.5 * operations / (timing.seconds.forward + timing.seconds.backward);
    free_inputs(&inputs);
    return timing;
}

// ----------------------------------------------------------------------------
// Reporting

static void print_timing(const AttentionShape* s, const Timing* t, double peak) {
    printf("%4d %6d %4d %4d %4d %7d %11.3f %11.3f %9.1f %9.1f %9.1f %7.1f\n", s->B, s->T, s->H, s->G, s->D,
           s->window, 1e3 * t->seconds.forward, 1e3 * t->seconds.backward, 1e-12 * t->forward_rate,
           1e-12 * t->backward_rate, 1e-12 * t->rate, 100 * t->rate / peak);
    fflush(stdout);
}

static void write_timing(FILE* json, const AttentionShape* s, const Timing* t, int is_first) {
    fprintf(json,
            "%s\n    {\"B\": %d, \"T\": %d, \"H\": %d, \"G\": %d, \"D\": %d, \"window\": %d, \"forward_ms\": "
            "%.5f, "
            "\"backward_ms\": %.5f, \"forward_tflops\": %.3f, \"backward_tflops\": %.3f, \"tflops\": %.3f}",
            is_first ? "" : ",", s->B, s->T, s->H, s->G, s->D, s->window, 1e3 * t->seconds.forward,
            1e3 * t->seconds.backward, 1e-12 * t->forward_rate, 1e-12 * t->backward_rate, 1e-12 * t->rate);
}

int main(int argc, char** argv) {
    program_name = "attention";
    Settings settings = {20, {1, 0, 0, 32, 32, 64, 0, 0, 0}, NULL};
    const struct argp parser = {
        settings_table, settings_parse, NULL, "Times attention on this machine's GPU.", NULL, NULL, NULL};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, NULL, &settings);
    if (settings.shape.G > settings.shape.H)
        fail_usage("--kv-heads %d: must not exceed --query-heads %d", settings.shape.G, settings.shape.H);

    matmul_start();
    const AttentionShape* shapes = settings.shape.T ? &settings.shape : default_shapes;
    const int count = settings.shape.T ? 1 : (int)(sizeof(default_shapes) / sizeof(default_shapes[0]));
    FILE* json = settings.json ? open_or_fail(settings.json, "w") : NULL;
    const double peak = product_rate(LARGE_PRODUCT);
    printf("%s %s, %s; medians of %d rounds; a matrix product of %d reaches %.1f TFLOP/s\n", DEVICE_NAME,
           device_name(), PRECISION_NAME, settings.rounds, LARGE_PRODUCT, 1e-12 * peak);
    printf("                                                                useful TFLOP/s            %% of "
           "the\n");
    printf(
        "   B      T    H    G    D  window  forward ms backward ms   forward  backward      both product\n");
    if (json)
        fprintf(json,
                "{\"device\": \"%s\", \"gpu\": \"%s\", \"precision\": \"%s\", \"rounds\": %d, "
                "\"matmul_tflops\": %.2f, \"results\": [",
                DEVICE_NAME, device_name(), PRECISION_NAME, settings.rounds, 1e-12 * peak);
    for (int i = 0; i < count; i++) {
        const Timing timing = measure(&shapes[i], settings.rounds);
        print_timing(&shapes[i], &timing, peak);
        if (json) write_timing(json, &shapes[i], &timing, i == 0);
    }
    if (json) {
        fprintf(json, "\n]}\n");
        close_written_or_fail(json, settings.json);
    }
    return 0;
}
