from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tap_flower.recent import Recent


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    recent = Recent[str, int](10)
    recent.put("a", 1, 4)
    recent.put("b", 2, 4)
    assert recent.get("a") == 1
    recent.put("c", 3, 4)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]
    recent.put("a", 5, 6)  # in place of the old one
    assert (recent.get("a"), recent.get("c"), recent.size) == (5, 3, 10)


def test_what_is_too_large_is_not_kept() -> None:
    recent = Recent[str, int](10)
    recent.put("a", 1, 11)
    assert (recent.get("a"), len(recent), recent.size) == (None, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12))))
def test_the_limit_holds(puts: list[tuple[int, int]]) -> None:
    recent = Recent[int, int](20)
    last: dict[int, int] = {}
    for key, size in puts:
        recent.put(key, size, size)
        last[key] = size
        kept = {k: v for k in last if (v := recent.get(k)) is not None}
        assert kept == {k: last[k] for k in kept}
        assert recent.size == sum(kept.values()) <= 20
