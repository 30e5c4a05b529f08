"""Training of the autoencoders of :mod:`benchmarks.inference_gap`: weights by epoch, kept and taken up again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax, random
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from tqdm import trange

from benchmarks import report
from benchmarks.inference_gap_experiments import EXPERIMENTS, make_programs
from models.images import Images
from numpyro_smc import kl_q_p
from numpyro_smc.engines.checkpoint import load_pytree, save_pytree
from numpyro_smc.engines.schedules import burda_schedule
from numpyro_smc.programs.density import Params, Program

#: Settings that change the weights, beside the number of epochs.
TRAINING = ("latent_size", "warm_up", "lr", "train_batch_size", "binarisation", "seed")


class Trained(NamedTuple):
    """Programs of the data, and their parameters."""

    model: Program
    guide: Program
    params: Params


def add_arguments(parser: argparse.ArgumentParser, epochs: int, warm_up: int) -> None:
    """The flags of :data:`TRAINING`, the data's, and where things are."""
    parser.add_argument("--latent_size", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--warm_up", type=int, default=warm_up, help="epochs over which log q gets its full weight")
    parser.add_argument("--lr", type=float, default=1e-3, help="of training; falls in stages, by epochs")
    parser.add_argument("--train_batch_size", type=int, default=100)
    parser.add_argument("--binarisation", default="fixed", choices=("fixed", "threshold"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data-dir", help="folder of MNIST or its fixed binarisation, or of other images' IDX files")
    parser.add_argument("--no-progress", action="store_true")


def train(name: str, images: Images, options: argparse.Namespace, epochs: int | None = None) -> Trained:
    """The experiment's programs and their weights after so many epochs (``options.epochs``).

    Weights in the output folder are loaded, and training goes on from those of the latest earlier epoch.
    """
    epochs = options.epochs if epochs is None else epochs
    experiment = EXPERIMENTS[name]
    model, guide = make_programs(name, images.train.shape[1], options.latent_size, options.seed)
    kept: Params = {}
    if experiment.decoder_of is not None:
        decoder = train(experiment.decoder_of, images, options, epochs).params["decoder$params"]
        kept = {"decoder$params": decoder}
    trainable = handlers.block(handlers.substitute(model, data=kept), hide=list(kept)) if kept else model
    x, size = jnp.asarray(images.train), options.train_batch_size
    num_batches = len(x) // size

    # The mean over the batch; the whole of log q counts with a weight, which warms up.
    def scaled_model(rows: Array, weight: Array) -> None:
        handlers.scale(trainable, scale=1.0 / size)(rows)

    def scaled_guide(rows: Array, weight: Array) -> None:
        handlers.scale(guide, scale=weight / size)(rows)

    adam = optax.adam(burda_schedule(options.lr, num_batches), eps=1e-4)
    svi = SVI(scaled_model, scaled_guide, adam, Trace_ELBO())

    @jax.jit
    def epoch(state: Any, rng_key: Array, weight: Array) -> tuple[Any, Array]:
        order = random.permutation(rng_key, len(x))[: num_batches * size].reshape(num_batches, size)
        return lax.scan(lambda state, rows: svi.update(state, x[rows], weight), state, order)

    key = random.key(options.seed)
    state = svi.init(key, x[:size], jnp.asarray(1.0))
    warm_up = options.warm_up if experiment.has_warm_up else 0
    settings = {key: getattr(options, key) for key in TRAINING} | {"data": str(images)}
    stem = f"{name}-{report.digest(settings)}"
    state, done = _latest(Path(options.output), stem, epochs, state)
    path = Path(options.output) / f"{stem}-{epochs}.npz"
    bar = trange(done, epochs, desc=f"train {name}", disable=options.no_progress)
    for number in bar:
        weight = jnp.asarray(min(1.0, (number + 1) / warm_up) if warm_up else 1.0)
        state, losses = epoch(state, random.fold_in(key, number), weight)
        bar.set_postfix(ELBO=f"{-float(jnp.mean(losses)):.2f}", refresh=False)
        if number + 1 == epochs or (number + 1) % 50 == 0:
            save_pytree(path, {"state": state, "epochs": number + 1})
    return Trained(model, guide, svi.get_params(state) | kept)


def _latest(folder: Path, stem: str, epochs: int, state: Any) -> tuple[Any, int]:
    """The state of the most epochs, but no more than asked for, that a file holds, and their number."""
    best, done = state, 0
    for path in folder.glob(f"{stem}-*.npz"):
        if int(path.stem.rpartition("-")[2]) <= epochs:
            saved = load_pytree(path, {"state": state, "epochs": 0})
            if saved["epochs"] > done:
                best, done = saved["state"], saved["epochs"]
    return best, done


def mean_test_elbo(trained: Trained, images: Images, seed: int) -> tuple[float, float]:
    """Mean over the test images and its standard error, of ten draws each."""
    size, values = min(1000, len(images.test)), []
    for first in range(0, len(images.test) - size + 1, size):
        rows = jnp.asarray(images.test[first : first + size])
        key = random.fold_in(random.key(seed), first)
        values.append(np.asarray(kl_q_p(key, *trained, rows, num_particles=10, batch_size=1).elbo))
    found = np.concatenate(values)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found)))
