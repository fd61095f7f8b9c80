/*
From text to words: the first half of a byte-level BPE tokenizer.

A pattern cuts text into words, and merges never cross a word's border. Two patterns are known, by name:
"gpt2" (GPT-2) and "cl100k" (GPT-4, Llama 3). Text may be any bytes. Each longest run of bytes that are not
UTF-8 is one word, and the valid parts around it are split as if they were separate texts.

    WordSplitter splitter;
    word_splitter_init(&splitter, split_pattern_by_name("cl100k"));
    word_splitter_begin(&splitter, text, bytes);
    while (word_splitter_next(&splitter, &word, &length)) ...
    word_splitter_free(&splitter);

The words are those of Hugging Face's `tokenizers` 0.23, whose regular expressions have Unicode 16. PCRE2
10.42 has Unicode 14 and counts U+180E as a space. So the patterns write the character classes out: spaces
completely; letters and numbers as PCRE2's own class plus the ranges that are new between the two versions.
*/
#ifndef TOKENIZER_SPLIT_H
#define TOKENIZER_SPLIT_H

#include "runtime/checks.h" // fail

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

// ----------------------------------------------------------------------------
// UTF-8

// The length in bytes of the well-formed sequence at the start of `text`, or 0.
// Surrogates and overlong forms are not well-formed.
static inline int utf8_sequence_length(const char* text, size_t bytes) {
    const unsigned char* s = (const unsigned char*)text;
    if (bytes == 0) return 0;
    if (s[0] < 0x80) return 1;
    int length = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    if (s[0] < 0xc2 || s[0] > 0xf4 || bytes < (size_t)length) return 0;
    for (int i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if (s[0] == 0xe0 && s[1] < 0xa0) return 0; // overlong
    if (s[0] == 0xed && s[1] > 0x9f) return 0; // surrogates
    if (s[0] == 0xf0 && s[1] < 0x90) return 0; // overlong
    if (s[0] == 0xf4 && s[1] > 0x8f) return 0; // beyond U+10FFFF
    return length;
}

// The number of bytes from the start that are well-formed UTF-8.
static inline size_t utf8_valid_prefix(const char* text, size_t bytes) {
    size_t at = 0;
    while (at < bytes) {
        uint64_t eight;
        if (at + sizeof(eight) <= bytes) {
            memcpy(&eight, text + at, sizeof(eight));
            if (!(eight & 0x8080808080808080u)) { // eight ASCII characters at once
                at += sizeof(eight);
                continue;
            }
        }
        int length = utf8_sequence_length(text + at, bytes - at);
        if (length == 0) break;
        at += (size_t)length;
    }
    return at;
}

// ----------------------------------------------------------------------------
// The patterns

// Members of a PCRE2 character class. The ASCII members are also in \p{L}, but
// PCRE2 tests them faster, with one bitmap.
#define SPLIT_SPACE                                                                                          \
    "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define SPLIT_LETTER                                                                                         \
    "a-zA-Z\\p{L}\\x{1C89}\\x{1C8A}\\x{A7CB}-\\x{A7CD}\\x{A7DA}-\\x{A7DC}\\x{105C0}-\\x{105F3}"              \
    "\\x{10D4A}-\\x{10D65}\\x{10D6F}-\\x{10D85}\\x{10EC2}-\\x{10EC4}\\x{1123F}\\x{11240}"                    \
    "\\x{11380}-\\x{11389}\\x{1138B}\\x{1138E}\\x{11390}-\\x{113B5}\\x{113B7}\\x{113D1}\\x{113D3}"           \
    "\\x{11BC0}-\\x{11BE0}\\x{11F02}\\x{11F04}-\\x{11F10}\\x{11F12}-\\x{11F33}\\x{1342F}"                    \
    "\\x{13441}-\\x{13446}\\x{13460}-\\x{143FA}\\x{16100}-\\x{1611D}\\x{16D40}-\\x{16D6C}\\x{18CFF}"         \
    "\\x{1B132}\\x{1B155}\\x{1DF25}-\\x{1DF2A}\\x{1E030}-\\x{1E06D}\\x{1E4D0}-\\x{1E4EB}"                    \
    "\\x{1E5D0}-\\x{1E5ED}\\x{1E5F0}\\x{2B739}\\x{2EBF0}-\\x{2EE5D}\\x{31350}-\\x{323AF}"
#define SPLIT_NUMBER                                                                                         \
    "0-9\\p{N}\\x{10D40}-\\x{10D49}\\x{116D0}-\\x{116E3}\\x{11BF0}-\\x{11BF9}\\x{11F50}-\\x{11F59}"          \
    "\\x{16130}-\\x{16139}\\x{16D70}-\\x{16D79}\\x{1CCF0}-\\x{1CCF9}\\x{1D2C0}-\\x{1D2D3}"                   \
    "\\x{1E4F0}-\\x{1E4F9}\\x{1E5F1}-\\x{1E5FA}"

typedef struct {
    const char* name;         // in options and messages
    const char* pcre;         // for PCRE2; every character of any text belongs to some match
    const char* spellings[3]; // in tokenizer.json: the first is written, all are read; NULL ends the list
} SplitPattern;

enum { SPLIT_PATTERN_COUNT = 2 };

static inline const SplitPattern* split_pattern(int index) {
    static const SplitPattern patterns[SPLIT_PATTERN_COUNT] = {
        {"cl100k",
         "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n" SPLIT_LETTER SPLIT_NUMBER "]?[" SPLIT_LETTER
         "]+|[" SPLIT_NUMBER "]{1,3}| ?[^" SPLIT_SPACE SPLIT_LETTER SPLIT_NUMBER "]+[\\r\\n]*|[" SPLIT_SPACE
         "]*[\\r\\n]+|[" SPLIT_SPACE "]+(?![^" SPLIT_SPACE "])|[" SPLIT_SPACE "]+",
         {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
          "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
          "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
          "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*"
          "|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+",
          NULL}},
        {"gpt2",
         "'s|'t|'re|'ve|'m|'ll|'d| ?[" SPLIT_LETTER "]+| ?[" SPLIT_NUMBER
         "]+| ?[^" SPLIT_SPACE SPLIT_LETTER SPLIT_NUMBER "]+|[" SPLIT_SPACE "]+(?![^" SPLIT_SPACE
         "])|[" SPLIT_SPACE "]+",
         {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
          "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", NULL}},
    };
    return &patterns[index];
}

// Finds a pattern by its name; NULL if there is none.
static inline const SplitPattern* split_pattern_by_name(const char* name) {
    for (int i = 0; i < SPLIT_PATTERN_COUNT; i++)
        if (!strcmp(split_pattern(i)->name, name)) return split_pattern(i);
    return NULL;
}

// Finds the pattern of a regular expression in a tokenizer.json; NULL if it is not one
// that is known to split as Hugging Face does.
static inline const SplitPattern* split_pattern_by_spelling(const char* regex) {
    for (int i = 0; i < SPLIT_PATTERN_COUNT; i++)
        for (int s = 0; split_pattern(i)->spellings[s]; s++)
            if (!strcmp(split_pattern(i)->spellings[s], regex)) return split_pattern(i);
    return NULL;
}

// ----------------------------------------------------------------------------
// Splitting

// One thread's splitter and its place in the text.
typedef struct {
    pcre2_code* code;
    pcre2_match_data* match;
    pcre2_match_context* context;
    pcre2_jit_stack* stack;
    const char* at;        // the next word starts here
    const char* valid_end; // up to here the text is UTF-8
    const char* end;
} WordSplitter;

static inline void word_splitter_init(WordSplitter* splitter, const SplitPattern* pattern) {
    int error = 0;
    PCRE2_SIZE error_at = 0;
    memset(splitter, 0, sizeof(*splitter));
    splitter->code = pcre2_compile((PCRE2_SPTR)pattern->pcre, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                                   &error, &error_at, NULL);
    if (!splitter->code)
        fail("the pattern %s: PCRE2 refuses it: error %d at %zu (was PCRE2 built with Unicode?)",
             pattern->name, error, (size_t)error_at);
    (void)pcre2_jit_compile(splitter->code,
                            PCRE2_JIT_COMPLETE); // without a JIT: the same result, but slower
    splitter->match = pcre2_match_data_create(1, NULL);
    splitter->context = pcre2_match_context_create(NULL);
    splitter->stack = pcre2_jit_stack_create(32 << 10, 64 << 20, NULL);
    if (!splitter->match || !splitter->context) fail("out of memory for PCRE2");
    if (splitter->stack) pcre2_jit_stack_assign(splitter->context, NULL, splitter->stack);
    pcre2_set_match_limit(splitter->context, UINT32_MAX); // a word may be as long as the text
    pcre2_set_depth_limit(splitter->context, UINT32_MAX);
    pcre2_set_heap_limit(splitter->context, UINT32_MAX);
}

static inline void word_splitter_free(WordSplitter* splitter) {
    pcre2_jit_stack_free(splitter->stack);
    pcre2_match_context_free(splitter->context);
    pcre2_match_data_free(splitter->match);
    pcre2_code_free(splitter->code);
    memset(splitter, 0, sizeof(*splitter));
}

// Starts to split a text, which must not change until the last word_splitter_next().
static inline void word_splitter_begin(WordSplitter* splitter, const char* text, size_t bytes) {
    splitter->at = splitter->valid_end = text;
    splitter->end = text + bytes;
}

// Returns 1 and the next word, or 0 at the end. The words together are the whole text.
static inline int word_splitter_next(WordSplitter* splitter, const char** word, size_t* length) {
    if (splitter->at == splitter->end) return 0;
    *word = splitter->at;
    if (splitter->at == splitter->valid_end) {
        splitter->valid_end += utf8_valid_prefix(splitter->at, (size_t)(splitter->end - splitter->at));
        if (splitter->at == splitter->valid_end) {
            do splitter->at++;
            while (splitter->at < splitter->end &&
                   !utf8_sequence_length(splitter->at, (size_t)(splitter->end - splitter->at)));
            splitter->valid_end = splitter->at;
            *length = (size_t)(splitter->at - *word);
            return 1;
        }
    }
    // The patterns have no look-behind, so each word can be matched at the start of the remaining text.
    int matched =
        pcre2_match(splitter->code, (PCRE2_SPTR)splitter->at, (size_t)(splitter->valid_end - splitter->at), 0,
                    PCRE2_NO_UTF_CHECK, splitter->match, splitter->context);
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(splitter->match);
    if (matched < 0 || range[0] != 0 || range[1] == 0)
        fail("PCRE2 cannot split a text of %zu bytes: error %d", (size_t)(splitter->end - splitter->at),
             matched);
    *length = range[1];
    splitter->at += range[1];
    return 1;
}

#endif
