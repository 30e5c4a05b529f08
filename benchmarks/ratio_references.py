r"""Our samplers on exact likelihoods of six simulators against reference posteriors: a check without any network.

Tempered SMC draws from each posterior, NUTS from those with one mode, and the classifier two-sample test (C2ST: 0.5 is
indistinguishable) compares them with the reference: published draws where the files are (--data-dir, or
NUMPYRO_SMC_DATA), exact draws otherwise; the Bernoulli GLM's reference is NUTS with another key. Two controls say what
the test can see: one half of the reference against the other, and draws from the prior.

Ranks: parameters are drawn from a task's prior, data from the simulator, and tempered SMC samples each posterior; the
weighted share of the cloud below the truth must be uniform, for each parameter and for the log likelihood. The table
has the largest distance of the distribution function from the diagonal, in units of 1 / sqrt(simulations), which
exceeds 1.95 in 0.1 % of exact samplers, and coverages of central intervals. The cloud has N particles: shares are
blurred by about 1 / sqrt(its effective size).

Columns: C2ST with the standard error of its folds; shift, the largest difference of means in reference deviations;
scale, the largest log ratio of deviations; log evidence, of SMC, with its standard error; CPU s, with compilation.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jax import random
from numpyro.infer import Predictive
from scipy.stats import norm

from benchmarks import report
from benchmarks.annealed_training import fill_table
from models import gaussian_linear
from models.sbi_benchmark import TASKS, Reference, Task, load_reference, posterior_model, sample_by_nuts
from numpyro_smc import SMCSampler
from numpyro_smc.reports.c2st import c2st

NAME = "ratio_references"
RANKS = f"{NAME}_ranks"
SMC, NUTS, HALVES, PRIOR = METHODS = ("smc", "nuts", "halves", "prior")
TARGET = 0.55  # of the C2ST
LEVELS = (0.5, 0.8, 0.95)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--observations", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--num_samples", type=int, default=10_000, help="draws of each, and particles of SMC")
    parser.add_argument("--num_moves", type=int, default=10, help="of SMC's particles at each temperature")
    parser.add_argument("--num_simulations", type=int, default=300, help="for the ranks; 0 for none")
    parser.add_argument("--rank_task", default="slcp", choices=list(TASKS))
    parser.add_argument("--rank_particles", type=int, default=2000, help="of each of these posteriors")
    parser.add_argument("--data-dir", default=None, help="folder of the published files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What to measure: controls at the first observation alone, NUTS where there is one mode."""
    return [
        {"task": task, "observation": observation, "method": method}
        for task in options.tasks
        for observation in options.observations
        for method in options.methods
        if method in (SMC, NUTS) or observation == options.observations[0]
        if method != NUTS or TASKS[task].is_unimodal
    ]


