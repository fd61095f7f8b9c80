/*
One output file of a command, written whole or not at all.

    OutputFile output;
    output_file_open(&output, "data/tokenizer.json");   // NULL: standard output. The name must outlive the output
    output_file_write(&output, text, bytes);
    output_file_close(&output);                         // now it has its name

The file is opened before the work begins, so that a place that cannot be written is known at once. Directories above it are
made. It uses the program's one scratch path. A pipe or a device is written as it is, since renaming would replace it.
*/
#ifndef TOKENIZER_OUTPUT_H
#define TOKENIZER_OUTPUT_H

#include "runtime/checks.h" // scratch_path_begin, make_parent_or_fail, open_or_fail

#include <signal.h>

// A standard file that the caller has closed stays unusable. Otherwise the next file to be opened would get its number, and
// output or messages would go into that file.
static inline void standard_files_reserve(void) {
    for (int number = 0; number <= 2; number++)
        if (fcntl(number, F_GETFD) < 0 && errno == EBADF)
            (void)open("/dev/null", number == 0 ? O_WRONLY : O_RDONLY);
}

typedef struct {
    FILE* file;
    const char* name;    // as the user gave it; for messages
    char path[PATH_MAX]; // links resolved
    int has_scratch;     // it is written under another name and renamed
} OutputFile;

static inline void output_file_open(OutputFile* output, const char* path) {
    output->file = stdout;
    output->has_scratch = 0;
    output->name = path ? path : "standard output";
    path_format(output->path, "%s", output->name);
    if (!path) return;
    char partial[PATH_MAX], resolved[PATH_MAX];
    struct stat info;
    const int exists = stat(path, &info) == 0;
    if (!*path || path[strlen(path) - 1] == '/') fail("--output %s: must name a file", path);
    if (exists && S_ISDIR(info.st_mode)) fail("%s: is a directory, not a file", path);
    if (exists && !S_ISREG(info.st_mode)) {
        output->file = open_or_fail(path, "wb");
        return;
    }
    // The rename must replace the file that a link points at, not the link.
    if (exists && realpath(path, resolved)) path_format(output->path, "%s", resolved);
    make_parent_or_fail(output->path);
    path_format(partial, "%s.%d.partial", output->path, (int)getpid());
    scratch_path_begin(partial);
    output->has_scratch = 1;
    output->file = scratch_open_or_fail(partial);
}

// A reader that has left early, as `head` does, is no error of this program: it ends without a line.
__attribute__((noreturn)) static inline void output_file_fail(const OutputFile* output, int reason) {
    if (reason == EPIPE) exit(128 + SIGPIPE);
    fail("%s: cannot write: %s", output->name, strerror(reason));
}

static inline void output_file_write(OutputFile* output, const void* data, size_t bytes) {
    if (bytes && fwrite(data, 1, bytes, output->file) != bytes) output_file_fail(output, errno);
}

static inline void output_file_close(OutputFile* output) {
    if (output->has_scratch) {
        close_written_or_fail(output->file, output->name);
        scratch_path_commit(output->path);
        return;
    }
    if (fflush(output->file) != 0) output_file_fail(output, errno);
    if (output->file != stdout && fclose(output->file) != 0) output_file_fail(output, errno);
}

#endif
