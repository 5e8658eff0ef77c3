/* Into a handler and back in long mode, where all is as it mostly is: a 64-bit kernel's page faults, ticks and IPIs.
 *
 * A straight path says yes or leaves everything as it was; "no" says only that Python (aiovm/delivery.py and
 * aiovm/interrupt_return.py), which knows every mode and every fault, must decide. What is done here is what would be done
 * there, to the last bit: tests compare. Nothing is remembered: tables are walked each time, in a few loads, so nobody has
 * to tell of stores to them. */
#include "_budget.h"
#include <string.h>

enum { P = 1, W = 2, U = 4, A = 0x20, D = 0x40, PS = 0x80 };
enum { DF = 0x400, VM = 1 << 17, OSZAPC = 0x8d5, LMA = 0x400, NXE = 0x800, SMAP = 1 << 21, PKE = 1 << 22 };
enum { LONG_CODE = 1 << 14 | 1 << 15 | 1 << 4 | 1 << 5, ADDSEG = 1 << 6 }; /* LMA, CS64, CS32, SS32 of hflags */
enum { FLAGS_OF_SEGMENT = 0xf0ff00 };
#define TABLE 0x000ffffffffff000
#define RESERVED 0x000fff0000000000 /* MAXPHYADDR is 40 */
#define NX ((uint64_t)1 << 63)

static bool is_canonical(uint64_t linear)
{
    return (uint64_t)((int64_t)(linear << 16) >> 16) == linear;
}

/* Where the host has a guest physical address; null: nowhere, or a store would be more than a store. Who asks for a store
 * makes it. */
static char *memory_at(const budget *b, uint64_t physical, bool store)
{
    const memory_range *range = range_of(b, physical);
    if (!range || (store && (!range->is_writable || b->code_pages[physical >> 12])))
        return NULL;
    if (store)
        note_store(range, physical);
    return range->host + (physical - range->base);
}

/* Bytes in one page that a supervisor may reach and of which nothing is left to judge or to set, as kernel_page of
 * aiovm/page_walk.py; null: the full walk must decide. */
static char *straight(const budget *b, uint64_t linear, unsigned size, bool store)
{
    const uint64_t wanted = P | A | (store ? W : 0);
    const uint64_t looked = wanted | PS | RESERVED | (*b->efer & NXE ? 0 : NX);
    uint64_t table = *b->cr3, allow = UINT64_MAX;
    if ((linear & 4095) + size > 4096 || !is_canonical(linear))
        return NULL;
    for (int shift = 39;; shift -= 9) {
        const char *at = memory_at(b, (table & TABLE) | (linear >> shift & 511) << 3, false);
        uint64_t entry, must = wanted, mask = looked, offset = ((uint64_t)1 << shift) - 1;
        bool leaf;
        if (!at)
            return NULL;
        memcpy(&entry, at, sizeof entry);
        leaf = shift == 12 || (shift == 21 && entry & PS);
        if (leaf) {
            must |= (store ? D : 0) | (shift == 21 ? PS : 0);
            mask = (shift == 21 ? mask | 0x1fe000 : mask & ~(uint64_t)PS) | must; /* bit 7 of a PTE is PAT */
        }
        if ((entry & mask) != must)
            return NULL;
        allow &= entry;
        if (leaf)
            return allow & U && (b->cr3[1] & SMAP || (b->cr3[1] & PKE && *b->pkru >> (entry >> 58 & 30) & 3))
                       ? NULL
                       : memory_at(b, (entry & TABLE & ~offset) | (linear & offset), store);
        table = entry;
    }
}

static bool load(const budget *b, uint64_t linear, void *bytes, unsigned size)
{
    const char *at = straight(b, linear, size, false);
    if (at)
        memcpy(bytes, at, size);
    return at;
}

void settle_flags(budget *b)
{
    enum { COMPUTED = 1 };
    uint64_t flags = 0;
    if (*b->cc_operation == COMPUTED || b->read_register(b->uc, (int)b->flags_register, &flags))
        return;
    *b->cc_source = flags & OSZAPC;
    *b->cc_operation = COMPUTED;
}

