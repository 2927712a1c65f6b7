"""The few PC devices a Linux without ACPI and PCI still wants.

Reading order:
console  where the serial console's bytes go: a capped log, and a look at the kernel's last words
serial   a 16550 that only speaks, at COM1
i8042    the keyboard controller's reset line
cmos     the wall clock of a PC
"""
