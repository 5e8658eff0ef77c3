/* The block-budget hook: virtual time advances by the code bytes of each translated block, and the slice ends
 * before the block that would start at or after its limit. PAUSEs are counted here, so that a spinning vCPU
 * crosses into Python only when its pause-loop window closes. RDTSC and RDTSCP are answered here: guests that wait
 * or gather entropy execute millions of them; and CR3 is loaded here, which a kernel does at each process switch.
 * Python holds the same rules; both stop at the same blocks.
 *
 * What the guest's port (Python's) answers with numbers is only carried: the plain forms of CPUID, RDMSR, WRMSR and the
 * hypercall, IN and OUT, and loads and stores where no memory is. Registers become arguments, and the answer goes back.
 * Prefixed and single-stepped instructions Python decodes by itself.
 *
 * Also here, and without a twin because no guest can see it: data accesses fill the TLB without the right to execute
 * where a page holds no code. The core sends every store to a page that may be executed through its slow path.
 */
#include "_budget.h"

/* The budget of the slice that this thread runs: the core's page walk has no other way to it. */
static _Thread_local budget *running;
static tlb_filler *core_fill;
static uintptr_t tlb_offset; /* of the TLB in the core's CPUState */
/* GuestPort's methods. */
enum question { ON_CPUID, ON_RDMSR, ON_WRMSR, ON_HYPERCALL, ON_IN, ON_OUT, ON_MMIO_READ, ON_MMIO_WRITE, QUESTIONS };
static const char *const NAMES[QUESTIONS] = {
    "on_cpuid", "on_rdmsr", "on_wrmsr", "on_hypercall", "on_in", "on_out", "on_mmio_read", "on_mmio_write",
};
static PyObject *questions[QUESTIONS];
enum { MOST_NUMBERS = 6 }; /* that a method takes */

/* Addresses where no memory is. */
typedef struct {
    budget *budget;
    uint64_t base;
} device_range;

typedef struct {
    uint64_t pc;
    uint16_t icount, size;
} block;

/* IRET is intercepted again. */
static void intercept_returns(budget *b)
{
    if (b->resume == &b->returning) {
        b->resume = b->resume_after;
        *b->intercepts |= (uint64_t)1 << (IRET - INTERCEPTS);
    }
}

static void on_block(void *uc, uint64_t address, uint32_t size, void *data)
{
    budget *b = data;
    volatile int64_t *cells = b->cells;
    int64_t now = cells[0];
    (void)address;
    if (__builtin_expect(now < cells[1], 1)) {
        int64_t charge = b->frac + (int64_t)size * b->rate;
        if (__builtin_expect(*b->exit_pending, 0))
            return;
        cells[0] = now + (charge >> 8);
        b->frac = charge & 255;
        if (__builtin_expect(*b->resume & RF, 0)) {
            if (b->resume != &b->returning) {
                *b->resume &= ~(uint64_t)RF;
            } else if (!b->returned) { /* it was charged before it exited */
                b->returned = 1;
                cells[0] = now;
                b->frac = charge - (int64_t)size * b->rate;
            } else {
                intercept_returns(b);
                *b->resume &= ~(uint64_t)RF;
            }
        }
    } else if (!*b->exit_pending) {
        b->stops++;
        b->stop(uc);
    }
}

/* The first bytes of the instruction at RIP, as many of four as lie in its page. */
static void fetch_code(budget *b, void *uc)
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

/* Whether the slice's time is over, or somebody ended it. */
static bool over(const budget *b)
{
    return b->cells[0] >= b->cells[1];
}

static void settle(budget *b, void *uc)
{
    if (over(b))
        b->stop(uc);
}

/* The instruction was answered here: step over it. */
static void done(budget *b, void *uc, uint64_t length)
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

/* Python raised: the engine keeps it. */
static void failed(budget *b)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace)
        PyException_SetTraceback(error, trace);
    Py_XDECREF(PyObject_CallFunctionObjArgs(b->fail, error, NULL));
    if (PyErr_Occurred())
        PyErr_WriteUnraisable(b->fail);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
}

