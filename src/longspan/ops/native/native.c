/* Which instruction set does the work. */
#include "native.h"

int64_t longspan_forward_avx2(Task *), longspan_backward_avx2(Task *), longspan_tile_avx2(void);
int64_t longspan_forward_avx512(Task *), longspan_backward_avx512(Task *);
int64_t longspan_tile_avx512(void);

int64_t longspan_task(void) { return sizeof(Task); }

int64_t longspan_level(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

int64_t longspan_tile(int64_t level) {
    return level >= 2 ? longspan_tile_avx512() : longspan_tile_avx2();
}

int64_t longspan_forward(Task *task) {
    return task->level >= 2 ? longspan_forward_avx512(task) : longspan_forward_avx2(task);
}

int64_t longspan_backward(Task *task) {
    return task->level >= 2 ? longspan_backward_avx512(task) : longspan_backward_avx2(task);
}
