# kube-proxy with the programs that it runs. Its layer of Kubernetes' programs is that of the control plane's image, to the bit.
ARG BASE
FROM $BASE
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends iptables nftables ipset conntrack kmod \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
 && ln -s /kubernetes/kube-proxy /usr/local/bin/kube-proxy
COPY root /
