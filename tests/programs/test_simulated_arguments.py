"""Simulated observations in the place of the data: their values are those that the model drew."""

import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_smc.programs.simulated_arguments import fit_rows

VALUES = jnp.array([0.4, -1.7, 2.9])
PLATE = {"value": np.array([0, 2, 3]), "args": (4, 3)}


@pytest.mark.parametrize("whole", [np.zeros(3, int), np.zeros(3, bool), np.zeros(3, np.float32)])
def test_real_values_are_not_cut_where_the_data_are_whole_numbers(whole):
    np.testing.assert_array_equal(fit_rows([], "guide")(VALUES, whole, "y"), VALUES)


def test_rows_of_a_subsample_are_not_cut_either():
    found = fit_rows([PLATE], "guide")(VALUES, np.array([5, 6, 7, 8]), "y")
    np.testing.assert_allclose(found, [0.4, 6.0, -1.7, 2.9], rtol=1e-6)


def test_counts_keep_the_type_of_the_data():
    assert fit_rows([], "guide")(jnp.array([1, 0, 2]), np.zeros(3, np.float32), "y").dtype == jnp.float32
    assert fit_rows([], "guide")(jnp.array([1, 0, 2]), np.zeros(3, np.int8), "y").dtype == jnp.int8
