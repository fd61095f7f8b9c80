/*
Compares both algorithms of mixture of block attention with a reference that follows the formulas of
docs/math.md section 2: every score, every block, one query at a time, in double.

Queries and keys are multiples of 1/8, so the scores of blocks of 2^i keys are exact in every precision. The
selections must then equal the reference's, also with equal scores.
*/
// moba_forward, moba_backward, flashmoba_forward, flashmoba_backward
#include "dev/cpu/moba.h"
// keys_forward
#include "dev/cpu/keys.h"
// AttentionModule, attention_modules
#include "runtime/attention.h"
// assert_close, fill_normal, central_difference
#include "test/numeric.h"
// head_maps
#include "test/head_maps.h"

// ----------------------------------------------------------------------------
// Cases

typedef struct {
    const char* name;
    const AttentionModule* module;
} algorithm_t;

static const algorithm_t algorithms[2] = {{"moba", &attention_modules[ATTENTION_MOBA]},
                                          {"flashmoba", &attention_modules[ATTENTION_FLASHMOBA]}};

// Inputs, what an algorithm computes from them, and what the reference computes.
typedef struct {
    AttentionShape s;
    AttentionTensors x;
    size_t qkv_count, out_count, lse_count, selected_count, centroids_count;
    floatX *qkv, *dout; // x.qkv, x.dout and x.centroids, to write to
    float_acc* centroids;
    double *ref_qkv, *ref_dout, *ref_out, *ref_lse, *ref_dqkv;
    int* ref_selected;
} moba_case_t;

static void fill_nan(floatX* values, size_t count) {
    for (size_t i = 0; i < count; i++) values[i] = (floatX)NAN;
}

static void forget_results(moba_case_t* c) {
    fill_nan(c->x.out, c->out_count);
    fill_nan(c->x.dqkv, c->qkv_count);
    fill_nan(c->x.lse, c->lse_count);
    fill_nan(c->centroids, c->centroids_count);
    for (size_t i = 0; i < c->selected_count; i++) c->x.selected[i] = -2;
}

// Takes a change of the inputs over into the reference's.
static void update_inputs(moba_case_t* c) {
    for (size_t i = 0; i < c->qkv_count; i++) c->ref_qkv[i] = (double)c->qkv[i];
    for (size_t i = 0; i < c->out_count; i++) c->ref_dout[i] = (double)c->dout[i];
}

static moba_case_t new_case(const head_map_t* map, int B, int T, int D, int S, int K) {
    static uint64_t seed = 0;
    const AttentionShape s = {B, T, 0, map->H, map->G, D, 0, S, K};
    moba_case_t c;
    memset(&c, 0, sizeof(c));
    c.s = s;
    c.qkv_count = (size_t)B * T * (c.s.H + 2 * c.s.G) * D;
    c.out_count = (size_t)B * T * c.s.H * D;
    c.lse_count = (size_t)B * c.s.H * T;
    c.selected_count = moba_selected_count(B, T, c.s.H, K);
    c.centroids_count = moba_centroids_count(B, T, c.s.G, D, S);
    c.qkv = new_floats(c.qkv_count), c.x.dqkv = new_floats(c.qkv_count);
    c.dout = new_floats(c.out_count), c.x.out = new_floats(c.out_count);
    c.x.lse = new_floats(c.lse_count), c.centroids = new_floats(c.centroids_count);
    c.x.qkv = c.qkv, c.x.dout = c.dout, c.x.centroids = c.centroids, c.x.kv_of_q = map->kv_of_q;
    c.x.selected = (int*)calloc_or_fail(c.selected_count, sizeof(int), "a test");
    c.ref_selected = (int*)calloc_or_fail(c.selected_count, sizeof(int), "a test");
    c.ref_qkv = new_doubles(c.qkv_count), c.ref_dqkv = new_doubles(c.qkv_count);
    c.ref_dout = new_doubles(c.out_count), c.ref_out = new_doubles(c.out_count);
    c.ref_lse = new_doubles(c.lse_count);
    fill_normal(NULL, c.qkv, c.qkv_count, 8, ++seed);
    fill_normal(NULL, c.dout, c.out_count, 1, ++seed);
    for (size_t i = 0; i < c.qkv_count; i++)
        c.qkv[i] = (floatX)(fmin(fmax(rint((double)c.qkv[i]), -16), 16) / 8);
    update_inputs(&c);
    forget_results(&c);
    return c;
}

static void free_case(moba_case_t* c) {
    free(c->qkv), free(c->x.dqkv), free(c->dout), free(c->x.out), free(c->x.lse), free(c->centroids);
    free(c->x.selected), free(c->ref_selected);
    free(c->ref_qkv), free(c->ref_dqkv), free(c->ref_dout), free(c->ref_out), free(c->ref_lse);
}

// Exactly the bytes asked for, none of them a number.
static void* new_workspace(size_t bytes) {
    return memset(malloc_or_fail(bytes ? bytes : 1, "a workspace"), 0xff, bytes);
}

