/* Each CPU in turn says hello. Option: cpus (as many as CPUID says). */
#include "lib.h"

static u32 cpus;
static u32 done;

static void hello(u32 cpu)
{
    put("hello from vCPU ");
    put_dec(cpu);
    put(" of ");
    put_dec(cpus);
    put("\n");
    __atomic_store_n(&done, cpu + 1, __ATOMIC_RELEASE);
}

/* CPUID.1: EBX[23:16] counts the package's logical CPUs when EDX[28] is set. */
static u32 count_cpus(void)
{
    struct cpuid r = cpuid(1);

    return r.d >> 28 & 1 ? r.b >> 16 & 0xFF : 1;
}

u32 guest_main(void)
{
    u64 given = option("cpus", count_cpus());

    options_end();
    if (given < 1 || given >= MAX_CPUS)
        refuse("cpus: 1 to 255", "");
    cpus = given;
    hello(0);
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        cpu_start(cpu, hello);
        for (u64 end = rdtsc() + ns_to_tsc(1000000000); __atomic_load_n(&done, __ATOMIC_ACQUIRE) <= cpu;) {
            delay(1000);
            if (rdtsc() > end) {
                put("no answer from vCPU ");
                put_dec(cpu);
                put("\n");
                return EXIT_FAILED;
            }
        }
    }
    return EXIT_OK;
}
