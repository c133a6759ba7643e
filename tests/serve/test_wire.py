"""What clients read of the wire format, however it was cut and whatever a server sends."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitlm.errors import UserError
from exitlm.serve import wire


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://a.example/v1/", "https://a.example/v1"),
        ("https://a.example/openai", "https://a.example/openai/v1"),
        ("https://a.example/api/v4", "https://a.example/api/v4"),
        (" http://[::1]:1 ", "http://[::1]:1/v1"),
    ],
)
def test_an_address_with_or_without_its_version(url: str, base: str) -> None:
    assert wire.base_of(url) == base


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://[::1", "http://a b", "http://a/?x=1",
            "http://a/#x", "http://user:secret@a", "http://a:99999"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError) as told:
        wire.base_of(url)
    assert "secret" not in str(told.value)


def test_the_key_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXITLM_API_KEY", raising=False)
    assert "Authorization" not in wire.headers(None)
    monkeypatch.setenv("EXITLM_API_KEY", "from-there")
    assert wire.headers(None)["Authorization"] == "Bearer from-there"
    assert wire.headers("given")["Authorization"] == "Bearer given"
    assert "Authorization" not in wire.headers("")
    for key in ("a b", "a\nb", "ä"):
        with pytest.raises(UserError, match="no header can carry it") as told:
            wire.headers(key)
        assert key not in str(told.value)


LINES = st.lists(
    st.one_of(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])).map(lambda text: f"data: {text}"),
        st.sampled_from(["", ": a comment", "event: x", "id: 3", "retry: 1", "data", "data:"]),
    )
)


def reference(text: str) -> list[str]:
    """The events of a stream, by the standard: the data lines up to each empty line."""
    found, data = [], []
    for line in text.split("\n")[:-1]:
        if line == "" and data:
            found.append("\n".join(data))
            data = []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
    return found


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.lists(st.integers(0, 400)))
def test_a_stream_cut_anywhere_is_the_same_stream(lines: list[str], end: str, cuts: list[int]) -> None:
    stream = "".join(line + end for line in lines).encode()
    reader, found, at = wire.EventReader(), [], 0
    for cut in [*sorted(min(cut, len(stream)) for cut in cuts), len(stream)]:
        found += reader.feed(stream[at:cut])
        at = cut
    assert found == reference("".join(line + "\n" for line in lines))


def test_lines_that_end_in_a_return_alone() -> None:
    reader = wire.EventReader()
    assert reader.feed(b"data: a\r") == []
    assert reader.feed(b"\rdata: b\r") == ["a"]  # the last return may be the first half of a line's end
    assert reader.feed(b"\ndata: c\r\n") == []
    assert reader.feed(b"\r\n") == ["b\nc"]


NAMES = st.sampled_from(["error", "message", "detail", "choices", "data", "id", "usage", "prompt_tokens"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
    )
)
def test_nothing_that_is_json_breaks_a_reader(found: object) -> None:
    mapping = wire.mapping_of(json.dumps(found))
    assert (mapping is None) == (not isinstance(found, dict))
    said = wire.message_of(mapping)
    assert said is None or ("\n" not in said and len(said) <= 300)
    assert "status 500" in str(wire.refusal("http://a", 500, json.dumps(found).encode()))
    assert all(isinstance(name, str) for name in wire.names_of(mapping))
    assert all(wire.context_of(mapping, name) is None for name in wire.names_of(mapping))
    if mapping is not None:
        for choice in wire.choices_of(mapping):
            assert wire.whole_of(choice, "usage", "prompt_tokens") is None or choice["usage"]["prompt_tokens"] >= -(
                10**99
            )


def test_the_model_that_is_meant() -> None:
    exits = {"base": {"exits": []}, "base:one": {"exits": [{"layer": 2}]}, "base:two": {"exits": [{"layer": 2}]}}
    assert wire.first_of(["base", "base:one", "base:two"], exits) == "base:one"
    assert wire.first_of(["base", "other"], {"base": {"exits": []}}) == "base"
    assert wire.first_of(["a", "b"], {}) == "a"
    assert wire.first_of([], {}) is None


@pytest.mark.parametrize(
    ("url", "here"), [("http://localhost:1/v1", True), ("http://[::1]/v1", True), ("http://a", False)]
)
def test_what_is_this_machine(url: str, here: bool) -> None:
    assert wire.is_here(url) == here


def test_errors_of_several_kinds_of_servers() -> None:
    for body, words in (
        ({"error": {"message": "no such\n model", "type": "x"}}, "answered with status 404: no such model"),
        ({"error": "too long"}, "answered with status 404: too long"),
        ({"detail": [{"msg": "field required"}]}, "field required"),
        ({"other": 1}, "answered with status 404 without saying why; check the address and the model"),
    ):
        assert words in str(wire.refusal("http://a", 404, json.dumps(body).encode()))
    assert "EXITLM_API_KEY" in str(wire.refusal("http://a", 401, b"<html>"))
    assert "(Bad Gateway)" in str(wire.refusal("http://a", 502, b"\xff", "Bad Gateway"))
