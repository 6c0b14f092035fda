"""U-GAT-IT: Unsupervised Generative Attentional Networks with Adaptive Layer-Instance Normalization (Kim et al. 2020).

Two generators whose encoders tell by a class activation map what is to be changed, and whose decoders have norms
between instance and layer norm, steered by that map; two critics for each domain, a deep and a shallow one, with maps
of their own. `light` leaves out the layer that makes 96 % of a full generator's parameters.

`official` is the authors' PyTorch code, `tensorflow` the code that the paper's numbers come from. They differ in
biases, learned scales of instance norms, the classifier of the attention, variances, the start and use of rho, initial
weights and weight decay. The order in which the TensorFlow code flattens the map is not here: it only renames inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional as F

from i2i_dist.config import Beta, Blocks, Pixels, Section, Weight, Width
from i2i_dist.data.batch import Batch
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1
from i2i_dist.method import Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.networks.adalin_resnet import AttentiveGenerator, Translation
from i2i_dist.networks.attention_critic import AttentiveCritic, CriticInput, FourCritics, Verdict
from i2i_dist.networks.critics import DomainPair
from i2i_dist.networks.init import initialise

Depth = Annotated[int, Field(ge=3, le=14)]  # 14 is what the largest pictures allow


class Hyperparameters(Section):
    """What a configuration's section `method` may say; the defaults are the preset `official`."""

    name: Literal["ugatit"] = "ugatit"
    preset: Literal["official", "tensorflow"] = "official"
    width: Width = 64  # channels of the generators' first convolution
    blocks: Blocks = 4  # residual blocks, and as many with AdaLIN
    light: bool = False
    cam_grid: Pixels = 64  # a full generator reads its attended map averaged to so many places a side: at 256, all
    critic_width: Width = 64
    global_layers: Depth = 7  # a critic takes pictures of at least 3 * 2**(layers - 2) pixels a side
    local_layers: Depth = 5
    bias: bool = False  # in the generators' convolutions and linear layers, and the critics' last convolution
    affine: bool = False  # instance norms have a learned scale and shift
    cam_shared: bool = False  # one classifier for mean and maximum, whose bias is added to the channels' weights
    cam_normalised: bool = False  # the critics' channels are weighted by normalised weights instead of raw ones
    variance: Literal["unbiased", "biased"] = "unbiased"  # of AdaLIN and ILN
    rho_smoothing: bool = False  # AdaLIN starts from rho = 1 and uses rho - 0.1, instead of starting from 0.9
    init: Literal["uniform", "normal"] = "uniform"  # PyTorch's default, or N(0, 0.02) with biases 0
    decays: Literal["all", "kernels"] = "all"  # kernels are the weights of convolutions and linear layers
    lambda_gan: Weight = 1.0
    lambda_cycle: Weight = 10.0
    lambda_identity: Weight = 10.0
    lambda_cam: Weight = 1000.0
    lr: Weight = 1e-4
    betas: tuple[Beta, Beta] = (0.5, 0.999)
    weight_decay: Weight = 1e-4


class Outputs(NamedTuple):
    """What the generator's side makes of a batch; the fakes alone if no more is asked.

    Images are [N, 3, H, W]. The logits [N, 2] are those of a generator's attention, for images of the domain that it
    translates from (source) and for images of the other (target).
    """

    fake_a: Tensor
    fake_b: Tensor
    cycled_a: Tensor | None = None
    cycled_b: Tensor | None = None
    identity_a: Tensor | None = None
    identity_b: Tensor | None = None
    source_ab: Tensor | None = None
    target_ab: Tensor | None = None
    source_ba: Tensor | None = None
    target_ba: Tensor | None = None


class Generators(nn.Module):
    """The generator's side: A -> B and B -> A."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        keys = ("width", "blocks", "light", "cam_grid", "bias", "affine", "cam_shared", "variance", "rho_smoothing")
        form: dict[str, Any] = {key: getattr(config, key) for key in keys}
        self.generator_ab, self.generator_ba = AttentiveGenerator(**form), AttentiveGenerator(**form)
        initialise(self, config.init, generator=init)

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate both ways, there and back, and what must stay as it is; no draws are needed.

        What one generator can do at once is one pass: everything is per image, so this changes nothing.
        """
        images = len(batch.a)
        if fakes_only:
            return Outputs(self.generator_ba(batch.b).image, self.generator_ab(batch.a).image)
        of_a_and_b: Translation = self.generator_ab(torch.cat([batch.a, batch.b]))
        fake_b, identity_b = of_a_and_b.image.split(images)
        source_ab, target_ab = of_a_and_b.logits.split(images)
        of_all: Translation = self.generator_ba(torch.cat([batch.b, fake_b, batch.a]))
        fake_a, cycled_a, identity_a = of_all.image.split(images)
        source_ba, _, target_ba = of_all.logits.split(images)
        cycled_b = self.generator_ab(fake_a).image
        return Outputs(
            fake_a, fake_b, cycled_a, cycled_b, identity_a, identity_b, source_ab, target_ab, source_ba, target_ba
        )