def compare(task: str, observation: int, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: draws by a method against the reference."""
    reference = load_reference(task, observation, options.data_dir, options.num_samples)
    began = time.process_time()
    samples, row = draw(task, method, reference, options)
    row["CPU s"] = time.process_time() - began
    truth = reference.samples
    if method == HALVES:
        truth = truth[: len(truth) // 2]
    found = c2st(truth, samples)
    row["C2ST"], row["s.e."] = float(found), float(np.std(found.folds, ddof=1) / math.sqrt(len(found.folds)))
    row["shift"] = float(np.max(np.abs(samples.mean(0) - truth.mean(0)) / truth.std(0)))
    row["scale"] = float(np.max(np.abs(np.log(samples.std(0) / truth.std(0)))))
    row["reference"] = reference.source
    return row


def draw(
    name: str, method: str, reference: Reference, options: argparse.Namespace
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draws ``[num_samples, D]``, and what else a method says."""
    task, number = TASKS[name], options.num_samples
    rng_key = random.key(options.seed)
    if method == HALVES:
        return reference.samples[number // 2 :], {}
    if method == PRIOR:
        return np.asarray(Predictive(task.prior, num_samples=number)(rng_key)["theta"]), {}
    if method == NUTS:
        return sample_by_nuts(rng_key, reference.observation, number, task=task), {}
    result = smc(task, number, options.num_moves).run(rng_key, reference.observation, progress_bar=False)
    row = {"log evidence": result.log_evidence, "log evidence s.e.": result.log_evidence_se}
    row["stages"] = len(result.betas)
    if name == "gaussian_linear":
        row["exact"] = float(norm.logpdf(reference.observation, 0, math.sqrt(2 * gaussian_linear.VARIANCE)).sum())
    return np.asarray(result.get_samples()["theta"]), row


@cache
def smc(task: Task, num_particles: int, num_moves: int) -> SMCSampler:
    """Its last stage resamples and moves as well: equal weights, and hardly a draw twice, which the test would see."""
    return SMCSampler(posterior_model(task), num_particles, num_moves=num_moves, ess_threshold=1.0)


def rank_table(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Uniformity of the truth's rank in the posteriors of simulated data: a row for each parameter, and one for the
    log likelihood."""
    keys = random.split(random.key(options.seed), 2)
    drawn = Predictive(task.simulator, num_samples=options.num_simulations)(keys[0])
    sampler = smc(task, options.rank_particles, options.num_moves)
    shares, began = [], time.process_time()
    for number, (truth, x) in enumerate(zip(drawn["theta"], drawn["x"], strict=True)):
        result = sampler.run(random.fold_in(keys[1], number), x, progress_bar=False)
        theta = result.samples["theta"]
        weights = np.exp(result.log_weights - np.max(result.log_weights))
        below = np.column_stack([theta < truth, task.log_likelihood(theta, x) < task.log_likelihood(truth, x)])
        shares.append(weights @ below / weights.sum())
    seconds = time.process_time() - began
    names = [f"theta[{i}]" for i in range(theta.shape[1])] + ["log likelihood"]
    return [
        {"quantity": name, **uniformity(values), "CPU s": seconds}
        for name, values in zip(names, np.transpose(shares), strict=True)
    ]


def uniformity(shares: np.ndarray) -> dict[str, float]:
    """Kolmogorov's distance from the uniform law, scaled, and how often central intervals hold the truth."""
    number, ordered = len(shares), np.sort(shares)
    steps = np.arange(number + 1) / number
    distance = max(np.max(steps[1:] - ordered), np.max(ordered - steps[:-1]))
    inside = {f"inside {level:.0%}": float(np.mean(np.abs(shares - 0.5) <= level / 2)) for level in LEVELS}
    return {"distance": float(distance * math.sqrt(number))} | inside


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    options = parse_arguments(argv)
    settings = {name: value for name, value in vars(options).items() if name not in ("data_dir", "output")}
    report.print_environment(settings)
    print()
    folder, free = Path(options.output), ("tasks", "observations", "methods", "output")

    def measure(task: str, observation: int, method: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return compare(task, observation, method, options), []

    comparison_settings = {k: v for k, v in settings.items() if not k.startswith(("num_simulations", "rank"))}
    rows, _ = fill_table(NAME, cells(options), measure, folder, comparison_settings, free)
    # What the rows of the other table were chosen by does not change this one.
    ranks = report.load(folder, RANKS, settings, (*free, "num_samples"))
    if options.num_simulations and not ranks:
        ranks = rank_table(TASKS[options.rank_task], options)
        report.write(folder, RANKS, ranks, settings)
    print(f"\nC2ST against the references; samplers are to stay below {TARGET}")
    columns = ("task", "observation", "method", "C2ST", "s.e.", "shift", "scale")
    columns += ("log evidence", "log evidence s.e.", "exact", "stages", "CPU s", "reference")
    report.print_table(rows, [*columns, "error"] if any("error" in row for row in rows) else columns)
    if ranks:
        print(f"\nRanks of the truth in tempered SMC: {options.rank_task}, {options.num_simulations} simulations")
        report.print_table(ranks)
    print(f"\nresults: {options.output}")
    return {NAME: rows, RANKS: ranks}


if __name__ == "__main__":
    main()
