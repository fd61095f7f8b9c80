/*
Tests the whole model. This file has an independent forward pass in double precision, token by token and
without tiles. The test compares the trainer's loss and logits with it, and the trainer's gradients with its
central differences. The bounds are 1e-12 and 1e-6 in the fp64 build, and 1e-5 in the fp32 build.
*/
#define TRAIN_GPT_NO_MAIN
#include "test/numeric.h"
#include "train_gpt.cu"

// ----------------------------------------------------------------------------
// The decoder of docs/math.md section 1, as plainly as it can be written

typedef struct {
    const Model* model; // the test uses only its sizes and offsets
    double* params;     // (elements)
    const int *tokens, *targets;
    int B, T;
    double* logits;         // (B, T, V)
    double* raw_keys;       // (L, B, T, G D) before convolution and RoPE
    double noise_alpha;     // 0: no noise
    int constants_are_kept; // 1: the gradient's constants keep their values, 0: the pass computes them
    double* spread;         // (L, B, T, H) standard deviation of each head's output
    int* chosen;            // (L, B, T, H, CHOSEN) past blocks of each query, then -1; kept with the spread
} Reference;

enum { CHOSEN = 3 }; // K - 1 is at most this in the cases below

// These numbers are the keys of a training pass's noise.
enum { NOISE_SEED = 42, NOISE_STEP = 3 };

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

// Convolves key channel c at token t. The keys of two neighbouring tokens lie `width` elements apart.
static double reference_convolve(const double* keys, const double* taps, int count, int t, int width, int c) {
    double sum = 0;
    for (int l = 0; l < count; l++)
        if (t - l >= 0) sum += taps[l * width + c] * keys[(t - l) * width + c];
    return keys[t * width + c] + sum / (1 + exp(-sum));
}

// Adds the noise of the perturbed variant to a head's output (D), as a training pass does. The
// gradient treats the spread as a constant.
static void reference_noise(double* out, Reference* reference, int l, int b, int t, int head) {
    const int T = reference->T, H = reference->model->config.heads, D = reference->model->config.head_dim;
    const uint64_t row = ((uint64_t)b * T + t) * H + head;
    double* spread = &reference->spread[(uint64_t)l * reference->B * T * H + row];
    if (!reference->constants_are_kept) {
        double mean = 0, square = 0;
        for (int d = 0; d < D; d++) mean += out[d] / D;
        for (int d = 0; d < D; d++) square += (out[d] - mean) * (out[d] - mean) / D;
        *spread = sqrt(square);
    }
    for (int d = 0; d < D; d++)
        out[d] -= reference->noise_alpha * *spread *
                  random_normal(NOISE_SEED, noise_stream(NOISE_STEP, l), row * D + d);
}

// Selects the K - 1 past blocks whose mean key has the highest score with a query. At
// a tie, the more recent block comes first.
static void reference_choose(int* chosen, const double* qkv, int t, int head, int group,
                             const ModelConfig* config) {
    const int H = config->heads, D = config->head_dim, width = (H + 2 * config->kv_heads) * D,
              S = config->moba_block;
    double best[CHOSEN];
    for (int i = 0; i < CHOSEN; i++) chosen[i] = -1;
    for (int block = t / S - 1; block >= 0; block--) {
        double score = 0;
        for (int s = block * S; s < (block + 1) * S; s++)
            score += dot(qkv + (size_t)t * width + head * D, qkv + (size_t)s * width + (H + group) * D,
                         (size_t)D) /
                     S;
        int place = config->moba_topk - 1;
        while (place > 0 && (chosen[place - 1] < 0 || best[place - 1] < score)) place--;
        for (int i = config->moba_topk - 2; i > place; i--) {
            chosen[i] = chosen[i - 1];
            best[i] = best[i - 1];
        }
        if (place == config->moba_topk - 1) continue;
        chosen[place] = block;
        best[place] = score;
    }
}

// Returns whether the query at t may see the key at s. chosen is NULL in layers without blocks.
static int reference_sees(int t, int s, int window, int S, const int* chosen) {
    if (s > t || (window > 0 && t - s >= window)) return 0;
    if (!chosen || s / S == t / S) return 1;
    for (int i = 0; i < CHOSEN; i++)
        if (chosen[i] == s / S) return 1;
    return 0;
}

// Computes attention of one query head at position t, over the packed rows (T, H + 2G, D) of its sequence.
static void reference_attend(double* out, const double* qkv, int t, int head, int group,
                             const ModelConfig* config, int window, const int* chosen) {
    const int H = config->heads, G = config->kv_heads, D = config->head_dim, width = (H + 2 * G) * D;
    const double* query = qkv + (size_t)t * width + head * D;
    double total = 0;
    for (int d = 0; d < D; d++) out[d] = 0;
    for (int s = 0; s <= t; s++) {
        if (!reference_sees(t, s, window, config->moba_block, chosen)) continue;
        const double *key = qkv + (size_t)s * width + (H + group) * D, *value = key + G * D;
        double weight = exp(dot(query, key, (size_t)D) / sqrt(D));
        total += weight;
        for (int d = 0; d < D; d++) out[d] += weight * value[d];
    }
    for (int d = 0; d < D; d++) out[d] /= total;
}

