# One layer for etcd and Kubernetes' programs, which are one file; the image gets the name of each.
FROM scratch
COPY root /
ENV PATH=/kubernetes
