/*
Documents: what `tokenizer train` and `tokenizer prepare` read.

    FileList files = {0};
    file_list_add(&files, "corpus");            // a file, or a directory: all its files, in the order of their names
    DocumentReader reader;
    document_reader_init(&reader, &files, NULL, "text", INT64_MAX);
    DocumentBatch batch = {0};
    while (document_reader_batch(&reader, 16 << 20, &batch))
        for (size_t d = 0; d < batch.count; d++) ... document_batch_text(&batch, d, &bytes) ...

A file is one document, or several between separators; a file named *.jsonl holds one on each line, under a key.
*/
#ifndef TOKENIZER_DOCUMENTS_H
#define TOKENIZER_DOCUMENTS_H

#include "runtime/checks.h"       // fail, read_file_or_fail
#include "tokenizer/formats.h"    // json_member, path_ends_with
#include "tokenizer/vocabulary.h" // ByteBuffer, array_reserve

#include <fts.h>

// ----------------------------------------------------------------------------
// Files

typedef struct {
    char** paths;
    size_t count, capacity;
    int64_t bytes; // of all files together, where the file system knows
} FileList;

static inline void file_list_append(FileList* files, const char* path, int64_t bytes) {
    files->paths = (char**)array_reserve(files->paths, &files->capacity, files->count + 1, sizeof(char*));
    files->paths[files->count++] = strcpy((char*)malloc_or_fail(strlen(path) + 1, "a path"), path);
    files->bytes += bytes;
}

static inline int compare_entries(const FTSENT** a, const FTSENT** b) {
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

// Links inside a directory are not followed: what they point at would be read twice, or without end.
static inline void file_list_add(FileList* files, const char* path) {
    struct stat info;
    if (stat(path, &info) != 0) fail("%s: %s", path, strerror(errno));
    if (!S_ISDIR(info.st_mode)) {
        file_list_append(files, path, (int64_t)info.st_size);
        return;
    }
    size_t before = files->count;
    char* roots[2] = {(char*)path, NULL};
    FTS* walk = fts_open(roots, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, compare_entries);
    if (!walk) fail("%s: %s", path, strerror(errno));
    for (FTSENT* entry; (entry = fts_read(walk));) {
        if (entry->fts_info == FTS_DNR || entry->fts_info == FTS_ERR || entry->fts_info == FTS_NS)
            fail("%s: %s", entry->fts_path, strerror(entry->fts_errno));
        if (entry->fts_info == FTS_F && S_ISREG(entry->fts_statp->st_mode))
            file_list_append(files, entry->fts_path, (int64_t)entry->fts_statp->st_size);
    }
    fts_close(walk);
    if (files->count == before) fail("%s: no file in this directory", path);
}

// A file that names others, one on each line.
static inline void file_list_add_from(FileList* files, const char* list_path) {
    FILE* list = open_or_fail(list_path, "rb");
    char* line = NULL;
    size_t capacity = 0;
    for (ssize_t length; (length = getline(&line, &capacity, list)) >= 0;) {
        while (length > 0 && (line[length - 1] == '\n' || line[length - 1] == '\r')) line[--length] = 0;
        if (length > 0) file_list_add(files, line);
    }
    if (ferror(list)) fail("%s: cannot read: %s", list_path, strerror(errno));
    free(line);
    fclose(list);
}

static inline void file_list_free(FileList* files) {
    for (size_t i = 0; i < files->count; i++) free(files->paths[i]);
    free(files->paths);
    memset(files, 0, sizeof(*files));
}

// ----------------------------------------------------------------------------
// Reading

typedef struct {
    const FileList* files;
    const char* separator; // NULL: each file is one document
    const char* text_key;  // of *.jsonl
    int64_t bytes_left;    // of --max-bytes
    int64_t bytes_given;   // of text
    int64_t bytes_read;    // of the files
    size_t next_file;
    char* text; // the open file, when it is plain text
    size_t text_bytes, text_at;
    FILE* lines; // the open file, when it is *.jsonl
    char* line;
    size_t line_capacity, line_number;
    cJSON* object; // the line at hand
} DocumentReader;

static inline void document_reader_init(DocumentReader* reader, const FileList* files, const char* separator,
                                        const char* text_key, int64_t max_bytes) {
    memset(reader, 0, sizeof(*reader));
    reader->files = files;
    reader->separator = separator;
    reader->text_key = text_key;
    reader->bytes_left = max_bytes;
}

static inline void document_reader_free(DocumentReader* reader) {
    if (reader->lines) fclose(reader->lines);
    free(reader->text);
    free(reader->line);
    cJSON_Delete(reader->object);
    memset(reader, 0, sizeof(*reader));
}

// The next document of an open text file; 0 when there is none, and the file is closed.
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
    *text = start;
    *bytes = end ? (size_t)(end - start) : left;
    reader->text_at += *bytes + (end ? strlen(reader->separator) : 0);
    return 1;
}

