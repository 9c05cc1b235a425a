# SPDX-License-Identifier: GPL-2.0
#
# A loader enters by the PVH protocol: 32-bit protected mode with flat segments, and the address of
# struct hvm_start_info in ebx. Map the first 4 GiB one to one, enter 64-bit mode, and call
# payload_main(start_info).

	.section .note.Xen, "a", @note
	.balign 4
	.long 4, 4, 18			# XEN_ELFNOTE_PHYS32_ENTRY
	.asciz "Xen"
	.long start32

	.section .head, "ax"
	.code32
	.globl start32
start32:
	cli
	cld
	mov $stack_top, %esp
	mov %ebx, %ebp
	mov $tables_pd, %edi		# 2048 entries of 2 MiB
	xor %ecx, %ecx
1:	mov %ecx, %eax
	shl $21, %eax
	or $0x83, %eax			# present, writable, large
	mov %eax, (%edi,%ecx,8)
	movl $0, 4(%edi,%ecx,8)
	inc %ecx
	cmp $2048, %ecx
	jne 1b
	mov $tables_pd + 3, %eax
	mov $tables_pdpt, %edi
	mov $4, %ecx
2:	mov %eax, (%edi)
	add $8, %edi
	add $4096, %eax
	loop 2b
	mov $tables_pdpt + 3, %eax
	mov %eax, tables_pml4
	mov $tables_pml4, %eax
	mov %eax, %cr3
	mov %cr4, %eax
	or $0x620, %eax			# PAE; SSE, which the compiler uses
	mov %eax, %cr4
	mov $0xc0000080, %ecx		# EFER.LME
	rdmsr
	or $0x100, %eax
	wrmsr
	mov %cr0, %eax
	and $0xfffffffb, %eax		# no emulation of the FPU
	or $0x80000003, %eax		# PG, MP, PE
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $start64

	.code64
start64:
	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov %ebp, %edi
	call payload_main
3:	cli
	hlt
	jmp 3b

	.section .rodata
	.balign 8
gdt:	.quad 0
	.quad 0x00af9b000000ffff	# 64-bit code
	.quad 0x00cf93000000ffff	# data
gdt_pointer:
	.word 23
	.long gdt

	.section .bss
	.balign 4096
tables_pml4: .skip 4096
tables_pdpt: .skip 4096
tables_pd: .skip 4 * 4096
	.skip 16384
stack_top:
