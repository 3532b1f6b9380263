"""How often an adapter's generated answer is the example's own, word for word.

In: prompts and answers, a loaded model. Out: each generated text, and whether it is right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.data.fields import text_field
from orchestrator.data.slices import RowProblem, read_options
from orchestrator.data.sources import PlanTask, no_rows, place, plan_file, read_slice, source_files
from orchestrator.data_config import DataConfig
from orchestrator.errors import ConfigError, DataError


@dataclass(frozen=True)
class Answer:
    prompt: str
    expected: str
    generated: str

    @property
    def exact(self) -> bool:
        """But for space around it."""
        return self.generated.strip() == self.expected.strip()


def check_has_answers(config: DataConfig) -> None:
    if config.format != "prompt_completion":
        raise ConfigError(
            f"--exact-match needs format: prompt_completion, where the completion is the answer, "
            f"but got format: {config.format}"
        )


def answers(model: Any, tokenizer: Any, config: DataConfig, max_new_tokens: int) -> list[Answer]:
    """Of all rows of `config.train`, by the likeliest token each time."""
    from orchestrator.tracking.adapter_model import generate

    pairs = list(_pairs(config))
    texts = generate(
        model, tokenizer, [prompt for prompt, _ in pairs], max_new_tokens=max_new_tokens
    )
    return [Answer(*pair, text) for pair, text in zip(pairs, texts, strict=True)]


def _pairs(config: DataConfig) -> Iterator[tuple[str, str]]:
    fields = config.fields
    files = [file for source in config.train_sources for file in source_files(source)]
    parts = [part for file in files for part in plan_file(PlanTask(file, config.slice_bytes))]
    if not parts:
        raise no_rows(config.train_name)
    for part in parts:
        for number, row in read_slice(part, read_options(config)):
            try:
                if isinstance(row, RowProblem):
                    raise row
                prompt = text_field(row, "prompt", fields.prompt)
                yield prompt, text_field(row, "completion", fields.completion)
            except RowProblem as problem:
                raise DataError(f"{place(part, number)}: {problem}") from problem
