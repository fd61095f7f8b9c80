// A trainer whose flags are chosen when it is linked: the words that ATTN, GQA and KCONV are, in the place of constants.
#ifndef TEST_VARIANT_H
#define TEST_VARIANT_H

extern const char variant_attn[], variant_gqa[];
extern const int variant_kconv;

#endif
