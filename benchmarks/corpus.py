"""English text of any size: the standard library's docstrings, and GSM8K where it is at hand, put
together anew for each document, with other numbers.

In: how much text, of which format. Out: a JSONL file, the same for the same Python and seed.
"""

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from orchestrator.data.stdlib_docs import SKIPPED_FOLDERS, stdlib_doc_rows

POOL_SIZE = 40_000  # paragraphs, or pairs, of which the documents are made
MIN_PARAGRAPH_CHARS = 80
MAX_PARAGRAPHS = 8  # in a document

Pair = tuple[str, str]


def write_texts(path: Path, num_bytes: int, gsm8k: Path | None, seed: int = 0) -> int:
    """Fill a file of at most `num_bytes` with rows of `text`, a document of some paragraphs each.

    Returns the UTF-8 bytes of the texts alone.
    """
    draw = random.Random(seed)
    paragraphs = [*_paragraphs(), *("\n".join(pair) for pair in _gsm8k_pairs(gsm8k))]
    pool = [_renumbered(draw.choice(paragraphs), draw) for _ in range(POOL_SIZE)]

    rows = (
        {"text": "\n\n".join(draw.choices(pool, k=draw.randint(1, MAX_PARAGRAPHS)))}
        for _ in count()
    )
    return _write(path, rows, num_bytes)


def write_pairs(path: Path, num_bytes: int, gsm8k: Path | None, seed: int = 0) -> int:
    """Rows of `prompt` and `completion`; else as `write_texts`."""
    draw = random.Random(seed)
    pairs = [(row["prompt"], row["completion"]) for row in stdlib_doc_rows()]
    pairs += _gsm8k_pairs(gsm8k)
    pool = [
        {"prompt": _renumbered(prompt, draw), "completion": _renumbered(completion, draw)}
        for prompt, completion in draw.choices(pairs, k=POOL_SIZE)
    ]
    return _write(path, (draw.choice(pool) for _ in count()), num_bytes)


def read_texts(path: Path) -> list[str]:
    """All text of each row as one."""
    with path.open() as file:
        return ["".join(json.loads(line).values()) for line in file]


def _write(path: Path, rows: Iterator[dict[str, str]], num_bytes: int) -> int:
    written = num_text_bytes = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for row in rows:
            line = json.dumps(row).encode() + b"\n"
            written += len(line)
            if written > num_bytes:
                return num_text_bytes
            file.write(line)
            num_text_bytes += sum(len(text.encode()) for text in row.values())
    raise AssertionError("the rows have no end")


def _renumbered(text: str, draw: random.Random) -> str:
    return re.sub(r"\d", lambda _: draw.choice("0123456789"), text)


def _paragraphs() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            for docstring in _docstrings(ast.parse(path.read_bytes())):
                found += re.split(r"\n\s*\n", docstring)
    return [text for text in found if len(text) >= MIN_PARAGRAPH_CHARS]


def _docstrings(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _gsm8k_pairs(path: Path | None) -> list[Pair]:
    if path is None:
        return []
    with path.open() as file:
        rows = [json.loads(line) for line in file]
    return [(row["question"], row["answer"]) for row in rows]
