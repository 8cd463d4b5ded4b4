"""Engines from checkpoints, and from tensors in memory: what is asked is checked, then loaded.

Nothing large is read, fetched or allocated before the arguments, the config, the tokenizer and the
sizes have been found right.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from gemcut.engine.checkpoints.hub import SMALL_FILES, check_holds_model, resolve_checkpoint
from gemcut.engine.checkpoints.load import (
    expected_layouts,
    load_cache_scales,
    load_checkpoint,
    load_config,
    load_settings,
    load_tokenizer,
)
from gemcut.engine.checkpoints.lora import open_adapter
from gemcut.engine.checkpoints.state_dict import (
    Tensors,
    match_tensors,
    read_config,
    read_tokenizer,
)
from gemcut.engine.checkpoints.stored_weights import fill_weights
from gemcut.engine.checks import check_bool, check_int, shorten
from gemcut.engine.config.generation_file import settings_folder, stop_token_ids
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import PREFILL_CHUNK
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.weights import Weights
from gemcut.engine.memory import Build
from gemcut.engine.placement import (
    choose_device,
    choose_dtype,
    choose_ops,
    in_temporary_thread,
    release_freed_memory,
)
from gemcut.engine.requests.sampling_params import INT64_MAX, SamplingParams
from gemcut.kernels import cpu
from gemcut.tokenizer import Tokenizer

E = TypeVar("E", bound="Loading")


class Loading:
    """The constructors of an engine, beside its own."""

    _folder: Path | None

    if TYPE_CHECKING:

        def __init__(self, *model_and_tokenizer: Any, **options: Any) -> None: ...

    @classmethod
    def from_pretrained(
        cls: type[E],
        model: str | Path = "demo",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_batch_size: int | Literal["auto"] = 8,
        max_seq_len: int | Literal["auto"] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = True,
        max_waiting: int | None = None,
        cuda_graphs: bool = True,
        dependent_launches: bool = True,
        skip_tokenizer_init: bool = False,
        quantization: Literal["int8", "int4", "fp8"] | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        lora: str | Path | None = None,
        ops: str = "auto",
        generation_config: str | Path = "auto",
        default_params: SamplingParams | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> E:
        """An engine for "demo", a local folder, a GGUF file or a Hugging Face id.

        Where a folder or repository holds several GGUF files, "owner/name:Q4_0" is one of them.

        device "auto" is cuda where there is one; dtype "auto" is bfloat16 on cuda and, with
        quantised weights, on a CPU that multiplies it, else float32; max_batch_size "auto" is the
        most of 16, 8, 4, 2, 1 slots that free memory holds; max_seq_len None or "auto" is the
        model's own limit, or less if free memory holds less; with skip_tokenizer_init the engine
        takes ids alone.  quantization: "int8", "int4" or "fp8" quantises the matrices of a plain
        checkpoint while they are read; one that is quantised needs nothing.  kv_cache_dtype:
        "fp8" halves the cache's bytes, see `Engine`; the scales are those of a checkpoint that has
        some for e4m3.  lora: a folder or Hugging Face id of a LoRA adapter that peft has saved as
        safetensors; it is merged into the weights while they are read (checkpoints/lora.py).

        generation_config: the file that publishes the settings of a call that gives none: "auto" is
        the model's generation_config.json, a folder has one of its own, and with "none" only the
        EOS of the model's counts.  default_params: those settings where the file has none.  token,
        revision, cache_dir, local_files_only: for the Hub, as huggingface_hub has them.
        ValueError says in one line what is wrong with an argument or the checkpoint.
        """
        target = choose_device(device)
        op_table = choose_ops(ops, target)
        _check_requests(max_waiting, default_params)
        choose_dtype(dtype, target)  # a bad one is refused before anything is fetched
        check_bool("skip_tokenizer_init", skip_tokenizer_init)
        from_hub: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        fetch = partial(resolve_checkpoint, model, revision=revision, **from_hub)
        folder = fetch(files=SMALL_FILES, gguf=True)
        if (folder / "adapter_config.json").exists():  # weights tell an adapter from a model
            folder = fetch()
        check_holds_model(folder)
        config = load_config(folder)
        _refuse_classifier(config, folder)
        adapter = None if lora is None else open_adapter(lora, config, **from_hub)
        own_config, config = config, config if adapter is None else adapter.config
        layouts = expected_layouts(config, quantization, folder)
        weights_dtype = choose_dtype(dtype, target, is_quantized=bool(layouts))
        tokenizer = None if skip_tokenizer_init else load_tokenizer(folder, config)
        published_in = settings_folder(generation_config, folder)
        eos_ids = stop_token_ids(published_in, config)
        defaults = SamplingParams() if default_params is None else default_params
        if generation_config != "none":
            defaults = replace(defaults, **load_settings(published_in))
        build = Build(
            config,
            target,
            weights_dtype,
            op_table,
            prefill_chunk,
            reuse_prefixes,
            cuda_graphs,
            layouts,
            kv_cache_dtype=kv_cache_dtype,
        )
        sizes = _chosen_sizes(build, max_batch_size, max_seq_len, dependent_launches)
        if folder.is_dir():
            folder = fetch()  # with the weights
        kv_scales = load_cache_scales(folder, config, target) if kv_cache_dtype == "fp8" else None

        def load() -> Weights:
            return load_checkpoint(
                folder,
                own_config,
                device=target,
                dtype=weights_dtype,
                quantization=quantization,
                has_cache_scales=kv_scales is not None,
                adapter=adapter,
            )

        engine = cls._made(
            build,
            load,
            tokenizer,
            **sizes,
            eos_ids=eos_ids,
            default_params=defaults,
            max_waiting=max_waiting,
            dependent_launches=dependent_launches,
            kv_scales=kv_scales,
        )
        engine._folder = folder
        return engine

    @classmethod
    def from_state_dict(
        cls: type[E],
        config: ModelConfig | Mapping[str, Any] | Any,
        tensors: Tensors,
        tokenizer: Tokenizer | str | Path | Any = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_batch_size: int | Literal["auto"] = 8,
        max_seq_len: int | Literal["auto"] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = True,
        max_waiting: int | None = None,
        cuda_graphs: bool = True,
        dependent_launches: bool = True,
        quantization: Literal["int8", "int4", "fp8"] | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        lora: str | Path | None = None,
        ops: str = "auto",
        eos_ids: Sequence[int] | None = None,
        default_params: SamplingParams | None = None,
    ) -> E:
        """An engine of tensors in memory, such as `model.state_dict()` of transformers' Gemma.

        config: a ModelConfig, what a config.json holds, or a config of transformers.  tensors: by
        Hugging Face's names, a mapping or pairs (name, tensor) of exactly the model's, floats of
        any dtype on any device; a tied lm_head may be there or not.  They are copied: the engine
        keeps none of them, and while it is made, both are in memory, with less than a layer beside
        them.  tokenizer: a Tokenizer, a folder, a Hugging Face id or a tokenizer of transformers;
        without one the engine takes ids alone.

        eos_ids and default_params are those of `Engine`; all else that of `from_pretrained`.
        ValueError says in one line what is wrong with an argument or a tensor.
        """
        target = choose_device(device)
        op_table = choose_ops(ops, target)
        config = read_config(config)
        _refuse_classifier(config, "config")
        _check_requests(max_waiting, default_params)
        _check_eos(eos_ids, config)
        stored = match_tensors(tensors, config)
        if lora is not None:
            adapter = open_adapter(lora, config)
            stored, config = adapter.merge(stored), adapter.config
        layouts = expected_layouts(config, quantization)
        weights_dtype = choose_dtype(dtype, target, is_quantized=bool(layouts))
        chosen_tokenizer = read_tokenizer(tokenizer, config)
        build = Build(
            config,
            target,
            weights_dtype,
            op_table,
            prefill_chunk,
            reuse_prefixes,
            cuda_graphs,
            layouts,
            kv_cache_dtype=kv_cache_dtype,
        )
        sizes = _chosen_sizes(build, max_batch_size, max_seq_len, dependent_launches)

        def load() -> Weights:
            return fill_weights(
                config, stored, device=target, dtype=weights_dtype, quantization=quantization
            )

        return cls._made(
            build,
            load,
            chosen_tokenizer,
            **sizes,
            eos_ids=eos_ids,
            default_params=default_params,
            max_waiting=max_waiting,
            dependent_launches=dependent_launches,
        )

    @classmethod
    def _made(
        cls: type[E],
        build: Build,
        load: Callable[[], Weights],
        tokenizer: Tokenizer | None,
        **options: Any,
    ) -> E:
        """The engine that `build` describes, of the weights that `load` gives."""

        def make() -> E:
            weights = load()
            if build.ops is cpu:
                weights.pack_()
            return cls(
                Gemma(build.config, weights, build.ops),
                tokenizer,
                prefill_chunk=build.prefill_chunk,
                reuse_prefixes=build.reuse_prefixes,
                cuda_graphs=build.cuda_graphs,
                kv_cache_dtype=build.kv_cache_dtype,
                **options,
            )

        engine = in_temporary_thread(make) if build.device.type == "cpu" else make()
        release_freed_memory()
        return engine


def _chosen_sizes(
    build: Build, max_batch_size: Any, max_seq_len: Any, dependent_launches: Any
) -> dict[str, int]:
    """The sizes of an engine, by the names of its arguments, before anything is loaded."""
    check_bool("cuda_graphs", build.cuda_graphs)
    check_bool("dependent_launches", dependent_launches)
    slots, length = build.choose(max_batch_size, max_seq_len)
    return {"max_batch_size": slots, "max_seq_len": length}


def _check_requests(max_waiting: Any, default_params: Any) -> None:
    """Nothing, or ValueError where an engine could take no request so."""
    if max_waiting is not None:
        check_int("max_waiting", max_waiting, 0, INT64_MAX)
    if not isinstance(default_params, SamplingParams | None):
        kind = type(default_params).__name__
        raise ValueError(f"default_params must be a SamplingParams, got {kind}")


def _check_eos(eos_ids: Any, config: ModelConfig) -> None:
    """Nothing, or ValueError where these are no ids of the model's tokens."""
    if isinstance(eos_ids, str) or not isinstance(eos_ids, Iterable | None):
        raise ValueError(f"eos_ids {shorten(eos_ids)} are no list of token ids")
    for eos_id in eos_ids or ():
        check_int("eos_ids: the token id", eos_id, 0, config.vocab_size - 1)


def _refuse_classifier(config: ModelConfig, place: Path | str) -> None:
    if config.classifier is not None:
        raise ValueError(
            f"{place} holds a {config.architectures[0]}, which generates no text; "
            f"gemcut.engine has a class of that name"
        )
