/* What the core reports in place. PAUSEs are counted here, so that a spinning vCPU crosses into Python only when its
 * pause-loop window closes. RDTSC and RDTSCP are answered here: guests that wait or gather entropy execute millions of
 * them; and CR3 is loaded here, which a kernel does at each process switch. All else is delivered, let through or carried
 * (_delivery.c, _port.c), or goes to Python (intercepts.py), which holds the same rules. */
#include "_budget.h"
#include <time.h>

void fetch_code(budget *b, void *uc)
{
    uint64_t linear = *b->hflags & CS64 ? *b->eip : (uint32_t)(*b->eip + *b->cs_base);
    size_t left = 4096 - (linear & 4095);
    b->code = 0;
    if (b->fetch(uc, linear, EXECUTE, &b->code, left < 4 ? left : 4))
        b->code = 0;
}

static int64_t time_now(const budget *b)
{
#ifdef __linux__
    struct timespec ts;
    if (b->tsc_epoch >= 0) {
        clock_gettime(CLOCK_MONOTONIC, &ts);
        return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec - b->tsc_epoch;
    }
#endif
    return b->cells[0];
}

void settle(budget *b, void *uc)
{
    if (over(b))
        b->stop(uc);
}

void done(budget *b, void *uc, uint64_t length)
{
    uint64_t next = *b->eip + length;
    *b->eip = *b->hflags & CS64 ? next : (uint32_t)next;
    *b->hflags &= ~(uint32_t)INHIBIT_IRQ;
    settle(b, uc);
}

/* RDTSC or RDTSCP without prefixes, not single-stepped; whether that was it. */
static int answer_rdtsc(budget *b, void *uc)
{
    uint64_t tsc, length;
    if (*b->eflags & TF)
        return 0;
    fetch_code(b, uc);
    if ((b->code & 0xffff) == 0x310f)
        length = 2;
    else if ((b->code & 0xffffff) == 0xf9010f)
        length = 3;
    else
        return 0;
    b->cells[0] += b->costs[RDTSC];
    tsc = (uint64_t)((unsigned __int128)time_now(b) * (uint64_t)b->tsc_khz / 1000000);
    if (tsc < b->tsc_last)
        tsc = b->tsc_last;
    b->tsc_last = tsc;
    tsc = (uint64_t)((unsigned __int128)tsc * b->tsc_ratio >> 48) + b->tsc_offset;
    b->regs[0] = (uint32_t)tsc;
    b->regs[2] = tsc >> 32;
    if (length == 3)
        b->regs[1] = (uint32_t)*b->tsc_aux;
    done(b, uc, length);
    return 1;
}

/* MOV to CR3 in 64-bit mode, of a value that cannot fault, not single-stepped; whether that was it. */
static int answer_cr3(budget *b, void *uc)
{
    uint32_t code, length = 3, high = 0;
    uint64_t value;
    if (!(*b->hflags & CS64) || *b->eflags & TF)
        return 0;
    fetch_code(b, uc);
    code = (uint32_t)b->code;
    if ((code & 0xf0) == 0x40) { /* REX, whose bit 0 is the register number's bit 3 */
        high = (code & 1) << 3;
        code >>= 8;
        length = 4;
    }
    if ((code & 0xffff) != 0x220f)
        return 0;
    value = b->regs[(code >> 16 & 7) | high];
    if (value >> b->cr3_width)
        return 0;
    b->cells[0] += b->costs[CR3_WRITE];
    *b->cr3 = value;
    b->flush_tlb(b->cpu);
    done(b, uc, length);
    return 1;
}

/* An exit for Python. The bytes of instructions that have one length, prefixes apart, come along. */
static void report(budget *b, void *uc, uint32_t number)
{
    PyGILState_STATE state;
    b->code = 0;
    if (b->eip && (number == CPUID || number == MSR || number == RDTSC || number == HLT || number == UNDEFINED)) {
        fetch_code(b, uc);
        if (carry(b, uc, number))
            return;
    }
    if (b->eip && ((number >= EXCEPTION && number < EXCEPTION + 32) || number == WINDOW || number == SOFT_INTERRUPT))
        settle_flags(b);
    b->cells[0] += b->costs[number];
    if (b->eip && number >= EXCEPTION && number < EXCEPTION + 32 && deliver_unheard(b, number - EXCEPTION)) {
        settle(b, uc);
        return;
    }
    state = PyGILState_Ensure();
    interrupt(b, number);
    PyGILState_Release(state);
    settle(b, uc);
}

void on_interrupt(void *uc, uint32_t number, void *data)
{
    budget *b = data;
    intercept_returns(b);
    if (number == PAUSE && b->eip) {
        int64_t now = b->cells[0], end = now + b->pause_cost;
        uint64_t next = *b->eip + 2;
        b->pauses++;
        b->cells[0] = end;
        *b->eip = *b->hflags & CS64 ? next : (uint32_t)next;
        *b->hflags &= ~(uint32_t)INHIBIT_IRQ;
        if (b->ple_window < 0 || (*b->hflags & CPL))
            return;
        if (now - b->ple_last > b->ple_gap)
            b->ple_first = now;
        b->ple_last = end;
        if (now - b->ple_first <= b->ple_window)
            return;
        b->ple_first = end;
    }
    if (number == RDTSC && b->tsc_khz && answer_rdtsc(b, uc))
        return;
    if (number == CR3_WRITE && b->cr3_width && answer_cr3(b, uc))
        return;
    if (number == IRET && b->eip && let_return(b, uc))
        return;
    report(b, uc, number);
}
