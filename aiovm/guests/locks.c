/*
 * The lock workload. Each CPU: think, take a lock, work inside, release; until the time is over. The last CPU to
 * finish compares the owners' non-atomic counters with what was done, and ends the machine: 0 equal, 1 not.
 *
 * Options (times in ns): lock=tas|ttas|ticket|pvticket|mcs|qspinlock|pvqspinlock|broken  cpus=8  nlocks=1
 *   hold=2000 hold_dist=fixed  think=20000 think_dist=exp  (fixed|exp|uniform: the mean is the number given)
 *   spin=512 (PAUSEs before a PV lock halts)  duration=200000000  warmup=0  seed=1  tsc_khz (lib.h)
 *
 * There is no start line: CPUs begin as they come up. Time counts from just before the first is started. An
 * operation begun before the end of warm-up is in the check but not in the statistics.
 */
#include "locks.h"

volatile struct state lock_state[MAX_CPUS] aligned64;
struct stats lock_stats[MAX_CPUS];
u32 wait_hist[MAX_CPUS][HIST_BUCKETS] aligned64;
struct params lock_params;
union lock lock_words[MAX_LOCKS];
volatile struct { u64 count; } aligned64 lock_count[MAX_LOCKS];
u64 lock_ops[MAX_CPUS][MAX_LOCKS] aligned64;

static struct cpu cpus[MAX_CPUS];
static u32 finished aligned64;

static const struct kind kinds[] = {
    { "tas", tas_lock, word_unlock, 0 },
    { "ttas", ttas_lock, word_unlock, 0 },
    { "ticket", ticket_lock, ticket_unlock, 0 },
    { "pvticket", pvticket_lock, pvticket_unlock, 1 },
    { "mcs", mcs_lock, mcs_unlock, 0 },
    { "qspinlock", queued_lock, queued_unlock, 0 },
    { "pvqspinlock", pvqueued_lock, pvqueued_unlock, 1 },
    { "broken", broken_lock, word_unlock, 0 },
};

#define KINDS (sizeof(kinds) / sizeof(*kinds))

/* ---- distributions ------------------------------------------------------------------------------------------ */

enum { FIXED, EXPONENTIAL, UNIFORM };
static const char *const distributions[] = { "fixed", "exp", "uniform", 0 };

/* ln(1 + i/256) x 2^32 for i = 0 to 256, computed by the compiler. */
#define LN(i)   (u64)(__builtin_log(1.0 + (i) / 256.0) * 4294967296.0 + 0.5)
#define LN4(i)  LN(i), LN(i + 1), LN(i + 2), LN(i + 3)
#define LN16(i) LN4(i), LN4(i + 4), LN4(i + 8), LN4(i + 12)
#define LN64(i) LN16(i), LN16(i + 16), LN16(i + 32), LN16(i + 48)
static const u64 ln_table[257] = { LN64(0), LN64(64), LN64(128), LN64(192), LN(256) };

/* -ln(u / 2^64) x 2^32, by the leading one and linear interpolation in the table. */
static u64 minus_ln(u64 u)
{
    u32 zeros = __builtin_clzl(u);
    u64 mantissa = u << zeros << 1;             /* 1.m, the one shifted out */
    u32 at = mantissa >> 56;
    u64 fraction = mantissa >> 24 & 0xFFFFFFFF;
    u64 ln = ln_table[at] + ((ln_table[at + 1] - ln_table[at]) * fraction >> 32);

    return (zeros + 1) * ln_table[256] - ln;
}

static u64 draw(u64 *random, u64 distribution, u64 mean)
{
    switch (distribution) {
    case EXPONENTIAL:
        return (u128)mean * minus_ln(random_next(random)) >> 32;
    case UNIFORM:
        return random_below(random, 2 * mean + 1);
    default:
        return mean;
    }
}

/* ---- statistics --------------------------------------------------------------------------------------------- */

static u32 bucket(u64 wait)
{
    u32 e;

    if (wait < 32)
        return wait;
    e = 63 - __builtin_clzl(wait);
    return 32 * (e - 4) + (wait >> (e - 5) & 31);
}

