r"""Time and memory of a training step as the number of particles K grows.

A sigmoid belief network of one layer of 200 units, 24 images per step [1], for score-function estimators; a Gaussian
VAE and the Gaussian toy model (1024 points, 20 dimensions), for OVIS beside the pathwise bound. Every estimator is
linear in K, in time and in memory, VIMCO included (the published code's is quadratic); with particles in chunks
(--chunk) memory stops growing. Each K of a model runs in a process of its own, on one core, with the steps of all its
estimators in turns. Prints milliseconds of CPU time and megabytes beside the published ones, and the exponent of K
between the two largest K; writes CSV, JSON and a figure. Finished cells are kept, unless more rounds are asked for.
Images are MNIST where NUMPYRO_SMC_DATA has it, else 8x8 digits.

Published: --models sbn --particles 10 19 39 79 158 315 629 1256 2506 5000, on a GPU: the shape compares, not the
numbers.

1. *Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds*, V. Lievin,
   A. Dittadi, A. Christensen, O. Winther (2020)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--cell" in sys.argv and hasattr(os, "sched_setaffinity"):
    # Before jax sizes its thread pools: idle threads cost CPU time as well.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import numpy as np
import optax
from jax import Array, random
from numpyro.infer import SVI

from benchmarks import report
from benchmarks.estimators import EXAMPLES, make_estimator
from models import gaussian_toy, sigmoid_belief_network, vae
from models.images import load_images

NAME = "efficiency"
ESTIMATORS = {
    "sbn": ["ovis-gamma1", "vimco", "reinforce", "tvo-part2-config1"],
    "vae": ["iwelbo", "ovis-gamma1", "vimco"],
    "toy": ["iwelbo", "ovis-gamma1", "vimco"],
}

#: Published figure of [1]: peak megabytes and seconds of an epoch (2084 steps) on a GPU.
PUBLISHED_PARTICLES = (10, 19, 39, 79, 158, 315, 629, 1256, 2506, 5000)
PUBLISHED_STEPS = 2084
_LINEAR_MB = (11.95, 17.92, 31.43, 58.65, 111.8, 218.6, 429.8, 853.8, 1696, 3369)
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "MB": {
        "ovis-gamma1": _LINEAR_MB,
        "tvo-part2-config1": _LINEAR_MB,
        "reinforce": _LINEAR_MB,
        "vimco": (*[None] * 7, 1073, 3215, 11200),
    },
    "seconds": {
        "ovis-gamma1": (17.87, 18.2, 18.09, 18.09, 20.34, 29.09, 49.78, 92.86, 181.4, 360),
        "tvo-part2-config1": (20.0, 20.0, 20.2, 20.2, 22.7, 32.3, 54.95, None, None, None),
        "vimco": (*[None] * 6, 60.5, 131.2, 333.3, 981.7),
        "reinforce": (16.3, 16.4, 16.5, 16.5, 18.7, 26.9, None, None, None, None),
    },
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ESTIMATORS), choices=ESTIMATORS)
    parser.add_argument("--estimators", nargs="+", help=f"instead of those of the model: {EXAMPLES}")
    parser.add_argument("--particles", type=int, nargs="+", default=[10, 40, 160, 640, 2500])
    parser.add_argument("--chunk", type=int, default=40, help="particles at a time in the chunked mode; 0: without it")
    parser.add_argument("--batch_size", type=int, default=24, help="images per step")
    parser.add_argument("--width", type=int, default=200, help="units of the layer, or of the code and hidden layers")
    parser.add_argument("--rounds", type=int, default=5, help="the fastest of so many is reported")
    parser.add_argument("--round_seconds", type=float, default=0.2, help="steps of a round take at least so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/efficiency")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # what the subprocess measures, as JSON
    return parser.parse_args(argv)


# In the subprocess


class Step:
    """A compiled training step of one estimator, and what it costs."""

    def __init__(self, model: str, estimator: str, num_particles: int, chunk: int | None, options: argparse.Namespace):
        keys = random.split(random.key(options.seed), 3)
        images = load_images(binarisation="threshold").train
        chosen = random.choice(keys[0], len(images), (options.batch_size,), replace=False)
        self.x = jax.device_put(images[np.asarray(chosen)])
        if model == "sbn":
            mean = images.mean(0)
            programs = sigmoid_belief_network.make_programs(keys[1], mean, num_layers=1, width=options.width)
        elif model == "toy":
            self.x = gaussian_toy.simulate(keys[0])
            programs = gaussian_toy.model, gaussian_toy.guide
        else:
            programs = vae.make_gaussian_vae(keys[1], images.shape[1], options.width, options.width)
        svi = SVI(*programs, optax.adam(1e-3), make_estimator(estimator, num_particles, batch_size=chunk))
        self.state = svi.init(keys[2], self.x)
        self.update = jax.jit(svi.update).lower(self.state, self.x).compile()
        self.row = {"MB": self.update.memory_analysis().temp_size_in_bytes / 1e6}

    def first(self) -> None:
        """Take the first step, and see how the process grows."""
        before = restart_peak()
        self.take(1)
        if before is not None:
            self.row["RSS MB"] = max(resident("VmHWM") - before, 0.0)

    def take(self, number: int) -> Array:
        """Take so many steps."""
        for _ in range(number):
            self.state, loss = self.update(self.state, self.x)
        return jax.block_until_ready(loss)

    def clock(self, number: int) -> None:
        """Note the milliseconds of a step, if they are the fewest so far."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.take(number)
        spent = {"ms": time.process_time() - cpu, "wall ms": time.perf_counter() - wall}
        for name, seconds in spent.items():
            self.row[name] = min(1e3 * seconds / number, self.row.get(name, np.inf))


