"""The base's shape from its files."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.planning.shape import UnknownShape, matching, read_shape
from tests.sweeps import LLAMA_8B, premises, sweep_config

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": True,
}
TENSORS = {
    "model.embed_tokens.weight": [40, 8],
    "model.layers.0.self_attn.q_proj.weight": [8, 8],
    "model.layers.0.self_attn.q_proj.bias": [8],
    "model.layers.0.mlp.up_proj.weight": [16, 8],
    "model.norm.weight": [8],
    "lm_head.weight": [40, 8],
}


def write_base(folder: Path, **changes: Any) -> Path:
    """A base whose files have headers and no weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    for part in (0, 1):
        write_weights(folder / f"model-{part}.safetensors", list(TENSORS)[part::2])
    return folder


def write_weights(path: Path, names: Sequence[str], prefix: str = "") -> None:
    header = {prefix + name: {"dtype": "BF16", "shape": TENSORS[name]} for name in names}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, None),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 512}},
            512,
        ),
        ({"rope_parameters": {"full": {"rope_type": "dynamic"}, "local": {}}}, 2048),
    ],
)
def test_sequences_are_kept_to_the_length_at_which_positions_are_still_their_own(
    tmp_path: Path, changes: dict[str, Any], most: int | None
) -> None:
    shape = read_shape(write_base(tmp_path, max_position_embeddings=2048, **changes))
    assert shape.most_tokens == most
    kept = {"train": "x", "block_length": 512}
    task = {"max_new_tokens": 8}
    premises(sweep_config(data=kept), "cuda", shape)
    for longer in (
        {"data": kept, "evaluation__task": task},
        {"data": kept | {"block_length": 4104}},
    ):
        if most is None or (most > 512 and "evaluation__task" in longer):
            premises(sweep_config(**longer), "cuda", shape)
            continue
        with pytest.raises(ConfigError, match=f"data.block_length.*at most {most} with this base"):
            premises(sweep_config(**longer), "cuda", shape)


def test_a_shape_is_read_from_the_headers_of_all_files(tmp_path: Path) -> None:
    shape = read_shape(write_base(tmp_path))
    assert not isinstance(shape, UnknownShape)
    sizes = {linear.name: (linear.in_features, linear.out_features) for linear in shape.linears}
    assert sizes == {
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.0.mlp.up_proj": (8, 16),
    }
    assert (shape.num_kv_heads, shape.head_dim) == (2, 4)
    assert shape.num_linear_params == 64 + 128
    assert shape.num_plain_params == 320 + 8 + 8  # tied: the head's copy is not loaded
    assert shape.tied_embeddings


@pytest.mark.parametrize("single", [True, False])
def test_a_base_that_lies_in_its_folder_twice_is_counted_once(tmp_path: Path, single: bool) -> None:
    alone = read_shape(write_base(tmp_path))
    if single:
        write_weights(tmp_path / "model.safetensors", list(TENSORS))
    else:
        files = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(TENSORS)}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    write_weights(tmp_path / "consolidated.safetensors", list(TENSORS), prefix="other.")
    assert read_shape(tmp_path) == alone


def test_a_damaged_index_leaves_the_shape_unknown(tmp_path: Path) -> None:
    (write_base(tmp_path) / "model.safetensors.index.json").write_text("{}")
    assert isinstance(read_shape(tmp_path), UnknownShape)


def test_an_output_head_of_its_own_is_not_quantised(tmp_path: Path) -> None:
    shape = read_shape(write_base(tmp_path, tie_word_embeddings=False))
    assert not isinstance(shape, UnknownShape)
    assert shape.num_linear_params == 64 + 128
    assert shape.num_plain_params == 2 * 320 + 8 + 8
    assert not shape.tied_embeddings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "family 'llama': its config.json has no hidden_size"),
        ({"num_local_experts": 8}, "a mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
    ],
)
def test_a_family_that_the_model_does_not_cover_is_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    shape = read_shape(write_base(tmp_path, **changes))
    assert isinstance(shape, UnknownShape)
    assert words in shape.reason


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, struct.pack("<Q", 9) + b"not json."])
def test_a_damaged_file_leaves_the_shape_unknown(tmp_path: Path, content: bytes) -> None:
    (write_base(tmp_path) / "model-0.safetensors").write_bytes(content)
    assert isinstance(read_shape(tmp_path), UnknownShape)


def test_a_folder_without_weights_leaves_the_shape_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_shape(tmp_path) == UnknownShape("the base has no .safetensors files")


def test_the_shape_of_a_real_folder_has_the_layers_that_take_adapters(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from tests.tiny import make_base_model

    make_base_model(tmp_path)
    shape = read_shape(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(shape, UnknownShape)
    assert shape.num_params == sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    modules = model.named_modules()
    linear = {n for n, m in modules if isinstance(m, torch.nn.Linear) and m is not head}
    assert {layer.name for layer in shape.linears} == linear


def test_adapters_go_where_names_end_as_the_user_wrote() -> None:
    assert len(LLAMA_8B.targets("all-linear")) == 7 * 32
    named = LLAMA_8B.targets(("q_proj", "mlp.up_proj"))
    assert len(named) == 2 * 32
    assert LLAMA_8B.targets(("proj",)) == ()
    names = ["q_proj", "a.q_proj", "a.xq_proj"]
    assert matching(names, ("q_proj",)) == ["q_proj", "a.q_proj"]
    assert matching(names, "all-linear") == names
