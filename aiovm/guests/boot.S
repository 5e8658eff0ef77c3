/*
 * Start-up of every guest program: a Multiboot 1 image (specification 0.6.96) to long mode, and the way in for
 * application processors.
 *
 * Memory: code at 2 MiB, everything that is written from 4 MiB on. Four GiB are mapped to themselves with 2 MiB
 * pages; only the first two pages (the AP trampoline, the code) may be executed, so that a store never goes to
 * a page that might hold code.
 *
 * CPUs are told apart by their initial APIC ID, which is also their index: a machine numbers them 0, 1, 2, ...
 */

#define STACK_SHIFT     12                      /* 4 KiB of stack a CPU */
#define TRAMPOLINE      0x8000                  /* SIPI vector 8 */

#define CODE32          0x08
#define DATA            0x10
#define CODE64          0x18

#define CR0_LONG        0x80010031              /* PG, WP, NE, ET, PE */
#define CR4_PAE         0x20
#define MSR_EFER        0xC0000080
#define EFER_LME_NXE    0x900
#define MSR_GS_BASE     0xC0000101

#define PTE_TABLE       0x23                    /* present, writable, accessed */
#define PTE_2M          0xE3                    /* present, writable, accessed, dirty, page size */
#define PTE_NX_HIGH     0x80000000              /* bit 63, in the high half */

        .section .multiboot, "a"
        .balign 4
        .long   0x1BADB002, 0x3, -(0x1BADB002 + 0x3)    /* page-align modules, memory information */

        .text
        .code32
        .globl  _start
        .type   _start, @function
_start:
        mov     %ebx, %edi                      /* the Multiboot information; 0 on an AP */

        /* PML4 -> PDPT -> four page directories of 512 entries each. */
        movl    $pdpt + PTE_TABLE, pml4
        mov     $pdpt, %ebx
        mov     $page_directories + PTE_TABLE, %eax
1:      mov     %eax, (%ebx)
        add     $8, %ebx
        add     $0x1000, %eax
        cmp     $pdpt + 32, %ebx
        jne     1b

        mov     $page_directories, %ebx
        mov     $PTE_2M, %eax
        xor     %edx, %edx
        xor     %ecx, %ecx
2:      cmp     $2, %ecx
        jne     3f
        mov     $PTE_NX_HIGH, %edx
3:      mov     %eax, (%ebx)
        mov     %edx, 4(%ebx)
        add     $8, %ebx
        add     $0x200000, %eax
        inc     %ecx
        cmp     $2048, %ecx
        jne     2b

        lgdt    gdt_pointer
        ljmp    $CODE32, $enter_long_mode

ap_start:
        xor     %edi, %edi
enter_long_mode:
        mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $CR4_PAE, %eax
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        xor     %edx, %edx
        mov     $EFER_LME_NXE, %eax
        wrmsr
        mov     $CR0_LONG, %eax
        mov     %eax, %cr0
        ljmp    $CODE64, $long_mode

        .code64
long_mode:
        mov     $1, %eax
        cpuid
        shr     $24, %ebx
        mov     %ebx, %esi                      /* the index */

        mov     %esi, %eax
        shl     $6, %eax
        add     $percpu, %eax
        mov     %esi, (%rax)
        xor     %edx, %edx
        mov     $MSR_GS_BASE, %ecx
        wrmsr

        lea     1(%rsi), %eax
        shl     $STACK_SHIFT, %eax
        lea     stacks(%rax), %rsp
        lidt    idt_pointer

        test    %edi, %edi
        jz      4f
        call    bsp_main                        /* (information) */
4:      mov     %esi, %edi
        call    ap_main                         /* (index) */

/* Copied to TRAMPOLINE: an AP starts there in real mode, CS:IP 0800:0000. */
        .code16
        .globl  ap_trampoline, ap_trampoline_end
        .type   ap_trampoline, @object
ap_trampoline:
        cli
        xor     %ax, %ax
        mov     %ax, %ds
        lgdtl   TRAMPOLINE + (trampoline_gdt - ap_trampoline)
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $CODE32, $ap_start
        .balign 4
trampoline_gdt:
        .word   gdt_end - gdt - 1
        .long   gdt
ap_trampoline_end:
        .size   ap_trampoline, . - ap_trampoline

/*
 * void delay_loops(u64 n): n times a block of nine-byte NOPs. A machine that charges time by bytes of code charges
 * much for this block and emulates it quickly. It stays within one page, so that it is one block everywhere.
 */
        .code64
        .balign 256
        .globl  delay_loops
        .type   delay_loops, @function
delay_loops:
        test    %rdi, %rdi
        jz      2f
1:      .rept   24
        .byte   0x66, 0x0F, 0x1F, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00
        .endr
        dec     %rdi
        jnz     1b
2:      ret
        .size   delay_loops, . - delay_loops

        .section .rodata
        .balign 8
gdt:    .quad   0
        .quad   0x00CF9B000000FFFF              /* 32-bit code */
        .quad   0x00CF93000000FFFF              /* data */
        .quad   0x00AF9B000000FFFF              /* 64-bit code */
gdt_end:
        .balign 4
        .word   0
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_pointer:
        .word   256 * 16 - 1
        .quad   idt

        .bss
        .balign 4096
pml4:   .skip   4096
pdpt:   .skip   4096
page_directories:
        .skip   4 * 4096
        .globl  idt
        .type   idt, @object
idt:    .skip   256 * 16
        .size   idt, 4096
stacks: .skip   256 << STACK_SHIFT
percpu: .skip   256 * 64                        /* at GS:0 on each CPU: its index */

        .section .note.GNU-stack, "", @progbits
