"""A cluster given from outside by its kubeconfig, used where tests would else start a control plane."""

import os
import shutil
from pathlib import Path

from hack.controlplane.access import Access
from hack.controlplane.controlplane import Cluster, ControlPlane

VARIABLE = "NODEPROXY_TEST_KUBECONFIG"


class NotSupported(Exception):
    """An external cluster is not ours to do this to."""


class ExternalCluster(Cluster):
    """The cluster that a kubeconfig's current context names, with all ways to authenticate that the client knows."""

    def __init__(self, kubeconfig: Path) -> None:
        from kubernetes.client import Configuration  # noqa: PLC0415 (half a second, and only needed here)
        from kubernetes.config import load_kube_config  # noqa: PLC0415

        self.kubeconfig = kubeconfig
        configuration = Configuration()
        load_kube_config(str(kubeconfig), client_configuration=configuration)  # type: ignore[no-untyped-call]
        token = configuration.get_api_key_with_prefix
        bearer: str | None = token("authorization") or token("BearerToken")
        self._access = Access(
            url=configuration.host.rstrip("/"),
            ca=_path(configuration.ssl_ca_cert),
            token=bearer.removeprefix("Bearer ") if bearer else None,
            certificate=_path(configuration.cert_file),
            key=_path(configuration.key_file),
            insecure=not configuration.verify_ssl,
        )

    @property
    def access(self) -> Access:
        """Address and credentials, as the kubeconfig has them."""
        return self._access

    def write_kubeconfig(self, path: Path) -> None:
        """Copies the kubeconfig."""
        shutil.copyfile(self.kubeconfig, path)
        path.chmod(0o600)

    def kill_apiserver(self) -> None:
        """Not supported."""
        raise NotSupported(f"{self.kubeconfig} is an external cluster: its API server is not ours to kill.")

    def start_apiserver(self) -> None:
        """Not supported."""
        raise NotSupported(f"{self.kubeconfig} is an external cluster: its API server is not ours to start.")

    def compact(self) -> None:
        """Not supported."""
        raise NotSupported(f"{self.kubeconfig} is an external cluster: its etcd is not ours to compact.")

    def stop(self) -> None:
        """Does nothing: we did not start it."""


def open_cluster(*, controller_manager: bool = False) -> Cluster:
    """The cluster of `NODEPROXY_TEST_KUBECONFIG` if that is set, else a control plane of our own; enter it by `with`."""
    given = os.environ.get(VARIABLE)
    return ExternalCluster(Path(given)) if given else ControlPlane(controller_manager=controller_manager)


def _path(name: str | None) -> Path | None:
    return Path(name) if name else None
