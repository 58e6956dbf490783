/* The forward pass in bfloat16 with tile registers (AMX): Sapphire Rapids and later.
 *
 * Scores lie as [key, query], as in tile.inc. With tiles as amx.inc has them,
 *
 *     S = K Q^T     takes keys as they lie, and queries turned once for the tile;
 *     O^T = V^T P   takes weights whose pairs are two rows of S, and values turned for each block.
 *
 * A tile's rows are strips of 32, each on its own: while the tile unit is at the scores of one
 * strip, or sums values for another, the vector unit makes weights for a third.
 *
 * Axes: T query rows of a tile, W of a strip, S keys of a block, D width of queries and keys, E of
 * values, m ranges per row; a trailing 2 is a pair.
 */
#ifndef LONGSPAN_WITHOUT_AMX
#include "amx.inc"
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Weights may grow to 2^8 before sums are brought down to the new maximum. */
#define LAZY 8.0f

/* Rows of the next tile that are asked for along with a product of 32 keys or values. */
enum { FETCH = 8 };

/* What a thread works on, one allocation. */
struct Work {
    Sight sight;
    const bf16 *q_T[TILE], *v_S[BLOCK];
    /* By strips: scores [S, W], in whose place weights [S / 2, W, 2] come; and results [E, W]. */
    float *s_SW[STRIPS], *out_EW[STRIPS];
    /* [T / 16, D / 2, 16, 2] and [S / 32, E, 32]. */
    bf16 *q_D2, *v_ES;
    Rows k;
    Ahead ahead;
    bf16 *zero_E;
    /* The first key that a strip sees, and the end of the last. */
    int32_t least[STRIPS], most[STRIPS];
    float base_T[TILE], sum_T[TILE], keep_T[TILE];
    /* Keys of the block in whole tiles; and weights at hand: of which strip, how many keys of it
     * are done, and how many to do while the tile unit is at one step. */
    int64_t whole, at_hand, done, share;
    float factor;
};

/* Rows of the result: out_i[e] = sum_i from_e[i], beside what earlier passes gave, in float32; or
 * rounded, where this is the only pass. */
AND_BF16 static void turn_out(const Work *w, const Task *task, int64_t b) {
    const Sight *sight = &w->sight;
    for (int64_t i = 0; i < sight->count; i += SIDE) {
        const float *from = w->out_EW[i / WIDE] + i % WIDE;
        const vf factor = v_load(w->sum_T + i);
        for (int64_t e = 0; e < task->value_width; e += SIDE) {
            vi row[SIDE];
            for (int64_t l = 0; l < SIDE; l++)
                row[l] = _mm512_castps_si512(v_mul(v_load(from + (e + l) * WIDE), factor));
            turn(row);
            for (int64_t l = 0; l < SIDE && i + l < sight->count; l++) {
                const int64_t at = e + place_of(task->out_steps, b,
                                                task->q_heads[sight->head_T[i + l]],
                                                sight->row_T[i + l]);
                vf found = _mm512_castsi512_ps(row[l]);
                if (task->half) {
                    _mm256_storeu_si256(
                        (__m256i *)((bf16 *)task->out + at), (__m256i)_mm512_cvtneps_pbh(found));
                    continue;
                }
                float *to = (float *)task->out + at;
                if (task->add) found = v_fma(v_set(w->keep_T[i + l]), v_load(to), found);
                v_store(to, found);
            }
        }
    }
}

/* New bases for the rows whose weights would grow too large; the others keep every bit. */
TARGET static void rebase(Work *w, int64_t value_width) {
    const int64_t strip = w->at_hand;
    const float *s = w->s_SW[strip];
    vf most[STRIP];
    EACH_OF_STRIP most[c] = v_set(-INFINITY);
    for (int64_t j = 0; j < w->whole; j++)
        EACH_OF_STRIP most[c] = v_max(most[c], v_load(s + j * WIDE + c * LANES));
    EACH_OF_STRIP {
        float *base = w->base_T + strip * WIDE + c * LANES;
        float *sum = w->sum_T + strip * WIDE + c * LANES;
        const vf before = v_load(base), now = v_mul(most[c], v_set(w->factor));
        const vm over = v_less(v_add(before, v_set(LAZY)), now);
        if (!v_any(over)) continue;
        v_store(base, v_choose(over, now, before));
        /* 0 for rows that have seen nothing. */
        const vf shrink = v_choose(over, exp2_near(v_sub(before, now)), v_set(1.0f));
        v_store(sum, v_mul(v_load(sum), shrink));
        for (int64_t e = 0; e < value_width; e++) {
            float *out = w->out_EW[strip] + e * WIDE + c * LANES;
            v_store(out, v_mul(v_load(out), shrink));
        }
    }
}