// cJSON ends a string at \u0000, so that the text behind it would be lost.
static inline int has_escaped_zero(const char* line) {
    for (const char* c = strchr(line, '\\'); c && c[1]; c = strchr(c + 2, '\\'))
        if (!strncmp(c + 1, "u0000", 5)) return 1;
    return 0;
}

static inline int next_line_document(DocumentReader* reader, const char** text, size_t* bytes) {
    const char* path = reader->files->paths[reader->next_file - 1];
    ssize_t length;
    do {
        length = getline(&reader->line, &reader->line_capacity, reader->lines);
        reader->line_number++;
        if (length > 0) reader->bytes_read += length;
    } while (length >= 0 && strspn(reader->line, " \t\r\n") == (size_t)length);
    if (length < 0) {
        if (ferror(reader->lines)) fail("%s: cannot read: %s", path, strerror(errno));
        fclose(reader->lines);
        reader->lines = NULL;
        return 0;
    }
    if (strlen(reader->line) != (size_t)length) fail("%s: line %zu has a byte 0", path, reader->line_number);
    if (has_escaped_zero(reader->line))
        fail("%s: line %zu: \\u0000 is not supported", path, reader->line_number);
    cJSON_Delete(reader->object);
    reader->object = cJSON_ParseWithOpts(reader->line, NULL, 1);
    if (!reader->object) fail("%s: line %zu is not JSON", path, reader->line_number);
    const cJSON* value = json_member(reader->object, reader->text_key);
    if (!cJSON_IsString(value))
        fail("%s: line %zu has no text under the key \"%s\"", path, reader->line_number, reader->text_key);
    *text = value->valuestring;
    *bytes = strlen(value->valuestring);
    return 1;
}

static inline void open_next_file(DocumentReader* reader) {
    const char* path = reader->files->paths[reader->next_file++];
    if (path_ends_with(path, ".jsonl")) {
        reader->lines = open_or_fail(path, "rb");
        reader->line_number = 0;
        return;
    }
    reader->text = read_file_or_fail(path, &reader->text_bytes);
    reader->text_at = 0;
    reader->bytes_read += (int64_t)reader->text_bytes;
}

// The longest prefix of at most `limit` bytes that does not cut a character.
static inline size_t cut_at_character(const char* text, size_t bytes, int64_t limit) {
    if ((int64_t)bytes <= limit) return bytes;
    size_t cut = (size_t)limit;
    for (int back = 0; back < 3 && cut > 0 && ((unsigned char)text[cut] & 0xc0) == 0x80; back++) cut--;
    return cut;
}

// The next document that is not empty, or 0 at the end. The text is valid until the next call.
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

// How much of the input has been read, for progress: by the bytes of the files or by --max-bytes.
static inline double part_read(const DocumentReader* reader) {
    double of_files = (double)reader->bytes_read / (double)reader->files->bytes;
    double of_limit =
        (double)reader->bytes_given / ((double)reader->bytes_given + (double)reader->bytes_left);
    return of_limit > of_files ? of_limit : of_files;
}

// ----------------------------------------------------------------------------
// Batches, so that several threads have documents to work on

typedef struct {
    ByteBuffer text;
    size_t* ends; // (count) document d is text[ends[d - 1] .. ends[d]]
    size_t count, capacity;
} DocumentBatch;

// Fills the batch with documents of about `bytes` together; 0 when no more is there.
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
