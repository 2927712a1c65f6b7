# A guest that looks through four spare windows for ever. Of a disk it reads the first sector four
# times, of an image the first byte, and says each first byte on
# the console, a line each.
	.text
	.code64
start:
	# Entry tables map the first GiB only; more directories bring the windows and GiB 4 to 7.
	movl $0x300003, 0xa018
	movl $0xd0000083, 0x300400
	mov $4, %ecx
map:	mov %rcx, %rax
	shl $12, %rax
	lea 0x301003(%rax), %rbx
	mov %rbx, 0xa000(,%rcx,8)
	mov %rcx, %rdx
	shl $30, %rdx
	or $0x83, %rdx
	mov %rdx, 0x301000(%rax)
	inc %ecx
	cmp $8, %ecx
	jne map
	movw $0x3f8, %dx
look:	mov $0xd0001000, %r9
next:	mov 8(%r9), %eax
	cmp $2, %eax
	je disk
	cmp $27, %eax
	je image
go_on:	add $0x1000, %r9
	cmp $0xd0005000, %r9d
	jne next
	jmp look

image:	mov 0x100(%r9), %ebx
	mov 0x104(%r9), %eax
	test %eax, %eax
	jz go_on		# it went before we had read where it is
	shl $32, %rax
	or %rax, %rbx
	mov (%rbx), %al
	out %al, %dx
	mov $10, %al
	out %al, %dx
	jmp go_on

	# Rings of 8 entries at 0x400000, 0x401000, 0x402000; header, data and status at 0x403000.
disk:	movl $0, 0x70(%r9)
	movl $1, 0x70(%r9)
	movl $3, 0x70(%r9)
	movl $1, 0x24(%r9)
	movl $1, 0x20(%r9)
	movl $0, 0x24(%r9)
	movl $0, 0x20(%r9)
	movl $11, 0x70(%r9)
	movl $0, 0x30(%r9)
	movl $8, 0x38(%r9)
	movl $0x400000, 0x80(%r9)
	movl $0x401000, 0x90(%r9)
	movl $0x402000, 0xa0(%r9)
	movl $1, 0x44(%r9)
	movq $0, 0x401000
	movq $0, 0x402000
	movq $0, 0x403000	# type IN
	movq $0, 0x403008	# sector 0
	movq $0x403000, 0x400000
	movl $16, 0x400008
	movl $0x10001, 0x40000c	# next 1
	movq $0x403010, 0x400010
	movl $512, 0x400018
	movl $0x20003, 0x40001c	# write, next 2
	movq $0x403210, 0x400020
	movl $1, 0x400028
	movl $2, 0x40002c	# write
	movl $15, 0x70(%r9)
	mov $1, %r10d
read:	movb $0x3f, 0x403010
	mov %r10w, 0x401002
	movl $0, 0x50(%r9)
	mov $2000, %ecx
wait:	dec %ecx
	jz go_on
	cmp %r10w, 0x402002
	jne wait
	mov 0x403010, %al
	out %al, %dx
	mov $10, %al
	out %al, %dx
	inc %r10d
	cmp $5, %r10d
	jne read
	jmp go_on
