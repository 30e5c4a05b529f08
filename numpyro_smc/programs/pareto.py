"""Tails of importance weights."""

import warnings

import numpy as np
from jax import Array
from numpyro.infer.importance import _psis_khat

#: Above it, means of such weights are not to be trusted.
LARGE_PARETO_K = 0.7

_FEWEST, _EQUAL = 25, 1e-4  # weights that give a tail of five; log weights this close count as equal


def pareto_k(log_weights: Array) -> np.ndarray:
    """Shape of a generalised Pareto distribution fitted to the largest weights [1], by NumPyro.

    :param log_weights: ``[S, ...]``.
    :return: ``[...]``; not a number for fewer than 25 weights, zero where many draws share the largest weight.

    **References**

    1. *Pareto Smoothed Importance Sampling*, A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024)
    """
    columns = np.asarray(log_weights, np.float64).reshape(len(log_weights), -1)
    shapes = np.full(columns.shape[1], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few distinct weights in the tail: infinite
        for i, column in enumerate(columns.T if len(columns) >= _FEWEST else ()):
            shapes[i] = _psis_khat(column)
            # Many draws share the largest weight, as with discrete latents: that is no tail.
            if np.isinf(shapes[i]) and np.sum(column > np.max(column) - _EQUAL) >= 5:
                shapes[i] = 0.0
    return shapes.reshape(np.shape(log_weights)[1:])
