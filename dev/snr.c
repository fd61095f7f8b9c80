/*
Measures the router's theory: why small blocks find the needle (docs/math.md section 4; arXiv 2511.11571).

    build/snr                                         the table: Monte Carlo beside its predictions
    build/snr --trials 100000 --blocks 256x4,64x16 --related 1,8 --json snr.json
    build/snr --checkpoint runs/mine --data data/mine_val_000000.bin      with a model's own queries and keys

The model of the table. There are T keys of unit norm in D dimensions, one query of unit norm, and n = T/S
blocks. Keys are uniform on the sphere, so a query's similarity with a key has mean 0 and variance 1/D. The
exceptions are m keys of one block, the signal block: the needle has similarity dmu with the query, and the m
- 1 keys related to it have `gap`. A block's score is the query's product with the mean of its keys, which is
the mean of its keys' similarities. With dmu_eff = dmu + (m-1) gap:

    score of the signal block - score of another: mean dmu_eff/S, variance about 2/(D S)
    SNR = dmu_eff sqrt(D/(2S)),  pairwise failure P(the other scores higher) = Phi(-SNR)
    recall P(the signal block is among the K best of n) = E_z[P(Binomial(n-1, 1 - Phi(z sqrt(D S))) <= K-1)],
        z ~ N(dmu_eff/S, (S-m)/(S^2 D)) the signal block's score, which all comparisons of a trial share.

A checkpoint has no known needle. So the signal block of a query row is the eligible block that holds the most
of its dense attention, and the selection is that of docs/math.md section 2: the own block, and K - 1 complete
past blocks by centroid score. docs/results/snr.md explains the reported values.
*/
#define TRAIN_GPT_NO_MAIN
#include <argp.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" // only the forward pass is needed
#include "train_gpt.cu"
#pragma GCC diagnostic pop
#include "runtime/json.h" // defines json_replace_file

enum { MOST_BLOCKINGS = 16 };

typedef struct {
    int S; // keys of a block
    int K; // blocks attended
} Blocking;

typedef struct {
    int T, D;
    double dmu, gap; // similarity of the needle, and of the keys related to it
    Blocking blockings[MOST_BLOCKINGS];
    int related[MOST_BLOCKINGS]; // m: the needle and the keys related to it
    int blocking_count, related_count;
    long trials;
    uint64_t seed;
    const char *json, *checkpoint, *data;
    int sequences, rows; // for a checkpoint: sequences of the data, and query rows of each
} Settings;

// ----------------------------------------------------------------------------
// The theory

static double normal_cdf(double x) { return 0.5 * erfc(-x / sqrt(2.0)); }

static double effective_dmu(const Settings* settings, int m) {
    return settings->dmu + (m - 1) * settings->gap;
}

static double predicted_snr(const Settings* settings, int S, int m) {
    return effective_dmu(settings, m) * sqrt(settings->D / (2.0 * S));
}

// P(Binomial(n, p) <= most)
static double binomial_cdf(int n, double p, int most) {
    if (most >= n) return 1;
    if (p <= 0) return 1;
    if (p >= 1) return 0;
    double sum = 0;
    for (int k = 0; k <= most; k++)
        sum +=
            exp(lgamma(n + 1.0) - lgamma(k + 1.0) - lgamma(n - k + 1.0) + k * log(p) + (n - k) * log1p(-p));
    return sum < 1 ? sum : 1;
}

// The integral over the signal block's score, by Simpson's rule over eight standard deviations on each side.
static double predicted_recall(const Settings* settings, Blocking blocking, int m) {
    enum { STEPS = 800 };
    const double S = blocking.S, D = settings->D, mean = effective_dmu(settings, m) / S;
    const double deviation = sqrt((S - m) / (S * S * D)), width = 16.0 / STEPS;
    const int others = settings->T / blocking.S - 1;
    double sum = 0;
    for (int i = 0; i <= STEPS; i++) {
        double x = -8 + i * width, z = mean + deviation * x;
        double weight = (i == 0 || i == STEPS ? 1 : i % 2 ? 4 : 2) * width / 3;
        double density = exp(-0.5 * x * x) / sqrt(2 * M_PI);
        sum += weight * density * binomial_cdf(others, normal_cdf(-z * sqrt(D * S)), blocking.K - 1);
    }
    return sum;
}

