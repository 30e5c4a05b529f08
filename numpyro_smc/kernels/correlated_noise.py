r"""The draws of a filter as functions of standard normal noise that the caller holds.

A draw of each site is :math:`x = g(u)` with :math:`u \sim \mathcal N(0, I)`: the location and scale of a normal, the
transforms of a transformed distribution, and otherwise the inverse distribution function at :math:`\Phi(u)`. A proposal
:math:`u' = \rho u + \sqrt{1 - \rho^2}\,\xi` then moves all particles a little instead of drawing them anew.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from jax.scipy.special import ndtr
from numpyro.distributions import (
    Distribution,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from numpyro.primitives import Messenger

from numpyro_smc.programs.sequence import Sequence, Steering


class Noise(NamedTuple):
    """All noise of a filter, standard normal.

    - **initial** - by site, ``[N, ...]``. **steps** - by site, ``[T, N, ...]``. **resampling** - ``[T]``.
    """

    initial: dict[str, Array]
    steps: dict[str, Array]
    resampling: Array


def noise_shape(fn: Distribution) -> tuple[int, ...]:
    """Shape of the noise that one draw of ``fn`` takes."""
    if isinstance(fn, MaskedDistribution | Independent | TransformedDistribution):
        return noise_shape(fn.base_dist)
    if isinstance(fn, ExpandedDistribution):
        return fn.batch_shape + noise_shape(fn.base_dist)[len(fn.base_dist.batch_shape) :]
    return fn.shape()


def from_noise(fn: Distribution, noise: Array) -> Array:
    """The draw of ``fn`` that the noise stands for: standard normal noise gives draws of ``fn``.

    :param noise: ``[*sample_shape, *noise_shape(fn)]``.
    :raises NotImplementedError: for distributions without an inverse distribution function. **ImportError** - for those
        whose inverse NumPyro takes from a package that is not installed.
    """
    if isinstance(fn, MaskedDistribution | Independent | ExpandedDistribution):
        return from_noise(fn.base_dist, noise)
    if isinstance(fn, TransformedDistribution):
        if type(fn).sample is not TransformedDistribution.sample:
            raise NotImplementedError
        value = from_noise(fn.base_dist, noise)
        for transform in fn.transforms:
            value = transform(value)
        return value
    if isinstance(fn, Normal):
        return fn.loc + fn.scale * noise
    if isinstance(fn, MultivariateNormal):
        return fn.loc + jnp.squeeze(jnp.matmul(fn.scale_tril, noise[..., None]), -1)
    uniform = to_uniform(noise)
    if fn.has_enumerate_support and not fn.event_shape:
        # Discrete: the first value whose distribution function is above the uniform.
        support = fn.enumerate_support(expand=False)
        cumulative = jnp.cumsum(jnp.moveaxis(jnp.exp(fn.log_prob(support)), 0, -1), axis=-1)
        index = jnp.sum(cumulative[..., :-1] <= uniform[..., None], axis=-1)
        return support.reshape(-1)[index]
    return jnp.asarray(fn.icdf(uniform))


def to_uniform(noise: Array) -> Array:
    """Uniforms on the open unit interval of standard normal noise."""
    epsilon = jnp.finfo(noise.dtype).eps
    return jnp.clip(ndtr(noise), epsilon, 1.0 - epsilon)


def draw_noise(rng_key: Array, sequence: Sequence, num_particles: int) -> Noise:
    """Independent noise for a run of a filter.

    :raises NotImplementedError: naming the site, for distributions whose draws are not such functions of noise.
    :raises ValueError: naming the plates, if plates enclose the whole program.
    """
    if sequence.batch_shape:
        raise ValueError(
            f"{sequence.user}: plates {list(sequence.plates.names)} enclose the whole program, whose problems would "
            f"each have to be sorted by their own states. Use correlation=0.0."
        )
    initial, steps = _noise_shapes(sequence)
    length = sequence.length
    initial_key, step_key, resampling_key = random.split(rng_key, 3)

    def normals(key: Array, shapes: dict[str, tuple[int, ...]], leading: tuple[int, ...]) -> dict[str, Array]:
        keys = random.split(key, max(len(shapes), 1))
        return {name: random.normal(keys[i], leading + shapes[name]) for i, name in enumerate(sorted(shapes))}

    return Noise(
        normals(initial_key, initial, (num_particles,)),
        normals(step_key, steps, (length, num_particles)),
        random.normal(resampling_key, (length,)),
    )


def move_noise(rng_key: Array, noise: Noise, correlation: float | Array) -> Noise:
    r""":math:`\rho u + \sqrt{1 - \rho^2}\,\xi`, which leaves the standard normal law as it is, and is reversible."""
    leaves, tree = jax.tree.flatten(noise)
    keys = random.split(rng_key, len(leaves))
    fresh = jnp.sqrt(1.0 - jnp.square(correlation))
    moved = [
        correlation * leaf + fresh * random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def steer(sequence: Sequence, noise: Noise) -> None:
    """Make the draws of a sequence model those that the noise stands for."""
    sequence.steering = Steering(noise.initial, noise.steps, lambda values, index: (_FromNoise(values, index),))


class _FromNoise(Messenger):
    """Replace what was drawn by what the noise stands for."""

    def __init__(self, noise: dict[str, Array], index: Array) -> None:
        super().__init__(None)
        self.noise, self.index = noise, index

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg.get("drawn") and msg["name"] in self.noise:
            drawn = from_noise(msg["fn"], self.noise[msg["name"]][self.index])
            msg["value"] = drawn.astype(jnp.result_type(msg["value"]))
            msg["intermediates"] = []  # those of the draw, which is no longer the value


class _Recorded(Messenger):
    """Note the shape of the noise of every site that is drawn."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], user: str) -> None:
        super().__init__(None)
        self.shapes, self.user = shapes, user

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not msg.get("drawn"):
            return
        shape = tuple(msg["kwargs"].get("sample_shape", ())) + noise_shape(msg["fn"])
        try:
            value = from_noise(msg["fn"], jnp.zeros(shape))
        except (NotImplementedError, ImportError) as error:  # some inverses need packages that are not here
            raise NotImplementedError(
                f"{self.user}: draws of site '{msg['name']}' ({type(msg['fn']).__name__}) are not a function of normal "
                f"noise, so they cannot be correlated between proposals. Use correlation=0.0, or a distribution with "
                f"an icdf (as a TransformedDistribution, for instance)."
            ) from error
        assert value.shape == jnp.shape(msg["value"])
        self.shapes[msg["name"]] = shape


def _noise_shapes(sequence: Sequence) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the noise of one particle, by site: before the scan, and in a step."""
    initial: dict[str, tuple[int, ...]] = {}
    steps: dict[str, tuple[int, ...]] = {}
    steering = sequence.steering

    def walk() -> Any:
        key = random.key(0)
        sequence.steering = Steering({}, {}, lambda _, index: (_Recorded(initial, sequence.user),))
        cloud, _ = sequence.init(key, 1)
        sequence.steering = Steering({}, {}, lambda _, index: (_Recorded(steps, sequence.user),))
        first = jax.tree.map(lambda leaf: leaf[0], sequence.inputs())
        return sequence.step(key, jnp.asarray(0), first, cloud, 1)

    jax.eval_shape(walk)
    sequence.steering = steering
    return initial, steps
