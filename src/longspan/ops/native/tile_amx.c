/* The forward pass in bfloat16 with tile registers (AMX): Sapphire Rapids and later.
 *
 * Scores lie as [key, query], as in tile.inc. With tiles as amx.inc has them,
 *
 *     S = K Q^T     takes keys as they lie, and queries turned once for the tile;
 *     O^T = V^T P   takes weights whose pairs are two rows of S, and values turned, which the next
 *                   tiles take over.
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

/* So many times 32 keys' values are kept: what a window of 1024 sees, and more. */
enum { KEPT = 64 };

/* Rows of the next tile that are asked for along with a product of 32 keys or values. */
enum { FETCH = 8 };

/* What a thread works on, one allocation. */
struct Work {
    Sight sight;
    const bf16 *q_T[TILE], *v_S[DEEP];
    /* By strips: scores [S, W], in whose place weights [S / 2, W, 2] come; and results [E, W]. */
    float *s_SW[STRIPS], *out_EW[STRIPS];
    /* Queries [T / 16, D / 2, 16, 2]. */
    bf16 *q_D2;
    /* Values turned, 32 keys at a time [E, 32]: those of the block, room for them, and what is
     * kept for the next tiles, with the first key of each and where keys are counted from. */
    const bf16 *v_ES[BLOCK / DEEP];
    bf16 *own_ES, *kept_ES;
    int64_t kept[KEPT], kept_from;
    Rows k;
    Ahead ahead;
    bf16 *zero_E;
    /* The first key that a strip sees, and the end of the last; whether it has no results yet. */
    int32_t least[STRIPS], most[STRIPS];
    uint8_t fresh[STRIPS];
    float base_T[TILE], sum_T[TILE], keep_T[TILE];
    /* Keys of the block in whole tiles, and from which to which a strip sees some; and weights at
     * hand: of which strip, which key is next, and how many to do while the tile unit is at one
     * step. */
    int64_t whole, from[STRIPS], to[STRIPS], at_hand, done, share;
    float factor;
};

/* Rows of the result: out_i[e] = sum_i from_e[i], beside what earlier passes gave, in float32; or
 * rounded, where this is the only pass. */
