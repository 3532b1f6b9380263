"""How often an adapter's generated answer is the example's own, word for word.

In: prompts and answers, a loaded model. Out: each generated text, and whether it is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.config import TaskConfig
from orchestrator.data.fields import text_field
from orchestrator.data.formats import row_format, segments
from orchestrator.data.questions import answered_together, compared, expected_answer
from orchestrator.data.slices import RowProblem, read_options
from orchestrator.data.sources import PlanTask, no_rows, place, plan_file, read_slice, source_files
from orchestrator.data_config import DataConfig
from orchestrator.errors import ConfigError, DataError


@dataclass(frozen=True)
class Answer:
    prompt: str
    expected: str
    generated: str
    exact: bool
    """What is compared of both is equal."""


def check_has_answers(config: DataConfig) -> None:
    if config.format != "prompt_completion":
        raise ConfigError(
            f"--exact-match needs format: prompt_completion, where the completion is the answer, "
            f"but got format: {config.format}"
        )


def answers_of_rows(
    model: Any,
    tokenizer: Any,
    config: DataConfig,
    task: TaskConfig,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Answer], int]:
    """Of all rows of `config.train`, by the likeliest token each time; and the bad rows skipped.

    `observe` is told how many are answered, and of how many, before the first and after each batch.

    Raises:
        DataError: with file and line, for a row that cannot be used, unless these are skipped; or
            none can be used.
    """
    from orchestrator.tracking.adapter_model import continued, encode

    pattern = task.answer_pattern
    rows, bad_rows = _read(config, tokenizer, pattern)
    prompts = [encode(tokenizer, prompt) for prompt, _, _ in rows]
    texts: dict[int, str] = {}
    observe(0, len(rows))
    for batch in answered_together(prompts, task.batch_size):
        asked = [prompts[number] for number in batch]
        generated = continued(model, tokenizer, asked, task.max_new_tokens)
        texts |= dict(zip(batch, generated, strict=True))
        observe(len(texts), len(rows))
    found = [
        Answer(prompt, answer, texts[number], compared(texts[number], pattern) == expected)
        for number, (prompt, answer, expected) in enumerate(rows)
    ]
    return found, bad_rows


def _read(
    config: DataConfig, tokenizer: Any, pattern: str | None
) -> tuple[list[tuple[str, str, str]], int]:
    """Of each row prompt, answer as training has it (a template may begin it with an empty
    thought), and what is compared of it; and how many were skipped."""
    parts = [
        (part, row_format(config, source))
        for source in config.train_sources
        for file in source_files(source)
        for part in plan_file(PlanTask(file, config.slice_bytes))
    ]
    if not parts:
        raise no_rows(config.train_name)
    rows, bad_rows = [], 0
    for part, form in parts:
        for number, row in read_slice(part, read_options(config)):
            try:
                if isinstance(row, RowProblem):
                    raise row
                prompt = text_field(row, "prompt", form.fields.prompt)
                learned = "".join(s.text for s in segments(row, form, tokenizer) if s.has_loss)
                ids = tokenizer(learned, add_special_tokens=False)["input_ids"]
                answer = tokenizer.decode(ids, skip_special_tokens=True)
                rows.append((prompt, answer, expected_answer(answer, pattern)))
            except RowProblem as problem:
                if config.on_bad_row == "error":
                    raise DataError(f"{place(part, number)}: {problem}") from problem
                bad_rows += 1
    if not rows:
        raise DataError(
            f"{config.train_name}: at least one row with an answer is needed, but all {bad_rows} "
            "were skipped: take out on_bad_row: skip to see what is wrong with the first"
        )
    return rows, bad_rows
