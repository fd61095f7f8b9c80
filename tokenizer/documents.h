/*
Documents: the input of `tokenizer train` and `tokenizer prepare`.

    FileList files = {0};
    file_list_add(&files, "corpus");            // a file, or all files of a directory, sorted by name
    DocumentReader reader;
    document_reader_init(&reader, &files, NULL, "text", INT64_MAX);
    DocumentBatch batch = {0};
    while (document_reader_batch(&reader, 16 << 20, &batch))
        for (size_t d = 0; d < batch.count; d++) ... document_batch_text(&batch, d, &bytes) ...
    document_reader_report(&reader);            // warnings about documents that are probably wrong

A file is one document, or several between separators; a file named *.jsonl holds one document on each line,
under a key. A file that is no text ends the program if the user has named it. In a directory or a list it is
skipped, with a warning.
*/
#ifndef TOKENIZER_DOCUMENTS_H
#define TOKENIZER_DOCUMENTS_H

#include "runtime/checks.h"       // fail, warn, read_stream_or_fail
#include "tokenizer/formats.h"    // json_member, path_ends_with
#include "tokenizer/split.h"      // utf8_sequence_length
#include "tokenizer/vocabulary.h" // ByteBuffer, array_reserve

#include <fts.h>

// ----------------------------------------------------------------------------
// Text or not

// The first bytes of a file decide whether it is text.
enum { PEEK_BYTES = 1 << 16 };

// The name of a known binary format, from the first bytes of a file; NULL: none of these formats.
static inline const char* known_format(const char* data, size_t bytes) {
    static const struct {
        const char *magic, *name;
    } formats[] = {{"\x1f\x8b", "gzip data"},
                   {"\x28\xb5\x2f\xfd", "zstd data"},
                   {"\xfd"
                    "7zXZ",
                    "xz data"},
                   {"BZh", "bzip2 data"},
                   {"PK\x03\x04", "a zip archive"},
                   {"PAR1", "Parquet"},
                   {"\x89PNG", "a PNG image"},
                   {"%PDF", "PDF"},
                   {"\xff\xfe", "UTF-16, not UTF-8"},
                   {"\xfe\xff", "UTF-16, not UTF-8"}};
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        size_t length = strlen(formats[i].magic);
        if (bytes >= length && !memcmp(data, formats[i].magic, length)) return formats[i].name;
    }
    return NULL;
}

// The reason why the bytes at the start of a file are no text, or NULL: a byte 0, or more than 30% of bytes
// that are not UTF-8 or are unusual control characters. So Latin-1 text passes if most letters are ASCII;
// Cyrillic text in a one-byte encoding does not.
static inline const char* binary_reason(const char* data, size_t bytes) {
    if (bytes > PEEK_BYTES) bytes = PEEK_BYTES;
    const int has_zero = memchr(data, 0, bytes) != NULL;
    size_t stray = 0;
    for (size_t at = 0; at < bytes && !has_zero;) {
        const int length = utf8_sequence_length(data + at, bytes - at);
        const unsigned char c = (unsigned char)data[at];
        stray += length == 0 || (c < 32 && !strchr("\t\n\v\f\r\b\x1b", c)) || c == 127;
        at += length ? (size_t)length : 1;
    }
    if (!has_zero && stray * 10 <= bytes * 3) return NULL;
    const char* format = known_format(data, bytes);
    return format ? format : has_zero ? "binary (it has a byte 0)" : "binary or not UTF-8";
}

// ----------------------------------------------------------------------------
// Files

typedef struct {
    char* path;
    int found; // 1: found in a directory, not named by the user; it may be gone when it is opened
} InputFile;

typedef struct {
    InputFile* files;
    size_t count, capacity;
    int64_t bytes;    // of all files together, by the file system
    int takes_binary; // 1: accept files that are no text; set it before the first file is added
    size_t skipped;   // files, directories and others
} FileList;

enum { SKIPPED_SHOWN = 10 }; // warnings; further skipped files are only counted

static inline void file_list_skip(FileList* list, const char* path, const char* reason) {
    if (list->skipped++ < SKIPPED_SHOWN) warn("skipped %s: %s", path, reason);
}

// After the last file: warns of the number of skipped files, if not every one had its own warning.
static inline void file_list_report(const FileList* list) {
    if (list->skipped > SKIPPED_SHOWN)
        warn("skipped %zu files and directories in all; %zu files are read", list->skipped, list->count);
}

