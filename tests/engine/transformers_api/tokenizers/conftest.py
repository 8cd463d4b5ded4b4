"""GemmaTokenizer and transformers' own tokenizer on the same pieces."""

import pytest
from tokenizer_texts import TEMPLATE
from vocabulary import TURN_MARKERS, hugging_face_twin

from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer


@pytest.fixture(scope="module")
def theirs(tokenizer_file):
    """A separate twin: these tests alter its settings."""
    twin = hugging_face_twin(tokenizer_file)
    twin.extra_special_tokens = list(TURN_MARKERS)
    twin.add_bos_token = True
    twin.chat_template = TEMPLATE
    return twin


@pytest.fixture
def ours(tokenizer_file) -> GemmaTokenizer:
    return GemmaTokenizer(tokenizer_file, mask_token=None)


@pytest.fixture(scope="module")
def shared(tokenizer_file) -> GemmaTokenizer:
    return GemmaTokenizer(tokenizer_file, mask_token=None)


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    """A folder as transformers writes it, with a tokenizer.json."""
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def from_json(saved) -> GemmaTokenizer:
    return GemmaTokenizer.from_pretrained(saved, mask_token=None)
