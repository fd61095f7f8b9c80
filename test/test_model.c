/*
The whole model. An independent forward pass is written out below in double precision, token by token and without tiles; the
trainer's loss and logits are compared with it, and the trainer's gradients with its central differences. Built in fp64, where
the bounds are 1e-12 and 1e-6, and in fp32.
*/
#define TRAIN_GPT_NO_MAIN
#include "test/numeric.h"
#include "train_gpt.cu"

// ----------------------------------------------------------------------------
// The decoder of docs/math.md section 1, as plainly as it can be written

typedef struct {
    const Model* model; // sizes and offsets; its numbers are not used
    double* params;     // (elements)
    const int *tokens, *targets;
    int B, T;
    double* logits; // (B, T, V)
} Reference;

static void reference_norm(double* out, const double* x, const double* gain, int C, double eps) {
    double sum = dot(x, x, (size_t)C);
    for (int c = 0; c < C; c++) out[c] = x[c] / sqrt(sum / C + eps) * gain[c];
}

// out (rows) = weight (rows, columns) x
static void reference_product(double* out, const double* weight, const double* x, int rows, int columns) {
    for (int row = 0; row < rows; row++) out[row] = dot(weight + (size_t)row * columns, x, (size_t)columns);
}

static void reference_rotate(double* x, int t, int D, double theta) {
    for (int i = 0; i < D / 2; i++) {
        double angle = t * pow(theta, -2.0 * i / D), first = x[i], second = x[i + D / 2];
        x[i] = first * cos(angle) - second * sin(angle);
        x[i + D / 2] = first * sin(angle) + second * cos(angle);
    }
}

// The attention of one query head at position t over the packed rows (T, H + 2G, D) of its sequence.
static void reference_attend(double* out, const double* qkv, int t, int head, const ModelConfig* config,
                             int window) {
    const int H = config->heads, G = config->kv_heads, D = config->head_dim, width = (H + 2 * G) * D;
    const int group = head / (H / G), first = window > 0 && t - window + 1 > 0 ? t - window + 1 : 0;
    const double* query = qkv + (size_t)t * width + head * D;
    double total = 0;
    for (int d = 0; d < D; d++) out[d] = 0;
    for (int s = first; s <= t; s++) {
        const double *key = qkv + (size_t)s * width + (H + group) * D, *value = key + G * D;
        double weight = exp(dot(query, key, (size_t)D) / sqrt(D));
        total += weight;
        for (int d = 0; d < D; d++) out[d] += weight * value[d];
    }
    for (int d = 0; d < D; d++) out[d] /= total;
}

static void reference_layer(double* x, const Reference* reference, int l) {
    const Model* model = reference->model;
    const ModelConfig* config = &model->config;
    const LayerParameters* at = &model->layout.layers[l];
    const double* params = reference->params;
    const int T = reference->T, C = config->channels, H = config->heads, G = config->kv_heads,
              D = config->head_dim;
    const int F = config->ffn, width = (H + 2 * G) * D;
    double *norm = new_doubles((size_t)C), *qkv = new_doubles((size_t)T * width),
           *heads = new_doubles((size_t)H * D);
    double *branch = new_doubles((size_t)C), *gate_up = new_doubles((size_t)2 * F);
    for (int t = 0; t < T; t++) {
        reference_norm(norm, x + (size_t)t * C, params + at->input_norm, C, config->norm_eps);
        reference_product(qkv + (size_t)t * width, params + at->qkv_proj, norm, width, C);
        for (int head = 0; head < H + G && layer_has_rope(config, l); head++)
            reference_rotate(qkv + (size_t)t * width + head * D, t, D, config->rope_theta);
    }
    for (int t = 0; t < T; t++) {
        double* row = x + (size_t)t * C;
        for (int head = 0; head < H; head++)
            reference_attend(heads + head * D, qkv, t, head, config, layer_window(config, l));
        reference_product(branch, params + at->o_proj, heads, C, H * D);
        for (int c = 0; c < C; c++) row[c] += branch[c];
        reference_norm(norm, row, params + at->post_norm, C, config->norm_eps);
        reference_product(gate_up, params + at->gate_up_proj, norm, 2 * F, C);
        for (int f = 0; f < F; f++) gate_up[f] = gate_up[f] / (1 + exp(-gate_up[f])) * gate_up[F + f];
        reference_product(branch, params + at->down_proj, gate_up, C, F);
        for (int c = 0; c < C; c++) row[c] += branch[c];
    }
    free(norm);
    free(qkv);
    free(heads);
    free(branch);
    free(gate_up);
}

