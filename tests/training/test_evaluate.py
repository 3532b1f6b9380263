"""`orchestrator evaluate`: an adapter measured on any file, as its training would have done it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from jobs.cli import run
from orchestrator.config import EvaluationConfig, TaskConfig
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.data.prepare import prepare
from orchestrator.data.reader import BlockReader
from orchestrator.data_config import DataConfig
from orchestrator.errors import BaseModelError, DataError
from orchestrator.files import read_json
from orchestrator.records import TrialDone
from orchestrator.training.adapter_evaluation import evaluate_adapter
from tests.tiny import CHAT_TEMPLATE, make_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import train


@pytest.fixture(scope="module")
def trained(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter on the query and value layers only, with its evaluation beside it"""
    folder = tmp_path_factory.mktemp("trained")
    spec = make_spec(num_slots=1, bit_width=4, target_modules=("q_proj", "v_proj"))
    adapter = {"rank": 3, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "rslora": True}
    _, events = train(spec, [trial_config(steps=4, adapter=adapter)], folder)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    return Path(done.adapter_dir)


@pytest.fixture(scope="module")
def held_out(make_spec: MakeSpec) -> Manifest:
    return load_manifest(make_spec().data_place, "held_out")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {n} plus 1?", "completion": f"It is {n + 1}."} for n in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_saved_adapter_has_the_losses_that_it_had_in_training(
    trained: Path, held_out: Manifest
) -> None:
    recorded = read_json(trained.with_name("evaluation.json"))
    found, base = evaluate_adapter(trained, held_out, batch_size=3)
    assert found["eval_loss"] == pytest.approx(recorded["eval_loss"], rel=1e-5)
    assert found["nll"] == pytest.approx(recorded["nll"], rel=1e-4)
    for name in ("labels", "examples", "examples_digest", "manifest"):
        assert found[name] == recorded[name]
    assert base["eval_loss"] > found["eval_loss"]


