"""Every official network that is converted, by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from i2i_dist.official import bicyclegan, cyclegan, matchgan, ugatit
from i2i_dist.official.names import Network

# Method -> the name of a network in its file -> the network.
NETWORKS: dict[str, dict[str, Network]] = {
    **cyclegan.NETWORKS,
    **matchgan.NETWORKS,
    "bicyclegan": bicyclegan.NETWORKS,
    "ugatit": ugatit.NETWORKS,
}

# Method -> hyperparameters that a checkpoint must have for the official code to compute what it does.
FORMS: dict[str, Mapping[str, Any]] = {
    "bicyclegan": bicyclegan.FORM,
    "matchgan": matchgan.FORM,
    "ugatit": ugatit.FORM,
}

# Method -> hyperparameters of which that code only knows multiples of a number.
MULTIPLES: dict[str, Mapping[str, int]] = {"matchgan": matchgan.MULTIPLES}
