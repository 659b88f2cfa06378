"""Owns which virtual servers kube-proxy left on this node, so that we go on with them, or let them go, as if they were ours.

Blocking: call in a thread. Functions raise `KernelError`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import VirtualServer
from nodeproxy.programmer.ipvs.servers import Servers
from nodeproxy.programmer.kube_proxy_traces import SETS, left_virtual_servers


def left_by_kube_proxy(
    ipsets: IPSets, service_addresses: Collection[str], node_addresses: Collection[str]
) -> Callable[[Servers], Collection[VirtualServer]]:
    """What picks the virtual servers of kube-proxy from a list: by the addresses of the dummy interface, and by its sets."""
    present = sorted(SETS.keys() & set(ipsets.list_names("KUBE-")))
    sets = {name: [entry.text for entry in ipsets.contents(name).entries] for name in present}
    return partial(left_virtual_servers, sets=sets, service_addresses=service_addresses, node_addresses=node_addresses)
