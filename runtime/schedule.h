/*
Learning-rate schedules: the learning rate of each optimizer step.

    Schedule schedule = {SCHEDULE_COSINE, 3e-4, 100, 2000, 0.1, 0.2};
    double lr = learning_rate(&schedule, step);                      // step = 0 .. steps-1

Every schedule rises linearly over the first `warmup` steps: lr(step) = max_lr (step+1) / warmup. Then, with
x = (step - warmup) / (steps - warmup) and min_lr = final_fraction max_lr, it is

    cosine     min_lr + (max_lr - min_lr) (1 + cos(pi x)) / 2
    linear     max_lr - (max_lr - min_lr) x
    constant   max_lr
    wsd        (warm-up, stable, decay) max_lr; then, over the last decay_fraction of all steps, with y from
               0 to 1 over them, min_lr + (max_lr - min_lr) (1 - sqrt(y))

The formulas are llm.c's, so that runs can be compared. min_lr itself would be the rate of step `steps`, which
no run takes.

Cosine: Loshchilov, Hutter, "SGDR", 2016. wsd: Hu et al., "MiniCPM", 2024; the 1 - sqrt form: Hagele et al.,
"Scaling laws and compute-optimal training beyond fixed training durations", 2024.
*/
#ifndef RUNTIME_SCHEDULE_H
#define RUNTIME_SCHEDULE_H

#include <math.h>

// defines fail_usage
#include "runtime/checks.h"

#define SCHEDULE_NAMES "cosine, linear, constant, wsd"
#define SCHEDULE_DECAY_FRACTION 0.2

typedef enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD } ScheduleKind;

typedef struct {
    ScheduleKind kind;
    double max_lr;
    int warmup;            // steps; 0: none
    int steps;             // of the whole run, including the warm-up
    double final_fraction; // min_lr / max_lr; no effect with constant
    double decay_fraction; // wsd: the part of all steps that decays, SCHEDULE_DECAY_FRACTION by default
} Schedule;

static const char* const schedule_names[] = {"cosine", "linear", "constant", "wsd", NULL};

// The first step of wsd's decay. As in llm.c, the number of steps before it is rounded down.
static inline int schedule_decay_start(const Schedule* schedule) {
    int start = (int)floor((1.0 - schedule->decay_fraction) * schedule->steps + 1e-9);
    return start > schedule->warmup ? start : schedule->warmup;
}

// The rate of a step, counted from 0. From step `steps` on it is the final rate.
static inline double learning_rate(const Schedule* schedule, int step) {
    double max_lr = schedule->max_lr, min_lr = schedule->final_fraction * max_lr;
    if (step < schedule->warmup) return max_lr * (step + 1) / schedule->warmup;
    if (schedule->kind == SCHEDULE_CONSTANT) return max_lr;

    int start = schedule->kind == SCHEDULE_WSD ? schedule_decay_start(schedule) : schedule->warmup;
    if (step < start) return max_lr;
    if (step >= schedule->steps) return min_lr;
    double progress = (double)(step - start) / (schedule->steps - start);
    double left = schedule->kind == SCHEDULE_COSINE   ? 0.5 * (1.0 + cos(3.14159265358979323846 * progress))
                  : schedule->kind == SCHEDULE_LINEAR ? 1.0 - progress
                                                      : 1.0 - sqrt(progress);
    return min_lr + (max_lr - min_lr) * left;
}

#endif
