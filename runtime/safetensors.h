/*
Files of named tensors in the safetensors format: 8 bytes with the length N of the header (little-endian), N
bytes of JSON, {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}, then the data.

    SafetensorsWriter writer;                                        // header first, then the data, in order
    safetensors_create(&writer, path);
    safetensors_declare(&writer, "weight", DTYPE_F32, 2, rows, columns);
    safetensors_write(&writer, values, DTYPE_F32, rows * columns);   // in any number of pieces
    safetensors_finish(&writer);                                     // synced to the disk

    SafetensorsFile file;
    safetensors_open(&file, path);                                   // every rule of the format checked
    const SafetensorsEntry* entry = safetensors_find(&file, "weight");
    safetensors_read(&file, entry, 0, rows * columns, values, DTYPE_F64);
    safetensors_close(&file);

Reading and writing hold only the header and the caller's piece in memory. Values are converted between the
file's type and the caller's; to BF16 by rounding to nearest even. An error ends the program with exit code 1
and one line that names the file, the tensor and the broken rule. Source of the format:
https://huggingface.co/docs/safetensors ("Format").
*/
#ifndef RUNTIME_SAFETENSORS_H
#define RUNTIME_SAFETENSORS_H

#include "runtime/json.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors files are little-endian, and so must be the machine"
#endif

// ----------------------------------------------------------------------------
// Number types

typedef enum { DTYPE_F64, DTYPE_F32, DTYPE_BF16 } Dtype;

static inline const char* dtype_name(Dtype dtype) {
    return dtype == DTYPE_F64 ? "F64" : dtype == DTYPE_F32 ? "F32" : "BF16";
}
static inline size_t dtype_size(Dtype dtype) { return dtype == DTYPE_F64 ? 8 : dtype == DTYPE_F32 ? 4 : 2; }
// The type of floatX or float_acc, by its size.
static inline Dtype dtype_of_size(size_t bytes) {
    return bytes == 8 ? DTYPE_F64 : bytes == 4 ? DTYPE_F32 : DTYPE_BF16;
}

