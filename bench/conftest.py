"""Parameters and fixtures of `pytest bench/`: the cases of `gemcut-bench kernels`."""

import argparse
import shlex

import pytest
import torch

from gemcut.bench.measure.ceilings import measure_ceilings
from gemcut.bench.ops.kernels import Bench, add_arguments, choose_cases, choose_peers, contestants
from gemcut.engine.placement import choose_device, choose_dtype, choose_ops


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option, which takes those of `gemcut-bench kernels`."""
    parser.addoption(
        "--kernels",
        default="",
        metavar="OPTIONS",
        help="of gemcut-bench kernels, as one argument: '--op rmsnorm geglu --peer torch'",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contestant of each case."""
    if "contestant" not in metafunc.fixturenames:
        return
    parser = argparse.ArgumentParser(prog="--kernels")
    add_arguments(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args(shlex.split(metafunc.config.getoption("--kernels")))
    try:
        device = choose_device(arguments.device)
        bench = Bench(
            device,
            choose_dtype(arguments.dtype, device),
            choose_ops(arguments.ops, device),
            choose_peers(arguments.peer),
            arguments.rounds,
            {},
        )
        cases = choose_cases(arguments, device, bench.dtype)
    except ValueError as error:
        raise pytest.UsageError(f"--kernels: {error}") from None
    parameters = [
        pytest.param(case, name, bench, id=f"{case.name}-{name}")
        for case in cases
        for name in contestants(case, bench)
    ]
    metafunc.parametrize(("case", "contestant", "bench"), parameters)


@pytest.fixture(scope="session")
def ceilings() -> dict[torch.dtype, dict[str, float]]:
    """The ceilings by dtype, measured once a run; filled by `measured_ceilings`."""
    return {}


@pytest.fixture
def measured_ceilings(
    bench: Bench, ceilings: dict[torch.dtype, dict[str, float]]
) -> dict[str, float]:
    """The machine's ceilings in the dtype of the run."""
    if bench.dtype not in ceilings:
        ceilings[bench.dtype] = measure_ceilings(bench.device, bench.dtype)
    return ceilings[bench.dtype]
