"""Owns the removal of what IPVS mode leaves in the kernel beside rules: virtual servers, the interface, ipsets.

Blocking: call in a thread.
"""

from __future__ import annotations

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import FeatureMissing, KernelError
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import IPVS, DeleteVirtualServer, VirtualServer
from nodeproxy.kernel.links import Links, NotADummy
from nodeproxy.programmer.ipvs.names import DEVICE, SetName
from nodeproxy.programmer.ipvs.places import OURS
from nodeproxy.programmer.kube_proxy_traces import SETS

_OUR_SETS = frozenset(name.of(family) for name in SetName for family in Family)


def has_traces() -> bool:
    """Whether IPVS mode left anything here: the interface tells, and the ipset of its addresses."""
    with Links() as links:
        if links.link_index(DEVICE) is not None:
            return True
    try:
        with IPSets() as ipsets:
            names = ipsets.list_names("KUBE-")
    except FeatureMissing:
        return False
    return any(SetName.SERVICE_ADDRESSES.of(family) in names for family in Family)


def remove_from_kernel() -> list[str]:
    """Remove everything but rules, which must be gone already; returns what could not be removed, and why.

    A kernel that lacks a feature has nothing of it to remove.
    """
    errors: list[str] = []
    for step in (_remove_servers, _remove_interface, _remove_sets):
        try:
            errors += step()
        except (FeatureMissing, NotADummy):
            continue
        except KernelError as error:
            errors.append(str(error))
    return errors


def remove_beside_kube_proxy() -> list[str]:
    """Remove what only we use, where kube-proxy's IPVS mode has taken the rest over; returns what could not be removed."""
    try:
        with IPVS() as ipvs:
            doomed = [server for server, settings in ipvs.virtual_servers().items() if settings.flags & OURS]
            errors = ipvs.change([DeleteVirtualServer(server) for server in doomed]).values()
        return [*(str(error) for error in errors), *_destroy(_OUR_SETS - SETS.keys())]
    except KernelError as error:
        return [str(error)]


def _remove_servers() -> list[str]:
    with IPVS() as ipvs, Links() as links:
        index = links.link_index(DEVICE)
        ours = links.addresses_of(index) if index is not None else set()
        doomed: list[VirtualServer] = [
            server for server, settings in ipvs.virtual_servers().items() if settings.flags & OURS or server.address in ours
        ]
        return [str(error) for error in ipvs.change([DeleteVirtualServer(server) for server in doomed]).values()]


def _remove_interface() -> list[str]:
    with Links() as links:
        if links.link_index(DEVICE) is not None:
            links.ensure_dummy(DEVICE)  # raises NotADummy: somebody else's
            links.delete_link(DEVICE)
    return []


def _remove_sets() -> list[str]:
    return _destroy(_OUR_SETS)


def _destroy(names: frozenset[str]) -> list[str]:
    """Destroy those of the sets that are there."""
    with IPSets() as ipsets:
        return [str(error) for error in ipsets.destroy(sorted(names.intersection(ipsets.list_names("KUBE-"))))]