// ----------------------------------------------------------------------------
// The table: Monte Carlo

// One blocking with one number of related keys.
typedef struct {
    Blocking blocking;
    int m;
    double snr, predicted_failure, predicted_recall;
    double failure, recall; // measured
    long pairs_lost,
        found; // over all trials: other blocks that scored higher; trials with the signal among the K best
} Cell;

// Returns the dot product of a fixed unit vector and a random unit vector in D > 2 dimensions. It has the
// distribution of the first coordinate x of a random unit vector, so the function samples x alone. The squared
// length of the D-2 coordinates after the first two is distributed as U^(2/(D-2)), with U uniform in (0, 1). The
// first two coordinates form a vector of the remaining length with a uniform direction; x is that length times
// the cosine of the direction.
// test/test_snr.c compares with keys and centroids of all D coordinates.
static double random_similarity(uint64_t seed, uint64_t stream, uint64_t element, int D) {
    uint64_t bits[2];
    random_bits(bits, seed, stream, element);
    double outside =
        exp(log(random_unit(bits[0])) * 2.0 / (D - 2)); // squared length outside of two coordinates
    return sqrt(1 - outside) * cos(2 * M_PI * random_unit(bits[1]));
}

// One set of T keys serves all cells. In each cell, m keys of one block are replaced by the needle and its
// related keys. Only their component along the query matters: the perpendicular part has no effect on any
// score.
static void run_trial(Cell* cells, int count, const Settings* settings, long trial, double* similarity,
                      double* sums) {
    const int T = settings->T;
    const uint64_t stream = random_stream("snr keys") + (uint64_t)trial;
    for (int t = 0; t < T; t++)
        similarity[t] = random_similarity(settings->seed, stream, (uint64_t)t, settings->D);
    int summed = 0; // the block size that `sums` belongs to
    for (int c = 0; c < count; c++) {
        const int S = cells[c].blocking.S, n = T / S, m = cells[c].m;
        for (int j = 0; j < n && summed != S; j++) {
            sums[j] = 0;
            for (int i = 0; i < S; i++) sums[j] += similarity[j * S + i];
        }
        summed = S;
        const uint64_t place = (uint64_t)trial * MOST_BLOCKINGS * MOST_BLOCKINGS + (uint64_t)c;
        const int signal_block =
            (int)(n * random_uniform(settings->seed, random_stream("snr blocks"), place));
        double signal = effective_dmu(settings, m);
        for (int i = m; i < S; i++) signal += similarity[signal_block * S + i];
        int above = 0;
        for (int j = 0; j < n; j++) above += j != signal_block && sums[j] > signal;
        cells[c].pairs_lost += above;
        cells[c].found += above < cells[c].blocking.K;
    }
}

static int list_cells(Cell* cells, const Settings* settings) {
    int count = 0;
    for (int b = 0; b < settings->blocking_count; b++) {
        for (int r = 0; r < settings->related_count; r++) {
            Cell* cell = &cells[count++];
            memset(cell, 0, sizeof(*cell));
            cell->blocking = settings->blockings[b];
            cell->m = settings->related[r];
            cell->snr = predicted_snr(settings, cell->blocking.S, cell->m);
            cell->predicted_failure = normal_cdf(-cell->snr);
            cell->predicted_recall = predicted_recall(settings, cell->blocking, cell->m);
        }
    }
    return count;
}

