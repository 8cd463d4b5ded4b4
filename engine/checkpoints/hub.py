"""The files of a model: bundled, local, or fetched from the Hugging Face Hub."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gemcut.engine.checkpoints.gguf_choice import SUFFIX, choose_file, split_tag
from gemcut.engine.checks import check_bool, shorten
from gemcut.tokenizer.tokenizer_files import FILES as TOKENIZER_FILES

DEMO = Path(__file__).parents[1] / "demo"
INDEX = "model.safetensors.index.json"
# Nothing else is read: no pickles, no Python, no weights of other frameworks.
WEIGHT_FILES = ["*.safetensors", INDEX]
SMALL_FILES = [  # that can be checked before weights are fetched
    "config.json",
    "generation_config.json",
    "adapter_config.json",  # says that the weights are an adapter's
    *TOKENIZER_FILES,
]
FILES = [*SMALL_FILES, *WEIGHT_FILES]
# Keywords of `from_pretrained` that say how files come from the Hub, and the values that mean "as
# usual".
HUB_OPTIONS = {
    "token": None,
    "revision": None,
    "cache_dir": None,
    "local_files_only": False,
    "force_download": False,
    "subfolder": "",
}
# Others that ask for nothing, with what may be given: no file of a model is run here, and the
# network's own settings (HTTPS_PROXY) count.
_NEUTRAL = {
    "trust_remote_code": (None, False, True),
    "code_revision": (None, "main"),
    "resume_download": (None, False, True),
    "use_auth_token": (None,),
    "proxies": (None, {}),
    "_commit_hash": (None,),
}
CONFIG_FILES = ["config.json", "adapter_config.json"]
_OF_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_GGUF = (
    "a GGUF file, which Engine.from_pretrained and the commands read; for anything else "
    "`gemcut convert` makes a folder of safetensors of it"
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def resolve_checkpoint(
    model: str | Path,
    *,
    files: Sequence[str] = FILES,
    gguf: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
) -> Path:
    """The folder that holds the files of `model`, or with `gguf` perhaps its GGUF file.

    "demo" is the bundled model (a local folder of that name is "./demo"), an existing folder is
    itself, and owner/name is a model on the Hugging Face Hub, of which `files` are fetched into its
    cache; with HF_HUB_OFFLINE only the cache is read.  With `gguf`, a GGUF file is itself, and a
    folder or repository that holds GGUF files and no safetensors is the only one, or that which a
    colon and its quantisation or name ask for (owner/name:Q4_0).  The other arguments are those of
    huggingface_hub, and mean nothing for a folder on this machine, except `subfolder`, where the
    files are within it.  ValueError says why a model is not found.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"model must be a name or a path, got {type(model).__name__}")
    _check_hub_options(token, revision, cache_dir, local_files_only, force_download)
    part = _read_subfolder(subfolder)
    if model == "demo":
        return _within(DEMO, part)
    path = os.path.expanduser(model)  # os.path: a name too long for a file is just missing
    if os.path.isfile(path):
        if gguf and str(path).endswith(SUFFIX):
            return Path(path)
        hint = _GGUF if str(path).endswith(SUFFIX) else "a file; give the folder that holds it"
        raise ValueError(f"model {str(model)!r} is {hint}")
    name, tag = str(model), None
    if gguf and not os.path.isdir(path):
        name, tag = split_tag(name)
        path = os.path.expanduser(name)
    if os.path.isdir(path):
        folder = _within(Path(path), part)
        return _gguf_in(folder, tag) if gguf else folder
    if str(model).endswith(SUFFIX):
        raise ValueError(f"model {str(model)!r}: no such file")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"model {str(model)!r} is neither 'demo', an existing folder, "
            f"nor a Hugging Face id (owner/name)"
        )

    options = {
        "token": token,
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    try:
        folder = _fetched(name, part, files, options)
        if gguf and not (tag is None and _holds_weights(folder)):
            names = _names_within(folder, name, part, options)
            is_plain = tag is None and any(n.endswith(".safetensors") for n in names)
            if not is_plain and (file := choose_file(name, names, tag)) is not None:
                return _fetched(name, part, [glob.escape(file)], options) / file
        return _within(folder, PurePosixPath())
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        reason = (
            f"is gated: accept its terms at https://huggingface.co/{name}, then log in or give "
            f"token="
        )
    except RepositoryNotFoundError:
        reason = "is no existing folder, and unknown to the Hugging Face Hub (or private)"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except LocalEntryNotFoundError:
        of = "" if revision is None else f" in revision {revision!r}"
        why = "the Hugging Face Hub is out of reach"
        if local_files_only:
            why = "local_files_only asks no network"
        reason = f"is no existing folder, not in the cache{of}, and {why}"
    except HFValidationError:
        reason = "is neither an existing folder nor a valid Hugging Face id"
    except (HfHubHTTPError, OSError) as error:
        reason = f"cannot be fetched: {next(iter(str(error).splitlines()), type(error).__name__)}"
    raise ValueError(f"model {model!r} {reason}")


def take_hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of a caller's keywords those that are about the Hub, for `resolve_checkpoint`."""
    for name in [name for name in options if name in _NEUTRAL]:
        if (value := options.pop(name)) not in _NEUTRAL[name]:
            hint = {"use_auth_token": "give token=", "proxies": "set HTTPS_PROXY"}
            raise NotImplementedError(
                f"{name}={shorten(value)} is not supported; {hint.get(name, 'leave it out')}"
            )
    taken = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    return {name: HUB_OPTIONS[name] if x is None else x for name, x in taken.items()}


def _check_hub_options(
    token: Any, revision: Any, cache_dir: Any, local_files_only: Any, force_download: Any
) -> None:
    if not isinstance(token, str | bool | None):
        raise ValueError(f"token is a {type(token).__name__}; give a string, True, False or None")
    if revision is not None and not (isinstance(revision, str) and revision):
        raise ValueError(
            f"revision {shorten(revision)} is no name of a branch, a tag or a commit; give a string"
        )
    if not isinstance(cache_dir, str | Path | None):
        raise ValueError(f"cache_dir {shorten(cache_dir)} is no path of a folder")
    check_bool("local_files_only", local_files_only)
    check_bool("force_download", force_download)


def _read_subfolder(subfolder: Any) -> PurePosixPath:
    """A folder within a model's; ValueError where it would lead out of it."""
    part = PurePosixPath(subfolder) if isinstance(subfolder, str) else None
    if part is None or part.is_absolute() or ".." in part.parts:
        raise ValueError(f"subfolder {shorten(subfolder)} is no folder within the model's")
    return part


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model.safetensors", INDEX))


def _gguf_in(folder: Path, tag: str | None) -> Path:
    """The GGUF file that is meant in a folder; the folder itself where it holds safetensors."""
    if tag is None and _holds_weights(folder):
        return folder
    file = choose_file(str(folder), (path.name for path in folder.glob(f"*{SUFFIX}")), tag)
    return folder if file is None else folder / file


def _fetched(name: str, part: PurePosixPath, files: Sequence[str], options: dict[str, Any]) -> Path:
    """The folder `part` of a repository, after these files of it were fetched."""
    patterns = [(part / file).as_posix() for file in files]
    return Path(snapshot_download(name, allow_patterns=patterns, **options)) / part


def _names_within(
    folder: Path, name: str, part: PurePosixPath, options: dict[str, Any]
) -> list[str]:
    """The files below `part` of a repository, or those of them that the cache has in `folder`."""
    try:
        if not options["local_files_only"]:
            # list_repo_files would try for half a minute to reach a hub that is out of reach
            info = model_info(name, revision=options["revision"], token=options["token"])
            paths = [PurePosixPath(file.rfilename) for file in info.siblings or ()]
            return [str(p.relative_to(part)) for p in paths if p.is_relative_to(part)]
    except Exception:  # of httpx or requests, as huggingface_hub's version has it
        pass  # offline: what is in the cache counts
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]


def _within(folder: Path, part: PurePosixPath) -> Path:
    whole = folder / part
    if not whole.is_dir():
        raise ValueError(f"{folder} has no folder {str(part)!r}")
    return whole


def check_holds_model(folder: Path) -> None:
    """Nothing, or ValueError that says what a folder holds in place of a model."""
    if folder.is_file() or _holds_weights(folder):
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a PEFT adapter, no model: Engine.from_pretrained merges it into its "
            f"model by lora=, the commands by --lora, and `gemcut convert --lora` saves that"
        )
    if any(folder.glob("*.gguf")):
        raise ValueError(f"{folder} holds {_GGUF}")
    if (folder / "config.json").exists():
        return
    if any((folder / name).exists() for name in _OF_TOKENIZERS):
        raise ValueError(f"{folder} holds a tokenizer and no model: config.json is missing")
