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
from i2i_dist.data.labels import LabelSpace
from i2i_dist.telemetry.heat_maps import heat_map_pictures
from i2i_dist.telemetry.samples import to_uint8
from i2i_dist.translate import main
from tests.fake_methods import Coloured, Edited, Watching, as_method
from tests.updates import small_method

HEIGHT, WIDTH = 21, 30  # in 24 x 32 when padded
SPACE = LabelSpace(["Blond_Hair", "Male", "light", "dark"], exactly_one=[["light", "dark"]])


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


# --------------------------------------------------------------------------------------------------------------- labels


def edited(picture: Path, red: float) -> npt.NDArray[np.uint8]:
    """Return what Edited makes of a picture when its labels weigh so much."""
    return to_uint8(0.5 * normalised(picture) + torch.tensor([red, 0, 0]).view(3, 1, 1))[0]


def test_each_label_has_its_translation(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["--labels", "Blond_Hair=1,light=1", "--labels", "dark=1,Male=0", "--labels", "light=1"]
    assert run(monkeypatch, Edited(SPACE), pictures, *labels) == 0
    weights = {"Blond_Hair+light": 0.4 + 0.1, "dark": 0.05, "light": 0.1}
    assert written(pictures) == {f"{n}_{tag}{s}" for n, s in (("x", ".png"), ("deep/y", ".bmp")) for tag in weights}
    for name, suffix in (("x", ".png"), ("deep/y", ".bmp")):
        for tag, red in weights.items():
            made = pixels(pictures.parent / f"out/{name}_{tag}{suffix}")
            assert np.array_equal(made, edited(pictures / f"{name}{suffix}", red))


def test_one_label_is_named_too(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = LabelSpace(["Male"])
    assert run(monkeypatch, Edited(space), pictures / "x.png", "--labels", "Male=0") == 0
    assert written(pictures / "x.png") == {"x_none.png"}


def test_every_label_and_a_sheet_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 pictures: 16 on the first sheet, two on the next, each in a row with its translations."""
    (tmp_path / "in").mkdir()
    sources = [np.full((64, 64, 3), (10 * number, 0, 128), dtype=np.uint8) for number in range(18)]
    for number, source in enumerate(sources):
        Image.fromarray(source).save(tmp_path / "in" / f"{number:02d}.png")
    kept: list[Any] = []
    monkeypatch.setattr("i2i_dist.sheets.write_grid", lambda *given: kept.append(given))
    assert run(monkeypatch, Edited(SPACE), tmp_path / "in", "--labels", "all") == 0
    red = {"dark": 0.05, "light": 0.1, "Male+dark": 0.25, "Male+light": 0.3}
    red |= {f"Blond_Hair+{tag}": 0.4 + weight for tag, weight in red.items()}
    assert written(tmp_path / "in") == {f"{number:02d}_{tag}.png" for number in range(18) for tag in red}
    assert [path for path, *_ in kept] == [tmp_path / "out" / f"labels-00{number}.png" for number in (1, 2)]
    assert all(list(heads) == ["source", *red] for _, _, heads in kept)
    rows = [to_uint8(images) for _, rows, _ in kept for _, images in rows]
    assert [len(rows) for _, rows, _ in kept] == [16, 2]
    for number, (source, row) in enumerate(zip(sources, rows, strict=True)):
        made = [edited(tmp_path / "in" / f"{number:02d}.png", weight) for weight in red.values()]
        assert np.array_equal(row, np.stack([source, *made]))


def test_a_sheet_of_pictures_of_all_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read has no row; the others are as large as the largest, though never beyond 256 pixels."""
    (tmp_path / "in").mkdir()
    for name, size in (("a", (64, 32)), ("b", (300, 600)), ("c", (8, 8))):
        Image.new("RGB", size, (0, 128, 0)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "aa.png").write_bytes(b"nothing")
    kept: list[Any] = []
    monkeypatch.setattr("i2i_dist.sheets.write_grid", lambda path, rows, heads: kept.extend(rows))
    assert run(monkeypatch, Edited(SPACE), tmp_path / "in", "--labels", "all") == 1
    assert "aa.png: left out: " in capfd.readouterr().err
    assert [tuple(images.shape) for _, images in kept] == [(9, 3, 128, 256), (9, 3, 256, 128), (9, 3, 256, 256)]
    assert all((to_uint8(images[:1])[0] == (0, 128, 0)).all() for _, images in kept)


def test_the_sheet_is_a_picture_of_its_own(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Edited(LabelSpace(["labels", "B"])), pictures, "--labels", "all") == 0
    tags = ("none", "B", "labels", "labels+B")
    results = {f"{n}_{tag}{s}" for n, s in (("x", ".png"), ("deep/y", ".bmp")) for tag in tags}
    assert written(pictures) == {"labels-001.png"} | results
    assert pixels(pictures.parent / "out" / "labels-001.png").shape[1] > 5 * 4 * WIDTH


def test_a_sheet_that_cannot_be_written_is_told(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (pictures.parent / "out" / "labels-001.png" / "full").mkdir(parents=True)
    assert run(monkeypatch, Edited(SPACE), pictures, "--labels", "all") == 1
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and "out/labels-001.png cannot be written: " in err
    assert "2 pictures translated" in out and len(written(pictures)) == 16


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
        (Watching(), "--labels Male=1", "--labels: Watching does not translate into labels; leave it out"),
        (Coloured(), "--labels all", "--labels: Coloured does not translate into labels; leave it out"),
        (
            Edited(SPACE),
            "",
            "--labels is missing: Edited .* of Blond_Hair, Male, light, dark \\(exactly one of light, dark\\); "
            "write for example --labels Blond_Hair=1,Male=1,light=1, or --labels all",
        ),
        (Edited(LabelSpace(["red hair"])), "", "attributes, of red hair; write for example --labels 'red hair=1', or"),
        (Edited(SPACE), "--labels all --samples 2", "--samples: Edited makes one translation for each of --labels; l"),
        (Edited(SPACE), "--labels all --style IN/x.png", "--style: Edited makes one translation for each of --labels"),
        (Edited(SPACE), "--labels all --encoded IN", "--encoded: Edited makes one translation"),
        (Edited(SPACE), "--labels all --attention", "--attention: Edited makes one translation for each of --labels"),
        (Edited(SPACE), "--attention", "--attention: Edited makes one translation for each of --labels; leave it out"),
        (Edited(SPACE), "--labels all --seed 1", "--seed: it is what --samples draws its codes from"),
        (Edited(SPACE), "--labels Mole=1,dark=1", "--labels Mole=1,dark=1: no attribute .* did you mean 'Male'"),
        (
            Edited(SPACE),
            "--labels Male=1",
            "--labels Male=1: given 1 for none of them; allowed is exactly one of light, dark",
        ),
        (Edited(SPACE), "--labels all --labels dark=1", "--labels all: it stands for every valid label; leave out"),
        (
            Edited(SPACE),
            "--labels dark=1 --labels dark=1,Male=0",
            "--labels: 2 results of each picture would be called NAME_dark; leave one",
        ),
        (Edited(LabelSpace("abcdef")), "--labels all", "there are 64 valid labels, allowed are at most 32; name those"),
        (Edited(SPACE), "--labels all --direction b_to_a", "given 'b_to_a', but .* translates a_to_b only"),
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
        (
            Edited(LabelSpace(["a", "a_a"])),
            ("x.png", "x_a.png"),
            "--labels a_a=1 --labels a=1",
            "x_a_a.png",
        ),
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
