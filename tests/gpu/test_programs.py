"""Compiled and recorded programs, and their kernels, against the plain ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.data.prepare import prepare
from orchestrator.records import BaseModel, Evaluated, TrialDone
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.dora import lengths, squared_lengths
from orchestrator.training.loss import weighted_losses
from orchestrator.training.model_source import folder_digest
from orchestrator.training.pack import PackWorker
from tests.sweeps import sweep_config
from tests.tiny import question_rows
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, killed_and_resumed, task, train

BFLOAT16 = QuantConfig(compute_dtype="bfloat16").model_dump()


def final_losses(events: list[object]) -> dict[int, float]:
    return {event.trial: event.eval_loss for event in events if isinstance(event, TrialDone)}


@pytest.mark.parametrize("program", ["compiled", "graph"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "kept_layers": 1},
        {"dropout": True},
    ],
)
def test_a_constant_program_trains_as_the_eager_one(
    make_spec: MakeSpec, tmp_path: Path, program: str, changes: dict[str, Any]
) -> None:
    dropout = 0.2 if changes.get("dropout") else 0.0
    trials = [
        trial_config(steps=20, adapter__rank=2, seed=1, adapter__dropout=dropout),
        trial_config(steps=20, adapter__rank=8, seed=2, optimizer__learning_rate=3e-3),
        trial_config(steps=10, seed=3),  # takes a slot that another leaves
    ]
    spec = make_spec(device="cuda", quant=BFLOAT16)
    _, events = train(spec, trials, tmp_path / "eager")
    changed = make_spec(device="cuda", quant=BFLOAT16, step_program=program, **changes)
    _, changed_events = train(changed, trials, tmp_path / program)
    eager, constant = final_losses(events), final_losses(changed_events)
    assert constant.keys() == eager.keys()
    for trial, loss in eager.items():
        assert constant[trial] == pytest.approx(loss, abs=0.05)


@pytest.mark.parametrize("program", ["compiled", "graph"])
@pytest.mark.parametrize("quant", [{"bit_width": 16}, {"bit_width": 4}])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_constant_program_trains_dora_as_the_eager_one(
    make_spec: MakeSpec, tmp_path: Path, program: str, quant: dict[str, int], dropout: float
) -> None:
    trials = [
        trial_config(steps=20, adapter__use_dora=True, adapter__dropout=dropout, seed=1),
        trial_config(
            steps=20,
            adapter__use_dora=True,
            adapter__rank=8,
            adapter__target_modules=("q_proj", "down_proj"),
            seed=2,
        ),
        trial_config(steps=10, adapter__use_dora=True, seed=3),
    ]
    losses = []
    for kind in ("eager", program):
        spec = make_spec(device="cuda", quant=BFLOAT16 | quant, step_program=kind)
        _, events = train(spec, trials, tmp_path / kind)
        losses.append(final_losses(events))
        begun = [event for event in events if isinstance(event, Evaluated) and event.step == 0]
        assert len({event.eval_loss for event in begun}) == 1
        done = [event for event in events if isinstance(event, TrialDone)]
        assert all(event.eval_loss < event.baseline_eval_loss - 0.1 for event in done)
    for trial, loss in losses[0].items():
        assert losses[1][trial] == pytest.approx(loss, abs=0.05)


def test_a_recorded_dora_trial_killed_and_resumed_ends_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    config = trial_config(adapter__use_dora=True, adapter__dropout=0.1, batch_size=4)
    spec = make_spec(device="cuda", quant={**BFLOAT16, "bit_width": 4}, step_program="graph")
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]
    resumed = killed_and_resumed(spec, config, tmp_path / "cut")
    assert resumed.adapter_digest == undisturbed.adapter_digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lengths_of_a_layers_rows_on_a_gpu_are_those_of_the_whole_weight(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(512, 384, device="cuda", dtype=dtype)
    A = torch.randn(3, 512, 16, device="cuda") / 32
    B = torch.randn(3, 16, 384, device="cuda") / 32
    scaling = torch.tensor([0.0, 1.0, 2.0], device="cuda").view(3, 1, 1)
    found = lengths(base, squared_lengths(base, torch.float32), A, B, scaling)
    whole = base.weight.double() + scaling * (A.double() @ B.double()).transpose(1, 2)
    expected = whole.norm(dim=2)[:, None].float()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_a_recorded_program_in_float32_is_compiled_instead(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """Its attention needs masks; the numbers are the eager ones to rounding."""
    torch.backends.cuda.matmul.allow_tf32 = False
    trials = [trial_config(seed=1), trial_config(seed=2, adapter__rank=8)]
    eager, _ = train(make_spec(device="cuda"), trials, tmp_path / "eager")
    spec = make_spec(device="cuda", step_program="graph")
    compiled, _ = train(spec, trials, tmp_path / "compiled")
    for number in range(2):
        assert_equal(eager[number], compiled[number], tolerance=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_a_recorded_trial_killed_and_resumed_ends_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path, optimizer: str
) -> None:
    config = trial_config(
        optimizer__name=optimizer, adapter__rank=64, adapter__dropout=0.1, batch_size=4
    )
    quant = {**BFLOAT16, "bit_width": 4}
    spec = make_spec(
        device="cuda", quant=quant, max_rank=64, step_program="graph", dequantise_once=True
    )
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]
    resumed = killed_and_resumed(spec, config, tmp_path / "cut")
    assert resumed.adapter_digest == undisturbed.adapter_digest


def test_a_program_built_anew_with_other_lanes_goes_on_where_the_last_one_stopped(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    trial = trial_config(steps=8, batch_size=4)
    spec = make_spec(device="cuda", quant=BFLOAT16, step_program="graph", num_slots=4)
    _, undisturbed = train(spec, [trial], tmp_path / "whole")
    worker = PackWorker(spec)
    worker.load()
    events = worker.advance([task(0, trial, tmp_path / "changed")])  # the checkpoint at step 2
    for lanes in (1, 2, 4):
        del worker.engine.program
        worker.engine.program = worker.programs.build(lanes)
        events += worker.advance([])
    assert worker.engine.program.num_lanes == 4
    while worker.slots:
        events += worker.advance([])
    assert final_losses(events)[0] == pytest.approx(final_losses(undisturbed)[0], abs=0.02)


def test_long_blocks_give_the_same_bits_every_time(
    make_spec: MakeSpec, base_folder: Path, tmp_path: Path
) -> None:
    """Attention's gradient by queries has a part from each tile of keys, added up in one order."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"{row} " * 9}) + "\n" for row in question_rows(99))
    )
    changes = {"data__train": str(rows), "data__format": "text", "data__block_length": 1024}
    data = prepare(sweep_config(**changes).data, base_folder, tmp_path)
    spec = make_spec(
        device="cuda",
        quant=BFLOAT16,
        step_program="graph",
        data_place=data.place,
    )
    trials = [trial_config(steps=20, seed=1), trial_config(steps=20, seed=2)]
    digests = []
    for number in range(2):
        _, events = train(spec, trials, tmp_path / str(number))
        digests.append([event.adapter_digest for event in events if isinstance(event, TrialDone)])
    assert digests[0] == digests[1]


