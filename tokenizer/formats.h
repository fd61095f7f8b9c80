/*
Tokenizer files. This header reads and writes Hugging Face's tokenizer.json. It reads GPT-2's vocab.json +
merges.txt, and tiktoken's rank files. It refuses a file with which Hugging Face or tiktoken would encode text
differently from this library.

In the JSON formats a token's bytes are written as characters: a byte that is a printable Latin-1 character
stands for itself, the n-th of the others is U+0100 + n (Radford et al. 2019, bytes_to_unicode).
*/
#ifndef TOKENIZER_FORMATS_H
#define TOKENIZER_FORMATS_H

#include "runtime/checks.h"       // fail, read_file_or_fail
#include "tokenizer/output.h"     // OutputFile
#include "tokenizer/vocabulary.h" // Tokenizer

#include <cjson/cJSON.h>
#include <math.h>

// ----------------------------------------------------------------------------
// The byte alphabet

typedef struct {
    int character[256];         // of each byte
    int byte[256 + 68];         // of each character, or -1
    unsigned char ordered[256]; // the bytes in the order of their characters: GPT-2's ids 0 to 255
} ByteAlphabet;

static inline void byte_alphabet_init(ByteAlphabet* alphabet) {
    int others = 0, ordered = 0;
    for (int c = 0; c < 256 + 68; c++) alphabet->byte[c] = -1;
    for (int b = 0; b < 256; b++) {
        int printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        alphabet->character[b] = printable ? b : 256 + others++;
        alphabet->byte[alphabet->character[b]] = b;
    }
    for (int c = 0; c < 256 + 68; c++)
        if (alphabet->byte[c] >= 0) alphabet->ordered[ordered++] = (unsigned char)alphabet->byte[c];
}

// Appends the bytes that `key` stands for. Returns 0 if it has a character outside the alphabet, else 1.
static inline int byte_alphabet_decode(const ByteAlphabet* alphabet, const char* key, size_t length,
                                       ByteBuffer* out) {
    for (size_t i = 0; i < length;) {
        int sequence = utf8_sequence_length(key + i, length - i);
        int c = (unsigned char)key[i];
        if (sequence == 2) c = (c & 0x1f) << 6 | (key[i + 1] & 0x3f);
        if (sequence < 1 || sequence > 2 || c >= 256 + 68 || alphabet->byte[c] < 0) return 0;
        char byte = (char)alphabet->byte[c];
        byte_buffer_append(out, &byte, 1);
        i += (size_t)sequence;
    }
    return 1;
}

// Appends the characters of some bytes, as UTF-8.
static inline void byte_alphabet_encode(const ByteAlphabet* alphabet, const char* bytes, size_t length,
                                        ByteBuffer* out) {
    for (size_t i = 0; i < length; i++) {
        int c = alphabet->character[(unsigned char)bytes[i]];
        char two[2] = {(char)(0xc0 | c >> 6), (char)(0x80 | (c & 0x3f))};
        if (c < 0x80) two[0] = (char)c;
        byte_buffer_append(out, two, c < 0x80 ? 1 : 2);
    }
}

// ----------------------------------------------------------------------------
// JSON, checked

static inline cJSON* json_read_or_fail(const char* path) {
    size_t length;
    char* text = read_file_or_fail(path, &length);
    if (strlen(text) != length) fail("%s: not JSON: it has a byte 0", path);
    const char* end = text;
    cJSON* root = cJSON_ParseWithLengthOpts(text, length + 1, &end, 1);
    if (!root) {
        size_t line = 1;
        for (const char* c = text; c < end; c++) line += *c == '\n';
        fail("%s: not JSON: error in line %zu, at byte %zu", path, line, (size_t)(end - text));
    }
    free(text);
    return root;
}

static inline const cJSON* json_member(const cJSON* object, const char* key) {
    return cJSON_IsObject(object) ? cJSON_GetObjectItemCaseSensitive(object, key) : NULL;
}

