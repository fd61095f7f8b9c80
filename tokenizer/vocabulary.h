/*
The data of a byte-level BPE tokenizer: tokens, merges, added tokens, pattern.

A loader or the training fills it (tokenizer_new, vocabulary_add_token, vocabulary_add_merge,
vocabulary_add_added). vocabulary_finish checks the conditions that encoding needs. After that the data never
change, so any number of threads may read them.
*/
#ifndef TOKENIZER_VOCABULARY_H
#define TOKENIZER_VOCABULARY_H

#include "runtime/checks.h"  // fail, malloc_or_fail
#include "tokenizer/split.h" // SplitPattern

// ----------------------------------------------------------------------------
// Growing arrays

typedef struct {
    char* data;
    size_t count, capacity;
} ByteBuffer;

typedef struct {
    int32_t* ids;
    size_t count, capacity;
} TokenBuffer;

// Returns the array with room for `wanted` items of `size` bytes in all; it may have moved. When it grows, it
// at least doubles.
static inline void* array_reserve(void* array, size_t* capacity, size_t wanted, size_t size) {
    if (wanted <= *capacity) return array;
    *capacity = wanted > 2 * *capacity ? wanted : 2 * *capacity;
    return realloc_or_fail(array, *capacity * size, "an array of the tokenizer");
}

static inline void byte_buffer_append(ByteBuffer* buffer, const char* data, size_t bytes) {
    buffer->data = (char*)array_reserve(buffer->data, &buffer->capacity, buffer->count + bytes, 1);
    if (bytes) memcpy(buffer->data + buffer->count, data, bytes);
    buffer->count += bytes;
}

static inline void token_buffer_append(TokenBuffer* buffer, const int32_t* ids, size_t count) {
    buffer->ids =
        (int32_t*)array_reserve(buffer->ids, &buffer->capacity, buffer->count + count, sizeof(int32_t));
    for (size_t i = 0; i < count; i++) buffer->ids[buffer->count + i] = ids[i];
    buffer->count += count;
}

static inline void byte_buffer_free(ByteBuffer* buffer) {
    free(buffer->data);
    memset(buffer, 0, sizeof(*buffer));
}

static inline void token_buffer_free(TokenBuffer* buffer) {
    free(buffer->ids);
    memset(buffer, 0, sizeof(*buffer));
}

// ----------------------------------------------------------------------------
// Hashing, for tables in memory; these hashes are never written to a file

static inline uint64_t hash_mix(uint64_t a, uint64_t b) {
    uint64_t h = (a ^ 0x9e3779b97f4a7c15u) * (b | 1);
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ (h >> 29);
}

static inline uint64_t hash_bytes(const char* data, size_t bytes) {
    uint64_t hash = bytes * 0xff51afd7ed558ccdu, part;
    for (; bytes >= 8; data += 8, bytes -= 8) {
        memcpy(&part, data, 8);
        hash = hash_mix(hash ^ part, 0xc4ceb9fe1a85ec53u);
    }
    part = 0;
    for (size_t i = 0; i < bytes; i++) part = part << 8 | (unsigned char)data[i];
    return hash_mix(hash ^ part, 0xc4ceb9fe1a85ec53u);
}

// ----------------------------------------------------------------------------
// The structure

// Files with a token id above this are refused as damaged: memory holds a table of all ids.
enum { VOCABULARY_MAX_ID = (1 << 24) - 1 };

typedef enum {
    TOKEN_NONE = 0,  // no token has this id: vocabularies may have unused ids
    TOKEN_WORD = 1,  // bytes that merges may produce
    TOKEN_ADDED = 2, // matched as a whole in the text before splitting; never produced by merges
    TOKEN_BOTH = 3
} TokenKind;

typedef struct {
    size_t offset; // of its bytes, in text
    uint32_t length;
    int kind; // TokenKind
} Token;

typedef struct {
    int32_t left, right, result;
    uint32_t rank; // the lowest merges first; equal ranks have equal results, and the leftmost merges first
} Merge;

