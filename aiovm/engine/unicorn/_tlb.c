/* The first store to a page of a slot whose log was taken is noted, as nothing may be stored through the TLB before. And data
 * accesses fill the TLB without the right to execute where a page holds no code, as the core sends every store to a
 * page that may be executed through its slow path; its size follows the guest alone; and new code's entry is looked for
 * where it can be. No guest can see any of this, so there is no twin (but of the log, which compares bytes). */
#include "_budget.h"

_Thread_local budget *running;
tlb_filler *core_fill;
uintptr_t tlb_offset;
void (*core_walk_store)(void *, uint64_t, uint32_t);

enum { STORE = 1, FETCH, NEVER = -1 };

/* An entry of the TLB was filled for such an access: note a store, and let none pass that was not noted. */
static void log_access(const budget *b, tlb_entry *entry, int access)
{
    const memory_range *range = range_of(b, entry->physical);
    uint8_t bit;
    if (access == STORE)
        note_store(range, entry->physical);
    else if (range && range->log && !(*log_of(range, entry->physical, &bit) & bit))
        entry->write = (uint64_t)NEVER;
}

/* The core's x86_stl_phys_notdirty, by which its page walk sets Accessed and Dirty bits: no TLB is asked. */
void on_walk_store(void *cpu, uint64_t physical, uint32_t value)
{
    if (running && running->cpu == cpu && running->logs)
        note_store(range_of(running, physical), physical);
    core_walk_store(cpu, physical, value);
}

static void mark(budget *b, void *uc, uint64_t linear)
{
    uint64_t physical;
    if (b->translate(uc, linear, EXECUTE, &physical) == 0 && physical >> 12 < b->code_page_count)
        b->code_pages[physical >> 12] = 1;
}

/* A block was translated: the host's later stores to its pages make it stale. */
void on_translate(void *uc, block *now, block *before, void *data)
{
    (void)before;
    mark(data, uc, now->pc);
    if (now->size && (now->pc ^ (now->pc + now->size - 1)) >> 12)
        mark(data, uc, now->pc + now->size - 1);
}

/* The core fits its TLB's size to the last tenth of a second of the host's clock, and a guest that leaves stale entries
 * sees which ones were lost. Here the window in which it looks for the most entries is so many flushes: one that began in
 * the far future does not end at the next flush, one that began in the far past does. The size follows the guest alone. */
static void pin_sizes(budget *b, int mmu)
{
    enum { TABLES = 3, BEGIN = 0x820, STRIDE = 0x2b8, USED = 2, WINDOW = 256 };
    int64_t *begin = (int64_t *)((char *)b->tlb - BEGIN);
    if (begin[mmu * (STRIDE / 8) + USED] == 1) /* the first since a flush */
        b->tlb_flushes[mmu]++;
    for (int i = 0; i < TABLES; i++)
        begin[i * (STRIDE / 8)] = b->tlb_flushes[i] % WINDOW ? INT64_MAX / 2 : INT64_MIN / 2;
}

static tlb_entry *entry_of(void *cpu, int mmu, uint64_t address)
{
    struct tlb_table *table = (struct tlb_table *)((char *)cpu + tlb_offset) + mmu;
    return (tlb_entry *)(table->entries + (address >> 6 & table->mask));
}

/* The core's page walk, and then: a page without code is not executable for data's sake. The first fetch from a page
 * makes it one with code, and whatever is known of it under other addresses is forgotten. */
bool on_fill(void *cpu, uint64_t address, int size, int access, int mmu, bool probe, uintptr_t from)
{
    budget *b = running;
    tlb_entry *entry;
    uint64_t page;
    if (!core_fill(cpu, address, size, access, mmu, probe, from))
        return false;
    entry = entry_of(cpu, mmu, address);
    if (!b || b->cpu != cpu) { /* no slice: the next one's stores are to come by */
        if (access != STORE)
            entry->write = (uint64_t)NEVER;
        return true;
    }
    pin_sizes(b, mmu); /* here, as nothing runs after a flush without coming by */
    page = entry->physical >> 12;
    if (page >= b->code_page_count)
        return true;
    if (access == FETCH && !b->code_pages[page]) {
        b->code_pages[page] = 1;
        b->flush_tlb(cpu);
        if (!core_fill(cpu, address, size, access, mmu, probe, from))
            return false;
        pin_sizes(b, mmu);
        entry = entry_of(cpu, mmu, address);
    }
    if (access != FETCH && !b->code_pages[page])
        entry->code = (uint64_t)NEVER;
    if (__builtin_expect(b->logs != 0, 0))
        log_access(b, entry, access);
    return true;
}

/* The core's tlb_reset_dirty_by_vaddr: code was translated from these addresses, so stores there are to be noticed. The core
 * looks at each entry of its TLB, block by block; an address can only be in one of them or among the victims. */
void on_new_code(void *cpu, uint64_t start, uint64_t length)
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
