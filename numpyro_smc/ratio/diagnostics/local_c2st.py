"""Local classifier two-sample test: is the posterior right at one observation, without a reference?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array, random

from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.ratio.diagnostics.simulated_posteriors import simulated_posteriors
from numpyro_smc.reports.plots import new_axes

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator


@dataclass(frozen=True, repr=False)
class LocalTest:
    """What :func:`local_c2st` found.

    :ivar statistic: mean squared distance of the class probabilities from one half, at draws from the posterior.
    :ivar null: the same with classes that were shuffled, ``[num_trials]``.
    """

    statistic: float
    null: np.ndarray

    def __repr__(self) -> str:
        return (
            f"Local C2ST: {self.statistic:.4f} beside {self.null.mean():.4f} (95 % below "
            f"{np.quantile(self.null, 0.95):.4f}) under shuffled classes; p = {self.p_value:.3g}"
        )

    @property
    def p_value(self) -> float:
        """Share of shuffled classes with a statistic at least as large, the observed one counted."""
        return float((1 + (self.null >= self.statistic).sum()) / (1 + len(self.null)))

    def table(self) -> list[dict[str, Any]]:
        """One line."""
        return [{"statistic": self.statistic, "null mean": float(self.null.mean()), "p-value": self.p_value}]

    def plot(self, ax: Any = None) -> Any:
        """The statistic beside those of shuffled classes.

        :return: the axes.
        """
        ax = new_axes() if ax is None else ax
        ax.hist(self.null, bins=20, color="0.7", label="shuffled classes")
        ax.axvline(self.statistic, color="C3", label="observed")
        ax.set(xlabel="statistic", ylabel="trials")
        ax.legend(frameon=False)
        return ax


def local_c2st(
    estimator: RatioEstimator,
    rng_key: Array,
    x_obs: Any,
    num_pairs: int = 1000,
    num_samples: int = 1000,
    num_trials: int = 100,
    **options: Any,
) -> LocalTest:
    r"""Can a classifier that sees the output tell true parameters from the posterior's draws, at this observation? [1]

    It is trained on pairs :math:`(\theta, x)` of the simulator against :math:`(\theta', x)` with :math:`\theta'` drawn
    from the posterior of the same output. If the posterior is right, its probabilities are one half everywhere; the
    statistic is their mean squared distance from that at draws from the posterior of ``x_obs``. Its law under a right
    posterior comes from classifiers trained on shuffled classes.

    Cost: ``num_pairs`` posteriors, and ``num_trials + 1`` trainings of a small network. Needs scikit-learn.

    :param x_obs: the observation, ``[*event]``.
    :param num_pairs: simulations. **num_samples** - draws at the observation. **num_trials** - shuffled classes.
    :param options: of :class:`~numpyro_smc.SMCSampler`.
    :raises ModuleNotFoundError: without scikit-learn.

    **References**

    1. *L-C2ST: Local Diagnostics for Posterior Approximations in Simulation-Based Inference*, J. Linhart et al. (2023)
    """
    check_positive("local_c2st", num_pairs=num_pairs, num_samples=num_samples, num_trials=num_trials)
    try:
        from sklearn.neural_network import MLPClassifier
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "local_c2st: the classifier is scikit-learn's; pip install scikit-learn.", name=error.name
        ) from error
    pairs_key, observed_key, shuffle_key = random.split(rng_key, 3)
    found = simulated_posteriors(pairs_key, estimator, num_pairs, num_samples, **options)
    outputs = np.asarray(found.x).reshape(num_pairs, -1)
    features = np.concatenate(
        [np.c_[np.asarray(found.theta), outputs], np.c_[np.asarray(found.samples[:, 0]), outputs]]
    )
    mean, scale = features.mean(0), features.std(0) + (features.std(0) == 0)
    size = features.shape[1] - outputs.shape[1]
    draws = estimator.sample(observed_key, x_obs, num_particles=num_samples, **options).get_samples()
    theta = np.asarray(estimator.simulator.ravel(draws))
    at = np.c_[theta, np.broadcast_to(np.ravel(x_obs), (len(theta), outputs.shape[1]))]
    labels = np.r_[np.zeros(num_pairs), np.ones(num_pairs)]
    rng = np.random.default_rng(np.asarray(random.bits(shuffle_key)).item())

    def statistic(labels: np.ndarray) -> float:
        network = MLPClassifier((10 * size, 10 * size), max_iter=1000, early_stopping=True, random_state=1)
        network.fit((features - mean) / scale, labels)
        return float(((network.predict_proba((at - mean) / scale)[:, 1] - 0.5) ** 2).mean())

    null = [statistic(rng.permutation(labels)) for _ in range(num_trials)]
    return LocalTest(statistic(labels), np.array(null))
