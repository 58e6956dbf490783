/* bfloat16 with tile registers: Sapphire Rapids and later. */
#ifndef LONGSPAN_WITHOUT_AMX
#define PRODUCTS "unit_amx.inc"
#include "bf16_forward.inc"
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#endif
