/*
The norm of the keys of each KV head: the statistic from which key-driven attention allocates its query heads
(docs/math.md section 3).

    key_rms(rms, sums, qkv, B, T, H, G, D, stream);      // from the keys: one number a sequence and KV head
    key_weight_norm(norm, wk, gain, G, D, C, stream);    // from the key projection's weights, without data

The keys are those that the projection gives, before convolution and RoPE.
*/
#ifndef DEV_CPU_KEYNORM_H
#define DEV_CPU_KEYNORM_H

#include "dev/cpu/device.h"

// rms[b][g] is the root mean square of KV head g's keys in sequence b, over tokens and channels. Adds rms[b][g]
// over all b to sums[g]. Every sequence has T tokens, without padding. Each sum has one order for any number of
// threads; the long sum over the tokens is in double.
static inline void key_rms(float_acc* rms,    // (B, G)
                           float_acc* sums,   // (G) accumulates
                           const floatX* qkv, // (B, T, H + 2G, D)
                           int B, int T, int H, int G, int D, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int i = 0; i < B * G; i++) {
        const int b = i / G, g = i % G;
        double sum = 0;
        for (int t = 0; t < T; t++) {
            const floatX* key = qkv + (((size_t)b * T + t) * (H + 2 * G) + H + g) * D;
            float_acc square = 0;
#pragma omp simd reduction(+ : square)
            for (int d = 0; d < D; d++) square += key[d] * key[d];
            sum += (double)square;
        }
        rms[i] = (float_acc)sqrt(sum / ((double)T * D));
    }
    for (int i = 0; i < B * G; i++) sums[i % G] += rms[i];
}

// Multiplies each column of Wk by the gain of the RMSNorm before the projection. norm[g] is then the Frobenius
// norm of KV head g's D rows.
static inline void key_weight_norm(float_acc* norm,    // (G)
                                   const floatX* wk,   // (G, D, C)
                                   const floatX* gain, // (C)
                                   int G, int D, int C, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int g = 0; g < G; g++) {
        double sum = 0;
        for (int d = 0; d < D; d++) {
            const floatX* row = wk + ((size_t)g * D + d) * C;
            float_acc square = 0;
#pragma omp simd reduction(+ : square)
            for (int c = 0; c < C; c++) square += row[c] * gain[c] * row[c] * gain[c];
            sum += (double)square;
        }
        norm[g] = (float_acc)sqrt(sum);
    }
}

#endif
