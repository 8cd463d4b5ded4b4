"""The check that stands before every launch."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds.

    An assert would vanish under `python -O`, and a kernel launched with a wrong shape reads memory
    that is not its own.
    """
    if not condition:
        raise ValueError(message)