typedef struct {
    int32_t id;
    int special;    // 1: matched only if the caller allows special tokens; 0: always
    int normalized; // 1: matched in a second pass, in the text between the matches of the first pass
} AddedToken;

typedef struct {
    uint64_t pair; // left << 32 | right, or UINT64_MAX in an empty slot
    uint32_t rank;
    int32_t result;
} MergeSlot;

typedef struct TokenizerEncoder TokenizerEncoder;

typedef struct {
    const char* origin; // the file, for messages
    const SplitPattern* pattern;
    int ignore_merges; // 1: a word that is a token is encoded as that token, without the merges
    ByteBuffer text;   // the bytes of all tokens, one after the other
    Token* tokens;     // (size)
    int32_t size;      // highest id + 1
    size_t token_capacity;
    int32_t* token_slots; // hash table from bytes to id, for TOKEN_WORD; -1: empty; a power of two of slots
    size_t token_slot_count, word_count;
    Merge* merges; // in order of rank
    size_t merge_count, merge_capacity;
    MergeSlot* merge_slots; // hash table of the merges; its size is a power of two, at most half full
    size_t merge_slot_count;
    AddedToken* added; // longest first
    size_t added_count, added_capacity;
    int32_t byte_ids[256];     // the tokens of one byte; all exist, so any byte string can be encoded
    uint32_t fingerprint;      // 31 bits, not 0
    TokenizerEncoder* encoder; // the one that tokenizer_encode uses
} Tokenizer;

// ----------------------------------------------------------------------------
// Tokens

static inline Tokenizer* tokenizer_new(const char* origin, const SplitPattern* pattern) {
    Tokenizer* t = (Tokenizer*)calloc_or_fail(1, sizeof(Tokenizer), "the tokenizer");
    char* name = (char*)malloc_or_fail(strlen(origin) + 1, "the tokenizer");
    t->origin = strcpy(name, origin);
    t->pattern = pattern;
    for (int b = 0; b < 256; b++) t->byte_ids[b] = -1;
    return t;
}

static inline const char* vocabulary_bytes(const Tokenizer* t, int32_t id) {
    return t->text.data + t->tokens[id].offset;
}

// The slot of these bytes, or the free slot for them.
static inline size_t vocabulary_slot(const Tokenizer* t, const char* bytes, size_t length) {
    size_t slot = hash_bytes(bytes, length) & (t->token_slot_count - 1);
    for (;; slot = (slot + 1) & (t->token_slot_count - 1)) {
        int32_t id = t->token_slots[slot];
        if (id < 0) return slot;
        if (t->tokens[id].length == length && !memcmp(vocabulary_bytes(t, id), bytes, length)) return slot;
    }
}

// The TOKEN_WORD with these bytes, or -1.
static inline int32_t vocabulary_find(const Tokenizer* t, const char* bytes, size_t length) {
    return t->token_slot_count ? t->token_slots[vocabulary_slot(t, bytes, length)] : -1;
}

static inline void vocabulary_grow_slots(Tokenizer* t) {
    if (2 * (t->word_count + 1) <= t->token_slot_count) return;
    t->token_slot_count = t->token_slot_count ? 2 * t->token_slot_count : 1024;
    free(t->token_slots);
    t->token_slots = (int32_t*)malloc_or_fail(t->token_slot_count * sizeof(int32_t), "the vocabulary");
    for (size_t s = 0; s < t->token_slot_count; s++) t->token_slots[s] = -1;
    for (int32_t id = 0; id < t->size; id++)
        if (t->tokens[id].kind & TOKEN_WORD)
            t->token_slots[vocabulary_slot(t, vocabulary_bytes(t, id), t->tokens[id].length)] = id;
}

