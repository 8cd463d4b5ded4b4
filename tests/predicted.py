"""Steps for tests of predictions: launches as the engine makes them, code as a compiler would."""

from gemcut.tools.compile_report import Cell
from gemcut.tools.launches import Launch, Made
from gemcut.tools.machine_code import Loop
from gemcut.tools.predicted_step import PredictedStep

Facts = dict[str, int]


def loop(begin: int, cycles: int, instructions: int = 100, multiplies: bool = False) -> Loop:
    return Loop(begin, begin + 16 * instructions, cycles, instructions, multiplies, loads=True)


def made(kernel: str, grid: tuple[int, ...], shapes: dict[str, tuple[int, ...]], **facts) -> Made:
    """One launch; its facts and grid tell it from others."""
    told = tuple((name, f"{facts} {shapes}") for name in ("facts",))
    launch = Launch("m", kernel, "sm_90", told, (), (), ())
    item_bytes = tuple((name, 2) for name in shapes)
    return Made(kernel, launch, grid, tuple(facts.items()), tuple(shapes.items()), item_bytes)


def product(kernel: str, N: int, D: int, block_n: int = 32, **facts) -> Made:
    sizes = {"M": 1, "BLOCK_M": 16, "BLOCK_D": 256, "num_warps": 4, "num_stages": 3, **facts}
    return made(kernel, (1, -(-N // block_n)), {"w_ptr": (N, D)}, **sizes)


def attention(grid: tuple[int, ...] = (8, 4, 1), **facts) -> Made:
    sizes = {"SPLIT": 128, "BLOCK_N": 32, "HEAD_DIM": 256, "BLOCK_S": 8, "BLOCK_R": 2}
    sizes |= {"GROUP_SIZE": 2, "Q_LEN": 1, "IS_LOCAL": 0, "W": 0, "num_warps": 4, "num_stages": 3}
    shapes = {"q_ptr": (grid[2], 1, 8, 256), "k_ptr": (1, grid[1], 8192, 256)}
    return made("attention_decode_kernel", grid, shapes, **sizes | facts)


def cell(one: Made, *loops: Loop) -> Cell:
    found = Cell(one.name, "sm_90", {}, [], registers=100, shared_bytes=50_000)
    found.loops, found.tail_cycles = list(loops), 500
    return found


def small_step(model: str = "gemma-2-2b") -> PredictedStep:
    """A step with each kind of launch."""
    up = product("norm_linear_geglu_kernel", 18432, 2304, HAS_BRANCH=1)
    down = product("skinny_linear_kernel", 2304, 9216, block_n=16)
    head = product("lm_head_argmax_kernel", 256_000, 2304, block_n=128, BLOCK_T=256)
    keys, advance = attention(), made("advance_kernel", (1,), {"ids_ptr": (1,)})
    counts = {Made("index_select"): 2, up: 26, keys: 26, down: 26, head: 1, advance: 1}
    codes = [
        cell(up, loop(0, 200), loop(2000, 1500, 370, multiplies=True)),
        cell(keys, loop(0, 1600, 600, multiplies=True), loop(20_000, 1400)),
        cell(down, loop(0, 700, 120, multiplies=True)),
        cell(head, loop(0, 430, 150, multiplies=True), loop(20_000, 2000)),
        cell(advance, loop(0, 300)),
    ]
    launches = [up.launch, keys.launch, down.launch, head.launch, advance.launch]
    cells = {launch: code for launch, code in zip(launches, codes, strict=True) if launch}
    return PredictedStep(model, 1, 1024, counts, cells)
