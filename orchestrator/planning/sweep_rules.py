"""What cannot work for any trial of a sweep, refused before any GPU is taken.

In: a SweepConfig, whose parts must suit each other. Out: a list of messages, empty when it can run.
Pure. Rules for single trials are in compatibility.py.
"""

from collections.abc import Iterator

from orchestrator.config import SweepConfig
from orchestrator.planning.compatibility import Rule
from orchestrator.planning.unread import unread_in_space


def sweep_problems(config: SweepConfig) -> list[str]:
    """Each names the fields, their values and what to do."""
    return [message for rule in SWEEP_RULES for message in rule.finds(config)]


def _fields_that_are_set_are_read(config: SweepConfig) -> Iterator[str]:
    yield from unread_in_space(config.trial.quant, config.search)


def _a_task_score_has_a_task(config: SweepConfig) -> Iterator[str]:
    if "task_score" in config.search.objectives and config.evaluation.task is None:
        yield (
            "search.objectives: task_score needs evaluation.task, but got evaluation.task=null: "
            "write evaluation: {task: {max_examples: 64}}, or seek eval_loss"
        )


def _the_gate_has_questions(config: SweepConfig) -> Iterator[str]:
    gate, task = config.registry.gate, config.evaluation.task
    if gate.metric == "task_error" and task is None:
        yield (
            "registry.gate.metric: task_error needs evaluation.task, but got evaluation.task=null: "
            "write evaluation: {task: {max_examples: 64}}, or compare token_loss"
        )
    elif gate.metric == "task_error" and task and task.max_examples < gate.min_pairs:
        yield (
            f"registry.gate.metric: task_error needs registry.gate.min_pairs ({gate.min_pairs}) "
            f"questions, but got evaluation.task.max_examples={task.max_examples}: ask more, or "
            "lower min_pairs"
        )


def _questions_have_answers(config: SweepConfig) -> Iterator[str]:
    data = config.data
    forms = {one.format or data.format for one in data.held_out_sources or data.train_sources}
    if config.evaluation.task is not None and forms != {"prompt_completion"}:
        yield (
            "evaluation.task needs held-out examples of data.format: prompt_completion, where the "
            f"completion is the answer, but got {', '.join(sorted(forms))}: give such ones as "
            "data.held_out, or leave evaluation.task out"
        )


def _answers_are_whole(config: SweepConfig) -> Iterator[str]:
    overlong = config.data.overlong
    if config.evaluation.task is not None and overlong in ("truncate", "split"):
        yield (
            f"evaluation.task needs whole answers, but got data.overlong={overlong}: set "
            "data.overlong: error or drop, or raise data.block_length"
        )


def _answers_are_generated_on_a_whole_base(config: SweepConfig) -> Iterator[str]:
    kinds = config.search.values_of("strategy.kind", config.trial.strategy.kind)
    if config.evaluation.task is not None and "zero" in kinds:
        yield (
            "evaluation.task needs strategy.kind: replicated, but got strategy.kind=zero: leave "
            "evaluation.task out, and measure adapters with `orchestrator evaluate --exact-match`"
        )


SWEEP_RULES: tuple[Rule[SweepConfig], ...] = (
    Rule(
        _fields_that_are_set_are_read,
        "its author would take the numbers for those of a setting that nobody has looked at",
        "orchestrator/training/codes.py; base_model.py, BitsAndBytesConfig",
    ),
    Rule(
        _a_task_score_has_a_task,
        "nobody would measure it, and no trial could win",
        "orchestrator/training/task.py",
    ),
    Rule(
        _the_gate_has_questions,
        "no candidate could be compared with a champion",
        "orchestrator/tracking/promotion.py",
    ),
    Rule(
        _questions_have_answers,
        "a score is the part of answers that are the example's own, and of other formats only "
        "single turns have one answer: as `orchestrator evaluate --exact-match`",
        "orchestrator/training/exact_match.py",
    ),
    Rule(
        _answers_are_whole,
        "the shards would hold answers that were cut, which no model could give",
        "orchestrator/data/questions.py",
    ),
    Rule(
        _answers_are_generated_on_a_whole_base,
        "a pass of one token would gather the whole base at stage 3, or bring it from where it is "
        "offloaded to, and all workers would have to make equally many passes",
        "DeepSpeed 0.19, runtime/zero/partitioned_param_coordinator.py",
    ),
)
