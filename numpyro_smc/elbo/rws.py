"""RWS: reweighted wake-sleep."""

from dataclasses import replace
from math import inf
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.elbo.iwelbo import normalised_weights
from numpyro_smc.elbo.multi_sample import Coefficients, ScoreFunctionELBO
from numpyro_smc.programs.arguments import check_between, check_callable, check_positive
from numpyro_smc.programs.density import Densities, Pair, Params, over_particles
from numpyro_smc.programs.simulated_arguments import Simulate, simulate_pair
from numpyro_smc.programs.sites import is_latent


class RWS(ScoreFunctionELBO):
    r"""Reweighted wake-sleep [1, 2]: the bound for the model, inclusive divergences for the guide.

    - wake, model: :math:`\nabla_\theta L_K^\alpha = \mathbb E[\sum_k v_k \nabla_\theta \log p(x, z_k)]`;
    - wake, guide: :math:`\sum_k v_k \nabla_\phi \log q(z_k \mid x)`, descends
      :math:`\mathrm{KL}(p(z \mid x) \,\|\, q)` with self-normalised weights (bias O(1/K));
    - sleep, guide: :math:`\nabla_\phi \log q(z' \mid x')` at :math:`(z', x') \sim p_\theta`, descends
      :math:`\mathbb E_{p(x)} \mathrm{KL}(p(z \mid x) \,\|\, q)`, unbiased.

    The simulated data come from the model itself (``handlers.uncondition``) and reach the guide in place of its
    observations.

    Value: unbiased for :math:`L_K`, per plate element, summed. Gradient: of each program's own objective, not of
    :math:`L_K` for the guide. Model and guide are told apart by role: a parameter of both is refused.
    Cost: O(K), plus ``num_sleep`` runs of model and guide.

    :param num_particles: :math:`K \ge 1`.
    :param wake_theta: weight of the model's objective.
    :param wake_phi: weight of the guide's wake objective.
    :param sleep_phi: weight of the guide's sleep objective.
    :param num_sleep: simulations per step; each is of the whole (sub)sample.
    :param simulate: how the guide is called on simulated data: ``simulate(values) -> (args, kwargs)``, ``values`` being
        those of the observed sites, by name. By default the first argument of the guide is the data, an array (with one
        observed site) or a dict of arrays by site name.
    :param allow_shared: allow parameters that both programs have; they get the sum of the gradients. Other arguments
        (but ``pathwise``, which it does not have): see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if a parameter is shared, or the model cannot simulate its data.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import RWS
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...         numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.0)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> loss = RWS(num_particles=5, wake_phi=0.5, sleep_phi=0.5)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), loss)
        >>> result = svi.run(random.key(0), 10, jnp.array([1.9, 0.1]), progress_bar=False)

    **References**

    1. *Reweighted Wake-Sleep*, J. Bornschein, Y. Bengio (2015)
    2. *Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow*, T. A. Le et al. (2019)
    """

    _is_explicit = False

    def __init__(
        self,
        num_particles: int,
        *,
        wake_theta: float = 1.0,
        wake_phi: float = 1.0,
        sleep_phi: float = 0.0,
        num_sleep: int = 1,
        simulate: Simulate | None = None,
        allow_shared: bool = False,
        **options: Any,
    ) -> None:
        if "pathwise" in options:
            raise ValueError("RWS: it has no pathwise; the guide is fitted by its density alone.")
        super().__init__(num_particles, **options)
        check_between("RWS", 0.0, inf, wake_theta=wake_theta, wake_phi=wake_phi, sleep_phi=sleep_phi)
        check_positive("RWS", num_sleep=num_sleep)
        if simulate is not None:
            check_callable("RWS", simulate=simulate)
        self.wake_theta, self.wake_phi, self.sleep_phi = wake_theta, wake_phi, sleep_phi
        self.num_sleep, self.simulate, self.allow_shared = num_sleep, simulate, allow_shared

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        weights, value = normalised_weights(log_weights, alpha)
        return Coefficients(self.wake_theta * weights, self.wake_phi * weights, value)

    def _check(self, cloud: Densities) -> None:
        super()._check(cloud)
        if cloud.shared_params and not self.allow_shared:
            raise ValueError(
                f"RWS: model and guide share the parameters {sorted(cloud.shared_params)}, but have different "
                f"objectives. Give the guide its own, or pass allow_shared=True to add the gradients."
            )

    def _other_loss(
        self, rng_key: Array, pair: Pair, params: Params, cloud: Densities, coefficients: Coefficients
    ) -> Array:
        if self.sleep_phi == 0.0:
            return jnp.zeros(())

        def asleep(rng_key: Array, index: Array) -> Densities:
            return self._asleep(pair, rng_key, index, params)

        simulated = over_particles(asleep, rng_key, self.num_sleep, self.batch_size)
        # With their scale: that of a plate inside the model is not among the enclosing plates'.
        log_q = sum(jnp.sum(simulated.log_q[name]) for name in simulated.score) / self.num_sleep
        return -self.sleep_phi * log_q * simulated.plates.scale

    def _asleep(self, pair: Pair, rng_key: Array, index: Array, params: Params) -> Densities:
        """Densities of the guide at one simulation of the model."""
        model_key, guide_key = random.split(rng_key)
        dream = simulate_pair(model_key, index, pair, params, self.simulate, "Or use sleep_phi=0.")
        guide = replace(pair, args=dream.args, kwargs=dream.kwargs).redraw(guide_key, index, params, dream.latents)
        for name, site in guide.trace.items():
            if is_latent(site) and name not in dream.latents.trace:
                raise ValueError(
                    f"RWS: sleep needs the guide's density at simulated latents, but its site '{name}' is not one of "
                    f"the model's. Use a guide that samples the model's sites directly, or sleep_phi=0."
                )
        return pair.densities(guide, dream.trace, self._is_score)
