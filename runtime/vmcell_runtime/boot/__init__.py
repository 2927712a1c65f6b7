"""Everything that stands in guest memory and registers before the first instruction.

Reading order:
elf           an ELF kernel's segments into guest memory
command_line  the VMM's own kernel arguments, and the whole line
mptable       the MP table: processors, IOAPIC, interrupt lines
params        boot_params ("zero page") and the e820 map
entry         page tables, GDT and registers of a 64-bit entry
linux         all of these, for one kernel
"""
