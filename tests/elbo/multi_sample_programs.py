"""Models and guides as users write them, with the exact value and gradient of their K-sample bounds.

Every reference sums over all assignments of K particles, one element of the enclosing plate at a time; it uses
NumPyro's ``log_density`` of the same programs and nothing of the library. A Normal latent is summed over Gauss-Hermite
nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax, random
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

# These programs run once, for a fraction of a second: compiling is what they cost.
quickly_compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclass(frozen=True, eq=False)
class Program:
    """A model and guide whose latents can be summed over.

    :ivar data: the argument of both; its axis ``axis`` is the enclosing plate, if there is one.
    :ivar assignments: ``(params, element) -> latents, log_measure``: every value of the latents of one element,
        ``[S, ...]`` as the sites have them when the enclosing plate has size one, and their log probabilities under the
        guide, ``[S]``, ``None`` if that is the log density of ``sampler``.
    :ivar axis: ``None`` for whole-model weights: the latents are then those of all elements together.
    :ivar sampler: what the latents are drawn from, if not exactly the guide (which may be scaled or masked).
    """

    name: str
    model: Callable
    guide: Callable
    data: Array
    params: dict[str, Array]
    assignments: Callable[[dict, Array], tuple[dict[str, Array], Array | None]]
    axis: int | None = 0
    sampler: Callable | None = None

    @property
    def elements(self) -> Array:
        """The data of each element of the enclosing plate, stacked."""
        if self.axis is None:
            return self.data[None]
        return jnp.expand_dims(jnp.moveaxis(self.data, self.axis, 0), self.axis + 1)

    @cached_property
    def guide_params(self) -> frozenset[str]:
        trace = handlers.trace(handlers.seed(self.guide, random.key(0))).get_trace(self.data)
        return frozenset(name for name, site in trace.items() if site["type"] == "param")

    def densities(self, params: dict[str, Array]) -> "Densities":
        """Log probability of every assignment, its log p(x, z) and its log q(z | x)."""

        def of_element(element):
            latents, log_measure = self.assignments(params, element)

            def of_assignment(one):
                log_p, _ = log_density(self.model, (element,), {}, params | one)
                log_q, _ = log_density(self.guide, (element,), {}, params | one)
                log_r, _ = log_density(self.sampler or self.guide, (element,), {}, params | one)
                return log_r, log_p, log_q

            densities = Densities(*jax.vmap(of_assignment)(latents))
            return densities if log_measure is None else densities._replace(log_measure=log_measure)

        return jax.vmap(of_element)(self.elements)

    @cached_property
    def table(self) -> tuple["Densities", "Densities"]:
        """The densities at ``params``, and their derivatives in the flattened parameters, ``[N, S, D]``."""
        flat, unravel = ravel_pytree(self.params)

        def densities(flat):
            values = self.densities(unravel(flat))
            return values, values

        derivatives, values = quickly_compiled(jax.jacfwd(densities, has_aux=True))(flat)
        return values, derivatives


class Densities(NamedTuple):
    """Log probability of each assignment, its log p(x, z) and its log q(z | x), each ``[N, S]``."""

    log_measure: Array
    log_p: Array
    log_q: Array


def _over_particles(densities: Densities, num_particles: int) -> tuple[Array, Array, Array]:
    """All ``S ** K`` choices of K particles: their probability ``[N, S^K]``, log p and log q ``[N, S^K, K]``."""
    choice = np.indices((densities.log_p.shape[1],) * num_particles).reshape(num_particles, -1).T
    probability = jnp.exp(densities.log_measure[:, choice].sum(-1))
    return probability, densities.log_p[:, choice], densities.log_q[:, choice]


def _value_and_gradient(program: Program, function: Callable[[Densities], Array]) -> tuple[float, dict[str, Array]]:
    """A function of the densities and its derivatives in the parameters, by the chain rule."""
    values, derivatives = program.table
    value, outer = quickly_compiled(jax.value_and_grad(function))(values)
    flat = sum(jnp.einsum("ns,nsd->d", o, d) for o, d in zip(outer, derivatives, strict=True))
    return float(value), ravel_pytree(program.params)[1](flat)


def expectation(densities: Densities, num_particles: int, statistic: Callable) -> Array:
    """Expectation of ``statistic(log_weights [..., K]) -> [...]``, summed over the elements."""
    probability, log_p, log_q = _over_particles(densities, num_particles)
    return jnp.sum(probability * statistic(log_p - log_q))


def exact_expectation(program: Program, num_particles: int, statistic: Callable) -> tuple[float, dict[str, Array]]:
    """The same for a program, and its gradient in the parameters."""
    return _value_and_gradient(program, lambda densities: expectation(densities, num_particles, statistic))


@cache
def exact_bound(program: Program, num_particles: int, alpha: float = 0.0) -> tuple[float, dict[str, Array]]:
    """The K-sample (Rényi) bound, summed over the elements, and its gradient."""

    def bound(log_weights):
        return (logsumexp((1 - alpha) * log_weights, axis=-1) - jnp.log(num_particles)) / (1 - alpha)

    return exact_expectation(program, num_particles, bound)


def exact_direction(program: Program, num_particles: int, coefficients: Callable) -> dict[str, Array]:
    """Expectation of sum_k A_k grad log p(x, z_k) + B_k grad log q(z_k | x), z_k fixed, for discrete latents.

    :param coefficients: ``log_weights [..., K] -> (A, B)``.
    """

    def surrogate(densities):
        probability, log_p, log_q = _over_particles(densities, num_particles)
        a, b = lax.stop_gradient(coefficients(log_p - log_q))
        return jnp.sum(lax.stop_gradient(probability)[..., None] * (a * log_p + b * log_q))

    return _value_and_gradient(program, surrogate)[1]


# ---- coefficients (A on grad log p, B on grad log q) as the papers define them, without any care for rounding


def wake_phi(log_weights: Array, alpha: float = 0.0) -> tuple[Array, Array]:
    """Reweighted wake-sleep: both with the normalised weights."""
    v = jax.nn.softmax((1 - alpha) * log_weights, axis=-1)
    return v, v


def thermodynamic(betas: Array, rule: str) -> tuple[Callable, Callable]:
    """Coefficients and value of the thermodynamic variational objective on the partition ``betas``."""
    widths = np.diff(betas)
    left, right = np.append(widths, 0.0), np.append(0.0, widths)
    multipliers = {"left": left, "right": right, "trapz": (left + right) / 2}[rule]

    def tempered(log_weights):
        weights = jax.nn.softmax(jnp.asarray(betas)[:, None] * log_weights[..., None, :], axis=-1)  # [..., P + 1, K]
        return weights, jnp.sum(weights * log_weights[..., None, :], axis=-1)

    def coefficients(log_weights):
        weights, means = tempered(log_weights)
        num_particles = log_weights.shape[-1]
        kappa = num_particles / (num_particles - 1)
        deviation = kappa * (log_weights[..., None, :] - means[..., None])
        beta, m = jnp.asarray(betas)[:, None], jnp.asarray(multipliers)[:, None]
        a = jnp.sum(m * weights * (1 + beta * deviation), axis=-2)
        b = jnp.sum(m * weights * (-1 + (1 - beta) * deviation), axis=-2)
        return a, b

    def value(log_weights):
        return jnp.sum(jnp.asarray(multipliers) * tempered(log_weights)[1], axis=-1)

    return coefficients, value


# ---- assignments


def grid(**sizes: tuple[int, tuple[int, ...]]) -> Callable:
    """All values of discrete sites, each given as ``(number of values, shape of the site)``."""
    cells = [(name, number, int(np.prod(shape))) for name, (number, shape) in sizes.items()]
    values = np.array(list(product(*[range(number) for _, number, cell in cells for _ in range(cell)])))
    latents, start = {}, 0
    for name, _, cell in cells:
        latents[name] = jnp.asarray(values[:, start : start + cell].reshape(-1, *sizes[name][1]))
        start += cell
    return lambda params, element: (latents, None)


def gauss_hermite(num_nodes: int) -> tuple[Array, Array]:
    """Nodes and log weights of the standard normal expectation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return jnp.asarray(nodes, jnp.result_type(float)), jnp.log(
        jnp.asarray(weights / weights.sum(), jnp.result_type(float))
    )


