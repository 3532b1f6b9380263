"""The index of waiting trials gives what sorting them all would; a decision leaves it as it was."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planning.waiting import Lines, Waiting, can_train, indexed, pack_key, work
from orchestrator.records import Arithmetic, TrialSpec
from tests.sweeps import premises, sweep_config


def trial(number: int, steps: int = 6, batch_size: int = 8, bits: int = 4) -> TrialSpec:
    config = sweep_config(
        trial__steps=steps,
        trial__batch_size=batch_size,
        trial__micro_batch_size=1,
        trial__quant__bit_width=bits,
    )
    return TrialSpec(number, {}, config.trial)


POOL = [trial(n, 6 + n % 3, (2, 3, 4)[n % 3], (4, 16)[n % 2]) for n in range(12)]


@settings(max_examples=60)
@given(
    waiting=st.sets(st.sampled_from(range(12))),
    half=st.dictionaries(
        st.sampled_from(range(12)),
        st.sampled_from([Arithmetic(1, 1, False), Arithmetic(2, 1, False)]),
        max_size=4,
    ),
    most=st.integers(1, 5),
    world_size=st.sampled_from([1, 2]),
)
def test_slots_are_given_to_the_half_trained_and_then_to_the_longest(
    waiting: set[int], half: dict[int, Arithmetic], most: int, world_size: int
) -> None:
    index = Waiting(POOL[number] for number in waiting)
    lines = Lines(index, half)
    arithmetic = Arithmetic(world_size, 1, False)
    for key in list(index.keys):
        mine = [t for t in index if pack_key(t.config) == key]
        order = sorted(mine, key=lambda t: (t.number not in half, -_rank(t, half), t.number))
        able = [t for t in order if can_train(arithmetic, t, half)]
        assert lines.count(key, arithmetic) == len(able)
        assert lines.take(key, arithmetic, most) == able[:most]
        assert lines.count(key, arithmetic) == len(able[most:])
        assert lines.take(key, arithmetic, most) == able[most : 2 * most]
        assert lines.left(key) == len(mine) - len(able[: 2 * most])
    assert {t.number for t in index} == waiting


def _rank(spec: TrialSpec, half: dict[int, Arithmetic]) -> int:
    """The half-trained are in the order of their numbers."""
    return 0 if spec.number in half else work(spec.config)


def test_the_index_follows_what_comes_and_goes() -> None:
    trials = {t.number: t for t in POOL}
    drawn = random.Random(0)
    index = Waiting()
    for _ in range(50):
        numbers = set(drawn.sample(range(12), drawn.randint(0, 12)))
        index.keep_to(numbers, trials)
        fresh = Waiting(trials[number] for number in sorted(numbers))
        assert {t.number for t in index} == numbers
        assert {k: list(index.places(k)) for k in index.keys} == {
            k: list(fresh.places(k)) for k in fresh.keys
        }
        assert all(index.batches(key) == fresh.batches(key) for key in fresh.keys)


def test_a_trial_that_cannot_be_trained_does_not_wait() -> None:
    odd, even = trial(0, batch_size=3), trial(1, batch_size=4)
    given = premises(sweep_config(resources__workers_per_pack=2))
    assert [t.number for t in indexed((odd, even), given)] == [1]


def test_where_a_pruner_judges_the_first_come_first_however_long_they_are() -> None:
    trials = [trial(0, steps=6), trial(1, steps=9), trial(2, steps=3), trial(3, steps=8)]
    for in_turn, expected in ((False, [1, 3, 0]), (True, [0, 1, 2])):
        index = Waiting(reversed(trials), in_turn)
        (key,) = index.keys
        taken = Lines(index, {}).take(key, Arithmetic(1, 1, False), 3)
        assert [one.number for one in taken] == expected
        short = Lines(index, {}).take(key, Arithmetic(1, 1, False), 3, longest=6 * 8)
        assert [one.number for one in short] == [0, 2]
        assert Lines(index, {}).shortest(key) == 3 * 8
        index.remove(1)
        assert [number for _, number in index.places(key)] == ([0, 2, 3] if in_turn else [3, 0, 2])


def test_workers_share_what_divides_the_batches_of_all_that_wait() -> None:
    index = Waiting([trial(0, batch_size=12), trial(1, batch_size=8)])
    (key,) = index.keys
    lines = Lines(index, {})
    assert lines.parts(key) == 4
    assert lines.take(key, Arithmetic(3, 1, False), 1) == [index.trial(0)]
    assert lines.parts(key) == 8


def test_the_shortest_that_is_left_is_none_that_was_given_out() -> None:
    key = pack_key(POOL[0].config)
    mine = [t for t in POOL if pack_key(t.config) == key]
    for index in (Waiting(mine), Waiting(mine, in_turn=True)):
        lines = Lines(index, {mine[0].number: Arithmetic(1, 1, False)})
        left = {trial.number: work(trial.config) for trial in mine}
        assert lines.shortest(key) == 0, "one is half-trained"
        while True:
            for trial in lines.take(key, Arithmetic(1, 1, False), 1):
                del left[trial.number]
            if not left:
                break
            assert lines.shortest(key) == min(left.values())
