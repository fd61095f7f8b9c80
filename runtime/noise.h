/*
The noise of perturbed grouped attention (PGQA of Khan et al., arXiv 2408.08454, with normal noise;
docs/math.md section 3). In training, each row o of attention's output (the D values of one token and head)
becomes

    o - alpha * std(o) * z        z normal, std over the D values

    const AttentionNoise noise = {noised, alpha, seed, noise_stream(step, layer), first_sequence};
    x.noise = &noise;                                          // AttentionTensors x; NULL: no noise
    attention_forward(&x, &s, stream);                         // writes out and noised

The counter (seed, step, layer, sequence, token, head, d) determines z, so the micro-batch, the number of
threads and a resume do not change it. std is a constant to the gradient, so the gradient of `out` equals that
of `noised`, and the noise needs no backward function. Attention's backward pass needs `out`. The gradient of
Wo needs `noised`, Wo's input.
*/
#ifndef RUNTIME_NOISE_H
#define RUNTIME_NOISE_H

#include "runtime/precision.h"
#include "runtime/random.h"

typedef struct {
    floatX* noised; // (B, T, H, D) in device memory
    float alpha;
    uint64_t seed, draws;    // draws: noise_stream()
    uint64_t first_sequence; // index, within the step, of the batch's first sequence
} AttentionNoise;

// One stream of random numbers for each layer of each step.
static inline uint64_t noise_stream(int step, int layer) {
    return random_stream("attention noise") + ((uint64_t)step << 16) + (uint64_t)layer;
}

#endif
