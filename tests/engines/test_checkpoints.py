"""Checkpoints are of their own work, whole or not at all, and never cost a result."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

import numpyro_smc
from numpyro_smc import IWELBO, SMC2, LocalOptimizer, ParticleFilter, SMCSampler, fit
from numpyro_smc.engines import checkpoint as module
from numpyro_smc.engines.checkpoint import load_pytree, save_pytree

Y = jnp.array(2.0)
MEAN = 0.0


def model(y):
    z = numpyro.sample("z", dist.Normal(MEAN, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def other_model(y):
    z = numpyro.sample("z", dist.Normal(7.0, 0.1))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def training(file, num_steps=20, program=model, guide=None, optimizer=None, loss=None, y=Y):
    svi = SVI(program, guide or AutoNormal(program), optimizer or optax.adam(0.05), loss or Trace_ELBO())
    return fit(svi, random.key(0), num_steps, y, progress_bar=False, checkpoint=file)


OTHER_TRAININGS = {
    "model and guide": {"program": other_model},
    "guide": {"guide": AutoNormal(model, init_scale=0.2)},
    "optimizer": {"optimizer": optax.adam(optax.exponential_decay(0.05, 10, 0.9))},
    "loss": {"loss": IWELBO(8)},
    "data": {"y": jnp.array(-100.0)},
}


def test_training_goes_on_with_the_same_and_refuses_another(tmp_path, monkeypatch):
    training(tmp_path / "run", 10)
    for what, change in OTHER_TRAININGS.items():
        if what == "optimizer":
            continue  # its state has another structure
        with pytest.raises(ValueError, match=rf"fit: checkpoint '.*run' is not of the same {what}\. Pass the svi"):
            training(tmp_path / "run", **change)
    with pytest.raises(ValueError, match=r"fit: checkpoint '.*run' (is not of the same optimizer|has)"):
        training(tmp_path / "run", optimizer=optax.adam(5.0))
    monkeypatch.setitem(globals(), "MEAN", 1.0)
    with pytest.raises(ValueError, match=r"is not of the same model and guide"):
        training(tmp_path / "run")
    monkeypatch.setitem(globals(), "MEAN", 0.0)
    resumed, whole = training(tmp_path / "run"), training(tmp_path / "other")
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_a_schedule_is_part_of_the_optimizer(tmp_path):
    def run(rate):
        return training(tmp_path / "run", optimizer=optax.sgd(optax.exponential_decay(0.05, 10, rate)))

    run(0.9)
    run(0.9)
    with pytest.raises(ValueError, match=r"is not of the same optimizer\."):
        run(0.5)


def test_another_process_goes_on_with_the_same_program(tmp_path):
    program = """
        import sys, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        from jax import random
        from numpyro.infer import SVI
        from numpyro.infer.autoguide import AutoNormal
        from numpyro_smc import IWELBO, fit
        def model(y):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, RATE), obs=y)
        RATE = float(sys.argv[2])
        svi = SVI(model, AutoNormal(model), optax.adam(optax.cosine_decay_schedule(0.1, 100)), IWELBO(2))
        num_steps, options = int(sys.argv[1]), dict(progress_bar=False, checkpoint="run")
        print(len(fit(svi, random.key(0), num_steps, jnp.array(2.0), **options).losses))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))

    def run(*args):
        paths = {"PYTHONPATH": str(Path(numpyro_smc.__file__).parents[1])}
        options = {"cwd": tmp_path, "env": os.environ | paths, "capture_output": True, "text": True}
        return subprocess.run([sys.executable, "program.py", *args], **options)

    assert run("3", "1.0").stdout == "3\n" and run("5", "1.0").stdout == "5\n"
    refused = run("7", "2.0")
    assert refused.returncode and "is not of the same model and guide" in refused.stderr


def rows(y):
    z = numpyro.sample("z", dist.Normal(0.0, 3.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_tempered_run_refuses_other_data_and_models(tmp_path):
    data, key = jnp.array([3.1, 2.7, 3.4]), random.key(0)

    def run(program=rows, y=data, **options):
        sampler = SMCSampler(program, 50, moves="rwmh", num_moves=1, **options)
        return sampler.run(key, y, progress_bar=False, checkpoint=tmp_path / "run")

    first = run()
    assert run().log_evidence == first.log_evidence
    for change, what in (({"y": -data}, "data"), ({"y": data[:2]}, "data"), ({"ess_threshold": 0.1}, "moves")):
        with pytest.raises(
            ValueError, match=rf"SMCSampler: checkpoint '.*' is not of the same {what}\. Pass the sampler"
        ):
            run(**change)
    with pytest.raises(ValueError, match=r"is not of the same model\."):
        run(lambda y: rows(2.0 * y))
    with pytest.raises(ValueError, match=r"is not of the same guide and params"):
        run(init_guide=(lambda y: numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), 3.0)), {"m": 3.0}))


