"""How noisy the log evidence of a filter is, and the number of particles at which it is as noisy as wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_smc.kernels.correlated_noise import move_noise
from numpyro_smc.kernels.pseudo_marginal import Target
from numpyro_smc.programs.arguments import check_number, check_positive
from numpyro_smc.programs.global_latents import Values
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.reports.plots import new_axes

if TYPE_CHECKING:
    from numpyro_smc.kernels.particle_metropolis import ParticleMetropolis

# Particles moved at a time, over all runs.
_AT_ONCE = 2**14


class EvidenceVariance(NamedTuple):
    r"""Variances of the log evidence at one parameter, by number of particles.

    - **num_particles** - each N that was tried, ascending, ``[K]``. **variance**, **error** - measured, with its
      standard error, ``[K]``; with correlation :math:`\rho`, half the variance of the difference of two estimates.
    - **log_evidence** - mean of the estimates, ``[K]``; low by about half the variance.
    - **target** - the variance wanted; **chosen** - the smallest N tried whose variance is at most that.
    - **at** - the parameter, by site, in its support. **correlation** - :math:`\rho`. **num_runs** - for each N.
    """

    num_particles: np.ndarray
    variance: np.ndarray
    error: np.ndarray
    log_evidence: np.ndarray
    target: float
    chosen: int
    at: Values
    correlation: float
    num_runs: int

    def table(self) -> list[dict[str, Any]]:
        """One row per number of particles."""
        columns = zip(self.num_particles, self.variance, self.error, self.log_evidence, strict=True)
        return [
            {"particles": int(n), "variance": float(v), "s.e.": float(e), "log evidence": float(m)}
            for n, v, e, m in columns
        ]

    def __repr__(self) -> str:
        shown = ", ".join(f"{np.asarray(value).round(4).tolist()}" for value in self.at.values())
        text = f"EvidenceVariance at {', '.join(self.at)} = {shown}"
        text += f" ({self.num_runs} runs each{f', correlation {self.correlation:g}' * bool(self.correlation)}): "
        text += f"{self.chosen} particles for a target of {self.target:g}"
        for row in self.table():
            mark = "*" if row["particles"] == self.chosen else " "
            text += f"\n {mark}{row['particles']:7d} particles: variance {row['variance']:.3g} ± {row['s.e.']:.2g}"
        return text

    def plot(self, ax: Any = None) -> Any:
        """Variance, with two standard errors, against the number of particles, and the target.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = new_axes() if ax is None else ax
        ax.errorbar(self.num_particles, self.variance, yerr=2.0 * self.error, marker=".", capsize=3)
        ax.axhline(self.target, color="0.3", lw=0.8, ls="--")
        ax.plot(self.chosen, self.variance[self.num_particles == self.chosen], "o", mfc="none", ms=10)
        ax.set(xscale="log", yscale="log", xlabel="particles", ylabel="variance of the log evidence")
        return ax


