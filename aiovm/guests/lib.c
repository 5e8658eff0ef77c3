/* See lib.h. */
#include "lib.h"

#define SERIAL          0x3F8
#define SERIAL_LCR      3
#define SERIAL_MCR      4
#define SERIAL_LSR      5
#define LSR_THRE        0x20

#define TRAMPOLINE      0x8000UL

/* GCC may call these for assignments and loops. */
void *memset(void *to, int value, u64 n)
{
    void *at = to;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, u64 n)
{
    void *at = to;
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n) : : "memory");
    return to;
}

/* ---- the end ------------------------------------------------------------------------------------------------ */

noreturn void stop(void)
{
    for (;;)
        __asm__ volatile("cli; hlt" : : : "memory");
}

noreturn void debug_exit(u32 value)
{
    outl(0xF4, value);
    stop();
}

/* ---- serial port -------------------------------------------------------------------------------------------- */

void put_char(char c)
{
    if (c == '\n')
        put_char('\r');
    while (!(inb(SERIAL + SERIAL_LSR) & LSR_THRE))
        pause();
    outb(SERIAL, c);
}

void put(const char *text)
{
    while (*text)
        put_char(*text++);
}

void put_dec(u64 value)
{
    char digits[24];
    u32 at = sizeof(digits) - 1;

    digits[at] = 0;
    do {
        digits[--at] = '0' + value % 10;
        value /= 10;
    } while (value);
    put(digits + at);
}

void put_hex(u64 value)
{
    int shift = 60;

    put("0x");
    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put_char("0123456789abcdef"[value >> shift & 15]);
}

noreturn void refuse(const char *text, const char *word)
{
    put(text);
    put(word);
    put("\n");
    debug_exit(EXIT_REFUSED);
}

/* ---- command line ------------------------------------------------------------------------------------------- */

#define MAX_WORDS 64

static char line[2048];
static struct { const char *text; u8 used; } words[MAX_WORDS];
static u32 word_count;

static void split_line(const char *from)
{
    u32 n = 0;

    while (n < sizeof(line) - 1 && from[n]) {
        line[n] = from[n];
        n++;
    }
    for (char *at = line; *at && word_count < MAX_WORDS;) {
        while (*at == ' ')
            *at++ = 0;
        if (*at)
            words[word_count++].text = at;
        while (*at && *at != ' ')
            at++;
    }
}

