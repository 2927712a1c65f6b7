"""Volumes on this node's disk: names, tokens, and access to files that trusts no path in them.

Whatever is in a volume was put there by a guest: symbolic links to anywhere, FIFOs, names that are
no text, trees of any depth. Nothing here follows a link or leaves the volume.

Reading order:
names        ids, names, and where a volume may be mounted
token        what lets a client touch the files of one volume
syscalls     calls of Linux that CPython lacks
clearing     removing trees that guests have made
folders      the volumes' directories on the disk
entries      what a path is, as E2B's VolumeEntryStat
file_errors  errnos as our errors
listing      a directory and what is below it
upload       a file that is written aside and then put in place
files        the verbs on the files of one volume
confinement  a process that sees the volumes and nothing else
"""
