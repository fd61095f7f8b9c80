/*
The weights of a model in device memory. In a bf16 build, training has them twice: the optimizer updates fp32
masters, which checkpoints load and save, and params are the masters rounded to bf16. An update in bf16 would
often be lost, since it is often less than half the distance to the next bf16 number.

    Weights weights = {params, masters};                        // masters: NULL if params are float_acc
    weights_upload(weights, tensor->offset, values, tensor->padded_count, stream);
    const float_acc* exact = weights_exact(weights);            // in device memory; a checkpoint saves these

A model that is not trained has no masters in any build: it keeps only the rounded params.
*/
#ifndef RUNTIME_WEIGHTS_H
#define RUNTIME_WEIGHTS_H

#include <assert.h>
#include "runtime/device.h" // defines stream_t, copy_to_device
#include "runtime/precision.h"
#include "runtime/safetensors.h" // defines Dtype, convert_values

#define DTYPE_FLOATX dtype_of_size(sizeof(floatX))
#define DTYPE_FLOAT_ACC dtype_of_size(sizeof(float_acc))
#define WEIGHTS_PIECE ((size_t)1 << 20) // elements that are converted at once

typedef struct {
    floatX* params;
    float_acc* masters;
} Weights;

// 1 if training needs masters.
static inline int weights_need_masters(void) { return sizeof(floatX) < sizeof(float_acc); }

static inline const float_acc* weights_exact(Weights weights) {
    assert(weights.masters || !weights_need_masters());
    return weights.masters ? weights.masters : (const float_acc*)(const void*)weights.params;
}

// Writes `count` elements from `offset` on, from host memory, which the caller may reuse when this returns.
static inline void weights_upload(Weights weights, size_t offset, const float_acc* values, size_t count,
                                  stream_t stream) {
    if (weights.masters) copy_to_device(weights.masters + offset, values, count * sizeof(float_acc), stream);
    if (!weights_need_masters()) {
        copy_to_device(weights.params + offset, values, count * sizeof(floatX), stream);
        stream_synchronize(stream);
        return;
    }
    const size_t most = count < WEIGHTS_PIECE ? count : WEIGHTS_PIECE;
    floatX* rounded = (floatX*)malloc_or_fail(most * sizeof(floatX), "weights on their way to the device");
    for (size_t i = 0; i < count; i += most) {
        const size_t n = count - i < most ? count - i : most;
        convert_values(rounded, DTYPE_FLOATX, values + i, DTYPE_FLOAT_ACC, n);
        copy_to_device(weights.params + offset + i, rounded, n * sizeof(floatX), stream);
        stream_synchronize(stream);
    }
    free(rounded);
}

static inline void weights_zero(Weights weights, size_t offset, size_t count, stream_t stream) {
    device_zero(weights.params + offset, count * sizeof(floatX), stream);
    if (weights.masters) device_zero(weights.masters + offset, count * sizeof(float_acc), stream);
}

#endif
