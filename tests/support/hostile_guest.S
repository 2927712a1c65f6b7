# A guest that writes and reads random registers of every virtio window and random ports, then says
# DONE on the console. Before `start` stand its rounds (4 bytes), flags (1: ports, 2: windows), seed.
	.text
	.code64
rounds:	.long 1
flags:	.long 3
seed:	.quad 1
start:
	# Entry tables map the first GiB only; one more directory brings 0xd0000000.
	movl $0x300003, 0xa018
	movl $0xd0000083, 0x300400
	mov seed(%rip), %r8
	mov flags(%rip), %r10d
	mov $0xd0000000, %r9
	mov rounds(%rip), %r11d
again:
	dec %r11d
	jz done
	# xorshift64
	mov %r8, %rax
	shl $13, %rax
	xor %rax, %r8
	mov %r8, %rax
	shr $7, %rax
	xor %rax, %r8
	mov %r8, %rax
	shl $17, %rax
	xor %rax, %r8
	test $2, %r10d
	jz ports
	# A register of one of eight windows, mostly below 0x120 and mostly a small value.
	mov %r8, %rbx
	and $0x71fc, %ebx
	add %r9, %rbx
	mov %r8, %rax
	shr $40, %rax
	mov %r8, %rcx
	shr $60, %rcx
	cmp $12, %ecx
	ja wide
	and $0xf, %eax
wide:	cmp $1, %ecx
	je byte
	mov %eax, (%rbx)
	mov (%rbx), %ecx
	jmp ports
byte:	mov %al, 1(%rbx)
	mov 3(%rbx), %cx
ports:	test $1, %r10d
	jz again
	mov %r8, %rdx
	shr $20, %rdx
	cmp $0x64, %dx
	je again
	in %dx, %al
	mov %r8, %rax
	shr $50, %rax
	out %ax, %dx
	in %dx, %eax
	jmp again
done:	movw $0x3fc, %dx
	xor %eax, %eax
	out %al, %dx		# no loop-back
	movw $0x3fb, %dx
	out %al, %dx		# no divisor
	movw $0x3f8, %dx
	lea text(%rip), %rsi
	mov $6, %ecx
say:	mov (%rsi), %al
	out %al, %dx
	inc %rsi
	dec %ecx
	jnz say
stop:	hlt
	jmp stop
text:	.ascii "\nDONE\n"
