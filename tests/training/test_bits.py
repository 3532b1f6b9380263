"""Training on every kind of base, and what it takes to load one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import AdapterConfig, QuantConfig, StrategyConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.errors import ConfigError
from orchestrator.planning.options import PackWish
from orchestrator.planning.packs import pack_key
from orchestrator.records import Evaluated, TrialDone
from orchestrator.sweep.bits import check_hqq
from orchestrator.training.adapter_evaluation import evaluate_adapter
from orchestrator.training.codes import quantise
from orchestrator.training.dropout import Drops
from orchestrator.training.export import Bounds, export_adapter
from orchestrator.training.frozen import PackedLinear
from orchestrator.training.lanes import Lanes, Served
from orchestrator.training.parity import measure
from orchestrator.training.slots import Slots
from tests.sweeps import sweep_config
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, train
from tests.training.test_zero import STRATEGIES

BASES: dict[str, dict[str, Any]] = {
    "NF4, single": {"double_quant": False},
    "FP4": {"quant_type": "fp4"},
    "NF4, blocks of 128": {"block_size": 128},
    "blockwise int8": {"bit_width": 8, "int8_type": "blockwise"},
    "2 bits": {"bit_width": 2},
    "3 bits": {"bit_width": 3},
    "a map": {"bit_width_pattern": {"down_proj": 8, "q_proj": 16}},
}
HQQ = ("2 bits", "3 bits")


def quant(name: str, **changes: Any) -> dict[str, Any]:
    fields = {**BASES[name], "compute_dtype": "float32", **changes}
    return QuantConfig.model_validate(fields).model_dump()


@pytest.mark.parametrize("name", BASES)
def test_training_lowers_the_held_out_loss_on_every_kind_of_base(
    make_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    """Two trials in one pack, with the values kept and with them made at every use; the adapter is
    then evaluated on the base that its record describes."""
    if name in HQQ:
        pytest.importorskip("hqq.core.quantize", reason="the extra hqq is not installed")
    spec = make_spec(quant=quant(name))
    trials = [trial_config(steps=12, quant=quant(name), seed=seed) for seed in (1, 2)]
    assert not pack_key(trials[0]).alone
    made, events = train(spec, trials, tmp_path / "made")
    kept, _ = train(make_spec(quant=quant(name), dequantise_once=True), trials, tmp_path / "kept")
    for done in (event for event in events if isinstance(event, TrialDone)):
        assert done.eval_loss < done.baseline_eval_loss - 0.1
        assert_equal(made[done.trial], kept[done.trial], tolerance=0)
        found, _ = evaluate_adapter(
            Path(done.adapter_dir), load_manifest(spec.data_place, "held_out")
        )
        assert found["eval_loss"] == pytest.approx(done.eval_loss, rel=1e-5)


def test_an_export_from_a_map_says_what_the_adapter_says(
    make_spec: MakeSpec, tmp_path: Path, base_folder: Path
) -> None:
    spec = make_spec(quant=quant("a map"), num_slots=1)
    _, events = train(spec, [trial_config(steps=4, quant=quant("a map"))], tmp_path / "run")
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    reader = BlockReader(load_manifest(spec.data_place, "held_out"))
    exported = export_adapter(
        Path(done.adapter_dir),
        str(base_folder),
        tmp_path / "out",
        "merged",
        lambda model: measure(model, reader),
        Bounds(max_loss_increase=0.01, min_agreement_fraction=0.9),
    )
    assert exported.parity.reference_loss == pytest.approx(done.eval_loss, rel=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_loftq_begins_with_what_every_kind_of_codes_left_out(
    make_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    if name in HQQ:
        pytest.importorskip("hqq.core.quantize", reason="the extra hqq is not installed")
    spec = replace(make_spec(quant=quant(name), num_slots=1), loftq=True)
    trial = trial_config(steps=12, quant=quant(name), adapter__init="loftq")
    _, events = train(spec, [trial], tmp_path)
    first = next(e.eval_loss for e in events if isinstance(e, Evaluated) and e.step == 0)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert first != done.baseline_eval_loss
    assert done.eval_loss < first - 0.1


UNDER_ZERO: dict[str, dict[str, Any]] = {
    name: fields for name, fields in STRATEGIES.items() if name != "stage 3, all on the CPU"
} | {"stage 3, parameters on the CPU": {"stage": 3, "offload_params": "cpu"}}


@pytest.mark.parametrize(
    ("fields", "strategy"),
    [
        *(({"quant_type": "fp4"}, name) for name in UNDER_ZERO),
        *(({"double_quant": False}, name) for name in UNDER_ZERO),
        *(({"bit_width": 8}, name) for name in UNDER_ZERO if name.endswith("optimizer on the CPU")),
        *(({"bit_width": bits}, "stage 3, parameters on the CPU") for bits in (4, 16)),
        ({"storage_dtype": "bfloat16"}, "stage 2"),
        *(({"storage_dtype": dtype}, "stage 3") for dtype in ("uint8", "bfloat16", "float16")),
        ({"storage_dtype": "bfloat16"}, "stage 3, parameters on the CPU"),
        *(
            ({"bit_width": 16, "compute_dtype": "float64"}, name)
            for name in ("stage 1", "stage 2", "stage 3", "stage 2, optimizer on the CPU")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.distributed")
def test_every_kind_of_base_trains_under_zero_as_it_does_without(
    make_spec: MakeSpec, tmp_path: Path, fields: dict[str, Any], strategy: str
) -> None:
    content = QuantConfig.model_validate({"compute_dtype": "float32", **fields}).model_dump()
    plain, _ = train(make_spec(num_slots=1, quant=content), [trial_config()], tmp_path / "one")
    zero_strategy = {"kind": "zero", **UNDER_ZERO[strategy]}
    spec = make_spec(num_slots=1, quant=content, strategy=zero_strategy)
    zero, _ = train(spec, [trial_config()], tmp_path / "other")
    assert_equal(zero[0], plain[0])


def test_packs_of_one_base_need_the_whole_map_to_be_the_same() -> None:
    def key(**fields: Any) -> object:
        return pack_key(trial_config(quant=fields))

    mixed = {"bit_width_pattern": {"q_proj": 8, "k_proj": 16}}
    other = {"bit_width_pattern": {"k_proj": 16, "q_proj": 8}}
    assert key(**mixed) == key(**other)
    assert key(**mixed) != key(bit_width_pattern={"q_proj": 8})
    assert len({key(**mixed), key(**other), key()}) == 2


@pytest.mark.parametrize(
    ("fields", "resident", "eager"),
    [
        ({"bit_width": 16}, False, ""),
        ({"bit_width": 8}, False, "LLM.int8"),
        ({"bit_width": 8, "int8_type": "blockwise"}, True, ""),
        ({"bit_width": 16, "bit_width_pattern": {"q_proj": 4}}, True, ""),
    ],
)
def test_blockwise_layers_are_compiled_and_kept_as_4_bit_ones_are(
    fields: dict[str, Any], resident: bool, eager: str
) -> None:
    wish = PackWish(QuantConfig.model_validate(fields), StrategyConfig(), "", 1, 1, 1, 1, False)
    assert wish.can_be_resident == resident
    assert wish.only_eager == eager


class Block(torch.nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        for name, width in (("one", bits), ("two", 4)):
            weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(bits))
            setattr(self, name, PackedLinear(quantise(weight, width, QuantConfig()), None))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("widths", "programs"), [((4, 4, 4), 1), ((8, 8, 8), 1), ((4, 8, 4), 2)])
def test_blocks_whose_layers_have_the_same_bits_share_one_compiled_program(
    widths: tuple[int, ...], programs: int, dora: bool
) -> None:
    """Though every layer scales its update by a number of its own."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(map(Block, widths))
    slots = Slots(model, "all-linear", 2, 4, "cpu", dora=dora)
    adapter = AdapterConfig(rank=4, rank_pattern={"one": 2}, use_dora=dora)
    for slot in (0, 1):
        slots.open(slot, adapter, seed=slot)
    slots.rows.normal_(std=0.1)
    lanes = Lanes(slots, 2, torch.float32, masked_blocks=1 if dora else None)
    lanes.attach(model)
    drops = Drops(0.2, (5,)) if dora else Drops()
    lanes.serve([Served(0, slots.scalings(adapter), drops), Served(1, 1.0)])

    def run() -> tuple[torch.Tensor, ...]:
        y = x
        for block in model.blocks:
            y = block(y)
        return (y, *torch.autograd.grad(y.square().sum(), lanes.parameters))

    x = torch.randn(2, 8, 64, requires_grad=True)
    plain = run()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False, fullgraph=True)
    for one, other in zip(run(), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert counter.frame_count == programs


def test_bits_that_need_hqq_are_refused_where_it_is_missing() -> None:
    import importlib.util

    if importlib.util.find_spec("hqq"):
        pytest.skip("the extra hqq is installed")
    for changes in (
        {"trial__quant__bit_width": 3, "search__space": {}},
        {"trial__quant__bit_width_pattern": {"q_proj": 2}},
        {"search__space": {"quant.bit_width": [4, 3]}},
    ):
        with pytest.raises(ConfigError, match="2 and 3 need HQQ, which is not installed"):
            check_hqq(sweep_config(**changes))
    check_hqq(sweep_config())


LOAD = """
import resource, sys, threading, time
from pathlib import Path

import torch
from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.records import BaseModel
from orchestrator.training import quantiser
from orchestrator.training.base_model import load_base_model
from orchestrator.training.model_source import folder_digest

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

peak, over = 0, False
def watch():
    global peak
    while not over:
        peak = max(peak, held())
        time.sleep(0.001)

quant = QuantConfig.model_validate_json(sys.argv[2])
def load(folder):
    base = BaseModel("tiny", None, folder, folder_digest(Path(folder)))
    return load_base_model(
        base, quant, "cpu", StrategyConfig(), cache_bytes=int(sys.argv[4])
    )
load(sys.argv[3])
load(sys.argv[3])
before = held()
watcher = threading.Thread(target=watch)
watcher.start()
loaded = load(sys.argv[1])
over = True
watcher.join()
print(peak - before, loaded.num_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_one_layer_in_full_beside_the_codes(
    base_folder: Path, tmp_path: Path
) -> None:
    """The peak of a child process, of memory of its own: pages of the file that the system keeps
    do not count. The model is 104 MiB in its file, its layers up to 1.5 MiB. Also while the codes
    are written to a cache, and read back from it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=264,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    whole = sum(parameter.numel() * 2 for parameter in model.parameters())
    model.save_pretrained(tmp_path / "large")
    del model
    settings = QuantConfig(compute_dtype="bfloat16")
    arguments = [str(tmp_path / "large"), settings.model_dump_json(), str(base_folder)]
    environment = {
        **os.environ,
        "ORCHESTRATOR_CACHE": str(tmp_path / "cache"),
        # A layer's memory goes back to the system at once, as it does for layers of 32 MiB; glibc
        # would else keep small ones in a heap, full of holes by then.
        "MALLOC_MMAP_THRESHOLD_": str(2**17),
    }
    for cache_bytes in (0, 2**30, 2**30):
        out = subprocess.run(
            [sys.executable, "-c", LOAD, *arguments, str(cache_bytes)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        peak, num_bytes = map(int, out.stdout.split())
        assert num_bytes < 0.3 * whole
        slack = 40 * 2**20  # some layers of 1.5 MiB, also in fp32, and what the allocator keeps
        assert peak < num_bytes + slack < whole, (cache_bytes, peak, num_bytes, whole)
    assert len(list((tmp_path / "cache" / "quantised").iterdir())) == 2


def test_a_base_waits_while_another_is_loaded_on_the_machine(base_folder: Path) -> None:
    import threading

    from orchestrator.records import BaseModel
    from orchestrator.training.base_model import load_base_model, loading_alone

    loaded = threading.Event()

    def load() -> None:
        base = BaseModel("tiny", None, str(base_folder), "d")
        load_base_model(base, QuantConfig(compute_dtype="float32"), "cpu", StrategyConfig())
        loaded.set()

    with loading_alone():
        thread = threading.Thread(target=load)
        thread.start()
        assert not loaded.wait(1.0)
    thread.join()
    assert loaded.is_set()
