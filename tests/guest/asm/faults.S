/*
 * Each fault in each mode of delivery, for two machines to be compared: a Multiboot 1 image that provokes them one by
 * one, keeps what the processor left behind, and prints it on the serial port as hexadecimal dwords.
 *
 * A record is 64 bytes: mode, case, vector, 0; stack pointer at the handler; CR2; SS; 48 bytes from the stack.
 * The case that did not fault has vector 0x80. 16-bit code runs at FFFF:0010 and up, with R(symbol) as the offset.
 * test_fault_guest.py knows the numbers of modes and cases.
 */

#define R(symbol) (symbol - base + 0x10)

        .set    CODE32, 0x08
        .set    DATA32, 0x10
        .set    CODE64, 0x18
        .set    CODE16, 0x20
        .set    DATA16, 0x28
        .set    USER32, 0x33
        .set    USERDATA, 0x3B
        .set    USER64, 0x43
        .set    TSS32, 0x48
        .set    FAULT_TSS, 0x50
        .set    SHORT_TSS, 0x58
        .set    ABSENT, 0x60
        .set    TSS64, 0x68
        .set    BEYOND, 0x200

        .set    NONE, 0x80
        .set    ABSENT_PAGE, 0x400000
        .set    READ_ONLY_PAGE, 0x800000
        .set    SUPERVISOR_PAGE, 0xC00000

        .text
        .balign 4
base:   .long   0x1BADB002, 0, -0x1BADB002

/* ---- cases ---------------------------------------------------------------------------------------------------- */

/* In the handler's own 16-bit segment. */
        .macro  case16 id, code
        movb    $\id, R(case)
        movw    $R(.Lnext\@), R(resume)
        movw    %sp, R(saved)
        \code
        int     $NONE
.Lnext\@:
        .endm

        .macro  case32 id, code
        movb    $\id, case
        movl    $.Lnext\@, resume
        movl    %esp, saved
        \code
        int     $NONE
.Lnext\@:
        .endm

        .macro  case64 id, code
        movb    $\id, case
        movl    $.Lnext\@, resume
        movl    %esp, saved
        \code
        int     $NONE
.Lnext\@:
        .endm

/* Left by IRET to CS selector at a privilege of 3, or to virtual-8086 mode; the code is of so many bits. */
        .macro  case_v86 id, code
        movb    $\id, case
        movl    $.Lnext\@, resume
        movl    %esp, saved
        movl    $R(.Lcode\@), %eax
        jmp     enter_v86
        .code16
.Lcode\@:
        \code
        int     $NONE
        .code32
.Lnext\@:
        .endm

        .macro  case_user32 id, code
        movb    $\id, case
        movl    $.Lnext\@, resume
        movl    %esp, saved
        movl    $.Lcode\@, %eax
        jmp     enter_user32
.Lcode\@:
        \code
        int     $NONE
.Lnext\@:
        .endm

        .macro  case_user64 id, selector, bits, code
        movb    $\id, case
        movl    $.Lnext\@, resume
        movl    %esp, saved
        movl    $.Lcode\@, %eax
        movl    $\selector, %edx
        jmp     enter_user64
        .code\bits
.Lcode\@:
        \code
        int     $NONE
        .code64
.Lnext\@:
        .endm

/* ---- start: 32-bit code, flat, as a Multiboot loader leaves it -------------------------------------------------- */

        .code32
        .globl  start
start:
        cli
        lgdt    gdt_pointer
        ljmp    $CODE32, $1f
