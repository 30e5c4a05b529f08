"""The Hodgkin-Huxley benchmark: replicates trained side by side, its density-ratio loss, what it writes and resumes."""

import csv
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random
from numpyro.infer import SVI

from benchmarks import hodgkin_huxley
from benchmarks import hodgkin_huxley_losses as losses
from benchmarks import hodgkin_huxley_training as training
from models import hodgkin_huxley as hh
from models import hodgkin_huxley_guides as guides
from numpyro_smc import FIVO, SIXO, bootstrap

SETTINGS = {"num_steps": 9, "subsample": 3}
ARGUMENTS = ["--num_steps", "101", "--num_train_steps", "4", "--inner_steps", "2", "2", "--num_series", "6"]
ARGUMENTS += ["--num_test", "3", "--mlp_size", "4", "--rnn_size", "4", "--tilt_batch_size", "3"]
ARGUMENTS += ["--num_tilt_times", "5", "--num_eval_particles", "8", "--num_eval_keys", "2", "--num_truth_keys", "2"]
ARGUMENTS += ["--num_curve_points", "2", "--particles", "4", "--num_inference_keys", "1", "--num_paths", "20"]
ARGUMENTS += ["--num_tilt_series", "4", "--num_tilt_uses", "2", "--batch_size", "2", "--no-progress"]


def test_replicates_are_trained_by_their_own_losses_only():
    model = hh.make_model(**SETTINGS)
    data = jnp.asarray(training.make_data(0, 3, **SETTINGS)[1])
    loss = losses.Batches(FIVO(3), 2)

    @jax.jit
    def total(currents):
        params = {"current": currents}
        return loss.loss_with_mutable_state(random.key(0), params, model, bootstrap(model), data)["loss"]

    slopes = [jax.grad(total)(jnp.array([1.3, second])) for second in (20.0, 30.0)]
    assert float(slopes[0][0]) == float(slopes[1][0]) != 0.0
    assert float(slopes[0][1]) != float(slopes[1][1])


@pytest.mark.slow
def test_density_ratio_loss_at_random_steps_has_the_mean_of_sixo_s():
    # 400 and 400 evaluations under networks at random: the difference of means within five standard errors
    model = hh.make_model(**SETTINGS)
    guide = guides.make_guide("bootstrap", "learned", random.key(5), width=6, hidden_size=4, **SETTINGS)
    y = jnp.asarray(training.make_data(0, 1, **SETTINGS)[1][0])
    svi = SVI(model, guide, optax.adam(0.1), SIXO(2))
    params = svi.get_params(svi.init(random.key(0), y))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), params)
    params["current"] = jnp.asarray(13.0)
    build = guides.learned_twist(random.key(0), 9, 1, 3, 6, 4)
    at_random = losses.RatioLoss(model, build, num_series=8, num_uses=1, size=6, num_times=4, last=6, subsample=3)
    at_all = SIXO(2, twist_batch_size=6)
    keys = random.split(random.key(1), 400)

    def one(key):
        key, pool_key = random.split(key)
        x, seen, _ = at_random.draw(pool_key[None], jax.tree.map(lambda leaf: leaf[None], params))
        return at_random.of_replicate(key, params, x[0], seen[0])

    ours = jax.jit(jax.vmap(one))(keys)
    theirs = jax.jit(jax.vmap(lambda key: at_all.twist_loss(key, params, model, guide, y)))(keys)
    error = np.sqrt((np.var(ours, ddof=1) + np.var(theirs, ddof=1)) / 400)
    assert abs(np.mean(ours) - 2 * np.log(2)) > 10 * error  # the networks say something
    assert abs(np.mean(ours) - np.mean(theirs)) < 5 * error


