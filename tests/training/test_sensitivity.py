"""What layers' bits cost: measured, and what a sweep makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs.cli import run
from orchestrator.config import QuantConfig
from orchestrator.data.prepare import find_prepared
from orchestrator.files import read_json
from orchestrator.planning.allocation import LayerLoss, allocate, resolved
from orchestrator.planning.bits import bits_of
from orchestrator.planning.shape import BaseShape, read_shape
from orchestrator.records import TrialSpec
from orchestrator.sweep.bits import BitChooser
from orchestrator.sweep.run_store import RunStore
from orchestrator.training.base_model import load_base_model
from orchestrator.training.sensitivity import measure_sensitivity
from tests.sweeps import sweep_config
from tests.training.conftest import MakeSpec

FLOAT32 = QuantConfig(compute_dtype="float32")


def test_the_layer_whose_outputs_matter_most_is_the_most_sensitive(
    make_spec: MakeSpec, base_folder: Path
) -> None:
    spec = make_spec()
    found = measure_sensitivity(spec.base_model, FLOAT32, "cpu", spec.data_place, 512)
    assert len(found) == 14
    assert len({layer.name for layer in found}) == 14
    for layer in found:
        increases = layer.loss_increase
        assert 0 == increases[16] < increases[8] < increases[4] / 50, layer
    by_name = {layer.name: layer.loss_increase[4] for layer in found}
    assert min(by_name.values()) > 0
    assert max(by_name.values()) > 3 * min(by_name.values())
    again = measure_sensitivity(spec.base_model, FLOAT32, "cpu", spec.data_place, 512)
    assert again == found


def test_the_expected_increase_follows_the_change_of_the_loss(
    make_spec: MakeSpec, base_folder: Path
) -> None:
    """The outputs' change per layer, measured by putting single layers at 4 bits: the layers that
    are expected to change most do."""
    from orchestrator.config import StrategyConfig

    spec = make_spec()
    found = measure_sensitivity(spec.base_model, FLOAT32, "cpu", spec.data_place, 512)
    names = [layer.name for layer in found]
    words = torch.randint(5, 260, (4, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).repeat(4, 1)

    def logits(pattern: dict[str, int]) -> torch.Tensor:
        quant = QuantConfig(bit_width=16, bit_width_pattern=pattern, compute_dtype="float32")
        base = load_base_model(spec.base_model, quant, "cpu", StrategyConfig())
        with torch.no_grad():
            return base.head(base.hidden(words, positions).flatten(0, 1)).log_softmax(-1)

    exact = logits({})
    change = {
        name: float((exact.exp() * (exact - logits({name: 4}))).sum(-1).mean()) for name in names
    }
    expected = {layer.name: layer.loss_increase[4] for layer in found}
    by_change = sorted(names, key=change.__getitem__)
    by_expected = sorted(names, key=expected.__getitem__)
    most, least = set(by_expected[-4:]), set(by_expected[:4])
    assert len(most & set(by_change[-7:])) >= 3, (change, expected)
    assert len(least & set(by_change[:7])) >= 3, (change, expected)


@pytest.fixture
def config_file(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    rows = [f'{{"prompt": "{n} plus 1?", "completion": "It is {n + 1}."}}' for n in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    content = {
        "name": "bits",
        "base_model": {"source": str(base_folder)},
        "data": {"train": str(tmp_path / "train.jsonl"), "block_length": 64},
        "trial": {
            "steps": 2,
            "batch_size": 2,
            "adapter": {"rank": 2},
            "quant": {"bit_width": "auto", "average_bits": 6, "compute_dtype": "float32"},
        },
        "runs_dir": str(tmp_path / "runs"),
        "registry": {"register_winner": False},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_trial_of_auto_bits_trains_on_a_map_that_every_record_names(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a dry run shows it, once it was measured."""
    dry_run = ["sweep", str(config_file), "--dry-run"]
    assert run(dry_run) == 0
    assert "bits: auto (6 bits): measured and chosen for each layer" in capsys.readouterr().out
    folder = tmp_path / "run"
    assert run(["train", str(config_file), "--run-dir", str(folder)]) == 0
    store = RunStore.open(folder)
    (trial,) = store.trials
    quant = trial.config.quant
    (chosen,) = read_json(folder / "bits.json").values()
    assert quant.bit_width == "auto"
    assert quant.bit_width_pattern == chosen["bit_width_pattern"]
    assert quant.average_bits is not None
    assert 5.5 < quant.average_bits <= 6
    assert chosen["num_layers"].keys() >= {"4", "8"}
    (result,) = store.results
    record = read_json(folder / result.adapter_dir / "orchestrator.json")
    assert record["quant"]["bit_width_pattern"] == quant.bit_width_pattern
    sensitivity = list((tmp_path / "cache" / "sensitivity").glob("*.json"))
    assert len(sensitivity) == 1, "kept for the next sweep"
    capsys.readouterr()
    assert run(dry_run) == 0
    shown = capsys.readouterr().out
    assert f"bits: auto (6 bits): as measured last, {chosen['reason']}" in shown
    for names, bits in quant.bit_width_pattern.items():
        assert f"{bits} bits: {names}" in shown


