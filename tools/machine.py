"""The constants of a GPU from which times are predicted.

They are estimates for an H200 until a measured profile is fitted (`predict_step --fit`);
bench/NOTES.md says where each comes from, and what measuring made of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Cycles until the result of an instruction that signals its end by a scoreboard; others are timed
# by the stall counts in the code.  LDGSTS is the issue alone: what it brings is waited for by
# DEPBAR, which the model of the memory includes.
LATENCIES = {
    "ATOM": 700,
    "ATOMG": 700,
    "BAR": 25,
    "DEPBAR": 0,
    "F2F": 20,
    "F2I": 20,
    "HGMMA": 130,
    "I2F": 20,
    "LDC": 40,
    "LDG": 280,  # from L2
    "LDGSTS": 30,
    "LDS": 29,
    "LDSM": 33,
    "MUFU": 22,
    "POPC": 20,
    "R2UR": 15,
    "S2R": 25,
    "S2UR": 25,
    "SHFL": 25,
    "STG": 20,
    "STS": 25,
}

# launches of one program or few, whose latencies leave nothing to compute
SMALL_US = {
    "add_rmsnorm_kernel": 2.35,
    "advance_kernel": 2.3,
    "begin_step_kernel": 2.6,  # a guess: embed and rmsnorm less one empty launch of .5
    "embed_kernel": 1.5,
    "rmsnorm_kernel": 1.6,
    "rope_tables_kernel": 1.4,
}


@dataclass(frozen=True)
class Machine:
    """Constants of a GPU, an H200 by default."""

    processors: int = 132
    ghz: float = 1.9
    bandwidth: float = 4.67e12  # bytes a second: the best that reading reaches, of 4.8e12 on paper
    l2_bandwidth: float = 7e12  # bytes a second, between L2 and all processors
    processor_bandwidth: float = 5.9e10  # bytes a second into one processor: 31 a cycle
    # half of the processors draw so much more of a short memory, half less
    unevenness: float = 0.15
    shared_bytes: int = 233_472  # of a processor; a program takes 1024 more than it asks for
    registers: int = 65_536  # of a processor
    warps: int = 64  # of a processor
    issue: float = 0.85  # instructions a cycle, of a scheduler at most
    launch_gap_us: float = 0.45  # between the end of a launch and the start of the next, in a graph
    hidden_us: float = 0.48  # of gap and start, where a launch is dependent
    # a dependent product takes so much longer where it leaves places free, by their number over
    # that of its programs: these pile up where the kernel before ends first
    crowding: float = 0.44
    start_us: float = 0.24  # from a launch's start to a program's first instruction
    fill_us: float = 1.04  # a latency of memory: until the first load has come
    memory_us: float = 1.04  # the same under load, which the steps in flight must cover
    end_us: float = 0.48  # from a program's last step to its last store
    lookup_us: float = 0.6  # slot, position and query, before a key can be addressed
    torch_us: float = 1.6  # a launch of torch's own: index_select 2.0, a sum of integers 1.2
    other_us: float = 2.0  # a launch without a product that the next line does not name
    small_us: Mapping[str, float] = field(default_factory=lambda: MappingProxyType(SMALL_US))
    latencies: Mapping[str, int] = field(default_factory=lambda: MappingProxyType(LATENCIES))

    def us(self, cycles: float) -> float:
        """Microseconds of so many cycles."""
        return cycles / self.ghz / 1e3

    def programs_at_once(self, shared_bytes: int, registers: int, num_warps: int) -> int:
        """How many programs of a launch a processor holds."""
        per_warp = 32 * (-(-max(registers, 1) // 8) * 8)  # given out by eights
        return max(
            1,
            min(
                self.shared_bytes // (shared_bytes + 1024),
                self.registers // (per_warp * num_warps),
                self.warps // num_warps,
                32,
            ),
        )


H200 = Machine()
