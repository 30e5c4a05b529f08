"""Standing an MCMC kernel at given values of a model's latents, with given data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.infer.gibbs import Gibbs, with_conditioning
from numpyro.infer.mcmc import MCMCKernel

from numpyro_smc.verify.joint_model import Draw, JointModel, Program, Values

#: A kernel built on the model, or what makes one of a program, such as ``NUTS`` or ``partial(NUTS, step_size=0.1)``.
KernelOf: TypeAlias = MCMCKernel | Callable[[Program], MCMCKernel]

_DATA = "_data_of_the_check"
_TRIALS = 4  # draws at which it is seen whether a kernel stands where it was told to


def conditioned_on_data(model: Program) -> Program:
    """The program with its data taken from a keyword of its own."""
    return partial(_run_conditioned, model)


def _run_conditioned(model: Program, *args: Any, **kwargs: Any) -> Any:
    return handlers.condition(model, data=kwargs.pop(_DATA))(*args, **kwargs)


class PlacedKernel:
    """A kernel whose data and position are arguments.

    The kernel's program is conditioned on the data, which travel in a reserved keyword.

    :param kernel: see :data:`KernelOf`.
    :param joint: its model.
    :raises ValueError: if it is no kernel.
    """

    def __init__(self, kernel: KernelOf, joint: JointModel) -> None:
        self.joint = joint
        found: Any = None
        if isinstance(kernel, MCMCKernel):
            found = kernel.wrap_model(conditioned_on_data)
        elif callable(kernel):
            found = kernel(conditioned_on_data(joint.model))
        if not isinstance(found, MCMCKernel):
            raise ValueError(
                f"{joint.user}: kernel must be an MCMC kernel on the model, or a function that makes one of a model "
                f"(NUTS, functools.partial(NUTS, step_size=0.1), ...); got {kernel!r}."
            )
        self.kernel = found
        self.name = type(found).__name__
        self.constrained: frozenset[str] = frozenset()
        self.takes_init_params = True

    def init(self, rng_key: Array, data: Values, num_warmup: int = 0, init_params: Any = None) -> Any:
        """The kernel's own start."""
        state = self.kernel.init(rng_key, num_warmup, init_params, self.joint.args, self._kwargs(data))
        return jax.tree.map(jnp.asarray, state)

    def sample(self, state: Any, data: Values) -> Any:
        """One step."""
        new = self.kernel.sample(state, self.joint.args, self._kwargs(data))
        return jax.tree.map(lambda leaf, old: jnp.asarray(leaf, old.dtype), new, state)

    def refresh(self, state: Any, data: Values) -> Any:
        """The same position with other data."""
        new = _refreshed(self.kernel, state, self.joint.args, self._kwargs(data))
        return jax.tree.map(lambda leaf, old: jnp.asarray(leaf, old.dtype), new, state)

    def values(self, state: Any, data: Values) -> Values:
        """Values of the latents that the state stands at, in their supports."""
        position = getattr(state, self.kernel.sample_field)
        found = self.kernel.get_constrain_fn(self.joint.args, self._kwargs(data))(position)
        missing = [name for name in self.joint.latent if name not in found]
        if missing:
            raise ValueError(
                f"{self.joint.user}: the state of {self.name} holds no value of the latent sites {missing}. Give a "
                f"kernel of all latents: with keep_paths=True, or numpyro.infer.Gibbs of several."
            )
        return {name: found[name] for name in self.joint.latent}

    def stand(self, rng_key: Array, draw: Draw) -> Any:
        """A state at the latents of a draw, given its data; :meth:`learn_placement` comes first."""
        position = self._position(draw.latents)
        state = self.init(rng_key, draw.data, 0, position if self.takes_init_params else None)
        return self.refresh(_moved(self.kernel, state, position), draw.data)

    def learn_placement(self, rng_key: Array) -> None:
        """Find out how the kernel holds its position: HMC unconstrained, others as it is, Gibbs either by site.

        :raises ValueError: if the kernel does not stand where it was told to.
        """
        try:
            first = self._misplaced(rng_key)
        except ValueError:
            # It does not take init_params of all its sites; a state can be moved nevertheless.
            self.takes_init_params = False
            first = self._misplaced(rng_key)
        self.constrained = frozenset(first)
        missed = self._misplaced(rng_key) if first else []
        if missed:
            raise ValueError(
                f"{self.joint.user}: {self.name} does not start at init_params: the values of {missed} are others. The "
                f"check starts at draws of the joint law; let the kernel's init put them into its state."
            )

    def _misplaced(self, rng_key: Array) -> list[str]:
        """Sites whose values are not those they were placed at, in any of a few draws."""

        def one(rng_key: Array) -> tuple[Values, Values]:
            draw_key, init_key = random.split(rng_key)
            draw = self.joint.draw(draw_key)
            return draw.latents, self.values(self.stand(init_key, draw), draw.data)

        given, found = jax.jit(jax.vmap(one))(random.split(rng_key, _TRIALS))
        return [
            name
            for name, value in given.items()
            if not np.allclose(found[name], value, rtol=1e-3, atol=1e-5, equal_nan=True)
        ]

    def _position(self, latents: Values) -> Values:
        supports = self.joint.supports(latents)
        return {
            name: value
            if name in self.constrained or supports[name].is_discrete
            else biject_to(supports[name]).inv(value)
            for name, value in latents.items()
        }

    def _kwargs(self, data: Values) -> dict[str, Any]:
        return self.joint.kwargs | {_DATA: data}

    def check_refreshes(self) -> None:
        """:raises ValueError: if the kernel cannot go on with other data."""
        if type(self.kernel).refresh is MCMCKernel.refresh:
            raise ValueError(
                f"{self.joint.user}: {self.name} does not implement refresh, so its data cannot be changed between two "
                f"steps. Implement it as for a block of numpyro.infer.Gibbs, or use sbc."
            )


def _moved(kernel: MCMCKernel, state: Any, position: Values) -> Any:
    """The state at another position, for kernels that take no ``init_params`` as well, also as blocks."""
    if isinstance(kernel, Gibbs):
        pairs = zip(kernel._kernels, state.block_states, strict=True)
        state = state._replace(block_states=tuple(_moved(block, of_block, position) for block, of_block in pairs))
    old = getattr(state, kernel.sample_field)
    new = {name: jnp.asarray(position[name], value.dtype) for name, value in old.items() if name in position}
    return state._replace(**{kernel.sample_field: old | new})


def _refreshed(kernel: MCMCKernel, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``kernel.refresh``, of all blocks of a composite: NumPyro's ``Gibbs.refresh`` leaves them as they are, and its
    ``sample`` refreshes only blocks whose siblings moved."""
    if not isinstance(kernel, Gibbs):
        return kernel.refresh(state, args, kwargs)
    values = kernel.get_constrain_fn(args, kwargs)(state.z)
    states = []
    for block, names, of_block in zip(kernel._kernels, kernel._sites, state.block_states, strict=True):
        siblings = {name: value for name, value in values.items() if name not in names}
        states.append(_refreshed(block, of_block, args, with_conditioning(kwargs, siblings)))
    return state._replace(block_states=tuple(states))