# ---- 1. one Bernoulli latent, no plate


def coin_model(x):
    logit = numpyro.param("prior_logit", 0.4)
    offset = numpyro.param("offset", -0.3)
    z = numpyro.sample("z", dist.Bernoulli(logits=logit))
    numpyro.sample("x", dist.Normal(2.0 * z + offset, 0.8), obs=x)


def coin_guide(x):
    slope = numpyro.param("slope", 0.5)
    logit = numpyro.param("logit", -0.7)
    numpyro.sample("z", dist.Bernoulli(logits=logit + slope * x))


COIN = Program(
    "one Bernoulli",
    coin_model,
    coin_guide,
    jnp.asarray(1.1),
    {k: jnp.asarray(v) for k, v in {"prior_logit": 0.4, "offset": -0.3, "slope": 0.5, "logit": -0.7}.items()},
    grid(z=(2, ())),
    axis=None,
)

# ---- 2. sigmoid belief network, two layers of two units, data plate

SIGMOID_PARAMS = {
    "prior": jnp.array([0.3, -0.6]),
    "deep_weights": jnp.array([[0.8, -0.5], [-0.3, 0.9]]),
    "deep_bias": jnp.array([-0.2, 0.4]),
    "visible_weights": jnp.array([[1.1, -0.7, 0.2], [-0.4, 0.6, 1.3]]),
    "visible_bias": jnp.array([0.1, -0.3, 0.2]),
    "encoder_weights": jnp.array([[0.5, -0.9], [0.3, 0.2], [-0.6, 0.8]]),
    "encoder_bias": jnp.array([0.2, -0.1]),
    "top_weights": jnp.array([[0.7, 0.1], [-0.5, 0.6]]),
    "top_bias": jnp.array([-0.3, 0.2]),
}


