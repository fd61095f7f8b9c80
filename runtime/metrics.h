/*
The record of a run: three files in its output directory, and lines on the terminal.

    MetricsOptions options = {0};  options.directory = "out";  options.total_steps = 2000;  ...
    metrics_describe_text(&options, "model", "d12");  metrics_start(&metrics, &options);
    metrics_step(&metrics, step + 1, loss, grad_norm, lr, seconds, attention_seconds);  ...
    metrics_finish(&metrics);

metrics.jsonl   {"event":"start", ...}, the run's description; a line for each step (step, tokens, loss,
                grad_norm, lr); a line for each validation (step, tokens, val_loss); lines of the variant
                (step, tokens, a member of its own). It depends on the flags alone: two runs with the same
                flags write the same bytes, resumed or not. A number reads back exactly; NaN is null.
timings.jsonl   a line for each step (step, tokens, seconds, tokens_per_second, step_ms, attention_ms; if
                known, flops_per_second and mfu); a line for each event (validation, checkpoint, changes of a
                resume). "seconds" counts from the start of the run and continues over resumes.
main.log        llm.c's log, for its plotting tools: "s:0 tel:..." for validation, "s:0 trl:..." for training

Training step s = 1 .. total_steps is the s-th optimizer step (main.log counts from 0, as llm.c does). A
validation at step s follows s optimizer steps; s = 0 is the fresh model. A run resumed at step k rewrites the
files without the lines of later steps and without a last line that is cut. It keeps k's validation, unless a
signal interrupted the measurements at k. A resume with a different description adds {"event":"resume", ...}.

On a terminal one live line is redrawn and messages scroll above it; elsewhere a plain line is printed every
log_every steps. A file that cannot be written ends the run with one line and exit code 1.
*/
#ifndef RUNTIME_METRICS_H
#define RUNTIME_METRICS_H

#include <math.h>
#include <sys/ioctl.h>
#include <time.h>

// defines fail, open_or_fail, path_format, scratch_path_begin and _commit
#include "runtime/checks.h"
// defines floatX
#include "runtime/precision.h"

#define METRICS_DESCRIPTION_BYTES 8192
#define METRICS_NUMBER_BYTES 32
#define METRICS_REDRAW_SECONDS 0.05

// ----------------------------------------------------------------------------
// Types

// All members zero: no files, and a line every step.
typedef struct {
    const char* directory;    // of the files; NULL: no files
    int resume_step;          // steps done before; 0: a new run, whose files begin empty
    int unmeasured;           // 1: the measurements at resume_step are repeated, and their old lines dropped
    int total_steps;          // of the whole run
    int log_every;            // steps between two plain lines if the display is no terminal; 0 is 1
    uint64_t tokens_per_step; // of all ranks
    uint64_t tokens_before;   // of the resume_step steps before, which may have had another total batch
    double flops_per_step;    // floating-point operations of a step, forward and backward; 0: not known
    double peak_flops;        // per second, of all ranks' devices; 0: not known, and MFU is left out
    int quiet;                // 1: nothing on the terminal
    FILE* terminal;           // NULL: stdout
    char description[METRICS_DESCRIPTION_BYTES]; // JSON members, by metrics_describe_text() and _number()
} MetricsOptions;

typedef struct {
    FILE* file; // NULL: no file
    char path[PATH_MAX];
} MetricsFile;

typedef struct {
    MetricsOptions options;
    MetricsFile metrics, timings, log;
    int last_validation; // the step of the last validation in the files, -1: none

    double clock_start;    // of this process's part of the run
    double seconds_before; // of the earlier parts of the run
    // For the display:
    int steps_here;         // steps of this process
    double first_step_done; // the clock at the end of this process's first step
    double smooth_seconds;  // of a step, averaged over about the last 20, without the first (warm-up) step
    int live;               // 1: the display is a terminal
    double redrawn;         // the clock at the last redraw
    char line[256];         // the live line
} Metrics;

// ----------------------------------------------------------------------------
// JSON

// Writes the shortest decimal that reads back as the same number: as a float if x is a float (except in the
// fp64 build), else as a double. JSON has no infinity; readers take 1e999 for it.
static inline void metrics_number(char* out, double x) {
    int is_float = sizeof(floatX) < sizeof(double) && (double)(float)x == x;
    if (isnan(x)) {
        snprintf(out, METRICS_NUMBER_BYTES, "null");
    } else if (isinf(x)) {
        snprintf(out, METRICS_NUMBER_BYTES, "%s", x > 0 ? "1e999" : "-1e999");
    } else {
        for (int digits = 1; digits <= 17; digits++) {
            snprintf(out, METRICS_NUMBER_BYTES, "%.*g", digits, x);
            if (is_float ? strtof(out, NULL) == (float)x : strtod(out, NULL) == x) break;
        }
    }
}

