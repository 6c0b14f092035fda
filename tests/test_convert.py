"""Official checkpoints in and out: the same outputs, the same bytes, and a sentence for everything that is not one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from i2i_dist import checkpoint, engine_state, ops, saver
from i2i_dist.checkpoint import CheckpointError, directory_name
from i2i_dist.config import ConfigError
from i2i_dist.convert import from_official, main, to_official
from i2i_dist.method import Method
from i2i_dist.methods import METHODS, resolve
from i2i_dist.official import cyclegan, names
from i2i_dist.official.networks import NETWORKS
from i2i_dist.pool import ImagePools
from i2i_dist.retention import Keep
from i2i_dist.run_directory import check_same_run
from i2i_dist.translate import load_method
from i2i_dist.translate import main as translate
from tests import official_bicyclegan, official_matchgan, official_ugatit
from tests import official_networks as net
from tests.official_networks import State, random_state
from tests.ranks import run_ranks

WIDTH = 4
TABLES = (
    net.TABLES | official_matchgan.TABLES | {"bicyclegan": official_bicyclegan.TABLE, "ugatit": official_ugatit.TABLE}
)
Files = dict[str, State]


def official_files(method: str, width: int = WIDTH) -> Files:
    return {name: random_state(table(width), seed) for seed, (name, table) in enumerate(TABLES[method].items())}


def write(files: Files, directory: Path, epoch: str = "latest") -> Path:
    directory.mkdir()
    if any(name.startswith("gen") for name in files):
        torch.save(files, directory / f"selfie2anime_params_{epoch}.pt")
        return directory
    if any(key in state for state in files.values() for key in ("main.0.weight", "encoder.0.weight")):
        for name, state in files.items():
            torch.save(state, directory / f"{'200000' if epoch == 'latest' else epoch}-{name}.ckpt")
        return directory
    for name, state in files.items():
        torch.save(state, directory / f"{epoch}_net_{name}.pth")
    return directory


def read(directory: Path, epoch: str = "latest") -> Files:
    for whole in directory.glob("*.pt"):
        assert whole.name == f"{directory.name}_params_{epoch.zfill(7) if epoch.isdecimal() else epoch}.pt"
        return torch.load(whole, weights_only=True)  # type: ignore[no-any-return]
    numbered = directory.glob(f"{'200000' if epoch == 'latest' else epoch}-?.ckpt")
    if files := {path.stem[-1]: torch.load(path, weights_only=True) for path in numbered}:
        return files
    paths = directory.glob(f"{epoch}_net_*.pth")
    return {path.stem.removeprefix(f"{epoch}_net_"): torch.load(path, weights_only=True) for path in paths}


def both_sides(run: Path) -> Method:
    method = load_method(run)
    checkpoint.fill(checkpoint.find(run), "discriminator", method.discriminator, averaged=False)
    return method


def written(method: str, files: Files) -> Files:
    """Return what comes of files there and back: statistics that nothing reads are those that a norm begins with."""
    if method not in official_matchgan.TABLES:
        return files
    return {name: official_matchgan.idle(state) for name, state in files.items()}


def assert_same_bytes(one: Files, other: Files) -> None:
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert list(state) == list(other[name]), name
        for key, tensor in state.items():
            assert tensor.dtype == other[name][key].dtype and torch.equal(tensor, other[name][key]), (name, key)


def assert_close(ours: Any, expected: Tensor) -> None:
    assert expected.abs().max() > 0.1, "outputs near 0 would prove nothing"
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the same


@pytest.fixture(params=sorted(TABLES))
def converted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Files, Path]:
    files = official_files(request.param)
    assert main(["--from", request.param, str(write(files, tmp_path / "official")), str(tmp_path / "run")]) == 0
    return request.param, files, tmp_path / "run"


def test_the_tables_cover_every_method_that_is_converted() -> None:
    assert NETWORKS.keys() == TABLES.keys() <= METHODS.keys()
    assert all(NETWORKS[method].keys() == TABLES[method].keys() for method in TABLES)


@pytest.mark.parametrize("method", sorted(TABLES))
def test_full_size_files_have_these_keys_and_shapes(method: str) -> None:
    """At full width, where nothing is computed; the widths are those that a configuration has by default."""
    method_class, config = resolve({"name": method})
    with torch.device("meta"):
        template = method_class(config, torch.Generator())
    for name, network in NETWORKS[method].items():
        side, _, inner = network.place.partition(".")
        ours = getattr(template, side).get_submodule(inner).state_dict()
        found, expected_names = {}, names.names(network.tree(config), ours)
        for key, place in expected_names.tensors.items():
            there = place.value if isinstance(place, names.Idle) else ours[place] if isinstance(place, str) else place
            shape = () if there is None else tuple(there.shape)
            found[key] = (1, *shape, 1, 1) if key in expected_names.columns else shape
        expected = TABLES[method][name](64)
        assert found == expected and list(found) == list(expected), name
        assert {place for place in expected_names.tensors.values() if type(place) is str} == set(ours)


def test_the_tables_have_the_published_numbers_of_parameters() -> None:
    buffers = ("filt", "running_mean", "running_var", "num_batches_tracked", "weight_u", "weight_v")

    def count(table: Callable[..., net.Shapes], **form: Any) -> int:
        tensors = {key: torch.empty(shape, device="meta") for key, shape in table(64, **form).items()}
        return sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(buffers))

    assert count(net.resnet_antialiased) == count(net.resnet_plain) == 11_378_179
    assert count(net.resnet_plain_6_blocks) == 7_837_699
    assert count(net.patchgan_antialiased) == count(net.patchgan_plain) == 2_764_737
    assert count(net.patchgan_batch_norm) == 2_768_705
    assert count(net.unet_256) == 54_413_955
    assert (count(net.heads_of_four), count(net.heads_of_five), count(net.mapping)) == (493_568, 560_384, 10_688)
    u, b = official_ugatit, official_bicyclegan
    assert (count(u.generator), count(u.generator, light=True)) == (278_959_808, 10_589_888)
    assert (count(u.critic, convs=6), count(u.critic, convs=4)) == (53_130_176, 3_290_560)
    assert (count(b.generator), count(b.generator, levels=7)) == (54_794_627, 42_145_155)
    assert (count(b.encoder), count(b.encoder, blocks=3), count(b.critic)) == (2_590_032, 1_344_080, 3_458_978)
    m = official_matchgan
    assert count(m.generator) == count(m.cut_generator) == 8_430_528 and count(m.generator, labels=8) == 8_439_936
    assert (count(m.critic), count(m.critic, matching=True)) == (44_762_048, 44_794_816)
    assert count(m.critic, labels=8, matching=True) == 44_819_392


def test_official_to_ours_to_official_is_the_same_to_the_byte(
    converted: tuple[str, Files, Path], tmp_path: Path
) -> None:
    method, files, run = converted
    assert main(["--to", method, str(run), str(tmp_path / "back"), "--epoch", "200"]) == 0
    assert_same_bytes(written(method, files), read(tmp_path / "back", "200"))


def test_the_next_conversion_is_the_same_checkpoint(converted: tuple[str, Files, Path], tmp_path: Path) -> None:
    method, _, run = converted
    to_official(method, run, tmp_path / "back")
    from_official(method, tmp_path / "back", tmp_path / "again")
    for side in ("generator", "discriminator"):
        first, second = (
            r / "checkpoints" / directory_name(0) / f"{side}.safetensors" for r in (run, tmp_path / "again")
        )
        assert first.read_bytes() == second.read_bytes()


def features_at(taps: list[Tensor], count: int) -> list[Tensor]:
    """Sample `count` places of each feature map [1, C, h, w]: [1, P, C]."""
    generator = torch.Generator().manual_seed(3)
    places = [torch.randperm(tap[0, 0].numel(), generator=generator)[:count] for tap in taps]
    return [tap.flatten(2)[:, :, ids].transpose(1, 2) for tap, ids in zip(taps, places, strict=True)]


@torch.no_grad()
def check_both_ways(ours: Method, files: Files, antialiased: bool) -> dict[str, list[Tensor]]:
    """Compare generators and critics, and return the feature maps of each official generator."""
    torch.manual_seed(0)
    image, taps = torch.randn(2, 3, 32, 40).clamp(-1, 1), {}
    for name, generator in (("G_A", ours.generator.generator_ab), ("G_B", ours.generator.generator_ba)):
        if antialiased:
            expected, taps[name] = net.run_resnet_antialiased(files[name], image)
        else:
            expected = net.run_resnet_plain(files[name], image)
        assert_close(generator(image)[0], expected)
    run_critic = net.run_patchgan_antialiased if antialiased else net.run_patchgan_plain
    # The official D_A judges images of domain B.
    assert_close(ours.discriminator.critic_b(image), run_critic(files["D_A"], image))
    assert_close(ours.discriminator.critic_a(image), run_critic(files["D_B"], image))
    return taps


@torch.no_grad()
def check_heads(generator: Any, head: Any, state: State, taps: list[Tensor]) -> list[Tensor]:
    """Compare what a head makes of its own generator's features, and return it."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 40).clamp(-1, 1)
    layers = ("rgb", "down1", "down2", "block1", "block5")[-len(taps) :]
    _, ours = generator(image, layers, encode_only=True)
    for one, other in zip(ours, taps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    projected = head(features_at([tap[:1] for tap in ours], 12))
    expected = net.run_heads(state, features_at([tap[:1] for tap in taps], 12))
    for one, other in zip(projected, expected, strict=True):
        assert_close(ops.l2_normalize(one, 1e-7), other)
    return expected


def test_cyclegan_computes_what_the_official_networks_do(tmp_path: Path) -> None:
    files = official_files("cyclegan")
    from_official("cyclegan", write(files, tmp_path / "official"), tmp_path / "run")
    check_both_ways(both_sides(tmp_path / "run"), files, antialiased=False)


@pytest.mark.parametrize("method", ["dclgan", "simdcl"])
def test_dclgan_and_simdcl_compute_what_the_official_networks_do(tmp_path: Path, method: str) -> None:
    files = official_files(method)
    from_official(method, write(files, tmp_path / "official"), tmp_path / "run")
    ours = both_sides(tmp_path / "run")
    taps, side = check_both_ways(ours, files, antialiased=True), ours.generator
    # F1 embeds domain A, which the encoder of G_A reads.
    projected = check_heads(side.generator_ab, side.head_a, files["F1"], taps["G_A"][1:])
    check_heads(side.generator_ba, side.head_b, files["F2"], taps["G_B"][1:])
    if method == "simdcl":
        mappings = {"F3": "real_a", "F4": "fake_b", "F5": "real_b", "F6": "fake_a"}
        for name, place in mappings.items():
            with torch.no_grad():
                vector = getattr(side, f"mapping_{place}")(projected)
            assert_close(vector, net.run_mapping(files[name], [layer[0] for layer in projected]))


@torch.no_grad()
def test_cut_computes_what_the_official_networks_do(tmp_path: Path) -> None:
    files = official_files("cut")
    from_official("cut", write(files, tmp_path / "official"), tmp_path / "run")
    ours = both_sides(tmp_path / "run")
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 40).clamp(-1, 1)
    expected, taps = net.run_resnet_antialiased(files["G"], image)
    assert_close(ours.generator.generator_ab(image)[0], expected)
    check_heads(ours.generator.generator_ab, ours.generator.head, files["F"], taps)
    assert_close(ours.discriminator.critic_b(image), net.run_patchgan_antialiased(files["D"], image))


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_pix2pix_computes_what_the_official_networks_do(tmp_path: Path, training: bool) -> None:
    files = official_files("pix2pix")
    from_official("pix2pix", write(files, tmp_path / "official"), tmp_path / "run")
    ours = both_sides(tmp_path / "run")
    torch.manual_seed(0)
    image, unet = torch.randn(1, 3, 256, 512).clamp(-1, 1), ours.generator.generator_ab
    masks = [torch.rand(1, *shape) < 0.5 for shape in unet.dropout_shapes(256, 512)]
    expected = net.run_unet_256(files["G"], image, masks, training)
    for statistics in ("batch", "image") if training else ("running",):
        unet.load_state_dict(load_method(tmp_path / "run").generator.generator_ab.state_dict())
        assert_close(unet(image, masks, statistics), expected)
    if training:
        assert not torch.allclose(expected, net.run_unet_256(files["G"], image, [], training), atol=0.1)
        pair = torch.randn(2, 6, 64, 64).clamp(-1, 1)
        assert_close(ours.discriminator.critic_b(pair), net.run_patchgan_batch_norm(files["D"], pair))


