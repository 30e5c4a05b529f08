"""Programs with plates whose elements are, or are not, independent problems; with exact answers."""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

Y = jnp.asarray(np.random.default_rng(5).normal(size=(5, 2)), jnp.float32)
MIX = np.array([[0.5, 0.45], [0.45, 0.5]])


def kalman(transition, process, observe, noise, y, mean=None, covariance=None):
    """Log evidence, and filtered means, of a linear Gaussian model; ``y`` [T, k]."""
    size = len(transition)
    mean = np.zeros(size) if mean is None else mean
    covariance = np.zeros((size, size)) if covariance is None else covariance
    total, means = 0.0, []
    for value in np.asarray(y, float):
        mean, covariance = transition @ mean, transition @ covariance @ transition.T + process
        s = observe @ covariance @ observe.T + noise
        residual = value - observe @ mean
        total -= 0.5 * (residual @ np.linalg.solve(s, residual) + np.linalg.slogdet(2 * np.pi * s)[1])
        gain = covariance @ observe.T @ np.linalg.inv(s)
        mean, covariance = mean + gain @ residual, covariance - gain @ observe @ covariance
        means.append(mean)
    return total, np.array(means)


def vector_autoregression(y):
    """The mean of each dimension depends on the states of both."""

    def step(x, y_t):
        mean = jnp.asarray(MIX, y.dtype) @ x
        with numpyro.plate("dim", 2):
            x = numpyro.sample("x", dist.Normal(mean, 0.6))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, jnp.zeros(2), y)


def exact_vector_autoregression():
    return kalman(MIX, 0.36 * np.eye(2), np.eye(2), 0.09 * np.eye(2), Y)[0]


def observed_against_the_mean(y):
    """Independent states; each observation is of the distance from the mean of all."""

    def step(x, y_t):
        with numpyro.plate("dim", 2):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.6))
            numpyro.sample("y", dist.Normal(x - 0.5 * x.mean(), 0.3), obs=y_t)
        return x, None

    scan(step, jnp.zeros(2), y)


def exact_observed_against_the_mean():
    observe = np.eye(2) - 0.25
    return kalman(0.8 * np.eye(2), 0.36 * np.eye(2), observe, 0.09 * np.eye(2), Y)[0]


def lagged_total_in_carry(y):
    """What couples the elements is a total that the carry hands on, not their states."""

    def step(carry, y_t):
        x, total = carry
        with numpyro.plate("dim", 2):
            x = numpyro.sample("x", dist.Normal(0.6 * x - 0.2 * total, 0.6))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return (x, x.sum()), None

    scan(step, (jnp.zeros(2), jnp.zeros(())), y)


def exact_lagged_total():
    transition = 0.6 * np.eye(2) - 0.2 * np.ones((2, 2))
    return kalman(transition, 0.36 * np.eye(2), np.eye(2), 0.09 * np.eye(2), Y)[0]


def coupled_after_the_scan(y):
    """Independent walks whose sum is observed, in the plate, after the scan."""

    def step(x, _):
        with numpyro.plate("dim", 2):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.6))
        return x, x

    _, x = scan(step, jnp.zeros(2), None, length=5)
    with numpyro.plate("time", 5, dim=-2), numpyro.plate("dim", 2, dim=-1):
        numpyro.sample("y", dist.Normal(x + 0.5 * x[:, ::-1], 0.3), obs=y)


def exact_coupled_after_the_scan():
    observe = np.array([[1.0, 0.5], [0.5, 1.0]])
    return kalman(0.8 * np.eye(2), 0.36 * np.eye(2), observe, 0.09 * np.eye(2), Y)[0]


def coupled_through_a_factor(y):
    """A factor in the plate's step that pulls both elements together: exp(-(x_1 - x_2)^2 / 4) for each of the two."""

    def step(x, y_t):
        with numpyro.plate("dim", 2):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.6))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            numpyro.factor("together", -0.25 * (x - x[::-1]) ** 2)
        return x, None

    scan(step, jnp.zeros(2), y)


def exact_coupled_through_a_factor():
    # The two factors are sqrt(2 pi) times the density at zero of an observation x_1 - x_2 with variance one.
    observe = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    data = np.concatenate([np.asarray(Y), np.zeros((5, 1))], 1)
    noise = np.diag([0.09, 0.09, 1.0])
    total = kalman(0.8 * np.eye(2), 0.36 * np.eye(2), observe, noise, data)[0]
    return total + 5 * 0.5 * np.log(2 * np.pi)