// Fills the cells and returns their number. Counts are whole numbers, so the result is the same for any
// number of threads.
static int measure_table(Cell cells[MOST_BLOCKINGS * MOST_BLOCKINGS], const Settings* settings) {
    const int count = list_cells(cells, settings), T = settings->T;
#pragma omp parallel
    {
        Cell* own = (Cell*)malloc_or_fail((size_t)count * sizeof(Cell), "the cells of a thread");
        memcpy(own, cells, (size_t)count * sizeof(Cell));
        double* similarity = (double*)malloc_or_fail((size_t)T * sizeof(double), "similarities");
        double* sums = (double*)malloc_or_fail((size_t)T * sizeof(double), "scores");
#pragma omp for schedule(static)
        for (long trial = 0; trial < settings->trials; trial++)
            run_trial(own, count, settings, trial, similarity, sums);
#pragma omp critical
        for (int c = 0; c < count; c++) {
            cells[c].pairs_lost += own[c].pairs_lost;
            cells[c].found += own[c].found;
        }
        free(own);
        free(similarity);
        free(sums);
    }
    for (int c = 0; c < count; c++) {
        const int others = T / cells[c].blocking.S - 1;
        const double trials = (double)settings->trials;
        cells[c].failure = (double)cells[c].pairs_lost / (trials * others);
        cells[c].recall = (double)cells[c].found / trials;
    }
    return count;
}

static void print_table(const Cell* cells, int count, const Settings* settings) {
    printf("T %d, D %d, dmu %g, gap %g, %ld trials, seed %llu\n", settings->T, settings->D, settings->dmu,
           settings->gap, settings->trials, (unsigned long long)settings->seed);
    printf("%5s %4s %4s %7s | %8s %8s %8s | %8s %8s %8s | %7s\n", "S", "K", "m", "SNR", "failure",
           "Phi(-SNR)", "differ", "recall", "integral", "differ", "chance");
    for (int c = 0; c < count; c++) {
        const Cell* cell = &cells[c];
        printf("%5d %4d %4d %7.3f | %8.4f  %8.4f %8.4f | %8.4f %8.4f %8.4f | %7.4f\n", cell->blocking.S,
               cell->blocking.K, cell->m, cell->snr, cell->failure, cell->predicted_failure,
               cell->failure - cell->predicted_failure, cell->recall, cell->predicted_recall,
               cell->recall - cell->predicted_recall,
               (double)cell->blocking.K * cell->blocking.S / settings->T);
    }
}

static void write_table(const Cell* cells, int count, const Settings* settings) {
    cJSON* json = cJSON_CreateObject();
    json_add_whole(json, "T", settings->T);
    json_add_whole(json, "D", settings->D);
    json_add_double(json, "dmu", settings->dmu);
    json_add_double(json, "gap", settings->gap);
    json_add_whole(json, "trials", settings->trials);
    json_add_uint64(json, "seed", settings->seed);
    cJSON* list = cJSON_AddArrayToObject(json, "cells");
    for (int c = 0; c < count; c++) {
        cJSON* item = cJSON_CreateObject();
        json_add_whole(item, "S", cells[c].blocking.S);
        json_add_whole(item, "K", cells[c].blocking.K);
        json_add_whole(item, "m", cells[c].m);
        json_add_double(item, "snr", cells[c].snr);
        json_add_double(item, "failure", cells[c].failure);
        json_add_double(item, "predicted_failure", cells[c].predicted_failure);
        json_add_double(item, "recall", cells[c].recall);
        json_add_double(item, "predicted_recall", cells[c].predicted_recall);
        cJSON_AddItemToArray(list, item);
    }
    json_replace_file(settings->json, json);
    cJSON_Delete(json);
}

// ----------------------------------------------------------------------------
// A checkpoint: its queries and keys

// Sums over the query rows of one head, for one blocking.
typedef struct {
    double rows;
    double mass, mass_current, mass_best, mass_chance; // dense attention in the attended blocks
    double recall, recall_chance;                      // of the K-1 past blocks with the most attention
    double top, top_chance;                            // whether the signal block is selected
    double pairs, lost;                                // the signal block against each other eligible block
    double difference, difference_squared;             // of their scores, for a query of unit norm
    double isotropic;                                  // SNR if keys were isotropic noise
} Head;

