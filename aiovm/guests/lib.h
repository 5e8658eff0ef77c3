/*
 * What the guest programs share: instructions, the serial port, the command line, delays, random numbers, CPUs
 * and interrupts. No libc, no floating point at run time.
 */
#ifndef LIB_H
#define LIB_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef unsigned __int128 u128;

#define MAX_CPUS 256
#define aligned64 __attribute__((aligned(64)))
#define noreturn __attribute__((noreturn))

/* ---- instructions ------------------------------------------------------------------------------------------- */

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

struct cpuid { u32 a, b, c, d; };

static inline struct cpuid cpuid(u32 leaf)
{
    struct cpuid r;
    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(0));
    return r;
}

static inline u64 rdmsr(u32 index)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (u64)high << 32 | low;
}

static inline void wrmsr(u32 index, u64 value)
{
    __asm__ volatile("wrmsr" : : "c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static inline void pause(void) { __asm__ volatile("pause" : : : "memory"); }

/* HLT as IF stands. The programs leave IF clear unless they say otherwise. */
static inline void hlt(void) { __asm__ volatile("hlt" : : : "memory"); }

/* Sleep for an interrupt: the STI shadow covers HLT, so that none is lost between the two. Returns with IF clear. */
static inline void wait_for_interrupt(void) { __asm__ volatile("sti; hlt; cli" : : : "memory"); }

/* This CPU is AMD's: its hypercall instruction is VMMCALL. */
extern u8 is_amd;

/* A hypercall (KVM's convention: the number in RAX, arguments in RBX, RCX). */
static inline u64 hypercall(u64 number, u64 arg0, u64 arg1)
{
    u64 result;
    if (is_amd)
        __asm__ volatile("vmmcall" : "=a"(result) : "a"(number), "b"(arg0), "c"(arg1) : "memory");
    else
        __asm__ volatile("vmcall" : "=a"(result) : "a"(number), "b"(arg0), "c"(arg1) : "memory");
    return result;
}

/* KVM_HC_KICK_CPU: wake the CPU from HLT; when it is awake, its next HLT does not sleep. */
static inline void kick_cpu(u32 cpu) { hypercall(5, 0, cpu); }

/* This CPU's index (its initial APIC ID), without the exit that CPUID costs. */
static inline u32 cpu_index(void)
{
    u32 index;
    __asm__ volatile("movl %%gs:0, %0" : "=r"(index));
    return index;
}

/* ---- the end ------------------------------------------------------------------------------------------------ */

/* Port 0xF4, isa-debug-exit: the process that runs the machine ends with status (value << 1) | 1. */
enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_REFUSED = 2 };

noreturn void debug_exit(u32 value);

/* Stop this CPU for ever. */
noreturn void stop(void);

/* ---- serial port (16550 at 0x3F8) --------------------------------------------------------------------------- */

void put_char(char c);
void put(const char *text);
void put_dec(u64 value);
void put_hex(u64 value);

/* Print "text" and the offending word, and end with EXIT_REFUSED. */
noreturn void refuse(const char *text, const char *word);

/* ---- command line: key=value words -------------------------------------------------------------------------- */

/* The number given for the key (decimal, or hexadecimal after 0x), or the default. */
u64 option(const char *key, u64 fallback);

/* The position, in a NULL-terminated list, of the word given for the key, or the default. */
u32 option_choice(const char *key, const char *const *choices, u32 fallback);

/* Refuse what nobody asked for: a mistyped key would otherwise run with its default. */
void options_end(void);

/* ---- time --------------------------------------------------------------------------------------------------- */

/* CPUID leaf 0x40000010 under KVM's signature, else tsc_khz= on the command line, else 2 GHz. */
extern u64 tsc_khz;

/* TSC cycles in so many nanoseconds. */
u64 ns_to_tsc(u64 ns);
u64 tsc_to_ns(u64 cycles);

/* Rounds of a loop of NOPs (boot.S), and how many take so many ns on this machine. */
void delay_loops(u64 n);
u64 ns_to_loops(u64 ns);
static inline void delay(u64 ns) { delay_loops(ns_to_loops(ns)); }

/* Nanoseconds that one round takes, x/65536; measured once, before other CPUs run. */
extern u64 loop_ns_fp;

/* ---- random numbers ----------------------------------------------------------------------------------------- */

/* A state for stream number n of a seed: never 0. */
u64 random_stream(u64 seed, u64 n);
u64 random_next(u64 *state);

/* Uniform in [0, limit). */
static inline u64 random_below(u64 *state, u64 limit) { return (u128)random_next(state) * limit >> 64; }

/* ---- CPUs and interrupts ------------------------------------------------------------------------------------ */

#define APIC_ID             0x020
#define APIC_EOI            0x0B0
#define APIC_LDR            0x0D0
#define APIC_SVR            0x0F0
#define APIC_ICR_LOW        0x300
#define APIC_ICR_HIGH       0x310
#define APIC_LVT_TIMER      0x320
#define APIC_TIMER_INITIAL  0x380
#define APIC_TIMER_CURRENT  0x390
#define APIC_TIMER_DIVIDE   0x3E0

#define ICR_ALL_BUT_SELF    0xC0000

static inline u32 apic_read(u32 reg) { return *(volatile u32 *)(0xFEE00000UL + reg); }
static inline void apic_write(u32 reg, u32 value) { *(volatile u32 *)(0xFEE00000UL + reg) = value; }

/* Software-enable this CPU's APIC; spurious vector 0xFF. */
void apic_enable(void);
void send_ipi(u32 cpu, u32 icr_low);

/* Run fn(index) on that CPU, once: INIT, SIPI. It stops when fn returns. */
void cpu_start(u32 cpu, void (*fn)(u32));

/* The same for CPUs 1 to n - 1. */
void cpus_start(u32 n, void (*fn)(u32));

/* Whether the machine offers the kick hypercall (KVM_FEATURE_PV_UNHALT). */
int has_pv_unhalt(void);

/* An interrupt gate for an __attribute__((interrupt)) function. */
struct frame;
void set_gate(u8 vector, void (*handler)(struct frame *));

/* Each program's own part; its result goes to debug_exit. */
u32 guest_main(void);

#endif
