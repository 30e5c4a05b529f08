r"""How many temperatures annealed importance sampling [1] needs on a trained autoencoder, from guide and from prior.

Trains the autoencoder A-ffg of :mod:`benchmarks.inference_gap` (or takes up weights that it left in the output folder)
and estimates the evidence of training images: from the guide with each of --guide_temperatures, from the prior with
each of --prior_temperatures. All are lower bounds on average; each stands beside the longest run from the guide,
paired by image. Then the bounds from both sides on --num_simulated images, at each of --certified_temperatures. For
every line the CPU seconds (all threads, compilation included), and the gradients in one row's latents that were taken
in one of them: rows are images times chains, the pilot's included.

A public implementation takes about 4,100 row-gradients in a second of one processor (100 images, 500 temperatures of
10 leapfrog steps); from the prior with 500 temperatures, its estimates are 10 nats below importance sampling's.

For MNIST: --data-dir DIR --epochs 10 --warm_up 0 --num_images 100 --guide_temperatures 100 200 500 2000
--prior_temperatures 500 2000 --certified_temperatures 500 2000

1. *On the Quantitative Analysis of Decoder-Based Generative Models*, Y. Wu, Y. Burda, R. Salakhutdinov, R. Grosse
   (2017)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import random

from benchmarks import report
from benchmarks.annealed_training import fill_table
from benchmarks.inference_gap_training import Trained, add_arguments, train
from models.images import Images, load_images
from numpyro_smc import AIS, bidirectional
from numpyro_smc.engines.checkpoint import replacing
from numpyro_smc.reports.summaries import mean_and_error

NAME = "annealing_budget"
EXPERIMENT = "A-ffg"
ORIGINAL = 4.1e-3  # million row-gradients in a second, of the public implementation

#: Settings that choose cells, or where things are.
FREE = ("guide_temperatures", "prior_temperatures", "certified_temperatures", "data_dir", "output", "no_progress")


def measure(
    start: str, temperatures: int, trained: Trained, images: Images, options: argparse.Namespace
) -> tuple[dict[str, Any], list[Any]]:
    """One line: from the guide or the prior, or the bounds from both sides (from the guide)."""
    x = jnp.asarray(images.train[: options.num_simulated if start == "simulated" else options.num_images])
    sampler = AIS(
        trained.model,
        None if start == "prior" else trained.guide,
        num_chains=options.num_chains,
        num_temperatures=temperatures,
        num_leapfrog=options.num_leapfrog,
        num_pilot_chains=options.num_pilot_chains,
        batch_size=options.batch_size,
    )

    rng_key = random.key(options.seed)
    wall, processor = time.perf_counter(), time.process_time()
    if start == "simulated":
        bounds = bidirectional(rng_key, sampler, x, params=trained.params)
        row = {"log p": float(np.mean(bounds.lower)), "gap": bounds.mean_gap, "gap s.e.": bounds.mean_gap_error}
        acceptance = bounds.acceptance
    else:
        found = sampler.run(rng_key, x, params=trained.params)
        values = np.asarray(found.per_datapoint, np.float64)
        with replacing(values_file(start, temperatures, options)) as path, open(path, "wb") as file:
            np.save(file, values)
        mean, error = mean_and_error(values)
        row = {"log p": mean, "log p s.e.": error, "mean log weight": float(np.mean(found.mean_log_weight))}
        acceptance = found.acceptance
    row["acceptance"] = float(np.mean(acceptance))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    num_chains = options.num_pilot_chains + options.num_chains * (2 if start == "simulated" else 1)  # some in reverse
    gradients = num_chains * len(x) * temperatures * options.num_leapfrog
    rate = gradients / processor / 1e6
    times = {"wall s": wall, "CPU s": processor, "M row-gradients/CPU s": rate, "times original": rate / ORIGINAL}
    return row | times, []


def values_file(start: str, temperatures: int, options: argparse.Namespace) -> Path:
    """Where the estimates of a line are, one an image."""
    return Path(options.output) / f"{NAME}_{start}_{temperatures}.npy"


def add_differences(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, with the paired difference from the longest run from the guide."""
    longest = values_file("guide", max(options.guide_temperatures), options)
    paired = []
    for row in rows:
        path = values_file(row["start"], row["temperatures"], options)
        if path.exists() and longest.exists():
            mean, error = mean_and_error(np.load(path) - np.load(longest))
            row = row | {"difference": mean, "difference s.e.": error}
        paired.append(row)
    return paired


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, epochs=100, warm_up=10)
    parser.add_argument("--num_images", type=int, default=50)
    parser.add_argument("--guide_temperatures", type=int, nargs="+", default=[25, 100, 400])
    parser.add_argument("--prior_temperatures", type=int, nargs="*", default=[100, 400])
    parser.add_argument("--certified_temperatures", type=int, nargs="*", default=[100, 400])
    parser.add_argument("--num_simulated", type=int, default=50, help="images, from both sides")
    parser.add_argument("--num_chains", type=int, default=16)
    parser.add_argument("--num_pilot_chains", type=int, default=8)
    parser.add_argument("--num_leapfrog", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=100, help="images at a time")
    parser.add_argument("--output", default=f"results/{NAME}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    images = load_images(options.data_dir, options.binarisation)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "data_dir")}
    settings |= {"experiment": EXPERIMENT, "data": str(images), "clock": "CPU time of all threads"}
    report.print_environment(settings)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {
        "guide": options.guide_temperatures,
        "prior": options.prior_temperatures,
        "simulated": options.certified_temperatures,
    }
    cells = [{"start": start, "temperatures": number} for start, numbers in lengths.items() for number in numbers]
    trained = train(EXPERIMENT, images, options)
    work = partial(measure, trained=trained, images=images, options=options)
    rows, _ = fill_table(NAME, cells, work, folder, settings, FREE)
    rows = add_differences(rows, options)
    report.write(folder, NAME, rows, settings)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    report.print_table(rows, columns)
    print(f"\nresults: {options.output}/{NAME}.csv and .json")
    return rows


if __name__ == "__main__":
    main()
