"""Train the bundled demo model: a Gemma 2 of a few million parameters, from plain text.

    python -P -m gemcut.tools.train_demo --text stories_train.txt --heldout stories_heldout.txt

The model is trained by transformers (an implementation that gemcut did not write), in bfloat16
autocast under torch.compile, and scored by gemcut: the bits per byte in the model card come from
`Engine.score`.  A run is seeded, shows its progress, writes its whole state every few hundred steps
and goes on from there when it is started again with the same arguments.

Text files hold paragraphs separated by blank lines.  A tenth of the training windows are chats:
neighbouring paragraphs of dialogue, dressed as turns of Gemma's chat template.
"""

import argparse
import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemcut.engine import Engine, SamplingParams

VOCAB_SIZE = 3072
CONTEXT = 512
CHAT_SHARE = 0.1
VALIDATION_SHARE = 0.01  # of the training text, from its end; the held-out file is not touched

# Everything that sets Gemma 2 apart is on: grouped heads, both softcaps, a score scale that is not
# head_dim**-0.5, windows much shorter than the context.  3.7 million parameters, 7.5 MB in bf16.
MODEL_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 96,
    "sliding_window": 64,
    "max_position_embeddings": CONTEXT,
}


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; a changed recipe is another run.

    600 steps with dropout 0.2 predict the held-out text better (1.62 bits per byte, not 1.77), but
    write duller: the model repeats itself where this one tells a story.
    """

    steps: int = 1400  # 11 epochs
    batch_size: int = 16  # windows of CONTEXT tokens
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    dropout: float = 0.1  # on what each sublayer adds to the residual stream
    seed: int = 0


def train_tokenizer(paragraphs: list[str], path: Path) -> sentencepiece.SentencePieceProcessor:
    """A byte-fallback BPE vocabulary of Gemma's kind at `path`: same special ids, same rules."""
    newlines = ["\n" * n for n in range(1, 5)]
    spaces = ["▁" * n for n in range(2, 9)]
    model = io.BytesIO()  # a file's name would be written into it
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", *newlines, *spaces, "\t"],
        max_sentence_length=1 << 20,
        num_threads=1,  # the same file on every machine
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


class Windows:
    """Random windows [batch_size, CONTEXT + 1] of token ids that begin where a paragraph begins."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, paragraphs: list[str]):
        pieces = [tokenizer.encode(p + "\n\n") for p in paragraphs]
        pieces[-1].append(tokenizer.eos_id())
        self.bos = tokenizer.bos_id()
        self.text = np.concatenate(pieces).astype(np.int64)
        self.text_starts = np.cumsum([0, *(len(p) for p in pieces[:-1])])
        # a text without dialogue has no chats
        chats = [[self.bos, *tokenizer.encode(chat)] for chat in dialogues(paragraphs)]
        self.chat = np.concatenate([np.empty(0, np.int64), *chats]).astype(np.int64)
        self.chat_starts = np.cumsum([0, *(len(c) for c in chats)])[:-1]

    def sample(self, rng: np.random.Generator, batch_size: int) -> torch.Tensor:
        rows = []
        for _ in range(batch_size):
            if rng.random() < CHAT_SHARE and len(self.chat):
                start = rng.choice(self.chat_starts)
                rows.append(np.take(self.chat, range(start, start + CONTEXT + 1), mode="wrap"))
            else:
                start = rng.choice(self.text_starts)
                row = np.take(self.text, range(start, start + CONTEXT), mode="wrap")
                rows.append(np.concatenate([[self.bos], row]))
        return torch.from_numpy(np.stack(rows))

    def in_order(self) -> Iterator[torch.Tensor]:
        """Every token of the text once, in windows [1, up to CONTEXT + 1] with a BOS each."""
        for start in range(0, len(self.text), CONTEXT):
            row = np.concatenate([[self.bos], self.text[start : start + CONTEXT]])
            yield torch.from_numpy(row)[None]


def dialogues(paragraphs: list[str]) -> Iterator[str]:
    """Runs of at least two spoken paragraphs, as chats without their BOS."""

    def spoken(paragraph: str) -> bool:
        return paragraph[:1] in "'\"" and len(paragraph) < 400

    run: list[str] = []
    for paragraph, following in pairwise([*paragraphs, ""]):
        if spoken(paragraph):
            run.append(paragraph)
        if run and (not spoken(following) or not spoken(paragraph) or len(run) == 6):
            run = run[: len(run) // 2 * 2]  # a chat ends with the model's turn
            roles = ["user", "model"] * (len(run) // 2)
            if run:
                yield "".join(
                    f"<start_of_turn>{role}\n{text.strip()}<end_of_turn>\n"
                    for role, text in zip(roles, run, strict=True)
                )
            run = []


def new_model(recipe: Recipe) -> Gemma2ForCausalLM:
    torch.manual_seed(recipe.seed)
    config = Gemma2Config(**MODEL_CONFIG)
    config._attn_implementation = "eager"  # the only one that knows the softcap
    model = Gemma2ForCausalLM(config)

    def drop(module, args, output):  # Gemma's own configuration knows attention dropout only
        return F.dropout(output, recipe.dropout, module.training)

    for name, module in model.named_modules():
        if name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            module.register_forward_hook(drop)
    return model


def new_optimizers(model: Gemma2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in parameters.items() if p.ndim != 2 or "embed" in name]
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(
            matrices, recipe.learning_rate, decay, adjust_lr_fn="match_rms_adamw", nesterov=True
        ),
        torch.optim.AdamW(others, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def cross_entropy(model, window: torch.Tensor) -> torch.Tensor:
    """Nats per token over window [B, T + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: Gemma2ForCausalLM, windows: Windows) -> float:
    model.eval()
    rows = list(windows.in_order())
    total = sum(cross_entropy(model, row).item() * (row.shape[1] - 1) for row in rows)
    model.train()
    return total / sum(row.shape[1] - 1 for row in rows)


