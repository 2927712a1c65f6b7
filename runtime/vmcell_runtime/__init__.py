"""The VMM: one process per microVM that drives /dev/kvm and plays the guest's hardware.

The guest is an attacker from its first instruction. What it can do wrong is a `GuestError` and ends
at its device; anything unexpected ends the process with a reason. Standard library only.

Reading order:
memory  guest RAM and read-only file windows, reached by guest address and length only
irq     interrupt lines, and the recorder tests pass instead
loop    the device thread's event loop: descriptors, timers, calls from other threads
"""
