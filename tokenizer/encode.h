/*
From words to tokens and back: the second half of a byte-level BPE tokenizer. split.h is the first half.

A word starts as its bytes. As long as two neighbours can merge, the pair with the lowest rank merges; of
equal ranks the leftmost pair (Sennrich et al. 2016, arXiv:1508.07909, in the order of Hugging Face's
`tokenizers`). A heap holds the candidates, so a word of n bytes takes O(n log n) time. A cache holds words
seen before.
*/
#ifndef TOKENIZER_ENCODE_H
#define TOKENIZER_ENCODE_H

#include "tokenizer/vocabulary.h" // Tokenizer, TokenBuffer, ByteBuffer

// ----------------------------------------------------------------------------
// A heap, for encoding and for training

// heap_pop() returns the smallest (first, second).
typedef struct {
    uint64_t first, second;
} HeapItem;

typedef struct {
    HeapItem* items;
    size_t count, capacity;
} Heap;

static inline int heap_before(HeapItem a, HeapItem b) {
    return a.first != b.first ? a.first < b.first : a.second < b.second;
}

static inline void heap_push(Heap* heap, uint64_t first, uint64_t second) {
    heap->items = (HeapItem*)array_reserve(heap->items, &heap->capacity, heap->count + 1, sizeof(HeapItem));
    HeapItem item = {first, second};
    size_t at = heap->count++;
    for (; at > 0 && heap_before(item, heap->items[(at - 1) / 2]); at = (at - 1) / 2)
        heap->items[at] = heap->items[(at - 1) / 2];
    heap->items[at] = item;
}

// The heap must not be empty.
static inline HeapItem heap_pop(Heap* heap) {
    HeapItem top = heap->items[0], moved = heap->items[--heap->count];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= heap->count) break;
        if (child + 1 < heap->count && heap_before(heap->items[child + 1], heap->items[child])) child++;
        if (!heap_before(heap->items[child], moved)) break;
        heap->items[at] = heap->items[child];
        at = child;
    }
    heap->items[at] = moved;
    return top;
}

// ----------------------------------------------------------------------------
// The encoder: the data that one thread needs to encode

// One entry of the cache has 64 bytes, as the processor's cache lines. Longer
// words or encodings are not cached.
enum { CACHED_BYTES = 30, CACHED_TOKENS = 8, CACHE_LINES = 1 << 16 };

typedef struct {
    char word[CACHED_BYTES];
    uint8_t length; // 0: an empty entry
    uint8_t count;
    int32_t ids[CACHED_TOKENS];
} CachedWord;

typedef struct {
    int32_t id; // -1: merged into a symbol to its left
    int32_t previous, next;
} Symbol;

struct TokenizerEncoder {
    const Tokenizer* tokenizer;
    WordSplitter splitter;
    CachedWord* cache; // (CACHE_LINES), by hash; a newer word overwrites an older one
    Symbol* symbols;   // of the current word
    size_t symbol_capacity;
    Heap candidates;                 // first: rank << 32 | index of the left symbol; second: the pair
    unsigned char added_starts[256]; // 1: an added token starts with this byte
};

// Makes an encoder, for one thread; the tokenizer must outlive it.
static inline TokenizerEncoder* tokenizer_encoder_new(const Tokenizer* t) {
    TokenizerEncoder* encoder = (TokenizerEncoder*)calloc_or_fail(1, sizeof(TokenizerEncoder), "an encoder");
    encoder->tokenizer = t;
    word_splitter_init(&encoder->splitter, t->pattern);
    encoder->cache = (CachedWord*)calloc_or_fail(CACHE_LINES, sizeof(CachedWord), "the cache of words");
    for (size_t a = 0; a < t->added_count; a++)
        encoder->added_starts[(unsigned char)vocabulary_bytes(t, t->added[a].id)[0]] = 1;
    return encoder;
}

