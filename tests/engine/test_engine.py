"""Engine: what callers get, against transformers and against itself."""

import threading
from dataclasses import replace

import pytest
import torch
from engines import assert_serves, dictate, run_as_on_a_gpu, save_random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from twins import poison

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution.logprobs import LOGITS_ROWS
from gemcut.kernels import cpu

PROMPTS = ["Once upon a time", "It was", "The quick brown fox jumps over the lazy dog. " * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=["read-at-once", "read-late"])
def engine(folder, request):
    with Engine.from_pretrained(
        folder, max_batch_size=3, prefill_chunk=8, dtype="float32"
    ) as engine:
        if request.param == "read-late":
            run_as_on_a_gpu(engine)
        poison(engine.cache)
        yield engine


def test_greedy_text_is_that_of_transformers(engine, theirs, tokenizer):
    for prompt in PROMPTS:
        output = engine.generate(prompt, GREEDY)
        ids = torch.tensor([output.prompt_token_ids])
        expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert output.token_ids == expected[0, ids.shape[1] :].tolist()
        assert output.prompt_token_ids == tokenizer.encode(prompt)
        assert output.text == tokenizer.decode(output.token_ids)
        assert output.finish_reason == ("length" if len(output.token_ids) == 20 else "stop")


def test_a_list_gives_a_list_in_order_whatever_the_slots(engine):
    prompts = [f"{i} {PROMPTS[i % 3]}" for i in range(8)]
    alone = [engine.generate(prompt, GREEDY) for prompt in prompts]
    together = engine.generate(prompts, GREEDY)
    assert [o.prompt for o in together] == prompts
    assert [o.text for o in together] == [o.text for o in alone]
    assert len({o.request_id for o in together + alone}) == 16


def test_ids_and_strings_are_prompts(engine, tokenizer):
    ids = tokenizer.encode(PROMPTS[0])
    output = engine.generate(ids, GREEDY)
    assert output.text == engine.generate(PROMPTS[0], GREEDY).text
    assert output.prompt is None
    mixed = engine.generate([ids, PROMPTS[0], torch.tensor(ids).numpy().tolist()], GREEDY)
    assert len({o.text for o in mixed}) == 1


def test_each_prompt_of_a_list_may_have_its_own_params(engine):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 5)]
    outputs = engine.generate(PROMPTS[:2], params)
    assert [len(o.token_ids) for o in outputs] == [2, 5]


