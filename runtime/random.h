/*
Counter-based random numbers: a value is a pure function of (seed, stream, element). So weights, data order
and samples do not depend on the device, the number of threads or ranks, or the number of resumes.

    uint64_t stream = random_stream("model.norm.weight");
    double z = random_normal(seed, stream, i);                       // the i-th draw of that stream
    uint64_t j = random_permutation(seed, epoch, i, count);          // a bijection of 0..count-1, no table

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
*/
#ifndef RUNTIME_RANDOM_H
#define RUNTIME_RANDOM_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Kernels draw the same bits as the host.
#if defined(__CUDACC__)
#define HOST_AND_DEVICE __host__ __device__
#else
#define HOST_AND_DEVICE
#endif

HOST_AND_DEVICE static inline void philox_4x32(uint32_t counter[4], uint64_t seed) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * counter[0];
        uint64_t product1 = (uint64_t)0xCD9E8D57u * counter[2];
        uint32_t c1 = counter[1], c3 = counter[3];
        counter[0] = (uint32_t)(product1 >> 32) ^ c1 ^ key0;
        counter[1] = (uint32_t)product1;
        counter[2] = (uint32_t)(product0 >> 32) ^ c3 ^ key1;
        counter[3] = (uint32_t)product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// 128 random bits for one element of one stream, as two 64-bit words.
HOST_AND_DEVICE static inline void random_bits(uint64_t bits[2], uint64_t seed, uint64_t stream,
                                               uint64_t element) {
    uint32_t counter[4] = {(uint32_t)element, (uint32_t)(element >> 32), (uint32_t)stream,
                           (uint32_t)(stream >> 32)};
    philox_4x32(counter, seed);
    bits[0] = (uint64_t)counter[1] << 32 | counter[0];
    bits[1] = (uint64_t)counter[3] << 32 | counter[2];
}

// Uniform in the open interval (0, 1): (a number of 52 bits + 0.5) / 2^52, which is exact and never 0 or 1.
HOST_AND_DEVICE static inline double random_unit(uint64_t bits) {
    return ((double)(bits >> 12) + 0.5) * 0x1p-52;
}

HOST_AND_DEVICE static inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t element) {
    uint64_t bits[2];
    random_bits(bits, seed, stream, element);
    return random_unit(bits[0]);
}

// Standard normal by Box and Muller.
static inline double random_normal(uint64_t seed, uint64_t stream, uint64_t element) {
    uint64_t bits[2];
    random_bits(bits, seed, stream, element);
    return sqrt(-2.0 * log(random_unit(bits[0]))) * cos(6.283185307179586 * random_unit(bits[1]));
}

// A stream's number from its name (FNV-1a, 64 bits).
HOST_AND_DEVICE static inline uint64_t random_stream(const char* name) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return hash;
}

// Continues a hash over these bytes, in words of 8 bytes. Every piece but the last must be whole words. Two
// inputs that differ in exactly one word never have the same hash.
static inline uint64_t hash_more(uint64_t hash, const void* bytes, size_t count) {
    const char* at = (const char*)bytes;
    for (size_t i = 0; i < count; i += 8) {
        uint64_t word = 0;
        memcpy(&word, at + i, count - i < 8 ? count - i : 8);
        hash = (hash ^ word) * 0x100000001b3u;
        hash ^= hash >> 29; // else high bits would never change low bits
    }
    return hash;
}

// The image of `index` under a pseudo-random permutation of 0..count-1: a Feistel network over the smallest
// even number of bits that holds count, applied again until the value is below count (on average fewer than 4
// times).
static inline uint64_t random_permutation(uint64_t seed, uint64_t stream, uint64_t index, uint64_t count) {
    int half_bits = 1;
    while (half_bits < 32 && ((uint64_t)1 << (2 * half_bits)) < count) half_bits++;
    uint64_t mask = ((uint64_t)1 << half_bits) - 1;
    do {
        uint64_t left = index >> half_bits, right = index & mask;
        for (uint64_t round = 0; round < 6; round++) {
            uint64_t bits[2];
            random_bits(bits, seed, stream ^ round << 56, right);
            uint64_t mixed = left ^ (bits[0] & mask);
            left = right;
            right = mixed;
        }
        index = left << half_bits | right;
    } while (index >= count);
    return index;
}

#endif
