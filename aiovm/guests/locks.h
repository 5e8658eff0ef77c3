/*
 * The lock guest: what the host reads, and what a lock is.
 *
 * Exported symbols, little-endian, all 64-byte aligned. aiovm/locks/layout.py reads them.
 *
 * lock_state   256 entries of 64 bytes, one a CPU, written while the guest runs and made for looking at any time:
 *                  +0 u32  0 outside, 1 waiting, 2 holding        +4 u32  which lock
 *              A CPU is waiting from just before its first attempt, holding from the instruction after the lock
 *              call to the instruction after the store that releases: a kick that unlocking sends is outside.
 * lock_stats   256 entries of 64 bytes, one a CPU: u64s
 *                  +0  operations, all                            +8  operations, measured (begun after warm-up)
 *              and over the measured ones
 *                  +16 sum of the waits, TSC cycles               +24 longest wait, TSC cycles
 *                  +32 HLTs                                       +40 kicks sent
 *                  +48 operations that had to halt                +56 PAUSEs
 * wait_hist    256 rows of 1920 u32 counts, one row a CPU: the measured waits of w TSC cycles, log-linear:
 *                  bucket = w < 32 ? w : 32 * (e - 4) + ((w >> (e - 5)) & 31)  with e = floor(log2 w)
 *              so a bucket is at most 1/32 of its value wide.
 * lock_params  the parameters in force, u64s in the order of struct params.
 * lock_count   64 entries of 64 bytes, one a lock: u64, incremented by every owner with plain loads and stores.
 * lock_ops     256 rows of 64 u64s: operations by CPU and lock. Their sum over the CPUs is what lock_count must show.
 */
#ifndef LOCKS_H
#define LOCKS_H

#include "lib.h"

#define MAX_LOCKS 64
#define HIST_BUCKETS 1920

enum { OUTSIDE = 0, WAITING = 1, HOLDING = 2 };

struct state { u32 state, lock; } aligned64;

struct stats {
    u64 ops_total, ops_measured, wait_sum_tsc, wait_max_tsc, halts, kicks, acquired_after_halt, spins;
} aligned64;

struct params {
    u64 lock, cpus, hold_ns, think_ns, hold_dist, think_dist, nlocks, spin;
    u64 duration_ns, warmup_ns, seed, tsc_khz, loop_ns_fp;
    u64 start_tsc, measure_tsc, end_tsc;        /* start, end of warm-up, no new operation from here */
} aligned64;

extern volatile struct state lock_state[MAX_CPUS];
extern struct params lock_params;

/* A CPU's own things: its random numbers, and what it did in the present operation. */
struct cpu {
    u64 random;
    u32 index;
    u32 halts, kicks, spins;
} aligned64;

/* One line for each lock; each kind uses it in its own way. */
union lock {
    u32 word;
    u64 tail;                                   /* MCS */
    struct { u16 head, next; } ticket;
    struct { u8 locked, pending; u16 tail; } queued;
    struct { u16 locked_pending; } halves;
} aligned64;

extern union lock lock_words[MAX_LOCKS];

struct kind {
    const char *name;
    void (*lock)(struct cpu *me, union lock *l);
    void (*unlock)(struct cpu *me, union lock *l);
    int needs_kick;
};

/* A waiter in the queue of MCS, qspinlock and pvqspinlock. A CPU waits for one lock at a time: one node each. */
struct node {
    struct node *next;
    u32 locked;                                 /* set by the predecessor: head of the queue (MCS: owner) */
    u32 cpu;
    u8 state;                                   /* pvqspinlock */
} aligned64;

extern struct node nodes[MAX_CPUS];

/* Plain, acquire and release accesses; read-modify-writes are full barriers on x86 in any case. */
#define READ(x)         __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define WRITE(x, v)     __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)
#define XCHG(x, v)      __atomic_exchange_n(&(x), (v), __ATOMIC_SEQ_CST)
#define ADD(x, v)       __atomic_fetch_add(&(x), (v), __ATOMIC_SEQ_CST)
#define OR(x, v)        __atomic_fetch_or(&(x), (v), __ATOMIC_SEQ_CST)
#define AND(x, v)       __atomic_fetch_and(&(x), (v), __ATOMIC_SEQ_CST)

/* The value found; the exchange took place if it equals the old one. */
#define CMPXCHG(x, old, new) ({                                                                     \
    __typeof__(x) found_ = (old);                                                                   \
    __atomic_compare_exchange_n(&(x), &found_, (new), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
    found_; })

/* One turn of a spin loop. */
static inline void relax(struct cpu *me)
{
    me->spins++;
    pause();
}

/* Sleep until kicked; IF is clear in this guest at all times. */
static inline void halt(struct cpu *me)
{
    me->halts++;
    hlt();
}

static inline void kick(struct cpu *me, u32 cpu)
{
    me->kicks++;
    kick_cpu(cpu);
}

/* To be called by every unlock right after the store that releases, before any kick. */
static inline void released(struct cpu *me)
{
    lock_state[me->index].state = OUTSIDE;
}

void tas_lock(struct cpu *me, union lock *l);
void ttas_lock(struct cpu *me, union lock *l);
void word_unlock(struct cpu *me, union lock *l);
void ticket_lock(struct cpu *me, union lock *l);
void ticket_unlock(struct cpu *me, union lock *l);
void mcs_lock(struct cpu *me, union lock *l);
void mcs_unlock(struct cpu *me, union lock *l);
void queued_lock(struct cpu *me, union lock *l);
void queued_unlock(struct cpu *me, union lock *l);
void broken_lock(struct cpu *me, union lock *l);

void pvticket_lock(struct cpu *me, union lock *l);
void pvticket_unlock(struct cpu *me, union lock *l);
void pvqueued_lock(struct cpu *me, union lock *l);
void pvqueued_unlock(struct cpu *me, union lock *l);

/* The queued locks' word: locked [7:0], pending [15:8], tail [31:16] = (cpu + 1) << 2, as Linux below 16K CPUs. */
#define LOCKED          0x00000001U
#define LOCKED_MASK     0x000000FFU
#define PENDING         0x00000100U
#define TAIL_MASK       0xFFFF0000U

static inline u16 tail_of(u32 cpu) { return (cpu + 1) << 2; }
static inline struct node *node_of(u32 tail16) { return &nodes[(tail16 >> 2) - 1]; }

/* The node that follows; its CPU may still be about to link it. */
static inline struct node *next_of(struct cpu *me, struct node *node)
{
    struct node *next;

    while (!(next = READ(node->next)))
        relax(me);
    return next;
}

#endif
