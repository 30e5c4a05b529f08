"""How fast a ratio network trains, beside the same training written in PyTorch.

The published network of simple likelihood, complex posterior: any marginal of five parameters (AMNRE), a perceptron of
465,665 weights (seven layers of 256 ELUs), NRE-A, AdamW, clipped gradients, uniform masks, data in memory. An epoch is
256 steps of 1024 rows. On a CPU: CPU time of all threads, single-threaded, one pinned core. On an accelerator: wall
time, and PyTorch, which stays on the CPU here, is left out. The minimum over repeats in interleaved rounds counts.
Columns:

  CPU ms        of a step
  epochs / s    of the published size (256 x 1024 rows)
  ratio         time over that of PyTorch
  compile s     first call (tracing, compilation, run) less one run
  recompiled    programs compiled in later calls; must be 0
  loss          of one batch under one set of weights and masks, the same for all

PyTorch is measured if it is importable; otherwise its row says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.one_core import use_one_core

if __name__ == "__main__":
    use_one_core()

import jax
from jax import random

from benchmarks import report
from numpyro_smc.ratio import steps
from numpyro_smc.ratio.datasets import RatioData
from numpyro_smc.ratio.losses import BinaryLoss
from numpyro_smc.ratio.masks import UniformMask
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.ratio.ratio_network import RatioNetwork, RatioWeights
from numpyro_smc.ratio.training import fit

NAME = "ratio_speed"
OURS, FIT, PYTORCH = "numpyro_smc", "numpyro_smc, fit", "pytorch"
NUM_PARAMETERS, OUTPUT_SHAPE = 5, (4, 2)
EPOCH_ROWS = 256 * 1024
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 1e-4, 10.0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 256])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="of a repeat")
    parser.add_argument("--rounds", type=int, default=4, help="interleaved over the libraries")
    parser.add_argument("--repeats", type=int, default=2, help="per round")
    parser.add_argument("--quick", action="store_true", help="a small network, one round: does it work?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch_sizes, options.width, options.num_layers = [64], 16, 1
        options.steps, options.rounds, options.repeats = 2, 1, 1
    return options


class Problem(NamedTuple):
    """One cell: simulations, a network with weights, and one set of masks to compare losses on."""

    network: RatioNetwork
    weights: RatioWeights
    theta: np.ndarray
    x: np.ndarray
    masks: np.ndarray  # of the first batch
    batch_size: int
    num_steps: int
    seed: int


class Training(NamedTuple):
    """Of one library."""

    run: Callable[[], Any]  # the problem's number of steps
    loss: Callable[[], float]  # of the first batch at the initial weights, rows rolled by one


def make_problem(options: argparse.Namespace, batch_size: int) -> Problem:
    """Simulations of ``models.slcp``, but for its jitter, drawn with NumPy."""
    rng = np.random.default_rng(options.seed)
    num = batch_size * options.steps
    theta = rng.uniform(-3, 3, (num, NUM_PARAMETERS)).astype(np.float32)
    noise = rng.standard_normal((num, *OUTPUT_SHAPE)).astype(np.float32)
    first, second, rho = theta[:, 2, None] ** 2, theta[:, 3, None] ** 2, np.tanh(theta[:, 4, None])
    x = np.stack(
        [
            theta[:, 0, None] + first * noise[..., 0],
            theta[:, 1, None] + second * (rho * noise[..., 0] + np.sqrt(1 - rho**2) * noise[..., 1]),
        ],
        axis=-1,
    )
    network = RatioNetwork(NUM_PARAMETERS, mlp(options.width, options.num_layers), has_masks=True, standardize_x=False)
    weights = network.init(random.key(options.seed), theta, x)
    masks = np.asarray(UniformMask().sample(random.key(options.seed), batch_size, NUM_PARAMETERS))
    return Problem(network, weights, theta, x, masks, batch_size, options.steps, options.seed)


# The libraries


def our_steps(problem: Problem) -> Training:
    """The compiled program that :func:`~numpyro_smc.ratio.training.fit` runs."""
    program = steps.Program(problem.network, BinaryLoss(), UniformMask(), problem.batch_size, WEIGHT_DECAY, CLIP_NORM)
    state = steps.initial_state(program, problem.weights.trained)
    chunk = steps.as_batch(RatioData(problem.theta, problem.x))
    order_key, rng_key = random.split(random.key(problem.seed))
    rate, num_planned = np.float32(LEARNING_RATE), np.float32(1e6)
    start, stop = np.int32(0), np.int32(problem.num_steps)

    def run() -> Any:
        order = random.permutation(order_key, len(problem.theta))
        constants = (program, problem.weights.standardization)
        return jax.block_until_ready(
            steps.train(*constants, state, chunk, order, rng_key, rate, num_planned, start, stop)
        )

    return Training(run, partial(our_loss, problem))


def our_fit(problem: Problem) -> Training:
    """The documented interface: one epoch without validation."""
    data = RatioData(problem.theta, problem.x)

    def run() -> Any:
        return fit(
            random.key(problem.seed),
            problem.network,
            BinaryLoss(),
            data,
            masks=UniformMask(),
            validation=None,
            batch_size=problem.batch_size,
            max_epochs=1,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            clip_norm=CLIP_NORM,
            weights=problem.weights,
            progress_bar=False,
        )

    return Training(run, partial(our_loss, problem))


def our_loss(problem: Problem) -> float:
    theta, x = problem.theta[: problem.batch_size], problem.x[: problem.batch_size]
    both = np.stack([theta, np.roll(theta, 1, axis=0)])
    ratios = problem.network.log_ratio(problem.weights, both, x, problem.masks)
    return float(jax.nn.softplus(-ratios[0]).mean() + jax.nn.softplus(ratios[1]).mean())


def pytorch(problem: Problem) -> Training:
    """The training loop as the original code has it, without its overhead of loaders and logs."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    torch.manual_seed(problem.seed)
    layers: list[Any] = []
    for weights in problem.weights.trained["trunk"]:
        matrix = torch.tensor(np.asarray(weights["weight"]).T.copy())
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0])
        layer.load_state_dict({"weight": matrix, "bias": torch.tensor(np.asarray(weights["bias"]))})
        layers += [layer, torch.nn.ELU()]
    network = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    moments = problem.weights.standardization["theta"]
    mean, scale = (torch.tensor(np.asarray(moment)) for moment in moments)
    theta, x = torch.tensor(problem.theta), torch.tensor(problem.x)
    bits = torch.arange(NUM_PARAMETERS)
    size = problem.batch_size

    def batch_loss(theta: Any, x: Any, mask: Any) -> Any:
        both = (torch.stack((theta, theta.roll(1, 0))) - mean) / scale * mask
        signs, flat = (2.0 * mask - 1).expand(2, -1, -1), x.flatten(1).expand(2, -1, -1)
        log_ratio, log_ratio_of_others = network(torch.cat((both, signs, flat), -1))[..., 0]
        return functional.softplus(-log_ratio).mean() + functional.softplus(log_ratio_of_others).mean()

    def run() -> Any:
        order = torch.randperm(len(theta))
        losses = []
        for rows in order.split(size):
            mask = (torch.randint(1, 2**NUM_PARAMETERS, (size, 1)) >> bits) & 1
            loss = batch_loss(theta[rows], x[rows], mask)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            if norm.isfinite():
                optimizer.step()
            losses.append(loss.item())
        return losses

    value = float(batch_loss(theta[:size], x[:size], torch.tensor(problem.masks)).detach())
    return Training(run, lambda: value)


