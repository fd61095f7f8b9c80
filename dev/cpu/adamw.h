/*
AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the global norm of the gradient that clips it.

    global_norm(norm, partials, grads, count, stream);
    adamw_update(params, masters, exp_avg, exp_avg_sq, grads, norm, count, settings, stream);
*/
#ifndef DEV_CPU_ADAMW_H
#define DEV_CPU_ADAMW_H

#include "dev/cpu/device.h"
// AdamW
#include "runtime/adamw.h"

#define GLOBAL_NORM_CHUNK 65536 // elements that are summed as one

// Elements of the scratch that global_norm needs.
static inline size_t global_norm_partials(size_t count) {
    return (count + GLOBAL_NORM_CHUNK - 1) / GLOBAL_NORM_CHUNK;
}

// norm = sqrt(sum of squares), summed in an order that does not depend on the number of threads.
static inline void global_norm(float_acc* norm,        // (1)
                               float_acc* partials,    // (global_norm_partials(count))
                               const float_acc* grads, // (count)
                               size_t count, stream_t stream) {
    (void)stream;
    size_t chunks = global_norm_partials(count);
#pragma omp parallel for schedule(static)
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        size_t first = chunk * GLOBAL_NORM_CHUNK;
        size_t last = first + GLOBAL_NORM_CHUNK < count ? first + GLOBAL_NORM_CHUNK : count;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = first; i < last; i++) sum += (double)grads[i] * (double)grads[i];
        partials[chunk] = (float_acc)sum;
    }
    double total = 0;
    for (size_t chunk = 0; chunk < chunks; chunk++) total += (double)partials[chunk];
    *norm = (float_acc)sqrt(total);
}

// Where the parameters have masters, these are what is updated and params are the copy of them that the model computes with.
static inline void adamw_update(floatX* params,         // (count)
                                float_acc* masters,     // (count), or NULL: params are all there is
                                float_acc* exp_avg,     // (count)
                                float_acc* exp_avg_sq,  // (count)
                                const float_acc* grads, // (count)
                                const float_acc* norm,  // (1) the gradient's global norm
                                size_t count, AdamW settings, stream_t stream) {
    (void)stream;
    const float_acc beta1 = settings.beta1, beta2 = settings.beta2;
    const float_acc scale = settings.clip > 0 && *norm > settings.clip ? settings.clip / *norm : 1;
    const AdamWStep step = adamw_step(settings);
    const float_acc rate = step.rate, eps = step.eps, keep = step.keep;
    const float_acc* from = masters ? masters : params; // floatX is float_acc on this device
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) {
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

#endif
