"""Imports point one way, and files and functions stay small: enforced over the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "i2i_dist"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launchers").glob("*.py"), ROOT / "setup.py"])

# A part imports itself and parts of earlier tiers, never a neighbour of its own tier.
TIERS = [
    {"draws", "distributed", "exit_codes", "processes", "stacks", "pace"},
    {"supervise"},
    {"stopping", "lifeline"},
    {"config"},
    {"agreement"},
    {"data"},
    {"ops"},
    {"networks", "losses"},
    {"schedules", "pool"},
    {"method"},
    {"methods", "collapse"},
    {"engines"},
    {"ema", "step", "memory"},
    {"replicas"},
    {"telemetry", "checkpoint", "styles"},
    {"run_directory", "sampling", "saver"},
    {"assembly", "translate", "convert"},
    {"reporter", "plan"},
    {"loop"},
    {"train"},
    {"bench", "demo", "studies"},
    {"doctor"},
]
# Several files, one part.
ALIASES = {
    "engine_state": "engines",
    "canonical": "checkpoint",
    "publishing": "checkpoint",
    "retention": "checkpoint",
    "command_line": "run_directory",
    "official": "convert",
    "renderings": "translate",
    "sheets": "translate",
}
# These are functions of tensors: they know neither data nor configuration nor each other.
PURE = {"ops": set(), "networks": {"ops"}, "losses": {"ops"}}


def part_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return ALIASES.get(name, name)


def allowed_for(part: str) -> set[str]:
    if part in PURE:
        return PURE[part] | {part}
    tier = next((i for i, parts in enumerate(TIERS) if part in parts), None)
    assert tier is not None, f"i2i_dist/{part} has no place in the order of imports: add it to TIERS"
    return {part}.union(*TIERS[:tier])


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the absolute dotted name of everything that the file imports, names of `from` imports included."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            yield from (".".join([*filter(None, module), alias.name]) for alias in node.names)


def project_parts(path: Path) -> set[str]:
    """Return the parts of i2i_dist that the file imports."""
    dotted = [name.split(".") for name in imported_modules(path)]
    names = {name[1] for name in dotted if name[0] == "i2i_dist" and len(name) > 1}
    return {ALIASES.get(name, name) for name in names if not name.startswith("__")}


@pytest.mark.parametrize("path", [p for p in FILES if PACKAGE in p.parents], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert project_parts(path) == set()
        return
    wrong = project_parts(path) - allowed_for(part_of(path))
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, which comes after or beside it"


def test_only_the_engines_import_deepspeed() -> None:
    users = {p for p in FILES if any(name.split(".")[0] == "deepspeed" for name in imported_modules(p))}
    assert {p.relative_to(ROOT).as_posix() for p in users} <= {"i2i_dist/engines.py", "i2i_dist/engine_state.py"}


def test_nothing_imports_the_launchers_or_the_tests() -> None:
    for path in FILES:
        assert not {name.split(".")[0] for name in imported_modules(path)} & {"launchers", "tests"}, path


def test_the_rules_notice_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    wrong = tmp_path / "i2i_dist" / "losses" / "wrong.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("def f():\n    from i2i_dist import train\n    from ..networks.blocks import upsample\n")
    assert project_parts(wrong) - allowed_for("losses") == {"train", "networks"}
    assert "losses" not in allowed_for("networks")
    assert "train" not in allowed_for("step")
    assert {"data", "methods", "engines"} <= allowed_for("train")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    special = {PACKAGE / "step.py": 100}
    limit = special.get(path, 250 if path.parent == PACKAGE / "methods" else 400)
    assert len(text.splitlines()) <= limit, f"{path.relative_to(ROOT)} has more than {limit} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines, more than 60"
