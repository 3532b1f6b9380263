"""What the command line says to a command that is not written as it should be."""

import pytest

from jobs.cli import run


@pytest.mark.parametrize(
    ("arguments", "verb"), [([], "sweep"), (["data"], "prepare"), (["registry"], "promote")]
)
def test_a_command_without_a_verb_shows_its_verbs_and_no_error(
    arguments: list[str], verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Usage: ")
    assert f"\n  {verb}" in shown
    assert "see `" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["swep"], "Did you mean 'sweep'?: see `orchestrator --help`"),
        (["sweep"], "Missing argument 'CONFIG': see `orchestrator sweep --help`"),
        (["data", "stats"], "Missing argument 'CONFIG': see `orchestrator data stats --help`"),
        (["sweep", "f", "--dryrun"], "see `orchestrator sweep --help`"),
    ],
)
def test_a_mistake_points_to_the_help_of_its_own_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert words in shown


def test_the_help_names_running_a_sweep_first_and_every_verb_in_one_whole_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--help"]) == 0
    verbs = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert verbs[0].split()[0] == "sweep"
    assert [line for line in verbs if line.endswith("...")] == []
