"""Hundreds of ways to spoil a real configuration: each ends in a sentence with the key, and nothing is started.

The mutations are made from the files of configs/ and from what the sections say of their own keys, so that new keys and
methods meet them by themselves. `test_config.py` has what a person might get wrong, with the whole sentence.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from i2i_dist import config
from i2i_dist.config import RunConfig
from i2i_dist.methods import METHODS, resolve
from i2i_dist.train import main
from tests.ranks import ROOT

SECONDS = 5.0  # of the processor, for an answer
FILES = sorted((ROOT / "configs").glob("*.yaml"))


class Mutation(NamedTuple):
    """A text that no run may start from, and what the answer must hold."""

    name: str
    text: str
    answer: str


def whole(path: Path) -> dict[str, Any]:
    """Return the file's configuration with every key of every section."""
    loaded = config.load(path)
    tree: dict[str, Any] = yaml.safe_load(config.dump(loaded, resolve(loaded.method)[1]))
    return json.loads(json.dumps(tree))  # type: ignore[no-any-return]


def section_models(tree: dict[str, Any]) -> dict[str, type[BaseModel]]:
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items() if name != "method"}
    return {"method": METHODS[tree["method"]["name"]].Config} | sections  # type: ignore[return-value]


def out_of_range(model: type[BaseModel], key: str, value: Any) -> Iterator[Any]:
    """Yield values just beyond what the key's own limits allow, and far beyond."""
    real = isinstance(value, float)
    for limit in model.model_fields[key].metadata:
        if isinstance(limit, (Ge, Gt)):
            low = limit.ge if isinstance(limit, Ge) else limit.gt
            yield from (low - 1, -(10**30)) if not real else (low - 1.0, -1e300)
            if isinstance(limit, Gt):
                yield low
        elif isinstance(limit, (Le, Lt)):
            high = limit.le if isinstance(limit, Le) else limit.lt
            yield from (high + 1, 10**30) if not real else (high + 1.0, 1e300)
    if real:
        yield from (math.nan, math.inf)


def of_a_key(model: type[BaseModel], key: str, value: Any, chance: random.Random) -> Iterator[tuple[str, Any]]:
    """Yield values of other types and out of range. A list with a section in it is none of any key's."""
    yield "type", chance.choice([{"a": 1}, [{"a": 1}], [[[]]], {"": None}])
    if isinstance(value, (bool, int, float)):
        yield "text", chance.choice(["x", "", "1", "true", str(value), "é", "\x00"])
        yield "nothing" if not optional(model, key) else "list", [value] if optional(model, key) else None
    if isinstance(value, int) and not isinstance(value, bool):
        yield "fraction", value + 0.5
    if isinstance(value, str):
        yield "number", chance.choice([3, -1.5, True, 10**30])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for number in out_of_range(model, key, value):
            yield "range", number


def optional(model: type[BaseModel], key: str) -> bool:
    return type(None) in getattr(model.model_fields[key].annotation, "__args__", ())


def mutations_of_keys() -> Iterator[Mutation]:
    """Every key of every section; those of the methods in the first of their files, all others in the first of all."""
    done: set[tuple[str, str]] = set()
    for path in FILES:
        written, tree, chance = config.read_tree(path), whole(path), random.Random(path.name)
        for section, model in section_models(tree).items():
            for key, value in tree[section].items():
                owner = tree["method"]["name"] if section == "method" else section
                if (owner, key) in done:
                    continue
                done.add((owner, key))
                for kind, wrong in of_a_key(model, key, value, chance):
                    spoiled = written | {section: written.get(section, {}) | {key: wrong}}
                    text = json.dumps(spoiled) if chance.random() < 0.5 else yaml.safe_dump(spoiled)
                    yield Mutation(f"{path.stem} {section}.{key} {kind}", text, f"{section}.{key}")


def mutations_of_names() -> Iterator[Mutation]:
    """In each file a section that is misspelt, one that is none, a key misspelt, and one that is needed left out."""
    for path in FILES:
        tree, chance = config.read_tree(path), random.Random(path.name)
        section = chance.choice(list(tree))
        wrong = section[:-1] + "_"
        others = {name: keys for name, keys in tree.items() if name != section}
        answer = f"{wrong}: unknown key; did you mean '{section}'?"
        yield Mutation(f"{path.stem} {wrong}", yaml.safe_dump(others | {wrong: tree[section]}), answer)
        none = chance.choice([3, "x", [], [1], True, None])
        yield Mutation(f"{path.stem} {section} none", json.dumps(tree | {section: none}), f"{section}: given {none!r}")
        section = chance.choice([name for name in tree if name != "method"])
        key = chance.choice(list(tree[section]))
        spoiled = tree | {section: tree[section] | {key + "s_": 1}}
        yield Mutation(f"{path.stem} {key}s_", yaml.safe_dump(spoiled), f"{section}.{key}s_: unknown key; did you mean")
        section, key = chance.choice([("data", "root"), ("method", "name")])
        spoiled = tree | {section: {name: value for name, value in tree[section].items() if name != key}}
        yield Mutation(f"{path.stem} without {key}", json.dumps(spoiled), f"{section}.{key}: ")