// Gives `id` these bytes. The id must be free; a TOKEN_WORD's bytes must be new.
static inline void vocabulary_add_token(Tokenizer* t, int64_t id, const char* bytes, size_t length,
                                        TokenKind kind) {
    if (id < 0 || id > VOCABULARY_MAX_ID)
        fail("%s: token id %lld is not between 0 and %d", t->origin, (long long)id, VOCABULARY_MAX_ID);
    if (length == 0) fail("%s: token %lld is empty", t->origin, (long long)id);
    if (length > INT32_MAX) fail("%s: token %lld is too long", t->origin, (long long)id);
    if (id >= t->size) {
        t->tokens = (Token*)array_reserve(t->tokens, &t->token_capacity, (size_t)id + 1, sizeof(Token));
        memset(t->tokens + t->size, 0, (size_t)(id + 1 - t->size) * sizeof(Token));
        t->size = (int32_t)id + 1;
    }
    if (t->tokens[id].kind != TOKEN_NONE) fail("%s: two tokens have the id %lld", t->origin, (long long)id);
    if (kind & TOKEN_WORD) {
        vocabulary_grow_slots(t);
        size_t slot = vocabulary_slot(t, bytes, length);
        if (t->token_slots[slot] >= 0)
            fail("%s: the ids %d and %lld have the same bytes", t->origin, t->token_slots[slot],
                 (long long)id);
        t->token_slots[slot] = (int32_t)id;
        t->word_count++;
        if (length == 1) t->byte_ids[(unsigned char)bytes[0]] = (int32_t)id;
    }
    Token token = {t->text.count, (uint32_t)length, (int)kind};
    t->tokens[id] = token;
    byte_buffer_append(&t->text, bytes, length);
}

// Whether the bytes are their own key in the byte alphabet of vocab.json.
static inline int is_printable_ascii(const char* bytes, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (bytes[i] < 33 || bytes[i] > 126) return 0;
    return 1;
}

// Adds a token that is matched in the text before splitting. If the id has a token already, it must have the
// same bytes and the same key, since Hugging Face compares keys.
static inline void vocabulary_add_added(Tokenizer* t, int64_t id, const char* bytes, size_t length,
                                        int special, int normalized) {
    for (size_t a = 0; a < t->added_count; a++)
        if (t->tokens[t->added[a].id].length == length &&
            !memcmp(vocabulary_bytes(t, t->added[a].id), bytes, length))
            fail("%s: the added token \"%.*s\" is listed twice", t->origin, (int)length, bytes);
    int32_t word = is_printable_ascii(bytes, length) ? vocabulary_find(t, bytes, length) : -1;
    if (word >= 0 && word != id)
        fail("%s: the added token \"%.*s\" has the id %d in the vocabulary, not %lld", t->origin, (int)length,
             bytes, word, (long long)id);
    int taken = id >= 0 && id < t->size && t->tokens[id].kind != TOKEN_NONE;
    if (!taken) vocabulary_add_token(t, id, bytes, length, TOKEN_ADDED);
    else if (t->tokens[id].length != length || memcmp(vocabulary_bytes(t, (int32_t)id), bytes, length) != 0 ||
             !is_printable_ascii(bytes, length))
        fail("%s: the added token \"%.*s\" has the id %lld of another token", t->origin, (int)length, bytes,
             (long long)id);
    t->tokens[id].kind |= TOKEN_ADDED;
    AddedToken added = {(int32_t)id, special, normalized};
    t->added =
        (AddedToken*)array_reserve(t->added, &t->added_capacity, t->added_count + 1, sizeof(AddedToken));
    size_t place = t->added_count++;
    for (; place > 0 && t->tokens[t->added[place - 1].id].length < length; place--)
        t->added[place] = t->added[place - 1];
    t->added[place] = added;
}

// ----------------------------------------------------------------------------
// Merges

