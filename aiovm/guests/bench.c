/*
 * Fixed loops, for measuring the machine: its speed from outside, its cost model by the cycles printed.
 *
 * Options: loop=alu|mem|call|cpuid|msr|wrmsr|port|in|mmio|store|hypercall|rdtsc|pause|fault|timer|ipi|wake
 *          n=1000000  tsc_khz (lib.h)
 * A round is three instructions in alu, six in mem, five in call. In fault it is a page fault and its IRET; in timer an
 * interrupt from the local APIC, armed, slept for, and ended; in ipi and wake an interrupt sent to CPU 1, which runs or
 * sleeps, and CPU 0's wait until it was handled. In the others it is the named one, DEC and JNZ, with what its operands
 * need.
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

/* IA32_SYSENTER_EIP: a register, and no more. */
static void with_wrmsr(u64 n)
{
    for (; n; n--)
        wrmsr(0x176, 0);
}

/* The POST port: nothing is behind it. */
static void port(u64 n)
{
    for (; n; n--)
        outb(0x80, 0);
}

static void with_in(u64 n)
{
    for (; n; n--)
        inb(0x80);
}

static void mmio(u64 n)
{
    for (; n; n--)
        apic_read(APIC_ID);
}

/* The logical destination: nobody waits for it. */
static void store(u64 n)
{
    for (; n; n--)
        apic_write(APIC_LDR, 0x01000000);
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

struct frame { u64 ip, cs, flags, sp, ss; };

#define PAGE_FAULT  14
#define VECTOR      0x40
#define ABSENT      (1UL << 40)                 /* boot.S maps four GiB */

/* The load is MOV AL, [RAX]: two bytes. */
__attribute__((interrupt)) static void on_fault(struct frame *frame, u64 error)
{
    (void)error;
    frame->ip += 2;
}

static void fault(u64 n)
{
    set_gate(PAGE_FAULT, (void (*)(struct frame *))(void *)on_fault);
    for (; n; n--)
        __asm__ volatile("movb (%%rax), %%al" : : "a"(ABSENT) : "memory");
}

static u64 received aligned64;
static u32 ready, asleep;

__attribute__((interrupt)) static void receive(struct frame *frame)
{
    (void)frame;
    __atomic_store_n(&received, received + 1, __ATOMIC_RELEASE);
    apic_write(APIC_EOI, 0);
}

static void timer(u64 n)
{
    set_gate(VECTOR, receive);
    apic_enable();
    apic_write(APIC_TIMER_DIVIDE, 0xB);
    apic_write(APIC_LVT_TIMER, VECTOR);
    for (; n; n--) {
        apic_write(APIC_TIMER_INITIAL, 1);
        wait_for_interrupt();
    }
}

static void other_cpu(u32 cpu)
{
    (void)cpu;
    apic_enable();
    __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
    while (asleep)
        wait_for_interrupt();
    __asm__ volatile("sti" : : : "memory");
    for (;;)
        pause();
}

static void ipi(u64 n)
{
    set_gate(VECTOR, receive);
    apic_enable();
    cpus_start(2, other_cpu);
    while (!__atomic_load_n(&ready, __ATOMIC_ACQUIRE))
        pause();
    for (u64 i = 1; i <= n; i++) {
        send_ipi(1, VECTOR);
        while (__atomic_load_n(&received, __ATOMIC_ACQUIRE) != i)
            pause();
    }
}

static void wake(u64 n)
{
    asleep = 1;
    ipi(n);
}

static const struct { const char *name; void (*run)(u64 n); } loops[] = {
    { "alu", alu },
    { "mem", mem },
    { "call", call },
    { "cpuid", with_cpuid },
    { "msr", msr },
    { "wrmsr", with_wrmsr },
    { "port", port },
    { "in", with_in },
    { "mmio", mmio },
    { "store", store },
    { "hypercall", with_hypercall },
    { "rdtsc", with_rdtsc },
    { "pause", with_pause },
    { "fault", fault },
    { "timer", timer },
    { "ipi", ipi },
    { "wake", wake },
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
