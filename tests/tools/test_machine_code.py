"""tools/machine_code.py: instructions, loops and cycles from machine code."""

from gemcut.tools.machine_code import find_loops, parse, pass_cycles, tail_cycles

LATENCIES = {"LDS": 29, "BAR": 25, "HMMA": 35}
NONE = 7  # no scoreboard


def line(address: int, text: str, stall: int, sets: int = NONE, waits: int = 0) -> str:
    control = stall | sets << 5 | NONE << 8 | waits << 11
    return (
        f"        /*{address:04x}*/                   {text} ;   /* 0x0000000000017918 */\n"
        f"                                              /* 0x{control << 41:016x} */"
    )


SASS = "\n".join(
    [
        "\tFunction : k_kernel",
        line(0x00, "S2R R0, SR_TID.X", 2),
        line(0x10, "LDS R4, [R2]", 1, sets=0),
        line(0x20, "FADD R5, R4, R5", 4, waits=1),
        line(0x30, "IADD3 R2, R2, 0x1, RZ", 4),
        line(0x40, "ISETP.GE.AND P0, PT, R2, R3, PT", 4),
        *(line(0x50 + 16 * i, "NOP", 1) for i in range(4)),
        line(0x90, "@!P0 BRA 0x10", 5),
        line(0xA0, "LDGSTS.E.BYPASS.128 [R6], desc[UR4][R8.64]", 1),
        line(0xB0, "HMMA.16816.F32.BF16 R12, R4, R6, R12", 10),
        *(line(0xC0 + 16 * i, "NOP", 1) for i in range(5)),
        line(0x110, "@P1 BRA 0xa0", 5),
        line(0x120, "STG.E [R2.64], R5", 1),
        line(0x130, "EXIT", 5),
        line(0x140, "BRA 0x140", 0),
    ]
)


def test_instructions():
    code = parse(SASS)
    assert [i.address for i in code[:3]] == [0x00, 0x10, 0x20]
    assert [i.name for i in code[:3]] == ["S2R", "LDS", "FADD"]
    assert code[9].name == "BRA"  # without its predicate
    assert code[1].control == 1 | 0 << 5 | 7 << 8


def test_loops_are_innermost_branches_back():
    """A branch to itself, with which every kernel ends, is none."""
    load, multiply = find_loops(parse(SASS), LATENCIES)
    assert (load.begin, load.end, load.instructions) == (0x10, 0x90, 9)
    assert not load.multiplies
    assert not load.loads  # from shared memory
    assert (multiply.begin, multiply.end) == (0xA0, 0x110)
    assert multiply.multiplies
    assert multiply.loads


def test_cycles_are_stalls_and_what_is_waited_for():
    """29 for the load, then 4 + 4 + 4, four of 1 and 5 of the branch."""
    load, multiply = find_loops(parse(SASS), LATENCIES)
    assert load.cycles == 29 + 12 + 4 + 5
    assert multiply.cycles == 1 + 10 + 5 + 5


def test_a_scoreboard_of_the_pass_before_is_waited_for():
    code = parse("\n".join([line(0, "FADD R1, R2, R2", 1, waits=1), line(16, "LDS R2", 1, sets=0)]))
    assert pass_cycles(code, LATENCIES, passes=1) == 2
    assert pass_cycles(code, LATENCIES, passes=3) == 30


def test_a_barrier_takes_its_latency():
    code = parse(line(0, "BAR.SYNC.DEFER_BLOCKING 0x0", 1))
    assert pass_cycles(code, LATENCIES) == 26


def test_the_tail_ends_with_the_program():
    assert tail_cycles(parse(SASS), 0x110, LATENCIES) == 1 + 5


def test_only_the_first_kernel_is_read():
    assert parse(SASS + "\n" + SASS) == parse(SASS)
    assert parse("no code") == []


def test_what_a_pass_stores_after_a_branch_is_left_out():
    """Only at the end of a split; what is loaded or multiplied after a branch counts."""

    def loop(skipped: str) -> str:
        lines = [line(0x10, "@P0 BRA 0x80", 5)]
        lines += [line(0x20 + 16 * i, skipped, 7) for i in range(6)]
        lines += [line(0x80 + 16 * i, "HMMA.16816.F32.BF16 R12, R4, R6, R12", 1) for i in range(8)]
        return "\n".join([*lines, line(0x100, "@P1 BRA 0x10", 5)])

    (stores,) = find_loops(parse(loop("STG.E [R2.64], R5")), LATENCIES)
    (loads,) = find_loops(parse(loop("LDS R4, [R2]")), LATENCIES)
    assert (stores.cycles, stores.instructions) == (5 + 8 + 5, 10)
    assert (stores.rare_cycles, loads.rare_cycles) == (6 * 7, 0)
    assert (loads.cycles, loads.instructions) == (5 + 6 * 7 + 8 + 5, 16)


def test_long_code_after_a_branch_is_rare():
    """The head compares the logits of a block once in many steps; what streams is no such code."""

    def loop(count: int, first: str = "NOP") -> str:
        end = 0x20 + 16 * count
        lines = [line(0x10, f"@P0 BRA 0x{end:x}", 5), line(0x20, first, 2)]
        lines += [line(0x30 + 16 * i, "FADD R5, R4, R5", 2) for i in range(count - 1)]
        lines += [line(end + 16 * i, "HMMA.16816.F32.BF16 R12, R4, R6, R12", 1) for i in range(8)]
        return "\n".join([*lines, line(end + 0x80, "@P1 BRA 0x10", 5)])

    (long,) = find_loops(parse(loop(120)), LATENCIES)
    assert (long.cycles, long.rare_cycles) == (5 + 8 + 5, 240)
    (scaled,) = find_loops(parse(loop(120, "LDG.E R4, [R2.64]")), LATENCIES)
    assert scaled.rare_cycles == 240  # by the row, at the end of a block
    for code in (loop(40), loop(120, "LDGSTS.E.BYPASS.128 [R4], [R2.64]")):
        (other,) = find_loops(parse(code), LATENCIES)
        assert other.rare_cycles == 0
        assert other.cycles > 5 + 8 + 5
