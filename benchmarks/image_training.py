"""What the benchmarks on images share: a grid of estimators and numbers of particles is trained on one model, evaluated
over training, and put in a table beside the published figures, a CSV, a JSON and a figure. Resumes from checkpoints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, random
from numpyro.infer import SVI

from benchmarks import report
from benchmarks.replicates import Replicates, train
from models.images import Images, binarise, load_images
from numpyro_smc import (
    IWELBO,
    OVIS,
    RWS,
    STL,
    TVO,
    VIMCO,
    DReG,
    Reinforce,
    StepwiseOptim,
    active_units,
    gradient_statistics,
    kl_q_p,
    log_schedule,
)
from numpyro_smc.elbo.multi_sample import MultiSampleELBO

Programs = tuple[Callable[..., None], Callable[..., None]]

#: By estimator: a loss from the number of particles.
ESTIMATORS: dict[str, Callable[..., MultiSampleELBO]] = {
    "iwelbo": IWELBO,
    "stl": STL,
    "dreg": DReG,
    "reinforce": Reinforce,
    "vimco-arithmetic": VIMCO,
    "vimco-geometric": partial(VIMCO, mean="geometric"),
    "ovis-gamma0": partial(OVIS, gamma=0.0),
    "ovis-gamma1": partial(OVIS, gamma=1.0),
    "ovis-S1": partial(OVIS, num_auxiliary=1),
    "ovis-S10": partial(OVIS, num_auxiliary=10),
    "ovis-S50": partial(OVIS, num_auxiliary=50),
    "tvo-part2-config1": lambda k, **options: TVO(k, partitions=2, beta_min=by_size(k, 0.05, 0.2, 0.3), **options),
    "tvo-part5-config2": lambda k, **options: TVO(k, partitions=5, beta_min=by_size(k, 0.01, 0.02, 0.03), **options),
    "wake-wake": RWS,
}

#: Importance weights that an evaluation computes at a time.
WEIGHTS_AT_ONCE = 2000

#: Settings that do not change how a cell is trained.
FREE = ("data_dir", "estimators", "num_particles", "num_train_steps", "anneal_steps", "output", "no_progress")
FREE += ("num_eval_particles", "num_eval_points", "num_gradient_samples")

#: The quantities of an evaluation that the table shows, and their headings.
SHOWN = {"test": "test L", "train": "train L", "train gap": "KL(q|p)", "ess": "ESS", "units": "active", "snr": "SNR"}


class Experiment(NamedTuple):
    """A model that is trained.

    - **name** - of the results.
    - **make_programs** - the model and its guide, from a key, the images and the options.
    - **guide_prefix** - how the names of the guide's parameters begin.
    - **published** - by estimator and quantity (of :data:`SHOWN`), figures by number of particles.
    """

    name: str
    make_programs: Callable[[Array, Images, argparse.Namespace], Programs]
    guide_prefix: str
    published: Mapping[str, Mapping[str, Mapping[int, float]]]


def published(**quantities: tuple[float, ...]) -> dict[str, dict[int, float]]:
    """Figures of one estimator for 5, 10 and (where there is one) 50 particles, by the names of :data:`SHOWN`."""
    return {name.replace("_", " "): dict(zip((5, 10, 50), values, strict=False)) for name, values in quantities.items()}


def by_size(num_particles: int, few: float, some: float, many: float) -> float:
    """The published choice of TVO's first point."""
    return few if num_particles < 10 else some if num_particles < 30 else many


def estimator(name: str) -> str:
    """Check an estimator's name: one of :data:`ESTIMATORS`, then ``+anneal`` or ``+alpha0.7`` for a Renyi bound."""
    kind, _, renyi = name.partition("+")
    try:
        valid = kind in ESTIMATORS and (renyi in ("", "anneal") or 0.0 <= float(renyi.removeprefix("alpha")) < 1.0)
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(
            f"'{name}' is not an estimator; choose from {', '.join(ESTIMATORS)}, with +anneal or +alpha0.7 after it."
        )
    return name


