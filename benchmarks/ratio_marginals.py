r"""Ratios of any subset of a simulator's parameters: the published experiments of [1], with checks of what was learned.

SLCP (five parameters), Hodgkin-Huxley neurons (eight), and black-hole mergers in the noise of two detectors (eleven of
fifteen; simulated, --data-dir with the spectra, and the extra gw). One network for all subsets (amnre), one for each
of a fixed list (mnre; -se with a shared embedding, -fl and -pl with focal and peripheral losses), or one of all
parameters (nre).

Printed for each: losses; area under the ROC curve, mean log ratio of pairs, mean ratio under the prior; largest
deviation of the coverage of one-parameter marginals from the diagonal; mean distance between marginals where they
overlap. For SLCP also the loss of the exact ratios, below which no network can be (0.393 over all subsets), and
correlation and root-mean-square error of log ratios against exact ones, by number of parameters. Figures: loss,
coverage, consistency, ROC, corner plot of the first simulated pair.

Published budget: --num_simulations 1048576 --num_validation 131072 --steps_per_epoch 256 --max_epochs 256 --width 256
--num_layers 7; for gw-amnre 4194304 simulations, 512 epochs of 1024 steps, 17 residual blocks of 512 units.

1. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from benchmarks import report
from benchmarks.annealed_training import fill_table
from models import gravitational_waves, hodgkin_huxley_summaries, slcp, slcp_true_ratios
from numpyro_smc.ratio.corner import corner
from numpyro_smc.ratio.diagnostics.calibration import marginal_coverage
from numpyro_smc.ratio.diagnostics.consistency import consistency
from numpyro_smc.ratio.diagnostics.power import roc
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.losses import BinaryLoss
from numpyro_smc.ratio.masks import PoissonMask, RestrictedMask, UniformMask, parse_masks
from numpyro_smc.ratio.networks import embedding_of, mlp, residual_mlp
from numpyro_smc.ratio.nre import NRE

NAME = "ratio_marginals"
FREE = ("experiments", "output")
FLOOR = 0.393

Options = argparse.Namespace


class Experiment(NamedTuple):
    """A simulator, and what is learned of it: arguments of :class:`~numpyro_smc.NRE`."""

    simulator: str
    arguments: Callable[[Options], dict[str, Any]]


def _perceptron(options: Options) -> dict[str, Any]:
    return {"trunk": mlp(options.width, options.num_layers)}


def _shared(options: Options) -> dict[str, Any]:
    embedding = embedding_of(mlp(options.width, options.num_layers), options.width)
    return {"trunk": mlp(64, 3), "embedding": embedding}


SINGLES_AND_PAIRS = "=1 =2"
OF_NEURONS = f"{SINGLES_AND_PAIRS} 11100100 11111111"
#: Phase, both azimuths of the spins and polarisation are never kept.
OF_MERGERS = "110111111001011"

EXPERIMENTS: dict[str, Experiment] = {
    "slcp-amnre": Experiment("slcp", lambda o: _perceptron(o) | {"masks": UniformMask()}),
    "slcp-mnre": Experiment("slcp", lambda o: _perceptron(o) | {"marginals": f"{SINGLES_AND_PAIRS} =5"}),
    "slcp-nre": Experiment("slcp", _perceptron),
    "hh-amnre": Experiment("hh", lambda o: _perceptron(o) | {"masks": UniformMask()}),
    "hh-amnre-pm": Experiment("hh", lambda o: _perceptron(o) | {"masks": PoissonMask()}),
    "hh-mnre": Experiment("hh", lambda o: _perceptron(o) | {"marginals": OF_NEURONS}),
    "hh-mnre-se": Experiment("hh", lambda o: _shared(o) | {"marginals": OF_NEURONS}),
    "hh-mnre-fl": Experiment(
        "hh", lambda o: _shared(o) | {"marginals": SINGLES_AND_PAIRS, "loss": BinaryLoss("focal")}
    ),
    "hh-mnre-pl": Experiment(
        "hh", lambda o: _shared(o) | {"marginals": SINGLES_AND_PAIRS, "loss": BinaryLoss("peripheral")}
    ),
    "hh-nre": Experiment("hh", _perceptron),
    "gw-amnre": Experiment(
        "gw",
        lambda o: {"trunk": residual_mlp(o.width, o.num_layers), "masks": RestrictedMask(UniformMask(), OF_MERGERS)},
    ),
    "gw-nre": Experiment(
        "gw", lambda o: {"trunk": residual_mlp(o.width, o.num_layers), "marginals": [list(map("1".__eq__, OF_MERGERS))]}
    ),
}


def parse_arguments(argv: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", nargs="+", default=["slcp-amnre"], choices=list(EXPERIMENTS))
    parser.add_argument("--num_simulations", type=int, default=2**14)
    parser.add_argument("--num_validation", type=int, default=2**12)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--steps_per_epoch", type=int, default=None, help="default: one pass")
    parser.add_argument("--max_epochs", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="plateau", choices=["constant", "cosine", "plateau"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=4, help="linear maps between hidden layers, or blocks")
    parser.add_argument("--num_pairs", type=int, default=2**13, help="for the ROC curve")
    parser.add_argument("--num_coverage", type=int, default=1000, help="pairs for the coverage")
    parser.add_argument("--num_consistency", type=int, default=4, help="observations for the consistency")
    parser.add_argument("--num_exact", type=int, default=16, help="pairs of SLCP with exact ratios of all subsets")
    parser.add_argument("--bins", type=int, default=50, help="cells of grids for each parameter")
    parser.add_argument("--stride", type=int, default=16, help="of the mergers' frequencies; 1 is published")
    parser.add_argument("--rank", type=int, default=32, help="directions kept of mergers; published: 128")
    parser.add_argument("--data-dir", default=None, help="folder of the detectors' spectra")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results and trained weights")
    return parser.parse_args(argv)


def make(name: str, options: Options) -> NRE:
    """The experiment's NRE."""
    experiment = EXPERIMENTS[name]
    if experiment.simulator == "gw":
        network = gravitational_waves.load_network(options.data_dir, stride=options.stride)
        basis, _ = gravitational_waves.fit_basis(random.key(options.seed), network, options.rank, num_waveforms=1024)
        program, params = partial(gravitational_waves.model, network, basis), list(gravitational_waves.PARAMETERS)
    elif experiment.simulator == "hh":
        program, params = hodgkin_huxley_summaries.model, list(hodgkin_huxley_summaries.BOUNDS)
    else:
        program, params = slcp.model, ["theta"]
    with warnings.catch_warnings():
        # SLCP and mergers have a likelihood, with which the ratios are compared.
        warnings.filterwarnings("ignore", "NRE: the simulator has no hidden draws")
        return NRE(program, params, nonfinite="drop", **{"loss": "A", **experiment.arguments(options)})