def test_a_pattern_for_no_layer_of_the_base_is_refused_before_anything_is_started(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for field, layers in (
        ("quant.bit_width_pattern", "of the base model"),
        ("adapter.rank_pattern", "that takes an adapter"),
        ("adapter.alpha_pattern", "that takes an adapter"),
    ):
        change = ["--set", f"trial.{field}={{w_proj: 8}}"]
        assert run(["sweep", str(config_file), "--dry-run", *change]) == 2
        message = f"{field}: 'w_proj' matches no linear layer {layers}; these are down_proj"
        assert message in capsys.readouterr().err


def test_a_target_module_that_the_base_does_not_have_is_refused_before_anything_is_started(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change in (
        "trial.adapter.target_modules=[q_proj, v_prj]",
        "search.space={adapter.target_modules: [[q_proj], [v_prj]]}",
    ):
        assert run(["sweep", str(config_file), "--dry-run", "--set", change]) == 2
        message = "'v_prj' matches no linear layer of the base model; it has down_proj"
        assert message in capsys.readouterr().err


def test_a_budget_that_is_too_small_is_refused_before_anything_is_trained(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["train", str(config_file), "--run-dir", str(folder)]
    assert run([*command, "--set", "trial.quant.average_bits=4.1"]) == 2
    assert "set quant.average_bits to 4.127 or more" in capsys.readouterr().err
    assert RunStore.open(folder).trials == []


@pytest.mark.slow
def test_a_point_whose_budget_no_map_fits_is_not_valid_and_the_others_train(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """6 bits are too few where down_proj keeps its 16."""
    folder = tmp_path / "run"
    space = "{quant.average_bits: [6, 12], quant.bit_width_pattern: [{}, {down_proj: 16}]}"
    command = ["sweep", str(config_file), "--set", f"search.space={space}"]
    command += ["--set", "resources.num_workers=1", "--run-dir", str(folder)]
    assert run(command) == 0
    results = sorted(RunStore.open(folder).results, key=lambda result: result.number)
    assert [result.reason for result in results] == ["", "not_valid", "", ""]
    assert "quant.average_bits=6 is less than the " in results[1].message
    assert "at the fewest with quant.bit_width_pattern={down_proj: 16}" in results[1].message
    capsys.readouterr()
    assert run([*command[:4], "--dry-run"]) == 0
    assert f"bits: auto (6 bits): not trained: {results[1].message}" in capsys.readouterr().out


def test_the_map_that_was_chosen_covers_every_layer_of_the_base(make_spec: MakeSpec) -> None:
    spec = make_spec()
    layers = measure_sensitivity(spec.base_model, FLOAT32, "cpu", spec.data_place, 512)
    asked = QuantConfig(bit_width="auto", average_bits=5, compute_dtype="float32")
    quant = resolved(asked, allocate(asked, layers, 0, 4))
    assert {bits_of(quant, layer.name) for layer in layers} <= {4, 8, 16}


def test_a_map_stays_as_it_was_chosen_where_layers_are_measured_anew(
    make_spec: MakeSpec, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, shape = make_spec(), read_shape(base_folder)
    data = find_prepared(spec.data_place)
    assert data is not None
    assert isinstance(shape, BaseShape)
    auto = {"bit_width": "auto", "average_bits": 5}
    config = sweep_config(trial__quant=auto, search__space={})
    trial = TrialSpec(0, {}, config.trial)
    layers = shape.linears

    def settled(machine: str, losses: list[float], chosen: dict[str, Any]) -> TrialSpec:
        monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / machine))
        found = [
            LayerLoss(layer.name, layer.num_params, {4: loss, 8: loss / 200, 16: 0.0})
            for layer, loss in zip(layers, losses, strict=True)
        ]
        chooser = BitChooser(spec.base_model, shape, data, "float32", "cpu")
        chooser.chosen |= chosen
        chooser.measure(config, lambda job: found, lambda words: None)
        settled = chooser.settle(trial)
        chosen |= chooser.chosen
        return settled

    rising = [float(number + 1) for number in range(len(layers))]
    chosen: dict[str, Any] = {}
    first = settled("one", rising, chosen)
    assert settled("another", rising[::-1], chosen) == first
    assert settled("another", rising[::-1], {}) != first
