/*
 * The first process of a Linux guest, and its only one: a thread on each CPU calls the kernel without a pause, so
 * that the threads contend for one of its spinlocks. The host is told through an I/O port when measuring begins and
 * ends; it knows the time better than the guest does.
 *
 * Loads, by the lock that all threads want (Linux 6.1):
 *
 *   directory  the directory's d_lock: a seek walks its entries with the lock held (fs/libfs.c, scan_positives), so
 *              the number of entries sets how long; the only load with a long critical section
 *   futex      the hash bucket's lock: FUTEX_WAIT with a value that is wrong (kernel/futex/waitwake.c)
 *   files      the descriptor table's file_lock: dup and close (fs/file.c)
 *   pipe       the wait queues' locks, besides a mutex: a byte into and out of one pipe (fs/pipe.c)
 *   memory     page tables and the page allocator, besides a semaphore: map, touch, unmap (mm/mmap.c)
 *
 * The kernel hands "name=value" words of its command line that it does not know on as environment variables:
 * contend=directory,futex  workers=8  entries=200  warmup=60  duration=200 (ms of the guest's time).
 *
 * No library: system calls only. Needs CONFIG_X86_IOPL_IOPERM.
 */
typedef unsigned int u32;
typedef unsigned long u64;

enum {
    SYS_READ = 0, SYS_WRITE = 1, SYS_OPEN = 2, SYS_CLOSE = 3, SYS_LSEEK = 8, SYS_MMAP = 9, SYS_MUNMAP = 11,
    SYS_DUP = 32, SYS_NANOSLEEP = 35, SYS_CLONE = 56, SYS_MKDIR = 83, SYS_IOPERM = 173, SYS_FUTEX = 202,
    SYS_SCHED_SETAFFINITY = 203, SYS_PIPE2 = 293,
};

enum { O_RDWR = 2, O_CREAT = 0100, O_NONBLOCK = 04000, O_DIRECTORY = 0200000 };
enum { FUTEX_WAIT_PRIVATE = 128, PROT_READ_WRITE = 3, MAP_PRIVATE_ANONYMOUS = 0x22 };
#define CLONE_THREAD_FLAGS 0x10f00              /* VM, FS, FILES, SIGHAND, THREAD */

#define PORT 0x580                              /* + 0: measuring begins; + 4: it ends, so many calls; + 8: done */
#define MAX_WORKERS 255
#define MAX_ENTRIES 9999
#define PAGE 4096

static struct worker {
    volatile u64 calls;
    long directory, place;
    u32 number;
    char pad[36];
    char stack[PAGE - 64];
} workers[MAX_WORKERS] __attribute__((aligned(PAGE)));

static void (*volatile load)(struct worker *);  /* what the workers do now; nothing: sleep */
static u32 worker_count = 1;
static long entries = 200;
static int pipe_ends[2];
static u32 futex_word;

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 asm("r10") = d;
    register long r8 asm("r8") = e;
    register long r9 asm("r9") = f;
    long result;

    asm volatile("syscall"
                 : "=a"(result)
                 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    return result;
}

#define CALL3(number, a, b, c) call(SYS_##number, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define CALL1(number, a) CALL3(number, a, 0, 0)

static void tell(u32 offset, u32 value)
{
    asm volatile("outl %0, %w1" : : "a"(value), "d"(PORT + offset) : "memory");
}

static void sleep_ms(u64 ms)
{
    u64 time[2] = { ms / 1000, ms % 1000 * 1000000 };

    CALL3(NANOSLEEP, time, 0, 0);
}

static void seek(struct worker *self)
{
    self->place = self->place == entries ? entries - 1 : entries;
    CALL3(LSEEK, self->directory, self->place, 0);
}

static void wait_in_vain(struct worker *self)
{
    (void)self;
    CALL3(FUTEX, &futex_word, FUTEX_WAIT_PRIVATE, futex_word + 1);
}

static void duplicate(struct worker *self)
{
    (void)self;
    CALL1(CLOSE, CALL1(DUP, pipe_ends[0]));
}

static void pass_a_byte(struct worker *self)
{
    char byte = 0;

    (void)self;
    CALL3(WRITE, pipe_ends[1], &byte, 1);
    CALL3(READ, pipe_ends[0], &byte, 1);
}

static void map_and_touch(struct worker *self)
{
    char *page = (char *)call(SYS_MMAP, 0, PAGE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0);

    (void)self;
    *(volatile char *)page = 1;
    CALL3(MUNMAP, page, PAGE, 0);
}