// Writes `text` as a JSON string with its quotes. Returns the length. `out` needs
// 6 bytes for each byte of text, and 3.
static inline size_t metrics_quote(char* out, const char* text) {
    char* place = out;
    *place++ = '"';
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < 0x20) {
            place += sprintf(place, "\\u%04x", c);
            continue;
        }
        if (c == '"' || c == '\\') *place++ = '\\';
        *place++ = (char)c;
    }
    *place++ = '"';
    *place = 0;
    return (size_t)(place - out);
}

static inline char* metrics_describe_key(MetricsOptions* options, const char* key, size_t value_bytes) {
    size_t used = strlen(options->description);
    if (used + 6 * strlen(key) + value_bytes + 8 > METRICS_DESCRIPTION_BYTES)
        fail("the run's description is longer than %d bytes at \"%s\"", METRICS_DESCRIPTION_BYTES, key);
    char* place = options->description + used;
    if (used) *place++ = ',';
    place += metrics_quote(place, key);
    *place++ = ':';
    return place;
}

// Appends to the run's description. Do not add values that depend on the machine or the time (time, host,
// number of threads), or the option to resume: they would differ between runs with the same flags.
static inline void metrics_describe_text(MetricsOptions* options, const char* key, const char* value) {
    char* place = metrics_describe_key(options, key, 6 * strlen(value) + 3);
    metrics_quote(place, value);
}

static inline void metrics_describe_number(MetricsOptions* options, const char* key, double value) {
    char* place = metrics_describe_key(options, key, METRICS_NUMBER_BYTES);
    if (value == floor(value) && fabs(value) < 9e15) {
        snprintf(place, METRICS_NUMBER_BYTES, "%.0f", value);
    } else {
        metrics_number(place, value);
    }
}

// ----------------------------------------------------------------------------
// Files

static inline double metrics_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Seconds since the start of the run, including the parts before resumes.
static inline double metrics_seconds(const Metrics* m) {
    return m->seconds_before + (metrics_clock() - m->clock_start);
}

// Writes one whole line and flushes it, so that another program that reads the file sees no partial line.
__attribute__((format(printf, 2, 3))) static inline void metrics_write(MetricsFile* out, const char* format,
                                                                       ...) {
    if (!out->file) return;
    va_list arguments;
    va_start(arguments, format);
    int written = vfprintf(out->file, format, arguments);
    va_end(arguments);
    if (written < 0 || fflush(out->file) != 0) fail("%s: cannot write: %s", out->path, strerror(errno));
}

// Whether this line of the resumed step is the training step's own line, not
// that of a measurement after the step.
static inline int metrics_line_of_step(const char* line) {
    return strstr(line, "\"loss\":") || strstr(line, "\"step_ms\":");
}

// Whether to keep this line (without its newline): it must belong to the first `step` steps. Lines of another
// form are dropped. If `unmeasured`, the measurements after the last of these steps are dropped as well.
static inline int metrics_line_kept(const char* line, int step, int unmeasured) {
    size_t length = strlen(line);
    char event[32], kind[4];
    int at, end = 0;
    if (line[0] == '{') {
        if (line[length - 1] != '}') return 0;
        if (!strncmp(line, "{\"event\":\"start\"", 16)) return 1;
        if (sscanf(line, "{\"step\":%d,", &at) == 1)
            return at < step || (at == step && (!unmeasured || metrics_line_of_step(line)));
        return sscanf(line, "{\"event\":\"%31[^\"]\",\"step\":%d%n", event, &at, &end) == 2 && at <= step;
    }
    if (sscanf(line, "s:%d %3[a-z]:%n", &at, kind, &end) != 2 || end == 0) return 0;
    return at < step || (at == step && !unmeasured && strcmp(kind, "trl") != 0);
}

// Takes from a kept line what the resumed run needs: last_validation, seconds_before, and `description`,
// which becomes that of the last start or resume.
static inline void metrics_remember(Metrics* m, const char* line, char* description) {
    int at, end = 0;
    if (sscanf(line, "{\"step\":%d,", &at) == 1 && strstr(line, "\"val_loss\":")) m->last_validation = at;
    (void)sscanf(line, "{\"event\":\"start\"%n", &end);
    if (!end) (void)sscanf(line, "{\"event\":\"resume\",\"step\":%d%n", &at, &end);
    if (end && strlen(line + end) < METRICS_DESCRIPTION_BYTES + 2) strcpy(description, line + end);
    const char* seconds = strstr(line, "\"seconds\":");
    if (seconds) m->seconds_before = strtod(seconds + 10, NULL);
}

