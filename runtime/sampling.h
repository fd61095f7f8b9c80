/*
Choosing the next token from a model's logits.

    int* workspace = (int*)malloc_or_fail(sampling_workspace_bytes(V), "sampling");
    double uniform = random_uniform(seed, random_stream("sample"), position);
    int token = sample_token(logits, V, 0.8f, 50, 0.95f, uniform, workspace);

Temperature, then top-k, then top-p, in that order, as Hugging Face's generation applies them: the logits are
divided by the temperature; the k largest stay; of these the smallest set whose probability, among the k,
reaches p stays, always one token at least; one of what stays is drawn in proportion to its probability. A
token is chosen by (logits, uniform) alone: the same inputs give the same token, on every machine with the
same exp().

Of equal logits the lower token id counts as the larger. So exactly k tokens stay, where Hugging Face keeps
all that tie with the k-th. A logit that is NaN is as good as absent, one of -infinity is drawn only when all
are.

Top-p: Holtzman et al., "The curious case of neural text degeneration", 2020.
*/
#ifndef RUNTIME_SAMPLING_H
#define RUNTIME_SAMPLING_H

#include <math.h>
#include <stddef.h>

// `workspace` of sample_token: an id for every token.
static inline size_t sampling_workspace_bytes(int vocab_size) { return (size_t)vocab_size * sizeof(int); }

// Does token a come before token b?
static inline int sampling_before(const float* logits, int a, int b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

// Lets the token at `place` sink to where it belongs in a heap that has the first of all tokens at its root.
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

// A token's probability relative to that of the likeliest one, whose logit is `top`. Infinite logits are why
// equality is asked first.
static inline double sampling_weight(float logit, float top, double temperature) {
    return logit == top ? 1.0 : exp(((double)logit - (double)top) / temperature);
}

// Takes the first of the `count` tokens of a heap out of it, to the place that the shrinking heap leaves
// free.
static inline void sampling_pop(const float* logits, int* heap, int count) {
    int first = heap[0];
    heap[0] = heap[count - 1];
    heap[count - 1] = first;
    sampling_sink(logits, heap, count - 1, 0);
}

// A token id. logits: (vocab_size); temperature 0: the largest logit; top_k 0 (or vocab_size and more): off;
// top_p 1 (or more): off; uniform: in [0, 1); workspace: sampling_workspace_bytes(). -1 when every logit is
// NaN.
static inline int sample_token(const float* logits, int vocab_size, float temperature, int top_k, float top_p,
                               double uniform, int* workspace) {
    int* tokens = workspace; // those whose logits are numbers
    int count = 0, best = -1;
    for (int i = 0; i < vocab_size; i++) {
        if (isnan(logits[i])) continue;
        if (best < 0 || logits[i] > logits[best]) best = i;
        tokens[count++] = i;
    }
    if (best < 0 || !(temperature > 0.0f)) return best;
    float top = logits[best];

    // A heap gives the tokens in falling order, at a cost only for those that are taken. They gather at the
    // end of the array, the first of all in its last place; `sorted` of them are there.
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

    // Rounding may leave uniform * total behind the last token: then it is the last that has any weight.
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
