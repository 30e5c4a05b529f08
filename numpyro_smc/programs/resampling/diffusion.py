"""Diffusion resampling: fresh normals, carried back to the weighted cloud by the score of its noised versions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_smc.programs.arguments import check_number, check_positive
from numpyro_smc.programs.resampling.mixing import as_matrix, log_probabilities, squared_distances
from numpyro_smc.programs.resampling.registry import Scheme

INTEGRATORS = ("euler", "lord_rougemont", "jentzen_kloeden")


def diffusion(
    time: float = 1.0,
    num_steps: int = 4,
    *,
    integrator: str = "jentzen_kloeden",
    dynamics: str = "ode",
    rate: float = 0.5,
    jitter: float = 1e-6,
) -> Scheme:
    r"""New particles by the reverse of a diffusion that starts at the weighted cloud [1].

    The forward process :math:`dX = -r (X - \mu)\,dt + \sqrt{2 r}\, s\, dB` leaves :math:`\mathcal N(\mu, s^2)`
    invariant, the cloud's weighted mean and diagonal variance. Started at the cloud, it has at time :math:`t` the
    mixture density with components :math:`\mathcal N(\mu + e^{-rt}(x_i - \mu),\, s^2 (1 - e^{-2rt}))` and weights
    :math:`W_i`, and the score of that mixture, :math:`\sigma`. N draws from :math:`\mathcal N(\mu, s^2)` run back from
    time :math:`T`, with the score taken at the beginning of each of K steps, in standardised states :math:`y`:

    .. math:: dy = r\,(y + \sigma)\,dt \quad\text{(ODE)}, \qquad
       dy = r\,(y + 2\sigma)\,dt + \sqrt{2r}\,dB \quad\text{(SDE)}.

    With :math:`f = r\sigma` or :math:`2r\sigma`, a step of length h is

    - ``"euler"``: :math:`y + h(ry + f)`, noise :math:`\sqrt{2rh}`;
    - ``"lord_rougemont"``: :math:`e^{rh}(y + hf)`, noise :math:`e^{rh}\sqrt{2rh}`;
    - ``"jentzen_kloeden"``: :math:`e^{rh}y + (e^{rh} - 1) f / r`, noise :math:`\sqrt{e^{2rh} - 1}`.

    (Applied to the states themselves, as published, Lord-Rougemont would depend on where the cloud lies.)

    The new weights are equal. Biased; the error falls with K and with N, but a short time T keeps the normal shape of
    the start, and many steps reproduce the old particles. Gradient: exact for this randomised map, through weights and
    states. Real states only; new particles may leave the support of constrained ones; no genealogies.
    Cost: O(K N^2 d) time, O(N^2) memory, and one more pass to differentiate.

    :param time: :math:`T > 0`.
    :param num_steps: :math:`K \ge 1`.
    :param integrator: of the three above.
    :param dynamics: ``"ode"`` or ``"sde"``.
    :param rate: :math:`r > 0`; only :math:`rT` matters.
    :param jitter: added to the variance of each coordinate, so that a coordinate without spread has gradients. Choose
        it well below the smallest variance that matters.
    :raises ValueError: for options out of range.

    **References**

    1. *Diffusion differentiable resampling*, J. Andersson, Z. Zhao (2025)
    """
    if integrator not in INTEGRATORS:
        raise ValueError(f"diffusion: unknown integrator={integrator!r}. Known: {', '.join(INTEGRATORS)}.")
    if dynamics not in ("ode", "sde"):
        raise ValueError(f"diffusion: unknown dynamics={dynamics!r}. Use 'ode' or 'sde'.")
    check_positive("diffusion", num_steps=num_steps)
    check_number("diffusion", "(0, inf)", time=time, rate=rate, jitter=jitter)
    step = rate * time / num_steps  # rh, the only scale there is
    noisy = dynamics == "sde"
    growth, drift, spread = {
        "euler": (1 + step, step, math.sqrt(2 * step)),
        "lord_rougemont": (math.exp(step), math.exp(step) * step, math.exp(step) * math.sqrt(2 * step)),
        "jentzen_kloeden": (math.exp(step), math.expm1(step), math.sqrt(math.expm1(2 * step))),
    }[integrator]

    def transport(rng_key: Array, log_weights: Array, particles: Any) -> tuple[Any, Array]:
        states, rebuild = as_matrix("diffusion", log_weights, particles)
        log_probs = log_probabilities(log_weights).astype(states.dtype)
        mean = jnp.exp(log_probs) @ states
        scale = jnp.sqrt(jnp.exp(log_probs) @ (states - mean) ** 2 + jitter)
        centres = jnp.where(jnp.isneginf(log_probs)[:, None], 0.0, (states - mean) / scale)
        start_key, noise_key = jax.random.split(rng_key)
        start = jax.random.normal(start_key, states.shape, states.dtype)

        @jax.checkpoint
        def back(y: Array, step_number: Array) -> tuple[Array, None]:
            score = ensemble_score(y, rate * time - step_number * step, log_probs, centres)
            y = growth * y + (2 * drift if noisy else drift) * score
            if noisy:
                key = jax.random.fold_in(noise_key, step_number)
                y = y + spread * jax.random.normal(key, y.shape, y.dtype)
            return y, None

        y, _ = jax.lax.scan(back, start, jnp.arange(num_steps))
        return rebuild(mean + scale * y), jnp.zeros_like(log_weights)

    return Scheme(
        "diffusion",
        None,
        transport=transport,
        differentiable="path",
        cost="O(K N^2 d) time for K steps, O(N^2) memory",
    )


def ensemble_score(y: Array, time: Array, log_probs: Array, centres: Array) -> Array:
    r"""Score of :math:`\sum_i W_i\, \mathcal N(e^{-t} c_i,\, 1 - e^{-2t})` at each row of ``y``.

    :param y: ``[n, d]``. **time** - :math:`t > 0`, a scalar.
    :param log_probs: :math:`\log W`, ``[N]``; ``-inf`` for a dead particle, whose centre must be finite.
    :param centres: :math:`c`, ``[N, d]``.
    :return: ``[n, d]``.
    """
    time = jnp.asarray(time, y.dtype)
    variance = -jnp.expm1(-2 * time)
    centres = jnp.exp(-time) * centres
    log_joint = log_probs - 0.5 * squared_distances(y, centres) / variance
    return (jax.nn.softmax(log_joint, axis=1) @ centres - y) / variance