static void head_add(Head* sum, const Head* one) {
    double* to = (double*)sum;
    const double* from = (const double*)one;
    for (size_t i = 0; i < sizeof(Head) / sizeof(double); i++) to[i] += from[i];
}

static double head_snr(const Head* head) {
    double mean = head->difference / head->pairs;
    return mean / sqrt(head->difference_squared / head->pairs - mean * mean);
}

// One query row: the dense attention of each key, and the key's product with the query.
typedef struct {
    const double *attention, *product; // (t + 1)
    double query_norm, key_rms;
    int t;
} Row;

// Adds a row to a head's sums. `scratch` has room for 2 doubles and 2 chars for each eligible block, at most
// t + 1.
static void measure_row(Head* head, const Row* row, Blocking blocking, int D, double* scratch) {
    const int S = blocking.S, eligible = row->t / S, choices = blocking.K - 1;
    double *mass = scratch, *score = scratch + eligible;
    char *chosen = (char*)(scratch + 2 * eligible), *dense = chosen + eligible;
    double current = 0, past = 0;
    for (int j = 0; j < eligible; j++) {
        mass[j] = score[j] = 0;
        for (int i = j * S; i < (j + 1) * S; i++) {
            mass[j] += row->attention[i];
            score[j] += row->product[i] / S;
        }
        past += mass[j];
    }
    for (int i = eligible * S; i <= row->t; i++) current += row->attention[i];
    mark_greatest(chosen, score, eligible, choices);
    mark_greatest(dense, mass, eligible, choices);
    int signal = 0, both = 0;
    double taken = 0, best = 0;
    for (int j = 0; j < eligible; j++) {
        if (mass[j] > mass[signal]) signal = j;
        taken += chosen[j] ? mass[j] : 0;
        best += dense[j] ? mass[j] : 0;
        both += chosen[j] && dense[j];
    }
    const double part = (double)choices / eligible;
    head->rows++;
    head->mass += current + taken;
    head->mass_current += current;
    head->mass_best += current + best;
    head->mass_chance += current + part * past;
    head->recall += choices ? (double)both / choices : 1;
    head->recall_chance += part;
    head->top += chosen[signal];
    head->top_chance += part;
    double gap = 0;
    for (int j = 0; j < eligible; j++) {
        if (j == signal) continue;
        double difference = (score[signal] - score[j]) / row->query_norm;
        gap += difference / (eligible - 1);
        head->pairs++;
        head->lost += difference < 0;
        head->difference += difference;
        head->difference_squared += difference * difference;
    }
    // dmu_eff = S (gap over the keys' norm), as if every key had the same norm
    head->isotropic += S * gap / row->key_rms * sqrt(D / (2.0 * S));
}

// Measures all sampled rows of one query head in one sequence. qkv is (T, H + 2G, D).
static void measure_head(Head* heads, const Settings* settings, const ModelConfig* config, const floatX* qkv,
                         int query_head, int kv_head, uint64_t stream) {
    const int T = settings->T, D = config->head_dim, width = qkv_heads(config) * D;
    int first = 0; // the first row at which no blocking attends to all keys
    for (int b = 0; b < settings->blocking_count; b++) {
        int needed = settings->blockings[b].K * settings->blockings[b].S;
        if (needed > first) first = needed;
    }
    double* attention = (double*)malloc_or_fail((size_t)T * 2 * sizeof(double), "a row of attention");
    double *product = attention + T,
           *scratch = (double*)malloc_or_fail((size_t)T * 4 * sizeof(double), "scores");
    for (int r = 0; r < settings->rows; r++) {
        double at = (r + random_uniform(settings->seed, stream, (uint64_t)r)) / settings->rows;
        const int t = first + (int)(at * (T - first));
        const floatX* query = qkv + (size_t)t * width + (size_t)query_head * D;
        const floatX* keys = qkv + (size_t)(config->heads + kv_head) * D;
        dense_attention_row(attention, product, query, keys, (size_t)width, t, D);
        double query_square = 0, key_square = 0;
        for (int d = 0; d < D; d++) query_square += (double)query[d] * (double)query[d];
        for (int i = 0; i <= t; i++) {
            const floatX* key = keys + (size_t)i * width;
            for (int d = 0; d < D; d++) key_square += (double)key[d] * (double)key[d];
        }
        Row row = {attention, product, sqrt(query_square), sqrt(key_square / (t + 1)), t};
        for (int b = 0; b < settings->blocking_count; b++)
            measure_row(&heads[b], &row, settings->blockings[b], D, scratch);
    }
    free(attention);
    free(scratch);
}

