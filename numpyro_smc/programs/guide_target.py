r"""A guide and its model as the two ends of a path, in unconstrained space.

The state :math:`u` holds the guide's latent sites (auxiliary ones included, point masses not), each mapped to the reals
by the bijection :math:`z = T(u)` of its support. The ends are the densities

.. math:: \log q_0(u) = \sum_s \log q(z_s) + \log |T'(u)|, \qquad
   \log f(u) = \log p(x, z) - \sum_{\text{point masses}} \log q + \log |T'(u)|,

so that :math:`f / q_0` is the pair's importance weight, and annealing from one to the other estimates the evidence.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions.transforms import biject_to
from numpyro.primitives import Messenger

from numpyro_smc.programs.density import Densities, Draw, Pair, Params, is_point
from numpyro_smc.programs.sites import BatchPlates, Site, in_control_flow, is_latent, plate_scales, sum_per_problem
from numpyro_smc.programs.supports import check_bijection

State = dict[str, Array]


class Ends(NamedTuple):
    """Log densities of the two ends of the path at one state, each of the shape of the enclosing plates."""

    base: Array
    target: Array


class GuideTarget:
    """The two ends of the path of one model/guide pair at given parameters.

    :param pair: the programs and their arguments.
    :param params: parameters of both.
    :param rng_key: key of whatever else the programs draw (``numpyro.prng_key``), the same for every state.
    :raises ValueError: naming the site, for discrete latents and for enclosing plates that are not the leftmost
        dimensions of a latent site.
    :raises NotImplementedError: for latent sites inside a scan.
    """

    def __init__(self, pair: Pair, params: Params, rng_key: Array) -> None:
        self.pair, self.params, self.rng_key = pair, params, rng_key
        found = jax.eval_shape(self._densities_of_draw)
        self.plates: BatchPlates = found.plates
        self.narrow, self.masked = found.narrow, found.masked

    def draw(self, rng_key: Array, index: Array) -> State:
        """A draw from the guide."""
        trace = self.pair.draw(rng_key, index, self.params).trace
        moving = {name: site for name, site in trace.items() if moves(site)}
        return {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in moving.items()}

    def ends(self, state: State) -> Ends:
        """Log densities at a state."""
        densities, log_jacobian = self._densities_at(state)
        fixed = [value for name, value in densities.log_q.items() if name in state]
        points = [value for name, value in densities.log_q.items() if name not in state]
        base = sum(fixed, start=log_jacobian)
        target = densities.log_likelihood + sum(densities.log_prior.values(), start=log_jacobian)
        return Ends(base, target - sum(points, start=jnp.zeros_like(base)))

    def values(self, state: State) -> dict[str, Array]:
        """Values of the guide's latent sites in their supports, without auxiliary ones."""
        trace = self.pair.run_guide(self.rng_key, self.params, _AtState(state)).trace
        latent = {name: site for name, site in trace.items() if is_latent(site)}
        return {name: site["value"] for name, site in latent.items() if not site["infer"].get("is_auxiliary")}

    def _densities_of_draw(self) -> Densities:
        draw = self.pair.draw(self.rng_key, jnp.asarray(0), self.params)
        model = self._model(draw)
        densities = self.pair.densities(draw, model, moves=True)
        for name, scale in (plate_scales(draw.trace) | plate_scales(model)).items():
            if scale != 1.0 and name not in densities.plates.names:
                raise ValueError(
                    f"{self.pair.user}: plate '{name}' is subsampled inside the dynamics, so the path would end at "
                    f"another density than the model's. Put every site inside the plate, or use the full data."
                )
        for name, site in draw.trace.items():
            if is_latent(site):
                self._check(name, site, densities.plates)
        return densities

    def _densities_at(self, state: State) -> tuple[Densities, Array]:
        at = _AtState(state)
        draw = self.pair.run_guide(self.rng_key, self.params, at)
        densities = self.pair.densities(draw, self._model(draw), moves=True)
        zeros = jnp.zeros_like(densities.log_likelihood)
        return densities, sum((sum_per_problem(j, densities.plates) for j in at.log_jacobians), start=zeros)

    def _model(self, draw: Draw) -> dict[str, Site]:
        return self.pair.run_model(self.rng_key, None, self.params, draw)

    def _check(self, name: str, site: Site, plates: BatchPlates) -> None:
        user = self.pair.user
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"{user}: site '{name}' is discrete, and annealing moves along gradients. Marginalise it in the model "
                f"(dist.MixtureSameFamily), or use VIMCO or OVIS."
            )
        if in_control_flow(site):
            raise NotImplementedError(
                f"{user}: site '{name}' is drawn inside a scan of the guide. Propose the whole path as one site, or "
                f"use FIVO or SIXO."
            )
        if moves(site):
            check_bijection(site, user)
        rank = len(site["fn"].batch_shape)
        if moves(site) and plates.dims != tuple(range(-rank, -rank + len(plates.dims))):
            raise ValueError(
                f"{user}: plates {list(plates.names)} enclose both programs but are not the leftmost batch dimensions "
                f"of site '{name}' (batch shape {site['fn'].batch_shape}). Give them the outermost dimensions."
            )


class _AtState(Messenger):
    """Give moving sites the values of a state, and collect the log Jacobians."""

    def __init__(self, state: State) -> None:
        super().__init__(None)
        self.state = state
        self.log_jacobians: list[Array] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["name"] not in self.state:
            return
        transform = biject_to(msg["fn"].support)
        unconstrained = self.state[msg["name"]]
        msg["value"] = transform(unconstrained)
        log_jacobian = transform.log_abs_det_jacobian(unconstrained, msg["value"])
        # What the support does not count as one event, the distribution may.
        extra = jnp.ndim(log_jacobian) - len(msg["fn"].batch_shape)
        self.log_jacobians.append(jnp.sum(log_jacobian, axis=tuple(range(-extra, 0))) if extra > 0 else log_jacobian)


def moves(site: Site) -> bool:
    """Whether a site of the guide is part of the state."""
    return is_latent(site) and not is_point(site["fn"])
