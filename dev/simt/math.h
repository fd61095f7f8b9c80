/*
CUDA's device functions that the C library lacks: mathematics, bits of floats, and atomics. Kernels use the C
library's functions where it has the same name (expf, exp2f, sqrtf, fmaxf, fmaf, sincosf, ...).
*/
#ifndef DEV_SIMT_MATH_H
#define DEV_SIMT_MATH_H

#include <math.h>
#include <string.h>
#include <type_traits>
#include "dev/simt/counters.h"
#include "dev/simt/types.h"

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 41)
inline float cospif(float x) { return (float)cos(3.141592653589793 * (double)x); }
#endif

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline int __float_as_int(float value) { return (int)__float_as_uint(value); }
inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class A, class B>
using simt_arithmetic =
    std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;
template <class A, class B> inline simt_arithmetic<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> C;
    return (C)b < (C)a ? (C)b : (C)a;
}
template <class A, class B> inline simt_arithmetic<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> C;
    return (C)a < (C)b ? (C)b : (C)a;
}

template <class T> inline T __ldg(const T* pointer) { return *pointer; }

// Atomics order no other accesses, as on the GPU.
SIMT_INTERNAL inline void simt_count_atomic() { simt::count(&simt::Counters::atomics, 1); }
template <class T, class Change> inline T simt_atomic(T* address, Change change) {
    T old, changed;
    simt_count_atomic();
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do changed = change(old);
    while (!__atomic_compare_exchange(address, &old, &changed, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template <class T> inline T simt_atomic_add(T* address, T by) {
    simt_count_atomic();
    return __atomic_fetch_add(address, by, __ATOMIC_RELAXED);
}
inline int atomicAdd(int* a, int v) { return simt_atomic_add(a, v); }
inline unsigned atomicAdd(unsigned* a, unsigned v) { return simt_atomic_add(a, v); }
inline unsigned long long atomicAdd(unsigned long long* a, unsigned long long v) {
    return simt_atomic_add(a, v);
}
inline float atomicAdd(float* a, float v) {
    return simt_atomic(a, [v](float old) { return old + v; });
}
template <class T> inline T atomicMax(T* a, std::common_type_t<T> v) {
    static_assert(std::is_integral_v<T>, "CUDA has no atomicMax for this type");
    return simt_atomic(a, [v](T old) { return old < v ? v : old; });
}
template <class T> inline T atomicMin(T* a, std::common_type_t<T> v) {
    static_assert(std::is_integral_v<T>, "CUDA has no atomicMin for this type");
    return simt_atomic(a, [v](T old) { return v < old ? v : old; });
}
template <class T> inline T atomicExch(T* a, std::common_type_t<T> v) {
    return simt_atomic(a, [v](T) { return v; });
}
template <class T> inline T atomicCAS(T* a, std::common_type_t<T> expected, std::common_type_t<T> v) {
    return simt_atomic(a, [expected, v](T old) { return old == expected ? v : old; });
}

// Accesses before one thread's fence are ordered before accesses after a later fence of another thread.
inline char simt_fence;
inline void __threadfence() {
    simt::acquire(&simt_fence);
    simt::release(&simt_fence);
}
inline void __threadfence_block() { __threadfence(); }

#endif
