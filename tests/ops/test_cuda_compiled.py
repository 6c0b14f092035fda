"""What nvcc makes of the kernels: no spills, registers within the occupancy meant, the instructions meant."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.ops import emulated

# The first test of each architecture compiles all kernels.
pytestmark = pytest.mark.timeout(900)

ARCHS = ("90", pytest.param("80", marks=pytest.mark.soak))
SOURCES = sorted((emulated.ROOT / "csrc" / "cuda").glob("*.cu"))
REGISTERS = 65536
"""Of an SM, shared by the threads on it; a thread has at most 255."""


class Occupancy(NamedTuple):
    """So many blocks of so many threads are to be on an SM at once."""

    threads: int
    blocks: int

    @property
    def registers(self) -> int:
        """Most registers of a thread with which they fit: a multiple of 8."""
        return min(255, REGISTERS // (self.threads * self.blocks) // 8 * 8)


OCCUPANCY = {
    "adalin.cu:moments": Occupancy(256, 2),
    "adalin.cu:statistics": Occupancy(1024, 1),
    "adalin.cu:apply": Occupancy(256, 2),
    "adalin.cu:gradient_sums": Occupancy(256, 2),
    "adalin.cu:gradient_coefficients": Occupancy(1024, 1),
    "adalin.cu:apply_gradient": Occupancy(256, 2),
    "instance_norm_act.cu:normalise_planes": Occupancy(1024, 1),
    "instance_norm_act.cu:plane_gradients": Occupancy(1024, 1),
    "patch_gather.cu:gather": Occupancy(256, 6),
    "patch_gather.cu:build_chains": Occupancy(256, 6),
    "patch_gather.cu:gradient": Occupancy(256, 6),
}
"""By file and kernel. A kernel that is not listed may take a thread's 255 registers."""


class Usage(NamedTuple):
    """What one kernel takes on one architecture."""

    kernel: str
    arch: str
    registers: int
    spilled: int


def tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit, or skip."""
    folders = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    packages = importlib.util.find_spec("nvidia")  # what NVIDIA's own packages share
    for package in (packages and packages.submodule_search_locations) or ():
        folders += map(str, Path(package).glob("*/bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{name} is neither in PATH nor in CUDA_HOME nor among the packages")
    return found


@functools.cache
def compiled(arch: str) -> dict[str, Path]:
    """Compile all kernels and return the object of each source file."""
    nvcc = tool("nvcc")
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout

    def compile_one(source: Path) -> Path:
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        name = source.relative_to(emulated.ROOT).as_posix()
        command = [nvcc, "-O3", "-std=c++17", '-DI2I_CUDA_ARCHS=""', gencode, "-Xptxas", "-v", "-c", name]
        digest = emulated.digest(emulated.ROOT, source, version, *command)
        return emulated.make(emulated.BUILT / f"{source.stem}-{digest}.cu.o", emulated.ROOT, command)

    objects = emulated.in_parallel(compile_one, SOURCES)
    return {source.name: path for source, path in zip(SOURCES, objects, strict=True)}


def usages(path: Path) -> list[Usage]:
    """Read what ptxas -v said when it made this object."""
    report = path.with_name(f"{path.name}.log").read_text()
    entry = r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    found = re.findall(entry + r"Used (\d+) registers", report, flags=re.DOTALL)
    assert len(found) == report.count("Compiling entry function")
    return [
        Usage(kernel_name(name), arch, int(used), int(stores) + int(loads)) for name, arch, stores, loads, used in found
    ]


def kernel_name(mangled: str) -> str:
    """Return the last name of a mangled qualified one: each name stands there behind its length."""
    names, rest = [], mangled.removeprefix("_Z").removeprefix("N")
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        names.append(rest[match.end() : end])
        rest = rest[end:]
    return names[-1]


@pytest.mark.parametrize("source", [source.name for source in SOURCES])
@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(source: str, arch: str) -> None:
    for usage in usages(compiled(arch)[source]):
        name = f"{source}:{usage.kernel}"
        most = OCCUPANCY.get(name, Occupancy(256, 1)).registers
        assert usage.spilled == 0, f"{name} spills {usage.spilled} bytes on sm_{usage.arch}"
        assert usage.registers <= most, f"{name} takes {usage.registers} registers on sm_{usage.arch}, not {most}"


def test_every_listed_kernel_exists() -> None:
    objects = compiled("90")
    found = {f"{source}:{usage.kernel}" for source, path in objects.items() for usage in usages(path)}
    assert set(OCCUPANCY) <= found


@pytest.mark.parametrize("arch", ARCHS)
def test_patch_nce_uses_tensor_cores_and_asynchronous_copies(arch: str) -> None:
    objects = [path for source, path in compiled(arch).items() if source.startswith("patch_nce")]
    if not objects:
        pytest.skip("there is no patch_nce.cu")
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")  # the former calls the latter
    environment = {**os.environ, "NVDISASM_PATH": str(Path(nvdisasm).parent)}
    command = [cuobjdump, "-sass", "-arch", f"sm_{arch}"]
    runs = [subprocess.run([*command, path], env=environment, capture_output=True, text=True) for path in objects]
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    code = "".join(run.stdout for run in runs)
    for instruction in ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32", "LDSM", "LDGSTS"):
        assert instruction in code, f"no {instruction} for sm_{arch}"


def test_a_report_is_read(tmp_path: Path) -> None:
    report = """ptxas info    : Compiling entry function '_ZN3i2i4cuda12_GLOBAL__N_16gatherIjEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN3i2i4cuda12_GLOBAL__N_16gatherIjEEvPKT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 392 bytes cmem[0]
"""
    (tmp_path / "kernels.o.log").write_text(report)
    assert usages(tmp_path / "kernels.o") == [Usage("gather", "80", 30, 16)]
    assert Occupancy(256, 2).registers == 128 and Occupancy(256, 1).registers == 255
