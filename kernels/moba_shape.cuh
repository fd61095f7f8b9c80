/*
The common part of MoBA's two algorithms, flashmoba (moba.cuh) and moba (kernels/moba_plain.cuh): the limits
of the sizes, the arrays of a workspace, and the order in which the router selects blocks.

    const AttentionShape shape = {B, T, start, H, G, D, 0, S, K};
    if (!moba_supports(&shape)) moba_refuse(&shape);
    int* begins = (int*)moba_take(memory, &used, count, sizeof(int));     // memory NULL: only counts bytes
    const MobaRank rank = moba_rank(score, block, eligible);              // the router selects the highest

The letters are those of docs/math.md: B sequences of T tokens, H query heads, G KV heads, D channels of a
head, blocks of S keys, K blocks for each query, its own included.
*/
#ifndef KERNELS_MOBA_SHAPE_CUH
#define KERNELS_MOBA_SHAPE_CUH

// AttentionShape, attention_supports_head_dim, fail
#include "gqa.cuh"

// A list entry of flashmoba holds the token of a query in its low MOBA_TOKEN_BITS bits, and the number of the
// choice above them. So T is below 2^MOBA_TOKEN_BITS.
enum { MOBA_TOKEN_BITS = 25 };

// Whether MoBA can be called with this shape. It does not use the window.
static inline int moba_supports(const AttentionShape* s) {
    return attention_supports_head_dim(s->D) && s->S >= 16 && s->S <= 512 && (s->S & (s->S - 1)) == 0 &&
           s->K >= 1 && s->K <= 64 && s->T < 1 << MOBA_TOKEN_BITS;
}

static inline void moba_refuse(const AttentionShape* s) {
    fail("MoBA with %d tokens, head dimension %d, blocks of %d keys, %d of them a query: on this device head "
         "dimension 32, 64 or 128, blocks of 16, 32, ... 512, up to 64 of them, less than 2^%d tokens",
         s->T, s->D, s->S, s->K, (int)MOBA_TOKEN_BITS);
}

// Numbers of elements of two arrays of the caller. The backward pass reads `selected`. In generation, a later
// call (start > 0) reads the centroids of earlier blocks.
static inline size_t moba_selected_count(int B, int T, int H, int K) { return (size_t)B * H * T * (K - 1); }
static inline size_t moba_centroids_count(int B, int T, int G, int D, int S) {
    return (size_t)B * (T / S) * G * D;
}

// Takes count elements from a workspace, rounded up to 256 bytes. Returns NULL if memory is NULL.
static inline void* moba_take(char* memory, size_t* used, size_t count, size_t size) {
    void* taken = memory ? memory + *used : NULL;
    *used += (count * size + 255) / 256 * 256;
    return taken;
}

// A rank orders pairs of score and block: the higher score wins, and of equal scores the later block. The
// rank is 0 if the score is NaN or the block is not a complete block of the past.
typedef unsigned long long MobaRank;

static __device__ __forceinline__ MobaRank moba_rank(float score, int block, int eligible) {
    if (block >= eligible || score != score) return 0;
    const unsigned bits = __float_as_uint(score + 0.0f); // no negative zero
    const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (MobaRank)ordered << 32 | (unsigned)block;
}

// The score of a rank; -INFINITY for the rank of an empty slot. A candidate needs at least this score to
// replace it.
static __device__ __forceinline__ float moba_score(MobaRank rank) {
    const unsigned ordered = (unsigned)(rank >> 32);
    return ordered == 0 ? -INFINITY : __uint_as_float(ordered >> 31 ? ordered ^ 0x80000000u : ~ordered);
}

#endif
