r"""Log evidence by annealing, tempered SMC and importance sampling, on targets whose evidence is known.

Each method runs from --runs keys. It starts from the prior (a wide Gaussian where the target is a bare density), or
from a Gaussian guide that SVI fitted to a bound with 32 particles. Columns:

  value        log evidence, mean over runs; for dais and dsmcs the bound after training
  s.e., sd     stated standard error of one run (root mean square), and standard deviation of the values over runs
  difference   value less the truth, in nats
  worst        greatest distance of a run from the truth, in its stated standard errors (and that of the truth)
  inside       runs whose stated 95 % interval holds the truth
  gradients    of the joint density, all observations, in one run, pilot runs included (importance: evaluations)
  CPU s        of one run once compiled; fit s: of fitting the guide or training, compilation included
  verdict      of the first run: trust, or do not

Bidirectional Monte Carlo doubles the number of temperatures until its bounds are less than 0.1 nat apart (with two
standard errors) on data simulated from the model: the budget that certifies. --coverage asks how often stated intervals
hold the truth on 100 conjugate problems; --modes compares shares of modes by NUTS and by SMC. Writes CSV, JSON and a
figure. Finished cells are kept.

Published: sonar and ionosphere (standardised, with intercept), log evidence -108.4 and -111.6; they need --data-dir
with the UCI repository's files sonar.all-data and ionosphere.data.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array, random
from numpyro.infer import MCMC, NUTS, SVI
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_median

from benchmarks import report
from models import eight_schools, gaussian_process, linear_regression, logistic_regression, static_targets
from numpyro_smc import AIS, DAIS, DSMCS, IWELBO, Evidence, SMCSampler, bidirectional, log_marginal_likelihood
from numpyro_smc.evidence.bidirectional import TIGHT

NAME = "evidence"
Program = Callable[..., Any]


class Target(NamedTuple):
    """A program with its data, and what is known of its evidence."""

    model: Program
    args: tuple[Any, ...]
    truth: float
    truth_error: float = 0.0
    start: Program | None = None  # in place of the prior
    simulate: Callable[[dict[str, Array]], Any] | None = None  # from simulated observations to arguments


def density(target: dist.Distribution) -> None:
    """A bare density as a program: its evidence is one."""
    numpyro.sample("z", target)


def whitened_process(y: Array, scale_tril: Array) -> None:
    gaussian_process.model(scale_tril, y, whiten=True)


def _of_density(target: dist.Distribution) -> Target:
    return Target(density, (target,), 0.0, start=static_targets.guide, simulate=lambda _: ((target,), {}))


def _of_process(name: gaussian_process.Name) -> Target:
    problem = gaussian_process.load_problem(name)
    args = jnp.asarray(problem.y, float), jnp.asarray(problem.scale_tril, float)
    return Target(whitened_process, args, gaussian_process.log_evidence(problem))


def _of_regression() -> Target:
    problem = linear_regression.random_problem(np.random.default_rng(0), 50, 10)
    x, y = jnp.asarray(problem.x, float), jnp.asarray(problem.y, float)
    truth = linear_regression.log_evidence(*problem)
    args = x, y, problem.noise_scale
    return Target(linear_regression.model, args, truth, simulate=lambda seen: ((x, seen["y"], args[2]), {}))


def _of_schools() -> Target:
    y, scale = (jnp.asarray(values, float) for values in eight_schools.load_problem())
    return Target(eight_schools.model, (y, scale), eight_schools.integrals(y, scale).log_evidence)


def _of_student_t() -> Target:
    y = static_targets.student_t_data()
    truth = static_targets.student_t_integrals(y).log_evidence
    return Target(static_targets.student_t_model, (jnp.asarray(y, float),), truth)


def _of_logistic(name: logistic_regression.Name, data_dir: str | None) -> Target:
    data = logistic_regression.load_dataset(name, data_dir)
    x, y = jnp.asarray(data.x, float), jnp.asarray(data.y)
    return Target(logistic_regression.model, (x, y), *LOGISTIC[name], simulate=lambda seen: ((x, seen["y"]), {}))


#: Mean and standard error of "ais, guide" and "importance, guide" (not on sonar, Pareto k 1.1), by precision, with
#: --chains 64 --temperatures 1000 --samples 200000 --runs 10 (30 for breast_cancer).
LOGISTIC: dict[str, tuple[float, float]] = {
    "breast_cancer": (-55.2239, 0.0022),
    "sonar": (-108.362, 0.027),
    "ionosphere": (-111.6092, 0.0045),
}
PUBLISHED = {"sonar": -108.4, "ionosphere": -111.6}

MIXTURE_WEIGHTS = (0.3, 0.2, 0.15, 0.1, 0.1, 0.07, 0.05, 0.03)
TARGETS: dict[str, Callable[[str | None], Target]] = {
    "student-t": lambda _: _of_student_t(),
    "gp-rbf1": lambda _: _of_process("rbf1"),
    "gp-rbf2": lambda _: _of_process("rbf2"),
    "regression": lambda _: _of_regression(),
    "schools": lambda _: _of_schools(),
    "mixture": lambda _: _of_density(
        static_targets.gaussian_mixture(static_targets.draw_means(random.key(0), 10), weights=MIXTURE_WEIGHTS)
    ),
    "bimodal": lambda _: _of_density(static_targets.bimodal(10, weight=0.9, scale=0.25)),
    "funnel": lambda _: _of_density(static_targets.Funnel(10)),
    "breast_cancer": lambda data_dir: _of_logistic("breast_cancer", data_dir),
    "sonar": lambda data_dir: _of_logistic("sonar", data_dir),
    "ionosphere": lambda data_dir: _of_logistic("ionosphere", data_dir),
}
NEED_DATA = ("sonar", "ionosphere")

#: By name: the method of log_marginal_likelihood, whether it starts from the fitted guide, and its options.
METHODS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "importance, prior": ("importance", False, {}),
    "importance, guide": ("importance", True, {}),
    "ais, prior": ("ais", False, {}),
    "ais, guide": ("ais", True, {}),
    "smc, prior": ("smc", False, {}),
    "smc, guide": ("smc", True, {}),
    "smc, waste-free": ("smc", False, {"waste_free": 10}),
    "smc, persistent": ("smc", False, {"persistent": True}),
}
BOUNDS = {"dais": DAIS, "dsmcs": DSMCS}
COVERAGE_METHODS: dict[str, dict[str, Any]] = {
    "importance": {"num_samples": 2000},
    "ais, 100 temperatures": {"num_chains": 16, "num_temperatures": 100},
    "ais, 400 temperatures": {"num_chains": 16, "num_temperatures": 400},
    "smc": {"num_particles": 400},
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="all but those that need --data-dir, without one")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, *BOUNDS], choices=[*METHODS, *BOUNDS])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=20_000, help="of importance sampling")
    parser.add_argument("--chains", type=int, default=16, help="of annealed importance sampling")
    parser.add_argument("--temperatures", type=int, default=400, help="of annealed importance sampling")
    parser.add_argument("--leapfrog", type=int, default=5, help="steps of its moves")
    parser.add_argument("--particles", type=int, default=1000, help="of tempered SMC")
    parser.add_argument("--fit-steps", type=int, default=3000, help="of the guide")
    parser.add_argument("--train-steps", type=int, default=1000, help="of dais and dsmcs (16 particles, 8 transitions)")
    parser.add_argument("--bound-keys", type=int, default=500, help="that a trained bound is averaged over")
    parser.add_argument("--simulated", type=int, default=16, help="data sets of bidirectional Monte Carlo; 0: without")
    parser.add_argument("--max-temperatures", type=int, default=3200, help="where its doubling from 50 ends")
    parser.add_argument("--coverage", type=int, default=0, metavar="PROBLEMS", help="conjugate problems, such as 100")
    parser.add_argument("--modes", type=int, default=0, metavar="KEYS", help="compare NUTS and SMC from so many keys")
    parser.add_argument("--data-dir", help="where the UCI files are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}")
    options = parser.parse_args(argv)
    if options.targets is None:
        options.targets = [name for name in TARGETS if options.data_dir or name not in NEED_DATA]
    return options


# Fitted guides and trained bounds


class Fitted(NamedTuple):
    guide: Program
    params: dict[str, Any]
    seconds: float


def fit_guide(target: Target, options: argparse.Namespace) -> Fitted:
    """A Gaussian over all latents, fitted to a bound of 32 particles: wider than the evidence lower bound's."""
    guide = AutoMultivariateNormal(target.model, init_loc_fn=init_to_median, init_scale=0.5)
    return _trained(target, guide, IWELBO(32), options.fit_steps, 0.02, options.seed)