def test_a_saved_adapter_answers_as_it_did_in_training(
    make_spec: MakeSpec, held_out: Manifest, tmp_path: Path
) -> None:
    task = TaskConfig(max_examples=5, max_new_tokens=2, batch_size=3, answer_pattern="(?s).")
    evaluation = EvaluationConfig(task=task)
    _, events = train(make_spec(num_slots=1, evaluation=evaluation), [trial_config()], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    recorded = read_json(Path(done.adapter_dir).with_name("answers.json"))
    found, _ = evaluate_adapter(Path(done.adapter_dir), held_out, task=task)
    assert found["answers"] == recorded | {"task": task.model_dump()}


def test_examples_are_the_same_however_they_are_packed(
    rows: Path, trained: Path, tmp_path: Path
) -> None:
    found = []
    for length in (64, 96):
        out = tmp_path / f"{length}.json"
        set_length = ["--set", f"block_length={length}"]
        where = ["--model", str(trained), "--data", str(rows), "--out", str(out)]
        assert run(["evaluate", *where, *set_length]) == 0
        found.append(read_json(out)["by_example"])
    assert found[0]["manifest"] != found[1]["manifest"]
    assert found[0]["examples_digest"] == found[1]["examples_digest"]
    by_key = [dict(zip(record["examples"], record["nll"], strict=True)) for record in found]
    assert by_key[0] == pytest.approx(by_key[1], rel=1e-4)


def test_rows_are_read_as_in_training_unless_it_is_said_otherwise(
    make_spec: MakeSpec,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = {"path": "train.jsonl", "fields": {"prompt": "question", "completion": "answer"}}
    trained_on = DataConfig.model_validate(
        {"train": [source, "other.jsonl"], "block_length": 64, "overlong": "truncate"}
    )
    spec = make_spec(num_slots=1, reading=trained_on.reading)
    _, events = train(spec, [trial_config(steps=1)], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[0]["completion"] *= 20  # more than a block holds
    asked = [{"question": line["prompt"], "answer": line["completion"]} for line in lines]
    rows.write_text("".join(json.dumps(line) + "\n" for line in asked))
    out = tmp_path / "out.json"
    where = ["--model", done.adapter_dir, "--data", str(rows)]
    assert run(["evaluate", *where, "--out", str(out)]) == 0
    assert read_json(out)["examples"] == 5
    assert run(["evaluate", *where, "--set", "overlong=error"]) == 2
    assert "64" in capsys.readouterr().err
    assert run(["evaluate", *where, "--set", "fields.completion=completion"]) == 2
    assert "completion" in capsys.readouterr().err


def test_an_evaluation_tells_loss_perplexity_and_exact_matches(
    rows: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.json"
    where = ["--model", str(trained), "--data", str(rows), "--out", str(out)]
    assert run(["evaluate", *where, "--exact-match", "--max-new-tokens", "3"]) == 0
    report = read_json(out)
    assert report["examples"] == 5
    assert report["perplexity"] == pytest.approx(2.718281828 ** report["loss"])
    low, high = report["difference"]
    assert low <= report["loss"] - report["base_loss"] <= high
    assert report["exact_match"] == 0
    assert [answer["expected"] for answer in report["answers"]][0] == "It is 1."
    printed, told = capsys.readouterr()
    for word in ("perplexity", "exact match", "tokens with loss"):
        assert word in printed
    assert told.startswith("generating answers: 0 of 5 done\n"), "through the libraries' silence"


def test_an_exact_match_is_found(rows: Path, trained: Path, tmp_path: Path) -> None:
    """The file's answers are what the adapter says."""
    from orchestrator.tracking.adapter_model import load
    from orchestrator.training.exact_match import answers_of_rows

    model, tokenizer = load(trained)
    config, task = DataConfig(train=str(rows)), TaskConfig(max_new_tokens=3, batch_size=2)
    said, _ = answers_of_rows(model, tokenizer, config, task)
    lines = [{"prompt": a.prompt, "completion": f" {a.generated}\n"} for a in said]
    lines[0]["completion"] = "something else"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told: list[tuple[int, int]] = []
    found, _ = answers_of_rows(model, tokenizer, config, task, lambda *counts: told.append(counts))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert [answer.exact for answer in found] == [False] + [True] * 4


def test_an_answer_is_what_was_taught_also_where_the_template_begins_it(
    rows: Path, tmp_path: Path
) -> None:
    """As Qwen 3's does, with an empty thought."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from orchestrator.training.exact_match import answers_of_rows

    model = LlamaForCausalLM.from_pretrained(make_base_model(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{m.content}}", "{% if m.role == 'assistant' %}[]\n{% endif %}{{m.content}}"
    )
    config = DataConfig(train=str(rows), template="chat")
    found, _ = answers_of_rows(model, tokenizer, config, TaskConfig(max_new_tokens=1))
    assert [answer.expected for answer in found] == [f"[]\nIt is {n + 1}." for n in range(5)]


def test_bad_rows_are_skipped_for_losses_and_answers_where_the_data_say_so(
    rows: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The answers skip one more: it has nothing that the pattern finds."""
    with rows.open("a") as file:
        file.write('{broken\n{"prompt": "Why?"}\n{"prompt": "Why?", "completion": "No number."}\n')
    out = tmp_path / "out.json"
    where = ["--model", str(trained), "--data", str(rows), "--out", str(out)]
    exact = ["--exact-match", "--max-new-tokens", "3", "--answer-pattern", "[0-9]+"]
    assert run(["evaluate", *where, *exact]) == 2
    assert "rows.jsonl:6: " in capsys.readouterr().err
    assert run(["evaluate", *where, *exact, "--set", "on_bad_row=skip"]) == 0
    report = read_json(out)
    assert (report["examples"], report["bad_rows"]) == (6, 2)
    assert (len(report["answers"]), report["exact_match_bad_rows"]) == (5, 3)
    printed = capsys.readouterr().out
    assert re.search(r"^.*exact match, bad rows skipped\W+3\W", printed, re.MULTILINE)
    assert re.search(r"^\W*bad rows skipped\W+2\W", printed, re.MULTILINE)
    exact[-1] = "never"
    assert run(["evaluate", *where, *exact, "--set", "on_bad_row=skip"]) == 2
    assert "at least one row with an answer is needed, but all 8 were" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "evaluate needs --data, or --task, or both"),
        (["--exact-match", "--task", "arc_easy"], "--exact-match needs --data"),
        (["--data", "ROWS", "--limit", "3"], "--limit needs --task"),
        (["--data", "ROWS", "--answer-pattern", "x"], "--answer-pattern needs --exact-match"),
        (
            ["--data", "ROWS", "--exact-match", "--answer-pattern", "(a)(b)"],
            "--answer-pattern: answer_pattern must have at most one group",
        ),
        (
            ["--data", "ROWS", "--exact-match", "--answer-pattern", "#### (.+)"],
            "rows.jsonl:1: its answer must have a match of answer_pattern '#### (.+)'",
        ),
        (["--data", "ROWS", "--set", "format=text", "--exact-match"], "format: prompt_completion"),
        (["--data", "ROWS", "--set", "formt=text"], "unknown field; did you mean 'format'?"),
        (["--data", "nothing.jsonl"], "nothing.jsonl: file not found"),
        (["--data", "ROWS", "--set", "fields.prompt=question"], "there is no column 'question'"),
    ],
)
def test_wrong_input_is_one_clear_error(
    rows: Path, trained: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(rows) if word == "ROWS" else word for word in arguments]
    assert run(["evaluate", "--model", str(trained), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_task_without_the_lm_eval_package_says_how_to_get_it(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "--model", str(trained), "--task", "arc_easy"]) == 2
    assert "pip install -e '.[lm-eval]'" in capsys.readouterr().err


def test_examples_of_another_template_or_tokenizer_are_refused(
    trained: Path, held_out: Manifest, tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    record = read_json(adapter / "orchestrator.json")
    (adapter / "orchestrator.json").write_text(json.dumps(record | {"template": "chat"}))
    with pytest.raises(DataError, match="template plain, the adapter was trained with chat"):
        evaluate_adapter(adapter, held_out)


def test_the_template_of_examples_is_that_of_their_own_source(
    trained: Path, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    def examples(train: str, held_out: str) -> Manifest:
        sources = {"train": {"path": str(rows), "template": train}}
        sources |= {"held_out": {"path": str(rows), "template": held_out}}
        config = DataConfig.model_validate(sources | {"block_length": 64})
        return prepare(config, base_folder, tmp_path / "cache").held_out

    evaluate_adapter(trained, examples(train="chat", held_out="plain"))
    with pytest.raises(DataError, match="with template chat, the adapter was trained with plain"):
        evaluate_adapter(trained, examples(train="plain", held_out="chat"))


def test_an_adapter_that_does_not_fit_its_base_is_refused(
    trained: Path, held_out: Manifest, tmp_path: Path
) -> None:
    from orchestrator.files import file_digest

    adapter = shutil.copytree(trained, tmp_path / "adapter")
    config = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    record = read_json(adapter / "orchestrator.json")
    record["files"]["adapter_config.json"] = file_digest(adapter / "adapter_config.json")
    (adapter / "orchestrator.json").write_text(json.dumps(record))
    with pytest.raises(BaseModelError, match="does not fit its base model: .*another shape"):
        evaluate_adapter(adapter, held_out)


def test_every_document_is_in_the_digest_of_the_examples(held_out: Manifest) -> None:
    reader = BlockReader(held_out)
    assert len(reader.examples_digest) == 64
    assert reader.examples_digest == BlockReader(held_out).examples_digest
