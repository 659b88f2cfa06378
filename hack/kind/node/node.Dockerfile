# A kind node: systemd, containerd, kubelet and kubeadm on Debian. hack/kind/node_image.py adds Kubernetes' own images.
ARG BASE
FROM $BASE
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      systemd systemd-sysv dbus runc iptables nftables ipset conntrack socat ethtool iproute2 iputils-ping procps kmod \
      mount curl jq ca-certificates hostname \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
 && systemctl set-default multi-user.target \
 && systemctl mask systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-logind.service \
      systemd-modules-load.service systemd-sysctl.service systemd-tmpfiles-clean.timer systemd-update-utmp.service \
      getty.target console-getty.service dev-hugepages.mount sys-fs-fuse-connections.mount sys-kernel-config.mount \
      sys-kernel-debug.mount sys-kernel-tracing.mount dev-mqueue.mount apt-daily.timer apt-daily-upgrade.timer \
      dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
COPY opt /opt
COPY bin /usr/local/bin
COPY files /
RUN systemctl enable containerd.service kubelet.service && mkdir -p /etc/kubernetes/manifests /etc/cni/net.d
# So systemd knows where it is, and ends on the signal that it ends on.
ENV container=docker
STOPSIGNAL SIGRTMIN+3
ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]
