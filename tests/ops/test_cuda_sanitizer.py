"""On a CUDA device: the kernels under NVIDIA's compute-sanitizer, which sees what results do not show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
)
PROGRAM = """
import itertools
import torch
from i2i_dist import ops

def draw(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

def contrast(dtype):
    for rows, width in ((38, 20), (130, 256), (70, 300), (520, 64)):
        layers = [[draw(count, width, dtype=dtype) for count in (rows, 2)] for _ in range(2)]
        torch.cat(ops.patch_nce_losses(*layers, groups=2)).sum().backward()

torch.set_float32_matmul_precision("high")
contrast(torch.float32)
torch.set_float32_matmul_precision("highest")
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    contrast(dtype)
for dtype, channels, layout in itertools.product(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    (5, 16),
    (torch.contiguous_format, torch.channels_last),
):
    x = draw(2, channels, 13, 11, dtype=dtype).detach().contiguous(memory_format=layout).requires_grad_()
    gamma, beta, rho = (draw(*shape, dtype=dtype) for shape in ((2, channels), (2, channels), (channels,)))
    ops.adalin(x, gamma, beta, rho, activation="relu", residual=x).sum().backward()
    ops.instance_norm_act(x, activation="leaky_relu", residual=x).sum().backward()
    ops.patch_gather(x, torch.tensor([3, 0, 142, 3], device="cuda")).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer was not found (PATH, CUDA_HOME)")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_touches_memory_that_is_not_its_own(tool: str) -> None:
    assert SANITIZER is not None
    # Torch's allocator would hide an access past the end of a tensor within a larger block.
    environment = {**os.environ, "I2I_DIST_OPS": "native", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Calls of the runtime that fail are torch's own questions about the machine.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [SANITIZER, "--tool", tool, *options, "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    if "not supported" in done.stdout + done.stderr and done.returncode != 9:
        pytest.skip(f"compute-sanitizer does not work here: {(done.stdout + done.stderr).strip()[-200:]}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
