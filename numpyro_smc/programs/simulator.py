r"""A simulator written as a NumPyro program: parameters, hidden draws, and an output.

Of its sample sites the named ones are the parameters :math:`\theta`; the output :math:`x` is any site, observed or
deterministic. All else that the program draws is hidden: :math:`p(x \mid \theta)` integrates over it, and nobody can
evaluate it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, random
from numpyro import handlers
from numpyro.infer.inspect import get_dependencies

from numpyro_smc.programs.element_priors import (
    bounds_of_elements,
    constant_elements,
    density_of_elements,
    is_factorized,
    is_on_surface,
)
from numpyro_smc.programs.hidden_draws import Hides, is_tractable
from numpyro_smc.programs.sites import Site, in_control_flow, is_latent, plate_scales
from numpyro_smc.programs.tracing import TRACING
from numpyro_smc.programs.unconstrained import RefuseImproper

Program = Callable[..., Any]
Values = dict[str, Array]

_NUM_PROBES = 16


class Simulations(NamedTuple):
    """Independent runs of a simulator, a row each: **theta** ``[n, D]``, **x** ``[n, *event]``, **context** ``[n, C]``
    or ``None``.

    Parameters and contexts are raveled one site after the other, in their supports.
    """

    theta: Array
    x: Array
    context: Array | None


class Simulator:
    """What a ratio estimator must know of a simulator.

    :param model: a NumPyro program without arguments (``functools.partial`` binds them).
    :param params: names of the sample sites that are inferred, in the order in which they are raveled.
    :param observed: name of the output's site, or of several, which are then raveled and joined.
    :param context: names of sample sites that are drawn for training and known when there is data, such as a noise
        level or a design.
    :param user: who asks, for error messages.
    :raises ValueError: naming the site, if it is unknown, discrete, observed, or inside a scan; if a parameter's prior
        depends on anything that is not a parameter; if a plate is subsampled.
    """

    def __init__(
        self,
        model: Program,
        params: Sequence[str],
        observed: str | Sequence[str] = "x",
        context: Sequence[str] = (),
        *,
        user: str = "NRE",
    ) -> None:
        self.model, self.user = model, user
        _check_program(model, user)
        self.params = _names(params, "params", user)
        self.observed = _names(observed, "observed", user)
        self.context = _names(context, "context", user) if len(context) else ()
        trace = _trace(handlers.seed(RefuseImproper(model, user), random.key(0)))
        self._check(trace)
        self._sites = {name: trace[name] for name in self.params}
        self.shapes = {name: jnp.shape(trace[name]["value"]) for name in (*self.params, *self.context)}
        self.size = sum(int(np.prod(self.shapes[name])) for name in self.params)
        self.context_size = sum(int(np.prod(self.shapes[name])) for name in self.context)
        self.event_shape = jax.eval_shape(lambda: self._output(trace)).shape
        self.elements = tuple(element for name in self.params for element in element_names(name, self.shapes[name]))
        self.context_elements = tuple(e for name in self.context for e in element_names(name, self.shapes[name]))
        self.visible = self._visible(trace)
        self.hidden = frozenset(trace) - self.visible
        self.has_tractable_likelihood = is_tractable(model, trace, self.params, self.observed, self.context)

    # ---- vectors ------------------------------------------------------------------------------------------------

    def ravel(self, values: Values) -> Array:
        """Parameters as one vector, ``[..., D]``; leading axes are kept.

        :raises ValueError: if a site's value is missing or of another shape.
        """
        self._check_values(values, self.params, "parameter", "theta")
        return self._ravel(values, self.params)

    def ravel_context(self, values: Values) -> Array:
        """Context as one vector, ``[..., C]``.

        :raises ValueError: if a site's value is missing or of another shape.
        """
        self._check_values(values, self.context, "context site", "context")
        return self._ravel(values, self.context)

    def unravel(self, theta: Array) -> Values:
        """Parameters by site from vectors ``[..., D]``."""
        sizes = [int(np.prod(self.shapes[name])) for name in self.params]
        parts = jnp.split(theta, np.cumsum(sizes)[:-1], axis=-1)
        return {
            name: part.reshape(*theta.shape[:-1], *self.shapes[name])
            for name, part in zip(self.params, parts, strict=True)
        }

    def mask(self, names: Sequence[str] | None) -> np.ndarray:
        """Which elements of the parameters are meant: bool ``[D]``.

        :param names: of sites, or of elements such as ``"theta[0]"``; ``None`` for all.
        :raises ValueError: for unknown names, and if there are none.
        """
        if names is None:
            return np.ones(self.size, bool)
        names = [names] if isinstance(names, str) else list(names)
        if not names:
            raise ValueError(f"{self.user}: a marginal of no parameter was asked for. Known: {', '.join(self.params)}.")
        chosen = np.zeros(self.size, bool)
        for name in names:
            inside = [element == name or element.startswith(f"{name}[") for element in self.elements]
            if not any(inside) or (name not in self.params and name not in self.elements):
                raise ValueError(f"{self.user}: no parameter '{name}'. Known: {', '.join(self.elements)}.")
            chosen |= np.asarray(inside)
        return chosen

    # ---- running ------------------------------------------------------------------------------------------------

    def simulate(self, rng_key: Array, theta: Array | None = None) -> Simulations:
        """One run, as vectors without a leading axis. Map it over keys for many.

        :param theta: parameters ``[D]`` instead of a draw from the prior.
        """
        program = self.model if theta is None else handlers.substitute(self.model, data=self.unravel(theta))
        trace = _trace(handlers.seed(program, rng_key))
        values = {name: trace[name]["value"] for name in (*self.params, *self.context)}
        context = self._ravel(values, self.context) if self.context else None
        return Simulations(self.ravel(values), self._output(trace), context)

    def prior(self, rng_key: Array) -> Array:
        """One draw of the parameters, ``[D]``; the compiler removes what the parameters do not need."""
        return self.simulate(rng_key).theta

    def posterior(self, log_ratio: Callable[[Array], Array]) -> Program:
        """The program of the parameters' sites alone, with ``log_ratio`` of their vector as a factor.

        Sites that the rest of the program draws get a fixed key and are shown to no handler, so that nothing but the
        priors remains once it is compiled. Deterministic sites of the parameters alone stay.
        """

        def posterior() -> None:
            with TRACING, Hides(self.hidden), handlers.trace() as trace:
                self.model()
            theta = self.ravel({name: trace[name]["value"] for name in self.params})
            numpyro.factor("log_ratio", log_ratio(theta))

        return posterior

    def prior_of_elements(self, chosen: np.ndarray) -> Callable[[Array], Array]:
        """Joint prior log density of some elements of the parameters, as a function of their vector ``[k]``.

        :param chosen: bool ``[D]``.
        :raises ValueError: naming the site, where it has no closed form: some of the elements of a site whose
            distribution is neither factorised nor multivariate normal, or a site whose prior depends on parameters that
            are not wholly chosen.
        """
        parts: list[Callable[[Array], Array]] = []
        ends: list[int] = []
        last = 0
        for name in self.params:
            first, last = last, last + int(np.prod(self.shapes[name]))
            indices = np.flatnonzero(chosen[first:last])
            if not len(indices):
                continue
            if not self._is_free(name):
                raise ValueError(
                    f"{self.user}: the prior of site '{name}' depends on other parameters, so its marginal has no "
                    f"density in closed form. Use sir or sample, which need none."
                )
            parts.append(density_of_elements(self._sites[name], name, indices, self.user))
            ends.append((ends[-1] if ends else 0) + len(indices))

        def log_density(values: Array) -> Array:
            pieces = jnp.split(values, ends[:-1])
            return jnp.sum(jnp.stack([part(piece) for part, piece in zip(parts, pieces, strict=True)]))

        return log_density

    def priors(self) -> dict[str, Any]:
        """The distributions of the parameters' sites, at one draw of whatever they depend on."""
        return {name: site["fn"] for name, site in self._sites.items()}

    def check_axes(self, chosen: np.ndarray, user: str) -> None:
        """:raises ValueError: naming the site, where chosen elements cannot vary freely, as those of a simplex."""
        first = 0
        for name in self.params:
            last = first + int(np.prod(self.shapes[name]))
            if chosen[first:last].any() and is_on_surface(self._sites[name]):
                raise ValueError(
                    f"{user}: site '{name}' ({type(self._sites[name]['fn']).__name__}) has elements that cannot vary "
                    f"freely, so its density has no values on a grid. Use sir or sample."
                )
            first = last

    def are_independent_of_others(self, chosen: np.ndarray) -> bool:
        """Whether the chosen elements are known to be independent of the others under the prior."""
        if chosen.all():
            return True
        first = 0
        for name in self.params:
            last = first + int(np.prod(self.shapes[name]))
            cut = chosen[first:last].any() and not chosen[first:last].all()
            if not self._is_free(name) or (cut and not is_factorized(self._sites[name])):
                return False
            first = last
        return True

    def constant(self) -> np.ndarray:
        """Which elements of the parameters are the same in all draws though others of their site are not, such as the
        zeros of a triangular matrix: bool ``[D]``."""
        return np.concatenate([constant_elements(self._sites[name]) for name in self.params])

    def support(self) -> np.ndarray:
        """Bounds of the parameters' elements, infinite where there are none: ``[D, 2]``."""
        return np.concatenate([bounds_of_elements(self._sites[name]) for name in self.params])

    def _check_values(self, values: Values, names: Sequence[str], what: str, argument: str) -> None:
        for name in names:
            if name not in values:
                raise ValueError(f"{self.user}: {what} '{name}' has no value; pass {argument}={{'{name}': ...}}.")
            shape, expected = jnp.shape(values[name]), self.shapes[name]
            if shape[len(shape) - len(expected) :] != expected:
                raise ValueError(f"{self.user}: {what} '{name}' has shape {shape}, but {expected} is expected.")

    # ---- reading ------------------------------------------------------------------------------------------------

    def _ravel(self, values: Values, names: Sequence[str]) -> Array:
        parts, dtype = [], jnp.result_type(float)
        for name in names:
            value = jnp.asarray(values[name], dtype)
            parts.append(value.reshape(*value.shape[: value.ndim - len(self.shapes[name])], -1))
        return jnp.concatenate(parts, -1)

    def _output(self, trace: dict[str, Site]) -> Array:
        outputs = [jnp.asarray(trace[name]["value"], jnp.result_type(float)) for name in self.observed]
        return outputs[0] if len(outputs) == 1 else jnp.concatenate([jnp.ravel(output) for output in outputs])

    def _check(self, trace: dict[str, Site]) -> None:
        known = ", ".join(name for name, site in trace.items() if site["type"] in ("sample", "deterministic"))
        for name in (*self.params, *self.observed, *self.context):
            if name not in trace:
                raise ValueError(f"{self.user}: the simulator has no site '{name}'. Its sites: {known or 'none'}.")
        for name in (*self.params, *self.context):
            site = trace[name]
            if not is_latent(site):
                raise ValueError(
                    f"{self.user}: site '{name}' is {'observed' if site['type'] == 'sample' else site['type']}; "
                    f"parameters and context must be sample sites without obs, to be drawn from their priors."
                )
            if in_control_flow(site):
                raise ValueError(f"{self.user}: site '{name}' stands inside a scan or cond. Draw it before.")
            if name in self.params and site["fn"].support.is_discrete:
                raise ValueError(
                    f"{self.user}: parameter '{name}' is discrete, and the posterior's samplers need a density over "
                    f"the reals. Leave it out of params (it is then integrated over), or give it a continuous prior."
                )
        twice = set(self.params) & {*self.observed, *self.context}
        if twice:
            raise ValueError(f"{self.user}: site '{min(twice)}' is named as parameter and as something else.")
        for name in self.observed:
            if trace[name]["type"] not in ("sample", "deterministic"):
                raise ValueError(f"{self.user}: site '{name}' is a {trace[name]['type']}; observe a value instead.")
            if trace[name]["type"] == "sample" and trace[name]["is_observed"]:
                raise ValueError(
                    f"{self.user}: site '{name}' has obs=..., so the simulator would repeat it. Bind the data to None."
                )
        for name, scale in plate_scales(trace).items():
            if scale != 1.0:
                raise ValueError(f"{self.user}: plate '{name}' is subsampled; a simulator must draw all of it.")

    def _probe(self, values: Values, keys: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Prior log densities and deterministic sites at given parameters, under several hidden draws."""

        def probe(key: Array) -> tuple[dict[str, Array], dict[str, Array]]:
            trace = _trace(handlers.seed(handlers.substitute(self.model, data=values), key))
            densities = {name: jnp.sum(trace[name]["fn"].log_prob(trace[name]["value"])) for name in self.params}
            fixed = [name for name, site in trace.items() if site["type"] == "deterministic"]
            return densities, {name: trace[name]["value"] for name in fixed if name not in self.observed}

        return jax.jit(jax.vmap(probe))(keys)

    def _visible(self, trace: dict[str, Site]) -> frozenset[str]:
        """Parameters, and deterministic sites of them alone.

        :raises ValueError: naming the site, if a parameter's prior depends on a hidden draw.
        """
        values = {name: trace[name]["value"] for name in self.params}
        densities, fixed = self._probe(values, random.split(random.key(1), _NUM_PROBES))
        for name, found in densities.items():
            if not _is_constant(found):
                raise ValueError(
                    f"{self.user}: the prior of parameter '{name}' depends on {self._culprit(name)}, so its density "
                    f"p({name}) is not known in closed form. Add that site to params, or fix it."
                )
        return frozenset(self.params) | {name for name, found in fixed.items() if _is_constant(found)}

    def _culprit(self, name: str) -> str:
        try:
            found = get_dependencies(self.model)["prior_dependencies"][name]
        except Exception:  # whatever the program does that NumPyro cannot inspect
            found = {}
        sites = [f"'{site}'" for site in found if site != name and site not in self.params]
        return f"the hidden site{'s' * (len(sites) > 1)} {', '.join(sites)}" if sites else "a hidden draw"

    @cache  # noqa: B019
    def _is_free(self, name: str) -> bool:
        """Whether a parameter's prior is the same whatever the other parameters are."""
        program = handlers.substitute(self.model, data={name: self._sites[name]["value"]})

        def log_density(key: Array) -> Array:
            site = _trace(handlers.seed(program, key))[name]
            return jnp.sum(site["fn"].log_prob(site["value"]))

        return _is_constant(jax.jit(jax.vmap(log_density))(random.split(random.key(2), _NUM_PROBES)))


def _trace(program: Program) -> dict[str, Site]:
    with TRACING, handlers.block():
        return handlers.trace(program).get_trace()


def _check_program(model: Program, user: str) -> None:
    if not callable(model):
        raise ValueError(f"{user}: the simulator must be a program, got {model!r}.")
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):  # of a callable that does not say
        return
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise ValueError(
            f"{user}: the simulator takes no arguments, but needs {', '.join(needed)}; bind them by functools.partial."
        )


def _names(names: str | Sequence[str], argument: str, user: str) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{user}: {argument} must name at least one site, each once; got {names!r}.")
    return found


def element_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Names of an array's elements, as they are raveled: ``"x"`` of a number, ``"x[0,1]"`` of an array."""
    return [f"{name}[{','.join(map(str, index))}]" if index else name for index in np.ndindex(*shape)]


def _is_constant(values: Array) -> bool:
    """Whether all rows are the same, to rounding."""
    found = np.asarray(values)
    return bool(np.allclose(found, found[:1], rtol=1e-5, atol=1e-6, equal_nan=True))