static uint64_t read_flags(const budget *b)
{
    return (*b->eflags & ~(uint64_t)(OSZAPC | DF)) | (*b->cc_source & OSZAPC) | (*b->direction < 0 ? DF : 0) | 2;
}

static void write_flags(budget *b, uint64_t flags)
{
    *b->cc_source = flags & OSZAPC;
    *b->direction = flags & DF ? -1 : 1;
    *b->eflags = (uint32_t)flags & ~(uint32_t)(OSZAPC | DF);
}

bool deliver(budget *b, uint32_t vector, uint32_t kind, int64_t error, uint64_t rip)
{
    /* A gate: P and the type but for its lowest bit. A descriptor: P, S, code, Accessed, L and not D. */
    enum { DEBUG = 1, GATE = 0x9e, GATE_IS = 0x8e, CODE = 0x609900, CODE_IS = 0x209900, NOT_FAULTS = 0x4011a };
    const uint32_t cpl = *b->hflags & CPL;
    const segment_register *idt = segment(b, IDT), *gdt = segment(b, GDT), *tr = segment(b, TR);
    segment_register *cs = segment(b, CS), *ss = segment(b, SS), code;
    uint64_t flags, gate[2], descriptor, target, frame[6], *next = frame, rsp = b->regs[4];
    uint32_t selector, dpl, ist, size;
    bool inner;
    char *stack;
    if (vector == DEBUG || !(*b->efer & LMA))
        return false;
    settle_flags(b);
    flags = read_flags(b);
    if (flags & VM || vector * 16 + 15 > idt->limit || !load(b, idt->base + vector * 16, gate, sizeof gate))
        return false;
    if ((gate[0] >> 40 & GATE) != GATE_IS || ((kind & 5) == SOFTWARE && (gate[0] >> 45 & 3) < cpl))
        return false;
    selector = gate[0] >> 16 & 0xffff;
    if (!(selector & 0xfffc) || selector & 4 || (selector | 7) > gdt->limit ||
        !load(b, gdt->base + (selector & 0xfff8), &descriptor, sizeof descriptor))
        return false;
    dpl = descriptor >> 45 & 3;
    target = (gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff0000) | gate[1] << 32;
    if ((descriptor >> 32 & CODE) != CODE_IS || dpl > cpl || !is_canonical(target))
        return false;

    ist = gate[0] >> 32 & 7;
    inner = dpl < cpl && !(descriptor >> 42 & 1); /* not conforming */
    if (ist || inner) {
        uint32_t offset = ist ? 28 + 8 * ist : 4 + 8 * dpl;
        if (offset + 7 > tr->limit || !load(b, tr->base + offset, &rsp, sizeof rsp))
            return false;
    }
    if (kind == FAULT_KIND && !(vector < 32 && NOT_FAULTS >> vector & 1))
        flags |= RF;
    else if (kind & SOFTWARE)
        flags &= ~(uint64_t)RF;
    if (error >= 0)
        *next++ = (uint64_t)error;
    *next++ = rip;
    *next++ = cs->selector;
    *next++ = flags;
    *next++ = b->regs[4];
    *next++ = ss->selector;
    size = (uint32_t)((char *)next - (char *)frame);
    rsp = (rsp & ~(uint64_t)15) - size;
    stack = straight(b, rsp, size, true);
    if (!stack)
        return false;
    memcpy(stack, frame, size);

    write_flags(b, flags & ~(uint64_t)(TF | NT | RF | (gate[0] >> 40 & 1 ? 0 : IF))); /* a trap gate leaves IF */
    b->regs[4] = rsp;
    *b->eip = target;
    code.selector = (selector & 0xfffc) | (inner ? dpl : cpl);
    code.base = (descriptor >> 16 & 0xffffff) | (descriptor >> 32 & 0xff000000);
    code.limit = (descriptor & 0xffff) | (descriptor >> 32 & 0xf0000);
    if (descriptor >> 55 & 1)
        code.limit = code.limit << 12 | 0xfff;
    code.flags = descriptor >> 32 & FLAGS_OF_SEGMENT;
    if (cs->selector != code.selector || cs->base != code.base || cs->limit != code.limit ||
        (cs->flags & FLAGS_OF_SEGMENT) != code.flags) {
        cs->selector = code.selector;
        cs->base = code.base;
        cs->limit = code.limit;
        cs->flags = code.flags;
        *b->hflags = (*b->hflags & ~(uint32_t)ADDSEG) | LONG_CODE;
    }
    if (inner) {
        ss->selector = dpl;
        ss->base = 0;
        ss->limit = 0;
        ss->flags = dpl << 13;
        *b->hflags = (*b->hflags & ~(uint32_t)CPL) | dpl;
    }
    *b->hflags &= ~(uint32_t)INHIBIT_IRQ;
    return true;
}

