"""What `translate.py` makes beside or in place of plain translations, with methods that are reckoned by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from i2i_dist import styles
from i2i_dist import translate as translate_module
from i2i_dist.data.decode import decode_image
from i2i_dist.telemetry.heat_maps import heat_map_pictures
from i2i_dist.telemetry.samples import to_uint8
from i2i_dist.translate import main
from tests.fake_methods import Coloured, Watching, as_method
from tests.updates import small_method

HEIGHT, WIDTH = 21, 30  # in 24 x 32 when padded


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with two pictures, one of them deeper, and beside it one with their partners."""
    rng = np.random.default_rng(0)
    for folder, names in {"in": ("x.png", "deep/y.bmp"), "partners": ("x.tif", "deep/y.png", "spare.png")}.items():
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    return tmp_path / "in"


def run(monkeypatch: pytest.MonkeyPatch, fake: Any, source: Path, *options: str) -> int:
    """Call the program with `fake` in place of the method of a checkpoint; the results are in `out` beside `source`."""
    monkeypatch.setattr(translate_module, "load_method", lambda *_: as_method(fake))
    return main(["checkpoint", str(source), str(source.parent / "out"), *options])


def written(source: Path) -> set[str]:
    target = source.parent / "out"
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}


def normalised(path: Path) -> torch.Tensor:
    return torch.from_numpy(decode_image(path.read_bytes())).permute(2, 0, 1)[None] / 127.5 - 1


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    return decode_image(path.read_bytes())


