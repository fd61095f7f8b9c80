/*
Time of attention on a GPU, forward and backward, as a share of what matrix products reach on the same GPU in the same run.

    build/bench/attention_cuda_bf16 --json attention.json
    dev/bench/peers.py --attention attention.json             # PyTorch's on the same shapes, beside these

Each shape has 16384 tokens and 2048 channels of queries. TFLOP/s count the useful work: two products of 2 D operations for every
pair of query and visible key in the forward, five in the backward. Calls go round through as many sets of inputs as leave none in
the cache. The twin for CPUs is attention.c.
*/
#include <argp.h>
#include <omp.h>
#include "kernels/device.cuh"
#include "kernels/matmul.cuh"  // defines matmul_forward
#include "gqa.cuh"             // defines attention_forward, attention_backward
#include "dev/bench/measure.h" // defines parse_number, new_random, Mark, median

typedef struct {
    int B, T, H, G, D, window;
} Shape;

static const Shape default_shapes[] = {
    {8, 2048, 32, 32, 64, 0},    {4, 4096, 32, 32, 64, 0},   {2, 8192, 32, 32, 64, 0},
    {1, 16384, 32, 32, 64, 0},   {8, 2048, 16, 16, 128, 0},  {4, 4096, 16, 16, 128, 0},
    {2, 8192, 16, 16, 128, 0},   {1, 16384, 16, 16, 128, 0}, {2, 8192, 32, 8, 64, 0},
    {2, 8192, 32, 32, 64, 1024}, {16, 1024, 32, 32, 64, 0},
};

