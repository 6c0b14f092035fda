"""What is left behind of updates with numbers that are not finite: whose numbers, which losses, which samples."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from i2i_dist.distributed import gather_texts, rank_and_world
from i2i_dist.telemetry.jsonl import StatsLog

FILE_NAME = "bad_updates.jsonl"

_RANKS_NAMED, _KEYS_NAMED = 4, 4  # of each domain; the file has them all

_log = logging.getLogger("i2i_dist.bad_updates")


class BadUpdates:
    """Appends to `bad_updates.jsonl` a row for each bad update and rank that met it, and logs the most of it.

    A row has "images_seen" and "update" after the update, "skipped" (the sides whose step was dropped on all ranks),
    "rank", "met" (the sides in which it met a number that is not finite), "losses" by name (null where not finite),
    "keys" (by domain, of its samples in this update), and "timestamp_seconds" and "nonfinite" as in stats.jsonl. Rows
    stay when a run goes back to an older checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._stats = StatsLog(directory / FILE_NAME) if rank_and_world()[0] == 0 else None

    def note(
        self,
        update: Mapping[str, object],
        met: Sequence[str],
        losses: Mapping[str, float],
        keys: Mapping[str, Sequence[str]],
    ) -> None:
        """Take in an update that was dropped on any side. Collective.

        Args:
            update: What all ranks know: "images_seen", "update" and "skipped".
            met: The sides in which this rank met a number that is not finite.
            losses: This rank's, by name.
            keys: By domain, of this rank's samples in this update.
        """
        mine = {"rank": rank_and_world()[0], "met": met, "losses": losses, "keys": keys}
        texts = gather_texts(json.dumps(mine) if met else "")
        if self._stats is None:
            return
        rows = [json.loads(text) for text in texts if text]
        for row in rows:
            self._stats.append({**update, **row})
        for row in rows[:_RANKS_NAMED]:
            _log.warning("Update %s: rank %d met %s; its samples: %s.", update["update"], row["rank"], *_words(row))
        if len(rows) > _RANKS_NAMED:
            _log.warning("So did %d more ranks; they stand in %s.", len(rows) - _RANKS_NAMED, FILE_NAME)


def _words(row: Mapping[str, Any]) -> tuple[str, str]:
    losses = [name for name, value in row["losses"].items() if not math.isfinite(value)]
    what = f"a loss that is not finite ({', '.join(losses)})"
    if not losses:
        what = f"a gradient of the {' and the '.join(row['met'])} that is not finite, though all its losses are finite"
    return what, ", ".join(f"{domain} {_first(keys)}" for domain, keys in row["keys"].items())


def _first(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
    return " ".join(keys[:_KEYS_NAMED]) + more
