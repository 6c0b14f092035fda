"""Prometheus metrics of one process, and the small HTTP server that shows them."""

from __future__ import annotations

import errno
import logging
import os
import socket
import socketserver
import threading
import time
import weakref
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

from i2i_dist.telemetry.record import CHECKPOINT_FAILURES, UpdateRecord, memory_kind

logger = logging.getLogger(__name__)

SIDES = ("generator", "discriminator")

_UPDATE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_PAUSE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_CHECKPOINT_BUCKETS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)

_PORTS_TRIED = 64
_MAX_CONNECTIONS = 32
_CONNECTION_TIMEOUT_SECONDS = 5.0
_PAGE_AGE_SECONDS = 0.5  # rendering takes the GIL from training, so many scrapers share one page
_EVICTION_AGE_SECONDS = 0.1  # a scraper sends its request at once; who is silent for longer may lose its place


class Metrics:
    """All metrics of one process, in a registry of their own.

    Counters count from the start of the process, as Prometheus expects: a counter that resumed below its last scraped
    value would show as a burst of images. The position of the run is the gauge `i2i_train_images_seen`.
    """

    def __init__(
        self, build: Mapping[str, str], run: Mapping[str, str], images_seen: int, target_images: int, interval: int
    ) -> None:
        """Register the metrics.

        Args:
            build: Labels of `i2i_build_info`: versions and backends. No paths, no secrets.
            run: Labels of `i2i_run_info`: method, precision and the like. No paths, no secrets.
            images_seen: Images at which this process starts; above 0 when the run resumes.
            target_images: Images at which the run ends.
            interval: Images from one checkpoint to the next.
        """
        # Creation times would double the counters' series.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        registry = self.registry
        Info("i2i_build", "Versions and backends of this process.", registry=registry).info(dict(build))
        Info("i2i_run", "What is being trained.", registry=registry).info(dict(run))
        self._progress(images_seen, target_images)
        self._time_and_data()
        self._checkpoints(interval)

    def _progress(self, images_seen: int, target_images: int) -> None:
        registry = self.registry
        self._position = images_seen
        self._images = Counter("i2i_train_images_total", "Images seen since this process started.", registry=registry)
        self._updates = Counter(
            "i2i_train_updates_total", "Updates made since this process started.", registry=registry
        )
        self._images_seen = Gauge(
            "i2i_train_images_seen", "Images seen since the run's first start.", registry=registry
        )
        self._images_seen.set(images_seen)
        target = Gauge("i2i_train_target_images", "Images at which the run ends.", registry=registry)
        target.set(target_images)
        self._loss = Gauge("i2i_train_loss", "Mean weighted loss since the last record.", ["name"], registry=registry)
        self._learning_rate = Gauge(
            "i2i_train_learning_rate", "Learning rate of a parameter group.", ["group"], registry=registry
        )
        self._gauge = Gauge("i2i_train_gauge", "What is watched beside the losses.", ["name"], registry=registry)
        self._skipped = Counter(
            "i2i_train_skipped_updates_total", "Updates of a side that were not applied.", ["side"], registry=registry
        )
        for side in SIDES:
            self._skipped.labels(side)  # a series that starts at 0 lets rate() see the first skip

    def _time_and_data(self) -> None:
        registry = self.registry
        self._update_duration = Histogram(
            "i2i_train_update_duration_seconds", "Duration of an update.", buckets=_UPDATE_BUCKETS, registry=registry
        )
        self._last_update = Gauge(
            "i2i_train_last_update_timestamp_seconds",
            "Unix time of the last recorded update; of the process's start before the first.",
            registry=registry,
        )
        self._last_update.set_to_current_time()
        # The slowest alone: a series for each of thousands of ranks would be too many.
        self._slowest_rank = Gauge(
            "i2i_train_slowest_rank", "The rank that works slowest by itself.", registry=registry
        )
        self._slowest_score = Gauge(
            "i2i_train_slowest_rank_score",
            "How fast the slowest rank works by itself: 1 is as fast as the others.",
            registry=registry,
        )
        self._slowest_score.set(1.0)
        self._data_wait = Counter(
            "i2i_data_wait_seconds_total", "Time that updates spent waiting for data.", registry=registry
        )
        self._bad_samples = Counter(
            "i2i_data_bad_samples_total", "Samples that could not be used.", ["domain"], registry=registry
        )
        self._worker_restarts = Counter(
            "i2i_data_worker_restarts_total", "Times that a rank's reading processes were replaced.", registry=registry
        )
        self._memory = Gauge(
            "i2i_memory_bytes", "Memory of this process: CUDA peak or resident set.", ["kind"], registry=registry
        )

    def _checkpoints(self, interval: int) -> None:
        registry = self.registry
        images = Gauge("i2i_checkpoint_interval_images", "Images from one checkpoint to the next.", registry=registry)
        images.set(interval)
        self._checkpoint_success = Gauge(
            "i2i_checkpoint_last_success_timestamp_seconds",
            "Unix time of the last published checkpoint; of the process's start before the first.",
            registry=registry,
        )
        self._checkpoint_success.set_to_current_time()
        self._checkpoint_failures = Counter(
            "i2i_checkpoint_failures_total", "Checkpoints that could not be published.", ["reason"], registry=registry
        )
        for reason in CHECKPOINT_FAILURES:
            self._checkpoint_failures.labels(reason)
        self._checkpoint_duration = Histogram(
            "i2i_checkpoint_duration_seconds",
            "Duration of a published checkpoint, from its beginning until it was published.",
            buckets=_CHECKPOINT_BUCKETS,
            registry=registry,
        )
        self._checkpoint_pause = Histogram(
            "i2i_checkpoint_pause_seconds",
            "How long training stood still for a checkpoint.",
            buckets=_PAUSE_BUCKETS,
            registry=registry,
        )

    def update(self, record: UpdateRecord) -> None:
        """Take over the record of a log point."""
        self._images.inc(record.images_seen - self._position)
        self._position = record.images_seen
        self._images_seen.set(record.images_seen)
        self._updates.inc(len(record.update_seconds))
        for seconds in record.update_seconds:
            self._update_duration.observe(seconds)
        self._data_wait.inc(record.data_wait_seconds)
        for name, value in record.losses.items():
            self._loss.labels(name).set(value)
        for group, rate in record.learning_rates.items():
            self._learning_rate.labels(group).set(rate)
        for name, value in record.gauges.items():
            self._gauge.labels(name).set(value)
        self._slowest_rank.set(record.slowest_rank)
        self._slowest_score.set(record.slowest_rank_score)
        self._memory.labels(memory_kind()).set(record.memory_bytes)
        self._last_update.set_to_current_time()

    def bad_sample(self, domain: str) -> None:
        """Count a sample of `domain` that could not be used."""
        self._bad_samples.labels(domain).inc()

    def workers_restarted(self, times: int) -> None:
        """Count that a rank's reading processes were replaced so many times."""
        self._worker_restarts.inc(times)

    def skipped(self, side: str) -> None:
        """Count an update of `side`, "generator" or "discriminator", that was not applied."""
        self._skipped.labels(side).inc()

    def checkpoint_saved(self, seconds: float, paused: float) -> None:
        """Count a checkpoint that was published just now, took `seconds`, and for `paused` of them held training up."""
        self._checkpoint_duration.observe(seconds)
        self._checkpoint_pause.observe(paused)
        self._checkpoint_success.set_to_current_time()

    def checkpoint_failed(self, reason: str, paused: float) -> None:
        """Count a checkpoint that could not be published, for one of `CHECKPOINT_FAILURES`."""
        self._checkpoint_failures.labels(reason).inc()
        self._checkpoint_pause.observe(paused)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of /metrics, one request a connection."""

    server: _Server
    timeout = _CONNECTION_TIMEOUT_SECONDS
    server_version = "i2i_dist"
    sys_version = ""

    def do_GET(self) -> None:
        """Send the page."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Send the page's headers."""
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        self.server.has_asked(self.connection)
        if self.path.split("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is served here")
            return
        page = self.server.page()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if body:
            self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


