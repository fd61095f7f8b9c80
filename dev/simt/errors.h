/*
The errors of the CUDA runtime's host functions, with CUDA's names and values. A function that fails returns
result(). This function stores the error for cudaGetLastError(), with a more detailed message than CUDA's own.
*/
#ifndef DEV_SIMT_ERRORS_H
#define DEV_SIMT_ERRORS_H

#include "dev/simt/fibers.h"

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorIllegalState = 401,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorStreamCaptureImplicit = 906,
    cudaErrorCapturedEvent = 907,
    cudaErrorGraphExecUpdateFailure = 910
};

namespace simt {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// Stores an error with its own message.
__attribute__((format(printf, 2, 3))) inline cudaError_t result(cudaError_t error, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_message, sizeof(error_message), format, arguments);
    va_end(arguments);
    return result(error);
}
} // namespace simt

inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline cudaError_t cudaGetLastError() {
    cudaError_t error = simt::last_error;
    simt::last_error = cudaSuccess;
    return error;
}

// For a launch or copy that failed: the message of the last failure.
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    default:
        return simt::error_message;
    }
}

#endif
