/*
Times a whole training step of one model: forward, loss, backward and update. It compares the rate with the
peak of matrix products, measured before and after in the same run, and on a GPU with the data sheet (MFU).

    build/bench/step                              a 124M model: 12 layers, 768 channels, V 50304, T 1024, B 4
    build/bench/step --model d6 --batch 8 --sequence-length 512 --steps 5 --json step.json
    build/bench/step --recompute layer            the time that --recompute costs
    build/bench/step_cuda_bf16 --batch 32         the same on a GPU

flops_per_token() of runtime/model.h counts the useful operations of a token; recomputation and padding do not
count. The program puts marks between the stages into the stream, so on a GPU the host runs ahead as in
training.
*/
#define TRAIN_GPT_NO_MAIN
#include <argp.h>
#include "train_gpt.cu"
#include "dev/bench/measure.h" // parse_number, new_random, Mark, median

typedef struct {
    const char *model, *json;
    int batch, sequence_length, vocab_size, kv_heads, steps;
    Recompute recompute;
} Settings;

static const struct argp_option settings_table[] = {
    {"model", 'e', "dN", 0, "descriptor (default d12)", 0},
    {"batch", 'b', "B", 0, "sequences (default 4)", 0},
    {"sequence-length", 't', "T", 0, "tokens of a sequence (default 1024)", 0},
    {"vocab", 'V', "V", 0, "vocabulary (default 50304)", 0},
    {"kv-heads", 'G', "G", 0, "key/value heads (default: as many as heads)", 0},
    {"steps", 'x', "N", 0, "timed steps; the median counts (default 3)", 0},
    {"recompute", 'r', "LEVEL", 0, "none, mlp or layer (default none)", 0},
    {"json", 'J', "FILE", 0, "write the result there too", 0},
    {0, 0, 0, 0, 0, 0},
};

