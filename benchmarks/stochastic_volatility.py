"""Stochastic volatility on real returns: FIVO, the never-resample bound, and SIXO with quadrature and learned twists.

Without ``--data-dir``: daily S&P 500 returns that the package ``arch`` ships. With it: the monthly series of 22
currencies (``forex_data.tsv``), trained on the first 119 returns and tested on the last 54, as published. Prints each
method's own bound (the objective it trains, N particles), and the evidence of its model by a bootstrap filter with many
particles; writes a CSV, a JSON, a plot of volatility bands over the returns and an ArviZ file. Training resumes from
checkpoints.

Published (22 currencies, 10 million steps, [1] table 1): own train bound FIVO 6923.66, SIXO-q 6930.56,
SIXO-DRE 6933.77.

1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventos, A. Warrington, S. Linderman (2022)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, random
from numpyro.infer import SVI

from benchmarks import report
from models import series
from models import stochastic_volatility as sv
from numpyro_smc import FIVO, SIXO, FitResult, ParticleFilter, alternating, fit, log_evidence

METHODS = ("fivo", "iwae", "sixo-q", "sixo-dre")
PUBLISHED = {"fivo": 6923.66, "sixo-q": 6930.56, "sixo-dre": 6933.77}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with forex_data.tsv; without it daily S&P 500 returns are used")
    parser.add_argument("--start", default="2016-01-01", help="first day of the S&P 500 window")
    parser.add_argument("--bound", nargs="+", default=["fivo", "sixo-q"], choices=METHODS, help="methods to train")
    parser.add_argument("--num_train_steps", type=int, default=3000, help="model steps (published: 10000000)")
    parser.add_argument("--num_train_particles", type=int, default=4)
    parser.add_argument("--num_eval_particles", type=int, default=2048, help="particles of the bootstrap filter")
    parser.add_argument("--num_eval_keys", type=int, default=4, help="bootstrap filters per evidence")
    parser.add_argument("--num_bound_keys", type=int, default=200, help="evaluations of each method's own bound")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="Adam step size (published: 1e-4, 3e-4 or 6e-4, constant)"
    )
    parser.add_argument(
        "--final_lr", type=float, default=6e-5, help="end of the cosine schedule; equal to --lr: constant"
    )
    parser.add_argument("--tilt_lr", type=float, default=1e-3, help="Adam step size of the learned twist")
    parser.add_argument(
        "--tilt_batch_size", type=int, default=32, help="simulated series per twist step (published: 64)"
    )
    parser.add_argument("--model_inner_steps", type=int, default=400, help="model steps per turn (published: 100)")
    parser.add_argument("--tilt_inner_steps", type=int, default=100, help="twist steps per turn")
    parser.add_argument("--rnn_size", type=int, default=64, help="hidden units of the backwards LSTM")
    parser.add_argument("--mlp_size", type=int, default=128, help="hidden units of the twist's head")
    parser.add_argument("--quadrature_degree", type=int, default=5)
    parser.add_argument("--init_scale", type=float, default=0.01)
    parser.add_argument("--min_scale", type=float, default=1e-12)
    parser.add_argument("--covariance", default="diagonal", choices=("diagonal", "full"))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--output", default="results/stochastic_volatility", help="folder of results and checkpoints")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def load(options: argparse.Namespace) -> tuple[Array, Array | None, str]:
    """Training series ``[T, D]``, test series or ``None``, and the name of the data."""
    if options.data_dir is None:
        returns, days = series.load_sp500(options.start)
        return (
            jnp.asarray(returns, jnp.float32)[:, None],
            None,
            f"S&P 500 daily returns in percent, {days[0]} to {days[-1]}",
        )
    train, test = series.load_forex(options.data_dir)
    return jnp.asarray(train, jnp.float32), jnp.asarray(test, jnp.float32), "22 currencies, monthly log returns"


def build(method: str, options: argparse.Namespace, y: Array, seed: int) -> tuple[SVI, int]:
    """The method's :class:`SVI`, and how many steps (twist steps included) hold ``--num_train_steps`` model steps."""
    num_steps, dim = y.shape
    shared = {"covariance": options.covariance, "min_scale": options.min_scale, "init_scale": options.init_scale}
    model = sv.make_model(num_steps, dim, **shared)
    twists = {"sixo-q": "quadrature", "sixo-dre": "learned"}
    guide = sv.make_guide(
        num_steps,
        dim,
        twists.get(method, "none"),
        rng_key=random.key(1000 + seed),
        hidden_size=options.rnn_size,
        width=options.mlp_size,
        degree=options.quadrature_degree,
        **shared,
    )
    schedule = optax.cosine_decay_schedule(options.lr, options.num_train_steps, options.final_lr / options.lr)
    particles = options.num_train_particles
    optim: Any = optax.adam(schedule)
    num_train_steps = options.num_train_steps
    if method == "fivo":
        loss = FIVO(particles)
    elif method == "iwae":
        loss = FIVO(particles, resample="never")
    elif method == "sixo-q":
        loss = SIXO(particles)
    else:
        loss = SIXO(particles, twist_training="dre", twist_batch_size=options.tilt_batch_size)
        turns = (options.model_inner_steps, options.tilt_inner_steps)
        optim = alternating(optim, optax.adam(options.tilt_lr), num_steps=turns[0], num_twist_steps=turns[1])
        num_train_steps = num_train_steps // turns[0] * sum(turns) + num_train_steps % turns[0]
    return SVI(model, guide, optim, loss), num_train_steps