@pytest.mark.parametrize("late", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("chunk", [512, 8], ids=["one-chunk", "five-chunks"])
def test_dynamic_rope_goes_on_past_the_trained_positions(tmp_path, tokenizer_file, chunk, late):
    """A prompt of 40 tokens, where 32 were trained: frequencies are those of its whole length."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    short = {"rope_parameters": dynamic, "max_position_embeddings": 32}
    theirs = save_random_model(tmp_path, tokenizer_file, "gemma", **short)
    theirs.generation_config.eos_token_id = None
    with Engine.from_pretrained(tmp_path, dtype="float32", prefill_chunk=chunk) as engine:
        assert engine.max_seq_len == 96
        if late:
            run_as_on_a_gpu(engine)
        prompt = [2, *range(30, 69)]
        output = engine.generate(prompt, SamplingParams(temperature=0, ignore_eos=True))
    expected = theirs.generate(
        torch.tensor([prompt]), max_length=96, do_sample=False, pad_token_id=0
    )
    assert prompt + output.token_ids == expected[0].tolist()


# Streaming

TEXTS = {
    "ascii": "plain words, and 12 numbers",
    "emoji": "family 👩‍👩‍👧‍👦 flags 🇩🇪🏴‍☠️ skin 👍🏽",
    "combining": "e\u0301a\u0308 Z\u0351\u036b\u0343 क्षि",
    "bytes": "汉字 ﷽ 𝔘𝔫𝔦 \x00 \u200b",
    "replacement": "a real \ufffd character",
}


@pytest.mark.parametrize("name", TEXTS)
def test_stream_joins_to_the_text_of_generate(engine, tokenizer, name):
    ids = tokenizer.encode(TEXTS[name], add_bos=False)
    params = SamplingParams(max_tokens=len(ids), logits_processors=dictate(ids))
    deltas = list(engine.stream("x", params))
    assert "".join(delta.text for delta in deltas) == engine.generate("x", params).text
    assert "".join(delta.text for delta in deltas) == TEXTS[name]
    assert [id_ for delta in deltas for id_ in delta.token_ids] == ids
    if name != "replacement":
        assert not any("\ufffd" in delta.text for delta in deltas)
    assert [d.finish_reason for d in deltas] == [None] * (len(ids) - 1) + ["length"]


@settings(max_examples=40)
@given(ids=st.lists(st.integers(4, 500), min_size=1, max_size=30))
def test_stream_of_any_tokens_joins_to_the_text_of_generate(engine, tokenizer, ids):
    """Broken UTF-8 included."""
    params = SamplingParams(max_tokens=len(ids), logits_processors=dictate(ids))
    streamed = "".join(delta.text for delta in engine.stream("x", params))
    assert streamed == engine.generate("x", params).text == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", ["STOP", ["Q", "STOP HERE", "TOP"], "👩‍👧", ["S", "P"]], ids=str)
def test_stop_strings_that_span_tokens_are_never_shown_in_part(engine, tokenizer, stop):
    text = "before S ST STO 👩 STOP HERE 👩‍👧 after"
    stops = [stop] if isinstance(stop, str) else stop
    # cut at the place where the first of them is complete
    shortest = min((text.index(s) + len(s), text.index(s)) for s in stops if s in text)
    expected = text[: shortest[1]]
    ids = tokenizer.encode(text, add_bos=False)
    params = SamplingParams(stop=stop, logits_processors=dictate(ids))
    shown = ""
    for delta in engine.stream("x", params):
        shown += delta.text
        assert expected.startswith(shown)
    assert shown == expected
    output = engine.generate("x", params).outputs[0]
    assert (output.text, output.finish_reason) == (expected, "stop")
    assert output.stop_reason in stops


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(engine, tokenizer):
    ids = tokenizer.encode("almost STO", add_bos=False)
    params = SamplingParams(stop="STOP", max_tokens=len(ids), logits_processors=dictate(ids))
    assert engine.generate("x", params).text == "almost STO"


# How a sequence ends


def test_eos_ends_the_text_unless_ignored(engine, tokenizer):
    ids = [*tokenizer.encode("end", add_bos=False), tokenizer.eos_id]
    ids += tokenizer.encode("more", add_bos=False)
    output = engine.generate("x", SamplingParams(logits_processors=dictate(ids))).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("end", "stop", None)
    assert output.token_ids[-1] == tokenizer.eos_id
    params = SamplingParams(ignore_eos=True, max_tokens=len(ids), logits_processors=dictate(ids))
    output = engine.generate("x", params).outputs[0]
    assert (output.text, output.finish_reason) == ("endmore", "length")
    with_specials = replace(params, skip_special_tokens=False)
    assert engine.generate("x", with_specials).text == "end<eos>more"


def test_stop_token_ids(engine, tokenizer):
    ids = tokenizer.encode("one two three", add_bos=False)
    params = SamplingParams(stop_token_ids=[ids[2]], logits_processors=dictate(ids))
    output = engine.generate("x", params).outputs[0]
    assert output.token_ids == ids[:3]
    assert output.text == tokenizer.decode(ids[:2])
    assert (output.finish_reason, output.stop_reason) == ("stop", ids[2])


def test_generation_runs_to_the_end_of_the_slot(engine, tokenizer):
    prompt = tokenizer.encode(PROMPTS[2])
    output = engine.generate(prompt, SamplingParams(ignore_eos=True, seed=0))
    assert len(prompt) + len(output.token_ids) == engine.max_seq_len == 128
    assert output.finish_reason == "length"


def test_min_tokens_puts_off_eos_and_stop_tokens(engine, tokenizer):
    likely = {tokenizer.eos_id: 100.0, 50: 90.0}
    params = {"logit_bias": likely, "stop_token_ids": [50], "max_tokens": 9, "temperature": 0}
    assert len(engine.generate("x", SamplingParams(**params)).token_ids) == 1
    output = engine.generate("x", SamplingParams(min_tokens=6, **params))
    assert len(output.token_ids) == 7
    assert set(output.token_ids[:6]).isdisjoint(likely)


# Sampling settings


def test_logit_bias_forces_and_bans(engine):
    best = engine.generate(PROMPTS[0], GREEDY).token_ids[0]
    banned = SamplingParams(temperature=0, max_tokens=20, logit_bias={best: -float("inf")})
    assert best not in engine.generate(PROMPTS[0], banned).token_ids
    forced = SamplingParams(max_tokens=3, logit_bias={77: 100.0})
    assert engine.generate(PROMPTS[0], forced).token_ids == [77] * 3


def test_penalties_spread_tokens(engine):
    fixed = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    plain = engine.generate("x", SamplingParams(**fixed)).token_ids
    for penalty in (
        {"repetition_penalty": 5.0},
        {"presence_penalty": 50.0},
        {"frequency_penalty": 50.0},
    ):
        spread = engine.generate("x", SamplingParams(**fixed, **penalty)).token_ids
        assert len(set(spread)) > len(set(plain))
    absolute = SamplingParams(**fixed, presence_penalty=1e6)
    assert len(set(engine.generate("x", absolute).token_ids)) == 40


def test_a_seed_gives_the_same_text_whatever_else_runs(engine):
    params = SamplingParams(seed=7, max_tokens=30, top_p=0.95, ignore_eos=True)
    alone = engine.generate(PROMPTS[0], params).token_ids
    assert engine.generate(PROMPTS[0], params).token_ids == alone
    others = [
        SamplingParams(max_tokens=25, top_k=5, repetition_penalty=1.2),
        params,
        SamplingParams(max_tokens=11, temperature=0),
        SamplingParams(max_tokens=31, logit_bias={5: 1.0}, min_tokens=3),
    ]
    together = engine.generate([PROMPTS[1], PROMPTS[0], PROMPTS[2], "x"], others)
    assert together[1].token_ids == alone
    unseeded = [engine.generate(PROMPTS[0], SamplingParams(max_tokens=30)) for _ in range(2)]
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_n_completions_draw_with_successive_seeds(engine):
    params = SamplingParams(n=5, seed=3, max_tokens=12, ignore_eos=True)
    output = engine.generate(PROMPTS[0], params)
    assert [c.index for c in output.outputs] == list(range(5))
    for index, completion in enumerate(output.outputs):
        single = SamplingParams(seed=3 + index, max_tokens=12, ignore_eos=True)
        assert engine.generate(PROMPTS[0], single).token_ids == completion.token_ids
    deltas = list(engine.stream(PROMPTS[0], params))
    for completion in output.outputs:
        mine = [delta.text for delta in deltas if delta.index == completion.index]
        assert "".join(mine) == completion.text


def test_greedy_ignores_the_seed(engine):
    outputs = [
        engine.generate("x", SamplingParams(temperature=0, seed=s, max_tokens=9)) for s in (1, 2)
    ]
    assert outputs[0].token_ids == outputs[1].token_ids


# Log-probabilities


def their_logprobs(theirs, ids: list[int]) -> torch.Tensor:
    """Transformers' log P of every token given those before it: [T - 1, V]."""
    with torch.inference_mode():
        return theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def test_score_is_transformers_log_probabilities(engine, theirs):
    for text, scored in zip(PROMPTS, engine.score(PROMPTS), strict=True):
        expected = their_logprobs(theirs, scored.token_ids)
        expected = expected.gather(-1, torch.tensor(scored.token_ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.logprobs), expected, rtol=1e-4, atol=1e-4)
        assert scored.perplexity == pytest.approx((-expected.mean()).exp().item(), rel=1e-4)
        assert scored.prompt == text
    assert engine.score(PROMPTS[0]).token_ids == engine.tokenizer.encode(PROMPTS[0])


def test_score_never_holds_the_logits_of_a_long_text(folder, monkeypatch):
    rows = []
    lm_head = cpu.lm_head

    def spy(x, weight, softcap):
        rows.append(x.shape[0])
        return lm_head(x, weight, softcap)

    monkeypatch.setattr(cpu, "lm_head", spy)
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        engine.score([[2] + [9] * 127])
    assert sum(rows) == 127
    assert max(rows) <= LOGITS_ROWS


def test_logprobs_are_those_of_transformers(engine, theirs):
    params = SamplingParams(
        max_tokens=10, seed=1, temperature=1.3, logprobs=3, prompt_logprobs=2, logit_bias={9: 2.0}
    )
    output = engine.generate(PROMPTS[0], params)
    ids = output.prompt_token_ids + output.token_ids
    expected = their_logprobs(theirs, ids)
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert output.prompt_logprobs[0] is None
    assert len(entries) == len(ids) - 1
    total = 0.0
    for position, (entry, token_id) in enumerate(zip(entries, ids[1:], strict=True)):
        row = expected[position]
        top = 2 if position < len(output.prompt_token_ids) - 1 else 3
        assert set(entry) == set(row.topk(top).indices.tolist()) | {token_id}
        for id_, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[id_].item(), rel=1e-4, abs=1e-4)
            assert logprob.rank == 1 + (row > row[id_]).sum()
            shown = engine.tokenizer.decode([id_], skip_special_tokens=False)
            assert logprob.decoded_token == shown
        if top == 3:
            total += entry[token_id].logprob
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)
    streamed = [entry for delta in engine.stream(PROMPTS[0], params) for entry in delta.logprobs]
    assert streamed == output.outputs[0].logprobs