static error_t settings_parse(int key, char* text, struct argp_state* state) {
    Settings* settings = (Settings*)state->input;
    switch (key) {
    case 'e':
        settings->model = text;
        break;
    case 'b':
        settings->batch = parse_number(text, "batch", 1);
        break;
    case 't':
        settings->sequence_length = parse_number(text, "sequence-length", 32);
        break;
    case 'V':
        settings->vocab_size = parse_number(text, "vocab", 2);
        break;
    case 'G':
        settings->kv_heads = parse_number(text, "kv-heads", 1);
        break;
    case 'x':
        settings->steps = parse_number(text, "steps", 1);
        break;
    case 'r':
        for (int level = 0; level < RECOMPUTE_LEVELS; level++)
            if (!strcmp(text, recompute_names[level])) settings->recompute = (Recompute)level;
        if (strcmp(text, recompute_names[settings->recompute]) != 0)
            fail_usage("--recompute %s: want none, mlp or layer", text);
        break;
    case 'J':
        settings->json = text;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

// The highest rate of the matrix sizes of a step, in operations a second: the ceiling for a step.
static double matmul_peak(void) {
    const int shapes[][3] = {{LARGE_PRODUCT, LARGE_PRODUCT, LARGE_PRODUCT},
                             {1024, 1024, 1024},
                             {4096, 2304, 768},
                             {4096, 4096, 768}};
    const int count = DEVICE_HAS_OWN_MEMORY ? 1 : 4; // a GPU is fastest at the largest
    const size_t most =
        (size_t)(count > 1 ? 4096 : LARGE_PRODUCT) * (size_t)(count > 1 ? 4096 : LARGE_PRODUCT);
    floatX *a = new_random(most), *b = new_random(most), *c = new_random(most);
    double best = 0;
    Mark begun = mark_make(), done = mark_make();
    for (int s = 0; s < count; s++) {
        for (int repeat = 0; repeat < 5; repeat++) {
            mark(&begun, 0);
            matmul_forward(c, a, b, shapes[s][0], shapes[s][2], shapes[s][1], 0);
            mark(&done, 0);
            double rate = 2.0 * shapes[s][0] * shapes[s][1] * shapes[s][2] / seconds_between(begun, done);
            if (rate > best) best = rate;
        }
    }
    mark_free(begun);
    mark_free(done);
    device_free(a);
    device_free(b);
    device_free(c);
    return best;
}

int main(int argc, char** argv) {
    Settings settings = {"d12", NULL, 4, 1024, 50304, 0, 3, RECOMPUTE_NONE};
    const struct argp parser = {settings_table, settings_parse, 0, "Times a training step.", 0, 0, 0};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, 0, &settings);
    const int B = settings.batch, T = settings.sequence_length;
    ModelConfig config = model_config_from_descriptor(settings.model);
    config.vocab_size = settings.vocab_size;
    config.kv_heads = settings.kv_heads;
    config.sequence_length = T;
    model_config_complete(&config);
    model_config_check(&config);

    matmul_start();
    double peak = matmul_peak();
    static Model model;
    gpt_plan(&model, &config, B, T, 1, settings.recompute, 0);
    gpt_allocate(&model);
    gpt_initialize(&model, 1);
    int* tokens = (int*)host_malloc_pinned((size_t)B * (T + 1) * sizeof(int), "tokens");
    for (int i = 0; i < B * (T + 1); i++)
        tokens[i] = (int)(random_uniform(2, 1, (uint64_t)i) * config.vocab_size);

    enum { FORWARD, LOSS, BACKWARD, UPDATE, STEP, STAGES };
    const char* names[STAGES] = {"forward", "head and loss", "backward", "update", "step"};
    double* times[STAGES];
    for (int i = 0; i < STAGES; i++)
        times[i] = (double*)malloc_or_fail((size_t)settings.steps * sizeof(double), "times");
    Mark at[STEP + 1];
    for (int i = 0; i <= STEP; i++) at[i] = mark_make();
    for (int step = -2; step < settings.steps; step++) { // the first two warm up
        mark(&at[FORWARD], model.stream);
        gpt_zero_gradients(&model);
        gpt_begin_step(&model, step + 2);
        const TrainingPass pass = {2, step + 2, 0, 1};
        gpt_forward(&model, tokens, B, T, 0, &pass);
        mark(&at[LOSS], model.stream);
        gpt_classify(&model, model.host_losses, tokens + 1, B, T, 1, 1.0f / (float)(B * T));
        mark(&at[BACKWARD], model.stream);
        gpt_backward(&model, B, T);
        mark(&at[UPDATE], model.stream);
        gpt_end_step(&model, step + 2, B);
        AdamW update = {1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 1, step + 3};
        gpt_update(&model, update);
        mark(&at[STEP], model.stream);
        stream_synchronize(model.stream);
        for (int i = 0; i < STEP && step >= 0; i++) times[i][step] = seconds_between(at[i], at[i + 1]);
        if (step >= 0) times[STEP][step] = seconds_between(at[FORWARD], at[STEP]);
    }
    for (int i = 0; i <= STEP; i++) mark_free(at[i]);
    // Generation: one token at a time, after half a sequence.
    enum { GENERATED = 16 };
    float* logits = (float*)malloc_or_fail((size_t)config.vocab_size * sizeof(float), "logits");
    floatX* scratch = (floatX*)malloc_or_fail((size_t)config.padded_vocab * sizeof(floatX), "logits");
    double token_seconds[GENERATED];
    gpt_next_logits(&model, logits, tokens, T / 2, 0, scratch);
    for (int i = 0; i < GENERATED && T / 2 + i < T; i++) {
        double begun = omp_get_wtime();
        gpt_next_logits(&model, logits, tokens, T / 2 + i + 1, T / 2 + i, scratch);
        token_seconds[i] = omp_get_wtime() - begun;
    }
    double peak_after = matmul_peak();
    if (peak_after > peak) peak = peak_after;

    const double flops = flops_per_token(&config, T) * B * T;
    double seconds[STAGES];
    for (int i = 0; i < STAGES; i++) seconds[i] = median(times[i], settings.steps);
    const double rate = flops / seconds[STEP];
    printf("%s, %.1f M parameters, B %d, T %d, V %d, recompute %s, %d threads, %s\n", settings.model,
           (double)table_parameter_count(&model.layout.table) / 1e6, B, T, config.vocab_size,
           recompute_names[settings.recompute], omp_get_max_threads(), PRECISION_NAME);
    for (int i = 0; i < STAGES; i++)
        printf("  %-14s %8.3f s  %5.1f %%\n", names[i], seconds[i], 100 * seconds[i] / seconds[STEP]);
    const ModelPlan plan = gpt_memory(&model);
    const double data_sheet = gpu_peak_flops(device_name(), PRECISION_NAME),
                 memory = (double)plan_model_bytes(&plan);
    printf("  %.0f tokens/s, %.2f TFLOP a step, %.1f GFLOP/s: %.1f %% of the matrix-product peak of %.1f "
           "GFLOP/s\n",
           B * T / seconds[STEP], flops / 1e12, rate / 1e9, 100 * rate / peak, peak / 1e9);
    if (data_sheet > 0)
        printf("  MFU %.1f %% of the %.0f TFLOP/s of %s\n", 100 * rate / data_sheet, data_sheet / 1e12,
               device_name());
    else if (device_name()[0])
        printf("  MFU unknown: %s in %s is not in the table\n", device_name(), PRECISION_NAME);
    printf("  %.1f MB for the model\n", memory / 1e6);
    printf("  generation: %.2f ms a token behind %d tokens\n", 1e3 * median(token_seconds, GENERATED), T / 2);
    if (settings.json) {
        FILE* file = open_or_fail(settings.json, "wb");
        fprintf(
            file,
            "{\"device\": \"%s\", \"gpu\": \"%s\", \"precision\": \"%s\", \"model\": \"%s\", \"batch\": %d, "
            "\"sequence_length\": %d, \"vocab\": %d, \"recompute\": \"%s\", \"threads\": %d, "
            "\"step_seconds\": %.6f, "
            "\"tokens_per_second\": %.1f, \"gflops\": %.2f, \"peak_gflops\": %.2f, \"fraction_of_peak\": "
            "%.4f, \"mfu\": ",
            DEVICE_NAME, device_name(), PRECISION_NAME, settings.model, B, T, config.vocab_size,
            recompute_names[settings.recompute], omp_get_max_threads(), seconds[STEP], B * T / seconds[STEP],
            rate / 1e9, peak / 1e9, rate / peak);
        fprintf(file, data_sheet > 0 ? "%.4f}\n" : "null}\n", rate / data_sheet);
        close_written_or_fail(file, settings.json);
    }
    for (int i = 0; i < STAGES; i++) free(times[i]);
    host_free_pinned(tokens);
    free(logits);
    free(scratch);
    gpt_free(&model);
    return 0;
}
