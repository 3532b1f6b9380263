"""Who becomes champion: crashes at every step, two sweeps at once, other examples, by hand."""

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.config import GateConfig, TaskConfig
from orchestrator.errors import (
    BaseModelError,
    OrchestratorError,
    RegistryError,
    RegistryUnreachable,
)
from orchestrator.files import read_json
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.alias_history import AliasEvent, carried_out, read_events
from orchestrator.tracking.entry import read_entry
from orchestrator.tracking.example_losses import ExampleLosses
from orchestrator.tracking.gate import Evaluate, Gate
from orchestrator.tracking.lease import LEASE_TAG, Timing, lease
from orchestrator.tracking.registry import Registration, Registry
from tests import runs as samples
from tests.integration.mlflow_runs import MakeRun, aliases, connected
from tests.integration.mortal_client import Died, MortalClient

QUICK = Timing(settle_s=0.02, stale_s=0.2, poll_s=0.02)
MOST_STEPS = 40
ONE_TRIAL = ({"quant.bit_width": 16, "adapter.rank": 16},)


def register(store: RunStore, uri: str, **options: Any) -> Registration:
    view = connected(store, uri)
    view.sync()
    return Registry(uri, timing=QUICK, **options).register_winner(store, view)


def history(client: MlflowClient, name: str) -> list[AliasEvent]:
    return [event for _, event in read_events(client.get_registered_model(name).tags)]


