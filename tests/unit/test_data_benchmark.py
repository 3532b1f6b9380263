"""The data benchmark's own arithmetic; what it measures takes minutes."""

from benchmarks.data_throughput import bars
from benchmarks.recording import Row


def _row(who: str, cores: int, rate: float, form: str = "text") -> Row:
    return {"who": who, "format": form, "cores": cores, "mb_per_s": rate}


ROWS = [
    *(
        _row(who, 1, rate, form)
        for form, own in (("text", 3.0), ("prompt_completion", 2.7))
        for who, rate in (
            ("raw encode_batch", 2.5),
            ("raw encode_batch_fast", 3.0),
            ("prepare_shard", own),
            ("datasets.map", 1.5),
        )
    ),
    _row("datasets.map", 2, 2.0),
    _row("datasets.map in processes", 2, 2.5),
    _row("prepare_shard on actors", 1, 3.2),
    _row("prepare_shard on actors", 2, 6.0),
    _row("prepare", 1, 2.9) | {"actor_peak_rss_gb": 0.7},
]


def test_the_worst_format_and_the_fastest_raw_method_count() -> None:
    found = bars(ROWS)
    assert {name: bar.value for name, bar in found.items()} == {
        "per_core_share_of_raw": 0.9,
        "speedup_over_datasets_map": 3.0,
        "speedup_over_datasets_map_on_one_core": 1.8,
        "actor_scaling": 0.938,
        "rss_gb_per_actor": 0.7,
    }
    assert [name for name, bar in found.items() if not bar.holds] == [
        "speedup_over_datasets_map_on_one_core"
    ]