def test_negatives_belong_to_other_observations_than_their_own():
    # A classifier that compares the potential with the observation: 2 log 2 for pairs that belong together twice
    model = hh.make_model(**SETTINGS)
    compare = lambda seen, times: (seen[times // 3], lambda x, y: 2.0 - (x[0] - y[0]) ** 2)  # noqa: E731
    loss = losses.RatioLoss(model, compare, 60, 1, 50, 20, 6, 3, {"current": 13.0})
    x, seen, _ = loss.draw(random.split(random.key(1), 1), {"current": jnp.zeros(1)})
    assert float(loss.of_replicate(random.key(0), {}, x[0], seen[0])) < 1.0


def test_pool_serves_some_steps_and_is_thrown_away_by_steps_of_the_model():
    model = hh.make_model(**SETTINGS)
    twist = lambda seen, times: (seen[times // 3], lambda x, y: x[0] * y[0])  # noqa: E731
    ratio_loss = losses.RatioLoss(model, twist, 3, 2, 2, 4, 6, 3)
    replicates = {"current": jnp.array([13.0, 20.0])}
    keys = random.split(random.key(0), 2)
    pools = [ratio_loss.draw(keys, replicates)]
    for seed in range(4):
        loss, pool = ratio_loss(random.split(random.key(1 + seed), 2), replicates, pools[-1])
        assert np.isfinite(loss)
        pools.append(pool)
    drawn = [not np.array_equal(one.x, other.x) for one, other in itertools.pairwise(pools)]
    assert drawn == [True, False, True, False] and [int(pool.uses) for pool in pools] == [0, 1, 2, 1, 2]
    assert not np.array_equal(pools[1].x[0], pools[1].x[1])
    batches = losses.Batches(FIVO(2), 2, ratio_loss)
    data = jnp.asarray(training.make_data(0, 3, **SETTINGS)[1])
    found = batches.loss_with_mutable_state(
        random.key(5), replicates | {"pool": pools[-1]}, model, bootstrap(model), data
    )
    assert int(found["mutable_state"]["pool"].uses) == 0


def test_twist_and_the_rest_are_held_in_turn():
    params = {"current": 1.0, "twist_mlp": 2.0, "proposal_mlp": 3.0}
    for of_twist, moving in ((True, {"current", "proposal_mlp"}), (False, {"twist_mlp"})):
        slopes = jax.grad(lambda p, of_twist=of_twist: sum(losses.hold(p, of_twist).values()))(params)
        assert {name for name, slope in slopes.items() if slope != 0} == moving


def test_rates_halve_at_milestones_or_follow_a_cosine():
    halved = training.schedule(0.4, 0.1, [10, 20], 30)
    assert [float(halved(step)) for step in (0, 11, 21)] == pytest.approx([0.4, 0.2, 0.1])
    cosine = training.schedule(0.4, 0.1, [], 30)
    assert [float(cosine(step)) for step in (0, 15, 30)] == pytest.approx([0.4, 0.25, 0.1])


def test_summary_tells_means_from_medians():
    values = np.array([[0.0, -1.0, -2.0], [0.0, -3.0, -100.0]])
    found = hodgkin_huxley.summary(values)
    assert found["filter"] == pytest.approx(-106 / 6) and found["filter median"] == -2.0
    expected = np.mean([0.0, np.log((np.exp(-1) + np.exp(-3)) / 2), -2 - np.log(2)])
    assert found["log-mean-exp"] == pytest.approx(expected)


def test_arguments_that_make_no_sense_are_refused(capsys):
    with pytest.raises(SystemExit):
        hodgkin_huxley.parse_arguments(["--inference_methods", "iwae"])
    assert "there is no 'iwae'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hodgkin_huxley.parse_arguments(["--tilt_batch_size", "65"])
    assert "there are only 64 series" in capsys.readouterr().err


@pytest.mark.slow
def test_truth_and_learning_write_their_tables_and_figures(tmp_path):
    argv = [*ARGUMENTS, "--methods", "fivo-bootstrap", "--init_currents", "1.3", "20", "--output", str(tmp_path)]
    rows = hodgkin_huxley.main(argv)
    assert [row.get("init_current") for row in rows] == [None, 1.3, 20.0]
    assert not [row for row in rows if "error" in row] and rows[1]["current"] != rows[2]["current"]
    assert all(row["relative error"] == pytest.approx(abs(row["current"] / 13 - 1)) for row in rows[1:])
    written = list(csv.DictReader((tmp_path / "hodgkin_huxley_learning.csv").read_text().splitlines()))
    assert [float(row["filter"]) for row in written] == [row["filter"] for row in rows[1:]]
    assert len((tmp_path / "hodgkin_huxley_series.csv").read_text().splitlines()) == 4
    curves = json.loads((tmp_path / "hodgkin_huxley_learning_curves.json").read_text())["rows"]
    assert [point["step"] for point in curves] == [2, 4, 2, 4]
    for figure in ("currents", "bounds"):
        assert (tmp_path / f"hodgkin_huxley_{figure}.png").stat().st_size > 5000


@pytest.mark.slow
def test_twisted_methods_train_resume_and_infer(tmp_path):
    argv = [*ARGUMENTS, "--experiment", "learning", "inference", "--methods", "sixo-smoothing", "fivo-filtering"]
    argv += ["--init_currents", "1.3", "--output", str(tmp_path)]
    rows = hodgkin_huxley.main(argv)
    assert not [row for row in rows if "error" in row]
    assert [row["steps"] for row in rows] == [8, 4, 0, 8]
    assert (tmp_path / rows[-1]["figure"]).stat().st_size > 5000
    for name in ("learning", "inference"):
        (tmp_path / f"hodgkin_huxley_{name}.json").unlink()
    again = hodgkin_huxley.main(argv)
    for row, other in zip(rows, again, strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
