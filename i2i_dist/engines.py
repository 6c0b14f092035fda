"""One DeepSpeed engine for each side of the game; the only file that imports deepspeed.

What decides the shape of this file; tests/test_engines.py holds the result against plain PyTorch:

* One backward per side and update over the sum of its losses: two backwards before one step are silently wrong at
  ZeRO 1 and 2.
* In the generator's turn the discriminator is its plain module, frozen: its engine would record the pass as its own.
* Every backward needs its own call of the engine since the backward before, or ZeRO 3 overwrites a micro-batch.
* `gradient_clipping` is always written: DeepSpeed clips at 1.0 where a configuration says nothing.
* DeepSpeed does not broadcast buffers, and makes a process group of its own for gradients, unless it is given one.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

from i2i_dist.config import ConfigError
from i2i_dist.distributed import Ranks, any_rank
from i2i_dist.method import ParameterGroup, Side
from i2i_dist.networks.blocks import RepeatedBlocks

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from deepspeed.utils import groups as deepspeed_groups

Precision = Literal["fp32", "bf16"]

PERSISTENCE_THRESHOLD = 100_000  # elements: ZeRO 3 leaves smaller parameters whole
LARGEST_BUCKET = 50_000_000  # elements


class Layout(NamedTuple):
    """How a side is spread: the batch identity micro_batch x accumulation x world = global, and the ZeRO stage."""

    micro_batch: int
    accumulation: int
    world: int
    stage: int = 0
    clipping: float = 0.0
    precision: Precision = "fp32"
    offload: bool = False  # the optimizer's state and step are in CPU memory
    recomputed: bool = False  # see `RepeatedBlocks`
    # Tests set 0, since small networks would never be partitioned otherwise.
    persistence_threshold: int = PERSISTENCE_THRESHOLD


class Asked(NamedTuple):
    """What is asked of one side's engine, and what of the method decides whether it can be had.

    The precision is not here: both can be had with everything.

    Attributes:
        side: Which side.
        stage, offload, micro_batch, accumulation, recomputed: As in `Layout`.
        penalised: The side differentiates itself, for a penalty.
        coupled: A sample's loss depends on the whole global batch.
        repeats: The side has blocks that can be recomputed.
    """

    side: Side
    stage: int = 0
    offload: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    recomputed: bool = False
    penalised: bool = False
    coupled: bool = False
    repeats: bool = False


class Refusal(NamedTuple):
    """What cannot be had together: when, and what is said of it, with fields of `Asked` in braces."""

    meets: Callable[[Asked], bool]
    says: str


# All else can be had, and trains what a plain loop trains; tests/test_engines.py holds the two against each other.
REFUSALS = (
    Refusal(
        lambda asked: asked.penalised and asked.stage == 3,
        "engine.{side}_stage: given 3, allowed with this method is 0, 1 or 2: its gradient penalty differentiates the "
        "critic twice, for which the critic must be whole; engine.generator_stage may be 3",
    ),
    Refusal(
        lambda asked: asked.offload and asked.stage == 0,
        "engine.{side}_offload: given true, allowed with engine.{side}_stage=0 is false: at ZeRO 0 every rank steps on "
        "all parameters where they are, and there is no copy of them to keep elsewhere; to offload, --set "
        "engine.{side}_stage=1, or 2 or 3",
    ),
    Refusal(
        lambda asked: asked.recomputed and not asked.repeats,
        "engine.checkpoint_activations: given true, allowed with this method is false: its generator is a U-Net, whose "
        "layers are all kept for its skips or, with batch norm, cannot run twice; a smaller train.micro_batch, where "
        "the method allows it, or train.precision=bf16 also saves memory",
    ),
    Refusal(
        lambda asked: asked.coupled and asked.accumulation > 1,
        "train.micro_batch: given {micro_batch}, but with this method's settings a sample's loss depends on the whole "
        "global batch, which then is not in one pass; leave train.micro_batch out",
    ),
)


def refusal(asked: Asked) -> str | None:
    """Return why it cannot be had, with the key and what is allowed; None if it can."""
    return next((line.says.format(**asked._asdict()) for line in REFUSALS if line.meets(asked)), None)


def check(asked: Asked) -> None:
    """Refuse what cannot be had.

    Raises:
        ConfigError: With what `refusal` returns.
    """
    if problem := refusal(asked):
        raise ConfigError(problem)


def device_of(ranks: Ranks, environment: Mapping[str, str]) -> torch.device:
    """Return the device that this rank trains on: the GPU of its local rank, or its own where it is shown no other.

    Each rank is shown its own by `srun --gpus-per-task=1`, or by a script that sets CUDA_VISIBLE_DEVICES to LOCAL_RANK.

    Raises:
        ConfigError: There are fewer GPUs than ranks on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible, own = torch.cuda.device_count(), str(ranks.local_rank)
    # With torchrun inside of a SLURM job SLURM_LOCALID is the launcher's.
    if visible == 1 and own in (environment.get("SLURM_LOCALID"), environment.get("CUDA_VISIBLE_DEVICES")):
        return torch.device("cuda", 0)
    if ranks.local_rank >= visible:
        raise ConfigError(
            f"{ranks.local_world} ranks on this machine, but GPUs to be seen: {visible}; start at most one rank for "
            "each GPU"
        )
    return torch.device("cuda", ranks.local_rank)


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """Turn the setting `train.precision` into what the device does.

    Raises:
        ValueError: bf16 is asked of a GPU that has none.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and device.type == "cuda" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"train.precision: given 'bf16', but {name} has no bf16; allowed here is 'fp32' or 'auto'")
    return "bf16" if wanted == "bf16" or (wanted == "auto" and has_bf16) else "fp32"


def start(ranks: Ranks, timeout_seconds: int) -> torch.device:
    """Join the process group and return this rank's device. Call once per process, before any engine is built."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = device_of(ranks, os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed chooses the device, in several places
    else:
        _keep_freed_memory()
        # Inference only, yet compiled at every first start on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Between a timeout and the end of the process NCCL's watchdog sleeps 4 times this, for a dump: by default 60 s.
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "250")
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
        rank=ranks.rank,
        world_size=ranks.world,
    )
    # Of two communicators NCCL would not keep the order, and DeepSpeed's own would have another timeout.
    deepspeed_groups._WORLD_GROUP = torch.distributed.group.WORLD
    return device


