"""Where the search for the best distribution of one datum starts: a mean and scales of the model's latents."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.distributions import Distribution, ExpandedDistribution, Independent, Normal
from numpyro.distributions.transforms import biject_to
from numpyro.infer.autoguide import AutoContinuous, AutoDiagonalNormal

from numpyro_smc.programs import streams
from numpyro_smc.programs.automatic_guides import latent_vector
from numpyro_smc.programs.density import Pair, Params, Program
from numpyro_smc.programs.sites import is_latent
from numpyro_smc.programs.supports import check_bijection
from numpyro_smc.programs.tracing import TRACING
from numpyro_smc.programs.unconstrained import FreeOfImproper

_JITTER = 1e-6
_RADIUS = 2.0


class Start(NamedTuple):
    """By latent site of the model of one datum:

    - **values** - the mean, in the site's support; **scales** - in unconstrained space.
    - **draws** - unconstrained, ``[S, ...]``, which tell the correlations; ``None`` if there are none.
    """

    values: dict[str, Array]
    scales: dict[str, Array]
    draws: dict[str, Array] | None = None

    def scale_params(self, guide: AutoContinuous) -> Params:
        """Scales, or their Cholesky factor, as parameters of a Gaussian automatic guide that has read its model."""
        scales = latent_vector(guide, self.scales)
        if isinstance(guide, AutoDiagonalNormal):
            return {f"{guide.prefix}_scale": scales}
        if self.draws is None:
            return {f"{guide.prefix}_scale_tril": jnp.diag(scales)}
        draws = jax.vmap(partial(latent_vector, guide))(self.draws)
        covariance = jnp.atleast_2d(jnp.cov(draws.T))
        return {f"{guide.prefix}_scale_tril": jnp.linalg.cholesky(covariance + _JITTER * jnp.eye(len(scales)))}


def plain_start(kind: str, rng_key: Array, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Start:
    """Scales of one, around zero (``"zeros"``) or uniform numbers on (-2, 2) (``"random"``)."""
    with TRACING, handlers.block():
        seeded = handlers.seed(FreeOfImproper(model), random.fold_in(rng_key, streams.SHAPES))
        trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    values, scales = {}, {}
    for number, (name, site) in enumerate((name, site) for name, site in trace.items() if is_latent(site)):
        check_bijection(site, "LocalOptimizer")
        bijection = biject_to(site["fn"].support)
        shape = bijection.inverse_shape(site["fn"].shape())
        loc = jnp.zeros(shape)
        if kind == "random":
            loc = random.uniform(random.fold_in(rng_key, number), shape, minval=-_RADIUS, maxval=_RADIUS)
        values[name], scales[name] = bijection(loc), jnp.ones(shape)
    return Start(values, scales)


def encoder_start(
    rng_key: Array,
    model: Program,
    guide: Program | None,
    params: Params,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    user: str,
) -> Start:
    """Moments of the guide: exact if its one site is normal with independent elements, else of draws.

    :raises ValueError: without a guide, and naming the site, if it does not cover the model's latents.
    """
    if guide is None:
        raise ValueError(f"{user}: init='encoder' starts from the guide; pass guide=, or init='zeros'.")
    model_key, plate_key = (random.fold_in(rng_key, stream) for stream in (streams.MODEL, streams.PLATES))
    pair = Pair(model, guide, args, kwargs, plate_key, None, user)

    def latents(index: Array | None) -> tuple[dict[str, Array], dict[str, Distribution], list[Distribution]]:
        draw = pair.draw(rng_key, index, params)  # type: ignore[arg-type]
        sites = {n: site for n, site in pair.run_model(model_key, None, params, draw).items() if is_latent(site)}
        state = {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in sites.items()}
        of_guide = [site["fn"] for site in draw.trace.values() if is_latent(site)]
        return state, {name: site["fn"] for name, site in sites.items()}, of_guide

    state, of_model, of_guide = latents(None)
    if len(of_guide) == 1 and isinstance(_base(of_guide[0]), Normal):
        ((name, value),) = state.items()
        mean, variance = (jnp.broadcast_to(moment, value.shape) for moment in (of_guide[0].mean, of_guide[0].variance))
        return Start({name: mean}, {name: jnp.sqrt(variance)})
    draws = jax.vmap(lambda index: latents(index)[0])(jnp.arange(num_samples))
    values = {name: biject_to(of_model[name].support)(jnp.mean(z, axis=0)) for name, z in draws.items()}
    return Start(values, {name: jnp.std(z, axis=0) + _JITTER for name, z in draws.items()}, draws)


def _base(fn: Distribution) -> Distribution:
    while isinstance(fn, Independent | ExpandedDistribution):
        fn = fn.base_dist
    return fn
