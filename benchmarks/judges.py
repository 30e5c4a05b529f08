"""Log likelihoods and evidences that others have published, beside ours.

Every program is written as its source's users write it. Series by bootstrap filters, the others by the annealed sampler
or importance sampling; estimates of several keys are averaged as evidences. Columns:

  theirs, +-    what the source states; its own Monte Carlo error, where it is one
  ours, s.e.    log of the mean estimate over the keys, and its jackknife standard error
  z             the difference, in combined standard errors
  N, keys       particles (importance samples, chains) of a key
  seconds       wall clock of all keys, compilation included

The epidemics read `pomp/measles_*.csv` and `pomp/dhaka_*.csv` in `--data-dir` or NUMPYRO_SMC_DATA, and take minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

from benchmarks import report
from models import cholera, measles, published_evidences, published_series
from numpyro_smc import SMC2, ParticleFilter, SMCSampler, log_marginal_likelihood
from numpyro_smc.evidence.estimate import log_mean_and_error

NAME = "judges"


class Judge(NamedTuple):
    """What is published, and how it is found here.

    - **source**; **value**; **error** - its Monte Carlo error, zero if it is exact.
    - **estimate** - log evidences of keys: called with the options and the number of particles.
    - **num_particles**, **keys** - by default. **reads_files** - is it one that needs data from outside.
    """

    source: str
    value: float
    error: float
    estimate: Callable[[argparse.Namespace, int, int], Sequence[float]]
    num_particles: int
    keys: int
    reads_files: bool = False


def filtered(program: Callable[..., Any], *args: Any) -> Callable[..., list[float]]:
    def estimate(options: argparse.Namespace, num_particles: int, keys: int) -> list[float]:
        particle_filter = ParticleFilter(program, num_particles, history=False)
        found = []
        for key in range(keys):
            began = time.perf_counter()
            run = particle_filter.run(random.fold_in(random.key(options.seed), key), *args)
            found.append(float(run.log_evidence))
            print(f"  key {key}: {found[-1]:.3f}, {time.perf_counter() - began:.1f} s", flush=True)
        return found

    return estimate


def output_gap(options: argparse.Namespace, num_particles: int, keys: int) -> list[float]:
    return filtered(partial(published_series.output_gap, **published_series.load_output_gap()[0]))(
        options, num_particles, keys
    )


def town(name: str) -> Callable[..., list[float]]:
    def estimate(options: argparse.Namespace, num_particles: int, keys: int) -> list[float]:
        data = measles.load(name, options.data_dir, replace=measles.MISREPORTED.get(name))
        theta = measles.load_parameters(name, options.data_dir)[0]
        return filtered(measles.model, data, theta)(options, num_particles, keys)

    return estimate


def district(options: argparse.Namespace, num_particles: int, keys: int) -> list[float]:
    return filtered(cholera.model, cholera.load(options.data_dir), cholera.Parameters())(options, num_particles, keys)


def sequential(options: argparse.Namespace, num_particles: int, keys: int) -> list[float]:
    """Brownian motion of unknown scales: as many particles for the scales as for the path."""
    sampler = SMC2(published_series.brownian, num_particles, num_particles)
    key = random.key(options.seed)
    return [
        float(sampler.run(random.fold_in(key, k), published_series.BROWNIAN, progress_bar=False).log_evidence)
        for k in range(keys)
    ]


def annealed(options: argparse.Namespace, num_particles: int, keys: int) -> list[float]:
    """Seeds, from a guide that is fitted first: the prior's own draws leave the range of single precision."""
    model, data = published_evidences.seeds, published_evidences.SEEDS
    guide = AutoMultivariateNormal(model, init_scale=0.05)
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
    params = svi.run(random.key(options.seed), 2000, *data, progress_bar=False).params
    sampler = SMCSampler(model, num_particles, init_guide=(guide, params))
    key = random.key(options.seed)
    return [sampler.run(random.fold_in(key, k), *data, progress_bar=False).log_evidence for k in range(keys)]


def marginal(model: Callable[..., Any], *args: Any, **options_of_method: Any) -> Callable[..., list[float]]:
    def estimate(options: argparse.Namespace, num_particles: int, keys: int) -> list[float]:
        size = {"importance": "num_samples", "ais": "num_chains", "smc": "num_particles"}
        sizes = {size[options_of_method["method"]]: num_particles}
        return [
            log_marginal_likelihood(
                random.fold_in(random.key(options.seed), k), model, *args, **options_of_method, options=sizes
            ).mean
            for k in range(keys)
        ]

    return estimate