/* Hand an exit to Python. */
static void interrupt(budget *b, uint32_t number)
{
    PyObject *argument = PyLong_FromUnsignedLong(number), *result = NULL;
    if (argument)
        result = PyObject_CallFunctionObjArgs(b->interrupt, argument, NULL);
    if (!result)
        failed(b);
    Py_XDECREF(result);
    Py_XDECREF(argument);
}

/* Whether a return to that level takes the segment's selector, with which the core would take the base. */
static bool loses(const budget *b, int which, uint64_t level)
{
    const segment_register *s = segment(b, which);
    return (s->selector & 0xfffc) && (s->flags >> 13 & 3) < level && (s->flags & 0xc00) != 0xc00;
}

/* Look at bytes of one page: whether they can be read, and are memory's, which does not notice. */
static bool peek(budget *b, void *uc, uint64_t linear, void *bytes, size_t size)
{
    uint64_t physical;
    if ((linear & 4095) + size > 4096 || b->translate(uc, linear, READ, &physical))
        return false;
    for (const memory_range *range = b->ram; range->end; range++)
        if (range->base <= physical && physical < range->end)
            return !b->fetch(uc, linear, READ, bytes, size);
    return false;
}

/* Whether a selector names a present segment of the GDT. */
static bool present(budget *b, void *uc, uint64_t selector)
{
    uint64_t descriptor;
    return (selector & 0xfffc) && !(selector & 4) &&
           peek(b, uc, segment(b, GDT)->base + (selector & 0xfff8), &descriptor, 8) && descriptor >> 47 & 1;
}

/* IRET is intercepted for the sake of FS and GS, whose bases the core would lose. One of 64-bit code that loses nothing,
 * and in which the core is right to the last fault, is let through: it is executed when the hook is left, in a block that
 * is not charged again. */
static int let_return(budget *b, void *uc)
{
    uint64_t frame[5], cs, ss; /* RIP, CS, RFLAGS, RSP, SS */
    if (!(*b->hflags & CS64) || *b->eflags & (TF | NT) || *b->exit_pending || b->counted || over(b))
        return 0;
    if (*b->windows && (*b->eflags & IF || *b->windows != INTERRUPT)) /* else it opens behind the IRET at the earliest */
        return 0;
    fetch_code(b, uc);
    if ((b->code & 0xffff) != 0xcf48 || !peek(b, uc, b->regs[4], frame, sizeof frame))
        return 0;
    cs = frame[1] & 0xffff;
    ss = frame[4] & 0xffff;
    if ((uint64_t)((int64_t)(frame[0] << 16) >> 16) != frame[0])
        return 0;
    if (ss != segment(b, SS)->selector && !present(b, uc, ss))
        return 0;
    if ((cs & 3) > (*b->hflags & CPL) && (loses(b, FS, cs & 3) || loses(b, GS, cs & 3)))
        return 0;
    *b->intercepts &= ~((uint64_t)1 << (IRET - INTERCEPTS));
    b->resume_after = b->resume;
    b->resume = &b->returning;
    b->returning = RF;
    b->returned = 0;
    return 1;
}

/* What a method of the port says to some numbers; null: it raised. */
static PyObject *ask(budget *b, enum question which, int count, const uint64_t *values)
{
    PyObject *n[MOST_NUMBERS + 1] = {NULL}, *answer = NULL;
    int made = 0;
    while (made < count && (n[made] = PyLong_FromUnsignedLongLong(values[made])))
        made++;
    if (made == count)
        answer = PyObject_CallMethodObjArgs(b->port, questions[which], n[0], n[1], n[2], n[3], n[4], n[5], NULL);
    while (made--)
        Py_DECREF(n[made]);
    if (!answer)
        failed(b);
    return answer;
}

/* An answer as a number, whether it is one. */
static bool number_of(budget *b, PyObject *answer, uint64_t *value)
{
    *value = 0;
    if (!answer)
        return false;
    *value = PyLong_AsUnsignedLongLongMask(answer);
    Py_DECREF(answer);
    if (!PyErr_Occurred())
        return true;
    failed(b);
    *value = 0;
    return false;
}

