"""What NumPyro's automatic guides keep to themselves: the order of the sites in their vector."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from numpyro.infer.autoguide import AutoContinuous


def latent_vector(guide: AutoContinuous, values: Mapping[str, Array]) -> Array:
    """Numbers of the unconstrained sites one after the other, as the guide's one latent holds them.

    :param guide: an automatic guide that has read its model.
    :param values: by latent site.
    """
    return jnp.concatenate([jnp.ravel(values[name]) for name in guide._init_locs])
