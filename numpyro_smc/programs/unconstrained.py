r"""A model as a target for samplers: a vector of reals, where it starts from, and what it is tempered by.

The position :math:`u \in \mathbb R^D` holds the model's latent sites, each mapped to the reals by the bijection
:math:`z = T(u)` of its support. The joint density in this space is split in two,

.. math:: \log \gamma(u) = \log \pi_0(u) + \log L(u), \qquad \gamma_\beta = \pi_0\, L^\beta,

where :math:`\pi_0` can be drawn from and integrates to one. From the prior, :math:`\log \pi_0` is the sum of the latent
sites and of :math:`\log |T'(u)|`, and :math:`\log L` that of the observed sites and factors. From a guide,
:math:`\pi_0` is the guide and :math:`L` the importance weight. Either way :math:`\int \gamma = p(x)`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import ImproperUniform, MaskedDistribution
from numpyro.distributions.transforms import biject_to
from numpyro.infer.util import _unconstrain_reparam
from numpyro.primitives import Messenger

from numpyro_smc.programs.density import Pair, is_point
from numpyro_smc.programs.draws import cannot_be_drawn
from numpyro_smc.programs.guide_target import GuideTarget
from numpyro_smc.programs.masked_latents import is_dummies, with_proper_dummies
from numpyro_smc.programs.observed_shapes import check_observed_shapes
from numpyro_smc.programs.sites import (
    BatchPlates,
    Site,
    is_latent,
    is_observed,
    log_density,
    plate_scales,
    unscaled_log_density,
)
from numpyro_smc.programs.supports import check_bijection, innermost
from numpyro_smc.programs.tracing import TRACING

Program = Callable[..., Any]
Values = dict[str, Array]

_WHOLE = BatchPlates()


class Split(NamedTuple):
    r"""Log densities at one position: **base** :math:`\log\pi_0(u)`, a scalar, and **likelihood** :math:`\log L(u)`.

    The likelihood is a scalar, or has one entry per row of the data.
    """

    base: Array
    likelihood: Array


class UnconstrainedModel:
    """A model at given arguments over unconstrained vectors. Build it where it is used: under ``jit``, inside.

    :param model: a NumPyro model without discrete latents.
    :param args, kwargs: its arguments.
    :param params: values of ``param`` sites, of the model and of the guide.
    :param guide: what to start from instead of the prior.
    :param user: who asks, for error messages.
    :param rng_key: key of whatever else the programs draw (``numpyro.prng_key``), the same for every position.
    :raises ValueError: naming the sites, for discrete latents, subsampled plates, improper priors without a guide, and
        a guide that does not cover the latents.
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        params: Values | None = None,
        *,
        guide: Program | None = None,
        user: str = "UnconstrainedModel",
        rng_key: Array | None = None,
    ) -> None:
        self.args, self.kwargs, self.user = args, kwargs or {}, user
        self.rng_key = random.key(0) if rng_key is None else rng_key
        # A copy, because networks with state write their new state into the dict that they are given.
        self.model = handlers.substitute(model, data=dict(params or {}))
        self._sites = trace = self._trace(handlers.seed(FreeOfImproper(self.model), self.rng_key))
        self._check(trace, from_prior=guide is None)
        check_observed_shapes(user, trace.values())
        self.start: _Prior | GuideTarget
        if guide is None:
            self.start = _Prior(self, trace)
        else:
            pair = Pair(model, guide, self.args, self.kwargs, self.rng_key, None, user)
            self.start = GuideTarget(pair, dict(params or {}), self.rng_key)
        example = jax.eval_shape(self.start.draw, self.rng_key, jnp.asarray(0))
        flat, self.unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example))
        self.dimension: int = flat.shape[0]
        if not self.dimension:
            raise ValueError(f"{user}: the model has no continuous latent site, so there is nothing to sample.")

    def draw(self, rng_key: Array, num_particles: int) -> Array:
        r"""Independent draws from :math:`\pi_0`, ``[num_particles, D]``."""

        def one(key: Array, index: Array) -> Array:
            return ravel_pytree(self.start.draw(key, index))[0]

        return jax.vmap(one)(random.split(rng_key, num_particles), jnp.arange(num_particles))

    def split(self, position: Array, rows: BatchPlates | None = None) -> Split:
        """Both log densities at one position ``[D]``.

        :param rows: the :meth:`plate` whose elements' likelihoods are kept apart; from the prior only. What is observed
            outside it counts with the first.
        """
        state = self.unravel(position)
        if isinstance(self.start, _Prior):
            return self.start.split(state, rows)
        assert rows is None
        ends = self.start.ends(state)
        return Split(ends.base, ends.target - ends.base)

    def plate(self, name: str) -> BatchPlates:
        """The plate whose elements are the rows of the data.

        :raises ValueError: naming it, if nothing is observed in it; naming the sites, if there are latents in it.
        """
        frames = {site["name"]: {f.name: f for f in site["cond_indep_stack"]} for site in self._sample_sites()}
        inside = [site for site in self._sample_sites() if name in frames[site["name"]]]
        latents = [f"'{site['name']}'" for site in inside if is_latent(site) and not is_point(site["fn"])]
        if latents:
            raise ValueError(
                f"{self.user}: the latent site{'s' * (len(latents) > 1)} {', '.join(latents)} "
                f"{'stand' if len(latents) > 1 else 'stands'} in plate '{name}': a new row of the data would bring "
                f"latents of its own, which the particles do not have. Temper the likelihood instead "
                f"(tempering='adaptive'), or integrate these latents out."
            )
        observed = [site for site in inside if is_observed(site)]
        if not observed:
            known = ", ".join(dict.fromkeys(f"'{plate}'" for plates in frames.values() for plate in plates))
            raise ValueError(
                f"{self.user}: nothing is observed in a plate '{name}', whose elements were to be the rows of the data "
                f"(plates of the model: {known or 'none'}). Name the plate around the observations with data_plate, or "
                f"put them in numpyro.plate('{name}', number of rows)."
            )
        frame = frames[observed[0]["name"]][name]
        return BatchPlates((name,), (frame.dim,), (frame.size,))

    def values(self, position: Array) -> Values:
        """Values of latent and deterministic sites at one position, in their supports. The missing values of a site
        with ``obs_mask`` are in the site that holds the observed ones too."""
        state = self.unravel(position)
        if isinstance(self.start, _Prior):
            trace = self.start.trace_at(state)
        else:
            trace = self._trace(self._at_values(self.start.values(state)))
        return {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "deterministic" or (is_latent(site) and not is_dummies(name, trace))
        }

    def site_log_densities(self, position: Array) -> dict[str, Array]:
        """Log density of every sample site of the model at one position, without Jacobians: to name the culprit."""
        state = self.unravel(position)
        if isinstance(self.start, _Prior):
            trace = self.start.trace_at(state)
        else:
            trace = self._trace(self._at_values(self.start.values(state)))
        names = [name for name, site in trace.items() if site["type"] == "sample"]
        return {name: log_density(trace[name], _WHOLE) for name in names if not _is_jacobian(name, trace)}

    def _sample_sites(self) -> list[Site]:
        return [site for site in self._sites.values() if site["type"] == "sample"]

    def _at_values(self, values: Values) -> Program:
        return handlers.substitute(handlers.seed(self.model, self.rng_key), data=values)

    def _trace(self, program: Program) -> dict[str, Site]:
        with TRACING, handlers.block():
            return with_proper_dummies(handlers.trace(program).get_trace(*self.args, **self.kwargs))

    def _check(self, trace: dict[str, Site], from_prior: bool) -> None:
        latent = {name: site for name, site in trace.items() if is_latent(site)}
        discrete = [f"'{name}'" for name, site in latent.items() if site["fn"].support.is_discrete]
        if discrete:
            raise ValueError(
                f"{self.user}: the latent site{'s' * (len(discrete) > 1)} {', '.join(discrete)} "
                f"{'are' if len(discrete) > 1 else 'is'} discrete, and moves need a density over the reals. Sum over "
                f"the states in the model (dist.MixtureSameFamily, or numpyro.factor with the log-sum-exp), or sample "
                f"an enumerated model with MCMC(DiscreteHMCGibbs(...))."
            )
        for site in latent.values() if from_prior else ():
            if not is_point(site["fn"]):
                check_bijection(site, self.user)
        for name, scale in plate_scales(trace).items():
            if scale != 1.0:
                raise ValueError(
                    f"{self.user}: plate '{name}' is subsampled, so every evaluation would have another target. Give "
                    f"the plate its full size (no subsample_size)."
                )
        for name, site in latent.items() if from_prior else ():
            if is_improper(site):
                raise ValueError(_improper(self.user, name))


