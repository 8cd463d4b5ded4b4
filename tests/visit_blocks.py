"""Blocks of a visit that end in every way that a block can; see test_gpu_visit.py."""

import os
import signal
import time
from pathlib import Path
from zlib import crc32

from gemcut.tools.gpu_visit import Block
from gemcut.tools.visit.block import Visit

ENDS = ("right", "wrong", "raises", "hangs", "dies", "spawns", "last")
BLOCKS = tuple(Block(name, "visit_blocks", seconds=3.0, expected=1.0, lines=3) for name in ENDS)


def seconds_of(out: Path) -> str:
    """Seconds that a block's process sleeps, different for each visit so that it can be found."""
    return f"600.{crc32(bytes(out.resolve()))}"


def run(visit: Visit) -> None:
    """Keep a record, then end in the way that the block is named after."""
    visit.add("first", line=f"{visit.block} said this")
    if visit.block == "right":
        for i in range(5):
            visit.add(f"case {i}", line=f"line {i}")
        with visit.attempt("a case"):
            raise MemoryError("1 GB is missing")
        visit.add("a case")  # a second try
        visit.skip("another", "nobody asked for it")
    if visit.block == "wrong":
        visit.check("a check", False, "error 2, where 1 is allowed")
        with visit.attempt("a failure"):
            raise TypeError("first line\nsecond line")
    if visit.block == "raises":
        raise RuntimeError("no such thing")
    if visit.block == "hangs":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a process that waits for its device
        time.sleep(600)
    if visit.block == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if visit.block == "spawns":
        os.spawnlp(os.P_WAIT, "sleep", "sleep", seconds_of(visit.out))