static inline int json_absent(const cJSON* value) { return !value || cJSON_IsNull(value); }

static inline int json_is_string(const cJSON* value, const char* text) {
    return cJSON_IsString(value) && !strcmp(value->valuestring, text);
}

static inline int json_empty_string(const cJSON* value) {
    return json_absent(value) || json_is_string(value, "");
}

// A whole number that fits a token id, or -1.
static inline int64_t json_id(const cJSON* value) {
    if (!cJSON_IsNumber(value) || !(value->valuedouble >= 0) || value->valuedouble > VOCABULARY_MAX_ID)
        return -1;
    return floor(value->valuedouble) == value->valuedouble ? (int64_t)value->valuedouble : -1;
}

// ----------------------------------------------------------------------------
// Vocabulary and merges as characters: common to tokenizer.json and GPT-2's files

// Whether `key` is the content of an added token and the byte alphabet would read it
// differently. Such keys stand for themselves.
static inline int is_added_key(const Tokenizer* t, const char* key, int64_t id, const cJSON* added_tokens) {
    if (is_printable_ascii(key, strlen(key))) return 0;
    const cJSON* added = added_tokens ? added_tokens->child : NULL;
    while (added && !json_is_string(json_member(added, "content"), key)) added = added->next;
    if (added && json_id(json_member(added, "id")) != id)
        fail("%s: the added token \"%s\" has another id in the vocabulary", t->origin, key);
    return added != NULL;
}

// Reads {"key": id, ...}, without the keys that read_added_tokens will add.
static inline void read_vocabulary(Tokenizer* t, const cJSON* vocabulary, const cJSON* added_tokens) {
    ByteAlphabet alphabet;
    ByteBuffer bytes = {NULL, 0, 0};
    byte_alphabet_init(&alphabet);
    if (!cJSON_IsObject(vocabulary)) fail("%s: the vocabulary is not a JSON object", t->origin);
    for (const cJSON* entry = vocabulary->child; entry; entry = entry->next) {
        int64_t id = json_id(entry);
        if (id < 0)
            fail("%s: the id of \"%s\" is not a whole number from 0 to %d", t->origin, entry->string,
                 VOCABULARY_MAX_ID);
        if (is_added_key(t, entry->string, id, added_tokens)) continue;
        bytes.count = 0;
        if (!byte_alphabet_decode(&alphabet, entry->string, strlen(entry->string), &bytes))
            fail("%s: the token \"%s\" has a character outside the byte alphabet, and is no added token",
                 t->origin, entry->string);
        vocabulary_add_token(t, id, bytes.data, bytes.count, TOKEN_WORD);
    }
    byte_buffer_free(&bytes);
}

// Adds one merge of two keys, with the next rank.
static inline void read_merge(Tokenizer* t, const ByteAlphabet* alphabet, const char* left,
                              size_t left_length, const char* right, size_t right_length) {
    ByteBuffer bytes = {NULL, 0, 0};
    int left_ok = byte_alphabet_decode(alphabet, left, left_length, &bytes);
    size_t middle = bytes.count;
    int right_ok = byte_alphabet_decode(alphabet, right, right_length, &bytes);
    int32_t left_id = left_ok && middle ? vocabulary_find(t, bytes.data, middle) : -1;
    int32_t right_id =
        right_ok && bytes.count > middle ? vocabulary_find(t, bytes.data + middle, bytes.count - middle) : -1;
    if (left_id < 0 || right_id < 0)
        fail("%s: merge %zu, \"%.*s %.*s\": \"%.*s\" is not in the vocabulary", t->origin, t->merge_count,
             (int)left_length, left, (int)right_length, right,
             (int)(left_id < 0 ? left_length : right_length), left_id < 0 ? left : right);
    int32_t result = vocabulary_find(t, bytes.data, bytes.count);
    if (result < 0)
        fail("%s: merge %zu, \"%.*s %.*s\": its result \"%.*s%.*s\" is not in the vocabulary", t->origin,
             t->merge_count, (int)left_length, left, (int)right_length, right, (int)left_length, left,
             (int)right_length, right);
    vocabulary_add_merge(t, left_id, right_id, result, (uint32_t)t->merge_count);
    byte_buffer_free(&bytes);
}

