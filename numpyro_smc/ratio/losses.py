"""Losses of a batch of simulations, whose optimum is the likelihood-to-evidence ratio.

Every loss contrasts parameters that belong to the outputs of a batch (joint class) with those of other rows (marginal
class), found by rolling the batch, so that a row never meets its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.ratio.classification import PROPER, SCORES, balance, binary, contrastive, softmax

__all__ = ["BalancedLoss", "BinaryLoss", "ContrastiveLoss", "LogRatio", "RatioLoss", "SoftmaxLoss", "ratio_loss"]

#: ``(theta [..., B, D], features [B, F], mask [B, D] or None) -> log ratios [..., B]``, or ``[..., B, M]``.
LogRatio = Callable[[Array, Array, Array | None], Array]


@dataclass(frozen=True)
class RatioLoss:
    """A loss of a batch of simulations, whose rows are contrasted with each other; see the subclasses."""

    @property
    def calibrated(self) -> bool:
        """Whether the minimiser is the ratio itself: not so if it is known up to a factor :math:`c(x)` only, or if the
        score is not proper."""
        return True

    @property
    def num_contrasts(self) -> tuple[int, int]:
        """How many parameters of other rows a row meets: beside its own (joint class), and without it (marginal)."""
        raise NotImplementedError

    @property
    def shares_contrasts(self) -> bool:
        """Whether the contrasts of the joint class are the first of the marginal class, evaluated once for both."""
        return False

    @property
    def smallest_batch(self) -> int:
        """Rows that a batch must have, so that a row meets others' parameters without repetition."""
        return 1 + max(self.num_contrasts)

    def of_log_ratios(
        self, joint: Array, marginal: Array, log_weights: Array | None = None, progress: Any = 1.0
    ) -> Array:
        """The loss of given log ratios.

        :param joint: ``[1 + contrasts, B]`` or ``[1 + contrasts, B, M]``; first those of the outputs' own parameters.
        :param marginal: ``[contrasts, B]`` or ``[contrasts, B, M]``.
        :param log_weights: of the marginal class, of its shape; :class:`BinaryLoss` only.
        :param progress: of the training, from 0 to 1.
        :raises ValueError: for weights that the loss has no place for.
        """
        raise NotImplementedError

    def __call__(
        self,
        rng_key: Array,
        log_ratio: LogRatio,
        theta: Array,
        features: Array,
        mask: Array | None = None,
        progress: Any = 1.0,
        log_weight: Callable[[Array], Array] | None = None,
    ) -> Array:
        """The loss of a batch.

        :param rng_key: random key, for the choice of contrasts.
        :param log_ratio: the network as a function ``(theta, features, mask)``.
        :param theta: parameters ``[B, D]``.
        :param features: of the outputs, ``[B, F]``.
        :param mask: bool ``[B, D]``; the same for a row and its contrasts.
        :param progress: of the training, from 0 to 1.
        :param log_weight: from parameters ``[1, B, D]`` to log weights of the marginal class; :class:`BinaryLoss` only.
        :raises ValueError: for fewer rows than :attr:`smallest_batch`, or weights that the loss has no place for.
        """
        if len(theta) < self.smallest_batch:
            raise ValueError(
                f"{type(self).__name__}: a batch needs at least {self.smallest_batch} rows, so that every row meets "
                f"other rows' parameters without repetition, but has {len(theta)}. Raise batch_size or lower "
                f"num_classes."
            )
        num_joint, num_marginal = self.num_contrasts
        joint_key, marginal_key = random.split(rng_key)
        marginal_theta = contrasts(marginal_key, theta, num_marginal)
        joint_theta = contrasts(joint_key, theta, 0 if self.shares_contrasts else num_joint)
        ratios = log_ratio(jnp.concatenate([theta[None], joint_theta, marginal_theta]), features, mask)
        joint, marginal = ratios[: 1 + num_joint], ratios[1 + len(joint_theta) :]
        log_weights = None if log_weight is None else log_weight(marginal_theta)
        return self.of_log_ratios(joint, marginal, log_weights, progress)