class _Prior:
    """Starting from the prior: the interface of :class:`~numpyro_smc.programs.guide_target.GuideTarget`."""

    def __init__(self, owner: UnconstrainedModel, trace: dict[str, Site]) -> None:
        self.owner = owner
        self.moving = {name for name, site in trace.items() if is_latent(site) and not is_point(site["fn"])}

    def draw(self, rng_key: Array, index: Array) -> Values:
        del index
        trace = self.owner._trace(handlers.seed(self.owner.model, rng_key))
        return {name: biject_to(trace[name]["fn"].support).inv(trace[name]["value"]) for name in self.moving}

    def trace_at(self, state: Values) -> dict[str, Site]:
        owner = self.owner
        at_state = handlers.substitute(owner.model, substitute_fn=partial(_unconstrain_reparam, state))
        return owner._trace(handlers.seed(at_state, owner.rng_key))

    def split(self, state: Values, rows: BatchPlates | None) -> Split:
        trace = self.trace_at(state)
        base, likelihood = jnp.zeros(()), jnp.zeros(())
        by_row = jnp.zeros(() if rows is None else rows.shape)
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            drawn = name in self.moving
            if drawn or _is_jacobian(name, trace):
                unscaled = unscaled_log_density(site, _WHOLE)
                base = base + unscaled
                if drawn and site["scale"] is not None:
                    # The draws know nothing of handlers.scale: what it adds is tempered with the likelihood. The
                    # Jacobian is never scaled (NumPyro scales it), so that the target is the scaled density itself.
                    likelihood = likelihood + (log_density(site, _WHOLE) - unscaled)
            elif rows is not None and any(frame.name in rows.names for frame in site["cond_indep_stack"]):
                by_row = by_row + log_density(site, rows)
            else:
                likelihood = likelihood + log_density(site, _WHOLE)
        return Split(base, likelihood if rows is None else by_row.at[0].add(likelihood))


