"""Simulation-based calibration of posterior samplers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.diagnostics import effective_sample_size
from numpyro.infer.mcmc import MCMCKernel

from numpyro_smc.programs.arguments import check_between, check_if_given, check_not_negative, check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.reports.uniformity import Uniformity, levels_of_ranks
from numpyro_smc.verify.joint_model import Draw, JointModel, Program, Values, names_of_elements, raveled
from numpyro_smc.verify.placement import KernelOf, PlacedKernel
from numpyro_smc.verify.replicates import replicates
from numpyro_smc.verify.successive_conditional import check_finite

#: From a random key and data by site to draws by site, each ``[num_draws, ...]``.
Sampler = Callable[[Array, Values], Values]

_MEANING = ("draws too large", "draws too small")


@dataclass(frozen=True, repr=False)
class Calibration(Uniformity):
    """What :func:`sbc` found: ranks of the truths among the draws.

    :ivar ess: effective sample size of the draws of each number, median over the simulations, ``[k]``.
    :ivar num_draws: of each posterior.
    """

    ess: np.ndarray | None = None
    num_draws: int = 0

    @property
    def is_independent(self) -> bool:
        """Whether the draws were nearly independent, as uniform ranks presume: half of them effective or more."""
        return self.ess is None or bool((self.ess >= 0.5 * self.num_draws).all())

    def __repr__(self) -> str:
        text = super().__repr__()
        if self.is_independent:
            return text
        assert self.ess is not None
        worst = int(np.argmin(self.ess))
        return (
            f"{text}\n  Draws are correlated (ESS of '{self.names[worst]}' {self.ess[worst]:.0f} of {self.num_draws}): "
            f"ranks of a right sampler are then not uniform either. Use more thinning."
        )

    def table(self) -> list[dict[str, Any]]:
        """One line a column."""
        ess = np.full(len(self.names), np.nan) if self.ess is None else self.ess
        return [line | {"ESS": float(number)} for line, number in zip(super().table(), ess, strict=True)]


def sbc(
    rng_key: Array,
    kernel: KernelOf | Sampler,
    model: Program,
    *args: Any,
    observed: str | Sequence[str] | None = None,
    num_simulations: int = 500,
    num_draws: int = 99,
    num_warmup: int = 200,
    thinning: int = 1,
    level: float = 1e-3,
    batch_size: int | None = None,
    **kwargs: Any,
) -> Calibration:
    r"""Simulation-based calibration [1]: the rank of the true latents among draws from their posterior is uniform.

    Of S draws of the joint law :math:`(z, y) \sim p(z)\,p(y \mid z)` the posterior :math:`p(z \mid y)` is sampled n
    times. Where these draws are exact and independent, z and they are exchangeable, so that ranks are uniform: of each
    element of the latents, of their log density, and of the log density of the data given them, without which a sampler
    that ignores the data would pass [2].

    Trust: false alarms have probability ``level`` (Bonferroni over the numbers; the p-values are Kolmogorov's). Unlike
    :func:`geweke`, it also tests that the sampler has arrived and mixes: a chain too short for its posterior fails, and
    so do correlated draws of a right kernel. The ``ESS`` of the table tells; give ``thinning`` until it is near n.
    Cost: S chains of ``num_warmup + thinning * num_draws`` steps, vectorised in one compiled program.

    :param kernel: an MCMC kernel on ``model``, or a function that makes one of a model, such as ``NUTS``; or any
        sampler, a function of two arguments ``(rng_key, data)``, data by site, to draws by site ``[n, ...]`` of all
        latents. One that JAX cannot trace is run once for each simulation.
    :param model: the program, latents and data. **args**, **kwargs** - its arguments.
    :param observed: names of the sites that are data, as for :func:`geweke`.
    :param num_simulations: S. **num_draws** - n, of a kernel.
    :param num_warmup: first steps of each chain, in which a kernel adapts. **thinning** - steps from draw to draw.
    :param level: probability of a false alarm.
    :param batch_size: simulations that are vectorised; all by default.
    :return: ``passed``, a table with a line for each number, and a plot.
    :raises ValueError: naming the site, for models that cannot be simulated, and for samplers without some latent.
    :raises FloatingPointError: naming the numbers, if draws are not finite.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.verify import sbc
        >>> def model(y=None):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def exact(rng_key, data):
        ...     return {"z": data["y"] / 2 + jnp.sqrt(0.5) * random.normal(rng_key, (99,))}
        >>> def overconfident(rng_key, data):
        ...     return {"z": data["y"] / 2 + 0.4 * random.normal(rng_key, (99,))}
        >>> [sbc(random.key(0), sampler, model, observed="y").passed for sampler in (exact, overconfident)]
        [True, False]

    **References**

    1. *Validating Bayesian Inference Algorithms with Simulation-Based Calibration*, S. Talts et al. (2018)
    2. *Simulation-Based Calibration Checking for Bayesian Computation*, M. Modrák et al. (2023)
    """
    check_if_given("sbc", batch_size=batch_size)
    check_not_negative("sbc", num_warmup=num_warmup)
    rng_key = one_key("sbc", rng_key)
    check_positive("sbc", num_simulations=num_simulations, num_draws=num_draws, thinning=thinning)
    check_between("sbc", 0.0, 1.0, level=level)
    joint = JointModel(model, args, kwargs, observed, user="sbc")
    name, sampler = _as_sampler(kernel, joint, num_draws, num_warmup, thinning)
    run_key, rank_key = random.split(rng_key)
    names: list[str] = []

    # Compiled on their own, for samplers that cannot be traced.
    draw = jax.jit(joint.draw)

    @jax.jit
    def numbers(latents: Values, data: Values) -> Array:
        prior, likelihood = joint.log_densities(Draw(latents, data))
        found = {name: latents[name] for name in joint.latent} | {"log prior": prior, "log likelihood": likelihood}
        names[:] = names_of_elements(found)
        return raveled(found)

    def one(rng_key: Array) -> tuple[Array, Array]:
        draw_key, sample_key = random.split(rng_key)
        true = draw(draw_key)
        draws = sampler(sample_key, true.data)
        missing = [name for name in joint.latent if name not in draws]
        if missing:
            raise ValueError(f"sbc: {name} gives no draws of the latent sites {missing}.")
        draws = {name: jnp.asarray(draws[name]) for name in joint.latent}
        return numbers(true.latents, true.data), jax.vmap(lambda latents: numbers(latents, true.data))(draws)

    true, draws = replicates(one, run_key, num_simulations, batch_size=batch_size)
    check_finite("sbc", name, names, draws.reshape(-1, len(names)))
    below, equal = (draws < true[:, None]).sum(1), (draws == true[:, None]).sum(1)
    levels = levels_of_ranks(random.uniform(rank_key, below.shape), below, equal, draws.shape[1])
    return Calibration(
        f"Simulation-based calibration of {name}",
        levels,
        tuple(names),
        _MEANING,
        level,
        _ess(draws),
        draws.shape[1],
    )


def _as_sampler(
    kernel: KernelOf | Sampler, joint: JointModel, num_draws: int, num_warmup: int, thinning: int
) -> tuple[str, Sampler]:
    if not isinstance(kernel, MCMCKernel | type) and callable(kernel) and _num_required(kernel) == 2:
        given: Any = kernel
        return getattr(given, "__name__", type(given).__name__), given
    placed = PlacedKernel(kernel, joint)  # type: ignore[arg-type]

    def sample(rng_key: Array, data: Values) -> Values:
        def step(state: Any, _: None) -> tuple[Any, None]:
            return placed.sample(state, data), None

        def draw(state: Any, _: None) -> tuple[Any, Values]:
            state, _ = lax.scan(step, state, None, length=thinning)
            return state, placed.values(state, data)

        state, _ = lax.scan(step, placed.init(rng_key, data, num_warmup), None, length=num_warmup)
        return lax.scan(draw, state, None, length=num_draws)[1]

    return placed.name, sample


def _num_required(function: Callable[..., Any]) -> int:
    """Positional arguments without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _ess(draws: np.ndarray) -> np.ndarray:
    """Of each number, the median over the simulations; a chain that never moves has one effective draw."""
    if draws.shape[1] < 4:
        return np.full(draws.shape[2], float(draws.shape[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = np.asarray(effective_sample_size(np.asarray(draws, np.float64)[:, None].transpose(1, 2, 0, 3)))
    return np.median(np.nan_to_num(ess, nan=1.0), axis=0)
