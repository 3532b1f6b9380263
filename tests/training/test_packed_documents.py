"""Documents that share a block are trained as if each were alone: no attention, no position and no
loss goes from one to another."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.data.reader import IGNORED, BlockReader
from orchestrator.data.tokenizing import Document
from orchestrator.records import BaseModel
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.loss import token_losses
from tests.shards import make_document, write_shards

BLOCK_LENGTH = 32
VOCAB_SIZE = 264  # the tiny base model's
# Of a document's loss, which is of size 100: as much as another order of additions may change.
LARGEST_DIFFERENCE = {"float64": 1e-11, "float32": 1e-3}


@pytest.fixture(scope="module", params=["float64", "float32"])
def base(base_folder: Path, request: pytest.FixtureRequest) -> LoadedBase:
    quant = QuantConfig.model_validate({"bit_width": 16, "compute_dtype": request.param})
    record = BaseModel("tiny", None, str(base_folder), "digest")
    return load_base_model(record, quant, "cpu", StrategyConfig())


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, BLOCK_LENGTH), min_size=1, max_size=30),
    seed=st.integers(0, 1000),
)
def test_documents_of_a_packed_batch_have_the_losses_that_they_have_alone(
    base: LoadedBase, lengths: list[int], seed: int
) -> None:
    documents = {}
    for number, length in enumerate(lengths, start=100 * seed):
        document = make_document(number, length, VOCAB_SIZE)
        documents[document.key.hex()] = document
    packed = packed_losses(base, list(documents.values()))
    assert packed.keys() == documents.keys()
    largest = LARGEST_DIFFERENCE[str(base.dtype).removeprefix("torch.")]
    for key, document in documents.items():
        assert packed[key] == pytest.approx(loss_alone(base, document), abs=largest)


@torch.no_grad()
def packed_losses(base: LoadedBase, documents: list[Document]) -> dict[str, float]:
    """Of each document by its key, from shards and all blocks at once."""
    half = len(documents) // 2
    with TemporaryDirectory() as folder:
        shards = [documents[:half], documents[half:]]
        manifest = write_shards(Path(folder), shards, BLOCK_LENGTH, VOCAB_SIZE)
        reader = BlockReader(manifest)
        batch = reader.blocks(range(reader.num_blocks))
        keys = reader.document_keys
    hidden = base.hidden(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
    places = batch.labels != IGNORED
    labels = torch.from_numpy(batch.labels[places])
    losses = token_losses(hidden[torch.from_numpy(places)], labels, base.head)
    weights = losses.double().numpy()
    sums = np.bincount(batch.document_ids[places], weights, minlength=len(keys))
    return dict(zip(keys, sums.tolist(), strict=True))


@torch.no_grad()
def loss_alone(base: LoadedBase, document: Document) -> float:
    """By the plain model, which knows nothing of blocks."""
    ids = torch.from_numpy(document.input_ids.astype(np.int64))[None]
    logits = base.model(input_ids=ids, use_cache=False).logits[0]
    places = torch.from_numpy(np.flatnonzero(document.has_label))
    labels = ids[0, places + 1]
    losses = torch.nn.functional.cross_entropy(logits[places], labels, reduction="sum")
    return float(losses)