class FreeOfImproper(Messenger):
    """Give improper sites some value of their support, so that a model that has them can be read."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["value"] is None and is_improper(msg):
            fn = msg["fn"]
            msg["value"] = jnp.broadcast_to(fn.support.feasible_like(jnp.zeros(fn.shape())), fn.shape())


class RefuseImproper(Messenger):
    """Say by name which site cannot be drawn, where NumPyro's distribution only says that it has no sampler."""

    def __init__(self, fn: Program, user: str) -> None:
        super().__init__(fn)
        self.user = user

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["value"] is None and isinstance(innermost(msg["fn"]), ImproperUniform):
            raise cannot_be_drawn(msg["name"], msg["fn"], self.user)


def is_improper(site: Site) -> bool:
    """Whether a latent site's prior does not integrate to one: an improper distribution, or a masked one."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution):
            known = not isinstance(fn._mask, jax.core.Tracer)
            if not (known and np.all(fn._mask)):
                return True
        fn = fn.base_dist
    return isinstance(fn, ImproperUniform)


def _is_jacobian(name: str, trace: dict[str, Site]) -> bool:
    of = name.removeprefix("_").removesuffix("_log_det")
    return name == f"_{of}_log_det" and of in trace and is_observed(trace[name])


def _improper(user: str, name: str) -> str:
    return (
        f"{user}: the prior of site '{name}' is improper (ImproperUniform, or masked), so there are no draws of it to "
        f"start from and no evidence. Give it a proper prior, or start from a fitted guide: "
        f"init_guide=(guide, params). Data are masked at their own site, missing data by obs_mask."
    )
