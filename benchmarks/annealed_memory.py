r"""Memory of the gradient through an annealed sampler, by how much of the chain is recomputed.

Reverse mode keeps every intermediate value of K transitions, unless ``remat`` says to recompute them: ``"step"`` keeps
the particles of every step, ``"sqrt"`` those of about :math:`\sqrt K` steps. Measures the temporary memory of the
compiled gradient, the growth of the process while it runs, and its CPU time, on the mixture of eight Gaussians of [1]
in 50 dimensions with 64 replicates of 32 particles. Each cell runs in a process of its own, on one core. Prints the
megabytes beside those of a prototype (a bare chain without resampling); writes CSV, JSON and a figure. Finished cells
are kept.

1. *Resampling Gradients Vanish in Differentiable Sequential Monte Carlo Samplers*, J. Zenn, R. Bamler (2023)
"""

from __future__ import annotations

import argparse
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
from jax import random

from benchmarks import report
from benchmarks.annealed_training import METHODS, fill_table, make_loss
from benchmarks.efficiency import resident, restart_peak
from models import static_targets

NAME = "annealed_memory"
REMAT = {"none": None, "step": "step", "sqrt": "sqrt"}

#: Megabytes of temporary memory of a prototype, a bare chain with momentum at the default sizes, by transitions.
PROTOTYPE = {
    "none": {16: 198.5, 64: 748.8, 256: 2950.1},
    "step": {16: 19.1, 64: 56.6, 256: 206.6},
    "sqrt": {16: 12.8, 64: 19.1, 256: 31.6},
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["stop_gradient-ess", "dais"], help=METHODS)
    parser.add_argument("--num_transitions", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--remat", nargs="+", default=list(REMAT), choices=REMAT)
    parser.add_argument("--dim", type=int, default=50)
    parser.add_argument("--num_particles", type=int, default=32)
    parser.add_argument("--num_replicates", type=int, default=64)
    parser.add_argument("--num_components", type=int, default=8, help="Gaussians of the target")
    parser.add_argument("--rounds", type=int, default=2, help="gradients; the fastest is reported")
    parser.add_argument("--output", default="results/annealed_memory")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # what the subprocess measures, as JSON
    return parser.parse_args(argv)


def measure(method: str, K: int, remat: str, options: argparse.Namespace) -> dict[str, float]:
    """Megabytes and seconds of one gradient, in this process."""
    loss = make_loss(method, options.num_particles, K, remat=REMAT[remat])
    means = static_targets.draw_means(random.key(0), options.dim, options.num_components)
    target = static_targets.gaussian_mixture(means)
    guide = loss.wrap(static_targets.guide)
    params = {f"annealing${name}": value for name, value in loss.schedule.initial.items()}

    def bound(params: dict[str, Any]) -> Any:
        return loss.loss(random.key(1), params, static_targets.model, guide, target, options.num_replicates)

    gradient = jax.jit(jax.value_and_grad(bound)).lower(params).compile()
    row = {"MB": gradient.memory_analysis().temp_size_in_bytes / 1e6}
    before, seconds = restart_peak(), []
    for _ in range(options.rounds):
        began = time.process_time()
        jax.block_until_ready(gradient(params))
        seconds.append(time.process_time() - began)
    if before is not None:
        row["RSS MB"] = max(resident("VmHWM") - before, 0.0)
    return row | {"CPU seconds": min(seconds)}


def measure_apart(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{NAME}", "--cell", json.dumps(cell)]
    for name in ("dim", "num_particles", "num_replicates", "num_components", "rounds"):
        command += [f"--{name}", str(getattr(options, name))]
    one_core = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {one_core}".strip()}
    root = Path(__file__).parents[1]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode} {' '.join(process.stderr.split())[-200:]}")
    return json.loads(process.stdout.splitlines()[-1])


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted((row for row in rows if "error" not in row), key=lambda row: row["K"])
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    styles = dict(zip(dict.fromkeys(row["method"] for row in rows), ("-", "--", ":", "-."), strict=False))
    for number, remat in enumerate(REMAT):
        for method, style in styles.items():
            line = [row for row in rows if (row["method"], row["remat"]) == (method, remat)]
            sizes, label = [row["K"] for row in line], f"{method}, remat {remat}"
            for ax, quantity in zip(axes, ("MB", "CPU seconds"), strict=True):
                ax.plot(sizes, [row[quantity] for row in line], f"C{number}{style}", marker=".", label=label)
    for ax, title in zip(axes, ("temporary memory (MB)", "CPU seconds of a gradient"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="transitions K", title=title)
        sizes = sorted({row["K"] for row in rows})
        ax.set_xticks(sizes, map(str, sizes), minor=False)
        ax.tick_params(axis="x", which="minor", labelbottom=False)
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    if options.cell:
        rows = [measure(**json.loads(options.cell), options=options)]
        print(json.dumps(rows[0]))
        return rows
    settings = {name: value for name, value in vars(options).items() if name != "cell"}
    report.print_environment(settings)
    cells = [
        {"method": method, "K": num_transitions, "remat": remat}
        for method in options.methods
        for num_transitions in options.num_transitions
        for remat in options.remat
    ]
    folder = Path(options.output)
    free = ("methods", "num_transitions", "remat", "rounds", "output")
    rows, _ = fill_table(NAME, cells, lambda **cell: (measure_apart(cell, options), []), folder, settings, free)
    plot(rows, folder)
    print("\nMB: temporary memory of the compiled gradient; RSS: growth of the process while it runs")
    report.print_table(
        [
            row | {"MB": row.get("MB", row.get("error")), "prototype MB": PROTOTYPE[row["remat"]].get(row["K"], "")}
            for row in rows
        ],
        ["method", "K", "remat", "MB", "RSS MB", "prototype MB", "CPU seconds"],
    )
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return rows


if __name__ == "__main__":
    main()
