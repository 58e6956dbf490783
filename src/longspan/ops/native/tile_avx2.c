#include "lanes_avx2.h"
#include "tile.inc"
