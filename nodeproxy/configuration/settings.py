"""Owns what belongs together: each field of `AgentConfig`, its flag, and its path in a KubeProxyConfiguration."""

from __future__ import annotations

from msgspec import Struct


class Setting(Struct, frozen=True):
    """One thing that can be set. `path`: None where kube-proxy has no such field, so that only the flag sets it.

    `overrides`: the flag counts also where a configuration file is given. kube-proxy has that for the node's name and for
    logging; the mode is ours, so that one file serves while nodes are moved from one mode to another, and so is the address
    of metrics, so that monitoring can be opened without another file.
    """

    field: str
    flag: str
    path: str | None = None
    overrides: bool = False

    @property
    def name(self) -> str:
        """The path in the document, where there is one, else the flag."""
        return self.path or self.flag


SETTINGS = (
    Setting("mode", "--mode", "mode", overrides=True),
    Setting("fallback", "--fallback"),
    Setting("kubeconfig", "--kubeconfig", "clientConnection.kubeconfig"),
    Setting("master", "--master"),
    Setting("manifests", "--manifests"),
    Setting("node_name", "--hostname-override", "hostnameOverride", overrides=True),
    Setting("service_proxy_name", "--service-proxy-name"),
    Setting("cluster_cidrs", "--cluster-cidr", "clusterCIDR"),
    Setting("detect_local_mode", "--detect-local-mode", "detectLocalMode"),
    Setting("pod_bridge_interface", "--pod-bridge-interface", "detectLocal.bridgeInterface"),
    Setting("pod_interface_name_prefix", "--pod-interface-name-prefix", "detectLocal.interfaceNamePrefix"),
    Setting("node_port_addresses", "--nodeport-addresses", "nodePortAddresses"),
    Setting("bind_address", "--bind-address", "bindAddress"),
    Setting("localhost_node_ports", "--iptables-localhost-nodeports", "iptables.localhostNodePorts"),
    Setting("masquerade_all", "--masquerade-all", "iptables.masqueradeAll"),
    Setting("masquerade_bit", "--iptables-masquerade-bit", "iptables.masqueradeBit"),
    Setting("min_sync_period", "--iptables-min-sync-period", "iptables.minSyncPeriod"),
    Setting("sync_period", "--iptables-sync-period", "iptables.syncPeriod"),
    Setting("iptables_variant", "--iptables-variant"),
    Setting("ipvs_scheduler", "--ipvs-scheduler", "ipvs.scheduler"),
    Setting("ipvs_strict_arp", "--ipvs-strict-arp", "ipvs.strictARP"),
    Setting("ipvs_exclude_cidrs", "--ipvs-exclude-cidrs", "ipvs.excludeCIDRs"),
    Setting("ipvs_tcp_timeout", "--ipvs-tcp-timeout", "ipvs.tcpTimeout"),
    Setting("ipvs_tcpfin_timeout", "--ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout"),
    Setting("ipvs_udp_timeout", "--ipvs-udp-timeout", "ipvs.udpTimeout"),
    Setting("ipvs_drain_timeout", "--ipvs-drain-timeout"),
    Setting("ipvs_min_sync_period", "--ipvs-min-sync-period", "ipvs.minSyncPeriod"),
    Setting("ipvs_sync_period", "--ipvs-sync-period", "ipvs.syncPeriod"),
    Setting("conntrack_max_per_core", "--conntrack-max-per-core", "conntrack.maxPerCore"),
    Setting("conntrack_min", "--conntrack-min", "conntrack.min"),
    Setting("conntrack_tcp_timeout_established", "--conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout"),
    Setting("conntrack_tcp_timeout_close_wait", "--conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout"),
    Setting("conntrack_tcp_be_liberal", "--conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal"),
    Setting("conntrack_udp_timeout", "--conntrack-udp-timeout", "conntrack.udpTimeout"),
    Setting("conntrack_udp_timeout_stream", "--conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout"),
    Setting("healthz_bind_address", "--healthz-bind-address", "healthzBindAddress"),
    Setting("metrics_bind_address", "--metrics-bind-address", "metricsBindAddress", overrides=True),
    Setting("oom_score_adj", "--oom-score-adj", "oomScoreAdj"),
    Setting("verbosity", "-v", "logging.verbosity", overrides=True),
    Setting("log_format", "--logging-format", "logging.format", overrides=True),
    Setting("while_another_runs", "--while-another-runs"),
    Setting("traffic_counters_period", "--traffic-counters-period"),
    Setting("events", "--events"),
)

BY_FIELD = {setting.field: setting for setting in SETTINGS}
FLAGS = {setting.field: setting.flag for setting in SETTINGS}
"""The flag of each field of `AgentConfig`."""

NEED_RESTART = frozenset(
    {
        *("kubeconfig", "master", "manifests", "node_name", "service_proxy_name"),  # what is watched
        "iptables_variant",
        "oom_score_adj",  # lowering it may need a capability that is gone
        *("verbosity", "log_format"),  # loggers are made once
    }
)
"""Fields of `AgentConfig` that a running agent cannot change."""

UNSUPPORTED_FLAGS = {
    "--bind-address-hard-fail": "bindAddressHardFail",
    "--boot-id-file": None,
    "--config-sync-period": "configSyncPeriod",
    "--feature-gates": "featureGates",
    "--kube-api-burst": "clientConnection.burst",
    "--kube-api-content-type": "clientConnection.contentType",
    "--kube-api-qps": "clientConnection.qps",
    "--log-flush-frequency": None,
    "--log-json-info-buffer-size": None,
    "--log-json-split-stream": None,
    "--log-text-info-buffer-size": None,
    "--log-text-split-stream": None,
    "--machine-id-file": None,
    "--profiling": "enableProfiling",
    "--show-hidden-metrics-for-version": "showHiddenMetricsForVersion",
    "--vmodule": None,
}
"""kube-proxy's flags that do nothing here, with the path of the field that takes their place in a configuration file.

None: without such a field, or (logging) counting beside it.
"""
