#!/bin/sh
# Attaches VXMON to a VXLAN device in a namespace of its own, and says what the kernel made of its programs: facts for the
# table, in FACTS. Fails if they cannot be used: packet sockets are no substitute here.
set -eu
vxmon=$1 facts=$2
ip netns add smoke
run() { ip netns exec smoke "$@"; }
run ip link add uplink type veth peer name peer
run ip addr add 10.0.100.3/24 dev uplink
run ip link set uplink up
run ip link set peer up
run ip link add flannel.1 type vxlan id 1 dstport 8472 local 10.0.100.3 dev uplink nolearning
run ip link set flannel.1 up
# Not by `run`: a function in the background is a shell of its own, and its process id not that of vxmon.
ip netns exec smoke "$vxmon" attach --engine tc --format json > /tmp/smoke.json 2> /tmp/smoke.err &
pid=$!
for _ in $(seq 300); do
    [ "$(grep -c '"attached"' /tmp/smoke.json)" -ge 2 ] && break
    [ -d /proc/$pid ] || break
    sleep 0.2
done
cat /tmp/smoke.err
# Not INT: a shell starts what runs in the background with that ignored.
kill -TERM $pid 2>/dev/null || true
wait $pid || { cat /tmp/smoke.json; exit 1; }
cat /tmp/smoke.json
grep -q '"attached"' /tmp/smoke.json
{
    echo "attached by=$(sed -n 's/.*"type":"attached".*"hook":"\([^"]*\)".*/\1/p' /tmp/smoke.json | sort -u | tr '\n' ' ')"
    echo "skb metadata=$(sed -n 's/.*"type":"attached".*"metadata":"\([^"]*\)".*/\1/p' /tmp/smoke.json | sort -u | tr '\n' ' ')"
} >> "$facts"
