/*
This header samples from a model, writes its logits, and measures the retrieval task. The training loop also
calls generate_sample().

    LanguageModel model = {context, &config, B, T, next_logits, forward, read_logits};
    generate_sample(&model, tokenizer, &options, "generate", 0);        // --generate, and samples while training
    generate_logits(&model, &options);                                  // --write-logits
    generate_answers(&model, task, &options, checkpoint, tokenizer);    // --eval-retrieval

The program that has the model gives its three functions.
*/
#ifndef RUNTIME_GENERATE_H
#define RUNTIME_GENERATE_H

#include "runtime/retrieval.h" // defines Retrieval, retrieval_evaluate
#include "runtime/run.h"       // defines Options, known_tokens, stop_wanted
#include "runtime/sampling.h"  // defines sample_token

typedef struct {
    void* context;
    const ModelConfig* config;
    int B, T; // the largest batch, and the longest sequence
    // Computes the logits (V) of the token that follows T tokens of one sequence. The previous call processed
    // the first `start` tokens; the model may reuse their keys and values. `scratch` holds Vp values.
    void (*next_logits)(void* context, float* logits, const int* tokens, int T, int start, floatX* scratch);
    void (*forward)(void* context, const int* tokens, int B, int T); // runs tokens (B, T)
    // Computes the Vp logits of one row of the last forward() and copies them to the host. Row b T + t is token
    // t of sequence b.
    void (*read_logits)(void* context, floatX* logits, size_t row);
} LanguageModel;

// ----------------------------------------------------------------------------
// Samples and logits

// Prints the text of a token to stdout, or its number if there is no tokenizer.
static inline void print_token(const Tokenizer* tokenizer, int token) {
    size_t length = 0;
    const char* bytes = tokenizer ? tokenizer_token_bytes(tokenizer, token, &length) : NULL;
    if (bytes) (void)fwrite(bytes, 1, length, stdout);
    else printf("%d ", token);
    fflush(stdout);
}

// Continues the prompt by up to --sample-length tokens and prints both. It ends early at the model's sequence
// length or at the end-of-text token. `name` and `number` key the random stream, so a sample does not depend
// on earlier samples. Returns 0 if a signal interrupted it, else 1.
static inline int generate_sample(const LanguageModel* model, Tokenizer* tokenizer, const Options* options,
                                  const char* name, uint64_t number) {
    const int V = known_tokens(model->config, tokenizer), most = model->T;
    const int end_of_text = tokenizer ? tokenizer_special_id(tokenizer, "<|endoftext|>") : -1;
    TokenBuffer prompt = {NULL, 0, 0};
    int32_t first = end_of_text >= 0 ? end_of_text : 0;
    token_buffer_append(&prompt, &first, 1);
    if (options->prompt) tokenizer_encode(tokenizer, options->prompt, strlen(options->prompt), 1, &prompt);
    if (prompt.count >= (size_t)most)
        fail("--prompt: %zu tokens, the model's sequences have %d", prompt.count, most);

    int* tokens = (int*)malloc_or_fail((size_t)most * sizeof(int), "a sample");
    float* logits =
        (float*)malloc_or_fail((size_t)model->config->vocab_size * sizeof(float), "a sample's logits");
    floatX* scratch =
        (floatX*)malloc_or_fail((size_t)model->config->padded_vocab * sizeof(floatX), "a sample's logits");
    int* workspace = (int*)malloc_or_fail(sampling_workspace_bytes(V), "sampling");
    int count = 0, done = 0, stopped = 0;
    for (size_t i = 0; i < prompt.count; i++) {
        tokens[count++] = prompt.ids[i];
        if (i > 0) print_token(tokenizer, prompt.ids[i]);
    }
    uint64_t stream = random_stream(name) ^ number;
    for (int i = 0; i < options->sample_length && count < most; i++) {
        if ((stopped = stop_wanted() != 0)) break;
        model->next_logits(model->context, logits, tokens, count, done, scratch);
        done = count;
        double uniform = random_uniform(options->seed, stream, (uint64_t)i);
        int token = sample_token(logits, V, (float)options->temperature, options->top_k,
                                 (float)options->top_p, uniform, workspace);
        if (token < 0) fail("the model's logits are not numbers");
        if (token == end_of_text) break;
        tokens[count++] = token;
        print_token(tokenizer, token);
    }
    printf("\n");
    token_buffer_free(&prompt);
    free(tokens);
    free(logits);
    free(scratch);
    free(workspace);
    return !stopped;
}

