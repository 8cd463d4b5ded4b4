"""How many tokens a second does gemcut decode, and how many do others, on the same checkpoint?

Each contestant continues the same prompts greedily by the same number of tokens, through its public
API, end to end.  Decoding is every step after the first token; the time to the first token stands
apart.  Before anything is timed, the tokens are compared: a peer that computes something else is
reported, and not timed.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from gemcut.bench.peers import Contestant, Gemcut, Generation, Setup, Transformers, load_peers
from gemcut.bench.report import describe_machine, print_table
from gemcut.bench.timing import Spread, take_turns
from gemcut.engine.checks import check_int
from gemcut.engine.config import GemmaConfig
from gemcut.engine.hub import resolve_checkpoint
from gemcut.engine.loading import choose_device, choose_dtype
from gemcut.tokenizer import Tokenizer

# how far two logits may lie apart, as a share of the greatest, where two correct implementations
# choose differently: float32 as in tests/twins.py, bf16 four units in the last place
NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}

PASSAGE = (
    "The ferry left at six, with the mail, two sheep and a schoolmaster on board. Nobody spoke "
    "until the lighthouse was behind them. Then the pilot said that the wind would turn before "
    "noon, and that whoever had business on the island had better finish it by then. The "
    "schoolmaster looked at his watch, at the sheep, and at the long grey line ahead of them."
)


@dataclass(frozen=True)
class Workload:
    """What every contestant does in every round."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int

    def __post_init__(self) -> None:
        check_int("prompt tokens", self.prompt_tokens, 1, 2**20)
        check_int("new tokens", self.new_tokens, 2, 2**20)  # the first is not decoding
        check_int("batch", self.batch, 1, 4096)
        check_int("repeats", self.repeats, 1, 10**6)

    @property
    def length(self) -> int:
        """Tokens of one row, prompt and continuation."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Verdict:
    """Whether a peer's greedy tokens are gemcut's."""

    status: str  # "same" | "near tie" | "wrong" | "failed"
    detail: str

    @property
    def passed(self) -> bool:
        return self.status in ("same", "near tie")


@dataclass
class Result:
    """The rounds of a comparison so far; in each, a Generation of every contestant by name."""

    contestants: list[Contestant]  # gemcut first
    verdicts: dict[str, Verdict]  # of each peer
    rounds: list[dict[str, Generation]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def timed(self) -> list[str]:
        """Names of those that were timed, gemcut first."""
        return list(self.rounds[0]) if self.rounds else []

    def tokens_per_second(self, name: str) -> list[float]:
        return [round_[name].tokens_per_second for round_ in self.rounds]

    def ratios(self, name: str) -> list[float]:
        """Tokens a second of gemcut over a peer's, round by round."""
        own = self.tokens_per_second(self.contestants[0].name)
        return [a / b for a, b in zip(own, self.tokens_per_second(name), strict=True)]

    def first_token_ms(self, name: str) -> list[float]:
        return [1e3 * round_[name].first_token_seconds for round_ in self.rounds]

    @property
    def fastest_peer(self) -> str | None:
        return max(
            self.timed[1:],
            key=lambda name: Spread.of(self.tokens_per_second(name)).median,
            default=None,
        )


def setup_decode(model: str, device: str, dtype: str, workload: Workload) -> Setup:
    """What the contestants are loaded with; ValueError where the model cannot do the workload."""
    target = choose_device(device)
    weights_dtype = choose_dtype(dtype, target)
    folder = resolve_checkpoint(model)
    limit = GemmaConfig.from_file(folder).context_length
    if workload.length > limit:
        raise ValueError(
            f"{workload.prompt_tokens} prompt tokens and {workload.new_tokens} new ones are "
            f"{workload.length}, but a slot of this model holds at most {limit}"
        )
    is_folder = os.path.isdir(os.path.expanduser(model))
    name = os.path.basename(os.path.abspath(folder)) if is_folder else model
    return Setup(name, folder, target, weights_dtype, workload.batch, workload.length)


