"""noded: the only process beside the shims that may speak to containerd.

Reading order:
oci_image      image index, manifest and config: chain id and environment
oci_spec       the OCI spec of a sandbox and its annotations
slot_plan      names and addresses of network slots
firewall       the nftables table of the slots
conntrack      ending the connections of a slot
slots          the pool of TAPs
containerd     containerd's gRPC services, errors as ours
guest_init     envd's token, environment and health
start_command  the image's start command, and the wait for its ready command
sandbox_files  resolv.conf, hosts and hostname for a guest
sandbox        a sandbox, as labels and back
teardown       removing a sandbox, however much of it there is
build          making a sandbox
deadlines      a timer on the monotonic clock
node           every sandbox of the host and the verbs on them
zygote         the node's zygote, kept while noded runs
door           the gRPC service on noded's socket
__main__       the process
"""
