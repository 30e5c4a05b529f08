"""Bernoulli resampling: the more unequal the weights, the more likely the cloud is resampled at all."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from numpyro_smc.programs.arguments import named
from numpyro_smc.programs.resampling.registry import Scheme, resolve
from numpyro_smc.programs.weights import effective_sample_size


def bernoulli(inner: str | Scheme = "multinomial") -> Scheme:
    r"""Resamples by ``inner`` with probability :math:`1 - (\mathrm{ESS} - 1) / (N - 1)`, else leaves all as it is [1].

    Kept particles keep their weights. Equal weights are never resampled, and a cloud with a single living particle
    always is. It thins the schedule: with ``resample="ess"`` it is asked only below the threshold. The published code
    makes the decision over the batch of replicates instead of for each of them; this is what it means to do.

    Unbiased, differentiable and costly as ``inner`` is. The decision is a constant to differentiation, so score terms
    are refused.

    :param inner: name of a registered scheme, or a scheme.
    :raises ValueError: if ``inner`` is itself a Bernoulli scheme.

    **References**

    1. *Resampling Gradients Vanish in Differentiable Sequential Monte Carlo Samplers*, J. Zenn, R. Bamler (2023)
    """
    with named("bernoulli: inner"):
        scheme = resolve(inner)
    if scheme.keep is not None:
        raise ValueError(f"bernoulli: '{scheme.name}' already keeps clouds at random. Give the scheme that resamples.")
    name = "bernoulli" if scheme.name == "multinomial" else f"bernoulli({scheme.name})"
    cost = f"a decision, then as {scheme.name}: {scheme.cost}"
    return dataclasses.replace(scheme, name=name, keep=keep_probability, log_prob=None, cost=cost)


def keep_probability(log_weights: Array) -> Array:
    r""":math:`(\mathrm{ESS} - 1) / (N - 1)`; one for a single particle, zero if every particle is dead.

    :param log_weights: unnormalised, shape ``[N]``.
    """
    size = log_weights.shape[0]
    if size == 1:
        return jnp.ones((), log_weights.dtype)
    return jnp.clip((effective_sample_size(log_weights) - 1) / (size - 1), 0.0, 1.0)
