"""Per-datapoint local optimisation: the best variational distribution of every datum under a fixed model."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.engines.identity import identity
from numpyro_smc.guides.data_rows import DataRows, check_rows, data_rows, inspector
from numpyro_smc.guides.local_search import GAUSSIANS, optima
from numpyro_smc.guides.resumable import over_rows
from numpyro_smc.programs.arguments import check_number, check_positive
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import Params, Program
from numpyro_smc.programs.inputs import checked_call
from numpyro_smc.reports.summaries import mean_and_error

_USER = "LocalOptimizer"


@dataclass(frozen=True, repr=False)
class LocalOptimum:
    r"""What :class:`LocalOptimizer` found, per datum: arrays ``[N]`` (of the data done, if ``interrupted``).

    - **elbo**, **elbo_error** - :math:`L[q^*]` on fresh draws, and its Monte Carlo standard error.
    - **iwae**, **iwae_error** - log of the mean weight of the same draws.
    - **params** - parameters of each datum's distribution, ``[N, ...]``, constrained.
    - **num_steps** - steps of the start that was best, 0 where it was not bettered by them; **start** - its number;
      **converged** - whether its loss had stopped to fall, rather than ``max_steps`` being reached.
    - **family** - its name; **interrupted** - whether Ctrl-C came before the last datum.
    """

    family: str
    elbo: np.ndarray
    elbo_error: np.ndarray
    iwae: np.ndarray
    iwae_error: np.ndarray
    num_steps: np.ndarray
    start: np.ndarray
    converged: np.ndarray
    params: dict[str, Any]
    interrupted: bool = False

    def table(self) -> list[dict[str, Any]]:
        """Means over data, with their standard errors from the spread between data."""
        rows = []
        for name in ("elbo", "iwae", "num_steps"):
            mean, error = mean_and_error(getattr(self, name))
            rows.append({"quantity": name, "family": self.family, "mean": mean, "s.e.": error})
        return rows

    def __repr__(self) -> str:
        elbo, iwae, steps = (row["mean"] for row in self.table())
        text = f"LocalOptimum ({self.family}, {len(self.elbo)} data): mean ELBO {elbo:.6g}, IWAE {iwae:.6g}"
        late = int(np.sum(~self.converged))
        text += f", {steps:.0f} steps" + (f", {late} not converged" if late else "")
        return text + (" (interrupted)" if self.interrupted else "")


@dataclass(frozen=True)
class LocalOptimizer:
    r"""The best variational distribution of each datum, all else being fixed [1].

    For every element :math:`n` of the data's plate, a distribution of its own is fitted,

    .. math:: q_n^* = \arg\max_{q \in \mathcal Q} \; \mathbb E_{q(z)}[\log p(x_n, z) - \log q(z)],

    which tells how much the family :math:`\mathcal Q` can do at all: what an encoder loses against it is amortisation.
    Adam on ``num_mc`` draws a step. Whenever a datum's mean loss over ``check_every`` steps has not been below its best
    for ``patience`` checks, its next learning rate is taken, and after the last one it is frozen; the data of a
    batch go on until all are. Of all starts, and what became of them, each datum keeps the one with the largest bound.

    Trust: ``elbo`` and ``iwae`` are unbiased and a lower bound on average, on draws that chose nothing. The optimum may
    be a local one; several starts show it. A local ELBO falls short of the true optimum, never exceeds it on average.
    Cost: at most ``max_steps * num_mc`` gradients of the model per datum and start, and ``num_eval`` evaluations.
    Memory: of ``batch_size * num_starts`` distributions with Adam's moments, and of ``num_mc`` runs of the model for
    each. One program is compiled for all batches and for later calls with data of the same shapes.

    :param family: ``"factorised"`` or ``"ffg"`` (Gaussian with independent coordinates, in unconstrained space),
        ``"full_rank"``, a class of automatic guides (``AutoIAFNormal``), or a function that makes a guide of the model
        of one datum. It may take ``start`` (``start.values``, the mean by site, and ``start.scales``, in unconstrained
        space) or, as automatic guides do, ``init_loc_fn``.
    :param init: where to start: ``"encoder"`` (mean and scales of the guide at that datum), ``"zeros"`` (a standard
        Gaussian in unconstrained space), a number of random starts (mean uniform on (-2, 2), scale 1), or a sequence of
        these. Automatic guides have scales of their own; a function that takes no start has its own parameters.
    :param learning_rate: one, or those that are taken one after the other.
    :param num_mc: draws of a step.
    :param check_every: steps of a window.
    :param patience: windows that may fail to better the best.
    :param max_steps: at most, per start.
    :param num_eval: draws of the final evaluation.
    :param batch_size: data at a time.
    :raises ValueError: for arguments out of range. When run: naming the site, if no plate encloses all sites of model
        and guide, for discrete latents, for parameters without a value, and for data outside their support; for
        subsampled plates; for a checkpoint of another configuration.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.guides.local import LocalOptimizer
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = jnp.array([0.3, -1.2, 2.0])
        >>> optimizer = LocalOptimizer("ffg", init="zeros", patience=3)
        >>> optimum = optimizer.run(random.key(0), model, x)
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)  # the posterior is in the family
        >>> bool(abs(optimum.elbo - exact).max() < 0.02)
        True

    **References**

    1. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
    """

    family: str | Callable[..., Program] = "ffg"
    init: str | int | Sequence[str | int] = "encoder"
    learning_rate: float | Sequence[float] = (1e-2, 1e-3)
    num_mc: int = 16
    check_every: int = 100
    patience: int = 10
    max_steps: int = 20_000
    num_eval: int = 1000
    batch_size: int = 100

    def __post_init__(self) -> None:
        # Tuples, so that equal settings find the program that was compiled for them.
        given: Any = self.learning_rate
        rates = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        for rate in rates:
            check_number(_USER, "(0, 1e3)", learning_rate=rate)
        object.__setattr__(self, "learning_rate", tuple(map(float, rates)))
        init = (self.init,) if isinstance(self.init, str | int) else tuple(self.init)
        object.__setattr__(self, "init", init)
        names = ("num_mc", "check_every", "patience", "max_steps", "num_eval", "batch_size")
        check_positive(_USER, **{name: getattr(self, name) for name in names})
        if isinstance(self.family, str) and self.family not in GAUSSIANS:
            raise ValueError(
                f"{_USER}: unknown family {self.family!r}; there are {list(GAUSSIANS)}, or give a class of automatic "
                f"guides, or a function that makes a guide of the model of one datum."
            )
        if not isinstance(self.family, str) and not callable(self.family):
            raise ValueError(f"{_USER}: family must be a name, a class or a function, got {self.family!r}.")
        if not self.starts or not self.rates:
            raise ValueError(f"{_USER}: init and learning_rate must not be empty.")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates, in turn."""
        return self.learning_rate  # type: ignore[return-value]

    @property
    def starts(self) -> list[str]:
        """The starts one by one: ``"encoder"``, ``"zeros"`` or ``"random"``."""
        starts: list[str] = []
        for start in self.init:  # type: ignore[union-attr]
            if isinstance(start, int):
                check_positive(_USER, init=start)
            elif start not in ("encoder", "zeros"):
                raise ValueError(
                    f"{_USER}: init must be 'encoder', 'zeros', a number of random starts or a sequence of these, got "
                    f"{start!r}."
                )
            starts += ["random"] * start if isinstance(start, int) else [start]
        return starts

    @property
    def name(self) -> str:
        """The family's name."""
        return self.family if isinstance(self.family, str) else getattr(self.family, "__name__", "family")

    def run(
        self,
        rng_key: Array,
        model: Program,
        *args: Any,
        guide: Program | None = None,
        params: Params | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> LocalOptimum:
        """Fit the distributions of all data in ``args`` and ``kwargs``. After Ctrl-C, returns those of the data done.

        :param guide: the encoder to start from; needed by ``init="encoder"``.
        :param params: constrained values of the ``param`` sites of model and guide, which stay as they are.
        :param checkpoint: file that is written after each batch, and that the same call continues from.
        """
        rng_key, params, args, kwargs = checked_call(
            _USER, rng_key, model, guide, params, args, kwargs, options=(LocalOptimizer.run,), may_lack="none"
        )
        rows, _ = data_rows(model, guide, params, args, kwargs, _USER)
        check_rows(_inspector(model), params, rows, self.batch_size, _USER)
        work = partial(self.batch, rng_key, model, guide, params, rows)
        found, interrupted = over_rows(
            work,
            rows.num,
            min(self.batch_size, rows.num),
            like=lambda: self.shapes(model, guide, params, rows),
            checkpoint=checkpoint,
            of=identity(
                _USER,
                _inspector(model).ignored,
                model=model,
                guide=guide,
                family=self.family,
                configuration=self.description,
                random_key=(rng_key,),
                params=params,
                data=(args, kwargs),
            ),
            user=_USER,
            progress_bar=progress_bar,
        )
        return LocalOptimum(self.name, **found, interrupted=interrupted)

    def batch(
        self, rng_key: Array, model: Program, guide: Program | None, params: Params, rows: DataRows, first: int
    ) -> dict[str, Any]:
        """The arrays of :class:`LocalOptimum` for a batch of rows. A datum's key is by its row, not by its batch."""
        size = min(self.batch_size, rows.num)
        keys = jax.vmap(random.fold_in, (None, 0))(rng_key, first + jnp.arange(size))
        return _compiled(self, model, guide)(keys, params, rows.part(first, size))

    def shapes(self, model: Program, guide: Program | None, params: Params, rows: DataRows) -> dict[str, Any]:
        """Shapes and dtypes of what :meth:`batch` returns."""
        part = rows.part(0, min(self.batch_size, rows.num))
        keys = jax.vmap(random.key)(jnp.arange(part.num))
        program = partial(optima, self, model, guide)

        def found(keys: Array, params: Params, leaves: list[Array]) -> dict[str, Any]:
            return program(keys, params, DataRows(leaves, part.shared, part.layout))

        return jax.eval_shape(found, keys, params, part.rows)

    @property
    def description(self) -> str:
        """All settings in words, the same in every process."""
        family = getattr(self.family, "__qualname__", self.family)
        return f"{family} {[getattr(self, name) for name in self.__dataclass_fields__ if name != 'family']}"


@lru_cache(maxsize=32)
def _compiled(optimizer: LocalOptimizer, model: Program, guide: Program | None) -> Compiled:
    # Kept, so that a second call finds its compiled program.
    return Compiled(partial(optima, optimizer, model, guide))


@lru_cache(maxsize=32)
def _inspector(model: Program) -> Compiled:
    return inspector(model, _USER)