// Reads a merge "left right".
static inline void read_merge_line(Tokenizer* t, const ByteAlphabet* alphabet, const char* line,
                                   size_t length) {
    const char* space = (const char*)memchr(line, ' ', length);
    if (!space || memchr(space + 1, ' ', length - (size_t)(space + 1 - line)))
        fail("%s: merge %zu, \"%.*s\", is not two tokens with a space between", t->origin, t->merge_count,
             (int)length, line);
    size_t left = (size_t)(space - line);
    read_merge(t, alphabet, line, left, space + 1, length - left - 1);
}

// Reads the merges ["left right", ...] or [["left", "right"], ...].
static inline void read_merges(Tokenizer* t, const cJSON* merges) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    if (!cJSON_IsArray(merges)) fail("%s: model.merges is not a JSON array", t->origin);
    for (const cJSON* merge = merges->child; merge; merge = merge->next) {
        const cJSON *left = merge->child, *right = left ? left->next : NULL;
        if (cJSON_IsString(merge)) {
            read_merge_line(t, &alphabet, merge->valuestring, strlen(merge->valuestring));
        } else if (cJSON_IsArray(merge) && cJSON_IsString(left) && right && cJSON_IsString(right) &&
                   !right->next) {
            read_merge(t, &alphabet, left->valuestring, strlen(left->valuestring), right->valuestring,
                       strlen(right->valuestring));
        } else {
            fail("%s: merge %zu is neither \"left right\" nor [\"left\", \"right\"]", t->origin,
                 t->merge_count);
        }
    }
}

// ----------------------------------------------------------------------------
// tokenizer.json

// The regular expression of {"type": "Split", ...}. Fails unless Split only cuts the text.
static inline const char* json_split_regex(const char* path, const cJSON* split) {
    const cJSON* regex = json_member(json_member(split, "pattern"), "Regex");
    const cJSON* behavior = json_member(split, "behavior");
    int inverted = cJSON_IsTrue(json_member(split, "invert"));
    if (!cJSON_IsString(regex)) fail("%s: pre_tokenizer: Split has no pattern.Regex", path);
    // Our patterns match every character, so to remove the text that does not match removes nothing.
    if (!(json_is_string(behavior, "Isolated") && !inverted) &&
        !(json_is_string(behavior, "Removed") && inverted))
        fail("%s: pre_tokenizer: the behavior of Split is not \"Isolated\"", path);
    return regex->valuestring;
}

// Checks a ByteLevel. Returns 1 if it splits by GPT-2's pattern, 0 if it only changes bytes to characters.
static inline int json_byte_level(const char* path, const cJSON* byte_level) {
    if (!json_is_string(json_member(byte_level, "type"), "ByteLevel"))
        fail("%s: pre_tokenizer: only ByteLevel, or Split and then ByteLevel, is supported", path);
    if (!cJSON_IsFalse(json_member(byte_level, "add_prefix_space")))
        fail("%s: pre_tokenizer: ByteLevel with add_prefix_space is not supported: it changes the text",
             path);
    return !cJSON_IsFalse(json_member(byte_level, "use_regex"));
}

