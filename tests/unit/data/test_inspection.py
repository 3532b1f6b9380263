from pathlib import Path

import numpy as np

from orchestrator.data.inspection import read_figures, show_block
from orchestrator.data.reader import BlockReader
from tests.shards import make_document, write_shards


def test_a_shown_block_is_its_documents_with_what_is_learned_marked(tmp_path: Path) -> None:
    documents = [make_document(number, length) for number, length in enumerate((9, 5, 12))]
    reader = BlockReader(write_shards(tmp_path, [documents], block_length=32))
    block = show_block(reader, 0)
    assert [document.num_tokens for document in block.documents] == [9, 5, 12]
    assert block.num_padding == 32 - 26
    for shown, document in zip(block.documents, documents, strict=True):
        tokens = [token for run in shown.runs for token in run.token_ids]
        learned = [run.is_learned for run in shown.runs for _ in run.token_ids]
        assert tokens == document.input_ids.tolist()
        assert learned == [False, *document.has_label[:-1].tolist()]
        assert shown.key == document.key.hex()


def test_figures_count_every_document_once(tmp_path: Path) -> None:
    lengths = [3, 7, 7, 20, 31, 32, 1]
    documents = [make_document(number, length) for number, length in enumerate(lengths)]
    manifest = write_shards(tmp_path, [documents[:4], documents[4:]], block_length=32)
    figures = read_figures(manifest)
    assert sorted(figures.document_lengths.tolist()) == sorted(lengths)
    assert figures.documents_per_block.sum() == len(lengths)
    assert figures.quantiles["longest"] == 32
    for num_bins in (1, 5, 100):
        bins = figures.histogram(num_bins)
        assert sum(count for _, _, count in bins) == len(lengths)
        for low, high, count in bins:
            inside = (figures.document_lengths >= low) & (figures.document_lengths <= high)
            assert np.count_nonzero(inside) == count
