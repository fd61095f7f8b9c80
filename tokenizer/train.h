/*
Training of a tokenizer: from the words of a text, with their counts, to merges.

    WordCounts counts;
    word_counts_init(&counts);
    word_counts_add_text(&counts, &splitter, text, bytes);   // once for each document
    TokenizerTraining training = {8192, 2, specials, 1, NULL};
    Tokenizer* t = tokenizer_train(&counts, split_pattern_by_name("cl100k"), &training);

The most frequent pair of neighbours merges first; of equally frequent pairs the one with the smaller left id,
then the smaller right id. Nothing else decides, so the result does not depend on the order of the words or on
the number of threads that counted them. Ids: first the 256 bytes in GPT-2's order, then the merges in their
order, then the special tokens. Hugging Face's trainer merges the same pairs in the same order.
*/
#ifndef TOKENIZER_TRAIN_H
#define TOKENIZER_TRAIN_H

#include "tokenizer/encode.h"  // Heap
#include "tokenizer/formats.h" // ByteAlphabet: the order of the first 256 ids

#include <assert.h>

// ----------------------------------------------------------------------------
// Counting words

typedef struct {
    size_t offset; // of its bytes, in text
    uint32_t length;
    uint64_t hash;
    int64_t count;
} CountedWord;

typedef struct {
    ByteBuffer text;
    CountedWord* words;
    size_t count, capacity;
    uint32_t* slots; // hash table: index of a word + 1, or 0; a power of two, at most half full
    size_t slot_count;
} WordCounts;

static inline void word_counts_init(WordCounts* counts) { memset(counts, 0, sizeof(*counts)); }

static inline void word_counts_free(WordCounts* counts) {
    byte_buffer_free(&counts->text);
    free(counts->words);
    free(counts->slots);
    word_counts_init(counts);
}

static inline void word_counts_grow_slots(WordCounts* counts) {
    if (2 * (counts->count + 1) <= counts->slot_count) return;
    counts->slot_count = counts->slot_count ? 2 * counts->slot_count : 1 << 12;
    free(counts->slots);
    counts->slots = (uint32_t*)calloc_or_fail(counts->slot_count, sizeof(uint32_t), "the counts of words");
    for (size_t w = 0; w < counts->count; w++) {
        size_t slot = counts->words[w].hash & (counts->slot_count - 1);
        while (counts->slots[slot]) slot = (slot + 1) & (counts->slot_count - 1);
        counts->slots[slot] = (uint32_t)(w + 1);
    }
}

static inline void word_counts_add(WordCounts* counts, const char* word, size_t length, int64_t times) {
    if (length >= INT32_MAX || counts->count >= UINT32_MAX - 1)
        fail("too many or too long words to train on");
    word_counts_grow_slots(counts);
    uint64_t hash = hash_bytes(word, length);
    size_t slot = hash & (counts->slot_count - 1);
    for (; counts->slots[slot]; slot = (slot + 1) & (counts->slot_count - 1)) {
        assert(counts->words && counts->text.data);
        CountedWord* known = &counts->words[counts->slots[slot] - 1];
        if (known->hash != hash || known->length != length) continue;
        if (memcmp(counts->text.data + known->offset, word, length) != 0) continue;
        known->count += times;
        return;
    }
    CountedWord added = {counts->text.count, (uint32_t)length, hash, times};
    counts->words =
        (CountedWord*)array_reserve(counts->words, &counts->capacity, counts->count + 1, sizeof(CountedWord));
    counts->words[counts->count++] = added;
    counts->slots[slot] = (uint32_t)counts->count;
    byte_buffer_append(&counts->text, word, length);
}

// Counts the words of one document. Each thread has its own splitter and its own counts.
static inline void word_counts_add_text(WordCounts* counts, WordSplitter* splitter, const char* text,
                                        size_t bytes) {
    const char* word;
    size_t length;
    word_splitter_begin(splitter, text, bytes);
    while (word_splitter_next(splitter, &word, &length)) word_counts_add(counts, word, length, 1);
}

static inline void word_counts_add_counts(WordCounts* counts, const WordCounts* others) {
    for (size_t w = 0; w < others->count; w++)
        word_counts_add(counts, others->text.data + others->words[w].offset, others->words[w].length,
                        others->words[w].count);
}

// ----------------------------------------------------------------------------
// Pairs of neighbours

typedef struct {
    uint64_t pair; // left << 32 | right
    int64_t count;
    uint32_t* words; // all words that may contain the pair; some may no longer, some are listed twice
    size_t word_count, word_capacity;
    int closed;  // 1: merged or refused; it never goes on the heap again
    int touched; // 1: its count has grown since it was put on the heap
} TrainPair;

typedef struct {
    Tokenizer* tokenizer;
    const WordCounts* counts;
    int32_t* symbols;  // of all words; word w starts at the offset of its bytes in counts->text
    uint32_t* lengths; // (words) the number of symbols that each word has left
    TrainPair* pairs;
    size_t pair_count, pair_capacity;
    uint32_t* slots; // hash table: index of a pair + 1, or 0
    size_t slot_count;
    Heap heap;         // first: ~count, second: the pair; trainer_next() corrects outdated counts
    uint32_t* touched; // pairs to put on the heap after this merge
    size_t touched_count, touched_capacity;
} Trainer;

