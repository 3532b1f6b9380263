"""When a constant program is made smaller, and larger again."""

from orchestrator.planning.lanes import BUILD_S, WORTH, lanes_for


def test_a_full_pack_keeps_its_lanes() -> None:
    assert lanes_for(16, 16, 16, rounds_left=10_000, round_s=1.0)[0] == 16


def test_a_long_trial_that_is_left_alone_gets_a_program_of_its_own() -> None:
    lanes, reason = lanes_for(1, 16, 16, rounds_left=1000, round_s=0.1)
    assert lanes == 1
    assert "1 of 16 lanes" in reason


def test_what_would_save_less_than_it_costs_is_left_alone() -> None:
    rounds = int(WORTH * BUILD_S / 0.1 / (15 / 16))
    assert lanes_for(1, 16, 16, rounds - 1, round_s=0.1)[0] == 16
    assert lanes_for(1, 16, 16, rounds + 2, round_s=0.1)[0] == 1


def test_lanes_come_in_powers_of_two_up_to_the_packs_slots() -> None:
    found = [lanes_for(n, 1, 12, rounds_left=1, round_s=1.0)[0] for n in (2, 3, 5, 9, 12)]
    assert found == [2, 4, 8, 12, 12]


def test_a_program_too_small_for_its_members_grows_whatever_it_costs() -> None:
    assert lanes_for(3, 2, 8, rounds_left=1, round_s=0.001)[0] == 4
