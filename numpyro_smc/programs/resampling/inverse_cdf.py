"""Ancestors by inverting the cumulative weights: the search that every resampling scheme shares."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap


def scaled_weights(log_weights: Array) -> Array:
    r"""Weights :math:`w_i = e^{\ell_i - \max_j \ell_j}`, so that the largest is one; constants to differentiation.

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle, whose weight is exactly zero.
    :return: float32 or wider, shape ``[N]``; all zero if every particle is dead, not all finite if some log weight is
        ``nan`` or ``+inf``.
    """
    log_weights = lax.stop_gradient(jnp.asarray(log_weights))
    if log_weights.ndim != 1:
        raise ValueError(
            f"Resampling: log_weights has shape {log_weights.shape}; expected [N]. Use jax.vmap for several clouds."
        )
    log_weights = log_weights.astype(jnp.promote_types(log_weights.dtype, jnp.float32))
    largest = log_weights.max()
    return jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))


def strata(offsets: Array, num_samples: int) -> Array:
    r"""Positions :math:`i + U_i`, one in each of the cells :math:`[i, i+1)`.

    Rounding :math:`i + U_i` up to :math:`i + 1` would leave a cell empty, so the sum stops one float short of it.

    :param offsets: :math:`U \in [0, 1)`, shape ``[]`` (shared by all cells) or ``[num_samples]``.
    :return: shape ``[num_samples]``, increasing.
    """
    cells = jnp.arange(num_samples, dtype=offsets.dtype)
    return jnp.minimum(cells + offsets, _float_below(cells + 1))


def search(weights: Array, positions: Array, span: int = 1) -> Array:
    r"""The particle that owns each position when the weights are laid end to end over ``[0, span)``.

    With :math:`C_i = \sum_{j \le i} w_j`, position :math:`v` belongs to the first :math:`i` with
    :math:`C_i > v\, C_N / \mathrm{span}`. Rounding must not choose a dead particle, nor none:

    * a scaled position may round up to :math:`C_N`: it is kept one float below;
    * XLA adds in a tree, so a dead particle's :math:`C_i` may exceed :math:`C_{i-1}` in the last digit: what it would
      own goes to the nearest living particle before it;
    * all particles may be dead, or some weight not finite: the answer is then ``arange(n) % N``.

    Cost: O(N + n log N); on a CPU core 8 ns per particle in all, a third of it the cumulative sum. In float32
    :math:`C_i / C_N` is good to about 1e-7, so the expected offspring of one particle is off by about 1e-7 ``n``.

    :param weights: from :func:`scaled_weights`, or any with a zero for every dead particle; shape ``[N]``.
    :param positions: in ``[0, span)``, sorted or not, shape ``[n]``.
    :return: int32 ``[n]``, in ``[0, N)``.
    """
    cumulative = jnp.cumsum(weights)
    total = cumulative[-1]
    values = jnp.minimum(positions * (total / span), _float_below(total))
    owners = first_above(cumulative, values)
    owners = lax.cond(
        _anywhere_in_batch(jnp.any(weights[owners] == 0)),
        lambda owners: _nearest_living(weights)[owners],
        lambda owners: owners,
        owners,
    )
    return identity_unless_alive(owners, weights, total)


def draw_one(rng_key: Array, log_weights: Array) -> Array:
    r"""One particle by its weight: a block of about :math:`\sqrt N` of them by the blocks' sums, then one in the block.

    Cost: O(N) without a cumulative sum over all weights; for N = 10,000 on a CPU core a third of a search's.

    :param log_weights: unnormalised, shape ``[N]``.
    :return: int32, a scalar; zero if every particle is dead.
    """
    weights = scaled_weights(log_weights)
    size = math.isqrt(weights.shape[0] - 1) + 1
    blocks = jnp.pad(weights, (0, -weights.shape[0] % size)).reshape(-1, size)
    uniforms = jax.random.uniform(rng_key, (2, 1), weights.dtype)
    block = search(blocks.sum(1), uniforms[0])[0]
    return block * size + search(blocks[block], uniforms[1])[0]


def identity_unless_alive(ancestors: Array, weights: Array, total: Array | None = None) -> Array:
    """The given ancestors, or ``arange(n) % N`` if every particle is dead or some weight is not finite.

    :param ancestors: shape ``[n]``.
    :param weights: shape ``[N]``.
    :param total: their sum, where it is known.
    """
    total = weights.sum() if total is None else total
    identity = jnp.arange(ancestors.shape[0], dtype=jnp.int32) % weights.shape[0]
    return jnp.where((total > 0) & (total < jnp.inf), ancestors, identity)


def position_within(rng_key: Array, weights: Array, particle: int | Array, span: int) -> tuple[Array, Array]:
    """A uniform position among those a particle owns, as the cell that holds it and the offset in that cell.

    :param particle: its index, a scalar.
    :return: the cell, int32 in ``[0, span)``, and the offset in ``[0, 1)``; scalars.
    """
    cumulative = jnp.cumsum(weights)
    start = jnp.where(particle > 0, cumulative[particle - 1], 0.0)
    value = start + jax.random.uniform(rng_key, (), weights.dtype) * weights[particle]
    position = value * (span / cumulative[-1])
    cell = jnp.clip(jnp.floor(position), 0, span - 1)
    return cell.astype(jnp.int32), jnp.clip(position - cell, 0.0, _float_below(jnp.ones_like(position)))


def pin(ancestors: Array, slot: Array, pivot_in: int | Array, pivot_out: int | Array) -> Array:
    """Gives ``slot`` the ancestor ``pivot_in``, then shifts all slots cyclically until ``slot`` is ``pivot_out``."""
    # Not jnp.roll, which takes 40 us of 10,000 slots on a CPU core when the amount is known at run time only.
    size = ancestors.shape[0]
    places = jnp.arange(size, dtype=jnp.int32) + jnp.asarray(slot - pivot_out, jnp.int32)
    places = jnp.where(places < 0, places + size, jnp.where(places < size, places, places - size))
    rolled = ancestors.at[places].get(mode="promise_in_bounds")
    return rolled.at[pivot_out].set(jnp.asarray(pivot_in, ancestors.dtype))


def _float_below(x: Array) -> Array:
    """The largest float below a positive ``x``: a product, cheaper than :func:`jax.numpy.nextafter`."""
    return x * (1 - jnp.finfo(x.dtype).epsneg)


def first_above(cumulative: Array, values: Array) -> Array:
    """``searchsorted(cumulative, values, side="right")``; below N whenever ``values < cumulative[-1]``.

    On accelerators a sort. On a CPU a sort is 20 times slower than bisection, and bisection by powers of two, with one
    comparison and no bounds at each level, saves a quarter of the time of :func:`jax.numpy.searchsorted`.
    """
    if jax.default_backend() != "cpu":
        return jnp.searchsorted(cumulative, values, side="right", method="sort").astype(jnp.int32)
    size = cumulative.shape[0]
    levels = size.bit_length()
    # padded[c] <= value says that at least c entries are <= value; the tail is never reached.
    beyond = jnp.inf if jnp.issubdtype(cumulative.dtype, jnp.floating) else jnp.iinfo(cumulative.dtype).max
    padded = jnp.pad(cumulative, (1, 2**levels - size - 1), constant_values=(0, beyond))

    def descend(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        found, step = state
        further = padded.at[found + step].get(mode="promise_in_bounds") <= values
        return jnp.where(further, found + step, found), step // 2

    start = jnp.zeros(values.shape, jnp.int32), jnp.int32(2 ** (levels - 1))
    return lax.fori_loop(0, levels, descend, start)[0]


def _nearest_living(weights: Array) -> Array:
    """For each particle the last living one up to it, else the first living one; shape ``[N]``."""
    living = weights > 0
    first = jnp.argmax(living).astype(jnp.int32)
    return lax.cummax(jnp.where(living, jnp.arange(weights.shape[0], dtype=jnp.int32), first))


@custom_vmap
def _anywhere_in_batch(condition: Array) -> Array:
    """A condition that :func:`jax.vmap` joins by *or* over its batch, so :func:`jax.lax.cond` on it stays a branch.

    A condition that may differ within a batch would turn the branch into a selection, which pays for both sides: here,
    half as much again as the whole search.
    """
    return condition


@_anywhere_in_batch.def_vmap
def _(axis_size: int, in_batched: list[bool], condition: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _anywhere_in_batch(jnp.any(condition)), False
