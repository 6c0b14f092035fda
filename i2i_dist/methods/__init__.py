"""All methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from i2i_dist.config import ConfigError, validate
from i2i_dist.method import Method
from i2i_dist.methods.bicyclegan import BicycleGAN
from i2i_dist.methods.cut import CUT
from i2i_dist.methods.cyclegan import CycleGAN
from i2i_dist.methods.dclgan import DCLGAN
from i2i_dist.methods.matchgan import MatchGAN
from i2i_dist.methods.opgan import OPGAN
from i2i_dist.methods.pix2pix import Pix2Pix
from i2i_dist.methods.simdcl import SimDCL
from i2i_dist.methods.stargan import StarGAN
from i2i_dist.methods.ugatit import UGATIT

METHODS: dict[str, type[Method]] = {
    "bicyclegan": BicycleGAN,
    "cut": CUT,
    "cyclegan": CycleGAN,
    "dclgan": DCLGAN,
    "matchgan": MatchGAN,
    "opgan": OPGAN,
    "pix2pix": Pix2Pix,
    "simdcl": SimDCL,
    "stargan": StarGAN,
    "ugatit": UGATIT,
}


def resolve(section: Mapping[str, Any]) -> tuple[type[Method], BaseModel]:
    """Return the class that a configuration's section `method` names, and its validated hyperparameters.

    The preset's values, without one those of the method's first, stand in for everything the section does not say.

    Raises:
        ConfigError: Unknown name, preset or key, or an impossible value.
    """
    name = _choice("method.name", section.get("name"), METHODS)
    method = METHODS[name]
    preset = _choice("method.preset", section.get("preset", next(iter(method.PRESETS))), method.PRESETS)
    return method, validate(method.Config, {**method.PRESETS[preset], **section, "preset": preset}, prefix="method.")


def _choice(key: str, given: Any, known: Mapping[str, Any]) -> str:
    if isinstance(given, str) and given in known:
        return given
    nearest = difflib.get_close_matches(str(given), list(known), n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    given_text = "nothing" if given is None else repr(given)
    raise ConfigError(f"{key}: given {given_text}, allowed is one of {', '.join(sorted(known))}{hint}")
