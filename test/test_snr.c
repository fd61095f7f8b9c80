/*
Tests dev/snr.c, the router's theory. It compares the table with its predictions and with the figures on
record, the sampling of single coordinates with whole keys, and the report on a model's queries and keys with
values calculated by hand.
*/
#define SNR_NO_MAIN
#include "dev/snr.c" // NOLINT(bugprone-suspicious-include): the program without its main

// This include is last, because cmocka.h defines a macro `fail`.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

static void assert_close(const char* what, double a, double b, double tolerance) {
    if (!(fabs(a - b) <= tolerance)) fail_msg("%s: %.6g is not %.6g within %g", what, a, b, tolerance);
}

// ----------------------------------------------------------------------------
// Predictions

static void predictions_by_hand(void** state) {
    (void)state;
    assert_close("a fair coin thrown 3 times", binomial_cdf(3, 0.5, 1), 0.5, 1e-12);
    assert_close("one of 20", binomial_cdf(20, 0.1, 1), pow(0.9, 20) + 20 * 0.1 * pow(0.9, 19), 1e-12);
    assert_close("never", binomial_cdf(5, 0, 0), 1, 0);
    assert_close("always", binomial_cdf(5, 1, 4), 0, 0);
    assert_close("at most all", binomial_cdf(5, 1, 5), 1, 0);
    Settings settings = settings_default();
    assert_close("SNR", predicted_snr(&settings, 512, 1), 0.2, 1e-12); // 0.8 sqrt(64/1024)
    assert_close("SNR", predicted_snr(&settings, 128, 4), 1.0, 1e-12); // 2 sqrt(64/256)
    // The router finds a signal of size zero only by chance.
    settings.dmu = 0;
    const Blocking blocking = {64, 16};
    assert_close("chance", predicted_recall(&settings, blocking, 1), 16 / 128.0, 0.003);
    // Two blocks have only one rival, so the recall follows from the pairwise failure,
    // except that the needle itself has no noise.
    settings.T = 1024;
    settings.dmu = 0.8;
    const Blocking pair = {512, 1};
    assert_close("a pair", predicted_recall(&settings, pair, 1),
                 1 - normal_cdf(-predicted_snr(&settings, 512, 1)), 0.001);
}

// ----------------------------------------------------------------------------
// The table

static void the_table_is_reproduced(void** state) {
    (void)state;
    static const double recorded[4][3] = {
        {.19, .30, .52}, {.22, .42, .72}, {.27, .60, .92}, {.36, .81, .995}};
    const Settings settings = settings_default();
    static Cell cells[MOST_BLOCKINGS * MOST_BLOCKINGS];
    assert_int_equal(measure_table(cells, &settings), 12);
    for (int c = 0; c < 12; c++) {
        char what[64];
        snprintf(what, sizeof(what), "S %d, K %d, m %d", cells[c].blocking.S, cells[c].blocking.K,
                 cells[c].m);
        assert_close(what, cells[c].failure, cells[c].predicted_failure, 0.01);
        assert_close(what, cells[c].recall, cells[c].predicted_recall, 0.02);
        assert_close(what, cells[c].recall, recorded[c / 3][c % 3], 0.02);
        assert_close(what, cells[c].predicted_recall, recorded[c / 3][c % 3], 0.02);
    }
}

static void threads_do_not_matter_and_seeds_do(void** state) {
    (void)state;
    static Cell cells[4][MOST_BLOCKINGS * MOST_BLOCKINGS];
    Settings settings = settings_default();
    settings.trials = 50;
    const int threads = omp_get_max_threads();
    for (int i = 0; i < 4; i++) {
        omp_set_num_threads(i == 0 ? 1 : 3);
        settings.seed = i == 2 ? 7 : 1337;
        if (i == 3)
            settings.blocking_count = 2; // the rest of the table must not influence the keys of a cell
        measure_table(cells[i], &settings);
    }
    omp_set_num_threads(threads);
    int differ = 0;
    for (int c = 0; c < 12; c++) {
        assert_true(cells[0][c].pairs_lost == cells[1][c].pairs_lost &&
                    cells[0][c].found == cells[1][c].found);
        differ += cells[0][c].pairs_lost != cells[2][c].pairs_lost;
    }
    assert_true(differ >= 10);
    assert_true(cells[0][0].pairs_lost == cells[3][0].pairs_lost);
}

