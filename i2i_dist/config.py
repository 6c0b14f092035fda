"""Typed configuration: YAML in, frozen and validated objects out, one message for everything that is wrong.

A configuration file holds the sections of `RunConfig`. The section `method` stays raw here; `train.py` has it validated
by the method's own `Config`, so that a paper's hyperparameters live in the paper's file alone.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

_MAX_FILE_BYTES = 1 << 17  # a configuration is a page of text; anything larger is another file, or a trap


class ConfigError(ValueError):
    """The configuration cannot be used. The message names each key, what was given and what is allowed."""


class Section(BaseModel):
    """Base of every section: frozen, refuses unknown keys, converts nothing silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Limits lie far beyond what anybody trains, so that a slip of the pen is told of before networks of its size are tried.
Positive = Annotated[int, Field(gt=0, le=10**12)]
NotNegative = Annotated[int, Field(ge=0, le=10**12)]
Width = Annotated[int, Field(gt=0, le=65_536)]  # channels of a layer, or numbers of a vector
Blocks = Annotated[int, Field(gt=0, le=100)]  # one after the other
Pixels = Annotated[int, Field(gt=0, le=16_384)]  # of a picture's side
Weight = Annotated[float, Field(ge=0)]
Stage = Annotated[int, Field(ge=0, le=3)]
Beta = Annotated[float, Field(ge=0, lt=1)]  # of Adam


class DataConfig(Section):
    """Where the images are and how they become training pictures (sizes in pixels)."""

    root: str  # holds trainA/ trainB/ testA/ testB/: image folders of any depth, or shards written by launchers/pack.py
    load_size: Annotated[int, Field(ge=24, le=16_384)] = 286  # every image is resized to load_size x load_size
    crop_size: Annotated[int, Field(ge=24, le=16_384, multiple_of=4)] = 256  # then a random window of that size is cut
    flip: bool = True  # mirror an image with probability 1/2
    decay_jitter: bool = False  # False: no random window once the learning rate decays, as the official code does
    workers: Annotated[int, Field(ge=0, le=1_024)] = 4  # reading processes per rank; 0 reads in the training process
    worker_timeout_seconds: Annotated[int, Field(ge=1, le=86_400)] = 180  # one silent for longer is replaced

    @model_validator(mode="after")
    def _crop_fits(self) -> DataConfig:
        if self.crop_size > self.load_size:
            raise ValueError(f"crop_size {self.crop_size} is larger than load_size {self.load_size}; lower one of them")
        return self


class ScheduleConfig(Section):
    """Length of training and the linear decay of the learning rate, in epochs of `epoch_images` images seen."""

    epoch_images: Annotated[int, Field(gt=0, le=10**12)] | None = None  # null means the size of the larger domain
    constant_epochs: Annotated[int, Field(ge=0, le=10**6)] = 200
    decay_epochs: Annotated[int, Field(ge=0, le=10**6)] = 200
    decay_step: Literal["epoch_end", "epoch_start"] = "epoch_end"  # when the official code lowers the rate

    @model_validator(mode="after")
    def _not_empty(self) -> ScheduleConfig:
        if self.constant_epochs + self.decay_epochs == 0:
            raise ValueError("constant_epochs and decay_epochs are both 0; at least one epoch is needed")
        return self


