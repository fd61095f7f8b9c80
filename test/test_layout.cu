/*
Tests the properties of the machine that the kernels rely on, with plain index formulas: which element of a
fragment is in which register of which lane (mma, ldmatrix plain and transposed), groups of cp.async, shuffles
of every kind, width and type, votes, barriers, bf16 rounding.

Compiled by g++ it tests the emulator. Compiled by nvcc it tests the GPU and the inline PTX, which the
emulator never runs, so run this test first on a new GPU.
*/
#include "kernels/ptx.cuh"
#include "test/device_array.h"

// last, as it has a macro `fail` of its own
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
extern "C" {
#include <cmocka.h>
}

typedef __nv_bfloat16 bf16;

// ----------------------------------------------------------------------------
// mma: A (16, 16), B (16, 8), D (16, 8), all row major in memory

__device__ static unsigned pair_of(bf16 low, bf16 high) {
    return __bfloat16_as_ushort(low) | (unsigned)__bfloat16_as_ushort(high) << 16;
}

// Element i of a lane's fragments, word by word as the PTX ISA has it for mma.m16n8k16 with floating point types.
__device__ static int a_row(int lane, int i) { return i < 2 || (i >= 4 && i < 6) ? lane / 4 : lane / 4 + 8; }
__device__ static int a_column(int lane, int i) {
    return i < 4 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8;
}
__device__ static int b_row(int lane, int i) {
    return i < 2 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8;
}
__device__ static int b_column(int lane) { return lane / 4; }
__device__ static int d_row(int lane, int i) { return i < 2 ? lane / 4 : lane / 4 + 8; }
__device__ static int d_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

__global__ void multiply(float* D, const bf16* A, const bf16* B) {
    const int lane = (int)threadIdx.x;
    unsigned a[4], b[2];
    float d[4];
    for (int i = 0; i < 8; i += 2)
        a[i / 2] = pair_of(A[a_row(lane, i) * 16 + a_column(lane, i)],
                           A[a_row(lane, i + 1) * 16 + a_column(lane, i + 1)]);
    for (int i = 0; i < 4; i += 2)
        b[i / 2] =
            pair_of(B[b_row(lane, i) * 8 + b_column(lane)], B[b_row(lane, i + 1) * 8 + b_column(lane)]);
    for (int i = 0; i < 4; i++) d[i] = D[d_row(lane, i) * 8 + d_column(lane, i)];
    mma_m16n8k16_bf16(d, a, b[0], b[1]);
    for (int i = 0; i < 4; i++) D[d_row(lane, i) * 8 + d_column(lane, i)] = d[i];
}

struct Tiles {
    DeviceArray<bf16> A, B;
    DeviceArray<float> D;
    Tiles() : A(16 * 16), B(16 * 8), D(16 * 8) {}
};

// D + A B in whole numbers; no sum here needs more than 24 bits, so the result has to be exact.
static void assert_product(Tiles* tiles) {
    int expected[16 * 8];
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            float sum = tiles->D.host[row * 8 + column];
            for (int k = 0; k < 16; k++)
                sum += __bfloat162float(tiles->A.host[row * 16 + k]) *
                       __bfloat162float(tiles->B.host[k * 8 + column]);
            expected[row * 8 + column] = (int)sum;
        }
    tiles->A.to_device();
    tiles->B.to_device();
    tiles->D.to_device();
    launch(multiply, 1, 32, 0, nullptr, tiles->D.device, tiles->A.device, tiles->B.device);
    tiles->D.to_host();
    for (int i = 0; i < 16 * 8; i++) assert_int_equal((int)tiles->D.host[i], expected[i]);
}

// Where A is all different, B picks columns of it: each element of D is then one of A, and tells which.
static void mma_places_a(void** state) {
    (void)state;
    for (int half = 0; half < 2; half++) {
        Tiles tiles;
        for (int i = 0; i < 256; i++) tiles.A.host[i] = __float2bfloat16((float)(i + 1));
        for (int i = 0; i < 128; i++)
            tiles.B.host[i] = __float2bfloat16(i / 8 == i % 8 + 8 * half ? 1.0f : 0.0f);
        assert_product(&tiles);
    }
}

