"""The openai package, unchanged, against the server: answers equal the engine's own."""

import openai
import pytest

from gemcut.engine import SamplingParams

PROMPT = "It was a bright cold morning"
MESSAGES = [{"role": "user", "content": "Who are you?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client, demo):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("demo", "gemcut")
    assert client.models.retrieve("demo") == model
    assert model.max_model_len == demo.max_seq_len
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; 'demo' is"):
        client.models.retrieve("gpt")


def test_a_completion(client, demo):
    answer = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=12)
    own = demo.generate(PROMPT, GREEDY)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (own.text, "length")
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == len(own.prompt_token_ids)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_repeated_prompt_is_counted_as_cached(client):
    usages = [
        client.completions.create(model="demo", prompt=f"{PROMPT} again", max_tokens=1).usage
        for _ in range(2)
    ]
    assert usages[1].prompt_tokens_details.cached_tokens == usages[1].prompt_tokens - 1


def test_prompts_and_choices_are_numbered_in_order(client, demo):
    prompts = ["It was", [2, 300, 301]]
    asked = {"temperature": 0, "max_tokens": 5, "n": 2}
    answers = [
        client.completions.create(model="demo", prompt=prompt, **asked) for prompt in prompts[:1]
    ]
    batch = client.completions.create(model="demo", prompt=["It was", "She"], **asked)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert batch.choices[0].text == batch.choices[1].text == answers[0].choices[0].text
    assert (
        batch.choices[3].text
        == demo.generate("She", SamplingParams(temperature=0, max_tokens=5)).text
    )
    ids = client.completions.create(model="demo", prompt=prompts[1], **asked)
    assert ids.usage.prompt_tokens == 3


def test_a_stream_is_the_answer_in_pieces(client, demo):
    asked = {"model": "demo", "prompt": ["It was", "She"], "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(**asked)
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {0: "length", 1: "length"}
    assert (usage.completion_tokens, usage.prompt_tokens) == (20, whole.usage.prompt_tokens)


def test_stop_and_seed(client):
    def text(**asked):
        answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, **asked)
        return answer.choices[0].text, answer.choices[0].finish_reason

    free, _ = text(seed=7)
    assert text(seed=7)[0] == free
    assert text(seed=8)[0] != free
    stop = free[5:9]
    assert text(seed=7, stop=[stop]) == (free[: free.index(stop)], "stop")


def test_a_chat(client, demo):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_completion_tokens=12
    )
    own = demo.chat(MESSAGES, GREEDY)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert (choice.message.content, choice.finish_reason) == (own.text, own.finish_reason)
    assert choice.message.tool_calls is None
    assert answer.usage.prompt_tokens == len(own.prompt_token_ids)


def test_a_chat_of_parts_with_a_system_message(client, demo):
    parts = [{"type": "text", "text": "Who are you?"}]
    for role in ("system", "developer"):
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": role, "content": "Be short."}, {"role": "user", "content": parts}],
            temperature=0,
            max_tokens=12,
        )
        messages = [{"role": "system", "content": "Be short."}, *MESSAGES]
        assert (
            answer.choices[0].message.content == demo.chat(messages, GREEDY, merge_system=True).text
        )


def test_a_streamed_chat(client):
    asked = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked, n=2)
    chunks = list(client.chat.completions.create(**asked, n=2, stream=True))
    for index in range(2):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in own[1:])
        text = "".join(choice.delta.content or "" for choice in own)
        assert text == whole.choices[index].message.content
        assert [choice.finish_reason for choice in own][-1] == whole.choices[index].finish_reason
        assert all(choice.finish_reason is None for choice in own[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_of_a_chat(client, demo):
    asked = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    own = demo.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=6, logprobs=2)).outputs[0]
    content = answer.choices[0].logprobs.content
    assert [one.token for one in content] == [demo.tokenizer.decode([i]) for i in own.token_ids]
    for one, token_id, entry in zip(content, own.token_ids, own.logprobs, strict=True):
        assert one.logprob == pytest.approx(entry[token_id].logprob, abs=1e-4)
        assert bytes(one.bytes).decode() == one.token
        assert one.top_logprobs[0].token == one.token
        assert len(one.top_logprobs) == 2
    streamed = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
    pieces = [c.choices[0].logprobs for c in streamed]
    assert [one.token for piece in pieces if piece for one in piece.content] == [
        one.token for one in content
    ]


