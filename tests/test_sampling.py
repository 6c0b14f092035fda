"""Sample grids: which pictures they show, and which rows a method has."""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from i2i_dist import assembly, sampling, styles
from i2i_dist.config import ConfigError, DataConfig, OutputConfig, RunConfig, validate
from i2i_dist.data.folders import open_source
from i2i_dist.data.labels import LabelSpace
from i2i_dist.data.pairs import paired
from i2i_dist.sampling import Sampler
from i2i_dist.telemetry.heat_maps import heat_map_pictures
from tests.fake_methods import Coloured, Edited, Watching, as_method
from tests.updates import small_method

SIZE = 24


def grey(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def values(images: torch.Tensor) -> list[int]:
    """Return the grey of each picture."""
    return [round(value) for value in ((images.mean(dim=(1, 2, 3)) + 1) * 127.5).tolist()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pictures of the same name are grey 10 apart; those of test begin at 100, and their paths sort otherwise."""
    for number in range(4):
        grey(tmp_path / "trainA" / f"{number}.png", number)
        grey(tmp_path / "trainB" / f"{number}.png", number + 10)
    for number, name in enumerate(("0", "1", "2", "2.bx")):
        grey(tmp_path / "testA" / f"{name}.png", number + 100)
        grey(tmp_path / "testB" / f"{name}.{'bmp' if name == '2' else 'png'}", number + 110)
    return tmp_path


def inputs(root: Path, pairs: bool, count: int = 3) -> dict[str, list[int]]:
    config = RunConfig(
        method={"name": "fake"},
        data=DataConfig(root=str(root), load_size=SIZE, crop_size=SIZE),
        output=OutputConfig(sample_images=count),
    )
    a, b = (open_source(root, f"train{domain}") for domain in "AB")
    found = assembly._sample_inputs(config, {"a": a, "b": paired(a, b) if pairs else b}, pairs)
    assert all(images.shape[1:] == (3, SIZE, SIZE) for images in found.values())
    return {domain: values(images) for domain, images in found.items()}


def test_pictures_come_from_the_test_images_and_pairs_stay_pairs(root: Path) -> None:
    assert inputs(root, pairs=False) == {"a": [100, 101, 103], "b": [110, 111, 112]}
    assert inputs(root, pairs=True) == {"a": [100, 101, 103], "b": [110, 111, 113]}
    assert inputs(root, pairs=True, count=32) == {"a": [100, 101, 103, 102], "b": [110, 111, 113, 112]}


def test_what_cannot_be_read_drops_its_partner(root: Path) -> None:
    (root / "testB" / "1.png").write_bytes(b"no picture")
    (root / "testA" / "2.bx.png").write_bytes(b"no picture")
    assert inputs(root, pairs=True) == {"a": [100, 102], "b": [110, 112]}
    assert inputs(root, pairs=False) == {"a": [100, 101, 102], "b": [110, 112, 113]}


@pytest.mark.parametrize("missing", ["file", "picture", "all"])
def test_training_images_stand_in_for_pairs_as_pairs(
    root: Path, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    for path in (root / "testB").iterdir():
        if missing == "picture":
            path.write_bytes(b"no picture")
        elif missing == "all" or path.name == "2.bmp":
            path.unlink()
    with caplog.at_level(logging.WARNING):
        assert inputs(root, pairs=True) == {"a": [0, 1, 2], "b": [10, 11, 12]}
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Sample grids show training images of domain a and b, for ")


def test_a_missing_domain_leaves_the_other_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (root / "testB").iterdir():
        path.unlink()
    assert inputs(root, pairs=False) == {"a": [100, 101, 103], "b": [10, 11, 12]}
    assert caplog.messages[0].startswith("Sample grids show training images of domain b, for ")


def _halve(module: torch.nn.Module) -> None:
    """Stand in for an average that differs from what the replica was built with."""
    for parameter in module.parameters():
        parameter.fill_(0.5)


class Drawn:
    """A sampler over a fake, and the rows that it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fake: Any, count: int = 3, style_count: int = 2) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs = {domain: torch.rand(count, 3, 32, 32, generator=draw) * 2 - 1 for domain in "ab"}
        self.seen: list[int] = []
        monkeypatch.setattr(sampling, "write_grid", lambda path, rows: self.rows.append(dict(rows)))
        self.rows: list[dict[str, torch.Tensor]] = []
        self.side: Any = SimpleNamespace(
            device=torch.device("cpu"), module=fake.generator, autocast=lambda: contextlib.nullcontext()
        )
        average: Any = SimpleNamespace(load_into=_halve)
        for name in ("translate", "attend", "translate_styled", "encode", "translate_labelled"):
            if hasattr(fake, name):
                setattr(fake, name, self._noted(getattr(fake, name)))
        self.sampler = Sampler(as_method(fake), self.side, average, self.inputs, style_count)

    def _noted(self, function: Any) -> Any:
        def noted(image: torch.Tensor, *rest: Any) -> Any:
            self.seen.append(len(image))
            return function(image, *rest)

        return noted

    def sheet(self, path: Path) -> dict[str, torch.Tensor]:
        self.sampler.write(path)
        assert set(self.seen) == {1}, "more memory than a training step"
        return self.rows[-1]


def test_heat_maps_stand_below_each_translation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = Drawn(monkeypatch, Watching())
    kept: list[tuple[str, torch.Tensor]] = []
    monkeypatch.setattr(sampling, "write_grid", lambda path, rows: kept.extend(rows))
    drawn.sampler.write(tmp_path / "sheet.png")
    assert [label for label, _ in kept] == ["A", "A to B", "attention", "B", "B to A", "attention"]
    for place, domain, gain in ((0, "a", 0.5), (3, "b", 0.25)):
        source = drawn.inputs[domain]
        cells = 10 * torch.nn.functional.avg_pool2d(source[:, :1], 4)
        expected = source, -gain * source, heat_map_pictures(cells, (32, 32), (32, 32))
        for (_, images), right in zip(kept[place : place + 3], expected, strict=True):
            assert torch.allclose(images, right, atol=1e-6)
    assert set(drawn.seen) == {1}


@pytest.mark.parametrize("encodes", [True, False])
def test_styles_stand_below_the_true_partner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encodes: bool) -> None:
    drawn = Drawn(monkeypatch, Coloured(encodes), style_count=3)
    sheet = drawn.sheet(tmp_path / "sheet.png")
    assert list(sheet) == ["A", "B", *(["encoded"] if encodes else []), "style 1", "style 2", "style 3"]
    a, b = drawn.inputs["a"], drawn.inputs["b"]
    assert torch.equal(sheet["A"], a) and torch.equal(sheet["B"], b)
    codes = {f"style {n}": code.expand(3, 3) for n, code in enumerate(styles.drawn(0, 3, 3), 1)}
    if encodes:
        codes["encoded"] = b.mean(dim=(2, 3))
    for label, code in codes.items():
        assert torch.allclose(sheet[label], 0.25 * a + 0.1 * code[:, :, None, None], atol=1e-6)
    again = drawn.sheet(tmp_path / "next.png")
    assert all(torch.equal(again[label], sheet[label]) for label in sheet)