static void mma_places_b_and_d(void** state) {
    (void)state;
    Tiles tiles;
    for (int i = 0; i < 256; i++) tiles.A.host[i] = __float2bfloat16(i / 16 == i % 16 ? 1.0f : 0.0f);
    for (int i = 0; i < 128; i++) tiles.B.host[i] = __float2bfloat16((float)(i + 1));
    for (int i = 0; i < 128; i++) tiles.D.host[i] = (float)(1000 * i);
    assert_product(&tiles);
}

static void mma_sums_products(void** state) {
    (void)state;
    Tiles tiles;
    for (int i = 0; i < 256; i++) tiles.A.host[i] = __float2bfloat16((float)(i * 37 % 61 - 30));
    for (int i = 0; i < 128; i++) tiles.B.host[i] = __float2bfloat16((float)(i * 53 % 47 - 20));
    for (int i = 0; i < 128; i++) tiles.D.host[i] = (float)(i * 29 % 101 - 50);
    assert_product(&tiles);
}

// ----------------------------------------------------------------------------
// ldmatrix

enum { MATRIX_STRIDE = 40 }; // elements between rows: more than a row, a multiple of 16 bytes

// Matrix m has its row r in row order[8 m + r] of the tile.
__global__ void load(unsigned* registers, const unsigned short* tile, const int* order, int transposed) {
    __shared__ __align__(16) unsigned short rows[32 * MATRIX_STRIDE];
    for (int i = (int)threadIdx.x; i < 32 * MATRIX_STRIDE; i += 32) rows[i] = tile[i];
    __syncwarp();
    unsigned r[4];
    const unsigned short* row = rows + order[threadIdx.x] * MATRIX_STRIDE;
    if (transposed) ldmatrix_x4_trans(r, row);
    else ldmatrix_x4(r, row);
    for (int m = 0; m < 4; m++) registers[threadIdx.x * 4 + m] = r[m];
}

static void check_ldmatrix(int transposed) {
    DeviceArray<unsigned short> tile(32 * MATRIX_STRIDE);
    DeviceArray<int> order(32);
    DeviceArray<unsigned> registers(32 * 4);
    for (int i = 0; i < 32 * MATRIX_STRIDE; i++) tile.host[i] = (unsigned short)(i * 31 + 7);
    for (int i = 0; i < 32; i++) order.host[i] = (i * 13 + 5) % 32;
    tile.to_device();
    order.to_device();
    launch(load, 1, 32, 0, nullptr, registers.device, tile.device, order.device, transposed);
    registers.to_host();
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++)
            for (int half = 0; half < 2; half++) {
                int row = transposed ? lane % 4 * 2 + half : lane / 4;
                int column = transposed ? lane / 4 : lane % 4 * 2 + half;
                unsigned expected = tile.host[order.host[8 * m + row] * MATRIX_STRIDE + column];
                assert_int_equal(registers.host[lane * 4 + m] >> 16 * half & 0xffff, expected);
            }
}

static void ldmatrix_plain(void** state) {
    (void)state;
    check_ldmatrix(0);
}

static void ldmatrix_transposed(void** state) {
    (void)state;
    check_ldmatrix(1);
}

// A product as kernels make it: both operands by ldmatrix, B once from its transpose (8 x 16 tiles of the other operand, as keys
// are) and once from itself (as values are).
__global__ void multiply_from_shared(float* D, const bf16* A, const bf16* B, int b_transposed) {
    __shared__ __align__(16) bf16 shared_a[16 * 16], shared_b[16 * 16];
    const int lane = (int)threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        shared_a[i] = A[i];
        shared_b[b_transposed ? i % 16 * 16 + i / 16 : i] = B[i];
    }
    __syncwarp();
    unsigned a[4], b[4];
    ldmatrix_x4(a, shared_a + lane % 16 * 16 + lane / 16 * 8);
    if (b_transposed) // matrices: columns 0..7 at k 0 and k 8, columns 8..15 at k 0 and k 8
        ldmatrix_x4(b, shared_b + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
    else ldmatrix_x4_trans(b, shared_b + (lane / 8 % 2 * 8 + lane % 8) * 16 + lane / 16 * 8);
    for (int n = 0; n < 2; n++) {
        float d[4] = {0, 0, 0, 0};
        mma_m16n8k16_bf16(d, a, b[2 * n], b[2 * n + 1]);
        for (int i = 0; i < 4; i++) D[d_row(lane, i) * 16 + n * 8 + d_column(lane, i)] = d[i];
    }
}

