"""Bases in codes on local disk: the same bits as quantised anew, whatever happened to the files."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.files import cache_dir, file_digest, read_json, record_digest, write_json
from orchestrator.records import BaseModel, TrialDone
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.loftq import Corrections
from orchestrator.training.model_source import folder_digest
from orchestrator.training.quantised_cache import QuantisedCache
from orchestrator.training.quantiser import LayerByLayer
from orchestrator.training.quiet import quiet_libraries
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_families import SIZES
from tests.training.test_pack import train

MAX_BYTES = 2**30
QUANTS: dict[str, dict[str, Any]] = {
    "NF4": {},
    "NF4, single": {"double_quant": False},
    "FP4, blocks of 128": {"quant_type": "fp4", "block_size": 128},
    "blockwise int8": {"bit_width": 8, "int8_type": "blockwise"},
    "blockwise int8, single": {"bit_width": 8, "int8_type": "blockwise", "double_quant": False},
    "2 bits": {"bit_width": 2},
    "NF4 in bfloat16": {"compute_dtype": "bfloat16"},
    "a map": {"bit_width_pattern": {"down_proj": 8, "q_proj": 16}},
    "a map with 3 bits": {"bit_width_pattern": {"down_proj": 8, "q_proj": 16, "up_proj": 3}},
}
Load = Callable[..., LoadedBase]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_base_model(tmp_path / "base")


@pytest.fixture
def load(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Load:
    """Loads the base with a cache of its own, unless told otherwise."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)

    def run(cache_bytes: int = MAX_BYTES, digest: str = "", **fields: Any) -> LoadedBase:
        quant = QuantConfig.model_validate({"compute_dtype": "float32"} | fields)
        base = BaseModel("tiny", None, str(source), digest or folder_digest(source))
        return load_base_model(base, quant, "cpu", StrategyConfig(), cache_bytes=cache_bytes)

    return run