static void run_forward_from(moba_case_t* c, const algorithm_t* algorithm, int T, int start) {
    AttentionShape s = c->s;
    s.T = T, s.start = start;
    c->x.workspace = new_workspace(algorithm->module->forward_workspace(&s));
    keys_forward(c->qkv, NULL, c->centroids, NULL, NULL, s.B, T, start, s.H, s.G, s.D, s.S, 0, 0);
    algorithm->module->forward(&c->x, &s, 0);
    free(c->x.workspace);
}

static void run_forward(moba_case_t* c, const algorithm_t* algorithm) {
    run_forward_from(c, algorithm, c->s.T, 0);
}

static void run_backward(moba_case_t* c, const algorithm_t* algorithm) {
    c->x.workspace = new_workspace(algorithm->module->backward_workspace(&c->s));
    algorithm->module->backward(&c->x, &c->s, 0);
    free(c->x.workspace);
}

static void run_both(moba_case_t* c, const algorithm_t* algorithm) {
    forget_results(c);
    run_forward(c, algorithm);
    run_backward(c, algorithm);
}

// ----------------------------------------------------------------------------
// The reference

// Where things of one query of one head are.
typedef struct {
    size_t q, k, v, out, row;
} place_t;

static place_t place(const moba_case_t* c, int b, int h, int t) {
    const size_t stride = (size_t)(c->s.H + 2 * c->s.G) * c->s.D, sequence = (size_t)b * c->s.T * stride;
    place_t p;
    p.q = sequence + (size_t)t * stride + (size_t)h * c->s.D;
    p.k = sequence + (size_t)(c->s.H + c->x.kv_of_q[h]) * c->s.D;
    p.v = p.k + (size_t)c->s.G * c->s.D;
    p.out = (((size_t)b * c->s.T + t) * c->s.H + h) * c->s.D;
    p.row = ((size_t)b * c->s.H + h) * c->s.T + t;
    return p;
}

// The score of block j: the query's product with the mean of its keys.
static double reference_score(const moba_case_t* c, const place_t* p, int j) {
    const size_t stride = (size_t)(c->s.H + 2 * c->s.G) * c->s.D;
    double score = 0;
    for (int d = 0; d < c->s.D; d++) {
        double mean = 0;
        for (int s = j * c->s.S; s < (j + 1) * c->s.S; s++) mean += c->ref_qkv[p->k + s * stride + d];
        score += c->ref_qkv[p->q + d] * (mean / c->s.S);
    }
    return score;
}

// A block is chosen when fewer than K-1 others come before it: those of higher score, and more recent ones of the same.
static void reference_select(moba_case_t* c) {
    double* scores = new_doubles((size_t)c->s.T / c->s.S + 1);
    for (int i = 0; i < c->s.B * c->s.H * c->s.T; i++) {
        const int b = i / (c->s.H * c->s.T), h = i / c->s.T % c->s.H, t = i % c->s.T, eligible = t / c->s.S;
        const place_t p = place(c, b, h, t);
        int count = 0;
        if (c->s.K == 1) break;
        int* chosen = c->ref_selected + p.row * (c->s.K - 1);
        for (int j = 0; j < eligible; j++) scores[j] = reference_score(c, &p, j);
        for (int j = eligible - 1; j >= 0; j--) {
            int before = 0;
            for (int other = 0; other < eligible; other++)
                before += scores[other] > scores[j] || (scores[other] == scores[j] && other > j);
            if (!isnan(scores[j]) && before < c->s.K - 1) chosen[count++] = j;
        }
        while (count < c->s.K - 1) chosen[count++] = -1;
    }
    free(scores);
}

// Whether query t sees key s by the reference's selection.
static int sees(const moba_case_t* c, const place_t* p, int t, int s) {
    if (s > t) return 0;
    if (s / c->s.S == t / c->s.S) return 1;
    for (int i = 0; i < c->s.K - 1; i++)
        if (c->ref_selected[p->row * (c->s.K - 1) + i] == s / c->s.S) return 1;
    return 0;
}

// One query of one head: its output and log-sum-exp, and what it adds to the gradients of the sequence.
static void reference_row(moba_case_t* c, double* probs, int* keys, int b, int h, int t, int with_gradient) {
    const int D = c->s.D;
    const size_t stride = (size_t)(c->s.H + 2 * c->s.G) * D;
    const place_t p = place(c, b, h, t);
    double largest = -INFINITY, sum = 0;
    int count = 0;
    for (int s = 0; s <= t; s++)
        if (sees(c, &p, t, s)) keys[count++] = s;
    for (int i = 0; i < count; i++) {
        probs[i] = dot(c->ref_qkv + p.q, c->ref_qkv + p.k + keys[i] * stride, D) / sqrt((double)D);
        largest = fmax(largest, probs[i]);
    }
    for (int i = 0; i < count; i++) sum += probs[i] = exp(probs[i] - largest);
    c->ref_lse[p.row] = largest + log(sum);
    for (int d = 0; d < D; d++) c->ref_out[p.out + d] = 0;
    for (int i = 0; i < count; i++) {
        probs[i] /= sum;
        for (int d = 0; d < D; d++)
            c->ref_out[p.out + d] += probs[i] * c->ref_qkv[p.v + keys[i] * stride + d];
    }
    if (!with_gradient) return;
    const double* dout = c->ref_dout + p.out;
    const double delta = dot(c->ref_out + p.out, dout, D);
    for (int i = 0; i < count; i++) {
        const size_t key = keys[i] * stride;
        const double dprob = dot(dout, c->ref_qkv + p.v + key, D);
        const double dscore = probs[i] * (dprob - delta) / sqrt((double)D);
        for (int d = 0; d < D; d++) {
            c->ref_dqkv[p.q + d] += dscore * c->ref_qkv[p.k + key + d];
            c->ref_dqkv[p.k + key + d] += dscore * c->ref_qkv[p.q + d];
            c->ref_dqkv[p.v + key + d] += probs[i] * dout[d];
        }
    }
}

