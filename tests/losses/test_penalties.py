"""The gradient penalty against what is known of linear critics, and its own gradient against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i2i_dist.losses.penalties import gradient_norms, gradient_penalty
from i2i_dist.networks.labelled_critic import LabelledCritic

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randn(3, 3, 8, 8, generator=DRAW, dtype=torch.float64)


def small_critic() -> LabelledCritic:
    critic = LabelledCritic(attributes=2, image_size=8, width=2, layers=2).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.4)
    return critic


def test_a_linear_critic_is_as_steep_everywhere() -> None:
    weight = torch.randn(3, 8, 8, generator=DRAW, dtype=torch.float64, requires_grad=True)
    norms = gradient_norms(lambda x: (x * weight).sum((1, 2, 3)), IMAGES)
    length = weight.detach().square().sum().sqrt()
    torch.testing.assert_close(norms.detach(), length.expand(3))
    penalty = gradient_penalty(norms)
    torch.testing.assert_close(penalty.detach(), (length - 1).square())
    penalty.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * (length - 1) * weight.detach() / length)


def test_the_values_of_an_image_are_added_up() -> None:
    """Of a critic that gives two values, v and 2 v, the steepness is 3 times that of v."""
    critic = small_critic()

    def two(x: Tensor) -> Tensor:
        patches = critic(x).patches
        return torch.cat([patches, 2 * patches], 1)

    torch.testing.assert_close(gradient_norms(two, IMAGES), 3 * gradient_norms(lambda x: critic(x).patches, IMAGES))
    first, second, third = (gradient_norms(lambda x: critic(x).patches, image[None]) for image in IMAGES)
    alone = torch.cat([first, second, third])
    torch.testing.assert_close(gradient_norms(lambda x: critic(x).patches, IMAGES), alone)
    assert len(set(alone.tolist())) == 3


def test_its_own_gradient_is_that_of_differences() -> None:
    critic = small_critic()

    def value() -> Tensor:
        return gradient_penalty(gradient_norms(lambda x: critic(x).patches, IMAGES))

    value().backward()
    draw, step = torch.Generator().manual_seed(2), 1e-6
    for name, parameter in critic.named_parameters():
        if name.startswith("to_classes"):
            assert parameter.grad is None  # the penalty is on the patches alone
            continue
        if name.endswith("bias"):  # moves a value, and only where it crosses a kink of the leaky ReLU its slope
            assert parameter.grad is None or not parameter.grad.any()
            continue
        assert parameter.grad is not None
        way, ends = torch.randn(parameter.shape, generator=draw, dtype=torch.float64), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(way, alpha=sign * step)
                ends.append(float(value()))
                parameter.sub_(way, alpha=sign * step)
        slope = float((parameter.grad * way).sum())
        assert abs(slope) > 1e-2
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_images_are_constants_and_gradients_may_be_off() -> None:
    critic, images = small_critic(), IMAGES.clone().requires_grad_()
    with torch.no_grad():
        norms = gradient_norms(lambda x: critic(x).patches, images)
    norms.sum().backward()
    assert images.grad is None
    assert critic.stages[0].weight.grad is not None
    with torch.device("meta"):
        on_meta = LabelledCritic(attributes=2, image_size=8, width=2, layers=2)
    assert gradient_norms(lambda x: on_meta(x).patches, torch.empty(3, 3, 8, 8, device="meta")).shape == (3,)


def test_it_has_all_its_digits_under_autocast() -> None:
    critic, images = small_critic().float(), IMAGES.float()
    expected = gradient_norms(lambda x: critic(x).patches, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(images).patches.dtype == torch.bfloat16
        found = gradient_norms(lambda x: critic(x).patches, images)
        of_low = gradient_norms(lambda x: critic(x).patches, images.bfloat16())
    assert torch.equal(found, expected)
    assert of_low.dtype == torch.float32
    torch.testing.assert_close(of_low, expected, rtol=0.02, atol=0)


def test_where_a_critic_is_flat_there_is_a_gradient_of_zeros() -> None:
    weight = torch.zeros(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    norms = gradient_norms(lambda x: F.conv2d(x, weight), IMAGES)
    assert not norms.any()
    gradient_penalty(norms).backward()
    assert weight.grad is not None and not weight.grad.any()
