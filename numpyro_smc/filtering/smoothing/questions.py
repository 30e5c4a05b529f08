"""What one asks of a filter's result about the past: paths, smoothing weights, smoothed expectations, the score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.filtering import score as scores
from numpyro_smc.filtering.smoothing import backward, genealogy, marginal
from numpyro_smc.filtering.smoothing.estimate import SmoothedEstimate
from numpyro_smc.filtering.smoothing.kernel import backward_kernel, read
from numpyro_smc.filtering.smoothing.methods import NEED_GENEALOGY, backward_draw
from numpyro_smc.filtering.smoothing.pairs import Functional
from numpyro_smc.filtering.smoothing.runs import check_bound, expectation_of, repeat, summarise
from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.replay import along_paths

if TYPE_CHECKING:
    from numpyro_smc.filtering.filter import ParticleFilter
    from numpyro_smc.filtering.result import History

_BACKWARD = {"backward": "exact", "backward_mcmc": "mcmc", "backward_rejection": "rejection"}


class Smoothing:
    """The smoothing methods of :class:`~numpyro_smc.FilterResult`."""

    filter: ParticleFilter
    rng_key: Array
    program: Any
    history: History

    def sample_posterior(
        self,
        rng_key: Array,
        num_samples: int = 1000,
        method: str = "genealogy",
        *,
        num_mcmc_steps: int = 2,
        log_bound: Any = None,
        max_trials: int = 20,
        batch_size: int = 100,
    ) -> dict[str, Array]:
        r"""Draws of whole paths from :math:`p(x_{0:T-1} \mid y_{0:T-1})`.

        - ``"genealogy"``: trace the ancestors of the final particles; O(T) a draw, few distinct ancestors early on.
        - ``"backward"``: backward simulation with the model's own transition density [1]; O(NT) a draw, no such loss.
        - ``"backward_rejection"``: draws of the same law by rejection [2], exact after ``max_trials``; O(T) a draw
          where the density is not far below its bound.
        - ``"backward_mcmc"``: ``num_mcmc_steps`` independence-Metropolis moves from the ancestor instead of all N
          densities [3]; O(T) a draw.

        :param num_samples: number of paths. **batch_size** - paths simulated at a time by ``"backward"``.
        :param log_bound: for rejection, an upper bound of the log density of a step's sites, observations included,
            given the state before it: a number, or one per step. If not given it is read off the step's distributions,
            which must be Gaussian, Laplace, Cauchy, Student, uniform or discrete with scales that do not depend on the
            state before.
        :return: by site, ``[num_samples, T, ...]`` (``[num_samples, ...]`` for sites before the scan).
        :raises ValueError: for backward methods if the carry is not determined by the step's own latents; for
            ``"genealogy"`` and ``"backward_mcmc"`` after a resampling scheme that mixes particles; for rejection where
            no bound is given or known, or a density exceeds it.

        **References**

        1. *Monte Carlo Smoothing for Nonlinear Time Series*, S. Godsill, A. Doucet, M. West (2004)
        2. *Sequential Monte Carlo smoothing for general state space hidden Markov models*, R. Douc, A. Garivier,
           E. Moulines, J. Olsson (2011)
        3. *On backward smoothing algorithms*, H.-D. Dau, N. Chopin (2023)
        """
        self._need_history("sample_posterior")
        if num_samples < 1:
            raise ValueError(f"sample_posterior: num_samples must be positive, got {num_samples}.")
        if method in ("genealogy", "backward_mcmc"):
            self._need_genealogy(f"sample_posterior(method={method!r})")
        if method == "genealogy":
            question = (_genealogical_paths, rng_key, self.rng_key, self.program, self.history, num_samples)
            return self.filter._compiled_answer(*question)
        if method not in _BACKWARD:
            raise ValueError(f"Unknown method={method!r}. Use 'genealogy', {', '.join(map(repr, _BACKWARD))}.")
        # As an array: another bound is then no other program to compile.
        level = None if log_bound is None else jnp.asarray(log_bound)
        options = (_BACKWARD[method], num_mcmc_steps, level, max_trials, batch_size)
        asked = (rng_key, self.rng_key, self.program, self.history, num_samples, options)
        paths, wrong = self.filter._compiled_answer(_backward_paths, *asked)
        check_bound("sample_posterior", wrong)
        return paths

    def smoothing_log_weights(self, *, batch_size: int = 100) -> Array:
        """Log smoothing weights of the particles of each step (FFBSm), of mean one: ``[T, N, *batch]``.

        ``particles[site]`` with these weights is the law of the site's value given all observations. Deterministic
        given the run; consistent in N. Cost: O(N^2 T) time, O(NT) memory.

        :param batch_size: rows of N densities that are held at a time.
        :raises ValueError: if the carry is not determined by the step's own latents.
        """
        self._need_history("smoothing_log_weights")
        check_positive("smoothing_log_weights", batch_size=batch_size)
        asked = (self.rng_key, self.program, self.history, batch_size)
        return self.filter._compiled_answer(_marginal_log_weights, *asked)

    def smooth(
        self,
        functional: Functional | str,
        method: str = "backward_mcmc",
        *,
        additive: bool = False,
        num_repeats: int = 8,
        rng_key: Array | None = None,
        **options: Any,
    ) -> SmoothedEstimate:
        r"""Smoothed expectations of a functional of successive states, with standard errors.

        :math:`\mathbb E[f_t(x_{t-1}, x_t) \mid y_{0:T-1}]` at each step, or of their sum, by

        - ``"backward_mcmc"``, ``"backward"``, ``"backward_rejection"``: ``num_samples`` (N) paths of
          :meth:`sample_posterior`; the first, with ``num_mcmc_steps`` (1) moves, is O(NT).
        - ``"paris"``: ``num_backward_draws`` (2) draws from the backward kernel for every particle [1], ``backward`` =
          ``"mcmc"`` (``num_mcmc_steps`` moves from the ancestor; O(NT)), ``"rejection"`` (``log_bound``,
          ``max_trials``) or ``"exact"`` (``batch_size``; O(N^2 T)).
        - ``"ffbsm"``: all pairs of particles, ``batch_size`` rows at a time; O(N^2 T), the least variance per particle.
        - ``"fixed_lag"``: lineages of the particles ``lag`` (10) steps later; O(N T lag). Biased at every N by what
          observations beyond the lag say.
        - ``"genealogy"``: lineages of the final particles; O(NT), variance growing with T.
        - ``"twist"``: the twisted filter's own weights at each step; O(NT). Right only as far as the guide's twist is
          :math:`p(y_{t+1:T-1} \mid x_t)` up to a constant, and biased at every N otherwise.

        Where no bias is named the estimates are consistent in N with a bias of order 1/N, which, as those named, is not
        in the standard errors.

        :param functional: the name of a site; or a function ``(t, carry, values)`` of the step's number, the carry the
            step received (that is :math:`x_{t-1}`) and the values of the step's sites, to an array or a pytree. Under
            plates that enclose the program, values start with their axes. A new function is compiled anew.
        :param additive: sum over the steps. **num_repeats** - independent runs of the filter: this one and fresh ones,
            at the cost of running and smoothing each; their spread is the standard error.
        :param rng_key: for fresh runs and backward draws; derived from the run's own key if not given.
        :param options: of the method, as above.
        :raises ValueError: as :meth:`sample_posterior` does. **TypeError** - for options a method does not have.

        **Example**

        .. doctest::

            >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from jax import random
            >>> from numpyro.contrib.control_flow import scan
            >>> from numpyro_smc import ParticleFilter
            >>> def model(y):
            ...     def step(x, y_t):
            ...         x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            ...         numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            ...         return x, None
            ...     scan(step, 0.0, y)
            >>> result = ParticleFilter(model, num_particles=200).run(random.key(0), jnp.array([0.3, 0.8, 0.6]))
            >>> result.smooth("x").value.shape
            (3,)
            >>> squares = result.smooth(lambda t, x, values: (values["x"] - 0.9 * x) ** 2, "ffbsm", additive=True)
            >>> bool(0.0 < squares.value < 3.0) and bool(squares.standard_error < 0.1)
            True

        **References**

        1. *Efficient particle-based online smoothing in general hidden Markov models: the PaRIS algorithm*, J. Olsson,
           J. Westerborn (2017)
        """
        check_positive("smooth", num_repeats=num_repeats)
        self._check_method(method, options, "smooth")
        known = self._site_names()
        if isinstance(functional, str):
            self._check_of_elements(functional)
        if isinstance(functional, str) and functional not in known[0] | known[1]:
            raise KeyError(f"No site '{functional}' in this filter. Known: {', '.join(sorted(known[0] | known[1]))}.")

        key = random.fold_in(self.rng_key, 1) if rng_key is None else rng_key
        asked = (functional, additive, self.rng_key, key, self.program, num_repeats, method, options)
        answers = self.filter._compiled_answer(_smooth, *asked)
        what = functional if isinstance(functional, str) else getattr(functional, "__name__", "functional")
        what = "functional" if what == "<lambda>" else what
        per_step = not additive and not (isinstance(functional, str) and functional not in known[1])
        return summarise("smooth", answers, what, method, self.filter.num_particles, per_step)

    def score(
        self,
        sites: Any = None,
        method: str = "backward_mcmc",
        *,
        num_repeats: int = 8,
        rng_key: Array | None = None,
        **options: Any,
    ) -> SmoothedEstimate:
        r"""Gradient of the log evidence in the run's ``params``, by Fisher's identity [1], with standard errors.

        .. math:: \nabla_\theta \log p_\theta(y) = \mathbb E\Big[\nabla_\theta \log p_\theta(x_{\text{init}})
           + \sum_t \nabla_\theta \log p_\theta(x_t, y_t \mid x_{t-1}) \,\Big|\, y\Big],

        the expectation by one of the smoothers of :meth:`smooth`. Consistent in N with a bias of order 1/N; not
        unbiased, neither for the score nor for the gradient of a bound. The variance of ``"backward_mcmc"``,
        ``"paris"`` and ``"ffbsm"`` grows as T/N, that of ``"genealogy"`` and of differentiating the evidence through
        resampling as :math:`T^2/N`; quadratic methods allow fewer particles, so more bias, at equal time.
        Under plates that enclose the program the problems' scores are summed.

        :param sites: names of the ``param`` sites, or of latents given in ``params``; all real ones if not given. Of a
            latent its prior adds nothing: the evidence is conditional on it. Values are constrained ones.
        :param num_repeats, rng_key, options: see :meth:`smooth`. Cost: that of smoothing, and of differentiating the
            densities of its pairs.
        :return: structured like the chosen ``params``.
        :raises ValueError: if there is nothing to differentiate in; if the carry is not determined by the step's own
            latents (use ``FIVO(resampling_gradient="stop_gradient")`` then).

        **Example**

        .. doctest::

            >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from jax import random
            >>> from numpyro.contrib.control_flow import scan
            >>> from numpyro_smc import ParticleFilter
            >>> def model(y):
            ...     a = numpyro.param("a", 0.5)
            ...     def step(x, y_t):
            ...         x = numpyro.sample("x", dist.Normal(a * x, 0.5))
            ...         numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            ...         return x, None
            ...     scan(step, 0.0, y)
            >>> y, params = jnp.array([1.0, 0.8, 0.9]), {"a": 0.5}
            >>> score = ParticleFilter(model, num_particles=200).run(random.key(0), y, params=params).score()
            >>> bool(score.value["a"] > 0.0)
            True

        **References**

        1. *Particle approximations of the score and observed information matrix in state space models*, G. Poyiadjis,
           A. Doucet, S. Singh (2011)
        """
        check_positive("score", num_repeats=num_repeats)
        self._check_method(method, options, "score")
        names = scores.chosen_names(self.program[0], sites)

        key = random.fold_in(self.rng_key, 2) if rng_key is None else rng_key
        asked = (names, self.rng_key, key, self.program, num_repeats, method, options)
        answers = self.filter._compiled_answer(_score, *asked)
        return summarise("score", answers, "score", method, self.filter.num_particles, False)

    # ---- checks -------------------------------------------------------------------------------------------------

    def _check_method(self, method: str, options: dict[str, Any], user: str) -> None:
        by_ancestors = method == "paris" and options.get("backward", "mcmc") == "mcmc"
        if method in NEED_GENEALOGY or by_ancestors:
            self._need_genealogy(f"{user}(method={method!r})")

    def _check_of_elements(self, site: str) -> None:
        """:raises ValueError: for deterministic sites that no particle of one problem has a value of."""
        if site in self.history.combined:
            raise ValueError(
                f"Deterministic site '{site}' does not start with the axes of the plates whose elements are filtered "
                f"as independent problems, so it belongs to no particle of one element and has no weights. Take its "
                f"values along paths, sample_posterior(...)['{site}'], or state it per element in the plate."
            )

    def _need_history(self, what: str) -> None:
        if self.history.steps is None:
            raise ValueError(
                f"FilterResult.{what} needs the particles of all steps: run ParticleFilter(..., history=True)."
            )

    def _need_genealogy(self, what: str) -> None:
        scheme = self.filter.scheme
        if scheme is not None and scheme.mixes:
            raise ValueError(
                f"FilterResult.{what}: resampler '{scheme.name}' mixes particles, which then have no ancestors. Use "
                f"method='backward', or a scheme that copies particles, such as 'systematic'."
            )

    def _site_names(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the sites before the scan, and of those of a step."""
        self._need_history("smooth of a site")
        return frozenset(self.history.initial["values"]), frozenset(self.history.steps["values"])