1:      movl    $DATA32, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %fs
        movl    %eax, %gs
        movl    %eax, %ss
        movl    $stack_top, %esp
        movb    $0xFF, %al              /* no interrupts from the 8259s */
        outb    %al, $0x21
        outb    %al, $0xA1
        movl    %cr4, %eax
        orl     $0x610, %eax            /* PSE, OSFXSR, OSXMMEXCPT */
        movl    %eax, %cr4
        movl    $0x31, %eax             /* PE, ET, NE */
        movl    %eax, %cr0
        fninit

        movl    $tss32, %eax            /* bases of the task-state segments */
        movl    $gdt + TSS32, %edi
        call    set_base
        movl    $fault_tss, %eax
        movl    $gdt + FAULT_TSS, %edi
        call    set_base
        movl    $fault_tss, %eax
        movl    $gdt + SHORT_TSS, %edi
        call    set_base
        movl    $tss64, %eax
        movl    $gdt + TSS64, %edi
        call    set_base
        movl    $stack0_top, tss32 + 4
        movl    $DATA32, tss32 + 8
        movw    $0x68, tss32 + 0x66
        movl    $page_directory, tss32 + 0x1C
        movl    $TSS32, %eax
        ltr     %ax

        call    real_mode
        call    protected16
        call    protected32
        jmp     long_mode

set_base:
        movw    %ax, 2(%edi)
        shrl    $16, %eax
        movb    %al, 4(%edi)
        movb    %ah, 7(%edi)
        ret

/* Fill IDT entries 0-31 and NONE with the 32-bit stubs; the gates' type and flags are in AL. */
fill_idt32:
        movl    $idt, %edi
        movl    $stubs32, %ebx
        xorl    %ecx, %ecx
1:      movw    %bx, (%edi)
        movw    $CODE32, 2(%edi)
        movb    $0, 4(%edi)
        movb    %al, 5(%edi)
        movl    %ebx, %edx
        shrl    $16, %edx
        movw    %dx, 6(%edi)
        addl    $8, %edi
        addl    $16, %ebx
        incl    %ecx
        cmpl    $32, %ecx
        jne     1b
        cmpl    $idt + 8 * (NONE + 1), %edi
        je      2f
        movl    $idt + 8 * NONE, %edi
        movl    $31, %ecx
        jmp     1b
2:      lidt    idt_pointer32
        ret

/* ---- real mode and 16-bit protected mode: the same code ---------------------------------------------------------- */

real_mode:
        movb    $1, mode
        movl    $R(stubs16), %eax       /* the interrupt vector table: FFFF:stub */
        orl     $0xFFFF0000, %eax
        xorl    %edi, %edi
1:      movl    %eax, (%edi)
        addl    $16, %eax
        addl    $4, %edi
        cmpl    $128, %edi
        jne     1b
        movl    %eax, 4 * NONE
        movw    $0xFFFF, data16
        movl    %esp, saved_flat
        lidt    idt_pointer_real
        ljmp    $CODE16, $R(1f)
        .code16
1:      movw    $DATA16, %ax
        movw    %ax, %ss
        movw    %ax, %ds
        movw    %ax, %es
        movl    %cr0, %eax
        andb    $0xFE, %al
        movl    %eax, %cr0
        ljmp    $0xFFFF, $R(2f)
2:      movw    $0xFFFF, %ax
        movw    %ax, %ss
        movw    %ax, %ds
        movw    %ax, %es
        movw    $R(stack_top) - 256, %sp  /* below our own */
        call    faults16
        case16  0x31, "ltr %ax"
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $CODE32, $flat
        .code32
flat:   movl    $DATA32, %eax           /* back from 16-bit code */
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    saved_flat, %esp
        ret

protected16:
        movb    $3, mode
        movl    $idt, %edi              /* 286 interrupt gates */
        movl    $R(stubs16), %eax
        xorl    %ecx, %ecx
1:      movw    %ax, (%edi)
        movw    $CODE16, 2(%edi)
        movw    $0x8600, 4(%edi)
        movw    $0, 6(%edi)
        addl    $8, %edi
        addl    $16, %eax
        incl    %ecx
        cmpl    $32, %ecx
        jb      1b
        movl    $idt + 8 * NONE, %edi
        je      1b
        lidt    idt_pointer32
        movw    $DATA16, data16
        movl    %esp, saved_flat
        ljmp    $CODE16, $R(2f)
        .code16
