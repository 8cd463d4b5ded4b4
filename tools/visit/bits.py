"""Checks of equal bits: replays of a graph, eager steps, stored text, a late producer.

A race shows only now and then, so a graph is replayed two thousand times.  The comparison is part
of the graph, and counts on the device: nothing waits for the host in between.

TEXTS were made on a CPU by the reference ops in float32, 48 tokens each, greedily; a test makes
them again.  The least lead of a chosen logit over the next one is 0.025 there, so float32 kernels,
which differ from the oracles by some 1e-5, must choose the same; bfloat16 need not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gemcut import kernels
from gemcut.bench.engines.random_model import published_config, random_weights
from gemcut.bench.measure.timing import capture
from gemcut.bench.ops.cases import Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases
from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import PREFILL_CHUNK, KVCache
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import GREEDY
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.execution.steps import Steps
from gemcut.engine.execution.weights import empty_weights
from gemcut.tokenizer import Tokenizer
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.profile_step import DecodeStep
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.dependent_launch import add_one, late_store
from gemcut.tools.visit.ops import bits

MODEL, CONTEXT, BATCH = "gemma-2-2b", 1024, 3
REPLAYS, STEP_REPLAYS = 2000, 2000
OPS = ("attention_decode", "lm_head_argmax", "sample")
NEW_TOKENS, CPU_TOKENS = 48, 4
MAX_SEQ_LEN = 256
DELAY_NS = 30_000  # a consumer that does not wait has long ended by then
LATE_REPLAYS = 200
ELEMENTS = 4096  # 16 programs: a producer must leave room for its consumer

DTYPE = torch.bfloat16
TEXTS = {
    "It was": " a long night, and there was no room in the night. The window was open, and the "
    "light was burning, with the light of the lamp, and the lamp was closed. The window of the "
    "door was closed, and the",
    "In the morning": " we were at the door, and we were back in the street. Holmes was still "
    "deep in his chamber, and his face was pale and drawn, with his eyes fixed upon his wrists.\n\n"
    '"I am afraid',
    "He had never": ' been so excited with his own life.\n\n"I am sorry to have a word with you, '
    'Mr. Holmes," said he. "I have no doubt that you are here, but I am not sure that you have '
    "never had",
}


@torch.inference_mode()
def run(visit: Visit) -> None:
    """Keep records of replays that differ, of texts, and of the producer that is late."""
    shapes = Shapes(MODEL if visit.on_gpu else "demo", small_config(visit), visit.device, DTYPE)
    contexts = (CONTEXT if visit.on_gpu else 24,)
    for case in decode_cases(shapes, Grid((BATCH,), contexts, (), 1, PREFILL_CHUNK)):
        wanted = case.op in OPS and case.facts.get("variant") in (None, "", "top-k top-p")
        if wanted and case.facts.get("layer") != "local":
            with visit.attempt(case.name):
                arguments = case.make()
                compare_replays(
                    visit,
                    f"replays of {case.name}",
                    lambda op=case.op, given=arguments: getattr(kernels, op)(**given),
                    REPLAYS,
                )
    for dtype in (torch.float32, torch.bfloat16) if visit.on_gpu else (torch.float32,):
        for prompt in list(TEXTS)[: None if visit.on_gpu else 1]:
            with visit.attempt(f"text {prompt!r} {dtype}"):
                compare_text(visit, prompt, dtype)
    with visit.attempt("a late producer"):
        check_late(visit)
    with visit.attempt("replays of a step"):
        compare_steps(visit)


def small_config(visit: Visit) -> ModelConfig:
    """The model whose steps are replayed; the demo on a CPU."""
    return published_config(MODEL) if visit.on_gpu else ModelConfig.from_file(DEMO)


def compare_replays(
    visit: Visit, case: str, call: Callable[[], Tensor | tuple[Tensor, ...]], replays: int
) -> None:
    """Keep a record of how many replays give other bits than the eager call before them."""

    def outputs() -> list[Tensor]:
        found = call()
        return list(found) if isinstance(found, tuple) else [found]

    expected = [bits(x).clone() for x in outputs()]
    differing = torch.zeros((), dtype=torch.int64, device=visit.device)

    def compared() -> None:
        pairs = zip(outputs(), expected, strict=True)
        unlike = torch.stack([(bits(x) != y).any() for x, y in pairs]).any()
        differing.add_(unlike)

    replay: Callable[[], object] = compared
    if visit.on_gpu:
        replay = capture([compared]).replay
        differing.zero_()  # what a warm call counted
    else:
        replays = 1
    for _ in range(replays):
        replay()
    count = int(differing.item())
    told = f"{count} of {replays} replays differ from the eager call"
    visit.check(case, count == 0, told, line=f"{case}: {replays} equal the eager call bit for bit")


def compare_steps(visit: Visit) -> None:
    """Keep records of a whole step: its logits, and the ids that it chooses."""
    config = small_config(visit)
    if visit.on_gpu:
        weights = random_weights(config, device=visit.device, dtype=DTYPE)
    else:
        weights = load_checkpoint(DEMO, config, device=visit.device, dtype=DTYPE)
    step = DecodeStep(
        Gemma(config, weights, kernels), BATCH, CONTEXT - 1 if visit.on_gpu else 24, 1
    )

    def ids() -> Tensor:
        step.reset()
        return step.run()

    def logits() -> Tensor:
        step.reset()
        return step.steps.logits(step.slots)

    compare_replays(visit, "replays of a step's ids", ids, STEP_REPLAYS)
    compare_replays(visit, "replays of a step's logits", logits, STEP_REPLAYS)


# Text


def compare_text(visit: Visit, prompt: str, dtype: torch.dtype) -> None:
    """Keep a record of the demo's greedy text beside the stored one, which float32 must equal."""
    config = ModelConfig.from_file(DEMO)
    weights = load_checkpoint(DEMO, config, device=visit.device, dtype=dtype)
    tokenizer = Tokenizer.from_file(DEMO)
    count = NEW_TOKENS if visit.on_gpu else CPU_TOKENS
    ids = generate(Gemma(config, weights, kernels), tokenizer.encode(prompt), count)
    stored = tokenizer.encode(prompt + TEXTS[prompt])[-NEW_TOKENS:]
    text, expected = tokenizer.decode(ids), TEXTS[prompt]
    same = expected == text if len(ids) == NEW_TOKENS else expected.startswith(text)
    common = next(
        (i for i, (a, b) in enumerate(zip(ids, stored, strict=False)) if a != b), len(ids)
    )
    case = f"text {prompt!r} {str(dtype).removeprefix('torch.')}"
    told = f"{text!r} instead of {expected[: len(text)]!r}"
    line = f"{case}: {'as stored' if same else f'leaves the stored text at token {common}'}"
    visit.check(case, same or dtype != torch.float32, told, line=line)


