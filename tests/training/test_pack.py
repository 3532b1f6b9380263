"""A trial in a pack is the same trial alone; PEFT and a plain loop are the reference."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.config import TrialConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.order import step_block_indices
from orchestrator.data.reader import BlockReader
from orchestrator.files import record_digest
from orchestrator.planning.shape import Targets
from orchestrator.records import (
    ALONE,
    Assign,
    Checkpointed,
    Evaluated,
    Event,
    GroupPlace,
    Leave,
    PackLeft,
    PackSpec,
    Progress,
    Prune,
    SlotTask,
    TrialDone,
    TrialOpened,
    TrialStopped,
)
from orchestrator.tracking.adapter_model import load_base
from orchestrator.training.optimizers import learning_rate
from orchestrator.training.pack import PackWorker
from tests.training.conftest import MakeSpec, trial_config

Adapter = dict[str, torch.Tensor]


def task(number: int, config: TrialConfig, folder: Path, attempt: int = 1) -> Assign:
    attempt_dir = folder / str(number) / str(attempt)
    attempt_dir.mkdir(parents=True, exist_ok=True)
    found = sorted((folder / str(number)).glob("*/checkpoint-*"), reverse=True)
    return Assign(SlotTask(number, attempt, config, str(attempt_dir), tuple(map(str, found))))


def train(
    spec: PackSpec, trials: Sequence[TrialConfig], folder: Path, place: GroupPlace = ALONE
) -> tuple[dict[int, Adapter], list[Event]]:
    """All trials through one pack, refilling slots as they come free."""
    worker = PackWorker(spec_for(spec, trials), place)
    worker.load()
    waiting = [task(number, config, folder) for number, config in enumerate(trials)]
    events: list[Event] = []
    adapters: dict[int, Adapter] = {}
    over = 0
    directives, waiting = waiting[: spec.num_slots], waiting[spec.num_slots :]
    while over < len(trials):
        new = worker.advance(directives)
        ended = [event for event in new if isinstance(event, TrialDone | TrialStopped)]
        over += len(ended)
        directives, waiting = waiting[: len(ended)], waiting[len(ended) :]
        events += new
    for event in events:
        if isinstance(event, TrialDone) and place.world_rank == 0:  # it alone writes
            path = Path(event.adapter_dir) / "adapter_model.safetensors"
            adapters[event.trial] = load_file(path)
    return adapters, events


def spec_for(spec: PackSpec, trials: Sequence[TrialConfig]) -> PackSpec:
    """What the planner would say of them."""
    adapters = [trial.adapter for trial in trials]
    dropout = any(adapter.dropout for adapter in adapters)
    return replace(spec, dropout=dropout, dora=any(adapter.use_dora for adapter in adapters))


def killed_and_resumed(
    spec: PackSpec, config: TrialConfig, folder: Path, other: PackSpec | None = None
) -> TrialDone:
    """The end of a trial whose first worker was killed after its checkpoint at step 4."""
    return resumed(spec, config, folder, other)[-1]  # type: ignore[return-value]


def resumed(
    spec: PackSpec, config: TrialConfig, folder: Path, other: PackSpec | None = None
) -> list[Event]:
    """All that the second worker tells, in the same pack or another one."""
    spec = spec_for(spec, [config])
    worker = PackWorker(spec)
    worker.load()
    events = worker.advance([task(0, config, folder)])
    while not any(isinstance(event, Checkpointed) and event.step == 4 for event in events):
        events += worker.advance([])
    del worker  # killed: what is on disk is all there is

    worker = PackWorker(spec if other is None else spec_for(other, [config]))
    worker.load()
    events = worker.advance([task(0, config, folder, attempt=2)])
    while not isinstance(events[-1:] and events[-1], TrialDone):
        events += worker.advance([])
    return events


def assert_equal(one: Adapter, other: Adapter, tolerance: float = 2e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=tolerance, msg=name)


def reference_adapter(spec: PackSpec, trial: TrialConfig) -> Adapter:
    """The same training by plain transformers, PEFT and torch, one document pack at a time."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    worker = PackWorker(spec_for(spec, [trial]))
    worker.load()
    worker.rows.open(0, trial.adapter, trial.seed)
    first = worker.rows.adapter_tensors(0, trial.adapter)

    record = {
        "quant": spec.quant,
        "compute_dtype": spec.quant["compute_dtype"],
        "base_model": {"trust_remote_code": False},
    }
    base = load_base(record, spec.base_model.folder)
    config = LoraConfig(
        r=trial.adapter.rank,
        lora_alpha=trial.adapter.alpha,
        use_rslora=trial.adapter.rslora,
        use_dora=trial.adapter.use_dora,
        rank_pattern=trial.adapter.rank_pattern,
        alpha_pattern=trial.adapter.alpha_pattern,
        target_modules="all-linear",
    )
    model = get_peft_model(base, config)
    state = model.state_dict()
    for name, tensor in first.items():
        own = f"{name.removesuffix('.weight')}.default.weight"
        if "magnitude" in name:  # PEFT takes it from the weights itself
            torch.testing.assert_close(state[own], tensor)
        state[own].copy_(tensor)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, weight_decay=trial.optimizer.weight_decay, eps=trial.optimizer.eps
    )
    reader = BlockReader(load_manifest(spec.data_place, "train"))
    for step in range(trial.steps):
        indices = step_block_indices(trial.seed, step, trial.batch_size, reader.num_blocks)
        batch = reader.blocks(indices)
        logits = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            use_cache=False,  # with a cache transformers does not see that blocks are packed
        ).logits
        labels = torch.from_numpy(batch.labels)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, trial.optimizer.max_grad_norm or math.inf)
        rate = learning_rate(step, trial.steps, trial.optimizer.learning_rate, trial.schedule)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return dict(get_peft_model_state_dict(model))


