/*
Key convolution (Optimizing Mixture of Block Attention, arXiv 2511.11571; docs/math.md section 2): a short
causal filter over the keys of a layer, for each channel, with a residual:

    k'_t = k_t + silu( sum over l < taps of w_l * k_{t-l} )        keys before the sequence are zero

This file has the part of one thread. keys_forward and keys_backward (kernels/keys.cuh) make the passes over
the keys.
*/
#ifndef KERNELS_KEYCONV_CUH
#define KERNELS_KEYCONV_CUH

#include "kernels/vector.cuh"

enum { KEYCONV_MAX_TAPS = 5 };

// Returns the sum over l < taken of w_l * k_{t-l}, for WIDTH channels. `key` points at k_t, `weight` at w_0;
// rows have `width` channels. taken is min(t + 1, taps).
template <int WIDTH>
__device__ inline Values<WIDTH> keyconv_filter(const floatX* key, const floatX* weight, int taken,
                                               size_t width) {
    Values<WIDTH> sum = {};
    for (int l = 0; l < KEYCONV_MAX_TAPS; l++) {
        if (l >= taken) break;
        const Values<WIDTH> k = load<WIDTH>(key - l * width), w = load<WIDTH>(weight + l * width);
        for (int i = 0; i < WIDTH; i++) sum.at[i] += w.at[i] * k.at[i];
    }
    return sum;
}

// key += silu(keyconv_filter(keys, ...))
template <int WIDTH>
__device__ inline void keyconv_add(Values<WIDTH>& key, const floatX* keys, const floatX* weight, int taken,
                                   size_t width) {
    const Values<WIDTH> sum = keyconv_filter<WIDTH>(keys, weight, taken, width);
    for (int i = 0; i < WIDTH; i++) key.at[i] += sum.at[i] / (1 + __expf(-sum.at[i]));
}

#endif
