"""Reading and writing sysctls, against the real kernel."""

import errno
import sys
from pathlib import Path

import pytest

from nodeproxy.kernel import sysctl
from nodeproxy.kernel.errors import SysctlAbsent, SysctlReadOnly, SysctlRefused
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel


def test_value_is_set_in_the_threads_namespace_only(netns: NetworkNamespace) -> None:
    name = "net.ipv4.conf.all.route_localnet"
    outside = sysctl.get(name)
    assert netns.run(sysctl.get, name) == "0"
    assert netns.run(sysctl.set, name, 1) is True
    assert netns.run(sysctl.set, name, "1") is False  # it is so already
    assert netns.run(sysctl.get, name) == "1"
    assert netns.command("cat", "/proc/sys/net/ipv4/conf/all/route_localnet").strip() == "1"
    assert sysctl.get(name) == outside


def test_several_numbers(netns: NetworkNamespace) -> None:
    assert netns.run(sysctl.set, "net.ipv4.ip_local_port_range", "20000 30000") is True
    assert netns.run(sysctl.get, "net.ipv4.ip_local_port_range") == "20000\t30000"
    assert netns.run(sysctl.set, "net.ipv4.ip_local_port_range", "20000 30000") is False


@pytest.mark.parametrize(
    "name", ["net/ipv4/conf/eth0.100/rp_filter", "net.ipv4.conf.eth0/100.rp_filter"], ids=["slashes", "swapped"]
)
def test_interface_name_with_a_dot(netns: NetworkNamespace, name: str) -> None:
    netns.command("ip", "link", "add", "eth0.100", "type", "veth", "peer", "name", "eth1")
    netns.run(sysctl.set, name, 2)
    assert netns.command("cat", "/proc/sys/net/ipv4/conf/eth0.100/rp_filter").strip() == "2"
    assert netns.run(sysctl.get, name) == "2"


def test_absent_sysctl(netns: NetworkNamespace) -> None:
    for name in ("net.ipv4.no_such_thing", "net.ipv4.conf.nodev0.rp_filter", "net.ipv4.ip_forward.below", "net.ipv4"):
        with pytest.raises(SysctlAbsent, match=name):
            netns.run(sysctl.get, name)
        with pytest.raises(SysctlAbsent, match=name):
            netns.run(sysctl.set, name, 1)


def test_read_only_sysctl(netns: NetworkNamespace) -> None:
    with pytest.raises(SysctlReadOnly) as caught:
        netns.run(sysctl.set, "kernel.ostype", "Other")
    assert (caught.value.name, caught.value.value) == ("kernel.ostype", "Other")
    present = sysctl.get("kernel.ostype")
    assert sysctl.set("kernel.ostype", present) is False  # right already: no error


def test_read_only_proc_sys(netns: NetworkNamespace) -> None:
    """As in a container without privileges: /proc/sys mounted read-only."""
    script = "import sys; from nodeproxy.kernel import sysctl\ntry: sysctl.set('net.ipv4.ip_forward', sys.argv[1])\n"
    script += "except Exception as error: print(type(error).__name__, error)"
    value = "0" if netns.run(sysctl.get, "net.ipv4.ip_forward") == "1" else "1"
    shell = (
        f'mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec {sys.executable} -c "$0" {value}'
    )
    printed = netns.command("unshare", "--mount", "sh", "-c", shell, script)
    assert printed.startswith("SysctlReadOnly sysctl net.ipv4.ip_forward is read-only")


def test_refused_value(netns: NetworkNamespace) -> None:
    for value in ("words", "-5"):
        with pytest.raises(SysctlRefused) as caught:
            netns.run(sysctl.set, "net.ipv4.ip_default_ttl", value)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("name", ["", ".", "net..ipv4", "net/../../etc/passwd", "/etc/passwd", "net.ipv4.x\0y"])
def test_name_that_leaves_proc_sys_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a sysctl name"):
        sysctl.get(name)


def test_paths() -> None:
    assert sysctl.path_of("net.ipv4.ip_forward") == Path("/proc/sys/net/ipv4/ip_forward")
    assert sysctl.path_of("net/ipv4/ip_forward") == Path("/proc/sys/net/ipv4/ip_forward")
