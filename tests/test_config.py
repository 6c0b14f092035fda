"""Configurations: each mistake is answered in one message that a person can act on, and nothing else ever comes out."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from i2i_dist import config
from i2i_dist.config import ConfigError, RunConfig
from i2i_dist.methods import METHODS, resolve

ROOT = Path(__file__).resolve().parent.parent
VALID = """\
method: {name: dclgan, lr: 1e-4}
data: {root: datasets/demo, load_size: 64, crop_size: 64}
train: {global_batch: 4}
"""


def write(path: Path, text: str) -> Path:
    (path / "c.yaml").write_text(text, encoding="utf-8")
    return path / "c.yaml"


def message(path: Path, text: str, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(write(path, text), settings)
    return str(caught.value)


def test_what_is_written_arrives(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, VALID))
    assert loaded.data.root == "datasets/demo"
    assert (loaded.data.load_size, loaded.data.flip, loaded.train.global_batch) == (64, True, 4)
    assert loaded.method == {"name": "dclgan", "lr": 1e-4}
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.seed = 3  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------- mistakes in values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("train: {global_batsh: 4}", "train.global_batsh: unknown key; did you mean 'global_batch'?"),
        ("trian: {}", "trian: unknown key; did you mean 'train'?"),
        ("train: {zzz: 4}", "train.zzz: unknown key; known here: global_batch, micro_batch, seed"),
        ("train: {global_batch: '4'}", "train.global_batch: given '4', allowed is a valid integer"),
        ("train: {global_batch: 4.0}", "train.global_batch: given 4.0, allowed is"),
        ("train: {global_batch: true}", "train.global_batch: given True, allowed is a valid integer"),
        ("train: {global_batch: 0}", "train.global_batch: given 0, allowed is greater than 0"),
        ("train: {global_batch: null}", "train.global_batch: given None, allowed is a valid integer"),
        ("train: {seed: -1}", "train.seed: given -1, allowed is greater than or equal to 0"),
        ("train: {seed: 18446744073709551616}", "train.seed: given 18446744073709551616, allowed is less than"),
        (
            "train: {precision: bf61}",
            "train.precision: given 'bf61', allowed is 'auto', 'fp32' or 'bf16'; did you mean",
        ),
        ("train: [1, 2]", "train: given [1, 2], allowed is"),
        ("train:", "train: given None, allowed is"),
        ("engine: {generator_stage: 4}", "engine.generator_stage: given 4, allowed is less than or equal to 3"),
        ("engine: {gradient_clipping: .nan}", "engine.gradient_clipping: given nan, allowed is a finite number"),
        ("engine: {gradient_clipping: .inf}", "engine.gradient_clipping: given inf, allowed is a finite number"),
        ("engine: {gradient_clipping: -1.0}", "engine.gradient_clipping: given -1.0, allowed is"),
        ("output: {metrics_port: 70000}", "output.metrics_port: given 70000, allowed is less than or equal to 65535"),
        ("output: {keep_every_images: 0}", "output.keep_every_images: given 0, allowed is greater than 0"),
        (
            "output: {keep_best: cycle_a, log_every_images: 200, checkpoint_every_images: 100}",
            "output: keep_best compares what is logged between checkpoints, but log_every_images 200 is larger than",
        ),
        ("schedule: {constant_epochs: 0, decay_epochs: 0}", "schedule: constant_epochs and decay_epochs are both 0"),
        ("schedule: {decay_step: epoch_ends}", "did you mean 'epoch_end'?"),
        ("train: {seed: 2020-01-01}", "no plain number or text"),
        ("train: {seed: !!binary aGFsbG8=}", "no plain number or text"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, change: str, expected: str) -> None:
    section = change.partition(":")[0]
    lines = [line for line in VALID.splitlines() if not line.startswith(section)]
    text = message(tmp_path, "\n".join([*lines, change]))
    assert expected in text
    assert len(text.splitlines()) <= 2  # and nothing besides


def test_data_must_fit_together(tmp_path: Path) -> None:
    bad = VALID.replace("load_size: 64", "load_size: 32")
    assert "data: crop_size 64 is larger than load_size 32; lower one of them" in message(tmp_path, bad)
    assert "data.crop_size: given 62, allowed is a multiple of 4" in message(tmp_path, VALID, "data.crop_size=62")


def test_missing_sections_and_keys_are_named(tmp_path: Path) -> None:
    assert "data: missing; it has no default" in message(tmp_path, "method: {name: dclgan}\n")
    assert "data.root: missing; it has no default" in message(tmp_path, "method: {name: dclgan}\ndata: {}\n")


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    text = message(tmp_path, "data: {root: 3, workers: -1, crops: 1}\ntrain: {global_batch: 0}\n")
    for key in (
        "method: missing",
        "data.root: given 3",
        "data.workers: given -1",
        "data.crops: ",
        "train.global_batch",
    ):
        assert key in text
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VALID + "train: {seed: 1}\n", "line 4: the key 'train' is given twice"),
        (VALID + "output: {log_every_images: 1, log_every_images: 2}\n", "the key 'log_every_images' is given twice"),
        ("- a\n- b\n", "holds ['a', 'b']; expected sections: method, data"),
        ("", "holds None; expected sections"),
        ("just text", "holds 'just text'; expected sections"),
        ("3", "holds 3; expected sections"),
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("a: [*x]\n", "anchors and aliases"),
        ("<<: *x\n", "anchors and aliases"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("a: \tb: c\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("a: !!python/name:os.system\n", "is not valid YAML"),
        ("a: 2020-13-45\n", "is not valid YAML"),
        ("? [a, b]\n: 1\n", "keys are names"),
        ("? {a: b}\n: 1\n", "keys are names"),
        ("a: " + "[" * 5000 + "]" * 5000, "is not valid YAML"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ('a: "\\ud800"\n', ""),
        ("a: \x07\n", "is not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    said = message(tmp_path, text)
    assert expected in said
    assert len(said) < 1000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, VALID)
    with pytest.raises(ConfigError, match=r"there is no configuration .*d\.yaml; there are .*c\.yaml"):
        config.load(tmp_path / "d.yaml")
    with pytest.raises(ConfigError, match=r"there is no configuration .*x.d\.yaml$"):
        config.load(tmp_path / "x" / "d.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 17) + 1))
    with pytest.raises(ConfigError, match="has 131073 bytes; a configuration has at most 131072"):
        config.load(tmp_path / "large.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "binary.yaml")


# ---------------------------------------------------------------------------------------------------------------- --set


def test_settings_change_single_keys(tmp_path: Path) -> None:
    settings = [
        "train.global_batch=8", "output.metrics_port=null", "engine.gradient_clipping=1e-1",
        "method.nce_layers=[down1]", "data.flip=false", "data.root=a=b", " train.seed =5", "method.lr=3e-4",
        "train.seed=6",
    ]  # fmt: skip
    loaded = config.load(write(tmp_path, VALID), settings)
    assert (loaded.train.global_batch, loaded.train.seed) == (8, 6)  # the last one of a key counts
    assert loaded.output.metrics_port is None
    assert loaded.engine.gradient_clipping == 0.1
    assert loaded.method == {"name": "dclgan", "lr": 3e-4, "nce_layers": ["down1"]}
    assert (loaded.data.flip, loaded.data.root, loaded.data.load_size) == (False, "a=b", 64)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.global_batch", "expected section.key=value, for example --set train.global_batch=8"),
        ("=3", "expected section.key=value"),
        ("", "expected section.key=value"),
        ("train.seed=[1", "the value is not valid YAML"),
        ("train.seed=*x", "anchors and aliases"),
        ("train.seed=2020-13-45", "the value is not valid YAML"),
        ("train.seed=" + "9" * 5000, "the value is not valid YAML"),
        ("train.seed=" + "[" * 5000, "the value is not valid YAML"),
        ("train.seed={a: 1, a: 2}", "given twice"),
        ("train.sead=1", "train.sead: unknown key; did you mean 'seed'?"),
        ("train.seed.more=1", "train.seed.more: unknown key|given {'more': 1}, allowed is"),
        ("train.global_batch.x=1", "train.global_batch is a value, not a section"),
        ("seed=1", "seed: unknown key"),
        ("train=3", "train: given 3, allowed is"),
        ("train.=3", "train.: unknown key"),
        ("..=3", ": unknown key"),
        ("train.seed=", "train.seed: given None, allowed is"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, setting: str, expected: str) -> None:
    said = message(tmp_path, VALID, setting)
    assert any(part in said for part in expected.split("|")), said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E4", 1e4), ("-2e3", -2e3), ("+1e+2", 100.0), ("2.5e-3", 2.5e-3), ("1.e1", 10.0),
        ("1e", "1e"), ("e5", "e5"), ("1e5x", "1e5x"), ("1", 1), ("0.5", 0.5), ("true", True), ("'1e-4'", "1e-4"),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: Any) -> None:
    found = config.load(write(tmp_path, VALID), [f"method.x={text}"]).method["x"]
    assert found == value
    assert type(found) is type(value)


# ------------------------------------------------------------------------------------------------- methods and presets


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in METHODS for preset in METHODS[name].PRESETS])
def test_presets_resolve_and_what_is_written_wins(name: str, preset: str) -> None:
    """Without a preset it is the first one: `official` wherever there is a released code."""
    default, other = resolve({"name": name})[1], resolve({"name": name, "preset": preset})[1]
    first = "reconstruction" if name == "opgan" else "official"
    assert default == resolve({"name": name, "preset": first})[1]
    assert (default.preset, other.preset) == (first, preset)  # type: ignore[attr-defined]
    for key, value in METHODS[name].PRESETS[preset].items():
        mine = tuple(value) if isinstance(value, list) else value
        assert getattr(other, key) == mine != getattr(default, key)
        kept = resolve({"name": name, "preset": preset, key: getattr(default, key)})[1]
        assert getattr(kept, key) == getattr(default, key)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, "method.name: given nothing, allowed is one of " + ", ".join(sorted(METHODS))),
        ({"name": "dclgun"}, f"'dclgun', allowed is one of {', '.join(sorted(METHODS))}; did you mean 'dclgan'?"),
        ({"name": ["dclgan"]}, "method.name: given ['dclgan'], allowed is one of"),
        (
            {"name": "dclgan", "preset": "papr"},
            "method.preset: given 'papr', allowed is one of official, paper; did you",
        ),
        ({"name": "dclgan", "preset": None}, "method.preset: given nothing"),
        ({"name": "dclgan", "lr_head": 1}, "method.lr_head: unknown key; did you mean 'lr_heads'?"),
        ({"name": "dclgan", "lr": "x"}, "method.lr: given 'x', allowed is a valid number"),
        ({"name": "dclgan", "temperature": 0.0}, "method.temperature: given 0.0, allowed is"),
        ({"name": "dclgan", "nce_layers": []}, "method.nce_layers: given"),
        ({"name": "dclgan", "betas": [0.5]}, "method.betas"),
        ({"name": "dclgan", "lambda_gan": float("nan")}, "method.lambda_gan: given nan"),
        ({"name": "cyclegan", "pool_size": -1}, "method.pool_size: given -1"),
        ({"name": "cyclegan", 3: 4}, "method.3: unknown key"),
    ],
)
def test_mistakes_in_the_method_section(section: dict[Any, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        resolve(section)


# ----------------------------------------------------------------------------------------------------------- round trip


def test_the_docs_name_every_method_and_every_configuration() -> None:
    found = {path.stem: config.load(path).method["name"] for path in (ROOT / "configs").glob("*.yaml")}
    assert set(found.values()) == METHODS.keys()
    rows = [line for line in (ROOT / "docs" / "reproducing.md").read_text().splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", row)}
    assert named == found.keys() - {"demo"}
    chosen = (ROOT / "docs" / "which_method.md").read_text()
    assert set(re.findall(r"\(\.\./i2i_dist/methods/(\w+)\.py\)", chosen)) == METHODS.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_resolve_and_go_round(path: Path, tmp_path: Path) -> None:
    assert_goes_round(config.load(path), tmp_path)


def assert_goes_round(loaded: RunConfig, tmp_path: Path) -> None:
    method = resolve(loaded.method)[1]
    text = config.dump(loaded, method)
    again = config.load(write(tmp_path, text))
    assert resolve(again.method)[1] == method
    assert again.model_dump(exclude={"method"}) == loaded.model_dump(exclude={"method"})
    assert config.dump(again, resolve(again.method)[1]) == text


@pytest.mark.parametrize(
    "root",
    ["a b", "1e5", "1e-4", "true", "null", "3", "2020-01-01", "é/画像", "a: b", "#x", "x'y\"z", "", "~", "\n", "1_0e3"],
)
def test_any_text_goes_round(tmp_path: Path, root: str) -> None:
    loaded = config.load(write(tmp_path, VALID))
    assert_goes_round(loaded.model_copy(update={"data": loaded.data.model_copy(update={"root": root})}), tmp_path)


@pytest.mark.parametrize("number", [1e-4, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, 1e22, 123456789.123456789])
def test_any_number_goes_round(tmp_path: Path, number: float) -> None:
    loaded = config.load(write(tmp_path, VALID))
    changed = loaded.model_copy(update={"method": {"name": "dclgan", "lambda_gan": number, "preset": "paper"}})
    assert_goes_round(changed, tmp_path)


# ----------------------------------------------------------------------------------------------------------------- fuzz

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 0.0, -0.5, 1.5, 1e308, float("nan"), float("inf"), "", "x",
    "auto", "1e-4", "\ud800", "\0", [], [1], [[]], {}, {"a": 1}, {1: 2}, {"root": []}, b"bytes", {1, 2}, ["down1"] * 50,
]  # fmt: skip


def full_tree() -> dict[str, Any]:
    """Return a configuration in which every key of every section stands."""
    loaded = config.validate(RunConfig, yaml.safe_load(VALID.replace("1e-4", "0.0001")))
    tree: dict[str, Any] = yaml.safe_load(config.dump(loaded, resolve(loaded.method)[1]))
    return tree


def mutate(chance: random.Random, tree: dict[str, Any]) -> str:
    section = chance.choice(list(tree))
    node: Any = tree
    if chance.random() < 0.9 and isinstance(tree[section], dict) and tree[section]:
        node = tree[section]
    key = chance.choice(list(node)) if chance.random() < 0.85 else chance.choice(["sead", "", "x.y", 3, None, "name"])
    if chance.random() < 0.15 and key in node:
        del node[key]
        return f"without {key!r}"
    node[key] = copy.deepcopy(chance.choice(STRANGE))
    return f"{key!r}: {node[key]!r}"


def outcome(attempt: Callable[[], BaseModel]) -> str:
    try:
        attempt()
    except ConfigError as error:
        assert str(error).strip()
        return "refused"
    return "valid"


def test_nothing_but_a_configuration_or_an_error_comes_out(tmp_path: Path) -> None:
    counts, whole = {"refused": 0, "valid": 0}, full_tree()
    for number in range(400):
        chance, tree = random.Random(number), copy.deepcopy(whole)
        done = [mutate(chance, tree) for _ in range(chance.choice((1, 1, 1, 3)))]

        def attempt(tree: dict[str, Any] = tree) -> BaseModel:
            return resolve(config.validate(RunConfig, tree).method)[1]

        try:
            result = outcome(attempt)
        except Exception as error:
            raise AssertionError(f"{done} raised {type(error).__name__}: {error}") from error
        counts[result] += 1
    assert min(counts.values()) > 20, counts


def test_damaged_text_is_refused_or_read(tmp_path: Path) -> None:
    text = yaml.safe_dump(full_tree(), sort_keys=False)
    counts = {"refused": 0, "valid": 0}
    for number in range(400):
        chance = random.Random(number)
        characters = list(text)
        for _ in range(chance.choice((1, 1, 1, 5))):
            at = chance.randrange(len(characters))
            characters[at] = chance.choice(
                ["", "\n", "\t", ":", "{", "]", "&", "*", "!", "9", "e", "?", "'", "é", "  "]
            )
        path = write(tmp_path, "".join(characters))
        try:
            counts[outcome(lambda path=path: resolve(config.load(path).method)[1])] += 1
        except Exception as error:
            raise AssertionError(f"seed {number} raised {type(error).__name__}: {error}") from error
    assert min(counts.values()) > 5, counts
