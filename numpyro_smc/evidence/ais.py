"""Annealed importance sampling: the log evidence, and bounds from both sides where the latents are known."""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.util import find_stack_level

from numpyro_smc.evidence import annealing
from numpyro_smc.evidence.annealing import Annealed, Path
from numpyro_smc.evidence.estimate import Evidence, log_mean_and_error
from numpyro_smc.evidence.rows import batches, check_densities, check_plates, cut
from numpyro_smc.programs.arguments import check_between, check_positive
from numpyro_smc.programs.bootstrap import bootstrap
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import Pair, Params, Program
from numpyro_smc.programs.guide_target import GuideTarget, State
from numpyro_smc.programs.nonfinite import as_arrays, check_finite
from numpyro_smc.programs.sites import BatchPlates

SCHEDULES = ("linear", "sigmoid", "adaptive")


class Problem(NamedTuple):
    """Arguments of one run: parameters, ``args``, ``kwargs``, and the key of whatever else the programs draw."""

    params: Params
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    program_key: Array


class BothWays(NamedTuple):
    """Chains of one problem: **forward** from the guide, **reverse** from exact latents (if given), and their path."""

    forward: Annealed
    reverse: Annealed | None
    step_sizes: Array
    betas: Array


class AIS:
    r"""Annealed importance sampling from a guide, or the prior, to the model [1].

    Along :math:`\gamma_k = q^{1-\beta_k} p^{\beta_k}` in unconstrained space, each of :math:`C` chains starts as a draw
    from the guide :math:`q`, moves by Hamiltonian transitions that leave :math:`\gamma_k` invariant, and has the weight

    .. math:: \log w = \sum_{k=1}^K (\beta_k - \beta_{k-1}) \big(\log p(x, z_{k-1}) - \log q(z_{k-1})\big), \qquad
       \mathbb E\Big[\tfrac1C \sum_c w_c\Big] = p(x).

    Elements of the plates that enclose every site of model and guide are independent problems: each data point has its
    own chains, weights and step sizes. Steps and scales are tuned by a pilot run, per temperature and element, and then
    frozen: tuning them on the chains that are weighed would bias the weights.

    Trust: :math:`\hat Z` is unbiased, so its logarithm is a lower bound on average, however few the temperatures; no
    chain can tell of a mode that none has entered. :func:`~numpyro_smc.bidirectional` measures how loose the bound is.
    A start from a fitted guide needs five to twenty times fewer temperatures than one from the prior.
    Cost: ``num_temperatures * num_leapfrog`` gradients of model and guide per chain, and as many for each chain of the
    pilot (twice with ``"adaptive"``); gradients of both ends are kept, so a new temperature costs no evaluation.
    Memory: that of ``chain_batch_size`` chains on ``batch_size`` data points. Compiled once for data of one shape.

    :param model: its continuous latents are annealed; discrete ones must be marginalised.
    :param guide: where chains start; the prior if ``None``.
    :param num_chains: :math:`C`.
    :param num_temperatures: :math:`K \ge 2`.
    :param num_leapfrog: leapfrog steps of each transition; at equal cost, more temperatures mostly beat more steps.
    :param schedule: ``"sigmoid"`` (denser at both ends), ``"linear"``, ``"adaptive"`` (one more pilot run puts the
        temperatures of each element at equal distances of the path) or the :math:`K + 1` temperatures.
    :param num_pilot_chains: chains of the pilot.
    :param target_acceptance: what the pilot tunes the step sizes to.
    :param batch_size: data points at a time: the programs are run on as many rows of those array arguments that have
        the leading plate's size (checked on the first batch). All if ``None``.
    :param chain_batch_size: chains at a time; must divide ``num_chains``. All if ``None``.
    :param plates: ``"auto"``: the plates that enclose every site and whose elements the programs prove independent;
        names of plates that must be so; or ``None`` for whole-model weights.
    :raises ValueError: for arguments out of range; naming the site, for discrete latents and for latents that the guide
        does not cover.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.evidence.ais import AIS
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> x = jnp.array([0.3, -1.2, 2.0])
        >>> result = AIS(model, num_chains=20, num_temperatures=20, num_leapfrog=3).run(random.key(0), x)
        >>> exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
        >>> bool(jnp.all(jnp.abs(result.per_datapoint - exact) < 0.5))
        True

    **References**

    1. *Annealed Importance Sampling*, R. Neal (2001)
    2. *On the Quantitative Analysis of Decoder-Based Generative Models*, Y. Wu, Y. Burda, R. Salakhutdinov, R. Grosse
       (2017)
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        *,
        num_chains: int = 16,
        num_temperatures: int = 400,
        num_leapfrog: int = 5,
        schedule: str | Sequence[float] = "sigmoid",
        num_pilot_chains: int = 16,
        target_acceptance: float = 0.8,
        batch_size: int | None = None,
        chain_batch_size: int | None = None,
        plates: str | Collection[str] | None = "auto",
    ) -> None:
        check_positive("AIS", num_chains=num_chains, num_temperatures=num_temperatures, num_leapfrog=num_leapfrog)
        check_positive("AIS", num_pilot_chains=num_pilot_chains)
        check_between("AIS", 0.05, 0.999, target_acceptance=target_acceptance)
        for name, size in (("batch_size", batch_size), ("chain_batch_size", chain_batch_size)):
            if size is not None:
                check_positive("AIS", **{name: size})
        if num_temperatures < 2 or num_pilot_chains < 2:
            raise ValueError(
                f"AIS: num_temperatures and num_pilot_chains must be at least 2, got {num_temperatures} and "
                f"{num_pilot_chains}. One temperature is importance sampling."
            )
        if num_chains % (chain_batch_size or num_chains):
            raise ValueError(f"AIS: chain_batch_size={chain_batch_size} must divide num_chains={num_chains}.")
        self.model, self.guide = model, bootstrap(model) if guide is None else guide
        self.betas = temperatures(schedule, num_temperatures)
        self.num_temperatures, self.num_leapfrog = len(self.betas) - 1, num_leapfrog
        self.is_adaptive = isinstance(schedule, str) and schedule == "adaptive"
        self.num_chains, self.num_pilot_chains, self.target_acceptance = num_chains, num_pilot_chains, target_acceptance
        self.batch_size, self.chain_batch_size = batch_size, chain_batch_size or num_chains
        self.plates = plates
        self._tune, self._forward, self._reverse = (Compiled(f) for f in (self._tuned, self._annealed, self._unwound))
        self._ends = Compiled(self._ends_of)

    def run(self, rng_key: Array, *args: Any, params: Params | None = None, **kwargs: Any) -> Evidence:
        """Log evidence of the data in ``args`` and ``kwargs``, per element of the enclosing plates.

        :param params: constrained values of the ``param`` sites.
        :raises FloatingPointError: naming the sites, if some element's weights all vanish or are not a number.
        """
        program_key, run_key = random.split(rng_key)
        problem = Problem(as_arrays(params), args, kwargs, program_key)
        chains = self.both_ways(run_key, problem)
        log_weights = chains.forward.log_weights
        value, error, ess = log_mean_and_error(log_weights)
        check_finite(value, self.pair(problem), problem.params)
        self._warn_of_small_steps(chains)
        return Evidence(
            "ais",
            self.num_chains,
            value,
            error,
            ess,
            self.plates_of(problem),
            jnp.mean(log_weights, axis=0),
            acceptance=chains.forward.acceptance,
            step_sizes=chains.step_sizes,
            betas=chains.betas,
        )

    def both_ways(self, rng_key: Array, problem: Problem, exact: State | None = None) -> BothWays:
        """Weights of forward chains and, if the exact latents of each element are given, of reverse chains.

        :param exact: unconstrained values of the guide's latents, ``[*plates, ...]``.
        """
        size, num_rows = self.batch_size, 0
        if size is not None:
            plates = self.plates_of(problem)
            num_rows = plates.shape[0] if plates.shape else 0
            if plates.scale != 1.0:
                raise ValueError(
                    f"AIS: batch_size with subsampled plates {list(plates.names)}. Give all data, unsampled."
                )
        if size is None or size >= num_rows:
            return self._in_chain_batches(rng_key, problem, exact)
        results = []
        for number, (first, repeated) in enumerate(batches(num_rows, size)):
            part = problem._replace(
                args=cut(problem.args, num_rows, first, size), kwargs=cut(problem.kwargs, num_rows, first, size)
            )
            if number == 0:
                self._check_rows(problem, part, plates, size)
            known = None if exact is None else cut(exact, num_rows, first, size)
            result = self._in_chain_batches(random.fold_in(rng_key, number), part, known)
            # Every leaf is [chains or temperatures, rows, ...].
            results.append(jax.tree.map(lambda x, r=repeated: x[:, r:], result))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results)

    def plates_of(self, problem: Problem) -> BatchPlates:
        """The enclosing plates."""
        found = []
        jax.eval_shape(
            lambda params: found.append(self._target(problem._replace(params=params)).plates), problem.params
        )
        return found[0]

    def _in_chain_batches(self, rng_key: Array, problem: Problem, exact: State | None) -> BothWays:
        tune_key, forward_key, reverse_key = random.split(rng_key, 3)
        path = self._tune(tune_key, problem)

        def all_chains(run: Callable[..., Annealed], rng_key: Array, *given: Any) -> Annealed:
            keys = random.split(rng_key, self.num_chains // self.chain_batch_size)
            parts = [run(key, problem, path, *given) for key in keys]
            log_weights = jnp.concatenate([part.log_weights for part in parts])
            return Annealed(log_weights, jnp.mean(jnp.stack([part.acceptance for part in parts]), axis=0))

        reverse = None if exact is None else all_chains(self._reverse, reverse_key, exact)
        return BothWays(all_chains(self._forward, forward_key), reverse, path.step_sizes, path.betas)

    def pair(self, problem: Problem, user: str = "AIS") -> Pair:
        """Model and guide with the arguments of a problem."""
        plate_key = random.split(problem.program_key)[0]
        num = self.num_chains
        return Pair(self.model, self.guide, problem.args, problem.kwargs, plate_key, self.plates, user, num)

    def _target(self, problem: Problem) -> GuideTarget:
        return GuideTarget(self.pair(problem), problem.params, random.split(problem.program_key)[1])

    def _tuned(self, rng_key: Array, problem: Problem) -> Path:
        target = self._target(problem)
        shape = target.plates.shape
        betas = jnp.asarray(self.betas).reshape((-1,) + (1,) * len(shape)) * jnp.ones(shape)
        settings = self.num_pilot_chains, self.num_leapfrog, self.target_acceptance
        if self.is_adaptive:
            first_key, rng_key = random.split(rng_key)
            betas = annealing.equal_steps(betas, annealing.tune(first_key, target, betas, *settings)[1])
        return annealing.tune(rng_key, target, betas, *settings)[0]

    def _annealed(self, rng_key: Array, problem: Problem, path: Path) -> Annealed:
        start_key, run_key = random.split(rng_key)
        target = self._target(problem)
        chains = annealing.start(start_key, target, self.chain_batch_size)
        return annealing.anneal(run_key, target, chains, path, self.num_leapfrog)

    def _unwound(self, rng_key: Array, problem: Problem, path: Path, exact: State) -> Annealed:
        target = self._target(problem)
        copies = jax.tree.map(lambda z: jnp.broadcast_to(z, (self.chain_batch_size, *z.shape)), exact)
        chains = annealing.chains_at(target, copies)
        annealed = annealing.anneal(rng_key, target, chains, path.reversed(), self.num_leapfrog)
        return annealed._replace(acceptance=jnp.flip(annealed.acceptance, 0))

    def _ends_of(self, problem: Problem, state: State | None) -> tuple[State, Array]:
        target = self._target(problem)
        state = target.draw(problem.program_key, jnp.asarray(0)) if state is None else state
        return state, jnp.stack(target.ends(state))

    def _check_rows(self, whole: Problem, part: Problem, plates: BatchPlates, size: int) -> None:
        check_plates(plates, self.plates_of(part), size, "AIS")
        state, ends = self._ends(whole, None)
        check_densities(ends[:, :size], self._ends(part, cut(state, plates.shape[0], 0, size))[1], "AIS")

    def _warn_of_small_steps(self, chains: BothWays) -> None:
        driven = np.any(np.asarray(chains.step_sizes) <= 1.01 * annealing.SMALLEST_STEP, axis=0)
        if np.any(driven):
            warnings.warn(
                f"AIS: the step sizes of {int(np.sum(driven))} of {np.size(driven)} elements were driven to zero: at "
                f"some temperature no move is accepted. The densities or their gradients are not smooth or not finite.",
                stacklevel=find_stack_level(),
            )


def temperatures(schedule: str | Sequence[float], num_temperatures: int) -> np.ndarray:
    r"""The :math:`K + 1` temperatures of a schedule, from 0 to 1.

    ``"sigmoid"``: :math:`\beta_k \propto \sigma(8k/K - 4)`, shifted and scaled. ``"adaptive"`` gives those of its
    first pilot, :math:`(k/K)^4`.

    :raises ValueError: for unknown names, and unless given temperatures increase from 0 to 1.
    """
    along = np.arange(num_temperatures + 1) / num_temperatures
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"AIS: unknown schedule {schedule!r}; there are {list(SCHEDULES)}, or give temperatures.")
        curve = 1.0 / (1.0 + np.exp(4.0 - 8.0 * along))
        curve = (curve - curve[0]) / (curve[-1] - curve[0])
        return {"linear": along, "sigmoid": curve, "adaptive": along**4}[schedule]
    betas = np.asarray(schedule, np.float64)
    increasing = betas.ndim == 1 and len(betas) > 2 and bool(np.all(np.diff(betas) > 0.0))
    if not increasing or not math.isclose(betas[0], 0.0) or not math.isclose(betas[-1], 1.0):
        raise ValueError(f"AIS: temperatures must increase from 0 to 1, at least three of them, got {schedule!r}.")
    return betas
