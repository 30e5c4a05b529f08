"""Every code block of the README and every docstring example runs, and the README names what exists."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import numpyro_smc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (
    "ActiveUnits",
    "BoundGap",
    "BoundsFromBothSides",
    "Evidence",
    "GradientStatistics",
    "InferenceGap",
    "LocalOptimum",
    "RatioPosterior",
    "SmoothedEstimate",
    "TwoSampleTest",
)
MODULES = [m.name for m in pkgutil.walk_packages(numpyro_smc.__path__, "numpyro_smc.")]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        for test in finder.find(importlib.import_module(name), name):
            if test.examples:
                yield pytest.param(test, id=test.name.removeprefix("numpyro_smc."))


@pytest.mark.parametrize("example", list(examples()))
def test_docstring_examples_run(example):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert runner.run(example).failed == 0


def test_public_names_are_documented_in_docstrings_and_in_the_readme():
    for name in numpyro_smc.__all__:
        thing = getattr(numpyro_smc, name)
        assert thing.__doc__, name
        if not name.endswith(("Result", "State")) and name not in RESULTS:
            assert f"`{name}" in README, f"{name} is missing from the README's table"


def test_commands_and_paths_of_the_readme_exist():
    for module in set(re.findall(r"python -m (benchmarks\.\w+)", README)):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for folder in ("numpyro_smc", "models", "benchmarks", "tests", "benchmarks/results"):
        assert (ROOT / folder).is_dir(), folder
    for flag in set(re.findall(r"--[a-z_-]{4,}", README)) - {"--help"}:
        assert any(flag in path.read_text() for path in (ROOT / "benchmarks").glob("*.py")), flag