def _keep_freed_memory() -> None:
    """Have glibc hand the blocks that one step frees to the next instead of to the system.

    By default every large tensor is mapped anew and its pages are faulted in, in each step, which shows from 256 x 256
    on. Other C libraries have no such setting.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Watch:
    """Notices a loss or gradient that is not finite, before any reduction hides whose it was.

    As such a gradient counts one whose values lie further apart than the largest number.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._zero = torch.zeros((), device=device)  # until it has met one, and NaN from then on
        for parameter in module.parameters():
            parameter.register_hook(self._look)

    def _look(self, value: Tensor) -> None:
        low, high = torch.aminmax(value.detach())  # hands NaN on, and makes no copy of the gradient as isfinite does
        # 0 x infinity is NaN too. Every further operator here is a launch for each parameter and backward.
        self._zero.add_(high - low, alpha=0)

    loss = _look

    def take(self) -> Tensor:
        """Return 1 if it has met one since the last call, else 0, on the device."""
        met = self._zero.isnan().float()
        self._zero.zero_()
        return met


class _SideOptimizer:
    """Mixed into an optimizer: what a side needs that neither it nor DeepSpeed does.

    While `skip` is set a step does nothing, and DeepSpeed still consumes the gradients. After a step parameters are
    clamped to the bounds of their group: what DeepSpeed has put there are this rank's fp32 values, which it hands on to
    the module and to the other ranks, while a module's parameter that is clamped is overwritten by the next step.
    """

    skip = False
    param_groups: list[dict[str, Any]]

    def step(self, closure: Any = None) -> Any:
        if self.skip:
            return None
        result = super().step(closure)  # type: ignore[misc]
        with torch.no_grad():
            for group in self.param_groups:
                if group["bounds"] is not None and group["params"]:
                    torch._foreach_clamp_min_(group["params"], group["bounds"][0])
                    torch._foreach_clamp_max_(group["params"], group["bounds"][1])
        return result