static void product_from_shared_memory(void** state) {
    (void)state;
    DeviceArray<bf16> A(256), B(256);
    DeviceArray<float> D(256);
    for (int i = 0; i < 256; i++) A.host[i] = __float2bfloat16((float)(i * 37 % 61 - 30));
    for (int i = 0; i < 256; i++) B.host[i] = __float2bfloat16((float)(i * 53 % 47 - 20));
    A.to_device();
    B.to_device();
    for (int b_transposed = 0; b_transposed < 2; b_transposed++) {
        launch(multiply_from_shared, 1, 32, 0, nullptr, D.device, A.device, B.device, b_transposed);
        D.to_host();
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 16; column++) {
                float sum = 0;
                for (int k = 0; k < 16; k++)
                    sum += __bfloat162float(A.host[row * 16 + k]) * __bfloat162float(B.host[k * 16 + column]);
                assert_int_equal((int)D.host[row * 16 + column], (int)sum);
            }
    }
}

// ----------------------------------------------------------------------------
// cp.async

enum { STAGES = 3 };

__device__ static void copy(int* shared, const int* global, bool valid) { cp_async4(shared, global, valid); }
__device__ static void copy(int2* shared, const int2* global, bool valid) {
    cp_async8(shared, global, valid);
}
__device__ static void copy(int4* shared, const int4* global, bool valid) {
    cp_async16(shared, global, valid);
}

// Each thread copies an element a stage, every third of them invalid, a group each, and reads a stage when only the newer groups may
// be unfinished.
template <class T> __global__ void copy_in_groups(T* out, const T* in) {
    SHARED_MEMORY(T, stages);
    const int i = (int)threadIdx.x, n = (int)blockDim.x;
    for (int stage = 0; stage < STAGES; stage++) {
        copy(&stages[stage * n + i], &in[stage * n + i], (stage + i) % 3 != 0);
        cp_async_commit();
    }
    cp_async_wait<2>();
    out[i] = stages[i];
    cp_async_wait<1>();
    __syncthreads();
    out[n + i] = stages[n + (i + 1) % n]; // a neighbour's
    cp_async_wait<0>();
    __syncthreads();
    out[2 * n + i] = stages[2 * n + (i + n / 2) % n];
}

template <class T> static void check_copies_in_groups() {
    enum { THREADS = 96 };
    DeviceArray<T> in(STAGES * THREADS), out(STAGES * THREADS);
    unsigned char* bytes = (unsigned char*)in.host.data();
    for (size_t i = 0; i < STAGES * THREADS * sizeof(T); i++) bytes[i] = (unsigned char)(i * 97 % 251 + 1);
    in.to_device();
    launch(copy_in_groups<T>, 1, THREADS, STAGES * THREADS * sizeof(T), nullptr, out.device, in.device);
    out.to_host();
    const int shifts[STAGES] = {0, 1, THREADS / 2};
    for (int stage = 0; stage < STAGES; stage++)
        for (int i = 0; i < THREADS; i++) {
            const int from = (i + shifts[stage]) % THREADS, valid = (stage + from) % 3 != 0;
            const T expected = valid ? in.host[stage * THREADS + from] : T();
            assert_memory_equal(&out.host[stage * THREADS + i], &expected, sizeof(expected));
        }
}

static void copies_in_groups(void** state) {
    (void)state;
    check_copies_in_groups<int>();
    check_copies_in_groups<int2>();
    check_copies_in_groups<int4>();
}

// More shared memory than a block gets unasked, in arrays that are carved from it.
__global__ void reverse_in_shared(int* out, const int* in, int n) {
    SHARED_MEMORY(char, rest);
    int* first = carve<int>(rest, n);
    short* second = carve<short>(rest, n);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        first[i] = in[i];
        second[i] = (short)(in[i] % 1000);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) out[i] = first[n - 1 - i] + second[n - 1 - i];
}

static void large_shared_memory(void** state) {
    (void)state;
    enum { N = 12345 };
    DeviceArray<int> in(N), out(N);
    for (int i = 0; i < N; i++) in.host[i] = i * 7;
    in.to_device();
    const size_t bytes = carved_bytes<int>(N) + carved_bytes<short>(N);
    assert_true(bytes > 48 * 1024);
    launch(reverse_in_shared, 1, 128, bytes, nullptr, out.device, in.device, (int)N);
    out.to_host();
    for (int i = 0; i < N; i++) assert_int_equal(out.host[i], in.host[N - 1 - i] + in.host[N - 1 - i] % 1000);
}

