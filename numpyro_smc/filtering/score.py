r"""The score: the gradient of the log evidence, by Fisher's identity.

.. math:: \nabla_\theta \log p_\theta(y) = \mathbb E\Big[\nabla_\theta \log p_\theta(x_{\text{init}})
   + \sum_t \nabla_\theta \log p_\theta(x_t, y_t \mid x_{t-1}) \,\Big|\, y\Big]
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.filtering.smoothing.complete_data import initial_log_density, with_carries_recomputed
from numpyro_smc.filtering.smoothing.kernel import backward_kernel
from numpyro_smc.filtering.smoothing.marginal import Marginals
from numpyro_smc.filtering.smoothing.pairs import Pairs
from numpyro_smc.filtering.smoothing.runs import Question
from numpyro_smc.programs.sequence import Sequence


def score_of(particle_filter: Any, names: tuple[str, ...]) -> Question:
    """The question after the gradient in the parameters ``names``, at given smoothing weights."""

    def ask(program: Any, sequence: Sequence, history: Any, weights: Pairs | Marginals) -> dict[str, Any]:
        params, args, kwargs = program
        kernel = backward_kernel(sequence, history, "score")
        held = jax.tree.map(lax.stop_gradient, params | history.global_values)

        def complete_data(chosen: dict[str, Any]) -> Array:
            # Nothing is drawn any more, so the key does not matter.
            here = particle_filter.read(random.key(0), held | chosen, args, kwargs)
            renewed = with_carries_recomputed(here, kernel, history)
            before = weights.initial_weights(kernel.num_particles)
            return weights.log_density(renewed) + initial_log_density(here, history, before) + here.log_outside

        return jax.grad(complete_data)({name: params[name] for name in names})

    return ask


def chosen_names(params: dict[str, Any], sites: Any) -> tuple[str, ...]:
    """Names of the parameters to differentiate in.

    :raises ValueError: if there are none, one is unknown, or one is not real.
    """
    real = [
        name
        for name, value in params.items()
        if all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(value))
    ]
    names = tuple(real if sites is None else [sites] if isinstance(sites, str) else sites)
    for name in names:
        if name not in params:
            raise ValueError(
                f"score: '{name}' is not among the params of this run ({', '.join(sorted(params)) or 'none'}). Give "
                f"its value in ParticleFilter.run(..., params={{'{name}': ...}})."
            )
        if name not in real:
            raise ValueError(f"score: '{name}' is not real, so there is no gradient in it. Leave it out of sites.")
    if not names:
        raise ValueError(
            "score: this run has no real params to differentiate in. Declare them with numpyro.param, or as latents "
            "before the scan, and give their values in ParticleFilter.run(..., params=...)."
        )
    return names
