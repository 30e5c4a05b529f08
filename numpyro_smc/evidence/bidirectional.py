"""Bidirectional Monte Carlo: the log evidence of simulated data, bounded from both sides."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.evidence.ais import AIS, BothWays, Problem
from numpyro_smc.evidence.estimate import log_mean_and_error
from numpyro_smc.programs.arguments import check_callable, check_positive
from numpyro_smc.programs.compiled import Compiled, is_array
from numpyro_smc.programs.density import Params
from numpyro_smc.programs.guide_target import State
from numpyro_smc.programs.inputs import checked_call
from numpyro_smc.programs.simulation import Simulate, simulated
from numpyro_smc.programs.sites import BatchPlates
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.summaries import mean_and_error

TIGHT = 0.1  # nats per problem


@dataclass(frozen=True, repr=False)
class BoundsFromBothSides:
    """What :func:`bidirectional` found, per simulated problem: ``[num_simulated, *plates]``.

    - **lower** - by forward chains; **upper** - by reverse chains; **gap** - their difference.
    - **lower_error**, **upper_error** - Monte Carlo standard errors, over chains.
    - **lower_ess**, **upper_ess** - effective sample sizes of the chains' weights.
    - **mean_gap**, **mean_gap_error** - over problems; **verdict** - what this says, in words.
    - **problems** - the simulated ``(args, kwargs)``.
    - **num_chains**, **num_temperatures**, **plates** - of the run; **acceptance** and **reverse_acceptance** -
      ``[num_simulated, K - 1, *plates]``.
    """

    lower: Array
    upper: Array
    lower_error: Array
    upper_error: Array
    lower_ess: Array
    upper_ess: Array
    acceptance: Array
    reverse_acceptance: Array
    num_chains: int
    num_temperatures: int
    plates: BatchPlates
    problems: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def gap(self) -> Array:
        return self.upper - self.lower

    @property
    def mean_gap(self) -> float:
        return float(np.mean(np.asarray(self.gap, np.float64)))

    @property
    def mean_gap_error(self) -> float:
        """Of the mean over problems; of the chains alone if there is one problem."""
        if np.size(self.gap) > 1:
            return mean_and_error(self.gap)[1]
        return float(np.hypot(np.ravel(self.lower_error), np.ravel(self.upper_error))[0])

    @property
    def verdict(self) -> str:
        number, gap, error = np.size(self.gap), self.mean_gap, self.mean_gap_error
        text = f"On {number} simulated problem{'s' * (number > 1)} the bounds are {gap:.2g} ± {error:.1g} nats apart"
        if not np.isfinite(gap):
            return f"{text}: some reverse chain left the guide's support, so these settings are not certified."
        if gap + 2.0 * error < TIGHT:
            return f"{text} on average: on data like the model's own these settings are nearly exact."
        if gap < 10.0 * TIGHT:
            return f"{text} on average: on data like the model's own the lower bound falls short by at most that much."
        return f"{text} on average: too far to be of use. Use more temperatures, or start from a fitted guide."

    def table(self) -> list[dict[str, Any]]:
        """Mean over problems of both bounds and the gap, with the spread between problems as standard error."""
        rows = []
        for name in ("lower", "upper", "gap"):
            mean, error = mean_and_error(getattr(self, name))
            rows.append({"quantity": name, "mean": mean, "s.e.": error})
        return rows

    def __repr__(self) -> str:
        lower, upper, _ = (row["mean"] for row in self.table())
        return (
            f"Bounds from both sides ({self.num_chains} chains, {self.num_temperatures} temperatures): "
            f"mean lower {lower:.6g}, mean upper {upper:.6g}\n  {self.verdict}"
        )

    def plot(self, ax: Any = None) -> Any:
        """Both bounds of every problem, in increasing order.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = ax or new_axes()
        lower, upper = np.ravel(self.lower), np.ravel(self.upper)
        order = np.argsort(lower)
        ax.plot(lower[order], "^", ms=3, label="lower (forward)")
        ax.plot(upper[order], "v", ms=3, label="upper (reverse)")
        ax.set_xlabel("simulated problem, sorted")
        ax.set_ylabel("log evidence")
        ax.legend(frameon=False)
        return ax