// ----------------------------------------------------------------------------
// Shuffles and votes

enum ShuffleKind { SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, SHUFFLE_KINDS };

__device__ static int shuffle_of_kind(unsigned mask, int kind, int value, int by, int width) {
    switch (kind) {
    case SHUFFLE_INDEX:
        return __shfl_sync(mask, value, by, width);
    case SHUFFLE_UP:
        return __shfl_up_sync(mask, value, (unsigned)by, width);
    case SHUFFLE_DOWN:
        return __shfl_down_sync(mask, value, (unsigned)by, width);
    default:
        return __shfl_xor_sync(mask, value, by, width);
    }
}

__global__ void shuffle_all(int* out, int kind, int width) {
    for (int by = 0; by < 32; by++)
        out[by * 32 + threadIdx.x] = shuffle_of_kind(0xffffffffu, kind, 100 + (int)threadIdx.x, by, width);
}

// The lane that a shuffle reads, by CUDA's description of warp shuffle functions.
static int source_lane(int kind, int lane, int by, int width) {
    const int segment = lane / width * width;
    int source = lane;
    if (kind == SHUFFLE_INDEX) source = segment + by % width;
    if (kind == SHUFFLE_UP) source = lane - by < segment ? lane : lane - by;
    if (kind == SHUFFLE_DOWN) source = lane + by >= segment + width ? lane : lane + by;
    if (kind == SHUFFLE_XOR) source = (lane ^ by) >= segment + width ? lane : (lane ^ by);
    return source;
}

static void shuffles_of_every_width(void** state) {
    (void)state;
    DeviceArray<int> out(32 * 32);
    for (int kind = 0; kind < SHUFFLE_KINDS; kind++)
        for (int width = 1; width <= 32; width *= 2) {
            launch(shuffle_all, 1, 32, 0, nullptr, out.device, kind, width);
            out.to_host();
            for (int by = 0; by < 32; by++)
                for (int lane = 0; lane < 32; lane++)
                    assert_int_equal(out.host[by * 32 + lane], 100 + source_lane(kind, lane, by, width));
        }
}

// The value of lane l is what `values` holds at l; lane l reads that of lane 31 - l in warps of every place of the block.
template <class T> __global__ void shuffle_type(T* out, const T* values) {
    const int lane = (int)threadIdx.x % 32;
    out[threadIdx.x] = __shfl_sync(0xffffffffu, values[threadIdx.x], 31 - lane);
}

template <class T> static void check_shuffle_type() {
    DeviceArray<T> values(128), out(128);
    unsigned char* bytes = (unsigned char*)values.host.data();
    for (size_t i = 0; i < 128 * sizeof(T); i++)
        bytes[i] = (unsigned char)(i * 97 % 61); // no NaN of any type
    values.to_device();
    launch(shuffle_type<T>, 1, 128, 0, nullptr, out.device, values.device);
    out.to_host();
    for (int i = 0; i < 128; i++)
        assert_memory_equal(&out.host[i], &values.host[i / 32 * 32 + 31 - i % 32], sizeof(T));
}

static void shuffles_of_every_type(void** state) {
    (void)state;
    check_shuffle_type<int>();
    check_shuffle_type<unsigned>();
    check_shuffle_type<long long>();
    check_shuffle_type<unsigned long long>();
    check_shuffle_type<float>();
    check_shuffle_type<double>();
    check_shuffle_type<bf16>();
    check_shuffle_type<__nv_bfloat162>();
}

// Lanes that split in three by the remainder of their number add up within their own third, each in its own branch.
__device__ static int sum_of_mask(unsigned mask, int value) {
    int sum = 0;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) sum += __shfl_sync(mask, value, lane);
    return sum;
}

__global__ void sum_in_thirds(int* sums, unsigned* ballots, int* votes, unsigned* matches) {
    const int lane = (int)threadIdx.x % 32, third = lane % 3;
    unsigned mask = 0;
    for (int i = third; i < 32; i += 3) mask |= 1u << i;
    const int value = (int)threadIdx.x * (int)threadIdx.x;
    if (third == 0) sums[threadIdx.x] = sum_of_mask(mask, value);
    else if (third == 1) sums[threadIdx.x] = sum_of_mask(mask, 2 * value);
    else sums[threadIdx.x] = sum_of_mask(mask, 3 * value);
    ballots[threadIdx.x] = __ballot_sync(mask, lane % 2);
    votes[threadIdx.x] = __any_sync(mask, lane == 6) + 2 * __all_sync(mask, lane != 7);
    matches[2 * threadIdx.x] = __match_any_sync(mask, lane / 5 - 1);
    matches[2 * threadIdx.x + 1] = __match_any_sync(mask, (unsigned long long)(lane / 5) << 32);
}