2:      movw    $DATA16, %ax
        movw    %ax, %ss
        movw    %ax, %ds
        movw    %ax, %es
        movw    $R(stack_top) - 256, %sp  /* below our own */
        call    faults16
        case16  0x20, "movw $ABSENT, %ax; movw %ax, %es"
        case16  0x21, "movw $ABSENT, %ax; movw %ax, %ss"
        case16  0x22, "movw $BEYOND, %ax; movw %ax, %es"
        case16  0x23, "ljmp $SHORT_TSS, $0"
        case16  0x24, "int $0x81"
        case16  0x25, "xorw %ax, %ax; movw %ax, %ss"
        movb    $0, R(idt) + 8 * 13 + 5
        case16  0x26, "movw $BEYOND, %ax; movw %ax, %es"
        movb    $0x86, R(idt) + 8 * 13 + 5
        ljmpl   $CODE32, $flat

faults16:
        case16  0, "xorw %ax, %ax; xorw %dx, %dx; xorw %cx, %cx; divw %cx"
        case16  1, "pushw $0x102; popfw; nop; nop"
        case16  2, "int $1"
        case16  3, "int3"
        case16  4, "movb $0x7F, %al; addb $1, %al; into"
        case16  5, "movw $9, %ax; boundw %ax, bounds16 - base + 0x10"
        case16  6, "ud2"
        case16  7, "movl %cr0, %eax; orb $8, %al; movl %eax, %cr0; fnop"
        clts
        case16  8, ".byte 0xF1"
        case16  16, "fldcw unmasked - base + 0x10; fld1; fldz; fdivrp; fwait"
        fninit
        case16  17, "int $0x10"
        ret

common16:                               /* [sp]: vector, then the frame */
        pushw   %bp
        movw    %sp, %bp
        movw    %cs:R(data16), %ax
        movw    %ax, %ds
        movw    R(record), %di
        addw    $0x10, %di
        movb    R(mode), %al
        movb    R(case), %ah
        movw    %ax, (%di)
        movw    2(%bp), %ax
        movw    %ax, 2(%di)
        leaw    4(%bp), %ax
        movw    %ax, 4(%di)
        movl    %cr2, %eax
        movl    %eax, 8(%di)
        movw    %ss, 12(%di)
        xorw    %si, %si
1:      movw    4(%bp, %si), %ax
        movw    %ax, 16(%di)
        addw    $2, %di
        addw    $2, %si
        cmpw    $10, %si
        jne     1b
        addw    $64, R(record)
        movw    R(saved), %sp
        jmp     *R(resume)

        .balign 16
stubs16:
        .set    vector, 0
        .rept   32
        .balign 16
        pushw   $vector
        jmp     common16
        .set    vector, vector + 1
        .endr
        .balign 16
        pushw   $NONE
        jmp     common16
        .code32

/* ---- 32-bit protected mode: gates of all kinds, three privileges --------------------------------------------------- */

