/* Eight numbers at a time: AVX2 with FMA. */
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma")))
#define SUFFIX(name) name##_avx2
#define LANES 8
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;
#define v_load(p) _mm256_loadu_ps(p)
#define v_store(p, x) _mm256_storeu_ps(p, x)
/* From bfloat16. */
#define v_widen(p) \
    v_of_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p))), 16))
#define v_set(x) _mm256_set1_ps(x)
#define v_add(a, b) _mm256_add_ps(a, b)
#define v_sub(a, b) _mm256_sub_ps(a, b)
#define v_mul(a, b) _mm256_mul_ps(a, b)
#define v_max(a, b) _mm256_max_ps(a, b)
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define v_less(a, b) _mm256_cmp_ps(a, b, _CMP_LT_OQ)
#define v_choose(m, yes, no) _mm256_blendv_ps(no, yes, m)
#define v_any(m) (_mm256_movemask_ps(m) != 0)
#define v_iload(p) _mm256_loadu_si256((const __m256i *)(p))
#define v_iset(x) _mm256_set1_epi32(x)
#define v_isub(a, b) _mm256_sub_epi32(a, b)
/* a < b of numbers without a sign: not max(a, b) = a. */
#define v_below(a, b) \
    _mm256_castsi256_ps(_mm256_xor_si256( \
        _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a), _mm256_set1_epi32(-1)))
#define v_or(a, b) _mm256_or_ps(a, b)
#define v_and(a, b) _mm256_and_ps(a, b)
#define v_none _mm256_setzero_ps()
#define v_all(m) (_mm256_movemask_ps(m) == 0xff)
/* a 2^n for whole n from -126 on, when n is added to the exponent; or 0. */
#define v_scale_unless(m, a, n) \
    _mm256_andnot_ps( \
        m, _mm256_castsi256_ps(_mm256_add_epi32( \
               _mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23))))
#define v_round(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define v_bits(x) _mm256_castps_si256(x)
#define v_of_bits(x) _mm256_castsi256_ps(x)

/* 8 rows of 8 dwords become columns. */
TARGET static inline void turn(vi *row) {
    vi a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    /* Now vector 4 i + j holds columns j and 4 + j of rows 4 i to 4 i + 3. */
    for (int j = 0; j < 4; j++) {
        row[j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x20);
        row[4 + j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x31);
    }
}
