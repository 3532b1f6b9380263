"""Who was champion and who is the one before: told from events that are never changed."""

import pytest

from orchestrator.tracking.alias_history import (
    Action,
    AliasEvent,
    carried_out,
    earlier_champions,
    event_tag,
    read_events,
)


def events(*moves: tuple[Action, int | None, int]) -> list[AliasEvent]:
    return [AliasEvent(action, before, after, 1.0, "why") for action, before, after in moves]


P: Action = "promote"
FIRST, SECOND, THIRD = (P, None, 1), (P, 1, 2), (P, 2, 3)


@pytest.mark.parametrize(
    ("moves", "holder", "earlier"),
    [
        ([], None, []),
        ([FIRST], 1, []),
        ([FIRST, SECOND, THIRD], 3, [1, 2]),
        ([FIRST, SECOND, THIRD, ("rollback", 3, 2)], 2, [1]),
        ([FIRST, SECOND, THIRD, ("rollback", 3, 2), ("rollback", 2, 1)], 1, []),
        ([FIRST, SECOND, ("rollback", 2, 1), (P, 1, 3)], 3, [1]),
        ([FIRST, SECOND, THIRD], 2, [1]),  # a crash came before the alias moved
        ([FIRST, SECOND, (P, 1, 3)], 3, [1]),  # the second was written, but did not come about
        ([FIRST, (P, 5, 6)], 6, [1, 5]),  # 5 was made champion in the MLflow UI
        ([FIRST, SECOND], 9, [1, 2]),  # so was 9
        ([FIRST, SECOND, ("force", 2, 1)], 1, [2]),
    ],
)
def test_the_champions_before(
    moves: list[tuple[Action, int | None, int]], holder: int | None, earlier: list[int]
) -> None:
    assert earlier_champions(events(*moves), holder) == earlier


def test_an_event_whose_alias_did_not_move_is_told_from_the_others() -> None:
    first, lost, second = events(FIRST, SECOND, (P, 1, 3))
    assert carried_out([first, lost, second], 3) == [first, second]
    assert carried_out([first, lost], 1) == [first]


def test_events_come_back_from_tags_in_their_order() -> None:
    written = events(FIRST, SECOND) * 6
    tags = dict(event_tag(number, event) for number, event in enumerate(written, 1))
    assert [event for _, event in read_events(tags | {"other": "x"})] == written


def test_a_long_reason_is_cut_to_what_a_tag_holds() -> None:
    _, value = event_tag(1, AliasEvent(P, None, 1, 1.0, "x" * 9000))
    assert len(value) < 5000
