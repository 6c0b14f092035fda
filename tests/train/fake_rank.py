"""What a supervisor sees of a rank, without a trainer: `fake_rank.py LOG until_told|deaf|lost|CODE`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from i2i_dist import supervise


def main(log: Path, what: str) -> int:
    heard: list[int] = []

    def say(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{text}\n")

    def note(number: int, frame: Any) -> None:
        heard.append(number)
        say(f"heard {signal.Signals(number).name}")

    for number in supervise.STOP_SIGNALS:
        signal.signal(number, note)
    supervise.register()
    environment = [os.environ[name] for name in (supervise.VARIABLE, supervise.RESTART, supervise.RESTARTS)]
    say(f"started {os.getpid()} {' '.join(environment)}")
    while what == "deaf" or (what == "until_told" and not heard):
        time.sleep(0.01)
    time.sleep(0.3)  # a second signal finds it saving
    if what == "lost":
        supervise.report_loss()
    code = 75 if heard or what == "lost" else int(what)
    supervise.report(code)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