// Head (l, h) of blocking b is heads[(l * H + h) * blocking_count + b].
static Head* measure_checkpoint(Model* model, const Settings* settings, const DataLoader* loader) {
    const ModelConfig* config = &model->config;
    const int T = settings->T, H = config->heads, L = config->layers, blockings = settings->blocking_count;
    const size_t values = (size_t)T * qkv_heads(config) * config->head_dim;
    Head* heads = (Head*)calloc_or_fail((size_t)L * H * blockings, sizeof(Head), "sums of the heads");
    floatX* qkv = (floatX*)malloc_or_fail(values * sizeof(floatX), "queries and keys");
    int* tokens = (int*)malloc_or_fail((size_t)2 * T * sizeof(int), "a sequence");
    int* map = (int*)malloc_or_fail((size_t)L * H * sizeof(int), "the map of query heads");
    copy_to_host(map, model->heads.map, (size_t)L * H * sizeof(int), model->stream);
    for (int s = 0; s < settings->sequences; s++) {
        if (!loader_read(loader, (uint64_t)s, 1, tokens, tokens + T)) break;
        gpt_forward(model, tokens, 1, T, 0, NULL);
        for (int l = 0; l < L; l++) {
            if (layer_kind(config, l) == 'S') continue;
            copy_to_host(qkv, model->acts.layers[l].qkv, values * sizeof(floatX), model->stream);
            stream_synchronize(model->stream);
#pragma omp parallel for schedule(dynamic)
            for (int h = 0; h < H; h++)
                measure_head(heads + ((size_t)l * H + h) * blockings, settings, config, qkv, h,
                             map[l * H + h], random_stream("snr rows") + (uint64_t)s);
        }
    }
    free(qkv);
    free(tokens);
    free(map);
    return heads;
}

static void print_head(const char* name, const Head* head) {
    const double rows = head->rows;
    printf("%-12s| %7.4f %7.4f %7.4f %7.4f | %7.4f %7.4f | %7.4f %7.4f | %7.3f %9.3f | %7.4f  %8.4f\n", name,
           head->mass / rows, head->mass_best / rows, head->mass_chance / rows, head->mass_current / rows,
           head->recall / rows, head->recall_chance / rows, head->top / rows, head->top_chance / rows,
           head_snr(head), head->isotropic / rows, head->lost / head->pairs, normal_cdf(-head_snr(head)));
}

static cJSON* head_as_json(const Head* head) {
    cJSON* json = cJSON_CreateObject();
    const struct {
        const char* name;
        double value;
    } members[] = {
        {"mass", head->mass / head->rows},
        {"mass_best", head->mass_best / head->rows},
        {"mass_chance", head->mass_chance / head->rows},
        {"mass_current", head->mass_current / head->rows},
        {"recall", head->recall / head->rows},
        {"recall_chance", head->recall_chance / head->rows},
        {"top", head->top / head->rows},
        {"top_chance", head->top_chance / head->rows},
        {"snr", head_snr(head)},
        {"isotropic_snr", head->isotropic / head->rows},
        {"failure", head->lost / head->pairs},
        {"predicted_failure", normal_cdf(-head_snr(head))},
    };
    for (size_t i = 0; i < sizeof(members) / sizeof(members[0]); i++)
        json_add_double(json, members[i].name, members[i].value);
    return json;
}

