"""The estimators that the benchmarks compare, by the names of the published experiments."""

from __future__ import annotations

import re
from typing import Any

from numpyro.infer.elbo import ELBO

from numpyro_smc import IWELBO, OVIS, RWS, STL, TVO, VIMCO, DReG, Reinforce

EXAMPLES = (
    "ovis-gamma0, ovis-gamma1, ovis-S10-exclusive (10 auxiliary draws besides the K particles), ovis-S5 (5 of the K), "
    "vimco, vimco-geometric, reinforce, iwelbo, stl, dreg, rws, tvo-part2-config1, tvo-part5-beta2, tvo-part1"
)

_PLAIN = {
    "vimco": VIMCO,
    "vimco-arithmetic": VIMCO,
    "reinforce": Reinforce,
    "iwelbo": IWELBO,
    "pathwise-iwae": IWELBO,
    "stl": STL,
    "dreg": DReG,
    "rws": RWS,
    "wake-wake": RWS,
}


def make_estimator(name: str, num_particles: int, **options: Any) -> ELBO:
    """The loss that a name stands for.

    :param options: passed on, for example ``batch_size``.
    :raises ValueError: for an unknown name.
    """
    if name in _PLAIN:
        return _PLAIN[name](num_particles, **options)
    if name == "vimco-geometric":
        return VIMCO(num_particles, mean="geometric", **options)
    if found := re.fullmatch(r"ovis-gamma([\d.]+)", name):
        return OVIS(num_particles, gamma=float(found[1]), **options)
    if found := re.fullmatch(r"ovis-S(\d+)(-exclusive)?", name):
        return OVIS(num_particles, num_auxiliary=int(found[1]), exclusive=bool(found[2]), **options)
    if found := re.fullmatch(r"tvo-part(\d+)(?:-(config1|config2|beta\d+))?", name):
        beta_min = _beta_min(found[2] or "beta10", num_particles)
        return TVO(num_particles, partitions=int(found[1]), beta_min=beta_min, **options)
    raise ValueError(f"There is no estimator '{name}'; there are {EXAMPLES}.")


def _beta_min(schedule: str, num_particles: int) -> float:
    if schedule.startswith("beta"):
        return 10.0 ** -int(schedule[4:])
    by_size = {"config1": (0.05, 0.2, 0.3), "config2": (0.01, 0.02, 0.03)}[schedule]
    return by_size[0 if num_particles < 10 else 1 if num_particles < 30 else 2]
