"""Public benchmarks on an adapter, by the lm-eval package, which is an extra.

In: a loaded model and names of tasks. Out: each task's metrics. lm-eval fetches a task's examples
itself, from the hub or from where the task's file says.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import ConfigError


def check_installed() -> None:
    """Raises ConfigError with the remedy; before anything is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--task needs the lm-eval package, which is not installed: "
            "pip install -e '.[lm-eval]' in the project's folder"
        )


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None
) -> dict[str, Mapping[str, Any]]:
    """Raises ConfigError for a task that lm-eval does not know or cannot fetch."""
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        outcome = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=list(tasks),
            limit=limit,
            bootstrap_iters=0,
            # Generation that a task asks for must be what the adapter was trained for.
            apply_chat_template=bool(tokenizer.chat_template),
        )
    except (KeyError, OSError, ValueError) as error:
        raise ConfigError(
            f"--task: lm-eval cannot run {', '.join(tasks)}: {error}: see `lm_eval ls tasks`"
        ) from error
    assert outcome is not None
    return dict(outcome["results"])
