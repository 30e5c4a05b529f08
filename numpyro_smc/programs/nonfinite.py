"""What to say where an element has no finite weight."""

import warnings

import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.programs.density import Pair, Params
from numpyro_smc.programs.supports import log_prob

_NUM_DRAWS = 4


def check_finite(values: Array, pair: Pair, params: Params) -> None:
    """:raises FloatingPointError: naming the sites with non-finite log densities, unless every value is finite."""
    if np.all(np.isfinite(values)):
        return
    sites: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values outside a support: that is what is looked for
        for i in range(_NUM_DRAWS):
            draw = pair.draw(random.key(i), jnp.asarray(0), params)
            model = pair.run_model(random.key(i), jnp.asarray(0), params, draw)
            for program, trace in (("guide", draw.trace), ("model", model)):
                for name, site in trace.items():
                    if site["type"] == "sample" and not np.all(np.isfinite(log_prob(site["fn"], site["value"]))):
                        sites[f"'{name}' of the {program}"] = None
    where = f"at draws from the guide, log densities of site {', '.join(sites)} are not finite" if sites else ""
    raise FloatingPointError(
        f"{pair.user}: {int(np.sum(~np.isfinite(values)))} of {np.size(values)} elements have no draw of finite weight"
        f"{'; ' + where if where else ''}. Make the guide's support that of the posterior, and check the data for "
        f"missing values."
    )