def test_a_crash_after_any_step_leaves_one_version_and_the_alias_moves_last(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    """Each sweep is a little better than the one before, and dies one step later."""
    name, died_at = "", []
    for steps in range(MOST_STEPS):
        store = make_run(gain=0.8 + 0.08 * steps, params=ONE_TRIAL)
        view = connected(store, uri)
        view.sync()
        mortal = MortalClient(client, steps)
        before = aliases(client, name).get("champion") if name else None
        try:
            Registry(uri, mortal, timing=QUICK).register_winner(store, view)
        except Died as death:
            died_at.append(str(death))
            assert not store.read("registration")
        registration = Registry(uri, timing=QUICK).register_winner(store, view)
        name = registration.model_name
        assert registration.champion, registration.reason
        assert registration.version == steps + 1
        assert len(client.search_model_versions(f"name = '{name}'")) == steps + 1
        assert aliases(client, name) == {"candidate": steps + 1, "champion": steps + 1}
        events = carried_out(history(client, name), steps + 1)
        assert [(event.before, event.after) for event in events][-1] == (before, steps + 1)
        assert [event.after for event in events] == list(range(1, steps + 2))
        if mortal.made and mortal.made[-1] == "log_dict" and len(mortal.made) <= steps:
            break
    assert "create_model_version" in died_at
    last = len(mortal.made) - 1 - mortal.made[::-1].index("set_registered_model_alias")
    rest = mortal.made[last + 1 :]
    assert rest == ["delete_registered_model_tag", "log_dict"], "the alias moves last"


def test_models_that_a_crash_left_unfinished_are_removed(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    view.sync()
    with pytest.raises(Died):
        Registry(uri, MortalClient(client, 3), timing=QUICK).register_winner(store, view)
    Registry(uri, timing=QUICK).register_winner(store, view)
    rule = f"tags.`orchestrator.run_id` = '{store.sweep.run_id}'"
    (model,) = client.search_logged_models([view.experiment_id], rule)
    assert str(model.status) == "READY"


def register_at_once(folder: str, uri: str, barrier: Any) -> None:
    store = RunStore.open(Path(folder))
    view = connected(store, uri)
    view.sync()
    barrier.wait(100)
    Registry(uri).register_winner(store, view)


@pytest.mark.slow
def test_of_two_sweeps_that_end_at_once_the_better_one_is_champion(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    first = register(make_run(gain=0.8, params=ONE_TRIAL), uri)
    stores = [make_run(gain=1.4), make_run(gain=1.1)]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=register_at_once, args=(str(store.folder), uri, barrier))
        for store in stores
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    better, worse = (store.read("registration") for store in stores)
    name = first.model_name
    assert aliases(client, name)["champion"] == better["version"]
    assert aliases(client, name)["candidate"] == 3
    events = history(client, name)
    moves = [(event.before, event.after) for event in events]
    if worse["champion"]:  # it was first, and gave way
        assert moves == [(None, 1), (1, worse["version"]), (worse["version"], better["version"])]
    else:
        assert moves == [(None, 1), (1, better["version"])]
        assert worse["gate"]["comparison"]["champion"] == better["version"]


def test_the_lease_is_held_by_one_at_a_time(uri: str, client: MlflowClient) -> None:
    """Four threads add one to a number that each reads and writes apart."""
    client.create_registered_model("counter")
    client.set_registered_model_tag("counter", "number", "0")

    def add() -> None:
        api = MlflowClient(tracking_uri=uri, registry_uri=uri)
        for _ in range(3):
            with lease(api, "counter", Timing(settle_s=0.25, poll_s=0.02)):
                number = int(api.get_registered_model("counter").tags["number"])
                api.set_registered_model_tag("counter", "number", str(number + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.get_registered_model("counter").tags["number"] == "12"


def test_a_lease_whose_holder_died_is_taken_over(uri: str, client: MlflowClient) -> None:
    client.create_registered_model("left")
    client.set_registered_model_tag("left", LEASE_TAG, "of a process that died")
    with lease(client, "left", QUICK) as held:
        held.check()
        client.set_registered_model_tag("left", LEASE_TAG, "of another that thinks we died")
        with pytest.raises(RegistryError, match="took over the aliases"):
            held.check()
    waits = Timing(wait_s=0.1, stale_s=100)
    with pytest.raises(RegistryError, match="run again later"), lease(client, "left", waits):
        pass


def other_examples(make_run: MakeRun, gain: float) -> RunStore:
    """A sweep whose trials were measured on other held-out examples."""
    store = make_run(gain=gain, params=ONE_TRIAL)
    for result in store.results:
        folder = (store.folder / result.adapter_dir).parent
        assert result.eval_loss is not None
        samples.write_evaluation(folder, result.number, result.eval_loss, examples="f")
    return store


def measured(folder: Path, loss: float) -> tuple[dict[str, Any], dict[str, Any]]:
    samples.write_evaluation(folder, 9, loss, examples="f")
    record = read_json(folder / "evaluation.json")
    return record, record


@pytest.mark.parametrize(("loss", "champion"), [(2.6, True), (1.5, False)])
def test_a_champion_is_measured_on_the_candidates_examples(
    make_run: MakeRun, uri: str, loss: float, champion: bool
) -> None:
    asked = []

    def evaluate(
        adapter: Path, data_place: str, task: TaskConfig | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append((read_json(adapter / "orchestrator.json")["template"], data_place, task))
        return measured(adapter.parent, loss)

    register(make_run(gain=1.0, params=ONE_TRIAL), uri)
    store = other_examples(make_run, gain=1.2)
    registration = register(store, uri, evaluate=evaluate)
    assert registration.champion == champion
    assert registration.gate["rule"] == ("better" if champion else "worse")
    assert registration.gate["comparison"]["examples_digest"] == "f" * 64
    assert asked == [("plain", store.read("data")["place"], None)]


BY_ANSWERS = {
    "data": {"train": "sums.jsonl", "format": "prompt_completion"},
    "evaluation": {"task": {"max_examples": 40}},
    "registry": {"gate": {"metric": "task_error"}},
}


@pytest.mark.parametrize(("right", "champion"), [(20, True), (30, False)])
def test_a_champion_that_answered_other_questions_is_asked_the_candidates(
    make_run: MakeRun, uri: str, right: int, champion: bool
) -> None:
    asked = []

    def evaluate(
        adapter: Path, data_place: str, task: TaskConfig | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append(task)
        record, alone = measured(adapter.parent, 1.5)  # of a lower loss
        samples.write_answers(adapter.parent, right)
        assert task is not None
        answers = read_json(adapter.parent / "answers.json") | {"task": task.model_dump()}
        return record | {"answers": answers}, alone

    first, second = (
        make_run(gain=gain, params=ONE_TRIAL, content=BY_ANSWERS) for gain in (1.0, 1.2)
    )
    for store, questions in ((first, "a"), (second, "b")):
        for result in store.results:
            folder = (store.folder / result.adapter_dir).parent
            samples.write_answers(folder, 30, questions)
    register(first, uri)
    registration = register(second, uri, evaluate=evaluate)
    assert registration.champion == champion, registration.reason
    assert "task_error differs by" in registration.reason
    assert "over 40 questions" in registration.reason
    assert asked == [TaskConfig(max_examples=40)]


def test_a_version_has_the_answers_of_all_trials_that_were_asked_the_same(
    make_run: MakeRun, uri: str
) -> None:
    store = make_run(content=BY_ANSWERS)
    for number, result in enumerate(store.results):
        folder = (store.folder / result.adapter_dir).parent
        samples.write_answers(folder, 10 + number, "ab"[number == 2])
    evaluation = read_entry(store).evaluation
    assert evaluation is not None
    answers = ExampleLosses.from_json(evaluation).answers
    assert answers is not None
    winner = store.read("winner")["trial"]
    assert winner != 2
    assert answers.wrong.sum() == 40 - (10 + winner)
    assert answers.rivals.shape == (40, len(store.results) - 2)
    assert answers.task == TaskConfig(max_examples=40).model_dump()


def failing(error: OrchestratorError) -> Evaluate:
    def evaluate(
        adapter: Path, data_place: str, task: TaskConfig | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        raise error

    return evaluate


def test_a_champion_that_cannot_be_measured_stays_and_says_why(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    evaluate = failing(BaseModelError("the base model is not in /models"))
    name = register(make_run(gain=1.0, params=ONE_TRIAL), uri).model_name
    registration = register(other_examples(make_run, gain=1.2), uri, evaluate=evaluate)
    assert not registration.champion
    assert "the base model is not in /models" in registration.reason
    assert "registry promote --force" in registration.reason
    assert aliases(client, name) == {"candidate": 2, "champion": 1}


def test_nothing_is_decided_while_the_registry_does_not_answer(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    """A verdict would stand though its reason has passed."""
    name = register(make_run(gain=1.0, params=ONE_TRIAL), uri).model_name
    better = other_examples(make_run, gain=1.2)
    with pytest.raises(RegistryUnreachable):
        register(better, uri, evaluate=failing(RegistryUnreachable("timed out")))
    assert aliases(client, name) == {"candidate": 1, "champion": 1}
    again = register(better, uri, evaluate=lambda adapter, *_: measured(adapter.parent, 2.6))
    assert again.champion
    assert aliases(client, name) == {"candidate": 2, "champion": 2}


def test_the_decision_stands_on_the_version_and_in_the_run(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    register(make_run(gain=1.0, params=ONE_TRIAL), uri)
    registration = register(make_run(gain=1.2), uri)
    version = client.get_model_version(registration.model_name, "2")
    comparison = registration.gate["comparison"]
    assert json.loads(version.tags["gate"]) == registration.gate
    assert float(version.tags["gate.difference"]) == pytest.approx(comparison["difference"], 1e-3)
    assert version.tags["gate.num_pairs"] == "40"
    assert version.tags["gate.examples_digest"] == "e" * 64
    assert comparison["num_trials"] == 4
    artifacts = [file.path for file in client.list_artifacts(version.run_id)]
    assert "gate.json" in artifacts


def test_rollback_goes_back_one_champion_at_a_time_and_is_remembered(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    for gain in (0.8, 1.0, 1.2):
        name = register(make_run(gain=gain, params=ONE_TRIAL), uri).model_name
    gate = Gate(client, uri, timing=QUICK)
    assert gate.roll_back(name, "answers got longer") == (3, 2)
    assert gate.roll_back(name, "still") == (2, 1)
    with pytest.raises(RegistryError, match="no earlier champion to go back to"):
        gate.roll_back(name, "once more")
    assert aliases(client, name) == {"candidate": 3, "champion": 1}
    assert [event.reason for event in history(client, name)][3:] == ["answers got longer", "still"]
    # What was rolled back may come back, by the gate or by force.
    assert gate.promote(name, 3, GateConfig()).promote
    assert gate.promote(name, 2, GateConfig()).rule == "worse"
    assert gate.force(name, 2, "legal asked for it").promote
    assert history(client, name)[-1].action == "force"
    assert aliases(client, name)["champion"] == 2
    assert client.get_model_version(name, "2").tags["promotion"] == "forced: legal asked for it"


def test_a_retry_after_a_rollback_does_not_promote_again(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    register(make_run(gain=0.8, params=ONE_TRIAL), uri)
    store = make_run(gain=1.2, params=ONE_TRIAL)
    registration = register(store, uri)
    Gate(client, uri, timing=QUICK).roll_back(registration.model_name, "bad")
    (store.folder / "registration.json").unlink()
    assert register(store, uri) == registration
    assert aliases(client, registration.model_name)["champion"] == 1
