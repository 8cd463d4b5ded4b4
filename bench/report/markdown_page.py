"""The Markdown page of reports, with its plots, and the README's table of results.

A page holds the goals, and for each device its machine and reports, plots, tables of all that was
measured, and what could not be.  Neither holds anything that no report measured.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from gemcut.bench.report.load import CEILINGS, Report, device_of, figures, on_gpu, read_report
from gemcut.bench.report.plots import make_plots
from gemcut.bench.report.serving import server_tables
from gemcut.bench.report.tables import (
    cpu_decode_summary,
    decode_summary,
    decode_tables,
    failures_table,
    goals_table,
    host_work_table,
    kernel_tables,
    kernels_summary,
    markdown,
    prefill_tables,
    serving_table,
)

PAGE = "report.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NO_GPU = "Not yet measured on a GPU."
MACHINE = ("device", "capability", "multiprocessors", "memory_bytes", "l2_bytes", "driver", "cuda")
MACHINE += ("sm_mhz", "memory_mhz", "max_sm_mhz", "power_limit_w", "temperature_c")
MACHINE += ("cpu", "cores", "threads")
SECTIONS = {
    "Kernels": kernel_tables,
    "Decoding": decode_tables,
    "Prefill": prefill_tables,
    "Serving": serving_table,
    "Servers": server_tables,
    "Work of the host": host_work_table,
    "Not measured": failures_table,
}


def run_report(files: Sequence[Path], out: Path | None, readme: Path | None, check: bool) -> int:
    """Write a page with plots into `out`, and the README's table.

    With `check` the README stays as it is, and 1 says that it would change.
    """
    if out is None and readme is None:
        raise ValueError("there is nothing to write: give --out FOLDER or --readme FILE")
    if check and readme is None:
        raise ValueError("--check says whether a README would change: give --readme FILE")
    reports = load_reports(files)
    if not reports:
        raise ValueError("there is no file to report on")
    if out is not None:
        print(f"written: {write_page(reports, out)}")
    if readme is None:
        return 0
    text = _read(readme)
    new = replace_results(text, readme_table(list(reports.values())), readme)
    if new == text:
        print(f"{readme} is as these reports have it")
        return 0
    if check:
        print(f"{readme} differs from what these reports say: run without --check")
        return 1
    readme.write_text(new)
    print(f"written: {readme}")
    return 0


def load_reports(files: Iterable[Path]) -> dict[Path, Report]:
    """The reports in these files and folders, by file; in a folder other JSON is passed over.

    ValueError where a file is no report or a folder holds none.
    """
    reports = {}
    for file in files:
        if not file.is_dir():
            reports[file] = read_report(file)
            continue
        found = {}
        for candidate in sorted(file.glob("*.json")):
            if candidate.name.startswith("tiles-"):  # those of tools/tune.py, kept beside reports
                continue
            try:
                found[candidate] = read_report(candidate)
            except ValueError as error:
                print(f"passed over: {error}")
        if not found:
            raise ValueError(f"{file}: there is no report in this folder")
        reports |= found
    return reports


def write_page(reports: dict[Path, Report], out: Path) -> Path:
    """Write report.md and its plots; its path.  The folder is made if need be."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# What gemcut-bench measured", "", *_goals(list(reports.values()))]
    for device in _devices(reports.values()):
        own = {file: report for file, report in reports.items() if device_of(report) == device}
        plots = make_plots(list(own.values()), out)
        lines += _device_section(device, own, [plot.name for plot in plots])
    page = out / PAGE
    page.write_text("\n".join(lines))
    return page


def _devices(reports: Iterable[Report]) -> list[str]:
    """The devices of these reports, each once, GPUs first."""
    return list(dict.fromkeys(map(device_of, sorted(reports, key=on_gpu, reverse=True))))


