"""A scrape shows what was recorded, and no client can slow or stop the run."""

from __future__ import annotations

import http.client
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from i2i_dist.telemetry import prometheus
from i2i_dist.telemetry.prometheus import Metrics, MetricsServer, serve
from i2i_dist.telemetry.record import UpdateRecord

HOST = "127.0.0.1"


def record(images_seen: int, losses: dict[str, float]) -> UpdateRecord:
    rates, gauges = {"generator": 2e-4}, {"attention_spread": images_seen / 1e4}
    return UpdateRecord(images_seen, 1000, 2, losses, rates, gauges, 10.0, 0.4, 0.1, 0.08, (0.3, 0.5), 4096, 60.0)


def new_metrics(images_seen: int = 0) -> Metrics:
    return Metrics({"version": "0.1.0"}, {"method": 'cut "a\\b"'}, images_seen, target_images=1000, interval=200)


@pytest.fixture
def metrics() -> Metrics:
    return new_metrics()


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    running = serve(metrics, HOST, 0)
    assert running is not None
    yield running
    running.close()


def ask(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def samples(page: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_scrape_equals_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "_PAGE_AGE_SECONDS", 0.0)
    metrics = new_metrics(images_seen=400)
    server = serve(metrics, HOST, 0)
    assert server is not None
    begin = time.time()
    first = samples(ask(server.port)[1])
    assert first["i2i_train_images_total"] == 0
    assert first["i2i_train_images_seen"] == 400
    assert first["i2i_train_skipped_updates_total{side=generator}"] == 0

    metrics.update(record(420, {"g": 2.5, "nce": 1.0}))
    metrics.update(record(460, {"g": math.nan, "nce": math.inf}))
    for domain in "AAB":
        metrics.bad_sample(domain)
    metrics.skipped("generator")
    metrics.checkpoint_saved(7.0, paused=0.25)
    metrics.checkpoint_failed("enospc", paused=0.5)
    found = samples(ask(server.port)[1])
    server.close()
    expected = {
        "i2i_build_info{version=0.1.0}": 1,
        'i2i_run_info{method=cut "a\\b"}': 1,
        "i2i_train_images_total": 60,
        "i2i_train_images_seen": 460,
        "i2i_train_target_images": 1000,
        "i2i_train_updates_total": 4,
        "i2i_train_learning_rate{group=generator}": 2e-4,
        "i2i_train_loss{name=nce}": math.inf,
        "i2i_train_gauge{name=attention_spread}": 0.046,
        "i2i_train_update_duration_seconds_count": 4,
        "i2i_train_update_duration_seconds_sum": pytest.approx(1.6),
        "i2i_train_update_duration_seconds_bucket{le=0.2}": 0,
        "i2i_train_update_duration_seconds_bucket{le=0.5}": 4,
        "i2i_data_wait_seconds_total": pytest.approx(0.16),
        "i2i_data_bad_samples_total{domain=A}": 2,
        "i2i_data_bad_samples_total{domain=B}": 1,
        "i2i_train_skipped_updates_total{side=generator}": 1,
        "i2i_train_skipped_updates_total{side=discriminator}": 0,
        "i2i_checkpoint_duration_seconds_sum": 7.0,
        "i2i_checkpoint_duration_seconds_count": 1,
        "i2i_checkpoint_pause_seconds_sum": 0.75,
        "i2i_checkpoint_failures_total{reason=enospc}": 1,
        "i2i_checkpoint_failures_total{reason=other}": 0,
    }
    assert {name: found[name] for name in expected} == expected
    assert math.isnan(found["i2i_train_loss{name=g}"])
    assert begin <= found["i2i_train_last_update_timestamp_seconds"] <= time.time()
    assert begin <= found["i2i_checkpoint_last_success_timestamp_seconds"] <= time.time()
    assert [value for name, value in found.items() if name.startswith("i2i_memory_bytes{")] == [4096]


def test_names_and_help_follow_the_conventions(metrics: Metrics) -> None:
    metrics.update(record(20, {"g": 1.0}))
    page = generate_latest(metrics.registry).decode()
    families = list(text_string_to_metric_families(page))
    assert len(families) == 23
    for family in families:
        assert family.name.startswith("i2i_")
        assert family.documentation.endswith(".")
        assert not any(word in family.name for word in ("_ms", "_millis", "_minutes", "_kb", "_created", ":"))
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
    counters = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE") and line.endswith("counter")]
    assert counters
    assert all(name.endswith("_total") for name in counters)
    assert len(samples(page)) <= 300


def test_pages(server: MetricsServer) -> None:
    status, body = ask(server.port, "/metrics?name=x")
    assert (status, "i2i_build_info" in body) == (200, True)
    assert ask(server.port, method="HEAD") == (200, "")
    assert ask(server.port, "/")[0] == 404
    assert ask(server.port, "/metrics/../etc/passwd")[0] == 404
    assert ask(server.port, method="POST")[0] == 501


def test_many_scrapers_share_one_rendering(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "_PAGE_AGE_SECONDS", 60.0)
    renderings: list[int] = []

    def render(registry: object) -> bytes:
        renderings.append(1)
        return b"page\n"

    monkeypatch.setattr(prometheus, "generate_latest", render)
    answers: list[tuple[int, str]] = []
    scrapers = [threading.Thread(target=lambda: answers.append(ask(server.port))) for _ in range(50)]
    for scraper in scrapers:
        scraper.start()
    for scraper in scrapers:
        scraper.join()
    assert answers == [(200, "page\n")] * 50
    assert len(renderings) == 1


def test_idle_clients_block_no_scrape(server: MetricsServer) -> None:
    before = threading.active_count()
    idle = [socket.create_connection((HOST, server.port), timeout=5) for _ in range(200)]
    try:
        idle[-1].sendall(b"GET /metr")  # one that stops in the middle of its request
        start = time.monotonic()
        assert ask(server.port)[0] == 200
        assert time.monotonic() - start < 4.0  # far below the 5 s after which silence is cut off anyway
        assert threading.active_count() - before <= prometheus._MAX_CONNECTIONS
        start = time.monotonic()
        assert ask(server.port)[0] == 200
        assert time.monotonic() - start < 1.0
    finally:
        for client in idle:
            client.close()


def test_port_in_use(metrics: Metrics, server: MetricsServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="i2i_dist"):
        second = serve(metrics, HOST, server.port)
    assert second is not None
    assert second.port != server.port
    assert f"http://{HOST}:{second.port}/metrics (port {server.port} is in use" in caplog.text
    assert ask(second.port)[0] == 200
    second.close()
    second.close()
    with pytest.raises(OSError, match="refused"):
        ask(second.port)


def test_all_ports_in_use(
    metrics: Metrics, server: MetricsServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "_PORTS_TRIED", 1)
    with caplog.at_level(logging.INFO, logger="i2i_dist"):
        second = serve(metrics, HOST, server.port)
    assert second is not None
    assert ask(second.port)[0] == 200
    assert "any free one was taken" in caplog.text
    second.close()


def test_unusable_address_is_a_warning(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    assert serve(metrics, "192.0.2.1", 9410) is None
    assert "metrics are off: cannot listen on 192.0.2.1:9410" in caplog.text


def test_failing_page_is_the_scraper_s_problem(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(registry: object) -> bytes:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(prometheus, "generate_latest", fail)
        with pytest.raises(http.client.HTTPException):
            ask(server.port)
    assert ask(server.port)[0] == 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_keep_the_port(metrics: Metrics) -> None:
    server = serve(metrics, HOST, 0)
    assert server is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    server.close()
    again = serve(metrics, HOST, server.port)
    os.close(writing)
    os.waitpid(child, 0)
    assert again is not None
    assert again.port == server.port
    again.close()