/* P = exp2(factor S - base) in pairs of keys, in the place of S, for the next `share` keys of the
 * strip that is at hand. */
AND_BF16 static void soften(Work *w, int64_t share) {
    const int64_t strip = w->at_hand, first = w->done;
    const int64_t stop = first + share < w->whole ? first + share : w->whole;
    if (first >= stop) return;
    w->done = stop;
    const vf by = v_set(w->factor);
    /* Words 0, 16, 1, 17, ..: numbers of both side by side. */
    const vi weave = _mm512_add_epi32(
        v_iset(0x00100000),
        _mm512_mullo_epi32(
            v_iset(0x00010001),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    vf base[STRIP], sum[STRIP];
    EACH_OF_STRIP {
        base[c] = v_load(w->base_T + strip * WIDE + c * LANES);
        base[c] = v_choose(v_less(base[c], v_set(-1e38f)), v_set(0.0f), base[c]);
        sum[c] = v_load(w->sum_T + strip * WIDE + c * LANES);
    }
    for (int64_t j = first; j < stop; j += 2) {
        float *s = w->s_SW[strip] + j * WIDE;
        EACH_OF_STRIP {
            const vf one = exp2_near(_mm512_fmsub_ps(v_load(s + c * LANES), by, base[c]));
            const vf two = exp2_near(_mm512_fmsub_ps(v_load(s + WIDE + c * LANES), by, base[c]));
            sum[c] = v_add(sum[c], v_add(one, two));
            _mm512_storeu_si512(
                s + c * LANES,
                _mm512_permutexvar_epi16(weave, (vi)_mm512_cvtne2ps_pbh(two, one)));
        }
    }
    EACH_OF_STRIP v_store(w->sum_T + strip * WIDE + c * LANES, sum[c]);
}

AND_BF16 static void meanwhile(Work *w) { soften(w, w->share); }

/* O^T += V^T P for 32 columns of values from e on, or for 16 if these are all. */
TILES static void weigh(Work *w, int64_t e, int64_t strip, int64_t width) {
    float *out = w->out_EW[strip] + e * WIDE, *two = e + SIDE < width ? out + SIDE * WIDE : 0;
    const bf16 *v = w->v_ES + e * DEEP, *p = (const bf16 *)w->s_SW[strip];
    const Side a = {v, v + SIDE * DEEP, 2 * DEEP, 2 * DEEP, DEEP * width};
    const Side b = {p, p + 2 * SIDE, 8 * WIDE, 8 * WIDE, 2 * DEEP * WIDE};
    get(out, 4 * WIDE, two, 4 * WIDE);
    multiply(w, a, b, w->whole / DEEP, two != 0);
    put(out, 4 * WIDE, two, 4 * WIDE);
}

/* A block of keys for all strips that see some of it: scores of one strip, weights of the one
 * before, and sums of values of the one before that, at a time. */
TILES static void do_block(Work *w, const Task *task, int64_t keys) {
    const int64_t D = task->width, E = task->value_width;
    int64_t strips[STRIPS], many = 0;
    for (int64_t i = 0; i < STRIPS; i++)
        if (w->least[i] <= w->sight.key_S[keys - 1] && w->most[i] > w->sight.key_S[0])
            strips[many++] = i;
    /* An even share for each step of the tile unit. */
    const int64_t steps = w->whole / DEEP * (D / DEEP + (E + DEEP - 1) / DEEP);
    w->share = (w->whole / 2 + steps - 1) / steps * 2;
    for (int64_t i = 0; i < many + 2; i++) {
        w->done = w->whole;
        if (i && i <= many) {
            w->at_hand = strips[i - 1];
            w->done = 0;
            float *s = w->s_SW[w->at_hand];
            hide(&w->sight, s, w->at_hand * STRIP, task->ranges, 0, keys);
            for (int64_t j = keys * WIDE; j < w->whole * WIDE; j++) s[j] = -INFINITY;
            rebase(w, E);
        }
        if (i < many)
            for (int64_t j = 0; j < w->whole; j += DEEP) {
                fetch(&w->ahead, FETCH);
                float *s = w->s_SW[strips[i]] + j * WIDE;
                scores(w, &w->k, j, w->q_D2 + strips[i] * WIDE * D, D);
                put(s, 4 * WIDE, s + SIDE * WIDE, 4 * WIDE);
            }
        if (i > 1)
            for (int64_t e = 0; e < E; e += DEEP) {
                fetch(&w->ahead, FETCH);
                weigh(w, e, strips[i - 2], E);
            }
        soften(w, w->whole);
    }
}

TARGET static void forward_tile(Work *w, const Task *task, Spot now, Spot next) {
    const int64_t b = now.b, h = now.h;
    const int64_t kv = h / (task->heads / task->key_heads), head = task->k_heads[kv];
    const int64_t D = task->width, E = task->value_width;
    const bf16 *k = (const bf16 *)task->k + place_of(task->k_steps, b, head, 0);
    const bf16 *v = (const bf16 *)task->v + place_of(task->v_steps, b, head, 0);
    const int64_t *row_M = rows_of(task, b, kv);
    Sight *sight = &w->sight;
    /* The sign is in the queries; a scale of 0 too. */
    w->factor = task->scale == 0.0f ? 1.0f : fabsf(task->scale) * LOG2E;
    const Array rows[] = {
        {task->q, task->q_steps, sizeof *k, D},
        {task->out, task->out_steps, task->half ? sizeof *k : sizeof(float), E}};
    const Array key_rows[] = {
        {task->k, task->k_steps, sizeof *k, D}, {task->v, task->v_steps, sizeof *v, E}};
    gather_rows(sight, task, b, h, now.first);
    look(sight, task, b);
    look_ahead(&w->ahead, sight, task, now, next, rows, 2, key_rows, 2);
    for (int64_t i = 0; i < sight->count; i++)
        w->q_T[i] = (const bf16 *)task->q + place_of(task->q_steps, b,
                                                     task->q_heads[sight->head_T[i]],
                                                     sight->row_T[i]);
    turn_queries(w->q_D2, w->q_T, sight->count, D, task->scale);
    hulls(sight, task->ranges, WIDE, w->least, w->most);
    memset(w->out_EW[0], 0, E * TILE * sizeof(float));
    for (int i = 0; i < TILE; i++) {
        w->base_T[i] = -INFINITY;
        w->sum_T[i] = 0.0f;
    }
    int64_t keys;
    while ((keys = next_block(sight, task->ranges, row_M))) {
        /* Whole tiles: weights of 0 for values of 0. */
        w->whole = (keys + DEEP - 1) / DEEP * DEEP;
        for (int64_t j = 0; j < w->whole; j++)
            w->v_S[j] = j < keys ? v + sight->row_S[j] * task->v_steps.row : w->zero_E;
        turn_values(w->v_ES, w->v_S, w->whole, E);
        find_keys(&w->k, sight, k, task->k_steps.row, keys, D);
        do_block(w, task, keys);
    }
    settle(sight, task, b, w->base_T, w->sum_T, w->keep_T);
    turn_out(w, task, b);
}

/* Everything that a thread needs; NULL if there is no memory. */
static Work *begin(const Task *task) {
    const int64_t D = task->width, E = task->value_width;
    const int64_t bytes = sizeof(Work) + 4 * TILE * (BLOCK + E) +
                          2 * (TILE * D + BLOCK * E + BLOCK * D + E) +
                          sight_bytes(task->ranges) + 64 * (5 + 2 * STRIPS);
    char *all = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!all) return 0;
    Work *w = take(&all, sizeof *w);
    for (int i = 0; i < STRIPS; i++) w->s_SW[i] = take(&all, 4 * BLOCK * WIDE);
    for (int i = 0; i < STRIPS; i++) w->out_EW[i] = take(&all, 4 * WIDE * E);
    w->q_D2 = take(&all, 2 * TILE * D);
    w->v_ES = take(&all, 2 * BLOCK * E);
    w->k.near = take(&all, 2 * BLOCK * D);
    w->zero_E = take(&all, 2 * E);
    sight_take(&w->sight, &all, task->ranges);
    memset(w->zero_E, 0, 2 * E);
    return w;
}

TILES int64_t longspan_forward_amx(Task *task) {
    Work *w = begin(task);
    if (!w) return 1;
    _tile_loadconfig(&shape);
    share_forward(w, task, forward_tile);
    _tile_release();
    free(w);
    return 0;
}

/* Asked once: a process has AMX only if Linux was asked for the room that its registers take. */
static int64_t amx(void) {
#ifdef __linux__
    const unsigned ASK = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d, state, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    /* AMX-BF16 and AMX-TILE, AVX512-BF16, and that Linux keeps the registers. */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return 0;
    __asm__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
    if ((state >> 17 & 3) != 3) return 0;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
    return 0;
#endif
}

int64_t longspan_amx(void) {
    static int64_t known = -1;
    if (known < 0) known = amx();
    return known;
}

int64_t longspan_tile_amx(void) { return TILE; }
#endif
