/*
RMSNorm (Zhang and Sennrich, arXiv 1910.07467), alone and after a residual addition. The twin of
dev/cpu/rmsnorm.h.

    out = x * rstd * weight        rstd = 1 / sqrt(mean(x^2) + eps)

Cost in bytes of device memory for each element of a row (bf16, 2 bytes): forward 4 (read, write); with the
residual 8 (two reads, two writes); backward 8 (dout, inp and dinp read, dinp written), and C floats for each
thread block for the weight's partial sums. A row is read twice, the second time from the cache.
*/
#ifndef KERNELS_RMSNORM_CUH
#define KERNELS_RMSNORM_CUH

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

// Thread blocks of the backward: about four for each multiprocessor of a large GPU. Each has its own sum of
// dweight.
enum { RMSNORM_BACKWARD_BLOCKS = 512 };

// The input of the norm: inp, or inp + branch if there is a branch. The sum is rounded to floatX, as it is
// stored.
template <int WIDTH>
__device__ inline Values<WIDTH> rmsnorm_input(const floatX* inp, const floatX* branch, size_t at) {
    Values<WIDTH> x = load<WIDTH>(inp + at);
    if (branch) {
        const Values<WIDTH> added = load<WIDTH>(branch + at);
        for (int i = 0; i < WIDTH; i++) x.at[i] = rounded(x.at[i] + added.at[i]);
    }
    return x;
}

template <int WIDTH>
__global__ void rmsnorm_forward_kernel(floatX* sum,          // (rows, C), or NULL with branch
                                       floatX* out,          // (rows, C)
                                       float* rstd,          // (rows)
                                       const floatX* inp,    // (rows, C)
                                       const floatX* branch, // (rows, C), or NULL
                                       const floatX* weight, // (C)
                                       int rows, int C, float eps) {
    const int row = (int)(blockIdx.x * blockDim.y + threadIdx.y);
    const int first = (int)threadIdx.x * WIDTH, step = (int)blockDim.x * WIDTH;
    const int end = row < rows ? C : 0; // threads without a row must still take part in row_sum
    const size_t at = (size_t)row * C;

    float square = 0;
    for (int c = first; c < end; c += step) {
        const Values<WIDTH> x = rmsnorm_input<WIDTH>(inp, branch, at + c);
        for (int i = 0; i < WIDTH; i++) square += x.at[i] * x.at[i];
    }
    const float r = 1.0f / sqrtf(row_sum(square) / C + eps);
    if (threadIdx.x == 0 && row < rows) rstd[row] = r;

    for (int c = first; c < end; c += step) {
        Values<WIDTH> x = rmsnorm_input<WIDTH>(inp, branch, at + c);
        if (branch) store(sum + at + c, x);
        const Values<WIDTH> gain = load<WIDTH>(weight + c);
        for (int i = 0; i < WIDTH; i++) x.at[i] *= r * gain.at[i];
        store(out + at + c, x);
    }
}

// sum = residual + branch and out = RMSNorm(sum), in one pass over memory. The four arrays must not overlap.
static inline void residual_rmsnorm_forward(floatX* sum,            // (rows, C)
                                            floatX* out,            // (rows, C)
                                            float_acc* rstd,        // (rows)
                                            const floatX* residual, // (rows, C)
                                            const floatX* branch,   // (rows, C)
                                            const floatX* weight,   // (C)
                                            int rows, int C, float eps, stream_t stream) {
    const int packs = whole_packs(C, sum, out, residual, branch, weight);
    const dim3 block = row_block(C, packs ? (int)PACK : 1);
    launch(packs ? rmsnorm_forward_kernel<PACK> : rmsnorm_forward_kernel<1>, ceil_div(rows, (int)block.y),
           block, 0, stream, sum, out, rstd, residual, branch, weight, rows, C, eps);
}

static inline void rmsnorm_forward(floatX* out,          // (rows, C)
                                   float_acc* rstd,      // (rows)
                                   const floatX* inp,    // (rows, C)
                                   const floatX* weight, // (C)
                                   int rows, int C, float eps, stream_t stream) {
    residual_rmsnorm_forward(NULL, out, rstd, inp, NULL, weight, rows, C, eps, stream);
}