// Prints a line for each head and one for all heads; writes the same as JSON.
static void report_checkpoint(const Head* heads, const ModelConfig* config, const Settings* settings) {
    cJSON* json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "checkpoint", settings->checkpoint);
    cJSON_AddStringToObject(json, "data", settings->data);
    json_add_whole(json, "T", settings->T);
    cJSON* blockings = cJSON_AddArrayToObject(json, "blockings");
    for (int b = 0; b < settings->blocking_count; b++) {
        const Blocking blocking = settings->blockings[b];
        cJSON* item = cJSON_CreateObject();
        json_add_whole(item, "S", blocking.S);
        json_add_whole(item, "K", blocking.K);
        cJSON* list = cJSON_AddArrayToObject(item, "heads");
        printf("\nS %d, K %d, T %d\n%-12s| %-31s | %-15s | %-15s | %-17s | pairwise failure\n", blocking.S,
               blocking.K, settings->T, "", "attention captured", "recall of top", "top block", "SNR");
        printf("%-12s| %7s %7s %7s %7s | %7s %7s | %7s %7s | %7s %9s | %7s %9s\n", "layer head", "router",
               "best", "chance", "current", "router", "chance", "router", "chance", "own", "isotropic", "own",
               "Phi(-SNR)");
        Head all;
        memset(&all, 0, sizeof(all));
        for (int i = 0; i < config->layers * config->heads; i++) {
            const int l = i / config->heads, h = i % config->heads;
            const Head* head = &heads[(size_t)i * settings->blocking_count + b];
            if (head->rows == 0) continue;
            char name[32];
            snprintf(name, sizeof(name), "%5d %4d", l, h);
            print_head(name, head);
            head_add(&all, head);
            cJSON* line = head_as_json(head);
            json_add_whole(line, "layer", l);
            json_add_whole(line, "head", h);
            cJSON_AddItemToArray(list, line);
        }
        print_head("all", &all);
        cJSON_AddItemToObject(item, "all", head_as_json(&all));
        cJSON_AddItemToArray(blockings, item);
    }
    if (settings->json) json_replace_file(settings->json, json);
    cJSON_Delete(json);
}

static void run_checkpoint(Settings* settings, int T_given, int blocks_given) {
    char directory[PATH_MAX], path[PATH_MAX];
    checkpoint_resolve(settings->checkpoint, directory);
    const ModelConfig config = checkpoint_read_config(directory);
    const int T = settings->T = T_given ? settings->T : config.sequence_length;
    // The default blockings have the table's proportions: an eighth of the sequence, in smaller and smaller
    // blocks.
    for (int b = 0; b < settings->blocking_count && !blocks_given; b++) {
        settings->blockings[b].S = T / 16 >> b;
        if (settings->blockings[b].S < 2) settings->blocking_count = b;
    }
    for (int b = 0; b < settings->blocking_count; b++)
        if (settings->blockings[b].K < 2 || (settings->blockings[b].K + 1L) * settings->blockings[b].S > T)
            fail_usage("--blocks %dx%d: a sequence of %d tokens leaves the router nothing to choose",
                       settings->blockings[b].S, settings->blockings[b].K, T);
    if (!settings->blocking_count) fail_usage("--sequence-length %d: at least 32", T);
    path_format(path, "%s/tokenizer.json", directory);
    Tokenizer* tokenizer = path_exists(path) ? tokenizer_load(path) : NULL;
    const int known = tokenizer ? tokenizer_vocab_size(tokenizer) : config.vocab_size; // the rest is padding
    DataLoader* loader =
        loader_open(settings->data, T, known, tokenizer ? tokenizer_hash(tokenizer) : 0, settings->seed, 0);
    if (loader_sequences(loader) == 0) fail("%s: less than one sequence of %d tokens", settings->data, T);
    static Model model;
    gpt_plan(&model, &config, 1, T, 0, RECOMPUTE_NONE, 0);
    gpt_allocate(&model);
    checkpoint_load_model(directory, &model.layout.table, gpt_weights(&model), model.stream);
    if (heads_are_key_driven(&config)) gpt_load_heads(&model, directory);
    Head* heads = measure_checkpoint(&model, settings, loader);
    double rows = 0;
    for (int i = 0; i < config.layers * config.heads; i++)
        rows += heads[(size_t)i * settings->blocking_count].rows;
    if (rows == 0) fail("%s: has no global layer (pattern %s)", settings->checkpoint, config.pattern);
    report_checkpoint(heads, &config, settings);
    free(heads);
    loader_close(loader);
    tokenizer_free(tokenizer);
    gpt_free(&model);
}