static inline const SplitPattern* json_pattern(const char* path, const cJSON* pre_tokenizer) {
    if (json_absent(pre_tokenizer)) fail("%s: pre_tokenizer is missing: a byte-level BPE has one", path);
    const cJSON *first = pre_tokenizer, *second = NULL;
    if (json_is_string(json_member(pre_tokenizer, "type"), "Sequence")) {
        const cJSON* list = json_member(pre_tokenizer, "pretokenizers");
        first = cJSON_IsArray(list) ? list->child : NULL;
        second = first ? first->next : NULL;
        if (second && second->next)
            fail("%s: pre_tokenizer: a Sequence of more than two is not supported", path);
    }
    if (!second) {
        if (!json_byte_level(path, first))
            fail("%s: pre_tokenizer: ByteLevel without use_regex splits nothing", path);
        return split_pattern_by_name("gpt2");
    }
    if (!json_is_string(json_member(first, "type"), "Split"))
        fail("%s: pre_tokenizer: a Sequence that does not start with Split is not supported", path);
    if (json_byte_level(path, second))
        fail("%s: pre_tokenizer: Split and then ByteLevel with use_regex", path);
    const char* regex = json_split_regex(path, first);
    const SplitPattern* pattern = split_pattern_by_spelling(regex);
    if (!pattern) fail("%s: pre_tokenizer: the pattern %s is not supported", path, regex);
    return pattern;
}

static inline void json_check_model(const char* path, const cJSON* model) {
    if (!cJSON_IsObject(model)) fail("%s: no \"model\": not a tokenizer.json", path);
    const cJSON* type = json_member(model, "type");
    if (type && !json_is_string(type, "BPE"))
        fail("%s: model.type is %s, not \"BPE\"", path,
             cJSON_IsString(type) ? type->valuestring : "no string");
    if (!json_member(model, "vocab")) fail("%s: no \"vocab\" in the model", path);
    if (!json_member(model, "merges")) fail("%s: no \"merges\" in the model", path);
    const cJSON* dropout = json_member(model, "dropout");
    if (!json_absent(dropout) && !(cJSON_IsNumber(dropout) && dropout->valuedouble == 0))
        fail("%s: model.dropout is not supported", path);
    if (!json_empty_string(json_member(model, "continuing_subword_prefix")) ||
        !json_empty_string(json_member(model, "end_of_word_suffix")))
        fail("%s: a model with continuing_subword_prefix or end_of_word_suffix is not byte-level", path);
}

// Fails if a part outside the model would change the text or its tokens.
static inline void json_check_surroundings(const char* path, const cJSON* root) {
    static const char* const must_be_null[] = {"normalizer", "truncation", "padding"};
    for (int i = 0; i < 3; i++)
        if (!json_absent(json_member(root, must_be_null[i])))
            fail("%s: \"%s\" is not supported: it changes the text or its tokens", path, must_be_null[i]);
    const cJSON* decoder = json_member(root, "decoder");
    if (!json_absent(decoder) && !json_is_string(json_member(decoder, "type"), "ByteLevel"))
        fail("%s: the decoder is not ByteLevel", path);
    const cJSON* added = json_member(root, "added_tokens");
    if (!json_absent(added) && !cJSON_IsArray(added)) fail("%s: added_tokens is not a JSON array", path);
}

// Reads an added token {"content": ..., "id": ...}. Fails if a setting would make it
// match by more or less than its plain content.
static inline void read_added_token(Tokenizer* t, const cJSON* added) {
    static const char* const unsupported[] = {"single_word", "lstrip", "rstrip"};
    const cJSON* content = json_member(added, "content");
    int64_t id = json_id(json_member(added, "id"));
    if (!cJSON_IsString(content) || !content->valuestring[0])
        fail("%s: an added token has no content", t->origin);
    if (id < 0) fail("%s: the added token \"%s\" has no valid id", t->origin, content->valuestring);
    for (int i = 0; i < 3; i++)
        if (cJSON_IsTrue(json_member(added, unsupported[i])))
            fail("%s: the added token \"%s\": %s is not supported", t->origin, content->valuestring,
                 unsupported[i]);
    int special = cJSON_IsTrue(json_member(added, "special"));
    const cJSON* normalized = json_member(added, "normalized");
    vocabulary_add_added(t, id, content->valuestring, strlen(content->valuestring), special,
                         normalized ? cJSON_IsTrue(normalized) : !special);
}

