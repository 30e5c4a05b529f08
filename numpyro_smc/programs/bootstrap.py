"""The guide that proposes from the model itself."""

from collections.abc import Callable
from typing import Any

from numpyro import handlers

from numpyro_smc.programs.arguments import check_callable


class Bootstrap:
    """See :func:`bootstrap`."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = handlers.block(self.model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
        return hidden(*args, **kwargs)

    def __repr__(self) -> str:
        return f"bootstrap({getattr(self.model, '__name__', self.model)})"


def bootstrap(model: Callable[..., Any]) -> Bootstrap:
    """The guide that proposes every latent of a sequence model from the model's own prior and transitions.

    It is an ordinary guide with the model's parameters. Particle methods recognise it and cancel the densities exactly,
    so the weights are the likelihood alone (the bootstrap filter); global latents are drawn from their prior.

    :param model: a NumPyro model.
    :return: a guide for :class:`~numpyro.infer.SVI` and for every class of this package that takes one.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import FIVO, bootstrap
        >>> def model(y):
        ...     rate = numpyro.param("rate", 0.5)
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(rate * x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> svi = SVI(model, bootstrap(model), numpyro.optim.Adam(0.01), FIVO(num_particles=8))
        >>> result = svi.run(random.key(0), 2, jnp.array([0.3, -0.1]), progress_bar=False)
    """
    check_callable("bootstrap", model=model)
    return Bootstrap(model)
