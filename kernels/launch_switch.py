"""The switch of dependent launches (dependent_launch.py), for engines and tools; without Triton.

It is on by default, and changes no bit of a result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_ON: ContextVar[bool] = ContextVar("dependent_launches", default=True)


@contextmanager
def dependent_launches(enabled: bool) -> Iterator[None]:
    """Within a `with`, launch kernels dependently or not: those of the calling thread alone.

    A GPU without dependent launches has plain ones all the same.  A CUDA graph keeps those with
    which it was captured.
    """
    token = _IS_ON.set(enabled)
    try:
        yield
    finally:
        _IS_ON.reset(token)


def is_on() -> bool:
    """Whether the calling thread launches dependently, where the GPU can."""
    return _IS_ON.get()