// ----------------------------------------------------------------------------
// The command line

static Settings settings_default(void) {
    Settings settings = {8192,      64,   0.8,  0.4,   {{512, 2}, {256, 4}, {128, 8}, {64, 16}},
                         {1, 4, 8}, 4,    3,    10000, 1337,
                         NULL,      NULL, NULL, 16,    32};
    return settings;
}

#ifndef SNR_NO_MAIN // a test includes this file for its functions

enum {
    KEY_DMU = 1000,
    KEY_GAP,
    KEY_BLOCKS,
    KEY_RELATED,
    KEY_TRIALS,
    KEY_JSON,
    KEY_CHECKPOINT,
    KEY_DATA,
    KEY_SEQUENCES,
    KEY_ROWS,
    KEY_SNR_SEED,
    KEY_DIMENSION
};

static const struct argp_option settings_table[] = {
    {0, 0, 0, 0, "Both", 1},
    {"sequence-length", 't', "T", 0, "keys (default 8192), or tokens of a sequence (default: the model's)",
     1},
    {"blocks", KEY_BLOCKS, "SxK,...", 0,
     "block sizes, each with the number of blocks attended (default 512x2,256x4,128x8,64x16; with a "
     "checkpoint "
     "T/16x2,T/32x4,T/64x8,T/128x16)",
     1},
    {"seed", KEY_SNR_SEED, "N", 0, "of keys, places and sampled rows (default 1337)", 1},
    {"json", KEY_JSON, "FILE", 0, "write the result there too", 1},
    {0, 0, 0, 0, "The table", 2},
    {"dimension", KEY_DIMENSION, "D", 0, "of a key (default 64)", 2},
    {"dmu", KEY_DMU, "X", 0, "similarity of the needle (default 0.8)", 2},
    {"gap", KEY_GAP, "X", 0, "similarity of the keys related to it (default 0.4)", 2},
    {"related", KEY_RELATED, "M,...", 0, "keys of the signal block that are not noise (default 1,4,8)", 2},
    {"trials", KEY_TRIALS, "N", 0, "sets of keys (default 10000)", 2},
    {0, 0, 0, 0, "A checkpoint", 3},
    {"checkpoint", KEY_CHECKPOINT, "DIR", 0, "measure this model's own queries and keys instead", 3},
    {"data", KEY_DATA, "GLOB", 0, "token shards to run through it", 3},
    {"sequences", KEY_SEQUENCES, "N", 0, "sequences (default 16)", 3},
    {"rows", KEY_ROWS, "N", 0, "query rows of each sequence (default 32)", 3},
    {0, 0, 0, 0, 0, 0},
};

// The next whole number of a list, from 1 to `most`; *text moves past it.
static int parse_next(const char* option, const char* whole, const char** text, char separator, long most) {
    char* end;
    long value = strtol(*text, &end, 10);
    if (end == *text || value < 1 || value > most || (*end && *end != separator && *end != ','))
        fail_usage("--%s %s: want whole numbers from 1, such as %s", option, whole,
                   separator == 'x' ? "128x8,64x16" : "1,4,8");
    *text = end;
    return (int)value;
}

static void parse_blocks(Settings* settings, const char* list) {
    settings->blocking_count = 0;
    for (const char* text = list;; text++) {
        if (settings->blocking_count == MOST_BLOCKINGS)
            fail_usage("--blocks: at most %d", (int)MOST_BLOCKINGS);
        Blocking* blocking = &settings->blockings[settings->blocking_count++];
        blocking->S = parse_next("blocks", list, &text, 'x', 1 << 24);
        if (*text++ != 'x') fail_usage("--blocks %s: want SxK, such as 128x8,64x16", list);
        blocking->K = parse_next("blocks", list, &text, ',', 1 << 20);
        if (!*text) return;
    }
}