def bomb() -> str:
    """Return nine levels of nine aliases each: 3 GB of "x" for who follows them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
    return "\n".join(lines)


TEXT = FILES[0].read_text()
OF_THE_FILE = [
    Mutation("aliases that multiply", bomb(), "anchors and aliases"),
    Mutation("a list that holds itself", "data: &a [*a]", "anchors and aliases"),
    Mutation("a section that holds itself", "data: &a {root: *a}", "anchors and aliases"),
    Mutation("a merge of an anchor", "a: &a {root: x}\ndata: {<<: *a}", "anchors and aliases"),
    Mutation("ten megabytes", "#" * (10 << 20) + "\n" + TEXT, "has 10"),
    Mutation("one long list", "data: [" + "1," * (1 << 15) + "]", "data: given [1, 1"),
    Mutation("thousands of keys", "data: {" + ",".join(f"k{i}: 1" for i in range(9_000)) + "}", "data.k0: unknown"),
    Mutation("lists in lists", "data: " + "[" * 20_000, "not valid YAML"),
    Mutation("sections in sections", "data: " + '{"a":' * 90 + "1" + "}" * 90, "data.a: unknown key"),
    Mutation("a program's call", "data: !!python/object/apply:os.system ['touch canary']", "not valid YAML"),
    Mutation("a program's name", "data: !!python/name:os.system", "not valid YAML"),
    Mutation("a type of its own", "data: !x {root: y}", "not valid YAML"),
    Mutation("a date", "train: {seed: 2020-01-01}\n" + "data: {root: x}", "no plain number or text"),
    Mutation("cut in the middle", json.dumps({"data": {"root": "x"}})[:-5], "not valid YAML"),
    Mutation("two documents", "---\ndata: {}\n---\ndata: {}\n", "not valid YAML"),
    Mutation("a tab", "data:\n\troot: x", "not valid YAML"),
    Mutation("a number of 10,000 digits", f"train: {{seed: {'9' * 10_000}}}", "not valid YAML"),
    Mutation("NUL", "data: {root: x\x00}", "not valid YAML"),
    Mutation("a key that is a list", "? [a]\n: 1", "keys are names"),
    Mutation("nothing", "", "expected sections"),
]


def mutations_of_sizes() -> Iterator[Mutation]:
    for path in (FILES[0], ROOT / "configs/matchgan_celeba.yaml"):
        tree = whole(path)
        for section, values, change, answer in (
            ("data", {"crop_size": 16_000}, "huge crop", "data: crop_size 16000 is larger than load_size"),
            ("data", {"crop_size": 24, "load_size": 24}, "small crop", "data.crop_size: given 24"),
            ("data", {"crop_size": 130, "load_size": 130}, "odd crop", "data.crop_size: given 130"),
            ("data", {"load_size": 26}, "crop larger than the picture", "is larger than load_size 26"),
        ):
            yield Mutation(f"{path.stem} {change}", json.dumps(tree | {section: tree[section] | values}), answer)


def test_every_mutation_is_answered_with_its_key_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the launcher's own code answers; not a dry run, for a run must not come further."""
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: pytest.fail("a process group was started"))
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("a GPU was used"))
    monkeypatch.chdir(tmp_path)
    path, wrong = tmp_path / "c.yaml", []
    mutations = [*mutations_of_keys(), *mutations_of_names(), *mutations_of_sizes(), *OF_THE_FILE]
    for mutation in mutations:
        path.write_text(mutation.text, encoding="utf-8")
        begun = time.process_time()
        code = main(["--config", str(path), "--run", str(tmp_path / "run")])
        seconds, said = time.process_time() - begun, capsys.readouterr().err
        fine = code == 2 and seconds < SECONDS and mutation.answer in said and "Traceback" not in said
        if not fine or not said.startswith("train.py: "):
            wrong.append(f"{mutation.name}: exit code {code} after {seconds:.1f} s: {said[:300]!r}")
    assert not wrong, f"{len(wrong)} of {len(mutations)}:\n" + "\n".join(wrong)
    assert len(mutations) > 700
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.yaml"], "neither a run's directory nor a canary"


@pytest.mark.parametrize(
    "model", [*(method.Config for method in METHODS.values()), RunConfig], ids=lambda m: m.__module__
)
def test_every_whole_number_has_a_limit(model: type[BaseModel]) -> None:
    """Without one, a digit too many has networks tried that take hours to build or do not fit any tensor."""
    sections = {"": model.model_json_schema(), **model.model_json_schema().get("$defs", {})}
    numbers = {
        f"{section}.{key}": kind
        for section, schema in sections.items()
        for key, field in schema["properties"].items()
        for kind in field.get("anyOf", [field])
        if kind.get("type") == "integer"
    }
    assert numbers
    assert not {key for key, kind in numbers.items() if not {"maximum", "exclusiveMaximum"} & kind.keys()}


def test_files_that_are_no_text_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"data: \xff\xfe")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in ("folder", "bytes", "loop", "missing"):
        assert main(["--config", str(tmp_path / f"{name}.yaml")]) == 2
        said = capsys.readouterr().err
        assert f"{name}.yaml" in said and "Traceback" not in said


def test_a_process_answers_as_well(tmp_path: Path) -> None:
    """What the others show inside one process, as people start it."""
    path = tmp_path / "c.yaml"
    path.write_text(bomb())
    command = [sys.executable, "launchers/train.py", "--config", str(path), "--run", str(tmp_path / "run")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 2 and "anchors and aliases" in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.yaml"]