// With the selection as it is in ref_selected.
static void reference_attend(moba_case_t* c, int with_gradient) {
    double* probs = new_doubles((size_t)c->s.T);
    int* keys = (int*)calloc_or_fail((size_t)c->s.T, sizeof(int), "a test");
    memset(c->ref_dqkv, 0, c->qkv_count * sizeof(double));
    for (int b = 0; b < c->s.B; b++)
        for (int h = 0; h < c->s.H; h++)
            for (int t = 0; t < c->s.T; t++) reference_row(c, probs, keys, b, h, t, with_gradient);
    free(probs), free(keys);
}

static void run_reference(moba_case_t* c) {
    reference_select(c);
    reference_attend(c, 1);
}

// ----------------------------------------------------------------------------
// Comparing

static void assert_selected_as(const moba_case_t* c, const int* expected, const char* name) {
    for (size_t i = 0; i < c->selected_count; i++) {
        if (c->x.selected[i] == expected[i]) continue;
        const int row = (int)(i / (c->s.K - 1));
        print_error("%s: choice %d of query %d is block %d, not %d (B %d T %d H %d D %d S %d K %d)\n", name,
                    (int)(i % (c->s.K - 1)), row % c->s.T, c->x.selected[i], expected[i], c->s.B, c->s.T,
                    c->s.H, c->s.D, c->s.S, c->s.K);
        assert_int_equal(c->x.selected[i], expected[i]);
    }
}

static void assert_near(const moba_case_t* c, const char* name, const char* what, const floatX* a,
                        const double* b, size_t count) {
    char label[160];
    snprintf(label, sizeof(label), "%s %s, B %d T %d H %d G %d D %d S %d K %d", name, what, c->s.B, c->s.T,
             c->s.H, c->s.G, c->s.D, c->s.S, c->s.K);
    assert_close(label, a, b, count, FORWARD_BOUND);
}

// A query that sees one key alone has gradient 0 of both; what is left is rounding of what dout brings in.
static void assert_gradient_near(moba_case_t* c, const char* name) {
    double largest = 0;
    for (size_t i = 0; i < c->qkv_count; i++) {
        assert_true(isfinite((double)c->x.dqkv[i]));
        largest = fmax(largest, fabs(c->ref_dqkv[i]));
    }
    // The first query of the sequence, and all of them with S = 1, K = 1.
    const int is_alone = c->s.T == 1 || (c->s.S == 1 && c->s.K == 1);
    const size_t stride = (size_t)(c->s.H + 2 * c->s.G) * c->s.D;
    for (size_t i = 0; i < c->qkv_count; i++) {
        if (!is_alone || i % stride >= (size_t)(c->s.H + c->s.G) * c->s.D) continue;
        assert_true(fabs((double)c->x.dqkv[i] - c->ref_dqkv[i]) <= 10 * FORWARD_BOUND * largest);
        c->x.dqkv[i] = 0, c->ref_dqkv[i] = 0;
    }
    assert_near(c, name, "dqkv", c->x.dqkv, c->ref_dqkv, c->qkv_count);
}

static void assert_as_reference(moba_case_t* c, const char* name) {
    assert_selected_as(c, c->ref_selected, name);
    assert_near(c, name, "out", c->x.out, c->ref_out, c->out_count);
    assert_near(c, name, "lse", c->x.lse, c->ref_lse, c->lse_count);
    assert_gradient_near(c, name);
}

// Both algorithms against the reference.
static void check_case(moba_case_t* c) {
    run_reference(c);
    for (int a = 0; a < 2; a++) {
        run_both(c, &algorithms[a]);
        assert_as_reference(c, algorithms[a].name);
    }
}

static void check_shape(const head_map_t* map, int B, int T, int D, int S, int K) {
    moba_case_t c = new_case(map, B, T, D, S, K);
    check_case(&c);
    free_case(&c);
}

// ----------------------------------------------------------------------------
// Tests against the reference