bool deliver_unheard(budget *b, uint32_t vector)
{
    /* #DB may be a debugger's; #UD and #GP may mean an instruction that the core does not know, or #SS. */
    enum { PAGE_FAULT = 14, LOOKED_AT = 1 << 1 | 1 << 6 | 1 << 13, WITH_ERROR = 0x27d00 };
    if (!b->unheard || b->counted || LOOKED_AT >> vector & 1 || *b->eflags & TF)
        return false;
    if (!deliver(b, vector, FAULT_KIND, WITH_ERROR >> vector & 1 ? (int64_t)*b->error_code : -1, *b->eip))
        return false;
    if (vector == PAGE_FAULT)
        b->cr3[-1] = *b->fault_address; /* CR2 */
    b->cells[0] += b->inject_cost;
    b->vectors[b->delivered++ & 7] = (uint8_t)vector;
    return true;
}

void intercept_returns(budget *b)
{
    if (b->resume == &b->returning) {
        b->resume = b->resume_after;
        *b->intercepts |= (uint64_t)1 << (IRET - INTERCEPTS);
    }
}

/* Whether a return to that level takes the segment's selector, with which the core would take the base. */
static bool loses(const budget *b, int which, uint64_t level)
{
    const segment_register *s = segment(b, which);
    return (s->selector & 0xfffc) && (s->flags >> 13 & 3) < level && (s->flags & 0xc00) != 0xc00;
}

/* Whether a selector names a present segment of the GDT. */
static bool present(const budget *b, uint64_t selector)
{
    uint64_t descriptor;
    return (selector & 0xfffc) && !(selector & 4) &&
           load(b, segment(b, GDT)->base + (selector & 0xfff8), &descriptor, 8) && descriptor >> 47 & 1;
}

/* IRET is intercepted for the sake of FS and GS, whose bases the core would lose. One of 64-bit code that loses nothing,
 * and in which the core is right to the last fault, is let through: it is executed when the hook is left, in a block that
 * is not charged again. */
bool let_return(budget *b, void *uc)
{
    uint64_t frame[5], cs, ss; /* RIP, CS, RFLAGS, RSP, SS */
    if (!(*b->hflags & CS64) || (*b->hflags & CPL) == 3 || *b->eflags & (TF | NT) || *b->exit_pending || b->counted || over(b))
        return false;
    if (*b->windows && (*b->eflags & IF || *b->windows != INTERRUPT)) /* else it opens behind the IRET at the earliest */
        return false;
    fetch_code(b, uc);
    if ((b->code & 0xffff) != 0xcf48 || !load(b, b->regs[4], frame, sizeof frame))
        return false;
    cs = frame[1] & 0xffff;
    ss = frame[4] & 0xffff;
    if (!is_canonical(frame[0]))
        return false;
    if (ss != segment(b, SS)->selector && !present(b, ss))
        return false;
    if ((cs & 3) > (*b->hflags & CPL) && (loses(b, FS, cs & 3) || loses(b, GS, cs & 3)))
        return false;
    *b->intercepts &= ~((uint64_t)1 << (IRET - INTERCEPTS));
    b->resume_after = b->resume;
    b->resume = &b->returning;
    b->returning = RF;
    b->returned = 0;
    return true;
}