typedef struct {
    int rounds;
    Shape shape; // T = 0: the default shapes
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

// Operations a second of a large matrix product.
static double matmul_peak(int size) {
    const size_t count = (size_t)size * (size_t)size;
    floatX *a = new_random(count), *b = new_random(count), *c = new_random(count);
    enum { ROUNDS = 10 };
    double times[ROUNDS];
    Mark begun = mark_make(), done = mark_make();
    for (int round = -2; round < ROUNDS; round++) {
        mark(&begun, 0);
        matmul_forward(c, a, b, size, size, size, 0);
        mark(&done, 0);
        const double seconds = seconds_between(begun, done);
        if (round >= 0) times[round] = seconds;
    }
    mark_free(begun), mark_free(done);
    device_free(a), device_free(b), device_free(c);
    return 2.0 * size * size * size / median(times, ROUNDS);
}

static double visible_pairs(const Shape* shape) {
    const double T = shape->T, W = shape->window > 0 && shape->window < shape->T ? shape->window : T;
    return W * (W + 1) / 2 + (T - W) * W;
}

// What one call reads and writes.
typedef struct {
    floatX *qkv, *dqkv, *out, *dout;
    float_acc* lse;
} Buffers;

typedef struct {
    double forward_seconds, backward_seconds; // medians
    double rate, forward_rate, backward_rate; // useful operations a second
} Timing;

static Timing measure(const Shape* shape, int rounds) {
    const int B = shape->B, T = shape->T, H = shape->H, G = shape->G, D = shape->D, W = shape->window;
    const size_t rows = (size_t)B * (size_t)T, qkv = rows * (size_t)(H + 2 * G) * (size_t)D,
                 out = rows * (size_t)H * (size_t)D;
    const size_t cache = device_cache_bytes(), bytes = (qkv + out) * sizeof(floatX);
    enum { MOST_SETS = 16 };
    Buffers sets[MOST_SETS];
    const int wanted = 1 + (int)(2 * cache / bytes), count = wanted < MOST_SETS ? wanted : MOST_SETS;
    for (int i = 0; i < count; i++) {
        sets[i].qkv = new_random(qkv), sets[i].dqkv = new_random(qkv), sets[i].out = new_random(out),
        sets[i].dout = new_random(out);
        sets[i].lse = (float_acc*)device_malloc(rows * (size_t)H * sizeof(float_acc), "log-sum-exps");
    }
    const size_t forward_bytes = attention_forward_workspace(B, T, H, G, D),
                 backward_bytes = attention_backward_workspace(B, T, H, G, D);
    void* workspace =
        device_malloc(forward_bytes > backward_bytes ? forward_bytes : backward_bytes, "a workspace");
    int* map = (int*)malloc_or_fail(sizeof(int) * (size_t)H, "the head map");
    for (int h = 0; h < H; h++) map[h] = (int)((long)h * G / H);
    int* kv_of_q = (int*)device_malloc(sizeof(int) * (size_t)H, "the head map");
    copy_to_device(kv_of_q, map, sizeof(int) * (size_t)H, 0);

    double* times = (double*)malloc_or_fail(sizeof(double) * 2 * (size_t)rounds, "the times");
    double *forward = times, *backward = times + rounds;
    Mark begun = mark_make(), middle = mark_make(), done = mark_make();
    for (int round = -3; round < rounds; round++) { // the first ones warm up
        const Buffers* x = &sets[(round + 3) % count];
        mark(&begun, 0);
        attention_forward(x->out, x->lse, x->qkv, kv_of_q, workspace, B, T, 0, H, G, D, W, NULL, 0);
        mark(&middle, 0);
        attention_backward(x->dqkv, x->dout, x->out, x->lse, x->qkv, kv_of_q, workspace, B, T, H, G, D, W, 0);
        mark(&done, 0);
        const double seconds = seconds_between(middle, done);
        if (round < 0) continue;
        forward[round] = seconds_between(begun, middle);
        backward[round] = seconds;
    }
    mark_free(begun), mark_free(middle), mark_free(done);
    const double operations = 4 * visible_pairs(shape) * D * H * B;
    Timing timing;
    timing.forward_seconds = median(forward, rounds);
    timing.backward_seconds = median(backward, rounds);
    timing.forward_rate = operations / timing.forward_seconds;
    timing.backward_rate = 2.5 * operations / timing.backward_seconds;
    timing.rate = 3.5 * operations / (timing.forward_seconds + timing.backward_seconds);
    for (int i = 0; i < count; i++) {
        device_free(sets[i].qkv), device_free(sets[i].dqkv), device_free(sets[i].out),
            device_free(sets[i].dout);
        device_free(sets[i].lse);
    }
    device_free(workspace), device_free(kv_of_q), free(map), free(times);
    return timing;
}

// ----------------------------------------------------------------------------
// Reporting

static void print_timing(const Shape* s, const Timing* t, double peak) {
    printf("%4d %6d %4d %4d %4d %7d %11.3f %11.3f %9.1f %9.1f %9.1f %7.1f\n", s->B, s->T, s->H, s->G, s->D,
           s->window, 1e3 * t->forward_seconds, 1e3 * t->backward_seconds, 1e-12 * t->forward_rate,
           1e-12 * t->backward_rate, 1e-12 * t->rate, 100 * t->rate / peak);
    fflush(stdout);
}

static void write_timing(FILE* json, const Shape* s, const Timing* t, int is_first) {
    fprintf(json,
            "%s\n    {\"B\": %d, \"T\": %d, \"H\": %d, \"G\": %d, \"D\": %d, \"window\": %d, \"forward_ms\": "
            "%.5f, "
            "\"backward_ms\": %.5f, \"forward_tflops\": %.3f, \"backward_tflops\": %.3f, \"tflops\": %.3f}",
            is_first ? "" : ",", s->B, s->T, s->H, s->G, s->D, s->window, 1e3 * t->forward_seconds,
            1e3 * t->backward_seconds, 1e-12 * t->forward_rate, 1e-12 * t->backward_rate, 1e-12 * t->rate);
}

int main(int argc, char** argv) {
    program_name = "attention";
    Settings settings = {20, {1, 0, 32, 32, 64, 0}, NULL};
    const struct argp parser = {
        settings_table, settings_parse, NULL, "Times attention on this machine's GPU.", NULL, NULL, NULL};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, NULL, &settings);
    if (settings.shape.G > settings.shape.H)
        fail_usage("--kv-heads %d: must not exceed --query-heads %d", settings.shape.G, settings.shape.H);

    matmul_start();
    const Shape* shapes = settings.shape.T ? &settings.shape : default_shapes;
    const int count = settings.shape.T ? 1 : (int)(sizeof(default_shapes) / sizeof(default_shapes[0]));
    FILE* json = settings.json ? open_or_fail(settings.json, "w") : NULL;
    const double peak = matmul_peak(LARGE_PRODUCT);
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
