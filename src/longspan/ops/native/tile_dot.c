/* bfloat16 with products of vectors: Cooper Lake, Zen 4 and later. */
#ifndef LONGSPAN_WITHOUT_BF16
#define PRODUCTS "unit_dot.inc"
#include "bf16_forward.inc"
#endif