def test_echo_gives_the_log_probabilities_of_a_prompt(client, demo):
    """As lm-eval asks for them: token ids in, the entry of each in the answer."""
    ids = demo.tokenizer.encode("It was a bright cold morning.")
    scores = demo.score(ids)
    for most, after in ((1, 1), (0, 0)):
        answer = client.completions.create(
            model="demo", prompt=ids, max_tokens=most, temperature=0, logprobs=1, echo=True
        )
        logprobs = answer.choices[0].logprobs
        assert len(logprobs.tokens) == len(ids) + after
        assert logprobs.token_logprobs[0] is None
        own = logprobs.token_logprobs[1 : len(ids)]
        assert own == pytest.approx(scores.logprobs, abs=1e-4)
        assert "".join(logprobs.tokens[1 : len(ids)]) == "It was a bright cold morning."
        assert answer.choices[0].text.startswith("It was a bright cold morning.")
        place = logprobs.tokens.index(" cold")
        assert answer.choices[0].text[logprobs.text_offset[place] :].startswith(" cold")


def test_a_response(client, demo):
    answer = client.responses.create(
        model="demo", input="Who are you?", temperature=0, max_output_tokens=4
    )
    own = demo.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=4))
    assert answer.output_text == own.text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 4
    whole = client.responses.create(model="demo", input="Who are you?", temperature=0)
    assert (whole.status, whole.incomplete_details) == ("completed", None)
    messages = [{"role": "system", "content": "Be short."}, *MESSAGES]
    answer = client.responses.create(
        model="demo",
        instructions="Be short.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Who are you?"}]}],
        temperature=0,
        max_output_tokens=12,
    )
    assert answer.output_text == demo.chat(messages, GREEDY, merge_system=True).text


def test_a_streamed_response(client):
    asked = {"model": "demo", "input": "Who are you?", "temperature": 0, "max_output_tokens": 4}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    del asked["max_output_tokens"]
    with client.responses.stream(**asked) as stream:
        ended = stream.get_final_response()
    assert (ended.status, ended.output_text) == (
        "completed",
        client.responses.create(**asked).output_text,
    )


def test_a_response_takes_the_settings_of_a_chat(client):
    """Beyond OpenAI's, those that vLLM takes there."""
    settings = {"seed": 5, "top_k": 40, "stop": ["e"], "frequency_penalty": 0.5, "min_p": 0.01}
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=20, extra_body=settings
    )
    response = client.responses.create(
        model="demo", input=MESSAGES, max_output_tokens=20, extra_body=settings
    )
    assert response.output_text == chat.choices[0].message.content != ""
    form = {"structured_outputs": {"choice": ["yes"]}}
    answer = client.responses.create(model="demo", input="Is it?", extra_body=form)
    assert answer.output_text == "yes"


@pytest.mark.parametrize("given", [{}, {"parameters": None, "strict": None}], ids=["left", "null"])
@pytest.mark.parametrize("choice", [{"type": "function"}, {}], ids=["responses", "chats"])
def test_a_response_repeats_a_tool_that_takes_nothing(client, given, choice):
    tool = {"type": "function", "name": "now", **given}
    choice = {**choice, "name": "now"} if choice else {"function": {"name": "now"}}
    answer = client.responses.create(model="demo", input="x", tools=[tool], tool_choice=choice)
    (call,) = answer.output
    assert (call.type, call.name, call.arguments) == ("function_call", "now", "{}")
    assert answer.tools[0].to_dict() == tool | {"parameters": None, "strict": None}
    assert answer.tool_choice.to_dict() == {"type": "function", "name": "now"}


def test_the_async_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            stream = await client.chat.completions.create(
                model="demo", messages=MESSAGES, temperature=0, max_tokens=12, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    import asyncio

    assert asyncio.run(ask()) == server.engine.chat(MESSAGES, GREEDY).text
