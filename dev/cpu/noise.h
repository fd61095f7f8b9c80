/*
The noise of perturbed grouped attention (PGQA of arXiv 2408.08454, with normal noise; docs/math.md section 3): while training,
each row o of attention's output, the D values of one token and head, becomes

    o - alpha * std(o) * z        z normal, std over the D values

    attention_noise(noised, out, B, T, H, D, alpha, seed, noise_stream(step, layer), first_sequence, stream);

z is drawn by the counter (seed, step, layer, sequence, token, head, d), so it is the same for every micro-batch size, number
of threads and resume. std counts as a constant: the gradient of `out` is that of `noised`, and there is no backward. What
needs the output itself afterwards is attention's backward; what was multiplied, and so what Wo's gradient needs, is `noised`.
*/
#ifndef DEV_CPU_NOISE_H
#define DEV_CPU_NOISE_H

#include "dev/cpu/device.h"
#include "runtime/random.h"

// One stream of random numbers for each layer of each step.
static inline uint64_t noise_stream(int step, int layer) {
    return random_stream("attention noise") + ((uint64_t)step << 16) + (uint64_t)layer;
}

// first_sequence is the place of this batch's first sequence among those of the whole step.
static inline void attention_noise(floatX* noised,    // (B, T, H, D)
                                   const floatX* out, // (B, T, H, D)
                                   int B, int T, int H, int D, float alpha, uint64_t seed, uint64_t draws,
                                   long first_sequence, stream_t stream) {
    (void)stream;
    const uint64_t first_row = (uint64_t)first_sequence * T * H;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < (size_t)B * T * H; i++) {
        const floatX* o = out + i * D;
        float_acc mean = 0, square = 0;
        for (int d = 0; d < D; d++) mean += o[d];
        mean /= D;
        for (int d = 0; d < D; d++) square += (o[d] - mean) * (o[d] - mean);
        const double scale = (double)alpha * sqrt((double)(square / D));
        for (int d = 0; d < D; d++) {
            double z = random_normal(seed, draws, (first_row + i) * D + d);
            noised[i * D + d] = (floatX)((double)o[d] - scale * z);
        }
    }
}

#endif