// Reads the added tokens. If an added token is not in the vocabulary, Hugging Face ignores its id and gives
// it the next free one; so a file with another id is refused.
static inline void read_added_tokens(Tokenizer* t, const cJSON* added_tokens, const cJSON* vocabulary) {
    int64_t vocabulary_size = cJSON_GetArraySize(vocabulary), highest = -1;
    for (const cJSON* added = added_tokens ? added_tokens->child : NULL; added; added = added->next) {
        read_added_token(t, added);
        const char* content = json_member(added, "content")->valuestring;
        int64_t id = json_id(json_member(added, "id"));
        int64_t next = highest >= vocabulary_size ? highest + 1 : vocabulary_size;
        if (id != next && !json_member(vocabulary, content))
            fail("%s: the added token \"%s\" is not in the vocabulary and its id %lld is not the next, %lld",
                 t->origin, content, (long long)id, (long long)next);
        if (id > highest) highest = id;
    }
}

static inline Tokenizer* load_tokenizer_json(const char* path) {
    cJSON* root = json_read_or_fail(path);
    const cJSON* model = json_member(root, "model");
    json_check_model(path, model);
    json_check_surroundings(path, root);
    Tokenizer* t = tokenizer_new(path, json_pattern(path, json_member(root, "pre_tokenizer")));
    t->ignore_merges = cJSON_IsTrue(json_member(model, "ignore_merges"));
    read_vocabulary(t, json_member(model, "vocab"), json_member(root, "added_tokens"));
    read_merges(t, json_member(model, "merges"));
    read_added_tokens(t, json_member(root, "added_tokens"), json_member(model, "vocab"));
    cJSON_Delete(root);
    vocabulary_finish(t);
    return t;
}

// ----------------------------------------------------------------------------
// GPT-2: vocab.json + merges.txt; OpenAI's names of the same files are encoder.json + vocab.bpe

static inline void read_merges_text(Tokenizer* t, const char* path) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    size_t bytes;
    char* text = read_file_or_fail(path, &bytes);
    for (char *line = text, *end; line < text + bytes; line = end + 1) {
        end = (char*)memchr(line, '\n', (size_t)(text + bytes - line));
        if (!end) end = text + bytes;
        size_t length = (size_t)(end - line);
        if (length > 0 && line[length - 1] == '\r') length--;
        if (length == 0 || (line == text && length >= 8 && !memcmp(line, "#version", 8))) continue;
        read_merge_line(t, &alphabet, line, length);
    }
    free(text);
}

static inline Tokenizer* load_gpt2_files(const char* vocabulary_path, const char* merges_path) {
    Tokenizer* t = tokenizer_new(vocabulary_path, split_pattern_by_name("gpt2"));
    cJSON* root = json_read_or_fail(vocabulary_path);
    read_vocabulary(t, root, NULL);
    cJSON_Delete(root);
    read_merges_text(t, merges_path);
    const char* end_of_text = "<|endoftext|>";
    int32_t id = vocabulary_find(t, end_of_text, strlen(end_of_text));
    if (id >= 0) vocabulary_add_added(t, id, end_of_text, strlen(end_of_text), 1, 0);
    vocabulary_finish(t);
    return t;
}

// ----------------------------------------------------------------------------
// tiktoken: a line for each token: its bytes in base64, a space, its rank