static bool carry_cpuid(budget *b)
{
    PyObject *answer = ask(b, ON_CPUID, 2, (uint64_t[]){(uint32_t)b->regs[0], (uint32_t)b->regs[1]});
    unsigned long long eax, ebx, ecx, edx;
    bool good = answer && PyArg_ParseTuple(answer, "KKKK", &eax, &ebx, &ecx, &edx);
    if (good)
        b->regs[0] = eax, b->regs[1] = ecx, b->regs[2] = edx, b->regs[3] = ebx;
    else if (answer)
        failed(b);
    Py_XDECREF(answer);
    return good;
}

static bool carry_rdmsr(budget *b)
{
    PyObject *answer = ask(b, ON_RDMSR, 1, (uint64_t[]){(uint32_t)b->regs[1]});
    uint64_t value;
    if (answer == Py_None) { /* a fault */
        Py_DECREF(answer);
        return false;
    }
    if (!number_of(b, answer, &value))
        return false;
    b->regs[0] = (uint32_t)value;
    b->regs[2] = value >> 32;
    return true;
}

static bool carry_wrmsr(budget *b)
{
    PyObject *answer =
        ask(b, ON_WRMSR, 2, (uint64_t[]){(uint32_t)b->regs[1], b->regs[2] << 32 | (uint32_t)b->regs[0]});
    Py_XDECREF(answer);
    return answer == Py_True;
}

static bool carry_hypercall(budget *b)
{
    static const int arguments[] = {0, 3, 1, 2, 6}; /* RAX, RBX, RCX, RDX, RSI */
    uint64_t cut = *b->hflags & CS64 ? UINT64_MAX : UINT32_MAX, values[MOST_NUMBERS], result;
    for (int i = 0; i < 5; i++)
        values[i] = b->regs[arguments[i]] & cut;
    values[5] = *b->hflags & CPL;
    if (!number_of(b, ask(b, ON_HYPERCALL, MOST_NUMBERS, values), &result))
        return false;
    b->regs[0] = result & cut;
    return true;
}

/* CPUID, RDMSR, WRMSR, VMCALL and VMMCALL without prefixes, not single-stepped; whether that was it. */
static bool carry(budget *b, void *uc, uint32_t number)
{
    PyGILState_STATE state;
    bool (*how)(budget *), answered;
    uint32_t code = b->code & 0xffffff, low = code & 0xffff, msr = (uint32_t)b->regs[1];
    if (*b->eflags & TF)
        return false;
    if (number == CPUID && low == 0xa20f)
        how = carry_cpuid;
    else if (number == MSR && low == 0x320f && msr != EFER)
        how = carry_rdmsr;
    else if (number == MSR && low == 0x300f && msr != EFER) /* which changes more than a register */
        how = carry_wrmsr;
    else if (number == UNDEFINED && (code == 0xc1010f || code == 0xd9010f))
        how = carry_hypercall;
    else
        return false;
    b->cells[0] += b->exit_cost;
    state = PyGILState_Ensure();
    answered = how(b);
    if (!answered)
        interrupt(b, FAULTED);
    PyGILState_Release(state);
    if (answered)
        done(b, uc, how == carry_hypercall ? 3 : 2);
    else
        settle(b, uc);
    return true;
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

static void on_interrupt(void *uc, uint32_t number, void *data)
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

/* The instruction's end is another than the core's: the slice ends behind it, or an interrupt comes there. */
static void behind_io(budget *b, uint32_t port, int is_out)
{
    PyObject *result = PyObject_CallFunction(b->behind_io, "Ii", port, is_out);
    if (!result)
        failed(b);
    Py_XDECREF(result);
}

static uint64_t cut(uint64_t value, unsigned size)
{
    return size < 8 ? value & (((uint64_t)1 << 8 * size) - 1) : value;
}

/* IN, and each element of INS. Code that is not at CPL 0 needs a permission. */
static uint32_t on_in(void *uc, uint32_t port, int size, void *data)
{
    budget *b = data;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *answer;
    uint64_t value;
    (void)uc;
    b->cells[0] += b->exit_cost;
    if (*b->hflags & CPL) {
        answer = PyObject_CallFunction(b->port_in, "Ii", port, size);
        if (!answer)
            failed(b);
        number_of(b, answer, &value);
    } else {
        number_of(b, ask(b, ON_IN, 2, (uint64_t[]){port, size}), &value);
        if (over(b))
            behind_io(b, port, 0);
    }
    PyGILState_Release(state);
    return (uint32_t)cut(value, size);
}

static void on_out(void *uc, uint32_t port, int size, uint32_t value, void *data)
{
    budget *b = data;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *answer;
    (void)uc;
    b->cells[0] += b->exit_cost;
    if (*b->hflags & CPL) {
        answer = PyObject_CallFunction(b->port_out, "IiI", port, size, value);
        if (!answer)
            failed(b);
    } else {
        answer = ask(b, ON_OUT, 3, (uint64_t[]){port, size, cut(value, size)});
        if (over(b) || *b->windows)
            behind_io(b, port, 1);
    }
    Py_XDECREF(answer);
    PyGILState_Release(state);
}

static uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size, void *data)
{
    device_range *range = data;
    budget *b = range->budget;
    PyGILState_STATE state = PyGILState_Ensure();
    uint64_t value;
    (void)uc;
    b->cells[0] += b->exit_cost;
    number_of(b, ask(b, ON_MMIO_READ, 2, (uint64_t[]){range->base + offset, size}), &value);
    PyGILState_Release(state);
    return cut(value, size);
}