_SEIR = "He, Ionides, King 2010"
JUDGES = {
    "nile": Judge(
        "Durbin, Koopman 2012", -641.5856, 0.0, filtered(published_series.nile, published_series.NILE), 4000, 10
    ),
    "nile, first left out": Judge(
        "statsmodels",
        -632.5456,
        0.0,
        filtered(published_series.nile, published_series.NILE[1:], published_series.NILE[0], 15099.0 + 1469.1),
        4000,
        10,
    ),
    "ricker": Judge("pomp", -139.0503, 0.0, filtered(published_series.ricker, published_series.RICKER), 4000, 10),
    "earthquakes": Judge(
        "Zucchini et al. 2016",
        -342.31831,
        0.0,
        filtered(published_series.earthquakes, published_series.EARTHQUAKES),
        2000,
        10,
    ),
    "brownian, scales known": Judge(
        "Inference Gym",
        5.613044,
        0.0,
        filtered(published_series.brownian, published_series.BROWNIAN, 0.1, 0.15),
        2000,
        10,
    ),
    "brownian": Judge("Inference Gym", 1.18775, 0.0, sequential, 200, 4),
    "clark_1987": Judge("statsmodels (GAUSS)", 578.520887, 0.0, output_gap, 10_000, 10),
    "seeds": Judge("Blessing et al. 2024", -73.403, 0.004, annealed, 1000, 4),
    "phase_transition": Judge(
        "BlackJAX", -11.534, 0.0, marginal(published_evidences.phase_transition, method="smc"), 1000, 4
    ),
    "double_well": Judge(
        "Chen et al. 2024",
        10.2935,
        0.0,
        marginal(published_evidences.wells, 1, method="smc", guide=published_evidences.wide),
        1000,
        4,
    ),
    "isotropic": Judge(
        "PyAutoFit", -2.7673, 0.0, marginal(published_evidences.isotropic, method="importance"), 10_000, 4
    ),
    "measles, London": Judge(_SEIR, -3804.9, 0.16, town("London"), 2000, 6, True),
    "measles, Hastings": Judge(_SEIR, -1583.7, 0.21, town("Hastings"), 2000, 6, True),
    "measles, Halesworth": Judge(_SEIR, -318.6, 0.51, town("Halesworth"), 2000, 6, True),
    "dhaka_cholera": Judge("King et al. 2008", -3748.0, 0.07, district, 5000, 10, True),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quick = [name for name, judge in JUDGES.items() if not judge.reads_files]
    parser.add_argument("--judges", nargs="+", default=quick, choices=list(JUDGES), help="by default, without files")
    parser.add_argument("--num-particles", type=int, help="of every judge, instead of its own number")
    parser.add_argument("--keys", type=int, help="of every judge, instead of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", help="folder of the epidemics' files; by default NUMPYRO_SMC_DATA")
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results; its rows are kept")
    return parser.parse_args(argv)


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a judge."""
    judge = JUDGES[name]
    num_particles, keys = options.num_particles or judge.num_particles, options.keys or judge.keys
    began = time.perf_counter()
    found = np.asarray(judge.estimate(options, num_particles, keys), np.float64)
    seconds = time.perf_counter() - began
    value, error, _ = (float(x) for x in log_mean_and_error(jnp.asarray(found - found.mean())))
    value += float(found.mean())
    return {
        "judge": name,
        "source": judge.source,
        "theirs": judge.value,
        "+-": judge.error,
        "ours": value,
        "s.e.": error,
        "z": (value - judge.value) / np.hypot(error, judge.error),
        "N": num_particles,
        "keys": keys,
        "seconds": seconds,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = {name: value for name, value in vars(options).items() if name != "data_dir"}
    report.print_environment(settings)
    rows = {row["judge"]: row for row in report.load(options.output, NAME, settings, free=("judges", "output"))}
    for name in options.judges:
        if name not in rows:
            print(f"{name}", flush=True)
            rows[name] = compare(name, options)
            report.write(options.output, NAME, list(rows.values()), settings)
    print()
    report.print_table([rows[name] for name in JUDGES if name in rows])
    print(f"\nresults: {options.output}/{NAME}.csv and .json")
    return list(rows.values())


if __name__ == "__main__":
    main()