static const struct {
    const char *name;
    void (*load)(struct worker *);
} loads[] = {
    { "directory", seek }, { "futex", wait_in_vain }, { "files", duplicate }, { "pipe", pass_a_byte },
    { "memory", map_and_touch },
};

__attribute__((noreturn, used)) static void work(struct worker *self)
{
    u64 mask[4] = { 0 };

    mask[self->number / 64] = 1UL << self->number % 64;
    CALL3(SCHED_SETAFFINITY, 0, sizeof mask, mask);
    self->directory = CALL3(OPEN, "/d", O_DIRECTORY, 0);
    for (;;) {
        void (*now)(struct worker *) = load;

        if (now) {
            now(self);
            self->calls++;
        } else {
            sleep_ms(1);
        }
    }
}

/* The thread begins with the top of its stack in RSP, and there the address of its worker. */
static void start_worker(u32 number)
{
    struct worker *self = &workers[number];
    u64 *top = (u64 *)(self + 1) - 2;
    long result;

    self->number = number;
    *top = (u64)self;
    asm volatile("xor %%r10d, %%r10d\n\t"
                 "xor %%r8d, %%r8d\n\t"
                 "syscall\n\t"
                 "test %%eax, %%eax\n\t"
                 "jnz 1f\n\t"
                 "pop %%rdi\n\t"
                 "call work\n"
                 "1:"
                 : "=a"(result)
                 : "a"(SYS_CLONE), "D"(CLONE_THREAD_FLAGS), "S"(top), "d"(0)
                 : "rcx", "r8", "r10", "r11", "memory");
}

static void make_directory(void)
{
    char name[] = "/d/0000";

    CALL3(MKDIR, "/d", 0700, 0);
    for (long i = 0; i < entries; i++) {
        for (long digit = 6, rest = i; digit >= 3; digit--, rest /= 10)
            name[digit] = '0' + rest % 10;
        CALL1(CLOSE, CALL3(OPEN, name, O_RDWR | O_CREAT, 0600));
    }
}

static u64 all_calls(void)
{
    u64 sum = 0;

    for (u32 i = 0; i < worker_count; i++)
        sum += workers[i].calls;
    return sum;
}

static void measure(u32 which, u64 warmup_ms, u64 duration_ms)
{
    u64 before;

    load = loads[which].load;
    sleep_ms(warmup_ms);
    before = all_calls();
    tell(0, which);
    sleep_ms(duration_ms);
    tell(4, all_calls() - before);
    load = 0;
    sleep_ms(10);
}

/* Whether `text` begins with `word`; then it moves behind it. */
static int take(const char **text, const char *word)
{
    const char *at = *text;

    while (*word)
        if (*at++ != *word++)
            return 0;
    *text = at;
    return 1;
}

static u64 number(const char *text, u64 most)
{
    u64 value = 0;

    while (*text >= '0' && *text <= '9' && value <= most)
        value = value * 10 + *text++ - '0';
    return value < most ? value : most;
}

__attribute__((noreturn, used)) static void begin(long *stack)
{
    const char **words = (const char **)(stack + 2 + stack[0]), *wanted = "directory";
    u64 warmup = 60, duration = 200;

    for (; *words; words++) {
        const char *word = *words;

        if (take(&word, "contend="))
            wanted = word;
        else if (take(&word, "workers="))
            worker_count = number(word, MAX_WORKERS);
        else if (take(&word, "entries="))
            entries = number(word, MAX_ENTRIES);
        else if (take(&word, "warmup="))
            warmup = number(word, 1000000);
        else if (take(&word, "duration="))
            duration = number(word, 1000000);
    }
    CALL3(IOPERM, PORT, 12, 1);
    CALL3(PIPE2, pipe_ends, O_NONBLOCK, 0);
    make_directory();
    for (u32 i = 0; i < worker_count; i++)
        start_worker(i);
    while (*wanted) {
        for (u32 i = 0; i < sizeof loads / sizeof loads[0]; i++)
            if (take(&wanted, loads[i].name))
                measure(i, warmup, duration);
        while (*wanted && *wanted++ != ',')
            ;
    }
    tell(8, 0);
    for (;;)
        sleep_ms(1000);
}

asm(".globl _start\n"
    "_start:\n\t"
    "mov %rsp, %rdi\n\t"
    "and $-16, %rsp\n\t"
    "call begin\n");
