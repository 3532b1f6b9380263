"""Question and answer pairs from the docstrings of the installed Python standard library.

In: the library's .py files, parsed and never imported. Out: rows of `prompt` and `completion`, in
the same order each time. Imports no other module of this package.

It is the dataset that every machine with Python already has: first runs and tests need no download.
"""

import ast
import inspect
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.files import write_text

STDLIB_DOCS_VERSION = 1  # part of the file's name in the cache: raise it when the rows change

MIN_ANSWER_CHARS = 30  # shorter docstrings only repeat the name
MAX_ANSWER_CHARS = 400
MAX_SIGNATURE_CHARS = 120

# Folders without prose: tests, demos, applications, tables of characters, bundled wheels.
SKIPPED_FOLDERS = frozenset(
    {"dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
    | {"test", "tests", "turtledemo"}
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Documented:
    kind: str  # function, class or method
    name: str
    signature: str
    docstring: str


def write_stdlib_docs(path: Path) -> int:
    """Write the rows as JSONL; returns their number."""
    rows = stdlib_doc_rows()
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def stdlib_doc_rows() -> list[dict[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    answers: dict[str, str] = {}
    for path in _module_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for item in _documented(ast.parse(path.read_bytes()), module):
            answer = _answer(item.docstring)
            if len(answer) >= MIN_ANSWER_CHARS:
                # A name may be defined twice, in the branches of an `if`: the first one counts.
                answers.setdefault(_question(item), answer)
    return [{"prompt": prompt, "completion": answer} for prompt, answer in answers.items()]


def _module_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir(), key=lambda path: path.name):
        if path.is_dir() and not _is_private(path.name) and path.name not in SKIPPED_FOLDERS:
            yield from _module_files(path)
        elif path.suffix == ".py" and (path.name == "__init__.py" or not _is_private(path.name)):
            yield path


def _documented(module: ast.Module, module_name: str) -> Iterator[Documented]:
    for node in _definitions(module.body):
        name = f"{module_name}.{node.name}"
        if not isinstance(node, ast.ClassDef):
            yield _describe("function", name, node, _signature(node.args))
            continue
        yield _describe("class", name, node, _constructor_signature(node))
        for method in _definitions(node.body):
            if not isinstance(method, ast.ClassDef):
                arguments = method.args if _is_static(method) else _without_self(method.args)
                yield _describe("method", f"{name}.{method.name}", method, _signature(arguments))


def _definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, Definition) and not _is_private(node.name):
            yield node


def _constructor_signature(node: ast.ClassDef) -> str:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _signature(_without_self(item.args))
    return ""


def _is_private(name: str) -> bool:
    return name.startswith(("_", "."))


def _is_static(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = (item.id for item in method.decorator_list if isinstance(item, ast.Name))
    return "staticmethod" in decorators


def _without_self(arguments: ast.arguments) -> ast.arguments:
    if arguments.posonlyargs:
        arguments.posonlyargs.pop(0)
    elif arguments.args:
        arguments.args.pop(0)
    return arguments


def _describe(kind: str, name: str, node: Definition, signature: str) -> Documented:
    return Documented(kind, name, signature, ast.get_docstring(node, clean=False) or "")


def _signature(arguments: ast.arguments) -> str:
    variadic = [item for item in (arguments.vararg, arguments.kwarg) if item]
    for item in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]:
        item.annotation = None
    text = ast.unparse(arguments)
    return f"({text})" if len(text) <= MAX_SIGNATURE_CHARS else "(...)"


def _question(item: Documented) -> str:
    return f"What does the Python {item.kind} `{item.name}{item.signature}` do?"


def _answer(docstring: str) -> str:
    """The first paragraphs of prose, as one line that ends where a sentence does."""
    answer = ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if re.match(r"\s|>>>|[-*=+]", paragraph):  # an example, a list or a table
            break
        answer = f"{answer} {' '.join(paragraph.split())}".strip()
        if len(answer) > MAX_ANSWER_CHARS:
            break
    return _cut_at_sentence(answer)


def _cut_at_sentence(text: str) -> str:
    """Cut what is too long, and a last sentence that announces what is not there ("Example:")."""
    if len(text) <= MAX_ANSWER_CHARS and not text.endswith(":"):
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text[: MAX_ANSWER_CHARS + 1])]
    if ends:
        return text[: ends[-1]]
    return text[:MAX_ANSWER_CHARS].rpartition(" ")[0]
