"""Texts, chats and a chat template on which gemcut and transformers must agree."""

import re

from vocabulary import plain_texts, texts

# as published with gemma-2b-it and gemma-2-2b-it
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PAIR = ("The children walked", "in 1984")
MANY = ["The children", "", "a <eos> walked to the river"]

# user-defined pieces in runs of spaces: test_codec.py has the cases
transformers_differs = re.compile(" {5}|▁").search
same = texts.filter(lambda text: not transformers_differs(text))
contents = plain_texts.filter(lambda text: not transformers_differs(text))


def turns(*contents: str) -> list[dict]:
    roles = ("user", "assistant", "user", "model")
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