def last_note(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.messages[-1].removeprefix("tiny in codes: ")


def tensors(base: LoadedBase) -> dict[str, Tensor]:
    return dict(base.model.named_parameters()) | dict(base.model.named_buffers())


def assert_same_bits(one: LoadedBase, other: LoadedBase) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert (one.num_bytes, one.num_params) == (other.num_bytes, other.num_params)
    words, positions = torch.arange(12)[None], torch.arange(12)[None]
    assert torch.equal(one.hidden(words, positions), other.hidden(words, positions))


def entries() -> list[Path]:
    return sorted((cache_dir() / "quantised").glob("*"))


@pytest.mark.parametrize("kind", QUANTS)
def test_a_base_read_back_has_the_bits_of_a_fresh_one(
    load: Load, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    fields = QUANTS[kind]
    if 2 in fields.values() or 3 in fields.get("bit_width_pattern", {}).values():
        pytest.importorskip("hqq.core.quantize", reason="the extra hqq is not installed")
    fresh = load(cache_bytes=0, **fields)
    assert not entries()
    writing = load(**fields)
    assert last_note(caplog).startswith("kept in ")
    reading = load(**fields)
    assert last_note(caplog).startswith("read from ")
    assert_same_bits(writing, fresh)
    assert_same_bits(reading, fresh)
    (entry,) = entries()
    files = {path.name for path in entry.iterdir()}
    layers = read_json(entry / "index.json")["layers"]
    assert files == {"index.json", *(layer["file"] for layer in layers.values())}


def test_layers_that_are_kept_are_not_read_from_the_bases_files(load: Load, source: Path) -> None:
    """Zeroed there, with the digest of what they were believed of them, they come out so."""
    fresh = load()
    weights = source / "model.safetensors"
    digest = file_digest(weights)
    from safetensors.torch import load_file, save_file

    content = load_file(weights)
    zeroed = {n: t.zero_() if n.endswith("_proj.weight") else t for n, t in content.items()}
    save_file(zeroed, weights, metadata={"format": "pt"})
    now = weights.stat()
    stamp = [now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns]
    believed = cache_dir() / "digests" / f"{record_digest(str(weights))[:32]}.json"
    write_json(believed, {"path": str(weights), "stamp": stamp, "digest": digest})
    assert_same_bits(load(), fresh)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": lambda entry: flip(entry / "00003.safetensors"),
    "a file that was cut": lambda entry: os.truncate(entry / "00003.safetensors", 100),
    "a missing file": lambda entry: (entry / "00003.safetensors").unlink(),
    "an index that was cut": lambda entry: os.truncate(entry / "index.json", 100),
    "another number in the index": lambda entry: (entry / "index.json").write_text(
        (entry / "index.json").read_text().replace("64", "65", 1)
    ),
    "an index of something else": lambda entry: (entry / "index.json").write_text("[]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_made_anew(
    load: Load, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    fresh = load()
    (entry,) = entries()
    DAMAGE[what](entry)
    assert_same_bits(load(), fresh)
    assert last_note(caplog).startswith(f"kept in {entry}, made anew: ")
    assert_same_bits(load(), fresh)
    assert last_note(caplog) == f"read from {entry}"


def test_an_entry_without_an_index_is_not_read(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """So a load that was killed leaves it; what it had written may be anything."""
    fresh = load()
    (entry,) = entries()
    (entry / "index.json").unlink()
    flip(entry / "00000.safetensors")
    assert_same_bits(load(), fresh)
    assert last_note(caplog) == f"kept in {entry}"


def test_what_the_codes_depend_on_has_an_entry_of_its_own(load: Load) -> None:
    for number, fields in enumerate(
        [
            {},
            {"quant_type": "fp4"},
            {"double_quant": False},
            {"block_size": 128},
            {"compute_dtype": "bfloat16"},
            {"bit_width_pattern": {"q_proj": 8}},
        ]
    ):
        load(**fields)
        assert len(entries()) == number + 1, fields
    load(storage_dtype="uint8")
    assert len(entries()) == 6


@pytest.mark.parametrize("kept_before", [False, True])
def test_files_that_are_not_the_recorded_bases_are_neither_kept_nor_mixed(
    load: Load, source: Path, caplog: pytest.LogCaptureFixture, kept_before: bool
) -> None:
    recorded = folder_digest(source)
    if kept_before:
        load()
    shutil.rmtree(source)
    make_base_model(source, seed=1)
    fresh = load(cache_bytes=0)
    assert_same_bits(load(digest=recorded), fresh)
    assert last_note(caplog).startswith("not used: ")
    assert len(entries()) == kept_before


def test_entries_used_longest_ago_make_room(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    names = []
    for age, fields in enumerate(({}, {"quant_type": "fp4"}, {"double_quant": False})):
        load(**fields)
        (new,) = (entry for entry in entries() if entry.name not in names)
        names.append(new.name)
        os.utime(new / "index.json", (age + 1.0, age + 1.0))
    load()  # the first is the last one used now
    sizes = [sum(path.stat().st_size for path in entry.iterdir()) for entry in entries()]
    load(cache_bytes=sum(sizes) + sizes[0] // 2, block_size=128)  # three and a half of them
    left = {entry.name for entry in entries()}
    assert {names[0], names[2]} < left
    assert names[1] not in left
    assert len(left) == 3
    load(cache_bytes=10_000, block_size=256)
    assert "not kept: " in last_note(caplog)
    assert {entry.name for entry in entries()} == left


@pytest.mark.parametrize("place", ["", "quantised"])
def test_a_cache_that_cannot_be_written_stops_nothing(
    load: Load, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    fresh = load(cache_bytes=0)
    if place:
        cache_dir().mkdir()
    (cache_dir() / place).write_text("a file where the folder should be")
    assert_same_bits(load(), fresh)
    assert last_note(caplog).startswith("not kept: ")


def test_loftq_sees_each_weight_though_codes_are_kept(
    load: Load, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    base = BaseModel("tiny", None, str(source), folder_digest(source))
    found = []
    for cache_bytes in (0, MAX_BYTES):
        corrections = Corrections(max_rank=4)
        load_base_model(
            base,
            QuantConfig(compute_dtype="float32"),
            "cpu",
            StrategyConfig(),
            on_layer=corrections.add,
            cache_bytes=cache_bytes,
        )
        found.append(corrections.by_layer)
    assert last_note(caplog) == "not used: each layer's weight is wanted"
    assert len(found[0]) == 14
    for name, correction in found[0].items():
        assert torch.equal(correction.left, found[1][name].left)
    load()
    assert last_note(caplog).startswith("read from ")


@pytest.mark.parametrize(
    ("pattern", "note"),
    [
        ({}, "read from "),
        ({"up_proj": 8}, "read from "),
        ({"up_proj": 16}, "not kept: the files fuse layers of 16 bits with others"),
    ],
)
def test_layers_that_the_files_fuse_are_kept_unless_some_must_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: dict[str, Any], note: str
) -> None:
    """HRM's files have gate_proj and up_proj as one tensor, and all that attention projects to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = AutoConfig.for_model("hrm_text", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "base")
    base = BaseModel("tiny", None, folder, folder_digest(tmp_path / "base"))
    quant = QuantConfig(compute_dtype="float32", bit_width_pattern=pattern)
    models, cache = [], None
    for _ in range(3):
        with quiet_libraries():
            models.append(
                AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    quantization_config=LayerByLayer(quant, None, cache),
                    device_map={"": "cpu"},
                )
            )
        found = cache.note if cache is not None else ""
        cache = QuantisedCache(base, folder, quant, torch.device("cpu"), MAX_BYTES)
    assert found.startswith(note)
    fresh, *others = (
        dict(model.named_buffers(), **dict(model.named_parameters())) for model in models
    )
    for other in others:
        assert other.keys() == fresh.keys()
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in other.items())


def test_a_trial_on_a_base_that_was_read_back_ends_with_the_same_bytes(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    digests = []
    for number, cache_bytes in enumerate((0, MAX_BYTES, MAX_BYTES)):
        spec = replace(make_spec(4, num_slots=1), quantised_cache_bytes=cache_bytes)
        _, events = train(spec, [trial_config()], tmp_path / str(number))
        digests += [event.adapter_digest for event in events if isinstance(event, TrialDone)]
    assert len(entries()) == 1
    assert len(set(digests)) == 1


LOAD = """
import hashlib, logging, sys
from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.records import BaseModel
from orchestrator.training.base_model import load_base_model

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
quant = QuantConfig(compute_dtype="float32")
base = BaseModel("tiny", None, sys.argv[1], sys.argv[2])
digest = hashlib.sha256()
for _ in range(3):
    loaded = load_base_model(base, quant, "cpu", StrategyConfig(), cache_bytes=2**30)
    found = hashlib.sha256()
    for name, tensor in sorted(loaded.model.named_buffers()):
        found.update(name.encode() + tensor.numpy().tobytes())
    print("DIGEST", found.hexdigest())
"""


@pytest.mark.slow
def test_processes_that_write_one_entry_at_once_do_not_disturb_each_other(
    load: Load, source: Path, tmp_path: Path
) -> None:
    """Each with a temporary folder of its own, as on two machines: none waits for the other."""
    children = []
    for number in range(2):
        temporary = tmp_path / f"machine{number}"
        temporary.mkdir()
        command = [sys.executable, "-c", LOAD, str(source), folder_digest(source)]
        children.append(
            subprocess.Popen(
                command,
                env={**os.environ, "TMPDIR": str(temporary)},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    printed = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    digests = {line for text in printed for line in text.splitlines() if "DIGEST" in line}
    assert len(digests) == 1
    assert all(text.count("read from") >= 1 for text in printed)
    assert_same_bits(load(), load(cache_bytes=0))
    assert len(entries()) == 1
