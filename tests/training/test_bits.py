"""Training on every kind of base, and what it takes to load one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import QuantConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.planning.options import PackWish
from orchestrator.planning.packs import pack_key
from orchestrator.records import TrialDone
from orchestrator.training.adapter_evaluation import evaluate_adapter
from orchestrator.training.export import Bounds, export_adapter
from orchestrator.training.parity import measure
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, train

BASES: dict[str, dict[str, Any]] = {
    "NF4, single": {"double_quant": False},
    "FP4": {"quant_type": "fp4"},
    "NF4, blocks of 128": {"block_size": 128},
    "blockwise int8": {"bit_width": 8, "int8_type": "blockwise"},
    "3 bits": {"bit_width": 3},
    "a map": {"bit_width_pattern": {"down_proj": 8, "q_proj": 16}},
}


def quant(name: str, **changes: Any) -> dict[str, Any]:
    fields = {**BASES[name], "compute_dtype": "float32", **changes}
    return QuantConfig.model_validate(fields).model_dump()


@pytest.mark.parametrize("name", BASES)
def test_training_lowers_the_held_out_loss_on_every_kind_of_base(
    make_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    """Two trials in one pack, with the values kept and with them made at every use; the adapter is
    then evaluated on the base that its record describes."""
    if name == "3 bits":
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


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "fields",
    [{"quant_type": "fp4"}, {"double_quant": False}, {"storage_dtype": "bfloat16"}],
    ids=["FP4", "NF4, single", "stored in bfloat16"],
)
@pytest.mark.filterwarnings("ignore:`torch.distributed")
def test_every_4_bit_base_trains_under_zero_as_it_does_without(
    make_spec: MakeSpec, tmp_path: Path, fields: dict[str, Any], stage: int
) -> None:
    content = QuantConfig.model_validate({**fields, "compute_dtype": "float32"}).model_dump()
    plain, _ = train(make_spec(num_slots=1, quant=content), [trial_config()], tmp_path / "one")
    strategy = {"kind": "zero", "stage": stage}
    spec = make_spec(num_slots=1, quant=content, strategy=strategy)
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
    wish = PackWish(QuantConfig.model_validate(fields), False, "", 1, 1, 1, 1, False)
    assert wish.can_be_resident == resident
    assert wish.only_eager == eager


LOAD = """
import resource, sys, threading, time
from pathlib import Path

import torch
from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.records import BaseModel
from orchestrator.training import quantiser
from orchestrator.training.base_model import load_base_model

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
base = BaseModel("tiny", None, sys.argv[1], "d")
load_base_model(BaseModel("tiny", None, sys.argv[3], "d"), quant, "cpu", StrategyConfig())
before = held()
watcher = threading.Thread(target=watch)
watcher.start()
loaded = load_base_model(base, quant, "cpu", StrategyConfig())
over = True
watcher.join()
print(peak - before, loaded.num_bytes)
"""


@pytest.mark.parametrize("fields", [{}, {"bit_width": 8, "int8_type": "blockwise"}])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_one_layer_in_full_beside_the_codes(
    base_folder: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """The peak of a child process, of memory of its own: pages of the file that the system keeps
    do not count. The model is 96 MiB in its file, its layers up to 3 MiB."""
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
    settings = QuantConfig.model_validate({**fields, "compute_dtype": "bfloat16"})
    arguments = [str(tmp_path / "large"), settings.model_dump_json(), str(base_folder)]
    out = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, check=True
    )
    peak, num_bytes = map(int, out.stdout.split())
    assert num_bytes < 0.6 * whole
    slack = 24 * 2**20  # some layers of 3 MiB in bfloat16 and fp32, and what the allocator keeps
    assert peak < num_bytes + slack < whole, (peak, num_bytes, whole)


def test_a_base_waits_while_another_is_loaded_on_the_machine(base_folder: Path) -> None:
    import threading

    from orchestrator.config import StrategyConfig
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