protected32:
        movl    $page_directory, %edi   /* 4-MiB pages: 0 for all, then absent, read-only, the supervisor's */
        movl    $0x87, (%edi)
        movl    $READ_ONLY_PAGE + 0x85, READ_ONLY_PAGE >> 20(%edi)
        movl    $SUPERVISOR_PAGE + 0x83, SUPERVISOR_PAGE >> 20(%edi)
        movl    %edi, %cr3
        movl    $0x80010031, %eax       /* PG, WP */
        movl    %eax, %cr0

        movb    $4, mode                /* interrupt gates */
        movb    $0xEE, %al
        call    fill_idt32
        sti
        call    faults32
        case32  8, "movb $0, idt + 8 * 13 + 5; movl $BEYOND, %eax; movl %eax, %es"
        movb    $0xEE, idt + 8 * 13 + 5
        case32  9, "movl $0, idt + 8 * 14 + 4; movb ABSENT_PAGE, %al"
        movb    $5, mode                /* trap gates: IF stays */
        movb    $0xEF, %al
        call    fill_idt32
        sti
        case32  0, "xorl %eax, %eax; xorl %edx, %edx; xorl %ecx, %ecx; divl %ecx"
        case32  3, "int3"
        case32  0x22, "movl $BEYOND, %eax; movl %eax, %es"
        case32  14, "movl $0x12345678, ABSENT_PAGE + 0x234"
        cli

        movb    $7, mode                /* from CPL 3 */
        movb    $0xEE, %al
        call    fill_idt32
        movl    $0x3202, user_flags
        case_user32 0, "xorl %eax, %eax; xorl %edx, %edx; xorl %ecx, %ecx; divl %ecx"
        case_user32 1, "pushl $0x3302; popfl; nop; nop"
        case_user32 3, "int3"
        case_user32 4, "movb $0x7F, %al; addb $1, %al; into"
        case_user32 5, "movl $9, %eax; boundl %eax, bounds32"
        case_user32 6, "ud2"
        case_user32 0x20, "movl $ABSENT, %eax; movl %eax, %es"
        case_user32 0x22, "movl $BEYOND, %eax; movl %eax, %es"
        case_user32 13, "hlt"
        case_user32 14, "movb ABSENT_PAGE, %al"
        case_user32 0x40, "movb %al, READ_ONLY_PAGE"
        case_user32 0x41, "movb SUPERVISOR_PAGE, %al"
        case_user32 0x42, "movb %al, SUPERVISOR_PAGE"
        case_user32 0x43, "movl $SUPERVISOR_PAGE, %eax; jmp *%eax"
        case_user32 16, "fldcw unmasked; fld1; fldz; fdivrp; fwait"
        fninit
        movb    $0x8E, idt + 8 * 3 + 5
        case_user32 0x44, "int3"
        movb    $0xEE, idt + 8 * 3 + 5
        movl    %cr0, %eax
        orb     $8, %al
        movl    %eax, %cr0
        case_user32 7, "fnop"
        clts
        movl    %cr0, %eax
        orl     $0x40000, %eax          /* AM */
        movl    %eax, %cr0
        case_user32 17, "pushl $0x43202; popfl; movl bounds32 + 1, %eax"
        case_user32 19, "ldmxcsr sse_unmasked; xorps %xmm0, %xmm0; divps %xmm0, %xmm0"
        ldmxcsr sse_masked

        movb    $2, mode                /* from virtual-8086 mode, IOPL 3 and then 0 */
        movl    $0x23202, user_flags
        case_v86 0, "xorw %ax, %ax; xorw %dx, %dx; xorw %cx, %cx; divw %cx"
        case_v86 1, "pushw $0x3302; popfw; nop; nop"
        case_v86 3, "int3"
        case_v86 4, "movb $0x7F, %al; addb $1, %al; into"
        case_v86 5, "movw $9, %ax; boundw %ax, bounds16 - base + 0x10"
        case_v86 6, "ud2"
        case_v86 13, "hlt"
        case_v86 0x24, "int $0x20"
        case_v86 0x31, "ltr %ax"
        case_v86 0x43, "movl %cr0, %eax"
        case_v86 16, "fldcw unmasked - base + 0x10; fld1; fldz; fdivrp; fwait"
        fninit
        movl    $0x20202, user_flags
        case_v86 0x50, "int3"
        case_v86 0x51, "pushfw"
        case_v86 0x52, "cli"
        case_v86 0x53, "iretw"

        movb    $6, mode                /* through task gates, on the other task's stack */
        movl    $page_directory, fault_tss + 0x1C
        movl    $fault_task, fault_tss + 0x20
        movl    $0x2, fault_tss + 0x24
        movl    $stack1_top, fault_tss + 0x38
        movl    $DATA32, %eax
        movl    %eax, fault_tss + 0x48
        movl    %eax, fault_tss + 0x50
        movl    %eax, fault_tss + 0x54
        movl    %eax, fault_tss + 0x58
        movl    %eax, fault_tss + 0x5C
        movl    $CODE32, fault_tss + 0x4C
        movl    $FAULT_TSS << 16, idt + 8 * 6
        movl    $0x8500, idt + 8 * 6 + 4
        movl    $FAULT_TSS << 16, idt + 8 * 13
        movl    $0x8500, idt + 8 * 13 + 4
        movl    $FAULT_TSS << 16, idt + 8 * 8
        movl    $0x8500, idt + 8 * 8 + 4
        movl    $0x1234, %ebp           /* the old task's registers go to its segment */
        case32  6, "ud2"
        case32  0x22, "movl $BEYOND, %eax; movl %eax, %es"
        case32  8, "movb $0, idt + 8 * 13 + 5; movl $BEYOND, %eax; movl %eax, %es"
        ret