// The value of a base64 digit, or -1.
static inline int base64_digit(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

static inline int base64_decode(const char* text, size_t length, ByteBuffer* out) {
    uint32_t bits = 0;
    int count = 0;
    if (length == 0 || length % 4 != 0) return 0;
    for (int padding = 0; padding < 2 && text[length - 1] == '='; padding++) length--;
    for (size_t i = 0; i < length; i++) {
        int digit = base64_digit(text[i]);
        if (digit < 0) return 0;
        bits = bits << 6 | (uint32_t)digit;
        count += 6;
        if (count < 8) continue;
        count -= 8;
        char byte = (char)(bits >> count & 0xff);
        byte_buffer_append(out, &byte, 1);
    }
    return out->count > 0;
}

static inline void read_ranks(Tokenizer* t) {
    size_t bytes;
    char* text = read_file_or_fail(t->origin, &bytes);
    ByteBuffer token = {NULL, 0, 0};
    size_t number = 0;
    for (char *line = text, *end; line < text + bytes; line = end + 1) {
        number++;
        end = (char*)memchr(line, '\n', (size_t)(text + bytes - line));
        if (!end) end = text + bytes;
        if (end == line) continue;
        *end = 0; // at the last line this is the closing 0 of read_file_or_fail()
        char* space = strchr(line, ' ');
        if (!space) fail("%s: line %zu is not a token in base64, a space and its rank", t->origin, number);
        char* after = space;
        errno = 0;
        long rank = space[1] >= '0' && space[1] <= '9' ? strtol(space + 1, &after, 10) : -1;
        if (rank < 0 || errno || (*after && strcmp(after, "\r") != 0))
            fail("%s: line %zu: the rank is not a whole number", t->origin, number);
        token.count = 0;
        if (!base64_decode(line, (size_t)(space - line), &token))
            fail("%s: line %zu: the token is not in base64", t->origin, number);
        vocabulary_add_token(t, rank, token.data, token.count, TOKEN_WORD);
    }
    byte_buffer_free(&token);
    free(text);
}

static inline int compare_merges(const void* a, const void* b) {
    const Merge *x = (const Merge*)a, *y = (const Merge*)b;
    if (x->rank != y->rank) return x->rank < y->rank ? -1 : 1;
    if (x->left != y->left) return x->left < y->left ? -1 : 1;
    return (x->right > y->right) - (x->right < y->right);
}

// tiktoken merges any two neighbours that form a token, the token of the lowest rank first. So every way to
// cut a token into two tokens is a merge, whose rank is the token's.
static inline void merges_from_ranks(Tokenizer* t) {
    for (int32_t id = 0; id < t->size; id++) {
        if (t->tokens[id].kind == TOKEN_NONE) continue;
        const char* bytes = vocabulary_bytes(t, id);
        for (size_t cut = 1; cut < t->tokens[id].length; cut++) {
            int32_t left = vocabulary_find(t, bytes, cut);
            int32_t right = left < 0 ? -1 : vocabulary_find(t, bytes + cut, t->tokens[id].length - cut);
            if (right >= 0) vocabulary_add_merge(t, left, right, id, (uint32_t)id);
        }
    }
    if (t->merge_count) qsort(t->merges, t->merge_count, sizeof(Merge), compare_merges);
}

static inline void add_special(Tokenizer* t, int64_t id, const char* content) {
    vocabulary_add_added(t, id, content, strlen(content), 1, 0);
}

// Rank files contain neither the pattern nor the special tokens; the number
// of ranks identifies the known files.
static inline Tokenizer* load_tiktoken(const char* path) {
    Tokenizer* t = tokenizer_new(path, split_pattern_by_name("cl100k"));
    t->ignore_merges = 1;
    read_ranks(t);
    merges_from_ranks(t);
    if (t->word_count >= 199998 && t->word_count <= 200000)
        fail("%s: the split pattern of o200k_base is not supported", path);
    if (t->word_count == 100256) { // cl100k_base
        add_special(t, 100257, "<|endoftext|>");
        add_special(t, 100258, "<|fim_prefix|>");
        add_special(t, 100259, "<|fim_middle|>");
        add_special(t, 100260, "<|fim_suffix|>");
        add_special(t, 100276, "<|endofprompt|>");
    } else if (t->word_count == 50256 || t->word_count == 50280) { // r50k_base (GPT-2), p50k_base
        t->pattern = split_pattern_by_name("gpt2");
        add_special(t, 50256, "<|endoftext|>");
    } else {
        add_special(t, t->size, "<|endoftext|>");
    }
    vocabulary_finish(t);
    return t;
}

// ----------------------------------------------------------------------------
// Any of these formats

static inline int path_ends_with(const char* path, const char* ending) {
    size_t length = strlen(path), tail = strlen(ending);
    return length >= tail && !strcmp(path + length - tail, ending);
}

// Loads a tokenizer. `path` is a tokenizer.json, a GPT-2 vocab.json or merges.txt (with the other
// file beside it), a .tiktoken file, or a directory that holds tokenizer.json or the GPT-2 files. An
// error in a file ends the program with one line.
static inline Tokenizer* tokenizer_load(const char* path) {
    static const char* const gpt2_names[2][2] = {{"vocab.json", "merges.txt"}, {"encoder.json", "vocab.bpe"}};
    char directory[PATH_MAX], vocabulary[PATH_MAX], merges[PATH_MAX], json[PATH_MAX];
    struct stat info;
    if (stat(path, &info) != 0) fail("%s: %s", path, strerror(errno));
    int is_directory = S_ISDIR(info.st_mode);
    const char* slash = strrchr(path, '/');
    const char* name = slash ? slash + 1 : path;
    path_format(directory, "%.*s", is_directory ? (int)strlen(path) : (int)(name - path), path);
    const char* between = is_directory ? "/" : "";
    path_format(json, "%s%stokenizer.json", directory, between);
    if (is_directory && path_exists(json)) return load_tokenizer_json(json);
    for (int i = 0; i < 2; i++) {
        path_format(vocabulary, "%s%s%s", directory, between, gpt2_names[i][0]);
        path_format(merges, "%s%s%s", directory, between, gpt2_names[i][1]);
        if (!strcmp(name, gpt2_names[i][0]) || !strcmp(name, gpt2_names[i][1]) ||
            (is_directory && path_exists(vocabulary)))
            return load_gpt2_files(vocabulary, merges);
    }
    if (is_directory) fail("%s: holds neither tokenizer.json nor vocab.json and merges.txt", path);
    if (path_ends_with(path, ".tiktoken")) return load_tiktoken(path);
    return load_tokenizer_json(path);
}

// ----------------------------------------------------------------------------
// Writing tokenizer.json

static inline void json_append(ByteBuffer* out, const char* text) {
    byte_buffer_append(out, text, strlen(text));
}

// Appends a JSON string. The bytes must be UTF-8.
static inline void json_append_string(ByteBuffer* out, const char* bytes, size_t length) {
    char escaped[8];
    json_append(out, "\"");
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c == '"' || c == '\\') snprintf(escaped, sizeof(escaped), "\\%c", c);
        else if (c < 0x20 || c == 0x7f) snprintf(escaped, sizeof(escaped), "\\u%04x", c);
        else snprintf(escaped, sizeof(escaped), "%c", c);
        json_append(out, escaped);
    }
    json_append(out, "\"");
}