static void partial_masks(void** state) {
    (void)state;
    enum { THREADS = 64 };
    DeviceArray<int> sums(THREADS), votes(THREADS);
    DeviceArray<unsigned> ballots(THREADS), matches(2 * THREADS);
    launch(sum_in_thirds, 1, THREADS, 0, nullptr, sums.device, ballots.device, votes.device, matches.device);
    sums.to_host();
    ballots.to_host();
    votes.to_host();
    matches.to_host();
    for (int thread = 0; thread < THREADS; thread++) {
        const int lane = thread % 32, warp = thread / 32, third = lane % 3;
        int sum = 0;
        unsigned ballot = 0, match = 0;
        for (int other = third; other < 32; other += 3) {
            sum += (third + 1) * (warp * 32 + other) * (warp * 32 + other);
            ballot |= (unsigned)(other % 2) << other;
            match |= (unsigned)(other / 5 == lane / 5) << other;
        }
        assert_int_equal(sums.host[thread], sum);
        assert_int_equal(ballots.host[thread], ballot);
        assert_int_equal(votes.host[thread], (third == 0) + 2 * (third != 1));
        for (int i = 0; i < 2; i++) assert_int_equal(matches.host[2 * thread + i], match);
    }
}

// ----------------------------------------------------------------------------
// Barriers

// Warps take different ways to the same barrier, and go round loops of their own between two of them.
__global__ void meet_in_loops(int* out, int rounds) {
    __shared__ int values[256];
    const int i = (int)threadIdx.x, n = (int)blockDim.x;
    int value = i;
    for (int round = 0; round < rounds; round++) {
        if (i / 32 % 2 == 0)
            for (int k = 0; k < i / 32; k++) value += __shfl_xor_sync(0xffffffffu, 1, k % 32);
        values[i] = value;
        __syncthreads();
        value = values[(i + round * 33 + 1) % n];
        __syncthreads();
    }
    out[i] = value;
    const int odd = __syncthreads_count(value % 2 != 0);
    const int any = __syncthreads_or(i == 77), all = __syncthreads_and(i != 77), none = __syncthreads_or(0);
    out[n + i] = odd * 8 + any * 4 + all * 2 + none;
}

static void barriers_in_loops(void** state) {
    (void)state;
    enum { THREADS = 160, ROUNDS = 5 };
    DeviceArray<int> out(2 * THREADS);
    launch(meet_in_loops, 1, THREADS, 0, nullptr, out.device, (int)ROUNDS);
    out.to_host();
    int value[THREADS], next[THREADS], odd = 0;
    for (int i = 0; i < THREADS; i++) value[i] = i;
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < THREADS; i++)
            if (i / 32 % 2 == 0) value[i] += i / 32;
        for (int i = 0; i < THREADS; i++) next[i] = value[(i + round * 33 + 1) % THREADS];
        memcpy(value, next, sizeof(value));
    }
    for (int i = 0; i < THREADS; i++) odd += value[i] % 2 != 0;
    for (int i = 0; i < THREADS; i++) {
        assert_int_equal(out.host[i], value[i]);
        assert_int_equal(out.host[THREADS + i], odd * 8 + 4);
    }
}

// Every block and thread of a grid in three dimensions, once.
__global__ void number_threads(int* counts) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    // A warp is 32 threads that follow each other in this numbering.
    const unsigned first_of_warp = __shfl_sync(0xffffffffu, thread, 0);
    if (first_of_warp == thread / 32 * 32)
        atomicAdd(&counts[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

static void grids_of_three_dimensions(void** state) {
    (void)state;
    enum { BLOCKS = 3 * 2 * 4, THREADS = 8 * 6 * 2 };
    DeviceArray<int> counts(BLOCKS * THREADS);
    counts.to_device();
    launch(number_threads, dim3(3, 2, 4), dim3(8, 6, 2), 0, nullptr, counts.device);
    counts.to_host();
    for (int i = 0; i < BLOCKS * THREADS; i++) assert_int_equal(counts.host[i], 1);
}

// ----------------------------------------------------------------------------
// bf16

__global__ void widen(float* out, const bf16* in, int n) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = __bfloat162float(in[i]);
}

__global__ void narrow(bf16* out, bf16* low, bf16* high, const float* in, int n) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    out[i] = __float2bfloat16(in[i]);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[i], -in[i]);
    low[i] = pair.x;
    high[i] = pair.y;
}

