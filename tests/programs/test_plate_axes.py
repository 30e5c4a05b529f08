"""Every plated program: the elements that are filtered as independent problems do not touch each other.

One element's particles are exchanged for each other; then one step later, with the same noise, nothing of any other
element has changed, to the last bit. Programs whose evidence is known are compared with it element by element in
test_user_programs.py; static ones, element by element by enumeration, in tests/elbo/test_multi_sample_programs.py.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from models import drift_diffusion, vrnn
from numpyro_smc import ParticleFilter
from numpyro_smc.engines.particles import advance, initialise, step_keys
from tests.programs.coupled_programs import Y, totals, trends
from tests.programs.user_programs import PROGRAMS

_VRNN_MODEL, _VRNN_GUIDE = vrnn.make_programs(random.key(0), 2, 3, 4, "normal")
_PANEL = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)

# By name: model, guide, arguments, keyword arguments, parameters.
OF_MODELS = {
    "vrnn": (_VRNN_MODEL, None, (_PANEL,), {}, {}),
    "vrnn, guided": (_VRNN_MODEL, _VRNN_GUIDE, (_PANEL,), {}, {}),
    "drift diffusion": (drift_diffusion.model, None, (jnp.array([1.0, -2.0, 0.5]), 4, 3), {}, {"alpha": jnp.zeros(())}),
    "trends, component first": (trends, None, (Y, "component first"), {}, {}),
    "trends, series first": (trends, None, (Y, "series first"), {}, {}),
    "totals beside the plate": (totals, None, (Y,), {}, {}),
}
CASES = OF_MODELS | {
    name: (program.model, program.guide, program.args, program.kwargs, program.params)
    for name, program in PROGRAMS.items()
}

# Programs of independent problems, and their number. All others are one problem.
INDEPENDENT = {
    "vrnn": (3,),
    "vrnn, guided": (3,),
    "drift diffusion": (3,),
    "trends, component first": (2,),
    "trends, series first": (2,),
    "totals beside the plate": (2,),
    "HMM with lengths": (2,),
    "HMM of tones with lengths": (2,),
    "HMM with lengths, guided": (2,),
    "variational recurrent network": (2,),
    "variational recurrent network, guided": (2,),
    "hierarchy over series": (3,),
    "hierarchy reparameterised around the program": (3,),
    "panel of two plates": (2, 3),
    "panel of two plates, path guide": (2, 3),
}


def exchanged(tree, rank):
    """The first element's particles in another order, all other elements' as they were."""

    def exchange(leaf):
        flat = leaf.reshape(leaf.shape[0], -1, *leaf.shape[1 + rank :])
        return flat.at[:, 0].set(jnp.roll(flat[:, 0], 1, axis=0)).reshape(leaf.shape)

    return jax.tree.map(exchange, tree)


@pytest.mark.parametrize("name", CASES)
def test_elements_do_not_touch_each_other(name):
    model, guide, args, kwargs, params = CASES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "shape requires ndarray or scalar arguments", DeprecationWarning)
        sequence = ParticleFilter(model, 4, guide=guide).read(random.key(0), params, args, kwargs)
    batch = sequence.batch_shape
    assert batch == INDEPENDENT.get(name, ())
    if not batch:
        return
    rank = len(batch)

    key = random.key(1)

    def first(key):
        state = initialise(key, sequence, 4)[0]
        return advance(step_keys(key, 0), sequence, None, state, jnp.asarray(0), at(0))[0]

    # One compiled program for both, so that equal inputs are equal to the last bit.
    @jax.jit
    def second(state):
        move = advance(step_keys(key, 1), sequence, None, state, jnp.asarray(1), at(1))[2]
        return move.log_weights, move.values

    def at(t):
        return jax.tree.map(lambda leaf: leaf[t], sequence.inputs())

    state = jax.jit(first)(key)
    other = state._replace(cloud=state.cloud._replace(particles=exchanged(state.cloud.particles, rank)))
    before, after = second(state), second(other)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        flat = [np.asarray(leaf).reshape(4, int(np.prod(batch)), -1) for leaf in (one, two)]
        np.testing.assert_array_equal(flat[0][:, 1:], flat[1][:, 1:])
    # The exchange itself was seen, where a step depends on what came before.
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
