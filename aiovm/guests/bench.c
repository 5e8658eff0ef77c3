/*
 * Fixed loops, for measuring the machine: its speed from outside, its cost model by the cycles printed.
 *
 * Options: loop=alu|mem|call|cpuid|msr|port|mmio|hypercall|rdtsc|pause  n=1000000  tsc_khz (lib.h)
 * A round is three instructions in alu, six in mem, five in call; in the others the named one, DEC and JNZ, with
 * what its operands need.
 */
#include "lib.h"

static u64 cell[2] aligned64;

static void alu(u64 n)
{
    u64 sum = 0;
    __asm__ volatile("1: add %1, %0; dec %1; jnz 1b" : "+r"(sum), "+r"(n) : : "cc");
}

static void mem(u64 n)
{
    u64 x = 0;
    __asm__ volatile("1: mov (%2), %1; add $1, %1; mov %1, 8(%2); incq (%2); dec %0; jnz 1b"
                     : "+r"(n), "+r"(x) : "r"(cell) : "cc", "memory");
}

static void call(u64 n)
{
    __asm__ volatile("jmp 2f; 1: nop; ret; 2: call 1b; dec %0; jnz 2b" : "+r"(n) : : "cc", "memory");
}

static void with_cpuid(u64 n)
{
    for (; n; n--)
        cpuid(0);
}

/* IA32_APIC_BASE. */
static void msr(u64 n)
{
    for (; n; n--)
        rdmsr(0x1B);
}

/* The POST port: nothing is behind it. */
static void port(u64 n)
{
    for (; n; n--)
        outb(0x80, 0);
}

static void mmio(u64 n)
{
    for (; n; n--)
        apic_read(APIC_ID);
}

/* KVM_HC_VAPIC_POLL_IRQ: an exit, and nothing else. */
static void with_hypercall(u64 n)
{
    for (; n; n--)
        hypercall(1, 0, 0);
}

static void with_rdtsc(u64 n)
{
    for (; n; n--)
        rdtsc();
}

static void with_pause(u64 n)
{
    for (; n; n--)
        pause();
}

static const struct { const char *name; void (*run)(u64 n); } loops[] = {
    { "alu", alu },
    { "mem", mem },
    { "call", call },
    { "cpuid", with_cpuid },
    { "msr", msr },
    { "port", port },
    { "mmio", mmio },
    { "hypercall", with_hypercall },
    { "rdtsc", with_rdtsc },
    { "pause", with_pause },
};

#define LOOPS (sizeof(loops) / sizeof(*loops))

u32 guest_main(void)
{
    const char *names[LOOPS + 1];
    u64 n, start, cycles;
    u32 which;

    for (u32 i = 0; i < LOOPS; i++)
        names[i] = loops[i].name;
    names[LOOPS] = 0;
    which = option_choice("loop", names, 0);
    n = option("n", 1000000);
    options_end();
    if (!n)
        refuse("out of range: ", "n");

    start = rdtsc();
    loops[which].run(n);
    cycles = rdtsc() - start;

    put(names[which]);
    put(": ");
    put_dec(n);
    put(" rounds, ");
    put_dec(cycles);
    put(" cycles\n");
    return EXIT_OK;
}
