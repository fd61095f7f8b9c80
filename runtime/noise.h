/*
The noise of perturbed grouped attention (PGQA of Khan et al., arXiv 2408.08454, with normal noise; docs/math.md section 3): while
training, each row o of attention's output, the D values of one token and head, becomes

    o - alpha * std(o) * z        z normal, std over the D values

    const AttentionNoise noise = {noised, alpha, seed, noise_stream(step, layer), first_sequence};
    attention_forward(out, ..., &noise, stream);               // writes out and noised; NULL: out alone

z is drawn by the counter (seed, step, layer, sequence, token, head, d), so it is the same for every micro-batch size, number
of threads and resume. std counts as a constant: the gradient of `out` is that of `noised`, and there is no backward. What
needs the output itself afterwards is attention's backward; what was multiplied, and so what Wo's gradient needs, is `noised`.
*/
#ifndef RUNTIME_NOISE_H
#define RUNTIME_NOISE_H

#include "runtime/precision.h"
#include "runtime/random.h"

typedef struct {
    floatX* noised; // (B, T, H, D) in the memory of the device
    float alpha;
    uint64_t seed, draws;    // draws: noise_stream()
    uint64_t first_sequence; // the place of the batch's first sequence among those of the whole step
} AttentionNoise;

// One stream of random numbers for each layer of each step.
static inline uint64_t noise_stream(int step, int layer) {
    return random_stream("attention noise") + ((uint64_t)step << 16) + (uint64_t)layer;
}

#endif
