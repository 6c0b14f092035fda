"""The emulation itself: what it computes is what the PTX ISA says, and what breaks a rule of CUDA does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops import emulated

THREADS = 96
NOTHING = torch.zeros(1)
every_schedule = pytest.mark.parametrize(("seed", "late"), emulated.SCHEDULES)


def selftest(
    name: str, a: Tensor = NOTHING, b: Tensor = NOTHING, size: int = THREADS, seed: int = 0, late: bool = True
) -> Tensor:
    with emulated.schedule(seed, late) as ops:
        out = torch.empty(size)
        ops.selftest(name, a.contiguous(), b.contiguous(), out)
    return out


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_schedule
def test_bf16_product_by_ldmatrix_and_mma(seed: int, late: bool) -> None:
    a, b = random(16, 16).bfloat16(), random(16, 8, seed=1).bfloat16()
    expected = a.double() @ b.double()
    for name, operand in (("bf16_product", b.mT), ("bf16_product_transposed", b)):
        out = selftest(name, a, operand, 128, seed, late).view(16, 8)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_tf32_product_ignores_the_low_bits() -> None:
    a, b = random(16, 8), random(8, 8, seed=1)
    truncated_a, truncated_b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b))
    out = selftest("tf32_product", a, b, 128).view(16, 8).double()
    torch.testing.assert_close(out, truncated_a @ truncated_b, rtol=1e-5, atol=1e-5)
    assert (out - a.double() @ b.double()).abs().max() > 1e-4


def test_shuffles_and_votes() -> None:
    values = random(32)
    lanes = torch.arange(32)
    out = selftest("warp_functions", values, size=160).view(32, 5)
    torch.testing.assert_close(out[:, 0], values[lanes ^ 5])
    torch.testing.assert_close(out[:, 1], values[torch.where(lanes + 3 < 32, lanes + 3, lanes)])
    torch.testing.assert_close(out[:, 2], values[7].expand(32))
    assert out[:, 3].unique().item() == sum(1 << i for i in range(16) if values[i] > 0)
    assert out[:, 4].unique().item() == 2


def test_conversions_round_as_torch_does() -> None:
    special = [
        0.0,
        -0.0,
        1.0,
        65519.9,
        65520.0,
        1e-7,
        2.0**-24,
        2.0**-25,
        6.1e-5,
        3e38,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    ties = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    values = torch.cat([torch.tensor(special + ties), random(THREADS - len(special) - len(ties)) * 100])
    halves, bf16 = (random(THREADS, seed=2) * 1e-5).half(), random(THREADS, seed=3).bfloat16()
    out = selftest("conversions", values, torch.cat([halves.view(torch.int16), bf16.view(torch.int16)]), 5 * THREADS)
    tf32, as_bf16, as_half, from_half, from_bf16 = out.view(5, THREADS)
    torch.testing.assert_close(as_bf16, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(as_half, values.half().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(from_half, halves.float(), rtol=0, atol=0)
    torch.testing.assert_close(from_bf16, bf16.float(), rtol=0, atol=0)
    finite = values.isfinite()
    assert ((tf32 - values)[finite].abs() <= values[finite].abs() * 2.0**-11).all()
    assert (tf32.view(torch.int32)[finite] & 0x1FFF == 0).all()


@every_schedule
def test_what_is_synchronised_is_right(seed: int, late: bool) -> None:
    reverse = torch.arange(THREADS - 1, -1, -1.0)
    torch.testing.assert_close(selftest("exchange_with_barrier", seed=seed, late=late), reverse)
    source = random(THREADS, 4)
    torch.testing.assert_close(selftest("copy_with_wait", source, seed=seed, late=late), source[:, 0])


def test_what_is_not_synchronised_is_nan() -> None:
    assert selftest("exchange_without_barrier").isnan().any()
    assert selftest("read_before_write").isnan().all()
    source = random(THREADS, 4)
    assert selftest("copy_without_wait", source, late=True).isnan().all()
    torch.testing.assert_close(selftest("copy_without_wait", source, late=False), source[:, 0])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("copy_out_of_bounds", "copy_async16 to shared memory at byte 1536 of 1536 bytes"),
        ("copy_to_odd_address", "copy_async16 to shared memory at an address that is no multiple of 16"),
        ("write_out_of_bounds", "a thread wrote outside the 1536 bytes of shared memory"),
        ("write_output_out_of_bounds", "emulated memory: a kernel wrote outside a tensor"),
        ("barrier_not_reached_by_all", r"64 of 96 threads have ended, 32 wait at __syncthreads \(.*selftest.cu:\d+\)"),
        ("two_barriers_at_once", r"wait at __syncthreads \(.*selftest.cu:\d+\), others at __syncthreads"),
        ("shuffle_not_reached_by_all", r"93 wait at __shfl_xor_sync \(.*, 3 wait at __syncthreads"),
        ("shuffle_from_an_ended_lane", "a shuffle reads from a lane that has ended"),
        ("trap", "__trap"),
    ],
)
def test_what_breaks_a_rule_is_an_error_that_says_so(name: str, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        selftest(name, random(THREADS, 4))
    # ... and the next launch is as good as any.
    torch.testing.assert_close(selftest("exchange_with_barrier"), torch.arange(THREADS - 1, -1, -1.0))


def test_a_seed_repeats_and_another_differs() -> None:
    first, again, other = (selftest("exchange_without_barrier", seed=seed).isnan() for seed in (5, 5, 6))
    assert first.equal(again) and not first.equal(other)


def test_a_change_of_an_included_header_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "folder").mkdir(parents=True)
    source, near, far = (tmp_path / "csrc" / name for name in ("folder/a.cu", "folder/b.h", "c.h"))
    source.write_text('#include "b.h"\n')
    near.write_text('#include "c.h"\n')
    far.write_text("int one;\n")
    before = emulated.digest(tmp_path, source)
    assert before == emulated.digest(tmp_path, source) != emulated.digest(tmp_path, source, "-O2")
    far.write_text("int two;\n")
    assert emulated.digest(tmp_path, source) != before


def test_two_mutations_of_one_place_are_refused() -> None:
    with pytest.raises(AssertionError, match="a mutation needs one place"):
        emulated.mutant("csrc/testing/selftest.cu", "__global__", "")
