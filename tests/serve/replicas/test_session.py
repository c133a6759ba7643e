"""Which replica a request goes to."""

import json
import random
from collections import Counter
from typing import Any

from exitlm.serve.replicas.session import BEGINNING, FREE, ranked, session_of

SYSTEM = {"role": "system", "content": "Answer briefly."}
ASKED = {"role": "user", "content": "Why do cats purr?"}


def session(fields: Any, *headers: tuple[bytes, bytes]) -> str | None:
    return session_of(headers, fields if isinstance(fields, bytes) else json.dumps(fields).encode())


def test_the_turns_of_a_conversation_are_one_session() -> None:
    first = session({"messages": [SYSTEM, ASKED]})
    later = session({"messages": [SYSTEM, ASKED, {"role": "assistant", "content": "Why not?"}, ASKED], "seed": 3})
    assert first is not None
    assert first == later
    assert first != session({"messages": [SYSTEM, {"role": "user", "content": "And dogs?"}]})
    assert first != session({"messages": [ASKED]})
    items = {"instructions": "Be brief.", "input": [ASKED]}
    assert session(items) == session({**items, "input": [ASKED, {"role": "assistant", "content": "x"}]})
    assert session(items) != session({"input": [ASKED]})


def test_a_text_is_known_by_its_beginning() -> None:
    text = "x" * BEGINNING
    assert session({"prompt": text + "a"}) == session({"prompt": text + "b"}) == session({"prompt": [text, "c"]})
    assert session({"prompt": text}) != session({"prompt": text[1:]})
    assert session({"prompts": [text]}) == session({"prompt": text})
    ids = list(range(BEGINNING))
    assert session({"prompt": [*ids, 1]}) == session({"prompt": [[*ids, 2]]}) != session({"prompt": ids[1:]})


def test_what_a_client_says_counts_more() -> None:
    body = {"prompt": "a", "prompt_cache_key": "k", "user": "u"}
    by_key = session(body)
    assert by_key == session({"prompt": "b", "prompt_cache_key": "k"})
    assert session({"prompt": "a", "user": "u"}) == session({"prompt": "b", "user": "u"}) != by_key
    header = (b"X-Session-Id", b"s")
    assert session(body, header) == session({"prompt": "b"}, header) != by_key
    assert session(body, (b"x-session-id", b" ")) == by_key


def test_what_has_no_session() -> None:
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, {}, {"prompt": ""}, {"prompt": []}, {"prompt": 3}):
        assert session(body) is None
    assert session({"messages": [], "user": 4}) is not None  # wrong, but any replica says so
    assert session({"prompt": "\ud800"}) is not None


def test_a_session_has_one_home_and_sessions_are_spread() -> None:
    draw = random.Random(0)
    idle = dict.fromkeys("abcd", 0)
    homes = {f"s{i}": ranked(f"s{i}", idle, draw)[0] for i in range(400)}
    assert all(len(home) == 1 for home in homes.values())
    assert all(ranked(name, idle, draw)[0] == home for name, home in homes.items())
    assert all(70 <= found <= 130 for found in Counter(home[0] for home in homes.values()).values())


def test_a_replica_that_goes_moves_only_its_own_sessions() -> None:
    draw = random.Random(0)
    for name in map(str, range(200)):
        (before,) = ranked(name, dict.fromkeys("abcd", 0), draw)[0]
        (after,) = ranked(name, dict.fromkeys("abc", 0), draw)[0]
        assert after == before or before == "d"


def test_a_home_with_too_much_to_do_gives_to_the_less_loaded_of_two() -> None:
    draw = random.Random(0)
    (home,) = ranked("s", dict.fromkeys("abcd", 0), draw)[0]
    others = sorted(set("abcd") - {home})
    assert ranked("s", {**dict.fromkeys("abcd", 0), home: FREE - 1}, draw)[0] == [home]
    for _ in range(20):
        first, *rest = ranked("s", {**dict.fromkeys("abcd", 0), home: FREE}, draw)
        assert len(first) == 2
        assert set(first) <= set(others)
        assert rest == [sorted("abcd")]
    assert ranked("s", {**dict.fromkeys(others, 40), home: 41}, draw)[0] == [home]  # all have much to do
    assert ranked("s", {**dict.fromkeys(others, 40), home: 80}, draw)[0] != [home]


def test_every_replica_is_tried_in_the_end() -> None:
    draw = random.Random(0)
    for case in range(500):
        loads = {name: draw.randrange(20) for name in "abcdefgh"[: draw.randrange(9)]}
        for key in (None, str(case)):
            groups = ranked(key, loads, draw)
            assert set().union(*groups) == set(loads)
            assert all(len(set(group)) == len(group) for group in groups)
    assert ranked("s", {}, draw) == [[], []]
    assert ranked("s", {"a": 99}, draw) == [["a"]] * 3
    firsts = Counter(frozenset(ranked(None, dict.fromkeys("abc", 0), draw)[0]) for _ in range(300))
    assert len(firsts) == 3
    assert min(firsts.values()) > 50