static void on_mmio_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *data)
{
    device_range *range = data;
    budget *b = range->budget;
    PyGILState_STATE state = PyGILState_Ensure();
    (void)uc;
    b->cells[0] += b->exit_cost;
    Py_XDECREF(ask(b, ON_MMIO_WRITE, 3, (uint64_t[]){range->base + offset, size, cut(value, size)}));
    PyGILState_Release(state);
}

static void mark(budget *b, void *uc, uint64_t linear)
{
    uint64_t physical;
    if (b->translate(uc, linear, EXECUTE, &physical) == 0 && physical >> 12 < b->code_page_count)
        b->code_pages[physical >> 12] = 1;
}

/* A block was translated: the host's later stores to its pages make it stale. */
static void on_translate(void *uc, block *now, block *before, void *data)
{
    (void)before;
    mark(data, uc, now->pc);
    if (now->size && (now->pc ^ (now->pc + now->size - 1)) >> 12)
        mark(data, uc, now->pc + now->size - 1);
}

/* The core fits its TLB's size to the last tenth of a second of the host's clock, and a guest that leaves stale entries
 * sees which ones were lost. A window that began in the far future never ends: the size follows the guest alone. */
static void pin_sizes(budget *b)
{
    enum { TABLES = 3, BEGIN = 0x820, STRIDE = 0x2b8 };
    for (int i = 0; i < TABLES; i++)
        *(int64_t *)((char *)b->tlb - BEGIN + i * STRIDE) = INT64_MAX / 2;
}

/* The core's page walk, and then: a page without code is not executable for data's sake. The first fetch from a page
 * makes it one with code, and whatever is known of it under other addresses is forgotten. */
static bool on_fill(void *cpu, uint64_t address, int size, int access, int mmu, bool probe, uintptr_t from)
{
    enum { FETCH = 2, NEVER = -1 };
    budget *b = running;
    struct tlb_table *table;
    tlb_entry *entry;
    uint64_t page;
    if (!core_fill(cpu, address, size, access, mmu, probe, from))
        return false;
    if (!b || b->cpu != cpu)
        return true;
    pin_sizes(b); /* here, as nothing runs after a flush without coming by */
    table = &b->tlb[mmu];
    entry = (tlb_entry *)(table->entries + (address >> 6 & table->mask));
    page = entry->physical >> 12;
    if (page >= b->code_page_count)
        return true;
    if (access == FETCH && !b->code_pages[page]) {
        b->code_pages[page] = 1;
        b->flush_tlb(cpu);
        return core_fill(cpu, address, size, access, mmu, probe, from);
    }
    if (access != FETCH && !b->code_pages[page])
        entry->code = NEVER;
    return true;
}

