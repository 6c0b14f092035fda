"""The demonstration: synthesise a data set with a hidden map, pack it, train on it, and score what was recovered.

Every step is a command that a person could type, and is printed before it runs.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from i2i_dist import checkpoint, config, run_directory
from i2i_dist.data.decode import decode_image
from i2i_dist.data.folders import open_source
from i2i_dist.data.synthetic import score, write_dataset
from i2i_dist.method import Method
from i2i_dist.methods import resolve
from i2i_dist.telemetry.samples import to_uint8
from i2i_dist.translate import load_method, translate

# The averaged generators must recover at least this much of the hidden map: 0 is what the best of the untrained
# network, the identity and the best constant picture reaches, 1 is the map itself.
MARGIN = 0.3

_CONFIG = Path("configs/demo.yaml")
_Pixels = npt.NDArray[np.uint8]


def _run(*command: str) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(f"demo: failed, {command[1]} ended with exit code {code}; why stands above")


def _free_port() -> int:
    """Return a port for the ranks to meet on: the launcher's own default may be taken by another run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _translated(method: Method, pictures: _Pixels) -> _Pixels:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.generator.to(device)
    outputs = [translate(method, torch.from_numpy(picture).to(device), "a_to_b") for picture in pictures]
    return np.concatenate([to_uint8(output) for output in outputs])


def report(run: Path, dataset: Path) -> bool:
    """Print how much of the hidden map the generators recovered; say whether they beat all baselines by the margin."""
    source = open_source(dataset, "testA")
    pictures = np.stack([decode_image(source.read(index)[1]) for index in range(sum(source.counts))])
    trained = score(_translated(load_method(run), pictures), pictures)
    found, _ = checkpoint.newest_verified(run / "checkpoints")
    assert found is not None  # load_method has just read it
    settings = checkpoint.read_state(found).config
    method_class, method_config = resolve(settings["method"])
    untrained_method = method_class(method_config, torch.Generator().manual_seed(settings["train"]["seed"]))
    untrained = score(_translated(untrained_method, pictures), pictures)
    best = min(untrained["error"], trained["identity"], trained["constant"])
    recovered = 1.0 - trained["error"] / best
    print(
        f"mean absolute error of A to B on {len(pictures)} test pictures: trained {trained['error']:.3f}, untrained "
        f"network {untrained['error']:.3f}, identity {trained['identity']:.3f}, best constant {trained['constant']:.3f}"
    )
    passed = recovered >= MARGIN
    verdict = "beats all three baselines by the margin" if passed else "does not reach the margin"
    print(f"recovered {recovered:.0%} of the hidden map ({verdict} of {MARGIN:.0%})")
    return passed


def main() -> int:
    """Run the demonstration from the top folder of the project; return the exit code."""
    python, begun = sys.executable, time.monotonic()
    bin_folder = Path(python).parent
    dataset = Path(config.load(_CONFIG).data.root)
    print(
        "i2i_dist demo: DCLGAN on a synthetic data set. Its networks are shrunk (12 channels and 5 blocks instead of 64"
    )
    print("and 9) so that two CPU cores train them in minutes; configs/dclgan_horse2zebra.yaml has them at full width.")
    with tempfile.TemporaryDirectory() as pictures:
        write_dataset(Path(pictures), size=64, train=200, test=32, seed=0)
        _run(python, "launchers/pack.py", pictures, str(dataset), "--overwrite")
    run = run_directory.choose(None, _CONFIG, fresh=True)
    ranks = min(torch.cuda.device_count(), 2) if torch.cuda.is_available() else 2
    train = [
        str(bin_folder / "deepspeed"),
        f"--num_gpus={ranks}",
        f"--master_port={_free_port()}",
        "launchers/train.py",
        f"--config={_CONFIG}",
        f"--run={run}",
    ]
    _run(*train)
    passed = report(run, dataset)
    print(f"run directory: {run}")
    print(f"sample grid: {max((run / 'samples').glob('*.png'))}")
    print(f"translate with: {python} launchers/translate.py {run} PICTURES RESULTS")
    print(f"resume with: {shlex.join(train)}")
    print(f"took {time.monotonic() - begun:.0f} s")
    if not passed:
        print("demo: failed, the score is below the margin", file=sys.stderr)
        return 1
    print(f"demo: ok {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
