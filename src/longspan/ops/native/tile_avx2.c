#include "lanes_avx2.h"
#define ROWS 4
#define VECTORS 3
#define KEY_ROWS 6
#define KEY_VECTORS 2
#include "tile.inc"
