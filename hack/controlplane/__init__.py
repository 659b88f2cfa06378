"""A real Kubernetes API server for tests and benchmarks, ready in a few seconds, on nothing but this machine.

`build` compiles etcd and the Kubernetes programs from their Go modules (or takes those that `KUBEBUILDER_ASSETS` names),
`controlplane` runs them, `load` fills them with Services and EndpointSlices, and `peer` runs kube-proxy beside us:

    with ControlPlane() as cluster:
        cluster.write_kubeconfig(path)
        print(cluster.request("GET", "/api/v1/services"))

From a shell: `python -m hack.controlplane up --dir DIR`.
"""

from hack.controlplane.access import Access, ApiError
from hack.controlplane.controlplane import Cluster, ControlPlane
from hack.controlplane.external import ExternalCluster, NotSupported, open_cluster
from hack.controlplane.processes import StartError

__all__ = [
    "Access",
    "ApiError",
    "Cluster",
    "ControlPlane",
    "ExternalCluster",
    "NotSupported",
    "StartError",
    "open_cluster",
]
