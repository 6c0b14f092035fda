"""Losses on labels against torch.nn.functional, and which pictures are compared."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from i2i_dist.losses.labels import _places, classification, match_loss, match_pairs

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]).repeat(2, 1).float()


def test_attributes_are_summed_over_and_pictures_averaged() -> None:
    expected = F.binary_cross_entropy_with_logits(LOGITS, LABELS, reduction="none").sum(1).mean()
    torch.testing.assert_close(classification(LOGITS, LABELS, [], range(5)), expected)


def test_a_choice_is_one_softmax() -> None:
    expected = -LOGITS[:, :3].log_softmax(1)[LABELS[:, :3].bool()].mean()
    choice = classification(LOGITS[:, :3], LABELS[:, :3], [[0, 1, 2]], [])
    torch.testing.assert_close(choice, expected)
    rest = F.binary_cross_entropy_with_logits(LOGITS[:, 3:], LABELS[:, 3:], reduction="sum") / 6
    torch.testing.assert_close(classification(LOGITS, LABELS, [[0, 1, 2]], [3, 4]), choice + rest)


def test_places_may_be_apart() -> None:
    order = [3, 0, 4, 1, 2]  # where each of the columns is put
    back = [order.index(place) for place in range(5)]
    mixed = classification(LOGITS[:, back], LABELS[:, back], [[order[0], order[1], order[2]]], [order[3], order[4]])
    torch.testing.assert_close(mixed, classification(LOGITS, LABELS, [[0, 1, 2]], [3, 4]))


def test_an_index_is_made_once_for_each_device() -> None:
    """And is the one that a list makes, to the last bit of gradients."""
    found, plain = (LOGITS.clone().requires_grad_() for _ in range(2))
    for _ in range(2):
        classification(found, LABELS, [[0, 3, 1]], [4, 2]).backward()
        exact = F.cross_entropy(plain[:, [0, 3, 1]], LABELS[:, [0, 3, 1]].argmax(1))
        summed = F.binary_cross_entropy_with_logits(plain[:, [4, 2]], LABELS[:, [4, 2]], reduction="sum")
        torch.stack([exact, summed / 6]).sum().backward()
    assert torch.equal(found.grad, plain.grad)
    assert _places((4, 2), LOGITS.device) is _places((4, 2), LOGITS.device)


def test_they_are_computed_in_fp32() -> None:
    low = LOGITS.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = classification(low, LABELS, [[0, 1, 2]], [3, 4]), match_loss(low[:, :2], torch.ones(6).long())
    expected = (
        classification(low.float(), LABELS, [[0, 1, 2]], [3, 4]),
        match_loss(low[:, :2].float(), torch.ones(6).long()),
    )
    assert all(one.dtype == torch.float32 for one in found)
    torch.testing.assert_close(found, expected)


def test_the_pairs_of_four_by_four_are_those_of_the_authors_code() -> None:
    """Written out: rows 0 to 3 are of the first class, 4 to 7 of the second, and so on."""
    pairs, same = match_pairs(4, 4)
    found = {(*pair, kind) for pair, kind in zip(pairs.tolist(), same.tolist(), strict=True)}
    assert found == {tuple(entry) for entry in (
        (0, 1, 1), (4, 5, 1), (8, 9, 1), (12, 13, 1),  # members 0 and 1
        (2, 1, 1), (6, 5, 1), (10, 9, 1), (14, 13, 1),  # members 2 and 1
        (2, 15, 0), (6, 3, 0), (10, 7, 0), (14, 11, 0),  # member 2, and 3 of the class before
        (0, 11, 0), (4, 15, 0), (8, 3, 0), (12, 7, 0),  # member 0, and 3 of the class before that
    )}  # fmt: skip
    assert len(pairs) == 16


@pytest.mark.parametrize(("classes", "images"), [(2, 2), (2, 4), (3, 2), (3, 4), (4, 6), (5, 8), (8, 2)])
def test_half_of_the_pairs_are_of_one_class_whatever_the_group(classes: int, images: int) -> None:
    pairs, same = match_pairs(classes, images)
    assert pairs.shape == (classes * images, 2) and same.sum() * 2 == len(pairs)
    assert pairs.min() == 0 and pairs.max() < classes * images
    assert torch.equal(same, (pairs[:, 0] // images == pairs[:, 1] // images).long())
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    assert set(pairs.flatten().tolist()) == set(range(classes * images))  # nobody is left out


def test_match_loss_is_the_mean_cross_entropy_of_two_classes() -> None:
    logits, same = LOGITS[:, :2], torch.tensor([1, 0, 1, 1, 0, 0])
    expected = torch.stack([-row.log_softmax(0)[kind] for row, kind in zip(logits, same, strict=True)]).mean()
    torch.testing.assert_close(match_loss(logits, same), expected)
