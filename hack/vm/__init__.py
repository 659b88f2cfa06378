"""A VM whose kernel has IPVS, for commands of this repository on machines whose own kernel lacks it.

Owns: Debian's kernel package and the disk images made of this machine's files (cached), QEMU's life, the channel into
the VM, and copying the working tree there. See README.md in this folder.
"""
