"""The folder of a model's files: bundled, local, or fetched from the Hugging Face Hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gemcut.engine.checks import check_bool, shorten
from gemcut.tokenizer.tokenizer_files import FILES as TOKENIZER_FILES

DEMO = Path(__file__).parents[1] / "demo"
# Nothing else is read: no pickles, no Python, no weights of other frameworks.
WEIGHT_FILES = ["*.safetensors", "model.safetensors.index.json"]
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
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def resolve_checkpoint(
    model: str | Path,
    *,
    files: Sequence[str] = FILES,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
) -> Path:
    """The folder that holds the files of `model`.

    "demo" is the bundled model (a local folder of that name is "./demo"), an existing folder is
    itself, and owner/name is a model on the Hugging Face Hub, of which `files` are fetched into its
    cache; with HF_HUB_OFFLINE only the cache is read.  The other arguments are those of
    huggingface_hub, and mean nothing for a folder on this machine, except `subfolder`, where the
    files are within it.  ValueError says why a model is not found.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"model must be a name or a path, got {type(model).__name__}")
    _check_hub_options(token, revision, cache_dir, local_files_only, force_download)
    part = _read_subfolder(subfolder)
    if model == "demo":
        return _within(DEMO, part)
    folder = os.path.expanduser(model)  # os.path: a name too long for a file is just missing
    if os.path.isdir(folder):
        return _within(Path(folder), part)
    if os.path.isfile(folder):
        raise ValueError(f"model {str(model)!r} is a file; give the folder that holds it")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise ValueError(
            f"model {str(model)!r} is neither 'demo', an existing folder, "
            f"nor a Hugging Face id (owner/name)"
        )
    try:
        snapshot = snapshot_download(
            model,
            allow_patterns=[(part / name).as_posix() for name in files],
            token=token,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return _within(Path(snapshot), part)
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        reason = (
            f"is gated: accept its terms at https://huggingface.co/{model}, then log in or give "
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


def _within(folder: Path, part: PurePosixPath) -> Path:
    whole = folder / part
    if not whole.is_dir():
        raise ValueError(f"{folder} has no folder {str(part)!r}")
    return whole