fault_task:
        movl    record, %edi
        movb    mode, %al
        movb    case, %ah
        movw    %ax, (%edi)
        movl    %esp, 4(%edi)
        movl    %cr0, %eax              /* TS is set by the switch */
        movl    %eax, 8(%edi)
        str     12(%edi)
        movl    (%esp), %eax
        movl    %eax, 16(%edi)
        movl    fault_tss, %eax
        movl    %eax, 20(%edi)
        movl    tss32 + 0x20, %eax
        movl    %eax, 24(%edi)
        movl    tss32 + 0x24, %eax
        movl    %eax, 28(%edi)
        movl    tss32 + 0x38, %eax
        movl    %eax, 32(%edi)
        movl    tss32 + 0x3C, %eax
        movl    %eax, 36(%edi)
        movl    tss32 + 0x4C, %eax
        movl    %eax, 40(%edi)
        movl    gdt + TSS32 + 4, %eax   /* both are busy */
        movl    %eax, 44(%edi)
        movl    gdt + FAULT_TSS + 4, %eax
        movl    %eax, 48(%edi)
        pushfl
        popl    52(%edi)
        addl    $64, record
        movl    resume, %eax
        movl    %eax, tss32 + 0x20
        clts
        movl    $stack1_top, %esp
        iretl
        jmp     fault_task

faults32:
        case32  0, "xorl %eax, %eax; xorl %edx, %edx; xorl %ecx, %ecx; divl %ecx"
        case32  1, "pushl $0x302; popfl; nop; nop"
        case32  2, "int $1"
        case32  3, "int3"
        case32  4, "movb $0x7F, %al; addb $1, %al; into"
        case32  5, "movl $9, %eax; boundl %eax, bounds32"
        case32  6, "ud2"
        case32  7, "movl %cr0, %eax; orb $8, %al; movl %eax, %cr0; fnop"
        clts
        case32  0x20, "movl $ABSENT, %eax; movl %eax, %es"
        case32  0x21, "movl $ABSENT, %eax; movl %eax, %ss"
        case32  0x22, "movl $BEYOND, %eax; movl %eax, %es"
        case32  0x23, "ljmp $SHORT_TSS, $0"
        case32  0x24, "int $0x81"
        case32  0x25, "xorl %eax, %eax; movl %eax, %ss"
        case32  14, "movb ABSENT_PAGE + 0x123, %al"
        case32  0x40, "movb %al, READ_ONLY_PAGE"
        case32  0x41, "movl $ABSENT_PAGE, %eax; jmp *%eax"
        case32  16, "fldcw unmasked; fld1; fldz; fdivrp; fwait"
        fninit
        case32  8, ".byte 0xF1"
        ret

enter_user32:
        pushl   $USERDATA
        pushl   $user_stack_top
        pushl   user_flags
        pushl   $USER32
        pushl   %eax
        movl    $USERDATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        iretl

enter_v86:
        pushl   $0xFFFF                 /* GS, FS, DS, ES, SS */
        pushl   $0xFFFF
        pushl   $0xFFFF
        pushl   $0xFFFF
        pushl   $0xFFFF
        pushl   $R(user_stack_top)
        pushl   user_flags
        pushl   $0xFFFF
        pushl   %eax
        iretl

