"""Engine: what its calls give, against transformers and against themselves."""

import threading

import pytest
import torch
from engines import assert_serves, dictate, run_as_on_a_gpu, save_random_model

from gemcut.engine import Engine, SamplingParams

PROMPTS = ["Once upon a time", "It was", "The quick brown fox jumps over the lazy dog. " * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


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
