"""The likelihood of parameters, estimated by a particle filter, with a path of the latents where one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array, random

from numpyro_smc.engines.particles import run
from numpyro_smc.kernels.conditional_smc import Sweep
from numpyro_smc.kernels.correlated_noise import Noise, draw_noise, steer, to_uniform
from numpyro_smc.kernels.sorted_resampling import ORDERS, sorted_systematic
from numpyro_smc.programs.arguments import check_callable, named
from numpyro_smc.programs.bootstrap import Bootstrap
from numpyro_smc.programs.inputs import as_data, as_params, check_program
from numpyro_smc.programs.pinned import Path, path_sites
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.resample import Decision, ResampleFn, build, no_conditional, schedule
from numpyro_smc.programs.resampling import Scheme, resolve
from numpyro_smc.programs.sequence import Program, Sequence


class Estimate(NamedTuple):
    r"""What one run of a filter says of parameters.

    - **log_evidence** - :math:`\log \hat p(y \mid \theta)`, a scalar. **path** - by site; empty if none was asked for.
    """

    log_evidence: Array
    path: Path


class EstimatedLikelihood:
    r"""An unbiased estimate of :math:`p(y \mid \theta)`: data about global latents included, once.

    :param num_particles, guide, resampler, resample, ess_threshold: as for :class:`~numpyro_smc.ParticleFilter`.
    :param params: values of ``param`` sites, and of latents to condition on.
    :param keep_paths: draw a path with each estimate.
    :param correlated: whether the draws are functions of noise that the caller holds.
    :param sort: in which order particles are resampled where the draws are given; see :class:`ParticleMetropolis`.
    :param user: who asks, for error messages.
    :raises ValueError: for options that do not go together, and schemes that are not unbiased.
    """

    def __init__(
        self,
        model: Program,
        num_particles: int,
        guide: Program | None,
        params: dict[str, Any] | None,
        *,
        resampler: str | Scheme,
        resample: str | Decision,
        ess_threshold: float,
        keep_paths: bool,
        correlated: bool,
        sort: str | None,
        user: str,
    ) -> None:
        self.model, self.guide, self.user = model, None if isinstance(guide, Bootstrap) else guide, user
        self.params = as_params(user, params)
        self.num_particles, self.keep_paths, self.correlated, self.sort = num_particles, keep_paths, correlated, sort
        self.resampler, self.resample, self.ess_threshold = resampler, resample, ess_threshold
        self._check()

    def read(self, values: dict[str, Array], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence:
        """The program at given parameters, as the recursion sees it.

        :param values: of the global latents, in their supports.
        """
        params = self.params | values
        sequence = read_sequence(random.key(0), self.model, self.guide, params, args, kwargs, user=self.user)
        if sequence.bound_scale != 1.0 or sequence.plates.scale != 1.0:
            raise ValueError(
                f"{self.user}: the whole program stands under handlers.scale or in subsampled plates: the estimate of "
                f"the likelihood is unbiased, but not a power of it. Remove the scale, and use plates of full size."
            )
        return sequence

    def checked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *options: Callable[..., Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as arrays, and an error if programs, arguments and parameters do not go together."""
        args, kwargs = as_data(self.user, (args, kwargs))
        check_program(self.user, self.model, self.guide, self.params, args, kwargs, options=options)
        return args, kwargs

    def noise(self, rng_key: Array, sequence: Sequence) -> Noise | None:
        """Independent noise for a run, where the draws are functions of it."""
        return draw_noise(rng_key, sequence, self.num_particles) if self.correlated else None

    def __call__(self, rng_key: Array, sequence: Sequence, noise: Noise | None) -> Estimate:
        """Run the filter.

        :param noise: of :meth:`noise`. What is no function of it (the choice of a path) is drawn anew.
        """
        resample = build(self.resampler, self.resample, self.ess_threshold)
        if noise is not None:
            steer(sequence, noise)
            resample = self._sorted(noise)
        if self.keep_paths:
            return self._with_path(rng_key, sequence, resample, None)
        recursion = run(rng_key, sequence, self.num_particles, resample)
        return Estimate(sequence.bound(recursion.log_evidence), {})

    def given_path(self, rng_key: Array, sequence: Sequence, path: Path) -> Estimate:
        r"""Run the filter with one particle held on a path, which is kept.

        The estimate has the law it has given this path, under the joint law of estimates and paths in which the density
        of an estimate is weighted with itself: the one in which the pairs of a chain are distributed.

        :raises ValueError: for options that leave no such run.
        """
        if not path:  # nothing is latent, and the estimate is exact
            return self(rng_key, sequence, None)
        self._check_given_path()
        resample = build(self.resampler, self.resample, self.ess_threshold)
        return self._with_path(rng_key, sequence, resample, path)._replace(path=path)

    def _check_given_path(self) -> None:
        if self.correlated:
            raise ValueError(
                f"{self.user}: noise that is correlated between proposals cannot be drawn anew given a path. Use "
                f"correlation=0.0 in a composite kernel."
            )
        if self.num_particles < 2:
            raise ValueError(f"{self.user}: a composite kernel holds one particle on the path. Use num_particles >= 2.")
        scheme = resolve(self.resampler)
        if self.resample != "never" and scheme.conditional is None:
            raise ValueError(f"{self.user}: {no_conditional(scheme)}")

    def _with_path(self, rng_key: Array, sequence: Sequence, resample: Any, reference: Path | None) -> Estimate:
        steps = path_sites(sequence)[1]
        if not steps:
            raise ValueError(f"{self.user}: the scan has no latent site, so there are no paths. Use keep_paths=False.")
        path, recursion = Sweep(self.num_particles, resample, False, False)(rng_key, sequence, reference)
        return Estimate(sequence.bound(recursion.log_evidence), path)

    def _sorted(self, noise: Noise) -> ResampleFn | None:
        decide = schedule(self.resample, self.ess_threshold)
        if decide is None:
            return None
        return sorted_systematic(to_uniform(noise.resampling), decide, self.sort, self.user)

    def _check(self) -> None:
        user = self.user
        check_callable(user, model=self.model, **({} if self.guide is None else {"guide": self.guide}))
        with named(user):
            scheme = resolve(self.resampler)
            build(scheme, self.resample, self.ess_threshold)
        if self.resample != "never" and not scheme.unbiased:
            raise ValueError(
                f"{user}: resampler '{scheme.name}' is not known to be unbiased, and chains that use its estimates "
                f"have another target than the posterior. Use an unbiased scheme such as 'systematic'."
            )
        if self.resample != "never" and self.keep_paths and scheme.mixes:
            raise ValueError(
                f"{user}: resampler '{scheme.name}' mixes particles, which then have no ancestors, so there are no "
                f"paths. Use a scheme that copies particles, such as 'systematic', or keep_paths=False."
            )
        if self.sort is not None and self.sort not in ORDERS:
            raise ValueError(f"{user}: unknown sort={self.sort!r}. Known: {', '.join(map(repr, ORDERS))}, None.")
        if self.sort is not None and not self.correlated:
            raise ValueError(f"{user}: sort={self.sort!r} is for correlated draws. Give correlation > 0, or no sort.")
        if self.correlated and scheme.name != "systematic":
            raise ValueError(
                f"{user}: correlated draws are resampled systematically in the order of the particles' states. Use "
                f"resampler='systematic', not '{scheme.name}'."
            )
