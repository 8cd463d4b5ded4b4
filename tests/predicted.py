"""Steps for tests of predictions: launches as the engine makes them, code as a compiler would."""

from gemcut.tools.compile_report import Cell
from gemcut.tools.launches import Launch, Made
from gemcut.tools.machine_code import Loop
from gemcut.tools.prediction.predicted_step import PredictedStep

Facts = dict[str, int]


def loop(begin: int, cycles: int, instructions: int = 100, multiplies: bool = False) -> Loop:
    return Loop(begin, begin + 16 * instructions, cycles, instructions, multiplies, loads=True)


def made(kernel: str, grid: tuple[int, ...], shapes: dict[str, tuple[int, ...]], **facts) -> Made:
    """One launch; its facts and grid tell it from others."""
    told = tuple((name, f"{facts} {shapes}") for name in ("facts",))
    launch = Launch("m", kernel, "sm_90", told, (), (), ())
    item_bytes = tuple((name, 2) for name in shapes)
    return Made(kernel, launch, grid, tuple(facts.items()), tuple(shapes.items()), item_bytes)


def product(kernel: str, N: int, D: int, block_n: int = 64, splits: int = 1, **facts) -> Made:
    sizes = {"M": 1, "BLOCK_M": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3, **facts}
    if splits > 1:
        sizes["split_d"] = -(-D // splits)
    return made(kernel, (1, -(-N // block_n), splits), {"w_ptr": (N, D)}, **sizes)


def attention(grid: tuple[int, ...] = (16, 4, 1), **facts) -> Made:
    sizes = {"SPLIT": 64, "BLOCK_N": 32, "HEAD_DIM": 256, "IS_LOCAL": 0, "W": 0}
    sizes |= {"num_warps": 4, "num_stages": 3}
    shapes = {"q_ptr": (grid[2], 1, 8, 256), "k_ptr": (1, grid[1], 8192, 256)}
    return made("attention_decode_kernel", grid, shapes, **sizes | facts)


def combined(grid: tuple[int, ...] = (16, 8, 1), **facts) -> Made:
    sizes = {"SPLIT": 64, "BLOCK_S": 64, "BLOCK_D": 16, "IS_LOCAL": 0, "W": 0, "num_warps": 1}
    return made("attention_combine_kernel", grid, {}, **sizes | facts)


def cell(one: Made, *loops: Loop) -> Cell:
    found = Cell(one.name, "sm_90", {}, [], registers=100, shared_bytes=50_000)
    found.loops, found.tail_cycles = list(loops), 500
    return found


def small_step(model: str = "gemma-2-2b") -> PredictedStep:
    """A step with each kind of launch."""
    qkv = product("linear_rope_and_store_kernel", 4096, 2304, num_stages=6)
    up = product("linear_geglu_kernel", 18432, 2304)
    down = product("skinny_linear_kernel", 2304, 9216, splits=8)
    head = product("lm_head_argmax_kernel", 256_000, 2304)
    keys, advance = attention(), made("advance_kernel", (1,), {"ids_ptr": (1,)})
    counts = {Made("index_select"): 2, qkv: 26, up: 26, keys: 26, down: 26, head: 1, advance: 1}
    codes = [
        cell(qkv, loop(0, 300, multiplies=True)),
        cell(up, loop(0, 310, multiplies=True)),
        cell(keys, loop(0, 2000, 600, multiplies=True)),
        cell(down, loop(0, 1500, multiplies=True)),  # so slow that its clock shows
        cell(head, loop(0, 350, multiplies=True)),
        cell(advance, loop(0, 300)),
    ]
    launches = [qkv.launch, up.launch, keys.launch, down.launch, head.launch, advance.launch]
    cells = {launch: code for launch, code in zip(launches, codes, strict=True) if launch}
    return PredictedStep(model, 1, 1024, counts, cells)
