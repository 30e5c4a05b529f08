r"""Backward simulation (FFBSi): given the future :math:`x_{t+1}`, particle i at step t is chosen with probability

.. math:: B_t(i) \propto W_t^i \; p(x_{t+1} \mid x_t^i)\, p(y_{t+1} \mid x_t^i, x_{t+1}).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.filtering.smoothing.genealogy import draw_final, take
from numpyro_smc.programs.replay import replay_step, step_latents, transition_density
from numpyro_smc.programs.sequence import Sequence


def sample_paths(
    particle_filter: Any,
    rng_key: Array,
    filter_key: Array,
    program: Any,
    history: Any,
    num_samples: int,
    num_mcmc_steps: int,
    batch_size: int,
) -> dict[str, Array]:
    """Draw paths backwards through a filter's particles.

    :param num_mcmc_steps: 0 to choose among all N particles exactly; else the number of independence-Metropolis moves
        from the genealogical ancestor.
    :param batch_size: number of paths whose N densities are held at a time.
    :return: by site, ``[num_samples, T, ...]`` (``[num_samples, ...]`` before the scan).
    """
    params, args, kwargs = program
    sequence = particle_filter.read(random.split(filter_key)[0], params, args, kwargs)
    check_markov(sequence, history)
    rank = len(sequence.batch_shape)
    final_key, rng_key = random.split(rng_key)
    last = draw_final(final_key, history.steps["log_weights"][-1], num_samples)
    # Particles of step t beside the inputs of step t + 1; the initial particles come first.
    before = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest[:-1]]),
        {k: history.initial[k] for k in ("cloud", "log_weights")},
        {k: history.steps[k] for k in ("cloud", "log_weights")},
    )
    latents = step_latents(sequence)

    def back(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Any]:
        rng_key, index = carry
        t, x, earlier, values, ancestors = inputs
        rng_key, key = random.split(rng_key)
        chosen = jax.tree.map(lambda leaf: take(leaf, index, rank), values)
        future = {name: chosen[name] for name in latents}

        def density(particles: Any, future: dict[str, Array]) -> Array:
            return transition_density(sequence, t, x, particles, earlier["cloud"].shared, future)

        particles, log_weights = earlier["cloud"].particles, earlier["log_weights"]
        if num_mcmc_steps == 0:

            def exact(operand: tuple[Array, dict[str, Array]]) -> Array:
                key, future = operand
                each = jax.vmap(lambda i: density(jax.tree.map(lambda leaf: leaf[i], particles), future))
                logits = log_weights + each(jnp.arange(log_weights.shape[0]))
                return random.categorical(key, logits, axis=0)

            parent = lax.map(exact, (random.split(key, num_samples), future), batch_size=batch_size)
        else:
            parent = take(ancestors, index, rank)

            def log_target(index: Array) -> Array:
                past = jax.tree.map(lambda leaf: take(leaf, index, rank), particles)
                each = jax.vmap(lambda m: density(*jax.tree.map(lambda leaf: leaf[m], (past, future))))
                return each(jnp.arange(num_samples))

            current = log_target(parent)
            for number in range(num_mcmc_steps):
                propose_key, accept_key = random.split(random.fold_in(key, number))
                proposal = draw_final(propose_key, log_weights, num_samples)
                proposed = log_target(proposal)
                accept = jnp.log(random.uniform(accept_key, current.shape)) < proposed - current
                parent, current = jnp.where(accept, proposal, parent), jnp.where(accept, proposed, current)
        return (rng_key, parent), chosen

    times = jnp.arange(sequence.length)
    inputs = (times, sequence.inputs()["model"], before, history.steps["values"], history.ancestors)
    (_, first), path = lax.scan(back, (rng_key, last), inputs, reverse=True)
    initial = jax.tree.map(lambda leaf: take(leaf, first, rank), history.initial["values"])
    return initial | jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), path)


def check_markov(sequence: Sequence, history: Any) -> None:
    """:raises ValueError: unless the new carry is a function of the step's latents alone.

    Otherwise exchanging the past of a path would change the carries of its whole future.
    """
    cloud = jax.tree.map(lambda leaf: leaf[0, 0], history.steps["cloud"].particles)
    shared = jax.tree.map(lambda leaf: leaf[0], history.steps["cloud"].shared)
    values = {name: history.steps["values"][name][0, 0] for name in step_latents(sequence)}
    x = jax.tree.map(lambda leaf: leaf[0], sequence.inputs()["model"])

    def carry(past: Any, future: Any) -> Any:
        return replay_step(sequence, jnp.asarray(0), x, past, shared, future)[0]

    uses = eval_provenance(carry, past=cloud, future=values)
    if any("past" in found for found in jax.tree.leaves(uses, is_leaf=lambda leaf: isinstance(leaf, frozenset))):
        raise ValueError(
            "sample_posterior: backward sampling needs a carry that the step's own latents determine, but this model's "
            "new carry also depends on the old one (lags, recurrent networks, reparameterised innovations). Use "
            "method='genealogy'."
        )
