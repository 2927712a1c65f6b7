"""Figures of this host, each with its definition, its failures and what was measured beside it:
`vmcell bench`.

Reading order:
samples     what was measured of one thing, and what failed
machine     which machine measured, in which lane
report      a run as a table and as JSON
payload     hand-made guests of a few instructions
zygote      a zygote of the benchmark's own
qemu_microvm  QEMU's microvm with such a guest, as a peer
restore     a saved machine → its first instruction
containers  containers made, saved, restored and removed through containerd
start       starts of containers timed, by part, beside runc
execs       a program beside a container's own, beside runc
snapshot    snapshots by how much was written
clone       one clone against many at once
idle        memory of idle sandboxes, and how many there can be
service_client  sandboxes of a running API
service     creates and rollbacks as the API's clients see them
"""