static void parse_related(Settings* settings, const char* list) {
    settings->related_count = 0;
    for (const char* text = list;; text++) {
        if (settings->related_count == MOST_BLOCKINGS)
            fail_usage("--related: at most %d", (int)MOST_BLOCKINGS);
        settings->related[settings->related_count++] = parse_next("related", list, &text, ',', 1 << 20);
        if (!*text) return;
    }
}

static double parse_number(const char* option, const char* text, double low, double high) {
    char* end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= low && value <= high))
        fail_usage("--%s %s: must be from %g to %g", option, text, low, high);
    return value;
}

typedef struct {
    Settings settings;
    int T_given, blocks_given;
} Arguments;

static error_t settings_parse(int key, char* text, struct argp_state* state) {
    Arguments* arguments = (Arguments*)state->input;
    Settings* settings = &arguments->settings;
    switch (key) {
    case 't':
        settings->T = (int)parse_number("sequence-length", text, 2, 1 << 24);
        arguments->T_given = 1;
        break;
    case KEY_DIMENSION:
        settings->D = (int)parse_number("dimension", text, 3, 1 << 16);
        break;
    case KEY_DMU:
        settings->dmu = parse_number("dmu", text, -1, 1);
        break;
    case KEY_GAP:
        settings->gap = parse_number("gap", text, -1, 1);
        break;
    case KEY_BLOCKS:
        parse_blocks(settings, text);
        arguments->blocks_given = 1;
        break;
    case KEY_RELATED:
        parse_related(settings, text);
        break;
    case KEY_TRIALS:
        settings->trials = (long)parse_number("trials", text, 1, 1e9);
        break;
    case KEY_SNR_SEED:
        settings->seed = (uint64_t)parse_number("seed", text, 0, 9e15);
        break;
    case KEY_JSON:
        settings->json = text;
        break;
    case KEY_CHECKPOINT:
        settings->checkpoint = text;
        break;
    case KEY_DATA:
        settings->data = text;
        break;
    case KEY_SEQUENCES:
        settings->sequences = (int)parse_number("sequences", text, 1, 1 << 24);
        break;
    case KEY_ROWS:
        settings->rows = (int)parse_number("rows", text, 1, 1 << 24);
        break;
    case ARGP_KEY_ARG:
        fail_usage("%s: not an option", text);
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static void check_table(const Settings* settings) {
    for (int b = 0; b < settings->blocking_count; b++) {
        const Blocking blocking = settings->blockings[b];
        if (settings->T % blocking.S != 0 || settings->T / blocking.S < 2)
            fail_usage("--blocks %dx%d: --sequence-length %d must be two or more whole blocks", blocking.S,
                       blocking.K, settings->T);
        for (int r = 0; r < settings->related_count; r++)
            if (settings->related[r] > blocking.S)
                fail_usage("--related %d: more than the %d keys of a block", settings->related[r],
                           blocking.S);
    }
}

int main(int argc, char** argv) {
    program_name = "snr";
    Arguments arguments = {settings_default(), 0, 0};
    Settings* settings = &arguments.settings;
    const struct argp parser = {settings_table,
                                settings_parse,
                                0,
                                "Measures how well a router by block centroids finds the needle.",
                                0,
                                0,
                                0};
    argp_err_exit_status = 2;
    argp_parse(&parser, argc, argv, 0, 0, &arguments);
    if (!settings->checkpoint != !settings->data) fail_usage("--checkpoint and --data: one needs the other");
    if (settings->checkpoint) {
        run_checkpoint(settings, arguments.T_given, arguments.blocks_given);
        return 0;
    }
    check_table(settings);
    static Cell cells[MOST_BLOCKINGS * MOST_BLOCKINGS];
    const int count = measure_table(cells, settings);
    print_table(cells, count, settings);
    if (settings->json) write_table(cells, count, settings);
    return 0;
}

#endif
