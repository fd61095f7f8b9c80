/*
Rotary position embedding (Su et al., arXiv 2104.09864) on packed rows of queries, keys and values, in place. The twin of
dev/cpu/rope.h. The pairs are (i, i + D/2), as in Hugging Face's LlamaForCausalLM.

    rope_table(table, T, D, 10000);                         // on the host, once
    rope_forward(qkv, table, B, T, H, G, D, stream);        // rotates the queries and keys, leaves the values

Cost: queries and keys read and written once, 4 bytes an element of bf16; the table stays in the cache, where the heads of a
token read the same part of it.
*/
#ifndef KERNELS_ROPE_CUH
#define KERNELS_ROPE_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

// (T, D/2, 2): cosine and sine of t * theta^(-2i/D). Computed in double, for the angle grows with t.
static inline void rope_table(float_acc* table, int T, int D, float theta) {
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < D / 2; i++) {
            const double angle = t * pow((double)theta, -2.0 * i / D);
            table[((size_t)t * (D / 2) + i) * 2] = (float_acc)cos(angle);
            table[((size_t)t * (D / 2) + i) * 2 + 1] = (float_acc)sin(angle);
        }
    }
}

// A thread rotates WIDTH neighbouring pairs of one head by the table's angle times `direction`.
template <int WIDTH>
__global__ void rope_kernel(floatX* qkv,        // (B T, H + 2G, D)
                            const float* table, // (T, D/2, 2)
                            int rows, int T, int H, int G, int D, float direction) {
    const int half = D / 2, in_head = half / WIDTH, in_row = (H + G) * in_head;
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int row = (int)(index / in_row), in = (int)(index % in_row);
    if (row >= rows) return;
    const int head = in / in_head, i = in % in_head * WIDTH;
    floatX* x = qkv + ((size_t)row * (H + 2 * G) + head) * D + i;
    const float* angles = table + ((size_t)(row % T) * half + i) * 2;
    Values<WIDTH> a = load<WIDTH>(x), b = load<WIDTH>(x + half);
    const Values<2 * WIDTH> turn = load<2 * WIDTH>(angles);
    for (int k = 0; k < WIDTH; k++) {
        const float cosine = turn.at[2 * k], sine = direction * turn.at[2 * k + 1], first = a.at[k];
        a.at[k] = first * cosine - b.at[k] * sine;
        b.at[k] = b.at[k] * cosine + first * sine;
    }
    store(x, a);
    store(x + half, b);
}

static inline void rope_rotate(floatX* qkv, const float_acc* table, int B, int T, int H, int G, int D,
                               float direction, stream_t stream) {
    const int packs = whole_packs(D / 2, qkv, table);
    launch(packs ? rope_kernel<PACK> : rope_kernel<1>,
           flat_grid((size_t)B * T * (H + G) * (D / 2), packs ? (int)PACK : 1), FLAT_BLOCK, 0, stream, qkv,
           table, B * T, T, H, G, D, direction);
}

static inline void rope_forward(floatX* qkv,            // (B, T, H + 2G, D)
                                const float_acc* table, // (T, D/2, 2)
                                int B, int T, int H, int G, int D, stream_t stream) {
    rope_rotate(qkv, table, B, T, H, G, D, 1, stream);
}

static inline void rope_backward(floatX* dqkv,           // (B, T, H + 2G, D)
                                 const float_acc* table, // (T, D/2, 2)
                                 int B, int T, int H, int G, int D, stream_t stream) {
    rope_rotate(dqkv, table, B, T, H, G, D, -1, stream);
}

#endif
