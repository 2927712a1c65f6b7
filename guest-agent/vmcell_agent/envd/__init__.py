"""envd: the E2B data plane inside a sandbox, on port 49983; pid 1 of its container.

One thread, one epoll loop, no blocking call but short ones on files. `serve.run` is the entry.
Files are touched as root and what is made is given to the user, as E2B's envd does; commands run
with the user's rights.

Reading order:
wire                what is read and written, without I/O
accounts            the container's /etc/passwd and /etc/group
paths               which absolute path a client means
loop                epoll, timers, deferred calls
settings            what /init told: token, environment, defaults
exchange            one request and its response
file_sending        sendfile(2)
connection          HTTP/1.1 on one socket
rpc                 Connect calls
spawn               fork and exec of one command
stdin               writing to a child that may not read
journal             starts, output and ends, for GET /logs
process_event       what listeners are told, framed once
process             one process, its listeners, its end
process_table       all processes; reaping
process_service     process.Process
entry               EntryInfo of a path
job                 long work on files in slices
tree                make, list, remove, move
filesystem_service  filesystem.Filesystem
inotify             the three calls of inotify(7)
watch               one directory with all below it
watch_service       filesystem.Filesystem: WatchDir and CreateWatcher
file_access         who may use /files, and which file is meant
download            GET /files
upload              POST /files
compose             POST /files/compose
initialise          POST /init
metrics             GET /metrics
layer               what has changed in the root, as a tar
layer_route         GET /layer, of the builder alone
cors                cross-origin rules
router              which endpoint serves a request
serve               listening sockets, signals, `run`
"""
