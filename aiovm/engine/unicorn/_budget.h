/* What the native hooks share: the structure that Python fills in (budget.py mirrors it), and small words over it.
 *
 * No third-party header: Unicorn's functions come as addresses in the structure. */
#ifndef AIOVM_BUDGET_H
#define AIOVM_BUDGET_H
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

typedef bool tlb_filler(void *cpu, uint64_t address, int size, int access, int mmu, bool probe, uintptr_t from);

struct tlb_table {
    uint64_t mask;           /* (entries - 1) * 64 */
    char *entries;
};

typedef struct {
    uint64_t read, write, code, physical, host, unused[3];
} tlb_entry;

typedef struct {
    uint64_t base, end;      /* guest physical */
    char *host;
    uint64_t is_writable;
    uint8_t *log;            /* one bit a page to which was stored; null: nobody wants to know */
} memory_range;

/* A segment register, or a descriptor table's. */
typedef struct {
    uint32_t selector;
    uint64_t base;
    uint32_t limit, flags;
} segment_register;

typedef struct {
    volatile int64_t *cells; /* now, limit: ns */
    int64_t rate;            /* 1/256 ns a code byte */
    int64_t frac;            /* carried 1/256 ns, of the running vCPU */
    int64_t stops, pauses;
    int64_t pause_cost;      /* ns a PAUSE */
    int64_t ple_gap;         /* ns: longest time between PAUSEs of one loop */
    int64_t ple_window;      /* ns: longest loop; negative: pause-loop exiting is off */
    int64_t ple_first, ple_last;
    volatile uint16_t *exit_pending; /* non-zero: the core leaves before this block */
    uint64_t *eip;           /* null on the public path: every exit goes to Python */
    uint32_t *hflags;
    uint8_t *windows;        /* what waits for the guest to take it: bit 0 an interrupt, bit 1 an NMI */
    uint64_t *cs_base;
    int (*stop)(void *);
    const int64_t *costs;    /* of each interrupt number but PAUSE's, ns */
    int64_t exit_cost;       /* of what has no number of its own: hypercalls, ports, device memory */
    PyObject *interrupt;     /* called with the number; answers the exit */
    PyObject *fail;          /* called with what Python raised; ends the slice */
    PyObject *port_in, *port_out; /* PortIo's: IN and OUT of code that may need a permission */
    PyObject *behind_io;     /* PortIo's: what is to be done behind an IN (0) or OUT (1) */
    PyObject *port;          /* the running vCPU's GuestPort; null: no vCPU runs */
    int (*fetch)(void *, uint64_t, uint32_t, void *, size_t);
    uint64_t code;           /* the first bytes of the instruction that exits, as many as are mapped up to 4 */
    int (*translate)(void *, uint64_t, uint32_t, uint64_t *);
    uint8_t *code_pages;     /* one byte a guest page: code was translated from it */
    uint64_t code_page_count;
    const memory_range *ram; /* where memory is; the last one's end is 0 */
    int64_t logs;            /* how many of them are logged */
    uint64_t *regs;          /* RAX, RCX, RDX; null: RDTSC goes to Python */
    uint64_t *eflags;
    uint64_t *cc_source;     /* the arithmetic flags, while cc_operation says so */
    uint32_t *cc_operation;
    int (*read_register)(void *, int, void *);
    int64_t flags_register;  /* its number of RFLAGS */
    uint64_t *tsc_aux;
    int64_t tsc_khz;         /* the machine's counter; 0: RDTSC goes to Python */
    int64_t tsc_epoch;       /* CLOCK_MONOTONIC when the machine's time was 0, ns; negative: time is cells[0] */
    uint64_t tsc_last;       /* what any CPU has seen of the machine's counter: nobody's is behind that */
    uint64_t tsc_ratio, tsc_offset; /* the running vCPU's: 48 fraction bits, then this added */
    int (*start)(void *, uint64_t, uint64_t, uint64_t, size_t);
    void *cpu;               /* the core's CPUState; null: its TLB is left alone */
    uint64_t tlb_flushes[3]; /* of each of its tables */
    struct tlb_table *tlb;   /* the core's TLB, a table for each of its MMU modes */
    void (*flush_tlb)(void *);
    uint64_t *cr3;
    const uint32_t *pkru;
    int64_t cr3_width;       /* bits that CR3 has; 0: stores to it go to Python */
    uint64_t *resume;        /* where a block clears RF: the flags, or nobody's word; see let_return */
    uint64_t *intercepts;    /* by bit: the exit's number less 0x160 */
    uint64_t *resume_after;  /* what resume was */
    uint64_t returning;      /* RF */
    int64_t returned;        /* the block that is the IRET alone has begun */
    int64_t counted;         /* the slice is of so many instructions; 0: it is not */
    void *uc;
    int (*leave)(void *, uint32_t); /* the core's look whether to leave, which does not come back then; null: it looks itself */
    void *translation;       /* the core's TCGContext; null: no block hook was put into a block yet */
    uint64_t *efer;
    int32_t *direction;      /* -1 while RFLAGS.DF is set, else 1 */
    const uint32_t *error_code;
    const uint64_t *fault_address;
    int64_t inject_cost;     /* of a delivery, ns */
    int64_t unheard;         /* nobody wants to hear of exceptions that are delivered */
    int64_t delivered;       /* how many nobody heard of; and the vectors of the last ones, each at its number */
    uint8_t vectors[8];
} budget;

