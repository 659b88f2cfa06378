"""Alerts and dashboard ask for metrics and labels that an agent exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.observers.traffic import TrafficCounters

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "nodeproxy.json").read_text())
OF_PROMETHEUS = {"up": set[str]()}
TARGET_LABELS = {"job", "node", "le"}


def expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def exported() -> dict[str, set[str]]:
    """The labels of each series' name."""
    metrics = Metrics()
    TrafficCounters(metrics.registry, lambda: (), 10.0)
    found: dict[str, set[str]] = dict(OF_PROMETHEUS)
    for collector, names in metrics.registry._collector_to_names.items():
        if isinstance(collector, MetricWrapperBase):
            found.update({key: set(collector._labelnames) for key in names})
        elif isinstance(collector, TrafficCounters):
            found.update({key: {"namespace", "service", "port", "protocol", "direction"} for key in names})
        else:  # of the process and of Python: what they are called is known by asking
            found.update({sample.name: set(sample.labels) for metric in collector.collect() for sample in metric.samples})
    return found


EXPORTED = exported()


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_what_is_asked_for_is_exported(place: str, expression: str) -> None:
    text = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    grouped = {word for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", text) for word in re.findall(r"\w+", group)}
    matched = {word for group in re.findall(r"\{([^}]*)\}", text) for word in re.findall(r"(\w+)\s*[=!]", group)}
    bare = re.sub(r"\{[^}]*\}|\b(?:by|on)\s*\([^)]*\)", "", text)
    names = set(re.findall(r"\b(?:up|(?:kubeproxy|nodeproxy|process|python)_\w+)\b", bare))
    assert names, f"{place}: no metric in {expression}"
    assert names <= EXPORTED.keys(), f"{place} asks for {names - EXPORTED.keys()}"
    labels = set[str]().union(*(EXPORTED[name] for name in names))
    assert grouped | matched <= labels | TARGET_LABELS, place


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_only_our_series_are_asked_for(place: str, expression: str) -> None:
    """kube-proxy, which serves other nodes during a migration, has series of the same names."""
    for name, selector in re.findall(r"\b((?:up|(?:kubeproxy|process|python)_\w+)\b)(\{[^}]*\})?", expression):
        assert 'job="nodeproxy"' in selector, f"{place}: {name}"


def test_an_unknown_name_would_be_found() -> None:
    with pytest.raises(AssertionError, match="nodeproxy_no_such_thing"):
        test_what_is_asked_for_is_exported("x", "sum by (node) (rate(nodeproxy_no_such_thing[5m]))")
    with pytest.raises(AssertionError):
        test_what_is_asked_for_is_exported("x", 'up{colour="red"}')


def test_labels_of_alerts_are_exported() -> None:
    for rule in RULES:
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        kept = re.match(r"\s*(?:sum|max|histogram_quantile\(0\.99, sum) by \(([^)]*)\)", rule["expr"])
        if kept is not None:
            assert used <= set(re.findall(r"\w+", kept[1])), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set[tuple[int, int]]()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
