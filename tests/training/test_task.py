"""A trial that is trained to its end answers questions: its score is its saved adapter's."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.cli import run
from orchestrator.config import EvaluationConfig, TrialConfig
from orchestrator.data.prepare import prepare
from orchestrator.data.tokenizing import load_tokenizer
from orchestrator.files import read_json
from orchestrator.records import (
    Answered,
    Checkpointed,
    Evaluated,
    Event,
    Leave,
    PackLeft,
    PackSpec,
    Progress,
    TrialDone,
    TrialOpened,
)
from orchestrator.tracking.adapter_model import continued
from orchestrator.training.lanes import Served
from orchestrator.training.pack import PackWorker
from orchestrator.training.program import EagerProgram
from orchestrator.training.slots import Slots
from orchestrator.training.task import generating
from tests.sweeps import sweep_config
from tests.tiny import make_tokenizer, question_rows
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_data_parallel import train_together
from tests.training.test_families import load, make_family
from tests.training.test_pack import task as assign
from tests.training.test_pack import train

# What a tiny model learns soon is that sums begin with "It is 1": right for some of them.
PATTERN = r"It is (\d)"
MAX_NEW_TOKENS = 10
BATCH_SIZE = 4
TASK: dict[str, Any] = {
    "answer_pattern": PATTERN,
    "max_new_tokens": MAX_NEW_TOKENS,
    "batch_size": BATCH_SIZE,
}
QUESTIONS = 16
QUESTION_TEXTS = ["What is 3 plus 3?", "3", "What then is 300 less 7 times 300?", "And 4 plus 4?"]
LEARNT = trial_config(steps=120, batch_size=8, adapter__rank=8)
NEIGHBOURS = [
    trial_config(steps=3, seed=1, adapter__rank=2, adapter__dropout=0.1),
    trial_config(steps=7, seed=2, adapter__rank=8),
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "held_out.jsonl"
    rows = question_rows(200)[:: 200 // QUESTIONS][:QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def spec(make_spec: MakeSpec, base_folder: Path, questions: Path) -> PackSpec:
    train_file = questions.with_name("train.jsonl")
    train_file.write_text("".join(json.dumps(row) + "\n" for row in question_rows(200)))
    changes = {"train": str(train_file), "held_out": str(questions), "block_length": 64}
    data = prepare(sweep_config(data=changes).data, base_folder, questions.parent)
    return make_spec(
        data_place=data.place, evaluation=EvaluationConfig.model_validate({"task": TASK})
    )


def without_task(spec: PackSpec) -> PackSpec:
    return replace(spec, evaluation=EvaluationConfig())


def done_of(events: Sequence[Event]) -> dict[int, TrialDone]:
    return {event.trial: event for event in events if isinstance(event, TrialDone)}


def answers_of(done: TrialDone) -> dict[str, int]:
    record = read_json(Path(done.adapter_dir).with_name("answers.json"))
    assert record["task_score"] == done.task_score
    return dict(zip(record["examples"], record["right"], strict=True))


def evaluate_arguments(done: TrialDone, questions: Path, out: Path) -> list[str]:
    """The same questions, asked of the saved adapter."""
    where = ["--model", done.adapter_dir, "--data", str(questions), "--out", str(out)]
    where += ["--set", "block_length=64", "--max-new-tokens", str(MAX_NEW_TOKENS)]
    where += ["--batch-size", str(BATCH_SIZE)]
    return ["evaluate", *where, "--exact-match", "--answer-pattern", PATTERN]


@pytest.mark.parametrize(
    ("quant", "adapter"),
    [
        ({"bit_width": 4}, {}),
        pytest.param({"bit_width": 8}, {}, marks=pytest.mark.slow),
        pytest.param({"bit_width": 4}, {"use_dora": True}, marks=pytest.mark.slow),
    ],
)
def test_the_score_is_what_evaluate_says_of_the_saved_adapter(
    spec: PackSpec,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quant: dict[str, Any],
    adapter: dict[str, Any],
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    one_slot = replace(spec, quant=spec.quant | quant, num_slots=1)
    trial = TrialConfig.model_validate(
        LEARNT.model_dump() | {"adapter": LEARNT.adapter.model_dump() | adapter}
    )
    done = done_of(train(one_slot, [trial], tmp_path)[1])[0]
    assert done.task_score is not None
    assert 0 < done.task_score < 1
    out = tmp_path / "report.json"
    assert run(evaluate_arguments(done, questions, out)) == 0
    report = read_json(out)
    assert report["exact_match"] == done.task_score
    assert sum(answer["exact"] for answer in report["answers"]) == sum(answers_of(done).values())


@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("family", ["cohere", "gemma2", "gpt_neox", "llama", "mixtral", "phi"])
@torch.no_grad()
def test_what_is_generated_is_what_trainings_own_passes_find_likeliest(
    tmp_path: Path, family: str, bit_width: int
) -> None:
    """With keys and values kept, prompts of several lengths together, by one slot of several."""
    base = load(make_tokenizer(make_family(family, tmp_path)), bit_width)
    rows = Slots(base.model, "all-linear", 3, 4, base.device, base.wide_dtype)
    program = EagerProgram(base, rows)
    rows.rows.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    served = Served(1, 2.0)
    tokenizer = load_tokenizer(str(tmp_path))
    prompts: list[list[int]] = [tokenizer(text)["input_ids"] for text in QUESTION_TEXTS]
    program.serve([served])
    block, positions = torch.tensor(prompts[:1]), torch.arange(len(prompts[0]))[None]
    before = base.hidden(block, positions)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != tokenizer.eos_token_id:
            hidden = base.hidden(torch.tensor([ids]), torch.arange(len(ids))[None])
            ids.append(int(base.head(hidden[0, -1:]).argmax()))
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    with generating(base, rows, served, program):
        assert continued(base.model, tokenizer, prompts, 12) == expected
        assert [continued(base.model, tokenizer, [one], 12)[0] for one in prompts] == expected
    assert torch.equal(base.hidden(block, positions), before)
    assert all(module.training for module in base.model.modules())


def test_each_answer_of_a_batch_ends_at_its_own_end_token(tmp_path: Path) -> None:
    model: Any = load(make_tokenizer(make_family("llama", tmp_path))).model.eval()
    tokenizer = load_tokenizer(str(tmp_path))
    prompts = [tokenizer(text)["input_ids"] for text in QUESTION_TEXTS]

    def one_by_one() -> list[str]:
        return [continued(model, tokenizer, [prompt], 12)[0] for prompt in prompts]

    whole = one_by_one()
    generated = model.generate(torch.tensor(prompts[:1]), max_new_tokens=12, do_sample=False)
    model.generation_config.eos_token_id = int(generated[0, -7])
    shorter = one_by_one()
    assert shorter[0] != whole[0]
    assert len({len(text) for text in shorter}) > 1
    assert continued(model, tokenizer, prompts, 12) == shorter


def passes_and_answers(spec: PackSpec, folder: Path) -> tuple[int, dict[str, int]]:
    """Passes of the whole model, of which training has none: it takes hidden states alone."""
    worker = PackWorker(spec)
    worker.load()
    passes = []
    worker.base.model.register_forward_hook(lambda *_: passes.append(1))
    (done,) = done_of(to_the_end(worker, LEARNT, folder, attempt=1)).values()
    return len(passes), answers_of(done)


@pytest.mark.slow
def test_a_batch_takes_the_passes_of_one_answer(spec: PackSpec, tmp_path: Path) -> None:
    def asked(batch_size: int) -> PackSpec:
        task = TASK | {"batch_size": batch_size}
        return replace(spec, evaluation=EvaluationConfig.model_validate({"task": task}))

    one_by_one, answers = passes_and_answers(asked(1), tmp_path / "1")
    together, same_answers = passes_and_answers(asked(QUESTIONS), tmp_path / "16")
    assert together == MAX_NEW_TOKENS
    assert one_by_one > (QUESTIONS - 1) * MAX_NEW_TOKENS
    assert same_answers == answers
    assert 0 < sum(answers.values()) < QUESTIONS


def test_a_score_does_not_depend_on_who_else_is_in_the_pack(spec: PackSpec, tmp_path: Path) -> None:
    alone = done_of(train(spec, [LEARNT], tmp_path / "alone")[1])[0]
    packed = done_of(train(spec, [LEARNT, *NEIGHBOURS], tmp_path / "packed")[1])
    assert answers_of(packed[0]) == answers_of(alone)
    assert [packed[number].task_score is None for number in packed] == [False] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"step_program": "in_place", "num_slots": 1},
        pytest.param({"step_program": "compiled"}, marks=pytest.mark.slow),
    ],
)
def test_others_train_on_as_if_nobody_had_answered(
    spec: PackSpec, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """To the bit: also through blocks that were compiled before."""
    spec = replace(spec, **changes)
    trials = [*NEIGHBOURS, trial_config(steps=9, seed=3)]
    with_answers, events = train(spec, trials, tmp_path / "with")
    without, others = train(without_task(spec), trials, tmp_path / "without")
    for number, adapter in without.items():
        for name, tensor in adapter.items():
            assert torch.equal(tensor, with_answers[number][name]), (number, name)
    assert any(isinstance(event, Answered) for event in events)
    for number, done in done_of(others).items():
        assert done.task_score is None
        assert done_of(events)[number].eval_loss == done.eval_loss


@pytest.mark.slow
def test_answers_compile_nothing(spec: PackSpec, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    def compiled(spec: PackSpec, folder: Path) -> int:
        torch._dynamo.reset()
        counters.clear()
        train(replace(spec, step_program="compiled"), NEIGHBOURS, folder)
        return int(counters["stats"]["unique_graphs"])

    without = compiled(without_task(spec), tmp_path / "without")
    assert without > 0
    assert compiled(spec, tmp_path / "with") == without


def until_answered(worker: PackWorker, trial: TrialConfig, folder: Path) -> list[Event]:
    """Until half of the questions are answered."""
    events = worker.advance([assign(0, trial, folder)])
    while not any(isinstance(e, Answered) and e.num_answered == QUESTIONS // 2 for e in events):
        events += worker.advance([])
    assert not done_of(events)
    return events


def to_the_end(worker: PackWorker, trial: TrialConfig, folder: Path, attempt: int) -> list[Event]:
    events = worker.advance([assign(0, trial, folder, attempt)])
    while not done_of(events):
        events += worker.advance([])
    return events


@pytest.mark.parametrize("killed", [True, False])
def test_a_trial_whose_worker_ends_while_it_answers_trains_no_step_again(
    spec: PackSpec, tmp_path: Path, killed: bool
) -> None:
    trial = trial_config(steps=5)
    whole = done_of(train(spec, [trial], tmp_path / "whole")[1])[0]
    worker = PackWorker(spec)
    worker.load()
    until_answered(worker, trial, tmp_path)
    if not killed:
        *saved, left = worker.advance([Leave(save=True)])
        assert isinstance(left, PackLeft)
        assert [event.step for event in saved if isinstance(event, Checkpointed)] == [trial.steps]
    del worker  # what is on disk is all there is

    worker = PackWorker(spec)
    worker.load()
    events = to_the_end(worker, trial, tmp_path, attempt=2)
    (opened,) = [event for event in events if isinstance(event, TrialOpened)]
    assert opened.step == trial.steps
    assert not [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [trial.steps]
    done = done_of(events)[0]
    assert (done.adapter_digest, done.task_score) == (whole.adapter_digest, whole.task_score)
    assert (done.eval_loss, done.tokens) == (whole.eval_loss, whole.tokens)
    assert answers_of(done) == answers_of(whole)


@pytest.mark.slow
def test_two_workers_share_the_questions(spec: PackSpec, tmp_path: Path) -> None:
    """An odd number of batches: one worker has none in the last round."""
    odd = EvaluationConfig.model_validate({"task": TASK | {"max_examples": 5, "batch_size": 2}})
    spec = replace(spec, micro_batch_size=1, evaluation=odd)
    alone = done_of(train(spec, [LEARNT], tmp_path / "alone")[1])[0]
    (_, events), (_, other_events) = train_together(spec, [LEARNT], tmp_path / "pair")
    assert answers_of(done_of(events)[0]) == answers_of(alone)
    assert done_of(other_events)[0].task_score == alone.task_score
    counts = [event.num_answered for event in events if isinstance(event, Answered)]
    assert counts == [4, 5]
