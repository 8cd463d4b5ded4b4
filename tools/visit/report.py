"""The files of a GPU visit, read and written without torch: records, ends, table, reports.

A record has `case` and `status`; `line`, where the table should have one; `detail`, where something
is wrong.  Of two records of one case the later counts: a block may have run twice.
"""

import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLE, ARCHIVE = "table.txt", "all.tgz"
RESULTS = Path(__file__).parents[2] / "bench" / "results"
MOST_LINES = 100  # of the table
LEAST_FAILURES = 20  # of its lines, where there are so many
WIDTH = 115  # of its lines
SCHEMA = 1  # of bench/measure/report_file.py
# the status of a record: the words of bench/measure/report_file.py, which loads torch, and one more
OK, WRONG, FAILED, NO_MEMORY, SKIPPED = "ok", "wrong", "failed", "no memory", "skipped"
FINISHED = "finished"  # how a block ends without an error
CEILINGS = ("read_gbps", "copy_gbps", "matmul_tflops")
# the order of the table, after failures and the blocks' own ends
ORDER = (
    "bits",
    "capture",
    "waits",
    "ops",
    "memcheck",
    "steps",
    "tiles",
    "pdl",
    "attention",
    "peers",
)
Record = dict[str, Any]


def append(file: Path, record: Record) -> None:
    """One more line of a file of JSON lines, whole on the disk."""
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def read(file: Path) -> list[Record]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # what a kill cut off
            continue
    return found


def records(out: Path, block: str) -> list[Record]:
    """What a block has found, a record for each case."""
    return list(
        {record["case"]: record for record in read(out / "rows" / f"{block}.jsonl")}.values()
    )


def ends(out: Path) -> list[Record]:
    """How each block ended the last time that it ran."""
    return list({end["block"]: end for end in read(out / "visit.jsonl")}.values())


def has_failed(out: Path, blocks: Sequence[str]) -> bool:
    """Whether one of these blocks did not finish, or has a record that is not right."""
    finished = {end["block"] for end in ends(out) if end["status"] == FINISHED}
    if not finished.issuperset(blocks):
        return True
    return any(_is_wrong(record) for block in blocks for record in records(out, block))


def _is_wrong(record: Record) -> bool:
    return record["status"] not in (OK, SKIPPED)


def table(out: Path, quotas: Mapping[str, int]) -> list[str]:
    """The table: failures, the blocks, then what each has to say, in at most its quota of lines."""
    found = {name: records(out, name) for name in quotas}
    body = []
    for name in [*ORDER, *(name for name in quotas if name not in ORDER)]:
        said = [
            record["line"]
            for record in found.get(name, ())
            if "line" in record and not _is_wrong(record)
        ]
        skipped = [record for record in found.get(name, ()) if record["status"] == SKIPPED]
        said += [f"{record['case']} skipped: {record.get('detail', '')}" for record in skipped]
        if said:
            body += [f"-- {name}", *_clipped(said, quotas[name])]
    summary = [_ended(end, found.get(end["block"], ())) for end in ends(out)]
    wrong = [
        f"{name} {record['case']} {record['status']}: {record.get('detail', '')}"
        for name in quotas
        for record in found[name]
        if _is_wrong(record)
    ]
    room = max(LEAST_FAILURES, MOST_LINES - len(body) - len(summary) - 3)
    head = [f"-- {_title(out)}"]
    if wrong:
        head += [f"-- {len(wrong)} rows are not right", *_clipped(wrong, room)]
    lines = [*head, "-- blocks", *summary, *body][:MOST_LINES]
    return [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines]


def _clipped(lines: Sequence[str], most: int) -> list[str]:
    lines = [" ".join(line.split("\n")) for line in lines]
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"... and {len(lines) - most + 1} more: see rows/"]


def _ended(end: Record, found: Sequence[Record]) -> str:
    counts = Counter(record["status"] for record in found)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    detail = f" ({end['detail']})" if "detail" in end else ""
    return f"{end['block']:<10}{end['status']}{detail}, {end['seconds']:.0f} s; {told or 'no rows'}"


def _title(out: Path) -> str:
    machine = machine_of(out)
    versions = machine.get("versions", {})
    commit = str(machine.get("commit") or "unknown")[:12]
    seconds = sum(end["seconds"] for end in ends(out))
    names = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions
    )
    return f"{machine['device']}, {names or 'versions unknown'}, commit {commit}, {seconds:.0f} s"


# Reports


def machine_of(out: Path) -> Record:
    """The machine as the first block described it."""
    found = [record["machine"] for record in records(out, "machine") if "machine" in record]
    return found[0] if found else {"device": "unknown", "versions": {}, "commit": None}


def ceilings_of(out: Path) -> dict[str, float]:
    """The ceilings that the first block measured; none where it did not come so far."""
    found = [
        record for record in records(out, "machine") if all(name in record for name in CEILINGS)
    ]
    return {name: found[0][name] for name in CEILINGS} if found else {}


def write_report(out: Path, block: str) -> None:
    """Write a block's records as a report that gemcut-bench report reads."""
    found = records(out, block)
    if not found:
        return
    finished = any(end["block"] == block and end["status"] == FINISHED for end in ends(out))
    machine = machine_of(out)
    report = {
        "schema": SCHEMA,
        "benchmark": "visit",
        "arguments": {"block": block},
        "machine": machine,
        "ceilings": ceilings_of(out),
        "interrupted": not finished,
        "rows": [
            {"contestant": "gemcut", "detail": "", **record, "case": f"{block}/{record['case']}"}
            for record in found
        ],
    }
    (out / f"visit-{block}.json").write_text(json.dumps(report) + "\n")


def keep(out: Path, results: Path) -> list[Path]:
    """Copy a visit's reports to the folder of its device; ValueError where there are none."""
    files = sorted(file for file in out.glob("*.json") if _is_kept(file))
    if not files:
        raise ValueError(f"{out} holds no report of a visit")
    device = machine_of(out)["device"]
    if device == "unknown":
        raise ValueError(f"{out} does not say which device it is of: its first block did not run")
    folder = results / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, folder / file.name)) for file in files]


def _is_kept(file: Path) -> bool:
    """A report, or the breakdown of a step."""
    if file.name.startswith("breakdown-"):
        return True
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("schema") == SCHEMA


def pack(out: Path, archive: Path) -> None:
    """Pack all of a visit into one file, which is replaced as a whole."""
    new = archive.with_name(f"{archive.name}.part")
    with tarfile.open(new, "w:gz") as tar:
        for file in sorted(out.rglob("*")):
            if file.is_file() and file not in (archive, new):
                tar.add(file, file.relative_to(out))
    new.replace(archive)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder; ValueError where the file is no archive."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{archive}: {getattr(error, 'strerror', None) or error}") from None
