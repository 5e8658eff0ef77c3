/* Locks that only spin. */
#include "locks.h"

struct node nodes[MAX_CPUS];

/* ---- test-and-set, test-and-test-and-set -------------------------------------------------------------------- */

void tas_lock(struct cpu *me, union lock *l)
{
    while (XCHG(l->word, 1))
        relax(me);
}

void ttas_lock(struct cpu *me, union lock *l)
{
    while (READ(l->word) || XCHG(l->word, 1))
        relax(me);
}

void word_unlock(struct cpu *me, union lock *l)
{
    WRITE(l->word, 0);
    released(me);
}

/* ---- broken: the test and the set are two steps, and time passes between them ------------------------------ */

void broken_lock(struct cpu *me, union lock *l)
{
    while (READ(l->word))
        relax(me);
    delay_loops(32);
    WRITE(l->word, 1);
}

/* ---- ticket ------------------------------------------------------------------------------------------------- */

void ticket_lock(struct cpu *me, union lock *l)
{
    u16 mine = ADD(l->ticket.next, 1);

    while (READ(l->ticket.head) != mine)
        relax(me);
}

void ticket_unlock(struct cpu *me, union lock *l)
{
    WRITE(l->ticket.head, (u16)(l->ticket.head + 1));
    released(me);
}

/* ---- MCS (Mellor-Crummey and Scott, 1991): each waiter spins on its own line ------------------------------- */

void mcs_lock(struct cpu *me, union lock *l)
{
    struct node *node = &nodes[me->index], *before;

    node->next = 0;
    node->locked = 0;
    before = (struct node *)XCHG(l->tail, (u64)node);
    if (!before)
        return;
    WRITE(before->next, node);
    while (!READ(node->locked))
        relax(me);
}

void mcs_unlock(struct cpu *me, union lock *l)
{
    struct node *node = &nodes[me->index];

    if (!READ(node->next) && CMPXCHG(l->tail, (u64)node, 0) == (u64)node) {
        released(me);
        return;
    }
    WRITE(next_of(me, node)->locked, 1);
    released(me);
}

/*
 * ---- qspinlock (kernel/locking/qspinlock.c, 6.16) ------------------------------------------------------------
 *
 * The owner has the locked byte, the first waiter the pending byte, all others an MCS queue whose end is in the
 * tail. Not modelled: nested contexts (four nodes a CPU); this guest takes no interrupts.
 */

#define PENDING_TURNS 512                       /* _Q_PENDING_LOOPS on x86 */

void queued_lock(struct cpu *me, union lock *l)
{
    struct node *node = &nodes[me->index];
    u16 mine = tail_of(me->index), before;
    u32 val = CMPXCHG(l->word, 0, LOCKED);

    if (!val)
        return;

    /* Pending is turning into locked: give it a moment, and perhaps the queue need not be used. */
    for (u32 turns = PENDING_TURNS; val == PENDING && turns; turns--) {
        relax(me);
        val = READ(l->word);
    }

    if (!(val & ~LOCKED_MASK)) {
        val = OR(l->word, PENDING);
        if (!(val & ~LOCKED_MASK)) {
            /* First waiter: nobody else touches locked and pending until both change hands here. */
            while (READ(l->queued.locked))
                relax(me);
            WRITE(l->halves.locked_pending, LOCKED);
            return;
        }
        if (!(val & PENDING))
            WRITE(l->queued.pending, 0);
    }

    node->next = 0;
    node->locked = 0;
    /* The lock may have become free while the node's line was fetched. */
    if (!READ(l->word) && !CMPXCHG(l->word, 0, LOCKED))
        return;

    before = XCHG(l->queued.tail, mine);
    if (before) {
        WRITE(node_of(before)->next, node);
        while (!READ(node->locked))
            relax(me);
    }

    /* Head of the queue: wait for the owner and for the pending waiter. */
    while ((val = READ(l->word)) & (LOCKED_MASK | PENDING))
        relax(me);

    /* Alone: take the lock and end the queue in one step. Else somebody follows, or is about to. */
    if (val >> 16 == mine && CMPXCHG(l->word, val, LOCKED) == val)
        return;
    WRITE(l->queued.locked, 1);
    WRITE(next_of(me, node)->locked, 1);
}

void queued_unlock(struct cpu *me, union lock *l)
{
    WRITE(l->queued.locked, 0);
    released(me);
}
