"""A fingerprint changes with everything that a program computes with, and with nothing else."""

import os
import subprocess
import sys
import textwrap
import threading
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer.autoguide import AutoNormal

import numpyro_smc
from numpyro_smc import IWELBO, ParticleFilter
from numpyro_smc.programs.fingerprint import fingerprint

SD = 0.5
TABLE = [1.0, 2.0]
SETTINGS = {"sd": 0.5}
SCALES = np.array([0.5, 1.0])
CONFIG = types.SimpleNamespace(sd=0.5)
other_module = types.ModuleType("other_module")
other_module.SD = 0.5


def noise():
    return SD


def uses_global(y):
    numpyro.sample("y", dist.Normal(0.0, SD), obs=y)


def uses_helper(y):
    numpyro.sample("y", dist.Normal(0.0, noise()), obs=y)


def uses_list(y):
    numpyro.sample("y", dist.Normal(0.0, TABLE[0]), obs=y)


def uses_dict(y):
    numpyro.sample("y", dist.Normal(0.0, SETTINGS["sd"]), obs=y)


def uses_array(y):
    numpyro.sample("y", dist.Normal(0.0, SCALES[0]), obs=y)


def uses_object(y):
    numpyro.sample("y", dist.Normal(0.0, CONFIG.sd), obs=y)


def uses_module(y):
    numpyro.sample("y", dist.Normal(0.0, other_module.SD), obs=y)


def uses_inner_function(y):
    def inner():
        return SD

    numpyro.sample("y", dist.Normal(0.0, inner()), obs=y)


def uses_default(y, sd=0.5):
    numpyro.sample("y", dist.Normal(0.0, sd), obs=y)


class Model:
    offset = 0.0

    def __init__(self, sd):
        self.sd = sd

    def __call__(self, y):
        numpyro.sample("y", dist.Normal(self.offset, self.sd), obs=y)

    def method(self, y):
        self(y)


def closing_over(value):
    def model(y):
        nonlocal value
        numpyro.sample("y", dist.Normal(0.0, value), obs=y)

    def rebind(new):
        nonlocal value
        value = new

    return model, rebind


OBJECT = Model(0.5)
CLOSURE, rebind = closing_over(0.5)
HELD = handlers.condition(uses_global, data={"x": jnp.array(1.0)})