def as_double(state: State) -> State:
    return {key: tensor.double() for key, tensor in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("light", [False, True])
def test_ugatit_computes_what_the_official_networks_do(tmp_path: Path, light: bool) -> None:
    files = official_files("ugatit")
    if light:
        files |= {name: random_state(official_ugatit.generator(WIDTH, light=True), 7) for name in ("genA2B", "genB2A")}
    from_official("ugatit", write(files, tmp_path / "official"), tmp_path / "run")
    # In fp64: the norms of so many layers leave 1e-5 in fp32.
    ours, files = both_sides(tmp_path / "run"), {name: as_double(state) for name, state in files.items()}
    ours.generator.double(), ours.discriminator.double()
    torch.manual_seed(0)
    image = torch.randn(2, 3, *((96, 128) if light else (256, 256)), dtype=torch.float64).clamp(-1, 1)
    for name, direction in (("genA2B", "a_to_b"), ("genB2A", "b_to_a")):
        translation, logits, heat_map = official_ugatit.run_generator(files[name], image)
        made, attended = ours.attend(image, direction)  # type: ignore[attr-defined]
        assert_close(made, translation)
        assert_close(attended, heat_map)
        assert_close(getattr(ours.generator, f"generator_{direction[0]}{direction[-1]}")(image).logits, logits)
    critics = {"disGA": "global_a", "disGB": "global_b", "disLA": "local_a", "disLB": "local_b"}
    for name, place in critics.items():
        critic, state = getattr(ours.discriminator, place), files[name]
        for critic_in_training in (False, True, True):
            state = official_ugatit.iterated(state) if critic_in_training else state
            for verdict, expected in zip(
                critic.train(critic_in_training)(image), official_ugatit.run_critic(state, image), strict=True
            ):
                torch.testing.assert_close(verdict, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dropping", [True, False])
def test_bicyclegan_computes_what_the_official_networks_do(tmp_path: Path, dropping: bool) -> None:
    files = official_files("bicyclegan")
    from_official("bicyclegan", write(files, tmp_path / "official"), tmp_path / "run")
    ours = both_sides(tmp_path / "run")
    torch.manual_seed(0)
    image, code, unet = torch.randn(2, 3, 256, 256).clamp(-1, 1), torch.randn(2, 8), ours.generator.generator_ab
    masks = [torch.rand(2, *shape) < 0.5 for shape in unet.dropout_shapes(256, 256)] if dropping else []
    assert_close(unet(image, code, masks or None), official_bicyclegan.run_generator(files["G"], image, code, masks))
    for one, expected in zip(
        ours.generator.encoder(image), official_bicyclegan.run_encoder(files["E"], image), strict=True
    ):
        assert_close(one, expected)
    for name, place in (("D", "critic_encoded"), ("D2", "critic_random")):
        scales = getattr(ours.discriminator, place)(image)
        for one, expected in zip(scales, official_bicyclegan.run_critic(files[name], image), strict=True):
            assert_close(one, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["stargan", "matchgan"])
def test_stargan_and_matchgan_compute_what_the_official_networks_do(tmp_path: Path, method: str) -> None:
    files = official_files(method)
    from_official(method, write(files, tmp_path / "official"), tmp_path / "run")
    # In fp64: the norms of so many layers leave 1e-5 in fp32.
    ours, files = both_sides(tmp_path / "run"), {name: as_double(state) for name, state in files.items()}
    ours.generator.double(), ours.discriminator.double()
    torch.manual_seed(0)
    image, labels = torch.randn(3, 3, 128, 128).double().clamp(-1, 1), torch.randint(2, (3, 5)).double()
    small = image[:, :, :32, :40]
    expected = official_matchgan.run_generator(files["G"], small, labels)
    assert_close(ours.translate_labelled(small, labels), expected)  # type: ignore[attr-defined]
    assert not torch.allclose(expected, official_matchgan.run_generator(files["G"], small, 1 - labels), atol=0.1)
    pairs = torch.tensor([[0, 1], [2, 0], [1, 2], [1, 0]])
    reading = ours.discriminator.critic(image, pairs)
    for one, other in zip(reading[:2], official_matchgan.run_critic(files["D"], image), strict=True):
        assert_close(one, other)
    if method == "matchgan":
        matches = official_matchgan.run_match(files["D"], image[pairs[:, 0]], image[pairs[:, 1]])
        assert_close(10 * reading.matches, 10 * matches)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    run_ranks(1, "tests.test_translate:save_checkpoint", run, str(run / "checkpoints"))
    return run


@pytest.mark.parametrize("weights", ["ema", "last"])
def test_a_run_of_ours_becomes_official_files(trained: Path, tmp_path: Path, weights: str) -> None:
    assert main(["--to", "cyclegan", str(trained), str(tmp_path / "official"), "--weights", weights]) == 0
    files, ours = read(tmp_path / "official"), load_method(trained, weights)  # type: ignore[arg-type]
    kept = torch.load(trained / "expected.pt", weights_only=True)[weights]
    assert torch.equal(files["G_A"]["model.1.weight"], kept["generator_ab.stem.weight"])
    assert torch.equal(files["G_B"]["model.10.conv_block.5.bias"], kept["generator_ba.blocks.0.conv2.bias"])
    from_official("cyclegan", tmp_path / "official", tmp_path / "back")
    again = load_method(tmp_path / "back").generator.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.generator.state_dict().items())


def test_other_sizes_are_read_off_the_tensors(tmp_path: Path) -> None:
    generator = random_state(net.resnet_plain_6_blocks(6), 0)
    critic = random_state(net.patchgan_plain(2), 1)
    files = {"G_A": generator, "G_B": generator, "D_A": critic}
    from_official("cyclegan", write(files, tmp_path / "official"), tmp_path / "run")
    config = checkpoint.read_state(checkpoint.find(tmp_path / "run")).config["method"]
    assert (config["width"], config["blocks"], config["critic_width"]) == (6, 6, 2)
    with pytest.raises(
        CheckpointError, match=r"latest_net_G_B\.pth .* model\.1\.weight is \[4, 3, 7, 7\] float32 and not"
    ):
        files["G_B"] = random_state(net.resnet_plain_6_blocks(4), 0)
        from_official("cyclegan", write(files, tmp_path / "differing"), tmp_path / "other")


def method_section(run: Path) -> dict[str, Any]:
    section: dict[str, Any] = checkpoint.read_state(checkpoint.find(run)).config["method"]
    return section


def test_sizes_of_ugatit_are_read_off_the_tensors(tmp_path: Path) -> None:
    u = official_ugatit
    files = {
        "genA2B": random_state(u.generator(2, grid=32), 0),
        "disGA": random_state(u.critic(6, convs=5), 1),
        "disLB": random_state(u.critic(6, convs=3), 2),
    }
    files["genA2B"] = {key: tensor for key, tensor in files["genA2B"].items() if ".12." not in key}
    files["genA2B"] = {
        key.replace(".13.", ".12.").replace(".14.", ".13.").replace(".15.", ".14."): tensor
        for key, tensor in files["genA2B"].items()
        if not key.startswith("UpBlock1_4.")
    }
    from_official("ugatit", write(files, tmp_path / "official"), tmp_path / "run")
    section = method_section(tmp_path / "run")
    expected = {"width": 2, "blocks": 3, "light": False, "cam_grid": 32, "critic_width": 6, "preset": "official"}
    assert section | expected | {"global_layers": 6, "local_layers": 4} == section
    from_official("ugatit", write(small_ugatit(0), tmp_path / "light"), tmp_path / "other")
    assert method_section(tmp_path / "other")["light"]


def test_sizes_of_bicyclegan_are_read_off_the_tensors(tmp_path: Path) -> None:
    b = official_bicyclegan
    critic = {key.replace("model_0.", "model."): shape for key, shape in b.critic(6).items() if "model_1" not in key}
    critic["model.0.weight"] = (6, 6, 4, 4)
    files = {
        "G": random_state(b.generator(2, codes=5, levels=7), 0),
        "E": random_state(b.encoder(4, codes=5, blocks=3), 1),
        "D2": random_state(critic, 2),
    }
    from_official("bicyclegan", write(files, tmp_path / "official"), tmp_path / "run")
    expected = {"width": 2, "downs": 7, "style_dim": 5, "encoder_width": 4, "encoder_blocks": 3, "critic_width": 6}
    expected |= {"critic_scales": 1, "critic_layers": 3, "conditional_critic": True, "model": "bicyclegan"}  # type: ignore[dict-item]
    assert method_section(tmp_path / "run") | expected == method_section(tmp_path / "run")
    to_official("bicyclegan", tmp_path / "run", tmp_path / "back")
    assert_same_bytes(files, read(tmp_path / "back"))


# --------------------------------------------------------------------------------------------------- what may differ


def picture(directory: Path) -> Path:
    Image.new("RGB", (16, 16), "red").save(directory / "x.png")
    return directory / "x.png"


def test_generators_alone_are_enough(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {name: state for name, state in official_files("dclgan").items() if name in ("G_A", "G_B")}
    assert main(["--from", "dclgan", str(write(files, tmp_path / "official")), str(tmp_path / "run")]) == 0
    out = capfd.readouterr().out
    assert "not there, and so initialised afresh: D_A, D_B, F1, F2\n" in out
    for direction in ("a_to_b", "b_to_a"):
        arguments = [str(tmp_path / "run"), str(picture(tmp_path)), str(tmp_path / direction)]
        assert translate([*arguments, "--direction", direction]) == 0
    assert main(["--to", "dclgan", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert "not there, and so left out: D_A, D_B, F1, F2\n" in capfd.readouterr().out
    assert_same_bytes(files, read(tmp_path / "back"))


@pytest.mark.parametrize(("name", "direction", "other"), [("G", "a_to_b", "b_to_a"), ("G_B", "b_to_a", "a_to_b")])
def test_one_generator_translates_one_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, direction: str, other: str
) -> None:
    state = official_files("cyclegan")["G_A"]
    assert main(["--from", "cyclegan", str(write({name: state}, tmp_path / "official")), str(tmp_path / "run")]) == 0
    arguments = [str(tmp_path / "run"), str(picture(tmp_path)), str(tmp_path / "out"), "--direction"]
    assert translate([*arguments, direction]) == 0
    (tmp_path / "out" / "x.png").unlink()
    capfd.readouterr()
    assert translate([*arguments, other]) == 2
    assert f"direction: given '{other}', but " in capfd.readouterr().err
    assert not (tmp_path / "out" / "x.png").exists()
    with pytest.raises(ConfigError, match=f"holds a generator for {direction} only$"):
        load_method(tmp_path / "run", direction=other)  # type: ignore[arg-type]


def test_of_ugatit_one_generator_is_enough(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {"genB2A": random_state(official_ugatit.generator(WIDTH, light=True), 0)}
    assert main(["--from", "ugatit", str(write(files, tmp_path / "official")), str(tmp_path / "run")]) == 0
    assert "not there, and so initialised afresh: genA2B, disGA, disGB, disLA, disLB\n" in capfd.readouterr().out
    arguments = [str(tmp_path / "run"), str(picture(tmp_path)), str(tmp_path / "out"), "--direction"]
    assert translate([*arguments, "b_to_a"]) == 0 and (tmp_path / "out" / "x.png").exists()
    assert translate([*arguments, "a_to_b"]) == 2
    assert "holds a generator for b_to_a only" in capfd.readouterr().err
    to_official("ugatit", tmp_path / "run", tmp_path / "back")
    assert_same_bytes(files, read(tmp_path / "back"))


def test_bicyclegan_needs_its_encoder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = official_files("bicyclegan")
    alone = {"G": files["G"], "D": files["D"]}
    err = refused("bicyclegan", write(alone, tmp_path / "alone"), tmp_path, capfd, code=2)
    assert (
        "has no latest_net_E.pth, which bicyclegan translates with beside the generator; such files there: lat" in err
    )
    from_official("bicyclegan", write({"G": files["G"], "E": files["E"]}, tmp_path / "official"), tmp_path / "run")
    arguments = [str(tmp_path / "run"), str(picture(tmp_path)), str(tmp_path / "out")]
    assert translate(arguments) == 0 and (tmp_path / "out" / "x.png").exists()


def small_ugatit(seed: int) -> Files:
    """A generator, and a critic from which the width of those that are not there follows."""
    u = official_ugatit
    return {"genA2B": random_state(u.generator(2, light=True), seed), "disLA": random_state(u.critic(2, convs=4), seed)}


def test_of_several_files_of_ugatit_the_epoch_says_which(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old, new = small_ugatit(1), small_ugatit(2)
    source = write(old, tmp_path / "official", "0100000")
    torch.save(new, source / "selfie2anime_params_latest.pt")
    err = refused("ugatit", source, tmp_path, capfd, code=2)
    assert "has several files that fit: selfie2anime_params_0100000.pt, selfie2anime_params_latest.pt; name one" in err
    for epoch, files in (("100000", old), ("0100000", old), ("latest", new)):
        from_official("ugatit", source, tmp_path / f"run_{epoch}", epoch=epoch)
        to_official("ugatit", tmp_path / f"run_{epoch}", tmp_path / f"back_{epoch}", epoch=epoch)
        assert_same_bytes(files, read(tmp_path / f"back_{epoch}", epoch))
    torch.save(new, source / "another_params_latest.pt")
    with pytest.raises(ConfigError, match=r"several files that fit: another_params_latest\.pt, selfie2anime_params_l"):
        from_official("ugatit", source, tmp_path / "run", epoch="latest")
    with pytest.raises(ConfigError, match=r"has no DATASET_params_0000007\.pt; such files there: another_params_late"):
        from_official("ugatit", source, tmp_path / "run", epoch="7")


def test_parts_of_a_file_that_are_not_read_are_named(tmp_path: Path) -> None:
    files: dict[str, Any] = {**small_ugatit(0), "optimizer": {"lr": 1}}
    notes = from_official("ugatit", write(files, tmp_path / "official"), tmp_path / "run").notes
    assert notes == ("not read, since ugatit has no such network: optimizer",)


def test_another_epoch(tmp_path: Path) -> None:
    source = write(official_files("cyclegan"), tmp_path / "official", "150")
    with pytest.raises(ConfigError, match=r"has no latest_net_G_A\.pth or .*; such files there: 150_net_D_A\.pth, "):
        from_official("cyclegan", source, tmp_path / "run")
    assert from_official("cyclegan", source, tmp_path / "run", epoch="150").absent == ()


def test_the_prefix_of_data_parallel_is_removed(tmp_path: Path) -> None:
    files = official_files("cyclegan")
    wrapped = {name: {f"module.{key}": tensor for key, tensor in state.items()} for name, state in files.items()}
    from_official("cyclegan", write(wrapped, tmp_path / "official"), tmp_path / "run")
    to_official("cyclegan", tmp_path / "run", tmp_path / "back")
    assert_same_bytes(files, read(tmp_path / "back"))


def test_old_statistics_of_instance_norms_are_left_out_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = official_files("cyclegan")
    old = {name: dict(state) for name, state in files.items()}
    for key in ("model.2", "model.10.conv_block.6"):
        old["G_A"] |= {f"{key}.running_mean": torch.zeros(3), f"{key}.running_var": torch.ones(3)}
    old["D_B"]["model.3.num_batches_tracked"] = torch.tensor(5)
    assert main(["--from", "cyclegan", str(write(old, tmp_path / "official")), str(tmp_path / "run")]) == 0
    out = capfd.readouterr().out
    assert "G_A: left out statistics of instance norms, which nothing reads: model.2.running_mean, " in out
    assert "model.10.conv_block.6.running_var\n" in out and "D_B: left out" in out and "G_B: left out" not in out
    to_official("cyclegan", tmp_path / "run", tmp_path / "back")
    assert_same_bytes(files, read(tmp_path / "back"))


def test_old_batch_norms_did_not_count(tmp_path: Path) -> None:
    files = official_files("pix2pix")
    old = {
        name: {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
        for name, state in files.items()
    }
    from_official("pix2pix", write(old, tmp_path / "official"), tmp_path / "run")
    to_official("pix2pix", tmp_path / "run", tmp_path / "back")
    for state in files.values():
        state |= {key: torch.tensor(0) for key in state if key.endswith("num_batches_tracked")}
    assert_same_bytes(files, read(tmp_path / "back"))


def test_the_layers_of_heads_are_told(tmp_path: Path) -> None:
    notes = from_official("dclgan", write(official_files("dclgan"), tmp_path / "official"), tmp_path / "run").notes
    assert (
        "F1: the file does not say which layers of the generator it reads; taken to be down1, down2, block1, block5"
        in notes
    )


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    source = write(official_files("simdcl"), tmp_path / "official")
    (source / "100_net_F3.pth").write_bytes(b"of another epoch")
    notes = from_official("dclgan", source, tmp_path / "run").notes
    names = ", ".join(f"latest_net_F{number}.pth" for number in (3, 4, 5, 6))
    assert notes[-1] == f"not read, since dclgan has no such network: {names}"


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(method: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Convert what must not be converted, and return the sentence; nothing may be left behind."""
    before = sorted(tmp_path.iterdir())
    assert main(["--from", method, str(source), str(tmp_path / "run")]) == code
    out, err = capfd.readouterr()
    assert sorted(tmp_path.iterdir()) == before and not out
    assert err.startswith("convert.py: ") and "Traceback" not in err
    return err


def without(key: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(key)


def with_tensor(key: str, tensor: Tensor) -> Callable[[State], None]:
    return lambda state: state.__setitem__(key, tensor)


@pytest.mark.parametrize(
    ("method", "name", "change", "words"),
    [
        ("dclgan", "G_A", without("model.8.bias"), "latest_net_G_A.pth is not this network; missing: model.8.bias\n"),
        ("dclgan", "G_B", without("model.1.weight"), "latest_net_G_B.pth is not this network; missing: model.1.weig"),
        ("dclgan", "G_A", without("model.7.filt"), "missing: model.7.filt\n"),
        ("dclgan", "F2", without("mlp_3.2.bias"), "latest_net_F2.pth is not this network; missing: mlp_3.2.bias\n"),
        ("dclgan", "D_A", with_tensor("model.17.bias", torch.zeros(3)), "left over: model.17.bias\n"),
        ("dclgan", "D_A", with_tensor("model\r.1", torch.zeros(3)), "left over: 'model\\r.1'\n"),
        ("dclgan", "F1", with_tensor("mlp_4.0.weight", torch.zeros(3)), "left over: mlp_4.0.weight\n"),
        ("dclgan", "G_A", with_tensor("model.3.running_mean", torch.zeros(3)), "left over: model.3.running_mean\n"),
        ("dclgan", "G_A", with_tensor("model.4.weight", torch.zeros(3)),
         "other shapes: model.4.weight is [3] float32 and not [8, 4, 3, 3] float32\n"),
        ("dclgan", "G_A", with_tensor("model.4.bias", torch.zeros(8, dtype=torch.int64)),
         "other shapes: model.4.bias is [8] int64 and not [8] float32\n"),
        ("dclgan", "G_A", with_tensor("model.1.weight", torch.zeros(())), "model.1.weight is [] float32 and not ["),
        ("dclgan", "G_A", with_tensor("model.1.weight", torch.zeros(0, 3, 7, 7)), "no dclgan here has these sizes: "),
        ("dclgan", "G_A", with_tensor("model.7.filt", net.BLUR.repeat(8, 1, 1, 1).flip(0) + 1e-7),
         "other fixed filters: model.7.filt\n"),
        ("dclgan", "G_B", with_tensor("model.25.filt", net.UPSAMPLE.repeat(8, 1, 1, 1) * 0.5),
         "other fixed filters: model.25.filt\n"),
        ("dclgan", "D_B", with_tensor("model.6.filt", torch.full((8, 1, 3, 3), torch.nan)),
         "other fixed filters: model.6.filt\n"),
        ("dclgan", "D_B", with_tensor("model.6.filt", net.BLUR.repeat(9, 1, 1, 1)), "shapes: model.6.filt is [9, 1"),
        ("pix2pix", "D", without("model.6.running_var"), "missing: model.6.running_var\n"),
        ("pix2pix", "D", with_tensor("model.3.num_batches_tracked", torch.zeros(2)),
         "model.3.num_batches_tracked is [2] float32 and not [] int64\n"),
        ("pix2pix", "G", without("model.model.1.model.3.model.5.weight"), "model.model.1.model.3.model.5.weight\n"),
        ("dclgan", "G_A", with_tensor("model.1.bias", torch.zeros(4).half()), "model.1.bias is no dense tensor of fl"),
        ("dclgan", "G_A", with_tensor("model.1.bias", torch.eye(4).to_sparse()), "model.1.bias is no dense tensor"),
        ("dclgan", "G_A", with_tensor("model.1.bias", torch.zeros(1).expand(10**9)), "model.1.bias is no dense tensor"),
        ("dclgan", "G_A", with_tensor("model.1.bias", torch.zeros(4, device="meta")), "model.1.bias is no dense tenso"),
        ("dclgan", "G_A", with_tensor("epoch", 3), "the entry 'epoch' of type int is no tensor with a name"),  # type: ignore[arg-type]
        ("dclgan", "G_A", with_tensor(7, torch.zeros(1)), "the entry 7 of type Tensor is no tensor with a name"),  # type: ignore[arg-type]
        ("dclgan", "F1", lambda state: state.clear(), "latest_net_F1.pth does not hold tensors by name"),
    ],
)  # fmt: skip
def test_a_file_of_another_network_is_refused_by_name(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    method: str,
    name: str,
    change: Callable[[State], None],
    words: str,
) -> None:
    files = official_files(method)
    change(files[name])
    assert words in refused(method, write(files, tmp_path / "official"), tmp_path, capfd)


def test_another_form_of_a_generator_is_refused_with_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, antialiased = official_files("cyclegan"), official_files("dclgan")
    strided = {"G_A": plain["G_A"], "G_B": plain["G_B"]}
    err = refused("dclgan", write(strided, tmp_path / "strided"), tmp_path, capfd)
    assert "it was trained with strided convolutions (--no_antialias), which this method here is not" in err
    filtered = {"G_A": antialiased["G_A"], "G_B": antialiased["G_B"]}
    err = refused("cyclegan", write(filtered, tmp_path / "filtered"), tmp_path, capfd)
    assert "it was trained with fixed filters (anti-aliased), which this method here is not" in err
    assert (
        "missing: model.7.weight, model.7.bias, model.10.conv_block.1.weight" in err
        and "left over: model.7.filt, " in err
    )
    assert ", ... (16 in all)" in err
    unet = {"G": random_state(net.unet_256(2), 0)}  # has no filters either, and is no such generator
    assert "it was trained with" not in refused("cut", write(unet, tmp_path / "unet"), tmp_path, capfd)
    four = random_state({k: s for k, s in net.resnet_antialiased(4).items() if ".conv_block." not in k}, 0)
    four |= random_state(net._blocks(12, 4, 16), 0)
    err = refused("cut", write({"G": four}, tmp_path / "four"), tmp_path, capfd)
    assert "no cut here has these sizes: " in err and "no feature map is called 'block5'" in err


def test_a_part_of_another_network_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def err_of(change: Callable[[Files], None], code: int = 1) -> str:
        files = official_files("ugatit")
        files |= {name: random_state(official_ugatit.generator(2, light=True), 0) for name in ("genA2B", "genB2A")}
        change(files)
        source = write(files, tmp_path / "official")
        err = refused("ugatit", source, tmp_path, capfd, code)
        (source / "selfie2anime_params_latest.pt").unlink()
        source.rmdir()
        return err

    def swap(files: Files) -> None:
        files["disGA"], files["disLA"] = files["disLA"], files["disGA"]

    file = "selfie2anime_params_latest.pt"
    rho = "UpBlock1_2.norm1.rho"
    assert f"{file}: genB2A is not this network; missing: gap_fc.weight\n" in err_of(
        lambda files: files["genB2A"].__delitem__("gap_fc.weight")
    )
    assert f"{file}: genA2B is not this network; other shapes: {rho} is [8] float32 and not [1, 8, 1, 1] fl" in err_of(
        lambda files: files["genA2B"].update({rho: files["genA2B"][rho].flatten()})
    )
    assert f"{file}: disLA is not this network; missing: conv.weight_v\n" in err_of(
        lambda files: files["disLA"].__delitem__("conv.weight_v")
    )
    assert f"{file}: disGB is not this network; left over: model.1.weight\n" in err_of(
        lambda files: files["disGB"].update({"model.1.weight": torch.zeros(1)})
    )
    assert "disGB is not this network; left over: model.13.bias, " in err_of(swap)
    mixed = random_state(official_ugatit.generator(2, grid=8), 0)
    assert "genB2A is not this network; other shapes: FC.0.weight is [8, 512] float32 and not [8, 8] float32" in err_of(
        lambda files: files.update({"genB2A": mixed})
    )
    assert f"{file}: disGA: the entry 'x' of type int is no tensor" in err_of(
        lambda files: files.update({"disGA": {"x": 3}})  # type: ignore[dict-item]
    )
    assert "genA2B does not hold tensors by name, but a list of something else" in err_of(
        lambda files: files.update({"genA2B": [1]})  # type: ignore[dict-item]
    )

    def critics_alone(files: Files) -> None:
        del files["genA2B"], files["genB2A"]
        files["genA2A"] = {}

    assert f"{file} has no genA2B or genB2A, the generators of ugatit; there are: disGA, " in err_of(critics_alone, 2)


def test_generators_of_other_forms_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grey = official_files("bicyclegan") | {"G": random_state(official_bicyclegan.generator(WIDTH, inputs=1), 0)}
    err = refused("bicyclegan", write(grey, tmp_path / "grey"), tmp_path, capfd)
    assert "other shapes: model.down.0.weight is [4, 9, 4, 4] float32 and not [4, 11, 4, 4] float32\n" in err
    shapes = official_ugatit.generator(2, grid=8) | {"FC.0.weight": (8, 8 * 8 * 6)}  # not square
    err = refused("ugatit", write({"genA2B": random_state(shapes, 0)}, tmp_path / "oblong"), tmp_path, capfd)
    assert "other shapes: FC.0.weight is [8, 384] float32 and not [8, 288] float32\n" in err


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_damaged_or_wrong_file_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(official_files("cyclegan"), tmp_path / "official")
    file, good = source / "latest_net_D_B.pth", (source / "latest_net_D_B.pth").read_bytes()
    old = tmp_path / "old"
    torch.save(torch.load(file, weights_only=True), old, _use_new_zipfile_serialization=False)
    legacy = old.read_bytes()
    for content in (b"", b"no checkpoint\n", b"\x80", pickle.dumps([1]), good[:-100], good[: len(good) // 2], good[:4]):
        file.write_bytes(content)
        assert f"{file} is damaged, " in refused("cyclegan", source, tmp_path, capfd)
    for length in range(1, len(legacy), len(legacy) // 97):
        file.write_bytes(legacy[:length])
        assert f"{file} is damaged, " in refused("cyclegan", source, tmp_path, capfd)
    file.write_bytes(legacy)  # the format of PyTorch before 1.6
    from_official("cyclegan", source, tmp_path / "run")


def test_a_file_with_code_in_it_runs_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = official_files("cyclegan")
    files["G_A"]["trap"] = Trap(tmp_path / "sprung")  # type: ignore[assignment]
    source = write(files, tmp_path / "official")
    err = refused("cyclegan", source, tmp_path, capfd)
    assert err == (
        f"convert.py: {source / 'latest_net_G_A.pth'} is damaged, or holds more than tensors, which is not loaded\n"
    )
    torch.load(source / "latest_net_G_A.pth", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap would not have sprung"


def test_arguments_that_fit_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for method, file in (("cut", "G"), ("dclgan", "G_A")):
        err = refused(method, tmp_path / "nowhere", tmp_path, capfd, code=2)
        assert f"is no directory; expected one with files such as latest_net_{file}.pth\n" in err
    source = write(official_files("cyclegan"), tmp_path / "official")
    assert "is no directory" in refused("cut", source / "latest_net_G_A.pth", tmp_path, capfd, code=2)
    err = refused("pix2pix", source, tmp_path, capfd, code=2)
    assert "has no latest_net_G.pth, the generator of pix2pix; such files there: latest_net_D_A.pth, " in err
    err = refused("ugatit", source, tmp_path, capfd, code=2)
    assert "has no DATASET_params_latest.pt; such files there: none" in err
    err = refused("ugatit", tmp_path / "nowhere", tmp_path, capfd, code=2)
    assert "is no directory; expected one with files such as DATASET_params_latest.pt\n" in err
    (tmp_path / "empty").mkdir()
    assert "such files there: none" in refused("dclgan", tmp_path / "empty", tmp_path, capfd, code=2)
    for arguments in (["--from", "munit", "a", "b"], ["a", "b"], ["--from", "cut", "--to", "cut", "a", "b"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_what_is_there_is_never_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(official_files("cyclegan"), tmp_path / "official")
    (tmp_path / "run").mkdir()
    assert "is there already; name a directory that is not" in refused("cyclegan", source, tmp_path, capfd, code=2)
    (tmp_path / "file").write_text("x")
    assert main(["--from", "cyclegan", str(source), str(tmp_path / "file" / "run")]) == 1
    assert "run cannot be written: Not a directory" in capfd.readouterr().err


@pytest.mark.parametrize("way", ["from", "to"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    source = write(official_files("cyclegan"), tmp_path / "official")
    from_official("cyclegan", source, tmp_path / "ours")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr("i2i_dist.publishing._write_text", full)
    before = sorted(tmp_path.iterdir())
    given = source if way == "from" else tmp_path / "ours"
    assert main([f"--{way}", "cyclegan", str(given), str(tmp_path / "run")]) == 1
    assert "No space left on device" in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_to_refuses_what_is_no_checkpoint_of_the_method(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from_official("cyclegan", write(official_files("cyclegan"), tmp_path / "official"), tmp_path / "run")
    assert main(["--to", "dclgan", str(tmp_path / "run"), str(tmp_path / "back")]) == 2
    assert "--to dclgan: " in (err := capfd.readouterr().err) and "is a checkpoint of cyclegan" in err
    assert main(["--to", "dclgan", str(tmp_path / "nowhere"), str(tmp_path / "back")]) == 1
    assert "is no checkpoint and no run directory" in capfd.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "ugatit", "preset": "tensorflow"}, "has bias: True, and the official code of ugatit only knows F"),
        ({"name": "ugatit", "variance": "biased"}, "has variance: biased, and the official code of ugatit only know"),
        ({"name": "bicyclegan", "model": "clr_gan"}, "has model: clr_gan, and the official code of bicyclegan only k"),
        ({"name": "matchgan", "match_head": "difference"}, "has match_head: difference, and the official code of matc"),
        ({"name": "matchgan", "blocks": 3}, "has blocks: 3, and the official code of matchgan only knows multiples o"),
    ],
)  # fmt: skip
def test_to_refuses_a_form_that_the_official_code_lacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], section: dict[str, Any], words: str
) -> None:
    small = {"width": 2, "critic_width": 4} | ({"light": True} if section["name"] == "ugatit" else {})
    method_class, config = resolve(small | section)
    method = method_class(config, torch.Generator().manual_seed(0))
    state = checkpoint.State(0, 0, 1, {"method": config.model_dump(mode="json")}, {}, {})
    captured = {side: engine_state.capture_module(getattr(method, side)) for side in ("generator", "discriminator")}
    assert saver.write(tmp_path / "run" / "checkpoints", state, captured, ImagePools((), 0, 0), Keep(1)) is None
    assert main(["--to", section["name"], str(tmp_path / "run"), str(tmp_path / "back")]) == 2
    assert words in capfd.readouterr().err and not (tmp_path / "back").exists()


def test_no_run_goes_on_from_converted_weights(tmp_path: Path) -> None:
    from_official("cyclegan", write(official_files("cyclegan"), tmp_path / "official"), tmp_path / "run")
    found = checkpoint.find(tmp_path / "run")
    same = {"method": checkpoint.read_state(found).config["method"]}
    with pytest.raises(ConfigError, match=r"made by launchers/convert\.py: .* train into another directory$"):
        check_same_run(found, same, {"a": "fingerprint"}, METHODS["cyclegan"].ARCHITECTURE)


def test_upsampling_is_the_official_filter() -> None:
    """The official filter is not ours by name: the networks here interpolate."""
    filters = cyclegan.resnet(2, 1, antialias=True)
    [first, second] = [leaf for _, leaf in names.leaves(filters) if isinstance(leaf, Tensor) and leaf.size(-1) == 4]
    assert torch.equal(first, net.UPSAMPLE.expand(8, 1, 4, 4)) and torch.equal(second, net.UPSAMPLE.expand(4, 1, 4, 4))
    x = torch.randn(1, 4, 5, 6)
    ours = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, net._upsampled({"k.filt": second}, "k", x))
