#!/bin/sh
# PID 1 of the VM until the root is there: in the initial ramdisk, with busybox. `settings` comes from the host.
export PATH=/bin
. /settings
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
say() { echo "hack.vm: $*" >/dev/console; }
say "kernel is up"
for module in $MODULES; do insmod "/modules/$module" || say "cannot load $module"; done

# The root: what the host has, read-only, and what is written here on top of it, in memory.
mkdir -p /lower /rw /root
if [ "$KIND" = uml ]; then
  mount -t hostfs -o ro none /lower
else
  mount -t ext4 -o ro,noatime /dev/vda /lower
fi || { say "cannot mount the root"; poweroff -f; }
mount -t tmpfs -o size=60%,mode=755 rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work root /root

mkdir -p /root/run /root/tmp
mount -t tmpfs -o mode=755 run /root/run
mount -t tmpfs -o mode=1777,size=60% tmp /root/tmp

# Whole folders of the host, at their own places (which may be below /tmp).
for pair in $DISKS; do
  mkdir -p "/root/${pair#*:}"
  mount -t ext4 -o ro,noatime "/dev/${pair%%:*}" "/root/${pair#*:}" || say "cannot mount $pair"
done
for pair in $FOLDERS; do
  mkdir -p "/root/${pair#*:}"
  mount -t hostfs -o "${pair%%:*}" none "/root/${pair#*:}" || say "cannot mount $pair"
done
for each in dev proc sys; do
  mkdir -p "/root/$each"
  mount -o move "/$each" "/root/$each"
done
mkdir -m 700 /root/run/vm
cp -a /guest/. /settings /root/run/vm/
exec switch_root /root /bin/sh /run/vm/hack/vm/guest/system.sh