def test_one_slot_trains_as_plain_peft_does(make_spec: MakeSpec, tmp_path: Path) -> None:
    trial = trial_config(optimizer__weight_decay=0.1, adapter__rslora=True)
    spec = make_spec(num_slots=1)
    adapters, _ = train(spec, [trial], tmp_path)
    assert_equal(adapters[0], reference_adapter(spec, trial))


def test_trials_of_different_rank_rate_and_seed_train_in_a_pack_as_alone(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    trials = [
        trial_config(adapter__rank=2, seed=1),
        trial_config(adapter__rank=8, seed=2, optimizer__learning_rate=3e-3, steps=4),
        trial_config(adapter__rank=4, seed=3, adapter__alpha=32, optimizer__max_grad_norm=0.05),
        trial_config(adapter__rank=3, seed=4, adapter__target_modules=("q_proj", "down_proj")),
    ]
    together, _ = train(make_spec(num_slots=3), trials, tmp_path / "pack")  # the fourth refills
    for number, trial in enumerate(trials):
        alone, _ = train(make_spec(num_slots=1), [trial], tmp_path / f"alone{number}")
        assert_equal(together[number], alone[0])


def test_a_trial_of_few_layers_is_the_same_whatever_layers_its_neighbours_adapt(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    trial = trial_config(adapter__target_modules=("down_proj",), adapter__dropout=0.3, seed=3)
    together, _ = train(make_spec(), [trial_config(seed=1), trial], tmp_path / "pack")
    own = make_spec(num_slots=1, target_modules=("down_proj",))
    alone, _ = train(own, [trial], tmp_path / "alone")
    assert_equal(together[1], alone[0])


def test_dropout_in_a_pack_is_the_dropout_alone(make_spec: MakeSpec, tmp_path: Path) -> None:
    trials = [trial_config(adapter__dropout=0.3, seed=1), trial_config(seed=2)]
    together, _ = train(make_spec(), trials, tmp_path / "pack")
    for number, trial in enumerate(trials):
        alone, _ = train(make_spec(num_slots=1), [trial], tmp_path / f"alone{number}")
        assert_equal(together[number], alone[0])
    undropped, _ = train(make_spec(num_slots=1), [trial_config(seed=1)], tmp_path / "undropped")
    name = next(name for name in undropped[0] if "lora_B" in name)
    assert not torch.allclose(undropped[0][name], together[0][name])


def test_micro_batches_add_up_to_the_whole_batch(make_spec: MakeSpec, tmp_path: Path) -> None:
    trials = [trial_config(batch_size=4)]
    whole, _ = train(make_spec(num_slots=1, micro_batch_size=4), trials, tmp_path / "whole")
    parts, _ = train(make_spec(num_slots=1, micro_batch_size=1), trials, tmp_path / "parts")
    assert_equal(whole[0], parts[0])


@pytest.mark.parametrize("kept_layers", [0, 1])
def test_recomputation_changes_nothing(
    make_spec: MakeSpec, tmp_path: Path, kept_layers: int
) -> None:
    trials = [trial_config(adapter__dropout=0.2)]
    plain, _ = train(make_spec(), trials, tmp_path / "plain")
    spec = make_spec(gradient_checkpointing=True, kept_layers=kept_layers)
    recomputed, _ = train(spec, trials, tmp_path / "recomputed")
    assert_equal(plain[0], recomputed[0])


@pytest.mark.parametrize(
    ("bit_width", "recomputed", "dora"), [(4, True, False), (16, False, False), (4, False, True)]
)
def test_a_step_in_place_ends_with_the_same_bytes(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int, recomputed: bool, dora: bool
) -> None:
    kind: dict[str, Any] = {"adapter__use_dora": dora}
    trials = [
        trial_config(batch_size=4, micro_batch_size=2, adapter__dropout=0.1, **kind),
        trial_config(seed=1, adapter__rank=8, optimizer__name="adamw_8bit", **kind),
    ]
    spec = make_spec(num_slots=1, bit_width=bit_width, gradient_checkpointing=recomputed, dora=dora)
    copying, _ = train(spec, trials, tmp_path / "copying")
    in_place, _ = train(replace(spec, step_program="in_place"), trials, tmp_path / "in_place")
    for number in range(len(trials)):
        for name, tensor in copying[number].items():
            assert torch.equal(in_place[number][name], tensor), name


@pytest.mark.parametrize("bit_width", [4, 8, 16])
def test_training_lowers_the_held_out_loss_at_every_bit_width(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int
) -> None:
    spec = make_spec(bit_width=bit_width, num_slots=1)
    _, events = train(spec, [trial_config(steps=20)], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert done.eval_loss < done.baseline_eval_loss - 0.2
    assert done.tokens > 0
    assert done.num_adapter_params > 0


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_a_trial_killed_and_resumed_ends_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path, optimizer: str
) -> None:
    config = trial_config(optimizer__name=optimizer, adapter__dropout=0.1)
    spec = make_spec(num_slots=1, max_rank=4, bit_width=4)
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]

    again = killed_and_resumed(spec, config, tmp_path / "cut")
    assert again.adapter_digest == undisturbed.adapter_digest
    assert again.tokens == undisturbed.tokens


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "step"), [("adamw", 4), ("paged_adamw_32bit", 4), ("adamw_8bit", 0)]
)
def test_a_trial_goes_on_in_a_pack_of_larger_ranks_and_more_layers(
    make_spec: MakeSpec, tmp_path: Path, optimizer: str, step: int, dora: bool
) -> None:
    """Where a sweep is extended. 8-bit states belong to blocks of the old row: they begin anew."""
    targets = ("q_proj", "down_proj")
    config = trial_config(
        optimizer__name=optimizer,
        adapter__target_modules=targets,
        adapter__rank_pattern={"down_proj": 2},
        adapter__use_dora=dora,
        adapter__dropout=0.3,
    )
    small = make_spec(num_slots=1, max_rank=4, target_modules=targets)
    undisturbed, _ = train(small, [config], tmp_path / "whole")
    events = resumed(small, config, tmp_path / "cut", make_spec(num_slots=3, max_rank=8))
    opened, done = events[0], events[-1]
    assert isinstance(opened, TrialOpened)
    assert isinstance(done, TrialDone)
    assert opened.step == step
    if step:
        assert "max_rank=4" in opened.note
        assert "equal up to rounding" in opened.note
        path = Path(done.adapter_dir) / "adapter_model.safetensors"
        assert_equal(load_file(path), undisturbed[0])
    else:
        assert "layout" in opened.refused_checkpoints[0]


