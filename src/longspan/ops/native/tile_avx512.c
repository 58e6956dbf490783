#include "lanes_avx512.h"
#include "tile.inc"
