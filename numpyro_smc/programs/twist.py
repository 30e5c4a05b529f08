"""The twist statement of a guide, and Gauss-Hermite quadrature for twists that look one step ahead."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import logsumexp

from numpyro_smc.programs.arguments import check_callable, check_positive
from numpyro_smc.programs.statements import state


def twist(name: str, log_r: Array) -> Array:
    r"""State the log twist :math:`\log r_t(x_t)` of the current step, inside a guide's scan body.

    Twisted filters target :math:`p(x_{0:t}, y_{0:t})\, r_t(x_t)` at step :math:`t`; the best choice is the lookahead
    likelihood :math:`r_t(x_t) = p(y_{t+1:T-1} \mid x_t)`. A constant added to :math:`\log r_t` changes no weight. The
    value at and after the last observation is ignored (:math:`r = 1` there), so the evidence estimate stays unbiased
    for any twist. :class:`~numpyro_smc.SIXO` and :class:`~numpyro_smc.ParticleFilter` use the statement; every other
    ELBO ignores it. Several twists in one step multiply.

    :param name: site name, unique within the step.
    :param log_r: log twist of this step's latents, a scalar, or of the shape of the plates that enclose the program.
    :return: ``log_r``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_smc import twist
        >>> def guide(y):
        ...     slope = numpyro.param("twist_slope", jnp.zeros(len(y)))
        ...     def step(x, inputs):
        ...         slope_t = inputs
        ...         x = numpyro.sample("x", dist.Normal(x, 1.0))
        ...         twist("r", slope_t * x)
        ...         return x, None
        ...     scan(step, 0.0, slope)

    **References**

    1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventos, A. Warrington, S. Linderman (2022)
    """
    return state("twist", name, jnp.asarray(log_r))


def gauss_hermite(log_likelihood: Callable[[Array], Array], loc: Array, scale: Array, degree: int = 5) -> Array:
    r"""Log of a Gaussian expectation, :math:`\log \mathbb E_{z \sim N(\mu, \sigma^2)} e^{f(z)}`, by quadrature.

    With the Gauss-Hermite nodes :math:`\xi_i` and weights :math:`w_i`, elementwise:
    :math:`\log \sum_i \tfrac{w_i}{\sqrt\pi} \exp f(\mu + \sqrt2\,\sigma\,\xi_i)`. With the transition's ``loc`` and
    ``scale`` and the next observation's log likelihood it is the one-step lookahead twist.

    :param log_likelihood: elementwise function :math:`f` of ``z``, broadcasting over a leading axis of nodes.
    :param loc: mean, any shape.
    :param scale: standard deviation, broadcastable with ``loc``.
    :param degree: number of nodes; exact when :math:`e^f` is a polynomial of degree below ``2 * degree``.
    :return: array of the broadcast shape. Cost: ``degree`` evaluations of ``log_likelihood``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_smc import gauss_hermite
        >>> value = gauss_hermite(lambda z: dist.Normal(z, 1.0).log_prob(0.3), jnp.array(0.5), jnp.array(0.2))
        >>> exact = dist.Normal(0.5, jnp.sqrt(1.04)).log_prob(0.3)
        >>> bool(abs(value - exact) < 1e-5)
        True
    """
    check_positive("gauss_hermite", degree=degree)
    check_callable("gauss_hermite", log_likelihood=log_likelihood)
    if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) >= 0.0):
        raise ValueError(f"gauss_hermite: scale must not be negative, got {scale}.")
    roots, weights = np.polynomial.hermite.hermgauss(degree)
    loc, scale = jnp.broadcast_arrays(loc, scale)
    column = (degree,) + (1,) * loc.ndim
    nodes = jnp.asarray(roots, loc.dtype).reshape(column)
    log_weights = jnp.asarray(np.log(weights / np.sqrt(np.pi)), loc.dtype).reshape(column)
    return logsumexp(log_weights + log_likelihood(loc + np.sqrt(2.0) * scale * nodes), axis=0)
