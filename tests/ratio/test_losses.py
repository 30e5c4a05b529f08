"""Losses on a 3 x 3 joint table, exactly: where their minimum is. Then what they do with a batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_smc.ratio.classification import balance, binary, contrastive, softmax
from numpyro_smc.ratio.losses import (
    BalancedLoss,
    BinaryLoss,
    ContrastiveLoss,
    RatioLoss,
    SoftmaxLoss,
    contrasts,
    ratio_loss,
)

# Fourteen equally likely cases: rows are parameters, columns outputs.
COUNTS = np.array([[4, 1, 1], [1, 2, 1], [2, 1, 1]])
CASES = [(i, j) for i, j in itertools.product(range(3), range(3)) for _ in range(COUNTS[i, j])]
OWN, OUTPUT = np.array(CASES).T
JOINT = COUNTS / COUNTS.sum()
TRUE = np.log(JOINT / JOINT.sum(1, keepdims=True) / JOINT.sum(0))
NUM = len(CASES)


def population_ratios(table, num_joint, num_marginal):
    """Log ratios of all equally likely cases: an output with its own parameter and others, and with others alone."""
    others = np.array(list(itertools.product(OWN, repeat=num_joint)), int)
    rows = np.repeat(np.arange(NUM), len(others)), np.tile(np.arange(len(others)), NUM)
    joint = [table[OWN[rows[0]], OUTPUT[rows[0]]]]
    joint += [table[others[rows[1], k], OUTPUT[rows[0]]] for k in range(num_joint)]
    others = np.array(list(itertools.product(OWN, repeat=num_marginal)), int)
    rows = np.repeat(np.arange(NUM), len(others)), np.tile(np.arange(len(others)), NUM)
    marginal = [table[others[rows[1], k], OUTPUT[rows[0]]] for k in range(num_marginal)]
    return jnp.stack(joint), jnp.stack(marginal) if marginal else jnp.zeros((0, NUM))


def population_loss(table, loss):
    return loss.of_log_ratios(*population_ratios(table, *loss.num_contrasts))


def minimiser(loss):
    """By damped Newton steps from zero; losses that do not know their level are minimised nearby."""
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda flat: population_loss(flat.reshape(3, 3), loss)))
        hessian = jax.jit(jax.jacfwd(gradient))
        flat = jnp.zeros(9)
        for _ in range(40):
            flat = flat - 0.7 * jnp.linalg.lstsq(hessian(flat), gradient(flat))[0]
        assert abs(gradient(flat)).max() < 1e-9
        return np.asarray(flat).reshape(3, 3)


@pytest.mark.parametrize(
    "loss",
    [
        BinaryLoss(),
        BinaryLoss("quadratic"),
        ContrastiveLoss(1, 1.0),
        ContrastiveLoss(2, 0.5),
        ContrastiveLoss(2, 5.0),
        BalancedLoss(),
        BalancedLoss(ContrastiveLoss(2, 2.0), strength=10.0),
    ],
    ids=repr,
)
def test_calibrated_losses_are_smallest_at_the_true_ratio(loss):
    assert loss.calibrated
    np.testing.assert_allclose(minimiser(loss), TRUE, atol=1e-7)


def test_the_softmax_loss_is_smallest_at_the_true_ratio_up_to_a_factor_per_output():
    loss = SoftmaxLoss(3)
    assert not loss.calibrated
    difference = minimiser(loss) - TRUE
    np.testing.assert_allclose(difference - difference[:1], 0, atol=1e-7)
    shifted = TRUE + np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(population_loss(shifted, loss), population_loss(TRUE, loss), rtol=1e-6)


@pytest.mark.parametrize("score", ["focal", "peripheral"])
def test_improper_scores_miss_the_ratio_and_say_so(score):
    assert not BinaryLoss(score).calibrated
    gradient = jax.grad(population_loss)(jnp.asarray(TRUE), BinaryLoss(score))
    assert abs(gradient).max() > 1e-3


def test_weights_of_the_marginal_class_leave_the_rest_of_the_ratio():
    """With the log ratio of another estimator as weight, the optimum is what that one lacks; zero, if it is exact."""
    partial = 0.6 * TRUE
    with jax.enable_x64(True):

        def gradient(table, log_weights):
            def loss(table):
                joint, marginal = population_ratios(table, 0, 1)
                return binary(joint[0], marginal[0], population_ratios(log_weights, 0, 1)[1][0])

            return jax.grad(loss)(jnp.asarray(table))

        np.testing.assert_allclose(gradient(0.4 * TRUE, partial), 0, atol=1e-12)
        np.testing.assert_allclose(gradient(0 * TRUE, TRUE), 0, atol=1e-12)
        assert abs(gradient(TRUE, partial)).max() > 1e-2


def test_the_exact_ratio_is_balanced_and_another_is_not():
    joint, marginal = population_ratios(TRUE, 0, 1)
    assert balance(joint[0], marginal) < 1e-12
    joint, marginal = population_ratios(TRUE + 1, 0, 1)
    assert balance(joint[0], marginal) > 1e-2


def log_ratios(seed, *shape):
    return 2 * random.normal(random.key(seed), shape)


def test_the_contrastive_loss_of_one_class_is_the_binary_one():
    joint, marginal = log_ratios(0, 20), log_ratios(1, 20)
    np.testing.assert_allclose(
        contrastive(joint, marginal[None][:0], marginal[None]), binary(joint, marginal), rtol=1e-6
    )


def test_the_contrastive_loss_of_large_odds_is_twice_the_softmax_one():
    joint, others, marginal = log_ratios(0, 20), log_ratios(1, 3, 20), log_ratios(2, 4, 20)
    gradient = jax.grad(lambda joint: contrastive(joint, others, marginal, 1e6))(joint)
    expected = jax.grad(lambda joint: 2 * softmax(joint, others))(joint)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_the_contrastive_loss_is_its_formula():
    joint, others, marginal = (np.asarray(log_ratios(*args)) for args in ((0, 5), (1, 2, 5), (2, 3, 5)))
    g, k = 0.7, 3
    none = k / (k + g * np.exp(marginal).sum(0))
    own = g * np.exp(joint) / (k + g * (np.exp(joint) + np.exp(others).sum(0)))
    expected = -2 / (1 + g) * np.log(none).mean() - 2 * g / (1 + g) * np.log(own).mean()
    np.testing.assert_allclose(contrastive(joint, others, marginal, g), expected, rtol=1e-5)


def test_losses_of_fixed_marginals_are_summed():
    joint, others, marginal = log_ratios(0, 6, 2), log_ratios(1, 2, 6, 2), log_ratios(2, 3, 6, 2)
    for loss, arguments in (
        (lambda j, c, m: binary(j, m[0]), (joint, others, marginal)),
        (lambda j, c, m: softmax(j, c), (joint, others, marginal)),
        (lambda j, c, m: contrastive(j, c, m, 2.0), (joint, others, marginal)),
        (lambda j, c, m: balance(j, m), (joint, others, marginal)),
    ):
        each = sum(loss(*(a[..., i] for a in arguments)) for i in range(2))
        np.testing.assert_allclose(loss(*arguments), each, rtol=1e-5)


def test_contrasts_never_repeat_and_never_are_the_rows_own():
    theta = jnp.arange(12.0)[:, None]
    drawn = np.stack([contrasts(random.key(seed), theta, 11)[..., 0] for seed in range(3)])
    assert np.all(np.sort(drawn, axis=1) == np.array([np.delete(np.arange(12), row) for row in range(12)]).T)
    # One contrast, 1100 keys: each other row has probability 1/11, within five standard errors.
    first = jax.vmap(lambda key: contrasts(key, theta, 1)[0, 4, 0])(random.split(random.key(9), 1100))
    frequencies = np.bincount(np.asarray(first, int), minlength=12) / 1100
    assert frequencies[4] == 0 and np.all(abs(np.delete(frequencies, 4) - 1 / 11) < 5 * np.sqrt(10 / 121 / 1100))


def product(theta, features, mask):
    return (theta * features * (1 if mask is None else mask)).sum(-1)


@pytest.mark.parametrize("name", ["A", "B", "C", "balanced", "balanced C"])
def test_a_loss_contrasts_each_row_with_others_under_its_own_mask_and_output(name):
    loss, batch = ratio_loss(name, num_classes=3, gamma=2.0), 8
    theta, features = log_ratios(0, batch, 2), log_ratios(1, batch, 2)
    mask = random.bernoulli(random.key(2), shape=(batch, 2))
    seen = []

    def recording(theta, features, mask):
        seen.append(theta)
        return product(theta, features, mask)

    value = loss(random.key(3), recording, theta, features, mask)
    num_joint, num_marginal = loss.num_contrasts
    assert seen[0].shape == (1 + num_joint + num_marginal, batch, 2) and np.array_equal(seen[0][0], theta)
    ratios = np.stack([product(t, features, mask) for t in seen[0]])
    expected = loss.of_log_ratios(jnp.array(ratios[: 1 + num_joint]), jnp.array(ratios[1 + num_joint :]))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_two_classes_meet_different_contrasts():
    theta = jnp.arange(50.0)[:, None]
    seen = []
    ContrastiveLoss(5)(random.key(0), lambda theta, *_: (seen.append(theta), theta[..., 0])[1], theta, theta)
    joint, marginal = (set(part[:, 0, 0].tolist()) for part in (seen[0][1:5], seen[0][5:]))
    assert len(joint) == 4 and len(marginal) == 5 and joint - marginal


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, lambda loss: BalancedLoss(loss, full_at=0.0)], ids=["C", "balanced C"]
)
def test_shared_contrasts_are_evaluated_once_and_serve_both_classes(wrap):
    loss, theta, seen = wrap(ContrastiveLoss(3, 2.0, shared=True)), log_ratios(0, 8, 2), []
    value = loss(random.key(3), lambda theta, *rest: (seen.append(theta), product(theta, *rest))[1], theta, theta)
    assert seen[0].shape == (4, 8, 2) and np.array_equal(seen[0][0], theta)
    ratios = product(seen[0], theta, None)
    np.testing.assert_allclose(value, loss.of_log_ratios(ratios[:3], ratios[1:]), rtol=1e-5)


def test_the_balancing_penalty_ramps_up_to_four_fifths_of_the_training():
    theta = features = log_ratios(0, 8, 2)
    values = [
        float(BalancedLoss(strength=3.0)(random.key(0), product, theta, features, progress=progress))
        for progress in (0.0, 0.4, 0.8, 1.0)
    ]
    assert np.isclose(values[0], BinaryLoss()(random.key(0), product, theta, features))
    ratios = product(jnp.stack([theta, contrasts(random.split(random.key(0))[1], theta, 1)[0]]), features, None)
    np.testing.assert_allclose(values[2] - values[0], 2 * 3 * balance(ratios[0], ratios[1:]), rtol=1e-4)
    np.testing.assert_allclose(values[1] - values[0], (values[2] - values[0]) / 2, rtol=1e-4)
    assert values[3] == values[2]


def test_the_binary_loss_starts_at_twice_log_two_and_weights_belong_to_the_contrasts():
    theta = features = log_ratios(0, 8, 2)
    nothing = lambda theta, features, mask: jnp.zeros(theta.shape[:-1])  # noqa: E731
    assert np.isclose(BinaryLoss()(random.key(0), nothing, theta, features), 2 * np.log(2))
    seen = []

    def log_weight(theta):
        seen.append(theta)
        return jnp.full(theta.shape[:-1], np.log(3.0))

    assert np.isclose(BinaryLoss()(random.key(0), nothing, theta, features, log_weight=log_weight), 4 * np.log(2))
    assert np.array_equal(seen[0], contrasts(random.split(random.key(0))[1], theta, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContrastiveLoss(8)(*batch_of(8)), r"ContrastiveLoss: a batch needs at least 9 rows, .* but has 8"),
        (lambda: SoftmaxLoss(9)(*batch_of(8)), r"SoftmaxLoss: a batch needs at least 9 rows"),
        (lambda: BinaryLoss()(*batch_of(1)), r"BinaryLoss: a batch needs at least 2 rows"),
        (lambda: SoftmaxLoss(1), r"num_classes"),
        (lambda: ContrastiveLoss(0), r"num_classes must be a positive integer, got 0"),
        (lambda: ContrastiveLoss(gamma=float("inf")), r"its limit is SoftmaxLoss"),
        (lambda: BalancedLoss(SoftmaxLoss()), r"only BinaryLoss\(\) and ContrastiveLoss\(...\) .* got SoftmaxLoss"),
        (lambda: BalancedLoss(strength=-1), r"strength must be non-negative"),
        (lambda: BinaryLoss("hinge"), r"score must be one of .* got 'hinge'"),
        (lambda: ratio_loss("D"), r"loss must be one of .* got 'D'"),
        (lambda: SoftmaxLoss(2)(*batch_of(4), log_weight=lambda theta: theta[..., 0]), r"for BinaryLoss only"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def batch_of(num):
    theta = log_ratios(0, num, 2)
    return random.key(0), product, theta, theta


def test_losses_are_values_that_programs_can_be_compiled_for():
    for name in ("A", "B", "C", "balanced"):
        assert isinstance(ratio_loss(name), RatioLoss)
        assert ratio_loss(name) == ratio_loss(name) and hash(ratio_loss(name)) == hash(ratio_loss(name))