def _trained(target: Target, guide: Program, loss: Any, num_steps: int, rate: float, seed: int) -> Fitted:
    began = time.process_time()
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    result = SVI(target.model, guide, optimiser, loss).run(
        random.key(seed), num_steps, *target.args, progress_bar=False, stable_update=True
    )
    return Fitted(guide, result.params, time.process_time() - began)


def train_bound(name: str, target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """The bound of a trained differentiable sampler: its row of the table."""
    loss = BOUNDS[name](16, 8)
    plain = AutoNormal(target.model, init_loc_fn=init_to_median, init_scale=0.5)
    found = _trained(target, loss.wrap(plain), loss, options.train_steps, 0.02, options.seed)

    @jax.jit
    def values(keys: Array) -> Array:
        return jax.lax.map(lambda key: -loss.loss(key, found.params, target.model, found.guide, *target.args), keys)

    keys = random.split(random.key(options.seed + 1), options.bound_keys)
    jax.block_until_ready(values(keys))
    began = time.process_time()
    bounds = np.asarray(values(keys), np.float64)
    error = bounds.std(ddof=1) / math.sqrt(len(bounds))
    return {
        "value": float(bounds.mean()),
        "s.e.": float(error),
        "sd": float(bounds.std(ddof=1)),
        "difference": float(bounds.mean() - target.truth),
        "bound": "lower",
        "gradients": 16 * 8,
        "CPU s": (time.process_time() - began) / len(bounds),
        "fit s": found.seconds,
        "verdict": "A bound: the difference is its gap.",
    }


# Estimates


def estimate(name: str, target: Target, fitted: Callable[[], Fitted], options: argparse.Namespace) -> dict[str, Any]:
    """Runs of one method on one target: its row of the table."""
    method, from_fitted, special = METHODS[name]
    sizes = {
        "importance": {"num_samples": options.samples},
        "ais": {
            "num_chains": options.chains,
            "num_temperatures": options.temperatures,
            "num_leapfrog": options.leapfrog,
        },
        "smc": {"num_particles": options.particles},
    }
    start = {"guide": fitted().guide, "params": fitted().params} if from_fitted else {"guide": target.start}
    runs: list[Evidence] = []
    seconds: list[float] = []
    for run in range(options.runs + 1):  # the first compiles
        rng_key = random.fold_in(random.key(options.seed), max(run, 1))
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large Pareto k: the verdict says it
            found = log_marginal_likelihood(
                rng_key, target.model, *target.args, method=method, **start, **sizes[method], **special
            )
        seconds.append(time.process_time() - began)
        runs.append(found)
    runs, seconds = runs[1:], seconds[1:]
    values, errors = (np.array([getattr(found, each) for found in runs]) for each in ("value", "standard_error"))
    inside = [low <= target.truth <= high for low, high in (found.interval() for found in runs)]
    row = {
        "value": float(values.mean()),
        "s.e.": float(np.sqrt(np.mean(errors**2))),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        "difference": float(values.mean() - target.truth),
        "worst": float(np.max(np.abs(values - target.truth) / np.hypot(errors, target.truth_error))),
        "inside": f"{sum(inside)}/{len(runs)}",
        "bound": runs[0].bound,
        "gradients": num_gradients(method, runs[0], options, special),
        "CPU s": float(np.mean(seconds)),
        "fit s": fitted().seconds if from_fitted else "",
        "verdict": runs[0].verdict,
    }
    if runs[0].pareto_k is not None:
        row["Pareto k"] = float(np.max([np.max(found.pareto_k) for found in runs]))
    return row


def num_gradients(method: str, found: Evidence, options: argparse.Namespace, special: dict[str, Any]) -> int:
    """Gradients of the joint density in one run; evaluations for importance sampling."""
    if method == "importance":
        return found.num_samples
    if method == "ais":
        return annealing_gradients(options.chains, options.temperatures, options.leapfrog, pilot=16)
    assert found.acceptance is not None
    num_steps = 8  # of the default moves, five of them
    num, kept = options.particles, special.get("waste_free")
    of_a_stage = (num // kept) * (1 + (kept - 1) * num_steps) if kept else num * (1 + 5 * num_steps)
    return num + len(found.acceptance) * of_a_stage


def annealing_gradients(chains: int, temperatures: int, leapfrog: int, pilot: int = 0) -> int:
    """Of weighed chains, and of a pilot's, which move at least a hundred times and thirty before."""
    moves = temperatures - 1
    pilot_moves = 30 + moves * math.ceil(100 / moves)
    return chains * (1 + moves * leapfrog) + pilot * (1 + pilot_moves * leapfrog)


def certify(target: Target, temperatures: int, options: argparse.Namespace) -> dict[str, Any]:
    """Bounds from both sides on simulated data, from a start that suits any data."""
    ais = AIS(
        target.model,
        target.start,
        num_chains=options.chains,
        num_temperatures=temperatures,
        num_leapfrog=options.leapfrog,
    )
    ask = {"num_simulated": options.simulated, "simulate": target.simulate}
    began = time.process_time()
    bidirectional(random.key(options.seed + 1), ais, *target.args, **(ask | {"num_simulated": 1}))
    compiled = time.process_time()
    found = bidirectional(random.key(options.seed), ais, *target.args, **ask)
    settings = options.chains, temperatures, options.leapfrog
    row = {
        "temperatures": temperatures,
        "gap": found.mean_gap,
        "s.e.": found.mean_gap_error,
        "largest gap": float(np.max(found.gap)),
        "certified": found.mean_gap + 2 * found.mean_gap_error < TIGHT,
        "gradients": annealing_gradients(*settings, pilot=16) + annealing_gradients(*settings),
        "CPU s": (time.process_time() - compiled) / options.simulated,
        "compile s": compiled - began,
        "verdict": found.verdict,
    }
    if target.model is density:  # nothing is simulated but the latents: the truth lies between the bounds
        row |= {"lower": float(np.mean(found.lower)), "upper": float(np.mean(found.upper))}
    return row


# Coverage, and shares of modes


def regression_guide(x: Array, y: Array, noise_scale: Array) -> None:
    """The posterior's mean, and independent scales a tenth larger than its own."""
    covariance = jnp.linalg.inv(jnp.eye(x.shape[1]) + x.T @ x / noise_scale**2)
    scale = 1.1 * jnp.sqrt(jnp.diag(covariance))
    numpyro.sample("w", dist.Normal(covariance @ x.T @ y / noise_scale**2, scale).to_event(1))


def cover(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """How often stated 95 % intervals hold the exact evidence of conjugate regressions."""
    method, sizes = name.split(",")[0], COVERAGE_METHODS[name]
    inside, scores, trusted = [], [], []
    began = time.process_time()
    for number, problem in enumerate(linear_regression.random_problems(options.seed, options.coverage)):
        args = jnp.asarray(problem.x, float), jnp.asarray(problem.y, float), jnp.asarray(problem.noise_scale, float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = log_marginal_likelihood(
                random.fold_in(random.key(options.seed), number),
                linear_regression.model,
                *args,
                method=method,
                guide=regression_guide if method == "importance" else None,
                **sizes,
            )
        truth = linear_regression.log_evidence(*problem)
        low, high = found.interval()
        inside.append(low <= truth <= high)
        scores.append((found.value - truth) / found.standard_error)
        trusted.append(not found.verdict.startswith("Not to be trusted"))
    kept = np.array(inside)[np.array(trusted)]
    return {
        "inside": int(np.sum(inside)),
        "problems": options.coverage,
        "trusted": int(np.sum(trusted)),
        "inside of trusted": int(kept.sum()),
        "mean score": float(np.mean(scores)),
        "sd of score": float(np.std(scores, ddof=1)),
        "CPU s": time.process_time() - began,
        **sizes,
    }


def shares_of_modes(method: str, key: int, options: argparse.Namespace) -> dict[str, Any]:
    """Shares of the modes of weight 0.9 and 0.1, twelve scales apart, in draws of one run."""
    target = static_targets.bimodal(10, weight=0.9, scale=0.25)
    began = time.process_time()
    rng_key = random.fold_in(random.key(options.seed), key)
    if method == "nuts, 4 chains":
        sizes = {"num_warmup": 500, "num_samples": 1000, "num_chains": 4}
        mcmc = MCMC(NUTS(static_targets.model), **sizes, chain_method="vectorized", progress_bar=False)
        mcmc.run(rng_key, target)
        chains = mcmc.get_samples(group_by_chain=True)["z"]
        by_chain = [float(static_targets.mode_weights(target, z)[0]) for z in chains]
        share, r_hat = float(np.mean(by_chain)), float(np.max(numpyro.diagnostics.gelman_rubin(np.asarray(chains))))
        row = {"share": share, "by chain": " ".join(f"{s:.2f}" for s in by_chain), "R-hat": r_hat}
    else:
        sampler = _mode_sampler(options.particles)
        result = sampler.run(rng_key, target, progress_bar=False)
        share = float(static_targets.mode_weights(target, result.samples["z"], result.log_weights)[0])
        row = {"share": share, "log evidence": result.log_evidence, "s.e.": result.log_evidence_se}
    return row | {"CPU s": time.process_time() - began}


@cache
def _mode_sampler(num_particles: int) -> SMCSampler:
    return SMCSampler(static_targets.model, num_particles, init_guide=(static_targets.guide, {}))


# The tables


class Table:
    """Rows by cell, kept from an earlier run of the same settings and written after each."""

    def __init__(self, name: str, columns: Sequence[str], settings: dict[str, Any], free: Sequence[str]) -> None:
        self.name, self.columns, self.settings = name, columns, settings
        rows = report.load(settings["output"], name, settings, free)
        self.rows = {tuple(row[column] for column in columns): row for row in rows}

    def measure(self, cell: tuple[Any, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if cell not in self.rows:
            began, row = time.perf_counter(), dict(zip(self.columns, cell, strict=True))
            try:
                row |= make()
            except Exception as error:  # a cell that fails keeps its row, and is tried again next time
                row["error"] = f"{type(error).__name__}: {error}"
            self.rows[cell] = row
            print(f"{self.name}: {', '.join(map(str, cell))}: {time.perf_counter() - began:.0f} s", flush=True)
            report.write(self.settings["output"], self.name, list(self.rows.values()), self.settings)
        return self.rows[cell]

    def show(self, title: str, columns: Sequence[str]) -> None:
        if self.rows:
            print(f"\n{title}")
            shown = [{**row, "verdict": row.get("verdict", "").split(":")[0]} for row in self.rows.values()]
            report.print_table(shown, [*columns, "error"] if any("error" in row for row in shown) else columns)


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    options = parse_arguments(argv)
    settings = {name: value for name, value in vars(options).items() if name != "data_dir"}
    report.print_environment(settings)
    print()
    free = ("targets", "methods", "output", "max_temperatures", "coverage", "modes")
    estimates = Table(NAME, ("target", "method"), settings, free)
    gaps = Table(f"{NAME}_bidirectional", ("target", "temperatures"), settings, free)
    coverage = Table(f"{NAME}_coverage", ("method", "problems"), settings, free)
    modes = Table(f"{NAME}_modes", ("method", "key"), settings, free)
    for name in options.targets:
        target = TARGETS[name](options.data_dir)
        fitted = cache(lambda target=target: fit_guide(target, options))
        for method in options.methods:
            if method in BOUNDS:
                estimates.measure((name, method), lambda t=target, m=method: train_bound(m, t, options))
            else:
                estimates.measure((name, method), lambda t=target, m=method, f=fitted: estimate(m, t, f, options))
        temperatures = 50
        while options.simulated and temperatures <= options.max_temperatures:
            row = gaps.measure((name, temperatures), lambda t=target, k=temperatures: certify(t, k, options))
            if row.get("certified"):
                break
            temperatures *= 2
        jax.clear_caches()
    for method in COVERAGE_METHODS if options.coverage else ():
        coverage.measure((method, options.coverage), lambda m=method: cover(m, options))
    for key in range(options.modes):
        for method in ("nuts, 4 chains", "smc"):
            modes.measure((method, key), lambda m=method, k=key: shares_of_modes(m, k, options))
    plot(estimates.rows.values(), gaps.rows.values(), Path(options.output))
    shown = ("target", "method", "value", "s.e.", "sd", "difference", "worst", "inside", "gradients", "CPU s", "fit s")
    estimates.show("Estimates (all lower bounds on average)", (*shown, "verdict"))
    print("\nPublished:", ", ".join(f"{name} {value}" for name, value in PUBLISHED.items()))
    gaps.show(
        "Bounds from both sides, on simulated data",
        ("target", "temperatures", "gap", "s.e.", "certified", "gradients", "CPU s", "lower", "upper"),
    )
    coverage.show(
        "Coverage of 95 % intervals on conjugate regressions",
        ("method", "inside", "problems", "trusted", "inside of trusted", "mean score", "sd of score", "CPU s"),
    )
    modes.show(
        "Share of the mode of weight 0.9", ("method", "key", "share", "by chain", "R-hat", "log evidence", "s.e.")
    )
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return {table.name: list(table.rows.values()) for table in (estimates, gaps, coverage, modes)}


def plot(estimates: Any, gaps: Any, folder: Path) -> None:
    """Errors of the mean value with two stated standard errors, by target; and gaps by number of temperatures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in estimates if "value" in row]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for number, method in enumerate(methods):
        for row in (row for row in rows if row["method"] == method):
            at = targets.index(row["target"]) + 0.09 * (number - len(methods) / 2)
            label = method if row["target"] == targets[0] else None
            left.errorbar(at, row["difference"], 2 * row["s.e."], fmt="o", ms=4, color=f"C{number}", label=label)
    left.axhline(0.0, color="0.6", lw=0.8)
    left.set_yscale("symlog", linthresh=0.5)
    left.set_xticks(range(len(targets)), targets, rotation=40, ha="right")
    left.set_ylabel("value less the truth (± 2 stated s.e. of a run), nats")
    if methods:
        left.legend(frameon=False, fontsize=8)
    for name in dict.fromkeys(row["target"] for row in gaps):
        points = sorted((row["temperatures"], row["gap"]) for row in gaps if row["target"] == name and "gap" in row)
        right.plot([p[0] for p in points], [max(p[1], 1e-4) for p in points], marker="o", label=name)
    right.axhline(TIGHT, color="0.6", lw=0.8)
    right.set(xscale="log", yscale="log", xlabel="temperatures", ylabel="mean gap of the two bounds, nats")
    if right.get_lines()[1:]:
        right.legend(frameon=False, fontsize=8)
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
