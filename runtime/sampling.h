/*
Choosing the next token from a model's logits.

    int* workspace = (int*)malloc_or_fail(sampling_workspace_bytes(V), "sampling");
    double uniform = random_uniform(seed, random_stream("sample"), position);
    int token = sample_token(logits, V, 0.8f, 50, 0.95f, uniform, workspace);

The steps have the order of Hugging Face's generation. Temperature divides the logits. Top-k keeps the k
largest. Top-p keeps the smallest set of these whose probability, among the k, reaches p; at least one token.
Then one of the kept tokens is drawn by its probability. The token depends on (logits, uniform) alone: the
same inputs give the same token on every machine with the same exp().

Of equal logits the lower token id counts as the larger, so exactly k tokens stay; Hugging Face keeps all that
tie with the k-th. A NaN logit counts as absent. A logit of -infinity is drawn only if all logits are.

Top-p: Holtzman et al., "The curious case of neural text degeneration", 2020.
*/
#ifndef RUNTIME_SAMPLING_H
#define RUNTIME_SAMPLING_H

#include <math.h>
#include <stddef.h>

// Bytes of sample_token()'s workspace: an id for every token.
static inline size_t sampling_workspace_bytes(int vocab_size) { return (size_t)vocab_size * sizeof(int); }

// Whether token a comes before token b.
static inline int sampling_before(const float* logits, int a, int b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

// Moves the token at `place` down to its position in the heap, whose root is the first of all tokens.
static inline void sampling_sink(const float* logits, int* heap, int count, int place) {
    int token = heap[place];
    for (;;) {
        int child = 2 * place + 1;
        if (child >= count) break;
        if (child + 1 < count && sampling_before(logits, heap[child + 1], heap[child])) child++;
        if (!sampling_before(logits, heap[child], token)) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = token;
}

// A token's probability relative to that of the most likely one, whose logit is `top`. Equality is tested
// first, since the difference of two infinite logits is NaN.
static inline double sampling_weight(float logit, float top, double temperature) {
    return logit == top ? 1.0 : exp(((double)logit - (double)top) / temperature);
}

// Removes the first of a heap's `count` tokens, and stores it in the place that the smaller heap leaves free.
static inline void sampling_pop(const float* logits, int* heap, int count) {
    int first = heap[0];
    heap[0] = heap[count - 1];
    heap[count - 1] = first;
    sampling_sink(logits, heap, count - 1, 0);
}

// Returns a token id, or -1 if every logit is NaN. logits: (vocab_size); temperature 0: the
// largest logit; top_k 0 (or vocab_size and more): off; top_p 1 (or more): off; uniform: in [0,
// 1); workspace: sampling_workspace_bytes().
static inline int sample_token(const float* logits, int vocab_size, float temperature, int top_k, float top_p,
                               double uniform, int* workspace) {
    int* tokens = workspace; // the tokens whose logits are not NaN
    int count = 0, best = -1;
    for (int i = 0; i < vocab_size; i++) {
        if (isnan(logits[i])) continue;
        if (best < 0 || logits[i] > logits[best]) best = i;
        tokens[count++] = i;
    }
    if (best < 0 || !(temperature > 0.0f)) return best;
    float top = logits[best];

    // A heap gives the tokens in descending order, and only the tokens that are taken cost time. Taken tokens
    // are stored from the end of the array backwards; `sorted` is their number.
    int kept = top_k > 0 && top_k < count ? top_k : count, sorted = 0;
    if (kept < count || top_p < 1.0f)
        for (int place = count / 2 - 1; place >= 0; place--) sampling_sink(logits, tokens, count, place);
    if (kept < count)
        for (; sorted < kept; sorted++) sampling_pop(logits, tokens, count - sorted);

    double total = 0.0;
    for (int i = 0; i < kept; i++) total += sampling_weight(logits[tokens[count - 1 - i]], top, temperature);
    if (top_p < 1.0f) {
        double reached = 0.0;
        int nucleus = 0;
        while (nucleus < kept && (nucleus == 0 || reached < (double)top_p * total)) {
            if (nucleus == sorted) sampling_pop(logits, tokens, count - sorted++);
            reached += sampling_weight(logits[tokens[count - 1 - nucleus++]], top, temperature);
        }
        kept = nucleus;
        total = reached;
    }

    // Rounding may leave uniform * total above the sum of all weights: then the
    // last token with a weight is chosen.
    double sum = 0.0;
    int chosen = best;
    for (int i = 0; i < kept && sum <= uniform * total; i++) {
        double weight = sampling_weight(logits[tokens[count - 1 - i]], top, temperature);
        if (weight > 0.0) chosen = tokens[count - 1 - i];
        sum += weight;
    }
    return chosen;
}

#endif
