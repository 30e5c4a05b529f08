"""Laws of masks against their probabilities: every frequency within five standard errors (false alarms 6e-7 each)."""

from math import comb, exp, factorial

import numpy as np
import pytest
from jax import random

from numpyro_smc.ratio.masks import (
    PoissonMask,
    RestrictedMask,
    SelectionMask,
    SizesMask,
    UniformMask,
    default_mask_law,
    parse_masks,
)

NUM = 40_000


def draw(law, size, num=NUM):
    masks = np.asarray(law.sample(random.key(1), num, size))
    assert masks.shape == (num, size) and masks.dtype == bool and masks.any(axis=1).all()
    return masks


def assert_frequencies(masks, probabilities):
    """Every mask of ``probabilities``, by its digits, is as frequent as it says; there are no others."""
    found = dict.fromkeys(probabilities, 0)
    words, counts = np.unique(masks.astype(int), axis=0, return_counts=True)
    found |= {"".join(map(str, word)): count for word, count in zip(words, counts, strict=True)}
    assert found.keys() == probabilities.keys()
    assert np.isclose(sum(probabilities.values()), 1)
    for word, probability in probabilities.items():
        error = np.sqrt(probability * (1 - probability) / len(masks))
        assert abs(found[word] / len(masks) - probability) <= 5 * error, word


def subsets(size):
    return ["".join(map(str, row.astype(int))) for k in range(1, size + 1) for row in parse_masks(f"={k}", size)]


def by_size(size, sizes):
    """Probabilities of all masks from those of their sizes."""
    return {word: sizes[word.count("1")] / comb(size, word.count("1")) for word in subsets(size)}


def test_uniform_masks_have_equal_frequencies():
    assert_frequencies(draw(UniformMask(), 5), dict.fromkeys(subsets(5), 1 / 31))
    assert_frequencies(draw(UniformMask(), 1, 10), {"1": 1.0})


def test_uniform_masks_of_many_parameters_keep_half_of_them():
    kept = draw(UniformMask(), 40, 4000).mean(axis=0)
    assert np.all(abs(kept - 0.5) < 5 * 0.5 / np.sqrt(4000))


def test_poisson_masks_draw_their_size_row_by_row():
    poisson = [exp(-1.5) * 1.5**k / factorial(k) for k in range(4)]
    sizes = {1: poisson[0], 2: poisson[1], 3: poisson[2], 4: 1 - sum(poisson[:3])}
    assert_frequencies(draw(PoissonMask(1.5), 4), by_size(4, sizes))


def test_masks_of_sizes_have_their_probabilities():
    assert_frequencies(draw(SizesMask((1, 2)), 3), {w: p for w, p in by_size(3, {1: 0.5, 2: 0.5, 3: 0}).items() if p})
    weighted = SizesMask((1, 2, "all"), probabilities=(0.2, 0.5, 0.3))
    assert_frequencies(draw(weighted, 4), {w: p for w, p in by_size(4, {1: 0.2, 2: 0.5, 3: 0, 4: 0.3}).items() if p})


def test_masks_of_a_selection_are_alike_and_hashable():
    law = SelectionMask(["=1", np.array([True, True, False])])
    assert_frequencies(draw(law, 3), dict.fromkeys(["100", "010", "001", "110"], 0.25))
    assert hash(law) == hash(SelectionMask(["=1", [True, True, False]]))


def test_restricted_masks_are_those_of_the_allowed_parameters():
    law = RestrictedMask(UniformMask(), "10110")
    expected = {f"{a}0{b}{c}0" for a in "01" for b in "01" for c in "01"} - {"00000"}
    assert_frequencies(draw(law, 5), dict.fromkeys(expected, 1 / 7))


def test_the_default_law_trains_small_marginals_of_many_parameters():
    assert default_mask_law(8) == UniformMask()
    sizes = draw(default_mask_law(15), 15, 600).sum(axis=1)
    assert set(sizes) == {1, 2, 15} and min(np.bincount(sizes)[[1, 2, 15]]) > 120  # five standard errors below 200


def test_the_language_of_masks():
    assert parse_masks("=2", 3).astype(int).tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    assert parse_masks(["011 =3", [True, True, True]], 3).astype(int).tolist() == [[0, 1, 1], [1, 1, 1]]
    assert len(parse_masks("=1 =2 11100100 11111111", 8)) == 38


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_masks("01", 3), r"one entry per parameter, 3, but '01'"),
        (lambda: parse_masks("000", 3), r"keeps no parameter"),
        (lambda: parse_masks([[False] * 3], 3), r"keeps no parameter"),
        (lambda: parse_masks("=4", 3), r"'=k' with k from 1 to 3"),
        (lambda: parse_masks("=0", 3), r"'=k' with k from 1 to 3"),
        (lambda: parse_masks("0a1", 3), r"'0a1' is no mask"),
        (lambda: parse_masks([], 3), r"no masks"),
        (lambda: PoissonMask(None), r"lam must be a positive number, got None"),
        (lambda: SizesMask(()), r"sizes is empty"),
        (lambda: SizesMask((0,)), r"must be a positive integer, got 0"),
        (lambda: SizesMask((1, 2), (0.5, 0.6)), r"sum to one"),
        (lambda: SizesMask((4,)).sample(random.key(0), 2, 3), r"masks of 4 parameters .* there are 3"),
        (lambda: RestrictedMask(UniformMask(), "000").sample(random.key(0), 2, 3), r"keeps no parameter"),
    ],
)
def test_masks_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
