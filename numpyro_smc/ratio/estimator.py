r"""A trained ratio :math:`\hat r(\theta, x) \approx p(x \mid \theta) / p(x)` and the posteriors it gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_smc.engines.checkpoint import save_pytree
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.simulator import Program, Simulations, Simulator, element_names
from numpyro_smc.ratio.datasets import NonfinitePolicy, RatioData
from numpyro_smc.ratio.finiteness import Finiteness, FinitenessWeights
from numpyro_smc.ratio.losses import RatioLoss
from numpyro_smc.ratio.marginals import Marginal
from numpyro_smc.ratio.posterior import RatioPosterior
from numpyro_smc.ratio.ratio_network import RatioNetwork, RatioWeights
from numpyro_smc.ratio.seen import Seen, check_finite, warn_beyond
from numpyro_smc.ratio.truncation import Box, draw_within
from numpyro_smc.samplers.smc_sampler import SMCSampler

_ROWS = 10_000
_MORE = 0x6D6F7265
_FEWEST_MORE = 1000
_MOST_PARTS = 100


class RatioEstimator:
    r"""What :meth:`NRE.train` returns.

    Observations may have a leading axis of independent ones with the same parameters: their log ratios are summed,

    .. math:: p(\theta \mid x_{1:n}) \propto p(\theta) \prod_i \hat r(\theta, x_i).

    The sum has n times the error of one, and no calibration.

    :ivar simulator: the :class:`~numpyro_smc.programs.simulator.Simulator`. **network**, **weights**, **loss** - what
        was trained, and how.
    Where simulations failed and were left out, :math:`\hat r` holds the probability of a finite output as well (see
    :mod:`numpyro_smc.ratio.finiteness`); outside a truncated prior's box it is zero.

    :ivar training: the record of the training; ``None`` after :meth:`NRE.load`.
    :ivar has_failures: whether simulations failed and were left out.
    :ivar elements: names of the parameters' elements, in the order of their vector ``[D]``.
    """

    def __init__(
        self,
        simulator: Simulator,
        network: RatioNetwork,
        weights: RatioWeights,
        loss: RatioLoss,
        *,
        box: Box | None = None,
        finiteness: FinitenessWeights | None = None,
        seen: Seen | None = None,
        nonfinite: NonfinitePolicy = "raise",
        description: str = "",
        training: Any = None,
    ) -> None:
        self.simulator, self.network, self.weights, self.loss = simulator, network, weights, loss
        self.box, self.description, self.training = box, description, training
        self.finiteness, self.seen, self.nonfinite = finiteness, seen, nonfinite
        self.has_failures = finiteness is not None and float(finiteness.log_share) < 0
        self._finiteness = Finiteness.beside(network) if self.has_failures else None
        self.elements = simulator.elements
        self._samplers: dict[Any, SMCSampler] = {}
        self._simulate = jax.jit(jax.vmap(lambda key: simulator.simulate(key)))
        self._prior = jax.jit(jax.vmap(simulator.prior))
        self._of_rows = jax.jit(self._log_ratios_of_rows, static_argnums=3)

    def __repr__(self) -> str:
        loss = type(self.loss).__name__
        return f"RatioEstimator of {', '.join(self.simulator.params)} given {self.simulator.observed}, {loss}"

    # ---- the ratio ----------------------------------------------------------------------------------------------

    def log_ratio(self, theta: Any, x: Any, params: Sequence[str] | None = None, context: Any = None) -> Array:
        r""":math:`\log \hat r(\theta_b, x)`; leading axes broadcast.

        :param theta: all parameters, ``[..., D]`` or a dict of sites; those not in ``params`` do not matter.
        :param x: outputs ``[..., *event]``.
        :param params: names of sites or elements :math:`\theta_b`; all by default.
        :param context: values of the context's sites, by name, or ``[..., C]``.
        :return: ``[...]``.
        :raises ValueError: for parameters whose marginal the estimator has not learned.
        """
        chosen = self.simulator.mask(params)
        if isinstance(theta, dict):
            unknown = set(theta) - set(self.simulator.params)
            if unknown:
                known = ", ".join(self.simulator.params)
                raise ValueError(f"RatioEstimator: theta has '{min(unknown)}', which is no parameter. Known: {known}.")
            theta = self.simulator.ravel(theta)
        theta, index, given = jnp.asarray(theta), self._check(chosen), self._context(context)
        if theta.shape[-1:] == chosen.shape and not isinstance(theta, jax.core.Tracer) and self.seen is not None:
            warn_beyond("parameters", self._named(chosen), theta[..., chosen], self.seen.theta[:, chosen], 3)
        features = self.network.features(self.weights, self._observation(x, given), given)
        return self._of_chosen(theta, features, chosen, index)

    def log_ratio_given(self, x_obs: Any, chosen: np.ndarray, context: Any = None) -> Callable[[Array], Array]:
        """The log ratio of one observation, or of several independent ones, as a function of ``[..., D]``."""
        features = self._features(x_obs, chosen, context)
        return lambda theta: self._summed(theta, features, chosen, self._check(chosen))

    def log_ratios_of(self, theta: Array, x_obs: Any, chosen: np.ndarray, context: Any = None) -> Array:
        """The same of many parameters ``[n, D]``, in parts, by a program that is compiled once for all observations."""
        features = self._features(x_obs, chosen, context)
        return self._of_rows(theta, features, jnp.asarray(chosen), self._check(chosen))

    def _log_ratios_of_rows(self, theta: Array, features: Array, chosen: Array, index: int | None) -> Array:
        def one(row: Array) -> Array:
            return self._summed(row, features, chosen, index)

        return lax.map(one, theta, batch_size=min(_ROWS, len(theta)))

    def _features(self, x_obs: Any, chosen: np.ndarray, context: Any) -> Array:
        x = jnp.asarray(x_obs, jnp.result_type(float))
        event = self.simulator.event_shape
        if x.shape[x.ndim - len(event) :] != event or x.ndim > len(event) + 1:
            raise ValueError(
                f"RatioEstimator: the observation has shape {x.shape}; expected {event}, as the simulator returns it, "
                f"or one leading axis more for independent observations. Use sample_many for separate problems."
            )
        self._check(chosen)
        given = self._context(context)
        return self.network.features(self.weights, self._observation(x, given), given)

    def _observation(self, x: Any, context: Any = None) -> Any:
        """What the network sees of an observation; bad input is found here."""
        shape = self.simulator.event_shape
        if isinstance(x, jax.core.Tracer) or np.shape(x)[np.ndim(x) - len(shape) :] != shape:
            return x
        x = self._as_seen(x)
        check_finite("observation", x)
        check_finite("context", context)
        if self.seen is not None:
            warn_beyond("observation", element_names("x", shape), x, self.seen.x, 5)
            warn_beyond("context", self.simulator.context_elements, context, self.seen.context, 5)
        return x

    def _summed(self, theta: Array, features: Array, chosen: Any, index: int | None) -> Array:
        """Summed over independent observations, if there are several."""
        if features.ndim == 1:
            return self._of_chosen(theta, features, chosen, index)
        return jnp.sum(self._of_chosen(theta[..., None, :], features, chosen, index), -1)

    def _of_chosen(self, theta: Array, features: Array, chosen: Any, index: int | None) -> Array:
        mask = chosen if self.network.has_masks else None
        found = self.network.log_ratio_of_features(self.weights, theta, features, mask)
        if self._finiteness is not None:
            assert self.finiteness is not None
            found = found + self._finiteness.log_factor(self.finiteness, theta, mask)
        if index is not None:
            found = found[..., index]
        if self.box is None:
            return found
        return jnp.where(self.box.contains(theta, chosen), found, -jnp.inf)

    def _check(self, chosen: np.ndarray) -> int | None:
        """Which of the fixed marginals is meant, if there are any."""
        if not np.any(chosen):
            known = ", ".join(self.elements)
            raise ValueError(f"RatioEstimator: a marginal of no parameter was asked for. Known: {known}.")
        if self.network.marginals is not None:
            wanted = tuple(chosen.tolist())
            if wanted in self.network.marginals:
                return self.network.marginals.index(wanted)
            known = "; ".join(", ".join(self._named(mask)) for mask in self.network.marginals)
            raise ValueError(
                f"RatioEstimator: the marginal of {', '.join(self._named(chosen))} was not learned. Known: {known}. "
                f"Train with it among marginals, or with masks=UniformMask() for all of them."
            )
        if not chosen.all() and not self.network.has_masks:
            raise ValueError(
                f"RatioEstimator: only the ratio of all parameters was learned, not that of "
                f"{', '.join(self._named(chosen))} alone. Train with masks=UniformMask(), or sample all parameters and "
                f"look at some."
            )
        return None

    def _named(self, mask: Any) -> list[str]:
        return [element for element, kept in zip(self.elements, mask, strict=True) if kept]

    def _context(self, context: Any) -> Array | None:
        if not self.simulator.context:
            if context is not None:
                raise ValueError("RatioEstimator: the simulator was read without context sites; leave context out.")
            return None
        if isinstance(context, dict):
            unknown = set(context) - set(self.simulator.context)
            if unknown:
                known = ", ".join(self.simulator.context)
                raise ValueError(f"RatioEstimator: context has '{min(unknown)}', which is no context. Known: {known}.")
            return self.simulator.ravel_context(context)
        if context is None:
            raise ValueError(
                f"RatioEstimator: pass context={{'{self.simulator.context[0]}': ...}} with the observation."
            )
        found, size = jnp.asarray(context, jnp.result_type(float)), self.simulator.context_size
        if found.shape[-1:] != (size,):
            names = ", ".join(self.simulator.context_elements)
            raise ValueError(
                f"RatioEstimator: the context has shape {found.shape}; expected [..., {size}], the numbers of {names}."
            )
        return found

    # ---- posteriors ---------------------------------------------------------------------------------------------

    def program(self, params: Sequence[str] | np.ndarray | None = None) -> Program:
        """The posterior as a NumPyro program of the observation (and the context): for samplers of many observations.

        :param params: parameters whose marginal ratio is taken; the others then follow their prior.
        """
        chosen = params if isinstance(params, np.ndarray) else self.simulator.mask(params)

        def posterior(x_obs: Any, context: Any = None) -> None:
            log_ratio = self.log_ratio_given(x_obs, chosen, context)
            if self.box is None:
                return self.simulator.posterior(log_ratio)()
            box = self.box
            return self.simulator.posterior(lambda theta: jnp.where(box.contains(theta), log_ratio(theta), -jnp.inf))()

        return posterior

    def posterior_model(self, x_obs: Any, params: Sequence[str] | None = None, context: Any = None) -> Program:
        """The posterior as an ordinary NumPyro model without arguments, for ``MCMC``, ``SVI`` and everything else.

        It has the parameters' sites and a factor; the simulator is compiled away.

        :param x_obs: the observation, or independent ones along a leading axis.
        :param params: parameters whose marginal ratio is taken; the others then follow their prior.
        :param context: values of the context's sites.
        """
        self.log_ratio_given(x_obs, self.simulator.mask(params), context)  # bad input is found here, not in a sampler
        return partial(self.program(params), self._as_seen(x_obs), context)

    def marginal(self, x_obs: Any, params: str | Sequence[str], context: Any = None) -> Marginal:
        """The posterior of some parameters.

        :param params: names of sites or elements, such as ``"theta[0]"``.
        """
        return Marginal(self, x_obs, params, context)

    def sample(
        self, rng_key: Array, x_obs: Any, params: Sequence[str] | None = None, context: Any = None, **options: Any
    ) -> RatioPosterior:
        """Sample the posterior by tempered sequential Monte Carlo, which finds every mode that the prior reaches.

        :param x_obs: the observation, or independent ones along a leading axis.
        :param params: parameters whose marginal ratio is taken; the others then follow their prior.
        :param options: of :class:`~numpyro_smc.SMCSampler`: ``num_particles``, ``moves``, ...
        :return: a :class:`RatioPosterior`.
        """
        self.log_ratio_given(x_obs, self.simulator.mask(params), context)
        arguments = (self._as_seen(x_obs), *(() if context is None else (self._context(context),)))
        result = self._sampler(params, options).run(rng_key, *arguments, progress_bar=False)
        return self._posterior(result, num_observations=np.ndim(x_obs) - len(self.simulator.event_shape))

    def sample_many(
        self, rng_key: Array, x: Any, params: Sequence[str] | None = None, context: Any = None, **options: Any
    ) -> list[RatioPosterior]:
        """Sample the posteriors of separate observations at once, in one compiled program.

        :param x: observations along a leading axis, ``[B, *event]`` or ``[B, n, *event]``.
        :param context: of each, ``[B, C]`` or values of the context's sites.
        :return: a :class:`RatioPosterior` of each.
        """
        x = jnp.asarray(x)
        if not len(x):
            raise ValueError("RatioEstimator.sample_many: there are no observations.")
        given = self._context(context)
        if given is not None and (given.ndim < 2 or len(given) != len(x)):
            raise ValueError(
                f"RatioEstimator.sample_many: the context has shape {given.shape}; expected one row for each of "
                f"{len(x)} observations, [{len(x)}, {self.simulator.context_size}]."
            )
        self._observation(x, given)
        x = self._as_seen(x)
        self.log_ratio_given(x[0], self.simulator.mask(params), None if given is None else given[0])
        arguments = (x, *(() if given is None else (given,)))
        results = self._sampler(params, options).run_many(rng_key, *arguments, progress_bar=False)
        return [self._posterior(result, x.ndim - 1 - len(self.simulator.event_shape)) for result in results]

    def _as_seen(self, x: Any) -> Array:
        """An observation as an array, changed by the function that replaced simulations that were not finite.

        A function that changes its own results as well is no replacement but a transform, which is the caller's.
        """
        x = jnp.asarray(x)
        if not callable(self.nonfinite) or isinstance(x, jax.core.Tracer):
            return x
        once = np.asarray(self.nonfinite(np.asarray(x).reshape(-1, *self.simulator.event_shape)))
        if not np.array_equal(once, np.asarray(self.nonfinite(once)), equal_nan=True):
            return x
        return jnp.asarray(once, x.dtype).reshape(x.shape)

    def _sampler(self, params: Sequence[str] | None, options: dict[str, Any]) -> SMCSampler:
        chosen = self.simulator.mask(params)
        key = (chosen.tobytes(), tuple(sorted(options.items())))
        try:
            hash(key)
        except TypeError:  # an array of temperatures, say: two of them are not told apart by any name
            return SMCSampler(self.program(chosen), **options)
        if key not in self._samplers:
            self._samplers[key] = SMCSampler(self.program(chosen), **options)
        return self._samplers[key]

    def _posterior(self, result: Any, num_observations: int) -> RatioPosterior:
        mass = 0.0 if self.box is None else self.box.log_prior_mass
        is_calibrated = self.loss.calibrated and not num_observations
        return RatioPosterior.of_run(result, is_calibrated=is_calibrated, log_prior_mass=mass)

    # ---- simulations --------------------------------------------------------------------------------------------

    def simulate(self, rng_key: Array, num: int) -> Simulations:
        """Fresh simulations from the whole prior, for diagnostics: **theta** ``[num, D]``, **x**, **context**.

        Those that are not finite are replaced as they were for the training, or, with ``nonfinite="drop"``, left out:
        then they are draws given a finite output.

        :raises ValueError: if some are not finite and nothing is to be done about it; if nearly all fail.
        """
        rng_key = one_key("RatioEstimator.simulate", rng_key)
        found = self._simulate(random.split(rng_key, num))
        if self.nonfinite != "drop":
            data = RatioData(found.theta, found.x, found.context, self.nonfinite)
            return found if self.nonfinite == "raise" else found._replace(x=jnp.asarray(data.x, found.x.dtype))
        parts, num_found = [_finite_rows(found)], 0
        for number in range(_MOST_PARTS):
            num_found = sum(len(part.theta) for part in parts)
            if num_found >= num:
                return jax.tree.map(lambda *rows: jnp.concatenate(rows)[:num], *parts)
            key = random.fold_in(rng_key, _MORE + number)
            parts.append(_finite_rows(self._simulate(random.split(key, max(num, _FEWEST_MORE)))))
        raise ValueError(f"RatioEstimator.simulate: nearly all simulations fail; only {num_found} are finite.")

    def prior(self, rng_key: Array, num: int) -> Array:
        """Draws of the parameters from the prior, within the box where it was truncated: ``[num, D]``."""
        rng_key = one_key("RatioEstimator.prior", rng_key)
        if self.box is not None:
            return draw_within(rng_key, self.simulator.prior, self.box, num)[0]
        return self._prior(random.split(rng_key, num))

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights to one file; :meth:`NRE.load` of an equal NRE reads it."""
        box = Box.everywhere(self.simulator.size) if self.box is None else self.box
        text = np.frombuffer(self.description.encode(), np.uint8)
        contents = {"description": text, "weights": self.weights, "box": box, "seen": self.seen}
        save_pytree(path, contents | {"finiteness": self.finiteness})


def _finite_rows(found: Simulations) -> Simulations:
    is_finite = [np.isfinite(np.asarray(leaf)).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(found)]
    return jax.tree.map(lambda leaf: leaf[np.all(is_finite, axis=0)], found)