class _Server(ThreadingHTTPServer):
    """A thread for each connection, up to a cap; beyond it the longest silent connection makes room."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry) -> None:
        self._registry = registry
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._silent: dict[Any, float] = {}  # connections that have not asked yet, oldest first, with their arrival
        self._silent_lock = threading.Lock()
        self._page = b""
        self._page_time = -_PAGE_AGE_SECONDS
        self._page_lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without http.server's look-up of the host's full name, which can hang for seconds on a cluster."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def page(self) -> bytes:
        """Return the metrics as text, at most `_PAGE_AGE_SECONDS` old."""
        with self._page_lock:
            now = time.monotonic()
            if now - self._page_time >= _PAGE_AGE_SECONDS:
                self._page = generate_latest(self._registry)
                self._page_time = now
            return self._page

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; pause where that fails, as the loop would spin while file descriptors are short."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_EVICTION_AGE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread once there is room for it."""
        if not self._make_room():
            self.shutdown_request(request)
            return
        with self._silent_lock:
            self._silent[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve the connection, then give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def has_asked(self, request: Any) -> None:
        """Take a connection that has sent its request off the list of those that may be closed."""
        with self._silent_lock:
            self._silent.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep a client's broken connection off the console."""
        logger.debug("a scrape failed", exc_info=True)

    def _leave(self, request: Any) -> None:
        self.has_asked(request)
        self._slots.release()

    def _make_room(self) -> bool:
        """Take a place, closing silent connections where none is free; False where all stay busy for too long."""
        deadline = time.monotonic() + _CONNECTION_TIMEOUT_SECONDS
        while not self._slots.acquire(blocking=False):
            self._close_oldest_silent()
            if self._slots.acquire(timeout=0.01):
                break
            if time.monotonic() > deadline:
                return False
        return True

    def _close_oldest_silent(self) -> None:
        with self._silent_lock:
            oldest, arrival = next(iter(self._silent.items()), (None, 0.0))
            if oldest is None or time.monotonic() - arrival < _EVICTION_AGE_SECONDS:
                return
            del self._silent[oldest]
            try:
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end of the stream, leaves and closes it
            except OSError:
                logger.debug("a silent connection was gone already")


class MetricsServer:
    """A running exporter.

    Attributes:
        port: The TCP port that it listens on.
    """

    def __init__(self, server: _Server) -> None:
        self._server = server
        self.port = server.server_port
        self._thread = threading.Thread(target=server.serve_forever, name="i2i-metrics", daemon=True)
        self._thread.start()
        _close_in_forked_children(server)

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _close_in_forked_children(server: _Server) -> None:
    """Let no forked worker keep the port: it would outlive a killed parent and block the restarted run's exporter."""
    reference = weakref.ref(server)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.socket.close()

    os.register_at_fork(after_in_child=close)


def serve(metrics: Metrics, host: str, port: int) -> MetricsServer | None:
    """Serve `metrics` at http://host:port/metrics from daemon threads.

    The page is plain text without authentication: bind to 127.0.0.1 unless the network is trusted. Where the port is
    in use, the next free one of 64 is taken, then any free one; the log says which and why.

    Args:
        metrics: What is shown.
        host: Address to bind to.
        port: First port to try; 0 takes any free one.

    Returns:
        The running server, or None where none could be started; the log then says why. Training goes on either way.
    """
    candidates = [*range(port, min(port + _PORTS_TRIED, 65536)), 0] if port else [0]
    for candidate in candidates:
        try:
            server = MetricsServer(_Server((host, candidate), metrics.registry))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            logger.warning("metrics are off: cannot listen on %s:%d (%s)", host, candidate, error)
            return None
        logger.info("metrics: http://%s:%d/metrics%s", host, server.port, _why(port, candidate))
        return server
    logger.warning("metrics are off: %s has no free port", host)
    return None


def _why(asked: int, taken: int) -> str:
    if taken == asked:
        return ""
    if taken == 0:
        return f" (ports {asked} to {asked + _PORTS_TRIED - 1} are in use, so any free one was taken)"
    return f" (port {asked} is in use, so the next free one was taken)"
