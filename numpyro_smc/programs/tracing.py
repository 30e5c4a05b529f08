"""One thread at a time runs user programs: NumPyro keeps its handlers in one stack for all threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from numpyro_smc.programs.fingerprint import Fingerprint

#: Held while a user's program runs under handlers. Whoever compiles takes it before JAX's own locks, not after them.
TRACING = threading.RLock()

_VERSION = jax.make_user_context(None)


@contextmanager
def tracing(version: Fingerprint) -> Iterator[None]:
    """The context in which a program of that fingerprint is traced.

    JAX too keeps what it has traced of a function (the body of a ``lax.scan``, a jitted function), whatever has changed
    of the values that it closes over; of another version it is traced again.
    """
    with TRACING, _VERSION(version if version.is_renewed else None):
        yield