static void test_shapes(void** state) {
    (void)state;
    const int Ss[] = {1, 4, 16, 32, 64, 128}, Ks[] = {1, 2, 3, 8, 64}, Ds[] = {8, 32, 64, 7};
    int i = 0;
    for (int s = 0; s < 6; s++) {
        const int S = Ss[s];
        const int Ts[] = {1, S - 1, S, S + 1, 2 * S, 3 * S + S / 2 + 1, min_int(40, 512 / S) * S + S / 3};
        for (int t = 0; t < 7; t++) {
            for (int k = 0; k < 5; k++, i++) {
                if (Ts[t] < 1) continue;
                // Maps, head dimensions and batch sizes take turns; the large ones with few heads.
                const int map = Ts[t] > 300 ? i % 2 * 5 : i % NUM_HEAD_MAPS;
                check_shape(&head_maps[map], Ts[t] > 100 ? 1 : 1 + i % 3, Ts[t], Ds[(i + i / 4) % 4], S,
                            Ks[k]);
            }
        }
    }
}

static void test_head_maps(void** state) {
    (void)state;
    for (int m = 0; m < NUM_HEAD_MAPS; m++) {
        check_shape(&head_maps[m], 2, 75, 8, 8, 3);
        check_shape(&head_maps[m], 1, 150, 16, 16, 4);
    }
}

// Sizes that are no powers of two, and blocks of more keys than one tile holds.
static void test_odd_sizes(void** state) {
    (void)state;
    const int sizes[][4] = {{100, 3, 3, 5},  {90, 7, 33, 3},   {200, 13, 17, 4},  {333, 100, 129, 2},
                            {333, 37, 1, 8}, {900, 300, 8, 2}, {1500, 600, 8, 2}, {1100, 257, 3, 3}};
    for (int i = 0; i < 8; i++) {
        moba_case_t c =
            new_case(&head_maps[i % 4 * 5 / 3], 1, sizes[i][0], sizes[i][2], sizes[i][1], sizes[i][3]);
        // Means of these blocks are rounded: no ties, please.
        fill_normal(c.ref_qkv, c.qkv, c.qkv_count, 1, (uint64_t)i);
        check_case(&c);
        free_case(&c);
    }
}

// Enough queries that their lists fill several tiles and several chunks.
static void test_many_queries(void** state) {
    (void)state;
    check_shape(&head_maps[0], 1, 2100, 8, 8, 2);
    check_shape(&head_maps[3], 1, 900, 8, 64, 8);
    check_shape(&head_maps[0], 1, 1700, 8, 1, 64);
    check_shape(&head_maps[0], 1, 2100, 8, 256, 3);
}

// Scores of about +-1e4, small integers in the inputs so that they are exact in every precision.
static void test_large_scores(void** state) {
    (void)state;
    moba_case_t c = new_case(&head_maps[4], 1, 200, 64, 16, 3);
    for (size_t i = 0; i < c.qkv_count; i++) c.qkv[i] *= 64;
    update_inputs(&c);
    run_reference(&c);
    double largest = 0;
    for (size_t i = 0; i < c.lse_count; i++) largest = fmax(largest, c.ref_lse[i]);
    assert_true(largest > 1e4);
    for (int a = 0; a < 2; a++) {
        run_both(&c, &algorithms[a]);
        assert_selected_as(&c, c.ref_selected, algorithms[a].name);
        assert_near(&c, algorithms[a].name, "out", c.x.out, c.ref_out, c.out_count);
        assert_near(&c, algorithms[a].name, "lse", c.x.lse, c.ref_lse, c.lse_count);
        // A probability made again from a log-sum-exp of 1e4 has 1e4 times the rounding.
        assert_close("gradient", c.x.dqkv, c.ref_dqkv, c.qkv_count, 1e4 * FORWARD_BOUND);
    }
    free_case(&c);
}

#if defined(PRECISION_FP64)
static double reference_loss(void* context) {
    moba_case_t* c = (moba_case_t*)context;
    reference_attend(c, 0);
    return dot(c->ref_dout, c->ref_out, c->out_count);
}

// The selection stays what it was: that is the definition of the gradient.
static void test_central_differences(void** state) {
    (void)state;
    const int shapes[][5] = {
        {2, 9, 4, 2, 2}, {1, 18, 3, 4, 3}, {1, 23, 2, 5, 2}, {1, 11, 4, 1, 4}, {1, 13, 4, 4, 1}};
    for (int m = 0; m < NUM_HEAD_MAPS; m++) {
        for (int i = 0; i < 5; i++) {
            const int* shape = shapes[i];
            moba_case_t c = new_case(&head_maps[m], shape[0], shape[1], shape[2], shape[3], shape[4]);
            fill_normal(c.ref_qkv, c.qkv, c.qkv_count, 1, (uint64_t)(m * 5 + i));
            reference_select(&c);
            double* gradient = new_doubles(c.qkv_count);
            for (size_t j = 0; j < c.qkv_count; j++)
                gradient[j] = central_difference(reference_loss, &c, c.ref_qkv + j);
            for (int a = 0; a < 2; a++) {
                run_both(&c, &algorithms[a]);
                assert_selected_as(&c, c.ref_selected, algorithms[a].name);
                assert_close(algorithms[a].name, c.x.dqkv, gradient, c.qkv_count, GRADIENT_BOUND);
            }
            free(gradient);
            free_case(&c);
        }
    }
}
#endif

// ----------------------------------------------------------------------------
// Consequences

