/*
The loss: cross-entropy of softmax(logits). With write_gradient the gradient overwrites the logits; otherwise
the logits stay. The probabilities are never stored. The padded columns V..Vp have no probability, and their
gradient is 0.
*/
#ifndef DEV_CPU_CLASSIFIER_H
#define DEV_CPU_CLASSIFIER_H

#include "dev/cpu/device.h"
#include "dev/cpu/math.h"

static inline void
fused_classifier(floatX* logits,     // (rows, Vp); with write_gradient becomes dloss * dlosses/dlogits
                 float_acc* losses,  // (rows) logsumexp(logits) - logits[target], natural log
                 const int* targets, // (rows)
                 float_acc dloss, int rows, int V, int Vp, int write_gradient, stream_t stream) {
    (void)stream;
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        floatX* x = logits + (size_t)row * Vp;
        floatX target_logit = x[targets[row]], maximum = x[0];
#pragma omp simd reduction(max : maximum)
        for (int v = 0; v < V; v++) maximum = x[v] > maximum ? x[v] : maximum;
        float_acc sum = 0;
        if (!write_gradient) {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) sum += exp_fast(x[v] - maximum);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) sum += x[v] = exp_fast(x[v] - maximum);
            float_acc scale = dloss / sum;
#pragma omp simd
            for (int v = 0; v < V; v++) x[v] *= scale;
            x[targets[row]] -= dloss;
            for (int v = V; v < Vp; v++) x[v] = 0;
        }
        losses[row] = (float_acc)log((double)sum) + maximum - target_logit;
    }
}

#endif