common32:                               /* [esp]: vector, then the frame */
        pushl   %ebp
        movl    %esp, %ebp
        movl    $DATA32, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    record, %edi
        movb    mode, %al
        movb    case, %ah
        movw    %ax, (%edi)
        movl    4(%ebp), %eax
        movw    %ax, 2(%edi)
        leal    8(%ebp), %esi
        movl    %esi, 4(%edi)
        movl    %cr2, %eax
        movl    %eax, 8(%edi)
        movw    %ss, 12(%edi)
        addl    $16, %edi
        movl    $12, %ecx
        cld
        rep movsl
        movl    %edi, record
        movl    saved, %esp
        movl    $0x1234, %ebp
        jmp     *resume

        .balign 16
stubs32:
        .set    vector, 0
        .rept   32
        .balign 16
        pushl   $vector
        jmp     common32
        .set    vector, vector + 1
        .endr
        .balign 16
        pushl   $NONE
        jmp     common32

/* ---- long mode -------------------------------------------------------------------------------------------------- */

long_mode:
        movl    $0x31, %eax             /* paging off */
        movl    %eax, %cr0
        movl    $pdpt + 7, pml4
        movl    $directory + 7, pdpt
        movl    $0x87, directory        /* 2-MiB pages: as before */
        movl    $READ_ONLY_PAGE + 0x85, directory + (READ_ONLY_PAGE >> 18)
        movl    $SUPERVISOR_PAGE + 0x83, directory + (SUPERVISOR_PAGE >> 18)
        movl    %cr4, %eax
        orl     $0x20, %eax
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $0xC0000080, %ecx
        movl    $0x901, %eax            /* SCE, LME, NXE */
        xorl    %edx, %edx
        wrmsr
        movl    $0x80010031, %eax
        movl    %eax, %cr0
        ljmp    $CODE64, $1f
        .code64
1:      movl    $stack_top, %esp
        movl    $stack0_top, tss64 + 4
        movl    $stack1_top, tss64 + 0x24
        movw    $0x68, tss64 + 0x66
        movl    $TSS64, %eax
        ltr     %ax
        xorl    %ebp, %ebp
        movl    %ebp, %fs
        movl    %ebp, %gs

        movb    $8, mode
        xorl    %eax, %eax
        call    fill_idt64
        sti
        call    faults64
        movb    $0, idt + 16 * 13 + 5
        case64  8, "movl $BEYOND, %eax; movl %eax, %es"
        movb    $0xEE, idt + 16 * 13 + 5

        movb    $9, mode                /* on the first stack of the interrupt stack table */
        movl    $1, %eax
        call    fill_idt64
        case64  0, "xorl %eax, %eax; xorl %edx, %edx; xorl %ecx, %ecx; divl %ecx"
        case64  3, "int3"
        case64  0x22, "movl $BEYOND, %eax; movl %eax, %es"
        case64  14, "movb ABSENT_PAGE + 0x123, %al"
        case64  0x45, "movl $stack_top - 5, %esp; ud2"

        movb    $10, mode               /* from CPL 3 */
        xorl    %eax, %eax
        call    fill_idt64
        movl    $0x3202, user_flags
        case_user64 0, USER64, 64, "xorl %eax, %eax; xorl %edx, %edx; xorl %ecx, %ecx; divl %ecx"
        case_user64 1, USER64, 64, "pushq $0x3302; popfq; nop; nop"
        case_user64 3, USER64, 64, "int3"
        case_user64 6, USER64, 64, "ud2"
        case_user64 0x20, USER64, 64, "movl $ABSENT, %eax; movl %eax, %es"
        case_user64 0x22, USER64, 64, "movl $BEYOND, %eax; movl %eax, %es"
        case_user64 13, USER64, 64, "hlt"
        case_user64 14, USER64, 64, "movb ABSENT_PAGE, %al"
        case_user64 0x40, USER64, 64, "movb %al, READ_ONLY_PAGE"
        case_user64 0x41, USER64, 64, "movb SUPERVISOR_PAGE, %al"
        case_user64 0x43, USER64, 64, "movl $SUPERVISOR_PAGE, %eax; jmp *%rax"
        case_user64 0x46, USER64, 64, "movabsq $0x8000000000000000, %rax; movb (%rax), %al"
        case_user64 0x47, USER64, 64, "movabsq $0x8000000000000000, %rsp; pushq %rax"
        case_user64 16, USER64, 64, "fldcw unmasked; fld1; fldz; fdivrp; fwait"
        fninit

        movb    $11, mode               /* from compatibility mode */
        case_user64 0, USER32, 32, "xorl %eax, %eax; xorl %edx, %edx; xorl %ecx, %ecx; divl %ecx"
        case_user64 1, USER32, 32, "pushl $0x3302; popfl; nop; nop"
        case_user64 3, USER32, 32, "int3"
        case_user64 4, USER32, 32, "movb $0x7F, %al; addb $1, %al; into"
        case_user64 5, USER32, 32, "movl $9, %eax; boundl %eax, bounds32"
        case_user64 6, USER32, 32, "ud2"
        case_user64 0x20, USER32, 32, "movl $ABSENT, %eax; movl %eax, %es"
        case_user64 0x22, USER32, 32, "movl $BEYOND, %eax; movl %eax, %es"
        case_user64 0x23, USER32, 32, "ljmp $TSS64 + 3, $0"
        case_user64 13, USER32, 32, "hlt"
        case_user64 14, USER32, 32, "movb ABSENT_PAGE, %al"
        case_user64 0x41, USER32, 32, "movb SUPERVISOR_PAGE, %al"
        jmp     print

