"""BicycleGAN: Toward Multimodal Image-to-Image Translation (Zhu et al., NeurIPS 2017).

One generator from A and a code to B, an encoder from B to a code, two critics. A picture has many translations, one for
each code. In cVAE-GAN the code encoded from the true picture must bring that back (L1), and stays near N(0, 1) (KL). In
cLR-GAN a drawn code must be read off the picture made with it (L1). BicycleGAN is both; `model` chooses it, one of the
two, or pix2pix + noise, the baseline without an encoder.

`official`, the only preset, has the losses and optimizers of the authors' PyTorch code. Its "batch size 1" are two
pictures: of each pair of consecutive samples the first is translated with both codes, and the second is what the second
critic sees as real. Until 2020 that code made two steps of the generator in each update, which is not here. KL is a sum
over the numbers of a code and a mean over pictures; the authors' code adds up pictures too, more the larger the batch.

The latent term reaches the generator and not the encoder, or the two would hide the code in the picture. The authors
backpropagate it on its own; here the encoder is frozen while it reads the drawn code, and all terms are one backward.
In cLR-GAN it trains the encoder too, as nothing else would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from i2i_dist.config import Beta, Section, Weight, Width
from i2i_dist.data.batch import Batch, first_and_last
from i2i_dist.draws import Draws
from i2i_dist.losses.adversarial import discriminator_loss, generator_loss
from i2i_dist.losses.cycle import l1
from i2i_dist.losses.latent import kl_to_standard_normal
from i2i_dist.method import SIDES, Direction, Judge, Losses, ParameterGroup, Side, Stream
from i2i_dist.networks.init import initialise
from i2i_dist.networks.multiscale import CriticsByKind
from i2i_dist.networks.style_encoder import StyleEncoder
from i2i_dist.networks.styled_unet import StyledUNetGenerator

# What each model translates with: the code encoded from the true picture, a drawn one, or both.
CODES: Mapping[str, tuple[str, ...]] = {
    "bicyclegan": ("encoded", "random"),
    "cvae_gan": ("encoded",),
    "clr_gan": ("random",),
    "pix2pix_noise": ("random",),
}
UNUSED: Mapping[str, tuple[str, ...]] = {  # weights of terms that a model does not have
    "cvae_gan": ("lambda_gan_random", "lambda_latent"),
    "clr_gan": ("lambda_gan", "lambda_l1", "lambda_kl"),
    "pix2pix_noise": ("lambda_gan", "lambda_kl", "lambda_latent"),
}


class Hyperparameters(Section):
    """What a configuration's section `method` may say; the defaults are the preset `official`."""

    name: Literal["bicyclegan"] = "bicyclegan"
    preset: Literal["official"] = "official"
    model: Literal["bicyclegan", "cvae_gan", "clr_gan", "pix2pix_noise"] = "bicyclegan"
    style_dim: Width = 8  # numbers of a code
    width: Width = 64  # channels of the generator's first convolution
    downs: Annotated[int, Field(ge=2, le=14)] = 8  # halvings; crop_size must be a multiple of 2 ** downs
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5  # share of the values that it drops, in training alone
    encoder_width: Width = 64
    encoder_blocks: Annotated[int, Field(ge=1, le=13)] = 4
    critic_width: Annotated[int, Field(ge=4, le=65_536)] = 64  # each scale has half of the one before
    critic_layers: Annotated[int, Field(ge=1, le=14)] = 3  # halvings of each scale
    critic_scales: Annotated[int, Field(ge=1, le=3)] = 2
    conditional_critic: bool = False  # whether the critics see A beside the picture of B
    adversarial: Literal["lsgan", "vanilla", "hinge", "hinge_standard"] = "lsgan"
    lambda_gan: Weight = 1.0  # of the picture made with the encoded code
    lambda_gan_random: Weight = 1.0
    lambda_l1: Weight = 10.0
    lambda_kl: Weight = 0.01
    lambda_latent: Weight = 0.5
    lr: Weight = 2e-4
    betas: tuple[Beta, Beta] = (0.5, 0.999)

    @model_validator(mode="after")
    def _model_fits(self) -> Hyperparameters:
        for key in UNUSED.get(self.model, ()):
            if (given := getattr(self, key)) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: given {given}, but the model {self.model} has no such term; leave it out")
        if self.model != "pix2pix_noise" and self.encoder_blocks >= self.downs:
            # Otherwise it would halve pictures more often than the generator.
            raise ValueError(f"encoder_blocks: given {self.encoder_blocks}, allowed is less than downs={self.downs}")
        return self


