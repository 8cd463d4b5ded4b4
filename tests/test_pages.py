"""The pages: their Python runs, their links lead somewhere, and they name every file."""

import re
from pathlib import Path

import pytest
import torch

from gemcut.engine import Engine, SamplingParams

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = ("kernels", "engine", "tokenizer", "bench", "tools")
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in (*FOLDERS, "tests") for page in (ROOT / folder).rglob("*.md")),
]
LINKS = [
    pytest.param(page, link, id=f"{page.relative_to(ROOT)}-{link}")
    for page in PAGES
    for link in sorted(set(re.findall(r"\]\(([^)\s]+)\)", page.read_text())))
    if not link.startswith("http")
]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run_blocks(page: Path) -> tuple[dict[str, object], int]:
    """The names that a page's Python leaves, as one program, and how many blocks ran here."""
    names: dict[str, object] = {}
    ran = 0
    for block in blocks_of(page):
        if "cuda" not in block or torch.cuda.is_available():
            exec(compile(block, str(page), "exec"), names)
            ran += 1
    return names, ran


def test_its_python_runs_from_top_to_bottom():
    """One program, except what needs a GPU."""
    names, ran = run_blocks(README)
    assert ran >= len(blocks_of(README)) - 1
    names["engine"].close()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_python_of_the_step_interface_runs(capsys):
    names, _ = run_blocks(ROOT / "engine" / "README.md")
    lines = capsys.readouterr().out.splitlines()
    ends = [line.split()[:2] for line in lines if re.match(r"[abc] (stop|length|abort) ", line)]
    assert sorted(name for name, _ in ends) == ["a", "b", "c"]
    names["engine"].close()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_python_of_the_documented_classes_runs():
    names, ran = run_blocks(ROOT / "engine" / "transformers_api" / "README.md")
    assert ran == 1
    assert names["second"].logits.shape[:2] == (1, 1)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_python_of_ones_own_cache_runs():
    """All but the captured step, which is compiled; the tokens are those of an engine."""
    page = ROOT / "engine" / "EMBEDDING.md"
    blocks = blocks_of(page)
    names, ran = run_blocks(page)
    assert ran >= len(blocks) - 1
    for block in blocks:
        compile(block, str(page), "exec")
    engine = Engine.from_pretrained("demo", max_batch_size=2, max_seq_len=128)
    texts = ["It was a bright cold morning", "Once"]
    settings = SamplingParams(max_tokens=21, temperature=0, ignore_eos=True)
    ids = [list(output.token_ids) for output in engine.generate(texts, settings)]
    engine.close()
    assert torch.stack(names["generated"], 1).tolist() == ids  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_its_links_lead_somewhere(page, link):
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings}


def test_the_tests_that_pages_and_sources_name_are_there():
    sources = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    present = {file.name for folder in ("tests", "bench") for file in (ROOT / folder).rglob("*.py")}
    for file in (*PAGES, *sources):
        named = set(re.findall(r"\btest_\w+\.py\b", file.read_text()))
        # the example of a page that says how to add one
        assert named - present <= {"test_clamp.py"}, file


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_stands_in_its_tree(folder):
    """In the README of its folder or of its room."""
    for file in (ROOT / folder).rglob("*.py"):
        pages = [ROOT / folder / "README.md", file.parent / "README.md"]
        text = "".join(page.read_text() for page in pages if page.exists())
        if file.name != "__init__.py":
            assert re.search(rf"\b{file.name}\b", text), f"{file.relative_to(ROOT)}"


def test_the_first_page_is_read_in_minutes():
    assert len(README.read_text().splitlines()) <= 200


def test_no_file_is_too_long_or_too_short():
    for folder in (*FOLDERS, "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            lines = len(file.read_text().splitlines())
            assert lines <= 400, f"{file.relative_to(ROOT)} has {lines} lines"
            assert lines >= 20 or file.name == "__init__.py", f"{file.relative_to(ROOT)}: {lines}"
