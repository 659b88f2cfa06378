"""CoreDNS behind its own Service: names of the cluster, as pods ask for them."""

from __future__ import annotations

import pytest

from e2e.harness.dns import resolve
from e2e.harness.settings import NAMESPACE
from e2e.harness.stage import SERVERS
from e2e.harness.waiting import eventually
from e2e.harness.world import World

DOMAIN = "svc.cluster.local"


@pytest.mark.smoke
def test_names_of_services(world: World) -> None:
    """Pods and nodes reach CoreDNS by its cluster IP, by UDP and by TCP, and it knows each Service's address."""
    service = world.service("named")
    dns, name = world.dns(), f"{service.name}.{NAMESPACE}.{DOMAIN}"
    for place in world.stage.inside:
        for tcp in (False, True):
            eventually(
                lambda: resolve(place, dns, name, tcp=tcp) == {service.address},  # noqa: B023
                f"{place} resolves {name} by {'TCP' if tcp else 'UDP'}",
            )
            assert resolve(place, dns, f"kubernetes.default.{DOMAIN}", tcp=tcp)
    assert resolve(world.stage.client_a, dns, f"no-such-service.{NAMESPACE}.{DOMAIN}") == set()


def test_many_questions(world: World) -> None:
    """None of hundreds of questions, each from a new port, goes unanswered."""
    name, dns = f"kubernetes.default.{DOMAIN}", world.dns()
    for place in (world.stage.client_a, world.stage.client_b):
        answers = [resolve(place, dns, name) for _ in range(150)]
        assert all(answers), f"{answers.count(set())} of {len(answers)} questions of {place} were not answered"


@pytest.mark.smoke
def test_a_pod_by_a_name(world: World) -> None:
    """A process in a pod, with the resolver that kubelet gave it, gets a page by the short name of a Service."""
    service = world.service("page")

    def answered() -> bool:
        url = f"http://{service.name}/hostname"
        script = f"for i in 1 2 3 4 5 6; do curl -sS --max-time 10 {url}; echo; done"
        names = set(world.stage.cluster.kubectl("-n", NAMESPACE, "exec", "client-b", "--", "sh", "-c", script).split())
        assert names and names <= SERVERS, names
        return True

    eventually(answered, "a process in a pod is answered", poll=1)
