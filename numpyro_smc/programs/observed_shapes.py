"""Whether what is observed at a site has the shape that its distribution draws."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from numpyro_smc.programs.sites import Site, in_control_flow, is_observed


def check_observed_shapes(user: str, sites: Iterable[Site], in_step: bool = False) -> None:
    """An observed value is what its distribution draws, and not an array that broadcasts it to something larger.

    Outside of plates and scans NumPyro's own habit is left alone: rows of data with one distribution.

    :param in_step: whether the sites are those of one step of a scan.
    :raises ValueError: naming the site and both shapes.
    """
    for site in sites:
        if not is_observed(site):
            continue
        value, fn = jnp.shape(site["value"]), site["fn"]
        rows, batch = value[: len(value) - fn.event_dim], fn.batch_shape
        if in_control_flow(site) and batch[:1] != rows[:1]:
            continue  # after a scan, NumPyro leaves distributions that hold distributions without their time axis
        try:
            together = np.broadcast_shapes(rows, batch)
        except ValueError:
            continue  # refused by the density itself
        is_closed = in_step or in_control_flow(site) or bool(site["cond_indep_stack"])
        if np.prod(together) == np.prod(batch) or (together == rows and not is_closed):
            continue
        raise ValueError(
            f"{user}: site '{site['name']}' is observed with a value of shape {value}, but its distribution has shape "
            f"{(*batch, *fn.event_shape)}, so that densities would be taken of shape {together}. Give data of the "
            f"site's shape, or make the distribution as large as the data (expand and to_event, or a plate)."
        )