def make_prompts(tokenizer: Tokenizer, workload: Workload) -> list[list[int]]:
    """Prompts of equal length: BOS, then a passage that each row begins at another token."""
    ids = tokenizer.encode(PASSAGE, add_bos=False)
    rows = []
    for row in range(workload.batch):
        start = row % len(ids)
        turned = ids[start:] + ids[:start]
        repeated = turned * (workload.prompt_tokens // len(ids) + 1)
        rows.append([tokenizer.bos_id, *repeated[: workload.prompt_tokens - 1]])
    return rows


def run_decode(setup: Setup, workload: Workload, peers: Sequence[str]) -> Result:
    """Gemcut beside the peers of these names."""
    gemcut = Gemcut(setup)
    prompts = make_prompts(gemcut.engine.tokenizer, workload)
    return compare([gemcut, *load_peers(peers, setup)], prompts, workload, setup.dtype)


def compare(
    contestants: list[Contestant],
    prompts: list[list[int]],
    workload: Workload,
    dtype: torch.dtype,
) -> Result:
    """Verdicts on all peers, then rounds of those that passed; Ctrl-C keeps whole rounds."""
    result = Result(contestants, {})
    try:
        result.verdicts = judge(contestants, prompts, workload.new_tokens, dtype)
        calls = {
            one.name: partial(one.generate, prompts, workload.new_tokens)
            for one in contestants
            if one is contestants[0] or result.verdicts[one.name].passed
        }
        for round_ in take_turns(calls, workload.repeats):
            result.rounds.append(round_)
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def judge(
    contestants: list[Contestant], prompts: list[list[int]], new_tokens: int, dtype: torch.dtype
) -> dict[str, Verdict]:
    """What each peer's tokens are beside those of the first contestant.

    The first token where a row differs is weighed by transformers' logits, where it takes part;
    what follows it continues another text.  This is also everyone's warm-up.
    """
    gemcut, *peers = contestants
    own = gemcut.generate(prompts, new_tokens).token_ids
    arbiter = next((peer for peer in peers if isinstance(peer, Transformers)), None)
    verdicts = {}
    for peer in peers:
        try:
            theirs = peer.generate(prompts, new_tokens).token_ids
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            verdicts[peer.name] = Verdict("failed", f"{type(error).__name__}: {reason}")
        else:
            verdicts[peer.name] = _weigh(prompts, own, theirs, arbiter, NEAR_TIE[dtype])
    return verdicts


def _weigh(
    prompts: list[list[int]],
    own: list[list[int]],
    theirs: list[list[int]],
    arbiter: Transformers | None,
    near_tie: float,
) -> Verdict:
    if [len(row) for row in own] != [len(row) for row in theirs]:
        counts = sorted({len(row) for row in theirs})
        return Verdict("wrong", f"{len(theirs)} rows of {counts} tokens")
    near = Verdict("same", f"all {sum(map(len, own))} tokens")
    for row, (prompt, a, b) in enumerate(zip(prompts, own, theirs, strict=True)):
        if a == b:
            continue
        i = next(i for i in range(len(a)) if a[i] != b[i])
        detail = f"row {row}, new token {i}: {b[i]}, where gemcut has {a[i]}"
        if arbiter is None:
            return Verdict("wrong", detail)
        logits = arbiter.next_logits(prompt + a[:i])
        margin = (logits[a[i]] - logits[b[i]]).item()
        scale = logits.abs().max().item()
        favoured = "gemcut" if margin >= 0 else "the peer"
        detail += f"; transformers' logits favour {favoured} by {abs(margin):.1e} of {scale:.1f}"
        if abs(margin) > near_tie * scale:
            return Verdict("wrong", detail)
        near = Verdict("near tie", detail)
    return near


def print_decode(setup: Setup, workload: Workload, result: Result) -> None:
    """The result as a table; below it how each contestant was called, and what its tokens were."""
    print(
        f"decode {setup.model}: {workload.prompt_tokens} prompt tokens, {workload.new_tokens} new, "
        f"batch {workload.batch}, {_name(setup.dtype)} on {setup.device.type}, "
        f"threads {torch.get_num_threads()}, rounds {len(result.rounds)} of {workload.repeats}"
    )
    rows = []
    for name in result.timed:
        rate = Spread.of(result.tokens_per_second(name))
        first = Spread.of(result.first_token_ms(name))
        ratio = "" if name == result.timed[0] else _describe(Spread.of(result.ratios(name)))
        rows.append([name, _describe(rate, ".1f"), _describe(first), ratio])
    print_table(["median (range)", "tokens/s", "first token, ms", "gemcut's ratio"], rows)
    for one in result.contestants:
        print(f"{one.name} {one.version}: {one.settings}")
        if (verdict := result.verdicts.get(one.name)) is not None:
            print(f"    tokens: {verdict.status}, {verdict.detail}")
    if (fastest := result.fastest_peer) is not None:
        ratio = Spread.of(result.ratios(fastest))
        print(f"gemcut decodes {_describe(ratio)} times as fast as the fastest peer, {fastest}")
    if result.interrupted:
        print(f"interrupted: {len(result.rounds)} whole rounds are kept")


def _describe(spread: Spread, form: str = ".2f") -> str:
    return f"{spread.median:{form}} ({spread.low:{form}} - {spread.high:{form}})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report_decode(setup: Setup, workload: Workload, result: Result) -> dict[str, object]:
    """The result as JSON has it: a row for each contestant, with all its repetitions.

    A ratio is gemcut's tokens a second over the peer's in the same round; `headline` is that to
    the fastest peer.
    """
    fastest = result.fastest_peer
    headline = fastest and {"peer": fastest, **asdict(Spread.of(result.ratios(fastest)))}
    return {
        "benchmark": "decode",
        "model": setup.model,
        "dtype": _name(setup.dtype),
        **asdict(workload),
        **describe_machine(setup.device),
        "interrupted": result.interrupted,
        "headline": headline,
        "rows": [_row(one, result) for one in result.contestants],
    }


def _row(one: Contestant, result: Result) -> dict[str, object]:
    row: dict[str, object] = {
        "contestant": one.name,
        "version": one.version,
        "settings": one.settings,
    }
    if isinstance(one, Gemcut):
        row["weight_bytes_per_step"] = one.weight_bytes
    if (verdict := result.verdicts.get(one.name)) is not None:
        row["tokens"] = asdict(verdict)
    if one.name in result.timed:
        rates = result.tokens_per_second(one.name)
        row["tokens_per_second"] = {**asdict(Spread.of(rates)), "all": rates}
        first = result.first_token_ms(one.name)
        row["first_token_ms"] = {**asdict(Spread.of(first)), "all": first}
        if one.name != result.timed[0]:
            ratios = result.ratios(one.name)
            row["ratio"] = {**asdict(Spread.of(ratios)), "all": ratios}
    return row