// Rounds to nearest, ties to even. Rounding twice (double to float to bf16) can go wrong if the
// float is exactly halfway between two bf16 numbers but the double is not. Then the float's
// last bit is moved towards the double first.
static inline uint16_t bf16_from_double(double value) {
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (isnan(value)) return (uint16_t)(bits >> 16 | 0x40);
    if ((bits & 0xFFFF) == 0x8000 && (double)single != value)
        bits += fabs((double)single) < fabs(value) ? 1 : 0xFFFFFFFFu;
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline double bf16_to_double(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float single;
    memcpy(&single, &bits, 4);
    return (double)single;
}

// out[i] = in[i] in another type. The arrays must not overlap; they need not be aligned.
static inline void convert_values(void* out, Dtype out_dtype, const void* in, Dtype in_dtype, size_t count) {
    const char* source = (const char*)in;
    char* target = (char*)out;
    const size_t in_size = dtype_size(in_dtype), out_size = dtype_size(out_dtype);
    if (in_dtype == out_dtype) {
        memcpy(out, in, count * in_size);
        return;
    }
    for (size_t i = 0; i < count; i++, source += in_size, target += out_size) {
        double wide = 0;
        float single = 0;
        uint16_t half = 0;
        if (in_dtype == DTYPE_F64) memcpy(&wide, source, 8);
        else if (in_dtype == DTYPE_F32) memcpy(&single, source, 4), wide = (double)single;
        else memcpy(&half, source, 2), wide = bf16_to_double(half);
        if (out_dtype == DTYPE_F64) memcpy(target, &wide, 8);
        else if (out_dtype == DTYPE_F32) single = (float)wide, memcpy(target, &single, 4);
        else half = bf16_from_double(wide), memcpy(target, &half, 2);
    }
}

// ----------------------------------------------------------------------------
// Entries

#define SAFETENSORS_NAME_MAX 256
#define SAFETENSORS_DIMS_MAX 8
#define SAFETENSORS_HEADER_MAX 100000000 // bytes; the format's own limit

typedef struct {
    char name[SAFETENSORS_NAME_MAX];
    Dtype dtype;
    int dims;
    uint64_t shape[SAFETENSORS_DIMS_MAX];
    uint64_t begin, end; // bytes from the start of the data
} SafetensorsEntry;

// Elements of the entry.
static inline uint64_t safetensors_count(const SafetensorsEntry* entry) {
    return (entry->end - entry->begin) / dtype_size(entry->dtype);
}

// The shape as "(2, 3)", for messages. The result stays valid for the next call.
static inline const char* safetensors_shape_text(const SafetensorsEntry* entry) {
    static char texts[2][SAFETENSORS_DIMS_MAX * 22 + 4];
    static int next = 0;
    char* text = texts[next++ % 2];
    size_t used = (size_t)sprintf(text, "(");
    for (int d = 0; d < entry->dims; d++)
        used += (size_t)sprintf(text + used, d ? ", %llu" : "%llu", (unsigned long long)entry->shape[d]);
    sprintf(text + used, ")");
    return text;
}

// ----------------------------------------------------------------------------
// Writing

typedef struct {
    char path[PATH_MAX];
    FILE* file;
    cJSON* metadata; // strings by name
    SafetensorsEntry* entries;
    int count;
    int current;       // the entry being written
    uint64_t position; // bytes of data written
    int header_written;
} SafetensorsWriter;

static inline void safetensors_create(SafetensorsWriter* writer, const char* path) {
    memset(writer, 0, sizeof(*writer));
    path_format(writer->path, "%s", path);
    writer->file = open_or_fail(path, "wb");
    writer->metadata = cJSON_CreateObject();
    // Hugging Face's loaders require this: "pt" means tensors as PyTorch's, row-major.
    cJSON_AddStringToObject(writer->metadata, "format", "pt");
}

static inline void safetensors_metadata(SafetensorsWriter* writer, const char* key, const char* value) {
    cJSON_AddStringToObject(writer->metadata, key, value);
}

// Declares a tensor of 1 or 2 dimensions. All declarations come before the first safetensors_write().
static inline void safetensors_declare(SafetensorsWriter* writer, const char* name, Dtype dtype, int dims,
                                       uint64_t rows, uint64_t columns) {
    writer->entries = (SafetensorsEntry*)realloc_or_fail(
        writer->entries, (size_t)(writer->count + 1) * sizeof(SafetensorsEntry), "a safetensors header");
    SafetensorsEntry* entry = &writer->entries[writer->count];
    memset(entry, 0, sizeof(*entry));
    snprintf(entry->name, sizeof(entry->name), "%s", name);
    entry->dtype = dtype;
    entry->dims = dims;
    entry->shape[0] = rows;
    entry->shape[1] = columns;
    entry->begin = writer->count ? writer->entries[writer->count - 1].end : 0;
    entry->end = entry->begin + rows * (dims == 2 ? columns : 1) * dtype_size(dtype);
    writer->count++;
}

static inline cJSON* safetensors_entry_json(const SafetensorsEntry* entry) {
    cJSON* object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "dtype", dtype_name(entry->dtype));
    cJSON* shape = cJSON_AddArrayToObject(object, "shape");
    for (int d = 0; d < entry->dims; d++)
        cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)entry->shape[d]));
    cJSON* offsets = cJSON_AddArrayToObject(object, "data_offsets");
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)entry->begin));
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)entry->end));
    return object;
}

