"""Alert rules that fire, a dashboard that asks for what there is, and metrics that are documented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from raypipe.runtime.metrics import WorkMetrics
from raypipe.serving.metrics import ServingMetrics
from tests.conftest import unavailable

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
ALERTS = CLUSTER / "prometheus/alerts.yaml"
FIRED = Path(__file__).with_name("alerts_test.yaml")
DASHBOARD = json.loads((CLUSTER / "grafana/raypipe.json").read_text())
OURS = re.compile(r"\bray_(raypipe_[a-z_]+)")


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        unavailable("promtool is not installed (Debian's package prometheus)")
    return str(found)


def run(promtool: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def documented() -> dict[str, str]:
    """Metric → labels, by the table of cluster/README.md."""
    rows = re.findall(r"^\| `ray_(raypipe_[a-z_]+)` \|[^|]*\|[^|]*\|(.*?)\|", (CLUSTER / "README.md").read_text(), re.M)
    return dict(rows)


def test_rules_and_scrape_configuration_are_prometheus_own(promtool: str) -> None:
    rules = run(promtool, "check", "rules", ALERTS)
    assert rules.returncode == 0, rules.stderr
    config = run(promtool, "check", "config", CLUSTER / "prometheus/prometheus.yaml")
    assert config.returncode == 0, config.stderr


def test_every_alert_fires_when_its_condition_is_true_and_is_silent_beside_it(promtool: str) -> None:
    ended = run(promtool, "test", "rules", FIRED)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    tests = [test for case in yaml.safe_load(FIRED.read_text())["tests"] for test in case["alert_rule_test"]]
    fired = {test["alertname"] for test in tests if test.get("exp_alerts")}
    silent = {test["alertname"] for test in tests if not test.get("exp_alerts")}
    alerts = {rule["alert"] for rule in rules if "alert" in rule}
    assert fired == alerts
    assert {
        "RaypipeStalled",
        "RaypipeNightMissing",
        "RaypipeErrorBudget",
        "RaypipeServiceOverloaded",
        "RaypipeDiskFull",
    } <= silent


def test_a_rule_that_is_made_deaf_is_found(promtool: str, tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text().replace("> 0.05", "> 0.5"))
    (tmp_path / "test.yaml").write_text(FIRED.read_text().replace("../../cluster/prometheus/", ""))
    ended = run(promtool, "test", "rules", tmp_path / "test.yaml")
    assert ended.returncode != 0
    assert "RaypipeRejects" in ended.stdout + ended.stderr


def test_the_dashboard_is_whole_and_its_queries_are_promql(promtool: str, tmp_path: Path) -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["targets"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    rules = [
        {"record": f"query:{number}", "expr": expr.replace("$pipeline", ".*")}
        for number, expr in enumerate(expressions())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = run(promtool, "check", "rules", tmp_path / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_is_asked_for_is_what_work_tells_and_what_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, tuple[str, ...]] = {}

    class Metric:
        def __init__(self, name: str, description: str, *rest: Any) -> None:
            told[name] = rest[-1] if rest and isinstance(rest[-1], tuple) else ()

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags == {"pipeline": "summarize"}

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", Metric)
    WorkMetrics("summarize")
    ServingMetrics()
    table = {re.sub("_total$", "", name): labels for name, labels in documented().items()}
    assert set(table) == set(told)
    for name, tags in told.items():
        assert set(re.findall(r"`(\w+)`", table[name])) >= set(tags)
    asked = OURS.findall(ALERTS.read_text() + " ".join(expressions()))
    assert {re.sub("_(total|bucket|count|sum)$", "", name) for name in asked} == set(told)