def sigmoid_model(x, num_data=None, batch_size=None):
    num_data = len(x) if num_data is None else num_data
    p = {name: numpyro.param(name, SIGMOID_PARAMS[name]) for name in list(SIGMOID_PARAMS)[:5]}
    with numpyro.plate("data", num_data, subsample_size=batch_size):
        x = numpyro.subsample(x, event_dim=1)
        deep = numpyro.sample("deep", dist.Bernoulli(logits=p["prior"]).to_event(1))
        logits = (2 * deep - 1) @ p["deep_weights"] + p["deep_bias"]
        shallow = numpyro.sample("shallow", dist.Bernoulli(logits=logits).to_event(1))
        logits = (2 * shallow - 1) @ p["visible_weights"] + p["visible_bias"]
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def sigmoid_guide(x, num_data=None, batch_size=None):
    num_data = len(x) if num_data is None else num_data
    p = {name: numpyro.param(name, SIGMOID_PARAMS[name]) for name in list(SIGMOID_PARAMS)[5:]}
    with numpyro.plate("data", num_data, subsample_size=batch_size):
        x = numpyro.subsample(x, event_dim=1)
        logits = (2 * x - 1) @ p["encoder_weights"] + p["encoder_bias"]
        shallow = numpyro.sample("shallow", dist.Bernoulli(logits=logits).to_event(1))
        logits = (2 * shallow - 1) @ p["top_weights"] + p["top_bias"]
        numpyro.sample("deep", dist.Bernoulli(logits=logits).to_event(1))


SIGMOID = Program(
    "sigmoid belief network",
    sigmoid_model,
    sigmoid_guide,
    jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]),
    SIGMOID_PARAMS,
    grid(deep=(2, (1, 2)), shallow=(2, (1, 2))),
)

# ---- 3. mixture with a categorical latent for each datapoint, and constrained parameters

MIXTURE_PARAMS = {
    "weights": jnp.array([0.2, 0.5, 0.3]),
    "locs": jnp.array([-1.5, 0.3, 2.0]),
    "scale": jnp.asarray(0.9),
    "intercepts": jnp.array([0.2, -0.1, 0.4]),
    "slopes": jnp.array([-0.6, 0.1, 0.5]),
}


