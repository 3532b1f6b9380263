"""Questions of the held-out examples, and which part of an answer is compared.

In: a reader of the held-out shards, their tokenizer, a TaskConfig. Out: prompts as the model had
them in training, each with what its answer must be, and which are answered together. Imports no
torch.
"""

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config import TaskConfig
from orchestrator.data.fields import shown
from orchestrator.data.formats import Tokenizer
from orchestrator.data.reader import IGNORED, BlockReader
from orchestrator.data.slices import RowProblem
from orchestrator.errors import DataError


@dataclass(frozen=True)
class Question:
    key: str
    """Of the example."""
    prompt_ids: list[int]
    expected: str
    """What is compared of the example's own answer."""


def held_out_questions(
    reader: BlockReader, tokenizer: Tokenizer, task: TaskConfig
) -> list[Question]:
    """The first ones by content hash. Every document must be a prompt and its whole answer.

    Raises:
        DataError: an answer has nothing that the task compares.
    """
    questions = []
    chosen = heapq.nsmallest(task.max_examples, reader.documents(), key=lambda found: found[0])
    for key, tokens, labels in chosen:
        is_answer = labels != IGNORED
        prompt_length = int(is_answer.argmax()) + 1  # the last token before the answer predicts it
        answer = tokenizer.decode(labels[is_answer].tolist(), skip_special_tokens=True)
        try:
            expected = expected_answer(answer, task.answer_pattern)
        except RowProblem as problem:
            raise DataError(f"held-out example {key[:12]}: {problem}") from problem
        questions.append(Question(key, tokens[:prompt_length].tolist(), expected))
    return questions


def answered_together(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Numbers of the prompts of each batch, by the prompts' tokens alone: some of about the same
    length, for little padding. The longest come first: where memory lacks, it does at once."""
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), prompts[number]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def compared(answer: str, pattern: str | None) -> str | None:
    """The part of an answer that is compared, see TaskConfig; None where the pattern has no match.

    Of several matches the first counts, as in lm-eval's filters (gsm8k.yaml, strict-match): what a
    model writes after its answer is no part of it.
    """
    if pattern is None:
        return answer.strip()
    found = re.search(pattern, answer)
    return (found[found.re.groups] or "").strip() if found else None


def expected_answer(answer: str, pattern: str | None) -> str:
    """Raises RowProblem for an example whose own answer could never be given."""
    part = compared(answer, pattern)
    if part is None:
        raise RowProblem(
            f"its answer must have a match of answer_pattern {pattern!r}, but got {shown(answer)}: "
            "correct one of them"
        )
    return part