class Outputs(NamedTuple):
    """What the generator's side makes of a batch, or of the first samples of its pairs; None is what the model lacks.

    Attributes:
        fake_encoded: Translations [N, 3, H, W] with the code encoded from the true picture.
        fake_random: Translations of the same pictures with a drawn code.
        mean, logvar: The encoded code's distribution [N, style_dim].
        code: The drawn code [N, style_dim].
        recovered: The code that the encoder reads off `fake_random`, [N, style_dim].
    """

    fake_encoded: Tensor | None = None
    fake_random: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    code: Tensor | None = None
    recovered: Tensor | None = None


class Generators(nn.Module):
    """The generator's side: G: (A, code) -> B and, but for pix2pix + noise, E: B -> code."""

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        super().__init__()
        self.model, self.codes, self.rate = config.model, CODES[config.model], config.dropout
        keys = ("style_dim", "width", "downs", "dropout")
        self.generator_ab = StyledUNetGenerator(**{key: getattr(config, key) for key in keys})
        self.encoder: StyleEncoder | None = None
        if config.model != "pix2pix_noise":
            size = {"style_dim": config.style_dim, "width": config.encoder_width, "blocks": config.encoder_blocks}
            self.encoder = StyleEncoder(**size, variance="encoded" in self.codes)
        initialise(self, "xavier", generator=init)

    def forward(self, batch: Batch, draws: Draws, fakes_only: bool = False) -> Outputs:
        """Translate with the codes that the model has, all in one pass of G; encode, and read the drawn code back."""
        given, _ = first_and_last(batch, len(self.codes))
        codes, mean, logvar = {name: self._noise(name, given, draws) for name in self.codes}, None, None
        if "encoded" in codes:
            assert self.encoder is not None
            mean, logvar = self.encoder(given.b)
            codes["encoded"] = mean + codes["encoded"] * (0.5 * logvar).exp()
        images = torch.cat([given.a] * len(codes))
        made = self.generator_ab(images, torch.cat(list(codes.values())), self._kept(given, draws))
        fakes = {f"fake_{name}": fake for name, fake in zip(codes, made.chunk(len(codes)), strict=True)}
        if fakes_only:
            return Outputs(**fakes)
        return Outputs(**fakes, mean=mean, logvar=logvar, **self._read_back(codes, fakes))

    def _read_back(self, codes: Mapping[str, Tensor], fakes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder is None or "random" not in codes:
            return {}
        self.encoder.requires_grad_(self.model == "clr_gan")
        try:
            recovered = self.encoder(fakes["fake_random"]).mean
        finally:
            self.encoder.requires_grad_(True)  # before the backward, in which its other pass must reach it
        return {"code": codes["random"], "recovered": recovered}

    def _noise(self, purpose: str, given: Batch, draws: Draws) -> Tensor:
        noise = draws.normal(purpose, given.positions, self.generator_ab.style_dim)
        return noise.to(given.a.device, given.a.dtype, non_blocking=True)

    def _kept(self, given: Batch, draws: Draws) -> list[Tensor]:
        """Draw, for each place of dropout, masks for all codes: a picture drops something else with each."""
        kept = [
            [draws.kept(f"{code}.up{place}", given.positions, shape, self.rate) for code in self.codes]
            for place, shape in enumerate(self.generator_ab.dropout_shapes(*given.a.shape[-2:]))
        ]
        return [torch.cat(masks).to(given.a.device, non_blocking=True) for masks in kept]


class BicycleGAN:
    """Both sides and their losses."""

    Config: ClassVar[type[BaseModel]] = Hyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": {}}
    ARCHITECTURE: ClassVar[tuple[str, ...]] = (
        "name", "model", "style_dim", "width", "downs", "encoder_width", "encoder_blocks", "critic_width",
        "critic_layers", "critic_scales", "conditional_critic",
    )  # fmt: skip
    streams: ClassVar[tuple[Stream, ...]] = ("paired",)
    directions: ClassVar[tuple[Direction, ...]] = ("a_to_b",)
    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Hyperparameters, init: torch.Generator) -> None:
        self.config = config
        self.codes = CODES[config.model]
        self.group = len(self.codes)  # of two, the true picture of one critic is that of another sample
        self.fakes = tuple(f"fake_{code}" for code in self.codes)
        self.style_dim, self.encodes = config.style_dim, config.model != "pix2pix_noise"
        self.pool_size, self.couples_batch, self.penalised = 0, False, False
        self.generator = Generators(config, init)
        size = {"width": config.critic_width, "layers": config.critic_layers, "scales": config.critic_scales}
        self.discriminator = CriticsByKind(self.codes, in_channels=6 if config.conditional_critic else 3, **size)
        initialise(self.discriminator, "xavier", generator=init)
        self.multiple = self.generator.generator_ab.multiple

    def turns(self, update: int) -> tuple[Side, ...]:
        """Generator first; the critics then see the fakes made before its step."""
        return "generator", "discriminator"

    def parameter_groups(self) -> Mapping[Side, Sequence[ParameterGroup]]:
        """One group a network, all with the same rate and betas."""
        lr, betas = self.config.lr, self.config.betas
        return {
            side: [ParameterGroup(name, list(net.parameters()), lr, betas) for name, net in module.named_children()]
            for side, module in zip(SIDES, (self.generator, self.discriminator), strict=True)
        }

    def generator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Return the adversarial terms, L1, KL and latent term, or what the model has of them."""
        config, (given, _) = self.config, first_and_last(batch, self.group)
        fakes = {code: getattr(outputs, f"fake_{code}") for code in self.codes}
        logits = judge({code: self._with_source(given.a, fake) for code, fake in fakes.items()})
        weights = {"encoded": config.lambda_gan, "random": config.lambda_gan_random}
        losses = {}
        for code, scales in logits.items():
            terms = [generator_loss(config.adversarial, scale) for scale in scales]
            losses[f"gan_{code}"] = weights[code] * torch.stack(terms).sum()
        if config.model != "clr_gan":
            losses["l1_b"] = config.lambda_l1 * l1(fakes[self.codes[0]], given.b)
        if outputs.mean is not None and outputs.logvar is not None:
            losses["kl"] = config.lambda_kl * kl_to_standard_normal(outputs.mean, outputs.logvar)
        if outputs.recovered is not None and outputs.code is not None:
            losses["latent"] = config.lambda_latent * l1(outputs.recovered, outputs.code)
        return losses

    def discriminator_loss(self, batch: Batch, outputs: Outputs, judge: Judge, images_seen: int) -> Losses:
        """Real and fake term of each critic, added up over its scales."""
        given, other = first_and_last(batch, self.group)
        true, shown, losses = {"encoded": given, "random": other}, {}, {}
        for code in self.codes:
            real = self._with_source(true[code].a, true[code].b)
            # In one pass, which norms per image make equal to two.
            shown[code] = torch.cat([real, self._with_source(given.a, getattr(outputs, f"fake_{code}"))])
        for code, scales in judge(shown).items():
            terms = [discriminator_loss(self.config.adversarial, *scale.chunk(2)) for scale in scales]
            losses[f"critic_{code}"] = torch.stack(terms).sum()
        return losses

    def _with_source(self, source: Tensor, image: Tensor) -> Tensor:
        return torch.cat([source, image], dim=1) if self.config.conditional_critic else image

    def translate(self, image: Tensor, direction: Direction) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1] from A to B with the code 0, the most likely one."""
        return self.translate_styled(image, image.new_zeros(len(image), self.style_dim))

    def translate_styled(self, image: Tensor, codes: Tensor) -> Tensor:
        """Translate images [N, 3, H, W] in [-1, 1] from A to B, each with its row of `codes`; nothing is dropped."""
        translated: Tensor = self.generator.generator_ab(image, codes)
        return translated

    def encode(self, image: Tensor) -> Tensor:
        """Return the mean code [N, style_dim] of images [N, 3, H, W] of B.

        Raises:
            ValueError: The model has no encoder.
        """
        if self.generator.encoder is None:
            raise ValueError(f"method.model '{self.config.model}' has no encoder; draw codes from N(0, 1) instead.")
        mean: Tensor = self.generator.encoder(image).mean
        return mean
