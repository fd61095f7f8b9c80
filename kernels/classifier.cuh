/*
The loss: cross-entropy of softmax(logits). Its gradient is written over the logits, so probabilities are
never stored. The padded columns V..Vp have no probability, and their gradient is 0. The twin of
dev/cpu/classifier.h.

Cost for bf16: the logits are read once and written once, 4 bytes for each element; 2 bytes without the
gradient. The gradient reads the logits a second time, from the L2 cache. The cache must hold the rows in use:
100 KB a row for GPT-2's vocabulary and two thread blocks of 1024 threads on each multiprocessor, so about 26
MB on the largest GPUs.
*/
#ifndef KERNELS_CLASSIFIER_CUH
#define KERNELS_CLASSIFIER_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

template <int WIDTH>
__global__ void fused_classifier_kernel(floatX* logits, float* losses, const int* targets, float dloss,
                                        int rows, int V, int Vp, int write_gradient) {
    const int row = (int)(blockIdx.x * blockDim.y + threadIdx.y);
    const int begin = (int)threadIdx.x * WIDTH, step = (int)blockDim.x * WIDTH;
    const int seen = row < rows ? V : 0; // threads without a row must still take part in row_sum and row_max
    floatX* x = logits + (size_t)row * Vp;
    const int target = row < rows ? targets[row] : 0;
    const float target_logit = row < rows ? to_float(x[target]) : 0;

    // A running maximum, and the sum of exp(x - maximum) (Milakov and Gimelshein, arXiv 1805.02867). The
    // maximum starts at a finite number, because -inf - (-inf) is NaN.
    float maximum = -FLT_MAX, sum = 0;
    for (int v = begin; v < seen; v += step) {
        const Values<WIDTH> some = load<WIDTH>(x + v);
        float larger = maximum;
        for (int i = 0; i < WIDTH; i++)
            if (v + i < V) larger = fmaxf(larger, some.at[i]);
        sum *= __expf(maximum - larger);
        maximum = larger;
        for (int i = 0; i < WIDTH; i++)
            if (v + i < V) sum += __expf(some.at[i] - maximum);
    }
    const float row_maximum = row_max(maximum);
    sum = row_sum(sum * __expf(maximum - row_maximum));
    __syncthreads(); // every thread has read the target's logit, which the gradient overwrites
    if (row >= rows) return;
    if (threadIdx.x == 0) losses[row] = logf(sum) + row_maximum - target_logit;
    if (!write_gradient) return;

    const float scale = dloss / sum;
    for (int v = begin; v < Vp; v += step) {
        Values<WIDTH> some = load<WIDTH>(x + v);
        for (int i = 0; i < WIDTH; i++) {
            const float gradient = __expf(some.at[i] - row_maximum) * scale - (v + i == target ? dloss : 0);
            some.at[i] = v + i < V ? gradient : 0;
        }
        store(x + v, some);
    }
}

static inline void
fused_classifier(floatX* logits,     // (rows, Vp); with write_gradient becomes dloss * dlosses/dlogits
                 float_acc* losses,  // (rows) logsumexp(logits) - logits[target], natural log
                 const int* targets, // (rows)
                 float_acc dloss, int rows, int V, int Vp, int write_gradient, stream_t stream) {
    const int packs = whole_packs(Vp, logits);
    const dim3 block = row_block(Vp, packs ? (int)PACK : 1);
    launch(packs ? fused_classifier_kernel<PACK> : fused_classifier_kernel<1>, ceil_div(rows, (int)block.y),
           block, 0, stream, logits, losses, targets, dloss, rows, V, Vp, write_gradient);
}

#endif
