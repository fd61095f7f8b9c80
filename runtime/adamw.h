/*
The settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the factors of one step, for every device.
docs/math.md section 5 has the formulas.
*/
#ifndef RUNTIME_ADAMW_H
#define RUNTIME_ADAMW_H

#include <math.h>
#include <stddef.h>
#include "runtime/precision.h" // defines float_acc

typedef struct {
    float learning_rate, beta1, beta2, eps, weight_decay;
    float clip; // a gradient with a larger norm is scaled down to this norm; 0: never
    int step;   // 1 at the first update, for the bias corrections
} AdamW;

// Elements of the flat parameters that share one factor of weight decay (0 or 1). No tensor
// with another factor begins inside a block.
enum { DECAY_BLOCK = 64 };

static inline size_t decay_blocks(size_t count) { return (count + DECAY_BLOCK - 1) / DECAY_BLOCK; }

// The factors of p = p * (1 - decay) - rate * m / (sqrt(v) + eps), which equals the usual
// p = p * (1 - lr * weight_decay) - lr * (m / c1) / (sqrt(v / c2) + eps) with fewer divisions.
typedef struct {
    float_acc rate, eps, decay;
} AdamWStep;

static inline AdamWStep adamw_step(AdamW settings) {
    const float_acc correction1 = (float_acc)(1.0 - pow((double)settings.beta1, settings.step));
    const float_acc root_correction2 = (float_acc)sqrt(1.0 - pow((double)settings.beta2, settings.step));
    AdamWStep step;
    step.rate = settings.learning_rate * root_correction2 / correction1;
    step.eps = settings.eps * root_correction2;
    step.decay = (float_acc)settings.learning_rate * settings.weight_decay;
    return step;
}

#endif
