/*
Rotary position embedding (Su et al., arXiv 2104.09864) on packed rows of queries, keys and values, in place.
The pairs are (i, i + D/2), as in Hugging Face's LlamaForCausalLM, so that both programs use the same weights
without a permutation.

    rope_table(table, T, D, 10000);                         // on the host, once
    rope_forward(qkv, table, B, T, H, G, D, stream);        // rotates the queries and keys, leaves the values
*/
#ifndef DEV_CPU_ROPE_H
#define DEV_CPU_ROPE_H

#include "dev/cpu/device.h"

// (T, D/2, 2): cosine and sine of t * theta^(-2i/D). Computed in double, because the angle grows with t.
static inline void rope_table(float_acc* table, int T, int D, float theta) {
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < D / 2; i++) {
            double angle = t * pow((double)theta, -2.0 * i / D);
            table[((size_t)t * (D / 2) + i) * 2] = (float_acc)cos(angle);
            table[((size_t)t * (D / 2) + i) * 2 + 1] = (float_acc)sin(angle);
        }
    }
}

// Rotates by the table's angle times `direction`: 1 forward, -1 backward (the transpose).
static inline void rope_rotate(floatX* qkv, const float_acc* table, int B, int T, int H, int G, int D,
                               int direction) {
    const int half = D / 2;
#pragma omp parallel for schedule(static) collapse(2)
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            floatX* row = qkv + ((size_t)b * T + t) * (H + 2 * G) * D;
            const float_acc* angles = table + (size_t)t * D;
            for (int head = 0; head < H + G; head++) {
                floatX* x = row + head * D;
#pragma omp simd
                for (int i = 0; i < half; i++) {
                    float_acc cosine = angles[2 * i], sine = direction * angles[2 * i + 1];
                    floatX first = x[i], second = x[i + half];
                    x[i] = first * cosine - second * sine;
                    x[i + half] = second * cosine + first * sine;
                }
            }
        }
    }
}

static inline void rope_forward(floatX* qkv,            // (B, T, H + 2G, D)
                                const float_acc* table, // (T, D/2, 2)
                                int B, int T, int H, int G, int D, stream_t stream) {
    (void)stream;
    rope_rotate(qkv, table, B, T, H, G, D, 1);
}

static inline void rope_backward(floatX* dqkv,           // (B, T, H + 2G, D)
                                 const float_acc* table, // (T, D/2, 2)
                                 int B, int T, int H, int G, int D, stream_t stream) {
    (void)stream;
    rope_rotate(dqkv, table, B, T, H, G, D, -1);
}

#endif
