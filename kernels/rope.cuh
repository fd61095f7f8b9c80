/*
Rotary position embedding (Su et al., arXiv 2104.09864): the table of angles, and the rotation that one thread
makes. The pairs are (i, i + D/2), as in Hugging Face's LlamaForCausalLM.

    rope_table(table, T, D, 10000);                         // on the host, once

keys_forward and keys_backward (kernels/keys.cuh) make the passes over queries and keys. All heads of a token
read the same part of the table, which stays in the cache.
*/
#ifndef KERNELS_ROPE_CUH
#define KERNELS_ROPE_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

// Writes table (T, D/2, 2): cosine and sine of t * theta^(-2i/D). Computes in double, because the angle grows
// with t.
static inline void rope_table(float_acc* table, int T, int D, float theta) {
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < D / 2; i++) {
            const double angle = t * pow((double)theta, -2.0 * i / D);
            table[((size_t)t * (D / 2) + i) * 2] = (float_acc)cos(angle);
            table[((size_t)t * (D / 2) + i) * 2 + 1] = (float_acc)sin(angle);
        }
    }
}

// Rotates WIDTH neighbouring pairs (a, b) by their angles, which begin at `angles`. direction is 1, or -1 for
// the gradient.
template <int WIDTH>
__device__ inline void rope_turn(Values<WIDTH>& a, Values<WIDTH>& b, const float* angles, float direction) {
    const Values<2 * WIDTH> turn = load<2 * WIDTH>(angles);
    for (int k = 0; k < WIDTH; k++) {
        const float cosine = turn.at[2 * k], sine = direction * turn.at[2 * k + 1], first = a.at[k];
        a.at[k] = first * cosine - b.at[k] * sine;
        b.at[k] = b.at[k] * cosine + first * sine;
    }
}

#endif
