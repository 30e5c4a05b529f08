"""Numbers that make side streams of a key: folded into a key that is also split, they meet none of its parts.

``random.split(key)[i]`` and ``random.fold_in(key, i)`` are the same bits, so a small number would meet them.
"""

from jax import Array, random

EVALUATION = 0x6576616C
SMOOTHING = 0x736D6F6F
ONLINE_SMOOTHING = 0x6F6E6C73
FORECAST = 0x66637374
SCORE = 0x73636F72
TWIST = 0x74776973
GUIDES = 0x67756964
SHAPES = 0x73686170
MODEL = 0x6D6F6465
PLATES = 0x706C6174
EQUAL_WEIGHTS = 0x65717561
_REPORTED_DRAWS = 0x64726177


def reported_draws() -> Array:
    """The key of draws from a finished run for which the user gave none; runs often start from ``random.key(0)``."""
    return random.fold_in(random.key(0), _REPORTED_DRAWS)