def mixture_model(x):
    weights = numpyro.param("weights", MIXTURE_PARAMS["weights"], constraint=constraints.simplex)
    locs = numpyro.param("locs", MIXTURE_PARAMS["locs"])
    scale = numpyro.param("scale", MIXTURE_PARAMS["scale"], constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        c = numpyro.sample("c", dist.Categorical(logits=jnp.log(weights)))
        numpyro.sample("x", dist.Normal(locs[c], scale), obs=x)


def mixture_guide(x):
    intercepts = numpyro.param("intercepts", MIXTURE_PARAMS["intercepts"])
    slopes = numpyro.param("slopes", MIXTURE_PARAMS["slopes"])
    with numpyro.plate("data", len(x)):
        numpyro.sample("c", dist.Categorical(logits=intercepts + slopes * x[:, None]))


MIXTURE = Program(
    "mixture",
    mixture_model,
    mixture_guide,
    jnp.array([-1.2, 0.4, 2.5, 1.0]),
    MIXTURE_PARAMS,
    grid(c=(3, (1,))),
)

# ---- 4 and 5. hidden Markov chains of three steps, as a Python loop and as a scan; the same densities

CHAIN_PARAMS = {
    "first": jnp.asarray(0.3),
    "stay": jnp.asarray(1.2),
    "locs": jnp.array([-0.8, 1.1]),
    "forward": jnp.asarray(0.9),
    "emission": jnp.asarray(0.7),
    "bias": jnp.asarray(-0.2),
}


def _chain_prior():
    first, stay = (numpyro.param(name, CHAIN_PARAMS[name]) for name in ("first", "stay"))
    return lambda z, t: dist.Bernoulli(logits=jnp.where(t == 0, first, stay * (2 * z - 1)))


def _chain_proposal():
    forward, emission, bias = (numpyro.param(name, CHAIN_PARAMS[name]) for name in ("forward", "emission", "bias"))
    return lambda z, x, t: dist.Bernoulli(logits=bias + emission * x + jnp.where(t == 0, 0.0, forward * (2 * z - 1)))


def loop_model(x):  # x: [T, N]
    locs, transition = numpyro.param("locs", CHAIN_PARAMS["locs"]), _chain_prior()
    with numpyro.plate("series", x.shape[1]):
        z = 0
        for t in range(x.shape[0]):
            z = numpyro.sample(f"z_{t}", transition(z, t))
            numpyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[t])


def loop_guide(x):
    proposal = _chain_proposal()
    with numpyro.plate("series", x.shape[1]):
        z = 0
        for t in range(x.shape[0]):
            z = numpyro.sample(f"z_{t}", proposal(z, x[t], t))


def scan_model(x):
    locs, transition = numpyro.param("locs", CHAIN_PARAMS["locs"]), _chain_prior()

    def step(z, inputs):
        t, x_t = inputs
        with numpyro.plate("series", x.shape[1]):
            z = numpyro.sample("z", transition(z, t))
            numpyro.sample("x", dist.Normal(locs[z], 1.0), obs=x_t)
        return z, None

    scan(step, jnp.zeros(x.shape[1], int), (jnp.arange(len(x)), x))


def scan_guide(x):
    proposal = _chain_proposal()

    def step(z, inputs):
        t, x_t = inputs
        with numpyro.plate("series", x.shape[1]):
            z = numpyro.sample("z", proposal(z, x_t, t))
        return z, None

    scan(step, jnp.zeros(x.shape[1], int), (jnp.arange(len(x)), x))


CHAIN_DATA = jnp.array([[0.9, -1.4], [1.6, 0.2], [-0.5, -0.9]])
LOOP = Program(
    "chain, Python loop",
    loop_model,
    loop_guide,
    CHAIN_DATA,
    CHAIN_PARAMS,
    grid(z_0=(2, (1,)), z_1=(2, (1,)), z_2=(2, (1,))),
    axis=1,
)
SCAN = Program("chain, scan", scan_model, scan_guide, CHAIN_DATA, CHAIN_PARAMS, grid(z=(2, (3, 1))), axis=1)

# ---- 6. nested plates: a latent for each group and one for each member


def _nested_model(group_dim, member_dim, x):  # x: [groups, members] where the dims are -2, -1
    base = numpyro.param("base", -0.2)
    pull = numpyro.param("pull", 0.8)
    locs = numpyro.param("locs", jnp.array([-0.7, 0.9]))
    groups = numpyro.plate("groups", x.shape[group_dim], dim=group_dim)
    members = numpyro.plate("members", x.shape[member_dim], dim=member_dim)
    with groups:
        u = numpyro.sample("u", dist.Bernoulli(logits=base))
        with members:
            z = numpyro.sample("z", dist.Bernoulli(logits=pull * (2 * u - 1)))
            numpyro.sample("x", dist.Normal(locs[z] + 0.3 * u, 1.0), obs=x)


def _nested_guide(group_dim, member_dim, x):
    slope = numpyro.param("slope", 0.6)
    bias = numpyro.param("bias", 0.1)
    follow = numpyro.param("follow", 0.5)
    groups = numpyro.plate("groups", x.shape[group_dim], dim=group_dim)
    members = numpyro.plate("members", x.shape[member_dim], dim=member_dim)
    with groups:
        total = x.sum(member_dim, keepdims=member_dim == -1)
        u = numpyro.sample("u", dist.Bernoulli(logits=bias + slope * total))
        with members:
            numpyro.sample("z", dist.Bernoulli(logits=slope * x + follow * u))