// Rewrites one file without the lines after the resumed step. A missing file stays missing. After a power cut,
// zeros may stand in the place of lines; they end a line, so that the lines after them count.
static inline void metrics_cut_file(Metrics* m, const char* path, char* description) {
    if (!path_exists(path)) return;
    char partial[PATH_MAX];
    path_format(partial, "%s.partial", path);
    size_t length;
    char* text = read_file_or_fail(path, &length);
    for (char* zero = text; (zero = (char*)memchr(zero, 0, length - (size_t)(zero - text))) != NULL;)
        *zero = '\n';
    scratch_path_begin(partial);
    FILE* file = open_or_fail(partial, "wb");
    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = 0;
        if (!metrics_line_kept(line, m->options.resume_step, m->options.unmeasured)) continue;
        metrics_remember(m, line, description);
        *end = '\n';
        write_or_fail(line, (size_t)(end - line) + 1, file, partial);
    }
    close_written_or_fail(file, partial);
    scratch_path_commit(path);
    free(text);
}

// Opens one of the files to append to it. `description` as in metrics_cut_file().
static inline void metrics_open(Metrics* m, MetricsFile* out, const char* name, char* description) {
    const char* directory = m->options.directory;
    if (!directory) return;
    path_format(out->path, "%s/%s", directory, name);
    if (m->options.resume_step > 0) metrics_cut_file(m, out->path, description);
    out->file = open_or_fail(out->path, m->options.resume_step > 0 ? "ab" : "wb");
}

// Syncs the files to the disk. Call it before a checkpoint is committed, so
// that a resume finds the lines up to it.
static inline void metrics_sync(Metrics* m) {
    MetricsFile* files[] = {&m->metrics, &m->timings, &m->log};
    for (int i = 0; i < 3; i++)
        if (files[i]->file && fsync(fileno(files[i]->file)) != 0 && errno != EINVAL && errno != EROFS)
            fail("%s: cannot sync: %s", files[i]->path, strerror(errno));
}

// ----------------------------------------------------------------------------
// Terminal

static inline int metrics_terminal_width(const Metrics* m) {
    struct winsize size;
    int status = ioctl(fileno(m->options.terminal), TIOCGWINSZ, &size);
    return status == 0 && size.ws_col > 1 ? size.ws_col : 80;
}

static inline void metrics_draw(Metrics* m) {
    // The last column stays free: a terminal may wrap once it is written.
    fprintf(m->options.terminal, "\r%.*s\033[K", metrics_terminal_width(m) - 1, m->line);
    fflush(m->options.terminal);
    live_line_shown = 1;
    m->redrawn = metrics_clock();
}

// Removes the live line, so that something else can be printed in its place.
static inline void metrics_clear(Metrics* m) {
    if (live_line_shown) fprintf(m->options.terminal, "\r\033[K");
    live_line_shown = 0;
}

// Prints a line on the terminal, above the live line. Quiet runs print none.
__attribute__((format(printf, 2, 3))) static inline void metrics_message(Metrics* m, const char* format,
                                                                         ...) {
    if (m->options.quiet) return;
    int redraw = live_line_shown;
    metrics_clear(m);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(m->options.terminal, format, arguments);
    va_end(arguments);
    fputc('\n', m->options.terminal);
    if (redraw) metrics_draw(m);
    fflush(m->options.terminal);
}

// 1234567 as "1.23M".
static inline void metrics_short(char* out, double x) {
    const char* units[] = {"", "k", "M", "G", "T", "P"};
    int unit = 0;
    for (; x >= 999.5 && unit < 5; unit++) x /= 1000.0;
    snprintf(out, METRICS_NUMBER_BYTES, "%.*f%s",
             x >= 99.95 || unit == 0 ? 0
             : x >= 9.995            ? 1
                                     : 2,
             x, units[unit]);
}

// 3723 seconds as "1h02m".
static inline void metrics_duration(char* out, double seconds) {
    long long s = seconds < 1e15 ? (long long)(seconds + 0.5) : 0;
    if (s < 60) snprintf(out, METRICS_NUMBER_BYTES, "%llds", s);
    else if (s < 3600) snprintf(out, METRICS_NUMBER_BYTES, "%lldm%02llds", s / 60, s % 60);
    else if (s < 86400) snprintf(out, METRICS_NUMBER_BYTES, "%lldh%02lldm", s / 3600, s / 60 % 60);
    else snprintf(out, METRICS_NUMBER_BYTES, "%lldd%02lldh", s / 86400, s / 3600 % 24);
}