class TrainConfig(Section):
    """One update: how many images, from which seed, in which precision."""

    global_batch: Positive = 1  # images per domain and update over all ranks: what decides the result
    micro_batch: Positive | None = None  # images per rank at once: what fits; null means global_batch / ranks
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    ema_half_life_images: NotNegative = 10_000  # of the averaged generators; 0 switches the average off
    max_bad_updates: Positive = 10  # end the run after so many updates in a row with a loss or gradient not finite
    drift_every_updates: NotNegative = 1000  # see whether all ranks still hold the same weights; 0 only before saving

    @field_validator("precision", mode="before")
    @classmethod
    def _no_half(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half"):
            raise ValueError(
                f"given '{value}', allowed is 'auto', 'fp32' or 'bf16': fp16 needs a loss scaler for each side, and "
                "where one of them drops a step the other side would train on alone; bf16 needs none"
            )
        return value


class EngineConfig(Section):
    """How the two sides are spread over the ranks."""

    generator_stage: Stage = 0  # ZeRO stage: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 parameters too
    discriminator_stage: Stage = 0
    generator_offload: bool = False  # Adam's state and step in CPU memory, from ZeRO 1 on: slower, and less on the GPU
    discriminator_offload: bool = False
    checkpoint_activations: bool = False  # recompute the generators' residual blocks in the backward pass: less memory
    gradient_clipping: Weight = 0.0  # largest norm of a side's gradient; 0 does not clip
    timeout_seconds: Annotated[int, Field(ge=1, le=86_400)] = 1800  # a rank that waits longer for another ends the run


class OutputConfig(Section):
    """What is written, and how often (in images seen; rounded up to whole updates)."""

    log_every_images: Positive = 100
    sample_every_images: Positive = 5_000
    sample_images: Annotated[int, Field(ge=1, le=32)] = 6  # pictures of each domain in a sample grid
    sample_styles: Annotated[int, Field(ge=1, le=16)] = 4  # translations of each, where a method has many for a picture
    checkpoint_every_images: Positive = 5_000
    keep_checkpoints: Positive = 3  # so many of the newest; besides,
    keep_every_images: Positive | None = None  # the first at or after each multiple of this; null keeps none for that
    keep_best: str | None = None  # the one with the lowest mean of this loss, or gauge of the method; null: none
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = 9410  # Prometheus, of rank 0; null switches it off
    metrics_host: str = "127.0.0.1"  # the address it listens on; "0.0.0.0" is all, for whom the network lets through

    @model_validator(mode="after")
    def _best_is_measured(self) -> OutputConfig:
        if self.keep_best is not None and self.log_every_images > self.checkpoint_every_images:
            raise ValueError(
                f"keep_best compares what is logged between checkpoints, but log_every_images {self.log_every_images} "
                f"is larger than checkpoint_every_images {self.checkpoint_every_images}; lower it"
            )
        return self


class RunConfig(Section):
    """A whole run. `method` holds `name`, `preset` and the method's own keys; see `i2i_dist/methods/`."""

    method: dict[str, Any]
    data: DataConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key is a list or a mapping; keys are names")
            if key_node.value in seen:
                raise ConfigError(f"line {line}: the key '{key_node.value}' is given twice; remove one of them")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # nothing in a configuration needs one, and nested ones grow without end
            raise ConfigError("anchors and aliases (&name, *name) are not used in configurations; write the value out")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes whatever `_Loader` would not read back as text."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def load(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply `--set` settings to it.

    Args:
        path: A YAML file.
        settings: Strings `section.key=value`; the value is read as YAML.

    Raises:
        ConfigError: With one message that lists everything that is wrong.
    """
    tree = read_tree(path)
    for setting in settings:
        _apply(tree, setting)
    return validate(RunConfig, tree)


def read_tree(path: Path) -> dict[str, Any]:
    """Read a YAML file into plain dictionaries, or say why it is no configuration."""
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {size} bytes; a configuration has at most {_MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(_missing_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {_show(tree)}; expected sections: {', '.join(RunConfig.model_fields)}")
    return tree


def _missing_file(path: Path) -> str:
    others = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    listing = f"; there are {', '.join(others)}" if others else ""
    return f"there is no configuration {path}{listing}"


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting}: expected section.key=value, for example --set train.global_batch=8")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ConfigError among them
        raise ConfigError(f"--set {setting}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    *parents, last = key.strip().split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {setting}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[last] = value


ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(model: type[ModelT], tree: Mapping[str, Any], prefix: str = "") -> ModelT:
    """Build `model` from plain data; `prefix` is where the data stands in the file ("method.").

    Raises:
        ConfigError: Lists, for every wrong key, its path, what was given, what is allowed and the nearest known name.
    """
    try:
        # By way of JSON, pydantic's strict mode still takes a list for a tuple, as YAML has no tuples.
        return model.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = [_explain(model, details, prefix) for details in error.errors()]
    except (TypeError, ValueError, RecursionError) as error:
        lines = [f"{prefix.rstrip('.') or 'the configuration'} holds a value that is no plain number or text: {error}"]
    raise ConfigError("\n".join(["the configuration is not usable:", *(f"  {line}" for line in lines)]))


def _explain(model: type[BaseModel], details: ErrorDetails, prefix: str) -> str:
    location = [str(part) for part in details["loc"]]
    path = prefix + ".".join(location) if location else prefix.rstrip(".")
    if details["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known here: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if details["type"] == "missing":
        return f"{path}: missing; it has no default"
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if details["type"] == "value_error":
        return f"{path}: {message}"
    hint = ""
    if details["type"] == "literal_error" and isinstance(details["input"], str):
        nearest = difflib.get_close_matches(details["input"], re.findall(r"'([^']*)'", message), n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"{path}: given {_show(details['input'])}, allowed is {message}{hint}"


def _known_keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for name in location:
        field = model.model_fields.get(name)
        inner = _section_of(field.annotation) if field is not None else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for found in map(_section_of, typing.get_args(annotation)) if found), None)
    return None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def dump(config: RunConfig, method: BaseModel) -> str:
    """Return the resolved configuration as YAML, the method's keys filled in; `load` reads it back to the same."""
    tree = config.model_dump(mode="json")
    tree["method"] = method.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
