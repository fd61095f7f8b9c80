/*
The noise of perturbed grouped attention (pgqa, runtime/noise.h), for the finished rows of attention's
output. attention_forward() and the MoBA functions call it.
*/
#ifndef DEV_CPU_NOISE_H
#define DEV_CPU_NOISE_H

#include "dev/cpu/device.h"
#include "runtime/noise.h"

// Writes the rows start..T-1 of noise->noised, or nothing if noise is NULL.
static inline void attention_noise(const AttentionNoise* noise,
                                   const floatX* out, // (B, T, H, D)
                                   int B, int T, int start, int H, int D) {
    if (!noise) return;
    const uint64_t first_row = noise->first_sequence * T * H;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < (size_t)B * T * H; i++) {
        if ((int)(i / H % T) < start) continue;
        const floatX* o = out + i * D;
        float_acc mean = 0, square = 0;
        for (int d = 0; d < D; d++) mean += o[d];
        mean /= D;
        for (int d = 0; d < D; d++) square += (o[d] - mean) * (o[d] - mean);
        const double scale = (double)noise->alpha * sqrt((double)(square / D));
        for (int d = 0; d < D; d++) {
            const double z = random_normal(noise->seed, noise->draws, (first_row + i) * D + d);
            noise->noised[i * D + d] = (floatX)((double)o[d] - scale * z);
        }
    }
}

#endif
