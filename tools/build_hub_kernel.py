"""gemcut's kernels as a folder that Hugging Face's package `kernels` loads.

    python -P -m gemcut.tools.build_hub_kernel gemcut-kernel

The folder holds build/torch-cuda and build/torch-cpu: the files of `gemcut.kernels` and of
hub_kernel/, with relative imports, and each with a metadata.json.  Nothing is compiled, gemcut need
not be installed where it is loaded, and the same sources give the same bytes.  Ops are registered
under a namespace that bears a hash of the sources, so that other builds and gemcut itself may be
loaded beside it.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
# what is copied, and to where
SOURCES = {"kernels": "kernels", "tools/hub_kernel": "."}
DATA = ("measured_tiles.json",)
VARIANTS = {
    "torch-cuda": {"type": "cuda", "archs": ["8.0", "8.9", "9.0", "10.0", "12.0"]},
    "torch-cpu": {"type": "cpu"},
}
NAME = "gemcut"
OPS = re.compile(r"\bgemcut(?=::)|(?<=torch\.ops\.)gemcut\b")  # the namespace of gemcut's own
IMPORT = re.compile(r"^( *)from (gemcut(?:\.\w+)*) import ", re.MULTILINE)

# for versions of `kernels` before 0.12, which look for a folder of the kernel's name
OLDER_INIT = '''"""The names of the folder above, for versions of `kernels` before 0.12."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["{id}"])

__all__ = sys.modules["{id}"].__all__
globals().update({{name: getattr(sys.modules["{id}"], name) for name in __all__}})
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, gemma]
---

# gemcut

Fused Triton kernels for Google's Gemma models: the ops of `gemcut.kernels`, registered for
torch.compile, and layers for transformers. torch 2.11 and Triton 3.6 or later; NVIDIA GPUs from
sm_80 on, and CPUs.

```python
from pathlib import Path
from kernels import get_local_kernel

gemcut = get_local_kernel(Path("FOLDER"))
y = gemcut.rmsnorm(x, weight, 1e-6)  # Gemma's: x * rstd * (1 + weight)
```

Layers: {layers}.
"""


def relative_imports(source: str, place: str) -> str:
    """A module's source with `from gemcut.x import` made relative; place: its path in the build.

    ValueError where an import of gemcut is left, or names what is not in the build.
    """
    dots = "." * (place.count("/") + 1)

    def moved(match: re.Match[str]) -> str:
        path = match[2].replace(".", "/").removeprefix("gemcut").removeprefix("/")
        for source_folder, folder in SOURCES.items():
            if path == source_folder or path.startswith(source_folder + "/"):
                rest = [folder.strip("."), path[len(source_folder) :].strip("/")]
                return (
                    f"{match[1]}from {dots}{'.'.join(filter(None, rest)).replace('/', '.')} import "
                )
        if path:
            raise ValueError(f"{place} imports {match[2]}, which is not in the build")
        return f"{match[1]}from {dots} import "

    changed = IMPORT.sub(moved, source)
    for node in ast.walk(ast.parse(changed)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        left = [name for name in names if name.split(".")[0] == "gemcut"]
        if left:
            raise ValueError(f"{place} imports {left[0]} otherwise than by `from ... import`")
    return changed


def files_of_build() -> dict[str, str]:
    """The texts of a build by their paths, with the namespace of ops still gemcut's own."""
    files = {}
    for source_folder, folder in SOURCES.items():
        base = ROOT / source_folder
        for path in sorted(base.rglob("*")):
            if path.suffix == ".py" or path.name in DATA:
                place = (Path(folder) / path.relative_to(base)).as_posix()
                text = path.read_text(encoding="utf-8")
                files[place] = relative_imports(text, place) if path.suffix == ".py" else text
    return dict(sorted(files.items()))


def variant_files(variant: str, version: int) -> dict[str, str]:
    """What lies in build/VARIANT, by path; ValueError for an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; {' and '.join(VARIANTS)} are known")
    files = files_of_build()
    backend = VARIANTS[variant]
    kernel_id = f"_{NAME}_{backend['type']}_{_digest(files.items())[:10]}"
    files = {place: OPS.sub(kernel_id, text) for place, text in files.items()}
    files[f"{NAME}/__init__.py"] = OLDER_INIT.format(id=kernel_id)
    hashes = {
        place: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for place, text in sorted(files.items())
    }
    metadata = {
        "name": NAME,
        "id": kernel_id,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return files | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}


def _digest(files: Iterable[tuple[str, str]]) -> str:
    sha = hashlib.sha256()
    for place, text in files:
        sha.update(f"{place}\0{text}\0".encode())
    return sha.hexdigest()


def build(out: Path, variants: Sequence[str] = tuple(VARIANTS), version: int = 1) -> list[Path]:
    """Write the folder; the paths of its files.  ValueError before anything is written."""
    if not variants or version < 0:
        raise ValueError(f"{len(variants)} variants of version {version}: one at least, from 0 on")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is {'a file' if out.is_file() else 'not empty'}")
    layers = re.findall(r"^class (\w+)", (ROOT / "tools/hub_kernel/layers.py").read_text(), re.M)
    texts = {"README.md": CARD.format(layers=", ".join(layers))}
    for variant in variants:
        files = variant_files(variant, version)
        texts |= {f"build/{variant}/{place}": text for place, text in files.items()}
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=out) as stage:  # an interrupted build leaves nothing
        for place, text in texts.items():
            path = Path(stage) / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        for path in Path(stage).iterdir():
            path.rename(out / path.name)
    return [out / place for place in texts]


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="build_hub_kernel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="the folder to write, which is empty or not there")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="default: both")
    parser.add_argument("--version", type=int, default=1, help="of metadata.json; default 1")
    parsed = parser.parse_args(arguments)
    try:
        paths = build(parsed.out, parsed.variants, parsed.version)
    except (ValueError, OSError) as error:
        print(f"build_hub_kernel: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in paths)
    print(f"{parsed.out}: {', '.join(parsed.variants)}; {len(paths)} files, {size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
