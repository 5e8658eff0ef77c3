/*
 * Fixed interrupts between CPUs that sleep in HLT.
 *
 * mode=ring: a token goes round: each CPU that is interrupted interrupts the next. mode=all: CPU 0 interrupts all
 * others at once (shorthand "all excluding self"), the last of them to answer interrupts CPU 0.
 * Every CPU must receive one interrupt a round (mode=all, CPU 0 too).
 *
 * Options: mode=ring|all  cpus=2  rounds=1000
 */
#include "lib.h"

#define VECTOR 0x41

enum { RING, ALL };
static const char *const modes[] = { "ring", "all", 0 };

static u32 mode, cpus;
static u64 rounds;
static struct { volatile u64 received; u64 handled; } aligned64 side[MAX_CPUS];
static u32 ready aligned64, answers aligned64;

__attribute__((interrupt)) static void receive(struct frame *frame)
{
    (void)frame;
    side[cpu_index()].received++;
    apic_write(APIC_EOI, 0);
}

/* Sleep until an interrupt has come that was not handled yet. */
static void await(u32 cpu)
{
    while (side[cpu].received == side[cpu].handled)
        wait_for_interrupt();
    side[cpu].handled++;
}

static void serve(u32 cpu)
{
    apic_enable();
    __atomic_fetch_add(&ready, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        await(cpu);
        if (mode == RING) {
            send_ipi((cpu + 1) % cpus, VECTOR);
        } else if (__atomic_add_fetch(&answers, 1, __ATOMIC_SEQ_CST) == cpus - 1) {
            __atomic_store_n(&answers, 0, __ATOMIC_SEQ_CST);
            send_ipi(0, VECTOR);
        }
    }
}

u32 guest_main(void)
{
    u64 n = option("cpus", 2);
    u32 wrong = 0;

    mode = option_choice("mode", modes, RING);
    rounds = option("rounds", 1000);
    options_end();
    if (n < 2 || n >= MAX_CPUS)
        refuse("cpus: 2 to 255", "");
    cpus = n;
    set_gate(VECTOR, receive);
    apic_enable();
    cpus_start(cpus, serve);
    while (__atomic_load_n(&ready, __ATOMIC_ACQUIRE) < cpus - 1)
        pause();

    for (u64 round = 0; round < rounds; round++) {
        send_ipi(1, mode == RING ? VECTOR : ICR_ALL_BUT_SELF | VECTOR);
        await(0);
    }
    for (u32 cpu = 0; cpu < cpus; cpu++) {
        put("vCPU ");
        put_dec(cpu);
        put(" received ");
        put_dec(side[cpu].received);
        put("\n");
        wrong += side[cpu].received != rounds;
    }
    return wrong ? EXIT_FAILED : EXIT_OK;
}
