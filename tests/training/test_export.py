"""Exports of a trained adapter: what was trained, in folders that plain transformers loads."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.errors import ExportRefused
from orchestrator.files import read_json, write_json
from orchestrator.records import BaseModel, TrialDone
from orchestrator.tracking.adapter_model import base_digest
from orchestrator.training.export import (
    Bounds,
    Form,
    export_adapter,
    load_adapted,
    load_plain,
)
from orchestrator.training.merge import Updates
from orchestrator.training.parity import Measured, Parity, compare, measure
from tests.tiny import make_tokenizer
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_families import make_family
from tests.training.test_pack import train

LOOSE = Bounds(max_loss_increase=1.0, min_agreement_fraction=0.1)


@pytest.fixture(scope="module")
def adapters(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    found = {}
    for bits in (4, 8, 16):
        spec = make_spec(bits, num_slots=1)
        trial = trial_config(steps=4, quant__bit_width=bits)
        _, events = train(spec, [trial], tmp_path_factory.mktemp(f"bits{bits}"))
        (done,) = [event for event in events if isinstance(event, TrialDone)]
        found[bits] = Path(done.adapter_dir)
    return found


@pytest.fixture(scope="module")
def reader(make_spec: MakeSpec) -> BlockReader:
    return BlockReader(load_manifest(make_spec().data_place, "held_out"))


@pytest.mark.parametrize(
    ("bits", "form"),
    [(4, "merged"), (4, "nf4"), (4, "int8"), (8, "merged"), (16, "merged"), (16, "nf4")],
)
def test_an_export_is_loaded_by_plain_transformers_and_says_what_the_adapter_says(
    adapters: dict[int, Path],
    base_folder: Path,
    reader: BlockReader,
    tmp_path: Path,
    bits: int,
    form: Form,
) -> None:
    to = tmp_path / "out"
    exported = export_adapter(
        adapters[bits], str(base_folder), to, form, lambda model: measure(model, reader), LOOSE
    )
    reloaded = load_plain(to)
    quantised = getattr(reloaded.config, "quantization_config", None)
    assert (quantised is None) == (form == "merged")
    assert read_json(to / "export.json")["parity"]["loss"] == exported.parity.loss
    again = compare(measure(load_adapted(adapters[bits], str(base_folder)), reader),
                    measure(reloaded, reader))  # fmt: skip
    assert again == exported.parity
    limit = 0.01 if form == "merged" else 0.05
    assert abs(exported.parity.loss_increase) < limit
    assert not list(tmp_path.glob(".*"))


def test_the_merged_weights_are_the_dequantised_base_plus_the_adapter(
    adapters: dict[int, Path], base_folder: Path, reader: BlockReader, tmp_path: Path
) -> None:
    to = tmp_path / "out"
    export_adapter(
        adapters[4], str(base_folder), to, "merged", lambda model: measure(model, reader), LOOSE
    )
    weights = load_file(to / "model-00001.safetensors")
    adapted = load_adapted(adapters[4], str(base_folder))
    layer = "model.layers.1.mlp.down_proj"
    linear = adapted.get_submodule(f"base_model.model.{layer}.base_layer")
    from bitsandbytes.functional import dequantize_4bit

    values = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    merged = Updates(adapters[4]).merged(layer, values)
    assert not torch.equal(merged, values.float())
    assert torch.equal(weights[f"{layer}.weight"], merged.to(torch.bfloat16))


def test_a_refused_export_leaves_nothing(
    adapters: dict[int, Path], base_folder: Path, reader: BlockReader, tmp_path: Path
) -> None:
    strict = Bounds(max_loss_increase=-1.0)
    to = tmp_path / "out"
    with pytest.raises(ExportRefused, match="--max-loss-increase -1 allows: nothing is written"):
        export_adapter(
            adapters[4], str(base_folder), to, "nf4", lambda model: measure(model, reader), strict
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "bits", "targets"),
    [
        ("gpt2", 8, ("c_attn", "c_proj", "c_fc")),  # files that have weights turned
        ("glm4_moe", 4, ("q_proj", "v_proj")),  # a router's bias is no parameter
    ],
)
def test_an_export_is_whole_whatever_its_family_keeps_where(
    make_spec: MakeSpec,
    reader: BlockReader,
    tmp_path: Path,
    name: str,
    bits: int,
    targets: tuple[str, ...],
) -> None:
    base = make_tokenizer(make_family(name, tmp_path / "base"))
    if name == "glm4_moe":
        weights = load_file(base / "model.safetensors")
        (bias,) = [key for key in weights if key.endswith("e_score_correction_bias")]
        weights[bias] = torch.tensor([0.5, -0.5, 0.25, 0.0])
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    record = BaseModel("x", None, str(base), base_digest(base))
    spec = make_spec(bits, base_model=record, num_slots=1, target_modules=targets)
    trial = trial_config(steps=2, quant__bit_width=bits, adapter__target_modules=targets)
    _, events = train(spec, [trial], tmp_path / "trial")
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    exported = export_adapter(
        Path(done.adapter_dir),
        str(base),
        tmp_path / "out",
        "merged",
        lambda model: measure(model, reader),
        Bounds(max_loss_increase=0.005, min_agreement_fraction=0.9),
    )
    assert abs(exported.parity.loss_increase) < 0.005
    before, after = load_plain(base), load_plain(tmp_path / "out")
    kept = {n for n, _ in before.named_buffers()} & before.state_dict().keys()
    assert bool(kept) == (name == "glm4_moe")
    for buffer in kept:
        assert torch.equal(before.get_buffer(buffer), after.get_buffer(buffer))


def test_a_base_with_code_of_its_own_is_refused_before_anything_is_loaded(
    adapters: dict[int, Path], tmp_path: Path
) -> None:
    own = tmp_path / "adapter"
    shutil.copytree(adapters[4], own)
    record = read_json(own / "orchestrator.json")
    record["base_model"]["trust_remote_code"] = True
    write_json(own / "orchestrator.json", record)
    with pytest.raises(ExportRefused, match="the code of tiny is its repository's own"):
        export_adapter(own, "nowhere", tmp_path / "out", "merged", lambda model: 1 / 0, LOOSE)
    assert not (tmp_path / "out").exists()


def test_parity_counts_losses_and_likeliest_tokens() -> None:
    one = Measured(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1, 2, 3, 4]))
    other = Measured(np.array([1.0, 2.5, 3.0, 4.0]), np.array([1, 2, 3, 5]))
    assert compare(one, other) == Parity(2.5, 2.625, 0.125, 0.75, 0.5, 4)
