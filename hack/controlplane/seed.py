"""Objects as an API server stores them in etcd, so that thousands are there within seconds.

An API server of version 1.36 creates a few hundred Services a second, fewer the more there are: each new cluster IP makes it
walk over all others, twice, for two metrics. Tests and benchmarks that only need the objects to be there write them
to etcd while the API server is stopped (`ControlPlane.seed`); those that measure or test creation itself use `load.Load`.
"""

import time
import uuid
from collections.abc import Iterator

from hack.controlplane.access import Json
from hack.controlplane.load import Shape


def stored(shape: Shape, node_ports: range) -> Iterator[tuple[str, Json]]:
    """Etcd key and object of everything in a Shape's namespace, with the cluster IPs and node ports allocated.

    Allocation includes the IPAddress objects; that of node ports is noted by the API server when it starts.
    """
    for number in shape.numbers:
        service = _complete(shape.service(number))
        spec = service["spec"]
        spec |= {"sessionAffinity": "None", "internalTrafficPolicy": "Cluster"}
        if spec["type"] == "NodePort":
            before = int(number * shape.node_ports)  # so many Services with a lower number have node ports
            if before >= len(node_ports):
                raise ValueError(f"More Services ask for node ports than {node_ports[0]}-{node_ports[-1]} has.")
            spec["ports"][0]["nodePort"] = node_ports[-1 - before]
            spec["externalTrafficPolicy"] = "Cluster"
        for family, address in zip(shape.families, spec["clusterIPs"], strict=True):
            yield f"/registry/ipaddresses/{address}", _complete(_ip_address(shape, number, family, address))
        yield f"/registry/services/specs/{shape.namespace}/{shape.name(number)}", service
        for slice_ in shape.slices(number):
            key = f"/registry/endpointslices/{shape.namespace}/{slice_['metadata']['name']}"
            yield key, _complete(slice_)


def _ip_address(shape: Shape, number: int, family: str, address: str) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "IPAddress",
        "metadata": {
            "name": address,
            "labels": {
                "ipaddress.kubernetes.io/ip-family": family,
                "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
            },
        },
        "spec": {
            "parentRef": {"group": "", "resource": "services", "namespace": shape.namespace, "name": shape.name(number)}
        },
    }


def _complete(object_: Json) -> Json:
    """Adds what the API server sets in the metadata of every object."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    object_["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": created}
    if object_["kind"] == "EndpointSlice":
        object_["metadata"]["generation"] = 1
    return object_
