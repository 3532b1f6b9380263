"""`orchestrator export`: an adapter merged into its base, in 16 bits or quantised again.

In: an adapter, a form, and what it may lose. Out: a model folder for plain transformers or vLLM,
with export.json: its parity with the adapter on the base that it was trained on.
"""

import tempfile
from pathlib import Path

from jobs.adapters import open_adapter, rows_to_measure
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.data.prepare import find_examples, prepare_examples
from orchestrator.data.reader import BlockReader
from orchestrator.errors import BaseModelError, ConfigError
from orchestrator.files import cache_dir, read_json
from orchestrator.training.quiet import quiet_libraries


def export_model(
    model: str,
    to: Path,
    form: str,
    dtype: str,
    data: str | None,
    overrides: list[str],
    max_loss_increase: float,
    min_agreement: float,
    uri: str,
) -> int:
    """Each place where two models could say the same token counts alike for `min_agreement`."""
    with tempfile.TemporaryDirectory() as temporary, quiet_libraries():
        adapter = open_adapter(model, uri, Path(temporary))
        from orchestrator.tracking.adapter_model import base_source
        from orchestrator.training.export import Bounds, as_form, as_type, export_adapter
        from orchestrator.training.parity import measure

        record = read_json(adapter / "orchestrator.json")
        try:
            base = base_source(record["base_model"])
        except (OSError, ValueError) as error:
            raise BaseModelError(str(error)) from error
        reader = BlockReader(_examples(adapter, base, data, overrides))
        bounds = Bounds(max_loss_increase, min_agreement)
        exported = export_adapter(
            adapter,
            base,
            to,
            as_form(form),
            lambda loaded: measure(loaded, reader),
            bounds,
            as_type(dtype),
        )
    parity = exported.parity
    print(f"{form} model of {exported.num_bytes / 2**20:,.0f} MiB in {to}")
    print(
        f"held-out loss {parity.loss:.4f}, {parity.loss_increase:+.4f} against the adapter on the "
        f"base it was trained on; the same token in {parity.agreement_fraction:.1%} of "
        f"{parity.num_tokens:,} places"
    )
    return 0


def _examples(adapter: Path, base: str, data: str | None, overrides: list[str]) -> Manifest:
    """The file's rows, or of the rows that the adapter's sweep held out."""
    record = read_json(adapter / "orchestrator.json")
    if data is not None:
        return prepare_examples(rows_to_measure(adapter, data, overrides), Path(base), cache_dir())
    wanted = record["held_out_manifest"]
    if found := find_examples(cache_dir(), wanted):
        return load_manifest(found, "held_out")
    raise ConfigError(
        f"export: the held-out rows of this adapter ({wanted[:12]}) are not in {cache_dir()}: name "
        "examples to compare on with --data"
    )