// Writes the header, padded with spaces so that the data begin at a multiple of 8 bytes.
static inline void safetensors_write_header(SafetensorsWriter* writer) {
    cJSON* header = cJSON_CreateObject();
    cJSON_AddItemToObject(header, "__metadata__", writer->metadata);
    for (int i = 0; i < writer->count; i++)
        cJSON_AddItemToObject(header, writer->entries[i].name, safetensors_entry_json(&writer->entries[i]));
    char* text = cJSON_PrintUnformatted(header);
    if (!text) fail("out of memory: the header of %s", writer->path);
    const size_t length = strlen(text), padding = (8 - length % 8) % 8;
    const uint64_t padded = length + padding;
    write_or_fail(&padded, sizeof(padded), writer->file, writer->path);
    write_or_fail(text, length, writer->file, writer->path);
    write_or_fail("        ", padding, writer->file, writer->path);
    cJSON_free(text);
    cJSON_Delete(header);
    writer->metadata = NULL;
    writer->header_written = 1;
}

// Writes the next `count` values, in the order of the declarations. One call stays within one tensor.
static inline void safetensors_write(SafetensorsWriter* writer, const void* values, Dtype dtype,
                                     uint64_t count) {
    if (!writer->header_written) safetensors_write_header(writer);
    while (writer->current < writer->count && writer->entries[writer->current].end == writer->position)
        writer->current++;
    if (!count) return;
    const SafetensorsEntry* entry =
        writer->current < writer->count ? &writer->entries[writer->current] : NULL;
    if (!entry || count > (entry->end - writer->position) / dtype_size(entry->dtype))
        fail("%s: more values written than declared", writer->path); // an error of the calling code
    if (entry->dtype == dtype) {
        write_or_fail(values, count * dtype_size(dtype), writer->file, writer->path);
    } else {
        char piece[8192];
        const uint64_t step = sizeof(piece) / dtype_size(entry->dtype);
        for (uint64_t i = 0; i < count; i += step) {
            size_t n = (size_t)(count - i < step ? count - i : step);
            convert_values(piece, entry->dtype, (const char*)values + i * dtype_size(dtype), dtype, n);
            write_or_fail(piece, n * dtype_size(entry->dtype), writer->file, writer->path);
        }
    }
    writer->position += count * dtype_size(entry->dtype);
}

static inline void safetensors_finish(SafetensorsWriter* writer) {
    safetensors_write(writer, NULL, DTYPE_F32, 0);
    if (writer->current != writer->count) fail("%s: fewer values written than declared", writer->path);
    close_written_or_fail(writer->file, writer->path);
    free(writer->entries);
}

// ----------------------------------------------------------------------------
// Reading

typedef struct {
    char path[PATH_MAX];
    FILE* file;
    SafetensorsEntry* entries; // sorted by name
    int count;
    uint64_t data_start; // bytes
    cJSON* header;       // kept for the metadata
} SafetensorsFile;

static inline int safetensors_compare_names(const void* a, const void* b) {
    return strcmp(((const SafetensorsEntry*)a)->name, ((const SafetensorsEntry*)b)->name);
}

static inline int safetensors_compare_offsets(const void* a, const void* b) {
    const SafetensorsEntry *left = (const SafetensorsEntry*)a, *right = (const SafetensorsEntry*)b;
    if (left->begin != right->begin) return left->begin < right->begin ? -1 : 1;
    return left->end < right->end ? -1 : left->end > right->end;
}

