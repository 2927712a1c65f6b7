# Both vCPUs from their first instruction to ring 3, where kvm_pvm runs code at full speed.
#
# vCPU 0 comes as a Linux would, in long mode, and so does vCPU 1 the first time: kvm_pvm knows no
# INIT and SIPI. Where KVM does, vCPU 1 comes by them again, in real mode, as often as vCPU 0 likes. Ports are open to ring 3 by the TSS's bitmap, since kvm_pvm does not keep IOPL.
# There is no IDT: whatever faults is a triple fault.

	.set TRAMPOLINE, 0x8000
	.set STACK0, 0x90000
	.set STACK1, 0x80000
	.set USER_CODE, 0x30 | 3
	.set USER_DATA, 0x38 | 3
	.set TSS0, 0x40
	.set TSS1, 0x50
	.set TSS_LIMIT, 0x68 + 8192
	.set CR0, 0x80010033		# PG, WP, NE, ET, MP, PE
	.set CR4, 0x220			# PAE, OSFXSR
	.set SYSEXIT, 1

	.section .head, "awx"
	.code64
	.globl seed, flags
seed:	.quad 1				# written by the test, as are the next two
flags:	.long 0
way:	.long SYSEXIT			# into ring 3: the emulator has no IRETQ, AMD no SYSEXIT
	.balign 64
start:
	lgdt gdt_register(%rip)
	mov $pml4, %eax
	mov %rax, %cr3
	mov $CR4, %eax
	mov %rax, %cr4
	lea trampoline(%rip), %rsi
	mov $TRAMPOLINE, %edi
	mov $(trampoline_end - trampoline), %ecx
	rep movsb
	movb $0x89, gdt + TSS0 + 5	# LTR refuses a TSS that it has marked busy
	mov $TSS0, %eax
	ltr %ax
	lea storm(%rip), %rdx
	mov $STACK0 - 8, %ecx
	jmp to_ring_3

	.balign 64
second_entry:			# at 192 bytes, as `start` is at 64
	lgdt gdt_register(%rip)
	mov $pml4, %eax
	mov %rax, %cr3
	mov $CR4, %eax
	mov %rax, %cr4
second_start:
	movb $0x89, gdt + TSS1 + 5
	mov $TSS1, %eax
	ltr %ax
	lea second(%rip), %rdx
	mov $STACK1 - 8, %ecx

# To %rdx with its stack at %rcx.
to_ring_3:
	cmpl $SYSEXIT, way(%rip)
	jne 1f
	mov %rdx, %rbx
	mov %rcx, %rbp
	mov $0x174, %ecx		# IA32_SYSENTER_CS: SYSEXIT takes 32 and 40 above it
	mov $0x10, %eax
	xor %edx, %edx
	wrmsr
	mov %rbx, %rdx
	mov %rbp, %rcx
	sysexitq
1:	pushq $USER_DATA
	pushq %rcx
	pushq $2
	pushq $USER_CODE
	pushq %rdx
	iretq

	.globl triple_fault
triple_fault:
	ud2

# Copied below 1 MiB: from real mode into long mode in one step.
trampoline:
	.code16
	cli
	xor %ax, %ax
	mov %ax, %ds
	lgdtl TRAMPOLINE + (low_gdt_register - trampoline)
	mov $CR4, %eax
	mov %eax, %cr4
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx		# IA32_EFER
	mov $0x500, %eax		# LME; LMA is read-only on hardware
	xor %edx, %edx
	wrmsr
	mov $CR0, %eax
	mov %eax, %cr0
	ljmpl $0x10, $TRAMPOLINE + (long_mode - trampoline)
	.code64
long_mode:
	mov $0x18, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $STACK1, %esp
	mov $second_start, %eax
	jmp *%rax
	.balign 4
low_gdt_register:
	.word gdt_end - gdt - 1
	.long gdt
trampoline_end:

	.balign 8
gdt_register:
	.word gdt_end - gdt - 1
	.quad gdt
	.balign 16
gdt:	.quad 0
	.quad 0
	.quad 0x00af9b000000ffff	# 0x10 ring 0, 64-bit code
	.quad 0x00cf93000000ffff	# 0x18 ring 0, data
	.quad 0, 0
	.quad 0x00affb000000ffff	# 0x30 ring 3, 64-bit code
	.quad 0x00cff3000000ffff	# 0x38 ring 3, data
	.macro tss_descriptor
	.word TSS_LIMIT
	.word tss_low
	.byte tss_middle
	.byte 0x89, 0, 0
	.quad 0
	.endm
	tss_descriptor
	tss_descriptor
gdt_end:

	.section .tables, "aw"
	.balign 4096
	.globl tss
tss:	.skip 102
	.word 0x68			# where the bitmap begins
	.skip 8192
	.byte 0				# of an access over the last port
	.balign 4096
# One to one in pages of 2 MiB: RAM's GiB, the GiB of the windows, and that of the first image.
pml4:	.quad pdpt + 7
	.balign 4096
pdpt:	.quad pd + 7, 0, 0, pd + 0x1000 + 7, pd + 0x2000 + 7
	.balign 4096
pd:	.set page, 0
	.rept 512
	.quad page + 0x87
	.set page, page + 0x200000
	.endr
	.set page, 0xc0000000
	.rept 512
	.quad page + 0x87
	.set page, page + 0x200000
	.endr
	.set page, 0x100000000
	.rept 512
	.quad page + 0x87
	.set page, page + 0x200000
	.endr

	.section .note.GNU-stack, "", @progbits