// The mean loss; fills reference->logits.
static double reference_loss(void* context) {
    Reference* reference = (Reference*)context;
    const Model* model = reference->model;
    const ModelConfig* config = &model->config;
    const int B = reference->B, T = reference->T, C = config->channels, V = config->vocab_size;
    double *x = new_doubles((size_t)T * C), *norm = new_doubles((size_t)C), loss = 0;
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++)
            memcpy(x + (size_t)t * C,
                   reference->params + model->layout.embedding + (size_t)reference->tokens[b * T + t] * C,
                   (size_t)C * sizeof(double));
        for (int l = 0; l < config->layers; l++) reference_layer(x, reference, l);
        for (int t = 0; t < T; t++) {
            double *logits = reference->logits + ((size_t)b * T + t) * V, sum = 0;
            reference_norm(norm, x + (size_t)t * C, reference->params + model->layout.final_norm, C,
                           config->norm_eps);
            reference_product(logits, reference->params + model->layout.head, norm, V, C);
            for (int v = 0; v < V; v++) sum += exp(logits[v]);
            loss += log(sum) - logits[reference->targets[b * T + t]];
        }
    }
    free(x);
    free(norm);
    return loss / ((double)B * T);
}

// ----------------------------------------------------------------------------
// Models of odd sizes

typedef struct {
    const char* name;
    int layers, channels, heads, kv_heads, head_dim, ffn, vocab_size, T;
    const char* pattern;
    int window, rope_global, rope_sliding, tied;
} Case;

static const Case cases[] = {
    {"one head, tied", 1, 8, 1, 1, 8, 12, 11, 5, "G", 1, 1, 1, 1},
    {"hybrid SG, GQA, no position in G, tied", 3, 20, 4, 2, 6, 17, 37, 13, "SG", 4, 0, 1, 1},
    {"hybrid SGG, MQA, untied", 3, 18, 3, 1, 10, 23, 29, 11, "SGG", 3, 1, 0, 0},
    {"multi-head, heads wider than channels, untied", 2, 12, 3, 3, 8, 9, 130, 9, "G", 1, 1, 1, 0},
    {"window of two, no position at all", 2, 16, 2, 2, 7, 8, 21, 7, "SG", 2, 0, 0, 1},
};
#define CASES ((int)(sizeof(cases) / sizeof(*cases)))
#define BATCH 2

typedef struct {
    Model model;
    Reference reference;
    int *tokens, *targets;
} Fixture;

static void set_up(Fixture* fixture, const Case* c) {
    ModelConfig config = model_config_from_descriptor("d1");
    config.layers = c->layers;
    config.channels = c->channels;
    config.heads = c->heads;
    config.kv_heads = c->kv_heads;
    config.head_dim = c->head_dim;
    config.ffn = c->ffn;
    config.vocab_size = c->vocab_size;
    config.sequence_length = c->T;
    strcpy(config.pattern, c->pattern);
    config.window = c->window;
    config.rope_global = c->rope_global;
    config.rope_sliding = c->rope_sliding;
    config.tied = c->tied;
    model_config_complete(&config);
    model_config_check(&config);

    Model* model = &fixture->model;
    gpt_plan(model, &config, BATCH, c->T, 1);
    gpt_allocate(model);
    gpt_initialize(model, 42);
    // Weights larger than a fresh model's, and gains other than 1, so that every term of a gradient counts.
    const TensorTable* table = &model->layout.table;
    double* params = new_doubles(table->elements);
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        int gain = tensor->initializer == INIT_ONES;
        double scale = gain ? 0.3 : 1.0 / sqrt((double)tensor->shape[1]);
        fill_normal(params + tensor->offset, NULL, tensor->count, scale, (uint64_t)i);
        for (size_t j = 0; j < tensor->count; j++) {
            if (gain) params[tensor->offset + j] = (double)(float)(1 + params[tensor->offset + j]);
            model->params[tensor->offset + j] = (floatX)params[tensor->offset + j];
        }
    }
    size_t rows = (size_t)BATCH * c->T;
    fixture->tokens = (int*)malloc_or_fail(rows * sizeof(int), "tokens");
    fixture->targets = (int*)malloc_or_fail(rows * sizeof(int), "targets");
    for (size_t i = 0; i < rows; i++) {
        fixture->tokens[i] = (int)(random_uniform(1, 1, i) * c->vocab_size);
        fixture->targets[i] = (int)(random_uniform(1, 2, i) * c->vocab_size);
    }
    Reference reference = {model,
                           params,
                           fixture->tokens,
                           fixture->targets,
                           BATCH,
                           c->T,
                           new_doubles(rows * (size_t)c->vocab_size)};
    fixture->reference = reference;
}

