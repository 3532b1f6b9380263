"""How often an adapter's generated answer is the example's own, word for word.

In: prompts and answers, a loaded model. Out: each generated text, and whether it is right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.config import DataConfig
from orchestrator.data.sources import plan_slices, read_slice
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
    for part in plan_slices(config.train, config.rows_per_slice):
        for number, row in read_slice(part):
            try:
                yield str(row[config.fields.prompt]), str(row[config.fields.completion])
            except KeyError as error:
                raise DataError(
                    f"{part.file}:{number}: there is no column {error}: set fields.prompt and "
                    "fields.completion"
                ) from error
