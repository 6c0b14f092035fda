"""Official checkpoints of StarGAN and MatchGAN: what their files do not say, and how they are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from i2i_dist import checkpoint
from i2i_dist.checkpoint import CheckpointError
from i2i_dist.config import ConfigError
from i2i_dist.convert import Attributes, from_official, main, to_official
from i2i_dist.official.matchgan import RAFD
from i2i_dist.translate import main as translate
from tests import official_matchgan as official
from tests.official_networks import State, random_state, resnet_plain

WIDTH = 2


def generator(seed: int = 0, **form: int) -> State:
    return random_state(official.generator(WIDTH, **form), seed)


def write(directory: Path, iteration: int, **networks: State) -> Path:
    directory.mkdir(exist_ok=True)
    for name, state in networks.items():
        torch.save(state, directory / f"{iteration}-{name}.ckpt")
    return directory


def critic(**form: int) -> State:
    """A small one: where there is none, a converted checkpoint has one of full size."""
    return random_state(official.critic(WIDTH, **form), 1)


def section(run: Path) -> dict[str, Any]:
    method: dict[str, Any] = checkpoint.read_state(checkpoint.find(run)).config["method"]
    return method


@pytest.mark.parametrize("method", ["stargan", "matchgan"])
def test_sizes_are_read_off_the_tensors(tmp_path: Path, method: str) -> None:
    table = {"stargan": official.generator, "matchgan": official.cut_generator}[method]
    judging = official.critic(3, labels=8, size=64, convs=4, matching=method == "matchgan")
    networks = {"G": random_state(table(6, labels=8, blocks=4), 0), "D": random_state(judging, 1)}
    from_official(method, write(tmp_path / "official", 1, **networks), tmp_path / "run")
    expected: dict[str, Any] = {"width": 6, "blocks": 4, "critic_width": 3, "critic_layers": 4, "image_size": 64}
    expected |= {"attributes": list(RAFD), "at_most_one": [], "exactly_one": [list(RAFD)], "preset": "official"}
    assert section(tmp_path / "run") | expected == section(tmp_path / "run")


def test_the_latest_iteration_is_read_unless_one_is_named(tmp_path: Path) -> None:
    for iteration, seed in ((90000, 1), (200000, 2), (10000, 3)):
        write(tmp_path / "official", iteration, G=generator(seed), D=critic())
    write(tmp_path / "official", 300000, D=critic())
    (tmp_path / "official" / "latest-G.ckpt").write_bytes(b"no number")
    for epoch, seed in ((None, 2), ("90000", 1)):
        converted = from_official("stargan", tmp_path / "official", tmp_path / f"run_{epoch}", epoch)
        assert converted.networks == ("G", "D") and converted.absent == ()
        to_official("stargan", tmp_path / f"run_{epoch}", tmp_path / f"back_{epoch}", "7")
        back = torch.load(tmp_path / f"back_{epoch}" / "7-G.ckpt", weights_only=True)
        assert torch.equal(back["main.0.weight"], generator(seed)["main.0.weight"])
    with pytest.raises(
        ConfigError, match=r"has no 5-G\.ckpt, the generator of stargan; such files there: 10000-D\.ckpt, "
    ):
        from_official("stargan", tmp_path / "official", tmp_path / "run", "5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no 200000-G\.ckpt, the generator of matchgan; such files there: none$"):
        from_official("matchgan", tmp_path / "empty", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"is no directory; expected one with files such as 200000-G\.ckpt$"):
        from_official("matchgan", tmp_path / "nowhere", tmp_path / "run")


def test_written_files_are_those_that_the_official_code_reads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "official", 3, G=generator(), D=critic())
    assert main(["--from", "stargan", str(source), str(tmp_path / "run")]) == 0
    assert main(["--to", "stargan", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"200000-G.ckpt", "200000-D.ckpt"}
    out = capfd.readouterr().out
    assert "G: statistics of instance norms, which its code does not read, are written as mean 0 and variance 1" in out
    for way in ("--from", "--to"):
        assert main([way, "stargan", str(tmp_path / "run"), str(tmp_path / "x"), "--epoch", "latest"]) == 2
        assert "--epoch: given latest, allowed for stargan is the number of an iteration" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("missing", ["none", "num_batches_tracked", "running_"])
def test_statistics_are_left_out_by_name_and_need_not_be_there(tmp_path: Path, missing: str) -> None:
    """PyTorch 0.4.0, which StarGAN was published with, did not count batches."""
    state = {key: tensor for key, tensor in generator().items() if missing not in key}
    notes = from_official("stargan", write(tmp_path / "official", 3, G=state, D=critic()), tmp_path / "run").notes
    names = (
        "main.1.running_mean, main.1.running_var, main." if missing != "running_" else "main.1.num_batches_tracked, "
    )
    assert notes[0].startswith(f"G: left out statistics of instance norms, which nothing reads: {names}")
    to_official("stargan", tmp_path / "run", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "200000-G.ckpt", weights_only=True)
    expected = official.idle(generator())
    assert list(back) == list(expected)
    assert all(torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("count", "attributes", "groups", "told"),
    [
        (5, None, ([["Black_Hair", "Blond_Hair", "Brown_Hair"]], []),
         "Black_Hair, Blond_Hair, Brown_Hair, Male, Young (at most one of Black_Hair, Blond_Hair, Brown_Hair)"),
        (8, None, ([], [list(RAFD)]), "surprised (exactly one of angry, contemptuous, disgusted, fearful, happy, neu"),
        (5, Attributes("abcde", False), ([], []), "a, b, c, d, e"),
        (3, Attributes(["Bald", "Gray_Hair", "Black_Hair"], False), ([["Black_Hair", "Gray_Hair"]], []),
         "Bald, Gray_Hair, Black_Hair (at most one of Black_Hair, Gray_Hair)"),
        (3, Attributes(["cat", "dog", "wolf"], True), ([], [["cat", "dog", "wolf"]]),
         "cat, dog, wolf (exactly one of cat, dog, wolf)"),
    ],
)  # fmt: skip
def test_the_names_of_attributes_are_taken_or_told(
    tmp_path: Path, count: int, attributes: Attributes | None, groups: tuple[list[Any], list[Any]], told: str
) -> None:
    source = write(tmp_path / "official", 3, G=generator(labels=count), D=critic(labels=count))
    notes = from_official("stargan", source, tmp_path / "run", attributes=attributes).notes
    assert notes[-1].startswith("the files do not name the attributes of labels; taken to be ")
    assert told in notes[-1]
    method = section(tmp_path / "run")
    assert (method["at_most_one"], method["exactly_one"]) == groups and len(method["attributes"]) == count
    assert attributes is None or method["attributes"] == list(attributes.names)


@pytest.mark.parametrize(
    ("method", "count", "options", "words"),
    [
        ("stargan", 3, "", "the files do not name their 3 attributes; write --attributes A,B,..., or --exactly-one A,"),
        ("stargan", 5, "--attributes a,b", "--attributes: 2 are given, and the files have 5"),
        ("stargan", 5, "--exactly-one a,b,c,d,e,f", "--exactly-one: 6 are given, and the files have 5"),
        ("stargan", 3, "--attributes a,b,b", "--attributes: b stands twice in the attributes; leave it once"),
        ("stargan", 3, "--attributes a,b,", "--attributes: the attribute '' cannot be written in labels"),
        ("stargan", 5, "--attributes=", "--attributes: 1 are given, and the files have 5"),
        ("cyclegan", 0, "--attributes a,b", "--attributes, --exactly-one: cyclegan has no labels; leave it out"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str, count: int, options: str, words: str
) -> None:
    source = write(tmp_path / "official", 3, G=generator(labels=count))
    if method == "cyclegan":
        torch.save(random_state(resnet_plain(WIDTH), 0), source / "latest_net_G_A.pth")
    assert main(["--from", method, str(source), str(tmp_path / "run"), *options.split()]) == 2
    err = capfd.readouterr().err
    assert words in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_converted_generators_translate_into_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "official", 3, G=generator(labels=3), D=critic(labels=3))
    assert main(["--from", "stargan", str(source), str(tmp_path / "run"), "--exactly-one", "cat, dog,wolf"]) == 0
    assert main(["--to", "stargan", str(tmp_path / "run"), str(tmp_path / "back"), "--attributes", "a,b,c"]) == 2
    assert "with --to the checkpoint has the names; leave it out" in capfd.readouterr().err
    Image.new("RGB", (17, 16), "red").save(tmp_path / "x.png")
    arguments = [str(tmp_path / "run"), str(tmp_path / "x.png"), str(tmp_path / "out")]
    assert translate(arguments) == 2
    assert (
        "StarGAN translates a picture into one that has given attributes, of cat, dog, wolf (exactly one of cat, "
        in (capfd.readouterr().err)
    )
    assert translate([*arguments, "--labels", "all"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"x_cat.png", "x_dog.png", "x_wolf.png", "labels-001.png"}


def test_networks_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    cut = random_state(official.cut_generator(WIDTH), 0)
    matching = random_state(official.critic(WIDTH, matching=True), 1)
    plain, eight = critic(), critic(labels=8)
    odd = {key: tensor for key, tensor in cut.items() if not key.startswith("decoder.2.")}
    for number, (method, networks, words) in enumerate(
        [
            ("stargan", {"G": cut}, r"3-G\.ckpt is not this network; missing: main\.0\.weight, .*; left over: encoder"),
            ("matchgan", {"G": generator()}, r"3-G\.ckpt is not this network; missing: encoder\.0\.weight, "),
            ("stargan", {"G": generator(), "D": matching}, r"3-D\.ckpt is not this network; left over: conv3\.weight$"),
            ("matchgan", {"G": cut, "D": plain}, r"3-D\.ckpt is not this network; missing: conv3\.weight$"),
            (
                "stargan",
                {"G": generator(), "D": eight},
                r"3-D\.ckpt .* conv2\.weight is \[8, 64, 2, 2\] float32 and not",
            ),
            ("matchgan", {"G": odd}, r"3-G\.ckpt is not this network; "),
            (
                "stargan",
                {"G": generator() | {"main.0.weight": torch.zeros(2)}},
                r"other shapes: main\.0\.weight is \[2\]",
            ),
            ("stargan", {"G": generator() | {"main.0.weight": torch.zeros(2, 1, 7, 7)}}, r"shapes: main\.0\.weight"),
            (
                "stargan",
                {"G": generator(), "D": plain | {"conv2.weight": torch.zeros(5, 64, 0, 0)}},
                "has these sizes: ",
            ),
        ]
    ):
        source = write(tmp_path / str(number), 3, **networks)
        with pytest.raises(CheckpointError, match=words):
            from_official(method, source, tmp_path / "run")