def test_each_picture_has_a_row_of_all_its_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    space = LabelSpace(["Male", "light", "dark"], exactly_one=[["light", "dark"]])
    drawn = Drawn(monkeypatch, Edited(space))
    kept: list[Any] = []
    monkeypatch.setattr(sampling, "write_grid", lambda *given: kept.append(given))
    drawn.sampler.write(tmp_path / "deep" / "sheet.png")
    [(path, rows, heads)] = kept
    assert path == tmp_path / "deep" / "sheet.png" and path.parent.is_dir()
    assert heads == ["source", "dark", "light", "Male+dark", "Male+light"]
    assert [label for label, _ in rows] == [""] * 3
    for source, (_, images) in zip(drawn.inputs["a"], rows, strict=True):
        red = torch.tensor([0.1, 0.2, 0.5, 0.6])[:, None, None, None] * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        assert torch.allclose(images, torch.cat([source[None], 0.25 * source + red]), atol=1e-6)
    assert set(drawn.seen) == {1}, "more memory than a training step"


def test_of_many_labels_those_are_shown_that_change_one_thing() -> None:
    few = LabelSpace("abcd")
    assert np.array_equal(sampling.shown_labels(few), few.classes)
    many = LabelSpace("abcdef", at_most_one=["ab"], exactly_one=["df"])
    shown = sampling.shown_labels(many)
    assert [many.text(label.tolist()) for label in shown] == ["f", "a+f", "b+f", "c+f", "d", "e+f"]
    assert (many.numbers(shown) >= 0).all()
    most = LabelSpace([f"n{number}" for number in range(16)])
    assert [most.text(label.tolist()) for label in sampling.shown_labels(most)] == [
        "none",
        *(f"n{number}" for number in range(15)),
    ]


def test_a_paired_method_shows_the_true_partners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = Drawn(monkeypatch, small_method("pix2pix"))
    sheet = drawn.sheet(tmp_path / "sheet.png")
    assert list(sheet) == ["A", "B", "A to B"]
    assert torch.equal(sheet["B"], drawn.inputs["b"])


def test_buffers_are_those_that_training_has_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = Drawn(monkeypatch, fake := small_method("pix2pix"))
    live = copy.deepcopy(fake.generator)
    counted = {name: buffer for name, buffer in live.named_buffers() if "mean" in name}
    assert counted
    for buffer in counted.values():
        buffer.fill_(7)
    drawn.side.module = live
    drawn.sheet(tmp_path / "sheet.png")
    assert all((buffer == 7).all() for name, buffer in fake.generator.named_buffers() if name in counted)


def test_a_sheet_of_the_most_rows_and_columns_is_written(tmp_path: Path) -> None:
    fake = Coloured()
    side: Any = SimpleNamespace(
        device=torch.device("cpu"), module=fake.generator, autocast=lambda: contextlib.nullcontext()
    )
    pictures = {domain: torch.zeros(32, 3, 64, 64) for domain in "ab"}
    average: Any = SimpleNamespace(load_into=lambda module: None)
    Sampler(as_method(fake), side, average, pictures, 16).write(tmp_path / "deep" / "sheet.png")
    assert Image.open(tmp_path / "deep" / "sheet.png").size[1] > 19 * 60


def test_a_sheet_of_the_most_pictures_and_labels_is_written(tmp_path: Path) -> None:
    fake = Edited(LabelSpace([f"An_Attribute_of_a_Long_Name_{number}" for number in range(4)]))
    side: Any = SimpleNamespace(
        device=torch.device("cpu"), module=fake.generator, autocast=lambda: contextlib.nullcontext()
    )
    average: Any = SimpleNamespace(load_into=lambda module: None)
    Sampler(as_method(fake), side, average, {"a": torch.zeros(32, 3, 64, 64)}, 4).write(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[1] > 32 * 64


@pytest.mark.parametrize("count", [0, 17])
def test_the_number_of_styles_is_bounded(count: int) -> None:
    with pytest.raises(ConfigError, match=f"sample_styles: given {count}, allowed is"):
        validate(OutputConfig, {"sample_styles": count})
