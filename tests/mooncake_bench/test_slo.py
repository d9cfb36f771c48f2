"""Are SLOs read as people write them, and refused in one line when they make no sense?"""

import pytest

from mooncake_bench.slo import NOTHING, Slo, SloError, parse_slo, parse_slos, percent, seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft<30s,tbt<100ms", Slo(30.0, 0.1)),
        (" TTFT <= 2 s , TBT<40ms", Slo(2.0, 0.04)),
        ("tbt<200ms", Slo(30.0, 0.2)),
        ("ttft<1.5", Slo(1.5, 0.1)),
        ("ttft<450000us", Slo(0.45, 0.1)),
    ],
)
def test_bounds_are_read_with_their_units(text: str, expected: Slo) -> None:
    """Units are s, ms, us or none (seconds); a bound left out keeps the paper's default."""
    assert parse_slo(text) == expected


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "''"),
        ("ttft=30s", "'ttft=30s'"),
        ("e2e<3s", "'e2e'"),
        ("ttft<3h", "'h'"),
        ("ttft<1e,tbt<1s", "'1e'"),
        ("tbt<0ms", "tbt"),
        ("tbt<1e999s", "tbt"),
        ("tbt<1ms,tbt<2ms", "twice"),
    ],
)
def test_nonsense_is_refused_in_one_line_that_names_the_place(text: str, place: str) -> None:
    """The message is for a terminal: one line, with the piece at fault."""
    with pytest.raises(SloError) as refusal:
        parse_slo(text)
    assert place in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_slo_prints_as_it_is_written() -> None:
    """What is printed can be given back on a command line."""
    slo = Slo(30.0, 0.1)
    assert str(slo) == "ttft<30s,tbt<100ms"
    assert parse_slo(str(slo)) == slo


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.208, "21 %"), (0.987, "98.7 %"), (0.9996, "99.96 %")],
)
def test_a_share_gets_more_digits_where_little_is_left(share: float, expected: str) -> None:
    """99.96 % must not read as 100 %."""
    assert percent(share) == expected


def test_times_read_in_the_unit_people_use() -> None:
    """Milliseconds below a second, three digits; a dash, not a zero, where nothing was measured."""
    assert [seconds(t) for t in (0.0432, 0.9999, 1.066, 30.0, 1234.5, 0.0)] == [
        "43.2 ms",
        "1 s",
        "1.07 s",
        "30 s",
        "1,234 s",
        "0 s",
    ]
    assert seconds(None) == percent(None) == NOTHING


def test_classes_take_what_they_leave_out_from_the_general_bounds():
    """ "ttft<1s;chat:tbt<50ms": chat has both; without a general part there are the defaults."""
    slo, by_class = parse_slos("ttft<1s ; chat:tbt<50ms;batch : ttft<60s,tbt<1s")
    assert slo == Slo(1.0, 0.1)
    assert by_class == {"chat": Slo(1.0, 0.05), "batch": Slo(60.0, 1.0)}
    assert parse_slos("chat:ttft<2s") == (Slo(), {"chat": Slo(2.0, 0.1)})
    assert parse_slos("ttft<2s") == (Slo(2.0, 0.1), {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (";", "is not a bound"),
        (":ttft<1s", "no class before"),
        ("a:ttft<1s;a:tbt<1s", "gives a twice"),
        ("ttft<1s;tbt<1s", "gives the general bounds twice"),
        ("a:e2e<1s", "'e2e' is not ttft or tbt"),
    ],
)
def test_classes_that_cannot_be_read(text: str, words: str):
    """One line."""
    with pytest.raises(SloError, match=words):
        parse_slos(text)
