# The only code of the ledger that runs in ring 0, and the tables it needs.
#
#   _start (ring 0, VMM's page tables) --> own tables, iretq --> enter_ring3 --> ledger_main
#   exception or interrupt --> stub in ring 0 --> iretq --> ledger_exception (ring 3, fresh stack)
#
# On some KVMs ring 0 is emulated one instruction at a time, without SSE, so as little as possible
# happens here: every table is constant data, computed by the assembler from the fixed address of
# this section. Accessed, dirty and busy-able bits are set from the start.

.section .boot, "awx"
.set BASE, 0x100000
.set KERNEL_CODE, 0x08
.set USER_DATA, 0x1b
.set USER_CODE, 0x23
.set TASK, 0x28
# Reserved bit 1, IF (every interrupt line stays masked at the controller), IOPL 3.
.set USER_FLAGS, 0x3202
# Free low memory, below the 640-KiB mark; page 0x21 under it is not mapped.
.set USER_STACK, 0xa0000

boot_base:
.global _start
_start:
    lea rax, [rip + pml4]
    mov cr3, rax
    lgdt [rip + gdt_pointer]
    lidt [rip + idt_pointer]
    mov eax, TASK
    ltr ax
    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    lea rsp, [rip + first_frame]
    iretq

# The CPU pushed SS, RSP, RFLAGS, CS, RIP; a stub pushed an error code if the CPU did not, and the
# vector.
exception:
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    mov r8, cr2
    lea rsp, [rip + exception_frame]
    iretq

.balign 16
stubs:
.set vector, 0
.rept 48
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0
    .endif
    # push vector: spelt out, as a symbol would be taken for an address.
    .byte 0x6a, vector
    jmp exception
    .set vector, vector + 1
.endr

.balign 16
first_frame:
    .quad enter_ring3
    .quad USER_CODE
    .quad USER_FLAGS
    .quad USER_STACK
    .quad USER_DATA
exception_frame:
    .quad enter_exception
    .quad USER_CODE
    .quad USER_FLAGS
    .quad emergency_stack_top
    .quad USER_DATA

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

.set TSS_ADDRESS, BASE + (tss - boot_base)
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    # A 64-bit TSS, available.
    .word (tss_end - tss - 1) & 0xffff
    .word TSS_OFFSET_LOW
    .byte TSS_OFFSET_MIDDLE
    .byte 0x89
    .word 0
    .quad 0
gdt_end:

.balign 16
idt:
.set vector, 0
.rept 48
    .word STUBS_LOW + 16 * vector
    .word KERNEL_CODE
    .word 0x8e00
    .word BASE >> 16
    .quad 0
    .set vector, vector + 1
.endr
idt_end:

# The task state: the stack of the stubs, and an I/O bitmap in which every port is open (some KVMs
# lose IOPL, some have no bitmap: both are set).
.balign 4096
tss:
    .long 0
    .quad kernel_stack_top
    .fill 90, 1, 0
    .word tss_ports - tss
tss_ports:
    .fill 8192, 1, 0
    .byte 0xff
tss_end:

.balign 4096
.fill 1024, 1, 0
kernel_stack_top:
.fill 4096 - 1024, 1, 0
.fill 8192, 1, 0
emergency_stack_top:

# The first 4 GiB, identity mapped, for ring 3 too. Page 0 (null pointers) and page 0x21 (the end of
# the stack) are missing.
.balign 4096
pml4:
    .quad pdpt + 0x67
    .fill 511, 8, 0
pdpt:
    .quad directories + 0x67
    .quad directories + 0x1067
    .quad directories + 0x2067
    # Devices live here: not cached.
    .quad directories + 0x3067 + 0x18
    .fill 508, 8, 0
directories:
    .quad first_pages + 0x67
.set page, 1
.rept 2047
    .quad page * 0x200000 + 0xe7
    .set page, page + 1
.endr
first_pages:
.set page, 0
.rept 512
    .if (page == 0) || (page == 0x21)
    .quad 0
    .else
    .quad page * 0x1000 + 0x67
    .endif
    .set page, page + 1
.endr

.set STUBS_LOW, stubs - boot_base
.set TSS_OFFSET_LOW, tss - boot_base
.set TSS_OFFSET_MIDDLE, BASE >> 16

.section .text.enter, "ax"
enter_ring3:
    xor ebp, ebp
    mov rdi, rsi
    call ledger_main
    ud2
enter_exception:
    call ledger_exception
    ud2