def coloured(picture: Path, code: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return what Coloured makes of a picture."""
    return to_uint8(0.5 * normalised(picture) + 0.1 * code.view(1, 3, 1, 1))[0]


def reflected(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(image, (0, 32 - WIDTH, 0, 24 - HEIGHT), mode="reflect")


# ------------------------------------------------------------------------------------------------------------ attention


def test_the_heat_map_stands_beside_the_translation(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Watching(), pictures, "--attention") == 0
    names = {f"{name}{end}" for name in ("x", "deep/y") for end in ("_attention.png", "_attention.npy")}
    assert written(pictures) == names | {"x.png", "deep/y.bmp"}
    out, image = pictures.parent / "out", normalised(pictures / "x.png")
    assert np.array_equal(pixels(out / "x.png"), to_uint8(-image)[0])
    cells = 10 * reflected(image)[0, 0].view(6, 4, 8, 4).mean(dim=(1, 3))
    array = np.load(out / "x_attention.npy", allow_pickle=False)
    assert array.dtype == np.float32 and array.shape == (6, 8)
    assert np.allclose(array, cells, atol=1e-4)
    expected = heat_map_pictures(cells[None, None], (24, 32), (HEIGHT, WIDTH))
    assert np.abs(pixels(out / "x_attention.png").astype(int) - to_uint8(expected)[0]).max() <= 4  # one colour further


def test_places_beyond_the_picture_are_no_part_of_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (17, 12)).save(tmp_path / "in" / "x.png")  # 24 x 16 when padded: 6 x 4 places, of which 5 x 3
    assert run(monkeypatch, Watching(), tmp_path / "in", "--attention") == 0
    assert np.load(tmp_path / "out" / "x_attention.npy").shape == (3, 5)
    assert pixels(tmp_path / "out" / "x_attention.png").shape == (12, 17, 3)


@pytest.mark.parametrize(("size", "uneven"), [((16, 16), 0), ((16, 12), 1), ((12, 16), 1)])
def test_padding_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    size: tuple[int, int],
    uneven: int,
) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", size).save(tmp_path / "in" / "x.png")
    assert run(monkeypatch, Watching(), tmp_path / "in", "--attention") == 0
    assert ("1 pictures had a side that is no multiple of 8" in capfd.readouterr().out) == bool(uneven)


# --------------------------------------------------------------------------------------------------------------- styles


def test_without_options_a_picture_has_one_translation(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Coloured(), pictures) == 0
    assert written(pictures) == {"x.png", "deep/y.bmp"}
    assert np.array_equal(pixels(pictures.parent / "out/x.png"), coloured(pictures / "x.png", torch.zeros(3)))


@pytest.mark.parametrize("count", [1, 3])
def test_samples_have_the_same_codes_for_every_picture(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], count: int
) -> None:
    assert run(monkeypatch, Coloured(), pictures, "--samples", str(count), "--seed", "5") == 0
    codes, spread = styles.drawn(5, count, 3), []
    assert written(pictures) == {
        f"{n}_{i:02d}{s}" for n, s in (("x", ".png"), ("deep/y", ".bmp")) for i in range(1, count + 1)
    }
    for name, suffix in (("x", ".png"), ("deep/y", ".bmp")):
        made = [pixels(pictures.parent / f"out/{name}_{number:02d}{suffix}") for number in range(1, count + 1)]
        for picture, code in zip(made, codes, strict=True):
            assert np.array_equal(picture, coloured(pictures / f"{name}{suffix}", code))
        pairs = [(i, j) for i in range(count) for j in range(i)]
        spread += [np.abs(made[i].astype(float) - made[j]).mean() for i, j in pairs]
    out = capfd.readouterr().out
    if count == 1:
        assert "diversity" not in out
    else:
        assert f"diversity {np.mean(spread):.3f}: mean absolute difference" in out and "in [0, 255]" in out


def test_seeds_differ_and_0_is_the_default(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for seed in ([], ["--seed", "0"], ["--seed", "1"]):
        assert run(monkeypatch, Coloured(), pictures / "x.png", "--samples", "1", *seed) == 0
        path = pictures / "out" / "x_01.png"
        made.append(pixels(path))
        path.unlink()
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_a_style_comes_from_a_picture_of_any_size(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "styles").mkdir()
    Image.new("RGB", (9, 50), (255, 0, 127)).save(tmp_path / "styles" / "pink.bmp")
    Image.new("RGB", (64, 8), (0, 255, 0)).save(tmp_path / "styles" / "green.png")
    given = [word for name in ("pink.bmp", "green.png") for word in ("--style", str(tmp_path / "styles" / name))]
    assert run(monkeypatch, Coloured(), pictures, *given, "--samples", "1") == 0
    assert written(pictures) == {
        f"{name}_{tag}{suffix}"
        for name, suffix in (("x", ".png"), ("deep/y", ".bmp"))
        for tag in ("01", "pink", "green")
    }
    for tag, colour in (("pink", (255, 0, 127)), ("green", (0, 255, 0))):
        code = torch.tensor(colour) / 127.5 - 1
        assert np.array_equal(pixels(tmp_path / f"out/x_{tag}.png"), coloured(pictures / "x.png", code))


def test_the_code_of_the_partner_of_the_same_name(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partners = pictures.parent / "partners"
    assert run(monkeypatch, Coloured(), pictures, "--encoded", str(partners)) == 0
    assert written(pictures) == {"x_encoded.png", "deep/y_encoded.bmp"}
    for name, partner in (("x.png", "x.tif"), ("deep/y.bmp", "deep/y.png")):
        code = reflected(normalised(partners / partner)).mean(dim=(2, 3))
        made = (pictures.parent / "out" / name).with_name(name.split("/")[-1].replace(".", "_encoded."))
        assert np.array_equal(pixels(made), coloured(pictures / name, code))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda folder: (folder / "x.tif").unlink(), "partners holds no picture of its name, suffixes aside"),
        (lambda folder: (folder / "x.png").write_bytes(b""), "partners holds 2 pictures of its name, suffixes aside"),
        (lambda folder: (folder / "x.tif").write_bytes(b"no"), "its partner .*x.tif: not an image"),
        (
            lambda folder: Image.new("RGB", (7, 9)).save(folder / "x.tif"),
            "its partner .*x.tif: 7x9 pixels; .* at least 8",
        ),
    ],
)
def test_a_picture_whose_partner_cannot_be_used_is_left_out_alone(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], changes: Any, words: str
) -> None:
    changes(pictures.parent / "partners")
    assert run(monkeypatch, Coloured(), pictures, "--encoded", str(pictures.parent / "partners")) == 1
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and re.search(f"x.png: left out: .*{words}", err)
    assert "1 pictures translated" in out and written(pictures) == {"deep/y_encoded.bmp"}


def test_from_one_code_to_another(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Coloured(), pictures / "x.png", "--samples", "2", "--seed", "3", "--interpolate", "5") == 0
    way = styles.between(*styles.drawn(3, 2, 3), 5)
    for number, code in enumerate(way, 1):
        assert np.array_equal(pixels(pictures / f"out/x_{number:02d}.png"), coloured(pictures / "x.png", code))
    assert written(pictures / "x.png") == {f"x_{number:02d}.png" for number in range(1, 6)}
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    ends = ["--style", str(tmp_path / "b.png"), "--style", str(tmp_path / "a.png")]
    assert run(monkeypatch, Coloured(), pictures, *ends, "--interpolate", "3") == 0
    assert {name for name in written(pictures) if name.startswith("x")} == {f"x_{n:02d}.png" for n in (1, 2, 3)}
    for number, code in ((1, (-1, -1, 1)), (3, (1, -1, -1))):
        expected = coloured(pictures / "x.png", torch.tensor(code, dtype=torch.float32))
        assert np.array_equal(pixels(tmp_path / f"out/x_{number:02d}.png"), expected)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fake", "options", "words"),
    [
        (Coloured(), "--attention", "--attention: Coloured has no heat maps; leave it out"),
        (
            Watching(),
            "--samples 2",
            "--samples: Watching has one translation for a picture, and no codes; leave it out",
        ),
        (Watching(), "--encoded IN", "--encoded: Watching has one translation"),
        (small_method("cyclegan"), "--attention", "--attention: CycleGAN has no heat maps"),
        (small_method("pix2pix"), "--style IN/x.png", "--style: Pix2Pix has one translation"),
        (Coloured(encodes=False), "--style IN/x.png", "--style: the model of this checkpoint has no encoder"),
        (Coloured(encodes=False), "--encoded IN", "--encoded: .* draw codes with --samples N"),
        (Coloured(), "--samples 0", "--samples: given 0, allowed is 1 or more"),
        (Coloured(), "--samples 1 --seed -1", "--seed: given -1, allowed is 0 or more"),
        (Coloured(), "--seed 1", "--seed: .* give --samples N too"),
        (Coloured(), "--samples 2 --interpolate 1", "--interpolate: given 1, allowed is 2 or more"),
        (Coloured(), "--interpolate 3", "--interpolate: .* give either --samples 2 or two --style files"),
        (Coloured(), "--samples 3 --interpolate 3", "there are 3 of --samples and 0 of --style"),
        (Coloured(), "--samples 1 --style IN/x.png --interpolate 3", "there are 1 of --samples and 1 of --style"),
        (Coloured(), "--style IN/none.png", "--style .*none.png: cannot be read: .*; give another picture"),
        (Coloured(), "--style IN/x.png --style IN/./x.png", "2 results of each picture would be called NAME_x; rename"),
        (Coloured(), "--encoded IN/none", "--encoded .*none: no picture there"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fake: Any,
    options: str,
    words: str,
) -> None:
    given = [word.replace("IN", str(pictures)) for word in options.split()]
    assert run(monkeypatch, fake, pictures, *given) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(words, err)
    assert not (pictures.parent / "out").exists()


class Both(Watching, Coloured):
    """A method of both kinds."""


def test_maps_belong_to_plain_translations(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, Both(), pictures, "--attention", "--samples", "2") == 2
    assert "the map of the plain translation; leave out --samples" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fake", "names", "options", "result"),
    [
        (Watching(), ("x.png", "x_attention.png"), "--attention", "x_attention.png"),
        (Watching(), ("x.bmp", "x.png"), "--attention", "x_attention.png"),
        (Coloured(), ("x.png", "x_a.png"), "--style a_a.png --style a.png", "x_a_a.png"),
    ],
)
def test_no_result_replaces_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fake: Any,
    names: tuple[str, str],
    options: str,
    result: str,
) -> None:
    (tmp_path / "in").mkdir()
    for name in (*(f"in/{name}" for name in names), "a.png", "a_a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, fake, tmp_path / "in", *options.split()) == 2
    assert f"both {tmp_path / 'in' / names[0]} and " in (err := capfd.readouterr().err)
    assert f"would be translated into {result}; rename one of them" in err
    assert not (tmp_path / "out").exists()


def test_numbers_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("x.png", "x_01.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    assert run(monkeypatch, Coloured(), tmp_path / "in", "--samples", "1") == 0
    assert written(tmp_path / "in") == {"x_01.png", "x_01_01.png"}
