"""Owns what a kind cluster in the VM needs of this machine: images that hack.kind makes; and how it is told of them."""

from collections.abc import Sequence

from hack.vm import docker_disk
from hack.vm.docker_disk import Content
from hack.vm.kind_nodes import Nodes
from hack.vm.places import VmError


def content(cluster: str, more_images: Sequence[str] = ()) -> Content:
    """The disk of a VM for the cluster: agnhost and an agent (hack.kind loads this clone's) are in engine and nodes."""
    from hack.kind import agent_image, base_image, engine, node_image, test_images  # noqa: PLC0415 hack.kind knows hack.vm
    from hack.kind.places import KindError  # noqa: PLC0415

    try:
        engine.ensure()
        agent = agent_image.agent_image()
        loaded = (test_images.agnhost(), agent, *more_images)
        nodes = Nodes(cluster, node_image.node_image(), loaded)
        return Content((base_image.base_image(), *loaded), nodes, (agent,))
    except KindError as error:
        raise VmError(str(error)) from error


def environment(made: Content) -> list[str]:
    """Variables for commands in the VM, as NAME=VALUE."""
    assert made.nodes is not None
    return [
        f"NODEPROXY_NODE_IMAGE={made.nodes.light_image}",
        f"NODEPROXY_NODE_STORES={docker_disk.PLACE}/{docker_disk.STORES}",
        "NODEPROXY_PULL=never",
    ]
