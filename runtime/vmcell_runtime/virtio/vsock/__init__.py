"""Socket device (virtio 1.2 § 5.10): streams between guest ports and sockets of the host.

Reading order:
packet      the 44-byte header
connection  one stream's life and credit as a table; no I/O
stream      a connection joined to a host socket
delivery    packets into the guest's buffers: control first, then data in bursts
mux         one activation: which packet belongs to which stream
device      the virtio side, and the ports the host offers and dials
"""