static void tear_down(Fixture* fixture) {
    gpt_free(&fixture->model);
    free(fixture->reference.params);
    free(fixture->reference.logits);
    free(fixture->tokens);
    free(fixture->targets);
}

// Logits of every row of the last forward pass, (rows, V).
static floatX* all_logits(Model* model, int rows) {
    const int C = model->config.channels, V = model->config.vocab_size, Vp = model->config.padded_vocab;
    floatX* logits = new_floats((size_t)rows * V);
    floatX* row = new_floats((size_t)Vp);
    for (int r = 0; r < rows; r++) {
        matmul_forward(row, model->acts.norm + (size_t)r * C, model->params + model->layout.head, 1, C, Vp,
                       0);
        memcpy(logits + (size_t)r * V, row, (size_t)V * sizeof(floatX));
    }
    free(row);
    return logits;
}

static double loss_and_gradients(Fixture* fixture, int first_row, int B, double total) {
    Model* model = &fixture->model;
    const int T = model->T;
    gpt_forward(model, fixture->tokens + first_row * T, B, T, 0, NULL);
    double sum = gpt_loss(model, fixture->targets + first_row * T, B, T, 1, (float_acc)(1 / total));
    gpt_backward(model, B, T);
    return sum / total;
}

// ----------------------------------------------------------------------------
// Tests

static void test_forward(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        const int rows = BATCH * cases[i].T;
        gpt_forward(&fixture.model, fixture.tokens, BATCH, cases[i].T, 0, NULL);
        floatX* logits = all_logits(&fixture.model, rows);
        double loss = gpt_loss(&fixture.model, fixture.targets, BATCH, cases[i].T, 0, 0) / rows;
        double want = reference_loss(&fixture.reference);
        assert_close(cases[i].name, logits, fixture.reference.logits, (size_t)rows * cases[i].vocab_size,
                     FORWARD_BOUND);
        assert_true(fabs(loss - want) <= FORWARD_BOUND * want);
        free(logits);
        tear_down(&fixture);
    }
}

// Every tensor of every case, a sample of elements each, against central differences of the reference.
static void test_gradients(void** state) {
    (void)state;
    enum { SAMPLE = 24 };
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        loss_and_gradients(&fixture, 0, BATCH, (double)BATCH * cases[i].T);
        const TensorTable* table = &fixture.model.layout.table;
        for (int k = 0; k < table->count; k++) {
            const Tensor* tensor = &table->tensors[k];
            double numeric[SAMPLE];
            floatX analytic[SAMPLE];
            size_t sample = tensor->count < SAMPLE ? tensor->count : SAMPLE;
            for (size_t j = 0; j < sample; j++) {
                size_t element = tensor->offset + random_permutation(5, (uint64_t)k, j, tensor->count);
                numeric[j] = central_difference(reference_loss, &fixture.reference,
                                                &fixture.reference.params[element]);
                analytic[j] = fixture.model.grads[element];
            }
            char what[192];
            snprintf(what, sizeof(what), "%s: %s", cases[i].name, tensor->name);
            assert_close(what, analytic, numeric, sample, GRADIENT_BOUND);
        }
        tear_down(&fixture);
    }
}

