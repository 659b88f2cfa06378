"""Programmers translate the forwarding table for one mechanism of the kernel. They decide nothing about Services."""