// Writes a token's vocabulary key: a word in the byte alphabet, a token that is only an added token as it is.
static inline void vocabulary_key(const Tokenizer* t, const ByteAlphabet* alphabet, int32_t id,
                                  ByteBuffer* out) {
    out->count = 0;
    if (t->tokens[id].kind & TOKEN_WORD)
        byte_alphabet_encode(alphabet, vocabulary_bytes(t, id), t->tokens[id].length, out);
    else byte_buffer_append(out, vocabulary_bytes(t, id), t->tokens[id].length);
}

static inline void json_append_added(const Tokenizer* t, ByteBuffer* out) {
    const char* before = "\n";
    char number[32];
    json_append(out, "  \"added_tokens\": [");
    for (int32_t id = 0; id < t->size; id++) {
        const AddedToken* added = NULL;
        for (size_t a = 0; a < t->added_count && (t->tokens[id].kind & TOKEN_ADDED); a++)
            if (t->added[a].id == id) added = &t->added[a];
        if (!added) continue;
        snprintf(number, sizeof(number), "%s    {\"id\": %d", before, id);
        json_append(out, number);
        json_append(out, ", \"content\": ");
        json_append_string(out, vocabulary_bytes(t, id), t->tokens[id].length);
        json_append(out, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": ");
        json_append(out, added->normalized ? "true" : "false");
        json_append(out, added->special ? ", \"special\": true}" : ", \"special\": false}");
        before = ",\n";
    }
    json_append(out, t->added_count ? "\n  ],\n" : "],\n");
}