// The reason not to read a regular file, or NULL. *error becomes the error if
// the file cannot be read at all, else 0.
static inline const char* file_refusal(const char* path, int* error) {
    char start[PEEK_BYTES];
    *error = 0;
    FILE* file = fopen(path, "rb");
    size_t got = file ? fread(start, 1, sizeof(start), file) : 0;
    if (!file || ferror(file)) *error = errno ? errno : EIO;
    if (file) fclose(file);
    return *error ? strerror(*error) : binary_reason(start, got);
}

enum { FILE_NAMED, FILE_LISTED, FILE_FOUND }; // by the user, in a list, in a directory

// Whether a file of a directory may be skipped after this error. Other errors
// are faults of the machine or the disk.
static inline int error_of_one_file(int error) {
    return error == EACCES || error == EPERM || error == ENOENT;
}

static inline void file_list_add_file(FileList* list, const char* path, const struct stat* info, int origin) {
    int error = 0;
    const char* reason = NULL;
    if (S_ISREG(info->st_mode) && info->st_size > 0 && !list->takes_binary)
        reason = file_refusal(path, &error);
    if (reason && (error ? origin == FILE_FOUND && error_of_one_file(error) : origin != FILE_NAMED)) {
        file_list_skip(list, path, reason);
        return;
    }
    if (error) fail("%s: %s", path, reason);
    if (reason)
        fail(
            "%s: is %s. Leave it out, or take it as it is by --include-binary; files of a directory that are "
            "no text are skipped",
            path, reason);
    list->files = (InputFile*)array_reserve(list->files, &list->capacity, list->count + 1, sizeof(InputFile));
    InputFile added = {strcpy((char*)malloc_or_fail(strlen(path) + 1, "a path"), path), origin == FILE_FOUND};
    list->files[list->count++] = added;
    list->bytes += (int64_t)info->st_size;
}