static void reference_layer(double* x, Reference* reference, int l, int b) {
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
    double* raw_keys = reference->raw_keys + ((size_t)l * reference->B + b) * T * G * D;
    for (int t = 0; t < T; t++) {
        reference_norm(norm, x + (size_t)t * C, params + at->input_norm, C, config->norm_eps);
        reference_product(qkv + (size_t)t * width, params + at->qkv_proj, norm, width, C);
        memcpy(raw_keys + (size_t)t * G * D, qkv + (size_t)t * width + H * D, (size_t)G * D * sizeof(double));
        for (int c = 0; c < G * D && layer_taps(config, l); c++)
            qkv[t * width + H * D + c] =
                reference_convolve(raw_keys, params + at->k_conv, layer_taps(config, l), t, G * D, c);
        for (int head = 0; head < H + G && layer_has_rope(config, l); head++)
            reference_rotate(qkv + (size_t)t * width + head * D, t, D, config->rope_theta);
    }
    for (int t = 0; t < T; t++) {
        double* row = x + (size_t)t * C;
        for (int head = 0; head < H; head++) {
            int group = config->gqa == GQA_STATIC || config->gqa == GQA_PERTURBED
                            ? head / (H / G)
                            : model->heads.map[l * H + head];
            int* chosen = &reference->chosen[((((size_t)l * reference->B + b) * T + t) * H + head) * CHOSEN];
            if (layer_attention(config, l) == ATTENTION_DENSE) chosen = NULL;
            else if (!reference->constants_are_kept) reference_choose(chosen, qkv, t, head, group, config);
            reference_attend(heads + head * D, qkv, t, head, group, config, layer_window(config, l), chosen);
            if (reference->noise_alpha != 0) reference_noise(heads + head * D, reference, l, b, t, head);
        }
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

// Returns the mean loss, and fills reference->logits.
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
        for (int l = 0; l < config->layers; l++) reference_layer(x, reference, l, b);
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
    int kconv;
    GqaKind gqa;
    AttentionKind attention;
    int moba_block, moba_topk;
} Case;

static const Case cases[] = {
    {"one head, tied", 1, 8, 1, 1, 8, 12, 11, 5, "G", 1, 1, 1, 1, 0, GQA_STATIC, ATTENTION_DENSE, 1, 1},
    {"hybrid SG, GQA, no position in G, tied", 3, 20, 4, 2, 6, 17, 37, 13, "SG", 4, 0, 1, 1, 0, GQA_STATIC,
     ATTENTION_DENSE, 1, 1},
    {"hybrid SGG, MQA, untied", 3, 18, 3, 1, 10, 23, 29, 11, "SGG", 3, 1, 0, 0, 0, GQA_STATIC,
     ATTENTION_DENSE, 1, 1},
    {"multi-head, heads wider than channels, untied", 2, 12, 3, 3, 8, 9, 130, 9, "G", 1, 1, 1, 0, 0,
     GQA_STATIC, ATTENTION_DENSE, 1, 1},
    {"window of two, no position at all", 2, 16, 2, 2, 7, 8, 21, 7, "SG", 2, 0, 0, 1, 0, GQA_STATIC,
     ATTENTION_DENSE, 1, 1},
    {"three taps, hybrid SG, rope", 3, 16, 4, 2, 6, 10, 23, 9, "SG", 3, 1, 1, 1, 3, GQA_STATIC,
     ATTENTION_DENSE, 1, 1},
    {"five taps, heads by keys, untied", 2, 12, 6, 3, 4, 9, 19, 8, "G", 1, 0, 0, 0, 5, GQA_KEY,
     ATTENTION_DENSE, 1, 1},
    {"heads by the keys' history, hybrid GS", 3, 20, 5, 5, 4, 11, 17, 10, "GS", 4, 1, 1, 1, 0, GQA_DYNAMIC,
     ATTENTION_DENSE, 1, 1},
    {"noise on three taps, GQA", 2, 16, 4, 2, 8, 9, 13, 7, "SG", 3, 0, 1, 1, 3, GQA_PERTURBED,
     ATTENTION_DENSE, 1, 1},
    {"blocks of four, hybrid SG, GQA, no position in G", 3, 16, 4, 2, 6, 10, 23, 27, "SG", 3, 0, 1, 1, 0,
     GQA_STATIC, ATTENTION_FLASHMOBA, 4, 3},
    {"blocks by the original algorithm, five taps, rope", 2, 12, 3, 1, 8, 9, 19, 22, "G", 1, 1, 1, 0, 5,
     GQA_STATIC, ATTENTION_MOBA, 5, 2},
    {"blocks, three taps, heads by keys", 2, 16, 6, 3, 4, 11, 17, 21, "G", 1, 1, 1, 1, 3, GQA_KEY,
     ATTENTION_FLASHMOBA, 4, 2},
    {"blocks, heads by the keys' history", 2, 16, 4, 4, 6, 11, 17, 16, "SG", 5, 0, 1, 1, 0, GQA_DYNAMIC,
     ATTENTION_MOBA, 4, 4},
    {"dense first and last layer, blocks between, three taps", 4, 16, 4, 2, 6, 10, 23, 21, "DGGD", 1, 1, 1, 1,
     3, GQA_KEY, ATTENTION_FLASHMOBA, 4, 2},
    {"blocks and noise, T a multiple of S", 2, 12, 4, 2, 8, 9, 13, 12, "G", 1, 0, 0, 1, 5, GQA_PERTURBED,
     ATTENTION_FLASHMOBA, 4, 2},
};
#define CASES ((int)(sizeof(cases) / sizeof(*cases)))
#define BATCH 2

typedef struct {
    Model model;
    Reference reference;
    int *tokens, *targets;
    int step; // step of the next training pass
} Fixture;

static void set_up_recomputing(Fixture* fixture, const Case* c, Recompute recompute) {
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
    config.kconv = c->kconv;
    config.gqa = c->gqa;
    config.attention = c->attention;
    config.moba_block = c->moba_block;
    config.moba_topk = c->moba_topk;
    model_config_complete(&config);
    model_config_check(&config);

    Model* model = &fixture->model;
    gpt_plan(model, &config, BATCH, c->T, 1, recompute, 0);
    gpt_allocate(model);
    gpt_initialize(model, 42);
    // Weights larger than a fresh model's, and gains other than 1, so that every term of a gradient counts.
    const TensorTable* table = &model->layout.table;
    double* params = new_doubles(table->elements);
    for (int i = 0; i < table->count; i++) {
        const Tensor* tensor = &table->tensors[i];
        int gain = tensor->initializer == INIT_ONES;
        int taps = tensor->initializer == INIT_ZEROS;
        double scale = gain ? 0.3 : taps ? 0.7 : 1.0 / sqrt((double)tensor->shape[1]);
        fill_normal(params + tensor->offset, NULL, tensor->count, scale, (uint64_t)i);
        for (size_t j = 0; j < tensor->count; j++) {
            if (gain) params[tensor->offset + j] = (double)(float)(1 + params[tensor->offset + j]);
            model->params[tensor->offset + j] = (floatX)params[tensor->offset + j];
        }
    }
    // Maps as training makes them, also with KV heads that no query head reads.
    for (int l = 0; l < c->layers && heads_are_key_driven(&config); l++) {
        double weights[8];
        for (int g = 0; g < c->kv_heads; g++)
            weights[g] = pow(random_uniform(7, (uint64_t)l, (uint64_t)g), 3);
        assert_true(allocate_heads(model->heads.heads + l * c->kv_heads, weights, c->kv_heads, c->heads, 0));
        allocation_apply(&model->heads, l);
    }
    size_t rows = (size_t)BATCH * c->T;
    fixture->tokens = (int*)malloc_or_fail(rows * sizeof(int), "tokens");
    fixture->targets = (int*)malloc_or_fail(rows * sizeof(int), "targets");
    for (size_t i = 0; i < rows; i++) {
        fixture->tokens[i] = (int)(random_uniform(1, 1, i) * c->vocab_size);
        fixture->targets[i] = (int)(random_uniform(1, 2, i) * c->vocab_size);
    }
    Reference reference = {
        model,
        params,
        fixture->tokens,
        fixture->targets,
        BATCH,
        c->T,
        new_doubles(rows * (size_t)c->vocab_size),
        new_doubles(rows * c->layers * c->kv_heads * config.head_dim),
        0,
        0,
        new_doubles(rows * c->layers * c->heads),
        (int*)malloc_or_fail(rows * c->layers * c->heads * CHOSEN * sizeof(int), "chosen blocks")};
    fixture->reference = reference;
    fixture->step = NOISE_STEP;
}

static void set_up(Fixture* fixture, const Case* c) { set_up_recomputing(fixture, c, RECOMPUTE_NONE); }

static void tear_down(Fixture* fixture) {
    gpt_free(&fixture->model);
    free(fixture->reference.params);
    free(fixture->reference.logits);
    free(fixture->reference.raw_keys);
    free(fixture->reference.spread);
    free(fixture->reference.chosen);
    free(fixture->tokens);
    free(fixture->targets);
}

// Returns the logits of all rows of the last forward pass, (rows, V).
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

#define NOISE_ALPHA 0.5

static double loss_and_gradients(Fixture* fixture, int first_row, int B, double total) {
    Model* model = &fixture->model;
    const int T = model->T;
    const TrainingPass pass = {NOISE_SEED, fixture->step, first_row, NOISE_ALPHA};
    gpt_forward(model, fixture->tokens + first_row * T, B, T, 0, &pass);
    double sum = gpt_loss(model, fixture->targets + first_row * T, B, T, 1, (float_acc)(1 / total));
    gpt_backward(model, B, T);
    return sum / total;
}

// From here on, the reference computes a training pass with noise. It differentiates as the model does: the
// spread of the noise and the selection of blocks are constants.
static void freeze_constants(Fixture* fixture) {
    if (fixture->model.config.gqa == GQA_PERTURBED) fixture->reference.noise_alpha = NOISE_ALPHA;
    reference_loss(&fixture->reference);
    fixture->reference.constants_are_kept = 1;
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

// Compares the loss, and the gradients of up to `sample` elements of each tensor, with the reference.
// Rounding error is relative to the terms of a sum. A few elements whose terms cancel say little
// about fp32, so the sample there is large.
static void check_gradients(const Case* c, size_t sample) {
    enum { MOST = 256 };
    Fixture fixture;
    set_up(&fixture, c);
    freeze_constants(&fixture);
    double loss = loss_and_gradients(&fixture, 0, BATCH, (double)BATCH * c->T);
    double want = reference_loss(&fixture.reference);
    assert_true(fabs(loss - want) <= FORWARD_BOUND * want);
    const TensorTable* table = &fixture.model.layout.table;
    for (int k = 0; k < table->count; k++) {
        const Tensor* tensor = &table->tensors[k];
        double numeric[MOST];
        floatX analytic[MOST];
        size_t count = tensor->count < sample ? tensor->count : sample;
        for (size_t j = 0; j < count; j++) {
            size_t element = tensor->offset + random_permutation(5, (uint64_t)k, j, tensor->count);
            numeric[j] =
                central_difference(reference_loss, &fixture.reference, &fixture.reference.params[element]);
            analytic[j] = fixture.model.grads[element];
        }
        char what[256];
        snprintf(what, sizeof(what), "%s: %s", c->name, tensor->name);
        assert_close(what, analytic, numeric, count, GRADIENT_BOUND);
    }
    tear_down(&fixture);
}

static void test_gradients(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) check_gradients(&cases[i], 24);
}

// Every kind of attention, of heads and of convolution, with and without positions. The sequence length is a
// multiple of the block, or not: ATTN x GQA x KCONV x {rope, none} x {8, 9}.
static void test_gradients_of_variants(void** state) {
    (void)state;
    const AttentionKind attentions[3] = {ATTENTION_DENSE, ATTENTION_MOBA, ATTENTION_FLASHMOBA};
    const GqaKind kinds[4] = {GQA_STATIC, GQA_KEY, GQA_DYNAMIC, GQA_PERTURBED};
    const int taps[3] = {0, 3, 5}, T[2] = {8, 9}, block = 2, topk = 2;
    for (int i = 0; i < 3 * 4 * 3 * 2 * 2; i++) {
        const int rope = i % 2;
        char name[96];
        Case c = {name,
                  1,
                  6,
                  4,
                  2,
                  4,
                  5,
                  7,
                  T[i / 2 % 2],
                  "G",
                  1,
                  rope,
                  rope,
                  1,
                  taps[i / 4 % 3],
                  kinds[i / 12 % 4],
                  attentions[i / 48],
                  block,
                  topk};
        snprintf(name, sizeof(name), "attention %d, heads %d, %d taps, rope %d, T %d", (int)c.attention,
                 (int)c.gqa, c.kconv, rope, c.T);
        check_gradients(&c, 256);
    }
}

// The derivative along a random direction of all parameters at once, so that no element is left out.
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
        freeze_constants(&fixture);
        loss_and_gradients(&fixture, 0, BATCH, (double)BATCH * cases[i].T);
        const size_t elements = fixture.model.layout.table.elements;
        Line line = {&fixture.reference, new_doubles(elements), new_doubles(elements), 0};
        memcpy(line.origin, fixture.reference.params, elements * sizeof(double));
        double analytic = 0, length = 0;
        for (size_t j = 0; j < elements; j++) {
            // The direction leans towards the gradient, so that the sum is not a
            // small difference of large terms.
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

// The gradients of two micro-batches must add up to the gradients of one batch.
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

// Logits that are computed a few rows at a time must give the same loss and gradients as all rows at once.
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

// A generation adds one or several tokens at a time to the cache. It must give the
// logits of a full forward pass.
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
            // Data of an earlier batch must have no effect, so every layer's rows begin as NaN.
            for (int l = 0; l < cases[i].layers; l++) {
                const LayerActivations* layer = &fixture.model.acts.layers[l];
                const size_t bytes = (size_t)T * cases[i].head_dim * sizeof(floatX);
                memset(layer->qkv, 0xff, bytes * qkv_heads(&fixture.model.config));
                if (layer->raw_keys) memset(layer->raw_keys, 0xff, bytes * cases[i].kv_heads);
            }
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

// ----------------------------------------------------------------------------
// Recomputation in backward

// Returns the bytes that an array of `count` elements takes in the block of activations.
static size_t in_block(size_t count, size_t element) {
    return (count * element + ARENA_ALIGNMENT - 1) / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
}

// Returns the bytes that --recompute saves: every recomputed array exists once, not once for each layer.
static size_t saved_bytes(const Case* c, Recompute recompute) {
    const size_t rows = (size_t)BATCH * c->T, x = sizeof(floatX), acc = sizeof(float_acc);
    const size_t H = c->heads, G = c->kv_heads, D = c->head_dim, C = c->channels, F = c->ffn;
    size_t global = 0, choosing = 0, bytes = 0;
    for (int l = 0; l < c->layers; l++) {
        const char kind = c->pattern[l % (int)strlen(c->pattern)];
        global += kind != 'S';
        choosing += kind == 'G';
    }
    const size_t others = c->layers - 1;
    if (recompute >= RECOMPUTE_MLP) bytes += others * (in_block(rows * 2 * F, x) + in_block(rows * F, x));
    if (recompute < RECOMPUTE_LAYER) return bytes;
    bytes += others * (3 * in_block(rows * C, x) + 2 * in_block(rows, acc));
    bytes += others * in_block(rows * (H + 2 * G) * D, x);
    if (c->kconv) bytes += (global - 1) * in_block(rows * G * D, x);
    if (c->attention != ATTENTION_DENSE)
        bytes +=
            (choosing - 1) * in_block(moba_centroids_count(BATCH, c->T, (int)G, (int)D, c->moba_block), acc);
    return bytes;
}

// Compares two micro-batches with this level of --recompute to a model that keeps
// everything. Loss, gradients, maps and their statistics, queries and keys of a layer, and
// the next logits of a generation must agree.
static void must_recompute_the_same(const Case* c, Recompute recompute) {
    Fixture kept, again;
    set_up(&kept, c);
    set_up_recomputing(&again, c, recompute);
    Model *want = &kept.model, *got = &again.model;
    assert_int_equal(want->activations.bytes - got->activations.bytes, saved_bytes(c, recompute));
    if (c->gqa == GQA_KEY) want->heads.settings.source = got->heads.settings.source = SOURCE_FORWARD;
    const double total = (double)BATCH * c->T;
    for (int b = 0; b < BATCH; b++) {
        const double loss = loss_and_gradients(&kept, b, 1, total);
        assert_true(loss == loss_and_gradients(&again, b, 1, total));
    }
    assert_memory_equal(want->grads, got->grads, want->layout.table.elements * sizeof(float_acc));
    assert_memory_equal(want->acts.key_sums, got->acts.key_sums,
                        (size_t)c->layers * c->kv_heads * sizeof(float_acc));
    assert_memory_equal(want->heads.map, got->heads.map, (size_t)c->layers * c->heads * sizeof(int));

    gpt_forward(want, kept.tokens, BATCH, c->T, 0, NULL);
    gpt_forward(got, again.tokens, BATCH, c->T, 0, NULL);
    for (int l = 0; l < c->layers; l++) {
        layer_qkv_again(got, l, BATCH, c->T);
        assert_memory_equal(want->acts.layers[l].qkv, got->acts.layers[l].qkv,
                            (size_t)BATCH * c->T * qkv_heads(&want->config) * c->head_dim * sizeof(floatX));
    }
    // Generation agrees only up to rounding: one model computes a row for each token, the other
    // all rows again (docs/math.md section 6).
    const size_t V = (size_t)c->vocab_size;
    float* logits = (float*)malloc_or_fail(V * sizeof(float), "logits");
    floatX *next_again = new_floats(V), *scratch = new_floats((size_t)want->config.padded_vocab);
    double* next = new_doubles(V);
    for (int T = 1; T <= c->T; T++) {
        gpt_next_logits(want, logits, kept.tokens, T, T - 1, scratch);
        for (size_t v = 0; v < V; v++) next[v] = (double)logits[v];
        gpt_next_logits(got, logits, again.tokens, T, T - 1, scratch);
        for (size_t v = 0; v < V; v++) next_again[v] = (floatX)logits[v];
        assert_close("generation that computes again", next_again, next, V, 1e-5);
    }
    free(logits);
    free(next);
    free(next_again);
    free(scratch);
    tear_down(&kept);
    tear_down(&again);
}

// Covers every kind of attention, of heads and of convolution, and the layer patterns of all other cases.
static void test_recompute_changes_no_bit(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        must_recompute_the_same(&cases[i], RECOMPUTE_MLP);
        must_recompute_the_same(&cases[i], RECOMPUTE_LAYER);
    }
    for (int i = 0; i < 3 * 4 * 3; i++) {
        const int taps = i % 3 == 0 ? 0 : 1 + 2 * (i % 3);
        const Case c = {"variant",
                        4,
                        16,
                        6,
                        3,
                        4,
                        11,
                        17,
                        21,
                        "SGG",
                        5,
                        1,
                        0,
                        1,
                        taps,
                        (GqaKind)(i / 3 % 4),
                        (AttentionKind)(i / 12),
                        4,
                        2};
        must_recompute_the_same(&c, RECOMPUTE_MLP);
        must_recompute_the_same(&c, RECOMPUTE_LAYER);
    }
}

// ----------------------------------------------------------------------------
// Query heads that follow the keys

// Computes the statistic (L, G) of the reference's last pass, over sequences first to first + count - 1.
static void reference_statistic(double* n, const Reference* reference, int first, int count) {
    const ModelConfig* config = &reference->model->config;
    const int T = reference->T, G = config->kv_heads, D = config->head_dim;
    for (int i = 0; i < config->layers * G; i++) {
        n[i] = 0;
        for (int b = first; b < first + count; b++) {
            const double* keys =
                reference->raw_keys + ((size_t)(i / G) * reference->B + b) * T * G * D + i % G * D;
            double sum = 0;
            for (int t = 0; t < T; t++) sum += dot(keys + t * G * D, keys + t * G * D, (size_t)D);
            n[i] += sqrt(sum / (T * D)) / count;
        }
    }
}

static void must_be_near(const char* what, const double* got, const double* want, int count) {
    for (int i = 0; i < count; i++) {
        if (fabs(got[i] - want[i]) > FORWARD_BOUND * want[i])
            print_error("%s: %.17g, want %.17g\n", what, got[i], want[i]);
        assert_true(fabs(got[i] - want[i]) <= FORWARD_BOUND * want[i]);
    }
}

// The maps of all layers must be those of kdgqa for the statistic n (L, G).
static void must_follow(const Model* model, const double* n, int least) {
    const int G = model->config.kv_heads, H = model->config.heads;
    for (int l = 0; l < model->config.layers; l++) {
        double weights[8];
        int heads[8], map[16];
        weights_of_range(weights, n + l * G, G);
        allocate_heads(heads, weights, G, H, least);
        map_from_allocation(map, heads, G);
        assert_memory_equal(model->heads.map + l * H, map, (size_t)H * sizeof(int));
    }
}

// Three steps of two micro-batches each, with every source. The test checks the measured
// statistic, the step at which it becomes a map, and that the loss uses this map. Evaluation and
// generation in between must change nothing.
static void test_maps_follow_the_keys(void** state) {
    (void)state;
    const StatisticSource sources[3] = {SOURCE_LAGGED, SOURCE_FORWARD, SOURCE_WEIGHTS};
    const Case c = {"maps", 2, 16, 12, 4, 6, 9, 19, 7, "SG", 3, 1, 1, 1, 3, GQA_KEY, ATTENTION_DENSE, 1, 1};
    enum { L = 2, G = 4, H = 12, D = 6 };
    for (int k = 0; k < 3; k++) {
        Fixture fixture;
        set_up(&fixture, &c);
        Model* model = &fixture.model;
        model->heads.settings.source = sources[k];
        model->heads.settings.least = k == 0 ? 1 : 0;
        int moved = 0;
        for (int step = 0; step < 3; step++) {
            double before[L * G], n[L * G];
            int maps[L * H];
            memcpy(before, model->heads.statistic, sizeof(before));
            memcpy(maps, model->heads.map, sizeof(maps));
            gpt_zero_gradients(model);
            gpt_begin_step(model, step);
            if (sources[k] == SOURCE_LAGGED && step > 0) must_follow(model, before, 1);
            if (sources[k] == SOURCE_LAGGED && step == 0)
                assert_memory_equal(model->heads.map, maps, sizeof(maps));
            for (int i = 0; i < L * G && sources[k] == SOURCE_WEIGHTS; i++) {
                const LayerParameters* at = &model->layout.layers[i / G];
                n[i] = 0;
                for (int j = 0; j < D * c.channels; j++)
                    n[i] +=
                        pow((double)model->params[at->qkv_proj + (size_t)(H + i % G) * D * c.channels + j] *
                                (double)model->params[at->input_norm + j % c.channels],
                            2);
                n[i] = sqrt(n[i]);
            }
            if (sources[k] == SOURCE_WEIGHTS) {
                must_be_near("weights", model->heads.statistic, n, L * G);
                must_follow(model, n, 0);
            }
            double loss = 0;
            for (int micro = 0; micro < BATCH; micro++) {
                loss += loss_and_gradients(&fixture, micro, 1, (double)BATCH * c.T);
                reference_loss(&fixture.reference);
                reference_statistic(n, &fixture.reference, micro, 1);
                if (sources[k] == SOURCE_FORWARD) must_follow(model, n, 0);
            }
            const double want = reference_loss(&fixture.reference);
            if (sources[k] != SOURCE_FORWARD) assert_true(fabs(loss - want) <= FORWARD_BOUND * want);
            gpt_end_step(model, step, BATCH);
            reference_statistic(n, &fixture.reference, 0, BATCH);
            // With a map for each micro-batch, only the reference computes the
            // second layer's keys with the second map.
            if (sources[k] != SOURCE_WEIGHTS)
                must_be_near("statistic", model->heads.statistic, n,
                             sources[k] == SOURCE_FORWARD ? G : L * G);

            AdamW settings = {0.05f, 0.9f, 0.95f, 1e-8f, 0, 1, step + 1};
            gpt_update(model, settings);
            for (size_t j = 0; j < model->layout.table.elements; j++)
                fixture.reference.params[j] = (double)model->params[j];

            float logits[32];
            floatX scratch[128];
            memcpy(maps, model->heads.map, sizeof(maps));
            memcpy(before, model->heads.statistic, sizeof(before));
            float_acc sums[L * G];
            memcpy(sums, model->acts.key_sums, sizeof(sums));
            gpt_forward(model, fixture.tokens, BATCH, c.T, 0, NULL);
            gpt_next_logits(model, logits, fixture.tokens, 1, 0, scratch);
            gpt_next_logits(model, logits, fixture.tokens, 4, 1, scratch);
            assert_memory_equal(model->heads.map, maps, sizeof(maps));
            assert_memory_equal(model->heads.statistic, before, sizeof(before));
            assert_memory_equal(model->acts.key_sums, sums, sizeof(sums));
            for (int l = 0; l < L; l++) moved += (int)model->heads.moved[l];
        }
        assert_true(moved > 0);
        tear_down(&fixture);
    }
}

// Histories of both kinds of dgqa from the model's own statistics, with a window of two
// steps. Here forward measures whole batches.
static void test_dgqa_takes_windows(void** state) {
    (void)state;
    const StatisticSource sources[3] = {SOURCE_LAGGED, SOURCE_FORWARD, SOURCE_WEIGHTS};
    const Case c = {"windows",       2, 16, 12, 4, 6, 9, 19, 7, "G", 1, 1, 1, 1, 0, GQA_DYNAMIC,
                    ATTENTION_DENSE, 1, 1};
    enum { L = 2, G = 4, H = 12 };
    for (int k = 0; k < 6; k++) {
        const StatisticSource source = sources[k % 3];
        const int diff = k >= 3;
        Fixture fixture;
        set_up(&fixture, &c);
        Model* model = &fixture.model;
        HeadAllocation* heads = &model->heads;
        heads->settings.source = source;
        heads->settings.kind = diff ? DGQA_DIFF : DGQA_EMA;
        heads->settings.window = 2;
        double history[L * G] = {0}, weights[L * G];
        int windows = 0;
        for (int step = 0; step < 6; step++) {
            double lagged[L * G];
            memcpy(lagged, heads->statistic, sizeof(lagged));
            gpt_zero_gradients(model);
            gpt_begin_step(model, step);
            fixture.step = step;
            loss_and_gradients(&fixture, 0, BATCH, (double)BATCH * c.T);
            gpt_end_step(model, step, BATCH);
            const double* n = source == SOURCE_LAGGED ? lagged : heads->statistic;
            if (step % 2 == 0 && (step > 0 || source != SOURCE_LAGGED)) {
                for (int i = 0; i < L * G; i++) {
                    double average = windows ? 0.9 * history[i] + (1 - 0.9) * n[i] : n[i];
                    weights[i] = diff ? fabs(n[i] - history[i]) : average;
                    history[i] = diff ? n[i] : average;
                }
                windows++;
            }
            assert_int_equal(heads->windows[0], windows);
            for (int i = 0; i < L * G; i++) // equal, except if the compiler fuses product and sum
                assert_true(fabs(heads->history[i] - history[i]) <= 1e-14 * history[i]);
            for (int l = 0; l < L && windows > diff; l++) {
                int want[G];
                allocate_heads(want, weights + l * G, G, H, 1);
                assert_memory_equal(heads->heads + l * G, want, sizeof(want));
            }
            AdamW settings = {0.05f, 0.9f, 0.95f, 1e-8f, 0, 1, step + 1};
            gpt_update(model, settings);
        }
        assert_int_equal(windows, source == SOURCE_LAGGED ? 2 : 3);
        tear_down(&fixture);
    }
}

// Without a training pass, and with alpha 0, the perturbed model must equal the plain one bitwise. With noise
// it differs, and differently in each step.
static void test_noise_is_for_training_only(void** state) {
    (void)state;
    Case plain = cases[CASES - 1];
    assert_int_equal(plain.gqa, GQA_PERTURBED);
    plain.gqa = GQA_STATIC;
    Fixture noisy, clean;
    set_up(&noisy, &cases[CASES - 1]);
    set_up(&clean, &plain);
    const int T = plain.T, rows = BATCH * T;
    const size_t bytes = (size_t)rows * plain.vocab_size * sizeof(floatX);
    gpt_forward(&clean.model, clean.tokens, BATCH, T, 0, NULL);
    floatX *want = all_logits(&clean.model, rows), *last = NULL;
    for (int i = 0; i < 4; i++) {
        const TrainingPass pass = {NOISE_SEED, i, 0, i < 2 ? 0 : 1};
        gpt_forward(&noisy.model, noisy.tokens, BATCH, T, 0, i == 0 ? NULL : &pass);
        floatX* logits = all_logits(&noisy.model, rows);
        if (i < 2) assert_memory_equal(logits, want, bytes);
        else assert_memory_not_equal(logits, want, bytes);
        if (i == 3) assert_memory_not_equal(logits, last, bytes);
        free(last);
        last = logits;
    }
    free(last);
    free(want);
    tear_down(&noisy);
    tear_down(&clean);
}

// The padded rows of the vocabulary must not change loss or gradients, and have no gradient themselves.
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

// A changed token must change no earlier logit, but must change its own.
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

// Fresh weights: their spread, their gains, and their independence of the table's order. The loss
// of a fresh model must be that of guessing.
static void test_initialization(void** state) {
    (void)state;
    ModelConfig config = model_config_from_descriptor("d2");
    config.vocab_size = 500;
    config.sequence_length = 32;
    config.tied = 0;
    config.kconv = 3;
    config.gqa = GQA_STATIC;
    model_config_complete(&config);
    static Model model;
    gpt_plan(&model, &config, 1, 32, 1, RECOMPUTE_NONE, 0);
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
        if (tensor->initializer != INIT_NORMAL) { // gains of 1, taps of 0
            assert_true(tensor->initializer == INIT_ONES ? sum == n : squares == 0);
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

// Counts the keys that the query at t of a layer sees.
static int visible_keys(const ModelConfig* config, int l, int t) {
    const int S = config->moba_block, past = t / S,
              routed = past < config->moba_topk - 1 ? past : config->moba_topk - 1;
    if (layer_attention(config, l) != ATTENTION_DENSE) return t % S + 1 + routed * S;
    int count = 0;
    for (int s = 0; s <= t; s++) count += layer_window(config, l) == 0 || t - s < layer_window(config, l);
    return count;
}

// Compares the count of operations with a sum over every weight and every pair of query and key.
static void test_flops(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        const Case* c = &cases[i];
        const TensorTable* table = &fixture.model.layout.table;
        double weights = 0, pairs = 0;
        for (int k = 0; k < table->count; k++)
            if (table->tensors[k].initializer == INIT_NORMAL) weights += (double)table->tensors[k].count;
        if (!c->tied)
            weights -= (double)c->vocab_size * c->channels; // the embedding is looked up, not multiplied
        for (int l = 0; l < c->layers; l++)
            for (int t = 0; t < c->T; t++) pairs += visible_keys(&fixture.model.config, l, t);
        double want = 6 * weights + 12.0 * c->heads * c->head_dim * pairs / c->T;
        assert_true(fabs(flops_per_token(&fixture.model.config, c->T) / want - 1) < 1e-12);
        tear_down(&fixture);
    }
}

// The optimizer must reach every tensor. It decays matrices but not gains, and the
// model must learn a repeated batch.
static void test_update(void** state) {
    (void)state;
    for (int i = 0; i < CASES; i++) {
        Fixture fixture;
        set_up(&fixture, &cases[i]);
        Model* model = &fixture.model;
        const TensorTable* table = &model->layout.table;
        AdamW settings = {0.01f, 0.9f, 0.95f, 1e-8f, 0.5f, 1, 1};
        gpt_update(model, settings);
        assert_true(*model->host_norm == 0);
        for (int k = 0; k < table->count; k++) {
            const Tensor* tensor = &table->tensors[k];
            const double kept = tensor->initializer == INIT_NORMAL ? 1 - 0.005 : 1;
            for (size_t j = tensor->offset; j < tensor->offset + tensor->count; j++)
                assert_true(fabs((double)model->params[j] - kept * fixture.reference.params[j]) < 1e-6);
        }
        double first = 0, last = 0;
        settings.weight_decay = 0;
        for (settings.step = 1; settings.step <= 100; settings.step++) {
            gpt_zero_gradients(model);
            last = loss_and_gradients(&fixture, 0, BATCH, (double)BATCH * cases[i].T);
            if (settings.step == 1) first = last;
            gpt_update(model, settings);
            assert_true(*model->host_norm > 0);
        }
        assert_true(last < 0.5 * first);
        tear_down(&fixture);
    }
}

// Two tiny Llamas that transformers created and saved, with the logits that it computes for them in fp32.
static void test_transformers(void** state) {
    (void)state;
    const char* names[2] = {"untied", "tied"};
    for (int tied = 0; tied < 2; tied++) {
        char directory[PATH_MAX], path[PATH_MAX];
        path_format(directory, "test/fixtures/checkpoint/%s", names[tied]);
        ModelConfig config = checkpoint_read_config(directory);
        config.kconv = tied ? 3 : 0; // the checkpoint has no key convolution, so this has no effect
        config.gqa = GQA_STATIC;
        assert_int_equal(config.tied, tied);
        assert_true(config.rope_theta == (tied ? 10000.0f : 500.0f));
        float* expected;
        int *tokens, T, V;
        path_format(path, "%s/expected.safetensors", directory);
        logits_read(path, &expected, &tokens, &T, &V);
        assert_int_equal(V, config.vocab_size);
        static Model model;
        gpt_plan(&model, &config, 1, T, 0, RECOMPUTE_NONE, 0);
        gpt_allocate(&model);
        gpt_initialize(&model, 1);
        for (int i = 0; i < 3 * config.kv_heads * config.head_dim && config.kconv; i++)
            model.params[model.layout.layers[0].k_conv + (size_t)i] = 1;
        checkpoint_load_model(directory, &model.layout.table, gpt_weights(&model), model.stream);
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

// If the heads of a multi-head model are equal in pairs, the model with half the KV
// heads must give the same logits.
static void test_conversion_to_fewer_heads(void** state) {
    (void)state;
    float_acc heads[4] = {1, 3, 10, 20}, uneven[3] = {1, 3, 11};
    const int even[2] = {2, 2}, first[2] = {2, 1};
    pool_heads(heads, heads, even, 2, 1);
    assert_true(heads[0] == 2 && heads[1] == 15);
    pool_heads(uneven, uneven, first, 2, 1);
    assert_true(uneven[0] == 2 && uneven[1] == 11);

    const Case c = {"whole", 2, 16, 4, 4, 6, 9, 19, 7, "G", 1, 1, 1, 0, 3, GQA_STATIC, ATTENTION_DENSE, 1, 1};
    Fixture fixture;
    set_up(&fixture, &c);
    Model* model = &fixture.model;
    const size_t row = (size_t)c.head_dim * c.channels;
    for (int l = 0; l < c.layers; l++) {
        const LayerParameters* at = &model->layout.layers[l];
        for (int head = 0; head < 8; head += 2) // four heads of keys, four of values
            memcpy(model->params + at->qkv_proj + (size_t)(c.heads + head + 1) * row,
                   model->params + at->qkv_proj + (size_t)(c.heads + head) * row, row * sizeof(floatX));
        for (int head = 0; head < 3 * c.heads; head += 2) // for each of the three taps
            memcpy(model->params + at->k_conv + (size_t)(head + 1) * c.head_dim,
                   model->params + at->k_conv + (size_t)head * c.head_dim,
                   (size_t)c.head_dim * sizeof(floatX));
    }
    char output[] = "/tmp/test_model.XXXXXX", directory[PATH_MAX];
    assert_non_null(mkdtemp(output));
    TrainingState at_start;
    memset(&at_start, 0, sizeof(at_start));
    const StateRange whole = {0, model->layout.table.elements, 0};
    checkpoint_save(output, &model->config, &model->layout.table, &at_start, NULL, gpt_weights(model),
                    model->exp_avg, model->exp_avg_sq, &whole, 1, NULL, 0, model->stream);
    assert_true(checkpoint_latest(output, directory));

    ModelConfig config = model->config;
    config.kv_heads = 2;
    static Model pooled;
    gpt_plan(&pooled, &config, 1, c.T, 0, RECOMPUTE_NONE, 0);
    gpt_allocate(&pooled);
    checkpoint_load_pooled(directory, &config, &pooled.layout.table, gpt_weights(&pooled), pooled.stream);
    gpt_forward(model, fixture.tokens, 1, c.T, 0, NULL);
    gpt_forward(&pooled, fixture.tokens, 1, c.T, 0, NULL);
    floatX *want = all_logits(model, c.T), *got = all_logits(&pooled, c.T);
    double* exact = new_doubles((size_t)c.T * c.vocab_size);
    for (int i = 0; i < c.T * c.vocab_size; i++) exact[i] = (double)want[i];
    assert_close("logits", got, exact, (size_t)c.T * c.vocab_size, FORWARD_BOUND);
    checkpoint_remove_all(output);
    remove_path(output);
    free(want);
    free(got);
    free(exact);
    gpt_free(&pooled);
    tear_down(&fixture);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_gradients_of_variants),
        cmocka_unit_test(test_directional_derivative),
        cmocka_unit_test(test_recompute_changes_no_bit),
        cmocka_unit_test(test_maps_follow_the_keys),
        cmocka_unit_test(test_dgqa_takes_windows),
        cmocka_unit_test(test_noise_is_for_training_only),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_logit_rows),
        cmocka_unit_test(test_incremental_forward),
        cmocka_unit_test(test_padding),
        cmocka_unit_test(test_causality),
        cmocka_unit_test(test_initialization),
        cmocka_unit_test(test_flops),
        cmocka_unit_test(test_update),
        cmocka_unit_test(test_transformers),
        cmocka_unit_test(test_conversion_to_fewer_heads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