static inline void json_append_pre_tokenizer(const Tokenizer* t, ByteBuffer* out) {
    const char* regex = t->pattern->spellings[0];
    if (t->pattern == split_pattern_by_name("gpt2")) {
        json_append(out, "  \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
                         "\"trim_offsets\": true, \"use_regex\": true},\n");
        return;
    }
    json_append(out, "  \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [\n"
                     "    {\"type\": \"Split\", \"pattern\": {\"Regex\": ");
    json_append_string(out, regex, strlen(regex));
    json_append(out, "}, \"behavior\": \"Isolated\", \"invert\": false},\n"
                     "    {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
                     "\"use_regex\": false}\n  ]},\n");
}

static inline void json_append_vocabulary(const Tokenizer* t, const ByteAlphabet* alphabet, ByteBuffer* out) {
    ByteBuffer key = {NULL, 0, 0};
    const char* before = "\n";
    char number[32];
    json_append(out, "    \"vocab\": {");
    for (int32_t id = 0; id < t->size; id++) {
        if (t->tokens[id].kind == TOKEN_NONE) continue;
        vocabulary_key(t, alphabet, id, &key);
        json_append(out, before);
        json_append(out, "      ");
        json_append_string(out, key.data, key.count);
        snprintf(number, sizeof(number), ": %d", id);
        json_append(out, number);
        before = ",\n";
    }
    json_append(out, "\n    },\n");
    byte_buffer_free(&key);
}

// Writes "left right", not ["left", "right"]: every version of `tokenizers` reads it, and keys have no space.
static inline void json_append_merges(const Tokenizer* t, const ByteAlphabet* alphabet, ByteBuffer* out) {
    ByteBuffer key = {NULL, 0, 0}, line = {NULL, 0, 0};
    json_append(out, "    \"merges\": [");
    for (size_t m = 0; m < t->merge_count; m++) {
        vocabulary_key(t, alphabet, t->merges[m].left, &line);
        vocabulary_key(t, alphabet, t->merges[m].right, &key);
        json_append(&line, " ");
        byte_buffer_append(&line, key.data, key.count);
        json_append(out, m ? ",\n      " : "\n      ");
        json_append_string(out, line.data, line.count);
    }
    json_append(out, t->merge_count ? "\n    ]\n" : "]\n");
    byte_buffer_free(&key);
    byte_buffer_free(&line);
}

// Appends the whole tokenizer.json to *out.
static inline void tokenizer_to_json(const Tokenizer* t, ByteBuffer* out) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    json_append(out, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n");
    json_append_added(t, out);
    json_append(out, "  \"normalizer\": null,\n");
    json_append_pre_tokenizer(t, out);
    json_append(
        out, "  \"post_processor\": null,\n"
             "  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": true, "
             "\"use_regex\": true},\n"
             "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
             "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n"
             "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": ");
    json_append(out, t->ignore_merges ? "true,\n" : "false,\n");
    json_append_vocabulary(t, &alphabet, out);
    json_append_merges(t, &alphabet, out);
    json_append(out, "  }\n}\n");
}

// Writes into a file that the caller has opened, for example in a checkpoint directory.
static inline void tokenizer_write_json(const Tokenizer* t, FILE* file, const char* path) {
    ByteBuffer text = {NULL, 0, 0};
    tokenizer_to_json(t, &text);
    write_or_fail(text.data, text.count, file, path);
    byte_buffer_free(&text);
}

// Writes the file completely or not at all, and makes the directories above it.
static inline void tokenizer_save_json(const Tokenizer* t, const char* path) {
    OutputFile output;
    output_file_open(&output, path);
    tokenizer_write_json(t, output.file, path);
    output_file_close(&output);
}

#endif
