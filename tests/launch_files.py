"""What the tests read out of the files in launchers/ that are no Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.ranks import ROOT

LAUNCHERS = ROOT / "launchers"


def manifest(name: str) -> dict[str, Any]:
    """Return the one object of a file in launchers/."""
    (found,) = yaml.safe_load_all((LAUNCHERS / name).read_text())
    return dict(found)


def job_set() -> dict[str, Any]:
    return manifest("kubernetes.yaml")


def claim() -> dict[str, Any]:
    return manifest("kubernetes-storage.yaml")


def container_of(job_set: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = job_set["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def option(command: list[str], name: str) -> str:
    """Return the value of the one `--name=value` of a command."""
    (value,) = [word.partition("=")[2] for word in command if word.startswith(f"--{name}=")]
    return value


def pod_command(node_rank: int, **options: object) -> list[str]:
    """Return what a pod runs, with some options changed."""
    command = container_of(job_set())["command"]
    words = [re.sub(r"\$\(NODE_RANK\)", str(node_rank), word) for word in command]
    for name, value in options.items():
        old = f"--{name.replace('_', '-') if name == 'run_dir' else name}="
        if name == "set":  # of several, that of the same key
            old, value = f"{old}{str(value).partition('=')[0]}=", str(value).partition("=")[2]
        (place,) = [at for at, word in enumerate(words) if word.startswith(old)]
        words[place] = f"{old}{value}"
    return words


def sections(definition: Path) -> dict[str, str]:
    """Return the sections of an Apptainer definition, with the arguments' defaults filled in."""
    parts = re.split(r"^%(\w+)\n", definition.read_text(), flags=re.MULTILINE)
    found = dict(zip(["header", *parts[1::2]], parts[::2], strict=True))
    defaults = dict(line.strip().split("=", 1) for line in found["arguments"].splitlines() if line.strip())
    return {name: re.sub(r"{{ (\w+) }}", lambda match: defaults[match[1]], text) for name, text in found.items()}
