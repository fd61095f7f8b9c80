/*
Tests dev/scaling.c: compares collectives and steps with seconds calculated by hand, and published figures
with the errors in docs/results/scaling.md; and checks that this document is what the program writes today.
*/
#define SCALING_NO_MAIN
#include "dev/scaling.c" // NOLINT(bugprone-suspicious-include): the program without its main

// last, as it has a macro `fail` of its own
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

static void assert_close(const char* what, double a, double b, double tolerance) {
    if (!(fabs(a - b) <= tolerance)) fail_msg("%s: %.9g is not %.9g within %g", what, a, b, tolerance);
}

// ----------------------------------------------------------------------------
// Collectives

static void collectives_by_hand(void** state) {
    (void)state;
    assert_close("one GPU", ring_seconds(&h100, 1, 1e9), 0, 0);
    assert_close("one GPU", tree_seconds(&h100, 1, 1e9), 0, 0);
    // 7 steps within the node; 7/8 of 8 GB at 370 GB/s. Simple, whose bandwidth is larger.
    assert_close("a node", ring_seconds(&h100, 8, 8e9), 8.4e-6 + 7 * 3.4e-6 + 7.0 / 370, 1e-9);
    // 14 steps within nodes, one between; the narrower of 370 and 376.
    assert_close("two nodes", ring_seconds(&h100, 16, 8e9), 8.4e-6 + 14 * 3.4e-6 + 9.6e-6 + 7.5 / 370, 1e-9);
    Cluster narrow = h100;
    narrow.network = 100;
    assert_close("network", ring_seconds(&narrow, 16, 8e9), 8.4e-6 + 14 * 3.4e-6 + 9.6e-6 + 7.5 / 100, 1e-9);
    assert_close("no network", ring_seconds(&narrow, 8, 8e9), ring_seconds(&h100, 8, 8e9), 0);
    // What is short goes by LL128.
    assert_close("short", ring_seconds(&h100, 16, 16), 10e-6 + 14 * 1.9e-6 + 4e-6 + 15 / (0.92 * 370e9),
                 1e-12);
    // Four nodes: log2(4) steps between them, 7 within, up and down.
    assert_close("tree", tree_seconds(&h100, 32, 32e9),
                 4.4e-6 + 14 * 1.2e-6 + 4 * 8.5e-6 + 2 * 31 / (0.9 * 0.915 * 370), 1e-9);
    // What is short goes by a tree, what is long by a ring.
    assert_close("short sum", all_reduce_seconds(&h100, 1024, 56), tree_seconds(&h100, 1024, 56), 0);
    assert_close("long sum", all_reduce_seconds(&h100, 16, 8e9), 2 * ring_seconds(&h100, 16, 8e9), 0);
    // A node that is not full counts.
    assert_int_equal(nodes_of(&h100, 8), 1);
    assert_int_equal(nodes_of(&h100, 9), 2);
    assert_int_equal(nodes_of(&h100, 1024), 128);
}

// ----------------------------------------------------------------------------
// Steps

// Two buckets of 0.1 and 0.2 seconds of backward, and an update of 0.03.
static Work two_buckets(void) {
    Work work;
    memset(&work, 0, sizeof(work));
    work.buckets = 2;
    work.elements[0] = 1e9;
    work.elements[1] = 2e9;
    work.forward[0] = 0.05;
    work.forward[1] = 0.1;
    work.backward[0] = 0.1;
    work.backward[1] = 0.2;
    work.update = 0.03;
    work.micro_batches = 1;
    work.gradient_bytes = 4;
    work.parameter_bytes = 2;
    return work;
}

static void computing_beside_a_collective_is_slower(void** state) {
    (void)state;
    const double slow = 1 - contention;
    assert_close("no collective", compute_until(1, 2, 0.5), 3, 0);
    assert_close("one all along", compute_until(1, 2, 10), 1 + 2 / slow, 1e-12);
    assert_close("one that ends", compute_until(1, 2, 2), 2 + (2 - slow), 1e-12);
    assert_close("one that ends as it does", compute_until(0, slow, 1), 1, 1e-12);
}

static void steps_by_hand(void** state) {
    (void)state;
    const Work work = two_buckets();
    const double norm = tree_seconds(&h100, 8, 8), alone = 0.45 + 0.03;
    for (int s = ZERO_0; s <= ZERO_1; s++)
        assert_close("one GPU", step_seconds(&work, &h100, 1, (Sharding)s), alone, 1e-12);
    // Bucket 1 (8 GB) is ready at 0.35; while it goes round, bucket 0 computes; then that one (4 GB) follows.
    const double scatter1 = ring_seconds(&h100, 8, 8e9), scatter0 = ring_seconds(&h100, 8, 4e9);
    double computed = compute_until(0.35, 0.1, 0.35 + scatter1);
    // Of the update bucket 0 is first, a third of it; its parameters (2 GB) go round while bucket 1 is updated.
    const double first = computed + scatter0 + norm + 0.01 / 8, gather0 = ring_seconds(&h100, 8, 2e9);
    assert_close("ZeRO-1", step_seconds(&work, &h100, 8, ZERO_1),
                 first + gather0 + ring_seconds(&h100, 8, 4e9), 1e-12);
    computed = compute_until(0.35, 0.1, 0.35 + 2 * scatter1);
    assert_close("ZeRO-0", step_seconds(&work, &h100, 8, ZERO_0), computed + 2 * scatter0 + norm + 0.03,
                 1e-12);
    // A network so slow that it is all that counts: the second bucket waits for the first.
    Cluster slow = h100;
    slow.network = 1;
    const double queue = 2 * (ring_seconds(&slow, 16, 8e9) + ring_seconds(&slow, 16, 4e9));
    assert_close("queue", step_seconds(&work, &slow, 16, ZERO_0),
                 0.35 + queue + tree_seconds(&slow, 16, 8) + 0.03, 1e-12);
    // Only the last of three micro-batches sends.
    Work three = work;
    three.micro_batches = 3;
    assert_close("micro-batches",
                 step_seconds(&three, &h100, 8, ZERO_1) - step_seconds(&work, &h100, 8, ZERO_1), 0.9, 1e-12);
}

