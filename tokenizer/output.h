/*
One output file of a command, written completely or not at all.

    OutputFile output;
    output_file_open(&output, "data/tokenizer.json");   // NULL: standard output; keeps the pointer
    output_file_write(&output, text, bytes);
    output_file_close(&output);                         // now the file has its name

Open the file before the work, so that an error of the path shows at once. Directories above it are made. The
file is written under the program's scratch path and renamed at the end. A pipe or a device is written
directly, since a rename would replace it.
*/
#ifndef TOKENIZER_OUTPUT_H
#define TOKENIZER_OUTPUT_H

#include "runtime/checks.h" // replacement_begin, make_parent_or_fail, open_or_fail

#include <signal.h>

// Opens /dev/null, in the wrong direction, in the place of a closed standard file, which so stays unusable.
// Otherwise the next opened file would get its number, and output or messages would go into that file.
static inline void standard_files_reserve(void) {
    for (int number = 0; number <= 2; number++)
        if (fcntl(number, F_GETFD) < 0 && errno == EBADF)
            (void)open("/dev/null", number == 0 ? O_WRONLY : O_RDONLY);
}

typedef struct {
    FILE* file;
    const char* name;    // as the user gave it, for messages
    char path[PATH_MAX]; // with links resolved
    int has_scratch;     // 1: it is written under another name and then renamed
} OutputFile;

static inline void output_file_open(OutputFile* output, const char* path) {
    output->file = stdout;
    output->has_scratch = 0;
    output->name = path ? path : "standard output";
    path_format(output->path, "%s", output->name);
    if (!path) return;
    char partial[PATH_MAX];
    struct stat info;
    const int exists = stat(path, &info) == 0;
    if (!*path || path[strlen(path) - 1] == '/') fail("--output %s: must name a file", path);
    if (exists && S_ISDIR(info.st_mode)) fail("%s: is a directory, not a file", path);
    // /dev/stdout, or the file that standard output goes to: a rename would take it from those who append to it.
    struct stat standard;
    if (exists && fstat(STDOUT_FILENO, &standard) == 0 && standard.st_dev == info.st_dev &&
        standard.st_ino == info.st_ino)
        return;
    if (exists && !S_ISREG(info.st_mode)) {
        output->file = open_or_fail(path, "wb");
        return;
    }
    make_parent_or_fail(path);
    replacement_begin(output->path, partial, path);
    output->has_scratch = 1;
    output->file = scratch_open_or_fail(partial);
}

// Fails after an error of a write. If the reader of a pipe ended early, as `head`
// does, the program ends without a message.
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
