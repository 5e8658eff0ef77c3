/*
 * HLT against the kick: two CPUs play ping-pong and both sleep while they wait, with interrupts off, so that only
 * the kick hypercall can wake them. Random delays put the kick before the waiter's test, between its test and its
 * HLT, and after its HLT; for a kick before the test, jitter must exceed the time that a wake-up takes. A lost kick
 * leaves both asleep for ever.
 *
 * Options: rounds=100000  jitter=5000 (each delay is uniform below this, ns)  seed=1  tsc_khz (lib.h)
 */
#include "lib.h"

static struct {
    u64 round;                                  /* the last round begun for this CPU, set by the other */
    u64 random;
    u64 halts, early, spurious;                 /* HLTs; rounds that never slept; wake-ups before the time */
} aligned64 side[2];

static u64 rounds, jitter;

static void pause_a_while(u64 *random)
{
    delay(jitter ? random_below(random, jitter) : 0);
}

static void begin_round(u32 cpu, u64 round)
{
    __atomic_store_n(&side[cpu].round, round, __ATOMIC_RELEASE);
    kick_cpu(cpu);
}

static void await_round(u32 cpu, u64 round)
{
    u64 slept = 0;

    pause_a_while(&side[cpu].random);
    while (__atomic_load_n(&side[cpu].round, __ATOMIC_ACQUIRE) < round) {
        side[cpu].spurious += slept != 0;
        pause_a_while(&side[cpu].random);       /* the gap that a kick may fall into */
        hlt();
        slept++;
    }
    side[cpu].halts += slept;
    side[cpu].early += !slept;
}

static void play(u32 cpu)
{
    u32 other = 1 - cpu;

    for (u64 round = 1; round <= rounds; round++) {
        if (cpu == 1)
            await_round(1, round);
        pause_a_while(&side[cpu].random);
        begin_round(other, round);
        if (cpu == 0)
            await_round(0, round);
    }
}

static void report(const char *what, u64 value)
{
    put(what);
    put_dec(value);
}

u32 guest_main(void)
{
    u64 seed = option("seed", 1);

    rounds = option("rounds", 100000);
    jitter = option("jitter", 5000);
    options_end();
    if (!has_pv_unhalt())
        refuse("this machine has no KVM_FEATURE_PV_UNHALT", "");
    for (u32 cpu = 0; cpu < 2; cpu++)
        side[cpu].random = random_stream(seed, cpu);

    cpu_start(1, play);
    play(0);

    report("kickrace: ", rounds);
    report(" rounds, ", side[0].halts + side[1].halts);
    report(" halts, ", side[0].early + side[1].early);
    report(" kicks in time to save one, ", side[0].spurious + side[1].spurious);
    put(" wake-ups by an old kick\n");
    return EXIT_OK;
}
