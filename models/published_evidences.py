r"""Static models whose log evidence others have published.

- :func:`seeds`, germination on 21 plates with a random effect, BUGS's example with its vague prior, as the benchmark
  *Beyond ELBOs* [1] writes it.
- :func:`phase_transition`, of the chapter on nested sampling of BlackJAX's sampling book: a spike of scale 0.1 in ten
  dimensions holds nine tenths of the evidence, and nothing around it tells of it.
- :func:`wells`, independent double wells :math:`e^{-x_1^4 + 6 x_1^2 + x_1 / 2 - x_2^2 / 2}` [2]; start from
  :func:`wide`.
- :func:`isotropic`, :math:`e^{-|x|^2 / 2}` under a uniform prior on :math:`[-5, 5]^2`, of PyAutoFit.

**References**

1. *Beyond ELBOs: A Large-Scale Evaluation of Variational Methods for Sampling*, D. Blessing, X. Jia, J. Esslinger,
   F. Vargas, G. Neumann (2024)
2. *Sequential Controlled Langevin Diffusions*, J. Chen et al. (2024)
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints

#: Germinated and sown seeds, and the two factors: seed, and root extract.
SEEDS = tuple(
    map(
        jnp.array,
        (
            (10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3),
            (39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7),
            (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
            (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
        ),
    )
)


def seeds(germinated: ArrayLike, total: ArrayLike, x1: ArrayLike, x2: ArrayLike) -> None:
    tau = numpyro.sample("tau", dist.Gamma(0.01, 0.01))
    a0, a1, a2, a12 = (numpyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("a0", "a1", "a2", "a12"))
    with numpyro.plate("plates", len(germinated)):  # type: ignore[arg-type]
        b = numpyro.sample("b", dist.Normal(0.0, 1.0 / jnp.sqrt(tau)))
        logits = a0 + a1 * x1 + a2 * x2 + a12 * x1 * x2 + b
        numpyro.sample("r", dist.Binomial(total, logits=logits), obs=germinated)


def phase_transition(dim: int = 10, log_height: float = math.log(9e10), scale: float = 0.1) -> None:
    x = numpyro.sample("x", dist.Uniform(-5.0, 5.0).expand([dim]).to_event(1))
    half = jnp.sum(x**2) / 2.0
    numpyro.factor("likelihood", jnp.logaddexp(-half, log_height - half / scale**2))


def wells(num_pairs: int) -> None:
    with numpyro.plate("pair", num_pairs):
        x1 = numpyro.sample("x1", dist.ImproperUniform(constraints.real, (), ()))
        x2 = numpyro.sample("x2", dist.ImproperUniform(constraints.real, (), ()))
        numpyro.factor("density", -(x1**4) + 6.0 * x1**2 + x1 / 2.0 - x2**2 / 2.0)


def wide(num_pairs: int) -> None:
    with numpyro.plate("pair", num_pairs):
        numpyro.sample("x1", dist.Normal(0.0, 2.0))
        numpyro.sample("x2", dist.Normal(0.0, 1.0))


def isotropic(normalised: bool = False) -> None:
    """The published value is that of the likelihood without its constant; with it, it is :math:`-\\log 100`."""
    x = numpyro.sample("x", dist.Uniform(-5.0, 5.0).expand([2]).to_event(1))
    numpyro.factor("likelihood", -jnp.sum(x**2) / 2.0 - normalised * math.log(2.0 * math.pi))
