"""tools/prediction/fit_machine.py: planted constants are found again, other files refused."""

import json
from dataclasses import replace

import pytest
from predicted import small_step

from gemcut.tools.machine import H200, Machine
from gemcut.tools.prediction import fit_machine
from gemcut.tools.prediction.fit_machine import Profile, fit, least, read_profile, scaled
from gemcut.tools.prediction.predicted_step import PredictedStep

# latencies and ends trade with each other: a profile of few kernels cannot tell them apart
PLANTED = {"bandwidth": 0.93, "clock": 0.8}


def measured(step: PredictedStep, machine: Machine) -> Profile:
    """The profile that a GPU would leave if it were this machine."""
    kernels: dict[str, tuple[float, float]] = {}
    for count, made in step.made():
        name = "void at::native::gather()" if made.launch is None else made.name
        launches, us = kernels.get(name, (0.0, 0.0))
        kernels[name] = launches + count, us + count * step.us(made, machine)
    gaps = machine.launch_gap_us * sum(count for count, _ in step.made())
    return Profile(step.model, step.batch, step.context, kernels, gaps)


def test_planted_constants_are_found():
    gpu = replace(scaled(H200, PLANTED), launch_gap_us=1.7, torch_us=2.6)
    gpu = replace(gpu, small_us={"advance_kernel": 3.1})
    step = small_step()
    fitted, residuals = fit([(measured(step, gpu), step)])
    assert fitted.launch_gap_us == pytest.approx(1.7)
    assert (fitted.small_us["advance_kernel"], fitted.torch_us) == pytest.approx((3.1, 2.6))
    assert fitted.bandwidth == pytest.approx(gpu.bandwidth, rel=0.02)
    assert fitted.ghz == pytest.approx(gpu.ghz, rel=0.05)
    assert fitted.fill_us == pytest.approx(gpu.fill_us, rel=0.25)
    assert step.step_us(fitted) == pytest.approx(step.step_us(gpu), rel=0.01)
    assert {r.kernel for r in residuals} >= {"linear_geglu_kernel", "skinny_linear_kernel"}
    assert all(r.after_us == pytest.approx(r.measured_us, rel=0.03) for r in residuals)
    assert any(abs(r.before_us / r.measured_us - 1) > 0.05 for r in residuals)


def test_a_machine_as_estimated_stays():
    step = small_step()
    fitted, _ = fit([(measured(step, H200), step)])
    for group in fit_machine.FACTORS.values():
        for field in group:
            assert getattr(fitted, field) == pytest.approx(getattr(H200, field), rel=0.03)


def test_noise_moves_little():
    step = small_step()
    profile = measured(step, H200)
    noisy = {
        name: (n, us * (1.05 if i % 2 else 0.95))
        for i, (name, (n, us)) in enumerate(profile.kernels.items())
    }
    fitted, _ = fit([(replace(profile, kernels=noisy), step)])
    assert step.step_us(fitted) == pytest.approx(step.step_us(H200), rel=0.06)


def test_a_foreign_profile_is_refused():
    profile = Profile("gemma-2-2b", 1, 1024, {"ampere_bf16_gemm": (52.0, 900.0)}, 10.0)
    with pytest.raises(ValueError, match="no kernel of the profile of gemma-2-2b"):
        fit([(profile, small_step())])


def test_least():
    assert least(lambda x: (x - 0.3) ** 2, -1, 1) == pytest.approx(0.3, abs=1e-4)
    assert least(lambda x: x, 2, 5) == pytest.approx(2, abs=1e-3)


def test_a_breakdown_is_read(tmp_path):
    line = {"kernel": "lm_head_kernel", "launches": 1.0, "us": 300.0, "gap_us": 2.0}
    report = {"machine": {}, "model": "gemma-2-2b", "batch": 1, "context": 1024, "lines": [line]}
    file = tmp_path / "breakdown.json"
    file.write_text(json.dumps(report))
    profile = read_profile(file)
    assert profile == Profile("gemma-2-2b", 1, 1024, {"lm_head_kernel": (1.0, 300.0)}, 2.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("{", "JSONDecodeError", id="no JSON"),
        pytest.param("[]", "TypeError", id="a list"),
        pytest.param("{}", "KeyError: 'lines'", id="no lines"),
        pytest.param('{"lines": [], "model": "m", "batch": "x"}', "ValueError", id="no number"),
        pytest.param('{"lines": [], "model": "m", "batch": 1, "context": 2}', "empty", id="empty"),
        pytest.param(
            '{"lines": [{"kernel": "k", "launches": 0, "us": 1, "gap_us": 0}], "model": "m", '
            '"batch": 1, "context": 2}',
            "must be above 0",
            id="no launches",
        ),
    ],
)
def test_what_is_no_breakdown(text, reason, tmp_path):
    file = tmp_path / "breakdown.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"is no breakdown of profile_step: .*{reason}"):
        read_profile(file)


def test_a_missing_file():
    with pytest.raises(ValueError, match=r"nowhere\.json: No such file"):
        read_profile(fit_machine.Path("nowhere.json"))
