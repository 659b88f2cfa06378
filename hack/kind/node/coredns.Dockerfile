FROM scratch
COPY coredns /coredns
# kubeadm runs it without root, with one capability, in an image whose user is 65532.
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/coredns"]
