#!/bin/busybox sh
# First program of the dev VM, run from the initramfs: drivers, file systems, network, then
# switch_root to busybox init, which runs services.sh. Its words reach the host through the console.
# Settings come from /settings.sh, files for the root from /files.
set -eu
export PATH=/bin
say() { echo "vmcell-dev: $*" >/dev/console; }
trap 'say "init failed in step: $step"; poweroff -f' EXIT

step="mounting /proc, /sys and /dev"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
. /settings.sh

step="loading drivers"; say "$step"
while read -r module; do
    # shellcheck disable=SC2086 # the second word holds options
    insmod $module || say "driver $module did not load"
done </modules/order

step="mounting the host's root"; say "$step"
mkdir -p /lower /rw /newroot
mount -t virtiofs -o ro rootfs /lower
mount -t tmpfs -o "size=$rw_mib"m,mode=755 rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work root /newroot

step="mounting file systems"; say "$step"
mount --move /dev /newroot/dev
mkdir -p /newroot/dev/pts /newroot/dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /newroot/dev/pts
mount -t tmpfs -o mode=1777 shm /newroot/dev/shm
ln -sf /proc/self/fd /newroot/dev/fd
ln -sf fd/0 /newroot/dev/stdin
ln -sf fd/1 /newroot/dev/stdout
ln -sf fd/2 /newroot/dev/stderr
mkdir -p /newroot/proc /newroot/sys /newroot/run /newroot/mnt/out /newroot/mnt/store
mount -t tmpfs -o mode=755,nosuid,nodev run /newroot/run
mkdir -p /newroot/run/lock /newroot/run/vmcell-dev
mount -t virtiofs out /newroot/mnt/out
if [ -b /newroot/dev/vda ]; then
    mount -t ext4 -o noatime /newroot/dev/vda /newroot/mnt/store
else
    mount -t tmpfs -o "size=$store_mib"m,mode=755 store /newroot/mnt/store
fi
for directory in containerd vmcell; do
    mkdir -p "/newroot/mnt/store/$directory" "/newroot/var/lib/$directory"
    mount --bind "/newroot/mnt/store/$directory" "/newroot/var/lib/$directory"
done
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
read -r controllers </sys/fs/cgroup/cgroup.controllers
for controller in $controllers; do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
mkdir -p "/newroot/lib/modules/$kernel_release"
mount --bind "/newroot$kernel_modules" "/newroot/lib/modules/$kernel_release"

step="writing configuration"; say "$step"
cd /files
find . -type f -o -type l | while read -r file; do
    mkdir -p "/newroot/${file%/*}"
    rm -f "/newroot/$file"
    cp -a "$file" "/newroot/$file"
done
cd /
ssh="/newroot$home/.ssh"
mkdir -p "$ssh"
mount -t tmpfs -o mode=700,size=1m ssh "$ssh"
cp /authorized_keys "$ssh/authorized_keys"
chmod 600 "$ssh/authorized_keys"
cp /bin/busybox /newroot/run/vmcell-dev/init
cp /settings.sh /services.sh /host_key /newroot/run/vmcell-dev/
chmod 600 /newroot/run/vmcell-dev/host_key

step="configuring the network"; say "$step"
hostname "$hostname"
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
echo 1 >/proc/sys/net/ipv4/ip_forward
# Forwarded API and data-plane connections may end at a server that listens on loopback only.
echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet
echo 1048576 >/proc/sys/fs/inotify/max_user_watches

step="switching to the host's root"; say "$step"
trap - EXIT
mount --move /proc /newroot/proc
mount --move /sys /newroot/sys
exec switch_root /newroot /run/vmcell-dev/init