// Reads and checks one entry of the header by itself: its dtype, shape and offsets.
static inline void safetensors_parse_entry(SafetensorsEntry* entry, const cJSON* item, const char* path) {
    memset(entry, 0, sizeof(*entry));
    const char* name = item->string;
    if (!name[0] || strlen(name) >= SAFETENSORS_NAME_MAX)
        fail("%s: tensor \"%s\": a name has 1 to %d bytes", path, json_shown(name), SAFETENSORS_NAME_MAX - 1);
    for (const char* c = name; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127)
            fail("%s: tensor \"%s\": control character in the name", path, json_shown(name));
    strcpy(entry->name, name);
    name = json_shown(name);
    const char* dtype = json_text(json_get(item, "dtype"));
    if (!cJSON_IsObject(item) || !dtype) fail("%s: tensor %s: no dtype", path, name);
    if (!strcmp(dtype, "F64")) entry->dtype = DTYPE_F64;
    else if (!strcmp(dtype, "F32")) entry->dtype = DTYPE_F32;
    else if (!strcmp(dtype, "BF16")) entry->dtype = DTYPE_BF16;
    else fail("%s: tensor %s: dtype %s, but only F32, F64 and BF16 are read", path, name, json_shown(dtype));

    const cJSON* shape = json_get(item, "shape");
    if (!cJSON_IsArray(shape) || cJSON_GetArraySize(shape) > SAFETENSORS_DIMS_MAX)
        fail("%s: tensor %s: shape is not a list of at most %d sizes", path, name, SAFETENSORS_DIMS_MAX);
    uint64_t bytes = dtype_size(entry->dtype);
    for (const cJSON* size = shape->child; size; size = size->next) {
        uint64_t* n = &entry->shape[entry->dims++];
        if (!json_get_whole(size, n)) fail("%s: tensor %s: shape holds what is not a size", path, name);
        if (*n && bytes > UINT64_MAX / 4 / *n) fail("%s: tensor %s: shape too large", path, name);
        bytes *= *n;
    }
    const cJSON* offsets = json_get(item, "data_offsets");
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !json_get_whole(offsets->child, &entry->begin) ||
        !json_get_whole(offsets->child->next, &entry->end) || entry->begin > entry->end)
        fail("%s: tensor %s: data_offsets are not [begin, end]", path, name);
    if (entry->end - entry->begin != bytes)
        fail("%s: tensor %s: data_offsets span %llu bytes, but %s of %s takes %llu", path, name,
             (unsigned long long)(entry->end - entry->begin), safetensors_shape_text(entry), dtype,
             (unsigned long long)bytes);
}

// Checks all entries together: they follow each other without gap or overlap up to the end of the file, and
// no name is there twice. Sorts the entries by name.
static inline void safetensors_check_entries(SafetensorsFile* file, uint64_t data_bytes) {
    qsort(file->entries, (size_t)file->count, sizeof(SafetensorsEntry), safetensors_compare_offsets);
    uint64_t end = 0;
    for (int i = 0; i < file->count; i++) {
        const SafetensorsEntry* entry = &file->entries[i];
        if (entry->begin != end)
            fail("%s: tensor %s: begins at byte %llu of the data, %s the %llu where the one before ends",
                 file->path, json_shown(entry->name), (unsigned long long)entry->begin,
                 entry->begin < end ? "inside" : "after a gap from", (unsigned long long)end);
        end = entry->end;
        if (end > data_bytes)
            fail("%s: tensor %s: ends at byte %llu of the data, but the file has %llu (cut short?)",
                 file->path, json_shown(entry->name), (unsigned long long)end,
                 (unsigned long long)data_bytes);
    }
    if (end != data_bytes)
        fail("%s: %llu bytes after the last tensor", file->path, (unsigned long long)(data_bytes - end));
    qsort(file->entries, (size_t)file->count, sizeof(SafetensorsEntry), safetensors_compare_names);
    for (int i = 1; i < file->count; i++)
        if (!strcmp(file->entries[i].name, file->entries[i - 1].name))
            fail("%s: tensor %s: listed twice", file->path, json_shown(file->entries[i].name));
}

// Checks that every value of "__metadata__" is a string.
static inline void safetensors_check_metadata(const cJSON* metadata, const char* path) {
    if (!cJSON_IsObject(metadata)) fail("%s: __metadata__ is not an object", path);
    for (const cJSON* item = metadata->child; item; item = item->next)
        if (!cJSON_IsString(item))
            fail("%s: __metadata__: %s is not a string", path, json_shown(item->string));
}

