"""The model registry for real: versions, aliases, the gate, and models that generate."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from pandas import DataFrame

from orchestrator.errors import RegistryError
from orchestrator.files import file_digest
from orchestrator.records import BaseModel
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.adapter_model import generate, load
from orchestrator.tracking.entry import find_license, read_entry
from orchestrator.tracking.model_files import download_adapter, read_evaluation
from orchestrator.tracking.registry import Registration, Registry
from tests import runs as samples
from tests.integration.mlflow_runs import MakeRun, aliases, connected


def test_registering_twice_makes_one_version(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    view.sync()
    first = Registry(uri).register_winner(store, view)
    assert first.champion
    assert Registry(uri).register_winner(store, view) == first
    (store.folder / "registration.json").unlink()
    assert Registry(uri).register_winner(store, view) == first
    (version,) = client.search_model_versions(f"name = '{first.model_name}'")
    assert aliases(client, first.model_name) == {"candidate": 1, "champion": 1}
    assert version.run_id == view.trial_run_id(3)
    assert version.tags["rank"] == "16"
    assert version.tags["held_out_digest"] == "h" * 64


def test_a_crash_between_version_and_alias_is_made_good(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    view.sync()
    made = Registry(uri).ensure_version(read_entry(store), view)  # and the process dies here
    assert made.aliases == []
    registration = Registry(uri).register_winner(store, view)
    (version,) = client.search_model_versions(f"name = '{registration.model_name}'")
    assert registration.version == int(made.version) == int(version.version)
    assert aliases(client, registration.model_name) == {"candidate": 1, "champion": 1}


def register(store: RunStore, uri: str) -> Registration:
    """What a sweep does at its end."""
    view = connected(store, uri)
    view.sync()
    registration = Registry(uri).register_winner(store, view)
    view.finish("FINISHED")
    return registration


def test_the_gate_keeps_a_better_champion(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    good = register(make_run(gain=1.2), uri)
    worse = register(make_run(gain=0.8), uri)
    better = register(make_run(gain=1.4), uri)
    assert (good.champion, worse.champion, better.champion) == (True, False, True)
    assert "worse than version 1: token_loss differs by +" in worse.reason
    assert aliases(client, good.model_name) == {"candidate": 3, "champion": 3}


def test_after_registering_the_sweeps_run_can_be_ended(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    register(store, uri)
    run = client.get_run(store.read("tracking")["run_id"])
    assert run.info.status == "FINISHED"
    assert "Registered as" in run.data.tags["mlflow.note.content"]


def test_registering_leaves_mlflows_global_state_alone(
    make_run: MakeRun, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    register(make_run(), uri)
    assert mlflow.get_tracking_uri() == "http://elsewhere:5000"


def test_a_damaged_adapter_is_not_registered(make_run: MakeRun, uri: str) -> None:
    store = make_run()
    entry = read_entry(store)
    (entry.folder / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(RegistryError, match="is damaged"):
        register(store, uri)


def test_a_sweep_without_winner_is_not_registered(make_run: MakeRun, uri: str) -> None:
    with pytest.raises(RegistryError, match="has no winner"):
        register(make_run(winner=False), uri)


def test_a_downloaded_adapter_is_the_one_that_was_registered(
    make_run: MakeRun, uri: str, tmp_path: Path
) -> None:
    store = make_run()
    registration = register(store, uri)
    name = registration.model_name
    folder = download_adapter(uri, f"models:/{name}@champion", tmp_path / "adapter")
    assert file_digest(folder / "adapter_model.safetensors") == registration.adapter_digest
    assert json.loads((folder / "orchestrator.json").read_text())["template"] == "plain"
    assert download_adapter(uri, f"models:/{name}/1", folder) == folder
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(RegistryError, match="is not the adapter of"):
        download_adapter(uri, f"models:/{name}/1", folder)


def test_a_damaged_registered_adapter_is_refused(
    make_run: MakeRun, uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    registration = register(make_run(), uri)
    location = client.get_model_version_download_uri(registration.model_name, "1")
    (weights,) = Path(location.removeprefix("file://")).rglob("adapter_model.safetensors")
    weights.write_bytes(b"flipped")
    with pytest.raises(RegistryError, match="is not the adapter of"):
        download_adapter(uri, f"models:/{registration.model_name}/1", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("wrong", ["@nobody", "/99", "", "@"])
def test_an_unknown_version_names_those_that_exist(
    make_run: MakeRun, uri: str, tmp_path: Path, wrong: str
) -> None:
    name = register(make_run(), uri).model_name
    with pytest.raises(RegistryError, match=f"models:/{name}@champion"):
        download_adapter(uri, f"models:/{name}{wrong}", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("bit_width", "template"),
    [pytest.param(16, "plain", marks=pytest.mark.slow), (4, "chat")],
)
def test_a_registered_adapter_generates_what_peft_generates(
    make_run: MakeRun,
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bit_width: int,
    template: str,
) -> None:
    base = samples.make_base_model(tmp_path / "base")
    store = make_run(params=({"quant.bit_width": bit_width},), base=base)
    entry = read_entry(store)
    samples.make_peft_adapter(entry.folder, base)
    samples.write_adapter_record(entry.folder, entry.trial, base, template)
    digest = file_digest(entry.folder / "adapter_model.safetensors")
    (store.trial_dir(0) / "result.json").unlink()
    store.finish_trial(replace(entry.result, adapter_digest=digest))
    name = register(store, uri).model_name

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model_uri = f"models:/{name}@champion"
    model = mlflow.pyfunc.load_model(model_uri)
    prompts = ["What is a list?", "abc"]
    params = {"max_new_tokens": 12}
    texts = model.predict(prompts, params=params)
    assert texts == model.predict(DataFrame({"prompt": prompts}), params=params)
    assert texts == generate(*load(entry.folder), prompts, max_new_tokens=12)
    assert texts == samples.generate_with_peft(entry.folder, base, bit_width, template, prompts, 12)
    assert len(set(texts)) == 2

    version = MlflowClient(uri, uri).get_model_version_by_alias(name, "champion")
    location = MlflowClient(uri, uri).get_model_version_download_uri(name, version.version)
    files = Path(location.removeprefix("file://"))
    (weights,) = files.rglob("adapter_model.safetensors")
    assert not [path for path in files.rglob("*") if path.suffix in (".pkl", ".bin", ".pt")]
    assert sum(path.stat().st_size for path in files.rglob("*")) < 200_000, "no base weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged: its digest"):
        mlflow.pyfunc.load_model(model_uri)


def test_a_version_carries_what_it_was_made_of(
    make_run: MakeRun, uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    base = BaseModel("org/x", "main", str(tmp_path), "d" * 64)
    (tmp_path / "README.md").write_text("---\nlicense: llama3\nlanguage: en\n---\n# A model\n")
    store = make_run(base=base)
    name = register(store, uri).model_name
    version = client.get_model_version(name, "1")
    expected = {
        "base_model": "org/x",
        "base_revision": "main",
        "base_digest": "d" * 64,
        "base_license": "llama3",
        "train_digest": "t" * 64,
        "held_out_digest": "h" * 64,
        "gate.rule": "first",
    }
    assert {tag: version.tags[tag] for tag in expected} == expected
    assert json.loads(version.tags["quant"])["bit_width"] == 16
    assert "licence: llama3" in version.description
    location = client.get_model_version_download_uri(name, "1").removeprefix("file://")
    model = mlflow.models.Model.load(location)
    assert model.signature is not None
    assert model.saved_input_example_info is not None
    evaluation = read_evaluation(uri, version)
    assert len(evaluation["nll"]) == 40
    assert sorted(evaluation["rivals"]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "text", "license_name"),
    [
        ("README.md", "---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("README.md", "# no facts\n", ""),
        ("README.md", "---\n: [\n---\n", ""),
        ("LICENSE", "\n  Apache License\nVersion 2.0\n", "Apache License"),
        ("NOTICE", "x", ""),
    ],
)
def test_the_bases_licence_is_found_where_it_stands(
    tmp_path: Path, name: str, text: str, license_name: str
) -> None:
    (tmp_path / name).write_text(text)
    assert find_license(tmp_path) == license_name


def test_a_missing_base_model_is_named(tmp_path: Path) -> None:
    store = samples.make_run(tmp_path / "run", base=BaseModel("org/x", None, "/nowhere", "d" * 64))
    with pytest.raises(FileNotFoundError, match="/nowhere .* ORCHESTRATOR_BASE_MODEL"):
        load(read_entry(store).folder)
