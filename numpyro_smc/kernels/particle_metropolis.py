r"""Pseudo-marginal Metropolis: parameters of a sequence model, their likelihood estimated by a particle filter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_smc.kernels import adaptation as adaptive
from numpyro_smc.kernels.adaptation import Adaptation
from numpyro_smc.kernels.correlated_noise import Noise
from numpyro_smc.kernels.estimated_likelihood import EstimatedLikelihood
from numpyro_smc.kernels.evidence_variance import EvidenceVariance, tune_num_particles
from numpyro_smc.kernels.pseudo_marginal import Place, Screen, Target, check_start
from numpyro_smc.programs.arguments import check_between, check_number, check_positive
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.global_latents import GlobalLatents, Values
from numpyro_smc.programs.inputs import as_data
from numpyro_smc.programs.kernel_program import KernelProgram
from numpyro_smc.programs.options import keeps_options_apart
from numpyro_smc.programs.resample import Decision
from numpyro_smc.programs.resampling import Scheme
from numpyro_smc.programs.sequence import Program
from numpyro_smc.programs.tracing import TRACING


class ParticleMetropolisState(NamedTuple):
    """One chain.

    - **i** - number of iterations made. **z** - unconstrained parameters by site, and with ``keep_paths`` the path by
      site, ``[T, ...]``, in its own support.
    - **log_evidence** - the estimate at ``z``, made when ``z`` was proposed. **log_prior** - with the Jacobian.
      **potential_energy** - minus their sum. **log_screen** - what ``screen`` says of ``z``; zero without.
    - **accept_prob** - of the last proposal; **mean_accept_prob** - since the chain, or the sampling, began.
    - **noise** - standard normal noise of the estimate, with ``correlation``. **adapt_state** - the proposal.
    - **rng_key** - for the next iteration.
    """

    i: Array
    z: Values
    log_evidence: Array
    log_prior: Array
    potential_energy: Array
    log_screen: Array
    accept_prob: Array
    mean_accept_prob: Array
    noise: Noise | None
    adapt_state: Adaptation
    rng_key: Array


class ParticleMetropolis(MCMCKernel):
    r"""Random-walk Metropolis on the parameters of a sequence model, with a particle filter's likelihood [1, 2].

    The global latents :math:`\theta` move in unconstrained space, :math:`z' = z + S\xi`, and are accepted with

    .. math:: \alpha = 1 \wedge \frac{p(z')\, \hat p(y \mid \theta')}{p(z)\, \hat p(y \mid \theta)},

    where :math:`\hat p(y \mid \theta)`, unbiased, is kept from when :math:`z` was proposed and never made anew. The
    chain has the exact posterior :math:`p(\theta \mid y)` as its law for **every** number of particles N; noise only
    makes it stick. Let :math:`\sigma^2 = \operatorname{var} \log \hat p(y \mid \theta)`: efficiency for a given time is
    highest near :math:`\sigma^2 = 1` [3] to 3.3 [4] (the better the proposal, the lower), and far above, chains stand
    still for long after a lucky estimate: look at ``log_evidence`` and at R-hat, and choose N with :meth:`tune`.

    :math:`S` is learned by adaptive Metropolis in the warm-up (500 iterations and more), and fixed thereafter. With
    ``keep_paths`` each proposal brings a path drawn from its filter, and samples are of
    :math:`p(\theta, x_{0:T-1} \mid y)`.

    With ``correlation`` :math:`\rho` the filter's draws are functions of standard normal noise u, and
    :math:`u' = \rho u + \sqrt{1 - \rho^2}\,\xi` is proposed together with z' [5]: the noises of both estimates then
    nearly cancel, and N may grow more slowly with T. It takes draws by location and scale or inverse distribution
    functions, and particles resampled in the order of their state (``sort``), best at every step: ``resample="always"``
    (autoregression, T=200, N=100, :math:`\rho=0.99`: half the variance of differences is 0.19, with ``"ess"`` 0.49,
    without correlation 5.9). With more dimensions it saves less: compare :meth:`tune`. Memory for u: O(NT) a chain.

    With ``screen`` proposals that a cheap deterministic likelihood rejects never see the filter [6]. That the result is
    exact needs ``screen`` to be above zero wherever the posterior is. Chains of ``chain_method="vectorized"`` run both
    stages in step, so there it saves no time.

    Cost: one filter pass, O(NT), an iteration. Memory O(N), with ``keep_paths`` O(NT).

    :param model: a NumPyro model with one ``scan`` and continuous global latents: latents before it that its steps use.
    :param num_particles: N.
    :param guide, resampler, resample, ess_threshold: as for :class:`~numpyro_smc.ParticleFilter`; twists count.
    :param params: values of ``param`` sites, such as a guide's trained ones, and of latents to condition on.
    :param step_size: standard deviation of the first proposals, in every unconstrained direction.
    :param target_accept_prob: what the warm-up adapts the scale to, within a factor of two of what suits the
        covariance. About 0.25 without noise; noise of variance one halves it.
    :param adapt_covariance: whether the warm-up learns the covariance, or the scale alone (without that bound).
    :param correlation: :math:`\rho`, in [0, 1). Zero draws anew.
    :param sort: ``"state"`` for scalar states, ``"hilbert"`` along a Hilbert curve, ``None`` for the one that fits.
    :param screen: ``(parameters by site, *args, **kwargs) ->`` scalar log likelihood, deterministic.
    :param keep_paths: whether samples have a path beside the parameters.
    :raises ValueError: for options that do not go together, and biased resampling schemes; when run, for models without
        global latents or with discrete ones, naming them, and for starts at which nothing explains the data.

    ``init_params`` are unconstrained, as ever; otherwise each chain starts at one of 16 draws from the prior, chosen by
    their estimated likelihoods (of up to 100, as long as these are zero). As a block of NumPyro's ``Gibbs`` give
    ``keep_paths=True`` and name parameters and path; :meth:`refresh` says why.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import MCMC
        >>> from numpyro_smc import ParticleMetropolis
        >>> def model(y):
        ...     phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(phi * x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> mcmc = MCMC(ParticleMetropolis(model, 20), num_warmup=50, num_samples=100, progress_bar=False)
        >>> mcmc.run(random.key(0), jnp.array([0.5, 0.1, -0.3]), extra_fields=("log_evidence", "accept_prob"))
        >>> mcmc.get_samples()["phi"].shape
        (100,)
        >>> bool(0.0 < mcmc.get_extra_fields()["accept_prob"].mean() < 1.0)
        True

    **References**

    1. *The pseudo-marginal approach for efficient Monte Carlo computations*, C. Andrieu, G. Roberts (2009)
    2. *Particle Markov chain Monte Carlo methods*, C. Andrieu, A. Doucet, R. Holenstein (2010)
    3. *On some properties of Markov chain Monte Carlo simulation methods based on the particle filter*, M. Pitt,
       R. Silva, P. Giordani, R. Kohn (2012)
    4. *On the efficiency of pseudo-marginal random walk Metropolis algorithms*, C. Sherlock, A. Thiery, G. Roberts,
       J. Rosenthal (2015)
    5. *The correlated pseudo-marginal method*, G. Deligiannidis, A. Doucet, M. Pitt (2018)
    6. *Delayed acceptance particle MCMC for exact inference in stochastic kinetic models*, A. Golightly, D. Henderson,
       C. Sherlock (2015); *Markov chain Monte Carlo using an approximation*, J. Christen, C. Fox (2005)
    """

    sample_field = "z"  # type: ignore[assignment]

    def __init__(
        self,
        model: Program,
        num_particles: int = 100,
        *,
        guide: Program | None = None,
        params: dict[str, Any] | None = None,
        resampler: str | Scheme = "systematic",
        resample: str | Decision = "ess",
        ess_threshold: float = 0.5,
        step_size: float = 1.0,
        target_accept_prob: float = 0.15,
        adapt_covariance: bool = True,
        correlation: float = 0.0,
        sort: str | None = None,
        screen: Screen | None = None,
        keep_paths: bool = False,
    ) -> None:
        user = type(self).__name__
        check_positive(user, num_particles=num_particles)
        check_between(user, 0.0, 1.0, "Use 0.0 for independent draws.", correlation=correlation)
        check_between(user, 1e-3, 1.0, target_accept_prob=target_accept_prob)
        check_number(user, "(0, inf)", step_size=step_size)
        if screen is not None and not callable(screen):
            raise ValueError(f"{user}: screen must be a function (params, *args, **kwargs) -> scalar, got {screen!r}.")
        self._likelihood = EstimatedLikelihood(
            model,
            int(num_particles),
            guide,
            params,
            resampler=resampler,
            resample=resample,
            ess_threshold=ess_threshold,
            keep_paths=keep_paths,
            correlated=correlation > 0.0,
            sort=sort,
            user=user,
        )
        self._step_size, self._adapt_covariance = step_size, adapt_covariance
        self._target_accept_prob = target_accept_prob
        self._correlation, self._screen = correlation, screen
        self._names: tuple[str, ...] | None = None  # of the parameters, known once it runs
        self._forget()

    def __repr__(self) -> str:
        name = getattr(self._likelihood.model, "__name__", self._likelihood.model)
        extra = f", correlation={self._correlation:g}" if self._correlation else ""
        return f"{type(self).__name__}({name}, num_particles={self.num_particles}{extra})"

    def __fingerprint__(self) -> tuple[Any, ...]:
        adapted = (self._step_size, self._adapt_covariance, self._target_accept_prob)
        return (*vars(self._likelihood).values(), self._correlation, self._screen, *adapted)

    @property
    def model(self) -> Program:
        """The program; run without keys at draws of parameters alone, it shows no likelihood of single observations."""
        likelihood = self._likelihood
        if likelihood.keep_paths and not likelihood.params:
            return likelihood.model
        return KernelProgram(likelihood.model, likelihood.params)

    @property
    def num_particles(self) -> int:
        return self._likelihood.num_particles

    @property
    def correlation(self) -> float:
        return self._correlation

    def with_particles(self, num_particles: int) -> ParticleMetropolis:
        """The same kernel with another number of particles."""
        check_positive(type(self).__name__, num_particles=num_particles)
        return self._with(num_particles=int(num_particles))

    def target(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Target:
        """What is evaluated at parameters: prior, estimated likelihood, screen."""
        return Target(self._likelihood, self._screen, *as_data(self._likelihood.user, (args, kwargs or {})))

    # ---- one chain, or several by their keys ------------------------------------------------------------------------

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> ParticleMetropolisState:
        """Chains at ``init_params``, or at draws from the prior at which the evidence is finite."""
        program = self._likelihood.checked(model_args, model_kwargs or {})
        state = self._compiled_start(rng_key, jnp.asarray(num_warmup), init_params, *program)
        if not isinstance(state.potential_energy, jax.core.Tracer):
            check_start(_place(state), init_params is not None, self._likelihood.user)
        return state

    def sample(
        self, state: ParticleMetropolisState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ParticleMetropolisState:
        """Propose, estimate, accept or not."""
        if not is_prng_key(state.rng_key):
            return jax.vmap(lambda one: self.sample(one, model_args, model_kwargs))(state)
        rng_key, direction_key, propose_key, accept_key = random.split(state.rng_key, 4)
        target, current = self.target(model_args, model_kwargs), _place(state)
        z, unravel = ravel_pytree(target.split(state.z)[0])
        parameters = unravel(z + state.adapt_state.scale_tril @ random.normal(direction_key, z.shape, z.dtype))
        place, passed, log_ratio = target.propose(propose_key, current, parameters, self._correlation)
        # Not a number between two places that are both impossible: starts are checked outside of transformations only.
        accept_prob = jnp.where(passed & ~jnp.isnan(log_ratio), jnp.minimum(jnp.exp(log_ratio), 1.0), 0.0)
        accepted = random.uniform(accept_key) < accept_prob
        place = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), place, current)
        reached = ravel_pytree(target.split(place.z)[0])[0]
        i, num_warmup = state.i + 1, state.adapt_state.num_warmup
        since = jnp.where(i <= num_warmup, i, i - num_warmup)
        return _state(
            place,
            i=i,
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / since,
            adapt_state=adaptive.adapt(
                state.adapt_state,
                state.i,
                reached,
                accepted,
                accept_prob,
                self._target_accept_prob,
                self._adapt_covariance,
            ),
            rng_key=rng_key,
        )

    def refresh(
        self, state: ParticleMetropolisState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ParticleMetropolisState:
        """The same parameters and path, with an estimate for the present values of other blocks' sites.

        A new, independent estimate in the place of the kept one would change the law of the chain. What leaves it as it
        is, is an estimate given the path, by conditional SMC: so ``keep_paths`` is needed, unless other blocks hold the
        whole path and the likelihood is exact.

        :raises ValueError: without a path, with correlated draws, and for schemes without a conditional version.
        """
        rng_key, key = random.split(state.rng_key)
        place = self.target(model_args, model_kwargs).refreshed(key, _place(state))
        return state._replace(**_fields(place), rng_key=rng_key)

    # ---- what MCMC and composite kernels ask for --------------------------------------------------------------------

    def wrap_model(self, wrapper: Callable) -> ParticleMetropolis:
        """The same kernel for wrapped programs: the guide is conditioned on other sites as the model is."""
        guide = self._likelihood.guide
        return self._with(model=wrapper(self._likelihood.model), guide=None if guide is None else wrapper(guide))

    def get_constrain_fn(self, model_args: Any, model_kwargs: Any) -> Callable[[Values], Values]:
        """Values in their supports. Composite kernels also ask without giving values of the other blocks' sites."""
        kwargs, likelihood, names = model_kwargs or {}, self._likelihood, self._names
        model, params, user = likelihood.model, likelihood.params, likelihood.user
        latents = GlobalLatents(model, model_args, kwargs, params, names=names, user=user)
        return lambda z: z | latents.constrain({name: z[name] for name in latents.names})

    def postprocess_fn(self, model_args: Any, model_kwargs: Any) -> Callable[[Values], Values]:
        """Values in their supports; deterministic sites of parameters alone, or with ``keep_paths`` all of them."""
        # Compiled, because MCMC also asks outside of its loop, once a run.
        program = as_data(self._likelihood.user, (model_args, model_kwargs or {}))
        return lambda z: self._compiled_values(z, *program)

    def get_diagnostics_str(self, state: ParticleMetropolisState) -> str:
        return (
            f"steps of size {float(state.adapt_state.step_size):.2e}, log evidence {float(state.log_evidence):.5g}, "
            f"acc. prob={float(state.mean_accept_prob):.2f}"
        )

    @keeps_options_apart("self._likelihood.model")
    def tune(
        self,
        rng_key: Array,
        *args: Any,
        target_variance: float = 1.0,
        at: dict[str, Any] | None = None,
        num_runs: int = 100,
        max_particles: int = 100_000,
        num_pilot: int = 500,
        **kwargs: Any,
    ) -> tuple[ParticleMetropolis, EvidenceVariance]:
        r"""The kernel with the number of particles at which the variance of the log evidence is as wanted.

        At one central parameter the variance is measured over independent runs of the filter, for N doubled or halved
        from ``num_particles`` on; the smallest N whose variance is at most the target is taken. With ``correlation`` it
        is half the variance of :math:`\log \hat p(u') - \log \hat p(u)`, which is the same thing where that is zero.

        :param args, kwargs: arguments of the model.
        :param target_variance: 1.0 is best for good proposals [3], 3.3 for random walks in many dimensions whose noise
            dominates [4]; a high target saves time an iteration, a low one risks less where the variance differs
            over the posterior.
        :param at: the central parameter, by site, in its support; ``None`` for the mean, in unconstrained space, of
            ``num_pilot`` iterations after as many of warm-up.
        :param num_runs: runs of the filter for each N. The standard error of a variance is :math:`\sqrt{2/R}` of it.
        :param max_particles: where doubling ends.
        :return: a new kernel, and what was measured, with a table and a plot.
        :raises ValueError: if the variance is above the target at every N tried.
        """
        return tune_num_particles(self, rng_key, args, kwargs, target_variance, at, num_runs, max_particles, num_pilot)

    def __getstate__(self) -> dict[str, Any]:
        compiled = ("_compiled_start", "_compiled_values", "_sample_fn")
        return {name: value for name, value in self.__dict__.items() if name not in compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Nothing is compiled yet."""
        self._compiled_start = Compiled(self._start)
        self._compiled_values = Compiled(self._values)
        # MCMC initialises again, although it is given a state, unless there is something of this name.
        self._sample_fn = self.sample

    def _with(self, **changes: Any) -> ParticleMetropolis:
        kernel = copy.copy(self)
        kernel._likelihood = copy.copy(self._likelihood)
        for name, value in changes.items():
            setattr(kernel._likelihood, name, value)
        kernel._forget()
        return kernel

    def _start(
        self, rng_key: Array, num_warmup: Array, init_params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ParticleMetropolisState:
        if not is_prng_key(rng_key):
            return jax.vmap(lambda key, z: self._start(key, num_warmup, z, args, kwargs))(rng_key, init_params)
        target = self.target(args, kwargs)
        latents, in_gibbs = target.latents, GIBBS_SITES_KWARG in kwargs
        self._names = latents.names
        rng_key, start_key, refresh_key = random.split(rng_key, 3)
        if init_params is None:
            place = target.start(start_key)
        elif in_gibbs:  # it gives values in their supports, of the path's sites too
            place = target.at(start_key, latents.unconstrain({name: init_params[name] for name in latents.names}))
        else:
            latents.check(init_params)
            place = target.at(start_key, dict(init_params))
        if in_gibbs:
            place = target.refreshed(refresh_key, place)
        adaptation = adaptive.start(ravel_pytree(target.split(place.z)[0])[0], self._step_size, num_warmup)
        zero = jnp.zeros(())
        return _state(
            place, i=jnp.asarray(0), accept_prob=zero, mean_accept_prob=zero, adapt_state=adaptation, rng_key=rng_key
        )

    def _values(self, z: Values, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
        target = self.target(args, kwargs)
        parameters, path = target.split(z)
        if not self._likelihood.keep_paths:
            return target.latents.values(parameters)
        values = path | target.latents.constrain(parameters)
        given = handlers.substitute(
            handlers.seed(self._likelihood.model, random.key(0)), data=self._likelihood.params | values
        )
        with TRACING, handlers.block():
            trace = handlers.trace(given).get_trace(*args, **kwargs)
        return values | {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}


def _place(state: ParticleMetropolisState) -> Place:
    return Place(*(getattr(state, name) for name in Place._fields))


def _fields(place: Place) -> dict[str, Any]:
    return place._asdict() | {"potential_energy": -(place.log_prior + place.log_evidence)}


def _state(place: Place, **rest: Any) -> ParticleMetropolisState:
    return ParticleMetropolisState(**_fields(place), **rest)