def test_logprobs_are_absent_unless_asked_for(engine):
    output = engine.generate("x", GREEDY)
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


# Chat


def test_chat_renders_turns_and_ends_with_the_turn(engine, tokenizer):
    answer = tokenizer.encode("I am.", add_bos=False)
    params = SamplingParams(logits_processors=dictate([*answer, tokenizer.end_of_turn_id]))
    messages = [{"role": "user", "content": "Who are <start_of_turn>you?"}]
    output = engine.chat(messages, params)
    assert (output.text, output.finish_reason) == ("I am.", "stop")
    assert output.prompt_token_ids.count(tokenizer.start_of_turn_id) == 2
    assert output.prompt_token_ids.count(tokenizer.bos_id) == 1
    assert "".join(d.text for d in engine.chat(messages, params, stream=True)) == "I am."


def test_end_of_turn_does_not_end_a_plain_generation(engine, tokenizer):
    ids = [tokenizer.end_of_turn_id, *tokenizer.encode("on", add_bos=False)]
    params = SamplingParams(max_tokens=len(ids), logits_processors=dictate(ids))
    assert engine.generate("x", params).text == "on"


def test_a_rendered_template_gets_no_second_bos(engine, tokenizer):
    rendered = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    by_hand = engine.generate(rendered, GREEDY)
    chat = engine.chat([{"role": "user", "content": "Hi"}], GREEDY)
    assert by_hand.prompt_token_ids == chat.prompt_token_ids