static inline void tokenizer_encoder_free(TokenizerEncoder* encoder) {
    if (!encoder) return;
    word_splitter_free(&encoder->splitter);
    free(encoder->cache);
    free(encoder->symbols);
    free(encoder->candidates.items);
    free(encoder);
}

// ----------------------------------------------------------------------------
// One word

static inline void encoder_push_candidate(TokenizerEncoder* encoder, int32_t left) {
    const Symbol* symbols = encoder->symbols;
    if (left < 0 || symbols[left].next < 0) return;
    int32_t right_id = symbols[symbols[left].next].id;
    const MergeSlot* merge = vocabulary_merge(encoder->tokenizer, symbols[left].id, right_id);
    if (!merge) return;
    heap_push(&encoder->candidates, (uint64_t)merge->rank << 32 | (uint32_t)left, merge->pair);
}

// Merges until nothing merges. The symbols stay in a linked list whose first element is index 0.
static inline void encoder_merge_word(TokenizerEncoder* encoder, const char* word, size_t length) {
    const Tokenizer* t = encoder->tokenizer;
    if (length >= INT32_MAX) fail("a word of %zu bytes is too long to encode", length);
    encoder->symbols =
        (Symbol*)array_reserve(encoder->symbols, &encoder->symbol_capacity, length, sizeof(Symbol));
    Symbol* symbols = encoder->symbols;
    for (int32_t i = 0; i < (int32_t)length; i++) {
        Symbol symbol = {t->byte_ids[(unsigned char)word[i]], i - 1, i + 1 < (int32_t)length ? i + 1 : -1};
        symbols[i] = symbol;
    }
    encoder->candidates.count = 0;
    for (int32_t i = 0; i < (int32_t)length; i++) encoder_push_candidate(encoder, i);
    while (encoder->candidates.count > 0) {
        HeapItem candidate = heap_pop(&encoder->candidates);
        int32_t left = (int32_t)(uint32_t)candidate.first, right = symbols[left].next;
        // A candidate is outdated if one of its symbols has merged with another neighbour meanwhile.
        if (symbols[left].id < 0 || right < 0) continue;
        if (merge_pair(symbols[left].id, symbols[right].id) != candidate.second) continue;
        symbols[left].id = vocabulary_merge(t, symbols[left].id, symbols[right].id)->result;
        symbols[left].next = symbols[right].next;
        symbols[right].id = -1;
        if (symbols[left].next >= 0) symbols[symbols[left].next].previous = left;
        encoder_push_candidate(encoder, symbols[left].previous);
        encoder_push_candidate(encoder, left);
    }
}

static inline void encoder_encode_uncached(TokenizerEncoder* encoder, const char* word, size_t length,
                                           TokenBuffer* out) {
    if (encoder->tokenizer->ignore_merges) {
        int32_t id = vocabulary_find(encoder->tokenizer, word, length);
        if (id >= 0) {
            token_buffer_append(out, &id, 1);
            return;
        }
    }
    encoder_merge_word(encoder, word, length);
    for (int32_t i = 0; i >= 0; i = encoder->symbols[i].next)
        token_buffer_append(out, &encoder->symbols[i].id, 1);
}

static inline void encoder_encode_word(TokenizerEncoder* encoder, const char* word, size_t length,
                                       TokenBuffer* out) {
    if (length > CACHED_BYTES) {
        encoder_encode_uncached(encoder, word, length, out);
        return;
    }
    CachedWord* line = &encoder->cache[hash_bytes(word, length) & (CACHE_LINES - 1)];
    if (line->length == length && !memcmp(line->word, word, length)) {
        token_buffer_append(out, line->ids, line->count);
        return;
    }
    size_t before = out->count;
    encoder_encode_uncached(encoder, word, length, out);
    size_t count = out->count - before;
    if (count > CACHED_TOKENS) return;
    memcpy(line->word, word, length);
    memcpy(line->ids, out->ids + before, count * sizeof(int32_t));
    line->length = (uint8_t)length;
    line->count = (uint8_t)count;
}

