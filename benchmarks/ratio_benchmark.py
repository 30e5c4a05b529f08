r"""Ratio estimators on the benchmark of likelihood-free inference [1]: how far their posteriors are from the
references.

One network a task and budget of simulations, trained on the program of the simulator; then the posteriors of all
observations at once by tempered SMC on the ratio, in one compiled program, and the classifier two-sample test (C2ST:
0.5 is indistinguishable, 1 is told apart) against the reference posteriors: the published ones where their files are
(--data-dir, or NUMPYRO_SMC_DATA), exact draws otherwise (see models.sbi_benchmark). Beside it the published figures,
means over ten observations: NRE-C [2] (99 classes, residual network of 3 blocks of 128 units with batch norm, batches
of 1024, at most 1000 epochs) and NRE-B [1] (10 atoms, residual network of 2 blocks of 50, batches of 10,000).

Columns: C2ST with the standard error over folds; calibration, log of the mean ratio under the prior at the
observation, which is 0 for a right ratio; epochs and CPU seconds of the training; CPU seconds of sampling all
observations.

Published settings: --num_simulations 1000 10000 100000 --observations 1 2 3 4 5 6 7 8 9 10 --batch_size 1024
--max_epochs 1000 --learning_rate 0.0005 --num_classes 99 --independent. A fast preset: --fast.

1. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021)
2. *Contrastive Neural Ratio Estimation*, B. K. Miller, C. Weniger, P. Forré (2022)
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jax import random

from benchmarks import report
from benchmarks.annealed_training import fill_table
from models.sbi_benchmark import TASKS, load_reference
from numpyro_smc.ratio.diagnostics.calibration import coverage
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.losses import ContrastiveLoss, RatioLoss, ratio_loss
from numpyro_smc.ratio.networks import residual_mlp
from numpyro_smc.ratio.nre import NRE
from numpyro_smc.ratio.posterior import RatioPosterior
from numpyro_smc.reports.c2st import c2st

NAME = "ratio_benchmark"

#: C2ST, mean over ten observations, at 1,000, 10,000 and 100,000 simulations.
PUBLISHED = {
    "two_moons": {"C": (0.680, 0.578, 0.520), "B": (0.822, 0.761, 0.629)},
    "slcp": {"C": (0.974, 0.892, 0.794), "B": (0.972, 0.947, 0.919)},
    "gaussian_mixture": {"C": (0.757, 0.750, 0.724), "B": (0.777, 0.748, 0.735)},
    "gaussian_linear": {"C": (0.655, 0.556, 0.519), "B": (0.672, 0.560, 0.536)},
    "gaussian_linear_uniform": {"C": (0.746, 0.660, 0.550), "B": (0.788, 0.706, 0.631)},
    "bernoulli_glm": {"C": (0.802, 0.694, 0.601), "B": (0.899, 0.812, 0.751)},
}
FAST = {"num_simulations": [10_000], "num_classes": 8, "max_epochs": 60}
FREE = ("tasks", "num_simulations", "observations", "output")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["two_moons"], choices=list(TASKS))
    parser.add_argument("--num_simulations", nargs="+", type=int, default=[10_000])
    parser.add_argument("--observations", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--loss", default="C", choices=["A", "B", "C", "balanced", "balanced C"])
    parser.add_argument("--num_classes", type=int, default=20)
    parser.add_argument("--independent", action="store_true", help="contrasts of C drawn apart for its two classes")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--max_epochs", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--schedule", default="cosine", choices=["constant", "cosine", "plateau"])
    parser.add_argument("--patience", type=int, default=40)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num_blocks", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=10_000, help="draws compared, and particles of SMC")
    parser.add_argument("--num_moves", type=int, default=10, help="of the particles, at each temperature")
    parser.add_argument("--num_coverage", type=int, default=0, help="simulations for the expected coverage; 0 for none")
    parser.add_argument("--fast", action="store_true", help="a small budget, under a minute of training")
    parser.add_argument("--data-dir", default=None, help="folder of the published files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results and trained weights")
    options = parser.parse_args(argv)
    if options.fast:
        vars(options).update(FAST)
    return options


def make_loss(options: argparse.Namespace) -> RatioLoss:
    """The loss by name; the classes of C share their contrasts, at half the cost, unless told otherwise."""
    if options.loss == "C":
        return ContrastiveLoss(options.num_classes, shared=not options.independent)
    return ratio_loss(options.loss, options.num_classes)


def train(task: str, num_simulations: int, options: argparse.Namespace) -> tuple[RatioEstimator, dict[str, Any]]:
    """The task's estimator and what its training took; trained weights are taken up again."""
    trunk = residual_mlp(options.width, options.num_blocks)
    with warnings.catch_warnings():
        # Some of the simulators have a likelihood, which the benchmark does not use.
        warnings.filterwarnings("ignore", "NRE: the simulator has no hidden draws")
        nre = NRE(TASKS[task].simulator, ["theta"], loss=make_loss(options), trunk=trunk)
    settings = {name: value for name, value in vars(options).items() if name not in (*FREE, "data_dir")}
    path = Path(options.output) / f"{task}-{num_simulations}-{report.digest(settings)}.npz"
    started = time.process_time()
    estimator = nre.train(
        random.key(options.seed),
        num_simulations,
        batch_size=min(options.batch_size, num_simulations // 4),
        max_epochs=options.max_epochs,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        patience=options.patience,
        checkpoint=path,
        progress_bar=False,
    )
    record = estimator.training
    row = {"epochs": len(record.table), "validation loss": min(line["validation_loss"] for line in record.table)}
    return estimator, row | {"training CPU s": time.process_time() - started}


def posteriors(estimator: RatioEstimator, task: str, options: argparse.Namespace) -> tuple[list[RatioPosterior], float]:
    """The posteriors of all observations, and CPU seconds."""
    observed = [load_reference(task, number, options.data_dir).observation for number in options.observations]
    started = time.process_time()
    # The last stage resamples and moves as well, so that hardly a draw comes twice, which the test would see.
    found = estimator.sample_many(
        random.key(options.seed + 1),
        np.stack(observed),
        num_particles=options.num_samples,
        moves="rwmh",
        num_moves=options.num_moves,
        ess_threshold=1.0,
    )
    return found, time.process_time() - started


def coverage_of(estimator: RatioEstimator, options: argparse.Namespace) -> dict[str, float]:
    """Expected coverage: its largest deviation from the diagonal (above: conservative), and the part below it alone."""
    key = random.key(options.seed + 2)
    found = coverage(estimator, key, options.num_coverage, num_samples=200, moves="rwmh", num_moves=options.num_moves)
    levels = np.linspace(0.01, 0.99, 99)
    below = float(np.min(found.distribution(levels)[:, 0] - levels))
    return {"coverage deviation": float(found.deviations[0]), "coverage p": float(found.p_values[0]), "below": below}


def beside_published(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Means over observations beside the published figures."""
    table = []
    for task in options.tasks:
        for budget in options.num_simulations:
            found = [row for row in rows if (row["task"], row["simulations"]) == (task, budget)]
            found = [row for row in found if "C2ST" in row and row["observation"] in options.observations]
            if not found:
                continue
            accuracies = np.array([row["C2ST"] for row in found])
            line = {"task": task, "simulations": budget, "observations": len(found), "C2ST": float(accuracies.mean())}
            line["sd"] = float(accuracies.std(ddof=1)) if len(found) > 1 else float("nan")
            for loss in ("C", "B"):
                at = {1_000: 0, 10_000: 1, 100_000: 2}.get(budget)
                line[f"published NRE-{loss}"] = "" if at is None else PUBLISHED[task][loss][at]
            line["training CPU s"] = max(row["training CPU s"] for row in found)
            line["sampling CPU s"] = max(row["sampling CPU s"] for row in found)
            table.append(line)
    return table


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = {name: value for name, value in vars(options).items() if name not in ("data_dir", "output")}
    report.print_environment(settings)
    print()
    Path(options.output).mkdir(parents=True, exist_ok=True)

    @cache
    def trained(task: str, budget: int) -> tuple[dict[int, RatioPosterior], dict[str, Any]]:
        estimator, row = train(task, budget, options)
        if options.num_coverage:
            row |= coverage_of(estimator, options)
        found, seconds = posteriors(estimator, task, options)
        return dict(zip(options.observations, found, strict=True)), row | {"sampling CPU s": seconds}

    def measure(task: str, simulations: int, observation: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        found, row = trained(task, simulations)
        result, reference = found[observation], load_reference(task, observation, options.data_dir)
        test = c2st(reference.samples, np.asarray(result.get_samples()["theta"]))
        row = {"C2ST": float(test), "s.e.": float(np.std(test.folds, ddof=1) / np.sqrt(len(test.folds))), **row}
        if result.is_calibrated:
            row["calibration"], row["calibration s.e."] = result.calibration
        return row | {"stages": len(result.betas), "reference": reference.source}, []

    cells = [
        {"task": task, "simulations": budget, "observation": observation}
        for task in options.tasks
        for budget in options.num_simulations
        for observation in options.observations
    ]
    rows, _ = fill_table(NAME, cells, measure, Path(options.output), settings, FREE)
    report.print_table(rows, list(dict.fromkeys(column for row in rows for column in row)))
    print(f"\nC2ST beside the published figures, NRE-{options.loss}")
    report.print_table(beside_published(rows, options))
    print(f"\nresults: {options.output}")
    return rows


if __name__ == "__main__":
    main()
