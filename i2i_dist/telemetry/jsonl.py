"""The log of statistics: one JSON object a line, which survives crashes and follows a resume."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from i2i_dist.telemetry.record import UpdateRecord

logger = logging.getLogger(__name__)


class StatsLog:
    """Appends rows to a JSON Lines file and cuts it back to the point of a resume.

    A row carries "images_seen", the clock of everything, "timestamp_seconds" (Unix time) and "nonfinite", the dotted
    names of the values that were NaN or infinite: JSON knows neither, so they stand as null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, row: UpdateRecord | Mapping[str, object]) -> None:
        """Append one row and hand it to the operating system before returning.

        A disk that refuses the row costs that row and a warning, never the run.

        Args:
            row: A record, or JSON values by name with an int under "images_seen".

        Raises:
            ValueError: "images_seen" is missing or no int.
            TypeError: A value has no JSON form (a tensor, say).
        """
        values: Mapping[str, object] = row._asdict() if isinstance(row, UpdateRecord) else row
        if not isinstance(values.get("images_seen"), int):
            raise ValueError(f"a row of {self.path.name} needs an int under 'images_seen'; its keys are {list(values)}")
        nonfinite: list[str] = []
        # The single durations feed the histogram; in the log their mean is enough.
        finite = {name: _finite(value, name, nonfinite) for name, value in values.items() if name != "update_seconds"}
        line = json.dumps({**finite, "timestamp_seconds": round(time.time(), 3), "nonfinite": nonfinite}) + "\n"
        try:
            self._write(line.encode())
        except OSError as error:
            logger.warning("%s: a row at image %s was lost: %s", self.path, values["images_seen"], error)

    def _write(self, line: bytes) -> None:
        # Opened for each row: no handle to lose over a fork, a rename or a stale network file system.
        with self.path.open("ab", buffering=0) as file:
            whole = file.tell()
            written: int | None = None
            try:
                written = file.write(line)
            finally:
                if written != len(line):
                    # Half a row would swallow the next one; shortening works on a full disk too.
                    with contextlib.suppress(OSError):
                        file.truncate(whole)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")

    def truncate_after(self, images_seen: int) -> int:
        """Drop, in one atomic step, the rows beyond `images_seen` and every row that a crash left torn.

        Returns:
            The number of rows dropped; 0 where there is no file.

        Raises:
            OSError: The file cannot be read or replaced; it is then as it was.
        """
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_row_up_to(line, images_seen)]
        dropped = len(lines) - len(kept)
        if dropped:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with temporary.open("wb") as file:
                file.write(b"".join(kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            logger.info("%s: dropped %d rows beyond image %d", self.path.name, dropped, images_seen)
        return dropped


def _finite(value: object, name: str, nonfinite: list[str]) -> object:
    """Return `value` with NaN and infinity as None, and add their dotted names to `nonfinite`."""
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{name}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{name}.{place}", nonfinite) for place, item in enumerate(value)]
    return value


def _is_row_up_to(line: bytes, images_seen: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:  # covers bytes that are no UTF-8
        return False
    return isinstance(row, dict) and isinstance(row.get("images_seen"), int) and row["images_seen"] <= images_seen