/* uc_emu_start for the slice of this budget. */
static int enter(budget *b, void *uc, uint64_t rip, size_t count)
{
    int error;
    running = b;
    b->counted = (int64_t)count;
    error = b->start(uc, rip, 0, 0, count);
    intercept_returns(b);
    running = NULL;
    return error;
}

/* The core's tlb_reset_dirty_by_vaddr: code was translated from these addresses, so stores there are to be noticed. The core
 * looks at each entry of its TLB, block by block; an address can only be in one of them or among the victims. */
static void on_new_code(void *cpu, uint64_t start, uint64_t length)
{
    enum { TABLES = 3, VICTIMS = 8, STRIDE = 0x2b8, FIRST_VICTIM = 0x800, NOT_DIRTY = 0x400, NOT_PLAIN = 0xe40 };
    struct tlb_table *tables = (struct tlb_table *)((char *)cpu + tlb_offset);
    for (int i = 0; i < TABLES; i++) {
        tlb_entry *victims = (tlb_entry *)((char *)tables - FIRST_VICTIM + i * STRIDE);
        for (uint64_t page = 0; page < length; page += 4096) {
            tlb_entry *entry = (tlb_entry *)(tables[i].entries + ((start + page) >> 6 & tables[i].mask));
            if (!(entry->write & NOT_PLAIN) && (entry->write & ~(uint64_t)4095) == start + page)
                entry->write |= NOT_DIRTY;
        }
        for (int k = 0; k < VICTIMS; k++)
            if (!(victims[k].write & NOT_PLAIN) && (victims[k].write & ~(uint64_t)4095) - start < length)
                victims[k].write |= NOT_DIRTY;
    }
}

#define ADDRESS(function) (unsigned long long)(uintptr_t)(function)

static PyObject *addresses(PyObject *self, PyObject *arguments)
{
    unsigned long long fill, tlb;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KK", &fill, &tlb))
        return NULL;
    core_fill = (tlb_filler *)(uintptr_t)fill;
    tlb_offset = tlb;
    return Py_BuildValue("(KKKKKKKKKKn)", ADDRESS(on_block), ADDRESS(on_interrupt), ADDRESS(on_translate), ADDRESS(on_fill),
                         ADDRESS(on_new_code), ADDRESS(enter), ADDRESS(on_in), ADDRESS(on_out), ADDRESS(on_mmio_read),
                         ADDRESS(on_mmio_write), (Py_ssize_t)sizeof(budget));
}

/* deliver(address of the budget, vector, kind, error code or -1, the RIP that is pushed, or None for the guest's) */
static PyObject *deliver_for_python(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    budget *b;
    uint64_t rip;
    (void)self;
    (void)count;
    b = PyLong_AsVoidPtr(arguments[0]);
    if (!b)
        return NULL;
    rip = arguments[4] == Py_None ? *b->eip : PyLong_AsUnsignedLongLongMask(arguments[4]);
    return PyBool_FromLong(deliver(b, (uint32_t)PyLong_AsLong(arguments[1]), (uint32_t)PyLong_AsLong(arguments[2]),
                                   PyLong_AsLongLong(arguments[3]), rip));
}

static PyMethodDef methods[] = {
    {"deliver", (PyCFunction)(void (*)(void))deliver_for_python, METH_FASTCALL,
     "With a budget's address, an event's vector, kind and error code (-1: none), and the RIP that is pushed (None: the "
     "guest's): whether it was delivered. If not, nothing has changed."},
    {"addresses", addresses, METH_VARARGS,
     "With the address of the core's page walk, and where its CPUState has the TLB: the addresses of the hooks (block, "
     "interrupt, translation), of the page walk's cover, of what is called for new code, of the slice's entry, of the hooks "
     "of IN and OUT and of loads and stores where no memory is, and the "
     "size of the structure they share."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_budget", "The native block-budget hook.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__budget(void)
{
    for (int i = 0; i < QUESTIONS; i++)
        if (!(questions[i] = PyUnicode_InternFromString(NAMES[i])))
            return NULL;
    return PyModule_Create(&module);
}
