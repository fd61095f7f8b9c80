/*
The memory and the streams of the device that the build flag DEVICE chooses: the CPU, a GPU, or the emulator of one.

    float_acc* sums = (float_acc*)device_malloc(bytes, "sums");  // zeroed
    copy_to_host(host, sums, bytes, stream);
    stream_synchronize(stream);

dev/cpu/device.h and kernels/device.cuh define the same functions.
*/
#ifndef RUNTIME_DEVICE_H
#define RUNTIME_DEVICE_H

#if defined(DEVICE_CPU)
#include "dev/cpu/device.h"
#elif defined(DEVICE_CUDA) || defined(DEVICE_SIMT)
#include "kernels/device.cuh"
#else
#error "define DEVICE_CPU, DEVICE_CUDA or DEVICE_SIMT (make DEVICE=...)"
#endif

#endif
