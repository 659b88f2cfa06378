#!/bin/sh
# PID 1 of the VM once its root is there: mounts, kernel modules, name, network; then the agent, for ever.
. /run/vm/settings
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
# User Mode Linux saves no AVX-512 registers around signal handlers, so the C library shall not use them.
[ "$KIND" != uml ] || export GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512VL,-AVX512BW,-AVX512F
ulimit -n 65536
exec </dev/null >/dev/console 2>&1

mkdir -p /dev/pts /dev/shm /dev/mqueue /run/lock /run/netns /var/lib /root
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t cgroup2 cgroup2 /sys/fs/cgroup
[ ! -d /sys/fs/bpf ] || mount -t bpf bpf /sys/fs/bpf
[ ! -d /sys/kernel/tracing ] || mount -t tracefs tracefs /sys/kernel/tracing
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
[ -e /dev/net/tun ] || { mkdir -p /dev/net && mknod /dev/net/tun c 10 200; }
mount --make-rshared /

mkdir -p /sys/fs/cgroup/exec
for each in $(cat /sys/fs/cgroup/cgroup.controllers); do
  echo "+$each" >/sys/fs/cgroup/cgroup.subtree_control
done 2>/dev/null

echo "$HOSTNAME" >/proc/sys/kernel/hostname
printf '127.0.0.1 localhost %s\n::1 localhost ip6-localhost\n' "$HOSTNAME" >/etc/hosts
ip link set lo up
[ "$KIND" = uml ] || modprobe -a -q virtio_net virtio_rng
modprobe -a -q $LOAD || echo "hack.vm: not every kernel module could be loaded"
echo "hack.vm: kernel modules are loaded"
if [ -n "$DOCKER" ]; then
  mkdir -p "${DOCKER#*:}"
  mount -t ext4 -o noatime "${DOCKER%%:*}" "${DOCKER#*:}" || echo "hack.vm: cannot mount Docker's disk"
  sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
fi

cd /run/vm
while :; do
  "$PYTHON" -S -B -m hack.vm.guest.agent
  echo "hack.vm: the agent ended with status $?; again"
  sleep 1
done
