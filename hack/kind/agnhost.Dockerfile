# registry.k8s.io/e2e-test-images/agnhost where it cannot be pulled: Kubernetes' program, and what tests call beside it.
# The context, made by test_images.py, has the programs agnhost and coredns.
ARG BASE=debian:bookworm-slim
FROM $BASE
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    bind9-dnsutils ca-certificates conntrack curl iperf iproute2 iptables iputils-ping netcat-openbsd procps tcpdump wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home user-defined-in-image && groupadd --gid 50000 group-defined-in-image \
 && usermod --append --groups group-defined-in-image user-defined-in-image \
 && mkdir /uploads && ln -s agnhost /agnhost-2
COPY agnhost coredns /
EXPOSE 80 8080 8081 9376 5000
ENTRYPOINT ["/agnhost"]
CMD ["pause"]
