/* The backward pass in bfloat16 with tile registers (AMX): products of bfloat16 are summed in
 * float32, and what comes between them is float32.
 *
 * Scores lie as [key, query], as in the forward pass. With tiles as amx.inc has them,
 *
 *     S = K Q^T, dP = V dO^T    take keys and values as they lie, and rows of the tile turned once;
 *     dV = P dO, dK = dS Q      take weights and slopes as rows of keys, and rows of the tile whose
 *                               pairs are two queries, packed once;
 *     dQ^T = K^T dS             takes slopes whose pairs are two keys, and keys turned for each
 *                               block.
 *
 * Axes: as in amx.inc.
 */
#ifndef LONGSPAN_WITHOUT_AMX
#include "amx.inc"

/* Rows of the next tile that are asked for along with the scores of 32 keys. */
enum { FETCH = 16 };

/* What a thread works on, one allocation. */
struct Work {
    Sight sight;
    const bf16 *q_T[TILE], *dout_T[TILE], *k_S[BLOCK];
    /* Rows of the tile for scores [T / 16, D / 2, 16, 2], and in pairs [D / 16, T / 2, 16, 2]. */
    bf16 *q_D2, *dout_E2, *q_T2, *dout_T2;
    /* Of 32 keys and a strip: S and dP [32, W]. */
    float *s_SW, *dp_SW;
    /* Of 32 keys: P and dS [32, T]; and of each strip dS in pairs [S / 2, W, 2]. */
    bf16 *p_ST, *ds_ST, *ds_S2[STRIPS];
    /* dQ^T [D, W] of each strip. */
    float *dq_DW[STRIPS];
    /* Keys turned [S / 32, D, 32]. */
    bf16 *k_DS;
    Rows k, v;
    Ahead ahead;
    /* 32 rows of gradients that lie apart [32, D or E]; and zeros. */
    float *near;
    bf16 *zero;
    /* The first key that a strip sees, and the end of the last; which 32 of a block it sees. */
    int32_t least[STRIPS], most[STRIPS];
    uint8_t sees[STRIPS][BLOCK / DEEP];
    /* lse in powers of two, and scale delta. */
    float lse_T[TILE], delta_T[TILE];
    /* Keys of the block, and in whole tiles. */
    int64_t keys, whole;
    float factor, scale;
};

/* Slopes made while the tile unit works gained nothing. */
AND_BF16 static void meanwhile(Work *w) { (void)w; }

