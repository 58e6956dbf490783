/* The backward pass in bfloat16 with products of vectors. */
#ifndef LONGSPAN_WITHOUT_BF16
#define PRODUCTS "unit_dot.inc"
#include "bf16_backward.inc"
#endif
