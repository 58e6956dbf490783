/* Which instruction set does the work, and what does not depend on it. */
#include "native.h"
#include <sys/mman.h>

int64_t longspan_forward_avx2(Task *), longspan_backward_avx2(Task *), longspan_tile_avx2(void);
int64_t longspan_forward_avx512(Task *), longspan_backward_avx512(Task *);
int64_t longspan_tile_avx512(void);

#ifdef LONGSPAN_WITHOUT_BF16
/* The compiler does not know it. */
static int64_t longspan_forward_bf16(Task *task) { return task == 0; }
static int64_t longspan_backward_bf16(Task *task) { return task == 0; }
static int64_t longspan_tile_bf16(void) { return 1; }
static int64_t longspan_bf16(void) { return 0; }
#else
int64_t longspan_forward_bf16(Task *), longspan_backward_bf16(Task *), longspan_tile_bf16(void);
static int64_t longspan_bf16(void) { return __builtin_cpu_supports("avx512bf16") != 0; }
#endif

#ifdef LONGSPAN_WITHOUT_AMX
/* The compiler does not know it. */
static int64_t longspan_forward_amx(Task *task) { return task == 0; }
static int64_t longspan_backward_amx(Task *task) { return task == 0; }
static int64_t longspan_tile_amx(void) { return 1; }
static int64_t longspan_amx(void) { return 0; }
#else
int64_t longspan_forward_amx(Task *), longspan_backward_amx(Task *);
int64_t longspan_tile_amx(void), longspan_amx(void);
#endif

#ifndef LONGSPAN_SOURCES
#define LONGSPAN_SOURCES 0
#endif
int64_t longspan_sources(void) { return LONGSPAN_SOURCES; }

void longspan_large_pages(void *x, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    /* Whole pages only; whether the system follows the advice makes no difference to what is there. */
    const intptr_t page = 4096, begin = ((intptr_t)x + page - 1) / page * page;
    const intptr_t end = ((intptr_t)x + bytes) / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)x, (void)bytes;
#endif
}

int64_t longspan_level(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return longspan_amx() ? 4 : longspan_bf16() ? 3 : 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

int64_t longspan_tile(int64_t level) {
    switch (level) {
        case 4: return longspan_tile_amx();
        case 3: return longspan_tile_bf16();
        case 2: return longspan_tile_avx512();
        default: return longspan_tile_avx2();
    }
}

static int64_t forward(Task *task) {
    switch (task->level) {
        case 4: return longspan_forward_amx(task);
        case 3: return longspan_forward_bf16(task);
        case 2: return longspan_forward_avx512(task);
        default: return longspan_forward_avx2(task);
    }
}

static int64_t backward(Task *task) {
    switch (task->level) {
        case 4: return longspan_backward_amx(task);
        case 3: return longspan_backward_bf16(task);
        case 2: return longspan_backward_avx512(task);
        default: return longspan_backward_avx2(task);
    }
}

void longspan_forward(Task *task) {
    if (forward(task)) __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
}

void longspan_backward(Task *task) {
    if (backward(task)) __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
}