// Writes the line that shows the run's progress to m->line.
static inline void metrics_compose(Metrics* m, int step, double loss, double grad_norm, double lr) {
    const MetricsOptions* o = &m->options;
    char tokens[METRICS_NUMBER_BYTES], flops[METRICS_NUMBER_BYTES + 16] = "", eta[METRICS_NUMBER_BYTES];
    double rate = m->smooth_seconds > 0 ? 1.0 / m->smooth_seconds : 0.0;
    metrics_short(tokens, (double)o->tokens_per_step * rate);
    if (o->flops_per_step > 0 && o->peak_flops > 0)
        snprintf(flops, sizeof(flops), "  %.1f%% MFU", 100.0 * o->flops_per_step * rate / o->peak_flops);
    else if (o->flops_per_step > 0)
        snprintf(flops, sizeof(flops), "  %.1f GFLOP/s", 1e-9 * o->flops_per_step * rate);
    // Measured by the clock, so that validations and checkpoints count. The
    // first step (warm-up) does not count.
    double per_step =
        m->steps_here > 1 ? (metrics_clock() - m->first_step_done) / (m->steps_here - 1) : m->smooth_seconds;
    int left = o->total_steps > step ? o->total_steps - step : 0;
    metrics_duration(eta, per_step * left);
    snprintf(m->line, sizeof(m->line), "%s%d/%d  loss %.4f  norm %.2f  lr %.2e  %s tok/s%s  ETA %s",
             m->live ? "" : "step ", step, o->total_steps, loss, grad_norm, lr, tokens, flops, eta);
}

static inline void metrics_show(Metrics* m, int step, int shown, double loss, double grad_norm, double lr) {
    if (m->options.quiet) return;
    int draw = m->live && (shown || metrics_clock() - m->redrawn >= METRICS_REDRAW_SECONDS);
    if (!draw && (m->live || !shown)) return;
    metrics_compose(m, step, loss, grad_norm, lr);
    if (m->live) {
        metrics_draw(m);
    } else {
        fprintf(m->options.terminal, "%s\n", m->line);
        fflush(m->options.terminal);
    }
}

// ----------------------------------------------------------------------------
// The run

// Opens the files, drops the lines after the resumed step, and writes the
// description. The directory must exist.
static inline void metrics_start(Metrics* m, const MetricsOptions* options) {
    memset(m, 0, sizeof(*m));
    m->options = *options;
    if (m->options.log_every < 1) m->options.log_every = 1;
    if (!m->options.terminal) m->options.terminal = stdout;
    // mpirun gives its processes a terminal even if their output goes to a file;
    // TERM=dumb switches the live line off.
    const char* kind = getenv("TERM");
    m->live = !m->options.quiet && isatty(fileno(m->options.terminal)) && !(kind && !strcmp(kind, "dumb"));
    m->last_validation = -1;

    char before[METRICS_DESCRIPTION_BYTES + 2] = "", now[METRICS_DESCRIPTION_BYTES + 2];
    snprintf(now, sizeof(now), "%s%s}", options->description[0] ? "," : "", options->description);
    metrics_open(m, &m->metrics, "metrics.jsonl", before);
    if (!before[0]) metrics_write(&m->metrics, "{\"event\":\"start\"%s\n", now);
    else if (strcmp(before, now) != 0)
        metrics_write(&m->metrics, "{\"event\":\"resume\",\"step\":%d%s\n", options->resume_step, now);
    metrics_open(m, &m->timings, "timings.jsonl", before);
    metrics_open(m, &m->log, "main.log", before);
    m->clock_start = metrics_clock();
}

// Tokens that a run has trained on after `step` optimizer steps.
static inline unsigned long long metrics_tokens(const Metrics* m, int step) {
    const MetricsOptions* o = &m->options;
    return (unsigned long long)(o->tokens_before + o->tokens_per_step * (uint64_t)(step - o->resume_step));
}

