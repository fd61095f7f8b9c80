/*
The settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101) and what follows from them for one step, on every device.
*/
#ifndef RUNTIME_ADAMW_H
#define RUNTIME_ADAMW_H

#include <math.h>
#include <stddef.h>
#include "runtime/precision.h" // defines float_acc

typedef struct {
    float learning_rate, beta1, beta2, eps, weight_decay;
    float clip; // the gradient is scaled down to this norm where it is longer; 0: never
    int step;   // 1 at the first update, for the bias corrections
} AdamW;

// Elements of the flat parameters that share one number which weight decay is multiplied by: no tensor begins inside of them.
enum { DECAY_BLOCK = 64 };

static inline size_t decay_blocks(size_t count) { return (count + DECAY_BLOCK - 1) / DECAY_BLOCK; }

// p -= lr * (m/c1) / (sqrt(v/c2) + eps), written with fewer divisions: p = p * (1 - decay) - rate * m / (sqrt(v) + eps)
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