CHANGES = {
    "a global": (uses_global, "SD", 5.0),
    "a global of a helper": (uses_helper, "SD", 5.0),
    "a global of an inner function": (uses_inner_function, "SD", 5.0),
    "the sign of zero": (uses_global, "SD", -0.0),
    "a helper": (uses_helper, "noise", lambda: 0.7),
    "a partial's function": (partial(uses_global, 1.0), "SD", 5.0),
    "an optimizer's": (lambda: optax.adam(SD), "SD", 5.0),
    "a conditioned model": (HELD, "SD", 5.0),
    "an automatic guide's model": (AutoNormal(uses_global), "SD", 5.0),
    "a jitted helper": (jax.jit(uses_global), "SD", 5.0),
    "a filter": (ParticleFilter(uses_global, 3)._run, "SD", 5.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_global_of_another_value_is_another_program_and_the_old_value_the_old_one(what, monkeypatch):
    program, name, value = CHANGES[what]
    monkeypatch.setitem(globals(), name, globals()[name] if name == "noise" else 0.0 if str(value) == "-0.0" else 0.5)
    before = fingerprint(program)
    assert before.holds() and fingerprint(program) == before
    old = globals()[name]
    monkeypatch.setitem(globals(), name, value)
    assert not before.holds() and fingerprint(program) != before
    monkeypatch.setitem(globals(), name, old)
    assert before.holds() and fingerprint(program) == before and hash(fingerprint(program)) == hash(before)


MUTATIONS = {
    "list": (uses_list, lambda: TABLE.__setitem__(0, 3.0)),
    "longer list": (uses_list, lambda: TABLE.append(3.0)),
    "dict": (uses_dict, lambda: SETTINGS.update(sd=3.0)),
    "array": (uses_array, lambda: SCALES.__setitem__(0, 3.0)),
    "object": (uses_object, lambda: setattr(CONFIG, "sd", 3.0)),
    "module": (uses_module, lambda: setattr(other_module, "SD", 3.0)),
    "cell": (CLOSURE, lambda: rebind(3.0)),
    "default": (uses_default, lambda: setattr(uses_default, "__defaults__", (3.0,))),
    "attribute": (OBJECT, lambda: setattr(OBJECT, "sd", 3.0)),
    "attribute of a method's object": (OBJECT.method, lambda: setattr(OBJECT, "sd", 4.0)),
    "attribute of a class": (OBJECT, lambda: setattr(Model, "offset", 4.0)),
    "handler": (HELD, lambda: HELD.data.update(x=jnp.array(2.0))),
    "code": (uses_default, lambda: setattr(uses_default, "__code__", uses_array.__code__)),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_is_changed_in_place_is_seen(what):
    program, mutate = MUTATIONS[what]
    before = fingerprint(program)
    mutate()
    assert not before.holds() and fingerprint(program) != before and fingerprint(program).digest != before.digest


def test_equal_programs_made_anew_are_the_same():
    same = [fingerprint(closing_over(1.5)[0]) for _ in range(2)] + [fingerprint(closing_over(2.5)[0])]
    assert same[0] == same[1] != same[2] and same[0].digest == same[1].digest != same[2].digest
    for make in (
        lambda: IWELBO(8),
        lambda: optax.adam(0.1),
        lambda: handlers.substitute(noise, data={"x": jnp.ones(2)}),
    ):
        assert fingerprint(make()) == fingerprint(make())
    assert fingerprint(IWELBO(8)) != fingerprint(IWELBO(9))
    assert fingerprint(optax.adam(0.1)) != fingerprint(optax.sgd(0.1)) != fingerprint(optax.sgd(0.2))


@pytest.mark.parametrize(
    "a, b", [(1, 1.0), (1, True), (0.0, -0.0), ("1", 1), ((1, 2), [1, 2]), (random.key(0), random.key(1))]
)
def test_values_of_other_kinds_differ(a, b):
    assert fingerprint(a) != fingerprint(b) and fingerprint(a).digest != fingerprint(b).digest


def test_a_table_counts_by_its_values_and_labels():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
    before = fingerprint(table)
    assert before == fingerprint(table.copy())
    table.loc[0, "a"] = 5.0
    assert not before.holds() and before != fingerprint(table)


def test_circles_end():
    def first(y):
        return second(y)

    def second(y):
        return first(y)

    loop = [first]
    loop.append(loop)
    assert fingerprint(first, loop) == fingerprint(first, loop)


def test_another_process_makes_the_same_digest(tmp_path):
    program = """
        import jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, optax
        from numpyro.infer.autoguide import AutoNormal
        from numpyro_smc import FIVO
        from numpyro_smc.programs.fingerprint import fingerprint
        SD, NAMES, TABLE = 0.5, {"a", "b", "c"}, np.arange(3.0)
        def model(y):
            if "a" in {"a", "b", "c", "d"} and "b" in NAMES:
                numpyro.sample("z", dist.Normal(0.0, SD + TABLE[0]))
        found = fingerprint(model, AutoNormal(model), optax.adam(0.1), FIVO(4), jnp.ones(3))
        print(found.digest, found.unknown)
    """
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(program))
    options = {"env": os.environ | {"PYTHONPATH": str(Path(numpyro_smc.__file__).parents[1])}, "check": True}
    said = {subprocess.run([sys.executable, file], capture_output=True, text=True, **options).stdout for _ in range(2)}
    assert len(said) == 1 and said.pop().endswith(" ()\n")


def test_what_cannot_be_told_apart_elsewhere_is_named():
    found = fingerprint(partial(noise, threading.Lock()))
    assert found.unknown == ("_thread.lock",)
