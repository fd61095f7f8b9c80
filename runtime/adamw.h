/*
The settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101) and what follows from them for one step, on every device.
*/
#ifndef RUNTIME_ADAMW_H
#define RUNTIME_ADAMW_H

#include <math.h>
#include "runtime/precision.h" // defines float_acc

typedef struct {
    float learning_rate, beta1, beta2, eps, weight_decay;
    float clip; // the gradient is scaled down to this norm where it is longer; 0: never
    int step;   // 1 at the first update, for the bias corrections
} AdamW;

// p -= lr * (m/c1) / (sqrt(v/c2) + eps), written with fewer divisions: p = p * keep - rate * m / (sqrt(v) + eps)
typedef struct {
    float_acc rate, eps, keep;
} AdamWStep;

static inline AdamWStep adamw_step(AdamW settings) {
    const float_acc correction1 = (float_acc)(1.0 - pow((double)settings.beta1, settings.step));
    const float_acc root_correction2 = (float_acc)sqrt(1.0 - pow((double)settings.beta2, settings.step));
    AdamWStep step;
    step.rate = settings.learning_rate * root_correction2 / correction1;
    step.eps = settings.eps * root_correction2;
    step.keep = 1 - (float_acc)settings.learning_rate * settings.weight_decay;
    return step;
}

#endif
