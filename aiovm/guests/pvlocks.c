/*
 * Paravirtual locks: a waiter that has spun for lock_params.spin turns halts, and is kicked by hypercall.
 *
 * Not modelled: nested contexts; vcpu_is_preempted in the queue, as Linux took it back (commit 89340d0935c9);
 * waiting with interrupts on (IF is always clear here).
 */
#include "locks.h"

/*
 * ---- PV ticket (Linux 4.4: arch/x86/include/asm/spinlock.h, arch/x86/kernel/kvm.c) --------------------------
 *
 * Tickets count in twos: bit 0 of head says that somebody may have halted. A waiter first publishes what it waits
 * for, then sets that bit, then looks again; the owner first moves head on, then sees the bit and looks for the
 * next ticket's waiter. Whoever is second sees the first.
 */

#define TICKET          2
#define SLOWPATH        1

static struct { union lock *lock; u32 want; } aligned64 waiting[MAX_CPUS];
static u64 waiting_mask[MAX_CPUS / 64];

static void ticket_wait(struct cpu *me, union lock *l, u16 want)
{
    u64 *mask = &waiting_mask[me->index / 64], bit = 1UL << me->index % 64;

    /* A kicker that sees the lock must see this ticket with it. */
    WRITE(waiting[me->index].want, want);
    WRITE(waiting[me->index].lock, l);
    OR(*mask, bit);
    OR(l->ticket.head, SLOWPATH);
    if ((READ(l->ticket.head) & ~SLOWPATH) != want)
        halt(me);
    AND(*mask, ~bit);
    WRITE(waiting[me->index].lock, (union lock *)0);
}

static void ticket_kick(struct cpu *me, union lock *l, u16 ticket)
{
    for (u32 w = 0; w < MAX_CPUS / 64; w++)
        for (u64 set = READ(waiting_mask[w]); set; set &= set - 1) {
            u32 cpu = w * 64 + __builtin_ctzl(set);
            if (READ(waiting[cpu].lock) == l && READ(waiting[cpu].want) == ticket) {
                kick(me, cpu);
                return;
            }
        }
}

void pvticket_lock(struct cpu *me, union lock *l)
{
    u16 mine = ADD(l->ticket.next, TICKET), head;
    u64 turns = lock_params.spin;

    while (((head = READ(l->ticket.head)) & ~SLOWPATH) != mine) {
        if (turns--) {
            relax(me);
        } else {
            ticket_wait(me, l, mine);
            turns = lock_params.spin;
        }
    }
    /* Nobody behind this ticket: nobody to kick. */
    if (head & SLOWPATH) {
        u32 alone = (u32)(u16)(mine + TICKET) << 16 | head;
        CMPXCHG(l->word, alone, alone & ~SLOWPATH);
    }
}

void pvticket_unlock(struct cpu *me, union lock *l)
{
    u16 head = ADD(l->ticket.head, TICKET);

    released(me);
    if (head & SLOWPATH)
        ticket_kick(me, l, (head & ~SLOWPATH) + TICKET);
}

/*
 * ---- PV qspinlock (kernel/locking/qspinlock_paravirt.h, 6.16) ------------------------------------------------
 *
 * A newcomer may steal the lock while the queue's head does not claim it by the pending byte. A waiter in the queue
 * halts as HALTED; its predecessor, on making it the head, turns that into HASHED and leaves it asleep: the locked
 * byte becomes SLOW, and the unlocker finds in the hash whom to kick.
 */

#define SLOW            3
#define PREVIOUS_CHECK  256                     /* look at the predecessor's state each so many turns */

enum { RUNNING = 0, HALTED = 1, HASHED = 2 };

/* Open addressing by lines of 64 bytes; never full: at most one entry for each contended lock. */
#define HASH_LINES      MAX_CPUS
#define HASH_ENTRIES    4

static struct { union lock *lock; struct node *node; } hash[HASH_LINES][HASH_ENTRIES] aligned64;

static u32 hash_line(const union lock *l)
{
    return ((u32)((u64)l >> 6) * 0x9E3779B1U >> 24) % HASH_LINES;
}

static void hash_insert(union lock *l, struct node *node)
{
    for (u32 line = hash_line(l);; line = (line + 1) % HASH_LINES)
        for (u32 i = 0; i < HASH_ENTRIES; i++)
            if (!READ(hash[line][i].lock) && !CMPXCHG(hash[line][i].lock, (union lock *)0, l)) {
                WRITE(hash[line][i].node, node);
                return;
            }
}

