#!/usr/bin/env bash
# Plays two hosts, node1 and node2, on one machine, and runs a command that may use `on` and `ssh`:
#   two_hosts.sh COMMAND…
# Each host has a network of its own, joined to the other's by a cable, and a name that the other
# resolves. Everything is inside namespaces that end with the command; root is not needed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ "${1:-}" != --inside ]; then
    exec unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc \
        "$0" --inside "$@"
fi
shift
mount -t tmpfs tmpfs /run
mkdir /run/netns
printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' > /run/hosts
mount --bind /run/hosts /etc/hosts
ip netns add node1
ip netns add node2
ip link add eth0 netns node1 type veth peer name eth0 netns node2
for number in 1 2; do
    ip -n "node$number" addr add "10.77.0.$number/24" dev eth0
    ip -n "node$number" link set eth0 up
    ip -n "node$number" link set lo up
done
export PATH="$here:$PATH"
"$@"
