"""Geweke's test: does an MCMC kernel leave the posterior of the model as it is written invariant?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_smc.programs.arguments import check_between, check_if_given, check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.reports.uniformity import Uniformity, levels_of_ranks
from numpyro_smc.verify.joint_model import Draw, JointModel, Program, Values, names_of_elements, raveled
from numpyro_smc.verify.placement import KernelOf, PlacedKernel

#: Numbers of one draw of latents and data (by site, in one dictionary), by name.
TestFunction = Callable[[Values], Array]

_MEANING = ("too small after the kernel", "too large after the kernel")


def geweke(
    rng_key: Array,
    kernel: KernelOf,
    model: Program,
    *args: Any,
    observed: str | Sequence[str] | None = None,
    num_replicates: int = 1000,
    num_steps: int = 20,
    num_fresh: int = 99,
    test_functions: dict[str, TestFunction] | None = None,
    level: float = 1e-3,
    batch_size: int | None = None,
    **kwargs: Any,
) -> Uniformity:
    r"""Getting it right [1]: a kernel and a redraw of the data, in turn, must leave the joint law as it is.

    Each of R independent replicates starts at an exact draw :math:`(z, y) \sim p(z)\,p(y \mid z)`. Then :math:`L` times
    the data are drawn again, :math:`y \sim p(y \mid z)`, and the kernel takes one step :math:`z \sim K(z, \cdot \mid
    y)` towards :math:`p(z \mid y)`. If the kernel leaves the posterior invariant, the end has the law of the start, for
    any L and however badly the kernel mixes. So the rank of each of its numbers among n fresh draws of the joint law is
    exactly uniform, and independent between replicates [2]: no autocorrelation has to be estimated, as in the original
    test. Steps add up what is wrong with the kernel; a kernel that moves nothing passes. The kernel has the last word:
    were it a draw of the data, a kernel that ignores the data and leaves the prior invariant would pass.

    The numbers are: each element of each latent site and of the data, the log density of the latents, that of the data
    given them, and what ``test_functions`` say. Errors of joint laws whose margins are right show in the log densities.

    Trust: the whole has a false-alarm rate of ``level`` (Bonferroni over the numbers; the p-values are Kolmogorov's,
    accurate for 30 replicates and more). A number whose distribution function is off by :math:`\delta` somewhere is
    found where :math:`\delta \gg \sqrt{\log(2 k / \text{level}) / (2R)}` for k numbers: 0.08 for 1000 replicates and 30
    numbers. The kernel is not adapted: give it its step sizes.

    Cost: R L steps of the kernel and R (n + L) simulations of the model, in one compiled program.

    :param kernel: an MCMC kernel on ``model`` of all its latents, with ``wrap_model`` and ``refresh`` as NumPyro's
        ``Gibbs`` needs them; or a function that makes one of a model, such as ``NUTS``.
    :param model: the program, latents and data. **args**, **kwargs** - its arguments.
    :param observed: names of the sites that are data; by default all that are observed with these arguments, whose
        values are ignored. Data that enter the program otherwise than as values of these sites (as regressors, say)
        stay as they are.
    :param num_replicates: R. **num_steps** - L.
    :param num_fresh: n.
    :param test_functions: by name, scalar functions of the dictionary of latents and data by site.
    :param level: probability of a false alarm.
    :param batch_size: replicates that are vectorised; all by default.
    :return: ``passed``, a table with a line for each number, and a plot.
    :raises ValueError: naming the site, for models that cannot be simulated; for kernels that cannot be started at a
        draw, or whose data cannot be changed.
    :raises FloatingPointError: naming the numbers, if the kernel ends where they are not finite.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from functools import partial
        >>> from jax import random
        >>> from numpyro.infer import HMC
        >>> from numpyro_smc.verify import geweke
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.Gamma(3.0, 2.0))
        ...     with numpyro.plate("data", 3):
        ...         numpyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> kernel = partial(HMC, step_size=0.3, num_steps=4, trajectory_length=None)
        >>> found = geweke(random.key(0), kernel, model, observed="y", num_replicates=300, num_steps=5)
        >>> found.passed, found.names
        (True, ('scale', 'y[0]', 'y[1]', 'y[2]', 'log prior', 'log likelihood'))

    **References**

    1. *Getting It Right: Joint Distribution Tests of Posterior Simulators*, J. Geweke (2004)
    2. *Unit Testing for MCMC and other Monte Carlo Methods*, A. Gandy, J. Scott (2020)
    """
    check_if_given("geweke", batch_size=batch_size)
    rng_key = one_key("geweke", rng_key)
    check_positive("geweke", num_replicates=num_replicates, num_steps=num_steps, num_fresh=num_fresh)
    check_between("geweke", 0.0, 1.0, level=level)
    joint = JointModel(model, args, kwargs, observed, user="geweke")
    placed = PlacedKernel(kernel, joint)
    placed.check_refreshes()
    place_key, run_key, rank_key = random.split(rng_key, 3)
    placed.learn_placement(place_key)
    names: list[str] = []

    def numbers(draw: Draw) -> Array:
        found = _numbers(joint, test_functions or {}, draw)
        names[:] = names_of_elements(found)
        return raveled(found)

    def one(rng_key: Array) -> tuple[Array, Array, Array]:
        draws_key, chain_key = random.split(rng_key)
        draws = jax.vmap(joint.draw)(random.split(draws_key, num_fresh + 1))
        end = successive_conditional(chain_key, placed, jax.tree.map(lambda leaf: leaf[-1], draws), num_steps)
        # The end stands in the place of its start, so that the program holds one copy of the densities.
        draws = jax.tree.map(lambda fresh, leaf: fresh.at[-1].set(leaf), draws, end)
        found = jax.vmap(numbers)(draws)
        # Not a number compares as false: it shows in the end itself.
        return found[-1], jnp.sum(found[:-1] < found[-1], 0), jnp.sum(found[:-1] == found[-1], 0)

    keys = random.split(run_key, num_replicates)
    ends, below, equal = jax.jit(lambda keys: lax.map(one, keys, batch_size=batch_size or num_replicates))(keys)
    check_finite("geweke", placed.name, names, ends)
    levels = levels_of_ranks(random.uniform(rank_key, below.shape), below, equal, num_fresh)
    return Uniformity(f"Geweke test of {placed.name}", levels, tuple(names), _MEANING, level)


def successive_conditional(rng_key: Array, placed: PlacedKernel, start: Draw, num_steps: int) -> Draw:
    """The end of a chain that alternates draws of the data with steps of the kernel."""
    init_key, steps_key = random.split(rng_key)

    def step(state_and_data: tuple[Any, Values], key: Array) -> tuple[tuple[Any, Values], None]:
        state, data = state_and_data
        data = placed.joint.redraw(key, placed.values(state, data))
        return (placed.sample(placed.refresh(state, data), data), data), None

    chain = placed.stand(init_key, start), start.data
    (state, data), _ = lax.scan(step, chain, random.split(steps_key, num_steps))
    return Draw(placed.values(state, data), data)


def check_finite(user: str, kernel: str, names: Sequence[str], values: Any) -> None:
    """:raises FloatingPointError: naming the columns of ``values`` that hold something that is not a number."""
    bad = [name for name, column in zip(names, np.asarray(values).T, strict=True) if np.isnan(column).any()]
    if bad:
        raise FloatingPointError(
            f"{user}: {kernel} ended where {', '.join(bad[:5])}{' and others' * (len(bad) > 5)} are not numbers. Run "
            f"it on one simulated data set to see where that begins."
        )


def _numbers(joint: JointModel, test_functions: dict[str, TestFunction], draw: Draw) -> dict[str, Array]:
    values = draw.latents | draw.data
    prior, likelihood = joint.log_densities(draw)
    numbers = values | {"log prior": prior, "log likelihood": likelihood}
    for name, function in test_functions.items():
        numbers[name] = jnp.asarray(function(values))
    return numbers