COUPLED = {
    "vector autoregression": (vector_autoregression, exact_vector_autoregression, "x"),
    "observed against the mean": (observed_against_the_mean, exact_observed_against_the_mean, "y"),
    "total in the carry": (lagged_total_in_carry, exact_lagged_total, "x"),
    "coupled after the scan": (coupled_after_the_scan, exact_coupled_after_the_scan, "y"),
    "coupled by a factor": (coupled_through_a_factor, exact_coupled_through_a_factor, "together"),
}


# ---- counts: regions that infect each other

POPULATION, CONTACTS, RECOVERY, REPORTED = 3, np.array([[0.3, 1.2], [1.2, 0.3]]), 0.4, 0.7
CASES = np.array([[0, 1], [1, 0], [1, 1]])


def regional_epidemic(cases):
    def step(carry, cases_t):
        susceptible, infected = carry
        force = 1 - jnp.exp(-(jnp.asarray(CONTACTS, jnp.float32) @ infected) / POPULATION)
        with numpyro.plate("region", 2):
            new = numpyro.sample("new", dist.Binomial(susceptible, probs=force))
            out = numpyro.sample("out", dist.Binomial(infected, probs=RECOVERY))
            numpyro.sample("cases", dist.Binomial(new, probs=REPORTED), obs=cases_t)
        return (susceptible - new, infected + new - out), None

    scan(step, (jnp.array([2, 3]), jnp.array([1, 0])), cases)


def exact_regional_epidemic():
    from scipy.stats import binom

    law, total = {((2, 3), (1, 0)): 1.0}, 0.0
    for cases in CASES:
        later: dict = {}
        for (s, i), weight in law.items():
            force = 1 - np.exp(-(CONTACTS @ np.array(i)) / POPULATION)
            each = [
                [
                    (
                        a,
                        b,
                        binom.pmf(a, s[j], force[j]) * binom.pmf(cases[j], a, REPORTED) * binom.pmf(b, i[j], RECOVERY),
                    )
                    for a in range(s[j] + 1)
                    for b in range(i[j] + 1)
                ]
                for j in range(2)
            ]
            for u, v in itertools.product(*each):
                if weight * u[2] * v[2]:
                    key = ((s[0] - u[0], s[1] - v[0]), (i[0] + u[0] - u[1], i[1] + v[0] - v[1]))
                    later[key] = later.get(key, 0.0) + weight * u[2] * v[2]
        share = sum(later.values())
        total += np.log(share)
        law = {key: value / share for key, value in later.items()}
    return total


# ---- independent series, the carry laid out in several ways

TREND = np.array([[1.0, 1.0], [0.0, 0.9]])


def trends(y, layout):
    """Level and slope of two series in one array: ``[component, series]``, ``[series, component]``, or flat."""

    def step(carry, y_t):
        level, slope = {
            "component first": lambda: (carry[0], carry[1]),
            "series first": lambda: (carry[:, 0], carry[:, 1]),
            "in the middle": lambda: (carry[0, :, 0], carry[1, :, 0]),
        }[layout]()
        with numpyro.plate("series", 2):
            level = numpyro.sample("level", dist.Normal(level + slope, 0.5))
            slope = numpyro.sample("slope", dist.Normal(0.9 * slope, 0.3))
            numpyro.sample("y", dist.Normal(level, 0.4), obs=y_t)
        stacked = jnp.stack([level, slope])
        return {"component first": stacked, "series first": stacked.T, "in the middle": stacked[..., None]}[
            layout
        ], None

    shape = (2, 2, 1) if layout == "in the middle" else (2, 2)
    scan(step, jnp.zeros(shape), y)


def exact_trends():
    each = [kalman(TREND, np.diag([0.25, 0.09]), np.array([[1.0, 0.0]]), np.eye(1) * 0.16, Y[:, [j]]) for j in (0, 1)]
    return np.array([total for total, _ in each]), np.stack([means[-1, 0] for _, means in each])


def totals(y):
    """Two independent walks with deterministic sites beside the plate."""

    def step(x, y_t):
        before = x
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.deterministic("change", x - before)
            numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        numpyro.deterministic("total", x.sum())
        numpyro.deterministic("both", jnp.stack([x, 10 + x]))
        numpyro.deterministic("season", jnp.arange(3.0))
        return x, None

    scan(step, jnp.zeros(2), y)
