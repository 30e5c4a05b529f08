"""AutoDSMCS: a differentiable annealed sampler as an automatic guide."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from numpyro import handlers
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoGuide
from numpyro.infer.util import log_density

from numpyro_smc.elbo.annealed_runs import draw
from numpyro_smc.elbo.dsmcs import DSMCS
from numpyro_smc.evidence.estimate import Evidence, log_mean_and_error
from numpyro_smc.programs.arguments import check_callable, check_positive, named
from numpyro_smc.programs.density import Params, Program
from numpyro_smc.programs.sites import Site, in_control_flow, is_latent, plate_scales
from numpyro_smc.programs.supports import Supported
from numpyro_smc.programs.tracing import TRACING
from numpyro_smc.reports.annealing import AnnealingDiagnostics


class AutoDSMCS(AutoGuide):
    r"""Automatic guide that draws from a differentiable SMC sampler between a base guide and the model [1].

    It runs :class:`~numpyro_smc.DSMCS` and emits one particle :math:`z`, drawn by its final weight, with the density
    :math:`\log q(z) := \log p(x, z) - \log \hat Z`. So with ``Trace_ELBO`` the loss is the sampler's bound,

    .. math:: \mathbb E[\log p(x, z) - \log q(z)] = \mathbb E[\log \hat Z] \le \log p(x),

    and base guide, sampler and model parameters are trained together: ``param`` sites of the model take their present
    values inside the dynamics too. Value and gradient: those of :class:`~numpyro_smc.DSMCS`. Cost: its cost, and one
    evaluation of the model.

    Use ``Trace_ELBO`` (or ``IWELBO``), not losses that take :math:`\log q` apart by site (``TraceMeanField_ELBO``,
    ``TraceGraph_ELBO``). For subsampled plates use :class:`~numpyro_smc.DSMCS` itself.

    :param model: a NumPyro model whose latent sites are continuous.
    :param num_transitions: :math:`K \ge 0`.
    :param num_particles: :math:`N \ge 1`.
    :param base: the guide to start from: a guide of the model, or a function that makes one of the model; by default
        ``AutoDiagonalNormal(model, init_scale=0.5)``. A scale of 0.5 to 1 is a good start; NumPyro's 0.1 is too narrow.
    :param prefix: of the parameters of the default base guide.
    :param options: other arguments of :class:`~numpyro_smc.DSMCS`; ``resample="never"`` gives annealed importance
        sampling.
    :raises ValueError: for options that :class:`~numpyro_smc.DSMCS` refuses; when called, naming the site, for discrete
        latents, latents that the base guide lacks, and subsampled plates.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Predictive, Trace_ELBO
        >>> from numpyro_smc import AutoDSMCS
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        ...     numpyro.sample("y", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=y)
        >>> y = jnp.array([0.5, -1.2, 3.0])
        >>> guide = AutoDSMCS(model, num_transitions=4, num_particles=8)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
        >>> params = svi.run(random.key(0), 5, y, progress_bar=False).params
        >>> guide.sample_posterior(random.key(1), params, y, sample_shape=(100,))["scale"].shape
        (100,)
        >>> print(guide.log_evidence(random.key(2), params, y).method)
        AutoDSMCS

    **References**

    1. *Resampling Gradients Vanish in Differentiable Sequential Monte Carlo Samplers*, J. Zenn, R. Bamler (2023)
    """

    def __init__(
        self,
        model: Program,
        num_transitions: int = 8,
        num_particles: int = 16,
        *,
        base: Program | Callable[[Program], Program] | None = None,
        prefix: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(model, prefix=prefix)
        if isinstance(base, type):
            self.base: Any = base(model)
        else:
            self.base = AutoDiagonalNormal(model, prefix=prefix, init_scale=0.5) if base is None else base
        with named("AutoDSMCS"):
            self.sampler = DSMCS(num_particles, num_transitions, **options)
        check_callable("AutoDSMCS", base=self.base)
        self._wrapped = self.sampler.wrap(self.base)

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", self.model)
        return (
            f"AutoDSMCS({name}, num_transitions={self.sampler.schedule.num_transitions}, "
            f"num_particles={self.sampler.num_particles}, base={type(self.base).__name__})"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPyro's own word on the missing key
            rng_key = numpyro.prng_key()
        if rng_key is None:
            raise ValueError("AutoDSMCS: it draws at random; call it under handlers.seed.")
        params_key, path_key, model_key = random.split(rng_key, 3)
        params = self._present_params(params_key, args, kwargs)
        with TRACING, handlers.block():
            run_key, path = self.sampler.path(path_key, params, self.model, self.base, args, kwargs)
            drawn, log_evidence = draw(run_key, path, self.sampler, remat=self.sampler.remat)
            seeded = handlers.seed(Supported(self.model), model_key)
            log_joint, sites = log_density(seeded, args, kwargs, {**params, **drawn})
        self._check(sites)
        values = self._emit(sites)
        numpyro.factor(f"{self.prefix}_log_q", log_joint - jnp.sum(log_evidence))
        return values

    def sample_posterior(
        self, rng_key: Array, params: Params, *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of the latent sites, each from a run of the sampler of its own, ``[*sample_shape, ...]``."""
        draws = self.sampler.sample_posterior(
            rng_key, params, self.model, self.base, *args, num_samples=math.prod(sample_shape), **kwargs
        )
        return {name: value.reshape(*sample_shape, *value.shape[1:]) for name, value in draws.items()}

    def median(
        self, params: Params, *args: Any, rng_key: Array | None = None, num_samples: int = 1000, **kwargs: Any
    ) -> dict[str, Array]:
        """Median of every latent site: of the base guide, or, with an ``rng_key`` and the model's arguments, of draws.

        :raises NotImplementedError: if the base guide's is asked for and it has none.
        """
        if rng_key is None:
            return self._of_base("median")(params)
        return self._quantiles_of_draws(rng_key, params, 0.5, num_samples, args, kwargs)

    def quantiles(
        self,
        params: Params,
        quantiles: Sequence[float],
        *args: Any,
        rng_key: Array | None = None,
        num_samples: int = 1000,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Quantiles of every latent site, ``[len(quantiles), ...]``: of the base guide, or, with an ``rng_key`` and the
        model's arguments, of draws.

        :raises NotImplementedError: if the base guide's are asked for and it has none.
        """
        if rng_key is None:
            return self._of_base("quantiles")(params, quantiles)
        return self._quantiles_of_draws(rng_key, params, jnp.asarray(quantiles), num_samples, args, kwargs)

    def log_evidence(
        self, rng_key: Array, params: Params, *args: Any, num_replicates: int = 64, **kwargs: Any
    ) -> Evidence:
        """Log of the mean of :math:`\\hat Z` over independent runs, with its standard error.

        :return: an :class:`~numpyro_smc.Evidence`; the estimate of the evidence itself is unbiased.
        """
        check_positive("AutoDSMCS.log_evidence", num_replicates=num_replicates)
        found = self.diagnostics(rng_key, params, *args, num_runs=num_replicates, **kwargs).log_evidence
        _, path = self.sampler.path(rng_key, params, self.model, self.base, args, kwargs)
        value, error, ess = log_mean_and_error(found)
        return Evidence("AutoDSMCS", num_replicates, value, error, ess, path.target.plates, jnp.mean(found, axis=0))

    def diagnostics(
        self, rng_key: Array, params: Params, *args: Any, num_runs: int = 16, **kwargs: Any
    ) -> AnnealingDiagnostics:
        """What runs of the sampler do; see :meth:`numpyro_smc.DSMCS.diagnostics`."""
        return self.sampler.diagnostics(rng_key, params, self.model, self.base, *args, num_runs=num_runs, **kwargs)

    def _present_params(self, rng_key: Array, args: Any, kwargs: Any) -> Params:
        """State the parameters of base guide, sampler and model, and take their values from the handlers outside."""
        base_key, model_key = random.split(rng_key)
        with TRACING, handlers.trace() as trace, handlers.block(hide_fn=lambda site: site["type"] != "param"):
            proposed = handlers.trace(handlers.seed(self._wrapped, base_key)).get_trace(*args, **kwargs)
            handlers.seed(handlers.replay(self.model, trace=proposed), model_key)(*args, **kwargs)
        return {name: site["value"] for name, site in trace.items()}

    def _check(self, sites: dict[str, Site]) -> None:
        for name, scale in plate_scales(sites).items():
            if scale != 1.0:
                raise ValueError(
                    f"AutoDSMCS: plate '{name}' is subsampled, and a guide that weighs whole problems cannot follow. "
                    f"Use SVI(model, loss.wrap(guide), optim, loss) with loss=DSMCS(...), or the full plate."
                )
        for name, site in sites.items():
            if site["type"] == "mutable":
                raise NotImplementedError(f"AutoDSMCS: the model has mutable state '{name}', which it cannot update.")

    def _emit(self, sites: dict[str, Site]) -> dict[str, Array]:
        values: dict[str, Array] = {}
        plates: dict[str, numpyro.plate] = {}
        for name, site in sites.items():
            if not is_latent(site):
                continue
            # A site of a scan is one event here, its time axis included.
            inside = in_control_flow(site)
            with ExitStack() as stack:
                for frame in () if inside else site["cond_indep_stack"]:
                    plates.setdefault(frame.name, numpyro.plate(frame.name, frame.size, dim=frame.dim))
                    stack.enter_context(plates[frame.name])
                event_dim = jnp.ndim(site["value"]) if inside else site["fn"].event_dim
                values[name] = numpyro.sample(name, dist.Delta(site["value"], event_dim=event_dim))
        return values

    def _of_base(self, what: str) -> Callable[..., dict[str, Array]]:
        if not isinstance(self.base, AutoGuide):
            raise NotImplementedError(
                f"AutoDSMCS.{what}: the base guide is a plain program and has none. Pass rng_key and the model's "
                f"arguments, for the {what} of draws."
            )
        return getattr(self.base, what)

    def _quantiles_of_draws(
        self, rng_key: Array, params: Params, levels: Any, num_samples: int, args: Any, kwargs: Any
    ) -> dict[str, Array]:
        draws = self.sample_posterior(rng_key, params, *args, sample_shape=(num_samples,), **kwargs)
        return {name: jnp.quantile(value, levels, axis=0) for name, value in draws.items()}