def _goals(reports: Sequence[Report]) -> list[str]:
    """All goals for each GPU; those of a CPU are in each table."""
    cpu = [report for report in reports if not on_gpu(report)]
    lines = ["## Goals", ""]
    for device in _devices(filter(on_gpu, reports)):
        own = [report for report in reports if device_of(report) == device]
        lines += [f"{device}:", "", *goals_table(own + cpu)]
    return lines if len(lines) > 2 else [*lines, NO_GPU, "", *goals_table(cpu)]


def _device_section(device: str, reports: dict[Path, Report], plots: Sequence[str]) -> list[str]:
    own = list(reports.values())
    lines = [f"## {device}", "", *_machine_table(own), *_files_table(reports)]
    interrupted = [str(file.name) for file, report in reports.items() if report["interrupted"]]
    if interrupted:
        lines += [f"**Interrupted**, and complete only so far: {', '.join(interrupted)}.", ""]
    for plot in plots:
        lines += [f"![{plot.removesuffix('.png')}]({plot})", ""]
    for title, table in SECTIONS.items():
        if part := table(own):
            lines += [f"### {title}", "", *part]
    return lines


def _machine_table(reports: Sequence[Report]) -> list[str]:
    """Each fact of the machine; all its values, where runs differ."""
    facts = {name: [report["machine"].get(name) for report in reports] for name in MACHINE}
    for report in reports:
        for name, version in report["machine"].get("versions", {}).items():
            facts.setdefault(name, []).append(version)
    rows = []
    for name, values in facts.items():
        if known := [str(value) for value in dict.fromkeys(values) if value is not None]:
            rows.append([name, ", ".join(known)])
    return markdown(("machine", ""), rows)


def _files_table(reports: dict[Path, Report]) -> list[str]:
    rows = []
    for file, report in reports.items():
        asked = [f"{name} {_words(v)}" for name, v in report["arguments"].items() if v is not None]
        ceilings = [report["ceilings"].get(name) for name in CEILINGS]
        measured = ["" if value is None else figures(value) for value in ceilings]
        commit = str(report["machine"].get("commit") or "")
        rows.append([file.name, report["benchmark"], ", ".join(asked), commit, *measured])
    header = ["report", "benchmark", "asked for", "commit"]
    return markdown([*header, "read, GB/s", "copy, GB/s", "products, TFLOP/s"], rows)


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def readme_table(reports: Sequence[Report]) -> str:
    """The tables of a README: decoding and a few kernels on GPUs, decoding on CPUs."""
    told = [report for report in reports if report["benchmark"] in ("decode", "kernels")]
    lines = []
    for device in _devices(filter(on_gpu, told)):
        own = [report for report in told if device_of(report) == device]
        if tables := [*decode_summary(own), *kernels_summary(own)]:
            lines += [_caption(device, own), "", *tables]
    if not lines:
        lines += [NO_GPU, ""]
    for device in _devices(report for report in told if not on_gpu(report)):
        own = [report for report in told if device_of(report) == device]
        if table := cpu_decode_summary(own):
            lines += [_caption(device, own), "", *table]
    return "\n".join(lines).strip()


def _caption(device: str, reports: Sequence[Report]) -> str:
    """The device, driver, torch and commit of a table's numbers."""
    machines = [report["machine"] for report in reports]
    facts = {
        "driver": [machine.get("driver") for machine in machines],
        "torch": [machine.get("versions", {}).get("torch") for machine in machines],
        "commit": [(machine.get("commit") or "")[:12] for machine in machines],
    }
    words = [device]
    for name, values in facts.items():
        if known := [str(value) for value in dict.fromkeys(values) if value]:
            words.append(f"{name} {' and '.join(known)}")
    interrupted = " A run was interrupted." if any(r["interrupted"] for r in reports) else ""
    return f"{', '.join(words)}; median (range) of the rounds.{interrupted}"


def replace_results(text: str, table: str, file: Path) -> str:
    """A README's text with `table` between its markers; ValueError where these are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{file}: the lines {BEGIN} and {END} must stand there once, in this order"
        )
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {getattr(error, 'strerror', None) or 'is no text'}") from None