def evidence(model: Callable[..., Any], params: dict[str, Any], y: Array, options: argparse.Namespace) -> np.ndarray:
    """Bootstrap-filter log evidences of the model alone, one per key."""
    own = {
        name: value
        for name, value in params.items()
        if name in ("mu", "raw_phi", "log_beta", "raw_q", "raw_scale_tril")
    }
    keys = random.split(random.key(17), options.num_eval_keys)
    return np.array([log_evidence(key, model, own, y, num_particles=options.num_eval_particles) for key in keys])


def train(
    method: str, seed: int, options: argparse.Namespace, y: Array, name: str
) -> tuple[SVI, FitResult, dict[str, Any]]:
    """Train one method and measure its own bound."""
    svi, num_train_steps = build(method, options, y, seed)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = fit(
        svi,
        random.key(seed),
        num_train_steps,
        y,
        progress_bar=not options.no_progress,
        checkpoint=folder / f"{name}-{method}-seed{seed}.npz",
    )
    seconds = time.perf_counter() - started
    keys = random.split(random.key(99), options.num_bound_keys)
    bound = jax.jit(lambda params, y: -jax.lax.map(lambda k: svi.loss.loss(k, params, svi.model, svi.guide, y), keys))
    bounds = np.asarray(bound(result.params, y))
    row = {
        "method": method,
        "seed": seed,
        "model steps": options.num_train_steps,
        "steps": num_train_steps,
        "seconds": round(seconds, 1),
        "own train bound": float(bounds.mean()),
        "own bound s.e.": float(bounds.std(ddof=1) / np.sqrt(len(bounds))),
        "skipped": result.num_skipped,
    }
    return svi, result, row


def plot_volatility(params: dict[str, Any], model: Callable[..., Any], y: Array, title: str, folder: Path) -> None:
    """Bands of the returns' standard deviation over the returns, and the filter as an ArviZ file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    filtered = ParticleFilter(model, 2000).run(random.key(5), y, params=params)
    draws = filtered.sample_posterior(random.key(6), 200, method="backward")
    scale = np.exp(np.asarray(draws["x"])[..., 0] / 2 + np.asarray(params["log_beta"])[0])
    low, middle, high = np.quantile(scale, [0.05, 0.5, 0.95], axis=0)
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    times = np.arange(len(y))
    ax.plot(times, np.asarray(y)[:, 0], ".", ms=3, color="0.5", label="returns")
    for sign in (1, -1):
        ax.fill_between(times, sign * low, sign * high, color="tab:red", alpha=0.3, lw=0)
        ax.plot(
            times, sign * middle, color="tab:red", lw=1, label="volatility: median and 90% band" if sign > 0 else None
        )
    ax.set_xlabel("time")
    ax.set_title(title, fontsize=10)
    ax.legend(frameon=False)
    figure.savefig(folder / "volatility.png", dpi=150)
    plt.close(figure)
    filtered.to_arviz(random.key(7), 500).to_netcdf(str(folder / "filter.nc"))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    y, test, description = load(options)
    settings = vars(options) | {"data": description, "shape": tuple(y.shape)}
    report.print_environment(settings)
    name = "forex" if options.data_dir else "sp500"
    rows, last = [], None
    for seed in options.seed:
        for method in options.bound:
            print(f"\n{method}, seed {seed}")
            svi, result, row = train(method, seed, options, y, name)
            for split, data in (("train", y), ("test", test)):
                if data is not None:
                    values = evidence(svi.model, result.params, data, options)
                    row[f"filter {split}"] = float(values.mean())
                    row[f"filter {split} s.e."] = (
                        float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
                    )
            if name == "forex" and method in PUBLISHED:
                row["published own bound"] = PUBLISHED[method]
            rows.append(row)
            last = (result.params, svi.model)
            report.write(options.output, name, rows, settings)
    assert last is not None
    plot_volatility(*last, y, description, Path(options.output))
    print()
    report.print_table(rows)
    print(f"\nresults, figure volatility.png and filter.nc: {options.output}")
    return rows


if __name__ == "__main__":
    main()