def _smooth(particle_filter: Any, functional: Functional | str, additive: bool, *args: Any) -> Any:
    return repeat(particle_filter, "smooth", expectation_of(functional, additive), *args)


def _score(particle_filter: Any, names: tuple[str, ...], *args: Any) -> Any:
    return repeat(particle_filter, "score", scores.score_of(particle_filter, names), *args)


def _backward_paths(
    particle_filter: Any, rng_key: Array, filter_key: Array, program: Any, history: Any, num_samples: int, options: Any
) -> tuple[dict[str, Array], Array]:
    kernel = backward_kernel(read(particle_filter, filter_key, program, history), history, "sample_posterior")
    first, path, wrong = backward.sample_indices(rng_key, kernel, backward_draw(kernel, *options), num_samples)
    # What is computed from a path is that of the path drawn, not of the particles' own pasts.
    return along_paths(kernel.sequence, genealogy.follow(history, first, path)), wrong


def _genealogical_paths(
    particle_filter: Any, rng_key: Array, filter_key: Array, program: Any, history: Any, num_samples: int
) -> dict[str, Array]:
    paths = genealogy.sample_paths(rng_key, history, num_samples)
    return along_paths(read(particle_filter, filter_key, program, history), paths) if history.combined else paths


def _marginal_log_weights(
    particle_filter: Any, filter_key: Array, program: Any, history: Any, batch_size: int
) -> Array:
    sequence = read(particle_filter, filter_key, program, history)
    kernel = backward_kernel(sequence, history, "smoothing_log_weights")
    weights = marginal.smooth_backwards(kernel, batch_size).weights
    return jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -jnp.inf) + jnp.log(weights.shape[1])
