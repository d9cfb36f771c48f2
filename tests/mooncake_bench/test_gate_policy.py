"""Is a policy read as it is meant, and is what cannot be read told in one line?"""

from __future__ import annotations

from pathlib import Path

import pytest

from mooncake_bench.gate.errors import GateError
from mooncake_bench.gate.policy import (
    PolicyFile,
    Threshold,
    make_policy,
    read_policy,
)


def a_check(rule: str):
    return make_policy(PolicyFile(threshold=[Threshold(rule)]), "gate.toml").checks[0]


@pytest.mark.parametrize(
    ("rule", "baseline", "good", "bad"),
    [
        ("ttft_s.p95 < 2.0", None, 1.99, 2.0),
        ("ttft_s.p95 <= 2.0", None, 2.0, 2.01),
        ("ttft_s.p95 < 200 ms", None, 0.199, 0.201),
        ("goodput_rps >= 0.95 * baseline", 10.0, 9.5, 9.4),
        ("goodput_rps >= baseline * 0.95", 10.0, 9.5, 9.4),
        ("goodput_rps >= 95 % * baseline", 10.0, 9.5, 9.4),
        ("attainment >= baseline - 0.01", 0.9, 0.891, 0.889),
        ("attainment >= baseline - 1%", 0.9, 0.891, 0.889),
        ("tbt_s.p90 <= baseline + 5 ms", 0.1, 0.1049, 0.1051),
        ("rejected <= baseline", 3.0, 3.0, 4.0),
    ],
)
def test_a_term_holds_up_to_its_bound(
    rule: str, baseline: float | None, good: float, bad: float
) -> None:
    """k6's manner: the rule says what is demanded; units and per cent are understood."""
    check = a_check(rule)
    assert not check.is_breached(good, baseline)
    assert check.is_breached(bad, baseline)


def test_an_absolute_floor_spares_small_times() -> None:
    """5 % of 1 ms is no news where 2 ms are the floor; of 1 s it is."""
    check = read_policy(None).checks[1]
    assert (check.metric, check.floor_absolute) == ("ttft_s.p95", 0.002)
    assert not check.is_breached(0.0029, 0.001)
    assert check.is_breached(1.051, 1.0)


def test_what_is_undefined_is_worse_than_any_bound() -> None:
    """A candidate that finished nothing has no TTFT: that is no pass."""
    assert a_check("ttft_s.p95 < 2.0").is_breached(None, None)
    assert a_check("ttft_s.p95 <= 1.05 * baseline").is_breached(None, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nrepeats = 3\n", ("unknown key 'run'", "runs")),
        ("[runs]\nrepeat = 3\n", ("[runs]", "'repeat'", "repeats")),
        ('[[metric]]\nname = "ttft_s.p50"\nflor = 0.1\n', ("[metric]", "'flor'", "floor")),
        ("[runs]\nrepeats = 0\n", ("runs.repeats", "mend")),
        ('[[threshold]]\nrule = "ttft_s.p95"\n', ("ttft_s.p95", "write it like")),
        ('[[threshold]]\nrule = "ttft_s.p95 < fast"\n', ("fast", "write it like")),
        ('[[metric]]\nname = "offered"\n', ("offered", "better")),
        ("runs = [\n", ("not valid TOML",)),
        ('[[threshold]]\nrule = "a < 1"\n[[threshold]]\nrule = "a  < 1"\n', ("twice",)),
    ],
)
def test_a_policy_that_cannot_be_read(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    """One line with the file, the place and the remedy."""
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(GateError) as raised:
        read_policy(path)
    message = str(raised.value)
    assert "\n" not in message
    for word in ("gate.toml", *words):
        assert word in message