# Many callers


def test_streams_take_turns_and_a_paused_one_delays_nobody(engine):
    paused = engine.stream(PROMPTS[0], SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
    first = next(paused)
    assert len(engine.generate(PROMPTS[1], GREEDY).token_ids) > 0
    rest = [first, *paused]
    alone = engine.generate(PROMPTS[0], SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
    assert "".join(delta.text for delta in rest) == alone.text


def test_an_abandoned_stream_frees_its_slot(engine):
    for _ in range(10):  # three slots
        stream = engine.stream("x", SamplingParams(ignore_eos=True))
        next(stream)
        del stream
    assert_serves(engine)
    closed = engine.stream("x", SamplingParams(ignore_eos=True))
    next(closed)
    closed.close()
    assert_serves(engine)


def test_a_stream_that_nobody_reads_takes_no_slot(engine):
    unread = [engine.stream("x", SamplingParams(ignore_eos=True)) for _ in range(5)]
    assert_serves(engine)
    del unread


def test_a_stream_may_be_abandoned_in_the_midst_of_a_step(engine):
    """As the garbage collector does: the step holds the lock that the cancellation wants."""
    abandoned = [engine.stream("x", SamplingParams(ignore_eos=True))]
    next(abandoned[0])

    def forget(generated, logits):
        abandoned.clear()
        return logits

    params = SamplingParams(max_tokens=3, ignore_eos=True, logits_processors=[forget])
    caller = threading.Thread(target=engine.generate, args=("x", params), daemon=True)
    caller.start()
    caller.join(timeout=30)
    assert not caller.is_alive()
    assert abandoned == []
    assert_serves(engine)


def test_threads_share_the_engine(engine):
    wanted = {p: engine.generate(p, GREEDY).text for p in PROMPTS}
    got, errors = [], []

    def call(prompt: str) -> None:
        try:
            got.append((prompt, "".join(d.text for d in engine.stream(prompt, GREEDY))))
            got.append((prompt, engine.generate(prompt, GREEDY).text))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(PROMPTS[i % 3],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    assert len(got) == 16
    assert all(text == wanted[prompt] for prompt, text in got)
    assert_serves(engine)


def test_a_queue_of_short_requests_does_not_stall_a_running_one(engine, monkeypatch):
    """Between two of its tokens a stream waits for one chunk of a prompt at most."""
    runner, steps = engine._loop.runner, []
    prefill, decode = runner.start_prefill, runner.start_decode
    for name, mark, start in (("start_prefill", "p", prefill), ("start_decode", "d", decode)):
        noted = lambda *args, m=mark, s=start: (steps.append(m), s(*args))[1]  # noqa: E731
        monkeypatch.setattr(runner, name, noted)
    stream = engine.stream("x", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    engine.score([PROMPTS[1]] * 10)  # each needs a slot for one step
    assert len(list(stream)) == 99
    order = "".join(steps)
    assert order.count("p") == 11
    assert "pp" not in order
    assert "pdpdpdpd" in order  # nobody starves either
    assert_serves(engine)


def test_metrics_are_filled(engine):
    output = engine.generate("x", SamplingParams(n=2, max_tokens=10, ignore_eos=True))
    metrics = output.metrics
    assert metrics.prompt_tokens == len(output.prompt_token_ids)
    assert metrics.generated_tokens == 20
    assert metrics.reused_prefix_tokens == metrics.prompt_tokens - 1  # "x" was often asked here
    assert metrics.time_to_first_token > 0
    assert 0 < metrics.time_between_tokens < 1
    assert metrics.tokens_per_second > 0


def test_progress_bar_on_request(engine, capsys):
    engine.generate(PROMPTS, GREEDY, use_tqdm=True)
    assert "3/3" in capsys.readouterr().err
    engine.generate(PROMPTS, GREEDY)  # no terminal here
    assert capsys.readouterr().err == ""