// Reads the header and checks it against every rule of the format and against the file's length.
static inline void safetensors_open(SafetensorsFile* file, const char* path) {
    memset(file, 0, sizeof(*file));
    path_format(file->path, "%s", path);
    file->file = open_or_fail(path, "rb");
    struct stat info;
    if (fstat(fileno(file->file), &info) != 0 || !S_ISREG(info.st_mode)) fail("%s: not a regular file", path);
    const uint64_t file_bytes = (uint64_t)info.st_size;
    uint64_t length;
    if (file_bytes < sizeof(length) || fread(&length, sizeof(length), 1, file->file) != 1)
        fail("%s: cut short: %llu bytes, not even the header's length", path, (unsigned long long)file_bytes);
    if (length > SAFETENSORS_HEADER_MAX || length < 2)
        fail("%s: not a safetensors file: a header of %llu bytes", path, (unsigned long long)length);
    if (length > file_bytes - 8)
        fail("%s: cut short: a header of %llu bytes in a file of %llu", path, (unsigned long long)length,
             (unsigned long long)file_bytes);
    char* text = (char*)malloc_or_fail((size_t)length + 1, path);
    if (fread(text, 1, (size_t)length, file->file) != length)
        fail("%s: cannot read: %s", path, strerror(errno));
    text[length] = 0;
    if (text[0] != '{') fail("%s: not a safetensors file: its header is not a JSON object", path);
    file->header = json_parse_object(text, (size_t)length, path);
    free(text);

    int items = 0;
    for (const cJSON* item = file->header->child; item; item = item->next) items++;
    file->entries =
        (SafetensorsEntry*)malloc_or_fail((size_t)items * sizeof(SafetensorsEntry), "a safetensors header");
    for (const cJSON* item = file->header->child; item; item = item->next)
        if (!strcmp(item->string, "__metadata__")) safetensors_check_metadata(item, path);
        else safetensors_parse_entry(&file->entries[file->count++], item, path);
    file->data_start = 8 + length;
    safetensors_check_entries(file, file_bytes - file->data_start);
}

// Finds a tensor by its name; NULL if the file has none of that name.
static inline const SafetensorsEntry* safetensors_find(const SafetensorsFile* file, const char* name) {
    SafetensorsEntry key;
    if (strlen(name) >= sizeof(key.name)) return NULL;
    strcpy(key.name, name);
    return (const SafetensorsEntry*)bsearch(&key, file->entries, (size_t)file->count,
                                            sizeof(SafetensorsEntry), safetensors_compare_names);
}

// A string of the metadata; NULL if there is none of that name.
static inline const char* safetensors_get_metadata(const SafetensorsFile* file, const char* key) {
    return json_text(json_get(json_get(file->header, "__metadata__"), key));
}

// Reads `count` elements of an entry from `first` on into `values`, converted to `dtype`.
static inline void safetensors_read(const SafetensorsFile* file, const SafetensorsEntry* entry,
                                    uint64_t first, uint64_t count, void* values, Dtype dtype) {
    const size_t size = dtype_size(entry->dtype);
    if (first > safetensors_count(entry) || count > safetensors_count(entry) - first)
        fail("%s: tensor %s: read beyond its end", file->path, entry->name);
    if (fseeko(file->file, (off_t)(file->data_start + entry->begin + first * size), SEEK_SET) != 0)
        fail("%s: cannot read: %s", file->path, strerror(errno));
    char piece[8192];
    const uint64_t step = dtype == entry->dtype ? count : sizeof(piece) / size;
    for (uint64_t i = 0; i < count; i += step) {
        size_t n = (size_t)(count - i < step ? count - i : step);
        char* target = (char*)values + i * dtype_size(dtype);
        errno = 0;
        if (fread(dtype == entry->dtype ? target : piece, size, n, file->file) != n)
            fail("%s: tensor %s: cannot read: %s", file->path, json_shown(entry->name),
                 errno ? strerror(errno) : "the file became shorter");
        if (dtype != entry->dtype) convert_values(target, dtype, piece, entry->dtype, n);
    }
}

static inline void safetensors_close(SafetensorsFile* file) {
    fclose(file->file);
    free(file->entries);
    cJSON_Delete(file->header);
}

#endif