static int equal(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

/* The value of the last word for this key (a loader may put the image's name before the words), or NULL. */
static const char *find(const char *key)
{
    const char *found = 0;

    for (u32 i = 0; i < word_count; i++) {
        const char *k = key, *w = words[i].text;
        while (*k && *k == *w) {
            k++;
            w++;
        }
        if (!*k && *w == '=') {
            words[i].used = 1;
            found = w + 1;
        }
    }
    return found;
}

u64 option(const char *key, u64 fallback)
{
    const char *text = find(key), *at = text;
    u64 value = 0, base = 10;

    if (!text)
        return fallback;
    if (at[0] == '0' && at[1] == 'x') {
        base = 16;
        at += 2;
    }
    do {
        u32 digit = *at >= 'a' ? *at - 'a' + 10U : *at - (u32)'0';
        if (digit >= base)
            refuse("not a number: ", text);
        value = value * base + digit;
    } while (*++at);
    return value;
}

u32 option_choice(const char *key, const char *const *choices, u32 fallback)
{
    const char *text = find(key);

    if (!text)
        return fallback;
    for (u32 i = 0; choices[i]; i++)
        if (equal(text, choices[i]))
            return i;
    refuse("not a choice: ", text);
}

void options_end(void)
{
    /* Word 0 is the image's name. */
    for (u32 i = 1; i < word_count; i++)
        if (!words[i].used)
            refuse("unknown option: ", words[i].text);
}

/* ---- time --------------------------------------------------------------------------------------------------- */

u64 tsc_khz;
u64 loop_ns_fp;

/* KVM's highest leaf, or 0 without its signature "KVMKVMKVM". */
static u32 kvm_leaves(void)
{
    struct cpuid r;

    if (!(cpuid(1).c >> 31))
        return 0;
    r = cpuid(0x40000000);
    return r.b == 0x4B4D564B && r.c == 0x564B4D56 && r.d == 0x4D ? r.a : 0;
}

int has_pv_unhalt(void)
{
    return kvm_leaves() && cpuid(0x40000001).a >> 7 & 1;
}

static void find_tsc_khz(void)
{
    u64 given = option("tsc_khz", 0);

    if (kvm_leaves() >= 0x40000010)
        tsc_khz = cpuid(0x40000010).a;
    if (!tsc_khz)
        tsc_khz = given ? given : 2000000;
}

u64 ns_to_tsc(u64 ns)
{
    return ns / 1000000 * tsc_khz + ns % 1000000 * tsc_khz / 1000000;
}

u64 tsc_to_ns(u64 cycles)
{
    return cycles / tsc_khz * 1000000 + cycles % tsc_khz * 1000000 / tsc_khz;
}

/* The best of three runs of at least 400 us: RDTSC's own cost, two exits at worst, stays below one per cent. */
static void calibrate(void)
{
    u64 best = ~0UL;

    delay_loops(64);
    for (int run = 0; run < 3; run++) {
        u64 loops = 1024, ns;
        for (;; loops *= 2) {
            u64 start = rdtsc();
            delay_loops(loops);
            ns = tsc_to_ns(rdtsc() - start);
            if (ns >= 400000)
                break;
        }
        ns = ns * 65536 / loops;
        if (ns < best)
            best = ns;
    }
    loop_ns_fp = best ? best : 1;
}

u64 ns_to_loops(u64 ns)
{
    return (ns * 65536 + loop_ns_fp / 2) / loop_ns_fp;
}

/* ---- random numbers: Vigna's xorshift64*, seeded through splitmix64 ---------------------------------------- */

u64 random_stream(u64 seed, u64 n)
{
    u64 z = seed * 0xD1342543DE82EF95 + (n + 1) * 0x9E3779B97F4A7C15;

    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    z ^= z >> 31;
    return z ? z : 1;
}

u64 random_next(u64 *state)
{
    u64 x = *state;

    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545F4914F6CDD1D;
}

/* ---- CPUs and interrupts ------------------------------------------------------------------------------------ */

extern const u8 ap_trampoline[], ap_trampoline_end[];
extern u64 idt[256][2];

u8 is_amd;
static void (*ap_function[MAX_CPUS])(u32);

void apic_enable(void)
{
    apic_write(APIC_SVR, 0x1FF);
}

void send_ipi(u32 cpu, u32 icr_low)
{
    apic_write(APIC_ICR_HIGH, cpu << 24);
    apic_write(APIC_ICR_LOW, icr_low);
}

/* No pause between INIT and SIPI: CPUs of this century need none (Linux waits for none on them either). */
void cpu_start(u32 cpu, void (*fn)(u32))
{
    static u8 copied;

    if (!copied) {
        memcpy((void *)TRAMPOLINE, ap_trampoline, ap_trampoline_end - ap_trampoline);
        copied = 1;
    }
    __atomic_store_n(&ap_function[cpu], fn, __ATOMIC_RELEASE);
    send_ipi(cpu, 0x4500);                      /* INIT, assert */
    send_ipi(cpu, 0x4600 | TRAMPOLINE >> 12);   /* STARTUP */
}

void cpus_start(u32 n, void (*fn)(u32))
{
    for (u32 cpu = 1; cpu < n; cpu++)
        cpu_start(cpu, fn);
}

noreturn void ap_main(u32 cpu)
{
    ap_function[cpu](cpu);
    stop();
}

void set_gate(u8 vector, void (*handler)(struct frame *))
{
    u64 at = (u64)handler;

    idt[vector][1] = at >> 32;
    idt[vector][0] = (at & 0xFFFF) | 0x18UL << 16 | 0x8EUL << 40 | (at >> 16 & 0xFFFF) << 48;
}

/* The Multiboot information: flags in word 0 (bit 2: command line), its address in word 4. */
noreturn void bsp_main(const u32 *information)
{
    outb(SERIAL + SERIAL_LCR, 0x03);            /* 8N1 */
    outb(SERIAL + SERIAL_MCR, 0x03);            /* DTR, RTS */
    outb(0x21, 0xFF);                           /* firmware may have left the 8259s and a timer going */
    outb(0xA1, 0xFF);
    if (information[0] & 4)
        split_line((const char *)(u64)information[4]);
    is_amd = cpuid(0).b == 0x68747541;          /* "Auth" */
    find_tsc_khz();
    calibrate();
    debug_exit(guest_main());
}
