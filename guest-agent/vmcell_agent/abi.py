"""Numbers of the Linux ABI for x86-64 that CPython 3.11 does not name. Nothing is called here.

Names are the headers': <linux/mount.h>, <linux/sched.h>, <linux/prctl.h>, <linux/capability.h>,
<linux/magic.h>, <linux/random.h>, <linux/fcntl.h>, <linux/virtio_ids.h>, <asm-generic/ioctls.h>,
<linux/reboot.h> of Linux 6.12.
"""

from __future__ import annotations

from struct import Struct

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# the mount calls that work on descriptors: open_tree(2), move_mount(2), mount_setattr(2)
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_BENEATH = 0x4, 0x200
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR = Struct("=QQQQ")  # attr_set, attr_clr, propagation, userns_fd
AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x100, 0x1000, 0x8000

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000

PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

LINUX_CAPABILITY_VERSION_3 = 0x20080522
CAP_HEADER = Struct("=Ii")  # version, pid
CAP_DATA = Struct("=IIIIII")  # effective, permitted, inheritable: low words, then high words

DEVPTS_SUPER_MAGIC = 0x1CD1
EXT4_SUPER_MAGIC = 0xEF53
OVERLAYFS_SUPER_MAGIC = 0x794C7630
PROC_SUPER_MAGIC = 0x9FA0
TMPFS_MAGIC = 0x01021994

TIOCGPTN = 0x80045430
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441
PTMX_DEVICE = (5, 2)

RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
RAND_POOL_INFO = Struct("=ii")  # entropy in bits, length in bytes; the bytes follow

RB_AUTOBOOT = 0x01234567
SYS_PIVOT_ROOT, SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 155, 428, 429, 442

VIRTIO_ID_BLOCK, VIRTIO_ID_PMEM = 2, 27

VMADDR_CID_HOST = 2
