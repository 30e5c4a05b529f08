r"""A variational recurrent neural network: a deterministic memory, a Gaussian latent, and observations fed back.

.. math::

    z_t \sim \mathcal N(\mu_\theta(h_t), \sigma_\theta(h_t)^2), \qquad
    y_t \sim p_\theta(y_t \mid z_t, h_t), \qquad
    h_{t+1} = \mathrm{GRU}_\theta(h_t, [y_t, z_t]), \qquad h_0 = 0.

:func:`make_programs` returns the model and the guide, both called as ``program(y, lengths)``. Time is the leading axis:
``y`` is ``[T, B, K]`` for ``B`` series of ``K`` numbers per step, padded to one length, ``lengths`` is ``[B]``; what
stands in the padding is ignored. All sites are in the plate ``"series"``.

**References**

1. *A Recurrent Latent Variable Model for Sequential Data*, J. Chung et al. (2015)
2. *Filtering Variational Objectives*, C. Maddison et al. (2017)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logit
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module

from models.networks import mlp


def make_programs(
    rng_key: Array,
    output_size: int,
    latent_size: int = 16,
    hidden_size: int = 32,
    emission: Literal["bernoulli", "normal"] = "bernoulli",
    output_mean: ArrayLike | None = None,
    num_steps: int = 20,
    num_series: int = 1,
) -> tuple[Callable[..., tuple[Array, Array]], Callable[..., None]]:
    """The model and its guide.

    :param output_mean: mean of the training data, ``[K]``: the networks read ``y - output_mean``, and the emission is
        centred there (Bernoulli: a probability, clipped to ``[1e-4, 1 - 1e-4]``). ``None`` centres nothing.
    :param num_steps: length of a simulated batch, ``num_series`` its size; given ``y``, its own shape counts.
    """
    if emission not in ("bernoulli", "normal"):
        raise ValueError(f"vrnn: emission={emission!r}; expected 'bernoulli' or 'normal'.")
    keys = jax.random.split(rng_key, 5)
    center = jnp.zeros(output_size) if output_mean is None else jnp.asarray(output_mean, jnp.result_type(float))
    offset = center if emission == "normal" or output_mean is None else logit(jnp.clip(center, 1e-4, 1 - 1e-4))
    memory_modules = {
        "transition_rnn": eqx.nn.GRUCell(output_size + latent_size, hidden_size, key=keys[0]),
        "proposal_rnn": eqx.nn.GRUCell(output_size + latent_size, hidden_size, key=keys[1]),
    }
    prior_module = mlp(keys[2], hidden_size, hidden_size, 2 * latent_size)
    emission_module = mlp(keys[3], hidden_size + latent_size, hidden_size, output_size)
    proposal_module = mlp(keys[4], hidden_size + output_size, hidden_size, 2 * latent_size)

    def declare_memory(name: str) -> Callable[[Array, Array, Array], Array]:
        """The update of a memory ``[B, H]`` with what the step has seen and drawn."""
        cell = jax.vmap(eqx_module(name, memory_modules[name]))
        return lambda memory, y, z: cell(jnp.concatenate([y - center, z], -1), memory)

    def model(y: ArrayLike | None = None, lengths: ArrayLike | None = None) -> tuple[Array, Array]:
        update = declare_memory("transition_rnn")
        prior = jax.vmap(eqx_module("prior_net", prior_module))
        emit = jax.vmap(eqx_module("emission_net", emission_module))
        log_noise_scale = numpyro.param("log_noise_scale", jnp.zeros(output_size)) if emission == "normal" else None
        shape = (num_steps, num_series) if y is None else jnp.shape(y)[:2]
        valid = valid_steps(shape, lengths)
        y = None if y is None else fill_padding(y, valid)

        def step(h: Array, inputs: tuple[Array | None, Array]) -> tuple[Array, tuple[Array, Array]]:
            y_t, valid_t = inputs
            with numpyro.plate("series", shape[1], dim=-1), handlers.mask(mask=valid_t):
                z = numpyro.sample("z", diagonal_gaussian(prior(h)))
                out = offset + emit(jnp.concatenate([h, z], -1))
                if emission == "bernoulli":
                    distribution = dist.Bernoulli(logits=out).to_event(1)
                else:
                    distribution = dist.Normal(out, jnp.exp(log_noise_scale)).to_event(1)
                y_t = numpyro.sample("y", distribution, obs=y_t)
            return update(h, y_t, z), (z, y_t)

        _, (z, y) = scan(step, jnp.zeros((shape[1], hidden_size)), (y, valid), length=shape[0])
        return z, y

    def guide(y: ArrayLike, lengths: ArrayLike | None = None) -> None:
        update = declare_memory("proposal_rnn")
        propose = jax.vmap(eqx_module("proposal_net", proposal_module))
        shape = jnp.shape(y)[:2]
        valid = valid_steps(shape, lengths)
        y = fill_padding(y, valid)

        def step(g: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
            y_t, valid_t = inputs
            with numpyro.plate("series", shape[1], dim=-1), handlers.mask(mask=valid_t):
                z = numpyro.sample("z", diagonal_gaussian(propose(jnp.concatenate([g, y_t - center], -1))))
            return update(g, y_t, z), None

        scan(step, jnp.zeros((shape[1], hidden_size)), (y, valid))

    return model, guide


def diagonal_gaussian(raw: Array) -> dist.Distribution:
    """A Gaussian over the last axis: its first half is the mean, the second half the scale before a softplus."""
    loc, raw_scale = jnp.split(raw, 2, -1)
    return dist.Normal(loc, jax.nn.softplus(raw_scale + 0.5)).to_event(1)


def valid_steps(shape: tuple[int, int], lengths: ArrayLike | None) -> Array:
    """Bool ``[T, B]``: true before a series' end."""
    if lengths is None:
        return jnp.ones(shape, bool)
    return jnp.arange(shape[0])[:, None] < jnp.asarray(lengths)


def fill_padding(y: ArrayLike, valid: Array) -> Array:
    """Zeros beyond a series' end: a masked NaN would still reach the gradient."""
    return jnp.where(valid[..., None], jnp.asarray(y, jnp.result_type(float)), 0.0)
