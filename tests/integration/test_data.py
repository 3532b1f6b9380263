"""`orchestrator data`: shards without a sweep, and what is in them."""

from pathlib import Path

from tests.integration.conftest import Command, write_config
from tests.integration.test_bad_input import refused


def test_data_are_prepared_once_and_then_shown(
    orchestrator: Command, tmp_path: Path, tiny_base: Path
) -> None:
    config = write_config(tmp_path, tiny_base, data__on_bad_row="skip", name="shown")
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write("{broken\n")
    made = orchestrator("data", "prepare", str(config), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "data: making" in made.stdout
    assert "rows.jsonl:121: " in made.stdout
    block = orchestrator("data", "inspect", str(config), "--held-out", cwd=tmp_path)
    assert block.returncode == 0, block.stderr
    assert "making" not in block.stdout
    assert "── document 1: " in block.stdout
    assert "⟦" in block.stdout
    assert "positions of padding" in block.stdout
    stats = orchestrator("data", "stats", str(config), "--plot", "plot.html", cwd=tmp_path)
    assert stats.returncode == 0, stats.stderr
    assert "positions filled" in stats.stdout
    assert "plotly" in (tmp_path / "plot.html").read_text()


def test_a_block_that_is_not_there_is_refused(
    orchestrator: Command, tmp_path: Path, tiny_base: Path
) -> None:
    config = str(write_config(tmp_path, tiny_base))
    message = refused(orchestrator, tmp_path, "data", "inspect", config, "--block", "99999")
    assert "--block must be below" in message
