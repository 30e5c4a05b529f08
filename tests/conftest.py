"""Shared set-up: a persistent compilation cache (compiling dominates the run), two devices, no display."""

import os
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# Two devices, so that sharded data can be tested; everything else runs on the first. Programs of tests are compiled
# once and run briefly, but for the slow ones: without optimisation and by the older code generator, all take half the
# time. An unknown flag ends the process, so those that may go are given to versions that have them. Workers of
# pytest-xdist take over what their parent chose.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count=2 --xla_backend_optimization_level={int('slow' in sys.argv)}"
    + " --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
    * metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest

_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_modifyitems(config, items):
    """Slow tests run only when asked for with ``-m slow`` (or any other ``-m`` expression)."""
    if config.getoption("markexpr"):
        return
    chosen = [item for item in items if "slow" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
    items[:] = chosen


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Programs of a finished file are dropped: two workers would otherwise hold gigabytes of them at the end."""
    yield
    jax.clear_caches()
