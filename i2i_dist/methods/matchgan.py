"""MatchGAN: A Self-Supervised Semi-Supervised Conditional Generative Adversarial Network (Sun et al., ACCV 2020).

StarGAN that needs the labels of a part of the pictures. The critic also says of two pictures whether they show the
same: it learns that from pictures with labels, and teaches it to the generator, whose pictures have the labels they
were made for. So pictures come in groups, of a few classes with a few pictures each. Updates on pictures with and
without labels take turns; what needs the true label, the critic's reading and the cycle, is left out of the latter.

`official` is the authors' code, in which the decay of the learning rate that the text speaks of comes to one
thousandth: `lr_constant` is the share that it leaves alone. `paper` has the whole decay. That code does not mirror
pictures without labels; here data.flip is for all. Its labelled subset is in the order of the files, and here drawn.

In that code, and so by default here, the head for pairs is one linear layer on the features of both pictures, which
adds up what it finds in each. Whether the two show the same cannot be said by a sum: over pairs in which each class is
as often with its like as with others, the best answer is chance, and lambda_match * ln 2 is where its terms stay. With
`match_head: difference`, which is not the authors', the layer reads how far the features are apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from i2i_dist.config import Weight
from i2i_dist.data.batch import LabelledBatch
from i2i_dist.draws import Draws
from i2i_dist.losses.labels import match_loss, match_pairs
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.methods.stargan import (
    Critic,
    CriticInput,
    Generators,
    LabelKeys,
    Outputs,
    StarGAN,
    critic_terms,
    generator_terms,
    groups_of,
    turns_of,
)
from i2i_dist.networks.labelled_critic import Matching


class Hyperparameters(LabelKeys):
    """What a configuration's section `method` may say: StarGAN's keys, and those of the groups."""

    name: Literal["matchgan"] = "matchgan"
    group_classes: Annotated[int, Field(ge=2, le=1_024)] = 4  # of a group of pictures; targets of its translations
    group_images: Annotated[int, Field(ge=2, le=1_024, multiple_of=2)] = 4  # pictures of each class
    lambda_match: Weight = 0.5
    match_head: Matching = "joined"
    # Whether pictures whose labels are not told have updates of their own; null means where there are some because
    # labelled_fraction is below 1. Where labels are really missing, true, at any fraction.
    unlabelled_turns: bool | None = None

    def streams(self) -> tuple[Stream, ...]:
        """Return what feeds one update after the other."""
        both = self.labelled_fraction < 1 if self.unlabelled_turns is None else self.unlabelled_turns
        return ("labelled", "unlabelled") if both else ("labelled",)

    @model_validator(mode="after")
    def _groups_fit(self) -> Hyperparameters:
        classes = len(self.space().classes)
        if self.group_classes > classes:
            raise ValueError(f"group_classes: given {self.group_classes}, allowed is at most {classes}, as there are")
        if len(self.streams()) > 1 and self.critic_turns % 2 == 0:
            raise ValueError(
                f"critic_turns: given {self.critic_turns}, allowed with unlabelled_turns is an odd number: updates "
                "with and without labels take turns, and the generator must meet both"
            )
        return self


class MatchGAN:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": {}, "paper": {"lr_constant": 0.0}}
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (*StarGAN.ARCHITECTURE, "match_head")
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b",)
    fakes: ClassVar[tuple[str, ...]] = ("fake",)
    shown: ClassVar[tuple[str, ...]] = ("mixed",)
    penalised: ClassVar[bool] = True
    multiple: ClassVar[int] = 4

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.pool_size, self.couples_batch = 0, False
        self.streams = config.streams()
        self.label_space, self.labelled_fraction = config.space(), config.labelled_fraction
        self.labelled_group = classes, images = config.group_classes, config.group_images
        self.group = classes * images
        self._classes = torch.from_numpy(self.label_space.classes).float()
        self._pairs, self._same = match_pairs(classes, images)
        self.generator = Generators(config, self._targets, init)
        self.discriminator = Critic(config, init, matching=config.match_head)

    def _targets(self, batch: LabelledBatch, draws: Draws) -> Tensor:
        """Draw different classes for each group, which its samples take by turns.

        So each class of pictures gets each target, where it has as many pictures as there are classes.
        """
        classes, images = self.labelled_group
        drawn = draws.distinct("target", batch.positions[:: self.group], len(self._classes), classes)
        return self._classes[drawn.repeat(1, images).flatten()]

    def _of_all_groups(self, pairs: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Return the pairs of one group as those of all, and whether they are of the same class."""
        firsts = torch.arange(0, samples, self.group)
        return (firsts[:, None, None] + pairs).flatten(0, 1), self._same.repeat(len(firsts))

    def _by_target(self, pairs: Tensor) -> Tensor:
        """Turn pairs of pictures that lie class by class into the same of pictures whose classes take turns."""
        classes, images = self.labelled_group
        return pairs % images * classes + pairs // images

    def turns(self, update: int) -> tuple[Side, ...]:
        """The critic; and at every `critic_turns`-th update the generator after it, on the same batch."""
        return turns_of(self.config, update)

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """One group a network, with the same rate and betas."""
        return groups_of(self.config, {"generator": self.generator, "discriminator": self.discriminator})

    def generator_loss(self, batch: LabelledBatch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """StarGAN's terms, without a cycle where labels are not told; and pairs of translations by their targets."""
        pairs, same = self._of_all_groups(self._by_target(self._pairs), len(batch.images))
        reading = judge(CriticInput(outputs.fake, pairs)).reading
        losses = generator_terms(self.config, self.label_space, batch, outputs, reading)
        losses["match_fake"] = self.config.lambda_match * match_loss(reading.matches, same)
        return losses

    def discriminator_loss(self, batch: LabelledBatch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """StarGAN's terms; and pairs of the pictures, which like the reading of their labels need these told."""
        pairs, same = self._of_all_groups(self._pairs, len(batch.images))
        asked = None if batch.labels is None else pairs
        verdict = judge(CriticInput(torch.cat([batch.images, outputs.fake]), asked, outputs.mixed))
        losses = critic_terms(self.config, self.label_space, batch, verdict)
        if asked is not None:
            losses["match_real"] = self.config.lambda_match * match_loss(verdict.reading.matches, same)
        return losses

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1] into the first class of the space."""
        return self.translate_labelled(image, self._classes[:1].to(image.device).expand(len(image), -1))

    def translate_labelled(self, image: Tensor, labels: Tensor) -> Tensor:
        """Translate images [N, 3, H, W], each into its own row of `labels` [N, L] of 0 and 1."""
        translated: Tensor = self.generator.generator(image, labels)
        return translated
