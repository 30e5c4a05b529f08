"""Gaussian drift diffusion: which bounds become tight, and which twists are learned.

Trains the drift, the proposal and (for SIXO) the twist with IWAE, FIVO-u, FIVO-b, SIXO-u, SIXO-b, SIXO-a and SIXO-DRE
[1]: "u" keeps the score term of resampling, "b" drops it, "a" has the analytic twist, "DRE" learns it by density
ratios. Prints the gap between the exact mean log evidence at the trained drift and each bound, and the density-ratio
loss (Bayes optimal 1.0797, chance 1.2477, in the original's normalisation); writes CSV, JSON and a figure of gaps over
training. Resumes from checkpoints. Published: figures only; IWAE, SIXO-u and SIXO-DRE become tight, FIVO does not
(500,000 steps).

1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventos, A. Warrington, S. Linderman (2022)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, random
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO

from benchmarks import report
from models import drift_diffusion as gdd
from numpyro_smc import FIVO, SIXO, alternating, fit

METHODS = ("iwae", "fivo-u", "fivo-b", "sixo-u", "sixo-b", "sixo-a", "sixo-dre")


class Minibatch(ELBO):
    """A loss averaged over a batch of series drawn with replacement at each step."""

    def __init__(self, loss: ELBO, size: int) -> None:
        super().__init__(num_particles=loss.num_particles)
        self.loss_of_batch = loss
        self.size = size
        self.can_infer_discrete = loss.can_infer_discrete

    def loss_with_mutable_state(
        self, rng_key: Array, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        batch_key, key = random.split(rng_key)
        y, num_steps, _ = args
        batch = y[random.randint(batch_key, (self.size,), 0, len(y))]
        result = self.loss_of_batch.loss_with_mutable_state(key, param_map, model, guide, batch, num_steps, self.size)
        return {**result, "loss": result["loss"] / self.size}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bound", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--num_train_steps", type=int, default=5000, help="all steps, of model and twist (published: 500000)"
    )
    parser.add_argument("--num_steps", type=int, default=10, help="length of a series")
    parser.add_argument("--num_series", type=int, default=1000)
    parser.add_argument(
        "--drift", type=float, default=0.0, help="true drift (the published data have 0 whatever their flag)"
    )
    parser.add_argument("--num_train_particles", type=int, default=10)
    parser.add_argument("--num_eval_particles", type=int, default=128)
    parser.add_argument("--num_eval_keys", type=int, default=16, help="evaluations of each bound")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--tilt_batch_size", type=int, default=64, help="simulated series per twist step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tilt_lr", type=float, default=1e-3)
    parser.add_argument("--tilt_mlp_size", type=int, default=32)
    parser.add_argument("--inner_steps", type=int, nargs=2, default=[1000, 1000], help="model and twist steps per turn")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--output", default="results/drift_diffusion")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def build(method: str, options: argparse.Namespace, num_particles: int, batch_size: int) -> tuple[ELBO, Any]:
    """Loss and guide of a method."""
    score = "score_rb" if method.endswith("-u") else "none"
    twist = {
        "sixo-u": gdd.standard_tilt,
        "sixo-b": gdd.standard_tilt,
        "sixo-a": gdd.analytic_twist,
        "sixo-dre": gdd.mlp_tilt(random.key(5), options.tilt_mlp_size),
    }.get(method)
    guide = gdd.make_guide(gdd.learned_proposal, twist)
    if method == "iwae":
        return FIVO(num_particles, resample="never"), guide
    if method.startswith("fivo"):
        return FIVO(num_particles, resample="always", resampling_gradient=score), guide
    training = "dre" if method == "sixo-dre" else "bound"
    simulated = max(options.tilt_batch_size // batch_size, 1)
    loss = SIXO(
        num_particles, resample="always", resampling_gradient=score, twist_training=training, twist_batch_size=simulated
    )
    return loss, guide


def train(
    method: str, seed: int, options: argparse.Namespace, y: Array
) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Train one method; its row of the table, and its gap over training."""
    num_steps, num_series = options.num_steps, len(y)
    loss, guide = build(method, options, options.num_train_particles, options.batch_size)
    optim: Any = optax.adam(options.lr)
    if method == "sixo-dre":
        turns = options.inner_steps
        optim = alternating(optim, optax.adam(options.tilt_lr), num_steps=turns[0], num_twist_steps=turns[1])
    svi = SVI(gdd.model, guide, optim, Minibatch(loss, options.batch_size))
    of_bound, _ = build(method, options, options.num_eval_particles, num_series)

    @jax.jit
    def gap(params: dict[str, Any], rng_key: Array) -> tuple[Array, Array]:
        keys = random.split(rng_key, options.num_eval_keys)
        plain = FIVO if isinstance(of_bound, FIVO) and not isinstance(of_bound, SIXO) else SIXO
        bound = plain(options.num_eval_particles, resample="never" if method == "iwae" else "always")
        values = (
            -jax.lax.map(lambda k: bound.loss(k, params, gdd.model, guide, y, num_steps, num_series), keys) / num_series
        )
        exact = jnp.mean(gdd.log_evidence(y, params["drift"], num_steps))
        return exact - jnp.mean(values), jnp.std(exact - values) / jnp.sqrt(len(keys))

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = fit(
        svi,
        random.key(seed),
        options.num_train_steps,
        y,
        num_steps,
        num_series,
        progress_bar=not options.no_progress,
        checkpoint=folder / f"{method}-seed{seed}.npz",
        evaluate=lambda params, key: {"gap": float(gap(params, key)[0])},
    )
    seconds = time.perf_counter() - started
    value, error = (float(x) for x in gap(result.params, random.key(77)))
    row: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "steps": options.num_train_steps,
        "seconds": round(seconds, 1),
        "drift": float(result.params["drift"]),
        "drift (maximum likelihood)": float(gdd.maximum_likelihood_drift(y, num_steps)),
        "gap": value,
        "gap s.e.": error,
    }
    if method == "sixo-dre":
        probe, _ = build(method, options, 4, options.batch_size)
        assert isinstance(probe, SIXO)
        losses = jax.jit(
            lambda params, keys: jax.lax.map(
                lambda k: probe.twist_loss(
                    k, params, gdd.model, guide, y[: options.batch_size], num_steps, options.batch_size
                ),
                keys,
            )
        )(result.params, random.split(random.key(3), 400))
        # The original sums over T - 1 steps and divides by T.
        row["density-ratio loss"] = float(jnp.mean(losses)) * (num_steps - 1) / num_steps
    return row, [(step, values["gap"]) for step, values in result.evaluations]


def plot(curves: dict[str, list[tuple[int, float]]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, curve in curves.items():
        ax.plot(*np.array(curve).T, marker=".", label=method)
    ax.axhline(0.0, color="0.3", lw=0.8)
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(bottom=-0.01)
    ax.set_xlabel("training step")
    ax.set_ylabel("exact log evidence - bound (nats per series)")
    figure.legend(loc="outside right", frameon=False)
    figure.savefig(folder / "gaps.png", dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    report.print_environment(vars(options))
    y = gdd.simulate_data(random.key(0), options.num_series, options.num_steps, options.drift)
    rows, curves = [], {}
    for seed in options.seed:
        for method in options.bound:
            print(f"\n{method}, seed {seed}", flush=True)
            row, curves[f"{method} (seed {seed})"] = train(method, seed, options, y)
            rows.append(row)
            report.write(options.output, "drift_diffusion", rows, vars(options))
    plot(curves, Path(options.output))
    print()
    report.print_table(rows)
    print(f"\nresults and figure gaps.png: {options.output}")
    return rows


if __name__ == "__main__":
    main()
