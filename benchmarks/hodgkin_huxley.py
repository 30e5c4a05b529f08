r"""The Hodgkin-Huxley neuron: its current learned from wrong starts, and inference of its potential [1].

``truth``: log evidences at the true current by a bootstrap filter, a line per test series in a CSV of its own.
``learning``: FIVO and SIXO learn the current from each of several wrong values at once; the current and its relative
error, the method's own bound, and the log evidence of test series by the filter; figures of both over training.
``inference``: with the current known, proposals and twists are trained for each noise and subsampling; bounds by the
number of particles, and a figure of the potential with its posterior bands. Tables and curves are written after each
row; training resumes from checkpoints, and finished rows are taken up.

The gradient of the current through a bootstrap proposal is a chain over 2,000 states, of standard deviation 100 to 600
a series, and has to average to a score of 0.1 per unit of current. Proposals that are held (``-held``) leave the
gradient of transition densities of given paths, as published proposals by networks do: its standard deviation is about
1.7, and with a good twist its mean is the score, for then the filter is the smoother.

Test series are 64, as published, of this program's own keys. Estimates of log evidences are heavy-tailed, over series
and over keys: medians stand beside the means.

Published [1, table 2] (N = 4, filter of 256 particles): the true model -48.30; FIVO -50.06 +/- 0.55 on test series at
a relative error of the current of 0.43 +/- 0.12; SIXO -48.68 +/- 0.26 at 0.011 +/- 0.09. Settings of the published
scripts: --num_series 10000 --num_train_steps 8000000 --inner_steps 400 100 --batch_size 4 --tilt_batch_size 32
--num_tilt_series 32 --num_tilt_uses 1 --num_tilt_times 2000 --clip inf --init_log_scale 0, Adam, rates halved at
milestones:

  fivo-bootstrap  --lr 1e-2 --milestones 150000 300000 600000
  fivo-filtering  --lr 3e-4 --proposal_lr 2e-4
  sixo-bootstrap  --lr 5e-3 --milestones 400000 800000 1600000 --tilt_lr 2e-4 --tilt_milestones 100000 200000 400000
  sixo-smoothing  --lr 3e-4 --milestones 80000 160000 320000 --proposal_lr 1e-4 --tilt_lr 4e-3
                  --tilt_milestones 20000 40000 80000

(constant rates: --final_lr and --final_tilt_lr equal to the first.) Inference: 600,000 steps, --num_series 1000
--noises 1 2.5 5 10 25 --subsamples 1 2 5 10 25 50 100 --particles 4 8 16 32 64 128 256 --num_inference_keys 10.

1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventos, A. Warrington, S. Linderman (2022)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.infer import SVI
from scipy.special import logsumexp

from benchmarks import hodgkin_huxley_figures as figures
from benchmarks import report
from benchmarks.annealed_training import fill_table
from benchmarks.hodgkin_huxley_training import METHODS, build, filter_evidences, make_data, own_bounds, train
from models import hodgkin_huxley as hh
from numpyro_smc import FitResult

NAME = "hodgkin_huxley"
EXPERIMENTS = ("truth", "learning", "inference")
#: Keys of the data, as published: training and test.
TRAIN_SEED, TEST_SEED = 1, 3
PUBLISHED = {"truth": -48.30, "fivo-bootstrap": -50.06, "sixo-bootstrap": -48.68}

#: Settings that choose rows, or where things are.
FREE = ("experiment", "methods", "noises", "subsamples", "inference_methods", "stop_after", "output", "no_progress")
#: Settings that training does not depend on.
EVALUATION = (
    *("num_test", "num_eval_particles", "num_eval_keys", "num_truth_keys"),
    *("particles", "num_inference_keys", "num_paths"),
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", nargs="+", default=["truth", "learning"], choices=EXPERIMENTS)
    parser.add_argument("--methods", nargs="+", default=["fivo-bootstrap", "sixo-bootstrap-held"], choices=METHODS)
    parser.add_argument("--init_currents", type=float, nargs="+", default=list(hh.MISINITIALISED_CURRENTS))
    parser.add_argument("--num_steps", type=int, default=hh.NUM_STEPS, help="length of a series, 0.02 ms each")
    parser.add_argument("--num_series", type=int, default=1000, help="training series (published: 10000)")
    parser.add_argument("--num_test", type=int, default=64, help="test series")
    training = parser.add_argument_group("training")
    training.add_argument("--num_train_steps", type=int, default=600, help="model steps (published: millions)")
    training.add_argument("--stop_after", type=int, help="stop at this step; without its table, a call goes on")
    training.add_argument("--num_train_particles", type=int, default=4)
    training.add_argument("--batch_size", type=int, default=16, help="series per step of the model (published: 4)")
    training.add_argument("--lr", type=float, default=0.2, help="Adam step size of the current")
    training.add_argument("--final_lr", type=float, default=0.01, help="end of its cosine schedule")
    training.add_argument("--milestones", type=int, nargs="*", default=[], help="halve it here, instead of a cosine")
    training.add_argument("--proposal_lr", type=float, default=1e-3, help="Adam step size of proposal networks")
    training.add_argument("--tilt_lr", type=float, default=3e-3, help="Adam step size of the twist")
    training.add_argument("--final_tilt_lr", type=float, default=3e-4, help="end of its cosine schedule")
    training.add_argument("--tilt_milestones", type=int, nargs="*", default=[])
    training.add_argument("--tilt_batch_size", type=int, default=32, help="simulated series per step of the twist")
    training.add_argument("--num_tilt_times", type=int, default=100, help="steps of each that the twist is trained at")
    training.add_argument("--num_tilt_series", type=int, default=64, help="simulated series to draw these from")
    training.add_argument("--num_tilt_uses", type=int, default=40, help="steps of the twist before they are made anew")
    training.add_argument("--clip", type=float, default=10.0, help="largest gradient of the current; inf: none")
    training.add_argument("--inner_steps", type=int, nargs=2, default=[10, 40], help="model and twist steps per turn")
    training.add_argument("--residual", default="full", choices=("none", "mean", "full"), help="of network proposals")
    training.add_argument("--init_log_scale", type=float, default=3.0, help="of their potentials")
    training.add_argument("--mlp_size", type=int, default=32, help="units of each hidden layer")
    training.add_argument("--rnn_size", type=int, default=32, help="units of each recurrent network")
    training.add_argument("--num_curve_points", type=int, default=40, help="evaluations during training")
    training.add_argument("--num_curve_series", type=int, default=4, help="series of these evaluations")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--num_eval_particles", type=int, default=256, help="of the bootstrap filter")
    evaluation.add_argument("--num_eval_keys", type=int, default=2, help="filters per learned current (published: 5)")
    evaluation.add_argument("--num_truth_keys", type=int, default=10, help="filters at the true current")
    inference = parser.add_argument_group("inference")
    inference.add_argument("--inference_methods", nargs="+", default=["fivo-bootstrap", "sixo-smoothing"])
    inference.add_argument("--noises", type=float, nargs="+", default=[5.0], help="standard deviations in mV")
    inference.add_argument("--subsamples", type=int, nargs="+", default=[hh.SUBSAMPLE], help="steps per observation")
    inference.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64, 256])
    inference.add_argument("--num_inference_keys", type=int, default=2, help="repeats of each bound")
    inference.add_argument("--num_paths", type=int, default=200, help="paths of the posterior bands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/hodgkin_huxley")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(argv)
    if unknown := set(options.inference_methods) - set(METHODS):
        parser.error(f"--inference_methods: there is no {sorted(unknown)[0]!r}; choose from {', '.join(METHODS)}")
    if options.tilt_batch_size > options.num_tilt_series:
        parser.error(f"--tilt_batch_size: there are only {options.num_tilt_series} series (--num_tilt_series)")
    return options


def summary(values: np.ndarray) -> dict[str, float]:
    """Of log evidences ``[keys, series]``: the mean, its error over series, and two numbers that tails do not move.

    ``"filter median"`` is the median over series of the median over keys. ``"log-mean-exp"`` takes the mean of the
    evidences over keys first, which is nearer to the evidence, and then averages over series.
    """
    by_series = values.mean(0)
    return {
        "filter": float(by_series.mean()),
        "filter s.e.": float(by_series.std(ddof=1) / np.sqrt(len(by_series))),
        "filter median": float(np.median(np.median(values, 0))),
        "log-mean-exp": float(np.mean(logsumexp(values, 0) - np.log(len(values)))),
    }


# True current


def at_truth(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Evidences at the true current; writes one line per test series."""
    model = hh.make_model(options.num_steps)
    y = test_series(options.num_steps, options.num_test)
    fixed = {"current": jnp.asarray(hh.TRUE_CURRENT)}
    values = filter_evidences(model, None, fixed, y, options.num_eval_particles, options.num_truth_keys)
    lines = [
        {
            "series": number,
            "mean": float(column.mean()),
            "s.d.": float(column.std(ddof=1)),
            "median": float(np.median(column)),
            "log-mean-exp": float(logsumexp(column) - np.log(len(column))),
        }
        for number, column in enumerate(values.T)
    ]
    report.write(options.output, f"{NAME}_series", lines, settings)
    row = {"method": "truth", "current": hh.TRUE_CURRENT, **summary(values)}
    by_key = values.mean(1)
    row |= {"keys": len(by_key), "lowest key": float(by_key.min()), "highest key": float(by_key.max())}
    return row | {"published filter": PUBLISHED["truth"]}


