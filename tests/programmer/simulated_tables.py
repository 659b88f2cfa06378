"""What iptables-restore --noflush does to tables, as strict as the kernel: for property tests of transactions.

The kernel tests send the same transactions to the real thing; this exists because thousands of random ones are needed.
"""

from __future__ import annotations

from nodeproxy.programmer.iptables.ruleset import TABLES

BUILT_IN = {
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}
_VERDICTS = {"DNAT", "MASQUERADE", "RETURN", "ACCEPT", "DROP", "REJECT", "MARK", "SET"}


class SimulatedTables:
    """Chains and rules of the nat and filter tables."""

    def __init__(self) -> None:
        self.chains: dict[str, dict[str, list[str]]] = {table: {name: [] for name in BUILT_IN[table]} for table in TABLES}

    def restore(self, text: str) -> None:
        """Carry out a transaction; any error is an AssertionError."""
        chains: dict[str, list[str]] = {}
        for line in text.splitlines():
            verb, _, rest = line.partition(" ")
            if line.startswith("*"):
                chains = self.chains[line[1:]]
            elif line.startswith(":"):
                assert verb[1:] not in chains or verb[1:].startswith("KUBE-"), line
                chains[verb[1:]] = []
            elif verb == "-A":
                name, rule = rest.split(" ", 1)
                chains[name].append(rule)
            elif verb == "-I":
                name, _, rule = rest.split(" ", 2)
                chains[name].insert(0, rule)
            elif verb == "-D":
                name, rule = rest.split(" ", 1)
                chains[name].remove(rule)
            elif verb == "-X":
                assert chains.pop(rest) == [], f"{rest} is not empty"
            else:
                assert line == "COMMIT", line
                self._check(chains)

    @staticmethod
    def _check(chains: dict[str, list[str]]) -> None:
        for name, rules in chains.items():
            for rule in rules:
                assert rule == " ".join(rule.split()), f"{name}: {rule!r}"
                target = rule.rpartition("-j ")[2].split()[0]
                assert target in chains or target in _VERDICTS, f"{name}: {rule} jumps nowhere"

    def save(self, table: str) -> str:
        """The table as iptables-save prints it."""
        lines = [f"*{table}"]
        for name in self.chains[table]:
            lines.append(f":{name} {'ACCEPT' if name in BUILT_IN[table] else '-'} [0:0]")
        lines += [f"-A {name} {rule}" for name, rules in self.chains[table].items() for rule in rules]
        return "\n".join([*lines, "COMMIT", ""])
