r"""What annealing does to the guide it starts from, "DAIS_0" [1].

The start :math:`q_0`, a Gaussian with independent coordinates, is learned together with the sampler. Alone
(K = 0, N = 1) it minimises KL(q_0, p), and is too narrow; with K transitions behind it, it tends to the minimum of
KL(q_0, p) + KL(p, q_0) as K grows [1]; N > 1 particles widen it further, with transitions or without. Prints bound,
mean log variance and entropy of :math:`q_0` beside the mean log variances that are optimal for the three divergences
(of bimodal targets, the one of KL(p, q_0) and that of a single mode; of logistic regression, those of the Gaussian at
the posterior mode), and beside the published code; writes CSV, JSON, curves and a figure. Resumes from checkpoints.

bimodal-D2, bimodal-D5: two Gaussians of scale 1/4 at 0 and 1. gp-rbf1, gp-rbf2: Gaussian-process regression in the
function values, the start being the optimum of KL(q_0, p), and in units of its scales; with -whitened, of whitened
values. breast_cancer, sonar, ionosphere: logistic regression, from the Gaussian at the posterior mode; the last two
need --data-dir or NUMPYRO_SMC_DATA.

Published: --num_mc 512 --num_steps 2500 (bimodal); --num_mc 128 --num_steps 5000 (gp); --num_mc 128 --num_steps 10000
--lr 0.001 (ionosphere), with K = 16, fixed learning rates, and step sizes without a limit.

1. *Differentiable Annealed Importance Sampling Minimizes The Symmetrized Kullback-Leibler Divergence Between Initial
   and Target Distribution*, J. Zenn, R. Bamler (2024)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array, lax, random
from numpyro.infer import SVI

from benchmarks import replicates, report
from benchmarks.annealed_training import fill_table, learned, make_loss, summary
from models import gaussian_process, logistic_regression, static_targets

NAME = "annealed_guides"
PROBLEMS = (
    "bimodal-D2",
    "bimodal-D5",
    "gp-rbf1",
    "gp-rbf2",
    "gp-rbf2-whitened",
    "breast_cancer",
    "sonar",
    "ionosphere",
)
DEFAULT_PROBLEMS = ["bimodal-D2", "bimodal-D5", "gp-rbf2", "gp-rbf2-whitened", "breast_cancer"]

#: Settings that choose cells rather than change them.
FREE = ("problems", "num_transitions", "num_particles", "num_steps", "seeds", "data_dir", "output", "no_progress")

COLOURS = {f"optimal, {n}": f"C{i}" for i, n in enumerate(("reverse", "symmetrised", "forward", "one mode"), 1)}

#: Measured with the published code: bound and mean log variance, by problem and (N, K). Bimodal: 1500 steps alone and
#: 500 with transitions; Gaussian process: 40,000 and 12,000.
REFERENCE: dict[str, dict[tuple[int, int], tuple[float, float]]] = {
    "bimodal-D2": {(1, 0): (-0.686, -2.737), (32, 8): (-0.048, -1.075)},
    "bimodal-D5": {(1, 0): (-0.694, -2.770), (32, 8): (-0.085, -1.236)},
    "gp-rbf2": {(1, 0): (-58.79, -9.303), (16, 4): (-48.45, -7.493)},
}


class Problem(NamedTuple):
    """A posterior, and the start of its guide.

    - **model**, **args** - the program; **site** - its latent, ``[D]``.
    - **loc**, **scale** - of the guide before training, ``[D]``; its parameters are in these units.
    - **step_size_max** - limit of the sampler's steps.
    - **num_particles**, **num_transitions** - N, and the K that are compared, 0 among them.
    - **optima** - mean log variance by divergence; **log_evidence** - if it is known.
    """

    model: Callable[..., None]
    args: tuple[Any, ...]
    site: str
    loc: np.ndarray
    scale: np.ndarray
    step_size_max: float
    num_particles: int
    num_transitions: tuple[int, ...]
    optima: dict[str, float]
    log_evidence: float | None = None


def make_problem(name: str, data_dir: str | None = None) -> Problem:
    """The problem that a name of :data:`PROBLEMS` stands for."""
    if name.startswith("bimodal"):
        dim, scale = int(name.removeprefix("bimodal-D")), 0.25
        optima = {"one mode": 2 * np.log(scale), "forward": float(np.log(scale**2 + 0.25))}
        start = np.full(dim, 0.5), np.ones(dim)
        args = (static_targets.bimodal(dim, scale=scale),)
        return Problem(static_targets.model, args, "z", *start, 0.25, 32, (0, 8), optima, 0.0)
    if name.startswith("gp"):
        whiten = name.endswith("-whitened")
        data = gaussian_process.load_problem("rbf1" if "rbf1" in name else "rbf2")
        mean, covariance = gaussian_process.posterior(data, whiten)
        scale = np.sqrt(gaussian_process.factorised_optima(covariance).reverse)
        model = partial(gaussian_process.model, whiten=whiten)
        limit = float(2 * np.sqrt(np.linalg.eigvalsh(covariance)[0]))  # stability, at mass 1
        evidence = gaussian_process.log_evidence(data)
        site = "w" if whiten else "f"
        return Problem(model, data, site, mean, scale, limit, 16, (0, 1, 4, 16), optimal(covariance), evidence)
    dataset = logistic_regression.load_dataset(name, data_dir)
    mode, covariance = laplace(dataset)
    scale = np.sqrt(gaussian_process.factorised_optima(covariance).reverse)
    return Problem(logistic_regression.model, dataset, "w", mode, scale, 0.25, 16, (0, 1, 4, 16), optimal(covariance))


def optimal(covariance: np.ndarray) -> dict[str, float]:
    """Mean log variances of the best factorised Gaussians for a Gaussian target."""
    optima = gaussian_process.factorised_optima(covariance)._asdict()
    return {name: float(np.log(variances).mean()) for name, variances in optima.items()}


def laplace(dataset: logistic_regression.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mode and inverse Hessian of the posterior, by Newton's method in double precision."""
    x, y = np.asarray(dataset.x, np.float64), np.asarray(dataset.y, np.float64)
    w = np.zeros(x.shape[1])
    for _ in range(50):
        rates = 1 / (1 + np.exp(-x @ w))
        hessian = np.eye(len(w)) + (x.T * (rates * (1 - rates))) @ x
        w = w + np.linalg.solve(hessian, x.T @ (y - rates) - w)
    return w, np.linalg.inv(hessian)