MAKERS: dict[str, Callable[[Problem], Training]] = {OURS: our_steps, FIT: our_fit, PYTORCH: pytorch}


# Measuring


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def clock() -> float:
    """CPU time of all threads of the process; on an accelerator, wall time."""
    return time.process_time() if on_cpu() else time.perf_counter()


def time_column() -> str:
    return "CPU ms" if on_cpu() else "wall ms"


def version_of(library: str) -> str:
    return importlib.metadata.version("torch" if library == PYTORCH else "numpyro_smc")


def new_row(library: str, batch_size: int) -> dict[str, Any]:
    return {"case": "slcp", "library": library, "batch": batch_size}


def measure(
    problem: Problem, makers: dict[str, Callable[[Problem], Training]], rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """One row per library; what fails keeps its row, with the error."""
    rows, trainings = {}, {}
    for library, make in makers.items():
        row = rows[library] = new_row(library, problem.batch_size)
        try:
            row["version"] = version_of(library)
            training = make(problem)
            started = clock()
            training.run()
            row["compile s"], row["loss"] = clock() - started, training.loss()
            trainings[library] = training
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    before, seconds = steps.train._cache_size(), {library: float("inf") for library in trainings}
    for _ in range(rounds):
        for library, training in trainings.items():
            for _ in range(repeats):
                started = clock()
                training.run()
                seconds[library] = min(seconds[library], clock() - started)
    for library, best in seconds.items():
        row, step = rows[library], best / problem.num_steps
        row["compile s"] = max(row["compile s"] - best, 0.0)
        row[time_column()], row["epochs / s"] = 1e3 * step, problem.batch_size / step / EPOCH_ROWS
        if library != PYTORCH:
            row["recompiled"] = steps.train._cache_size() - before
        if PYTORCH in seconds:
            row["ratio"] = best / seconds[PYTORCH]
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    is_installed = importlib.util.find_spec("torch") is not None
    settings = {"clock": "CPU time of all threads" if on_cpu() else "wall time", **vars(options)}
    settings["load"] = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown"
    report.print_environment(settings)
    print()
    makers = {name: make for name, make in MAKERS.items() if name != PYTORCH or (is_installed and on_cpu())}
    rows: list[dict[str, Any]] = []
    for batch_size in options.batch_sizes:
        rows += measure(make_problem(options, batch_size), makers, options.rounds, options.repeats)
        if PYTORCH not in makers:
            error = "not installed" if not is_installed else "measured on CPUs only"
            rows.append(new_row(PYTORCH, batch_size) | {"error": error})
        report.write(options.output, NAME, rows, settings)
    columns = ["case", "library", "version", "batch", time_column(), "epochs / s", "ratio", "compile s", "recompiled"]
    report.print_table(rows, [*columns, "loss"])
    for row in rows:
        if "error" in row:
            print(f"{row['library']}, batch {row['batch']}: {row['error']}")
    print(f"\nresults: {options.output}/{NAME}.csv and .json")
    return rows


if __name__ == "__main__":
    main()