// Dense attention of the sequences of a case, cut into pieces of `length` tokens that do not see each other.
static void run_dense(moba_case_t* c, int length) {
    for (int b = 0; b < c->s.B; b++) {
        for (int first = 0; first < c->s.T; first += length) {
            const int T = min_int(length, c->s.T - first), H = c->s.H, G = c->s.G, D = c->s.D;
            const size_t row = (size_t)(H + 2 * G) * D, at = (size_t)b * c->s.T + first;
            const AttentionShape s = {1, T, 0, H, G, D, 0, 0, 0};
            AttentionTensors x;
            memset(&x, 0, sizeof(x));
            x.out = new_floats((size_t)T * H * D), x.dqkv = new_floats(T * row);
            x.lse = new_floats((size_t)H * T);
            x.qkv = c->qkv + at * row, x.dout = c->dout + at * H * D, x.kv_of_q = c->x.kv_of_q;
            x.workspace = new_workspace(attention_forward_workspace(&s));
            attention_forward(&x, &s, 0);
            free(x.workspace);
            x.workspace = new_workspace(attention_backward_workspace(&s));
            attention_backward(&x, &s, 0);
            free(x.workspace);
            for (size_t i = 0; i < (size_t)T * H * D; i++) c->ref_out[at * H * D + i] = (double)x.out[i];
            for (size_t i = 0; i < T * row; i++) c->ref_dqkv[at * row + i] = (double)x.dqkv[i];
            for (int i = 0; i < H * T; i++)
                c->ref_lse[((size_t)b * H + i / T) * c->s.T + first + i % T] = (double)x.lse[i];
            free(x.out), free(x.dqkv), free(x.lse);
        }
    }
}

static void check_against_dense(int T, int S, int K, int length) {
    for (int a = 0; a < 2; a++) {
        moba_case_t c = new_case(&head_maps[2 + 2 * a], 2, T, 16, S, K);
        run_both(&c, &algorithms[a]);
        run_dense(&c, length);
        assert_near(&c, algorithms[a].name, "out", c.x.out, c.ref_out, c.out_count);
        assert_near(&c, algorithms[a].name, "lse", c.x.lse, c.ref_lse, c.lse_count);
        assert_gradient_near(&c, algorithms[a].name);
        free_case(&c);
    }
}

static void test_all_blocks_selected_is_dense(void** state) {
    (void)state;
    check_against_dense(128, 16, 8, 128);
    check_against_dense(250, 32, 8, 250);
    check_against_dense(250, 50, 5, 250);
    check_against_dense(64, 1, 64, 64);
    check_against_dense(300, 16, 64, 300);
}

static void test_one_block_is_causal(void** state) {
    (void)state;
    check_against_dense(128, 128, 2, 128);
    check_against_dense(100, 128, 8, 100);
    check_against_dense(500, 512, 1, 500);
    check_against_dense(500, 1 << 20, 8, 500);
}

static void test_k_one_is_block_diagonal(void** state) {
    (void)state;
    check_against_dense(200, 32, 1, 32);
    check_against_dense(450, 200, 1, 200);
    check_against_dense(50, 1, 1, 1);
}

// Complete past blocks only, each once, as many as there are up to K-1; the last block here is partial.
static void test_only_complete_past_blocks(void** state) {
    (void)state;
    const int S = 16, T = 20 * S + 5;
    for (int K = 2; K <= 64; K *= 2) {
        for (int a = 0; a < 2; a++) {
            moba_case_t c = new_case(&head_maps[4], 1, T, 8, S, K);
            run_forward(&c, &algorithms[a]);
            for (int row = 0; row < c.s.H * T; row++) {
                const int* chosen = c.x.selected + (size_t)row * (K - 1);
                const int t = row % T, expected = min_int(K - 1, t / S);
                for (int i = 0; i < K - 1; i++) {
                    if (i >= expected) assert_int_equal(chosen[i], -1);
                    if (i < expected) assert_true(chosen[i] >= 0 && chosen[i] < (i ? chosen[i - 1] : t / S));
                }
            }
            free_case(&c);
        }
    }
}

// Not a bit of an earlier output: also where lists of queries become longer or shorter by later queries.
static void check_no_token_reaches_back(const algorithm_t* algorithm, int T, int K) {
    const int changed[] = {0, 1, 15, 16, 31, 64, 130, T - 5, T - 4, T - 1};
    moba_case_t c = new_case(&head_maps[5], 1, T, 64, 16, K);
    fill_normal(NULL, c.qkv, c.qkv_count, 1,
                (uint64_t)T); // rounded products, unlike those of multiples of 1/8
    floatX* before = new_floats(c.out_count);
    int* selected_before = (int*)calloc_or_fail(c.selected_count, sizeof(int), "a test");
    const size_t out_row = (size_t)c.s.H * c.s.D, qkv_row = (size_t)(c.s.H + 2 * c.s.G) * c.s.D,
                 choices = (size_t)K - 1;
    run_forward(&c, algorithm);
    for (int i = 0; i < 10; i++) {
        memcpy(before, c.x.out, c.out_count * sizeof(floatX));
        memcpy(selected_before, c.x.selected, c.selected_count * sizeof(int));
        for (size_t j = 0; j < qkv_row; j++) c.qkv[changed[i] * qkv_row + j] += (floatX)((int)j % 5 - 2) / 2;
        run_forward(&c, algorithm);
        assert_memory_equal(before, c.x.out, changed[i] * out_row * sizeof(floatX));
        assert_memory_not_equal(before + changed[i] * out_row, c.x.out + changed[i] * out_row,
                                out_row * sizeof(floatX));
        for (int row = 0; row < c.s.H * T; row++)
            if (row % T < changed[i])
                assert_memory_equal(selected_before + row * choices, c.x.selected + row * choices,
                                    choices * sizeof(int));
    }
    free(before), free(selected_before);
    free_case(&c);
}