static void sharded_parameters_by_hand(void** state) {
    (void)state;
    Work work = two_buckets();
    Cluster slow = h100;
    slow.network = 1;
    // Computing is nothing beside sending, but for the last bucket's forward, which nothing is sent beside.
    const double gather0 = ring_seconds(&slow, 16, 2e9), gather1 = ring_seconds(&slow, 16, 4e9);
    const double scatter0 = ring_seconds(&slow, 16, 4e9), scatter1 = ring_seconds(&slow, 16, 8e9);
    const double rest = tree_seconds(&slow, 16, 8) + 0.03 / 16;
    const double forward = gather0 + gather1 + 0.1;
    assert_close("all", step_seconds(&work, &slow, 16, FULL_SHARD),
                 forward + gather1 + gather0 + scatter1 + scatter0 + rest, 1e-9);
}

static void more_gpus_are_never_more_efficient(void** state) {
    (void)state;
    const Settings settings = settings_default();
    const Work work = work_of_settings(&settings);
    assert_true(all_elements(&work) > 123e6 && all_elements(&work) < 125e6);
    for (int s = ZERO_0; s <= ZERO_1; s++)
        for (int gpus = 8; gpus < 1024; gpus *= 2)
            assert_true(step_seconds(&work, &h100, 2 * gpus, (Sharding)s) >=
                        step_seconds(&work, &h100, gpus, (Sharding)s));
}

static void a_total_batch_is_shared(void** state) {
    (void)state;
    Settings settings = settings_default();
    const Work whole = work_of_settings(&settings);
    Work own;
    settings.total_batch = 2048L * 1024; // 2048 sequences, 32 of a micro-batch
    assert_true(share_of_total(&own, &settings, &whole, 1));
    assert_int_equal(own.micro_batches, 64);
    assert_true(share_of_total(&own, &settings, &whole, 64));
    assert_int_equal(own.micro_batches, 1);
    assert_close("whole", own.forward[1], whole.forward[1], 0);
    assert_true(share_of_total(&own, &settings, &whole, 256));
    assert_int_equal(own.micro_batches, 1);
    assert_close("a quarter", own.forward[1], whole.forward[1] / 4, 1e-15);
    assert_false(share_of_total(&own, &settings, &whole, 48));
    assert_false(share_of_total(&own, &settings, &whole, 4096));
    settings.batch = 48; // 64 sequences are not whole micro-batches
    assert_false(share_of_total(&own, &settings, &whole, 32));
}

// ----------------------------------------------------------------------------
// Published figures, and the file on record

static void published_figures_are_near(void** state) {
    (void)state;
    for (int r = 0; r < RUNS; r++) {
        const Run* run = &published[r];
        const double seconds = fitted_seconds(run);
        assert_close(run->name, rate_of_run(run, run->figures[0].gpus, seconds), run->figures[0].rate,
                     1e-6 * run->figures[0].rate);
        for (int i = 1; i < run->count; i++)
            assert_close(run->name, rate_of_run(run, run->figures[i].gpus, seconds) / run->figures[i].rate, 1,
                         0.06);
    }
    for (int i = 0; i < BANDWIDTHS; i++)
        assert_close("reduce-scatter",
                     bus_bandwidth(&h100, reduce_scatter[i].gpus, 8e9) / reduce_scatter[i].rate, 1, 0.21);
    assert_close("loss", loss_per_doubling(), 0.011, 0.001);
}

static void the_report_is_what_is_written_today(void** state) {
    (void)state;
    const char* recorded_path = "docs/results/scaling.md";
    char* written = NULL;
    size_t length = 0, recorded_length = 0;
    FILE* out = open_memstream(&written, &length);
    Settings settings = settings_default();
    write_report(&settings, out);
    fclose(out);
    char* recorded = read_file_or_fail(recorded_path, &recorded_length);
    assert_string_equal(written, recorded);
    free(recorded);
    free(written);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(collectives_by_hand),
        cmocka_unit_test(computing_beside_a_collective_is_slower),
        cmocka_unit_test(steps_by_hand),
        cmocka_unit_test(sharded_parameters_by_hand),
        cmocka_unit_test(more_gpus_are_never_more_efficient),
        cmocka_unit_test(a_total_batch_is_shared),
        cmocka_unit_test(published_figures_are_near),
        cmocka_unit_test(the_report_is_what_is_written_today),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