enum { CR3_WRITE = 0x113, EXCEPTION = 0x140, UNDEFINED = 0x146, INTERCEPTS = 0x160, WINDOW = 0x164, RDTSC = 0x16e,
       CPUID = 0x172, IRET = 0x174, SOFT_INTERRUPT = 0x175, PAUSE = 0x177, HLT = 0x178, MSR = 0x17c };
/* FAULTED is no interrupt of the core's: a carried instruction has raised a fault. */
enum { FAULTED = 0, EFER = 0xc0000080 };
enum { INHIBIT_IRQ = 8, CPL = 3, CS64 = 1 << 15, TF = 0x100, IF = 0x200, NT = 1 << 14, RF = 1 << 16, READ = 1, EXECUTE = 4 };
enum { INTERRUPT = 1 }; /* of the windows */
enum { CS = 1, SS, DS, FS, GS, LDT, TR, GDT, IDT };

static inline segment_register *segment(const budget *b, int which)
{
    return (segment_register *)(b->cs_base - 1) + which - CS;
}

/* An event's kind (EventKind), by the bits that matter here. */
enum { FAULT_KIND = 3, SOFTWARE = 4 };

/* Whether the slice's time is over, or somebody ended it. */
static inline bool over(const budget *b)
{
    return b->cells[0] >= b->cells[1];
}

/* Where memory has a guest physical address; null: nowhere. */
static inline const memory_range *range_of(const budget *b, uint64_t physical)
{
    for (const memory_range *range = b->ram; range->end; range++)
        if (range->base <= physical && physical < range->end)
            return range;
    return NULL;
}

/* The byte of a range's log that has a page's bit, and the bit. */
static inline uint8_t *log_of(const memory_range *range, uint64_t physical, uint8_t *bit)
{
    uint64_t page = (physical - range->base) >> 12;
    *bit = (uint8_t)(1 << (page & 7));
    return range->log + (page >> 3);
}

static inline void note_store(const memory_range *range, uint64_t physical)
{
    uint8_t bit, *byte;
    if (range && range->log) {
        byte = log_of(range, physical, &bit);
        *byte |= bit;
    }
}

/* ---- _exits.c: what the core reports ---- */

void on_interrupt(void *uc, uint32_t number, void *data);

/* The first bytes of the instruction at RIP, as many of four as lie in its page. */
void fetch_code(budget *b, void *uc);

/* The end of an exit: a slice that is over stops here. */
void settle(budget *b, void *uc);

/* The instruction was answered here: step over it. */
void done(budget *b, void *uc, uint64_t length);

/* ---- _port.c: what Python answers ---- */

/* Once, before all else; false: Python has raised. */
bool name_questions(void);

/* Hand an exit to Python. */
void interrupt(budget *b, uint32_t number);

/* CPUID, RDMSR, WRMSR, VMCALL and VMMCALL without prefixes, not single-stepped; whether that was it. */
bool carry(budget *b, void *uc, uint32_t number);

/* Addresses where no memory is. */
typedef struct {
    budget *budget;
    uint64_t base;
} device_range;

uint32_t on_in(void *uc, uint32_t port, int size, void *data);
void on_out(void *uc, uint32_t port, int size, uint32_t value, void *data);
uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size, void *data);
void on_mmio_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *data);

/* ---- _delivery.c: into a handler, and back ---- */

/* The core computes arithmetic flags when somebody asks: have them at hand. */
void settle_flags(budget *b);

/* Deliver an event on the straight path; false: nothing has changed, and Python must decide. error: -1 for none. */
bool deliver(budget *b, uint32_t vector, uint32_t kind, int64_t error, uint64_t rip);

/* Deliver an exception that nobody wants to hear of; whether that was it. */
bool deliver_unheard(budget *b, uint32_t vector);

/* Let the core execute the IRET that it has intercepted; false: Python must do it. */
bool let_return(budget *b, void *uc);

/* IRET is intercepted again. */
void intercept_returns(budget *b);

/* ---- _tlb.c: which addresses the core knows, and how ---- */

typedef struct {
    uint64_t pc;
    uint16_t icount, size;
} block;

/* The budget of the slice that this thread runs: the core's page walk has no other way to it. */
extern _Thread_local budget *running;
extern tlb_filler *core_fill;
extern void (*core_walk_store)(void *, uint64_t, uint32_t);
extern uintptr_t tlb_offset; /* of the TLB in the core's CPUState */

void on_translate(void *uc, block *now, block *before, void *data);
bool on_fill(void *cpu, uint64_t address, int size, int access, int mmu, bool probe, uintptr_t from);
void on_new_code(void *cpu, uint64_t start, uint64_t length);
void on_walk_store(void *cpu, uint64_t physical, uint32_t value);

#endif