static inline int compare_entries(const FTSENT** a, const FTSENT** b) {
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

// Adds one entry of a directory. Links are not followed: their targets could be read twice, or without end.
static inline void file_list_add_entry(FileList* list, FTS* walk, FTSENT* entry) {
    const int hidden = entry->fts_level > FTS_ROOTLEVEL && entry->fts_name[0] == '.';
    const int error = entry->fts_errno;
    switch (entry->fts_info) {
    case FTS_DP:
        return;
    case FTS_D:
        if (!hidden) return;
        fts_set(walk, entry, FTS_SKIP);
        file_list_skip(list, entry->fts_path, "a hidden directory");
        return;
    case FTS_DNR:
    case FTS_ERR:
    case FTS_NS:
        if (!error_of_one_file(error)) fail("%s: %s", entry->fts_path, strerror(error));
        file_list_skip(list, entry->fts_path, strerror(error));
        return;
    case FTS_SL:
    case FTS_SLNONE:
        file_list_skip(list, entry->fts_path, "a link; name it, or the directory it points at");
        return;
    default:
        if (hidden) file_list_skip(list, entry->fts_path, "a hidden file");
        else if (entry->fts_info == FTS_F && S_ISREG(entry->fts_statp->st_mode))
            file_list_add_file(list, entry->fts_path, entry->fts_statp, FILE_FOUND);
        else file_list_skip(list, entry->fts_path, "not a regular file");
    }
}

static inline void file_list_add_from_origin(FileList* list, const char* path, int origin) {
    struct stat info;
    if (stat(path, &info) != 0) {
        const int error = errno;
        if (error == ENOENT && strpbrk(path, "*?["))
            fail("%s: %s; a pattern must stand without quotes, so that the shell expands it", path,
                 strerror(error));
        fail("%s: %s", path, strerror(error));
    }
    if (!S_ISDIR(info.st_mode)) {
        file_list_add_file(list, path, &info, origin);
        return;
    }
    const size_t before = list->count, skipped = list->skipped;
    char* roots[2] = {(char*)path, NULL};
    FTS* walk = fts_open(roots, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, compare_entries);
    if (!walk) fail("%s: %s", path, strerror(errno));
    errno = 0;
    for (FTSENT* entry; (entry = fts_read(walk)); errno = 0) file_list_add_entry(list, walk, entry);
    if (errno) fail("%s: %s", path, strerror(errno));
    fts_close(walk);
    if (list->count == before)
        fail("%s: no file to read in this directory, %zu skipped", path, list->skipped - skipped);
}

static inline void file_list_add(FileList* list, const char* path) {
    file_list_add_from_origin(list, path, FILE_NAMED);
}

// Adds the files that a list file names, one on each line.
static inline void file_list_add_from(FileList* files, const char* list_path) {
    FILE* list = open_or_fail(list_path, "rb");
    char* line = NULL;
    size_t capacity = 0, before = files->count;
    for (ssize_t length; (length = getline(&line, &capacity, list)) >= 0;) {
        while (length > 0 && (line[length - 1] == '\n' || line[length - 1] == '\r')) line[--length] = 0;
        if (length > 0) file_list_add_from_origin(files, line, FILE_LISTED);
    }
    if (ferror(list)) fail("%s: cannot read: %s", list_path, strerror(errno));
    if (files->count == before) fail("--files-from %s: names no file to read", list_path);
    free(line);
    fclose(list);
}

static inline void file_list_free(FileList* list) {
    for (size_t i = 0; i < list->count; i++) free(list->files[i].path);
    free(list->files);
    memset(list, 0, sizeof(*list));
}

// ----------------------------------------------------------------------------
// Reading

// Lines that are probably wrong: their number, and the place of the first one.
typedef struct {
    size_t count, first_line;
    const char* first_path;
} Finding;

static inline void finding_add(Finding* finding, const char* path, size_t line) {
    if (finding->count++) return;
    finding->first_path = path;
    finding->first_line = line;
}

typedef struct {
    const FileList* files;
    const char* separator; // NULL: each file is one document
    const char* text_key;  // of *.jsonl
    int text_key_given;    // 1: by the user
    int64_t bytes_left;    // of --max-bytes
    int64_t bytes_given;   // bytes of text returned so far
    int64_t bytes_read;    // bytes of the files read so far
    size_t next_file;
    char* text; // the contents of the open file, if it is plain text
    size_t text_bytes, text_at;
    FILE* lines; // the open file, if it is *.jsonl
    char* line;
    size_t line_capacity, line_number;
    cJSON* object;                         // the current line
    size_t separators, texts, lines_files; // separators found; plain text files; *.jsonl files
    Finding replaced;                      // lines with escapes that are no character
    Finding nulls;                         // lines whose text is null
} DocumentReader;

// separator and text_key may be NULL.
static inline void document_reader_init(DocumentReader* reader, const FileList* files, const char* separator,
                                        const char* text_key, int64_t max_bytes) {
    memset(reader, 0, sizeof(*reader));
    reader->files = files;
    reader->separator = separator;
    reader->text_key = text_key ? text_key : "text";
    reader->text_key_given = text_key != NULL;
    reader->bytes_left = max_bytes;
}

static inline void document_reader_free(DocumentReader* reader) {
    if (reader->lines) fclose(reader->lines);
    free(reader->text);
    free(reader->line);
    cJSON_Delete(reader->object);
    memset(reader, 0, sizeof(*reader));
}

// Returns the next document of the open text file; at its end, frees the text and returns 0.
static inline int next_text_document(DocumentReader* reader, const char** text, size_t* bytes) {
    if (reader->text_at >= reader->text_bytes) {
        free(reader->text);
        reader->text = NULL;
        return 0;
    }
    const char* start = reader->text + reader->text_at;
    size_t left = reader->text_bytes - reader->text_at;
    const char* end = NULL;
    if (reader->separator)
        end = (const char*)memmem(start, left, reader->separator, strlen(reader->separator));
    reader->separators += end != NULL;
    *text = start;
    *bytes = end ? (size_t)(end - start) : left;
    reader->text_at += *bytes + (end ? strlen(reader->separator) : 0);
    return 1;
}

// The code unit of \uXXXX at `escape`, or -1.
static inline int escaped_unit(const char* escape) {
    char digits[5];
    if (escape[0] != '\\' || escape[1] != 'u') return -1;
    snprintf(digits, sizeof(digits), "%.4s", escape + 2);
    return strspn(digits, "0123456789abcdefABCDEF") == 4 ? (int)strtol(digits, NULL, 16) : -1;
}

// Writes U+FFFD over every \u0000 and every surrogate without its other half. cJSON would end the
// string at a \u0000 and refuse half a surrogate pair, and both are common in text from the web.
// Returns 1 if it replaced one, else 0; or -1 if a \u is not followed by four hexadecimal digits,
// since cJSON would end the string there as well.
static inline int replace_bad_escapes(char* line) {
    int replaced = 0;
    for (char* c = strchr(line, '\\'); c && c[1];) {
        const int unit = escaped_unit(c);
        if (c[1] == 'u' && unit < 0) return -1;
        const int next = unit >= 0xd800 && unit <= 0xdbff ? escaped_unit(c + 6) : -1;
        const int pair = next >= 0xdc00 && next <= 0xdfff;
        if (unit == 0 || (unit >= 0xd800 && unit <= 0xdfff && !pair)) {
            memcpy(c, "\\ufffd", 6);
            replaced = 1;
        }
        c = strchr(c + (pair ? 12 : unit >= 0 ? 6 : 2), '\\');
    }
    return replaced;
}

// Fails for a line of *.jsonl without a text. The message lists the line's keys, as a help for --text-key.
__attribute__((noreturn)) static inline void fail_without_text(const DocumentReader* reader, const char* path,
                                                               const cJSON* value) {
    char keys[256] = "";
    size_t used = 0;
    for (const cJSON* item = reader->object->child; item && item->string; item = item->next) {
        const int length = snprintf(keys + used, sizeof(keys) - used, "%s%.40s",
                                    used ? ", " : "; its keys are: ", item->string);
        if (length < 0 || used + (size_t)length >= sizeof(keys)) break;
        used += (size_t)length;
    }
    fail("%s: line %zu has no text under the key \"%s\"%s%s", path, reader->line_number, reader->text_key,
         value ? ", but another kind of value" : "", value ? "" : keys);
}

// Returns the next line that is not blank, without a byte order mark at the
// start of the file; NULL at the end.
static inline char* next_line(DocumentReader* reader, const char* path) {
    for (;;) {
        ssize_t length = getline(&reader->line, &reader->line_capacity, reader->lines);
        if (length < 0) break;
        reader->line_number++;
        reader->bytes_read += length;
        char* line = reader->line;
        if (reader->line_number == 1 && !strncmp(line, "\xef\xbb\xbf", 3)) line += 3;
        if (strlen(line) != (size_t)(length - (line - reader->line)))
            fail("%s: line %zu has a byte 0", path, reader->line_number);
        if (line[strspn(line, " \t\r\n")]) return line;
    }
    if (ferror(reader->lines)) fail("%s: cannot read: %s", path, strerror(errno));
    return NULL;
}

static inline int next_line_document(DocumentReader* reader, const char** text, size_t* bytes) {
    const char* path = reader->files->files[reader->next_file - 1].path;
    char* line = next_line(reader, path);
    if (!line) {
        fclose(reader->lines);
        reader->lines = NULL;
        return 0;
    }
    const int replaced = replace_bad_escapes(line);
    if (replaced > 0) finding_add(&reader->replaced, path, reader->line_number);
    cJSON_Delete(reader->object);
    reader->object = replaced < 0 ? NULL : cJSON_ParseWithOpts(line, NULL, 1);
    if (!reader->object) fail("%s: line %zu is not JSON", path, reader->line_number);
    const cJSON* value = json_member(reader->object, reader->text_key);
    *text = "";
    *bytes = 0;
    if (cJSON_IsNull(value)) {
        finding_add(&reader->nulls, path, reader->line_number);
        return 1; // an empty document
    }
    if (!cJSON_IsString(value)) fail_without_text(reader, path, value);
    *text = value->valuestring;
    *bytes = strlen(value->valuestring);
    return 1;
}

static inline void open_next_file(DocumentReader* reader) {
    const InputFile* input = &reader->files->files[reader->next_file++];
    const char* path = input->path;
    if (input->found && access(path, R_OK) != 0 && error_of_one_file(errno)) {
        warn("skipped %s: %s", path, strerror(errno)); // it existed when the directory was read
        return;
    }
    FILE* file = open_or_fail(path, "rb");
    if (path_ends_with(path, ".jsonl")) {
        reader->lines = file;
        reader->line_number = 0;
        reader->lines_files++;
        return;
    }
    reader->text = read_stream_or_fail(file, path, &reader->text_bytes);
    fclose(file);
    reader->text_at = 0;
    reader->texts++;
    reader->bytes_read += (int64_t)reader->text_bytes;
    // file_refusal() does not look at pipes, so this is the first check of a pipe's text.
    const char* reason =
        input->found || reader->files->takes_binary ? NULL : binary_reason(reader->text, reader->text_bytes);
    if (reason) fail("%s: is %s; --include-binary takes it as it is", path, reason);
}

// The longest prefix of at most `limit` bytes that does not cut a character.
static inline size_t cut_at_character(const char* text, size_t bytes, int64_t limit) {
    if ((int64_t)bytes <= limit) return bytes;
    size_t cut = (size_t)limit;
    for (int back = 0; back < 3 && cut > 0 && ((unsigned char)text[cut] & 0xc0) == 0x80; back++) cut--;
    return cut;
}

// Returns the next document that is not empty, or 0 at the end. The text is valid until the next call.
static inline int document_reader_next(DocumentReader* reader, const char** text, size_t* bytes) {
    while (reader->bytes_left > 0) {
        int found = 0;
        if (reader->text) found = next_text_document(reader, text, bytes);
        else if (reader->lines) found = next_line_document(reader, text, bytes);
        else if (reader->next_file < reader->files->count) open_next_file(reader);
        else return 0;
        if (!found || *bytes == 0) continue;
        size_t cut = cut_at_character(*text, *bytes, reader->bytes_left);
        reader->bytes_left = cut < *bytes ? 0 : reader->bytes_left - (int64_t)cut;
        reader->bytes_given += (int64_t)cut;
        *bytes = cut;
        return cut > 0;
    }
    return 0;
}

// Warns of options that had no effect, and of lines that were changed or skipped.
static inline void document_reader_report(const DocumentReader* reader) {
    if (reader->separator && !reader->separators && reader->texts)
        warn("--separator: is nowhere in the text, so each file is one document (\\n, \\r and \\t stand for "
             "newline, "
             "carriage return and tab)");
    if (reader->separator && !reader->texts) warn("--separator: does not apply to *.jsonl");
    if (reader->text_key_given && !reader->lines_files)
        warn("--text-key %s: no file of the input is named *.jsonl, so the key is not used",
             reader->text_key);
    if (reader->replaced.count)
        warn("lines with \\u0000 or half a surrogate pair, which is read as U+FFFD: %zu; the first is line "
             "%zu of %s",
             reader->replaced.count, reader->replaced.first_line, reader->replaced.first_path);
    if (reader->nulls.count)
        warn("lines skipped because their \"%s\" is null: %zu; the first is line %zu of %s", reader->text_key,
             reader->nulls.count, reader->nulls.first_line, reader->nulls.first_path);
}

// The part of the input that has been read, for progress: by the bytes of the files or by --max-bytes.
static inline double part_read(const DocumentReader* reader) {
    double of_files = (double)reader->bytes_read / (double)reader->files->bytes;
    double of_limit =
        (double)reader->bytes_given / ((double)reader->bytes_given + (double)reader->bytes_left);
    return of_limit > of_files ? of_limit : of_files;
}

// ----------------------------------------------------------------------------
// Batches of documents, for several threads

typedef struct {
    ByteBuffer text;
    size_t* ends; // (count) document d is text[ends[d - 1] .. ends[d]]
    size_t count, capacity;
} DocumentBatch;

// Fills the batch with documents of about `bytes` in total; 0 if no document is left.
static inline int document_reader_batch(DocumentReader* reader, size_t bytes, DocumentBatch* batch) {
    const char* text;
    size_t length;
    batch->text.count = batch->count = 0;
    while (batch->text.count < bytes && document_reader_next(reader, &text, &length)) {
        byte_buffer_append(&batch->text, text, length);
        batch->ends = (size_t*)array_reserve(batch->ends, &batch->capacity, batch->count + 1, sizeof(size_t));
        batch->ends[batch->count++] = batch->text.count;
    }
    return batch->count > 0;
}

static inline const char* document_batch_text(const DocumentBatch* batch, size_t document, size_t* bytes) {
    size_t start = document ? batch->ends[document - 1] : 0;
    *bytes = batch->ends[document] - start;
    return batch->text.data + start;
}

static inline void document_batch_free(DocumentBatch* batch) {
    byte_buffer_free(&batch->text);
    free(batch->ends);
    memset(batch, 0, sizeof(*batch));
}

#endif
