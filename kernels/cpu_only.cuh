/*
What only DEVICE=cpu computes so far: block-sparse attention written plainly. The Makefile refuses ATTN=moba for other devices, so no
call below is ever reached; the names let one trainer be compiled for all.
*/
#ifndef KERNELS_CPU_ONLY_CUH
#define KERNELS_CPU_ONLY_CUH

#include "runtime/checks.h"

#define CPU_ONLY(type, name)                                                                                 \
    template <typename... Arguments> static inline type name(Arguments...) {                                 \
        fail(#name ": computed with DEVICE=cpu only");                                                       \
    }

CPU_ONLY(size_t, moba_forward_workspace)
CPU_ONLY(size_t, moba_backward_workspace)
CPU_ONLY(void, moba_forward)
CPU_ONLY(void, moba_backward)

#endif