// The gradient along a random direction of all parameters at once: no element is left out.
typedef struct {
    Reference* reference;
    double *direction, *origin, step;
} Line;

static double loss_along_line(void* context) {
    Line* line = (Line*)context;
    for (size_t i = 0; i < line->reference->model->layout.table.elements; i++)
        line->reference->params[i] = line->origin[i] + line->step * line->direction[i];
    return reference_loss(line->reference);
}

static void test_directional_derivative(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        loss_and_gradients(&fixture, 0, BATCH, (double)BATCH * cases[i].T);
        const size_t elements = fixture.model.layout.table.elements;
        Line line = {&fixture.reference, new_doubles(elements), new_doubles(elements), 0};
        memcpy(line.origin, fixture.reference.params, elements * sizeof(double));
        double analytic = 0, length = 0;
        for (size_t j = 0; j < elements; j++) {
            // A direction that leans on the gradient, so that the sum is no small difference of large terms.
            line.direction[j] = (double)fixture.model.grads[j] * (1 + 0.5 * random_normal(3, 3, j));
            length += line.direction[j] * line.direction[j];
        }
        for (size_t j = 0; j < elements; j++) {
            line.direction[j] /= sqrt(length);
            analytic += line.direction[j] * (double)fixture.model.grads[j];
        }
        double numeric = central_difference(loss_along_line, &line, &line.step);
        assert_true(fabs(analytic - numeric) <= GRADIENT_BOUND * fabs(numeric));
        free(line.direction);
        free(line.origin);
        tear_down(&fixture);
    }
}

// Gradients of two micro-batches add up to those of one batch.
static void test_accumulation(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        const size_t elements = fixture.model.layout.table.elements;
        const double total = (double)BATCH * cases[i].T;
        double loss = loss_and_gradients(&fixture, 0, BATCH, total);
        double* want = new_doubles(elements);
        for (size_t j = 0; j < elements; j++) want[j] = (double)fixture.model.grads[j];
        gpt_zero_gradients(&fixture.model);
        double parts = loss_and_gradients(&fixture, 0, 1, total) + loss_and_gradients(&fixture, 1, 1, total);
        assert_close(cases[i].name, fixture.model.grads, want, elements, FORWARD_BOUND);
        assert_true(fabs(loss - parts) <= FORWARD_BOUND * loss);
        free(want);
        tear_down(&fixture);
    }
}

// Logits computed a few rows at a time give the same loss and gradients as all at once.
static void test_logit_rows(void** state) {
    (void)state;
    Fixture fixture;
    set_up(&fixture, &cases[1]);
    const size_t elements = fixture.model.layout.table.elements;
    const double total = (double)BATCH * cases[1].T;
    double loss = loss_and_gradients(&fixture, 0, BATCH, total);
    double* want = new_doubles(elements);
    for (size_t j = 0; j < elements; j++) want[j] = (double)fixture.model.grads[j];
    for (int some = 1; some <= 7; some += 2) {
        fixture.model.logit_rows = some;
        gpt_zero_gradients(&fixture.model);
        double again = loss_and_gradients(&fixture, 0, BATCH, total);
        assert_close("gradients", fixture.model.grads, want, elements, FORWARD_BOUND);
        assert_true(fabs(loss - again) <= FORWARD_BOUND * loss);
    }
    free(want);
    tear_down(&fixture);
}