static void test_no_token_reaches_back(void** state) {
    (void)state;
    for (int a = 0; a < 2; a++) {
        check_no_token_reaches_back(&algorithms[a], 260, 4);
        check_no_token_reaches_back(&algorithms[a], 700, 2);
    }
}

// ----------------------------------------------------------------------------
// Selections that are easy to get wrong

static floatX* key_of(moba_case_t* c, int t, int g) {
    return c->qkv + ((size_t)t * (c->s.H + 2 * c->s.G) + c->s.H + g) * c->s.D;
}

// All keys the same: the most recent blocks; every second block the same: the most recent of the better half.
static void test_ties(void** state) {
    (void)state;
    const int S = 8, T = 300, K = 4;
    for (int a = 0; a < 2; a++) {
        moba_case_t c = new_case(&head_maps[1], 1, T, 16, S, K);
        for (int period = 1; period <= 3; period++) {
            for (int t = 0; t < T; t++)
                for (int g = 0; g < c.s.G; g++)
                    for (int d = 0; d < c.s.D; d++)
                        key_of(&c, t, g)[d] = (floatX)(0.3 + 0.01 * d * (t / S % period));
            forget_results(&c);
            run_forward(&c, &algorithms[a]);
            for (int row = 0; row < c.s.H * T && period == 1; row++)
                for (int i = 0; i < K - 1; i++)
                    assert_int_equal(c.x.selected[(size_t)row * (K - 1) + i],
                                     max_int(-1, row % T / S - 1 - i));
            // The reference's means of equal numbers need not be equal: give it numbers that are exact.
            for (size_t i = 0; i < c.qkv_count; i++) c.qkv[i] = (floatX)(rint(64 * (double)c.qkv[i]) / 64);
            update_inputs(&c);
            check_case(&c);
        }
        free_case(&c);
    }
}

static void test_nan_is_never_selected(void** state) {
    (void)state;
    const int S = 8, T = 203, poisoned = 5;
    for (int a = 0; a < 2; a++) {
        for (int K = 2; K < 40; K += 17) {
            moba_case_t c = new_case(&head_maps[1], 1, T, 16, S, K);
            key_of(&c, poisoned * S + 3, 0)[2] = (floatX)NAN;
            update_inputs(&c);
            reference_select(&c);
            run_forward(&c, &algorithms[a]);
            assert_selected_as(&c, c.ref_selected, algorithms[a].name);
            for (int t = 0; t < T; t++)
                for (int i = 0; i < K - 1; i++)
                    assert_int_not_equal(c.x.selected[(size_t)t * (K - 1) + i], poisoned);
            for (size_t i = 0; i < c.out_count; i++)
                if ((int)(i / c.s.D / c.s.H) / S != poisoned) assert_true(isfinite((double)c.x.out[i]));
            free_case(&c);
        }
    }
}

// Infinite scores are scores: the last to be chosen, or the first.
static void test_infinite_scores(void** state) {
    (void)state;
    const int S = 4, T = 90;
    for (int a = 0; a < 2; a++) {
        for (int K = 2; K < 40; K += 9) {
            moba_case_t c = new_case(&head_maps[0], 1, T, 8, S, K);
            for (int t = 0; t < T; t++) {
                c.qkv[(size_t)t * 3 * c.s.D] = 1;
                if (t / S % 5 == 2) key_of(&c, t, 0)[0] = (floatX)-INFINITY;
                if (t / S % 5 == 3) key_of(&c, t, 0)[0] = (floatX)INFINITY;
            }
            update_inputs(&c);
            reference_select(&c);
            run_forward(&c, &algorithms[a]);
            assert_selected_as(&c, c.ref_selected, algorithms[a].name);
            free_case(&c);
        }
    }
}

// One block that every later query of every head chooses: one list holds them all. The oldest, and one in the middle.
static void test_hot_block(void** state) {
    (void)state;
    const int S = 16, T = 1500;
    for (int hot = 0; hot < 40; hot += 39) {
        moba_case_t c = new_case(&head_maps[3], 1, T, 8, S, 2);
        for (int t = 0; t < T; t++) {
            for (int h = 0; h < c.s.H; h++) c.qkv[((size_t)t * (c.s.H + 2) + h) * c.s.D] = 2;
            key_of(&c, t, 0)[0] = (floatX)(t / S == hot ? 8 : -2);
        }
        update_inputs(&c);
        check_case(&c);
        for (int row = 0; row < c.s.H * T; row++)
            if (row % T / S > hot) assert_int_equal(c.x.selected[row], hot);
        free_case(&c);
    }
}

