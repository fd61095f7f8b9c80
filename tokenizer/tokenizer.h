/*
Byte-level BPE tokenizer: training, encoding, decoding, files.

    Tokenizer* t = tokenizer_load("tokenizer.json");  // or vocab.json + merges.txt, or cl100k_base.tiktoken
    TokenBuffer tokens = {NULL, 0, 0};
    // 0: encodes "<|endoftext|>" in the text as ordinary text; 1: as the special token
    tokenizer_encode(t, text, bytes, 0, &tokens);             // tokens.ids[0 .. tokens.count - 1]
    ByteBuffer again = {NULL, 0, 0};
    tokenizer_decode(t, tokens.ids, tokens.count, &again);    // again.data[0 .. again.count - 1] is the text
    token_buffer_free(&tokens);
    byte_buffer_free(&again);
    tokenizer_free(t);

Decoding gives back the encoded bytes, for any byte string: the vocabulary has all 256 bytes, and text is not
normalised. The tokens are those of Hugging Face's `tokenizers`, encode(text, add_special_tokens=False), for
the same tokenizer.json; docs/tokenizer.md says how this was checked. tokenizer_load() refuses a tokenizer for
which this library cannot give the same tokens.

    split.h       from text to words
    vocabulary.h  tokens and merges in memory
    encode.h      from words to tokens; tokenizer_encode, tokenizer_decode; an encoder for each thread
    formats.h     files; tokenizer_load, tokenizer_save_json
    train.h       WordCounts, tokenizer_train

Errors end the program through fail() of runtime/checks.h. Link with -lpcre2-8 -lcjson -lm.
*/
#ifndef TOKENIZER_TOKENIZER_H
#define TOKENIZER_TOKENIZER_H

#include "tokenizer/split.h"      // SplitPattern, split_pattern_by_name
#include "tokenizer/vocabulary.h" // Tokenizer, TokenBuffer, ByteBuffer
#include "tokenizer/encode.h"     // tokenizer_encode, tokenizer_decode, tokenizer_token_bytes
#include "tokenizer/formats.h"    // tokenizer_load, tokenizer_save_json
#include "tokenizer/train.h"      // word_counts_add_text, tokenizer_train

static inline void tokenizer_free(Tokenizer* t) {
    if (!t) return;
    tokenizer_encoder_free(t->encoder);
    byte_buffer_free(&t->text);
    free((void*)t->origin);
    free(t->tokens);
    free(t->token_slots);
    free(t->merges);
    free(t->merge_slots);
    free(t->added);
    free(t);
}

// Highest token id + 1: the rows that an embedding table needs. Some vocabularies have unused ids.
static inline int32_t tokenizer_vocab_size(const Tokenizer* t) { return t->size; }

// A fingerprint of pattern, tokens and merges, from 1 to 2^31 - 1. Shards contain it, so that a model never
// reads text that another tokenizer has encoded.
static inline uint32_t tokenizer_hash(const Tokenizer* t) { return t->fingerprint; }

// Returns the id of the added token with this text (special or not), or -1 if there is none.
static inline int32_t tokenizer_special_id(const Tokenizer* t, const char* content) {
    size_t length = strlen(content);
    for (size_t a = 0; a < t->added_count; a++)
        if (t->tokens[t->added[a].id].length == length &&
            !memcmp(vocabulary_bytes(t, t->added[a].id), content, length))
            return t->added[a].id;
    return -1;
}

#endif