def measure(name: str, options: Options) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Simulate, train and check."""
    folder, nre = Path(options.output), make(name, options)
    kept = {k: v for k, v in vars(options).items() if k not in (*FREE, "data_dir", "no_progress")}
    data_key, held_out_key, train_key, check_key = random.split(random.key(options.seed), 4)
    started = time.process_time()
    data, held_out = nre.simulate(data_key, options.num_simulations), nre.simulate(held_out_key, options.num_validation)
    simulated = time.process_time()
    estimator = nre.train(
        train_key,
        data=data,
        validation=held_out,
        batch_size=options.batch_size,
        steps_per_epoch=options.steps_per_epoch,
        max_epochs=options.max_epochs,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        patience=None,
        checkpoint=folder / f"{name}-{report.digest(kept)}.npz",
        progress_bar=not options.no_progress,
    )
    row: dict[str, Any] = {
        "simulation CPU s": simulated - started,
        "training CPU s": time.process_time() - simulated,
        "epochs": len(estimator.training.table),
        "loss": estimator.training.table[-1]["loss"],
        "validation loss": min(line["validation_loss"] for line in estimator.training.table),
    }
    points = [{"epoch": line["epoch"], **_losses(line)} for line in estimator.training.table]
    row |= check(name, estimator, check_key, options)
    estimator.training.plot().figure.savefig(folder / f"{name}_loss.png", dpi=120)
    return row, points


def _losses(line: dict[str, Any]) -> dict[str, float]:
    return {name: float(line[name]) for name in ("loss", "validation_loss", "learning_rate")}


def check(name: str, estimator: RatioEstimator, rng_key: Any, options: Options) -> dict[str, Any]:
    """What is learned, in numbers and figures."""
    folder = Path(options.output)
    pairs_key, coverage_key, observation_key = random.split(rng_key, 3)
    is_plain = not estimator.network.has_masks and estimator.network.marginals is None
    largest = None if is_plain else _named(estimator, _largest(estimator))
    power = roc(estimator, pairs_key, options.num_pairs, largest)
    row: dict[str, Any] = {"ROC area": power.area, "mean log ratio": power.mutual_information[0]}
    if power.is_calibrated:
        row["mean ratio"], row["mean ratio s.e."] = power.mean_ratio
    power.plot().figure.savefig(folder / f"{name}_roc.png", dpi=120)
    candidates = [] if is_plain else _named(estimator, np.ones(len(estimator.elements), bool))
    free = _independent(estimator, [element for element in candidates if _knows(estimator, [element])])
    if free:
        found = marginal_coverage(estimator, coverage_key, options.num_coverage, free, 10 * options.bins)
        row["coverage deviation"] = float(found.deviations[np.argmax(np.abs(found.deviations))])
        found.plot().figure.savefig(folder / f"{name}_coverage.png", dpi=120)
        observed = estimator.simulate(observation_key, options.num_consistency)
        subsets = [[a] for a in free] + [[a, b] for i, a in enumerate(free) for b in free[i + 1 :]]
        agreement = consistency(estimator, observed.x, subsets, options.bins)
        row["consistency"] = float(np.nanmean(agreement.distances[np.triu_indices(len(subsets), 1)]))
        agreement.plot().figure.savefig(folder / f"{name}_consistency.png", dpi=120)
        corner(estimator, observed.x[0], free, num=options.bins, truth=_of(estimator, observed.theta[0], free)).savefig(
            folder / f"{name}_corner.png", dpi=100
        )
    if EXPERIMENTS[name].simulator == "slcp":
        row |= against_exact(estimator, observation_key, options)
    return row


def against_exact(estimator: RatioEstimator, rng_key: Any, options: Options) -> dict[str, Any]:
    """Learned log ratios of SLCP beside exact ones: joint pairs and shuffled ones, by number of parameters."""
    pairs = estimator.simulate(rng_key, options.num_exact)
    theta, x = np.asarray(pairs.theta), np.asarray(pairs.x)
    masks = [mask for mask in parse_masks("=1 =2 =3 =4 =5", 5) if _knows(estimator, _named(estimator, mask))]
    losses: dict[str, dict[int, list[float]]] = {"exact": {}, "learned": {}}
    ratios: dict[int, list[np.ndarray]] = {}
    for mask in masks:
        found = []
        for shift in (0, 1):
            given = np.roll(theta, shift, axis=0)
            exact = [slcp_true_ratios.log_ratio(t, o, mask) for t, o in zip(given, x, strict=True)]
            found.append([exact, np.asarray(estimator.log_ratio(given, x, _named(estimator, mask)))])
        joint, shuffled = np.array(found)
        for which, name in enumerate(losses):
            loss = np.logaddexp(0, -joint[which]).mean() + np.logaddexp(0, shuffled[which]).mean()
            losses[name].setdefault(int(mask.sum()), []).append(float(loss))
        ratios.setdefault(int(mask.sum()), []).append(joint)
    row: dict[str, Any] = {}
    for name, by_size in losses.items():
        row[f"loss of {name} ratios"] = float(np.mean([loss for values in by_size.values() for loss in values]))
    for size, values in ratios.items():
        exact, learned = np.concatenate(values, axis=1)
        row[f"correlation {size}"] = float(np.corrcoef(exact, learned)[0, 1])
        row[f"error {size}"] = float(np.sqrt(np.mean((exact - learned) ** 2)))
    return row


# Subsets


def _largest(estimator: RatioEstimator) -> np.ndarray:
    """The largest subset that is learned."""
    if estimator.network.marginals is not None:
        return np.array(max(estimator.network.marginals, key=sum))
    return (
        np.array([digit == "1" for digit in OF_MERGERS])
        if len(estimator.elements) == 15
        else np.ones(len(estimator.elements), bool)
    )


def _named(estimator: RatioEstimator, mask: Any) -> list[str]:
    return [element for element, kept in zip(estimator.elements, mask, strict=True) if kept]


def _knows(estimator: RatioEstimator, names: list[str]) -> bool:
    wanted = tuple(estimator.simulator.mask(names).tolist())
    if estimator.network.marginals is not None:
        return wanted in estimator.network.marginals
    if not estimator.network.has_masks:
        return all(wanted)
    return bool(_largest(estimator)[np.array(wanted)].all())


def _independent(estimator: RatioEstimator, names: list[str]) -> list[str]:
    """Those whose prior has a density of its own: not so the smaller mass, given the larger."""
    found = []
    for name in names:
        try:
            estimator.simulator.prior_of_elements(estimator.simulator.mask([name]))
        except ValueError:
            continue
        found.append(name)
    return found


def _of(estimator: RatioEstimator, theta: Any, names: list[str]) -> np.ndarray:
    return np.asarray(jnp.asarray(theta))[estimator.simulator.mask(names)]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    left_out = ("data_dir", "no_progress", "output")
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    report.print_environment(settings)
    print()
    jax.config.update("jax_enable_x64", any(name.startswith("gw") for name in options.experiments))
    cells = [{"experiment": name} for name in options.experiments]

    def of_cell(experiment: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return measure(experiment, options)

    rows, _ = fill_table(NAME, cells, of_cell, Path(options.output), settings, FREE)
    for row in rows:
        print(f"\n{row['experiment']}")
        report.print_table([{"quantity": name, "value": value} for name, value in row.items() if name != "experiment"])
    print(f"\nThe loss of exact ratios of SLCP over all subsets is {FLOOR} ± 0.025; a network's is larger.")
    print(f"results: {options.output}")
    return rows


if __name__ == "__main__":
    main()
