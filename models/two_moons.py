r"""Two moons: a crescent of noise around a folded shift; the posterior is two crescents [1].

.. math::

    \theta \sim \mathcal U(-1, 1)^2, \quad a \sim \mathcal U(-\tfrac\pi2, \tfrac\pi2), \quad
    r \sim \mathcal N(0.1, 0.01^2), \qquad
    x = \begin{pmatrix} r \cos a + 0.25 \\ r \sin a \end{pmatrix}
    + \frac1{\sqrt2} \begin{pmatrix} -|\theta_1 + \theta_2| \\ \theta_2 - \theta_1 \end{pmatrix}.

The shift folds a rotation of :math:`\theta` along its first axis, an isometry on either side. So the posterior is that
of the crescent's offset :math:`(r \cos a, r \sin a)`, mirrored, where it lies in the prior's square.

**References**

1. *Automatic Posterior Transformation for Likelihood-free Inference*, D. Greenberg, M. Nonnenmacher, J. Macke (2019)
2. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021)
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from jax.typing import ArrayLike

from models.rejection import sample_accepted

BOUND = 1.0  # of the prior, either side
RADIUS = dist.Normal(0.1, 0.01)
ANGLE = dist.Uniform(-math.pi / 2, math.pi / 2)
CENTRE = 0.25


def prior() -> Array:
    """Site ``"theta"`` ``[2]``."""
    return numpyro.sample("theta", dist.Uniform(-BOUND, BOUND).expand([2]).to_event(1))


def model() -> Array:
    """The simulator: site ``"theta"`` ``[2]``, nuisances ``"angle"``, ``"radius"``, deterministic ``"x"`` ``[2]``."""
    theta = prior()
    angle = numpyro.sample("angle", ANGLE)
    radius = numpyro.sample("radius", RADIUS)
    crescent = jnp.stack([radius * jnp.cos(angle) + CENTRE, radius * jnp.sin(angle)])
    return numpyro.deterministic("x", crescent + shift(theta))


def shift(theta: Array) -> Array:
    """Where parameters ``[..., 2]`` put the crescent."""
    total, difference = theta[..., 0] + theta[..., 1], theta[..., 1] - theta[..., 0]
    return jnp.stack([-jnp.abs(total), difference], -1) / math.sqrt(2)


def log_likelihood(theta: ArrayLike, x: ArrayLike) -> Array:
    r""":math:`\log p(x \mid \theta)`, exactly: with the offset's length :math:`r`, it is
    :math:`\log\mathcal N(r; 0.1, 0.01^2) - \log(\pi r)` in the right half plane and :math:`-\infty` elsewhere.

    The published task's own function leaves :math:`-\log r` out; its reference samples do not. Leading axes broadcast.

    :param theta: ``[..., 2]``.
    :param x: ``[..., 2]``.
    """
    offset = jnp.asarray(x) - shift(jnp.asarray(theta)) - jnp.array([CENTRE, 0.0])
    possible = offset[..., 0] > 0
    safe = jnp.where(possible[..., None], offset, 0.1)  # a finite gradient where the density is zero
    length = jnp.sqrt((safe**2).sum(-1))
    return jnp.where(possible, RADIUS.log_prob(length) - jnp.log(math.pi * length), -jnp.inf)


def sample_posterior(rng_key: Array, x: ArrayLike, num_samples: int) -> np.ndarray:
    """Independent draws from the exact posterior, ``[num_samples, 2]``: offsets, solved for the parameters."""
    x = jnp.asarray(x)

    def propose(rng_key: Array, number: int) -> tuple[Array, Array]:
        angle_key, radius_key, side_key = random.split(rng_key, 3)
        angle, radius = ANGLE.sample(angle_key, (number,)), RADIUS.sample(radius_key, (number,))
        fold = CENTRE + radius * jnp.cos(angle) - x[0]  # |theta_1 + theta_2| over the root of 2
        total = fold * random.rademacher(side_key, (number,)) * math.sqrt(2)
        difference = (x[1] - radius * jnp.sin(angle)) * math.sqrt(2)
        theta = jnp.stack([total - difference, total + difference], -1) / 2
        return theta, (fold >= 0) & jnp.all(jnp.abs(theta) <= BOUND, -1)

    return sample_accepted(rng_key, propose, num_samples)
