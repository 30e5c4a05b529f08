r"""A noisy single-compartment Hodgkin-Huxley neuron under a current step, seen through seven summaries [1, 2].

Eight parameters with uniform priors: conductances :math:`g_{Na}, g_K, g_l, g_M` (mS/cm²), time constant
:math:`\tau_{max}` (ms) of the slow potassium current, threshold :math:`V_T` and leak potential :math:`E_l` (mV, as
positive numbers), noise :math:`\sigma`. With :math:`u = V - V_T` and
:math:`e(z) = z / (e^z - 1)`, the gates' rates are

.. math::

    \alpha_m &= 1.28\, e(-\tfrac{u - 13}4), & \beta_m &= 1.4\, e(\tfrac{u - 40}5), &
    \alpha_h &= 0.128\, e^{-(u - 17) / 18}, & \beta_h &= 4 / (1 + e^{-(u - 40) / 5}), \\
    \alpha_n &= 0.16\, e(-\tfrac{u - 15}5), & \beta_n &= \tfrac12 e^{-(u - 10) / 40}, &
    p_\infty &= 1 / (1 + e^{-(V + 35) / 10}), & \tau_p &= \tau_{max} / (3.3\, e^{(V + 35) / 20} + e^{-(V + 35) / 20}).

A step of :math:`dt` = 0.01 ms moves the voltage exponentially to where the currents balance, noise
:math:`\sigma\epsilon / \sqrt{dt}` included, at the gates of the step before; then the gates, at the new voltage. The
trace has 120 ms; the current flows from 10 to 110 ms.

The simulator, :func:`model`, keeps no trace: :func:`summaries` counts spikes and adds up moments as it goes, in single
precision as fast as memory allows. :func:`voltage` returns the trace, for plots, and in double precision to compare
with other integrators: spike times are chaotic in single precision, their distribution is not.

**References**

1. *Minimal Hodgkin-Huxley type models for different classes of cortical and thalamic neurons*, M. Pospischil et al.
   (2008)
2. *Training deep neural density estimators to identify mechanistic models of neural dynamics*, P. Gonçalves et al.
   (2020)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.typing import ArrayLike

#: Bounds of the priors, by site. ``V_T`` and ``E_l`` are the negatives of the potentials.
BOUNDS = {
    "g_Na": (0.5, 80.0),
    "g_K": (1e-4, 15.0),
    "g_l": (1e-4, 0.6),
    "g_M": (1e-4, 0.6),
    "tau_max": (50.0, 3000.0),
    "V_T": (40.0, 90.0),
    "sigma": (1e-4, 0.15),
    "E_l": (35.0, 100.0),
}
#: The parameters of the published observation.
TRUE_PARAMETERS = (50.0, 5.0, 0.1, 0.07, 600.0, 60.0, 0.1, 70.0)

#: The seven summaries, in the order of ``"x"``.
SUMMARIES = ("spikes", "resting mean", "resting deviation", "mean", "variance", "skewness", "kurtosis")

STEP = 0.01  # ms
NUM_STEPS = 12_000
NUM_SUMMARISED = 11_001  # the steps that enter the summaries
FIRST_STIMULATED, END_OF_STIMULUS = 1000, 11_000  # indices of the trace
FIRST_SETTLED = 900
CURRENT = 5e-4 / (math.pi * 70e-4**2)  # uA / cm^2
E_NA, E_K, START = 53.0, -107.0, -70.0  # mV
SPIKE_FLOOR, REFRACTORY_STEPS = -10.0, 50  # mV, steps


class Neuron(NamedTuple):
    """Voltage and gates at one instant."""

    v: Array
    m: Array
    h: Array
    n: Array
    p: Array


def prior() -> Array:
    """The sites of :data:`BOUNDS`, stacked: ``[8]``."""
    return jnp.stack([numpyro.sample(name, dist.Uniform(*bounds)) for name, bounds in BOUNDS.items()])


def model() -> Array:
    """The simulator: sites of :data:`BOUNDS`, nuisance ``"noise"`` ``[11001]``, deterministic ``"x"`` ``[7]``."""
    theta = prior()
    noise = numpyro.sample("noise", dist.Normal(0.0, 1.0).expand([NUM_SUMMARISED]).to_event(1))
    return numpyro.deterministic("x", summaries(theta, noise))


def voltage(theta: ArrayLike, noise: ArrayLike) -> Array:
    """The trace, from the start on: ``[T + 1]`` for noise ``[T]``, in the precision of ``theta``."""
    theta = jnp.asarray(theta)
    noise = jnp.asarray(noise, theta.dtype)
    start = rest(theta)

    def step(neuron: Neuron, inputs: tuple[Array, Array]) -> tuple[Neuron, Array]:
        neuron = advance(theta, neuron, *inputs)
        return neuron, neuron.v

    _, trace = lax.scan(step, start, (_current(len(noise), theta.dtype), noise))
    return jnp.concatenate([start.v[None], trace])


def rest(theta: Array) -> Neuron:
    """At -70 mV, gates at their steady state."""
    v = jnp.full((), START, theta.dtype)
    (m, _), (h, _), (n, _), (p, _) = gates(theta, v)
    return Neuron(v, m, h, n, p)


def advance(theta: Array, neuron: Neuron, current: Array, noise: Array) -> Neuron:
    """One step of the exponential Euler rule."""
    sodium, potassium, leak, slow = theta[0], theta[1], theta[2], theta[3]
    v, m, h, n, p = neuron
    sodium, potassium, slow = sodium * m**3 * h, potassium * n**4, slow * p
    total = sodium + potassium + leak + slow
    drive = sodium * E_NA + (potassium + slow) * E_K - leak * theta[7] + current + theta[6] / math.sqrt(STEP) * noise
    limit = drive / total
    v = limit + (v - limit) * jnp.exp(-STEP * total)
    moved = [
        end + (x - end) * jnp.exp(-STEP * rate) for x, (end, rate) in zip(neuron[1:], gates(theta, v), strict=True)
    ]
    return Neuron(v, *moved)


def gates(theta: Array, v: Array) -> list[tuple[Array, Array]]:
    """Steady state and rate (1 / ms) of the gates m, h, n, p at a voltage."""
    u = v + theta[5]
    fifth = jnp.exp((u - 40) / 5)  # serves three of the rates
    opening_m, closing_m = 1.28 * _ratio(-(u - 13) / 4), 1.4 * _ratio((u - 40) / 5, fifth)
    opening_h, closing_h = 0.128 * jnp.exp(-(u - 17) / 18), 4 * fifth / (1 + fifth)
    opening_n, closing_n = 0.16 * _ratio(-(u - 15) / 5, math.exp(-5) / fifth), 0.5 * jnp.exp(-(u - 10) / 40)
    root = jnp.exp((v + 35) / 20)
    rates = [(opening_m, closing_m), (opening_h, closing_h), (opening_n, closing_n)]
    slow = (root**2 / (1 + root**2), (3.3 * root + 1 / root) / theta[4])
    return [(opening / (opening + closing), opening + closing) for opening, closing in rates] + [slow]


def _ratio(z: Array, exponential: Array | None = None) -> Array:
    """z / (exp(z) - 1), also at 0."""
    near = jnp.abs(z) < 1e-4
    exponential = jnp.exp(z) if exponential is None else exponential
    return jnp.where(near, 1 - z / 2, z / jnp.where(near, 1.0, exponential - 1))


def _current(num_steps: int, dtype: jnp.dtype) -> Array:
    """The current that acts on each step: that of the instant before."""
    number = np.arange(num_steps)
    on = (number >= FIRST_STIMULATED) & (number < END_OF_STIMULUS)
    return jnp.asarray(np.where(on, CURRENT, 0.0), dtype)


# Summaries


class Moments(NamedTuple):
    """Mean of the values so far, and sums of powers of their deviations from it."""

    mean: Array
    squares: Array
    cubes: Array
    fourths: Array

    def add(self, value: Array, count: Array) -> Moments:
        """With one value more, the ``count``-th; as they were if ``count`` is 0.

        The updates of a running mean and central moments, which do not cancel as powers of the values would.
        """
        counted = count > 0
        count = jnp.maximum(count, 1.0)
        deviation = value - self.mean
        share = jnp.where(counted, deviation / count, 0.0)
        square = deviation * share * (count - 1)
        cube = square * share * (count - 2) - 3 * share * self.squares
        fourth = square * share**2 * (count**2 - 3 * count + 3) + 6 * share**2 * self.squares - 4 * share * self.cubes
        return Moments(self.mean + share, self.squares + square, self.cubes + cube, self.fourths + fourth)


class Spikes(NamedTuple):
    """Of the clipped trace so far: its last value, whether it rose to it above the floor, and the spikes counted."""

    last: Array
    climbing: Array
    count: Array
    steps_since: Array

    def add(self, v: Array, within: Array) -> Spikes:
        """With one value more; ``within`` says whether the instant two steps earlier lies in the stimulus."""
        clipped = jnp.maximum(v, SPIKE_FLOOR)
        found = self.climbing & (clipped < self.last) & within
        counted = found & (self.steps_since > REFRACTORY_STEPS)
        return Spikes(
            clipped,
            (self.last > SPIKE_FLOOR) & (clipped >= self.last),
            self.count + counted,
            jnp.where(found, 1, self.steps_since + 1),
        )


def summaries(theta: ArrayLike, noise: ArrayLike) -> Array:
    """The seven summaries of one simulation, :func:`summaries_of` of its :func:`voltage`, without keeping the trace.

    :param theta: in the order of :data:`BOUNDS`, ``[8]``.
    :param noise: ``[11001]`` or more; what comes later enters no summary.
    """
    theta = jnp.asarray(theta)
    dtype = theta.dtype
    noise = jnp.asarray(noise, dtype)[:NUM_SUMMARISED]
    index = np.arange(1, NUM_SUMMARISED + 1)  # of the trace, after each step
    inputs = (_current(NUM_SUMMARISED, dtype), noise)
    neuron = rest(theta)
    none = Moments(*jnp.zeros((4, *neuron.v.shape), dtype))

    def settle(carry: tuple[Neuron, Array, Moments], inputs: tuple) -> tuple[tuple[Neuron, Array, Moments], None]:
        neuron, mean, settled = carry
        neuron = advance(theta, neuron, *inputs[:2])
        weight, count = inputs[2:]
        return (neuron, mean + weight * (neuron.v - mean), settled.add(neuron.v, count)), None

    def stimulate(carry: tuple[Neuron, Moments, Spikes], inputs: tuple) -> tuple[tuple[Neuron, Moments, Spikes], None]:
        neuron, moments, spikes = carry
        neuron = advance(theta, neuron, *inputs[:2])
        return (neuron, moments.add(neuron.v, inputs[2]), spikes.add(neuron.v, inputs[3])), None

    resting, driven = slice(None, FIRST_STIMULATED - 1), slice(FIRST_STIMULATED - 1, None)
    weight = jnp.asarray(1 / (index[resting] + 1), dtype)  # the start counts as well
    count = jnp.asarray(np.maximum(index[resting] - FIRST_SETTLED + 1, 0), dtype)
    xs = (*(x[resting] for x in inputs), weight, count)
    (neuron, mean, settled), _ = lax.scan(settle, (neuron, neuron.v, none), xs)

    number = index[driven]
    count = np.where(number < END_OF_STIMULUS, number - FIRST_STIMULATED, 0)
    within = (number - 2 > FIRST_STIMULATED) & (number - 2 < END_OF_STIMULUS)
    spikes = Spikes(jnp.asarray(SPIKE_FLOOR, dtype), jnp.asarray(False), jnp.zeros((), int), jnp.asarray(NUM_STEPS))
    xs = (*(x[driven] for x in inputs), jnp.asarray(count, dtype), jnp.asarray(within))
    (_, moments, spikes), _ = lax.scan(stimulate, (neuron, none, spikes), xs)

    num_settled, num_driven = FIRST_STIMULATED - FIRST_SETTLED, END_OF_STIMULUS - FIRST_STIMULATED - 1
    variance = moments.squares / num_driven
    return jnp.stack(
        [
            spikes.count.astype(dtype),
            mean,
            jnp.sqrt(settled.squares / num_settled),
            moments.mean,
            variance,
            moments.cubes / num_driven / variance**1.5,
            moments.fourths / num_driven / variance**2,
        ]
    )


def summaries_of(trace: ArrayLike) -> Array:
    """The seven summaries of a trace ``[12001]``, by their definition: :data:`SUMMARIES`, ``[7]``.

    Number of spikes in the stimulus; mean before it, and standard deviation in the millisecond before it; mean,
    variance, skewness and kurtosis in it. Moments divide by the number of values.
    """
    trace = jnp.asarray(trace)
    before, settled = trace[:FIRST_STIMULATED], trace[FIRST_SETTLED:FIRST_STIMULATED]
    within = trace[FIRST_STIMULATED + 1 : END_OF_STIMULUS]
    deviation = within - within.mean()
    variance = (deviation**2).mean()
    moments = [(deviation**power).mean() / variance ** (power / 2) for power in (3, 4)]
    count = len(spike_times(np.asarray(trace)))
    return jnp.stack([jnp.asarray(count, trace.dtype), before.mean(), settled.std(), within.mean(), variance, *moments])


def spike_times(trace: np.ndarray) -> np.ndarray:
    """Times (ms) of the spikes within the stimulus of a trace ``[12001]``.

    A spike is the last instant that a rise above -10 mV has before its peak, more than 0.5 ms after the one before.
    """
    clipped = np.maximum(trace, SPIKE_FLOOR)
    rising, falling = np.diff(clipped)[:-1] >= 0, np.diff(clipped)[1:] < 0
    found = np.flatnonzero((clipped[:-2] > SPIKE_FLOOR) & rising & falling)
    found = found[(found > FIRST_STIMULATED) & (found < END_OF_STIMULUS)]
    return STEP * found[np.diff(found, prepend=-np.inf) > REFRACTORY_STEPS]
