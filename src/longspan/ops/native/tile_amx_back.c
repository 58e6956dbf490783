/* The backward pass in bfloat16 with tile registers. */
#ifndef LONGSPAN_WITHOUT_AMX
#define PRODUCTS "unit_amx.inc"
#include "bf16_backward.inc"
#endif
