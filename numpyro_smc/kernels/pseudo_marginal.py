"""The target of pseudo-marginal Metropolis: prior, estimated likelihood and screen of a program at its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_smc.kernels.correlated_noise import Noise, move_noise
from numpyro_smc.kernels.estimated_likelihood import Estimate, EstimatedLikelihood
from numpyro_smc.programs.global_latents import GlobalLatents, Values
from numpyro_smc.programs.pinned import path_sites
from numpyro_smc.programs.weights import impossible_if_nan

NUM_STARTS = 16
MAX_STARTS = 100

Screen = Callable[..., Array]


class Place(NamedTuple):
    """Where a chain is: unconstrained parameters and path ``z``, and what was found there when it was proposed."""

    z: Values
    log_evidence: Array
    log_prior: Array
    log_screen: Array
    noise: Noise | None

    @property
    def is_possible(self) -> Array:
        return jnp.isfinite(self.log_evidence + self.log_prior + self.log_screen)


def check_start(place: Place, given: bool, user: str) -> None:
    """:raises ValueError: unless everything is finite, in every chain; naming what is not.

    :param given: whether the parameters were given, not drawn.
    """
    where = "at the given init_params" if given else f"at {MAX_STARTS} draws from the prior"
    for name in ("log_prior", "log_screen", "log_evidence"):
        broken = ~np.isfinite(np.atleast_1d(getattr(place, name)))
        if broken.any():
            raise ValueError(
                f"{user}: {where} the {name} is not finite (chain {int(broken.argmax())}), so there is nowhere to "
                f"start from. Give init_params at which the parameters explain the data, use more particles or a "
                f"guide; ParticleFilter(model).run(rng_key, ..., params=...) names the step at which the weights "
                f"vanish."
            )


class Proposal(NamedTuple):
    """A place, whether the first stage passed it, and the log acceptance ratio of what remains."""

    place: Place
    passed: Array
    log_ratio: Array


class Target:
    """What Metropolis evaluates. Build it where it is used: under ``jit``, inside.

    :param likelihood: the estimate.
    :param screen: ``(parameters by site, *args, **kwargs) ->`` scalar log likelihood of the first stage, or ``None``.
    :param args, kwargs: of the model.
    """

    def __init__(
        self, likelihood: EstimatedLikelihood, screen: Screen | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.likelihood, self.screen, self.args, self.kwargs = likelihood, screen, args, kwargs
        self.latents = GlobalLatents(likelihood.model, args, kwargs, likelihood.params, user=likelihood.user)

    def split(self, z: Values) -> tuple[Values, Values]:
        """Unconstrained parameters, and the path."""
        names = self.latents.names
        return {name: z[name] for name in names}, {name: value for name, value in z.items() if name not in names}

    # ---- starts -------------------------------------------------------------------------------------------------

    def at(self, rng_key: Array, parameters: Values) -> Place:
        """A place with a new, independent estimate."""
        noise_key, filter_key = random.split(rng_key)
        values = self.latents.constrain(parameters)
        sequence = self.likelihood.read(values, self.args, self.kwargs)
        noise = self.likelihood.noise(noise_key, sequence)
        estimate = self.likelihood(filter_key, sequence, noise)
        return self._place(parameters, values, estimate, noise)

    def start(self, rng_key: Array) -> Place:
        r"""One of 16 draws from the prior, chosen with probability proportional to :math:`\hat p(y \mid \theta)`; of up
        to 100, as long as none is possible.

        In the limit of many draws this is the law that the chain has in the end.
        """

        def attempt(i: Array) -> tuple[Array, Place]:
            draw_key, key, choice_key = random.split(random.fold_in(rng_key, i), 3)
            place = self.at(key, self.latents.draw(draw_key))
            merit = jnp.where(place.is_possible, place.log_evidence + random.gumbel(choice_key), -jnp.inf)
            return merit, place

        def go_on(state: tuple[Array, Array, Place]) -> Array:
            i, merit, _ = state
            return (i < NUM_STARTS) | ((i < MAX_STARTS) & (merit == -jnp.inf))

        def another(state: tuple[Array, Array, Place]) -> tuple[Array, Array, Place]:
            i, best = state[0], state[1:]
            new = attempt(i)
            better = (i == 0) | (new[0] > best[0])
            return i + 1, *jax.tree.map(lambda new, old: jnp.where(better, new, old), new, best)

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(attempt, jnp.asarray(0)))
        return lax.while_loop(go_on, another, (jnp.asarray(0), *zeros))[2]

    # ---- moves --------------------------------------------------------------------------------------------------

    def propose(self, rng_key: Array, current: Place, parameters: Values, correlation: float) -> Proposal:
        """The place of proposed parameters. With a screen the filter runs only where the first stage passes it."""
        noise_key, filter_key, screen_key = random.split(rng_key, 3)
        values = self.latents.constrain(parameters)
        noise = None if current.noise is None else move_noise(noise_key, current.noise, correlation)

        def estimated() -> Estimate:
            sequence = self.likelihood.read(values, self.args, self.kwargs)
            estimate = self.likelihood(filter_key, sequence, noise)
            return estimate._replace(log_evidence=impossible_if_nan(estimate.log_evidence))

        if self.screen is None:
            place = self._place(parameters, values, estimated(), noise)
            gain = place.log_prior + place.log_evidence - (current.log_prior + current.log_evidence)
            return Proposal(place, jnp.asarray(True), gain)
        log_prior, log_screen = impossible_if_nan(self.latents.log_prior(parameters)), self._log_screen(values)
        gain = log_screen - current.log_screen
        passed = jnp.log(random.uniform(screen_key)) < log_prior - current.log_prior + gain
        unchanged = Estimate(current.log_evidence, self.split(current.z)[1])
        estimate = lax.cond(passed, estimated, lambda: unchanged)
        place = self._place(parameters, values, estimate, noise)
        return Proposal(place, passed, estimate.log_evidence - current.log_evidence - jnp.where(passed, gain, 0.0))

    def refreshed(self, rng_key: Array, current: Place) -> Place:
        """The same parameters and path, evaluated anew, given the path.

        :raises ValueError: without a path of the latents.
        """
        parameters, path = self.split(current.z)
        values = self.latents.constrain(parameters)
        sequence = self.likelihood.read(values, self.args, self.kwargs)
        if not path and any(path_sites(sequence)):
            raise ValueError(
                f"{self.likelihood.user}: as a block of a composite kernel it must hold the path of the latents, to "
                f"which the other blocks' moves are tied. Use keep_paths=True, and name the path's sites with the "
                f"parameters."
            )
        estimate = self.likelihood.given_path(rng_key, sequence, path)
        return self._place(parameters, values, estimate, current.noise)

    def _place(self, parameters: Values, values: Values, estimate: Estimate, noise: Noise | None) -> Place:
        log_prior = impossible_if_nan(self.latents.log_prior(parameters))
        z = parameters | estimate.path
        return Place(z, impossible_if_nan(estimate.log_evidence), log_prior, self._log_screen(values), noise)

    def _log_screen(self, values: Values) -> Array:
        if self.screen is None:
            return jnp.zeros(())
        kwargs = dict(self.kwargs)
        given = self.likelihood.params | kwargs.pop(GIBBS_SITES_KWARG, {})
        log_screen = jnp.asarray(self.screen(given | values, *self.args, **kwargs))
        if log_screen.shape != ():
            raise ValueError(
                f"{self.likelihood.user}: screen returned an array of shape {log_screen.shape}; it must return one "
                f"log likelihood, a scalar. Sum over the data."
            )
        return impossible_if_nan(log_screen)