def nested_model(x):
    _nested_model(-2, -1, x)


def nested_guide(x):
    _nested_guide(-2, -1, x)


def transposed_nested_model(x):
    """The enclosing plate has dim -1, the inner one dim -2."""
    _nested_model(-1, -2, x)


def transposed_nested_guide(x):
    _nested_guide(-1, -2, x)


NESTED_PARAMS = {
    "base": jnp.asarray(-0.2),
    "pull": jnp.asarray(0.8),
    "locs": jnp.array([-0.7, 0.9]),
    "slope": jnp.asarray(0.6),
    "bias": jnp.asarray(0.1),
    "follow": jnp.asarray(0.5),
}
NESTED_DATA = jnp.array([[0.8, -0.4], [1.5, 1.1], [-1.3, 0.2]])
NESTED = Program(
    "nested plates",
    nested_model,
    nested_guide,
    NESTED_DATA,
    NESTED_PARAMS,
    grid(u=(2, (1, 1)), z=(2, (1, 2))),
)
TRANSPOSED = Program(
    "nested plates, enclosing dim -1",
    transposed_nested_model,
    transposed_nested_guide,
    NESTED_DATA.T,
    NESTED_PARAMS,
    grid(u=(2, (1,)), z=(2, (2, 1))),
    axis=1,
)

# ---- 7. hybrid: a categorical and a Normal latent

HYBRID_PARAMS = {
    "weights": jnp.array([0.3, -0.2]),
    "locs": jnp.array([-1.0, 1.2]),
    "gain": jnp.asarray(0.8),
    "intercepts": jnp.array([0.1, 0.4]),
    "slopes": jnp.array([-0.4, 0.5]),
    "starts": jnp.array([-0.6, 0.7]),
    "shrink": jnp.asarray(0.35),
    "scales": jnp.array([0.9, 0.7]),
}
_HYBRID_MODEL, _HYBRID_GUIDE = ("weights", "locs", "gain"), ("intercepts", "slopes", "starts", "shrink", "scales")


def _hybrid_params(names):
    return [
        numpyro.param(n, HYBRID_PARAMS[n], constraint=constraints.positive if n == "scales" else constraints.real)
        for n in names
    ]


def cluster_model(x):
    """The Normal latent depends on the categorical one."""
    weights, locs, gain = _hybrid_params(_HYBRID_MODEL)
    with numpyro.plate("data", len(x)):
        c = numpyro.sample("c", dist.Categorical(logits=weights))
        z = numpyro.sample("z", dist.Normal(locs[c], 1.0))
        numpyro.sample("x", dist.Normal(gain * z, 1.1), obs=x)


def cluster_guide(x):
    intercepts, slopes, starts, shrink, scales = _hybrid_params(_HYBRID_GUIDE)
    with numpyro.plate("data", len(x)):
        c = numpyro.sample("c", dist.Categorical(logits=intercepts + slopes * x[:, None]))
        numpyro.sample("z", dist.Normal(starts[c] + shrink * x, scales[c]))


def _cluster_assignments(params, element):
    nodes, log_weights = gauss_hermite(16)
    c = jnp.repeat(jnp.arange(2), len(nodes))[:, None]  # [S, 1]
    noise, log_noise = jnp.tile(nodes, 2)[:, None], jnp.tile(log_weights, 2)
    z = params["starts"][c] + params["shrink"] * element + params["scales"][c] * noise
    logits = jax.nn.log_softmax(params["intercepts"] + params["slopes"] * element[:, None])
    return {"c": c, "z": z}, logits[0, c[:, 0]] + log_noise


def switch_model(x):
    """The categorical latent depends on the Normal one."""
    weights, locs, gain = _hybrid_params(_HYBRID_MODEL)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.2, 1.0))
        c = numpyro.sample("c", dist.Categorical(logits=weights + jnp.array([-0.5, 0.5]) * z[..., None]))
        numpyro.sample("x", dist.Normal(locs[c] + gain * z, 1.1), obs=x)


def switch_guide(x):
    intercepts, slopes, starts, shrink, scales = _hybrid_params(_HYBRID_GUIDE)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(starts[0] + shrink * x, scales[0]))
        logits = intercepts + slopes * (x + z)[..., None] + jnp.stack([starts[1] * z, scales[1] * z], -1)
        numpyro.sample("c", dist.Categorical(logits=logits))