def make_loss(name: str, num_particles: int, anneal_steps: int | None) -> MultiSampleELBO:
    """The loss of an estimator.

    :param anneal_steps: length of ``+anneal``, in which alpha falls from 0.99 to 0; ``None`` for its end.
    """
    kind, _, renyi = name.partition("+")
    if renyi in ("", "anneal"):
        is_annealed = bool(renyi) and anneal_steps is not None
        options: dict[str, Any] = {"alpha": log_schedule(0.99, 0.0, anneal_steps)} if is_annealed else {}
    else:
        options = {"alpha": float(renyi.removeprefix("alpha"))}
    return ESTIMATORS[kind](num_particles, **options)


def add_arguments(parser: argparse.ArgumentParser, name: str, estimators: Sequence[str]) -> None:
    parser.add_argument("--data-dir", help="folder of MNIST; without it (and NUMPYRO_SMC_DATA) the 8x8 digits are used")
    parser.add_argument("--binarisation", default="fixed", choices=("fixed", "dynamic", "threshold"))
    parser.add_argument(
        "--estimators",
        nargs="+",
        type=estimator,
        default=list(estimators),
        help=f"of {', '.join(ESTIMATORS)}; with +anneal or +alpha0.7 after it for a Renyi bound",
    )
    parser.add_argument("--num_particles", type=int, nargs="+", default=[5, 10, 50], help="particles in training, K")
    parser.add_argument("--num_train_steps", type=int, default=5000, help="(published: 4000000)")
    parser.add_argument(
        "--anneal_steps",
        type=int,
        help="steps in which +anneal takes alpha from 0.99 to 0 (published: 1000000); by default a quarter of all",
    )
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-4, help="Adam step size")
    parser.add_argument("--num_eval_particles", type=int, default=5000, help="particles of the last evaluation")
    parser.add_argument("--num_eval_points", type=int, default=200, help="its images of each split (published: 10000)")
    parser.add_argument("--num_curve_particles", type=int, default=500, help="particles of evaluations over training")
    parser.add_argument("--num_curve_points", type=int, default=100, help="their images of each split")
    parser.add_argument("--num_evaluations", type=int, default=8, help="evaluations over training")
    parser.add_argument("--num_unit_samples", type=int, default=1000, help="draws for the active units")
    parser.add_argument(
        "--num_gradient_samples",
        type=int,
        default=0,
        help="gradients for the signal-to-noise ratio of the guide's (published: 200); 0 for none",
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds, trained side by side (published: 3)")
    parser.add_argument("--output", default=f"results/{name}", help="folder of results and checkpoints")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(experiment: Experiment, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and evaluate the grid; the rows of the table."""
    images = load_images(options.data_dir, options.binarisation, validation=True)
    settings = vars(options) | {"data": str(images)}
    settings["anneal_steps"] = options.anneal_steps or max(options.num_train_steps // 4, 1)
    report.print_environment({name: value for name, value in settings.items() if name != "data_dir"})
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows, curves, bounds = [], [], {}
    programs = experiment.make_programs(random.key(0), images, argparse.Namespace(**settings))
    for num_particles in options.num_particles:
        for name in options.estimators:
            print(f"\n{name}, {num_particles} particles", flush=True)
            cell = Cell(experiment, programs, images, name, num_particles, argparse.Namespace(**settings))
            fixed = {key: value for key, value in settings.items() if key not in FREE}
            fixed |= {"anneal_steps": settings["anneal_steps"]} if name.endswith("+anneal") else {}
            trained = cell.train(folder / f"{name}-K{num_particles}-{report.digest(fixed)}.npz")
            values, bounds[name] = cell.final_evaluation(trained.params)
            rows.append(row_of(cell, trained, values, bounds[name], bounds[options.estimators[0]]))
            curves += curve_rows(cell, trained)
            public = {key: value for key, value in settings.items() if key not in ("data_dir", "output")}
            report.write(folder, experiment.name, rows, public)
            report.write(folder, f"{experiment.name}_curves", curves, public)
            print(
                "  ".join(f"{key} {value:.5g}" for key, value in list(rows[-1].items())[1:] if value != ""), flush=True
            )
    plot(curves, options, folder / f"{experiment.name}.png")
    print(
        f"\n{images}\n{options.num_train_steps} steps of {options.batch_size} images (published: 4000000 of 24), "
        f"{len(options.seed)} seeds (3); L of {options.num_eval_particles} particles (5000) on up to "
        f"{options.num_eval_points} images of each split (10000)"
    )
    report.print_table(rows, list(dict.fromkeys(key for row in rows for key in row)))
    print(f"\nresults and figure {experiment.name}.png: {folder}")
    return rows


class Cell:
    """One estimator with one number of particles on an experiment's model.

    :param programs: model and guide, the same for all cells, so that evaluations are compiled once.
    """

    def __init__(
        self,
        experiment: Experiment,
        programs: Programs,
        images: Images,
        name: str,
        num_particles: int,
        options: argparse.Namespace,
    ) -> None:
        self.experiment, self.programs, self.images, self.options = experiment, programs, images, options
        self.name, self.num_particles = name, num_particles

    def train(self, checkpoint: Path) -> Replicates:
        options = self.options
        is_grey = options.binarisation == "dynamic"
        data = jnp.asarray(self.images.train if is_grey else self.images.train.astype(np.int8))

        def batch(rng_key: Array) -> tuple[Array]:
            row_key, grey_key = random.split(rng_key)
            x = data[random.randint(row_key, (options.batch_size,), 0, len(data))].astype(float)
            return (binarise(grey_key, x) if is_grey else x,)

        def init_params(rng_key: Array) -> dict[str, Any]:
            programs = self.experiment.make_programs(rng_key, self.images, options)
            svi = SVI(*programs, optax.sgd(0.0), make_loss(self.name, self.num_particles, None))
            return svi.get_params(svi.init(rng_key, jnp.zeros((1, data.shape[1]))))

        number, particles = options.num_curve_points, options.num_curve_particles
        loss = make_loss(self.name, self.num_particles, options.anneal_steps)
        return train(
            SVI(*self.programs, StepwiseOptim(optax.adam(options.lr)), loss),
            options.seed,
            options.num_train_steps,
            batch,
            evaluate=lambda params, key: self.evaluate(key, params, number, particles)[0],
            num_evaluations=options.num_evaluations,
            init_params=init_params,
            checkpoint=checkpoint,
            progress_bar=not options.no_progress,
            description=f"{self.name} K={self.num_particles}",
        )

    def points(self, split: str, number: int) -> Array:
        """Images of a split, evenly spaced in it and the same for every estimator."""
        data = getattr(self.images, split)
        x = jnp.asarray(data[np.linspace(0, len(data) - 1, min(number, len(data))).astype(int)])
        return binarise(random.key(42), x) if self.options.binarisation == "dynamic" else x

    def evaluate(
        self, rng_key: Array, params: dict[str, Any], num_points: int, num_particles: int
    ) -> tuple[dict[str, Array], Array]:
        """Means over ``num_points`` images of each split, by name (see :data:`SHOWN`); bounds of the test images."""
        test, train = self.points("test", num_points), self.points("train", num_points)
        x, num_test = jnp.concatenate([test, train]), len(test)
        bound_key, ess_key, unit_key = random.split(rng_key, 3)
        programs, chunk = (*self.programs, params), max(WEIGHTS_AT_ONCE // len(x), 1)
        found = kl_q_p(bound_key, *programs, x, num_particles=num_particles, batch_size=chunk)
        at_training = kl_q_p(ess_key, *programs, train, num_particles=self.num_particles, batch_size=chunk)
        number = self.options.num_unit_samples
        units = active_units(unit_key, *programs, train, num_samples=number, batch_size=chunk)
        values = {"ess": jnp.mean(at_training.ess), "units": units.num_active}
        for split, rows in (("test", slice(num_test)), ("train", slice(num_test, None))):
            values[split] = jnp.mean(found.bound[rows])
            values[f"{split} ELBO"] = jnp.mean(found.elbo[rows])
            values[f"{split} gap"] = jnp.mean(found.gap[rows])
        return values, found.bound[:num_test]

    def final_evaluation(self, params: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Values by seed, and the bounds of the test images, ``[seeds, images]``."""
        options = self.options
        found = []
        for number, seed in enumerate(options.seed):
            own = jax.tree.map(lambda x, number=number: x[number], params)
            values, bounds = self.evaluate(
                random.key(1000 + seed), own, options.num_eval_points, options.num_eval_particles
            )
            if options.num_gradient_samples:
                values["snr"] = self.signal_to_noise(random.key(2000 + seed), own)
            found.append((values, bounds))
        names = found[0][0]
        by_name = {name: np.array([float(values[name]) for values, _ in found]) for name in names}
        return by_name, np.stack([bounds for _, bounds in found])

    def signal_to_noise(self, rng_key: Array, params: dict[str, Any]) -> float:
        """Mean signal-to-noise ratio of the guide's gradient on one batch of training images."""
        options = self.options
        loss = make_loss(self.name, self.num_particles, None)
        x = self.points("train", options.batch_size)
        number, prefix = options.num_gradient_samples, self.experiment.guide_prefix
        statistics = gradient_statistics(rng_key, loss, *self.programs, params, x, num_samples=number, names=prefix)
        return statistics.average_snr


def row_of(
    cell: Cell, trained: Replicates, values: dict[str, np.ndarray], bounds: np.ndarray, reference: np.ndarray
) -> dict[str, Any]:
    """A row of the table: means over seeds, the test bound's errors, and what is published.

    :param reference: test bounds of the estimator that the others are compared with, on the same images.
    """
    options = cell.options
    num_seeds, num_images = bounds.shape
    steps = options.num_train_steps - trained.resumed
    row: dict[str, Any] = {"estimator": cell.name, "K": cell.num_particles}
    row |= {SHOWN[name]: float(values[name].mean()) for name in SHOWN if name in values}
    row["test s.e. (images)"] = float(bounds.mean(0).std(ddof=1) / np.sqrt(num_images))
    if num_seeds > 1:
        row["test s.d. (seeds)"] = float(values["test"].std(ddof=1))
    difference = bounds.mean(0) - reference.mean(0)
    row[f"test - {options.estimators[0]}"] = float(difference.mean())
    row["s.e. of difference"] = float(difference.std(ddof=1) / np.sqrt(num_images))
    row["ms/step"] = round(1000 * trained.seconds / steps, 3) if steps > 0 else ""
    figures = cell.experiment.published
    own = figures.get(cell.name, {}) if cell.images.name == "MNIST" else {}
    for name, heading in SHOWN.items():
        if any(name in of_estimator for of_estimator in figures.values()):
            row[f"published {heading}"] = own.get(name, {}).get(cell.num_particles, "")
    return row


def curve_rows(cell: Cell, trained: Replicates) -> list[dict[str, Any]]:
    names = [name for name in trained.curves if name != "step"]
    return [
        {"estimator": cell.name, "K": cell.num_particles, "seed": seed, "step": int(step)}
        | {name: float(trained.curves[name][i, j]) for name in names}
        for j, seed in enumerate(cell.options.seed)
        for i, step in enumerate(trained.curves["step"])
    ]


def plot(curves: list[dict[str, Any]], options: argparse.Namespace, path: Path) -> None:
    """Test bound, ESS and KL(q|p) over training: a column per number of particles, a colour per estimator."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"test": "test $L$ (nats)", "train gap": r"KL$(q \| p)$, train (nats)", "ess": "ESS, train"}
    size = len(options.num_particles)
    figure, axes = plt.subplots(
        len(labels), size, figsize=(2 + 3.2 * size, 7), sharex=True, squeeze=False, layout="constrained"
    )
    for column, num_particles in zip(axes.T, options.num_particles, strict=True):
        column[0].set_title(f"K = {num_particles}")
        column[-1].set_xlabel("training step")
        for number, name in enumerate(options.estimators):
            own = [row for row in curves if (row["estimator"], row["K"]) == (name, num_particles)]
            steps = sorted({row["step"] for row in own})
            for ax, quantity in zip(column, labels, strict=True):
                values = np.array([[row[quantity] for row in own if row["step"] == step] for step in steps])
                ax.plot(steps, values.mean(1), ".-", color=f"C{number}", label=name if ax is axes[0, 0] else None)
                ax.fill_between(steps, values.min(1), values.max(1), color=f"C{number}", alpha=0.2, lw=0)
    for ax, label in zip(axes[:, 0], labels.values(), strict=True):
        ax.set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