class UGATIT:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {},
        "tensorflow": {
            "bias": True, "affine": True, "cam_shared": True, "cam_normalised": True, "variance": "biased",
            "rho_smoothing": True, "init": "normal", "decays": "kernels",
        },
    }  # fmt: skip
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (
        "name", "width", "blocks", "light", "cam_grid", "critic_width", "global_layers", "local_layers", "bias",
        "affine", "cam_shared",
    )  # fmt: skip
    streams: ClassVar[tuple[Stream, ...]] = ("unpaired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b", "b_to_a")
    fakes: ClassVar[tuple[str, ...]] = ("fake_a", "fake_b")
    shown: ClassVar[tuple[str, ...]] = ()
    penalised: ClassVar[bool] = False
    multiple: ClassVar[int] = 4
    group: ClassVar[int] = 1

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.pool_size = 0
        self.couples_batch = False
        self.generator = Generators(config, init)

        def critic(layers: int) -> AttentiveCritic:
            return AttentiveCritic(
                width=config.critic_width,
                layers=layers,
                last_bias=config.bias,
                cam_shared=config.cam_shared,
                cam_normalised=config.cam_normalised,
            )

        deep, shallow = config.global_layers, config.local_layers
        self.discriminator = FourCritics(critic(deep), critic(deep), critic(shallow), critic(shallow))
        initialise(self.discriminator, config.init, generator=init)

    def turns(self, update: int) -> tuple[Side, ...]:
        """Discriminator first; both turns share the batch."""
        return "discriminator", "generator"

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """Rates and betas are all the same; what differs is who decays, and that rho stays in [0, 1]."""
        return {
            "generator": tuple(self._groups("generators", self.generator)),
            "discriminator": tuple(self._groups("critics", self.discriminator)),
        }

    def _groups(self, name: str, side: nn.Module) -> Iterator[ParameterGroup]:
        config = self.config
        rho = {key: p for key, p in side.named_parameters() if key.endswith(".rho")}
        others = [p for key, p in side.named_parameters() if key not in rho]
        # Kernels are matrices or more; biases, scales and shifts are vectors.
        free = [p for p in others if p.dim() == 1 and config.decays == "kernels"]
        decayed = [p for p in others if p.dim() > 1 or config.decays == "all"]
        yield ParameterGroup(name, decayed, config.lr, config.betas, config.weight_decay)
        if free:
            yield ParameterGroup(f"{name}_without_decay", free, config.lr, config.betas)
        if rho:
            decay = config.weight_decay if config.decays == "all" else 0.0
            yield ParameterGroup("rho", list(rho.values()), config.lr, config.betas, decay, bounds=(0.0, 1.0))

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Adversarial, cycle, identity and attention terms of both directions (paper, equations 3 to 6)."""
        config = self.config
        assert outputs.cycled_a is not None and outputs.cycled_b is not None
        assert outputs.identity_a is not None and outputs.identity_b is not None
        assert outputs.source_ab is not None and outputs.target_ab is not None
        assert outputs.source_ba is not None and outputs.target_ba is not None
        fakes = DomainPair(outputs.fake_a, outputs.fake_b)
        (fake,) = judge(CriticInput((fakes,), batch.update_position, "generator"))
        return {
            "gan_ab": config.lambda_gan * _seems_real(fake.global_b, fake.local_b),
            "gan_ba": config.lambda_gan * _seems_real(fake.global_a, fake.local_a),
            "cycle_a": config.lambda_cycle * l1(outputs.cycled_a, batch.a),
            "cycle_b": config.lambda_cycle * l1(outputs.cycled_b, batch.b),
            "identity_a": config.lambda_identity * l1(outputs.identity_a, batch.a),
            "identity_b": config.lambda_identity * l1(outputs.identity_b, batch.b),
            "cam_ab": config.lambda_cam * _told_apart(outputs.source_ab, outputs.target_ab),
            "cam_ba": config.lambda_cam * _told_apart(outputs.source_ba, outputs.target_ba),
        }

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """The real and the fake term of every logit, not halved; real images first and in a pass of their own."""
        passes = DomainPair(batch.a, batch.b), DomainPair(outputs.fake_a, outputs.fake_b)
        real, fake = judge(CriticInput(passes, batch.update_position, "discriminator"))
        weight = self.config.lambda_gan
        return {
            "critic_a": weight * (_apart(real.global_a, fake.global_a) + _apart(real.local_a, fake.local_a)),
            "critic_b": weight * (_apart(real.global_b, fake.global_b) + _apart(real.local_b, fake.local_b)),
        }

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1]."""
        return self._translated(image, direction).image

    def attend(self, image: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        """Translate, and return of the same pass heat maps [N, 1, H / 4, W / 4], at least 0."""
        made = self._translated(image, direction)
        return made.image, made.attended.sum(1, keepdim=True)

    def _translated(self, image: Tensor, direction: Direction) -> Translation:
        side = self.generator
        made: Translation = (side.generator_ab if direction == "a_to_b" else side.generator_ba)(image)
        return made


def _apart(real: Verdict, fake: Verdict) -> Tensor:
    terms = [discriminator_loss("lsgan", *logits) for logits in zip(real, fake, strict=True)]
    return torch.stack(terms).sum()


def _seems_real(*fakes: Verdict) -> Tensor:
    return torch.stack([generator_loss("lsgan", logits) for fake in fakes for logits in fake]).sum()


def _told_apart(source: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of attention logits [N, 2] with 1 for source and 0 for target images."""
    return F.softplus(-source).mean() + F.softplus(target).mean()
