"""What all multi-sample estimators share: particles, weights per plate element, and the surrogate of the gradient."""

import warnings
from collections.abc import Collection
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.infer.elbo import ELBO
from numpyro.util import find_stack_level

from numpyro_smc.engines.schedules import Schedule, value_now
from numpyro_smc.programs.arguments import check_between, check_if_given, check_positive
from numpyro_smc.programs.density import Densities, Pair, Params, Program, is_point, over_particles
from numpyro_smc.programs.sites import Site, in_control_flow, is_one


class Coefficients(NamedTuple):
    r"""An estimator, as ascent coefficients of the particles' gradients.

    - **model** - :math:`A_k`, of :math:`\nabla_\theta \log p(x, z_k)`, shape ``[K, ...]``.
    - **guide** - :math:`B_k`, of :math:`\nabla_\phi \log q(z_k)` at fixed :math:`z_k`, shape ``[K, ...]``.
    - **value** - the bound, shape ``[...]``.
    - **path** - :math:`P_k`, of :math:`\partial_z \log w_k \, \nabla_\phi z_k(\phi)`; ``None`` for zero.
    """

    model: Array
    guide: Array
    value: Array
    path: Array | None = None


class MultiSampleELBO(ELBO):
    r"""Base of the multi-sample bounds and their gradient estimators.

    :math:`K` draws :math:`z_k` from the guide have log weights :math:`\ell_k = \log p(x, z_k) - \log q(z_k)`, one per
    element of the plates that enclose every sample site of model and guide, one for the whole model if there are none.
    A subclass is a pure function :meth:`coefficients` of the log weights; this class does everything else, once: the
    loss is minus the bound, summed over plate elements and scaled to the full data, and its gradient is that of the
    surrogate :math:`\sum_k A_k \log p(x, z_k) + B_k \log q(z_k)` (of each plate element) with fixed coefficients.
    ``handlers.scale`` and masks act inside the weights, the scale of subsampled enclosing plates outside.

    :param num_particles: :math:`K`.
    :param alpha: order :math:`\alpha \in [0, 1)` of the Renyi bound
        :math:`\frac1{1-\alpha}\log\frac1K\sum_k w_k^{1-\alpha}` (0: the importance-weighted bound, towards 1: the
        evidence lower bound), or a schedule of the step; see :func:`~numpyro_smc.log_schedule`. Schedules need the
        optimiser wrapped in :class:`~numpyro_smc.StepwiseOptim`.
    :param num_mc: number of independent bounds that are averaged.
    :param kl_weight: factor of :math:`\log q(z) - \log p(z)` in the log weights, or a schedule (KL warm-up).
    :param free_bits: lower limit (nats) of each latent site's :math:`\log q(z_l) - \log p(z_l)`, per draw and element.
    :param plates: ``"auto"``: the plates that enclose every site and whose elements the programs prove independent;
        names of plates that must be so; or ``None`` for whole-model weights.
    :param batch_size: particles evaluated at a time. Memory, that of the gradient included, then does not grow with
        :math:`K`; time grows by one more evaluation.
    :raises ValueError: for arguments out of range; and, while tracing, naming the site: for latents that model and
        guide do not share, shapes that differ, and subsampled plates that do not enclose every site.
    """

    can_infer_discrete = True
    _fewest_particles = 1
    _is_explicit = True
    _has_one_objective = True

    def __init__(
        self,
        num_particles: int,
        *,
        alpha: float | Schedule = 0.0,
        num_mc: int = 1,
        kl_weight: float | Schedule = 1.0,
        free_bits: float = 0.0,
        plates: str | Collection[str] | None = "auto",
        batch_size: int | None = None,
    ) -> None:
        user = type(self).__name__
        check_positive(user, num_particles=num_particles, num_mc=num_mc)
        if num_particles < self._fewest_particles:
            raise ValueError(
                f"{user}: num_particles must be at least {self._fewest_particles}, because each particle's baseline "
                f"comes from the others; got {num_particles}."
            )
        if not callable(alpha):
            check_between(
                user, 0.0, 1.0, alpha=alpha, remedy="For the evidence lower bound, alpha = 1, use Trace_ELBO."
            )
        if not callable(kl_weight):
            check_between(user, 0.0, inf, kl_weight=kl_weight)
        check_between(user, 0.0, inf, free_bits=free_bits)
        if plates is not None and (isinstance(plates, str) or not isinstance(plates, Collection)) and plates != "auto":
            raise ValueError(f"{user}: plates must be 'auto', None or a collection of names, got {plates!r}.")
        check_if_given(user, batch_size=batch_size)
        super().__init__(num_particles=int(num_particles))
        self.alpha, self.kl_weight, self.free_bits = alpha, kl_weight, float(free_bits)
        self.num_mc, self.plates, self.batch_size = num_mc, plates, batch_size

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        """The estimator: coefficients of the particles' gradients, and the bound.

        :param log_weights: shape ``[K, ...]``; ``-inf`` marks a dead particle, whose model coefficient is zero.
        :param alpha: order of the Renyi bound.
        """
        raise NotImplementedError

    def loss_with_mutable_state(  # type: ignore[override]
        self, rng_key: Array, param_map: Params, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        user = type(self).__name__
        plate_key, cloud_key, auxiliary_key, other_key = random.split(rng_key, 4)
        pair = Pair(model, guide, args, kwargs, plate_key, self.plates, user, self.num_particles)
        kl_weight = value_now(self.kl_weight, "kl_weight", user)
        cloud = self._cloud(pair, cloud_key, param_map, self.num_particles)
        self._check(cloud)
        log_weights = cloud.log_weights(kl_weight, self.free_bits)
        if self._num_extra:
            extra = self._cloud(pair, auxiliary_key, lax.stop_gradient(param_map), self._num_extra)
            log_weights = jnp.concatenate([log_weights, extra.log_weights(kl_weight, self.free_bits)])
        alpha = value_now(self.alpha, "alpha", user)
        coefficients = lax.stop_gradient(self._weigh(lax.stop_gradient(log_weights), alpha, cloud))
        used = coefficients._replace(
            model=coefficients.model[: self.num_particles], guide=coefficients.guide[: self.num_particles]
        )
        surrogate = self._surrogate(cloud, used, kl_weight)
        bound = jnp.mean(coefficients.value + (surrogate - lax.stop_gradient(surrogate)), axis=0)
        loss = -jnp.sum(bound) * cloud.plates.scale
        other = self._other_loss(other_key, pair, param_map, cloud, coefficients)
        loss = loss + (other - lax.stop_gradient(other))
        return {"loss": loss, "mutable_state": self._new_state(cloud, coefficients) or None}

    @property
    def _num_extra(self) -> int:
        """Draws beyond ``num_particles`` that only serve as baselines."""
        return 0

    def _cloud(self, pair: Pair, rng_key: Array, params: Params, num: int) -> Densities:
        """Densities of ``num`` particles in each of the averaged bounds, ``[num, num_mc, *plates]``."""

        def particle(rng_key: Array, index: Array) -> Densities:
            return self._particle(pair, rng_key, index, params)

        cloud = over_particles(particle, rng_key, num * self.num_mc, self.batch_size)
        return jax.tree.map(lambda x: x.reshape(num, self.num_mc, *x.shape[1:]), cloud)

    def _particle(self, pair: Pair, rng_key: Array, index: Array, params: Params) -> Densities:
        raise NotImplementedError

    def _check(self, cloud: Densities) -> None:
        if cloud.shared_params and not self._has_one_objective:
            warnings.warn(
                f"{type(self).__name__}: model and guide share the parameters {sorted(cloud.shared_params)}, but do "
                f"not ascend the same objective; these get the sum of both gradients. Give the guide its own.",
                stacklevel=find_stack_level(),
            )
        if self.free_bits and set(cloud.log_q) != set(cloud.log_prior):
            odd = sorted(set(cloud.log_q) ^ set(cloud.log_prior))
            raise ValueError(
                f"{type(self).__name__}: free_bits compares each latent site with the same site of the guide, and "
                f"{odd} have no counterpart. Use a guide that samples the model's sites directly."
            )

    def _weigh(self, log_weights: Array, alpha: Any, cloud: Densities) -> Coefficients:
        return self.coefficients(log_weights, alpha)

    def _surrogate(self, cloud: Densities, coefficients: Coefficients, kl_weight: Any) -> Array:
        """Per averaged bound and plate element, a function with the gradient of the estimator."""
        model, guide, *_ = coefficients
        # Where the explicit log q and the score are the same function, their coefficients are added before any
        # rounding: the sum can be a thousand times smaller than its terms.
        is_plain = not self._is_explicit or (is_one(kl_weight) and not self.free_bits)
        merged = set(cloud.score) if not self._is_explicit else cloud.unscaled if is_plain else set()
        weights = cloud.with_fixed_guide(merged).log_weights(kl_weight, self.free_bits)
        total = weighted_sum(model, weights)
        for name, score in cloud.score.items():
            total = total + weighted_sum(guide if name in merged else model + guide, score)
        return total

    def _other_loss(
        self, rng_key: Array, pair: Pair, params: Params, cloud: Densities, coefficients: Coefficients
    ) -> Array:
        """A further loss, whose gradient is added and whose value is not."""
        return jnp.zeros(())

    def _new_state(self, cloud: Densities, coefficients: Coefficients) -> dict[str, Any]:
        """New values of mutable sites."""
        if cloud.mutable and self.num_particles * self.num_mc > 1:
            raise NotImplementedError(
                f"{type(self).__name__}: mutable site '{next(iter(cloud.mutable))}' would get one state per particle. "
                f"Freeze the running statistics (evaluation mode), use a layer without state such as layer "
                f"normalisation, or num_particles=1."
            )
        return jax.tree.map(lambda x: x[0, 0], cloud.mutable)


class ScoreFunctionELBO(MultiSampleELBO):
    r"""Base of the estimators that need no reparameterisation: gradients of draws by their score function.

    :param pathwise: which latent sites of the guide get pathwise gradients instead: none, all that have a
        reparameterised sampler (``True``: hybrid guides with discrete sites), or those named. Point masses always do.
    """

    def __init__(self, num_particles: int, *, pathwise: bool | Collection[str] = False, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if isinstance(pathwise, str):
            raise ValueError(f"{type(self).__name__}: pathwise must be a bool or a collection of names.")
        self.pathwise = pathwise if isinstance(pathwise, bool) else frozenset(pathwise)

    def _is_score(self, site: Site) -> bool:
        if is_point(site["fn"]):
            return False
        if isinstance(self.pathwise, bool):
            return not (self.pathwise and site["fn"].has_rsample)
        if site["name"] in self.pathwise and not site["fn"].has_rsample:
            raise ValueError(
                f"{type(self).__name__}: pathwise names site '{site['name']}', but its distribution "
                f"{type(site['fn']).__name__} has no reparameterised sampler."
            )
        return site["name"] not in self.pathwise

    def _particle(self, pair: Pair, rng_key: Array, index: Array, params: Params) -> Densities:
        guide_key, model_key = random.split(rng_key)
        draw = pair.draw(guide_key, index, params, self._is_score)
        if self.pathwise:
            self._check_names(pair, draw.trace)
        elif any(in_control_flow(site) for site in draw.trace.values()):
            # Inside a scan a path cannot be cut: drawn with fixed parameters, then evaluated at these values.
            draw = pair.redraw(guide_key, index, params, pair.draw(guide_key, index, lax.stop_gradient(params)))
        model = pair.run_model(model_key, index, params, draw)
        return pair.densities(draw, model, self._is_score)

    def _check_names(self, pair: Pair, guide: dict[str, Site]) -> None:
        for name in self.pathwise if isinstance(self.pathwise, frozenset) else ():
            if name not in guide:
                raise ValueError(f"{pair.user}: pathwise names site '{name}', which the guide does not have.")
        for name, site in guide.items():
            if site["type"] != "sample" or site["is_observed"] or not in_control_flow(site):
                continue
            if self._is_score(site) and site["fn"].has_rsample:
                raise NotImplementedError(
                    f"{pair.user}: site '{name}' is drawn inside a scan of the guide, where its pathwise gradient "
                    f"cannot be cut. Name it in `pathwise` too, or use pathwise=False."
                )


class PathwiseELBO(MultiSampleELBO):
    """Base of the estimators that differentiate through the guide's draws."""

    can_infer_discrete = False

    def _draw(self, pair: Pair, rng_key: Array, index: Array, params: Params) -> Any:
        draw = pair.draw(rng_key, index, params)
        for name, site in draw.trace.items():
            if site["type"] == "sample" and not site["is_observed"] and not site["fn"].has_rsample:
                raise ValueError(
                    f"{pair.user}: site '{name}' of the guide ({type(site['fn']).__name__}) has no reparameterised "
                    f"sampler, so its gradient would be wrong. Use VIMCO, OVIS or Reinforce, with pathwise=True if "
                    f"other sites are reparameterised."
                )
        return draw


def weighted_sum(coefficients: Array, log_densities: Array) -> Array:
    """Sum over particles of fixed coefficients times log densities; a zero coefficient silences ``-inf``."""
    silent = coefficients == 0.0
    return jnp.sum(jnp.where(silent, 0.0, coefficients * jnp.where(silent, 0.0, log_densities)), axis=0)