// Selections do not depend on the algorithm, also where scores are rounded.
static void test_same_selection(void** state) {
    (void)state;
    for (int i = 0; i < 8; i++) {
        const int S = 1 + i * 3, D = 5 + i * 11;
        moba_case_t c = new_case(&head_maps[i], 1, 700, D, S, 2 + i);
        fill_normal(c.ref_qkv, c.qkv, c.qkv_count, 1, (uint64_t)i);
        run_forward(&c, &algorithms[0]);
        memcpy(c.ref_selected, c.x.selected, c.selected_count * sizeof(int));
        for (size_t j = 0; j < c.out_count; j++) c.ref_out[j] = (double)c.x.out[j];
        forget_results(&c);
        run_forward(&c, &algorithms[1]);
        assert_selected_as(&c, c.ref_selected, "flashmoba and moba");
        assert_near(&c, "flashmoba and moba", "out", c.x.out, c.ref_out, c.out_count);
        free_case(&c);
    }
}

// ----------------------------------------------------------------------------
// Continuing a sequence

// Rows start..T-1 alone are those of the whole, and nothing before them is touched.
static void test_start(void** state) {
    (void)state;
    const int T = 257, starts[] = {0, 1, 15, 16, 17, 100, 255, 256};
    for (int i = 0; i < 16; i++) {
        const int start = starts[i % 8];
        const algorithm_t* algorithm = &algorithms[i / 8];
        moba_case_t c = new_case(&head_maps[4 + i % 4], 1 + i % 2, T, 16, 16, 4);
        run_reference(&c);
        run_forward(&c, algorithm);
        floatX* centroids = new_floats(c.centroids_count);
        memcpy(centroids, c.centroids, c.centroids_count * sizeof(floatX));
        forget_results(&c);
        const size_t row = (size_t)c.s.G * c.s.D, blocks = (size_t)T / c.s.S;
        for (int b = 0; b < c.s.B; b++)
            memcpy(c.centroids + b * blocks * row, centroids + b * blocks * row,
                   start / c.s.S * row * sizeof(floatX));
        run_forward_from(&c, algorithm, T, start);
        assert_memory_equal(centroids, c.centroids, c.centroids_count * sizeof(floatX));
        for (int at = 0; at < c.s.B * c.s.H * T; at++) {
            const place_t p = place(&c, at / (c.s.H * T), at / T % c.s.H, at % T);
            if (at % T < start) {
                for (int d = 0; d < c.s.D; d++) assert_true(isnan((double)c.x.out[p.out + d]));
                assert_true(isnan((double)c.x.lse[p.row]));
                assert_int_equal(c.x.selected[p.row * 3], -2);
                continue;
            }
            assert_memory_equal(c.x.selected + p.row * 3, c.ref_selected + p.row * 3, 3 * sizeof(int));
            assert_close(algorithm->name, c.x.out + p.out, c.ref_out + p.out, (size_t)c.s.D,
                         10 * FORWARD_BOUND);
            assert_close(algorithm->name, c.x.lse + p.row, c.ref_lse + p.row, 1, 10 * FORWARD_BOUND);
        }
        free(centroids);
        free_case(&c);
    }
}

// A sequence that grows, as in generation: a prompt, some pieces, single tokens; the buffers stay where they are.
static void test_growing_sequence(void** state) {
    (void)state;
    const int T = 140, S = 16;
    for (int i = 0; i < 4; i++) {
        const algorithm_t* algorithm = &algorithms[i % 2];
        moba_case_t c = new_case(&head_maps[2 + i], 1, T, 16, S, 3);
        if (i >= 2) fill_normal(c.ref_qkv, c.qkv, c.qkv_count, 1, (uint64_t)i);
        run_reference(&c);
        for (int start = 0, end; start < T; start = end) {
            end = start == 0 ? 37 : start < 100 ? min_int(T, start + 21) : start + 1;
            run_forward_from(&c, algorithm, end, start);
            for (int h = 0; h < c.s.H; h++)
                for (int t = start; t < end; t++) // lse and selected are laid out for end tokens
                    assert_memory_equal(c.x.selected + ((size_t)h * end + t) * 2,
                                        c.ref_selected + ((size_t)h * T + t) * 2, 2 * sizeof(int));
        }
        assert_near(&c, algorithm->name, "out of pieces", c.x.out, c.ref_out, c.out_count);
        free_case(&c);
    }
}

// ----------------------------------------------------------------------------
// Bits and memory

