"""Sheets of samples hold the right pixels and labels, and keep to their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2i_dist.telemetry.samples import MAX_SIDE, to_uint8, write_grid


def constant(count: int, side: int, value: float) -> torch.Tensor:
    return torch.full((count, 3, side, side), value)


def test_bytes_survive_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    images = (values.float() / 127.5 - 1.0).view(256, 1, 1, 1).expand(256, 3, 1, 1)
    array = to_uint8(images)
    assert array.dtype == np.uint8
    assert array.shape == (256, 1, 1, 3)
    assert np.array_equal(array[:, 0, 0, 1], values.numpy())


def test_clamps_rounds_and_shows_nan_as_black() -> None:
    values = torch.tensor([-7.0, 7.0, float("nan"), float("inf"), -float("inf"), 0.6 / 127.5 - 1.0, 0.4 / 127.5 - 1.0])
    array = to_uint8(values.view(-1, 1, 1, 1).expand(-1, 3, 1, 1).to(torch.float32))
    assert array[:, 0, 0, 0].tolist() == [0, 255, 0, 255, 0, 1, 0]


def test_accepts_bfloat16_that_requires_grad() -> None:
    images = torch.ones(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    assert (to_uint8(images) == 255).all()


@pytest.mark.parametrize("images", [torch.zeros(3, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4).byte()])
def test_refuses_other_tensors(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="floating"):
        to_uint8(images)


def test_pixels_and_labels_are_where_they_belong(tmp_path: Path) -> None:
    torch.manual_seed(0)
    real = torch.rand(3, 3, 128, 128) * 2 - 1
    path = tmp_path / "samples" / "sheet.png"
    write_grid(path, [("real A", real), ("A to B", -real)])
    sheet = np.asarray(Image.open(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]
    band = sheet.shape[1] - 3 * 132
    for column in range(3):
        left = band + column * 132
        assert np.array_equal(sheet[4:132, left : left + 128], to_uint8(real)[column])
        assert np.array_equal(sheet[136:264, left : left + 128], to_uint8(-real)[column])
    for top in (4, 136):
        ink = np.argwhere(sheet[top : top + 128, :band].max(axis=2) > 200)
        assert len(ink) > 50  # a legible text ...
        assert abs(ink[:, 0].mean() - 64) < 8  # ... in the middle of its row ...
        assert ink[:, 1].max() < band - 6  # ... clear of the images


def test_heads_stand_above_their_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [("", torch.rand(3, 3, 128, 128) * 2 - 1) for _ in range(2)]
    write_grid(tmp_path / "sheet.png", rows, ["source", "Young", "Long_Attribute+Another_Attribute+C"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 4 + 3 * 132, "no label, no room for it"
    top = sheet.shape[0] - 2 * 132
    for row, (_, images) in enumerate(rows):
        for column, pixels in enumerate(to_uint8(images)):
            left, above = 4 + column * 132, top + row * 132
            assert np.array_equal(sheet[above : above + 128, left : left + 128], pixels)
    ink = sheet[:top].max(axis=2) > 150
    assert not ink[top - 6 :].any() and not ink[:2].any()
    lines = []
    for column in range(3):
        left = 4 + column * 132
        places = np.argwhere(ink[:, left : left + 128])
        assert len(places) > 30 and abs((places[:, 1].min() + places[:, 1].max()) / 2 - 64) < 4  # in the middle
        filled = ink[:, left : left + 128].any(axis=1)
        lines.append(int((filled[1:] & ~filled[:-1]).sum()))
        assert not ink[:, left + 128 : left + 132].any()  # clear of its neighbour
    assert lines == [1, 1, 3]


def test_heads_shrink_rather_than_take_room_from_images(tmp_path: Path) -> None:
    images = constant(17, 256, 1.0)
    write_grid(tmp_path / "sheet.png", [("", images)] * 16, ["An_Attribute_that_has_a_long_name+" * 3] * 17)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert MAX_SIDE * 0.95 < max(sheet.shape) <= MAX_SIDE
    assert (sheet[-204:-4, 4:204] == 255).all()


def test_small_images_are_enlarged_by_whole_pixels(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    write_grid(tmp_path / "sheet.png", [("real", images)])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell = sheet[4:132, -132:-4]
    assert np.array_equal(cell, to_uint8(images)[1].repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize(("count", "rows", "side"), [(3, 2, 2048), (64, 1, 128), (1, 30, 512)])
def test_large_sheets_are_shrunk(tmp_path: Path, count: int, rows: int, side: int) -> None:
    images = constant(1, side, 1.0).expand(count, -1, -1, -1)
    write_grid(tmp_path / "sheet.png", [(f"row {row}", images) for row in range(rows)])
    size = Image.open(tmp_path / "sheet.png").size
    assert MAX_SIDE * 0.95 < max(size) <= MAX_SIDE


def test_rows_of_different_length_and_size(tmp_path: Path) -> None:
    write_grid(tmp_path / "sheet.png", [("a", constant(3, 128, 1.0)), ("b", constant(1, 64, 1.0))])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[136:264, -132:-4] == 40).all()


def test_refuses_what_fits_no_sheet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give fewer"):
        write_grid(tmp_path / "sheet.png", [("a", constant(1000, 16, 0.0))])
    with pytest.raises(ValueError, match="at least one"):
        write_grid(tmp_path / "sheet.png", [])
    assert not list(tmp_path.iterdir())