def measure(model: str, num_particles: int, modes: Sequence[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each of ``modes``, pairs of estimator and chunk size; a failing one has an error."""
    steps: list[Step | str] = []
    for estimator, chunk in modes:
        try:
            step = Step(model, estimator, num_particles, chunk, options)
            step.first()
            steps.append(step)
        except Exception as error:
            steps.append(f"{type(error).__name__}: {error}")
    running = [step for step in steps if isinstance(step, Step)]
    numbers = []
    for step in running:
        began = time.perf_counter()
        step.take(1)
        numbers.append(max(int(options.round_seconds / (time.perf_counter() - began)), 1))
    for _ in range(options.rounds):
        for step, number in zip(running, numbers, strict=True):
            step.clock(number)
    return [step.row if isinstance(step, Step) else {"error": step} for step in steps]


def restart_peak() -> float | None:
    """Resident megabytes now; the peak is counted from here. ``None`` where the system does not tell."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    return None


def resident(name: str) -> float:
    """A size in megabytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


# In the main process


def measure_apart(
    model: str, num_particles: int, modes: Sequence[Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """:func:`measure` in a process of its own."""
    cell = json.dumps({"model": model, "num_particles": num_particles, "modes": modes})
    command = [sys.executable, "-m", f"benchmarks.{NAME}", "--cell", cell, "--seed", str(options.seed)]
    for name in ("batch_size", "width", "rounds", "round_seconds"):
        command += [f"--{name}", str(getattr(options, name))]
    one_core = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {one_core}".strip()}
    root = Path(__file__).parents[1]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if process.returncode:
        message = " ".join(process.stderr.split())[-200:]
        return [{"error": f"exit status {process.returncode} {message}"} for _ in modes]
    return json.loads(process.stdout.splitlines()[-1])


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Between the two largest K: 1 is linear, 2 quadratic, 0 constant; and the time relative to the pathwise bound."""
    table = []
    rows = [row for row in rows if "error" not in row]
    for model, estimator, chunk in dict.fromkeys((row["model"], row["estimator"], row["chunk"]) for row in rows):
        line = [row for row in rows if (row["model"], row["estimator"], row["chunk"]) == (model, estimator, chunk)]
        line.sort(key=lambda row: row["K"])
        result: dict[str, Any] = {"model": model, "estimator": estimator, "chunk": chunk}
        result["K"] = " to ".join(str(row["K"]) for row in line[-2:])
        for quantity in ("ms", "wall ms", "MB"):
            enough = len(line) > 1 and all(row[quantity] > 0 for row in line[-2:])
            result[f"exponent of {quantity}"] = _exponent(*line[-2:], quantity) if enough else ""
        known = PUBLISHED["seconds"].get(estimator, ()) if model == "sbn" and not chunk else ()
        ends = [{"K": k, "ms": v} for k, v in zip(PUBLISHED_PARTICLES, known, strict=False) if v is not None]
        result["published (time)"] = _exponent(*ends[-2:], "ms") if len(ends) > 1 else ""
        bounds = {row["K"]: row["ms"] for row in rows if row["model"] == model and row["estimator"] == "iwelbo"}
        ratios = [row["ms"] / bounds[row["K"]] for row in line if not chunk and row["K"] in bounds]
        result["time over iwelbo"] = "  ".join(f"{ratio:.2f}" for ratio in ratios)
        table.append(result)
    return table


def _exponent(first: dict[str, Any], last: dict[str, Any], quantity: str) -> float:
    return float(np.log(last[quantity] / first[quantity]) / np.log(last["K"] / first["K"]))


def beside_published(row: dict[str, Any]) -> dict[str, Any]:
    known = {}
    for quantity, factor in (("seconds", 1e3 / PUBLISHED_STEPS), ("MB", 1.0)):
        values = PUBLISHED[quantity].get(row["estimator"], ()) if row["model"] == "sbn" and not row["chunk"] else ()
        value = dict(zip(PUBLISHED_PARTICLES, values, strict=False)).get(row["K"])
        known[quantity] = "" if value is None else factor * value
    return {
        **{name: row[name] for name in ("model", "estimator", "chunk", "K")},
        "ms": row.get("ms", row.get("error")),
        "wall ms": row.get("wall ms", ""),
        "publ. ms (GPU)": known["seconds"],
        "MB": row.get("MB", ""),
        "RSS MB": row.get("RSS MB", ""),
        "publ. MB (GPU)": known["MB"],
    }


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error" not in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        return
    figure, axes = plt.subplots(
        len(models), 2, figsize=(9, 0.5 + 3.2 * len(models)), layout="constrained", squeeze=False
    )
    for pair, model in zip(axes, models, strict=True):
        modes = dict.fromkeys((row["estimator"], row["chunk"]) for row in rows if row["model"] == model)
        for number, (estimator, chunk) in enumerate(modes):
            line = [r for r in rows if (r["model"], r["estimator"], r["chunk"]) == (model, estimator, chunk)]
            line.sort(key=lambda row: row["K"])
            label = f"{estimator}, {chunk} at a time" if chunk else estimator
            for ax, quantity in zip(pair, ("ms", "MB"), strict=True):
                ax.plot([r["K"] for r in line], [r[quantity] for r in line], f"C{number}.-", label=label)
        for ax, title in zip(pair, ("CPU milliseconds per step", "temporary memory (MB)"), strict=True):
            ax.set(xscale="log", yscale="log", xlabel="K", title=f"{model}: {title}")
        pair[0].legend(frameon=False, fontsize="small")
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    if options.cell:
        cell = json.loads(options.cell)
        rows = measure(cell["model"], cell["num_particles"], cell["modes"], options)
        print(json.dumps(rows))
        return rows
    images = load_images(binarisation="threshold")
    settings = {**vars(options), "images": f"{images.name}, {images.shape[0]}x{images.shape[1]}"}
    del settings["cell"]
    report.print_environment(settings)
    free = ("models", "estimators", "particles", "chunk", "rounds", "output")
    kept = report.load(options.output, NAME, settings, free)
    done = {(row["model"], row["estimator"], row["chunk"], row["K"]): row for row in kept}
    for model in options.models:
        estimators = options.estimators or ESTIMATORS[model]
        for num_particles in options.particles:
            modes = [(estimator, 0) for estimator in estimators]
            if options.chunk:
                modes += [(estimator, options.chunk) for estimator in estimators if estimator == "ovis-gamma1"]
            rounds = {mode: done.get((model, *mode, num_particles), {}).get("rounds", 0) for mode in modes}
            missing = [mode for mode in modes if rounds[mode] < options.rounds]
            if not missing:
                continue
            found = measure_apart(model, num_particles, [(e, chunk or None) for e, chunk in missing], options)
            for (estimator, chunk), row in zip(missing, found, strict=True):
                cell = {"model": model, "estimator": estimator, "chunk": chunk, "K": num_particles}
                done[tuple(cell.values())] = cell | row | {"rounds": options.rounds}
            print(f"{model}, K={num_particles}: {len(missing)} estimators", flush=True)
            report.write(options.output, NAME, list(done.values()), settings)
    rows = list(done.values())
    plot(rows, Path(options.output))
    print(
        "\nms: CPU time of a step; MB: temporary memory of the compiled step; RSS: growth of the process in the first"
    )
    report.print_table([beside_published(row) for row in rows])
    print()
    report.print_table(exponents(rows))
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return rows


if __name__ == "__main__":
    main()
