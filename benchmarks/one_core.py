"""One core and one thread for benchmarks of CPU time."""

import os
from typing import Any


def use_one_core() -> set[int]:
    """Keep this process to its last core; to be called before jax is imported, which then reads its flags and sizes its
    thread pools. Idle threads cost CPU time as well.

    :return: the cores it had before; empty where the system has no affinities.
    """
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    ).strip()
    if not hasattr(os, "sched_setaffinity"):
        return set()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    return cores


def conditions() -> dict[str, Any]:
    """What a measurement of CPU time was made under, for its settings."""
    return {
        "clock": "CPU time of all threads",
        "usable cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
