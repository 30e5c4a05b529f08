r"""Backward simulation (FFBSi): paths of particles drawn from the end by the backward kernel."""

from jax import Array, lax, random

from numpyro_smc.filtering.smoothing.backward_draws import Draw
from numpyro_smc.filtering.smoothing.genealogy import draw_final
from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step


def sample_indices(rng_key: Array, kernel: BackwardKernel, draw: Draw, num_samples: int) -> tuple[Array, Array, Array]:
    """Draw paths backwards through a filter's particles.

    :return: initial particles ``[num_samples, *batch]``, the particles of each step ``[T, num_samples, *batch]``, and
        whether some draw was wrong.
    """
    final_key, rng_key = random.split(rng_key)
    last = draw_final(final_key, kernel.final_log_weights, num_samples)

    def back(carry: tuple[Array, Array], step: Step) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        rng_key, index = carry
        rng_key, key = random.split(rng_key)
        parents, wrong = draw(key, kernel, step, index, 1)
        return (rng_key, parents[0]), (index, wrong)

    (_, first), (path, wrong) = lax.scan(back, (rng_key, last), kernel.steps, reverse=True)
    return first, path, wrong.any()