@dataclass(frozen=True)
class BinaryLoss(RatioLoss):
    """NRE-A [1]: is the parameter the output's own, or another row's? One contrast per row.

    :param score: see :func:`binary`; ``"focal"`` and ``"peripheral"`` do not learn the exact ratio.
    :raises ValueError: for an unknown score.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_smc.ratio.losses import BinaryLoss
        >>> theta = features = random.normal(random.key(0), (64, 2))
        >>> knows_nothing = lambda theta, features, mask: jnp.zeros(theta.shape[:-1])
        >>> bool(jnp.allclose(BinaryLoss()(random.key(1), knows_nothing, theta, features), 2 * jnp.log(2.0)))
        True

    **References**

    1. *Likelihood-free MCMC with Amortized Approximate Ratio Estimators*, J. Hermans, V. Begy, G. Louppe (2020)
    """

    score: str = "log"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"BinaryLoss: score must be one of {list(SCORES)}, got {self.score!r}.")

    @property
    def calibrated(self) -> bool:
        return self.score in PROPER

    @property
    def num_contrasts(self) -> tuple[int, int]:
        return 0, 1

    def of_log_ratios(
        self, joint: Array, marginal: Array, log_weights: Array | None = None, progress: Any = 1.0
    ) -> Array:
        return binary(joint[0], marginal[0], None if log_weights is None else log_weights[0], self.score)


@dataclass(frozen=True)
class SoftmaxLoss(RatioLoss):
    r"""NRE-B [1]: which of ``num_classes`` parameters made the output? The ratio is learnt up to a factor :math:`c(x)`.

    Posteriors by MCMC do not notice the factor; evidences, calibration and sums over observations do.

    :param num_classes: :math:`K \ge 2`, the output's own parameter included.
    :raises ValueError: for less than two classes.

    **References**

    1. *On Contrastive Learning for Likelihood-free Inference*, C. Durkan, I. Murray, G. Papamakarios (2020)
    """

    num_classes: int = 10

    def __post_init__(self) -> None:
        check_positive("SoftmaxLoss", **{"num_classes - 1": self.num_classes - 1})

    @property
    def calibrated(self) -> bool:
        return False

    @property
    def num_contrasts(self) -> tuple[int, int]:
        return self.num_classes - 1, 0

    def of_log_ratios(
        self, joint: Array, marginal: Array, log_weights: Array | None = None, progress: Any = 1.0
    ) -> Array:
        _check_no_weights("SoftmaxLoss", log_weights)
        return softmax(joint[0], joint[1:])


@dataclass(frozen=True)
class ContrastiveLoss(RatioLoss):
    r"""NRE-C [1]: which of ``num_classes`` parameters made the output, or none of them?

    Contrasts of a row do not repeat. Cost: :math:`2 K` evaluations of the trunk per row, :math:`K + 1` if the two
    classes share contrasts: the expected loss and its gradient are the same, the gradient's variance is not.

    :param num_classes: contrastive parameters :math:`K \ge 1`; the batch needs more rows than that.
    :param gamma: prior odds that one of them made the output.
    :param shared: whether the two classes share contrasts; drawn independently by default, as published.
    :raises ValueError: for numbers that make no sense.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_smc.ratio.losses import ContrastiveLoss
        >>> theta = features = random.normal(random.key(0), (64, 2))
        >>> log_ratio = lambda theta, features, mask: (theta * features).sum(-1)
        >>> ContrastiveLoss(num_classes=20)(random.key(1), log_ratio, theta, features).shape
        ()

    **References**

    1. *Contrastive Neural Ratio Estimation*, B. K. Miller, C. Weniger, P. Forré (2022)
    """

    num_classes: int = 10
    gamma: float = 1.0
    shared: bool = False

    def __post_init__(self) -> None:
        check_positive("ContrastiveLoss", num_classes=self.num_classes)
        if not 0 < self.gamma < float("inf"):
            raise ValueError(
                f"ContrastiveLoss: gamma must be positive and finite, got {self.gamma!r}; its limit is SoftmaxLoss."
            )

    @property
    def num_contrasts(self) -> tuple[int, int]:
        return self.num_classes - 1, self.num_classes

    @property
    def shares_contrasts(self) -> bool:
        return self.shared

    def of_log_ratios(
        self, joint: Array, marginal: Array, log_weights: Array | None = None, progress: Any = 1.0
    ) -> Array:
        _check_no_weights("ContrastiveLoss", log_weights)
        return contrastive(joint[0], joint[1:], marginal, self.gamma)