def generate(model: Gemma, prompt_ids: list[int], count: int) -> list[int]:
    """The greedy continuation by `count` tokens, step by step and eagerly."""
    device, config = model.device, model.config
    cache = _cache_of_one(model)
    hidden = model.prefill(torch.tensor(prompt_ids, device=device), cache, 0)[-1:]
    state = SlotState(1, config.vocab_size, device)
    state.limits.fill_(MAX_SEQ_LEN)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    state.tokens[:1] = model.ops.sample(model.logits(hidden))
    state.positions[:1] = len(prompt_ids)
    found = [state.tokens[:1].clone()]
    steps = Steps(model, cache, state)
    for _ in range(count - 1):
        found.append(steps.decode(slots, GREEDY))
    return torch.cat(found).tolist()


def _cache_of_one(model: Gemma) -> KVCache:
    return KVCache(
        model.config,
        num_slots=1,
        max_seq_len=MAX_SEQ_LEN,
        prefill_chunk=PREFILL_CHUNK,
        device=model.device,
        dtype=model.dtype,
    )


def record_text(arch: str) -> set[Launch]:
    """What the texts and the late producer launch: recorded, not made."""
    config, device = ModelConfig.from_file(DEMO), torch.device("cuda", 0)
    found: set[Launch] = set()
    lengths = sorted({len(Tokenizer.from_file(DEMO).encode(prompt)) for prompt in TEXTS})
    with recorded(arch) as launches:
        for dtype in (torch.float32, torch.bfloat16):
            model = Gemma(config, empty_weights(config, device=device, dtype=dtype), kernels)
            for length in lengths:
                cache = _cache_of_one(model)
                ids = torch.empty(length, dtype=torch.int64, device=device)
                hidden = model.prefill(ids, cache, 0).narrow(0, length - 1, 1)
                model.ops.sample(model.logits(hidden))
                steps = Steps(model, cache, SlotState(1, config.vocab_size, device))
                steps.decode(torch.empty(1, dtype=torch.int64, device=device), GREEDY)
        numbers = torch.empty(ELEMENTS, dtype=torch.int32, device=device)
        late_store(numbers.narrow(0, 0, 1), numbers, dependent=True, delay_ns=DELAY_NS)
        for waits in (True, False):
            add_one(numbers, numbers, dependent=True, waits=waits)
        found |= launches
    return found


# Dependent launch


def check_late(visit: Visit) -> None:
    """Keep records of consumers of a late producer: with their wait, and without it."""
    dependent = visit.on_gpu
    for waits in (True, False) if visit.on_gpu else (True,):
        value = torch.zeros(1, dtype=torch.int32, device=visit.device)
        y, z, u = torch.zeros(3, ELEMENTS, dtype=torch.int32, device=visit.device).unbind()
        wrong = torch.zeros((), dtype=torch.int64, device=visit.device)

        def chain(value=value, y=y, z=z, u=u, wrong=wrong, waits=waits) -> None:
            value.add_(1)
            y.fill_(-1)
            late_store(value, y, dependent, DELAY_NS if dependent else 0)
            add_one(y, z, dependent, waits)
            add_one(y, u, dependent, waits)  # has ended: the producer, and what waited for it
            wrong.add_(((z != value + 1) | (u != value + 1)).any())

        replay: Callable[[], object] = chain
        replays = LATE_REPLAYS
        if visit.on_gpu:
            replay = capture([chain]).replay
            wrong.zero_()
        else:
            replays = 2
        for _ in range(replays):
            replay()
        count = int(wrong.item())
        if waits:
            told = f"{count} of {replays} replays read what the producer had not yet written"
            line = f"a late producer: consumers that wait are right in {replays} replays"
            visit.check("a late producer", count == 0, told, line=line)
        else:
            line = f"without the wait {count} of {replays} are wrong: so much does this check see"
            visit.add("a late producer, no wait", line=line)
