"""Six tasks of the benchmark of likelihood-free inference [1]: simulator, exact likelihood, and reference posteriors.

Observations and reference posteriors are read from ``two_moons.npz`` and so on where those files are: the published
ones, repacked as the arrays ``observations`` ``[10, L]``, ``true_parameters`` ``[10, D]`` and
``reference_posterior_1`` to ``_3`` ``[10000, D]``. Without a file, observations are simulated, with a fixed key for
each number, and the reference is drawn from the exact posterior: in closed form, or for the Bernoulli GLM by NUTS on
the exact likelihood. SLCP has no such sampler and needs its file.

**References**

1. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, random
from jax.typing import ArrayLike
from numpyro.infer import MCMC, NUTS

from models import bernoulli_glm, gaussian_linear, gaussian_mixture_location, slcp, two_moons

SOURCE = (
    "Observations and reference posteriors are published as CSV files in github.com/sbi-benchmark/sbibm, under "
    "sbibm/tasks/<task>/files/num_observation_<n>; the module models.sbi_benchmark says how to pack them."
)
NUM_OBSERVATIONS = 10
NUM_REFERENCE_SAMPLES = 10_000
FIRST_SEED = 1_000_000  # of observation 1, as the benchmark numbers them; its generator is another one


class Task(NamedTuple):
    """One task: ``simulator()`` is a program with sites ``"theta"`` and ``"x"``."""

    name: str
    simulator: Callable[[], Array]
    prior: Callable[[], Array]
    log_likelihood: Callable[[Array, Array], Array]  # exact, but for a constant where its module says so
    sample_posterior: Callable[[Array, ArrayLike, int], ArrayLike] | None  # exact and independent draws
    observation_shape: tuple[int, ...]
    is_unimodal: bool


class Reference(NamedTuple):
    """An observation and its posterior; ``source`` says where they are from."""

    observation: np.ndarray  # in the shape of the task's "x"
    true_parameter: np.ndarray  # [D]
    samples: np.ndarray  # [10000, D]
    source: str


def posterior_model(task: Task) -> Callable[[ArrayLike], None]:
    """The exact posterior as a NumPyro program of the observation: site ``"theta"`` and the log likelihood."""

    def posterior(x: ArrayLike) -> None:
        numpyro.factor("log_likelihood", task.log_likelihood(task.prior(), jnp.asarray(x)))

    return posterior


def sample_by_nuts(rng_key: Array, x: ArrayLike, num_samples: int, *, task: Task) -> np.ndarray:
    """Every second draw of four chains from the exact posterior of a unimodal task, ``[num_samples, D]``."""
    per_chain = -(-num_samples // 4)
    kernel = NUTS(posterior_model(task))
    sizes = {"num_warmup": 500, "num_samples": 2 * per_chain, "num_chains": 4, "thinning": 2}
    mcmc = MCMC(kernel, **sizes, chain_method="vectorized", progress_bar=False)
    mcmc.run(rng_key, x)
    return np.asarray(mcmc.get_samples()["theta"])[:num_samples]


TASKS = {
    task.name: task
    for task in (
        Task(
            "two_moons",
            two_moons.model,
            two_moons.prior,
            two_moons.log_likelihood,
            two_moons.sample_posterior,
            (2,),
            is_unimodal=False,
        ),
        Task(
            "slcp",
            partial(slcp.model, jitter="covariance"),
            slcp.prior,
            partial(slcp.log_likelihood, jitter="covariance"),
            None,
            (slcp.NUM_DRAWS, 2),
            is_unimodal=False,
        ),
        Task(
            "gaussian_mixture",
            gaussian_mixture_location.model,
            gaussian_mixture_location.prior,
            gaussian_mixture_location.log_likelihood,
            gaussian_mixture_location.sample_posterior,
            (2,),
            is_unimodal=True,
        ),
        Task(
            "gaussian_linear",
            gaussian_linear.model,
            gaussian_linear.prior,
            gaussian_linear.log_likelihood,
            gaussian_linear.sample_posterior,
            (gaussian_linear.DIM,),
            is_unimodal=True,
        ),
        Task(
            "gaussian_linear_uniform",
            gaussian_linear.uniform_model,
            gaussian_linear.uniform_prior,
            gaussian_linear.log_likelihood,
            gaussian_linear.sample_uniform_posterior,
            (gaussian_linear.DIM,),
            is_unimodal=True,
        ),
        Task(
            "bernoulli_glm",
            bernoulli_glm.model,
            bernoulli_glm.prior,
            bernoulli_glm.log_likelihood,
            None,
            (bernoulli_glm.NUM_DELAYS + 1,),
            is_unimodal=True,
        ),
    )
}


def load_reference(
    name: str,
    number: int = 1,
    data_dir: str | os.PathLike | None = None,
    num_samples: int = NUM_REFERENCE_SAMPLES,
) -> Reference:
    """An observation of a task, with draws from its posterior.

    :param name: of the task.
    :param number: of the observation, 1 to 10; the published files have draws for the first three.
    :param data_dir: where ``name.npz`` is, here or in a folder ``sbibm``; without it, the environment variable
        ``NUMPYRO_SMC_DATA``.
    :param num_samples: draws; a file has 10,000, of which the first are taken.
    :raises FileNotFoundError: for ``"slcp"`` without its file.
    :raises ValueError: for an unknown task or number, draws that are not there, or a file in another format.
    """
    if name not in TASKS:
        raise ValueError(f"load_reference: name={name!r}; expected one of {', '.join(TASKS)}.")
    if number not in range(1, NUM_OBSERVATIONS + 1):
        raise ValueError(f"load_reference: number={number!r}; expected 1 to {NUM_OBSERVATIONS}.")
    task, path = TASKS[name], _find(name, data_dir)
    if path is not None:
        observation, true_parameter, samples = _read(path, task, number)
        if samples is not None and num_samples <= len(samples):
            return Reference(observation, true_parameter, samples[:num_samples], f"{path.name}, observation {number}")
        if name == "slcp":
            raise ValueError(
                f"load_reference: {path} has no {num_samples} draws from the posterior of observation {number}, and no "
                f"sampler makes them; it has {NUM_REFERENCE_SAMPLES} each of observations 1, 2 and 3."
            )
        source = f"{path.name}, observation {number}"
    elif name == "slcp":
        looked = data_dir if data_dir is not None else os.environ.get("NUMPYRO_SMC_DATA")
        raise FileNotFoundError(
            f"load_reference: slcp.npz is missing: "
            f"{'no directory was given' if looked is None else f'it is neither in {looked} nor in its folder sbibm'}. "
            f"{SOURCE} Pass its directory as data_dir, or set the environment variable NUMPYRO_SMC_DATA."
        )
    else:
        drawn = _simulate(task, number)
        observation, true_parameter = np.asarray(drawn["x"]), np.asarray(drawn["theta"])
        source = f"simulated observation {number}"
    rng_key = random.fold_in(random.key(FIRST_SEED), number)
    sampler = task.sample_posterior or partial(sample_by_nuts, task=task)
    kind = "NUTS" if task.sample_posterior is None else "exact draws"
    return Reference(
        observation, true_parameter, np.asarray(sampler(rng_key, observation, num_samples)), f"{source}, {kind}"
    )


def _simulate(task: Task, number: int) -> dict[str, Array]:
    seeded = numpyro.handlers.seed(task.simulator, random.key(FIRST_SEED + number - 1))
    trace = numpyro.handlers.trace(seeded).get_trace()
    return {site: trace[site]["value"] for site in ("theta", "x")}


def _find(name: str, data_dir: str | os.PathLike | None) -> Path | None:
    directory = data_dir if data_dir is not None else os.environ.get("NUMPYRO_SMC_DATA")
    folders = [] if directory is None else [Path(directory), Path(directory) / "sbibm"]
    return next((folder / f"{name}.npz" for folder in folders if (folder / f"{name}.npz").is_file()), None)


def _read(path: Path, task: Task, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Observation, true parameter, and draws where the file has them."""
    with np.load(path) as arrays:
        if missing := {"observations", "true_parameters"} - set(arrays):
            raise ValueError(f"load_reference: {path} has no array {' and no array '.join(sorted(missing))}. {SOURCE}")
        observations, parameters = arrays["observations"], arrays["true_parameters"]
        samples = arrays.get(f"reference_posterior_{number}")
    length = int(np.prod(task.observation_shape))
    if observations.shape != (NUM_OBSERVATIONS, length):
        raise ValueError(
            f"load_reference: observations of {path} have shape {observations.shape}; expected "
            f"{(NUM_OBSERVATIONS, length)}. {SOURCE}"
        )
    return observations[number - 1].reshape(task.observation_shape), parameters[number - 1], samples
