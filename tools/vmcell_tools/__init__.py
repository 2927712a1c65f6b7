"""The `vmcell` command: setup and checks of a host, kernel and image builds, the dev VM, the demo,
teams and keys.

Reading order:
host_packages    Debian packages by purpose, and their installation
progress         what a long command is doing, on standard error
build_cache      builds by the digest of what they were made from
build_step       one external tool, with its deadline and log
kernel_config    asked for against got, in kernel configurations
kernel_build     the guest kernel
debian_tree      Debian packages as a directory tree
base_image       the guest's base image
oci_layout       the format of OCI archives
image_layers     root file systems of our images
python_wheels    packages from PyPI, exactly those of a lock file
interpreter_image  what the code interpreter's image is made of
desktop_image    what the desktop's image is made of
oci_image        our OCI images
image_import     built images into containerd
setup_templates  the templates that every node has
go_programs      containerd 2.x and nerdctl, compiled for the tests
message_codegen  protobuf messages from .proto files
grpc_stubs       gRPC stubs for containerd
openapi_file     the API's OpenAPI document, as a file
containerd_config  our part of containerd's configuration, as text
containerd_setup  that part on this host: written beside it, merged when asked
zygote_unit      the zygote under systemd
setup_host       config.toml and the shim on this host
local_ca         a certificate authority for tests and development
service_units    the E2B service under systemd
ingress_setup    nginx, TLS and these units on this host
doctor           what this host has, and what to do
dev_config       the same inside a dev VM
dev_state        files and processes of a dev VM on the host
dev_kernel       Debian's cloud kernel, unpacked
dev_initramfs    the newc archive format
dev_store        a disk that outlives dev VMs
dev_seed         images on that disk before a VM has it
dev_containerd   containerd, CRI and the pods' network in a dev VM
dev_image        what goes into a dev VM's initramfs
dev_qemu         command lines of QEMU and virtiofsd
dev_ssh          keys and the shared connection
dev_sync         checkout, builds and configuration as they are on the host
dev_vm           up, down, status
dev_run          one command in the dev VM
dev_faults       guests and kernels that the software CPU lost
leak_check       what sandboxes have on a machine
dev_service      images and the E2B service in the dev VM
api_client       a running API: where it is, its errors as sentences
volume_client    a team's volumes, by a running API
sandbox_client   its sandbox routes
snapshot_client  its snapshot routes
envd_door        envd of a sandbox, from outside
local_terminal   the terminal that this process has, raw for a while
guest_command    a command in a sandbox
bench            figures of this host
operator_desk    the store, opened for the operator's commands, which are audited
demo             an E2B client against a real microVM
template_client  the API's template routes
template_source  what a template is built from
matrix           calls of every client in every version
cli_output       errors, JSON and tables of all commands
sandbox_tables   sandboxes, snapshots and memory as tables
cli_dev          words and options of `vmcell dev`
cli_host         words and options of `vmcell setup` and `doctor`
cli_bench        words and options of `vmcell bench`
cli_cache        words and options of `vmcell cache`
cli_template     words and options of `vmcell template`
cli_team         words and options of `vmcell team` and `migrate`
cli_key          words and options of `vmcell key`
cli_audit        words and options of `vmcell audit`
cli_exec         words and options of `vmcell sandbox exec`
cli_past         words and options of `vmcell sandbox history`, `rollback`, `undo` and `fork`
cli_sandbox      words and options of `vmcell sandbox`
cli_snapshot     words and options of `vmcell snapshot`
cli_volume       words and options of `vmcell volume`
cli_build        words and options of `vmcell kernel` and `image`
cli_matrix       words and options of `vmcell matrix`
cli              the `vmcell` command
__main__         `python -m vmcell_tools`
"""