// ----------------------------------------------------------------------------
// A text

static inline void encoder_encode_plain(TokenizerEncoder* encoder, const char* text, size_t bytes,
                                        TokenBuffer* out) {
    const char* word;
    size_t length;
    word_splitter_begin(&encoder->splitter, text, bytes);
    while (word_splitter_next(&encoder->splitter, &word, &length))
        encoder_encode_word(encoder, word, length, out);
}

// The longest added token of this pass that the text starts with, or NULL.
static inline const AddedToken* encoder_match_added(const TokenizerEncoder* encoder, const char* text,
                                                    size_t bytes, int pass) {
    const Tokenizer* t = encoder->tokenizer;
    for (size_t a = 0; a < t->added_count; a++) { // longest first
        int32_t id = t->added[a].id;
        if (t->added[a].normalized == pass && t->tokens[id].length <= bytes &&
            !memcmp(text, vocabulary_bytes(t, id), t->tokens[id].length))
            return &t->added[a];
    }
    return NULL;
}

// Added tokens cut the text, in two passes as in Hugging Face's `tokenizers`. The
// text between them is encoded by itself.
static inline void encoder_encode_pass(TokenizerEncoder* encoder, const char* text, size_t bytes,
                                       int allow_special, int pass, TokenBuffer* out) {
    if (pass == 2 || bytes == 0) {
        encoder_encode_plain(encoder, text, bytes, out);
        return;
    }
    size_t start = 0, at = 0;
    while (at < bytes) {
        const AddedToken* added = NULL;
        if (encoder->added_starts[(unsigned char)text[at]])
            added = encoder_match_added(encoder, text + at, bytes - at, pass);
        if (!added) {
            at++;
            continue;
        }
        uint32_t length = encoder->tokenizer->tokens[added->id].length;
        if (allow_special || !added->special) { // otherwise it is plain text
            encoder_encode_pass(encoder, text + start, at - start, allow_special, pass + 1, out);
            token_buffer_append(out, &added->id, 1);
            start = at + length;
        }
        at += length;
    }
    encoder_encode_pass(encoder, text + start, bytes - start, allow_special, pass + 1, out);
}

// Appends the tokens of any byte string to *out and returns how many. With allow_special, text that spells a
// special token becomes that token.
static inline size_t tokenizer_encode_with(TokenizerEncoder* encoder, const char* text, size_t bytes,
                                           int allow_special, TokenBuffer* out) {
    size_t before = out->count;
    encoder_encode_pass(encoder, text, bytes, allow_special, 0, out);
    return out->count - before;
}

// The same with the tokenizer's own encoder: only one thread at a time may call it.
static inline size_t tokenizer_encode(Tokenizer* t, const char* text, size_t bytes, int allow_special,
                                      TokenBuffer* out) {
    if (!t->encoder) t->encoder = tokenizer_encoder_new(t);
    return tokenizer_encode_with(t->encoder, text, bytes, allow_special, out);
}

// ----------------------------------------------------------------------------
// Back to text

// The bytes of one token, without a closing 0, owned by the tokenizer; NULL if no token has this id.
static inline const char* tokenizer_token_bytes(const Tokenizer* t, int32_t id, size_t* length) {
    if (id < 0 || id >= t->size || t->tokens[id].kind == TOKEN_NONE) return NULL;
    *length = t->tokens[id].length;
    return vocabulary_bytes(t, id);
}

// Appends the bytes of the tokens to *out. An id that is no token ends the program.
static inline void tokenizer_decode(const Tokenizer* t, const int32_t* ids, size_t count, ByteBuffer* out) {
    for (size_t i = 0; i < count; i++) {
        size_t length;
        const char* bytes = tokenizer_token_bytes(t, ids[i], &length);
        if (!bytes)
            fail("token %zu is %d: %s has no token with that id (vocabulary size %d)", i, ids[i], t->origin,
                 t->size);
        byte_buffer_append(out, bytes, length);
    }
}

#endif