def bidirectional(
    rng_key: Array,
    ais: AIS,
    *args: Any,
    params: Params | None = None,
    num_simulated: int = 1,
    simulate: Simulate | None = None,
    **kwargs: Any,
) -> BoundsFromBothSides:
    r"""Bounds from both sides of the log evidence of data simulated from the model [1].

    Latents and data are simulated, so the latents are an exact draw from their posterior. Forward chains from the guide
    give the lower bound :math:`\log\tfrac1C\sum_c w_c`; reverse chains start at the simulated latents, go through the
    same frozen transitions in reversed order and have weights with :math:`\mathbb E[\bar w] = 1 / p(x)`:

    .. math:: \mathbb E\Big[\log\tfrac1C\sum_c w_c\Big] \le \log p(x)
       \le \mathbb E\Big[-\log\tfrac1C\sum_c \bar w_c\Big].

    Trust: both inequalities are exact, whatever the settings. The gap says how good the settings are on data like the
    model's own; it bounds nothing about the real data, which the model may fit badly. A guide that is a function of the
    data (amortised), or the prior, suits any data; one that was fitted to one data set is a poor start for others.
    Cost: twice that of ``ais.run`` for each of ``num_simulated`` data sets, without the pilot, and the same compiled
    programs.

    :param ais: the sampler whose settings are judged.
    :param args: arguments of model and guide, whose first, the data, gives way to simulated data; also ``kwargs``.
    :param params: constrained values of the ``param`` sites.
    :param num_simulated: number of data sets; each gives as many problems as the enclosing plates have elements.
    :param simulate: function from simulated observations by site to the programs' ``(args, kwargs)``, for programs
        whose data are not the first argument.
    :raises ValueError: naming the site, for models with factors and guides with latents of their own.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.evidence.ais import AIS
        >>> from numpyro_smc.evidence.bidirectional import bidirectional
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> ais = AIS(model, num_chains=20, num_temperatures=50, num_leapfrog=3)
        >>> bounds = bidirectional(random.key(0), ais, jnp.zeros(40))
        >>> bounds.mean_gap < 0.1
        True

    **References**

    1. *Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo*, R. Grosse, Z. Ghahramani, R. Adams (2015)
    2. *On the Quantitative Analysis of Decoder-Based Generative Models*, Y. Wu, Y. Burda, R. Salakhutdinov, R. Grosse
       (2017)
    """
    check_positive("bidirectional", num_simulated=num_simulated)
    if not isinstance(ais, AIS):
        raise TypeError(f"bidirectional: ais must be an AIS(model, ...), got {ais!r}.")
    if simulate is not None:
        check_callable("bidirectional", simulate=simulate)
    rng_key, params, args, kwargs = checked_call(
        "bidirectional", rng_key, ais.model, ais.guide, params, args, kwargs, options=(bidirectional,)
    )
    results, problems = [], []
    for number in range(num_simulated):
        program_key, simulate_key, run_key = random.split(random.fold_in(rng_key, number), 3)
        problem = Problem(params, args, kwargs, program_key)
        drawn = _simulator(ais, simulate)(simulate_key, problem)
        problems.append(drawn.arguments())
        problem = problem._replace(args=problems[-1][0], kwargs=problems[-1][1])
        chains = ais.both_ways(run_key, problem, drawn.exact)
        assert chains.reverse is not None
        results.append(_bounds(chains))
    bounds: dict[str, Any] = jax.tree.map(lambda *parts: jnp.stack(parts), *results)
    return BoundsFromBothSides(
        **bounds,
        num_chains=ais.num_chains,
        num_temperatures=ais.num_temperatures,
        plates=ais.plates_of(problem),
        problems=problems,
    )


def _bounds(chains: BothWays) -> dict[str, Array]:
    assert chains.reverse is not None
    lower, lower_error, lower_ess = log_mean_and_error(chains.forward.log_weights)
    minus_upper, upper_error, upper_ess = log_mean_and_error(chains.reverse.log_weights)
    return {
        "lower": lower,
        "upper": -minus_upper,
        "lower_error": lower_error,
        "upper_error": upper_error,
        "lower_ess": lower_ess,
        "upper_ess": upper_ess,
        "acceptance": chains.forward.acceptance,
        "reverse_acceptance": chains.reverse.acceptance,
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Simulated:
    """Simulated arguments, arrays apart from what is static, and the exact latents."""

    arrays: list[Array]
    exact: State
    structure: Any = field(metadata={"static": True})

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arrays, (treedef, static) = iter(self.arrays), self.structure
        return jax.tree.unflatten(treedef, [next(arrays) if leaf is None else leaf[0] for leaf in static])


@lru_cache(maxsize=32)
def _simulator(ais: AIS, simulate: Simulate | None) -> Compiled:
    # Kept, so that a second call finds its compiled program.
    def run(rng_key: Array, problem: Problem) -> _Simulated:
        pair = ais.pair(problem, "bidirectional")
        args, kwargs, exact = simulated(rng_key, pair, problem.params, simulate)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        static = tuple(None if is_array(leaf) else (leaf,) for leaf in leaves)
        return _Simulated([leaf for leaf in leaves if is_array(leaf)], exact, (treedef, static))

    return Compiled(run)