static inline uint64_t merge_pair(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static inline void vocabulary_add_merge(Tokenizer* t, int32_t left, int32_t right, int32_t result,
                                        uint32_t rank) {
    t->merges = (Merge*)array_reserve(t->merges, &t->merge_capacity, t->merge_count + 1, sizeof(Merge));
    Merge merge = {left, right, result, rank};
    t->merges[t->merge_count++] = merge;
}

// Finds the merge of two neighbours, or NULL.
static inline const MergeSlot* vocabulary_merge(const Tokenizer* t, int32_t left, int32_t right) {
    uint64_t pair = merge_pair(left, right);
    size_t slot = hash_mix(pair, 0xc4ceb9fe1a85ec53u) & (t->merge_slot_count - 1);
    for (; t->merge_slots[slot].pair != UINT64_MAX; slot = (slot + 1) & (t->merge_slot_count - 1))
        if (t->merge_slots[slot].pair == pair) return &t->merge_slots[slot];
    return NULL;
}

static inline void vocabulary_index_merges(Tokenizer* t) {
    t->merge_slot_count = 16;
    while (t->merge_slot_count < 2 * t->merge_count) t->merge_slot_count *= 2;
    t->merge_slots = (MergeSlot*)malloc_or_fail(t->merge_slot_count * sizeof(MergeSlot), "the merges");
    for (size_t s = 0; s < t->merge_slot_count; s++) t->merge_slots[s].pair = UINT64_MAX;
    for (size_t m = 0; m < t->merge_count; m++) {
        const Merge* merge = &t->merges[m];
        if (vocabulary_merge(t, merge->left, merge->right))
            fail("%s: merge %zu, of the tokens %d and %d, is there twice", t->origin, m, merge->left,
                 merge->right);
        MergeSlot filled = {merge_pair(merge->left, merge->right), merge->rank, merge->result};
        size_t slot = hash_mix(filled.pair, 0xc4ceb9fe1a85ec53u) & (t->merge_slot_count - 1);
        while (t->merge_slots[slot].pair != UINT64_MAX) slot = (slot + 1) & (t->merge_slot_count - 1);
        t->merge_slots[slot] = filled;
    }
}

// ----------------------------------------------------------------------------
// Closing

// FNV-1a, byte by byte, so that the hash is the same on every machine: token shards contain it.
static inline uint64_t fingerprint_add(uint64_t hash, const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ ((const unsigned char*)data)[i]) * 0x100000001b3u;
    return hash;
}

static inline uint64_t fingerprint_add_number(uint64_t hash, int64_t number) {
    for (int shift = 0; shift < 64; shift += 8) {
        unsigned char byte = (unsigned char)((uint64_t)number >> shift);
        hash = fingerprint_add(hash, &byte, 1);
    }
    return hash;
}

static inline uint32_t vocabulary_fingerprint(const Tokenizer* t) {
    uint64_t hash = fingerprint_add(0xcbf29ce484222325u, t->pattern->name, strlen(t->pattern->name));
    hash = fingerprint_add_number(hash, t->ignore_merges);
    for (int32_t id = 0; id < t->size; id++) {
        hash = fingerprint_add_number(hash, (t->tokens[id].kind & TOKEN_ADDED) != 0);
        hash = fingerprint_add_number(hash, t->tokens[id].length);
        hash = fingerprint_add(hash, vocabulary_bytes(t, id), t->tokens[id].length);
    }
    for (size_t m = 0; m < t->merge_count; m++)
        hash = fingerprint_add_number(hash, (int64_t)merge_pair(t->merges[m].left, t->merges[m].right));
    uint32_t folded = (uint32_t)(hash ^ (hash >> 31)) & 0x7fffffffu;
    return folded ? folded : 1;
}

// Checks the tokens, builds the table of merges and computes the fingerprint.
static inline void vocabulary_finish(Tokenizer* t) {
    for (int b = 0; b < 256; b++)
        if (t->byte_ids[b] < 0)
            fail("%s: no token is the single byte 0x%02x: a byte-level vocabulary has all 256", t->origin, b);
    vocabulary_index_merges(t);
    t->fingerprint = vocabulary_fingerprint(t);
}

#endif
