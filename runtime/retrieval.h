/*
Evaluation of the retrieval task: how often a model finds the value that a sample of build/retrieval asks for,
by the length of the sample and the depth of the needle. docs/retrieval.md describes the files.

    Retrieval* task = retrieval_open("data/needle");                 // reads data/needle_index.jsonl
    RetrievalModel model = {context, forward, likeliest};
    retrieval_evaluate(task, &model, vocab_size, tokenizer_hash, B); // reads data/needle_256_val_*.bin, ...
    retrieval_print(task, stdout);
    retrieval_close(task);

Evaluation uses teacher forcing: the model reads the answer's own tokens, and a sample is right if each of
them is the most likely token after the tokens before it. Greedy decoding gives the same result: as long as
all its tokens are right, it feeds the same ones.
*/
#ifndef RUNTIME_RETRIEVAL_H
#define RUNTIME_RETRIEVAL_H

#include "dataloader.h"     // defines loader_open, loader_read
#include "runtime/checks.h" // defines fail
#include "runtime/json.h"   // defines json_parse_object, json_get_whole

// The model to evaluate, as two functions. A test may give functions without a model.
typedef struct {
    void* context;
    void (*forward)(void* context, const int* tokens, int rows, int T); // tokens (rows, T)
    int (*likeliest)(void* context, int row, int T,
                     int position); // the token after `position` of the last forward
} RetrievalModel;

typedef struct {
    int length, sequence; // the shards' length, and the sample's sequence number in them
    double depth;         // of the needle, from 0 to 1
    int answer_offset;    // the answer's first token
    int answer_tokens;
    int right; // answer tokens that were the most likely
} RetrievalSample;

// Samples of one length and depth.
typedef struct {
    int length;
    double depth;
    long samples, right, tokens, tokens_right;
} RetrievalCell;

typedef struct {
    char prefix[PATH_MAX];
    RetrievalSample* samples; // by length and sequence
    int count;
    int longest;
    RetrievalCell* cells; // by length and depth, after retrieval_evaluate()
    int cell_count;
} Retrieval;

// ----------------------------------------------------------------------------
// The index

static inline int retrieval_compare_samples(const void* a, const void* b) {
    const RetrievalSample *x = (const RetrievalSample*)a, *y = (const RetrievalSample*)b;
    if (x->length != y->length) return x->length < y->length ? -1 : 1;
    return (x->sequence > y->sequence) - (x->sequence < y->sequence);
}

static inline int retrieval_number(const cJSON* line, const char* key, int low, const char* path,
                                   int number) {
    uint64_t value;
    if (!json_get_whole(json_get(line, key), &value) || value > 1 << 30 || (int)value < low)
        fail("%s: line %d: %s must be a whole number from %d", path, number, key, low);
    return (int)value;
}

static inline RetrievalSample retrieval_parse_line(const char* text, size_t length, const char* path,
                                                   int number) {
    char where[PATH_MAX];
    path_format(where, "%s: line %d", path, number);
    cJSON* line = json_parse_object(text, length, where);
    RetrievalSample sample;
    memset(&sample, 0, sizeof(sample));
    sample.length = retrieval_number(line, "length", 1, path, number);
    sample.sequence = retrieval_number(line, "sequence", 0, path, number);
    sample.answer_offset = retrieval_number(line, "answer_offset", 1, path, number);
    sample.answer_tokens = retrieval_number(line, "answer_tokens", 1, path, number);
    if (!json_get_double(json_get(line, "depth"), &sample.depth) || !(sample.depth >= 0 && sample.depth <= 1))
        fail("%s: line %d: depth must be a number from 0 to 1", path, number);
    if (sample.answer_tokens > sample.length || sample.answer_offset > sample.length - sample.answer_tokens)
        fail("%s: line %d: the answer is not within the %d tokens of the sample", path, number,
             sample.length);
    cJSON_Delete(line);
    return sample;
}

