"""Where the planner's choices can be seen: the dry run, plan.json and the decisions."""

import json
import struct
from pathlib import Path

import pytest

from jobs.dry_run import show_plan
from orchestrator.planning.capacity import Node
from orchestrator.planning.memory import GIB
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, sweep_config

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "vocab_size": 32_000,
}
TENSORS = {"model.embed_tokens.weight": [32_000, 1024]} | {
    f"model.layers.{layer}.mlp.up_proj.weight": [4096, 1024] for layer in (0, 1)
}


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """A sweep over a local base that has headers and no weights."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    (base / "tokenizer.json").write_text("{}")
    tensors = {name: {"dtype": "BF16", "shape": shape} for name, shape in TENSORS.items()}
    header = json.dumps(tensors).encode()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"name: t\nbase_model: {{source: {base}}}\ndata: {{train: {rows}}}\n"
        "search: {space: {adapter.rank: [4, 8]}}\n"
    )
    return path


def printed(path: Path, machine: Node, capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    show_plan(path, list(settings), None, None, machine)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "  pack 0:" in line)
    return line


def test_a_dry_run_shows_what_each_pack_will_do(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = printed(sweep_file, Node(8, 1, 80 * GIB, 500 * GIB), capsys)
    assert "2 slots for 2 (at most 2)" in line
    assert (
        "all 8 blocks in one pass; dequantised once; no recomputation; step program graph" in line
    )
    assert "GiB of 72.0 GiB; starts with trials 0, 1" in line


def test_a_dry_run_shows_what_was_given_up_for_memory(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = printed(sweep_file, Node(8, 1, 3 * GIB, 500 * GIB), capsys)
    assert "4 of 8 blocks in a pass: 8 need 3.1 GiB without recomputation" in line


def test_a_dry_run_says_that_an_absent_base_leaves_the_choice_open(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = printed(sweep_file, Node(8, 1, 80 * GIB, 500 * GIB), capsys, "base_model.source=org/hub")
    assert "memory unknown: the base is not here yet: a sweep fetches it, and chooses anew" in line


def test_the_plan_and_the_decisions_hold_every_choice_and_its_reason(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config(search__space={"adapter.rank": [4, 8]}))
    assert make_controller(store, InProcessExecutor(SimulatedWorker), num_workers=1).run()
    (pack,) = store.read("plan")["packs"]  # type: ignore[index]
    assert pack["trials"] == [0, 1]
    assert (pack["world_size"], pack["num_slots"], pack["micro_batch_size"]) == (1, 2, 8)
    assert (pack["dequantise_once"], pack["gradient_checkpointing"]) == (False, False)
    (started,) = (d for d in store.decisions if d["action"] == "start_pack")
    assert started["reason"] == pack["reason"]
    for reason in pack["reasons"]:
        assert reason in started["reason"]
