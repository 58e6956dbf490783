#include "lanes_avx512.h"
/* Rows of a block of the products that broadcast keys: 8 x VECTORS sums stay in registers. */
#define ROWS 8
#define VECTORS 3
/* Rows and vectors of the product that gives rows of keys. */
#define KEY_ROWS 6
#define KEY_VECTORS 4
#include "tile.inc"