// A generation that adds tokens to the cache, one or several at a time, gives the logits of a full forward pass.
static void test_incremental_forward(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        const int T = cases[i].T, V = cases[i].vocab_size;
        float* logits = (float*)malloc_or_fail((size_t)V * sizeof(float), "logits");
        floatX *scratch = new_floats((size_t)fixture.model.config.padded_vocab), *row = new_floats((size_t)V);
        reference_loss(&fixture.reference);
        for (int stride = 1; stride <= 3; stride++) {
            // What an earlier batch left must not matter: every layer's rows begin as NaN.
            for (int l = 0; l < cases[i].layers; l++)
                memset(fixture.model.acts.layers[l].qkv, 0xff,
                       (size_t)T * qkv_heads(&fixture.model.config) * cases[i].head_dim * sizeof(floatX));
            for (int done = 0; done < T; done += stride) {
                int now = done + stride < T ? done + stride : T;
                gpt_next_logits(&fixture.model, logits, fixture.tokens, now, done, scratch);
                for (int v = 0; v < V; v++) row[v] = (floatX)logits[v];
                // Sampling reads logits as floats in every build.
                assert_close(cases[i].name, row, fixture.reference.logits + (size_t)(now - 1) * V, (size_t)V,
                             1e-5);
            }
        }
        free(logits);
        free(scratch);
        free(row);
        tear_down(&fixture);
    }
}

// What stands in the padded rows of the vocabulary changes neither loss nor gradients, and has none itself.
static void test_padding(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        Model* model = &fixture.model;
        const size_t C = (size_t)cases[i].channels,
                     first = model->layout.head + (size_t)cases[i].vocab_size * C;
        const size_t end = model->layout.head + (size_t)model->config.padded_vocab * C;
        double loss = loss_and_gradients(&fixture, 0, BATCH, 1);
        for (size_t j = first; j < end; j++) {
            assert_true(model->grads[j] == 0);
            model->params[j] = 3;
        }
        assert_true(loss_and_gradients(&fixture, 0, BATCH, 1) == loss);
        tear_down(&fixture);
    }
}

// A changed token changes no earlier logit, and does change its own.
static void test_causality(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        const int T = cases[i].T, V = cases[i].vocab_size;
        gpt_forward(&fixture.model, fixture.tokens, 1, T, 0, NULL);
        floatX* before = all_logits(&fixture.model, T);
        for (int changed = 0; changed < T; changed++) {
            int kept = fixture.tokens[changed];
            fixture.tokens[changed] = (kept + 1) % V;
            gpt_forward(&fixture.model, fixture.tokens, 1, T, 0, NULL);
            floatX* after = all_logits(&fixture.model, T);
            assert_memory_equal(before, after, (size_t)changed * V * sizeof(floatX));
            assert_memory_not_equal(before + (size_t)changed * V, after + (size_t)changed * V,
                                    (size_t)V * sizeof(floatX));
            fixture.tokens[changed] = kept;
            free(after);
        }
        free(before);
        tear_down(&fixture);
    }
}

// The fresh weights: spread, gains, and independence of the table's order; the loss of a fresh model is that of guessing.
static void test_initialization(void** state) {
    (void)state;
    ModelConfig config = model_config_from_descriptor("d2");
    config.vocab_size = 500;
    config.sequence_length = 32;
    config.tied = 0;
    model_config_complete(&config);
    static Model model;
    gpt_plan(&model, &config, 1, 32, 1);
    gpt_allocate(&model);
    gpt_initialize(&model, 1);
    const TensorTable* table = &model.layout.table;
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        double sum = 0, squares = 0;
        for (size_t j = 0; j < tensor->count; j++) {
            double value = (double)model.params[tensor->offset + j];
            sum += value;
            squares += value * value;
        }
        double n = (double)tensor->count, std = sqrt(squares / n);
        if (tensor->initializer == INIT_ONES) {
            assert_true(sum == n);
            continue;
        }
        int residual = strstr(tensor->name, "o_proj") || strstr(tensor->name, "down_proj");
        double want = residual ? 0.02 / sqrt(2.0 * config.layers) : 0.02;
        assert_true(fabs(std / want - 1) < 4 / sqrt(2 * n));
        assert_true(fabs(sum / n) < 4 * want / sqrt(n));
    }
    int tokens[32], targets[32];
    for (int t = 0; t < 32; t++) tokens[t] = targets[t] = t * 7 % 500;
    gpt_forward(&model, tokens, 1, 32, 0, NULL);
    assert_true(fabs(gpt_loss(&model, targets, 1, 32, 0, 0) / 32 - log(500)) < 0.2);
    gpt_free(&model);
}