/* Rows of the tile in pairs of queries; 0 beyond `count`. */
TARGET static void pair_rows(bf16 *to, const bf16 *const *x_T, int64_t count, int64_t width) {
    /* Words 0, 32, 1, 33, ..: numbers of both side by side. */
    const vi low = _mm512_add_epi32(
        v_iset(0x00200000),
        _mm512_mullo_epi32(
            v_iset(0x00010001),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    const vi high = _mm512_add_epi32(low, v_iset(0x00100010)), none = _mm512_setzero_si512();
    for (int64_t i = 0; i < TILE; i += 2)
        for (int64_t d = 0; d < width; d += DEEP) {
            const vi one = i < count ? v_iload(x_T[i] + d) : none;
            const vi two = i + 1 < count ? v_iload(x_T[i + 1] + d) : none;
            bf16 *at = to + d * TILE + i * SIDE;
            _mm512_storeu_si512(at, _mm512_permutex2var_epi16(one, low, two));
            _mm512_storeu_si512(at + SIDE * TILE, _mm512_permutex2var_epi16(one, high, two));
        }
}

TARGET static inline vf single(const bf16 *x) {
    const __m256i half = _mm256_loadu_si256((const __m256i *)x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The rows of a tile, both ways; lse and delta = dO O - dlse. */
TARGET static void find_rows(Work *w, const Task *task, int64_t b, int64_t h, int64_t first) {
    const int64_t D = task->width, E = task->value_width;
    Sight *sight = &w->sight;
    gather_rows(sight, task, b, h, first);
    look(sight, task, b);
    hulls(sight, task->ranges, WIDE, w->least, w->most);
    for (int64_t i = 0; i < TILE; i++) {
        w->lse_T[i] = w->delta_T[i] = 0.0f;
        w->q_T[i] = w->dout_T[i] = w->zero;
        if (i >= sight->count) continue;
        const int64_t head = task->q_heads[sight->head_T[i]], row = sight->row_T[i];
        const float lse = task->lse[place_of(task->lse_steps, b, head, row)];
        /* Rows that see nothing have weights of 0: whatever meets these must be finite, and what
         * such a row holds need not be. */
        if (lse == -INFINITY) continue;
        w->q_T[i] = (const bf16 *)task->q + place_of(task->q_steps, b, head, row);
        w->dout_T[i] = (const bf16 *)task->d_out + place_of(task->d_out_steps, b, head, row);
        const bf16 *out = (const bf16 *)task->out + place_of(task->out_steps, b, head, row);
        vf sum = v_set(0.0f);
        for (int64_t e = 0; e < E; e += LANES)
            sum = v_fma(single(out + e), single(w->dout_T[i] + e), sum);
        const float delta = _mm512_reduce_add_ps(sum);
        w->lse_T[i] = lse * LOG2E;
        w->delta_T[i] =
            task->scale * (delta - task->d_lse[place_of(task->d_lse_steps, b, head, row)]);
    }
    turn_queries(w->q_D2, w->q_T, sight->count, D, task->scale);
    turn_queries(w->dout_E2, w->dout_T, sight->count, E, 1.0f);
    pair_rows(w->q_T2, w->q_T, sight->count, D);
    pair_rows(w->dout_T2, w->dout_T, sight->count, E);
}

/* P = exp2(factor S - lse) and dS = scale P (dP - delta) of a strip and 32 keys. */
AND_BF16 static void slopes(Work *w, int64_t strip, int64_t first) {
    const vf by = v_set(w->factor), scale = v_set(w->scale);
    vf lse[STRIP], delta[STRIP];
    EACH_OF_STRIP {
        lse[c] = v_load(w->lse_T + strip * WIDE + c * LANES);
        delta[c] = v_load(w->delta_T + strip * WIDE + c * LANES);
    }
    for (int64_t j = 0; j < DEEP; j += 2) {
        vi slope[2];
        _Pragma("GCC unroll 2") for (int r = 0; r < 2; r++) {
            const float *s = w->s_SW + (j + r) * WIDE, *dp = w->dp_SW + (j + r) * WIDE;
            vf p[STRIP], ds[STRIP];
            EACH_OF_STRIP {
                p[c] = exp2_near(_mm512_fmsub_ps(v_load(s + c * LANES), by, lse[c]));
                ds[c] = v_mul(p[c], _mm512_fmsub_ps(v_load(dp + c * LANES), scale, delta[c]));
            }
            vi weight = (vi)_mm512_cvtne2ps_pbh(p[1], p[0]);
            slope[r] = (vi)_mm512_cvtne2ps_pbh(ds[1], ds[0]);
            if (first + j + r >= w->keys) weight = slope[r] = _mm512_setzero_si512();
            const int64_t at = (j + r) * TILE + strip * WIDE;
            _mm512_storeu_si512(w->p_ST + at, weight);
            _mm512_storeu_si512(w->ds_ST + at, slope[r]);
        }
        /* In each eight queries, four go to the first tile and four to the second. */
        bf16 *pairs = w->ds_S2[strip] + (first + j) * WIDE;
        _mm512_storeu_si512(pairs, _mm512_unpacklo_epi16(slope[0], slope[1]));
        _mm512_storeu_si512(pairs + DEEP, _mm512_unpackhi_epi16(slope[0], slope[1]));
    }
}

/* dQ^T += K^T dS for a strip. */
TILES static void give_queries(Work *w, int64_t strip, int64_t width) {
    for (int64_t d = 0; d < width; d += DEEP) {
        float *dq = w->dq_DW[strip] + d * WIDE;
        get(dq, 4 * WIDE, dq + SIDE * WIDE, 4 * WIDE);
        for (int64_t j = 0; j < w->whole; j += DEEP) {
            if (!w->sees[strip][j / DEEP]) continue;
            const bf16 *k = w->k_DS + j * width + d * DEEP, *ds = w->ds_S2[strip] + j * WIDE;
            const Side a = {k, k + SIDE * DEEP, 2 * DEEP, 2 * DEEP, 0};
            const Side b = {ds, ds + DEEP, 4 * WIDE, 4 * WIDE, 0};
            multiply(w, a, b, 1, 1);
        }
        put(dq, 4 * WIDE, dq + SIDE * WIDE, 4 * WIDE);
    }
}

/* dX += P Y for 32 keys from j on: rows of their gradients, which begin at `to`. */
TILES static void give_keys(
    Work *w, float *to, int64_t step, int64_t j, const bf16 *p_ST, const bf16 *y_T2,
    int64_t width) {
    const int64_t *row = w->sight.row_S + j;
    float *at[2];
    int64_t bytes[2];
    int apart[2];
    for (int i = 0; i < 2; i++) {
        apart[i] = j + (i + 1) * SIDE > w->keys || !one_after_another(row + i * SIDE);
        at[i] = apart[i] ? w->near + i * SIDE * width : to + row[i * SIDE] * step;
        bytes[i] = 4 * (apart[i] ? width : step);
        if (apart[i]) memset(at[i], 0, 4 * SIDE * width);
    }
    for (int64_t d = 0; d < width; d += DEEP) {
        get(at[0] + d, bytes[0], at[1] + d, bytes[1]);
        for (int64_t i = 0; i < STRIPS; i++) {
            if (!w->sees[i][j / DEEP]) continue;
            const bf16 *p = p_ST + i * WIDE, *y = y_T2 + d * TILE + i * WIDE * SIDE;
            const Side a = {p, p + SIDE * TILE, 2 * TILE, 2 * TILE, 0};
            const Side b = {y, y + SIDE * TILE, 2 * DEEP, 2 * DEEP, 0};
            multiply(w, a, b, 1, 1);
        }
        put(at[0] + d, bytes[0], at[1] + d, bytes[1]);
    }
    WRITTEN;
    for (int64_t l = 0; l < DEEP && j + l < w->keys; l++) {
        if (!apart[l / SIDE]) continue;
        float *own = to + row[l] * step;
        const float *more = w->near + l * width;
        for (int64_t d = 0; d < width; d += LANES)
            v_store(own + d, v_add(v_load(own + d), v_load(more + d)));
    }
}

/* A block of keys for all strips that see some of it. */
TILES static void do_block(Work *w, const Task *task, float *dk, float *dv) {
    const int64_t D = task->width, E = task->value_width;
    const int32_t *key_S = w->sight.key_S;
    float *s = w->s_SW, *dp = w->dp_SW;
    for (int64_t j = 0; j < w->whole; j += DEEP) {
        const int64_t stop = j + DEEP < w->keys ? j + DEEP : w->keys;
        for (int64_t i = 0; i < STRIPS; i++) {
            w->sees[i][j / DEEP] = key_S[stop - 1] >= w->least[i] && key_S[j] < w->most[i];
            if (!w->sees[i][j / DEEP]) continue;
            fetch(&w->ahead, FETCH);
            scores(w, &w->k, j, w->q_D2 + i * WIDE * D, D);
            put(s, 4 * WIDE, s + SIDE * WIDE, 4 * WIDE);
            scores(w, &w->v, j, w->dout_E2 + i * WIDE * E, E);
            put(dp, 4 * WIDE, dp + SIDE * WIDE, 4 * WIDE);
            WRITTEN;
            hide(&w->sight, s, i * STRIP, task->ranges, j, stop);
            slopes(w, i, j);
        }
        give_keys(w, dv, task->dv_steps.row, j, w->p_ST, w->dout_T2, E);
        give_keys(w, dk, task->dk_steps.row, j, w->ds_ST, w->q_T2, D);
    }
    for (int64_t i = 0; i < STRIPS; i++) give_queries(w, i, D);
}

/* Rows of dQ. */
TARGET static void turn_out(const Work *w, const Task *task, int64_t b) {
    const Sight *sight = &w->sight;
    for (int64_t i = 0; i < TILE; i += SIDE) {
        const float *from = w->dq_DW[i / WIDE] + i % WIDE;
        float *to[SIDE];
        for (int64_t l = 0; l < SIDE; l++) {
            /* As slopes are paired. */
            const int64_t own = i / WIDE * WIDE + i % WIDE / 4 + l / 4 * 8 + l % 4;
            to[l] = 0;
            if (own < sight->count)
                to[l] = task->dq + place_of(task->dq_steps, b,
                                            task->q_heads[sight->head_T[own]], sight->row_T[own]);
        }
        for (int64_t d = 0; d < task->width; d += SIDE) {
            vi row[SIDE];
            for (int64_t l = 0; l < SIDE; l++) row[l] = v_iload(from + (d + l) * WIDE);
            turn(row);
            for (int64_t l = 0; l < SIDE; l++) {
                if (!to[l]) continue;
                const vf found = v_of_bits(row[l]);
                v_store(to[l] + d, task->add ? v_add(v_load(to[l] + d), found) : found);
            }
        }
    }
}

TARGET static void backward_tile(
    Work *w, const Task *task, Spot now, Spot next, int64_t part) {
    const int64_t b = now.b, h = now.h;
    const int64_t kv = h / (task->heads / task->key_heads), head = task->k_heads[kv];
    const int64_t D = task->width, E = task->value_width;
    const bf16 *k = (const bf16 *)task->k + place_of(task->k_steps, b, head, 0);
    const bf16 *v = (const bf16 *)task->v + place_of(task->v_steps, b, head, 0);
    float *dk = task->dk + part * task->dk_part + place_of(task->dk_steps, b, head, 0);
    float *dv = task->dv + part * task->dv_part + place_of(task->dv_steps, b, head, 0);
    const int64_t *row_M = rows_of(task, b, kv);
    Sight *sight = &w->sight;
    /* The sign is in the queries; a scale of 0 too. */
    w->factor = task->scale == 0.0f ? 1.0f : fabsf(task->scale) * LOG2E;
    w->scale = task->scale;
    find_rows(w, task, b, h, now.first);
    look_ahead(&w->ahead, sight, task, now, next, part, sizeof *k, sizeof *k);
    memset(w->dq_DW[0], 0, D * TILE * sizeof(float));
    while ((w->keys = next_block(sight, task->ranges, row_M))) {
        w->whole = (w->keys + DEEP - 1) / DEEP * DEEP;
        for (int64_t j = 0; j < w->whole; j++)
            w->k_S[j] = k + sight->row_S[j < w->keys ? j : w->keys - 1] * task->k_steps.row;
        turn_values(w->k_DS, w->k_S, w->whole, D);
        find_keys(&w->k, sight, k, task->k_steps.row, w->keys, D);
        find_keys(&w->v, sight, v, task->v_steps.row, w->keys, E);
        do_block(w, task, dk, dv);
    }
    turn_out(w, task, b);
}

/* Everything that a thread needs; NULL if there is no memory. */
static Work *begin(const Task *task) {
    const int64_t D = task->width, E = task->value_width, wide = D > E ? D : E;
    const int64_t singles = 2 * DEEP * WIDE + TILE * D + DEEP * wide;
    const int64_t halves =
        wide + 2 * TILE * (D + E) + (2 * DEEP + BLOCK) * TILE + BLOCK * (2 * D + E);
    const int64_t bytes = sizeof(Work) + 4 * singles + 2 * halves + sight_bytes(task->ranges) +
                          64 * (14 + 2 * STRIPS);
    char *all = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!all) return 0;
    Work *w = take(&all, sizeof *w);
    w->s_SW = take(&all, 4 * DEEP * WIDE);
    w->dp_SW = take(&all, 4 * DEEP * WIDE);
    for (int i = 0; i < STRIPS; i++) w->dq_DW[i] = take(&all, 4 * WIDE * D);
    for (int i = 0; i < STRIPS; i++) w->ds_S2[i] = take(&all, 2 * BLOCK * WIDE);
    w->near = take(&all, 4 * DEEP * wide);
    w->zero = take(&all, 2 * wide);
    w->q_D2 = take(&all, 2 * TILE * D);
    w->q_T2 = take(&all, 2 * TILE * D);
    w->dout_E2 = take(&all, 2 * TILE * E);
    w->dout_T2 = take(&all, 2 * TILE * E);
    w->p_ST = take(&all, 2 * DEEP * TILE);
    w->ds_ST = take(&all, 2 * DEEP * TILE);
    w->k_DS = take(&all, 2 * BLOCK * D);
    w->k.near = take(&all, 2 * BLOCK * D);
    w->v.near = take(&all, 2 * BLOCK * E);
    sight_take(&w->sight, &all, task->ranges);
    memset(w->zero, 0, 2 * wide);
    return w;
}

TILES int64_t longspan_backward_amx(Task *task) {
    Work *w = begin(task);
    if (!w) return 1;
    _tile_loadconfig(&shape);
    share_backward(w, task, backward_tile);
    _tile_release();
    free(w);
    return 0;
}
#endif
