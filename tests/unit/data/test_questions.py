"""Held-out examples as questions: prompts as in training, answers as they are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataConfig, TaskConfig
from orchestrator.data.formats import Tokenizer
from orchestrator.data.prepare import prepare
from orchestrator.data.questions import (
    Question,
    answered_together,
    compared,
    held_out_questions,
)
from orchestrator.data.reader import BlockReader
from orchestrator.errors import DataError

ROWS: list[dict[str, object]] = [
    {"prompt": f"{n} apples and {n}?", "completion": f" Twice {n}.\n#### {2 * n}"}
    for n in range(20)
]

Ask = Callable[..., list[Question]]


@pytest.fixture
def ask(
    write_rows: Callable[..., Path], tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> Ask:
    def ask(data: dict[str, Any] | None = None, **task: Any) -> list[Question]:
        rows = str(write_rows(ROWS))
        content = {"train": rows, "held_out": rows, "block_length": 128} | (data or {})
        prepared = prepare(DataConfig.model_validate(content), tokenizer_dir, tmp_path / "cache")
        reader = BlockReader(prepared.held_out)
        return held_out_questions(reader, tokenizer, TaskConfig.model_validate(task))

    return ask


@pytest.mark.parametrize(
    ("template", "prompt"),
    [("plain", "{}"), ("chat", "<|user|>{}<|end|><|assistant|>")],
)
def test_a_question_is_the_prompt_as_in_training_and_the_answer_without_the_end(
    ask: Ask, tokenizer: Tokenizer, template: str, prompt: str
) -> None:
    questions = ask({"template": template})
    found = {tokenizer.decode(one.prompt_ids): one.expected for one in questions}
    assert found == {prompt.format(row["prompt"]): str(row["completion"]).strip() for row in ROWS}


def test_the_first_questions_by_content_hash_are_asked(ask: Ask) -> None:
    everything = ask()
    assert ask(max_examples=7) == everything[:7]
    assert [one.key for one in everything] == sorted(one.key for one in everything)
    assert ask({"slice_bytes": 200}, max_examples=7) == everything[:7]  # many shards


def test_a_pattern_says_what_is_compared(ask: Ask, tokenizer: Tokenizer) -> None:
    found = {
        tokenizer.decode(one.prompt_ids): one.expected for one in ask(answer_pattern="#### (.+)")
    }
    assert found == {row["prompt"]: str(2 * n) for n, row in enumerate(ROWS)}


def test_an_answer_without_what_is_compared_is_refused(ask: Ask) -> None:
    with pytest.raises(DataError, match=r"held-out example \w{12}: its answer must have a match"):
        ask(answer_pattern="#### (1.)")


@pytest.mark.parametrize(
    ("answer", "pattern", "part"),
    [
        (" whole \n", None, "whole"),
        ("so\n#### 42\n#### 43", "#### (.+)", "42"),
        ("so\n####  42 ", "#### (.+)", "42"),
        ("it is 42.", r"\d+", "42"),
        ("so it is 42", "#### (.+)", None),
        ("A", "A(B)?", ""),
    ],
)
def test_the_first_match_counts_or_its_group(
    answer: str, pattern: str | None, part: str | None
) -> None:
    assert compared(answer, pattern) == part


def test_questions_of_about_one_length_are_answered_together_the_longest_first() -> None:
    prompts = [[7] * length for length in (3, 9, 1, 8, 2)]
    assert answered_together(prompts, 2) == [[1, 3], [0, 4], [2]]
    assert answered_together(prompts, 16) == [[1, 3, 0, 4, 2]]
    assert answered_together([], 2) == []


def test_who_is_answered_together_depends_on_the_prompts_alone() -> None:
    prompts = [[number % 3, *[5] * (number % 4), number] for number in range(20)]
    backward = prompts[::-1]
    for there, here in zip(
        answered_together(prompts, 6), answered_together(backward, 6), strict=True
    ):
        assert [prompts[number] for number in there] == [backward[number] for number in here]
