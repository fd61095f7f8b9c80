/*
mma and ldmatrix, with the fragment layout of the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating
point type", "ldmatrix"). kernels/ptx.cuh documents both; test/test_layout.cu checks the bodies here and
there.

Products are exact in fp32, and sums are fp32 in the order of k. A tensor core adds in another order and may
round differently; the tests allow for that.
*/
#ifndef DEV_SIMT_MATRIX_H
#define DEV_SIMT_MATRIX_H

#include "dev/simt/counters.h"
#include "dev/simt/warp.h"

namespace simt {

// ----------------------------------------------------------------------------
// ldmatrix: lane 8 m + r gives the address of row r of the 8 x 8 matrix m

struct MatrixRow {
    unsigned short element[8];
};

// This function is instrumented, so that the sanitizers see the read by the lane that gives the address.
inline MatrixRow read_row(const void* row) { return *(const MatrixRow*)row; }

struct CountMatrices {
    SIMT_INTERNAL void operator()(Payload*) const { count(&Counters::matrices, 1); }
};

SIMT_INTERNAL inline void load_matrices(unsigned (&r)[4], const void* address, bool transposed,
                                        const Place& place) {
    if ((uintptr_t)address % 16)
        kernel_error("%s (%s:%d): row address %p must be a multiple of 16", place.operation, place.file,
                     place.line, address);
    if (!may_be_shared(address, sizeof(MatrixRow)))
        kernel_error("%s (%s:%d): %p is not shared memory", place.operation, place.file, place.line, address);
    const Payload* rows = meet(0xffffffffu, read_row(address), CountMatrices(), false, place);
    const int across = lane() / 4, along = lane() % 4 * 2;
    for (int m = 0; m < 4; m++) {
        const MatrixRow* matrix[8];
        for (int i = 0; i < 8; i++) matrix[i] = (const MatrixRow*)rows[8 * m + i].bytes;
        unsigned low = transposed ? matrix[along]->element[across] : matrix[across]->element[along];
        unsigned high = transposed ? matrix[along + 1]->element[across] : matrix[across]->element[along + 1];
        r[m] = low | high << 16;
    }
}

// ----------------------------------------------------------------------------
// mma.m16n8k16: D = A B + D with A (16, 16), B (16, 8), D (16, 8)

struct MmaOperands {
    unsigned a[4], b[2];
    float d[4];
};

struct MultiplyTiles {
    SIMT_INTERNAL static float low(unsigned pair) { return from_bits(pair << 16); }
    SIMT_INTERNAL static float high(unsigned pair) { return from_bits(pair & 0xffff0000u); }
    SIMT_INTERNAL static float from_bits(unsigned bits) {
        float value;
        __builtin_memcpy(&value, &bits, sizeof(value));
        return value;
    }

    // Replaces every lane's operands by its four elements of the result.
    SIMT_INTERNAL void operator()(Payload* payload) const {
        count(&Counters::products, 1);
        typedef float Row __attribute__((vector_size(32))); // 8 columns; the compiler need not vectorise
        float A[16][16];
        Row B[16], D[16];
        for (int l = 0; l < WARP; l++) {
            const MmaOperands* own = (const MmaOperands*)payload[l].bytes;
            const int group = l / 4, pair = l % 4 * 2;
            for (int i = 0; i < 4; i++) {
                const int row = group + i % 2 * 8, k = pair + i / 2 * 8;
                A[row][k] = low(own->a[i]);
                A[row][k + 1] = high(own->a[i]);
                D[group + i / 2 * 8][pair + i % 2] = own->d[i];
            }
            for (int i = 0; i < 2; i++) {
                B[pair + i * 8][group] = low(own->b[i]);
                B[pair + i * 8 + 1][group] = high(own->b[i]);
            }
        }
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k++) D[row] += A[row][k] * B[k];
        for (int l = 0; l < WARP; l++) {
            MmaOperands* own = (MmaOperands*)payload[l].bytes;
            for (int i = 0; i < 4; i++) own->d[i] = D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        }
    }
};

} // namespace simt

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, SIMT_PLACE) {
    simt::load_matrices(r, row, false, {"ldmatrix_x4", file, line});
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, SIMT_PLACE) {
    simt::load_matrices(r, row, true, {"ldmatrix_x4_trans", file, line});
}
inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, SIMT_PLACE) {
    const simt::MmaOperands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
    const simt::Payload* payload =
        simt::meet(0xffffffffu, mine, simt::MultiplyTiles(), false, {"mma_m16n8k16_bf16", file, line});
    __builtin_memcpy(d, payload[simt::lane()].bytes + offsetof(simt::MmaOperands, d), sizeof(d));
}

#endif