// Reads the index. The caller calls retrieval_close().
static inline Retrieval* retrieval_open(const char* prefix) {
    Retrieval* task = (Retrieval*)calloc_or_fail(1, sizeof(Retrieval), "the retrieval task");
    char path[PATH_MAX];
    path_format(task->prefix, "%s", prefix);
    path_format(path, "%s_index.jsonl", prefix);
    char* text = read_file_or_fail(path, NULL);
    int lines = 0, number = 0;
    for (const char* c = text; *c; c++) lines += *c == '\n';
    task->samples = (RetrievalSample*)malloc_or_fail(((size_t)lines + 1) * sizeof(RetrievalSample),
                                                     "the retrieval samples");
    for (char *line = text, *end; *line; line = end) {
        number++;
        end = strchr(line, '\n');
        if (!end) fail("%s: line %d: cut off", path, number);
        *end++ = 0;
        task->samples[task->count] = retrieval_parse_line(line, (size_t)(end - 1 - line), path, number);
        if (task->samples[task->count].length > task->longest)
            task->longest = task->samples[task->count].length;
        task->count++;
    }
    free(text);
    if (!task->count) fail("%s: has no samples", path);
    qsort(task->samples, (size_t)task->count, sizeof(RetrievalSample), retrieval_compare_samples);
    return task;
}

static inline void retrieval_close(Retrieval* task) {
    free(task->samples);
    free(task->cells);
    free(task);
}

// ----------------------------------------------------------------------------
// Evaluation

static inline int retrieval_compare_cells(const void* a, const void* b) {
    const RetrievalCell *x = (const RetrievalCell*)a, *y = (const RetrievalCell*)b;
    if (x->length != y->length) return x->length < y->length ? -1 : 1;
    return (x->depth > y->depth) - (x->depth < y->depth);
}

static inline void retrieval_count(Retrieval* task) {
    free(task->cells);
    task->cells =
        (RetrievalCell*)calloc_or_fail((size_t)task->count, sizeof(RetrievalCell), "the table of accuracy");
    task->cell_count = 0;
    for (int i = 0; i < task->count; i++) {
        const RetrievalSample* sample = &task->samples[i];
        int c = 0;
        while (c < task->cell_count &&
               (task->cells[c].length != sample->length || task->cells[c].depth != sample->depth))
            c++;
        RetrievalCell* cell = &task->cells[c];
        if (c == task->cell_count) {
            task->cell_count++;
            cell->length = sample->length;
            cell->depth = sample->depth;
        }
        cell->samples++;
        cell->right += sample->right == sample->answer_tokens;
        cell->tokens += sample->answer_tokens;
        cell->tokens_right += sample->right;
    }
    qsort(task->cells, (size_t)task->cell_count, sizeof(RetrievalCell), retrieval_compare_cells);
}

// Runs the samples first..end-1, all of one length, `batch` at a time.
static inline void retrieval_run_length(Retrieval* task, int first, int end, const RetrievalModel* model,
                                        const DataLoader* loader, int batch) {
    const int T = task->samples[first].length;
    int* tokens = (int*)malloc_or_fail((size_t)batch * T * sizeof(int), "retrieval samples");
    int* targets = (int*)malloc_or_fail((size_t)batch * T * sizeof(int), "retrieval samples");
    for (int i = first; i < end; i += batch) {
        const int rows = end - i < batch ? end - i : batch;
        for (int row = 0; row < rows; row++) {
            const uint64_t sequence = (uint64_t)task->samples[i + row].sequence;
            if (loader_read(loader, sequence, 1, tokens + (size_t)row * T, targets + (size_t)row * T) != 1)
                fail("%s_index.jsonl: sequence %llu of length %d: the shards have only %llu", task->prefix,
                     (unsigned long long)sequence, T, (unsigned long long)loader_sequences(loader));
        }
        model->forward(model->context, tokens, rows, T);
        for (int row = 0; row < rows; row++) {
            RetrievalSample* sample = &task->samples[i + row];
            sample->right = 0;
            for (int k = 0; k < sample->answer_tokens; k++) {
                const int position = sample->answer_offset + k - 1; // of the token before the wanted one
                const int wanted = targets[(size_t)row * T + position];
                sample->right += model->likeliest(model->context, row, T, position) == wanted;
            }
        }
    }
    free(tokens);
    free(targets);
}