faults64:
        case64  0, "xorl %eax, %eax; xorl %edx, %edx; xorl %ecx, %ecx; divl %ecx"
        case64  1, "pushq $0x302; popfq; nop; nop"
        case64  2, "int $1"
        case64  3, "int3"
        case64  4, ".byte 0xCE"         /* INTO is no instruction here */
        case64  6, "ud2"
        case64  7, "movq %cr0, %rax; orb $8, %al; movq %rax, %cr0; fnop"
        clts
        case64  0x20, "movl $ABSENT, %eax; movl %eax, %es"
        case64  0x21, "movl $ABSENT, %eax; movl %eax, %ss"
        case64  0x22, "movl $BEYOND, %eax; movl %eax, %es"
        case64  0x24, "int $0x81"
        case64  14, "movb ABSENT_PAGE + 0x123, %al"
        case64  0x40, "movb %al, READ_ONLY_PAGE"
        case64  0x41, "movl $ABSENT_PAGE, %eax; jmp *%rax"
        case64  0x46, "movabsq $0x8000000000000000, %rax; movb (%rax), %al"
        case64  0x47, "movabsq $0x8000000000000000, %rbp; movb (%rbp), %al"
        case64  16, "fldcw unmasked; fld1; fldz; fdivrp; fwait"
        fninit
        case64  0x45, "movl $stack_top - 5, %esp; ud2"
        case64  9, ".byte 0xF1"
        ret

/* 32 gates and NONE to the 64-bit stubs, on the IST stack in EAX. */
fill_idt64:
        movl    $idt, %edi
        movl    $stubs64, %ebx
        xorl    %ecx, %ecx
1:      movw    %bx, (%rdi)
        movw    $CODE64, 2(%rdi)
        movb    %al, 4(%rdi)
        movb    $0xEE, 5(%rdi)
        movl    %ebx, %edx
        shrl    $16, %edx
        movl    %edx, 6(%rdi)
        movl    $0, 8(%rdi)
        movw    %dx, 6(%rdi)
        movl    $0, 12(%rdi)
        addl    $16, %edi
        addl    $16, %ebx
        incl    %ecx
        cmpl    $32, %ecx
        jb      1b
        movl    $idt + 16 * NONE, %edi
        je      1b
        lidt    idt_pointer64
        ret

