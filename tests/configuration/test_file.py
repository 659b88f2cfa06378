"""KubeProxyConfiguration files: what they come to, field by field, and what is said of those that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nodeproxy.configuration.agent_config import AgentConfig, ConfigError, LogFormat, Mode
from nodeproxy.configuration.document import KubeProxyConfiguration, leaves
from nodeproxy.configuration.effective import as_document, not_supported
from nodeproxy.configuration.read import read_document
from nodeproxy.configuration.resolve import Resolved, resolve
from nodeproxy.configuration.settings import FLAGS, SETTINGS, UNSUPPORTED_FLAGS
from nodeproxy.programmer.base import DetectLocalMode
from tests.configuration.files import KUBEADM, write, write_text


def remarks(resolved: Resolved) -> dict[str, tuple[str, ...]]:
    return {remark.text: remark.names for remark in resolved.remarks}


def test_kubeadms_file_comes_to_kube_proxys_defaults(tmp_path: Path) -> None:
    resolved = resolve(write_text(tmp_path, KUBEADM), {"node_name": "n"})
    assert resolved.config == AgentConfig(
        node_name="n",
        kubeconfig=Path("/var/lib/kube-proxy/kubeconfig.conf"),
        cluster_cidrs=("10.244.0.0/16",),
        bind_address="0.0.0.0",
        ipvs_min_sync_period=0.0,
    )
    assert resolved.remarks == ()
    assert resolved.complaints == ()


@pytest.mark.parametrize("json", [False, True], ids=["yaml", "json"])
def test_a_file_without_fields_has_kube_proxys_defaults(tmp_path: Path, json: bool) -> None:
    text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    if json:
        text = '{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}'
    config = resolve(write_text(tmp_path, text)).config
    assert (config.min_sync_period, config.sync_period) == (1, 30)
    assert (config.ipvs_min_sync_period, config.ipvs_sync_period, config.ipvs_scheduler) == (0, 30, "rr")
    assert (config.conntrack_max_per_core, config.conntrack_min) == (32768, 131072)
    assert (config.conntrack_tcp_timeout_established, config.conntrack_tcp_timeout_close_wait) == (86400, 3600)
    assert (config.healthz_bind_address, config.metrics_bind_address) == ("0.0.0.0:10256", "127.0.0.1:10249")
    assert (config.oom_score_adj, config.masquerade_bit, config.localhost_node_ports) == (-999, 14, True)


HONOURED: list[tuple[dict[str, Any], str, Any]] = [
    ({"mode": "ipvs"}, "mode", Mode.IPVS),
    ({"clientConnection": {"kubeconfig": "/k"}}, "kubeconfig", Path("/k")),
    ({"hostnameOverride": " Node-1 "}, "node_name", "node-1"),
    ({"clusterCIDR": "10.0.0.0/8, fd00::/64"}, "cluster_cidrs", ("10.0.0.0/8", "fd00::/64")),
    ({"detectLocalMode": "NodeCIDR"}, "detect_local_mode", DetectLocalMode.NODE_CIDR),
    ({"detectLocal": {"bridgeInterface": "cbr0"}}, "pod_bridge_interface", "cbr0"),
    ({"detectLocal": {"interfaceNamePrefix": "veth"}}, "pod_interface_name_prefix", "veth"),
    ({"nodePortAddresses": ["primary"]}, "node_port_addresses", ("primary",)),
    ({"bindAddress": "10.0.0.1"}, "bind_address", "10.0.0.1"),
    ({"bindAddress": "::"}, "healthz_bind_address", "[::]:10256"),
    ({"bindAddress": "::"}, "metrics_bind_address", "[::1]:10249"),
    ({"iptables": {"localhostNodePorts": False}}, "localhost_node_ports", False),
    ({"iptables": {"masqueradeAll": True}}, "masquerade_all", True),
    ({"iptables": {"masqueradeBit": 0}}, "masquerade_bit", 0),
    ({"iptables": {"minSyncPeriod": "1.5s"}}, "min_sync_period", 1.5),
    ({"iptables": {"syncPeriod": "1m30s"}}, "sync_period", 90.0),
    ({"ipvs": {"scheduler": "wlc"}}, "ipvs_scheduler", "wlc"),
    ({"ipvs": {"strictARP": True}}, "ipvs_strict_arp", True),
    ({"ipvs": {"excludeCIDRs": ["10.9.0.0/16"]}}, "ipvs_exclude_cidrs", ("10.9.0.0/16",)),
    ({"ipvs": {"tcpTimeout": "1h"}}, "ipvs_tcp_timeout", 3600.0),
    ({"ipvs": {"tcpFinTimeout": "2m"}}, "ipvs_tcpfin_timeout", 120.0),
    ({"ipvs": {"udpTimeout": "5s"}}, "ipvs_udp_timeout", 5.0),
    ({"ipvs": {"minSyncPeriod": "2s"}}, "ipvs_min_sync_period", 2.0),
    ({"ipvs": {"syncPeriod": "10s"}}, "ipvs_sync_period", 10.0),
    ({"conntrack": {"maxPerCore": 0}}, "conntrack_max_per_core", 0),
    ({"conntrack": {"min": 7}}, "conntrack_min", 7),
    ({"conntrack": {"tcpEstablishedTimeout": "0s"}}, "conntrack_tcp_timeout_established", 0.0),
    ({"conntrack": {"tcpCloseWaitTimeout": "1m"}}, "conntrack_tcp_timeout_close_wait", 60.0),
    ({"conntrack": {"tcpBeLiberal": True}}, "conntrack_tcp_be_liberal", True),
    ({"conntrack": {"udpTimeout": "40s"}}, "conntrack_udp_timeout", 40.0),
    ({"conntrack": {"udpStreamTimeout": "3m"}}, "conntrack_udp_timeout_stream", 180.0),
    ({"healthzBindAddress": "127.0.0.2"}, "healthz_bind_address", "127.0.0.2:10256"),
    ({"metricsBindAddress": "::1"}, "metrics_bind_address", "[::1]:10249"),
    ({"oomScoreAdj": 0}, "oom_score_adj", 0),
    ({"logging": {"verbosity": 5}}, "verbosity", 5),
    ({"logging": {"format": "json"}}, "log_format", LogFormat.JSON),
]


@pytest.mark.parametrize(("fields", "name", "value"), HONOURED, ids=str)
def test_a_field_is_honoured(tmp_path: Path, fields: dict[str, Any], name: str, value: Any) -> None:
    resolved = resolve(write(tmp_path, **fields))
    assert getattr(resolved.config, name) == value
    assert type(getattr(resolved.config, name)) is type(value)
    assert resolved.complaints == ()
    assert resolved.remarks == ()


def test_each_honoured_field_is_among_the_examples() -> None:
    assert {s.field for s in SETTINGS if s.path is not None} == {name for _, name, _ in HONOURED}


NOT_SUPPORTED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"bindAddressHardFail": True}, ("bindAddressHardFail",)),
    ({"clientConnection": {"acceptContentTypes": "a/b"}}, ("clientConnection.acceptContentTypes",)),
    ({"clientConnection": {"contentType": "a/b"}}, ("clientConnection.contentType",)),
    ({"clientConnection": {"qps": 50, "burst": 100}}, ("clientConnection.qps", "clientConnection.burst")),
    ({"configSyncPeriod": "1m"}, ("configSyncPeriod",)),
    ({"enableProfiling": True}, ("enableProfiling",)),
    ({"featureGates": {"A": True, "B": False}}, ("featureGates.A", "featureGates.B")),
    ({"logging": {"flushFrequency": "1s"}}, ("logging.flushFrequency",)),
    ({"logging": {"flushFrequency": 1000000}}, ("logging.flushFrequency",)),
    ({"logging": {"vmodule": [{"filePattern": "a*", "verbosity": 3}]}}, ("logging.vmodule",)),
    ({"logging": {"options": {"json": {"splitStream": True}}}}, ("logging.options.json.splitStream",)),
    ({"logging": {"options": {"json": {"infoBufferSize": 5}}}}, ("logging.options.json.infoBufferSize",)),
    ({"logging": {"options": {"text": {"splitStream": True}}}}, ("logging.options.text.splitStream",)),
    ({"logging": {"options": {"text": {"infoBufferSize": "1Ki"}}}}, ("logging.options.text.infoBufferSize",)),
    ({"nftables": {"masqueradeAll": True}}, ("nftables.masqueradeAll",)),
    ({"nftables": {"masqueradeBit": 0}}, ("nftables.masqueradeBit",)),
    ({"nftables": {"minSyncPeriod": "2s", "syncPeriod": "1m"}}, ("nftables.minSyncPeriod", "nftables.syncPeriod")),
    ({"portRange": "1-2"}, ("portRange",)),
    ({"showHiddenMetricsForVersion": "1.35"}, ("showHiddenMetricsForVersion",)),
    ({"windowsRunAsService": True}, ("windowsRunAsService",)),
    ({"winkernel": {"enableDSR": True}}, ("winkernel.enableDSR",)),
    ({"winkernel": {"forwardHealthCheckVip": True}}, ("winkernel.forwardHealthCheckVip",)),
    ({"winkernel": {"networkName": "x"}}, ("winkernel.networkName",)),
    ({"winkernel": {"rootHnsEndpointName": "x"}}, ("winkernel.rootHnsEndpointName",)),
    ({"winkernel": {"sourceVip": "10.0.0.1"}}, ("winkernel.sourceVip",)),
]


@pytest.mark.parametrize(("fields", "paths"), NOT_SUPPORTED, ids=str)
def test_a_field_that_is_not_supported_is_named(tmp_path: Path, fields: dict[str, Any], paths: tuple[str, ...]) -> None:
    resolved = resolve(write(tmp_path, **fields), {"node_name": "n"})
    assert resolved.complaints == ()
    assert remarks(resolved) == {"not supported in the configuration file, ignored": paths}


def test_each_field_of_the_document_is_honoured_or_named() -> None:
    named = {path.removesuffix(".A").removesuffix(".B") for _, paths in NOT_SUPPORTED for path in paths}
    honoured = {setting.path for setting in SETTINGS if setting.path is not None}
    assert honoured | named == set(leaves(KubeProxyConfiguration()))
    assert honoured.isdisjoint(named)
    assert {path for path in UNSUPPORTED_FLAGS.values() if path is not None} <= named


def test_default_values_written_out_are_not_named(tmp_path: Path) -> None:
    document = as_document(AgentConfig(node_name="n"))
    assert not_supported(read_document(write(tmp_path, **document)).document) == ()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mode": "nftables"}, "mode: nftables mode is not supported; --mode iptables or --mode ipvs overrides the file"),
    ({"mode": "userspace"}, "mode: 'userspace' is neither iptables nor ipvs nor empty (iptables)"),
    ({"mode": 3}, "mode: expected text, got a whole number"),
    ({"bindAddress": "here"}, "bindAddress: 'here' is not an IP address"),
    ({"healthzBindAddress": "0.0.0.0:99999"}, "healthzBindAddress: '0.0.0.0:99999' is not an address and port"),
    ({"metricsBindAddress": "x:1"}, "metricsBindAddress: 'x:1' is not an address and port"),
    ({"clusterCIDR": "10.0.0.0/33"}, "clusterCIDR: '10.0.0.0/33' is not a CIDR"),
    ({"clusterCIDR": "10.0.0.0/8,11.0.0.0/8"}, "clusterCIDR: at most one CIDR for each IP family"),
    ({"nodePortAddresses": ["primary", "10.0.0.0/8"]}, "nodePortAddresses: 'primary' cannot be combined"),
    ({"nodePortAddresses": ["10.0.0.0/8", 4]}, "nodePortAddresses[1]: expected text, got a whole number"),
    ({"nodePortAddresses": "primary"}, "nodePortAddresses: expected a list, got text"),
    ({"detectLocalMode": "Magic"}, "detectLocalMode: 'Magic' is none of ClusterCIDR, NodeCIDR"),
    ({"detectLocalMode": "BridgeInterface"}, "detectLocal.bridgeInterface: needed with"),
    ({"iptables": {"minSyncPeriod": "fast"}}, "iptables.minSyncPeriod: 'fast' is not a duration such as"),
    ({"iptables": {"syncPeriod": 30}}, "iptables.syncPeriod: 30 is not a duration such as"),
    ({"iptables": {"syncPeriod": "-30s"}}, "iptables.syncPeriod: '-30s' is not a duration such as"),
    ({"iptables": {"syncPeriod": "9999999999h"}}, "iptables.syncPeriod: '9999999999h' is longer than"),
    ({"iptables": {"minSyncPeriod": "1m"}}, "iptables.syncPeriod: 30 s is less than the least period"),
    ({"iptables": {"masqueradeBit": 32}}, "iptables.masqueradeBit: 32 is not within 0-31"),
    ({"iptables": {"masqueradeBit": True}}, "iptables.masqueradeBit: expected a whole number, got true or false"),
    ({"iptables": {"masqueradeAll": "yes"}}, "iptables.masqueradeAll: expected true or false, got text"),
    ({"iptables": []}, "iptables: expected a mapping, got a list"),
    ({"ipvs": {"scheduler": "best"}}, "ipvs.scheduler: 'best' is none of rr,"),
    ({"ipvs": {"excludeCIDRs": ["10.0.0.1"]}}, "ipvs.excludeCIDRs: '10.0.0.1' is not a CIDR: has no prefix length"),
    ({"ipvs": {"udpTimeout": "10ms"}}, "ipvs.udpTimeout: 0.01 s is less than a second"),
    ({"conntrack": {"min": -1}}, "conntrack.min: -1 is negative"),
    ({"conntrack": {"maxPerCore": 2**31}}, "conntrack.maxPerCore: expected a whole number <= 2147483647"),
    ({"conntrack": {"udpTimeout": "x"}}, "conntrack.udpTimeout: 'x' is not a duration"),
    ({"oomScoreAdj": -1001}, "oomScoreAdj: -1001 is not within -1000 and 1000"),
    ({"clientConnection": {"burst": -1}}, "clientConnection.burst: expected a whole number >= 0"),
    ({"clientConnection": {"qps": "many"}}, "clientConnection.qps: expected a number, got text"),
    ({"featureGates": {"A": 1}}, "featureGates: expected true or false, got a whole number"),
    ({"hostnameOverride": "a node"}, "hostnameOverride: 'a node' cannot be the name of a Node"),
    ({"logging": {"format": "xml"}}, "logging.format: 'xml' is neither text nor json"),
    ({"logging": {"verbosity": -1}}, "logging.verbosity: expected a whole number >= 0"),
    ({"logging": {"flushFrequency": "soon"}}, "logging.flushFrequency: 'soon' is not a duration"),
    ({"logging": {"options": {"json": 1}}}, "logging.options.json: expected a mapping, got a whole number"),
    ({"nftables": {"masqueradeBit": 32}}, "nftables.masqueradeBit: expected a whole number <= 31"),
    ({"winkernel": {"enableDSR": "on"}}, "winkernel.enableDSR: expected true or false, got text"),
]


@pytest.mark.parametrize(("fields", "complaint"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_field_is_refused_with_path_and_reason(tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    path = write(tmp_path, **fields)
    (line,) = resolve(path).complaints
    assert line.startswith(f"{path}: {complaint}")
    with pytest.raises(ConfigError):
        resolve(path).usable()


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, mode="x", iptables={"syncPeriod": "y", "masqueradeBit": 77}, conntrack={"min": "z"})
    assert [line.split(": ")[1] for line in resolve(path).complaints] == [
        "conntrack.min",
        "iptables.syncPeriod",
        "mode",
        "iptables.masqueradeBit",
    ]


def test_unknown_and_repeated_fields_are_named_and_do_no_harm(tmp_path: Path) -> None:
    text = KUBEADM + "colour: red\nmode: iptables\nmode: ipvs\n"
    text = text.replace("  masqueradeAll: false\n  masqueradeBit", "  masqueradeAll: false\n  shade: 1\n  masqueradeBit", 1)
    text = text.replace("  strictARP: false\n", "  strictARP: false\n  strictARP: true\n")
    resolved = resolve(write_text(tmp_path, text), {"node_name": "n"})
    assert remarks(resolved) == {
        "unknown fields in the configuration file, ignored": ("colour", "iptables.shade"),
        "given more than once in the configuration file, the last counts": ("ipvs.strictARP", "mode"),
    }
    assert (resolved.config.mode, resolved.config.ipvs_strict_arp) == (Mode.IPVS, True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "holds a list"),
        ("a: [b", "not YAML: line "),
        (b"\x00\xff\xfe", "not YAML: "),
        ("[" * 100_000, "not YAML: line 1: nested more than 100 levels deep"),
        ("a: &a [*a]", "not YAML: "),
        ("a: &a {b: *a}", "not YAML: aliases nest"),
        ("[1]: 2", "not YAML: line 1: "),
        ("x: " + "9" * 5000, "not YAML: "),
        ("x" * (1 << 20) + "x", "larger than 1 MiB"),
        ("kind: KubeProxyConfiguration\n", "apiVersion None, kind 'KubeProxyConfiguration': expected"),
        (
            "apiVersion: kubeproxy.config.k8s.io/v2\nkind: KubeProxyConfiguration\n",
            "apiVersion 'kubeproxy.config.k8s.io/v2'",
        ),
        ("apiVersion: v1\nkind: ConfigMap\ndata: {}\n", "apiVersion 'v1', kind 'ConfigMap'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    path = write_text(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        resolve(path)
    (line,) = error.value.complaints
    assert line.startswith(f"{path}: {complaint}") or (complaint == "not YAML: " and "not YAML: " in line)
    assert "\n" not in line


def test_a_missing_file_and_a_directory_are_refused_in_one_line(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is not a file"), (tmp_path / "x", "No such file or directory")):
        with pytest.raises(ConfigError) as error:
            resolve(path)
        assert error.value.complaints == (f"{path}: {reason}",)


def test_aliases_that_multiply_take_no_time(tmp_path: Path) -> None:
    levels = [f"k{n}: &k{n} {{a: *k{n - 1}, b: *k{n - 1}}}" for n in range(1, 60)]
    text = KUBEADM + "k0: &k0 {a: 1}\n" + "\n".join(levels) + "\n"
    assert remarks(resolve(write_text(tmp_path, text))) == {
        "unknown fields in the configuration file, ignored": tuple(f"k{n}" for n in range(60))
    }


def test_further_documents_are_not_read(tmp_path: Path) -> None:
    resolved = resolve(write_text(tmp_path, KUBEADM + "---\nkind: KubeletConfiguration\n"))
    assert remarks(resolved) == {"the configuration file holds further documents, ignored": ()}


def test_flags_are_ignored_where_the_file_has_the_field(tmp_path: Path) -> None:
    flags = {"masquerade_all": True, "kubeconfig": Path("/k"), "cluster_cidrs": ("nonsense",)}
    resolved = resolve(write(tmp_path), flags, ["--profiling", "--vmodule", "--healthz-port"])
    assert remarks(resolved) == {
        "flags are ignored, the configuration file counts": (
            *("--masquerade-all", "--kubeconfig", "--cluster-cidr", "--profiling", "--healthz-port"),
        ),
        "flags of kube-proxy that are not supported, ignored": ("--vmodule",),
    }
    assert resolved.complaints == ()
    assert (resolved.config.masquerade_all, resolved.config.kubeconfig) == (False, None)


def test_flags_that_override_do_so_and_excuse_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, mode="nftables", hostnameOverride="a b", logging={"verbosity": 1, "format": "text"})
    flags = {"mode": Mode.IPVS, "node_name": "n1", "verbosity": 4, "log_format": LogFormat.JSON, "master": "https://x"}
    flags |= {"metrics_bind_address": "0.0.0.0:10249", "ipvs_drain_timeout": 5.0, "events": False}
    resolved = resolve(path, flags)
    config = resolved.config
    assert resolved.complaints == ()
    assert (config.mode, config.node_name, config.verbosity, config.log_format) == (Mode.IPVS, "n1", 4, LogFormat.JSON)
    assert (config.master, config.ipvs_drain_timeout, config.events) == ("https://x", 5.0, False)
    assert config.metrics_bind_address == "0.0.0.0:10249"


def test_manifests_take_the_place_of_the_files_kubeconfig(tmp_path: Path) -> None:
    resolved = resolve(write_text(tmp_path, KUBEADM), {"manifests": tmp_path})
    assert resolved.usable().kubeconfig is None
    assert [remark.names for remark in resolved.remarks] == [("clientConnection.kubeconfig",)]


def test_a_missing_kubeconfig_is_named_by_its_path_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, clientConnection={"kubeconfig": "/nowhere"})
    resolved = resolve(path)
    assert resolved.absent == (f"{path}: clientConnection.kubeconfig: /nowhere is not a file",)


def test_every_field_of_the_configuration_has_its_setting() -> None:
    assert set(FLAGS) == set(AgentConfig.__struct_fields__)
