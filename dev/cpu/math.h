/*
Elementwise mathematics that compilers can vectorise.

exp_fast is exp() with a relative error of 2.3e-7 in fp32. Compilers turn a loop over it into SIMD
instructions without -ffast-math (which would also remove the checks for NaN and Inf). The method is Cody and
Waite's: x = n ln2 + r, |r| <= ln2/2, and exp(r) by a polynomial of degree 6. In the fp64 build it is the C
library's exp().
*/
#ifndef DEV_CPU_MATH_H
#define DEV_CPU_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#include "runtime/precision.h"

#if defined(PRECISION_FP64)
static inline floatX exp_fast(floatX x) { return exp(x); }
#else
static inline float exp_fast(float x) {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits; floorf() and a conversion to
    // int would do the same, but gcc does not vectorise them while floating-point traps count as visible.
    float shifted = x * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666668e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits << 23) + ((uint32_t)127 << 23);
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    // Outside this range the bits above are not an exponent. A NaN fails both comparisons and passes through
    // p.
    float result = x < -87.3f ? 0.0f : p * scale;
    return x > 88.7f ? INFINITY : result;
}
#endif

#endif
