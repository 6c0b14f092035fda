"""The alerts that are shipped ask for metrics that there are, at the thresholds of the log, and say what to do.

Prometheus's own `promtool check rules` is not among what the tests need: expressions are taken apart here, and no more
than their names and numbers are looked at.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from i2i_dist import collapse
from i2i_dist.config import EngineConfig
from i2i_dist.methods import opgan
from i2i_dist.pace import LOWEST_SCORE
from tests.ranks import ROOT
from tests.telemetry.test_prometheus import new_metrics, record

DOCUMENT = yaml.safe_load((ROOT / "configs" / "monitoring" / "alerts.yaml").read_text())
RULES: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in DOCUMENT["groups"] for rule in group["rules"]}
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()

DURATION = r"\d+[smhd]"
FUNCTIONS = {"abs", "absent", "increase", "max_over_time", "rate", "resets", "time"}
WORDS = {"and", "or", "unless", "ignoring", "group_left", "Inf"}
OF_SCRAPING = {"instance"}  # labels that Prometheus adds
THRESHOLDS = {
    "NoProgress": EngineConfig().timeout_seconds / 2,  # at the whole of it the run has ended
    "SlowRank": LOWEST_SCORE,
    "SpreadLow": collapse.LOWEST_SPREAD,
    "ChangeLow": collapse.LOWEST_CHANGE,
    "CriticPullLow": collapse._OF_CRITICS["critic_pull"][0],
    "CriticDoubtLow": collapse._OF_CRITICS["critic_doubt"][0],
    "AttentionSpreadLow": opgan._LOWEST_SPREAD,
}
GAUGES = {
    "fake_spread": "SpreadLow",
    "fake_a_spread": "SpreadLow",
    "fake_encoded_spread": "SpreadLow",
    "fake_b_change": "ChangeLow",
    "critic_pull": "CriticPullLow",
    "critic_doubt": "CriticDoubtLow",
    "attention_spread": "AttentionSpreadLow",
}


def exported() -> dict[str, set[str]]:
    """Return the names of all series of a process that trains, each with its labels."""
    metrics = new_metrics()
    metrics.update(record(20, {"g": 1.0}))
    metrics.bad_sample("a")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(expression: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return each metric with its matchers of labels: name, operator, value."""
    found = re.findall(r"\b(i2i_\w+)(?:\{([^}]*)\})?", expression)
    return [(name, re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', inner)) for name, inner in found]


@pytest.mark.parametrize("name", RULES)
def test_an_alert_asks_for_what_is_exported(name: str) -> None:
    rule, known = RULES[name], exported()
    expression = rule["expr"]
    asked = selectors(expression)
    assert asked
    for metric, matchers in asked:
        assert metric in known
        assert {label for label, _, _ in matchers} <= known[metric]
    all_labels = set().union(*(known[metric] for metric, _ in asked))
    for label in re.findall(r"ignoring \((\w+)\)", expression) + re.findall(r"\$labels\.(\w+)", str(rule)):
        assert label in all_labels | OF_SCRAPING
    rest = re.sub(r"\bi2i_\w+(\{[^}]*\})?|\[" + DURATION + r"\]|ignoring \(\w+\)", " ", expression)
    assert set(re.findall(r"[A-Za-z_]\w*", rest)) <= FUNCTIONS | WORDS
    assert expression.count("(") == expression.count(")")
    for function, metric in re.findall(r"(\w+)\((\w+)\[", expression):
        assert metric.endswith("_total") == (function != "max_over_time"), "rate() and the like are for counters"


@pytest.mark.parametrize("name", RULES)
def test_an_alert_says_what_it_means_and_where_to_read_on(name: str) -> None:
    rule = RULES[name]
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(DURATION, rule.get("for", "0s"))
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", OPERATIONS, re.MULTILINE)
    assert page == "docs/operations.md"
    assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_alert_stands_in_the_table_and_the_other_way_round() -> None:
    assert sum(len(group["rules"]) for group in DOCUMENT["groups"]) == len(RULES), "two have the same name"
    section = OPERATIONS.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(RULES)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_an_alert_has_the_threshold_of_the_log(name: str) -> None:
    (threshold,) = re.findall(r"[<>] ([\d.]+)", RULES[name]["expr"])
    assert float(threshold) == THRESHOLDS[name]


@pytest.mark.parametrize("gauge", GAUGES)
def test_a_gauge_has_one_alert_after_the_same_warm_up(gauge: str) -> None:
    def chosen(expression: str) -> bool:
        tests = {"=": str.__eq__, "!=": str.__ne__, "=~": lambda value, pattern: bool(re.fullmatch(pattern, value))}
        found = [matchers for metric, matchers in selectors(expression) if metric == "i2i_train_gauge"]
        return any(all(tests[how](gauge, value) for _, how, value in matchers) for matchers in found)

    assert [name for name, rule in RULES.items() if chosen(rule["expr"])] == [GAUGES[gauge]]
    warm = re.findall(r"i2i_train_updates_total >= (\d+)", RULES[GAUGES[gauge]]["expr"])
    assert warm == ([] if gauge == "attention_spread" else [str(collapse.WARM_UP)])