// ----------------------------------------------------------------------------
// Backward

// A group is blockDim.y rows. A thread block takes every gridDim.x-th group. The threads of one row have
// their own sum of dweight in shared memory, so no other threads write to it. At the end the thread block
// adds these sums up into its row of `partials`.
template <int WIDTH>
__global__ void rmsnorm_backward_kernel(floatX* dinp,         // (rows, C)
                                        float* partials,      // (gridDim.x, C)
                                        const floatX* dout,   // (rows, C)
                                        const floatX* inp,    // (rows, C)
                                        const floatX* weight, // (C)
                                        const float* rstd,    // (rows)
                                        int rows, int C) {
    SHARED_MEMORY(float, dweights); // (blockDim.y, C)
    float* dweight = dweights + threadIdx.y * C;
    const int first = (int)threadIdx.x * WIDTH, step = (int)blockDim.x * WIDTH;
    for (int c = first; c < C; c += step) store(dweight + c, Values<WIDTH>{});

    for (int group = (int)(blockIdx.x * blockDim.y); group < rows; group += (int)(gridDim.x * blockDim.y)) {
        const int row = group + (int)threadIdx.y;
        const int end = row < rows ? C : 0; // threads without a row must still take part in row_sum
        const size_t at = (size_t)row * C;
        float dot = 0;
        for (int c = first; c < end; c += step) {
            const Values<WIDTH> dy = load<WIDTH>(dout + at + c), x = load<WIDTH>(inp + at + c),
                                gain = load<WIDTH>(weight + c);
            for (int i = 0; i < WIDTH; i++) dot += dy.at[i] * gain.at[i] * x.at[i];
        }
        const float r = row < rows ? rstd[row] : 0, slope = row_sum(dot) * r * r / C;
        for (int c = first; c < end; c += step) {
            const Values<WIDTH> dy = load<WIDTH>(dout + at + c), x = load<WIDTH>(inp + at + c),
                                gain = load<WIDTH>(weight + c);
            Values<WIDTH> dx = load<WIDTH>(dinp + at + c), sum = load<WIDTH>(dweight + c);
            for (int i = 0; i < WIDTH; i++) {
                dx.at[i] += r * (dy.at[i] * gain.at[i] - x.at[i] * slope);
                sum.at[i] += dy.at[i] * x.at[i] * r;
            }
            store(dinp + at + c, dx);
            store(dweight + c, sum);
        }
    }

    __syncthreads();
    const int thread = (int)(threadIdx.y * blockDim.x + threadIdx.x),
              threads = (int)(blockDim.x * blockDim.y);
    for (int c = thread; c < C; c += threads) {
        float sum = 0;
        for (int y = 0; y < (int)blockDim.y; y++) sum += dweights[y * C + c];
        partials[(size_t)blockIdx.x * C + c] = sum;
    }
}

// Bytes of the workspace of rmsnorm_backward.
static inline size_t rmsnorm_backward_workspace(int rows, int C) {
    (void)rows;
    return (size_t)RMSNORM_BACKWARD_BLOCKS * C * sizeof(float);
}

// dinp accumulates, because it is the gradient of the residual stream. dweight accumulates, too.
static inline void rmsnorm_backward(floatX* dinp,          // (rows, C)
                                    float_acc* dweight,    // (C)
                                    const floatX* dout,    // (rows, C)
                                    const floatX* inp,     // (rows, C)
                                    const floatX* weight,  // (C)
                                    const float_acc* rstd, // (rows)
                                    void* workspace, int rows, int C, stream_t stream) {
    const int packs = whole_packs(C, dinp, dout, inp, weight);
    const dim3 block = row_block(C, packs ? (int)PACK : 1);
    const int groups = ceil_div(rows, (int)block.y);
    const int blocks = groups < RMSNORM_BACKWARD_BLOCKS ? groups : RMSNORM_BACKWARD_BLOCKS;
    float* partials = (float*)workspace;
    launch(packs ? rmsnorm_backward_kernel<PACK> : rmsnorm_backward_kernel<1>, blocks, block,
           block.y * C * sizeof(float), stream, dinp, partials, dout, inp, weight, rstd, rows, C);
    add_column_sums(dweight, partials, blocks, C, stream);
}

#endif