def test_a_pack_that_leaves_saves_every_slot_first(make_spec: MakeSpec, tmp_path: Path) -> None:
    worker = PackWorker(make_spec())
    worker.load()
    config = trial_config(steps=100)
    worker.advance([task(0, config, tmp_path), task(1, config, tmp_path)])
    events = worker.advance([Leave(save=True)])
    kinds = [type(event) for event in events if not isinstance(event, Progress)]
    assert kinds == [Checkpointed, Checkpointed, PackLeft]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({}, ""),
        ({"versions": {"torch": "2.0.0", "gone": "1"}}, "torch 2.0.0 so far"),
    ],
)
def test_a_resume_under_another_version_of_a_library_says_so(
    make_spec: MakeSpec, tmp_path: Path, change: dict[str, Any], note: str
) -> None:
    config, spec = trial_config(steps=4), make_spec(num_slots=1)
    worker = PackWorker(spec)
    worker.load()
    worker.advance([task(0, config, tmp_path)])
    worker.advance([Leave(save=True)])
    (path,) = tmp_path.rglob("checkpoint.json")
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] == version("torch")
    changed = record | change
    del changed["digest"]
    path.write_text(json.dumps(changed | {"digest": record_digest(changed)}))
    worker = PackWorker(spec)
    worker.load()
    (opened, *_) = worker.advance([task(0, config, tmp_path, attempt=2)])
    assert isinstance(opened, TrialOpened)
    assert not opened.refused_checkpoints
    assert note in opened.note
    assert ("equal up to rounding" in opened.note) == bool(note)


