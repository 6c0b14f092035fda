"""Translation from checkpoints: pictures of any size and kind come out with their names, in either direction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from i2i_dist import checkpoint, renderings, saver
from i2i_dist import translate as translate_module
from i2i_dist.checkpoint import CheckpointError, State
from i2i_dist.config import ConfigError
from i2i_dist.data.decode import decode_image
from i2i_dist.distributed import rank_and_world
from i2i_dist.ema import Ema
from i2i_dist.engines import Layout, SideEngine
from i2i_dist.method import SIDES, Direction
from i2i_dist.methods import resolve
from i2i_dist.methods.cyclegan import CycleGAN
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep
from i2i_dist.translate import load_method, main, translate
from tests.ranks import run_ranks

SECTION = {"name": "cyclegan", "width": 4, "blocks": 1, "critic_width": 4, "pool_size": 0}


def save_checkpoint(directory: str) -> None:
    """Run on one rank: save a method whose weights and averages differ."""
    method_class, config = resolve(SECTION)
    method = method_class(config, torch.Generator().manual_seed(1))
    layout, groups = Layout(1, 1, rank_and_world()[1]), method.parameter_groups()
    sides = {side: SideEngine(getattr(method, side), groups[side], layout, torch.device("cpu")) for side in SIDES}
    with torch.no_grad():
        for parameter in method.generator.parameters():
            parameter.normal_(0, 0.1)
    ema = Ema(sides["generator"], 1000)
    with torch.no_grad():
        for parameter in method.generator.parameters():
            parameter.add_(0.05)
    state = State(8, 4, 1, {"method": config.model_dump(mode="json")}, {}, {})
    assert saver.write(Path(directory), state, saver.capture(sides, ema), ImagePools((), 0, 0), Keep(1)) is None
    last = {name: value.clone() for name, value in method.generator.state_dict().items()}
    ema.load_into(method.generator)
    torch.save({"last": last, "ema": method.generator.state_dict()}, Path(directory).parent / "expected.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    run_ranks(1, "tests.test_translate:save_checkpoint", run, str(run / "checkpoints"))
    return run


@pytest.mark.parametrize("weights", ["ema", "last"])
def test_the_weights_asked_for_are_loaded(run: Path, weights: str) -> None:
    expected = torch.load(run / "expected.pt", weights_only=True)
    assert not torch.equal(expected["ema"]["generator_ab.stem.weight"], expected["last"]["generator_ab.stem.weight"])
    for path in (run, run / "checkpoints", run / "checkpoints" / checkpoint.directory_name(8)):
        loaded = load_method(path, weights).generator.state_dict()  # type: ignore[arg-type]
        assert loaded.keys() == expected[weights].keys()
        assert all(torch.equal(loaded[name], expected[weights][name]) for name in loaded)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 46), (9, 8), (31, 64)])
def test_any_size_comes_out_as_it_went_in(run: Path, height: int, width: int) -> None:
    method = load_method(run)
    image = torch.randint(256, (height, width, 3), dtype=torch.uint8)
    output = translate(method, image, "a_to_b")
    assert output.shape == (1, 3, height, width)
    if height % 4 == width % 4 == 0:  # nothing is padded, so this is the network itself
        with torch.no_grad():
            plain = method.generator.generator_ab(image.permute(2, 0, 1)[None] / 127.5 - 1)[0]
        assert torch.allclose(output, plain, atol=1e-6)


@pytest.mark.parametrize(("side", "multiple"), [(9, 4), (8, 4), (13, 16), (8, 256), (300, 256)])
def test_padding_reflects_as_often_as_it_takes(side: int, multiple: int) -> None:
    rows = renderings._reflected(side, multiple)
    assert len(rows) % multiple == 0 and 0 <= len(rows) - side < multiple
    expected = torch.arange(side, dtype=torch.float32)[None, None]
    while (missing := len(rows) - expected.size(2)) > 0:
        expected = F.pad(expected, (0, min(missing, expected.size(2) - 1)), mode="reflect")
    assert rows.tolist() == expected[0, 0].int().tolist()


def test_directions_differ(run: Path) -> None:
    method, image = load_method(run), torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    assert not torch.allclose(translate(method, image, "a_to_b"), translate(method, image, "b_to_a"), atol=1e-3)
    with pytest.raises(
        ValueError, match="given 'sideways', but this checkpoint's method translates a_to_b or b_to_a only"
    ):
        translate(method, image, "sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 8"):
        translate(method, image[:4], "a_to_b")


def test_a_direction_that_was_never_learned_is_refused_before_a_picture_is_read(tmp_path: Path) -> None:
    method_class, config = resolve({"name": "cut", "width": 4, "blocks": 1, "critic_width": 4, "nce_layers": ["rgb"]})
    method = method_class(config, torch.Generator().manual_seed(0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="given 'b_to_a', but this checkpoint's method translates a_to_b only"):
        translate_module.translate_all(method, tmp_path / "in", tmp_path / "out", "b_to_a")
    with pytest.raises(ValueError, match="translates a_to_b only"):
        translate(method, torch.zeros(32, 32, 3, dtype=torch.uint8), "b_to_a")


def test_a_folder_keeps_its_names_and_kinds(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(32, 30, 3), dtype=np.uint8)
    for name in ("a.png", "a.bmp", "deep/a.png", "deep/b.jpg", "deep/c.WEBP", "d.tif"):
        Image.fromarray(pixels).save(source / name)
    Image.fromarray(pixels[..., 0]).save(source / "grey.png")
    (source / "broken.png").write_bytes((source / "a.png").read_bytes()[:200])
    assert main([str(run), str(source), str(target), "--direction", "b_to_a"]) == 1
    out, err = capfd.readouterr()
    assert "broken.png: left out: " in err and "Traceback" not in err
    assert "7 pictures had a side that is no multiple of 4: padded by reflection and cropped back" in out
    assert "7 pictures translated" in out and "1 left out" in out
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert names == {"a.png", "a.bmp", "deep/a.png", "deep/b.jpg", "deep/c.WEBP", "d.tif", "grey.png"}
    assert all(decode_image((target / name).read_bytes()).shape == (32, 30, 3) for name in names)
    once = translate(load_method(run), torch.from_numpy(pixels), "b_to_a")
    expected = ((once[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert np.array_equal(decode_image((target / "a.png").read_bytes()), expected.numpy())


def test_one_file(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "x.png")
    assert main([str(run), str(tmp_path / "x.png"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "x.png").is_file()


def test_bad_arguments_are_told_in_a_sentence(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    assert main([str(tmp_path / "nowhere"), str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is no checkpoint and no run directory" in capfd.readouterr().err
    assert main([str(run), str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "no picture there" in capfd.readouterr().err
    assert main([str(run), str(tmp_path), str(tmp_path)]) == 2
    assert "would be replaced" in capfd.readouterr().err
    assert main([str(run), str(tmp_path), str(tmp_path / "deep" / "out")]) == 2
    assert "the next run would translate its pictures again" in capfd.readouterr().err
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("name", "words"), [("picture", "has no suffix"), ("p.dat", "has the suffix '.dat'")])
def test_a_name_that_tells_no_kind_is_left_out(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / name, format="PNG")
    assert main([str(run), str(tmp_path / name), str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    assert f"{name}: left out: the result keeps the name, which {words}; pictures can be written as " in err
    assert ".jpg" in err and ".png" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_picture_that_memory_cannot_hold_is_left_out_alone(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, width in (("a.png", 16), ("b.png", 32), ("c.png", 16)):
        Image.new("RGB", (width, 16)).save(source / name)
    possible = CycleGAN.translate

    def out_of_memory(method: CycleGAN, image: torch.Tensor, direction: Direction) -> torch.Tensor:
        if image.shape[-1] == 32:
            raise torch.OutOfMemoryError("out of memory.\nmore lines")
        return possible(method, image, direction)

    monkeypatch.setattr(CycleGAN, "translate", out_of_memory)
    assert main([str(run), str(source), str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    assert err == f"{source / 'b.png'}: left out: its 32x16 pixels could not be translated: out of memory.\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "images_1"
    damaged.mkdir()
    for path in (run / "checkpoints" / checkpoint.directory_name(8)).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    data = bytearray((damaged / "generator.safetensors").read_bytes())
    data[-100] ^= 1
    (damaged / "generator.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load_method(damaged)
