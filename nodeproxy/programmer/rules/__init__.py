"""Packet filter rules that the programmers have in common: names, text of transactions, reading back."""
