"""The names that users import, and the commands that they type: what a version promises.

A name that goes or is added shows here; CHANGELOG.md says so too.
"""

from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest
import torch

PUBLIC = {
    "gemcut.engine": """
        AutoConfig AutoModel AutoModelForCausalLM AutoModelForSequenceClassification
        AutoModelForTokenClassification AutoTokenizer BatchEncoding CompletionOutput
        Delta DynamicCache Engine EngineFault FlaxGemmaForCausalLM FlaxGemmaModel
        Gemma2Config Gemma2ForCausalLM Gemma2ForSequenceClassification
        Gemma2ForTokenClassification Gemma2Model Gemma3ForCausalLM Gemma3TextConfig
        Gemma3TextForSequenceClassification Gemma3TextModel GemmaConfig GemmaForCausalLM
        GemmaForSequenceClassification GemmaForTokenClassification GemmaModel
        GemmaTokenizer GemmaTokenizerFast GenerationConfig Logprob ModelConfig PUBLISHED
        QueueFullError RequestMetrics RequestOutput SamplingParams ScoreOutput
        StaticCache StructuredOutputsParams TextGenerationPipeline TextPrompt TokensPrompt
        VaultGemmaConfig VaultGemmaForCausalLM VaultGemmaModel pipeline
    """,
    "gemcut.engine.transformers_api": """
        AutoConfig AutoModel AutoModelForCausalLM AutoModelForSequenceClassification
        AutoModelForTokenClassification AutoTokenizer BatchEncoding DynamicCache
        FlaxGemmaForCausalLM FlaxGemmaModel Gemma2Config Gemma2ForCausalLM
        Gemma2ForSequenceClassification Gemma2ForTokenClassification Gemma2Model
        Gemma3ForCausalLM Gemma3TextConfig Gemma3TextForSequenceClassification
        Gemma3TextModel GemmaConfig GemmaForCausalLM GemmaForSequenceClassification
        GemmaForTokenClassification GemmaModel GemmaTokenizer GemmaTokenizerFast
        GenerationConfig StaticCache TextGenerationPipeline VaultGemmaConfig
        VaultGemmaForCausalLM VaultGemmaModel pipeline
    """,
    "gemcut.kernels": """
        add_rmsnorm_ advance_ attention_decode attention_prefill begin_step embed geglu
        linear linear_geglu linear_rope_and_store_ lm_head lm_head_argmax penalize rmsnorm
        rope_and_store_ rope_tables sample skinny_linear
    """,
    "gemcut.kernels.reference": """
        add_rmsnorm_ advance_ attention_decode attention_prefill begin_step best_of_ranges
        embed filter_logits geglu gumbel_noise linear linear_geglu linear_rope_and_store_ lm_head
        lm_head_argmax penalize rmsnorm rope_and_store_ rope_tables sample skinny_linear
    """,
    "gemcut.kernels.cpu": """
        add_rmsnorm_ advance_ attention_decode attention_prefill begin_step best_of_ranges
        embed filter_logits geglu gumbel_noise linear linear_geglu linear_rope_and_store_ lm_head
        lm_head_argmax penalize rmsnorm rope_and_store_ rope_tables sample skinny_linear
    """,
    "gemcut.tokenizer": """
        AddedToken StopStrings StreamDecoder Tokenizer encode_chat end_of_turn_ids render_chat
    """,
}
OPS = PUBLIC["gemcut.kernels"]  # torch.ops.gemcut has each of them too, and `_out`
COMMANDS = {"gemcut": "gemcut.engine.cli:main", "gemcut-bench": "gemcut.bench.cli:main"}
TOOLS = "build_hub_kernel compile_report gpu_visit predict_step profile_step train_demo tune"


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_exports_what_it_promised(package):
    module = import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_op_is_registered():
    for name in OPS.split():
        assert hasattr(torch.ops.gemcut, name), name
        assert hasattr(torch.ops.gemcut, f"{name.rstrip('_')}_out"), name


def test_the_commands_lead_to_their_functions():
    scripts = {e.name: e.value for e in entry_points(group="console_scripts") if "gemcut" in e.name}
    assert scripts == COMMANDS
    for tool in TOOLS.split():
        assert find_spec(f"gemcut.tools.{tool}") is not None
