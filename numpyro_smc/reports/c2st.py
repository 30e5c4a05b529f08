"""The classifier two-sample test, as benchmarks of likelihood-free inference define it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from numpyro_smc.programs.arguments import check_positive


@dataclass(frozen=True, repr=False)
class TwoSampleTest:
    """What :func:`c2st` found.

    - **accuracy** - of the classifier on data it has not seen, mean over folds: 0.5 where it cannot tell the samples
      apart, 1 where it always can. ``float(result)`` is this number.
    - **folds** - the accuracy in each fold, ``[num_folds]``.
    - **num_reference** and **num_samples** - draws of each.
    """

    accuracy: float
    folds: np.ndarray
    num_reference: int
    num_samples: int

    def __float__(self) -> float:
        return self.accuracy

    def __repr__(self) -> str:
        shown = ", ".join(f"{fold:.3f}" for fold in self.folds)
        return (
            f"TwoSampleTest of {self.num_samples} draws against {self.num_reference}: accuracy {self.accuracy:.3f} "
            f"(folds {shown})"
        )


def c2st(
    reference: Any, samples: Any, *, num_folds: int = 5, seed: int = 1, max_iterations: int = 10_000
) -> TwoSampleTest:
    r"""How well a classifier tells samples from a reference, as in the benchmark [1]: 0.5 is indistinguishable.

    Both are standardised by the reference's mean and standard deviation (with N - 1). A network with two hidden layers
    of :math:`10 D` rectified units, trained by Adam, classifies them; the result is its accuracy on held-out draws,
    mean over :math:`k` shuffled folds. With the defaults this is the published definition, scikit-learn's
    ``MLPClassifier`` and ``KFold`` included.

    Trust: published numbers have 10,000 draws of each, and are not comparable to others with fewer, where the network
    learns less. With equal numbers of identically distributed draws the accuracy is 0.5 within about
    :math:`1 / \sqrt{8 N}`, N being the draws of each, and often a little below, since folds are not quite balanced.
    Cost: half a minute for 10,000 draws of each in two dimensions, minutes in ten. Needs scikit-learn.

    :param reference: draws from the truth, ``[N, D]``, or ``[N]``.
    :param samples: draws to be judged, ``[M, D]``, or ``[M]``.
    :param num_folds: :math:`k`.
    :param seed: of the network and of the folds.
    :param max_iterations: passes of the training, which ends by itself before.
    :raises ModuleNotFoundError: without scikit-learn.
    :raises ValueError: if the two have different dimensions, fewer draws than folds, numbers that are not finite, or a
        coordinate that is constant in the reference.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_smc.reports.c2st import c2st
        >>> rng = np.random.default_rng(0)
        >>> reference, same, other = rng.normal(size=(3, 500, 2))
        >>> bool(float(c2st(reference, same)) < 0.56), bool(float(c2st(reference, other + 2.0)) > 0.85)
        (True, True)

    **References**

    1. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021)
    2. *Revisiting Classifier Two-Sample Tests*, D. Lopez-Paz, M. Oquab (2017)
    """
    check_positive("c2st", num_folds=num_folds, max_iterations=max_iterations)
    sets = {"reference": _as_rows("reference", reference), "samples": _as_rows("samples", samples)}
    (num_reference, dim), (num_samples, other) = (rows.shape for rows in sets.values())
    if dim != other:
        raise ValueError(f"c2st: reference has {dim} columns and samples has {other}; expected the same parameters.")
    if num_folds < 2 or min(num_reference, num_samples) < num_folds:
        raise ValueError(
            f"c2st: num_folds={num_folds} with {num_reference} draws in reference and {num_samples} in samples; "
            "expected at least two folds, and at least as many draws."
        )
    network, folds, cross_val_score = _classifier(dim, num_folds, seed, max_iterations)
    centre, scale = sets["reference"].mean(0), sets["reference"].std(0, ddof=1)
    if not np.all(scale > 0):
        constant = int(np.flatnonzero(scale <= 0)[0])
        raise ValueError(f"c2st: reference is constant in column {constant}; leave that column out of both.")
    rows = np.concatenate([(values - centre) / scale for values in sets.values()])
    labels = np.concatenate([np.zeros(num_reference), np.ones(num_samples)])
    scores = cross_val_score(network, rows, labels, cv=folds, scoring="accuracy")
    return TwoSampleTest(float(np.mean(scores)), scores, num_reference, num_samples)


def _as_rows(name: str, values: Any) -> np.ndarray:
    rows = np.asarray(values)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise ValueError(f"c2st: {name} has shape {rows.shape}; expected [draws, parameters].")
    if not np.all(np.isfinite(rows)):
        bad = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
        raise ValueError(f"c2st: {name} has numbers that are not finite, first in row {bad}.")
    return rows


def _classifier(dim: int, num_folds: int, seed: int, max_iterations: int) -> tuple[Any, Any, Any]:
    """The network, the folds, and scikit-learn's cross-validation."""
    try:
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "c2st: the classifier is scikit-learn's; pip install scikit-learn.", name=error.name
        ) from error
    hidden = (10 * dim, 10 * dim)
    network = MLPClassifier(
        activation="relu", hidden_layer_sizes=hidden, max_iter=max_iterations, solver="adam", random_state=seed
    )
    return network, KFold(n_splits=num_folds, shuffle=True, random_state=seed), cross_val_score
