/*
AdamW (Loshchilov and Hutter, arXiv 1711.05101), and the global norm of the gradient, which clips it
(docs/math.md section 5). The twin of dev/cpu/adamw.h.

    sum_of_squares(&sums[i], partials, grads, count, stream);   // for each part of the gradient
    global_norm(norm, sums, parts, stream);
    adamw_update(params, masters, exp_avg, exp_avg_sq, grads, norm, decays, count, settings, stream);

One launch updates any number of tensors. decays has one number for each DECAY_BLOCK elements: 1 if they
decay, else 0.

Cost in bytes for each element: the norm 4; the update 30 with bf16 parameters and fp32 masters (moments and
masters read and written, gradients read, parameters written), 28 in fp32; decays 4/64.
*/
#ifndef KERNELS_ADAMW_CUH
#define KERNELS_ADAMW_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"
// AdamW
#include "runtime/adamw.h"

enum { GLOBAL_NORM_CHUNK = 65536 }; // elements that a thread block adds up
enum { GLOBAL_NORM_BLOCK = 512 };

// Number of elements of `partials`, the scratch array of sum_of_squares.
static inline size_t global_norm_partials(size_t count) { return ceil_div(count, GLOBAL_NORM_CHUNK); }

template <int WIDTH> __global__ void squares_kernel(float* partials, const float* grads, size_t count) {
    const size_t first = (size_t)blockIdx.x * GLOBAL_NORM_CHUNK;
    const size_t end = min(first + GLOBAL_NORM_CHUNK, count);
    float sum = 0;
    for (size_t i = first + threadIdx.x * WIDTH; i < end; i += GLOBAL_NORM_BLOCK * WIDTH) {
        if (i + WIDTH <= end) {
            const Values<WIDTH> some = load<WIDTH>(grads + i);
            for (int k = 0; k < WIDTH; k++) sum += some.at[k] * some.at[k];
        } else {
            for (size_t k = i; k < end; k++) sum += grads[k] * grads[k];
        }
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Adds up the parts in double, in one thread block, because there are few. Takes the square root of the sum
// if ROOT.
template <bool ROOT> __global__ void total_kernel(float* total, const float* parts, size_t count) {
    __shared__ double sums[GLOBAL_NORM_BLOCK];
    double sum = 0;
    for (size_t i = threadIdx.x; i < count; i += GLOBAL_NORM_BLOCK) sum += (double)parts[i];
    sums[threadIdx.x] = sum;
    for (unsigned half = GLOBAL_NORM_BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *total = (float)(ROOT ? sqrt(sums[0]) : sums[0]);
}

// The sum of the squares of a gradient, in a fixed order.
static inline void sum_of_squares(float_acc* sum,         // (1)
                                  float_acc* partials,    // (global_norm_partials(count))
                                  const float_acc* grads, // (count)
                                  size_t count, stream_t stream) {
    const size_t chunks = global_norm_partials(count);
    launch((uintptr_t)grads % 16 == 0 ? squares_kernel<4> : squares_kernel<1>, (unsigned)chunks,
           GLOBAL_NORM_BLOCK, 0, stream, partials, grads, count);
    launch(total_kernel<false>, 1, GLOBAL_NORM_BLOCK, 0, stream, sum, partials, chunks);
}

// The norm of a gradient: the square root of the total of its parts' sums of squares.
static inline void global_norm(float_acc* norm,       // (1)
                               const float_acc* sums, // (parts)
                               int parts, stream_t stream) {
    launch(total_kernel<true>, 1, GLOBAL_NORM_BLOCK, 0, stream, norm, sums, (size_t)parts);
}

template <int WIDTH>
__global__ void adamw_kernel(floatX* params, float* masters, float* exp_avg, float* exp_avg_sq,
                             const float* grads, const float* norm, const float* decays, size_t count,
                             float beta1, float beta2, float clip, AdamWStep step) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= count) return;
    const float scale = clip > 0 && *norm > clip ? clip / *norm : 1;
    const float keep = 1 - step.decay * decays[at / DECAY_BLOCK];
    const Values<WIDTH> gradient = load<WIDTH>(grads + at);
    Values<WIDTH> p = masters ? load<WIDTH>(masters + at) : load<WIDTH>(params + at);
    Values<WIDTH> m = load<WIDTH>(exp_avg + at), v = load<WIDTH>(exp_avg_sq + at);
    for (int i = 0; i < WIDTH; i++) {
        const float g = gradient.at[i] * scale;
        m.at[i] = beta1 * m.at[i] + (1 - beta1) * g;
        v.at[i] = beta2 * v.at[i] + (1 - beta2) * g * g;
        p.at[i] = p.at[i] * keep - step.rate * m.at[i] / (sqrtf(v.at[i]) + step.eps);
    }
    store(exp_avg + at, m);
    store(exp_avg_sq + at, v);
    store(params + at, p);
    if (masters) store(masters + at, p);
}

// With masters, the update changes the masters, and params becomes their rounded copy, which the model
// computes with. The first element must be at a multiple of DECAY_BLOCK in the flat array of all parameters.
static inline void adamw_update(floatX* params,          // (count)
                                float_acc* masters,      // (count), or NULL: update params directly
                                float_acc* exp_avg,      // (count)
                                float_acc* exp_avg_sq,   // (count)
                                const float_acc* grads,  // (count)
                                const float_acc* norm,   // (1) the gradient's global norm
                                const float_acc* decays, // (decay_blocks(count)) 1 where weights decay, or 0
                                size_t count, AdamW settings, stream_t stream) {
    const int packs = whole_packs((int)(count % PACK), params, masters, exp_avg, exp_avg_sq, grads);
    launch(packs ? adamw_kernel<PACK> : adamw_kernel<1>, flat_grid(count, packs ? (int)PACK : 1), FLAT_BLOCK,
           0, stream, params, masters, exp_avg, exp_avg_sq, grads, norm, decays, count, settings.beta1,
           settings.beta2, settings.clip, adamw_step(settings));
}

#endif
