"""What a run cannot be made from is refused before it takes memory, data or other ranks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from i2i_dist import assembly
from i2i_dist.assembly import Settings, check_sizes
from i2i_dist.config import ConfigError, EngineConfig, RunConfig, TrainConfig, validate
from i2i_dist.data.labels import LabelSpace, SampleLabels
from i2i_dist.method import SIDES
from i2i_dist.methods import METHODS, resolve
from i2i_dist.train import main
from tests.methods.cases import CASES
from tests.methods.cases.common import SIZE
from tests.updates import small_method


def settings(section: dict[str, Any], crop: int, **train: Any) -> Settings:
    tree = {
        "method": section, "data": {"root": "nowhere", "load_size": crop, "crop_size": crop}, "train": train,
    }  # fmt: skip
    return Settings(validate(RunConfig, tree), *resolve(section), Path("nowhere"))


@pytest.mark.parametrize("name", METHODS)
def test_full_size_is_tried_without_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device alone, and where only kernels may run."""
    monkeypatch.setenv("I2I_DIST_OPS", "native")
    devices: set[str] = set()
    method_class = METHODS[name]

    class Noted(method_class):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            devices.update(p.device.type for side in (self.generator, self.discriminator) for p in side.parameters())

    tried = settings({"name": name}, getattr(resolve({"name": name})[1], "image_size", 256))
    check_sizes(tried._replace(method_class=Noted))
    assert devices == {"meta"}


@pytest.mark.parametrize("batch", [1, 3, 4096])
@pytest.mark.parametrize("name", METHODS)
def test_small_methods_take_the_size_that_tests_train_them_with(name: str, batch: int) -> None:
    check_sizes(settings({"name": name, **CASES[name].small}, SIZE, global_batch=batch))


@pytest.mark.parametrize(
    ("section", "crop", "says"),
    [
        ({"name": "bicyclegan", "downs": 5}, 32, "2 scales of 3 layers they must be at least 47 x 47"),
        ({"name": "ugatit"}, 64, "with 7 layers they must be at least 96 x 96"),
        ({"name": "stargan"}, 64, "64 x 64; its heads are made for 128 x 128. .* or set method.image_size to"),
        ({"name": "matchgan"}, 256, "256 x 256; its heads are made for 128 x 128. .* or set method.image_size to"),
        ({"name": "simdcl"}, 24, "layers of shapes .* ask for fewer patches"),
        ({"name": "pix2pix"}, 100, "allowed with the networks of this method is a multiple of 256"),
        ({"name": "pix2pix", "downs": 3, "critic_width": 4}, 24, None),
    ],
)
def test_a_crop_that_a_network_cannot_take_is_refused(section: dict[str, Any], crop: int, says: str | None) -> None:
    state = torch.get_rng_state()
    if says is None:
        check_sizes(settings(section, crop))
    else:
        with pytest.raises(ConfigError, match=rf"data\.crop_size: given {crop}, .*{says}"):
            check_sizes(settings(section, crop))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dry_run_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("method: {name: ugatit}\ndata: {root: nowhere, load_size: 64, crop_size: 64}\n")
    assert main(["--config", str(path), "--dry-run"]) == 2
    assert "they must be at least 96 x 96" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stargan", "matchgan"])
