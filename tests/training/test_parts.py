"""Loss, optimizers, slots, checkpoints: each against a plain reference."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from orchestrator.config import (
    AdapterConfig,
    OptimizerConfig,
    QuantConfig,
    ScheduleConfig,
    StrategyConfig,
)
from orchestrator.errors import BaseModelError, ConfigError, RunFolderError
from orchestrator.records import BaseModel
from orchestrator.training import loss as loss_module
from orchestrator.training.base_model import load_base_model
from orchestrator.training.checkpoints import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from orchestrator.training.dropout import Dropout, Drops
from orchestrator.training.lanes import BASE_ALONE, Lanes, Served
from orchestrator.training.loss import losses_and_gradient, token_losses
from orchestrator.training.optimizers import (
    OPTIMIZERS,
    RowOptimizers,
    clip_and_step,
    clipping,
    clips_itself,
    learning_rate,
    optimizer_states,
    queue_step,
    restore_optimizer,
)
from orchestrator.training.paged import paged_state_bytes, refusal
from orchestrator.training.program import check_lanes
from orchestrator.training.slots import Slots

# Compiling DeepSpeed's takes 45 s where the cache does not hold it.
EACH = [
    pytest.param(name, marks=pytest.mark.slow) if name == "deepspeed_cpu_adam" else name
    for name in OPTIMIZERS
]


def test_losses_and_gradient_equal_plain_cross_entropy_over_chunk_borders() -> None:
    torch.manual_seed(0)
    num_labels = loss_module.CHUNK_TOKENS + 37
    head = nn.Linear(8, 31).requires_grad_(False)
    hidden = torch.randn(num_labels, 8, requires_grad=True)
    labels = torch.randint(31, (num_labels,))
    lanes = torch.randint(3, (num_labels,))
    weights = torch.tensor([0.5, 1.0, 0.25])
    losses, gradient = losses_and_gradient(hidden, labels, lanes, weights, head)

    nll = functional.cross_entropy(head(hidden), labels, reduction="none") * weights[lanes]
    nll.sum().backward()
    sums = torch.stack([nll[lanes == n].double().sum() for n in range(3)])
    # Of thousands of fp32 values, in an order that hangs on the number of threads.
    torch.testing.assert_close(losses.double(), sums, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradient, hidden.grad)


def test_token_losses_of_no_tokens_are_empty() -> None:
    head = nn.Linear(8, 31)
    assert token_losses(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), head).shape == (0,)


@pytest.mark.parametrize("name", EACH)
def test_an_optimizer_restored_from_its_states_goes_on_as_if_never_stopped(name: str) -> None:
    config = OptimizerConfig.model_validate({"name": name, "learning_rate": 1e-2})
    torch.manual_seed(0)
    gradients = torch.randn(40, 5000)
    rows = [nn.Parameter(torch.ones(5000)) for _ in range(2)]

    def step(row: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: torch.Tensor) -> None:
        row.grad = gradient.clone()
        optimizer.step()

    optimizer = RowOptimizers(rows[0]).begin(config)
    for gradient in gradients:
        step(rows[0], optimizer, gradient)

    first = RowOptimizers(rows[1]).begin(config)
    for gradient in gradients[:25]:
        step(rows[1], first, gradient)
    tensors, numbers = optimizer_states(first)
    second = RowOptimizers(rows[1]).begin(config)
    restore_optimizer(second, ({k: v.clone() for k, v in tensors.items()}, numbers))
    for gradient in gradients[25:]:
        step(rows[1], second, gradient)
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("name", EACH)
def test_the_next_trial_of_a_row_begins_anew_and_a_paged_one_in_the_same_memory(name: str) -> None:
    def config(beta1: float) -> OptimizerConfig:
        return OptimizerConfig.model_validate({"name": name, "beta1": beta1})

    def train(row: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        row.data.fill_(1.0)
        for seed in range(3):
            row.grad = torch.randn(5000, generator=torch.Generator().manual_seed(seed))
            clip_and_step(optimizer, row.grad, 1.0, None, 1e-2)
        tensors, _ = optimizer_states(optimizer)
        return {key: tensor.data_ptr() for key, tensor in tensors.items()}

    rows = [nn.Parameter(torch.ones(5000)) for _ in range(2)]
    optimizers = RowOptimizers(rows[0])
    first = train(rows[0], optimizers.begin(config(0.5)))
    second = train(rows[0], optimizers.begin(config(0.9)))
    train(rows[1], RowOptimizers(rows[1]).begin(config(0.9)))
    assert torch.equal(rows[0], rows[1])
    if name.startswith("paged"):  # others may get the same memory by chance
        assert first == second


@pytest.mark.parametrize(
    ("wanted", "free", "share", "refused"),
    [(95, 100, 0.95, False), (96, 100, 0.95, True), (96, 100, 1.0, False), (0, 0, 0.95, False)],
)
def test_paged_states_are_made_only_within_their_share_of_what_is_free(
    wanted: int, free: int, share: float, refused: bool
) -> None:
    assert bool(refusal(wanted, free, share)) == refused


def test_the_refusal_of_paged_states_has_the_numbers_and_what_to_lower() -> None:
    why = refusal(paged_state_bytes(2**30, state_bits=32), 6 * 2**30)
    assert "take 8.00 GiB, but the GPU has 6.00 GiB free, of which they may take 95%" in why
    assert "lower adapter.rank, resources.slots_per_pack or trial.micro_batch_size" in why
    assert not refusal(paged_state_bytes(2**30, state_bits=8), 6 * 2**30)


@pytest.mark.parametrize(("name", "bits"), [("paged_adamw_8bit", 8), ("paged_adamw_32bit", 32)])
def test_the_bytes_of_paged_states_are_those_that_bitsandbytes_makes(name: str, bits: int) -> None:
    row = nn.Parameter(torch.ones(100_000))
    optimizer = RowOptimizers(row).begin(OptimizerConfig.model_validate({"name": name}))
    row.grad = torch.ones(100_000)
    optimizer.step()
    tensors, _ = optimizer_states(optimizer)
    made = sum(tensors[state].nbytes for state in ("state1", "state2"))
    assert made == paged_state_bytes(row.numel(), bits)
    assert paged_state_bytes(99_999, bits) == 0


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=4)
    rates = [learning_rate(step, 20, 1.0, schedule) for step in range(21)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[20] == pytest.approx(0.0)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize(("value", "applied"), [(0.1, 0.1), (10.0, 0.5)])
def test_clipping_keeps_a_small_gradient_and_shortens_a_large_one(
    value: float, applied: float
) -> None:
    gradient = torch.full((4,), value)
    row = nn.Parameter(torch.zeros(4))
    row.grad = gradient
    plain = torch.optim.SGD([row])
    clip_and_step(plain, gradient, norm=2 * value, max_norm=1.0, rate=1.0)
    assert torch.allclose(row, torch.full((4,), -applied))


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_a_step_that_knows_its_norm_on_the_device_alone_is_the_step_that_was_told(
    max_norm: float,
) -> None:
    config = OptimizerConfig(name="adamw")
    rows = [nn.Parameter(torch.ones(5000)) for _ in range(2)]
    told, queued = (RowOptimizers(row).begin(config) for row in rows)
    assert clips_itself(queued, rows[1])
    for seed in range(4):
        gradient = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * 0.1**seed
        norms = torch.linalg.vector_norm(gradient)[None]
        rows[0].grad, rows[1].grad = gradient.clone(), gradient.clone()
        clip_and_step(told, rows[0].grad, float(norms), max_norm, 1e-2)
        divisors, lost = clipping(norms, torch.tensor([max_norm]))
        queue_step(queued, divisors[0], lost[0], 1e-2)
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_applied_by_a_step_that_is_queued(
    value: float,
) -> None:
    row = nn.Parameter(torch.ones(100))
    optimizer = RowOptimizers(row).begin(OptimizerConfig(name="adamw"))
    for gradient in (torch.ones(100), torch.full((100,), value)):
        row.grad = gradient
        before = row.detach().clone()
        norms = torch.linalg.vector_norm(gradient)[None]
        divisors, lost = clipping(norms, torch.tensor([1.0]))
        queue_step(optimizer, divisors[0], lost[0], 1e-2)
        assert torch.equal(row, before) == bool(lost)
    tensors, _ = optimizer_states(optimizer)
    assert float(tensors["step"]) == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def small_model() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 4)})


def test_padding_of_a_smaller_rank_stays_exactly_zero() -> None:
    torch.manual_seed(0)
    model = small_model().requires_grad_(False)
    slots = Slots(model, "all-linear", num_slots=2, max_rank=8, device="cpu")
    slots.open(0, AdapterConfig(rank=2, alpha=4), seed=1)
    slots.open(1, AdapterConfig(rank=8, alpha=4), seed=2)
    lanes = Lanes(slots, 2, torch.float32)
    lanes.attach(model)
    row = nn.Parameter(slots.rows[0])
    row.grad = slots.gradients[0]
    optimizer = torch.optim.AdamW([row], lr=0.1)
    for _ in range(5):
        lanes.serve([Served(0, 2.0), Served(1, 0.5)])
        loss = model["second"](model["first"](torch.randn(4, 3, 6))).square().sum()
        lanes.add_gradients(torch.autograd.grad(loss, lanes.parameters), [True, True])
        optimizer.step()
    used = sum(
        tensor.numel() for tensor in slots.adapter_tensors(0, AdapterConfig(rank=2)).values()
    )
    assert int(slots.rows[0].count_nonzero()) == used


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    dropout = Dropout(2, None, torch.device("cpu"), torch.float32)
    tokens = torch.ones(2, 300, 400)
    dropout.set([Drops(rate, (7,)), Drops(rate, (8,))], idle=0)
    first, other = dropout(tokens, torch.tensor(0)), dropout(tokens, torch.tensor(1))
    for masked in (first[0], first[1], other[0]):
        assert float((masked == 0).float().mean()) == pytest.approx(rate, abs=0.005)
        assert float(masked.mean()) == pytest.approx(1.0, abs=0.01)
        # Each place on its own: columns are no more alike than chance makes them.
        assert float((masked == 0).float().mean(0).std()) < 2 * (rate * (1 - rate) / 300) ** 0.5
    for one, another in ((first[0], first[1]), (first[0], other[0])):
        both = float(((one == 0) & (another == 0)).float().mean())
        assert both == pytest.approx(rate**2, abs=0.005)


def test_a_blocks_dropout_is_the_same_in_any_micro_batch_and_kind_of_program() -> None:
    tokens = torch.randn(1, 2 * 30, 40)  # two blocks of one lane
    whole = Dropout(1, None, torch.device("cpu"), torch.float32)
    whole.set([Drops(0.3, (7, 8))], idle=0)
    layer = torch.tensor(3)
    expected = whole(tokens, layer)
    alone = Dropout(1, None, torch.device("cpu"), torch.float32)
    alone.set([Drops(0.3, (8,))], idle=0)
    assert torch.equal(alone(tokens[:, 30:], layer), expected[:, 30:])
    constant = Dropout(2, 2, torch.device("cpu"), torch.float32)
    constant.set([Drops(0.3, (7, 8))], idle=1)
    both = constant(torch.cat([tokens, tokens]), layer)
    assert torch.equal(both[:1], expected)
    assert torch.equal(both[1:], tokens)


def test_a_lane_that_serves_nobody_is_the_base_alone() -> None:
    model = small_model().requires_grad_(False)
    tokens = torch.randn(2, 3, 6)
    base = model["first"](tokens)
    slots = Slots(model, "all-linear", num_slots=1, max_rank=2, device="cpu")
    slots.rows.fill_(1.0)
    lanes = Lanes(slots, 2, torch.float32)
    lanes.attach(model)
    lanes.serve([BASE_ALONE, Served(0, 1.0)])
    served = model["first"](tokens)
    assert torch.equal(served[0], base[0])
    assert not torch.allclose(served[1], base[1])


def test_a_target_that_matches_no_layer_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ConfigError, match="'thrid' matches no linear layer.*first, second"):
        Slots(small_model(), ("first", "thrid"), 1, 4, "cpu")


def test_a_model_without_any_linear_layer_is_refused_with_the_remedy() -> None:
    with pytest.raises(BaseModelError, match="no linear layer.*another base model"):
        Slots(nn.ModuleDict({"norm": nn.LayerNorm(4)}), "all-linear", 1, 4, "cpu")


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, 10 * step, 1.0, torch.full((8,), float(step)), ({}, {}), "eager")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    folders = [save_checkpoint(tmp_path, checkpoint(step), "c", "l") for step in (1, 2)]
    state = folders[1] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    found, refused = latest_checkpoint(folders[::-1], "c", "l")
    assert found is not None
    assert found.step == 1
    assert len(refused) == 1
    assert "damaged" in refused[0]


def test_a_checkpoint_whose_numbers_were_changed_is_passed_over_as_damaged(tmp_path: Path) -> None:
    folders = [save_checkpoint(tmp_path, checkpoint(step), "c", "l") for step in (1, 2)]
    record = folders[1] / "checkpoint.json"
    record.write_text(record.read_text().replace('"tokens": 20', '"tokens": 28'))
    found, (reason,) = latest_checkpoint(folders[::-1], "c", "l")
    assert found is not None
    assert found.step == 1
    assert reason == f"{folders[1]} is damaged: checkpoint.json does not have its digest"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.safetensors", None),
        ("checkpoint.json", None),
        ("checkpoint.json", "{"),
        ("checkpoint.json", "{}"),
        ("checkpoint.json", "[]"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_passed_over_as_damaged(
    tmp_path: Path, name: str, content: str | None
) -> None:
    folders = [save_checkpoint(tmp_path, checkpoint(step), "c", "l") for step in (1, 2)]
    (folders[1] / name).unlink()
    if content is not None:
        (folders[1] / name).write_text(content)
    found, (reason,) = latest_checkpoint(folders[::-1], "c", "l")
    assert found is not None
    assert found.step == 1
    assert reason.startswith(f"{folders[1]} is damaged: ")


def test_a_checkpoint_of_another_trial_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, checkpoint(1), "one trial", "l")
    with pytest.raises(RunFolderError, match="trial_config"):
        load_checkpoint(folder, "another trial", "l")


def test_only_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, checkpoint(step), "c", "l")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "checkpoint-00000004",
        "checkpoint-00000005",
    ]


class Backwards(nn.Module):
    """Hands its tokens on in another order, as experts do, and puts them back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flip(0)).flip(0)


def test_a_base_whose_layers_reorder_blocks_is_refused_for_several_slots(
    base_folder: Path,
) -> None:
    base = load_base_model(
        BaseModel("tiny", None, str(base_folder), "d"),
        QuantConfig(bit_width=16, compute_dtype="float32"),
        "cpu",
        StrategyConfig(),
    )
    check_lanes(base, Slots(base.model, "all-linear", 2, 4, "cpu"))
    layer = base.model.get_decoder().layers[0]  # type: ignore[operator]
    layer.mlp = Backwards(layer.mlp)
    slots = Slots(base.model, "all-linear", 2, 4, "cpu")
    with pytest.raises(BaseModelError, match=r"mix the tokens.*slots_per_pack: 1"):
        check_lanes(base, slots)
    assert not slots.rows.any()