def level(y, sd=0.2):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, sd))
        numpyro.sample("y", dist.Normal(x, noise), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def other_level(y, sd=0.2):
    level(y, 2 * sd)


def test_a_run_of_smc2_may_learn_the_future_but_not_another_past(tmp_path):
    y, path, key = jnp.array([0.3, -0.2, 0.5, 0.1]), tmp_path / "run", random.key(0)
    unknown = y.at[2:].set(jnp.nan)
    sampler = SMC2(level, 8, 4)
    first = sampler.run(key, unknown, until=2, progress_bar=False, checkpoint=path)
    refused = r"is not of the same past data\."
    for call in (
        lambda y: sampler.run(key, y, progress_bar=False, checkpoint=path),
        lambda y: sampler.resume(first, y),
    ):
        with pytest.raises(ValueError, match=refused):
            call(y.at[1].set(3.0))
    with pytest.raises(ValueError, match=refused):
        sampler.load(path, y, 0.3)
    with pytest.raises(ValueError, match=r"SMC2.resume: the result is not of the same model\. Pass"):
        SMC2(other_level, 8, 4).resume(first, y)
    assert sampler.resume(first, y[:3], progress_bar=False).num_steps == 3
    assert sampler.run(key, y, progress_bar=False, checkpoint=path).num_steps == 4


def fixed(y, sd=0.2):
    return level(y, sd)


def test_a_stream_is_loaded_under_its_own_model_and_params(tmp_path):
    y, params, path = jnp.array([0.3]), {"noise": 0.5}, tmp_path / "stream"
    particle_filter = ParticleFilter(level, 4)
    state = particle_filter.update(particle_filter.init(random.key(0), y, params=params), y[0])
    particle_filter.save(path, state)
    loaded = particle_filter.load(path, y, params=params)
    jax.tree.map(np.testing.assert_array_equal, loaded._replace(rng_key=None), state._replace(rng_key=None))
    for filtered, args, values, what in (
        (ParticleFilter(other_level, 4), (y,), params, "model"),
        (particle_filter, (y,), {"noise": 0.7}, "params"),
        (particle_filter, (y, 0.3), params, "arguments"),
        (ParticleFilter(level, 4, resample="always"), (y,), params, "resampling"),
    ):
        with pytest.raises(ValueError, match=rf"ParticleFilter\.load: checkpoint '.*' is not of the same {what}\."):
            filtered.load(path, *args, params=values)


def points(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(MEAN, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_local_optima_are_of_their_model(tmp_path, monkeypatch):
    small = dict(init="zeros", patience=1, max_steps=4, check_every=2, num_eval=4, batch_size=1)

    def run():
        return LocalOptimizer("ffg", **small).run(random.key(0), points, jnp.ones(2), checkpoint=tmp_path / "local")

    elbo = run().elbo
    np.testing.assert_array_equal(run().elbo, elbo)
    monkeypatch.setitem(globals(), "MEAN", 3.0)
    with pytest.raises(ValueError, match=r"LocalOptimizer: checkpoint .* is of another configuration.* same model\."):
        run()


# ---- files ----------------------------------------------------------------------------------------------------------

TREE = {"a": np.arange(6.0).reshape(2, 3), "b": random.key(3), "c": 5, "d": jnp.ones(2, jnp.bfloat16)}


def test_no_damage_is_read(tmp_path):
    path = tmp_path / "tree"
    save_pytree(path, TREE)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    load_pytree(path, TREE)
    for bit in generator.choice(8 * len(whole), 150, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        is_trailer = bit // 8 >= len(whole) - len(module._TRAILER) - 32
        with pytest.raises(ValueError, match="damaged") if not is_trailer else _any_refusal():
            load_pytree(path, TREE)
    for size in (0, 1, 40, len(whole) // 2, len(whole) - 60):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"'.*tree' (was not written by save_pytree, or )?is damaged|not written"):
            load_pytree(path, TREE)
    for foreign in (b"text", b"PK\x03\x04" + b"0" * 60):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match=r"tree' was not written by save_pytree, or is damaged"):
            load_pytree(path, TREE)


def _any_refusal():
    # The mark itself may be gone: then the file is one of an earlier version, and says so.
    return pytest.raises((ValueError, UserWarning), match=r"damaged|has no checksum")


def test_a_file_without_checksum_is_taken_with_a_warning(tmp_path):
    path = tmp_path / "tree"
    save_pytree(path, TREE)
    path.write_bytes(path.read_bytes()[: -len(module._TRAILER) - 32])
    with pytest.warns(UserWarning, match=r"'.*tree' has no checksum: it was written by an earlier version"):
        assert load_pytree(path, TREE)["c"] == 5


def test_what_killed_writes_left_is_removed_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = module.socket.gethostname()
    left, other = tmp_path / f".tree.{host}-{ended.pid}-x.part", tmp_path / f".other.{host}-{ended.pid}-x.part"
    running = tmp_path / f".tree.{host}-{os.getpid()}-x.part"
    for file in (left, other, running):
        file.write_text("")
    save_pytree(tmp_path / "tree", {"a": 1})
    assert not left.exists() and other.exists() and running.exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    def nothing(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", nothing)
    with pytest.raises(ValueError, match=r"fit: nothing can be written to the folder of checkpoint='.*': .*denied"):
        training(tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"fit: checkpoint='.*' is a folder; name a file in it"):
        training(tmp_path)


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_no_result(tmp_path, monkeypatch):
    y = jnp.array([0.3, -0.2])
    expected = training(tmp_path / "run", 5, guide=AutoDelta(model))
    monkeypatch.setattr(module, "replacing", full)
    said = r"could not be written \(.*No space left on device\).*in memory only"
    with pytest.warns(UserWarning, match=f"fit: checkpoint '.*' {said}"):
        found = training(tmp_path / "other", 5, guide=AutoDelta(model))
    np.testing.assert_array_equal(found.losses, expected.losses)
    with pytest.warns(UserWarning, match=f"SMC2: checkpoint '.*' {said}"):
        assert SMC2(level, 8, 4).run(random.key(0), y, progress_bar=False, checkpoint=tmp_path / "a").num_steps == 2
    with pytest.warns(UserWarning, match=f"SMCSampler: checkpoint '.*' {said}"):
        sampler = SMCSampler(rows, 20, moves="rwmh", num_moves=1)
        assert sampler.run(random.key(0), y, progress_bar=False, checkpoint=tmp_path / "b").betas[-1] == 1.0
    assert os.listdir(tmp_path) == ["run"]
