"""The nodes that tests make leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests import needs
from tests.nodes.two_nodes import why_not
from tests.ranks import ROOT

MAKER = """
import sys, time
from pathlib import Path
from tests.nodes.two_nodes import two_nodes

with two_nodes(Path(sys.argv[1]), alias="first") as nodes:
    print(*(node.pid for node in nodes), flush=True)
    time.sleep(1000)
"""


def network(pid: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def test_nothing_is_left_of_nodes_whose_maker_is_killed(tmp_path: Path) -> None:
    if reason := why_not():
        needs.skip(reason)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", MAKER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as maker:
        try:
            assert maker.stdout is not None
            pids = maker.stdout.readline().split()
            assert len({network("self"), *map(network, pids)}) == 3
        finally:
            maker.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"processes {pids} are still there"
        time.sleep(0.05)
