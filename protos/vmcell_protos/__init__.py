"""What all parts share: whose fault an error is, and every wire they speak.

Hand-written modules hold the codecs; the message modules are generated from the `.proto` file of
the same name by `python -m vmcell_tools.message_codegen`. Standard library only.

Reading order:
errors          GuestError, CallerError, HostError and the one table of codes
wire            protobuf's wire format for messages declared as tables
wellknown       Any, Timestamp, Empty (generated)
ttrpc_messages  payloads of ttrpc frames (generated)
ttrpc           frames, server and client connections, no I/O
rtnetlink       messages to and from the kernel's routing socket, no I/O
rtnetlink_rows  links, addresses, routes and neighbours as dumps tell them
rtnetlink_tc    traffic control: one interface's frames redirected to another
agent           shim ↔ guest agent (generated)
task            containerd's Task service (generated)
sandbox         containerd's sandbox API (generated)
events          containerd's task events and their envelope (generated)
metrics         cgroup v2 metrics for Task.Stats (generated)
zygote          what is said to the node's zygote and by it
bootstrap       what containerd exchanges with the shim binary (generated)
envd_process    E2B's process.Process (generated)
envd_filesystem  E2B's filesystem.Filesystem (generated)
pb              gRPC stubs for noded: containerd's services, the node door (generated)
"""
