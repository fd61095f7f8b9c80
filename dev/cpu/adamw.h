/*
AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the global norm of the gradient that clips it.

    sum_of_squares(&sums[i], partials, grads, count, stream);   // of each part of the gradient
    global_norm(norm, sums, parts, stream);
    adamw_update(params, masters, exp_avg, exp_avg_sq, grads, norm, decays, count, settings, stream);
*/
#ifndef DEV_CPU_ADAMW_H
#define DEV_CPU_ADAMW_H

#include "dev/cpu/device.h"
// AdamW
#include "runtime/adamw.h"

#define GLOBAL_NORM_CHUNK 65536 // elements of one partial sum

// Elements of the scratch that sum_of_squares needs.
static inline size_t global_norm_partials(size_t count) {
    return (count + GLOBAL_NORM_CHUNK - 1) / GLOBAL_NORM_CHUNK;
}

// The order of the sum does not depend on the number of threads.
static inline void sum_of_squares(float_acc* sum,         // (1)
                                  float_acc* partials,    // (global_norm_partials(count))
                                  const float_acc* grads, // (count)
                                  size_t count, stream_t stream) {
    (void)stream;
    size_t chunks = global_norm_partials(count);
#pragma omp parallel for schedule(static)
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        size_t first = chunk * GLOBAL_NORM_CHUNK;
        size_t last = first + GLOBAL_NORM_CHUNK < count ? first + GLOBAL_NORM_CHUNK : count;
        double squares = 0;
#pragma omp simd reduction(+ : squares)
        for (size_t i = first; i < last; i++) squares += (double)grads[i] * (double)grads[i];
        partials[chunk] = (float_acc)squares;
    }
    double total = 0;
    for (size_t chunk = 0; chunk < chunks; chunk++) total += (double)partials[chunk];
    *sum = (float_acc)total;
}

// The norm of a gradient from the sums of its parts' squares.
static inline void global_norm(float_acc* norm,       // (1)
                               const float_acc* sums, // (parts)
                               int parts, stream_t stream) {
    (void)stream;
    double total = 0;
    for (int i = 0; i < parts; i++) total += (double)sums[i];
    *norm = (float_acc)sqrt(total);
}

// With masters, the update changes the masters, and params becomes the copy of them that the model computes
// with. The first element is at a multiple of DECAY_BLOCK in the flat parameters.
static inline void adamw_update(floatX* params,          // (count)
                                float_acc* masters,      // (count), or NULL: there are no masters
                                float_acc* exp_avg,      // (count)
                                float_acc* exp_avg_sq,   // (count)
                                const float_acc* grads,  // (count)
                                const float_acc* norm,   // (1) the gradient's global norm
                                const float_acc* decays, // (decay_blocks(count)) 1 where weights decay, or 0
                                size_t count, AdamW settings, stream_t stream) {
    (void)stream;
    const float_acc beta1 = settings.beta1, beta2 = settings.beta2;
    const float_acc scale = settings.clip > 0 && *norm > settings.clip ? settings.clip / *norm : 1;
    const AdamWStep step = adamw_step(settings);
    const float_acc rate = step.rate, eps = step.eps;
    const float_acc* from = masters ? masters : params; // floatX is float_acc on this device
#pragma omp parallel for schedule(static)
    for (size_t block = 0; block < decay_blocks(count); block++) {
        const size_t first = block * DECAY_BLOCK;
        const size_t last = first + DECAY_BLOCK < count ? first + DECAY_BLOCK : count;
        const float_acc keep = 1 - step.decay * decays[block];
#pragma omp simd
        for (size_t i = first; i < last; i++) {
            float_acc gradient = grads[i] * scale;
            float_acc m = exp_avg[i] = beta1 * exp_avg[i] + (1 - beta1) * gradient;
            float_acc v = exp_avg_sq[i] = beta2 * exp_avg_sq[i] + (1 - beta2) * gradient * gradient;
#ifdef PRECISION_FP64
            float_acc root = sqrt(v);
#else
            float_acc root = sqrtf(v);
#endif
            params[i] = from[i] * keep - rate * m / (root + eps);
            if (masters) masters[i] = params[i];
        }
    }
}

#endif