// The same bits on every run and for every number of threads, whichever way the backward divides its work.
static void test_bitwise(void** state) {
    (void)state;
    const int threads_before = omp_get_max_threads();
    for (int i = 0; i < 2 * NUM_HEAD_MAPS; i++) {
        const algorithm_t* algorithm = &algorithms[i % 2];
        const int S = i % 3 ? 16 : 40, K = i % 3 ? 20 : 9; // several chunks
        moba_case_t c = new_case(&head_maps[i / 2], 1, 530, 8, S, K);
        floatX *out = new_floats(c.out_count), *lse = new_floats(c.lse_count),
               *dqkv = new_floats(c.qkv_count);
        for (int threads = 1; threads <= 8; threads += threads < 3 ? 1 : 5) {
            omp_set_num_threads(threads);
            run_both(&c, algorithm);
            if (threads == 1) {
                memcpy(out, c.x.out, c.out_count * sizeof(floatX));
                memcpy(lse, c.x.lse, c.lse_count * sizeof(floatX));
                memcpy(dqkv, c.x.dqkv, c.qkv_count * sizeof(floatX));
                memcpy(c.ref_selected, c.x.selected, c.selected_count * sizeof(int));
            }
            assert_memory_equal(out, c.x.out, c.out_count * sizeof(floatX));
            assert_memory_equal(lse, c.x.lse, c.lse_count * sizeof(floatX));
            assert_memory_equal(dqkv, c.x.dqkv, c.qkv_count * sizeof(floatX));
            assert_selected_as(&c, c.ref_selected, algorithm->name);
        }
        free(out), free(lse), free(dqkv);
        free_case(&c);
    }
    omp_set_num_threads(threads_before);
}

static void test_empty_groups_have_gradient_zero(void** state) {
    (void)state;
    for (int i = 0; i < 2 * (NUM_HEAD_MAPS - 5); i++) {
        moba_case_t c = new_case(&head_maps[5 + i / 2], 2, 65, 8, 16, 3);
        run_both(&c, &algorithms[i % 2]);
        for (int g = 0; g < c.s.G; g++) {
            int heads = 0;
            for (int h = 0; h < c.s.H; h++) heads += c.x.kv_of_q[h] == g;
            for (int row = 0; row < 2 * c.s.B * c.s.T && heads == 0; row++) {
                const floatX* token = c.x.dqkv + (size_t)(row / 2) * (c.s.H + 2 * c.s.G) * c.s.D;
                const floatX* gradient = token + (size_t)(c.s.H + row % 2 * c.s.G + g) * c.s.D;
                for (int d = 0; d < c.s.D; d++) assert_true(gradient[d] == 0);
            }
        }
        free_case(&c);
    }
}

// What a layer of H heads keeps for its backward, and the workspace on top: within 10 % of dense attention's.
static void test_memory(void** state) {
    (void)state;
    const int threads_before = omp_get_max_threads(), B = 1, H = 8, D = 64;
    const int SK[][2] = {{16, 64}, {32, 32}, {64, 16}, {128, 8}, {512, 2}};
    omp_set_num_threads(8);
    for (int i = 0; i < 5; i++) {
        for (int T = 8192; T <= 65536; T *= 2) {
            for (int G = 1; G <= H; G *= 8) {
                const int S = SK[i][0], K = SK[i][1];
                // A layer with a feed-forward of 8/3 C: norms, residuals and the gate, as docs/math.md has them.
                const double layer =
                    sizeof(floatX) * (double)B * T * D * ((H + 2 * G) + 4 * H + 3 * H * 8 / 3.0);
                const AttentionShape s = {B, T, 0, H, G, D, 0, S, K};
                const double dense =
                    fmax((double)attention_forward_workspace(&s), (double)attention_backward_workspace(&s));
                const double workspace =
                    fmax((double)flashmoba_forward_workspace(&s), (double)flashmoba_backward_workspace(&s));
                const double kept = sizeof(int) * (double)moba_selected_count(B, T, H, K) +
                                    sizeof(float_acc) * (double)moba_centroids_count(B, T, G, D, S);
                assert_true(workspace <= dense);
                assert_true(kept <= 0.1 * layer);
            }
        }
    }
    omp_set_num_threads(threads_before);
}

int main(void) {
    // Thousands of small calls: threads would mostly wait for each other, and the bits are the same (test_bitwise).
    omp_set_num_threads(1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_head_maps),
        cmocka_unit_test(test_odd_sizes),
        cmocka_unit_test(test_many_queries),
        cmocka_unit_test(test_large_scores),
#if defined(PRECISION_FP64)
        cmocka_unit_test(test_central_differences),
#endif
        cmocka_unit_test(test_all_blocks_selected_is_dense),
        cmocka_unit_test(test_one_block_is_causal),
        cmocka_unit_test(test_k_one_is_block_diagonal),
        cmocka_unit_test(test_only_complete_past_blocks),
        cmocka_unit_test(test_no_token_reaches_back),
        cmocka_unit_test(test_ties),
        cmocka_unit_test(test_nan_is_never_selected),
        cmocka_unit_test(test_infinite_scores),
        cmocka_unit_test(test_hot_block),
        cmocka_unit_test(test_same_selection),
        cmocka_unit_test(test_start),
        cmocka_unit_test(test_growing_sequence),
        cmocka_unit_test(test_bitwise),
        cmocka_unit_test(test_empty_groups_have_gradient_zero),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests_name("moba " PRECISION_NAME, tests, NULL, NULL);
}