// Runs every sample, up to `batch` at once. tokenizer_hash 0 accepts any tokenizer's shards.
static inline void retrieval_evaluate(Retrieval* task, const RetrievalModel* model, int vocab_size,
                                      uint32_t tokenizer_hash, int batch) {
    for (int first = 0, end; first < task->count; first = end) {
        const int length = task->samples[first].length;
        for (end = first; end < task->count && task->samples[end].length == length;) end++;
        char pattern[PATH_MAX];
        path_format(pattern, "%s_%d_val_*.bin", task->prefix, length);
        DataLoader* loader = loader_open(pattern, length, vocab_size, tokenizer_hash, 0, 0);
        retrieval_run_length(task, first, end, model, loader, batch);
        loader_close(loader);
    }
    retrieval_count(task);
}

// ----------------------------------------------------------------------------
// Results

static inline RetrievalCell retrieval_sum(const Retrieval* task, int length) {
    RetrievalCell sum;
    memset(&sum, 0, sizeof(sum));
    for (int c = 0; c < task->cell_count; c++) {
        const RetrievalCell* cell = &task->cells[c];
        if (length && cell->length != length) continue;
        sum.samples += cell->samples;
        sum.right += cell->right;
        sum.tokens += cell->tokens;
        sum.tokens_right += cell->tokens_right;
    }
    return sum;
}

static inline double retrieval_accuracy(const RetrievalCell* cell) {
    return (double)cell->right / (double)cell->samples;
}

// Prints a table of accuracy: a row for each length, a column for each
// depth, and a last column for all depths.
static inline void retrieval_print(const Retrieval* task, FILE* out) {
    double depths[128];
    int depth_count = 0;
    for (int c = 0; c < task->cell_count; c++) {
        int d = 0;
        while (d < depth_count && depths[d] < task->cells[c].depth) d++;
        if (d < depth_count && depths[d] == task->cells[c].depth) continue;
        if (depth_count == 128) fail("%s_index.jsonl: more than 128 depths", task->prefix);
        memmove(depths + d + 1, depths + d, (size_t)(depth_count - d) * sizeof(double));
        depths[d] = task->cells[c].depth;
        depth_count++;
    }
    fprintf(out, "%8s", "depth");
    for (int d = 0; d < depth_count; d++) fprintf(out, " %6.4g", depths[d]);
    fprintf(out, " %6s\n", "all");
    for (int c = 0; c < task->cell_count;) {
        const int length = task->cells[c].length;
        fprintf(out, "%8d", length);
        for (int d = 0; d < depth_count; d++) {
            const int has =
                c < task->cell_count && task->cells[c].length == length && task->cells[c].depth == depths[d];
            if (has) fprintf(out, " %6.3f", retrieval_accuracy(&task->cells[c++]));
            else fprintf(out, " %6s", "");
        }
        const RetrievalCell row = retrieval_sum(task, length);
        fprintf(out, " %6.3f\n", retrieval_accuracy(&row));
    }
}

static inline void retrieval_add_cell(cJSON* json, const RetrievalCell* cell) {
    json_add_whole(json, "samples", cell->samples);
    json_add_whole(json, "right", cell->right);
    json_add_double(json, "accuracy", retrieval_accuracy(cell));
    json_add_double(json, "token_accuracy", (double)cell->tokens_right / (double)cell->tokens);
}

// Returns the results as a JSON object; the caller deletes it.
static inline cJSON* retrieval_json(const Retrieval* task, const char* checkpoint) {
    cJSON* json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "checkpoint", checkpoint);
    cJSON_AddStringToObject(json, "task", task->prefix);
    const RetrievalCell all = retrieval_sum(task, 0);
    retrieval_add_cell(json, &all);
    cJSON* list = cJSON_AddArrayToObject(json, "cells");
    for (int c = 0; c < task->cell_count; c++) {
        cJSON* item = cJSON_CreateObject();
        json_add_whole(item, "length", task->cells[c].length);
        json_add_double(item, "depth", task->cells[c].depth);
        retrieval_add_cell(item, &task->cells[c]);
        cJSON_AddItemToArray(list, item);
    }
    return json;
}

#endif