// Runs one trial of the model: keys of D coordinates, their centroids, and the query's products with the
// centroids. Returns how many blocks score higher than the signal block, which is block 0.
static int whole_keys_trial(int T, int D, int S, int m, double dmu, double gap, uint64_t trial) {
    double query[64], key[64], centroid[64], signal = 0;
    int above = 0;
    uint64_t stream = random_stream("test of whole keys") + trial, at = 0;
    double square = 0;
    for (int d = 0; d < D; d++) query[d] = random_normal(1, stream, at++);
    for (int d = 0; d < D; d++) square += query[d] * query[d];
    for (int d = 0; d < D; d++) query[d] /= sqrt(square);
    for (int j = 0; j < T / S; j++) {
        memset(centroid, 0, sizeof(centroid));
        for (int i = 0; i < S; i++) {
            double norm = 0, along = 0;
            for (int d = 0; d < D; d++) key[d] = random_normal(1, stream, at++);
            for (int d = 0; d < D; d++) along += key[d] * query[d];
            const int related = j == 0 && i < m;
            if (related) // replaces the component along the query, and keeps the random rest
                for (int d = 0; d < D; d++) key[d] -= along * query[d];
            for (int d = 0; d < D; d++) norm += key[d] * key[d];
            const double similarity = i == 0 ? dmu : gap;
            for (int d = 0; d < D; d++) {
                key[d] /= sqrt(norm);
                if (related) key[d] = similarity * query[d] + sqrt(1 - similarity * similarity) * key[d];
                centroid[d] += key[d] / S;
            }
        }
        double score = 0;
        for (int d = 0; d < D; d++) score += query[d] * centroid[d];
        if (j == 0) signal = score;
        else above += score > signal;
    }
    return above;
}

static void whole_keys_give_the_same(void** state) {
    (void)state;
    enum { T = 512, D = 16, S = 32, K = 4, M = 2, TRIALS = 4000 };
    Settings settings = settings_default();
    settings.T = T, settings.D = D, settings.trials = 20000;
    settings.blockings[0].S = S, settings.blockings[0].K = K, settings.blocking_count = 1;
    settings.related[0] = M, settings.related_count = 1;
    static Cell cells[MOST_BLOCKINGS * MOST_BLOCKINGS];
    assert_int_equal(measure_table(cells, &settings), 1);
    const int others = T / S - 1;
    long lost = 0, found = 0;
#pragma omp parallel for reduction(+ : lost, found)
    for (int trial = 0; trial < TRIALS; trial++) {
        int above = whole_keys_trial(T, D, S, M, settings.dmu, settings.gap, (uint64_t)trial);
        lost += above;
        found += above < K;
    }
    print_message("recall %.4f, with whole keys %.4f\n", cells[0].recall, (double)found / TRIALS);
    assert_close("failure", (double)lost / TRIALS / others, cells[0].failure, 0.015);
    assert_close("recall", (double)found / TRIALS, cells[0].recall, 0.025);
}

// ----------------------------------------------------------------------------
// Queries and keys

// Ten keys in five blocks.
static void a_row_by_hand(void** state) {
    (void)state;
    const double attention[] = {.01, .02, .3, .1, .02, .03, .2, .05, .1, .17};
    const double product[] = {1, 1, 2, 6, 5, 7, 3, 0, 4, 4};
    const Row row = {attention, product, 2.0, 3.0, 9};
    const Blocking blocking = {
        2, 3}; // blocks 0..3 are past and complete, as t = 9 gives floor(9/2) = 4; block 4 is current
    double scratch[32];
    Head head;
    memset(&head, 0, sizeof(head));
    measure_row(&head, &row, blocking, 8, scratch);
    // The scores are 1, 4, 6, 1.5: blocks 2 and 1 are chosen. Attention is .03, .4,
    // .05, .25: blocks 1 and 3 hold most.
    assert_close("current", head.mass_current, .27, 1e-12);
    assert_close("captured", head.mass, .27 + .45, 1e-12);
    assert_close("best", head.mass_best, .27 + .65, 1e-12);
    assert_close("chance", head.mass_chance, .27 + .73 / 2, 1e-12);
    assert_close("recall", head.recall, .5, 1e-12);
    assert_close("recall by chance", head.recall_chance, .5, 1e-12);
    assert_close("top", head.top, 1, 0);
    // The lead of block 1 over blocks 0, 2 and 3, divided by the query's norm, is 1.5, -1 and 1.25.
    assert_close("pairs", head.pairs, 3, 0);
    assert_close("lost", head.lost, 1, 0);
    assert_close("difference", head.difference, 1.75, 1e-12);
    assert_close("its square", head.difference_squared, 2.25 + 1 + 1.5625, 1e-12);
    assert_close("isotropic", head.isotropic, 2 * (1.75 / 3) / 3 * sqrt(8 / 4.0), 1e-12);
}

static void ties_go_to_the_later_block(void** state) {
    (void)state;
    const double values[] = {1, 2, 2, 2, 0};
    char marks[5];
    mark_greatest(marks, values, 5, 2);
    assert_memory_equal(marks, "\0\0\1\1\0", 5);
    mark_greatest(marks, values, 5, 9);
    assert_memory_equal(marks, "\1\1\1\1\1", 5);
}

