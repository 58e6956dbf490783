/* Attention over key ranges on a CPU: what the caller hands over.
 *
 * Axes: B batch, H query heads, K key heads, N query rows, M key rows, D width of queries and keys,
 * E width of values, G groups of ranges, m ranges per row.
 */
#ifndef LONGSPAN_NATIVE_H
#define LONGSPAN_NATIVE_H
#include <stdint.h>

/* Numbers from one batch row, head and row to the next; columns lie side by side. */
typedef struct {
    int64_t batch, head, row;
} Steps;

typedef struct {
    /* Heads, rows and keys are those that take part. */
    int64_t batch, heads, key_heads, rows, keys, width, value_width, ranges;
    /* Query heads that a tile holds side by side: they have one key head and equal ranges. */
    int64_t share;
    /* The instruction set, see longspan_level. */
    int64_t level;
    /* Whether out and lse, or dq, hold what earlier passes gave: this one joins them. */
    int64_t add;
    /* Levels 3 and 4: whether out is in bfloat16, not in float32; then nothing is joined. */
    int64_t half;
    /* Forward, levels 1 and 2: whether keys and values are in bfloat16, not in float32. */
    int64_t narrow;
    float scale;
    const void *q, *k, *v;
    Steps q_steps, k_steps, v_steps;
    /* Which heads of the arrays take part [H] and [K]. */
    const int64_t *q_heads, *k_heads;
    /* Which row of the arrays stands at each place, -1 for none, or NULL where they are the same:
     * [batches, groups, N] and [batches, groups, M], shared by batch rows and by neighbouring
     * heads. */
    const int64_t *q_rows, *k_rows;
    int64_t q_row_batches, q_row_groups, k_row_batches, k_row_groups;
    /* Ranges in places of keys [G, N, m], and the group of each head [B, H]. */
    const int32_t *lo, *hi;
    const int64_t *group;
    /* Results of the forward pass, which the backward pass reads. */
    void *out;
    float *lse;
    Steps out_steps, lse_steps;
    /* Backward only: gradients of out and lse. At levels 3 and 4 out and its gradient are in bfloat16. */
    const void *d_out;
    const float *d_lse;
    Steps d_out_steps, d_lse_steps;
    /* Gradients, as long as the arrays that they belong to. Those of keys are added to, and each
     * part has its own: dk [parts, batch, key heads, rows, D], dv with E. */
    float *dq, *dk, *dv;
    Steps dq_steps, dk_steps, dv_steps;
    int64_t dk_part, dv_part;
    /* Part p holds the tiles from first[p] to first[p + 1] of each head. */
    int64_t parts;
    const int64_t *first;
    /* The next piece of work: all threads draw from it. */
    int64_t next;
    /* Whether memory ran out for a thread. */
    int64_t failed;
} Task;

/* Which sources this was made of (build.py): a caller of others stays away. */
int64_t longspan_sources(void);
/* What the machine can do: 0 nothing of ours, 1 AVX2, 2 AVX-512, 3 also products of bfloat16, 4 those
 * of AMX. Tasks of levels 3 and 4 are in bfloat16 (D and E multiples of 32); all else is float32 and
 * of level 1 or 2, but for keys that are `narrow`. */
int64_t longspan_level(void);
/* Query rows of a tile at a level, 1 where it has no code. */
int64_t longspan_tile(int64_t level);
/* Ask for large pages where memory was not touched yet. */
void longspan_large_pages(void *x, int64_t bytes);
/* Work on a task, from any number of threads at once. */
void longspan_forward(Task *task);
void longspan_backward(Task *task);
#endif
