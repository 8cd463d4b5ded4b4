"""The check of generated tokens: it finds a wrong token, and passes near ties."""

from dataclasses import replace

import pytest
import torch
from random_models import MODEL_TYPES, random_model
from twins import gemcut_twin, greedy, random_ids

from gemcut.bench.engines import token_check
from gemcut.bench.engines.random_model import published_config, random_weights
from gemcut.bench.engines.token_check import Answer, TokenCheck, exact_model, plain_model
from gemcut.bench.ops.op_check import rounded_weight
from gemcut.engine.execution.model import Gemma
from gemcut.kernels import reference

NEW_TOKENS = 24  # past the window of 5, again and again
VOCAB_SIZE = 600


@pytest.fixture(scope="module")
def model():
    """A small Gemma 2 that repeats itself less than most; int4 takes columns by 128."""
    config = replace(
        published_config("gemma-2-2b", 4),
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        head_dim=32,
        query_pre_attn_scalar=8,
        sliding_window=5,
        attn_softcap=2.0,
        attention_bias=True,
    )
    weights = random_weights(config, device=torch.device("cpu"), dtype=torch.float32)
    return Gemma(config, weights, reference)


@pytest.fixture(scope="module")
def prompts():
    return [random_ids(12, VOCAB_SIZE, seed).tolist() for seed in range(2)]


@pytest.fixture(scope="module")
def right(model, prompts):
    return answer(model, prompts)


def answer(model, prompts, new_tokens=NEW_TOKENS):
    return greedy(model, [torch.tensor(ids) for ids in prompts], new_tokens).tolist()


def check_one(model, prompts, rows, own=None, weight_bits=None):
    check = TokenCheck(model, prompts, NEW_TOKENS)
    return check.findings({"one": Answer(rows, weight_bits)}, own)["one"]


def changed(rows, row, token, value):
    rows = [list(one) for one in rows]
    rows[row][token] = value
    return rows


def in_bf16(model):
    """The same weights, rounded."""
    layers = [
        replace(layer, **{k: v.bfloat16() for k, v in vars(layer).items() if v is not None})
        for layer in model.weights.layers
    ]
    table = model.weights.embedding.bfloat16()
    norm = model.weights.norm.bfloat16()
    weights = replace(model.weights, embedding=table, lm_head=table, layers=layers, norm=norm)
    return Gemma(model.config, weights, reference)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_itself_is_right(model_type, dtype):
    model = gemcut_twin(random_model(model_type))
    model = in_bf16(model) if dtype == "bfloat16" else model
    prompts = [random_ids(12, 97).tolist(), [2]]  # one of a single token
    rows = [answer(model, [ids])[0] for ids in prompts]
    finding = check_one(model, prompts, rows, own=rows)
    assert finding.status == "ok", finding.detail
    assert "allowed" in finding.detail


@pytest.mark.parametrize(("row", "token"), [(0, 0), (1, 7), (1, NEW_TOKENS - 1)])
def test_a_planted_token_is_wrong_and_named(model, prompts, right, row, token):
    planted = changed(right, row, token, right[row][token] ^ 1)
    finding = check_one(model, prompts, planted, own=right)
    assert finding.status == "wrong"
    assert f"row {row}, token {token}: {planted[row][token]} lies" in finding.detail


def test_after_a_near_tie_the_text_is_checked_as_it_went_on(model, prompts, right):
    """Two rows of the table differ by so little that no float32 model can tell them apart."""
    row, token = 1, 9
    first = right[row][token]
    used = {i for ids in right + prompts for i in ids}
    # above `first`, which then wins where their logits are equal
    other = next(i for i in reversed(range(first, VOCAB_SIZE)) if i not in used)
    table = model.weights.embedding.clone()
    table[other] = table[first] * (1 - 1e-7)
    twin = Gemma(model.config, replace(model.weights, embedding=table, lm_head=table), model.ops)
    own = answer(twin, prompts)
    assert own[row][token] == first
    head = [*own[row][:token], other]
    rest = answer(twin, [prompts[row] + head], NEW_TOKENS - len(head))[0]
    rows = [own[0], head + rest]
    finding = check_one(twin, prompts, rows, own=own)
    assert finding.status == "ok", finding.detail
    assert f"first differs at row {row}, token {token}" in finding.detail
    # but a token that is wrong after it is found
    planted = changed(rows, row, token + 3, rows[row][token + 3] ^ 1)
    assert f"row {row}, token {token + 3}" in check_one(twin, prompts, planted).detail


def test_agreement_is_counted(model, prompts, right):
    finding = check_one(model, prompts, [list(row) for row in right], own=right)
    assert finding.detail.endswith("; all same as gemcut")
    assert "gemcut" not in check_one(model, prompts, right, own=right).detail
    other = changed(right, 0, 5, right[0][5] ^ 1)
    finding = check_one(model, prompts, right, own=other)
    assert finding.detail.endswith("47 of 48 same as gemcut, first differs at row 0, token 5")


