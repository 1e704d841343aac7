#!/bin/sh
# Runs the jobs of a guest, one line each in /run/results/jobs: name, limit in seconds, command; separated by tabs.
# For each job NAME: NAME.log (standard output), NAME.err (standard error), NAME.status (exit status, seconds).
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
results=/run/results
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t bpf bpf /sys/fs/bpf 2>/dev/null
mount -t tracefs tracing /sys/kernel/tracing 2>/dev/null
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
# As the strictest distributions have it.
echo 2 > /proc/sys/kernel/kptr_restrict
ip link set lo up
ulimit -n 65536
# Before 5.11 maps are charged to it. As the systemd unit has it: without, those tests fail that give few capabilities.
ulimit -l unlimited
{
    echo "release=$(uname -r)"
    echo "btf=$([ -e /sys/kernel/btf/vmlinux ] && echo yes || echo no)"
    echo "jit=$(cat /proc/sys/net/core/bpf_jit_enable 2>/dev/null)"
} > $results/facts
# There, a test that does not see the fault has failed.
case $(uname -r) in *-fault-a) export VXMON_EXPECT_FAULT_A=1 ;; esac
echo "vxmon-guest: ready"
tab=$(printf '\t')
while IFS=$tab read -r name limit command; do
    echo "vxmon-guest: $name"
    start=$(cut -d ' ' -f 1 /proc/uptime)
    timeout -k 10 "$limit" /bin/sh -c "$command" < /dev/null > "$results/$name.log" 2> "$results/$name.err"
    status=$?
    end=$(cut -d ' ' -f 1 /proc/uptime)
    # Written under another name first: the host reads it as soon as it is there.
    echo "$status ${end%.*} ${start%.*}" > "$results/$name.status.new"
    mv "$results/$name.status.new" "$results/$name.status"
done < $results/jobs
dmesg | grep -E 'BUG|WARNING|Oops|Call Trace' > $results/dmesg.bad
echo "vxmon-guest: done"
touch $results/done
sync
exec /bin/busybox reboot -f
