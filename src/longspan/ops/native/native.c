/* Which instruction set does the work, and what does not depend on it. */
#include "native.h"
#include <sys/mman.h>

/* The kernels of an instruction set. */
typedef struct {
    int64_t (*tile)(void), (*forward)(Task *), (*backward)(Task *);
} Kernels;

#define DECLARE(set) \
    int64_t longspan_tile_##set(void), longspan_forward_##set(Task *), \
        longspan_backward_##set(Task *)
#define KERNELS(set) {longspan_tile_##set, longspan_forward_##set, longspan_backward_##set}
DECLARE(avx2);
DECLARE(avx512);
DECLARE(bf16);
DECLARE(amx);
int64_t longspan_amx(void);

/* By level; what the compiler does not know is missing. */
static const Kernels kernels[5] = {
    [1] = KERNELS(avx2),
    [2] = KERNELS(avx512),
#ifndef LONGSPAN_WITHOUT_BF16
    [3] = KERNELS(bf16),
#ifndef LONGSPAN_WITHOUT_AMX
    [4] = KERNELS(amx),
#endif
#endif
};

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

/* The level of a machine with AVX-512. */
static int64_t level_512(void) {
#ifndef LONGSPAN_WITHOUT_BF16
#ifndef LONGSPAN_WITHOUT_AMX
    if (longspan_amx()) return 4;
#endif
    if (__builtin_cpu_supports("avx512bf16")) return 3;
#endif
    return 2;
}

int64_t longspan_level(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return level_512();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

int64_t longspan_tile(int64_t level) { return kernels[level].tile ? kernels[level].tile() : 1; }

static void run(Task *task, int64_t (*kernel)(Task *)) {
    if (kernel(task)) __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
}

void longspan_forward(Task *task) { run(task, kernels[task->level].forward); }

void longspan_backward(Task *task) { run(task, kernels[task->level].backward); }
