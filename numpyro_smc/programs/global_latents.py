r"""The global latents of a sequence model: its parameters, as functions of unconstrained values.

Global are the latents before the scan that the steps use directly, and what their priors depend on. With
:math:`\theta = T(z)` their values in the supports, the prior density of :math:`z` is

.. math:: \log p(z) = \log p(\theta) + \log |T'(z)|,

and the likelihood :math:`p(y \mid \theta)`, data about global latents included, is a particle filter's to estimate.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.infer.util import _unconstrain_reparam
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.programs.bootstrap import Bootstrap
from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import Overwrite
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.scans import Trace, run_prefix
from numpyro_smc.programs.sequence import Program
from numpyro_smc.programs.sites import BatchPlates, is_latent, log_density, plate_scales, unscaled_log_density
from numpyro_smc.programs.supports import check_bijection
from numpyro_smc.programs.unconstrained import FreeOfImproper, is_improper

Values = dict[str, Array]

_WHOLE = BatchPlates()


class GlobalLatents:
    """The global latents of a sequence model at given arguments. Build it where it is used: under ``jit``, inside.

    All methods are pure functions of one dict of values by site, for use under ``vmap``, ``jit`` and ``grad``.

    :param model: a NumPyro model with one ``scan``.
    :param args, kwargs: its arguments.
    :param params: values of ``param`` sites, and of latents to condition on, which are then not among the global ones.
    :param names: only these of the global latents, whose supports and priors must not depend on the others.
    :param user: who asks, for error messages.
    :ivar names: the names of the sites, sorted. **length** - of the scan.
    :raises ValueError: if there are none; naming the site, for discrete ones; naming the plate, if it is subsampled;
        and for programs that cannot be filtered.
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        params: Values | None = None,
        *,
        names: tuple[str, ...] | None = None,
        user: str = "GlobalLatents",
    ) -> None:
        self.user = user
        self.params = dict(params or {})
        self._program = handlers.substitute(partial(model, *args, **(kwargs or {})), data=self.params)
        free = FreeOfImproper(model)
        key = random.key(0)
        sequence = read_sequence(key, free, Bootstrap(model), self.params, args, kwargs or {}, user=user)
        self.length = sequence.length
        self._sites = sequence.model.prefix
        found = tuple(sorted(sequence.global_values.keys() - self.params.keys()))
        self.names = found if names is None else names
        self._check(plate_scales(sequence.model.prefix))

    def draw(self, rng_key: Array) -> Values:
        """Unconstrained values drawn from the prior.

        :raises ValueError: naming the site, for an improper prior.
        """
        for name in self.names:
            if is_improper(self._sites[name]):
                raise ValueError(
                    f"{self.user}: the prior of site '{name}' is improper (ImproperUniform, or masked), so no value "
                    f"can be drawn from it. Give it a proper prior; a kernel of MCMC also takes a start (init_params, "
                    f"unconstrained)."
                )
        return self._to_reals(run_prefix(self._program, CloudDraws(rng_key))[0])

    def unconstrain(self, values: Values) -> Values:
        """Unconstrained values of given values in the supports.

        :raises ValueError: naming the sites that are missing.
        """
        self._check_names(values)
        at_values = handlers.substitute(self._program, data={name: values[name] for name in self.names})
        return self._to_reals(run_prefix(at_values, CloudDraws(random.key(0)))[0])

    def constrain(self, z: Values) -> Values:
        """Values in the supports."""
        trace = self._at(z)
        return {name: trace[name]["value"] for name in self.names}

    def log_prior(self, z: Values) -> Array:
        r""":math:`\log p(z)`, a scalar, up to the constants of improper priors."""
        trace = self._at(z)
        total = jnp.zeros(())
        for name in self.names:
            total = total + log_density(trace[name], _WHOLE)
            if (jacobian := f"_{name}_log_det") in trace:
                total = total + unscaled_log_density(trace[jacobian], _WHOLE)
        return total

    def values(self, z: Values) -> Values:
        """Values in the supports, and the deterministic sites before the scan that depend on nothing else random."""
        trace = self._at(z)
        fixed = {name: trace[name]["value"] for name in self._deterministic()}
        return {name: trace[name]["value"] for name in self.names} | fixed

    def check(self, z: Values) -> None:
        """:raises ValueError: unless ``z`` has unconstrained values of every global latent, in their shapes."""
        self._check_names(z)
        expected = jax.eval_shape(lambda: self._to_reals(self._sites))
        for name in self.names:
            if jnp.shape(z[name]) != expected[name].shape:
                raise ValueError(
                    f"{self.user}: the given value of site '{name}' has shape {jnp.shape(z[name])}; unconstrained "
                    f"values of it have shape {expected[name].shape}. Values of several chains have one more leading "
                    f"axis, of length num_chains."
                )

    def _at(self, z: Values) -> Trace:
        program = handlers.substitute(self._program, substitute_fn=partial(_unconstrain_reparam, z))
        return run_prefix(program, CloudDraws(random.key(0)))[0]

    def _to_reals(self, trace: Trace) -> Values:
        return {name: biject_to(trace[name]["fn"].support).inv(trace[name]["value"]) for name in self.names}

    def _deterministic(self) -> list[str]:
        latents = {name: site["value"] for name, site in self._sites.items() if is_latent(site)}

        def deterministic(**values: Array) -> Values:
            trace = run_prefix(self._program, CloudDraws(random.key(0)), Overwrite(values))[0]
            return {name: jnp.asarray(site["value"]) for name, site in trace.items() if site["type"] == "deterministic"}

        uses = eval_provenance(deterministic, **latents)
        return [name for name, used in uses.items() if used <= set(self.names) | self.params.keys()]

    def _check_names(self, values: Values) -> None:
        missing = [f"'{name}'" for name in self.names if name not in values]
        unknown = [f"'{name}'" for name in values if name not in self.names]
        if missing or unknown:
            found = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(unknown)} unknown"] * bool(
                unknown
            )
            raise ValueError(
                f"{self.user}: values were given of other sites than the global latents "
                f"{', '.join(map(repr, self.names))}: {'; '.join(found)}. Give values of these, and no other."
            )

    def _check(self, scales: dict[str, float]) -> None:
        if not self.names:
            raise ValueError(
                f"{self.user}: the model has no global latent, no latent before the scan that its steps use directly, "
                f"so there are no parameters to sample. Sample paths alone with ConditionalSMC(model) or "
                f"ParticleFilter(model); a parameter that reaches the steps in the carry is made global by "
                f"infer={{'particle': False}} at its site."
            )
        discrete = [f"'{name}'" for name in self.names if self._sites[name]["fn"].support.is_discrete]
        if discrete:
            raise ValueError(
                f"{self.user}: the global latent site{'s' * (len(discrete) > 1)} {', '.join(discrete)} "
                f"{'are' if len(discrete) > 1 else 'is'} discrete, and moves need a density over the reals. Sum over "
                f"the values in the model, condition the model on one, or update the site in a block of its own "
                f"(numpyro.infer.Gibbs with DiscreteGibbs)."
            )
        for name in self.names:
            check_bijection(self._sites[name], self.user)
        for name, scale in scales.items():
            if scale != 1.0:
                raise ValueError(
                    f"{self.user}: plate '{name}' is subsampled, so every evaluation would have another target. Give "
                    f"the plate its full size (no subsample_size)."
                )