def train(recipe: Recipe, paragraphs: list[str], out: Path, save_every: int) -> Gemma2ForCausalLM:
    """The trained model; its state is kept in `out` and picked up from there."""
    split = int(len(paragraphs) * (1 - VALIDATION_SHARE))
    text_hash = hashlib.sha256("\n\n".join(paragraphs).encode()).hexdigest()
    identity = {"recipe": asdict(recipe), "model": MODEL_CONFIG, "text": text_hash}

    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.pt"
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state is not None and json.loads(state["identity"]) != identity:
        raise SystemExit(f"{state_file} is of another text or recipe; give another --out")
    tokenizer = train_tokenizer(paragraphs, out / "tokenizer.model")
    training = Windows(tokenizer, paragraphs[:split])
    validation = Windows(tokenizer, paragraphs[split:])
    model = new_model(recipe).train()
    optimizers = new_optimizers(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    first_step = 0

    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        first_step = state["step"]

    compiled = torch.compile(model)
    progress = tqdm(range(first_step, recipe.steps), initial=first_step, total=recipe.steps)
    for step in progress:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            optimizer.zero_grad()
        loss = cross_entropy(compiled, training.sample(rng, recipe.batch_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")

        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            progress.write(f"step {step + 1}: validation {validation_loss(model, validation):.4f}")
            state = {
                "identity": json.dumps(identity),
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "rng": json.dumps(rng.bit_generator.state),
                "torch_rng": torch.get_rng_state(),
            }
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").rename(state_file)
    return model.eval()


def bits_per_byte(checkpoint: Path, text: str) -> float:
    """How many bits gemcut's `Engine.score` needs for a byte of a text of any length.

    Every token is scored once, given a BOS and between half a context and a whole one before it.
    """
    with Engine.from_pretrained(checkpoint, dtype="float32") as engine:
        ids = engine.tokenizer.encode(text, add_bos=False)
        room, stride = CONTEXT - 1, CONTEXT // 2
        starts = range(0, max(1, len(ids) - room + stride), stride)
        windows = [[engine.tokenizer.bos_id, *ids[start : start + room]] for start in starts]
        nats, scored = 0.0, 0
        for start, output in zip(starts, engine.score(windows), strict=True):
            nats -= math.fsum(output.logprobs[scored - start :])
            scored = start + len(output.logprobs)
        assert scored == len(ids)
    return nats / math.log(2) / len(text.encode())


CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [gemma2, gemcut]
---

# The gemcut demo model

A Gemma 2 of {parameters:,} parameters that writes a kind of late Victorian English.  It is there so
that every part of gemcut can be tried on any machine, without a download; it knows nothing.

| | |
|---|---|
| shape | {layers} layers, hidden {hidden}, MLP {mlp}, {q_heads} query and {kv_heads} KV heads of {head_dim}, vocabulary {vocab} |
| Gemma 2's traits | both softcaps, a window of {window} on every other layer, context {context}, tied embeddings |
| files | {megabytes:.2f} MB together; weights in bfloat16 |
| data | {data_bytes:,} bytes: {data} |
| vocabulary | SentencePiece BPE with byte fallback, trained on the same text; Gemma's special tokens and turn markers |
| training | {steps} steps of {batch} windows of {context} tokens, seed {seed}: Muon and AdamW, a tenth of the windows as chats |
| held-out bits per byte | **{bits:.3f}** on {heldout_bytes:,} bytes never trained on, by `Engine.score` in float32 |

"{prompt}", continued at temperature 0.7, top_p 0.9, seed 0:

> {sample}

Made by `python -P -m gemcut.tools.train_demo {arguments}` with torch {torch} and transformers {transformers}.
"""  # noqa: E501


def write_card(
    checkpoint: Path, recipe: Recipe, training: list[Path], heldout: Path, data: str
) -> None:
    """README.md of the model: what it is and what gemcut measured."""
    text = heldout.read_text(encoding="utf-8")
    names = " ".join(file.name for file in training)
    changed = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in asdict(recipe).items()
        if value != getattr(Recipe(), name)
    ]
    prompt = "It was"
    with Engine.from_pretrained(checkpoint) as engine:
        params = SamplingParams(temperature=0.7, top_p=0.9, seed=0, max_tokens=120)
        sample = prompt + engine.generate(prompt, params).text
        config = engine.config
    card = CARD.format(
        parameters=config.num_parameters(),
        layers=config.num_layers,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        q_heads=config.num_q_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        window=config.sliding_window,
        context=config.max_position_embeddings,
        megabytes=sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e6,
        data=data,
        arguments=" ".join([f"--text {names} --heldout {heldout.name}", *changed]),
        data_bytes=sum(file.stat().st_size for file in training),
        steps=recipe.steps,
        batch=recipe.batch_size,
        seed=recipe.seed,
        bits=bits_per_byte(checkpoint, text),
        heldout_bytes=len(text.encode()),
        prompt=prompt,
        sample=sample.strip().replace("\n", "\n> "),
        torch=version("torch"),
        transformers=version("transformers"),
    )
    (checkpoint / "README.md").write_text(card, encoding="utf-8")


def read_paragraphs(files: list[Path]) -> list[str]:
    texts = [file.read_text(encoding="utf-8") for file in files]
    return [p.strip("\n") for text in texts for p in text.split("\n\n") if p.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from plain text.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files to train on")
    parser.add_argument("--heldout", type=Path, required=True, help="file to judge it by")
    parser.add_argument("--data", default="plain text", help="what the card calls the text")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="state and result")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    for name, default in asdict(Recipe()).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default)
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})

    for file in (*args.text, args.heldout):
        if not file.is_file():
            parser.error(f"{file} is no file")
    if args.save_every < 1:
        parser.error("--save-every must be at least 1")

    model = train(recipe, read_paragraphs(args.text), args.out, args.save_every)
    checkpoint = args.out / "checkpoint"
    model.bfloat16().save_pretrained(checkpoint)
    shutil.copy(args.out / "tokenizer.model", checkpoint / "tokenizer.model")
    write_card(checkpoint, recipe, args.text, args.heldout, args.data)
    print((checkpoint / "README.md").read_text())


if __name__ == "__main__":
    main()
