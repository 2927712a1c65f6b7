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
guest_process  commands, uploads and layers through envd
start_command  the start command of a template or image, and when it is ready
sandbox_files  resolv.conf, hosts and hostname for a guest
volume_use     which sandboxes have which volumes
sandbox        a sandbox, as labels and back
snapshot_records  what is known of each snapshot, and its end
metrics        what sandboxes used over time
teardown       removing a sandbox, however much of it there is
build          making a sandbox
deadlines      a timer on the monotonic clock
registry       every sandbox with its lock and deadline
removal        removing, until it is gone
suspension     saving a machine
pool           restored sandboxes that wait for a create
pauses         pause and resume
rollbacks      back to a snapshot
warm_start     the snapshots of templates
survey         what an earlier noded left
file_diff      which files differ between two snapshots
memory_use     memory of the host that a sandbox has
node           every sandbox of the host and the verbs on them
zygote         the node's zygote, kept while noded runs
snapshot_messages  snapshots and memory on the wire
door           the gRPC service on noded's socket
blob_store     blobs, images and unpacked layers
image_json     config and manifest of an image that is built
image_pull     images of registries, by ctr
build_images   what a build starts from, keeps and ends with
build_records  builds on disk: log and result
build_steps    the steps of a build, without I/O
upload_files   what clients uploaded, opened with care
build_run      one build
build_service  every build of the node
build_door     the gRPC service of builds
__main__       the process
"""
