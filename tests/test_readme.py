"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_its_python_runs_from_top_to_bottom(capsys):
    """One program, but for what needs a GPU."""
    names: dict[str, object] = {}
    ran = 0
    for block in BLOCKS:
        if "cuda" in block and not torch.cuda.is_available():
            continue
        exec(compile(block, str(README), "exec"), names)
        ran += 1
    assert ran >= len(BLOCKS) - 1
    lines = capsys.readouterr().out.splitlines()
    ends = [line.split()[:2] for line in lines if re.match(r"[abc] (stop|length|abort) ", line)]
    assert sorted(name for name, _ in ends) == ["a", "b", "c"]
    names["engine"].close()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([\w/.]+)\)", README.read_text()))))
def test_its_links_lead_somewhere(link):
    assert (README.parent / link).exists()


def test_every_file_stands_in_its_tree():
    tree = README.read_text().split("## The files")[1].split("```")[1]
    for folder in ("kernels", "engine", "tokenizer", "bench", "tools"):
        for file in (README.parent / folder).rglob("*.py"):
            if file.name not in ("__init__.py", "conftest.py"):
                assert re.search(rf"\b{file.name}", tree), f"{folder}/{file.name}"