def test_a_pack_answers_in_the_midst_of_a_long_step_and_may_leave_there(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec, config = make_spec(micro_batch_size=1), trial_config(batch_size=4)
    undisturbed, _ = train(spec, [config], tmp_path / "undisturbed")
    worker = PackWorker(spec)
    worker.load()
    begun = worker.advance([task(0, config, tmp_path)])
    assert [type(event) for event in begun] == [TrialOpened, Evaluated]  # and no step's Progress
    saved, left = worker.advance([Leave(save=True)])
    assert (type(saved), type(left)) == (Checkpointed, PackLeft)

    worker = PackWorker(spec)
    worker.load()
    events = worker.advance([task(0, config, tmp_path, attempt=2)])
    while not isinstance(events[-1:] and events[-1], TrialDone):
        events += worker.advance([])
    path = Path(events[-1].adapter_dir) / "adapter_model.safetensors"
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, undisturbed[0][name]), name


@pytest.mark.parametrize(
    "targets", ["all-linear", ("0.self_attn.q_proj", "v_proj"), ("layers.1.mlp.down_proj",)]
)
def test_a_saved_adapter_loads_with_plain_peft_and_has_the_reported_loss(
    make_spec: MakeSpec, tmp_path: Path, base_folder: Path, targets: Targets
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = make_spec(num_slots=1)
    _, events = train(spec, [trial_config(adapter__target_modules=targets)], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing.*")  # an adapter of which there are no weights
        model = PeftModel.from_pretrained(base, done.adapter_dir).eval()
    reader = BlockReader(load_manifest(spec.data_place, "held_out"))
    batch = reader.blocks(range(reader.num_blocks))
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            use_cache=False,  # with a cache transformers does not see that blocks are packed
        ).logits
    labels = torch.from_numpy(batch.labels)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(done.eval_loss, rel=1e-5)


def test_evaluation_happens_at_every_rung_and_the_end(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(num_slots=1)
    rungs = spec.evaluation.model_copy(update={"every_steps": 4})
    _, events = train(make_spec(num_slots=1, evaluation=rungs), [trial_config()], tmp_path)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 4, 6]


def test_a_trial_is_evaluated_at_its_rungs_and_a_pruned_one_leaves_no_trace(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    first, second, third = (trial_config(seed=seed) for seed in range(3))
    worker = PackWorker(make_spec())
    worker.load()
    events = []
    for number, config in ((0, first), (1, second)):
        assign = task(number, config, tmp_path)
        directive = Assign(replace(assign.task, rungs=(2, 4)))
        events += worker.advance([directive])
    while not any(isinstance(event, Evaluated) and event.step == 2 for event in events):
        events += worker.advance([])
    events += worker.advance([Prune(0), task(2, third, tmp_path), Prune(7)])  # 7 is over already
    while worker.slots:
        events += worker.advance([])
    at = {n: [e.step for e in events if isinstance(e, Evaluated) and e.trial == n] for n in (0, 1)}
    assert at[1] == [0, 2, 4, 6]
    assert set(at[0]) <= {0, 2}
    found = {
        event.trial: load_file(Path(event.adapter_dir) / "adapter_model.safetensors")
        for event in events
        if isinstance(event, TrialDone)
    }
    alone, _ = train(make_spec(), [second, third], tmp_path / "alone")
    assert found.keys() == {1, 2}
    assert_equal(found[1], alone[0])
    assert_equal(found[2], alone[1])