class SideEngine:
    """One side: its module, optimizer and ZeRO stage."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        layout: Layout,
        device: torch.device,
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        **options: Any,
    ) -> None:
        self.layout, self.device = layout, device
        module.to(device)
        for blocks in repeated_blocks(module):
            blocks.recomputed = layout.recomputed
        if layout.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._watch = _Watch(module, device)
        side_optimizer = type(f"Side{optimizer.__name__}", (_SideOptimizer, optimizer), {})
        self.optimizer: Any = side_optimizer(
            [
                {"name": group.name, "params": list(group.parameters), "lr": group.lr, "base_lr": group.lr}
                | {"weight_decay": group.weight_decay, "bounds": group.bounds, "constant": group.constant}
                | ({"betas": group.betas} if issubclass(optimizer, torch.optim.Adam) else {})
                for group in groups
            ],
            **(options or {"fused": True}),
        )
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=_deepspeed_config(layout, bucket_elements(module), pinned=device.type == "cuda"),
        )
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        """Run the side's forward, to be followed by `backward`."""
        return self.engine(*inputs)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Callable[..., Any]]:
        """Yield the side as a judge that passes gradients to its inputs and collects none."""

        def judge(*inputs: Any) -> Any:
            with autocast_if_enabled(self.engine):
                return self.module(*inputs)

        self.module.requires_grad_(False)
        try:
            yield judge
        finally:
            self.module.requires_grad_(True)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the side's plain module computes as its engine does."""
        context: contextlib.AbstractContextManager[None] = autocast_if_enabled(self.engine)
        return context

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate the sum of the side's losses for one micro-batch; `last` marks the update's last one."""
        self._watch.loss(loss)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # short of the boundary this only counts the micro-batch

    def step(self, *, skip: bool) -> None:
        """Finish the update; with `skip` its gradients are consumed and nothing changes."""
        self.optimizer.skip = skip
        try:
            self.engine.step()
        finally:
            self.optimizer.skip = False
        if self.layout.offload:
            for flat in self.flat_tensors():  # what gets no gradient in the next update must not meet this one's again
                flat.grad.zero_()

    def flat_tensors(self) -> list[Any]:
        """Return what the optimizer steps on from ZeRO 1 on: this rank's share of each group, in one fp32 tensor."""
        zero = self.engine.optimizer
        found: list[Any] = (
            zero.fp32_partitioned_groups_flat if self.layout.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return found

    def set_learning_rate(self, factor: float) -> dict[str, float]:
        """Set every group to its own rate times `factor`, but for its constant share; return the rates by group."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (group["constant"] + (1.0 - group["constant"]) * factor)
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}


def met_not_finite(sides: Sequence[SideEngine]) -> list[bool] | None:
    """Return None where no rank has met a loss or gradient that is not finite in these sides since the last call.

    Otherwise say of each side whether this rank has. Collective, with one wait where all is well.
    """
    met = torch.stack([side._watch.take() for side in sides])
    return [bool(times) for times in met.tolist()] if any_rank(met.sum().reshape(1))[0] else None


def repeated_blocks(module: nn.Module) -> list[RepeatedBlocks]:
    """Return what of a side can be recomputed."""
    return [part for part in module.modules() if isinstance(part, RepeatedBlocks)]


def bucket_elements(module: nn.Module) -> int:
    """Return how many elements of gradients ZeRO reduces at once, for which it holds a buffer of that size.

    DeepSpeed's own 500 million are 2 GB for each side, whatever it has, and at stage 3 all the time.
    """
    return min(sum(parameter.numel() for parameter in module.parameters()), LARGEST_BUCKET)


def _deepspeed_config(layout: Layout, bucket: int, *, pinned: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": layout.stage, "reduce_bucket_size": bucket}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if layout.stage == 3:
        zero["stage3_param_persistence_threshold"] = layout.persistence_threshold
    return {
        "train_batch_size": layout.micro_batch * layout.accumulation * layout.world,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": layout.clipping,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every forward and step
        "zero_allow_untested_optimizer": True,
        # An offloaded step is torch's own fused Adam; DeepSpeed's for CPUs would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # Parameters stay fp32; an empty list of "safe" modules keeps gradients in fp32 on the wire too.
        "torch_autocast": {
            "enabled": layout.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
