"""The folder of a model's files: bundled, local, or fetched from the Hugging Face Hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

DEMO = Path(__file__).parents[1] / "demo"
# Nothing else is read: no pickles, no Python, no weights of other frameworks.
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "*.safetensors",
    "model.safetensors.index.json",
]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def resolve_checkpoint(model: str | Path, *, files: Sequence[str] = FILES) -> Path:
    """The folder that holds the files of `model`.

    "demo" is the bundled model (a local folder of that name is "./demo"), an existing folder is
    itself, and owner/name is a model on the Hugging Face Hub, of which `files` are fetched into its
    cache; with HF_HUB_OFFLINE only the cache is read.  ValueError says why a model is not found.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"model must be a name or a path, got {type(model).__name__}")
    if model == "demo":
        return DEMO
    folder = os.path.expanduser(model)  # os.path: a name too long for a file is just missing
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.isfile(folder):
        raise ValueError(f"model {str(model)!r} is a file; give the folder that holds it")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise ValueError(
            f"model {str(model)!r} is neither 'demo', an existing folder, "
            f"nor a Hugging Face id (owner/name)"
        )
    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        reason = f"is gated: accept its terms at https://huggingface.co/{model}, then log in"
    except RepositoryNotFoundError:
        reason = "is no existing folder, and unknown to the Hugging Face Hub (or private)"
    except LocalEntryNotFoundError:
        reason = "is no existing folder, not in the cache, and the Hugging Face Hub is out of reach"
    except HFValidationError:
        reason = "is neither an existing folder nor a valid Hugging Face id"
    except (HfHubHTTPError, OSError) as error:
        reason = f"cannot be fetched: {next(iter(str(error).splitlines()), type(error).__name__)}"
    raise ValueError(f"model {model!r} {reason}")