BITS = [
    {"bit_width": 4},
    {"bit_width": 8, "int8_type": "blockwise"},
    {"bit_width": 4, "bit_width_pattern": {"down_proj": 8, "o_proj": 16}},
]


def load(folder: Path, quant: dict[str, Any], **options: bool) -> LoadedBase:
    config = QuantConfig.model_validate(quant | {"compute_dtype": "bfloat16"})
    base = BaseModel("tiny", None, str(folder), "digest")
    return load_base_model(base, config, "cuda", StrategyConfig(), **options)


@pytest.mark.parametrize("quant", BITS)
def test_dequantised_once_the_base_computes_the_same_bits(
    base_folder: Path, quant: dict[str, Any]
) -> None:
    packed = load(base_folder, quant)
    once = load(base_folder, quant, dequantise_once=True)
    words = torch.arange(48, device="cuda").view(1, 48)
    positions = torch.arange(48, device="cuda").view(1, 48)
    assert torch.equal(once.hidden(words, positions), packed.hidden(words, positions))


@pytest.mark.parametrize("quant", BITS)
def test_a_base_read_back_from_disk_has_the_bits_of_a_fresh_one(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: dict[str, Any]
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    config = QuantConfig.model_validate(quant | {"compute_dtype": "bfloat16"})
    base = BaseModel("tiny", None, str(base_folder), folder_digest(base_folder))
    fresh, writing, reading = (
        load_base_model(base, config, "cuda", StrategyConfig(), cache_bytes=cache_bytes).model
        for cache_bytes in (0, 2**30, 2**30)
    )
    (entry,) = (tmp_path / "quantised").iterdir()
    assert (entry / "index.json").exists()
    for other in (writing, reading):
        found = dict(other.named_buffers(), **dict(other.named_parameters()))
        for name, tensor in [*fresh.named_buffers(), *fresh.named_parameters()]:
            assert found[name].is_cuda
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("quant", BITS)
@pytest.mark.parametrize("dequantise_once", [False, True])
def test_a_base_of_any_bits_trains_in_a_recorded_program(
    make_spec: MakeSpec, tmp_path: Path, quant: dict[str, Any], dequantise_once: bool
) -> None:
    config = QuantConfig.model_validate(quant | {"compute_dtype": "bfloat16"})
    spec = make_spec(
        device="cuda",
        quant=config.model_dump(),
        step_program="graph",
        dequantise_once=dequantise_once,
    )
    trials = [trial_config(steps=20, seed=1), trial_config(steps=20, seed=2)]
    _, events = train(spec, trials, tmp_path)
    done = [event for event in events if isinstance(event, TrialDone)]
    assert len(done) == 2
    assert all(event.eval_loss < event.baseline_eval_loss - 0.2 for event in done)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cross_entropy_kernel_is_the_plain_one(dtype: torch.dtype) -> None:
    from orchestrator.training import kernels

    logits = (torch.randn(37, 20_011, device="cuda") * 4).to(dtype)
    labels = torch.randint(20_011, (37,), device="cuda")
    factors = torch.rand(37, device="cuda")
    losses, gradient = kernels.weighted_losses(logits, labels, factors)
    expected, expected_gradient = weighted_losses(logits, labels, factors)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-6)


def test_a_logit_that_is_nan_makes_its_own_row_nan_alone() -> None:
    from orchestrator.training import kernels

    logits = torch.randn(3, 9000, device="cuda")
    logits[1, 8999] = torch.nan
    labels = torch.zeros(3, dtype=torch.long, device="cuda")
    losses, gradient = kernels.weighted_losses(logits, labels, torch.ones(3, device="cuda"))
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lanes_gradients_reach_their_slots_rows_and_no_other(dtype: torch.dtype) -> None:
    from orchestrator.training.kernels import GradientGatherer

    segments = [(0, 1500), (1500, 1516), (1516, 5000)]
    parts = [torch.randn(2, end - start, device="cuda").to(dtype) for start, end in segments]
    rows = torch.ones(4, 5000, device="cuda")
    gatherer = GradientGatherer(segments, torch.device("cuda", 0))
    gatherer.add(parts, rows, slots=[3, 1], fresh=[True, False])
    whole = torch.cat(parts, dim=1).float()
    expected = torch.ones(4, 5000, device="cuda")
    expected[3] = whole[0]
    expected[1] += whole[1]
    assert torch.equal(rows, expected)
