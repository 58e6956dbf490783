/* Sixteen numbers at a time: AVX-512. */
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
#define SUFFIX(name) name##_avx512
#define LANES 16
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;
#define v_load(p) _mm512_loadu_ps(p)
#define v_store(p, x) _mm512_storeu_ps(p, x)
/* From bfloat16. */
#define v_widen(p) \
    v_of_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(p))), 16))
#define v_set(x) _mm512_set1_ps(x)
#define v_add(a, b) _mm512_add_ps(a, b)
#define v_sub(a, b) _mm512_sub_ps(a, b)
#define v_mul(a, b) _mm512_mul_ps(a, b)
#define v_max(a, b) _mm512_max_ps(a, b)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define v_less(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define v_choose(m, yes, no) _mm512_mask_blend_ps(m, no, yes)
#define v_any(m) (m != 0)
#define v_iload(p) _mm512_loadu_si512(p)
#define v_iset(x) _mm512_set1_epi32(x)
#define v_isub(a, b) _mm512_sub_epi32(a, b)
/* a < b of numbers without a sign. */
#define v_below(a, b) _mm512_cmplt_epu32_mask(a, b)
#define v_or(a, b) ((vm)((a) | (b)))
#define v_and(a, b) ((vm)((a) & (b)))
#define v_none ((vm)0)
#define v_all(m) ((m) == (vm)0xffff)
/* a 2^n for whole n, or 0. */
#define v_scale_unless(m, a, n) _mm512_maskz_scalef_ps((__mmask16)~(m), a, n)
#define v_scale(a, n) _mm512_scalef_ps(a, n)
#define v_round(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define v_bits(x) _mm512_castps_si512(x)
#define v_of_bits(x) _mm512_castsi512_ps(x)

/* 16 rows of 16 dwords become columns. */
TARGET static inline void turn(vi *row) {
    vi a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    /* Now vector 4 i + j holds columns j, 4 + j, 8 + j, 12 + j of rows 4 i to 4 i + 3. */
    for (int j = 0; j < 4; j++) {
        const vi even_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
        const vi odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const vi even_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const vi odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        row[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        row[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        row[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        row[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}