static inline void trainer_grow_slots(Trainer* trainer) {
    if (2 * (trainer->pair_count + 1) <= trainer->slot_count) return;
    trainer->slot_count = trainer->slot_count ? 2 * trainer->slot_count : 1 << 16;
    free(trainer->slots);
    trainer->slots =
        (uint32_t*)calloc_or_fail(trainer->slot_count, sizeof(uint32_t), "the pairs of training");
    for (size_t p = 0; p < trainer->pair_count; p++) {
        size_t slot = hash_mix(trainer->pairs[p].pair, 1) & (trainer->slot_count - 1);
        while (trainer->slots[slot]) slot = (slot + 1) & (trainer->slot_count - 1);
        trainer->slots[slot] = (uint32_t)(p + 1);
    }
}

static inline TrainPair* trainer_pair(Trainer* trainer, uint64_t pair) {
    trainer_grow_slots(trainer);
    size_t slot = hash_mix(pair, 1) & (trainer->slot_count - 1);
    for (; trainer->slots[slot]; slot = (slot + 1) & (trainer->slot_count - 1))
        if (trainer->pairs[trainer->slots[slot] - 1].pair == pair)
            return &trainer->pairs[trainer->slots[slot] - 1];
    trainer->pairs = (TrainPair*)array_reserve(trainer->pairs, &trainer->pair_capacity,
                                               trainer->pair_count + 1, sizeof(TrainPair));
    TrainPair* added = &trainer->pairs[trainer->pair_count++];
    memset(added, 0, sizeof(*added));
    added->pair = pair;
    trainer->slots[slot] = (uint32_t)trainer->pair_count;
    return added;
}

// Adds `times` (may be negative) to the count of a pair of neighbours in `word`.
static inline void trainer_change(Trainer* trainer, int32_t left, int32_t right, uint32_t word,
                                  int64_t times) {
    TrainPair* pair = trainer_pair(trainer, merge_pair(left, right));
    pair->count += times;
    if (times < 0) return;
    if (pair->word_count == 0 || pair->words[pair->word_count - 1] != word) {
        pair->words = (uint32_t*)array_reserve(pair->words, &pair->word_capacity, pair->word_count + 1,
                                               sizeof(uint32_t));
        pair->words[pair->word_count++] = word;
    }
    if (pair->touched || pair->closed) return;
    pair->touched = 1;
    trainer->touched = (uint32_t*)array_reserve(trainer->touched, &trainer->touched_capacity,
                                                trainer->touched_count + 1, sizeof(uint32_t));
    trainer->touched[trainer->touched_count++] = (uint32_t)(pair - trainer->pairs);
}

static inline void trainer_push_touched(Trainer* trainer) {
    for (size_t i = 0; i < trainer->touched_count; i++) {
        TrainPair* pair = &trainer->pairs[trainer->touched[i]];
        pair->touched = 0;
        if (pair->count > 0) heap_push(&trainer->heap, ~(uint64_t)pair->count, pair->pair);
    }
    trainer->touched_count = 0;
}

// ----------------------------------------------------------------------------
// Merging

static inline void trainer_init(Trainer* trainer, Tokenizer* t, const WordCounts* counts) {
    memset(trainer, 0, sizeof(*trainer));
    trainer->tokenizer = t;
    trainer->counts = counts;
    trainer->symbols =
        (int32_t*)malloc_or_fail(counts->text.count * sizeof(int32_t), "the words of training");
    trainer->lengths = (uint32_t*)malloc_or_fail(counts->count * sizeof(uint32_t), "the words of training");
    for (size_t i = 0; i < counts->text.count; i++)
        trainer->symbols[i] = t->byte_ids[(unsigned char)counts->text.data[i]];
    for (size_t w = 0; w < counts->count; w++) {
        const CountedWord* word = &counts->words[w];
        const int32_t* symbols = trainer->symbols + word->offset;
        trainer->lengths[w] = word->length;
        for (uint32_t i = 0; i + 1 < word->length; i++)
            trainer_change(trainer, symbols[i], symbols[i + 1], (uint32_t)w, word->count);
    }
    trainer_push_touched(trainer);
}

static inline void trainer_free(Trainer* trainer) {
    for (size_t p = 0; p < trainer->pair_count; p++) free(trainer->pairs[p].words);
    free(trainer->pairs);
    free(trainer->slots);
    free(trainer->symbols);
    free(trainer->lengths);
    free(trainer->heap.items);
    free(trainer->touched);
}

