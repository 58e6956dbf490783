/* Tile registers (AMX) in plain C, included before the CPU kernel's own code: what that does with them
 * is tested where there are none.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* 16 rows of 64 bytes each. */
static _Thread_local uint8_t tile_register[8][16][64];

static inline void load_tile(int t, const void *from, int64_t step) {
    for (int r = 0; r < 16; r++) memcpy(tile_register[t][r], (const char *)from + r * step, 64);
}

static inline void store_tile(int t, void *to, int64_t step) {
    for (int r = 0; r < 16; r++) memcpy((char *)to + r * step, tile_register[t][r], 64);
}

static inline float single_of(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

static inline void multiply_tiles(int c, int a, int b) {
    float sum[16][16];
    uint16_t left[16][32], right[16][32];
    memcpy(sum, tile_register[c], sizeof sum);
    memcpy(left, tile_register[a], sizeof left);
    memcpy(right, tile_register[b], sizeof right);
    for (int i = 0; i < 16; i++)
        for (int d = 0; d < 32; d++)
            for (int j = 0; j < 16; j++)
                sum[i][j] += single_of(left[i][d]) * single_of(right[d / 2][2 * j + d % 2]);
    memcpy(tile_register[c], sum, sizeof sum);
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_zero(t) ((void)memset(tile_register[t], 0, sizeof tile_register[t]))
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_dpbf16ps multiply_tiles
#define _tile_loadconfig(shape) ((void)(shape))
#define _tile_release() ((void)0)