static void record(struct cpu *me, u64 wait)
{
    struct stats *s = &lock_stats[me->index];

    s->ops_measured++;
    s->wait_sum_tsc += wait;
    if (wait > s->wait_max_tsc)
        s->wait_max_tsc = wait;
    s->halts += me->halts;
    s->kicks += me->kicks;
    s->acquired_after_halt += me->halts != 0;
    s->spins += me->spins;
    wait_hist[me->index][bucket(wait)]++;
}

/* ---- the check ---------------------------------------------------------------------------------------------- */

static u32 check(void)
{
    u64 total = 0, lost = 0;

    for (u32 l = 0; l < lock_params.nlocks; l++) {
        u64 done = 0, counted = lock_count[l].count;
        for (u32 cpu = 0; cpu < lock_params.cpus; cpu++)
            done += lock_ops[cpu][l];
        total += done;
        lost += done > counted ? done - counted : counted - done;
    }
    put(kinds[lock_params.lock].name);
    put(": ");
    put_dec(lock_params.cpus);
    put(" CPUs, ");
    put_dec(total);
    put(" operations, ");
    put_dec(lost);
    put(" lost\n");
    return lost ? EXIT_FAILED : EXIT_OK;
}

/* ---- the workload ------------------------------------------------------------------------------------------- */

static void work(u32 index)
{
    const struct params *p = &lock_params;
    const struct kind *kind = &kinds[p->lock];
    struct cpu *me = &cpus[index];
    volatile struct state *state = &lock_state[index];

    me->index = index;
    me->random = random_stream(p->seed, index);
    for (;;) {
        u64 loops, asked, got, count;
        u32 l;

        delay(draw(&me->random, p->think_dist, p->think_ns));
        l = p->nlocks > 1 ? random_below(&me->random, p->nlocks) : 0;
        loops = ns_to_loops(draw(&me->random, p->hold_dist, p->hold_ns));
        me->halts = me->kicks = me->spins = 0;

        state->lock = l;
        state->state = WAITING;
        asked = rdtsc();
        if (asked >= p->end_tsc)
            break;
        kind->lock(me, &lock_words[l]);
        state->state = HOLDING;
        got = rdtsc();
        count = lock_count[l].count;
        delay_loops(loops);
        lock_count[l].count = count + 1;
        kind->unlock(me, &lock_words[l]);

        lock_ops[index][l]++;
        lock_stats[index].ops_total++;
        if (asked >= p->measure_tsc)
            record(me, got > asked ? got - asked : 0);
    }
    state->state = OUTSIDE;
    if (ADD(finished, 1) + 1 == p->cpus)
        debug_exit(check());
}

static u64 option_within(const char *key, u64 fallback, u64 least, u64 most)
{
    u64 value = option(key, fallback);

    if (value < least || value > most)
        refuse("out of range: ", key);
    return value;
}

u32 guest_main(void)
{
    const char *names[KINDS + 1];
    struct params *p = &lock_params;

    for (u32 i = 0; i < KINDS; i++)
        names[i] = kinds[i].name;
    names[KINDS] = 0;

    p->lock = option_choice("lock", names, 0);
    p->cpus = option_within("cpus", 8, 1, MAX_CPUS - 1);
    p->hold_ns = option_within("hold", 2000, 0, 1000000000);
    p->think_ns = option_within("think", 20000, 0, 1000000000);
    p->hold_dist = option_choice("hold_dist", distributions, FIXED);
    p->think_dist = option_choice("think_dist", distributions, EXPONENTIAL);
    p->nlocks = option_within("nlocks", 1, 1, MAX_LOCKS);
    p->spin = option_within("spin", 512, 1, 1UL << 32);
    p->duration_ns = option_within("duration", 200000000, 0, 1UL << 50);
    p->warmup_ns = option_within("warmup", 0, 0, 1UL << 50);
    p->seed = option("seed", 1);
    options_end();
    if (kinds[p->lock].needs_kick && !has_pv_unhalt())
        refuse("this machine has no KVM_FEATURE_PV_UNHALT, needed by ", kinds[p->lock].name);

    p->tsc_khz = tsc_khz;
    p->loop_ns_fp = loop_ns_fp;
    p->start_tsc = rdtsc();
    p->measure_tsc = p->start_tsc + ns_to_tsc(p->warmup_ns);
    p->end_tsc = p->measure_tsc + ns_to_tsc(p->duration_ns);

    cpus_start(p->cpus, work);
    work(0);
    stop();
}
