r"""A Hodgkin-Huxley neuron with noise in its potential and gates, seen through few and noisy potentials [1, 2].

The state of each compartment is its potential :math:`v = V / 10` (V in mV) and the logits of its gates n, m, h; a state
``x`` of C compartments, ``[4 C]``, holds all potentials, then all n, all m, all h. With :math:`C_m = 1`,

.. math::

    \dot V = I - g_{Na} m^3 h (V - E_{Na}) - g_K n^4 (V - E_K) - g_L (V - E_L), \qquad
    \dot z = \alpha_z(V) (1 - z) - \beta_z(V) z, \quad z \in \{n, m, h\},

the mean of the next state is one explicit Euler step of length :math:`dt` = 0.02 ms from this one, gates clipped to
:math:`[10^{-5}, 1 - 10^{-5}]`; standard deviations are :math:`0.3 \sqrt{dt}` of v and :math:`0.1 \sqrt{dt}` of each
logit. At first :math:`v \sim \mathcal N(-6.5, 2.5^2)`, and the logits are of variance 1 around their rest at -65 mV. At
every 50th step, the first one included, :math:`y_t \sim \mathcal N(v_t, 0.5^2)`. Compartments do not interact, and
share the current :math:`I`, the one parameter that is learned: ``"current"``.

:func:`make_model` returns a program ``model(y, params)``. ``y`` has a row per step, ``[T, C]``; the rows between
observations are ignored and may be NaN. The guides are in :mod:`models.hodgkin_huxley_guides`.

**References**

1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventós, A. Warrington, S. Linderman (2022)
2. *Smoothing of, and parameter estimation from, noisy biophysical recordings*, Q. Huys, L. Paninski (2009)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logit
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from models.hodgkin_huxley_rates import GATES
from models.rejection import sample_accepted

Params = Mapping[str, ArrayLike]

NUM_STEPS = 2001  # 40 ms
SUBSAMPLE = 50  # steps per observation
STEP = 0.02  # ms
VOLTAGE_UNIT = 10.0  # mV
TRUE_CURRENT = 13.0
#: Initial currents, off by -90, -20, 50, 120 and 190 per cent.
MISINITIALISED_CURRENTS = (1.3, 10.4, 19.5, 28.6, 37.7)

SODIUM, POTASSIUM, LEAK = 120.0, 20.0, 0.3  # conductances, mS / cm^2
E_SODIUM, E_POTASSIUM, E_LEAK = 50.0, -80.0, -55.4  # reversal potentials, mV
REST = -65.0  # mV
VOLTAGE_NOISE, GATE_NOISE = 0.3, 0.1  # per square root of a ms
START_VOLTAGE_SCALE, START_GATE_SCALE = 2.5, 1.0
GATE_MARGIN = 1e-5
#: Series with an observation beyond this are not data: the Euler step has lost the solution.
LARGEST_OBSERVATION = 20.0


class Neuron(NamedTuple):
    """Potentials in units of 10 mV and open fractions of the gates, each ``[..., C]``."""

    v: Array
    n: Array
    m: Array
    h: Array


Velocity = Callable[[Neuron], Neuron]
#: From ``(velocity, neuron, dt)`` to the neuron a time ``dt`` (ms) later.
Integrator = Callable[[Velocity, Neuron, float], Neuron]


# The deterministic dynamics


def velocity(neuron: Neuron, current: ArrayLike) -> Neuron:
    """Time derivatives (1 / ms)."""
    v, n, m, h = neuron
    potential = VOLTAGE_UNIT * v
    flow = (
        SODIUM * m**3 * h * (potential - E_SODIUM)
        + POTASSIUM * n**4 * (potential - E_POTASSIUM)
        + LEAK * (potential - E_LEAK)
    )
    gates = []
    for gate, rates in zip((n, m, h), GATES, strict=True):
        opening, closing = rates(potential)
        gates.append(opening * (1.0 - gate) - closing * gate)
    return Neuron((current - flow) / VOLTAGE_UNIT, *gates)


def euler(velocity: Velocity, neuron: Neuron, dt: float) -> Neuron:
    """One explicit Euler step."""
    return jax.tree.map(lambda value, slope: value + dt * slope, neuron, velocity(neuron))


def diffrax_integrator(
    solver: Literal["dopri5", "euler"] = "dopri5", num_steps: int = 10, tolerance: float = 1e-4
) -> Integrator:
    """An integrator of :mod:`diffrax`, for :func:`make_model` and :func:`simulate`.

    :param solver: ``"dopri5"`` chooses its steps by ``tolerance``, relative and absolute; ``"euler"`` takes
        ``num_steps`` equal ones.
    :raises ModuleNotFoundError: without diffrax.
    """
    if solver not in ("dopri5", "euler"):
        raise ValueError(f"hodgkin_huxley: solver={solver!r}; expected 'dopri5' or 'euler'.")
    try:
        import diffrax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "hodgkin_huxley: diffrax_integrator needs diffrax: pip install diffrax. The default integrator, euler, "
            "needs nothing."
        ) from error
    if solver == "dopri5":
        method, steps = diffrax.Dopri5(), diffrax.PIDController(rtol=tolerance, atol=tolerance)
    else:
        method, steps = diffrax.Euler(), diffrax.ConstantStepSize()

    def integrate(velocity: Velocity, neuron: Neuron, dt: float) -> Neuron:
        term = diffrax.ODETerm(lambda t, value, args: velocity(value))
        solution = diffrax.diffeqsolve(
            term, method, 0.0, dt, dt / num_steps, neuron, stepsize_controller=steps, max_steps=10 * num_steps
        )
        return jax.tree.map(lambda values: values[0], solution.ys)

    return integrate


# The model


class Dynamics(NamedTuple):
    """The transition of a neuron under a current."""

    current: Array
    num_compartments: int = 1
    dt: float = STEP
    integrator: Integrator = euler

    def predict(self, x: Array) -> Array:
        """Mean of the next state, ``[4 C]``."""
        v, *logits = jnp.split(x, 4, -1)
        neuron = Neuron(v, *(jax.nn.sigmoid(z) for z in logits))
        v, *gates = self.integrator(lambda neuron: velocity(neuron, self.current), neuron, self.dt)
        return jnp.concatenate([v, *(logit(jnp.clip(gate, GATE_MARGIN, 1.0 - GATE_MARGIN)) for gate in gates)], -1)

    @property
    def scale(self) -> np.ndarray:
        """Standard deviations of the next state, ``[4 C]``."""
        return math.sqrt(self.dt) * np.repeat([VOLTAGE_NOISE] + 3 * [GATE_NOISE], self.num_compartments)

    def transition(self, t: Array, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviations of the state at step ``t``, which at step 0 do not depend on ``x``."""
        loc, scale = start(self.num_compartments)
        return jnp.where(t == 0, loc, self.predict(x)), jnp.where(t == 0, scale, self.scale)


