"""Whether objects stay where they are: CycleGAN and OP-GAN on domains that differ in where objects are and how many.

Both train on the same synthetic pictures, from the same seeds, with the same networks, schedule, number of images and
weights of the terms that they share, and without an identity term; OP-GAN adds its siamese network. Then the test
pictures of both domains are translated, and it is read off the translations where their objects are.

At the published weight of 1 content registration does not hold objects against critics here: how large the term is
depends on what the maps are, which for the paper's is not known. Hence the default of --content.
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
import torch

from i2i_dist.data.synthetic_objects import DOMAINS, Domain, object_score, render, scenes, write_objects
from i2i_dist.method import Direction, Method
from i2i_dist.studies.runs import train_all
from i2i_dist.telemetry.samples import to_uint8
from i2i_dist.translate import load_method

METHODS = ("cyclegan", "opgan")
_DIRECTIONS: dict[Domain, Direction] = {"a": "b_to_a", "b": "a_to_b"}  # by what is translated to
_COLUMNS = {"iou b": "iou A to B", "iou a": "iou B to A", "error b": "error A to B", "error a": "error B to A"}

_TEST = 100  # pictures of each domain
_SEED = 0  # of the pictures
_EPOCHS = 10  # of which half have a constant learning rate


class Scored(NamedTuple):
    """What a run's translations are worth; see `object_score`. Keys name the target, as in "iou b"."""

    name: str
    seed: int | None
    scores: dict[str, float]


def configuration(method: str, seed: int, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return a run's configuration; those of two methods differ in the section `method` alone."""
    epoch = max(1, options.images // _EPOCHS)
    own = {
        "cyclegan": {"name": "cyclegan", "preset": "paper"},  # without identity term, which OP-GAN has not either
        "opgan": {
            "name": "opgan",
            "preset": "reconstruction",
            "siamese_width": max(1, options.width // 2),
            "lambda_content": options.content,
        },
    }
    return {
        "method": {
            **own[method], "width": options.width, "blocks": options.blocks, "critic_width": options.width,
            "lr": options.lr,
        },
        "data": {"root": str(data), "load_size": options.size, "crop_size": options.size, "flip": False, "workers": 0},
        "schedule": {
            "epoch_images": epoch, "constant_epochs": _EPOCHS - _EPOCHS // 2, "decay_epochs": _EPOCHS // 2,
        },
        "train": {"global_batch": 1, "seed": seed, "ema_half_life_images": max(1, options.images // 40)},
        "output": {
            "log_every_images": max(1, epoch // 5), "sample_every_images": epoch, "sample_images": 8,
            "checkpoint_every_images": epoch, "keep_checkpoints": 1, "metrics_port": None,
        },
    }  # fmt: skip


@torch.no_grad()
def score(method: Method | None, size: int) -> dict[str, float]:
    """Score a method on the test pictures of both domains; without one, the pictures as they are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, float] = {}
    for source, target in (DOMAINS, DOMAINS[::-1]):
        shown = scenes(_SEED, f"test{source.upper()}", _TEST)
        pictures = np.stack([render(scene, source, size) for scene in shown])
        if method is not None:
            images = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            pictures = to_uint8(method.translate(images, _DIRECTIONS[target]))
        found |= {f"{key} {target}": value for key, value in object_score(pictures, shown, target).items()}
    return found


def table(rows: Sequence[Scored]) -> str:
    """Return a table of each run, and of the mean of each method that has several."""
    lines = [f"{'method':<10}{'seed':>6}" + "".join(f"{title:>14}" for title in _COLUMNS.values())]
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        shown = [("" if row.seed is None else str(row.seed), row.scores) for row in own]
        if len(own) > 1:
            shown.append(("mean", {key: sum(row.scores[key] for row in own) / len(own) for key in _COLUMNS}))
        lines += [
            f"{name:<10}{seed:>6}" + "".join(f"{values[key]:>14.3f}" for key in _COLUMNS) for seed, values in shown
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m i2i_dist.studies.objects", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/studies/objects"), help="for data, runs and results")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each method")
    parser.add_argument("--pictures", type=int, default=500, help="pictures of each domain to train with")
    parser.add_argument("--images", type=int, default=3000, help="images seen by each run; as given, minutes")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, a multiple of 4 from 28 on")
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolutions")
    parser.add_argument("--blocks", type=int, default=4, help="residual blocks of the generators")
    parser.add_argument("--content", type=float, default=20.0, help="OP-GAN's method.lambda_content")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, a thread each")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the top folder of the project; return the exit code."""
    options, begun = _parser().parse_args(arguments), time.monotonic()
    folder: Path = options.folder
    write_objects(folder / "pictures", size=options.size, train=options.pictures, test=_TEST, seed=_SEED)
    runs = [(method, seed, f"{method}_{seed}") for seed in range(options.seeds) for method in METHODS]
    data = folder / "pictures"
    try:
        train_all(folder, {run: configuration(name, seed, data, options) for name, seed, run in runs}, options.jobs)
    except RuntimeError as error:
        print(f"objects: failed, {error}", file=sys.stderr)
        return 1
    rows: list[Scored] = []
    for name, seed, run in sorted(runs, key=lambda one: METHODS.index(one[0])):
        method = load_method(folder / run)
        method.generator.to("cuda" if torch.cuda.is_available() else "cpu")
        rows.append(Scored(name, seed, score(method, options.size)))
    rows.append(Scored("untouched", None, score(None, options.size)))
    settings = {key: str(value) if key == "folder" else value for key, value in vars(options).items()}
    results = {"settings": settings, "results": [row._asdict() for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(table(rows))
    print(f"{_TEST} test pictures of each domain; iou of the objects' places: 1 if nothing moved, appeared or went")
    print(f"took {time.monotonic() - begun:.0f} s; results: {folder / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