AND_BF16 static void turn_out(const Work *w, const Task *task, int64_t b) {
    const Sight *sight = &w->sight;
    for (int64_t i = 0; i < sight->count; i += SIDE) {
        const float *from = w->out_EW[i / WIDE] + i % WIDE;
        const vf factor = v_load(w->sum_T + i);
        const int64_t rows = sight->count - i < SIDE ? sight->count - i : SIDE;
        int64_t at[SIDE];
        for (int64_t l = 0; l < rows; l++)
            at[l] = place_of(
                task->out_steps, b, task->q_heads[sight->head_T[i + l]], sight->row_T[i + l]);
        for (int64_t e = 0; e < task->value_width; e += SIDE) {
            vi row[SIDE];
            for (int64_t l = 0; l < SIDE; l++)
                row[l] = v_bits(v_mul(v_load(from + (e + l) * WIDE), factor));
            turn(row);
            for (int64_t l = 0; l < rows; l++) {
                vf found = v_of_bits(row[l]);
                if (task->half) {
                    _mm256_storeu_si256(
                        (__m256i *)((bf16 *)task->out + at[l] + e),
                        (__m256i)_mm512_cvtneps_pbh(found));
                    continue;
                }
                float *to = (float *)task->out + at[l] + e;
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
    /* Maxima of every other key, or each would wait for the one before. */
    vf most[STRIP], others[STRIP];
    EACH_OF_STRIP most[c] = others[c] = v_set(-INFINITY);
    for (int64_t j = w->from[strip]; j < w->to[strip]; j += 2)
        EACH_OF_STRIP {
            most[c] = v_max(most[c], v_load(s + j * WIDE + c * LANES));
            others[c] = v_max(others[c], v_load(s + (j + 1) * WIDE + c * LANES));
        }
    EACH_OF_STRIP most[c] = v_max(most[c], others[c]);
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
        for (int64_t e = 0; e < value_width && !w->fresh[strip]; e++) {
            float *out = w->out_EW[strip] + e * WIDE + c * LANES;
            v_store(out, v_mul(v_load(out), shrink));
        }
    }
}

/* P = exp2(factor S - base) in pairs of keys, in the place of S, for the next `share` keys of the
 * strip that is at hand. */
AND_BF16 static void soften(Work *w, int64_t share) {
    const int64_t strip = w->at_hand, first = w->done, end = w->to[strip];
    const int64_t stop = first + share < end ? first + share : end;
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
    if (w->fresh[strip])
        clear();
    else
        get(out, 4 * WIDE, two, 4 * WIDE);
    for (int64_t j = w->from[strip]; j < w->to[strip]; j += DEEP) {
        const bf16 *v = w->v_ES[j / DEEP] + e * DEEP, *p = (bf16 *)(w->s_SW[strip] + j * WIDE);
        const Side a = {v, v + SIDE * DEEP, 2 * DEEP, 2 * DEEP, 0};
        const Side b = {p, p + 2 * SIDE, 8 * WIDE, 8 * WIDE, 0};
        multiply(w, a, b, 1, two != 0);
    }
    put(out, 4 * WIDE, two, 4 * WIDE);
}

/* Turn the values of a block, or take those that the tiles before have turned. */
static void find_values(Work *w, const bf16 *v, int64_t step, int64_t keys, int64_t width) {
    const int32_t *key_S = w->sight.key_S;
    int64_t last = -1;
    for (int64_t j = 0; j < w->whole; j += DEEP) {
        const int64_t key = key_S[j], slot = key / DEEP % KEPT;
        /* Not so many, not one after another, or in the place of those just found. */
        const int alone = j + DEEP > keys || key_S[j + DEEP - 1] != key + DEEP - 1 || slot == last;
        bf16 *at = alone ? w->own_ES + j * width : w->kept_ES + slot * DEEP * width;
        w->v_ES[j / DEEP] = at;
        if (!alone) {
            last = slot;
            if (w->kept[slot] == w->kept_from + key) continue;
            w->kept[slot] = w->kept_from + key;
        }
        /* Past the last: weights of 0 for values of 0. */
        for (int64_t l = j; l < j + DEEP; l++)
            w->v_S[l - j] = l < keys ? v + w->sight.row_S[l] * step : w->zero_E;
        turn_values(at, w->v_S, DEEP, width);
    }
}

/* The scores of a strip that rows must not see. */
AND_BF16 static void hide_keys(Work *w, const Task *task, int64_t strip, int64_t keys) {
    const Sight *sight = &w->sight;
    float *s = w->s_SW[strip];
    for (int64_t j = w->from[strip]; j < w->to[strip]; j += DEEP) {
        const int64_t stop = j + DEEP < keys ? j + DEEP : keys;
        const int32_t first = sight->key_S[j], end = sight->key_S[stop - 1] + 1;
        if (end - first == stop - j &&
            all_see(sight, task->ranges, strip * STRIP, STRIP, first, end))
            continue;
        hide(sight, s + j * WIDE, strip * STRIP, task->ranges, j, stop);
    }
    for (int64_t j = keys * WIDE; j < w->to[strip] * WIDE; j++) s[j] = -INFINITY;
}

/* A block of keys for all strips that see some of it: scores of one strip, weights of the one
 * before, and sums of values of the one before that, at a time. */
TILES static void do_block(Work *w, const Task *task, int64_t keys) {
    const int64_t D = task->width, E = task->value_width;
    const int32_t *key_S = w->sight.key_S;
    int64_t strips[STRIPS], many = 0;
    for (int64_t i = 0; i < STRIPS; i++) {
        w->from[i] = w->whole;
        w->to[i] = 0;
        for (int64_t j = 0; j < w->whole; j += DEEP) {
            const int64_t stop = j + DEEP < keys ? j + DEEP : keys;
            if (key_S[stop - 1] < w->least[i] || key_S[j] >= w->most[i]) continue;
            if (j < w->from[i]) w->from[i] = j;
            w->to[i] = j + DEEP;
        }
        if (w->from[i] < w->to[i]) strips[many++] = i;
    }
    /* An even share for each step of the tile unit. */
    const int64_t steps = D / DEEP + (E + DEEP - 1) / DEEP;
    w->share = (DEEP / 2 + steps - 1) / steps * 2;
    for (int64_t i = 0; i < many + 2; i++) {
        w->done = w->whole;
        if (i && i <= many) {
            w->at_hand = strips[i - 1];
            w->done = w->from[w->at_hand];
            hide_keys(w, task, w->at_hand, keys);
            rebase(w, E);
        }
        if (i < many)
            for (int64_t j = w->from[strips[i]]; j < w->to[strips[i]]; j += DEEP) {
                fetch(&w->ahead, FETCH);
                float *s = w->s_SW[strips[i]] + j * WIDE;
                scores(w, &w->k, j, w->q_D2 + strips[i] * WIDE * D, D);
                put(s, 4 * WIDE, s + SIDE * WIDE, 4 * WIDE);
            }
        if (i > 1) {
            for (int64_t e = 0; e < E; e += DEEP) {
                fetch(&w->ahead, FETCH);
                weigh(w, e, strips[i - 2], E);
            }
            w->fresh[strips[i - 2]] = 0;
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
    gather_rows(sight, task, b, h, now.first);
    look(sight, task, b);
    look_ahead(&w->ahead, sight, task, now, next, 0, sizeof *k,
               task->half ? sizeof *k : sizeof(float));
    for (int64_t i = 0; i < sight->count; i++)
        w->q_T[i] = (const bf16 *)task->q + place_of(task->q_steps, b,
                                                     task->q_heads[sight->head_T[i]],
                                                     sight->row_T[i]);
    turn_queries(w->q_D2, w->q_T, sight->count, D, task->scale);
    hulls(sight, task->ranges, WIDE, w->least, w->most);
    memset(w->fresh, 1, sizeof w->fresh);
    for (int i = 0; i < TILE; i++) {
        w->base_T[i] = -INFINITY;
        w->sum_T[i] = 0.0f;
    }
    w->kept_from = (b * task->key_heads + kv) * task->keys;
    int64_t keys;
    while ((keys = next_block(sight, task->ranges, row_M))) {
        w->whole = (keys + DEEP - 1) / DEEP * DEEP;
        find_values(w, v, task->v_steps.row, keys, E);
        find_keys(&w->k, sight, k, task->k_steps.row, keys, D);
        do_block(w, task, keys);
    }
    for (int i = 0; i < STRIPS; i++)
        if (w->fresh[i]) memset(w->out_EW[i], 0, E * WIDE * sizeof(float));
    settle(sight, task, b, w->base_T, w->sum_T, w->keep_T);
    turn_out(w, task, b);
}

/* Everything that a thread needs; NULL if there is no memory. */
static Work *begin(const Task *task) {
    const int64_t D = task->width, E = task->value_width;
    const int64_t bytes = sizeof(Work) + 4 * TILE * (BLOCK + E) +
                          2 * (TILE * D + (BLOCK + KEPT * DEEP) * E + BLOCK * D + E) +
                          sight_bytes(task->ranges) + 64 * (6 + 2 * STRIPS);
    char *all = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!all) return 0;
    Work *w = take(&all, sizeof *w);
    for (int i = 0; i < STRIPS; i++) w->s_SW[i] = take(&all, 4 * BLOCK * WIDE);
    for (int i = 0; i < STRIPS; i++) w->out_EW[i] = take(&all, 4 * WIDE * E);
    w->q_D2 = take(&all, 2 * TILE * D);
    w->own_ES = take(&all, 2 * BLOCK * E);
    w->kept_ES = take(&all, 2 * KEPT * DEEP * E);
    w->k.near = take(&all, 2 * BLOCK * D);
    w->zero_E = take(&all, 2 * E);
    sight_take(&w->sight, &all, task->ranges);
    memset(w->zero_E, 0, 2 * E);
    for (int i = 0; i < KEPT; i++) w->kept[i] = -1;
    w->at_hand = 0;
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
