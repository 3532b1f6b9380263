"""`orchestrator plan`: what it says of a sweep on GPUs that are not there."""

import re
from pathlib import Path

import pytest

from jobs.dry_run import show_plan
from jobs.plan import show
from orchestrator.errors import ConfigError
from orchestrator.planning.capacity import Node
from orchestrator.planning.measured import Factors, Measurement
from orchestrator.planning.shape import BaseShape, read_shape
from orchestrator.sweep.earlier import keep_speeds
from tests.unit.test_layering import heavy_modules_after
from tests.unit.test_memory_plan import sweep_file

__all__ = ["sweep_file"]  # a fixture

LAPTOP = Node(4, 0, 0, 8 * 2**30)


def shown(path: Path, gpus: str | None, capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    assert show(path, list(settings), gpus, LAPTOP) == 0
    return capsys.readouterr().out


def test_a_laptop_says_what_a_sweep_takes_on_gpus_that_it_does_not_have(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(sweep_file, "1xH100-80GB", capsys, "resources.cost_per_hour=3")
    assert "workers: 1 x H100-80GB of 79.6 GiB" in out
    assert "recorded step" in out
    peak, most = (
        float(re.search(rf"{words} +│ +([\d.]+)", out)[1])  # type: ignore[index]
        for words in ("at its peak", "may be used")
    )
    assert 0 < peak < most == pytest.approx(0.9 * 79.6, abs=0.01)
    hours = re.search(r"predicted: ([\d.]+) hours, ([\d.]+) GPU-hours", out)
    assert hours is not None
    assert hours[1] == hours[2]
    price = re.search(r"price: ([\d.]+) at 3", out)
    assert price is not None
    assert float(price[1]) == pytest.approx(3 * float(hours[2]), abs=0.02)
    (chart,) = re.findall(r" 0 \|(.*)\|", out)
    assert re.fullmatch(r"\.+[0=]+ *", chart)


def test_each_kind_of_pack_has_its_own_memory(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = "search.space={micro_batch_size: [1, 4]}"
    out = shown(sweep_file, "1xH100-80GB", capsys, space, "trial.batch_size=4")
    (line,) = re.findall(r"at its peak.*", out)
    one, four = map(float, re.findall(r"[\d.]+", line))
    assert one < four
    assert "1 block a pass" in out
    assert "4 blocks a pass" in out


def test_times_under_zero_are_said_to_be_the_least(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "of packs under ZeRO these are the least"
    settings = ("resources.workers_per_pack=2", "trial.strategy={kind: zero, stage: 3}")
    assert words in shown(sweep_file, "2xH100-80GB", capsys, *settings)
    assert words not in shown(sweep_file, "2xH100-80GB", capsys)


def test_a_machine_whose_gpus_are_known_plans_for_them_as_if_they_were_named(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Node(16, 2, int(79.6 * 2**30), gpu_kind="NVIDIA H100 80GB HBM3")
    assert show(sweep_file, [], None, machine) == 0
    own = capsys.readouterr().out
    named = shown(sweep_file, "2xH100-80GB", capsys)
    (hours,) = re.findall(r"predicted: .*", own)
    assert hours in named


def test_a_plan_goes_by_what_earlier_sweeps_of_its_base_measured(
    sweep_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    fresh = shown(sweep_file, "1xH100-80GB", capsys)
    factors = Factors()
    for pack in range(3):
        factors.add(pack, "H100", "4-bit nf4, dequantised", Measurement(1, 1.0, 2.0))
    shape = read_shape(tmp_path / "base")
    assert isinstance(shape, BaseShape)
    keep_speeds(shape, factors)
    corrected = shown(sweep_file, "1xH100-80GB", capsys)
    words = "4-bit nf4, dequantised on H100: times x 2.00, as earlier sweeps measured"
    assert words in corrected
    assert words not in fresh
    rate, half = (
        float(re.search(r"│ +([\d,]+) │ 0:00:00", out)[1].replace(",", ""))  # type: ignore[index]
        for out in (fresh, corrected)
    )
    assert half == pytest.approx(rate / 2, abs=1)


def test_trials_that_are_not_known_yet_are_in_the_hours_and_the_price(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = "search={space: {adapter.rank: [4, 8]}, sampler: tpe, pruner: asha, num_trials: %d}"
    steps = "trial.steps=20000"
    ten, forty = (shown(sweep_file, "1xH100", capsys, space % count, steps) for count in (10, 40))
    hours = [float(re.search(r"predicted: ([\d.]+)", out)[1]) for out in (ten, forty)]  # type: ignore[index]
    assert hours[1] > 2 * hours[0]
    assert "only trials 0-9 are known before results are in" in forty
    assert "only trials" not in ten
    assert "less as far as asha stops trials" in forty


def test_trials_that_a_constraint_refuses_are_named_and_take_no_time(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = "search.constraints.adapter_mb=0.1"
    out = shown(sweep_file, "1xH100", capsys, "search.space={adapter.rank: [1, 64]}", limit)
    assert "trial 1 will not be trained: expected: adapter_mb is" in out
    assert "trial 0 will not be trained" not in out
    assert re.search(r"0:00:00 │ +\S+ │ 0 ", out)


def test_a_constraint_on_memory_binds_on_gpus_of_any_size(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(sweep_file, "1xH100,1xL4", capsys, "search.constraints.peak_memory_gib=10")
    allowed = re.search(r"may be used((?: +│ +[\d.]+)+)", out)
    assert allowed is not None
    assert set(re.findall(r"[\d.]+", allowed[1])) == {"9.00"}


def test_the_fastest_gpus_are_named_first(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(sweep_file, "1xA100-40GB,1xH100", capsys)
    first, second = re.findall(r"workers: 1 x (\S+) of", out)
    assert (first, second) == ("H100", "A100-40GB")


@pytest.mark.parametrize("gpus", ["1xH100-80GB,1xH100-80GB", "1xH100-80GB,1xH100"])
def test_gpus_that_are_named_twice_are_added(
    sweep_file: Path, gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(sweep_file, gpus, capsys)
    assert re.findall(r"workers: .*", out) == ["workers: 2 x H100-80GB of 79.6 GiB"]
    assert len(re.findall(r" \d \|(.*)\|", out)) == 2


def test_a_base_of_auto_may_take_its_budget_and_less_than_its_least_is_refused(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["resources.dequantise_once=false", "trial.quant.bit_width=auto"]
    out = shown(sweep_file, "1xL4", capsys, *kept, "trial.quant.budget_gib=0.07")
    assert re.search(r"base, as stored +│ +0.07 ", out)
    words = r"budget_gib=0.01 is less than the \d\.\d+ GiB that the base takes at the fewest bits"
    with pytest.raises(ConfigError, match=words):
        show(sweep_file, [*kept, "trial.quant.budget_gib=0.01"], "1xL4", LAPTOP)
    with pytest.raises(ConfigError, match=words):
        show_plan(sweep_file, [*kept, "trial.quant.budget_gib=0.01"], None, None, LAPTOP)
    assert "base" not in capsys.readouterr().out


def test_without_a_gpu_or_a_base_no_time_is_predicted_and_the_plan_says_why(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(sweep_file, None, capsys)
    assert "time: not predicted: say with --gpus which GPUs the sweep will have" in out
    out = shown(sweep_file, "2xH100", capsys, "base_model.source=org/hub")
    assert "time: not predicted: the base is not here yet" in out
    assert "predicted: " not in out.replace("not predicted: ", "")


@pytest.mark.parametrize(
    ("gpus", "settings", "words"),
    [
        ("2xNothing", [], "known: H200"),
        ("2xH100", ["resources.num_workers=3"], "--gpus 2xH100 has fewer"),
        ("2xH100", ["resources.device=cpu"], "set auto or cuda"),
        ("2xH100", ["resources.workers_per_pack=4"], "there are 2: set it to 2 or less"),
        (
            "2xH100,3xL4",
            ["resources.workers_per_pack=4"],
            "of one kind of GPU, but there are 2 x H100 and 3 x L4: set it to 3 or less",
        ),
    ],
)
def test_gpus_that_the_sweep_cannot_use_are_refused(
    sweep_file: Path, gpus: str, settings: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        show(sweep_file, settings, gpus, LAPTOP)


def test_a_plan_loads_nothing_heavy(sweep_file: Path) -> None:
    assert heavy_modules_after("plan", str(sweep_file), "--gpus", "8xH100-80GB") == set()