MISTAKES = {
    "window one longer": lambda c: replace(c, sliding_window=c.sliding_window + 1),
    "window one shorter": lambda c: replace(c, sliding_window=c.sliding_window - 1),
    "a layer global that is local": lambda c: replace(
        c, layer_types=("full_attention", *c.layer_types[1:])
    ),
    "another softcap": lambda c: replace(c, attn_softcap=2 * c.attn_softcap),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_config_is_wrong(model, prompts, mistake):
    other = Gemma(MISTAKES[mistake](model.config), model.weights, reference)
    assert check_one(model, prompts, answer(other, prompts)).status == "wrong"


@pytest.mark.parametrize("field", ["qkv_bias", "o_bias", "post_mlp_norm", "down"])
def test_a_weight_that_is_not_the_models_is_wrong(model, prompts, field):
    layers = list(model.weights.layers)
    tensor = getattr(layers[1], field)
    layers[1] = replace(layers[1], **{field: torch.zeros_like(tensor)})
    other = Gemma(model.config, replace(model.weights, layers=layers), reference)
    assert check_one(model, prompts, answer(other, prompts)).status == "wrong"


@pytest.mark.parametrize(
    ("rows", "detail"),
    [
        pytest.param([[5] * NEW_TOKENS], "1 rows of [24] tokens", id="a-row-missing"),
        pytest.param([[5] * 23, [5] * 24], "2 rows of [23, 24] tokens", id="too-few"),
        pytest.param([[5] * 24, [600] * 24], "token id 600 is outside 0..599", id="no-such-id"),
        pytest.param([[-1] * 24, [5] * 24], "token id -1 is outside 0..599", id="negative"),
    ],
)
def test_an_answer_that_cannot_be_read_is_wrong(model, prompts, rows, detail):
    finding = check_one(model, prompts, rows)
    assert finding.status == "wrong"
    assert detail in finding.detail


def test_logits_that_are_not_numbers_are_wrong(model, prompts, right):
    norm = torch.full_like(model.weights.norm, torch.nan)
    broken = Gemma(model.config, replace(model.weights, norm=norm), reference)
    assert check_one(broken, prompts, right).status == "wrong"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_have_their_own_budget(model, prompts, right, bits):
    rounded = plain_model(model, bits)
    head = rounded_weight(model.weights.lm_head, bits)
    rounded.weights = replace(rounded.weights, lm_head=head)
    quantised = answer(rounded, prompts)
    checked = check_one(model, prompts, quantised, own=right, weight_bits=bits)
    assert checked.status == "ok", checked.detail
    assert f"allowed for {bits}-bit weights" in checked.detail
    # int4 chooses other tokens, which full weights would not explain
    if bits == 4:
        assert quantised != right
        assert check_one(model, prompts, quantised).status == "wrong"
    noise = torch.randint(VOCAB_SIZE, (2, NEW_TOKENS), generator=torch.Generator().manual_seed(0))
    assert check_one(model, prompts, noise.tolist(), weight_bits=bits).status == "wrong"


def test_a_text_is_checked_once(model, prompts, right, monkeypatch):
    checked = []
    compare = TokenCheck._compare

    def counted(self, exact, plain, text, bits):
        checked.append((text, bits))
        return compare(self, exact, plain, text, bits)

    monkeypatch.setattr(TokenCheck, "_compare", counted)
    check = TokenCheck(model, prompts, NEW_TOKENS)
    planted = changed(right, 1, 3, 77)
    answers = {"a": Answer(right), "b": Answer([list(r) for r in right]), "c": Answer(planted)}
    check.findings(answers, right)
    assert checked == [(tuple(right[0]), None), (tuple(right[1]), None), (tuple(planted[1]), None)]
    check.findings(answers, right)
    assert len(checked) == 3


def test_the_head_is_read_in_pieces(model, prompts, right, monkeypatch):
    whole = check_one(model, prompts, right).detail
    planted = changed(right, 0, 2, 599)
    wrong = check_one(model, prompts, planted).detail
    monkeypatch.setattr(token_check, "HEAD_ROWS", 128)
    assert check_one(model, prompts, right).detail == whole
    assert check_one(model, prompts, planted).detail == wrong


def test_one_weight_at_a_time_is_held_in_higher_precision(model):
    exact = exact_model(model)
    assert exact.weights.layers[0].down.dtype == torch.float64
    assert exact.weights.layers[0].down is not exact.weights.layers[0].down
    assert exact.weights.embedding is model.weights.embedding
    assert exact_model(in_bf16(model)).weights.layers[0].down.dtype == torch.float32
    assert model.weights.layers[0].down.dtype == torch.float32


def test_exact_means_exact(model):
    """The check's own logits are those of a float64 model, within float64's precision."""
    ids = random_ids(20, VOCAB_SIZE)
    layers = [
        replace(layer, **{k: v.double() for k, v in vars(layer).items() if v is not None})
        for layer in model.weights.layers
    ]
    table = model.weights.embedding.double()
    norm = model.weights.norm.double()
    weights = replace(model.weights, embedding=table, lm_head=table, layers=layers, norm=norm)
    double = Gemma(model.config, weights, reference)
    double.embedding_scale = model.embedding_scale
    states = []
    for one in (exact_model(model), double):
        reading = token_check.Reading(one, ids[:12].tolist(), 8)
        states.append(reading.states(ids[12:].tolist()))
    assert states[0].dtype == torch.float64
    assert (states[0] - states[1]).abs().max() <= 1e-12 * states[1].abs().max()


def test_a_text_after_the_same_prompt_does_not_disturb_the_next():
    """Local layers are rings: what one text overwrote, the prompt's last token must not need."""
    model = gemcut_twin(random_model("gemma2", max_position_embeddings=256))
    prompt = random_ids(30, 97).tolist()
    texts = [random_ids(64, 97, seed).tolist() for seed in (1, 2)]
    reading = token_check.Reading(exact_model(model), prompt, 64)
    first = reading.states(texts[0])
    reading.states(texts[1])
    assert torch.equal(reading.states(texts[0]), first)
