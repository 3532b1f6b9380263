"""`orchestrator generate`: a prompt through a registered adapter on the base it was trained on."""

import os
import tempfile
from pathlib import Path

from orchestrator.tracking.model_files import download_adapter
from orchestrator.tracking.stores import default_store
from orchestrator.training.quiet import quiet_libraries


def generate_text(
    prompt: str,
    model: str,
    max_new_tokens: int,
    temperature: float,
    tracking_uri: str | None,
    runs_dir: Path,
) -> int:
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_store(runs_dir)
    with tempfile.TemporaryDirectory() as temporary, quiet_libraries():
        folder = Path(model)
        if model.startswith("models:/"):
            folder = download_adapter(uri, model, Path(temporary))
        from orchestrator.tracking.adapter_model import generate, load

        loaded, tokenizer = load(folder)
        generate(
            loaded,
            tokenizer,
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stream=True,
        )
    return 0
