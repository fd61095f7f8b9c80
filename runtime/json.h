/*
JSON files, with cJSON: reads and writes whole files; numbers read back exactly as they were written.

    cJSON* config = json_read_object("config.json");     // one line and exit code 1 if it is not an object
    json_add_double(config, "rope_theta", 10000.0);      // the fewest digits that read back bitwise
    json_write_file("copy.json", config);                // synced to the disk
    cJSON_Delete(config);

cJSON holds numbers as doubles, and prints 15 digits if that is nearly equal. This header prints the fewest
digits that are exactly equal. Whole numbers of 64 bits do not fit a double and are written as strings.
Messages show text from a file through json_shown(), so that a message stays one line.
*/
#ifndef RUNTIME_JSON_H
#define RUNTIME_JSON_H

#include <ctype.h>
#include <math.h>
#include <cjson/cJSON.h>
#include "runtime/checks.h"

// Prepares text of a file for a message: control characters become '?', and it is cut after 80 bytes. The
// result stays valid for the next three calls.
static inline const char* json_shown(const char* text) {
    static char shown[4][84];
    static int next = 0;
    char* buffer = shown[next++ % 4];
    size_t length = 0;
    for (; text && text[length] && length < 80; length++)
        buffer[length] = (unsigned char)text[length] < 32 || text[length] == 127 ? '?' : text[length];
    buffer[length] = 0;
    if (text && text[length]) strcpy(buffer + length, "...");
    return buffer;
}

// ----------------------------------------------------------------------------
// Reading

// Parses `length` bytes of text as a JSON object; a 0 byte must follow them. The caller deletes the object.
static inline cJSON* json_parse_object(const char* text, size_t length, const char* path) {
    const char* end = NULL;
    cJSON* object = cJSON_ParseWithLengthOpts(text, length + 1, &end, 0);
    if (!object) {
        long line = 1;
        for (const char* c = text; end && c < end && c < text + length; c++) line += *c == '\n';
        fail("%s: not valid JSON (line %ld)", path, line);
    }
    for (; end < text + length; end++)
        if (!strchr(" \t\r\n", *end) || !*end) fail("%s: not valid JSON (text after its end)", path);
    if (!cJSON_IsObject(object)) fail("%s: not a JSON object", path);
    return object;
}

static inline cJSON* json_read_object(const char* path) {
    size_t length;
    char* text = read_file_or_fail(path, &length);
    cJSON* object = json_parse_object(text, length, path);
    free(text);
    return object;
}

static inline const cJSON* json_get(const cJSON* object, const char* key) {
    return cJSON_GetObjectItemCaseSensitive(object, key);
}

// The text of an item; NULL if the item is absent or no string.
static inline const char* json_text(const cJSON* item) {
    return cJSON_IsString(item) ? item->valuestring : NULL;
}

// Returns 1 and the value if the item is a whole number from 0 to 2^53, which doubles hold exactly; else 0.
static inline int json_get_whole(const cJSON* item, uint64_t* value) {
    if (!cJSON_IsNumber(item)) return 0;
    double number = item->valuedouble;
    if (!(number >= 0 && number <= 9007199254740992.0) || number != floor(number)) return 0;
    *value = (uint64_t)number;
    return 1;
}

// Reads a number that json_add_double() has written: a JSON number, or the string "inf", "-inf" or "nan".
static inline int json_get_double(const cJSON* item, double* value) {
    if (cJSON_IsNumber(item)) {
        *value = item->valuedouble;
        return isfinite(*value);
    }
    const char* text = json_text(item);
    if (!text) return 0;
    if (!strcmp(text, "inf")) return *value = INFINITY, 1;
    if (!strcmp(text, "-inf")) return *value = -INFINITY, 1;
    if (!strcmp(text, "nan")) return *value = NAN, 1;
    return 0;
}

// Reads a number that json_add_uint64() has written: a string of decimal digits.
static inline int json_get_uint64(const cJSON* item, uint64_t* value) {
    const char* text = json_text(item);
    if (!text || !isdigit((unsigned char)text[0])) return 0;
    char* end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return *end == 0 && errno == 0;
}

// ----------------------------------------------------------------------------
// Writing

// Adds a number with the fewest digits that read back as the same double. JSON has no
// infinity and no NaN; they are written as strings.
static inline void json_add_double(cJSON* object, const char* key, double value) {
    if (!isfinite(value)) {
        cJSON_AddStringToObject(object, key, isnan(value) ? "nan" : value > 0 ? "inf" : "-inf");
        return;
    }
    char digits[40];
    for (int precision = 1; precision <= 17; precision++) {
        snprintf(digits, sizeof(digits), "%.*g", precision, value);
        if (strtod(digits, NULL) == value) break;
    }
    if (fabs(value) < 1e15 && value == floor(value)) // 10000.0, so that Python reads a float
        snprintf(digits, sizeof(digits), "%.1f", value);
    cJSON_AddRawToObject(object, key, digits);
}

// The double of the fewest digits that read back as this float: 1e-05 rather than 9.99999974737875e-06.
static inline double json_float_as_double(float value) {
    char digits[40];
    for (int precision = 1; precision <= 9 && isfinite(value); precision++) {
        snprintf(digits, sizeof(digits), "%.*g", precision, (double)value);
        if (strtof(digits, NULL) == value) return strtod(digits, NULL);
    }
    return (double)value;
}

static inline void json_add_float(cJSON* object, const char* key, float value) {
    json_add_double(object, key, json_float_as_double(value));
}

// Adds a whole number up to 2^53. cJSON's own printing may be wrong by one from 2^52 on.
static inline void json_add_whole(cJSON* object, const char* key, long value) {
    char digits[24];
    snprintf(digits, sizeof(digits), "%ld", value);
    cJSON_AddRawToObject(object, key, digits);
}

static inline void json_add_uint64(cJSON* object, const char* key, uint64_t value) {
    char digits[24];
    snprintf(digits, sizeof(digits), "%llu", (unsigned long long)value);
    cJSON_AddStringToObject(object, key, digits);
}

// Adds a list of numbers, each as json_add_double() writes it.
static inline void json_add_doubles(cJSON* object, const char* key, const double* values, int count) {
    cJSON* list = cJSON_AddArrayToObject(object, key);
    for (int i = 0; i < count; i++) {
        cJSON* holder = cJSON_CreateObject();
        json_add_double(holder, "value", values[i]);
        cJSON_AddItemToArray(list, cJSON_DetachItemFromObject(holder, "value"));
        cJSON_Delete(holder);
    }
}

// Writes the object and syncs it to the disk.
static inline void json_write_file(const char* path, const cJSON* object) {
    char* text = cJSON_Print(object);
    if (!text) fail("out of memory: the text of %s", path);
    FILE* file = open_or_fail(path, "wb");
    write_or_fail(text, strlen(text), file, path);
    write_or_fail("\n", 1, file, path);
    close_written_or_fail(file, path);
    cJSON_free(text);
}

// The same; the old file stays if the process ends early.
static inline void json_replace_file(const char* path, const cJSON* object) {
    char target[PATH_MAX], partial[PATH_MAX];
    replacement_begin(target, partial, path);
    json_write_file(partial, object);
    replacement_commit(target, partial);
}

#endif
