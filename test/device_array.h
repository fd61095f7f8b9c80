/*
An array of the host with a twin on the device, for tests and benchmarks of kernels.

    DeviceArray<float> x(100);              // the twin holds what cudaMalloc() gives
    for (float& value : x.host) value = 1;
    x.to_device();
    launch(kernel, 1, 32, 0, nullptr, x.device);
    x.to_host();
*/
#ifndef TEST_DEVICE_ARRAY_H
#define TEST_DEVICE_ARRAY_H

#include <vector>
#include "kernels/launch.cuh"

static inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail("%s: %s", what, cudaGetErrorString(error));
}

template <class T> struct DeviceArray {
    std::vector<T> host;
    T* device;

    explicit DeviceArray(size_t count) : host(count), device(nullptr) {
        check_cuda(cudaMalloc((void**)&device, count * sizeof(T)), "cudaMalloc");
    }
    ~DeviceArray() { (void)cudaFree(device); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    void to_device() {
        check_cuda(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
                   "cudaMemcpy");
    }
    // Waits for the kernels before it.
    void to_host() {
        check_cuda(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost),
                   "cudaMemcpy");
    }
};

#endif
