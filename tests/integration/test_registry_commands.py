"""`orchestrator registry`, as a user calls it, on a real store."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.cli import run
from orchestrator.tracking.lease import Timing
from orchestrator.tracking.registry import Registry
from tests.integration.mlflow_runs import MakeRun, aliases, connected

Said = Callable[..., tuple[int, str]]

QUICK = Timing(settle_s=0.02, stale_s=0.2, poll_s=0.02)


@pytest.fixture
def name(make_run: MakeRun, uri: str) -> str:
    """A model of three versions: 2 is champion, 3 is worse."""
    for gain in (0.8, 1.2, 1.0):
        store = make_run(gain=gain, params=({"quant.bit_width": 16, "adapter.rank": 16},))
        view = connected(store, uri)
        view.sync()
        name = Registry(uri, timing=QUICK).register_winner(store, view).model_name
    return name


@pytest.fixture
def said(uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """What `orchestrator registry ARGUMENTS` prints, and its exit code."""
    monkeypatch.setenv("COLUMNS", "240")

    def command(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run(["registry", *arguments, "--tracking-uri", uri])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return command


def test_the_commands_show_compare_move_and_remember(
    name: str, said: Said, client: MlflowClient
) -> None:
    code, text = said("list")
    (line,) = [line for line in text.splitlines() if f"{name} " in line]
    assert [word.strip() for word in line.split("│")[2:4]] == ["3", "2"]

    code, text = said("show", name)
    assert code == 0
    for words in ("candidate", "champion", "worse than version 2", "it is the first champion"):
        assert words in text

    code, text = said("show", f"{name}@champion")
    assert "adapter_digest" in text
    assert "gate.interval" in text
    assert '"bit_width": 16' in text

    code, text = said("compare", f"models:/{name}/3", f"models:/{name}/1")
    assert (code, "better than version 1" in text, "num_pairs" in text) == (0, True, True)
    assert aliases(client, name) == {"candidate": 3, "champion": 2}

    code, text = said("promote", f"models:/{name}/3")
    assert (code, "refused: worse than version 2" in text) == (1, True)
    assert aliases(client, name)["champion"] == 2
    code, text = said("promote", f"{name}/3", "--force")
    assert (code, "--force needs --reason" in text) == (2, True)
    code, text = said("promote", f"{name}/3", "--force", "--reason", "smaller [red]")
    assert (code, "promoted: forced: smaller [red]" in text) == (0, True)
    assert aliases(client, name)["champion"] == 3
    assert "is the champion already" in said("promote", f"{name}@champion")[1]

    code, text = said("rollback", name, "--reason", "too terse")
    assert "is version 2 again, no longer version 3" in text
    assert aliases(client, name)["champion"] == 2
    code, text = said("show", name)
    for words in ("force", "rollback", "too terse", "smaller [red]"):
        assert words in text

    for arguments, words in (
        (["show", "nobody"], "there is no registered model nobody: choose one of"),
        (["show", f"{name}/99"], "is not in the registry: choose one of"),
        (["rollback", "nobody"], "there is no registered model nobody"),
        (["compare", f"{name}/1", "other/1"], "is not in the registry"),
    ):
        code, text = said(*arguments)
        assert code == 1
        assert words in text
        assert "Traceback" not in text


def test_a_list_of_80_columns_breaks_no_short_word(
    name: str, said: Said, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.set_model_version_tag(name, "2", "base_model", "/a/long/way/SmolLM2.Q4_1.gguf")
    monkeypatch.setenv("COLUMNS", "80")
    text = said("list")[1]
    for word in ("model", "versions", "champion", "base model", "candidate", "since", name):
        assert word in text
    assert "/a/long" not in text
    (line,) = [line for line in text.splitlines() if name in line]
    assert "SmolLM2" in line


def test_looking_for_models_makes_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "mlflow.db"
    assert run(["registry", "list", "--tracking-uri", f"sqlite:///{store}"]) == 0
    assert "no model is registered yet: a sweep registers its winner" in capsys.readouterr().out
    for words in (["show", "m"], ["show", "m/1"], ["promote", "m/1"], ["rollback", "m"]):
        assert run(["registry", *words, "--tracking-uri", f"sqlite:///{store}"]) == 1
        assert "no model is registered yet: a sweep registers" in capsys.readouterr().err
    assert not store.exists()
