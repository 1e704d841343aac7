#!/bin/busybox sh
# First process of a guest: finds the host's root over 9p, lays a writable layer over it, and goes there.
# VXMON_MODULES, VXMON_GUEST and VXMON_RUN come from the kernel's command line.
b=/bin/busybox
fail() {
    echo "vxmon-guest: $*"
    $b reboot -f
}
$b mkdir -p /proc /sys /dev /host /rw /root
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module; do
    $b insmod "/modules/$module" || echo "vxmon-guest: no $module"
done < /modules/order
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host || fail "no root over 9p"
$b mount -t tmpfs rw /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /root || fail "no overlay"
for directory in tmp run; do
    # Unless what is to be run is there.
    case $VXMON_GUEST in
        /$directory/*) ;;
        *) $b mount -t tmpfs $directory /root/$directory ;;
    esac
done
$b chmod 1777 /root/tmp
$b mkdir -p /root/run/results
# What is written there is read by the host while the guest runs: no cache.
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 results /root/run/results || fail "no place for results"
if [ -n "$VXMON_MODULES" ]; then
    version=$($b uname -r)
    $b mkdir -p "/root/lib/modules/$version"
    $b mount --bind "/root$VXMON_MODULES/$version" "/root/lib/modules/$version" || fail "no modules of $version"
fi
for directory in proc sys dev; do
    $b mount --move /$directory /root/$directory
done
exec $b switch_root /root /bin/sh "$VXMON_GUEST"