def start(num_compartments: int = 1) -> tuple[Array, Array]:
    """Mean and standard deviations of the first state, ``[4 C]``."""
    rest = [jnp.log(opening / closing) for opening, closing in (rates(jnp.asarray(REST)) for rates in GATES)]
    loc = jnp.stack([jnp.asarray(REST / VOLTAGE_UNIT), *rest])
    scale = jnp.asarray([START_VOLTAGE_SCALE] + 3 * [START_GATE_SCALE])
    return jnp.repeat(loc, num_compartments), jnp.repeat(scale, num_compartments)


def declare_current(params: Params | None, init_current: float) -> Array:
    """The current that ``params`` fixes, or the parameter ``"current"``."""
    if params is not None and "current" in params:
        return jnp.asarray(params["current"], jnp.result_type(float))
    return numpyro.param("current", jnp.asarray(init_current, jnp.result_type(float)))


def make_model(
    num_steps: int = NUM_STEPS,
    num_compartments: int = 1,
    subsample: int = SUBSAMPLE,
    noise: float = 5.0,
    dt: float = STEP,
    init_current: float = TRUE_CURRENT,
    integrator: Integrator = euler,
) -> Callable[..., tuple[Array, Array]]:
    """The model as a program ``model(y=None, params=None)``; ``params`` may fix ``"current"``.

    :param num_steps: length of a series.
    :param subsample: steps per observation.
    :param noise: standard deviation of an observation (mV).
    :param init_current: where the parameter ``"current"`` starts.
    :return: a program that returns states ``[num_steps, 4 C]`` and observations ``[num_steps, C]``.
    """
    observed = jnp.arange(num_steps) % subsample == 0
    scale = noise / VOLTAGE_UNIT

    def model(y: ArrayLike | None = None, params: Params | None = None) -> tuple[Array, Array]:
        dynamics = Dynamics(declare_current(params, init_current), num_compartments, dt, integrator)
        y = None if y is None else blank(y, observed, num_compartments)

        def step(x: Array, inputs: tuple[Array, Array, Array | None]) -> tuple[Array, tuple[Array, Array]]:
            t, observed_t, y_t = inputs
            x = numpyro.sample("x", dist.Normal(*dynamics.transition(t, x)).to_event(1))
            with handlers.mask(mask=observed_t):
                y_t = numpyro.sample("y", dist.Normal(x[:num_compartments], scale).to_event(1), obs=y_t)
            return x, (x, y_t)

        times = jnp.arange(num_steps)
        _, (x, y) = scan(step, start(num_compartments)[0], (times, observed, y), length=num_steps)
        return x, y

    return model


def blank(y: ArrayLike, observed: Array, num_compartments: int = 1) -> Array:
    """The series with zeros for what is not observed.

    :raises ValueError: if it does not have a row per step.
    """
    y = jnp.asarray(y)
    if y.shape != (len(observed), num_compartments):
        raise ValueError(
            f"hodgkin_huxley: y has shape {y.shape}; expected {(len(observed), num_compartments)}, a row per step and "
            "a column per compartment. Rows between observations may hold anything."
        )
    return jnp.where(observed[:, None], y, 0.0)


# Data


def simulate(
    rng_key: Array, num_series: int, model: Callable[..., Any], current: ArrayLike = TRUE_CURRENT
) -> tuple[np.ndarray, np.ndarray]:
    """Series drawn from the model, without those that leave the range of a neuron.

    A series is dropped if an observation is not finite or beyond :data:`LARGEST_OBSERVATION`, whether a model sees it
    or not.

    :param model: as :func:`make_model` returns it.
    :return: states ``[num_series, T, 4 C]`` and observations ``[num_series, T, C]``.
    """

    def one(key: Array) -> Array:
        with handlers.block():
            return jnp.concatenate(handlers.seed(model, key)(None, {"current": current}), -1)

    @jax.jit
    def draw(key: Array) -> tuple[Array, Array]:
        both = jax.vmap(one)(jax.random.split(key, num_series))
        observations = both[..., both.shape[-1] * 4 // 5 :]
        return both, jnp.all(jnp.abs(observations) <= LARGEST_OBSERVATION, (1, 2))

    both = sample_accepted(rng_key, lambda key, number: draw(key), num_series)
    state_size = both.shape[-1] * 4 // 5
    return both[..., :state_size], both[..., state_size:]
