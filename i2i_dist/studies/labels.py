"""What labels are worth: StarGAN and MatchGAN with the labels of a part of the pictures, scored by an oracle.

Both train on the same synthetic pictures, from the same seeds, with the same networks, schedule and number of images.
Then every test picture is translated into every class, and the oracle reads off what the translation shows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from i2i_dist.data import pack
from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import open_source
from i2i_dist.data.labelled_domains import Labelling
from i2i_dist.data.synthetic_labels import ATTRIBUTES, COLOURS, LABELS_NAME, edit_accuracy, write_labelled_dataset
from i2i_dist.method import Labelled
from i2i_dist.studies.runs import train_all
from i2i_dist.telemetry.samples import to_uint8
from i2i_dist.translate import load_method

# By the name in the table: what the section `method` says of each. The last is MatchGAN with a head for pairs that can
# tell whether two pictures show the same, which the authors' cannot.
CONTESTANTS = {
    "stargan": {"name": "stargan"},
    "matchgan": {"name": "matchgan"},
    "difference": {"name": "matchgan", "match_head": "difference"},
}
SCORES = ("colour", "size", "shape", "whole")

_TEST = 200  # pictures, each of which is translated into every class
_BATCH = 16  # MatchGAN's group of 4 x 4
_EPOCHS = 10  # of which half have a constant learning rate
_Pixels = npt.NDArray[np.uint8]


class Scored(NamedTuple):
    """Shares of translations that are as they were asked to be, by what was asked for; see `edit_accuracy`."""

    name: str
    seed: int | None
    accuracy: dict[str, float]


def configuration(contestant: str, seed: int, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return a run's configuration; those of two contestants differ in what `CONTESTANTS` says of them alone."""
    epoch = max(_BATCH, options.images // _EPOCHS // _BATCH * _BATCH)
    return {
        "method": {
            **CONTESTANTS[contestant],
            "preset": "paper",
            "attributes": list(ATTRIBUTES),
            "at_most_one": [],
            "exactly_one": [list(COLOURS)],
            "labelled_fraction": options.fraction,
            "image_size": options.size,
            "width": options.width,
            "blocks": options.blocks,
            "critic_width": options.width,
            "critic_layers": (options.size // 2).bit_length() - 1,  # down to 2 x 2, as the papers' critic does
            "lr": options.lr,
        },
        "data": {"root": str(data), "load_size": options.size, "crop_size": options.size, "workers": 0},
        "schedule": {
            "epoch_images": epoch, "constant_epochs": _EPOCHS - _EPOCHS // 2, "decay_epochs": _EPOCHS // 2,
        },
        "train": {"global_batch": _BATCH, "seed": seed, "ema_half_life_images": epoch // 4},
        "output": {
            "log_every_images": epoch, "sample_every_images": epoch, "sample_images": 8,
            "checkpoint_every_images": epoch, "keep_checkpoints": 1, "metrics_port": None,
        },
    }  # fmt: skip


@torch.no_grad()
def translations(method: Labelled, pictures: _Pixels, label: npt.NDArray[np.uint8], device: torch.device) -> _Pixels:
    """Translate pictures, uint8 `[N, H, W, 3]`, into one label `[L]`."""
    images = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    labels = torch.from_numpy(label).to(device).float().expand(len(images), -1)
    return to_uint8(method.translate_labelled(images, labels))


def accuracy(method: Labelled | None, pictures: _Pixels, classes: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Translate all pictures into all classes and score them; without a method the pictures stay as they are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for label in classes:
        shown = pictures if method is None else translations(method, pictures, label, device)
        found.append(edit_accuracy(shown, np.broadcast_to(label, (len(pictures), len(label)))))
    return {score: sum(one[score] for one in found) / len(found) for score in SCORES}


def table(rows: Sequence[Scored]) -> str:
    """Return a table of percentages: each run, and the mean of each method that has several."""
    names = list(dict.fromkeys(row.name for row in rows))
    lines = [f"{'method':<12}{'seed':>4}" + "".join(f"{score:>9}" for score in SCORES)]
    for name in names:
        own = [row for row in rows if row.name == name]
        shown = [("" if row.seed is None else str(row.seed), row.accuracy) for row in own]
        if len(own) > 1:
            shown.append(("mean", {score: sum(row.accuracy[score] for row in own) / len(own) for score in SCORES}))
        lines += [f"{name:<12}{seed:>4}" + "".join(f"{values[s]:>9.1%}" for s in SCORES) for seed, values in shown]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m i2i_dist.studies.labels", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/studies/labels"), help="for data, runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each contestant")
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the pictures whose labels are told")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures to train with")
    parser.add_argument("--images", type=int, default=40_000, help="images seen by each run; as given, minutes")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures, a power of 2 from 32 on")
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolutions")
    parser.add_argument("--blocks", type=int, default=2, help="residual blocks of the generator")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, a thread each")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the top folder of the project; return the exit code."""
    options, begun = _parser().parse_args(arguments), time.monotonic()
    folder: Path = options.folder
    data = folder / "packed"
    if not (data / "testA").exists():  # which is packed last
        write_labelled_dataset(folder / "pictures", size=options.size, train=options.pictures, test=_TEST, seed=0)
        pack.pack(folder / "pictures", data, overwrite=True, labelling=Labelling(csv=folder / "pictures" / LABELS_NAME))
    runs = [(name, seed, f"{name}_{seed}") for seed in range(options.seeds) for name in CONTESTANTS]
    try:
        train_all(folder, {run: configuration(name, seed, data, options) for name, seed, run in runs}, options.jobs)
    except RuntimeError as error:
        print(f"labels: failed, {error}", file=sys.stderr)
        return 1
    source = open_source(data, "testA")
    pictures = np.stack([decode_image(source.read(index)[1]) for index in range(sum(source.counts))])
    rows: list[Scored] = []
    for name, seed, run in sorted(runs, key=lambda one: list(CONTESTANTS).index(one[0])):
        method = load_method(folder / run)
        assert isinstance(method, Labelled)
        method.generator.to("cuda" if torch.cuda.is_available() else "cpu")
        classes = method.label_space.classes
        rows.append(Scored(name, seed, accuracy(method, pictures, classes)))
    rows.append(Scored("untouched", None, accuracy(None, pictures, classes)))
    settings = {key: str(value) if key == "folder" else value for key, value in vars(options).items()}
    results = {"settings": settings, "results": [row._asdict() for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(table(rows))
    print(f"{len(pictures)} test pictures, each translated into {len(classes)} classes")
    print(f"took {time.monotonic() - begun:.0f} s; results: {folder / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