// Random queries and keys of two KV heads. Queries of head 0 have no relation to the keys, so the router does
// no better than chance. All queries of head 1 match the keys of one block, and the router finds it.
static void heads_of_known_kinds(void** state) {
    (void)state;
    enum { T = 256, H = 2, G = 2, D = 16, WIDTH = (H + 2 * G) * D };
    ModelConfig config = model_config_from_descriptor("d1");
    config.heads = H, config.kv_heads = G, config.head_dim = D;
    Settings settings = settings_default();
    settings.T = T, settings.rows = 64, settings.blocking_count = 1;
    settings.blockings[0].S = 16, settings.blockings[0].K = 3;
    floatX* qkv = (floatX*)malloc_or_fail((size_t)T * WIDTH * sizeof(floatX), "queries and keys");
    for (int i = 0; i < T * WIDTH; i++) qkv[i] = (floatX)random_normal(3, 1, (uint64_t)i);
    for (int t = 16; t < 32;
         t++) // block 1 of KV head 1: keys in the direction that all queries of head 1 share
        for (int d = 0; d < D; d++) qkv[(size_t)t * WIDTH + (H + 1) * D + d] = d == 0 ? 8 : 0;
    for (int t = 0; t < T; t++) qkv[(size_t)t * WIDTH + D] = 6;
    Head heads[2];
    memset(heads, 0, sizeof(heads));
    for (int h = 0; h < H; h++) measure_head(&heads[h], &settings, &config, qkv, h, h, 5);
    free(qkv);
    for (int h = 0; h < H; h++) {
        assert_close("rows", heads[h].rows, 64, 0);
        assert_true(heads[h].mass_best >= heads[h].mass && heads[h].mass >= heads[h].mass_current);
    }
    assert_true(heads[0].mass < 0.8 * heads[0].rows);
    assert_true(head_snr(&heads[0]) < 1.5);
    assert_close("mass", heads[1].mass / 64, 1, 0.01);
    assert_close("top", heads[1].top / 64, 1, 0);
    assert_close("lost", heads[1].lost, 0, 0);
    assert_true(head_snr(&heads[1]) > 3);
}

// ----------------------------------------------------------------------------
// Whole runs

static double number_of(const cJSON* object, const char* key) {
    double value = NAN;
    if (!json_get_double(json_get(object, key), &value)) fail_msg("no number %s", key);
    return value;
}

static void the_table_as_json(void** state) {
    (void)state;
    Settings settings = settings_default();
    char path[] = "/tmp/test_snr_XXXXXX";
    close(mkstemp(path));
    settings.trials = 20;
    settings.json = path;
    static Cell cells[MOST_BLOCKINGS * MOST_BLOCKINGS];
    int count = measure_table(cells, &settings);
    print_table(cells, count, &settings);
    write_table(cells, count, &settings);
    cJSON* json = json_read_object(path);
    const cJSON* list = json_get(json, "cells");
    assert_int_equal(cJSON_GetArraySize(list), 12);
    for (int c = 0; c < 12; c++) {
        const cJSON* item = cJSON_GetArrayItem(list, c);
        assert_true(number_of(item, "recall") == cells[c].recall);
        assert_true(number_of(item, "predicted_recall") == cells[c].predicted_recall);
    }
    cJSON_Delete(json);
    unlink(path);
}

static void a_checkpoint_from_end_to_end(void** state) {
    (void)state;
    char data[] = "/tmp/test_snr_data_XXXXXX", path[] = "/tmp/test_snr_json_XXXXXX";
    int file = mkstemp(data);
    int32_t header[256] = {20240520, 1, 200, 101, 0};
    uint16_t tokens[200];
    for (int i = 0; i < 200; i++) tokens[i] = (uint16_t)(101 * random_uniform(1, 1, (uint64_t)i));
    assert_int_equal(write(file, header, sizeof(header)), sizeof(header));
    assert_int_equal(write(file, tokens, sizeof(tokens)), sizeof(tokens));
    close(file);
    close(mkstemp(path));
    Settings settings = settings_default();
    settings.checkpoint = "test/fixtures/checkpoint/tied";
    settings.data = data;
    settings.json = path;
    run_checkpoint(&settings, 0, 0); // T 64: blocks of 4 and of 2
    cJSON* json = json_read_object(path);
    const cJSON* blockings = json_get(json, "blockings");
    assert_int_equal(cJSON_GetArraySize(blockings), 2);
    for (int b = 0; b < 2; b++) {
        const cJSON* item = cJSON_GetArrayItem(blockings, b);
        assert_int_equal(cJSON_GetArraySize(json_get(item, "heads")), 8);
        const cJSON* all = json_get(item, "all");
        double router = number_of(all, "mass"), best = number_of(all, "mass_best"),
               failure = number_of(all, "failure");
        assert_true(router > 0 && router <= best && best <= 1);
        assert_true(failure >= 0 && failure < 0.5);
    }
    cJSON_Delete(json);
    unlink(data);
    unlink(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(predictions_by_hand),
        cmocka_unit_test(the_table_is_reproduced),
        cmocka_unit_test(threads_do_not_matter_and_seeds_do),
        cmocka_unit_test(whole_keys_give_the_same),
        cmocka_unit_test(a_row_by_hand),
        cmocka_unit_test(ties_go_to_the_later_block),
        cmocka_unit_test(heads_of_known_kinds),
        cmocka_unit_test(the_table_as_json),
        cmocka_unit_test(a_checkpoint_from_end_to_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