static void bf16_widens_exactly(void** state) {
    (void)state;
    enum { N = 65536 };
    DeviceArray<bf16> in(N);
    DeviceArray<float> out(N);
    for (int i = 0; i < N; i++) in.host[i] = __ushort_as_bfloat16((unsigned short)i);
    in.to_device();
    launch(widen, N / 256, 256, 0, nullptr, out.device, in.device, (int)N);
    out.to_host();
    for (int i = 0; i < N; i++) {
        const unsigned expected = (unsigned)i << 16;
        assert_memory_equal(&out.host[i], &expected, sizeof(expected));
    }
}

// Round to nearest, ties to even, by search: of the two bf16 neighbours the one whose distance is smaller, in double precision.
static unsigned short nearest_bf16(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    const unsigned short below = (unsigned short)(bits >> 16); // towards zero
    const unsigned short above = (unsigned short)(below + 1);
    // What would be the next number beyond the largest stands for infinity here, as it does in IEEE's rounding.
    const double low = (double)__bfloat162float(__ushort_as_bfloat16(below));
    const double step =
        ldexp(1.0, ((below >> 7 & 0xff) ? (below >> 7 & 0xff) : 1) - 127 - 7) * (value < 0 ? -1 : 1);
    const double to_low = fabs((double)value - low), to_high = fabs(low + step - (double)value);
    if (to_low != to_high) return to_low < to_high ? below : above;
    return below % 2 ? above : below;
}

// All bf16 values, and around each: both ties, the floats next to them, and other fractions of a step.
static void bf16_rounds_to_nearest_even(void** state) {
    (void)state;
    static const unsigned fractions[] = {0, 1, 0x3fff, 0x7fff, 0x8000, 0x8001, 0xabcd, 0xffff};
    enum { FRACTIONS = sizeof(fractions) / sizeof(fractions[0]), N = 65536 * FRACTIONS };
    DeviceArray<float> in(N);
    DeviceArray<bf16> out(N), low(N), high(N);
    for (int i = 0; i < N; i++) {
        const unsigned bits = (unsigned)(i / FRACTIONS) << 16 | fractions[i % FRACTIONS];
        memcpy(&in.host[i], &bits, sizeof(bits));
    }
    in.to_device();
    launch(narrow, N / 256, 256, 0, nullptr, out.device, low.device, high.device, in.device, (int)N);
    out.to_host();
    low.to_host();
    high.to_host();
    for (int i = 0; i < N; i++) {
        const float value = in.host[i];
        const unsigned short rounded = __bfloat16_as_ushort(out.host[i]);
        assert_int_equal(__bfloat16_as_ushort(low.host[i]), rounded);
        if (value != value) {
            assert_true((rounded & 0x7fff) > 0x7f80); // still NaN
            assert_true((__bfloat16_as_ushort(high.host[i]) & 0x7fff) > 0x7f80);
            continue;
        }
        const unsigned short infinity = value < 0 ? 0xff80 : 0x7f80;
        assert_int_equal(rounded, isinf(value) ? infinity : nearest_bf16(value));
        assert_int_equal(__bfloat16_as_ushort(high.host[i]), rounded ^ 0x8000);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mma_places_a),
        cmocka_unit_test(mma_places_b_and_d),
        cmocka_unit_test(mma_sums_products),
        cmocka_unit_test(ldmatrix_plain),
        cmocka_unit_test(ldmatrix_transposed),
        cmocka_unit_test(product_from_shared_memory),
        cmocka_unit_test(copies_in_groups),
        cmocka_unit_test(large_shared_memory),
        cmocka_unit_test(shuffles_of_every_width),
        cmocka_unit_test(shuffles_of_every_type),
        cmocka_unit_test(partial_masks),
        cmocka_unit_test(barriers_in_loops),
        cmocka_unit_test(grids_of_three_dimensions),
        cmocka_unit_test(bf16_widens_exactly),
        cmocka_unit_test(bf16_rounds_to_nearest_even),
    };
    program_name = "test_layout";
    return cmocka_run_group_tests(tests, NULL, NULL);
}