enter_user64:
        pushq   $USERDATA
        pushq   $user_stack_top
        movl    user_flags, %ecx
        pushq   %rcx
        pushq   %rdx
        pushq   %rax
        movl    $USERDATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        iretq

common64:                               /* [rsp]: vector, then the frame */
        movl    record, %edi
        movb    mode, %al
        movb    case, %ah
        movw    %ax, (%rdi)
        popq    %rax
        movw    %ax, 2(%rdi)
        movl    %esp, 4(%rdi)
        movq    %cr2, %rax
        movl    %eax, 8(%rdi)
        movw    %ss, 12(%rdi)
        addl    $16, %edi
        movl    %esp, %esi
        movl    $12, %ecx
        cld
        rep movsl
        movl    %edi, record
        movl    saved, %esp
        xorl    %ebp, %ebp
        movl    resume, %eax
        jmp     *%rax

        .balign 16
stubs64:
        .set    vector, 0
        .rept   32
        .balign 16
        pushq   $vector
        jmp     common64
        .set    vector, vector + 1
        .endr
        .balign 16
        pushq   $NONE
        jmp     common64

/* ---- the report --------------------------------------------------------------------------------------------------- */

print:
        movl    $records, %esi
1:      movl    $16, %ebx
2:      movl    (%rsi), %ecx
        movl    $8, %ebp
3:      roll    $4, %ecx
        movl    %ecx, %eax
        andl    $15, %eax
        movb    digits(%rax), %al
        call    put
        decl    %ebp
        jnz     3b
        movb    $32, %al
        call    put
        addl    $4, %esi
        decl    %ebx
        jnz     2b
        movb    $10, %al
        call    put
        cmpl    record, %esi
        jb      1b
        xorl    %eax, %eax
        outb    %al, $0xF4
4:      hlt
        jmp     4b

put:    movb    %al, %dil
        movl    $0x3FD, %edx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        movb    %dil, %al
        movl    $0x3F8, %edx
        outb    %al, %dx
        ret

        .balign 8
gdt:    .quad   0
        .quad   0x00CF9B000000FFFF
        .quad   0x00CF93000000FFFF
        .quad   0x00AF9B000000FFFF
        .quad   0x00009B0FFFF0FFFF
        .quad   0x0000930FFFF0FFFF
        .quad   0x00CFFB000000FFFF
        .quad   0x00CFF3000000FFFF
        .quad   0x00AFFB000000FFFF
        .quad   0x0000890000000067
        .quad   0x0000890000000067
        .quad   0x0000890000000020      /* too short for a task */
        .quad   0x00CF13000000FFFF      /* not present */
        .quad   0x0000890000000067      /* the 64-bit one, of two entries */
        .quad   0
gdt_end:
        .word   0
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
        .word   0
idt_pointer_real:
        .word   0x3FF
        .long   0
        .word   0
idt_pointer32:
        .word   8 * (NONE + 1) - 1
        .long   idt
        .word   0
idt_pointer64:
        .word   16 * (NONE + 1) - 1
        .quad   idt
bounds16:
        .word   1, 8
bounds32:
        .long   1, 8
unmasked:
        .word   0x37B                   /* division by zero */
        .balign 4
sse_unmasked:
        .long   0x1F80 & ~0x280         /* invalid operation, division by zero */
sse_masked:
        .long   0x1F80
record: .long   records
resume: .long   0
saved:  .long   0
saved_flat:
        .long   0
user_flags:
        .long   0
data16: .word   0
mode:   .byte   0
case:   .byte   0
digits: .ascii  "0123456789abcdef"
        .balign 16
idt:    .skip   16 * (NONE + 1)
        .skip   1024
stack_top:
        .skip   512
stack0_top:
        .skip   512
stack1_top:
        .skip   512
user_stack_top:
        .skip   16

        .bss
        .balign 4096
page_directory:
        .skip   4096
pml4:   .skip   4096
pdpt:   .skip   4096
directory:
        .skip   4096
tss32:  .skip   128
fault_tss:
        .skip   128
tss64:  .skip   128
records:
        .skip   64 * 256