// Replaces the pair in one word, from left to right, and updates the counts of the neighbouring pairs.
static inline void trainer_merge_word(Trainer* trainer, uint32_t w, int32_t left, int32_t right,
                                      int32_t result) {
    int32_t* symbols = trainer->symbols + trainer->counts->words[w].offset;
    int64_t times = trainer->counts->words[w].count;
    uint32_t length = trainer->lengths[w], kept = 0;
    for (uint32_t i = 0; i < length; i++, kept++) {
        if (symbols[i] != left || i + 1 == length || symbols[i + 1] != right) {
            symbols[kept] = symbols[i];
            continue;
        }
        if (kept > 0) {
            trainer_change(trainer, symbols[kept - 1], left, w, -times);
            trainer_change(trainer, symbols[kept - 1], result, w, times);
        }
        if (i + 2 < length) {
            trainer_change(trainer, right, symbols[i + 2], w, -times);
            trainer_change(trainer, result, symbols[i + 2], w, times);
        }
        symbols[kept] = result;
        i++;
    }
    trainer->lengths[w] = kept;
}

// Returns the pair to merge next, and closes it; NULL if no pair with at least min_count is left.
static inline TrainPair* trainer_next(Trainer* trainer, int64_t min_count) {
    while (trainer->heap.count > 0) {
        HeapItem item = heap_pop(&trainer->heap);
        TrainPair* pair = trainer_pair(trainer, item.second);
        if (pair->closed) continue;
        if ((uint64_t)pair->count != ~item.first) { // outdated: smaller now; or larger, with a newer item
            if (pair->count > 0) heap_push(&trainer->heap, ~(uint64_t)pair->count, pair->pair);
            continue;
        }
        if (pair->count < min_count) return NULL;
        pair->closed = 1;
        return pair;
    }
    return NULL;
}

// Adds the token and its merge to the vocabulary, and applies the merge to all words.
static inline void trainer_merge(Trainer* trainer, TrainPair* pair, const char* bytes, size_t length) {
    Tokenizer* t = trainer->tokenizer;
    int32_t left = (int32_t)(pair->pair >> 32), right = (int32_t)(uint32_t)pair->pair, result = t->size;
    uint32_t* words = pair->words; // a copy: the table of pairs may move while it grows
    size_t word_count = pair->word_count;
    pair->words = NULL;
    pair->word_count = pair->word_capacity = 0;
    vocabulary_add_token(t, result, bytes, length, TOKEN_WORD);
    vocabulary_add_merge(t, left, right, result, (uint32_t)t->merge_count);
    for (size_t i = 0; i < word_count; i++) trainer_merge_word(trainer, words[i], left, right, result);
    free(words);
    trainer_push_touched(trainer);
}

// ----------------------------------------------------------------------------
// The whole training

typedef struct {
    int32_t vocab_size; // with the 256 bytes and the special tokens
    int64_t min_count;  // pairs with a smaller count do not merge; the vocabulary may then stay smaller
    const char* const* specials; // (special_count)
    int special_count;
    void (*progress)(int64_t merges, int64_t wanted); // may be NULL
} TokenizerTraining;

static inline int is_special_text(const TokenizerTraining* training, const ByteBuffer* bytes) {
    for (int s = 0; s < training->special_count; s++)
        if (strlen(training->specials[s]) == bytes->count &&
            !memcmp(training->specials[s], bytes->data, bytes->count))
            return 1;
    return 0;
}

// Trains a tokenizer. Special tokens must be UTF-8 (as JSON is) of at least two bytes (one byte is a token
// already), and not a key of one of the 256 bytes. The caller has checked vocab_size >= 256 + special_count.
static inline Tokenizer* tokenizer_train(const WordCounts* counts, const SplitPattern* pattern,
                                         const TokenizerTraining* training) {
    Tokenizer* t = tokenizer_new("the trained tokenizer", pattern);
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    for (int i = 0; i < 256; i++) {
        char byte = (char)alphabet.ordered[i];
        vocabulary_add_token(t, i, &byte, 1, TOKEN_WORD);
    }
    Trainer trainer;
    trainer_init(&trainer, t, counts);
    ByteBuffer bytes = {NULL, 0, 0};
    int32_t wanted = training->vocab_size - training->special_count;
    while (t->size < wanted) {
        TrainPair* pair = trainer_next(&trainer, training->min_count > 1 ? training->min_count : 1);
        if (!pair) break;
        int32_t left = (int32_t)(pair->pair >> 32), right = (int32_t)(uint32_t)pair->pair;
        bytes.count = 0;
        byte_buffer_append(&bytes, vocabulary_bytes(t, left), t->tokens[left].length);
        byte_buffer_append(&bytes, vocabulary_bytes(t, right), t->tokens[right].length);
        // A word that spells a special token must not become it.
        if (is_special_text(training, &bytes)) continue;
        trainer_merge(&trainer, pair, bytes.data, bytes.count);
        if (training->progress) training->progress(t->size - 256, wanted - 256);
    }
    byte_buffer_free(&bytes);
    trainer_free(&trainer);
    for (int s = 0; s < training->special_count; s++) add_special(t, t->size, training->specials[s]);
    vocabulary_finish(t);
    return t;
}

#endif