def _switch_assignments(params, element):
    nodes, log_weights = gauss_hermite(16)
    c = jnp.repeat(jnp.arange(2), len(nodes))[:, None]
    noise, log_noise = jnp.tile(nodes, 2)[:, None], jnp.tile(log_weights, 2)
    z = params["starts"][0] + params["shrink"] * element + params["scales"][0] * noise
    logits = params["intercepts"] + params["slopes"] * (element + z)[..., None]
    logits = logits + jnp.stack([params["starts"][1] * z, params["scales"][1] * z], -1)
    log_c = jnp.take_along_axis(jax.nn.log_softmax(logits), c[..., None], -1)[..., 0]
    return {"c": c, "z": z}, log_c[:, 0] + log_noise


HYBRID_DATA = jnp.array([0.9, -1.6])
CLUSTER = Program(
    "Normal given categorical", cluster_model, cluster_guide, HYBRID_DATA, HYBRID_PARAMS, _cluster_assignments
)
SWITCH = Program(
    "categorical given Normal", switch_model, switch_guide, HYBRID_DATA, HYBRID_PARAMS, _switch_assignments
)

# ---- 8. one Normal latent for each datapoint (for reparameterised estimators)


def gaussian_model(x):
    loc = numpyro.param("loc", 0.4)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.8), obs=x)


def gaussian_guide(x):
    slope = numpyro.param("slope", 0.4)
    bias = numpyro.param("bias", -0.1)
    scale = numpyro.param("scale", 0.9, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x + bias, scale))


def _gaussian_assignments(params, element):
    nodes, log_weights = gauss_hermite(32)
    return {"z": params["slope"] * element + params["bias"] + params["scale"] * nodes[:, None]}, log_weights


GAUSSIAN = Program(
    "Normal",
    gaussian_model,
    gaussian_guide,
    jnp.array([0.7, -1.2, 2.0]),
    {k: jnp.asarray(v) for k, v in {"loc": 0.4, "slope": 0.4, "bias": -0.1, "scale": 0.9}.items()},
    _gaussian_assignments,
)


# ---- 9. a Gaussian random walk, two steps, as a scan: reparameterised draws that depend on earlier draws


def walk_model(x):
    loc = numpyro.param("loc", 0.3)

    def step(z, x_t):
        with numpyro.plate("series", x.shape[1]):
            z = numpyro.sample("z", dist.Normal(0.8 * z + loc, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.9), obs=x_t)
        return z, None

    scan(step, jnp.zeros(x.shape[1]), x)


def walk_guide(x):
    carry = numpyro.param("carry", 0.5)
    gain = numpyro.param("gain", 0.4)
    scale = numpyro.param("scale", 0.8, constraint=constraints.positive)

    def step(z, x_t):
        with numpyro.plate("series", x.shape[1]):
            z = numpyro.sample("z", dist.Normal(carry * z + gain * x_t, scale))
        return z, None

    scan(step, jnp.zeros(x.shape[1]), x)


def _walk_assignments(params, element):
    nodes, log_weights = gauss_hermite(14)
    first, second = (e.ravel() for e in jnp.meshgrid(nodes, nodes))
    log_measure = jnp.add(*(e.ravel() for e in jnp.meshgrid(log_weights, log_weights)))
    z_0 = params["gain"] * element[0] + params["scale"] * first
    z_1 = params["carry"] * z_0 + params["gain"] * element[1] + params["scale"] * second
    return {"z": jnp.stack([z_0, z_1], 1)[..., None]}, log_measure


WALK = Program(
    "Gaussian walk, scan",
    walk_model,
    walk_guide,
    jnp.array([[0.8, -0.3], [1.9, 0.4]]),
    {k: jnp.asarray(v) for k, v in {"loc": 0.3, "carry": 0.5, "gain": 0.4, "scale": 0.8}.items()},
    _walk_assignments,
    axis=1,
)

DISCRETE = (COIN, SIGMOID, MIXTURE, LOOP, SCAN, NESTED, TRANSPOSED)
HYBRID = (CLUSTER, SWITCH)
CONTINUOUS = (GAUSSIAN, WALK)


def names(programs: tuple[Program, ...]) -> list[Any]:
    """Readable identifiers for parametrised tests."""
    return [program.name.replace(", ", "-").replace(" ", "-") for program in programs]
