"""Builds the extension i2i_dist._C: C++ always, CUDA objects whenever nvcc is found. All else is in pyproject.toml.

I2I_DIST_CUDA_ARCHS sets the GPU architectures, as in "8.0 9.0+PTX"; "none" leaves CUDA out.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

OPS = ["patch_nce", "adalin", "instance_norm_act", "patch_gather"]
SOURCES = ["csrc/ops.cpp", *(f"csrc/cpu/{op}.cpp" for op in OPS), "csrc/cpu/norm_kernels.cpp"]
LAUNCH_SOURCES = [f"csrc/launch/{op}.cpp" for op in OPS]  # torch on one side, cuda/ on the other
CUDA_SOURCES = [
    "csrc/cuda/build.cu",
    *(f"csrc/cuda/{op}.cu" for op in OPS),
    *(f"csrc/cuda/patch_nce_{part}.cu" for part in ("double", "rows", "similarities")),
]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h") if "testing" not in path.parts)
ARCHS = "8.0 8.6 9.0 10.0 12.0+PTX"


class Build(BuildExtension):
    """Compiles the CUDA files by nvcc itself, without torch headers, then leaves the rest to torch's build.

    They hold no torch code, so they need neither a GPU nor a CUDA build of torch, and link the CUDA runtime statically:
    the extension loads on machines that have no CUDA at all.
    """

    def build_extensions(self) -> None:
        """Add the CUDA objects, if any, and build."""
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # for ninja
        nvcc, archs = find_nvcc(), []
        if nvcc is not None:
            archs = known_archs(nvcc, os.environ.get("I2I_DIST_CUDA_ARCHS", ARCHS))
        if nvcc is not None and archs:
            [extension] = self.extensions
            extension.define_macros.append(("I2I_WITH_CUDA", None))
            extension.sources += LAUNCH_SOURCES
            extension.extra_objects += compile_cuda(nvcc, archs, Path(self.build_temp))
            extension.extra_link_args += [*library_folders(nvcc), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        self.force = True  # always link; ninja knows which files to compile again, setuptools does not see all of them
        super().build_extensions()


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None with a warning."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, homes)))
    if nvcc is None:
        warn("nvcc was not found (PATH, CUDA_HOME): the extension is built WITHOUT CUDA kernels")
    return nvcc


def known_archs(nvcc: str, wanted: str) -> list[str]:
    """Return the architectures of `wanted` that `nvcc` can compile for; warns of the others."""
    if wanted.strip().lower() == "none":
        warn("I2I_DIST_CUDA_ARCHS=none: the extension is built WITHOUT CUDA kernels")
        return []
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    known, too_old = [], False
    for arch in wanted.replace(";", " ").replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"I2I_DIST_CUDA_ARCHS: {arch!r} is no architecture; write them as in '8.0 9.0 12.0+PTX'.")
        if int(match[1]) < 8:
            warn(f"the CUDA kernels need architecture 8.0 or later: {arch} is left out, and runs plain PyTorch")
            too_old = True
            continue
        if f"compute_{match[1]}{match[2]}" in listed:
            known.append(arch)
        else:
            warn(f"{nvcc} does not know architecture {arch}: left out")
    if not known and not too_old:
        raise ValueError(f"I2I_DIST_CUDA_ARCHS={wanted!r}: {nvcc} knows none of them, only {', '.join(listed)}.")
    return known


def compile_cuda(nvcc: str, archs: list[str], folder: Path) -> list[str]:
    """Compile every CUDA source for `archs` and return the object files."""
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", f'-DI2I_CUDA_ARCHS="{" ".join(archs)}"']
    for arch in archs:
        number, ptx = arch.removesuffix("+PTX").replace(".", ""), arch.endswith("+PTX")
        flags.append(
            f"-gencode=arch=compute_{number},code=" + (f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}")
        )
    folder.mkdir(parents=True, exist_ok=True)
    objects = [str(folder / (Path(source).stem + ".cu.o")) for source in CUDA_SOURCES]
    commands = [[nvcc, *flags, "-c", source, "-o", out] for source, out in zip(CUDA_SOURCES, objects, strict=True)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for _ in pool.map(compile_one, commands):
            pass
    return objects


def compile_one(command: list[str]) -> None:
    """Show and run one compiler call."""
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def library_folders(nvcc: str) -> list[str]:
    """Return the -L flags with which this nvcc would link."""
    dry = subprocess.run([nvcc, "--dryrun", CUDA_SOURCES[0]], check=True, capture_output=True, text=True).stderr
    [line] = [line for line in dry.splitlines() if "LIBRARIES=" in line]
    return shlex.split(line.partition("LIBRARIES=")[2])


def warn(sentence: str) -> None:
    """Say what a reader of the build's output should not miss."""
    print(f"\ni2i_dist: WARNING: {sentence}.\n", file=sys.stderr, flush=True)


setup(
    ext_modules=[
        CppExtension(
            "i2i_dist._C",
            SOURCES,
            depends=[*CUDA_SOURCES, *LAUNCH_SOURCES, *HEADERS],
            include_dirs=[str(Path(__file__).parent / "csrc")],
            # Nothing here reads the floating-point exception flags; a compiler that guards them vectorises no choice.
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-fopenmp", "-fno-trapping-math"],
            extra_link_args=["-fopenmp", "-Wl,--exclude-libs,ALL"],
        )
    ],
    cmdclass={"build_ext": Build},
)
