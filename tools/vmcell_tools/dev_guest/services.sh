#!/bin/sh
# Second stage of the dev VM, run once by busybox init in the host's root: ssh, containerd, the end
# of life. Prints "ready" to the console when containerd answers.
set -u
. /run/vmcell-dev/settings.sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$home" LANG=C.UTF-8
say() { echo "vmcell-dev: $*" >/dev/console; }
ulimit -n 65536

# Pages of running guests stay where they are: the emulated nested paging is the less tried the less
# the kernel changes under it (docs/dev-vm.md).
for setting in khugepaged/scan_sleep_millisecs=4294967295 khugepaged/defrag=0 defrag=never; do
    echo "${setting#*=}" >"/sys/kernel/mm/transparent_hugepage/${setting%%=*}"
done
echo 0 >/proc/sys/vm/compaction_proactiveness

# By QEMU's real-time clock: the VM's own may count instructions, and then runs ahead.
rtc=/sys/class/rtc/rtc0/since_epoch
end=$(($(cat $rtc) + lifetime_s))
(
    while [ "$(cat $rtc)" -lt $end ]; do sleep 30; done
    say "powering off after $lifetime_s s"
    /bin/busybox poweroff -f
) &

say "starting ssh"
dropbear -r /run/vmcell-dev/host_key -P /run/vmcell-dev/dropbear.pid -s -E -p 22 -K 0 -I 0 \
    2>>/mnt/out/dropbear.log || say "ssh did not start, see out/dropbear.log"

nft -f - <<RULES || say "nftables rules for the forwarded ports failed"
table ip vmcell_dev {
    chain prerouting {
        type nat hook prerouting priority dstnat;
        iifname "eth0" tcp dport { $api_port, $data_port } dnat to 127.0.0.1
    }
}
RULES

say "starting containerd"
containerd --config /etc/containerd/config.toml >>/mnt/out/containerd.log 2>&1 &
until [ -S /run/containerd/containerd.sock ]; do sleep 0.1; done
ctr version >/mnt/out/ctr-version.txt 2>&1 || say "containerd does not answer"
# A store remembers the containers of a VM that is gone; none of them lives.
if [ -b /dev/vda ]; then
    for namespace in $(ctr namespaces list -q); do
        for container in $(ctr -n "$namespace" containers list -q); do
            say "deleting container $container of an earlier VM"
            ctr -n "$namespace" containers delete "$container" 2>>/mnt/out/containerd.log
        done
    done
fi
say "ready"

# As systemd would: another one soon after its end. Without a shim there is none.
while :; do
    [ -x /usr/local/bin/containerd-shim-vmcell-v2 ] &&
        containerd-shim-vmcell-v2 zygote 2>>/mnt/out/zygote.log
    sleep 2
done </dev/null &

# Logs of microVMs vanish with them; copies on the host also survive the end of this VM.
[ "$copy_logs" = 1 ] || exit 0
while sleep 10; do
    for log in /run/vmcell/*/*/*.log; do
        [ -s "$log" ] || continue
        copy="/mnt/out/sandboxes${log#/run/vmcell}"
        mkdir -p "${copy%/*}"
        cp -u "$log" "$copy"
    done
    dmesg >/mnt/out/dmesg.log
done