def make_guide(problem: Problem) -> Callable[..., None]:
    r"""A factorised Gaussian :math:`\mathcal N(m + s a, (s e^{b})^2)`, ``a`` and ``b`` being parameters from 0."""
    loc, scale = jnp.asarray(problem.loc, float), jnp.asarray(problem.scale, float)

    def guide(*args: Any) -> None:
        shift = numpyro.param("shift", jnp.zeros(len(loc)))
        log_ratio = numpyro.param("log_ratio", jnp.zeros(len(loc)))
        numpyro.sample(problem.site, dist.Normal(loc + scale * shift, scale * jnp.exp(log_ratio)).to_event(1))

    return guide


def start_statistics(problem: Problem, params: dict[str, Any]) -> dict[str, Array]:
    """Mean log variance and entropy of the start, and how far its mean went, in units of its first scales."""
    log_variances = 2 * (jnp.log(jnp.asarray(problem.scale, float)) + params["log_ratio"])
    entropy = 0.5 * jnp.sum(log_variances + jnp.log(2 * jnp.pi * jnp.e))
    shift = jnp.sqrt(jnp.mean(params["shift"] ** 2))
    return {"log variance": jnp.mean(log_variances), "entropy": entropy, "shift": shift}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=DEFAULT_PROBLEMS, choices=PROBLEMS)
    parser.add_argument("--num_transitions", type=int, nargs="+", help="instead of those of the problem, K")
    parser.add_argument("--num_particles", type=int, help="instead of that of the problem, N")
    parser.add_argument("--num_mc", type=int, default=16, help="samplers that the loss averages")
    parser.add_argument("--num_steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.01, help="falls to a tenth, on a cosine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_eval", type=int, default=2048, help="samplers that an evaluation runs")
    parser.add_argument("--data-dir", help="folder of sonar.all-data and ionosphere.data")
    parser.add_argument("--output", default="results/annealed_guides")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def train(cell: dict[str, Any], options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train one start with the sampler behind it; the rest of its row, and its curves."""
    problem = make_problem(cell["problem"], options.data_dir)
    sizes = "dais", cell["N"], cell["K"]
    one = make_loss(*sizes, step_size_max=problem.step_size_max)
    loss = make_loss(*sizes, step_size_max=problem.step_size_max, num_mc=options.num_mc, remat=None)
    guide = loss.wrap(make_guide(problem))
    rate = optax.cosine_decay_schedule(options.lr, cell["steps"], alpha=0.1)
    svi = SVI(problem.model, guide, optax.adam(rate), loss)

    def measure(params: dict[str, Any], rng_key: Array) -> dict[str, Array]:
        def estimate(rng_key: Array) -> Array:
            return -one.loss(rng_key, params, problem.model, guide, *problem.args)

        keys = random.split(rng_key, options.num_eval)
        return summary(lax.map(estimate, keys, batch_size=options.num_mc)) | start_statistics(problem, params)

    fixed = {name: value for name, value in vars(options).items() if name not in FREE}
    trained = replicates.train(
        svi,
        [cell["seed"]],
        cell["steps"],
        lambda rng_key: problem.args,
        evaluate=measure,
        num_evaluations=10,
        checkpoint=Path(options.output) / f"{cell['problem']}-{report.digest(fixed | cell)}.npz",
        progress_bar=not options.no_progress,
        description=" ".join(map(str, cell.values())),
    )
    curves = {name: values if name == "step" else values[:, 0] for name, values in trained.curves.items()}
    points = [{name: values[i].item() for name, values in curves.items()} for i in range(len(curves["step"]))]
    row = {name: value for name, value in points[-1].items() if name not in ("step", "loss")}
    row |= {f"optimal, {name}": value for name, value in problem.optima.items()}
    params = jax.tree.map(lambda value: value[0], trained.params)
    return row | {"log evidence": problem.log_evidence} | learned(loss, params), points


def beside_reference(row: dict[str, Any]) -> dict[str, Any]:
    reference = REFERENCE.get(row["problem"], {}).get((row["N"], row["K"]), ("", ""))
    known = row.get("log evidence")
    return {
        **{name: row[name] for name in ("problem", "N", "K", "steps", "seed")},
        "bound": row.get("bound", row.get("error")),
        "s.e.": row.get("s.e.", ""),
        "publ. code": reference[0],
        "log evidence": "" if known is None else known,
        "log variance": row.get("log variance", ""),
        "publ. code ": reference[1],
        "reverse": row.get("optimal, reverse", row.get("optimal, one mode", "")),
        "symmetrised": row.get("optimal, symmetrised", ""),
        "forward": row.get("optimal, forward", ""),
        "entropy": row.get("entropy", ""),
    }


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Mean log variance of the start by K, with the optima as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error" not in row]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    if not problems:
        return
    figure, axes = plt.subplots(
        1, len(problems), figsize=(3.2 * len(problems), 3.2), layout="constrained", squeeze=False
    )
    for ax, problem in zip(axes[0], problems, strict=True):
        chosen = sorted((row for row in rows if row["problem"] == problem), key=lambda row: (row["N"], row["K"]))
        labels = [f"{row['N']}, {row['K']}" for row in chosen]
        ax.plot(labels, [row["log variance"] for row in chosen], "o")
        optima = {name: value for name, value in chosen[0].items() if name.startswith("optimal") and value is not None}
        for name, value in optima.items():
            ax.axhline(value, color=COLOURS[name], ls=":", label=name.removeprefix("optimal, "))
        ax.tick_params(axis="x", labelrotation=90)
        ax.set(title=problem, xlabel="N, K", ylabel="mean log variance of the start" if ax is axes[0, 0] else "")
        ax.legend(frameon=False, fontsize="small")
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = vars(options)
    report.print_environment(settings)
    cells = []
    for name in options.problems:
        problem = make_problem(name, options.data_dir)
        particles = options.num_particles or problem.num_particles
        sizes = [(particles, k) for k in options.num_transitions or problem.num_transitions]
        for num_particles, num_transitions in ((1, 0), *sizes):
            cell = {"problem": name, "N": num_particles, "K": num_transitions, "steps": options.num_steps}
            cells += [cell | {"seed": seed} for seed in options.seeds]
    folder = Path(options.output)
    rows, _ = fill_table(NAME, cells, lambda **cell: train(cell, options), folder, settings, FREE)
    plot(rows, folder)
    print(
        "\nlog variance: mean of the learned start's; then the published code's, measured, and the optima of the three "
        "divergences (bimodal: of one mode, none, and forward)"
    )
    report.print_table([beside_reference(row) for row in rows])
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return rows


if __name__ == "__main__":
    main()