// Records training step number `step` (1, 2, ...): its loss, gradient norm, learning rate, duration in
// seconds, and the seconds of it that attention took.
static inline void metrics_step(Metrics* m, int step, double loss, double grad_norm, double lr,
                                double seconds, double attention_seconds) {
    const MetricsOptions* o = &m->options;
    if (++m->steps_here == 1) m->first_step_done = metrics_clock();
    m->smooth_seconds = m->steps_here <= 2 ? seconds : 0.95 * m->smooth_seconds + 0.05 * seconds;
    char loss_text[METRICS_NUMBER_BYTES], norm_text[METRICS_NUMBER_BYTES], lr_text[METRICS_NUMBER_BYTES];
    metrics_number(loss_text, loss);
    metrics_number(norm_text, grad_norm);
    metrics_number(lr_text, lr);
    const unsigned long long tokens = metrics_tokens(m, step);
    metrics_write(&m->metrics, "{\"step\":%d,\"tokens\":%llu,\"loss\":%s,\"grad_norm\":%s,\"lr\":%s}\n", step,
                  tokens, loss_text, norm_text, lr_text);

    double rate = seconds > 0 ? 1.0 / seconds : 0.0;
    char speed[96] = "";
    int used = 0;
    if (o->flops_per_step > 0)
        used = snprintf(speed, sizeof(speed), ",\"flops_per_second\":%.5g", o->flops_per_step * rate);
    if (o->flops_per_step > 0 && o->peak_flops > 0)
        snprintf(speed + used, sizeof(speed) - (size_t)used, ",\"mfu\":%.4f",
                 o->flops_per_step * rate / o->peak_flops);
    metrics_write(&m->timings,
                  "{\"step\":%d,\"tokens\":%llu,\"seconds\":%.3f,\"tokens_per_second\":%.1f,"
                  "\"step_ms\":%.3f,\"attention_ms\":%.3f%s}\n",
                  step, tokens, metrics_seconds(m), (double)o->tokens_per_step * rate, 1e3 * seconds,
                  1e3 * attention_seconds, speed);
    metrics_write(&m->log, "s:%d trl:%.4f lr:%.6f norm:%.2f\n", step - 1, loss, lr, grad_norm);
    int shown = step == 1 || step == o->total_steps || step % o->log_every == 0;
    metrics_show(m, step, shown, loss, grad_norm, lr);
}

// Writes a variant's line of metrics.jsonl after `step` optimizer steps, with the member `key`: `value` (JSON
// text). The value must depend on the flags alone.
static inline void metrics_member(Metrics* m, int step, const char* key, const char* value) {
    metrics_write(&m->metrics, "{\"step\":%d,\"tokens\":%llu,\"%s\":%s}\n", step, metrics_tokens(m, step),
                  key, value);
}

// Records an event other than a step, such as "checkpoint", that took `spent` seconds; in timings.jsonl only.
// `name` is a plain word of at most 31 letters.
static inline void metrics_event(Metrics* m, const char* name, int step, double spent) {
    metrics_write(&m->timings, "{\"event\":\"%s\",\"step\":%d,\"seconds\":%.3f,\"spent\":%.3f}\n", name, step,
                  metrics_seconds(m), spent);
}

// Records the changes of a run that is resumed at `step`, in timings.jsonl and on the terminal.
static inline void metrics_changes(Metrics* m, int step, const char* changes) {
    char* text = (char*)malloc_or_fail(6 * strlen(changes) + 3, "a line of timings.jsonl");
    metrics_quote(text, changes);
    metrics_write(&m->timings, "{\"event\":\"changes\",\"step\":%d,\"seconds\":%.3f,\"changes\":%s}\n", step,
                  metrics_seconds(m), text);
    metrics_message(m, "changed since the checkpoint: %s", changes);
    free(text);
}

// Records the mean loss on the validation data after `step` optimizer steps;
// the validation took `spent` seconds.
static inline void metrics_validation(Metrics* m, int step, double val_loss, double spent) {
    if (step > m->last_validation) {
        char loss_text[METRICS_NUMBER_BYTES];
        metrics_number(loss_text, val_loss);
        metrics_write(&m->metrics, "{\"step\":%d,\"tokens\":%llu,\"val_loss\":%s}\n", step,
                      metrics_tokens(m, step), loss_text);
        metrics_write(&m->log, "s:%d tel:%.4f\n", step, val_loss);
        m->last_validation = step;
    }
    metrics_event(m, "validation", step, spent);
    metrics_message(m, "step %d/%d  validation loss %.4f  (%.1f s)", step, m->options.total_steps, val_loss,
                    spent);
}

// Closes the files and leaves the terminal at the start of a new line.
static inline void metrics_finish(Metrics* m) {
    if (live_line_shown) fputc('\n', m->options.terminal);
    if (!m->options.quiet) fflush(m->options.terminal);
    live_line_shown = 0;
    MetricsFile* files[] = {&m->metrics, &m->timings, &m->log};
    for (int i = 0; i < 3; i++) {
        if (files[i]->file) close_written_or_fail(files[i]->file, files[i]->path);
        files[i]->file = NULL;
    }
}

#endif
