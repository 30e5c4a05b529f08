"""Neural ratio estimation for simulators written as NumPyro programs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax, random

from numpyro_smc.engines.checkpoint import AnyLength, load_pytree
from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.simulator import Program, Simulations, Simulator
from numpyro_smc.ratio.datasets import RatioData, check_policy
from numpyro_smc.ratio.description import check_same_nre, check_same_simulator, describe_network, describe_simulator
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.finiteness import Finiteness, FinitenessWeights
from numpyro_smc.ratio.losses import RatioLoss, ratio_loss
from numpyro_smc.ratio.masks import MaskLaw, SelectionMask, parse_masks
from numpyro_smc.ratio.networks import Embedding, Network, residual_mlp
from numpyro_smc.ratio.offline import check_failures, check_from_prior, check_varies
from numpyro_smc.ratio.ratio_network import RatioNetwork
from numpyro_smc.ratio.seen import Seen
from numpyro_smc.ratio.stored_data import StoredData, write
from numpyro_smc.ratio.training import fit
from numpyro_smc.ratio.training_checks import check_made_of
from numpyro_smc.ratio.truncation import Box, draw_within, truncated

_CHUNK = 4096
_ROWS = 2**18
_FINITENESS = 0x66696E69
_PRIOR = 0x7072696F


class NRE:
    r"""Learn the ratio :math:`r(\theta, x) = p(x \mid \theta) / p(x)` of a simulator, and so its posteriors [1-5].

    A classifier tells pairs :math:`(\theta, x)` of the simulator from pairs whose parameters belong to other outputs;
    its log odds are :math:`\log r`. Posteriors follow for every observation,
    :math:`p(\theta \mid x) = p(\theta)\, r(\theta, x)`, without training again, and are ordinary NumPyro programs.

    Values are consistent, not unbiased: they are as good as the network. ``estimator.sample(...).calibration`` and
    the diagnostics tell how good that is.

    Cost of a step: ``2 * num_classes * batch_size`` evaluations of the trunk for ``"C"``, ``2 * batch_size`` for
    ``"A"``.

    :param simulator: a NumPyro program without arguments. ``params`` are sample sites; all other draws, of sites, of
        ``numpyro.prng_key()`` or inside ``scan``, are integrated over.
    :param params: names of the sites to infer.
    :param observed: name of the output's site, deterministic or sampled, or of several, which are raveled and joined.
    :param loss: ``"A"`` (binary [1]), ``"B"`` (softmax [2]; the ratio up to a factor), ``"C"`` (contrastive [3]),
        ``"balanced"`` or ``"balanced C"`` (conservative [4]), or a loss of :mod:`numpyro_smc.ratio.losses`.
    :param num_classes: K of ``"B"`` and ``"C"``, less than the batch.
    :param gamma: prior odds of ``"C"``.
    :param masks: a law of random subsets of the parameters, such as ``UniformMask()``: every marginal is learned by one
        network [5]. Or a list of subsets, by names or in the language of
        :func:`~numpyro_smc.ratio.masks.parse_masks`.
    :param marginals: a list of fixed subsets, a network each.
    :param context: names of sites that are drawn for training and known with the data: a noise level, a design.
    :param trunk: the network; by default three residual blocks of 128 units.
    :param embedding: of the outputs: :func:`~numpyro_smc.ratio.networks.from_equinox`, ``from_flax``, ``embedding_of``.
    :param standardize_x: whether the outputs' elements are standardised.
    :param log_parameters: names of positive sites or elements whose logarithm is standardised.
    :param nonfinite: what to do with outputs that are not finite: ``"raise"``; ``"drop"``, which leaves them out of the
        training and learns the probability of a finite output beside the ratio, by which posteriors are then corrected;
        or a function of the outputs ``[n, *event]`` that returns finite ones, to which observations are put as well.
    :raises ValueError: naming the site, for whatever a :class:`~numpyro_smc.programs.simulator.Simulator` refuses; for
        subsets that keep nothing.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc import NRE
        >>> def simulator():
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", 4):
        ...         steps = numpyro.sample("steps", dist.Gamma(2.0, 1.0))
        ...     numpyro.deterministic("x", mean + steps)
        >>> nre = NRE(simulator, params=["mean"], loss="A")
        >>> estimator = nre.train(random.key(0), num_simulations=2000, max_epochs=5, progress_bar=False)
        >>> posterior = estimator.posterior_model(jnp.array([1.0, 2.5, 2.0, 4.0]))  # for MCMC, SVI, ...
        >>> result = estimator.sample(random.key(1), jnp.array([1.0, 2.5, 2.0, 4.0]), num_particles=200)
        >>> result.get_samples()["mean"].shape
        (200,)

    **References**

    1. *Likelihood-free MCMC with Amortized Approximate Ratio Estimators*, J. Hermans, V. Begy, G. Louppe (2020)
    2. *On Contrastive Learning for Likelihood-free Inference*, C. Durkan, I. Murray, G. Papamakarios (2020)
    3. *Contrastive Neural Ratio Estimation*, B. K. Miller, C. Weniger, P. Forré (2022)
    4. *Towards Reliable Simulation-Based Inference with Balanced Neural Ratio Estimation*, A. Delaunoy et al. (2022)
    5. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
    """

    def __init__(
        self,
        simulator: Program,
        params: Sequence[str],
        observed: str | Sequence[str] = "x",
        *,
        loss: str | RatioLoss = "C",
        num_classes: int = 10,
        gamma: float = 1.0,
        masks: MaskLaw | Sequence[Any] | str | None = None,
        marginals: Sequence[Any] | str | None = None,
        context: Sequence[str] = (),
        trunk: Network | None = None,
        embedding: Embedding | None = None,
        standardize_x: bool = True,
        log_parameters: Sequence[str] = (),
        nonfinite: Any = "raise",
    ) -> None:
        check_policy("NRE", nonfinite)
        check_made_of(loss=loss, trunk=trunk, embedding=embedding)
        self.simulator = Simulator(simulator, params, observed, context)
        self.loss = ratio_loss(loss, num_classes, gamma) if isinstance(loss, str) else loss
        if masks is None or isinstance(masks, MaskLaw):
            self.masks = masks
        else:
            self.masks = SelectionMask(self._subsets(masks))
        self.network = RatioNetwork(
            self.simulator.size,
            residual_mlp() if trunk is None else trunk,
            embedding,
            self.masks is not None,
            None if marginals is None else self._subsets(marginals),
            self.simulator.context_size,
            standardize_x,
            self.simulator.mask(log_parameters) if len(log_parameters) else None,
            constant if (constant := self.simulator.constant()).any() else None,
        )
        self.nonfinite = nonfinite
        self._simulate = jax.jit(self._simulate_rows, static_argnums=2)
        if self.simulator.has_tractable_likelihood:
            warnings.warn(
                f"NRE: the simulator has no hidden draws and its output {', '.join(self.simulator.observed)} is a "
                f"sample site, so its likelihood is known: MCMC or SMCSampler on the program itself, conditioned on "
                f"the data, is exact and needs no training.",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        of = ", ".join(self.simulator.params)
        return f"NRE({of}; observed={', '.join(self.simulator.observed)}, loss={self.loss}, masks={self.masks})"

    def simulate(self, rng_key: Array, num: int, *, box: Box | None = None, batch_size: int = _CHUNK) -> RatioData:
        """Simulations in memory.

        :param num: how many.
        :param box: draw the parameters from the prior within it.
        :param batch_size: simulations at a time, to bound memory.
        """
        rng_key = one_key("NRE.simulate", rng_key)
        check_positive("NRE.simulate", num=num, batch_size=batch_size)
        return self.data_of(self._simulations(rng_key, num, box, batch_size))

    def simulate_to(
        self,
        folder: str | os.PathLike,
        rng_key: Array,
        num: int,
        *,
        part_size: int = 2**16,
        file_format: str = "npz",
        batch_size: int = _CHUNK,
        progress_bar: bool = True,
    ) -> StoredData:
        """Simulations on disk, never all in memory; the same call again goes on where an interrupted one stopped.

        :param folder: where to write; made if absent.
        :param num: how many in all; more than the folder holds adds to it, and fewer are its first.
        :param part_size: simulations of a file. **batch_size** - simulations at a time.
        :param file_format: ``"npz"``, or ``"hdf5"``, which needs h5py.
        """

        def simulate(key: Array, num: int) -> tuple[Any, ...]:
            found = self._simulations(key, num, None, batch_size)
            return found[: 2 if found.context is None else 3]

        return write(
            folder,
            simulate,
            rng_key,
            num,
            part_size=part_size,
            file_format=file_format,
            settings=describe_simulator(self.simulator, self.nonfinite),
            nonfinite=self.nonfinite,
            progress_bar=progress_bar,
        )

    def data_of(self, simulations: Simulations | tuple[Any, ...]) -> RatioData:
        """Training data from parameters ``[n, D]``, outputs ``[n, *event]`` and, if there are any, contexts ``[n, C]``.

        :raises ValueError: for shapes that are not the simulator's.
        """
        theta, x, context = (*simulations, None)[:3]
        theta, x = np.asarray(theta), np.asarray(x)
        simulator = self.simulator
        if theta.shape != (len(x), simulator.size) or x.shape[1:] != simulator.event_shape:
            raise ValueError(
                f"NRE: the simulator gives parameters [n, {simulator.size}] and outputs "
                f"{('n', *simulator.event_shape)}; got shapes {theta.shape} and {x.shape}."
            )
        found = 0 if context is None else np.shape(context)[-1]
        if found != simulator.context_size:
            raise ValueError(f"NRE: each simulation needs {simulator.context_size} numbers of context, got {found}.")
        return RatioData(theta, x, None if context is None else np.asarray(context), nonfinite=self.nonfinite)

    def train(
        self,
        rng_key: Array,
        num_simulations: int | None = None,
        *,
        data: Any = None,
        box: Box | None = None,
        **options: Any,
    ) -> RatioEstimator:
        """Simulate, and train the network.

        Parameters of given data must be draws from the prior: the ratio belongs to their law, and the posterior is
        multiplied by the prior. Stored ones must be of this simulator.

        :param num_simulations: how many to draw, unless there are data.
        :param data: instead, what :meth:`simulate`, :meth:`simulate_to` or :meth:`data_of` returned; a tuple for the
            last; or a folder or file of stored simulations.
        :param box: the prior's region, of both simulations and posteriors; see :meth:`train_rounds`.
        :param options: of :func:`~numpyro_smc.ratio.training.fit`: ``batch_size``, ``max_epochs``, ``learning_rate``,
            ``schedule``, ``patience``, ``checkpoint``, ``progress_bar``, ...
        :return: a :class:`RatioEstimator`; its ``training`` is the record.
        :raises ValueError: naming what differs, for data of another simulator or prior, and for what
            :func:`~numpyro_smc.ratio.training.fit` refuses.
        :raises FloatingPointError: if no epoch had a finite loss.
        """
        if options.get("log_weight") is not None:
            raise ValueError(
                "NRE.train: with log_weight the network learns what another ratio lacks, which is not the ratio of "
                "these posteriors. Call numpyro_smc.ratio.training.fit, and add both log ratios."
            )
        if (num_simulations is None) == (data is None):
            raise ValueError("NRE.train: pass either num_simulations or data.")
        rng_key = one_key("NRE.train", rng_key)
        simulation_key, training_key = random.split(rng_key)
        if data is None:
            assert num_simulations is not None
            data = self.simulate(simulation_key, num_simulations, box=box)
        elif isinstance(data, str | os.PathLike):
            data = StoredData(data, nonfinite=self.nonfinite)
        elif isinstance(data, tuple):
            data = self.data_of(data)
        check_made_of(data=data)
        some = data.first(_ROWS)
        if num_simulations is None:
            self._check_data(data, some, box)
        check_varies(some.theta, self.simulator.constant(), self.simulator.elements)
        finiteness = None
        if self.nonfinite == "drop":
            key = random.fold_in(rng_key, _FINITENESS)
            finiteness = Finiteness.beside(self.network).train(key, some, self.masks)
        training = fit(training_key, self.network, self.loss, data, masks=self.masks, **options)
        return self._estimator(training.weights, box, finiteness, Seen.of(some), training)

    def train_rounds(
        self,
        rng_key: Array,
        x_obs: Any,
        num_rounds: int,
        num_simulations: int,
        *,
        context: Any = None,
        epsilon: float = 1e-6,
        **options: Any,
    ) -> RatioEstimator:
        r"""Train for one observation: every round simulates from the prior truncated to where the last ratio is not
        tiny.

        The box keeps each parameter where its own ratio exceeds :math:`\epsilon` times its maximum [1], if the
        marginals of one parameter are learned; otherwise where particles of the posterior lie, with a fifth of their
        range more on both sides.

        :param x_obs: the observation.
        :param num_rounds: 2 or more; the last one's estimator is returned, and is for this observation only.
        :param num_simulations: a round.
        :param options: of :meth:`train`.

        **References**

        1. *Truncated Marginal Neural Ratio Estimation*, B. K. Miller et al. (2021)
        """
        rng_key = one_key("NRE.train_rounds", rng_key)
        check_positive("NRE.train_rounds", num_rounds=num_rounds, num_simulations=num_simulations)
        box: Box | None = None
        for number in range(num_rounds):
            key, box_key = random.split(random.fold_in(rng_key, number))
            estimator = self.train(key, num_simulations, box=box, **options)
            if number < num_rounds - 1:
                box = truncated(box_key, estimator, x_obs, context, epsilon)
        return estimator

    def load(self, path: str | os.PathLike) -> RatioEstimator:
        """An estimator that :meth:`RatioEstimator.save` wrote, of an NRE equal to this one.

        :raises ValueError: naming what differs, for the file of another one.
        """
        theta, x, context = self._simulate(random.split(random.key(0), 4), None, 4)
        weights = self.network.init(random.key(0), theta, x, context)
        like = {
            "description": AnyLength("uint8"),
            "weights": weights,
            "box": Box.everywhere(self.simulator.size),
            "seen": Seen.of(RatioData(theta, x, context, np.nan_to_num)),
            "finiteness": Finiteness.beside(self.network).init(random.key(0), theta) if self._drops else None,
        }
        try:
            contents = load_pytree(path, like)
        except ValueError as error:
            raise ValueError(f"NRE.load: {error} Build the NRE with the arguments it was trained with.") from error
        check_same_nre(path, contents["description"].tobytes(), self._description)
        box = contents["box"]
        box = box if np.isfinite(box.low).any() else None
        return self._estimator(contents["weights"], box, contents["finiteness"], contents["seen"], None)

    # ---- pieces -------------------------------------------------------------------------------------------------

    @property
    def _drops(self) -> bool:
        return isinstance(self.nonfinite, str) and self.nonfinite == "drop"

    def _estimator(
        self, weights: Any, box: Box | None, finiteness: FinitenessWeights | None, seen: Seen, training: Any
    ) -> RatioEstimator:
        return RatioEstimator(
            self.simulator,
            self.network,
            weights,
            self.loss,
            box=box,
            finiteness=finiteness,
            seen=seen,
            nonfinite=self.nonfinite,
            description=json.dumps(self._description),
            training=training,
        )

    @property
    def _description(self) -> dict[str, Any]:
        return describe_simulator(self.simulator, self.nonfinite) | describe_network(
            self.network, self.loss, self.masks
        )

    def _check_data(self, data: Any, some: RatioData, box: Box | None) -> None:
        """:raises ValueError: for given data of another simulator or prior, or without their failures."""

        def draw(num: int) -> np.ndarray:
            if box is not None:
                return np.asarray(draw_within(random.key(_PRIOR), self.simulator.prior, box, num)[0])
            return np.asarray(jax.jit(jax.vmap(self.simulator.prior))(random.split(random.key(_PRIOR), num)))

        settings = getattr(data, "settings", {}).get("settings", {})
        if "simulator" in settings:
            check_same_simulator(f"'{data.path}'", settings, describe_simulator(self.simulator, self.nonfinite))
        check_failures(some, self._drops, is_incomplete=getattr(data, "lacks_failures", False))
        check_from_prior(np.concatenate([some.theta, some.failed]), draw, self.simulator.elements)

    def _subsets(self, subsets: Sequence[Any] | str) -> np.ndarray:
        """Masks from names, words and booleans."""
        masks = []
        for entry in [subsets] if isinstance(subsets, str) else subsets:
            is_word = isinstance(entry, str) and not set(entry) - set("=0123456789 ")
            by_name = isinstance(entry, str) or all(isinstance(name, str) for name in entry)
            if is_word or not by_name:
                masks.append(parse_masks(entry if is_word else [entry], self.simulator.size))
            else:
                masks.append(self.simulator.mask(entry)[None])
        if not masks:
            raise ValueError("NRE: no subsets of the parameters were given.")
        return np.concatenate(masks)

    def _simulations(self, rng_key: Array, num: int, box: Box | None, batch_size: int) -> Simulations:
        theta_key, key = random.split(rng_key)
        theta = None if box is None else draw_within(theta_key, self.simulator.prior, box, num)[0]
        return self._simulate(random.split(key, num), theta, min(batch_size, num))

    def _simulate_rows(self, keys: Array, theta: Array | None, batch_size: int) -> Simulations:
        if theta is None:
            return lax.map(self.simulator.simulate, keys, batch_size=batch_size)
        return lax.map(lambda row: self.simulator.simulate(*row), (keys, theta), batch_size=batch_size)