// The count of operations against a sum over every weight and every pair of query and key.
static void test_flops(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        const Case* c = &cases[i];
        const TensorTable* table = &fixture.model.layout.table;
        double weights = 0, pairs = 0;
        for (int k = 0; k < table->count; k++)
            if (table->tensors[k].dims == 2) weights += (double)table->tensors[k].count;
        if (!c->tied)
            weights -= (double)c->vocab_size * c->channels; // the embedding is looked up, not multiplied
        for (int l = 0; l < c->layers; l++)
            for (int t = 0; t < c->T; t++)
                for (int s = 0; s <= t; s++)
                    pairs += layer_window(&fixture.model.config, l) == 0 || t - s < c->window;
        double want = 6 * weights + 12.0 * c->heads * c->head_dim * pairs / c->T;
        assert_true(fabs(flops_per_token(&fixture.model.config, c->T) / want - 1) < 1e-12);
        tear_down(&fixture);
    }
}

// The optimizer reaches every tensor: matrices decay, gains do not, and a batch that is repeated is learnt.
static void test_update(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        Model* model = &fixture.model;
        const TensorTable* table = &model->layout.table;
        AdamW settings = {0.01f, 0.9f, 0.95f, 1e-8f, 0.5f, 1, 1};
        assert_true(gpt_update(model, settings) == 0);
        for (int k = 0; k < table->count; k++) {
            const Tensor* tensor = &table->tensors[k];
            const double kept = tensor->initializer == INIT_ONES ? 1 : 1 - 0.005;
            for (size_t j = tensor->offset; j < tensor->offset + tensor->count; j++)
                assert_true(fabs((double)model->params[j] - kept * fixture.reference.params[j]) < 1e-6);
        }
        double first = 0, last = 0;
        settings.weight_decay = 0;
        for (settings.step = 1; settings.step <= 100; settings.step++) {
            gpt_zero_gradients(model);
            last = loss_and_gradients(&fixture, 0, BATCH, (double)BATCH * cases[i].T);
            if (settings.step == 1) first = last;
            assert_true(gpt_update(model, settings) > 0);
        }
        assert_true(last < 0.5 * first);
        tear_down(&fixture);
    }
}

// Two tiny Llamas that transformers made and saved, with the logits that it computes for them in fp32.
static void test_transformers(void** state) {
    (void)state;
    const char* names[2] = {"untied", "tied"};
    for (int tied = 0; tied < 2; tied++) {
        char directory[PATH_MAX], path[PATH_MAX];
        path_format(directory, "test/fixtures/checkpoint/%s", names[tied]);
        ModelConfig config = checkpoint_read_config(directory);
        assert_int_equal(config.tied, tied);
        assert_true(config.rope_theta == (tied ? 10000.0f : 500.0f));
        float* expected;
        int *tokens, T, V;
        path_format(path, "%s/expected.safetensors", directory);
        logits_read(path, &expected, &tokens, &T, &V);
        assert_int_equal(V, config.vocab_size);
        static Model model;
        gpt_plan(&model, &config, 1, T, 0);
        gpt_allocate(&model);
        checkpoint_load_model(directory, &model.layout.table, model.params, model.stream);
        gpt_forward(&model, tokens, 1, T, 0, NULL);
        floatX* logits = all_logits(&model, T);
        double worst = 0;
        for (int i = 0; i < T * V; i++) worst = fmax(worst, fabs((double)logits[i] - (double)expected[i]));
        print_message("%s: largest difference from transformers' logits %.2g\n", names[tied], worst);
        assert_true(worst <= 1e-4);
        free(logits);
        free(expected);
        free(tokens);
        gpt_free(&model);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_directional_derivative),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_logit_rows),
        cmocka_unit_test(test_incremental_forward),
        cmocka_unit_test(test_padding),
        cmocka_unit_test(test_causality),
        cmocka_unit_test(test_initialization),
        cmocka_unit_test(test_flops),
        cmocka_unit_test(test_update),
        cmocka_unit_test(test_transformers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
