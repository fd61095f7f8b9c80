/*
bfloat16: the upper half of a float. The part of cuda_bf16.h that the kernels use, with its names and its rounding (to
nearest, ties to even; every NaN becomes 0x7FFF).
*/
#ifndef DEV_SIMT_BF16_H
#define DEV_SIMT_BF16_H

#include <string.h>
#include "dev/simt/types.h"

struct __nv_bfloat16;
inline __nv_bfloat16 __float2bfloat16(float value);
inline float __bfloat162float(__nv_bfloat16 value);

struct __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default; // no initialization, so that shared arrays of this type cost nothing
    __nv_bfloat16(float value) : __x(__float2bfloat16(value).__x) {}
    operator float() const { return __bfloat162float(*this); }
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 value;
    value.__x = bits;
    return value;
}

inline __nv_bfloat16 __float2bfloat16(float value) {
    if (value != value) return __ushort_as_bfloat16(0x7FFF);
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    // Adds half of the last kept place; one unit less if that place is even, so that a tie does not carry
    // into it.
    bits += 0x7FFF + (bits >> 16 & 1);
    return __ushort_as_bfloat16((unsigned short)(bits >> 16));
}

inline float __bfloat162float(__nv_bfloat16 value) {
    uint32_t bits = (uint32_t)value.__x << 16;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __float2bfloat16(value); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) {
    __nv_bfloat162 pair;
    pair.x = low, pair.y = high;
    return pair;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return __halves2bfloat162(__float2bfloat16(low), __float2bfloat16(high));
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 pair) { return __floats2bfloat162_rn(pair.x, pair.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
    return make_float2(__bfloat162float(pair.x), __bfloat162float(pair.y));
}
inline float __low2float(__nv_bfloat162 pair) { return __bfloat162float(pair.x); }
inline float __high2float(__nv_bfloat162 pair) { return __bfloat162float(pair.y); }

#endif