static struct node *hash_remove(union lock *l)
{
    for (u32 line = hash_line(l);; line = (line + 1) % HASH_LINES)
        for (u32 i = 0; i < HASH_ENTRIES; i++)
            if (READ(hash[line][i].lock) == l) {
                struct node *node = READ(hash[line][i].node);
                WRITE(hash[line][i].lock, (union lock *)0);
                return node;
            }
}

/* Sleep if the byte still has the value. A kick between the test and HLT makes that HLT return at once. */
static void wait_while(struct cpu *me, u8 *byte, u8 value)
{
    if (READ(*byte) == value)
        halt(me);
}

static int steal(struct cpu *me, union lock *l)
{
    for (;;) {
        u32 val = READ(l->word);
        if (!(val & (LOCKED_MASK | PENDING)) && !CMPXCHG(l->queued.locked, 0, LOCKED))
            return 1;
        if (!(val & TAIL_MASK) || val & PENDING)
            return 0;
        relax(me);
    }
}

/* Until the predecessor makes this node the head. */
static void wait_node(struct cpu *me, struct node *node, struct node *before)
{
    for (;;) {
        for (u64 turns = lock_params.spin; turns; turns--) {
            if (READ(node->locked))
                return;
            /* The predecessor sleeps: this one's turn is not near. */
            if (turns % PREVIOUS_CHECK == 0 && READ(before->state) != RUNNING)
                break;
            relax(me);
        }
        XCHG(node->state, HALTED);              /* a barrier: the state is out before locked is read again */
        if (!READ(node->locked))
            wait_while(me, &node->state, HALTED);
        CMPXCHG(node->state, HALTED, RUNNING);  /* HASHED stays: then the hash has an entry for this node */
        if (READ(node->locked))
            return;
    }
}

/* Until the head of the queue has the lock. */
static void wait_head(struct cpu *me, union lock *l, struct node *node)
{
    int hashed = READ(node->state) == HASHED;

    for (;;) {
        WRITE(node->state, RUNNING);
        WRITE(l->queued.pending, 1);            /* no more stealing */
        for (u64 turns = lock_params.spin; turns; turns--) {
            if (!READ(l->queued.locked) && CMPXCHG(l->halves.locked_pending, PENDING, LOCKED) == PENDING)
                return;
            relax(me);
        }
        WRITE(l->queued.pending, 0);

        if (!hashed) {
            hash_insert(l, node);
            hashed = 1;
            if (!XCHG(l->queued.locked, SLOW)) {
                /* It was free: owned now, and nobody will look for the entry. */
                WRITE(l->queued.locked, LOCKED);
                hash_remove(l);
                return;
            }
        }
        WRITE(node->state, HASHED);
        wait_while(me, &l->queued.locked, SLOW);
    }
}

/* The head owns the lock: make the next node the head, and if it sleeps leave it to the unlocker. */
static void hand_on(struct cpu *me, union lock *l, struct node *node)
{
    struct node *next = next_of(me, node);

    WRITE(next->locked, 1);
    if (CMPXCHG(next->state, HALTED, HASHED) == HALTED) {
        WRITE(l->queued.locked, SLOW);
        hash_insert(l, next);
    }
}

void pvqueued_lock(struct cpu *me, union lock *l)
{
    struct node *node = &nodes[me->index];
    u16 mine = tail_of(me->index), before;
    u32 val;

    if (!CMPXCHG(l->word, 0, LOCKED))
        return;

    node->next = 0;
    node->locked = 0;
    node->cpu = me->index;
    node->state = RUNNING;
    if (steal(me, l))
        return;

    before = XCHG(l->queued.tail, mine);
    if (before) {
        WRITE(node_of(before)->next, node);
        wait_node(me, node, node_of(before));
    }
    wait_head(me, l, node);

    val = READ(l->word);
    if (val >> 16 == mine && CMPXCHG(l->word, val, LOCKED) == val)
        return;
    hand_on(me, l, node);
}

void pvqueued_unlock(struct cpu *me, union lock *l)
{
    struct node *node;

    if (CMPXCHG(l->queued.locked, LOCKED, 0) == LOCKED) {
        released(me);
        return;
    }
    node = hash_remove(l);
    WRITE(l->queued.locked, 0);
    released(me);
    kick(me, node->cpu);
}