@dataclass(frozen=True)
class BalancedLoss(RatioLoss):
    r"""A loss plus a penalty on classifiers that are not balanced [1]: posteriors err on the side of being too wide.

    .. math:: L + 2 \lambda \min(t / t_1, 1)
       \big(\mathrm{mean}\, \sigma(\log r(\theta, x)) + \mathrm{mean}\, \sigma(\log r(\theta', x)) - 1\big)^2

    at progress :math:`t`; the factor two, because :math:`L` is the sum of the two classes' means, and the published
    :math:`\lambda` belongs to half of that. The exact ratio is balanced, so that the optimum is the same.

    :param loss: :class:`BinaryLoss` or :class:`ContrastiveLoss`.
    :param strength: :math:`\lambda`.
    :param full_at: :math:`t_1`, the part of the training after which the penalty has its full strength; 0 for always.
    :raises ValueError: for a loss that knows the ratio up to a factor only, and numbers that make no sense.

    **References**

    1. *Towards Reliable Simulation-Based Inference with Balanced Neural Ratio Estimation*, A. Delaunoy et al. (2022)
    """

    loss: RatioLoss = BinaryLoss()
    strength: float = 100.0
    full_at: float = 0.8

    def __post_init__(self) -> None:
        if not isinstance(self.loss, BinaryLoss | ContrastiveLoss):
            raise ValueError(
                f"BalancedLoss: only BinaryLoss() and ContrastiveLoss(...) have the two classes to be balanced, got "
                f"{type(self.loss).__name__}."
            )
        if not 0 <= self.strength < float("inf") or not 0 <= self.full_at <= 1:
            raise ValueError(
                f"BalancedLoss: strength must be non-negative and full_at between 0 and 1, got {self.strength!r} and "
                f"{self.full_at!r}."
            )

    @property
    def calibrated(self) -> bool:
        return self.loss.calibrated

    @property
    def num_contrasts(self) -> tuple[int, int]:
        return self.loss.num_contrasts

    @property
    def shares_contrasts(self) -> bool:
        return self.loss.shares_contrasts

    def of_log_ratios(
        self, joint: Array, marginal: Array, log_weights: Array | None = None, progress: Any = 1.0
    ) -> Array:
        _check_no_weights("BalancedLoss", log_weights)
        ramp = jnp.minimum(progress / self.full_at, 1.0) if self.full_at else 1.0
        penalty = 2 * self.strength * ramp * balance(joint[0], marginal)
        return self.loss.of_log_ratios(joint, marginal, None, progress) + penalty


def ratio_loss(name: str, num_classes: int = 10, gamma: float = 1.0) -> RatioLoss:
    """The loss of a name: ``"A"``, ``"B"``, ``"C"``, ``"balanced"`` (A with the penalty) or ``"balanced C"``.

    :param num_classes: of B and C.
    :param gamma: of C.
    :raises ValueError: for an unknown name.
    """
    makers: dict[str, Callable[[], RatioLoss]] = {
        "A": BinaryLoss,
        "B": lambda: SoftmaxLoss(num_classes),
        "C": lambda: ContrastiveLoss(num_classes, gamma),
        "balanced": BalancedLoss,
        "balanced C": lambda: BalancedLoss(ContrastiveLoss(num_classes, gamma)),
    }
    if name not in makers:
        raise ValueError(f"ratio_loss: loss must be one of {list(makers)} or a loss object, got {name!r}.")
    return makers[name]()


def contrasts(rng_key: Array, theta: Array, num: int) -> Array:
    """Parameters of ``num`` other rows for each row, ``[num, B, D]``: the batch rolled by different random numbers."""
    batch = len(theta)
    shifts = 1 + random.permutation(rng_key, batch - 1)[:num]
    return theta[(jnp.arange(batch) + shifts[:, None]) % batch]


def _check_no_weights(user: str, log_weights: Any) -> None:
    if log_weights is not None:
        raise ValueError(f"{user}: weights of the marginal class are defined for BinaryLoss only; pass that loss.")
