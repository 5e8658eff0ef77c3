/*
 * The local APIC timer in its three modes, with STI; HLT between the ticks; each tick's time since the first start
 * of the timer is printed.
 *
 * Options: mode=oneshot|periodic|deadline  n=10  period=1000 (us)  tsc_khz (lib.h)
 */
#include "lib.h"

#define VECTOR          0x40
#define TSC_DEADLINE    0x6E0                   /* IA32_TSC_DEADLINE */
#define DIVIDE_BY_1     0xB
#define LVT_MASKED      0x10000

enum { ONESHOT, PERIODIC, DEADLINE };
static const char *const modes[] = { "oneshot", "periodic", "deadline", 0 };

static u32 mode;
static u64 n, count, initial, period_tsc, deadline;

/* Times of ticks that are not yet printed: printing may take longer than a period. */
#define RING 1024
static u64 tick_tsc[RING];
static volatile u64 ticks;

__attribute__((interrupt)) static void tick(struct frame *frame)
{
    (void)frame;
    tick_tsc[ticks % RING] = rdtsc();
    ticks++;
    if (ticks >= n) {
        apic_write(APIC_LVT_TIMER, LVT_MASKED | VECTOR);
    } else if (mode == ONESHOT) {
        apic_write(APIC_TIMER_INITIAL, initial);
    } else if (mode == DEADLINE) {
        deadline += period_tsc;
        wrmsr(TSC_DEADLINE, deadline);
    }
    apic_write(APIC_EOI, 0);
}

/* The timer's kHz with divide by 1: how far it counts down in about a millisecond of the TSC. */
static u64 timer_khz(void)
{
    u64 start, cycles, counted;

    apic_write(APIC_LVT_TIMER, LVT_MASKED | VECTOR);
    apic_write(APIC_TIMER_DIVIDE, DIVIDE_BY_1);
    start = rdtsc();
    apic_write(APIC_TIMER_INITIAL, 0xFFFFFFFF);
    delay(1000000);
    counted = 0xFFFFFFFF - apic_read(APIC_TIMER_CURRENT);
    cycles = rdtsc() - start;
    apic_write(APIC_TIMER_INITIAL, 0);
    return counted * tsc_khz / cycles;
}

u32 guest_main(void)
{
    u64 period, start;

    mode = option_choice("mode", modes, ONESHOT);
    n = option("n", 10);
    period = option("period", 1000);
    options_end();
    if (!n || !period || period > 1000000)
        refuse("out of range: ", n ? "period" : "n");
    if (mode == DEADLINE && !(cpuid(1).c >> 24 & 1))
        refuse("this machine has no TSC deadline timer", "");

    apic_enable();
    set_gate(VECTOR, tick);
    period_tsc = ns_to_tsc(period * 1000);
    initial = timer_khz() * period / 1000;
    apic_write(APIC_LVT_TIMER, mode << 17 | VECTOR);
    start = rdtsc();
    if (mode == DEADLINE) {
        deadline = start + period_tsc;
        wrmsr(TSC_DEADLINE, deadline);
    } else {
        apic_write(APIC_TIMER_INITIAL, initial);
    }

    while (count < n) {
        if (ticks == count) {
            wait_for_interrupt();
            continue;
        }
        put("tick ");
        put_dec(count);
        put(" at ");
        put_dec(tsc_to_ns(tick_tsc[count % RING] - start) / 1000);
        put(" us\n");
        count++;
    }
    return EXIT_OK;
}
