// Declares ATTN, GQA and KCONV as variables instead of constants, so that linking chooses a trainer's flags.
#ifndef TEST_VARIANT_H
#define TEST_VARIANT_H

extern const char variant_attn[], variant_gqa[];
extern const int variant_kconv;

#endif