def tune_num_particles(
    kernel: ParticleMetropolis,
    rng_key: Array,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target_variance: float,
    at: dict[str, Any] | None,
    num_runs: int,
    max_particles: int,
    num_pilot: int,
) -> tuple[ParticleMetropolis, EvidenceVariance]:
    """See :meth:`ParticleMetropolis.tune`."""
    user = f"{type(kernel).__name__}.tune"
    check_positive(user, num_runs=num_runs, max_particles=max_particles, num_pilot=num_pilot)
    if num_runs < 2:
        raise ValueError(f"{user}: num_runs must be at least 2 for a variance, got {num_runs}.")
    check_number(user, "(0, inf)", target_variance=target_variance)
    rng_key = one_key(user, rng_key)
    args, kwargs = kernel._likelihood.checked(args, kwargs, type(kernel).tune)
    pilot_key, rng_key = random.split(rng_key)
    latents = kernel.target(args, kwargs).latents
    if at is None:
        z = _pilot_mean(pilot_key, kernel, args, kwargs, num_pilot)
    else:
        z = latents.unconstrain(jax.tree.map(jnp.asarray, at))
    found: dict[int, np.ndarray] = {}

    def is_quiet(num_particles: int) -> bool:
        if num_particles not in found:
            runs = runs_at(random.fold_in(rng_key, num_particles), kernel, num_particles, z, args, kwargs, num_runs)
            found[num_particles] = np.array([*_variance(runs[1]), runs[0].mean()])
        return bool(found[num_particles][0] <= target_variance)

    chosen = kernel.num_particles
    while not is_quiet(chosen):
        chosen *= 2
        if chosen > max_particles:
            tried = ", ".join(f"{found[n][0]:.3g} with {n}" for n in sorted(found))
            raise ValueError(
                f"{user}: the variance of the log evidence is above {target_variance:g} for every number of particles "
                f"tried ({tried}). Allow more (max_particles), use a guide, or correlation."
            )
    while chosen > 1 and is_quiet(chosen // 2):
        chosen //= 2
    numbers = sorted(found)
    variance, error, log_evidence = np.array([found[n] for n in numbers]).T
    report = EvidenceVariance(
        np.array(numbers),
        variance,
        error,
        log_evidence,
        float(target_variance),
        chosen,
        latents.constrain(z),
        kernel.correlation,
        num_runs,
    )
    return kernel.with_particles(chosen), report


def runs_at(
    rng_key: Array, kernel: ParticleMetropolis, num_particles: int, z: Values, args: Any, kwargs: Any, num_runs: int
) -> np.ndarray:
    """Estimates ``[num_runs]``, and what has the variance that counts: the same, or scaled differences of pairs."""
    candidate = kernel.with_particles(num_particles)

    def one(rng_key: Array) -> tuple[Array, Array]:
        target: Target = candidate.target(args, kwargs)
        keys = random.split(rng_key, 4)
        likelihood, values = target.likelihood, target.latents.constrain(z)
        noise = likelihood.noise(keys[0], likelihood.read(values, args, kwargs))
        estimate = likelihood(keys[1], likelihood.read(values, args, kwargs), noise).log_evidence
        if noise is None:
            return estimate, estimate
        moved = move_noise(keys[2], noise, candidate.correlation)
        other = likelihood(keys[3], likelihood.read(values, args, kwargs), moved).log_evidence
        return estimate, (other - estimate) / jnp.sqrt(2.0)

    keys = random.split(rng_key, num_runs)
    batch_size = min(max(_AT_ONCE // num_particles, 1), num_runs)
    return np.asarray(jax.jit(lambda keys: lax.map(one, keys, batch_size=batch_size))(keys), np.float64)


def _variance(values: np.ndarray) -> tuple[float, float]:
    """The variance and its standard error, infinite where some run found no particle that explains the data."""
    if not np.isfinite(values).all():
        return np.inf, np.nan
    size, variance = len(values), values.var(ddof=1)
    fourth = np.mean((values - values.mean()) ** 4)
    return float(variance), float(np.sqrt(max(fourth - variance**2 * (size - 3) / (size - 1), 0.0) / size))


def _pilot_mean(rng_key: Array, kernel: ParticleMetropolis, args: Any, kwargs: Any, num_pilot: int) -> Values:
    """Mean unconstrained parameters of a short chain after as long a warm-up."""
    state = kernel.init(rng_key, num_pilot, None, args, kwargs)
    names = kernel.target(args, kwargs).latents.names

    def step(state: Any, _: Any) -> tuple[Any, Values]:
        state = kernel.sample(state, args, kwargs)
        return state, {name: state.z[name] for name in names}

    chain = jax.jit(lambda state: lax.scan(step, state, None, length=2 * num_pilot)[1])(state)
    return jax.tree.map(lambda leaf: jnp.mean(leaf[num_pilot:], axis=0), chain)