@cache
def test_series(num_steps: int, num_series: int, **settings: Any) -> Array:
    return jnp.asarray(make_data(TEST_SEED, num_series, num_steps=num_steps, **settings)[1])


@cache
def training_series(num_steps: int, num_series: int, **settings: Any) -> Array:
    return jnp.asarray(make_data(TRAIN_SEED, num_series, num_steps=num_steps, **settings)[1])


# Learning


def measure_learning(
    method: str, init_current: float, options: argparse.Namespace, trained: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of one initial current, and its curve."""
    svi, result, seconds = trained(method)
    place = options.init_currents.index(init_current)
    replicate = {name: tree_at(value, place) for name, value in result.params.items()}
    current = float(replicate["current"])
    test = test_series(options.num_steps, options.num_test)
    values = filter_evidences(
        svi.model,
        None,
        {"current": replicate["current"]},
        test,
        options.num_eval_particles,
        options.num_eval_keys,
    )
    few = training_series(options.num_steps, options.num_series)[:64]
    bounds = np.asarray(own_bounds(svi, replicate, few, random.key(99), 2)).mean(0)
    row = {
        "current": current,
        "relative error": abs(current / hh.TRUE_CURRENT - 1),
        "own train bound": float(bounds.mean()),
        "own bound s.e.": float(bounds.std(ddof=1) / np.sqrt(len(bounds))),
        "own bound median": float(np.median(bounds)),
        **summary(values),
        "model steps": model_steps(len(result.losses), METHODS[method].twisted, options),
        "steps": len(result.losses),
        "seconds of this call, all currents": round(seconds, 1),
        "skipped": result.num_skipped,
    }
    if method in PUBLISHED:
        row["published filter"] = PUBLISHED[method]
    points = [
        {"step": step, "current": found[f"current {place}"], "bound": found[f"bound {place}"]}
        for step, found in result.evaluations
    ]
    return row, points


def model_steps(steps: int, twisted: bool, options: argparse.Namespace) -> int:
    """How many of the steps were the model's."""
    turns = options.inner_steps
    return steps // sum(turns) * turns[0] + min(steps % sum(turns), turns[0]) if twisted else steps


def tree_at(tree: Any, place: int) -> Any:
    """One replicate's values."""
    return jax.tree.map(lambda value: value[place], tree)


def learn(method: str, options: argparse.Namespace, settings: dict[str, Any]) -> tuple[SVI, FitResult, float]:
    """Train a method from all initial currents at once; its checkpoint is taken up."""
    started = time.perf_counter()
    svi = build(method, options, options.seed, num_steps=options.num_steps)
    result = train(
        svi,
        options.seed,
        options.num_train_steps,
        training_series(options.num_steps, options.num_series),
        options.init_currents,
        options,
        Path(options.output) / f"{method}-{report.digest(relevant(settings))}.npz",
    )
    return svi, result, time.perf_counter() - started


def relevant(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that training depends on."""
    return {name: value for name, value in settings.items() if name not in (*FREE, *EVALUATION)}


# Inference at the true current


def measure_inference(
    method: str, noise: float, subsample: int, options: argparse.Namespace, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Bounds of a method by the number of particles, on test series, and its figure of one of them."""
    program = {"noise": noise, "subsample": subsample}
    fixed = {"current": jnp.asarray(hh.TRUE_CURRENT)}
    svi = build(method, options, options.seed, fixed, num_steps=options.num_steps, **program)
    params: dict[str, Any] = {}
    started = time.perf_counter()
    num_steps = 0
    if method != "fivo-bootstrap":
        name = f"{method}-{noise:g}-{subsample}-{report.digest(relevant(settings))}.npz"
        data = training_series(options.num_steps, options.num_series, **program)
        folder = Path(options.output)
        result = train(svi, options.seed, options.num_train_steps, data, None, options, folder / name, fixed)
        params, num_steps = tree_at(result.params, 0), len(result.losses)
    seconds = time.perf_counter() - started
    test = test_series(options.num_steps, options.num_test, **program)
    is_twisted = METHODS[method].twisted
    points = []
    for size in options.particles:
        values = filter_evidences(
            svi.model, svi.guide, params, test, size, options.num_inference_keys, fixed, twisted=is_twisted
        )
        points.append({"particles": size, "bound median": float(np.median(values)), **bound_of(values)})
    states, y = make_data(TEST_SEED, options.num_test, num_steps=options.num_steps, **program)
    figure = figures.posterior_bands(method, svi, params, fixed, states, y, program, options)
    row = {"steps": num_steps, "seconds": round(seconds, 1), "figure": figure}
    return row | {f"bound {point['particles']}": point["bound"] for point in points}, points


def bound_of(values: np.ndarray) -> dict[str, float]:
    """Mean over series and keys, and its error over series."""
    by_series = values.mean(0)
    return {"bound": float(by_series.mean()), "s.e.": float(by_series.std(ddof=1) / np.sqrt(len(by_series)))}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "no_progress")}
    report.print_environment(settings)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if "truth" in options.experiment:
        found, _ = fill_table(
            f"{NAME}_truth",
            [{"method": "truth"}],
            lambda method: (at_truth(options, settings), []),
            folder,
            settings,
            FREE,
        )
        report.print_table(found)
        rows += found
    if "learning" in options.experiment:
        cells = [{"method": name, "init_current": start} for name in options.methods for start in options.init_currents]
        trained = cache(partial(learn, options=options, settings=settings))
        measure = partial(measure_learning, options=options, trained=trained)
        found, curves = fill_table(f"{NAME}_learning", cells, measure, folder, settings, FREE)
        figures.learning(curves, folder, NAME)
        report.print_table(found)
        rows += found
    if "inference" in options.experiment:
        cells = [
            {"method": name, "noise": noise, "subsample": subsample}
            for noise in options.noises
            for subsample in options.subsamples
            for name in options.inference_methods
        ]
        measure = partial(measure_inference, options=options, settings=settings)
        found, curves = fill_table(f"{NAME}_inference", cells, measure, folder, settings, FREE)
        figures.inference(curves, folder, NAME)
        report.print_table(found)
        rows += found
    print(f"\nresults and figures: {options.output}")
    return rows


if __name__ == "__main__":
    main()