// Runs the model over --tokens and writes all logits, for a comparison with other programs.
static inline void generate_logits(const LanguageModel* model, const Options* options) {
    const int V = model->config->vocab_size, Vp = model->config->padded_vocab;
    int* tokens = (int*)malloc_or_fail((size_t)model->T * sizeof(int), "tokens");
    int T = 0;
    for (const char* text = options->tokens; *text;) {
        char* end;
        long token = strtol(text, &end, 10);
        if (end == text || (*end && *end != ','))
            fail_usage("--tokens %s: want ids separated by commas", options->tokens);
        if (token < 0 || token >= V) fail_usage("--tokens: %ld is outside the vocabulary of %d", token, V);
        if (T == model->T) fail_usage("--tokens: more than the %d tokens of the model's sequences", model->T);
        tokens[T++] = (int)token;
        text = end + (*end == ',');
    }
    if (T == 0) fail_usage("--tokens: want at least one id");
    model->forward(model->context, tokens, 1, T);
    floatX* logits = (floatX*)malloc_or_fail((size_t)T * Vp * sizeof(floatX), "logits");
    for (int t = 0; t < T; t++) model->read_logits(model->context, logits + (size_t)t * Vp, (size_t)t);
    logits_write(options->write_logits, logits, tokens, T, V, Vp);
    free(tokens);
    free(logits);
}

// ----------------------------------------------------------------------------
// The retrieval task

typedef struct {
    const LanguageModel* model;
    int known; // tokens of the tokenizer
} RetrievalContext;

static inline void retrieval_forward(void* context, const int* tokens, int rows, int T) {
    const LanguageModel* model = ((const RetrievalContext*)context)->model;
    model->forward(model->context, tokens, rows, T);
}

// Returns the most likely token after one position of the batch that retrieval_forward() ran. If several tokens
// tie, it returns the lowest id.
static inline int retrieval_likeliest(void* context, int row, int T, int position) {
    const LanguageModel* model = ((const RetrievalContext*)context)->model;
    const int V = ((const RetrievalContext*)context)->known;
    floatX* scratch = (floatX*)malloc_or_fail((size_t)model->config->padded_vocab * sizeof(floatX), "logits");
    float_acc* logits = (float_acc*)malloc_or_fail((size_t)V * sizeof(float_acc), "logits");
    model->read_logits(model->context, scratch, (size_t)row * T + position);
    convert_values(logits, DTYPE_FLOAT_ACC, scratch, DTYPE_FLOATX, (size_t)V);
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    free(logits);
    free(scratch);
    return best;
}

// Runs the task and prints its accuracy by length and depth as a table and as a line of JSON. With --output
// it also writes the JSON to retrieval.json there.
static inline void generate_answers(const LanguageModel* model, Retrieval* task, const Options* options,
                                    const char* checkpoint, const Tokenizer* tokenizer) {
    RetrievalContext context = {model, known_tokens(model->config, tokenizer)};
    const RetrievalModel subject = {&context, retrieval_forward, retrieval_likeliest};
    retrieval_evaluate(task, &subject, context.known, tokenizer ? tokenizer_hash(tokenizer) : 0, model->B);
    retrieval_print(task, stdout);
    cJSON* json = retrieval_json(task, checkpoint);
    char* line = cJSON_PrintUnformatted(json);
    if (!line) fail("out of memory: the result as JSON");
    printf("%s\n", line);
    cJSON_free(line);
    if (options->output) {
        char path[PATH_MAX];
        make_directories_or_fail(options->output);
        path_format(path, "%s/retrieval.json", options->output);
        json_replace_file(path, json);
    }
    cJSON_Delete(json);
}

#endif