def test_a_critic_that_differentiates_itself_cannot_be_cut(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    for stage, code in ((2, 0), (3, 2)):
        path.write_text(
            f"method: {{name: {name}}}\ndata: {{root: nowhere, load_size: 128, crop_size: 128}}\n"
            f"engine: {{generator_stage: 3, discriminator_stage: {stage}}}\n"
        )
        assert main(["--config", str(path), "--dry-run"]) == code
    said = capsys.readouterr().err
    assert "engine.discriminator_stage: given 3, allowed with this method is 0, 1 or 2: its gradient penalty" in said
    assert "engine.generator_stage may be 3" in said


@pytest.mark.parametrize("name", METHODS)
def test_the_best_can_be_asked_for_by_what_a_method_logs(name: str) -> None:
    def asked(best: str) -> Settings:
        tried = settings({"name": name, **CASES[name].small}, SIZE)
        output = tried.config.output.model_copy(update={"keep_best": best})
        return tried._replace(config=tried.config.model_copy(update={"output": output}))

    with pytest.raises(ConfigError, match=r"output\.keep_best: given 'nothing', allowed with this method") as caught:
        check_sizes(asked("nothing"))
    logged = str(caught.value).partition(" is one of ")[2].partition(";")[0].split(", ")
    assert len(logged) >= 3 and (name != "opgan" or "attention_spread" in logged)
    for known in (logged[0], logged[-1]):
        check_sizes(asked(known))


def test_a_name_that_is_nearly_right_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: {name: cyclegan}\ndata: {root: nowhere}\noutput: {keep_best: cycle}\n")
    assert main(["--config", str(path), "--dry-run"]) == 2
    assert "output.keep_best: given 'cycle', allowed with this method is one of " in (said := capsys.readouterr().err)
    assert re.search(r"; did you mean 'cycle_\w+'\?\n$", said)


ENGINE_CHOICES = {
    "generator_stage": range(4), "discriminator_stage": range(4), "generator_offload": (False, True),
    "discriminator_offload": (False, True), "checkpoint_activations": (False, True),
}  # fmt: skip


def reasons_against(name: str, engine: dict[str, Any]) -> list[str]:
    """Return what may be said of a choice: the key at fault and the reason, as docs/architecture.md gives them."""
    found = []
    if name in ("stargan", "matchgan") and engine["discriminator_stage"] == 3:
        found.append(r"engine\.discriminator_stage: given 3, allowed with this method is 0, 1 or 2: .* must be whole")
    for side in SIDES:
        if engine[f"{side}_offload"] and engine[f"{side}_stage"] == 0:
            found.append(
                rf"engine\.{side}_offload: given true, allowed with engine\.{side}_stage=0 is false: at ZeRO 0 "
            )
    if engine["checkpoint_activations"] and name in ("pix2pix", "bicyclegan"):
        found.append(r"engine\.checkpoint_activations: given true, allowed with this method is false: .* is a U-Net")
    return found


@pytest.mark.parametrize("name", METHODS)
def test_what_the_engines_cannot_have_is_refused_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice of the section `engine` in every precision; the sizes are not tried again each time."""
    asked = settings({"name": name, **CASES[name].small}, SIZE)
    fields = ("generator", "discriminator", "multiple", "penalised", "couples_batch", "group")
    sketch = SimpleNamespace(streams=(), **{field: getattr(assembly._sketch(asked), field) for field in fields})
    monkeypatch.setattr(assembly, "_sketch", lambda _: sketch)
    for precision, *values in itertools.product(("auto", "fp32", "bf16"), *ENGINE_CHOICES.values()):
        engine = dict(zip(ENGINE_CHOICES, values, strict=True))
        changes = {"engine": EngineConfig(**engine), "train": TrainConfig(precision=precision)}
        chosen = asked._replace(config=asked.config.model_copy(update=changes))
        if reasons := reasons_against(name, engine):
            with pytest.raises(ConfigError, match="|".join(reasons)):
                check_sizes(chosen)
        else:
            check_sizes(chosen)


@pytest.mark.parametrize("given", ["fp16", "float16", "half"])
def test_fp16_is_refused_with_the_reason(given: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"train\.precision: given '{given}', allowed is .*the other side would train"
    ):
        settings({"name": "cyclegan"}, SIZE, precision=given)


def test_pictures_without_labels_that_are_not_used_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """A set of which a part has no labels, at the fraction 1: all that are there are told."""
    values = np.tile(LabelSpace(("a", "b")).classes, (4, 1)).astype(np.int8)
    values[1::2, 0] = -1
    source: Any = SimpleNamespace(name="trainA", labels=SampleLabels(("a", "b"), values))
    for turns, warned in ((None, True), (True, False)):
        caplog.clear()
        small = {"attributes": ["a", "b"], "at_most_one": [], "group_classes": 2, "labelled_fraction": 1.0}
        method = small_method("matchgan", **small, unlabelled_turns=turns)
        labelled = assembly._labelled(method, {"a": source}, seed=0)
        assert labelled is not None and labelled.counts == (8, 8, 0)
        assert ("The 8 pictures without labels are not used" in caplog.text) == warned
        assert ("unlabelled" in method.streams) == (not warned)
        assert {labelled.order("unlabelled").sample(place) for place in range(8)} == set(range(1, 16, 2))
