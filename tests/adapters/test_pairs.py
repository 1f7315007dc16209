"""Pairs: every format, every bad row, and splits that depend on content alone."""

from __future__ import annotations

import copy
import csv
import datetime
import json
import resource
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import attacked, changed_bytes, changed_json, memory_limit
from hypothesis import given
from hypothesis import strategies as st
from requirements import need

from austeer.adapters import ContrastivePair, PairsError, read_pairs
from austeer.adapters.pairs import check_pairs, iter_pairs, pairs_digest, render_pairs

GOOD = {"prompt": "Tom felt", "positive": " happy", "negative": " sad"}
TURNS = [{"role": "user", "content": "Tom felt"}]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(source: Path | str) -> str:
    with pytest.raises(PairsError) as caught:
        read_pairs(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def make(number: int, prompt: str | None = None) -> ContrastivePair:
    return ContrastivePair(
        f"p{number}" if prompt is None else prompt, f"+{number}", f"-{number}"
    )


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        [GOOD, "", {"prompt": "", "positive": "é\u2028x", "negative": "b", "note": [1]}],
    )
    assert read_pairs(path) == [
        ContrastivePair("Tom felt", " happy", " sad", None, f"{path}:1"),
        ContrastivePair("", "é\u2028x", "b", None, f"{path}:3"),
    ]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert read_pairs(path)[0].prompt == "Tom felt"


def test_csv_with_quoted_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "negative", "prompt", "positive"])
        writer.writerow(["1", " sad", "Tom,\nthen\r\nMia", ' "happy"'])
        writer.writerow(["2", "b", "", "a"])
    assert read_pairs(path) == [
        ContrastivePair("Tom,\nthen\r\nMia", ' "happy"', " sad", None, f"{path}:2"),
        ContrastivePair("", "a", "b", None, f"{path}:5"),
    ]


def test_csv_with_messages(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "messages", "positive", "negative"])
        writer.writerow(["", json.dumps(TURNS), "a", "b"])
        writer.writerow(["p", "", "a", "b"])
    chat, plain = read_pairs(path)
    assert chat.messages == tuple(TURNS) and plain.messages is None and plain.prompt == "p"


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not json": ("{nope", "not valid JSON"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "a list": ([1], "expected a JSON object, found list"),
    "a number": (3, "expected a JSON object, found 3"),
    "no prompt": ({"positive": "a", "negative": "b"}, "prompt (or messages) is missing"),
    "no positive": ({"prompt": "p", "negative": "b"}, "key positive is missing"),
    "no negative": ({"prompt": "p", "positive": "b"}, "key negative is missing"),
    "null prompt": ({**GOOD, "prompt": None}, "prompt: expected text, found null"),
    "number": ({**GOOD, "positive": 3.5}, "positive: expected text, found 3.5"),
    "boolean": ({**GOOD, "positive": True}, "positive: expected text, found true"),
    "list": ({**GOOD, "negative": ["x"]}, "negative: expected text, found list"),
    "empty positive": ({**GOOD, "positive": ""}, "positive is empty"),
    "blank negative": ({**GOOD, "negative": " \n"}, "negative is empty"),
    "same": ({**GOOD, "negative": " happy"}, "same text"),
    "half a surrogate": (
        '{"prompt": "\\ud800", "positive": "a", "negative": "b"}',
        "prompt: half of a surrogate",
    ),
    "both": ({**GOOD, "messages": TURNS}, "both prompt and messages"),
    "messages text": ({"messages": "hi", "positive": "a", "negative": "b"}, "found text"),
    "messages empty": ({"messages": [], "positive": "a", "negative": "b"}, "found empty list"),
    "turn text": (
        {"messages": ["hi"], "positive": "a", "negative": "b"},
        "turn 1: expected an object",
    ),
    "turn without role": (
        {"messages": [*TURNS, {"content": "x"}], "positive": "a", "negative": "b"},
        "turn 2: key role is missing",
    ),
    "nested further than it can be written": (
        '{"messages": [{"role": "u", "content": "c", "x": ' + "[" * 400 + "]" * 400 + "}]}",
        "nested more than",
    ),
    "a number of 10^5 digits": ('{"prompt": ' + "9" * 100_000 + "}", "not valid JSON"),
    "key that would end the line": (
        {"prompt\n\x1b[2J": "a", "positive": "a", "negative": "b"},
        "prompt (or messages) is missing",
    ),
    "surrogate in another key": (
        '{"messages": [{"role": "u", "content": "c", "name": "\\ud800"}],'
        '"positive": "a", "negative": "b"}',
        "turn 1: expected JSON values and whole characters",
    ),
    "no number": (
        '{"messages": [{"role": "u", "content": "c", "weight": NaN}],'
        '"positive": "a", "negative": "b"}',
        "turn 1: expected JSON values",
    ),
    "turn content list": (
        {"messages": [{"role": "user", "content": [1]}], "positive": "a", "negative": "b"},
        "turn 1: content: expected text",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_names_file_line_and_fault(tmp_path: Path, case: str) -> None:
    row, fault = BAD_ROWS[case]
    path = write(tmp_path / "pairs.jsonl", [GOOD, row])
    message = refusal(path)
    assert message.startswith(f"{path}:2: ") and fault in message
    assert message.isprintable() and len(message) < 2100


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_other_encodings(tmp_path: Path, encoding: str, suffix: str) -> None:
    text = "prompt,positive,negative\np,a,b\n" if suffix == ".csv" else json.dumps(GOOD)
    path = tmp_path / f"pairs{suffix}"
    path.write_bytes(text.encode(encoding))
    assert str(path) in refusal(path)


def test_what_is_odd_but_text_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "a\0b", "positive": "\ufeffa", "negative": "\u202e\x1b"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "😀"}) + "\n")
    first, second = read_pairs(path)
    assert (first.prompt, first.positive, first.negative) == tuple(row.values())
    assert second.prompt == "😀"
    path = tmp_path / "pairs.csv"
    path.write_bytes("\ufeffprompt,positive,negative\na\0b,\ufeffa,b\n".encode())
    assert read_pairs(path) == [ContrastivePair("a\0b", "\ufeffa", "b", None, f"{path}:2")]


HUGE = 1 << 34


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_a_line_without_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"prompt": "' if name.endswith("l") else "prompt,positive,negative\n")
    with path.open("r+b") as stream:
        stream.truncate(HUGE)  # sparse
    with memory_limit(1 << 29):
        assert f"more than {1 << 24} bytes" in refusal(path)


@pytest.mark.timeout(60)
def test_a_quoted_row_without_end(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,positive,negative\n" + '"\n",' * (1 << 24))
    with memory_limit(1 << 29):
        message = refusal(path)
    assert message.startswith(f"{path}:2: a row of more than")


def test_rows_of_a_csv_are_measured_each_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = "".join(f"{number:0100000},a,b\n" for number in range(200))
    path.write_text("prompt,positive,negative\n" + rows)
    assert path.stat().st_size > 1 << 24 and len(read_pairs(path)) == 200


def test_csv_cell_beyond_the_readers_limit(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"prompt,positive,negative\n{'x' * 200_000},a,b\n")
    assert "not valid CSV" in refusal(path)


ROWS = [
    GOOD,
    {"prompt": "", "positive": "é\u2028x", "negative": "b", "note": [1]},
    {"messages": [*TURNS, {"role": "a", "content": "b"}], "positive": "a", "negative": "b"},
]
CSV = (
    'prompt,messages,positive,negative\r\n"Tom,\nfelt",,a,"b ""c"""\r\n'
    ',"[{""role"": ""user"", ""content"": ""hi""}]",a,b\n'
)


def attack(path: Path) -> None:
    """Either a refusal, or pairs that everything after reading can take."""
    try:
        pairs = read_pairs(path)
    except PairsError as error:
        assert str(error).isprintable() and path.name in str(error)
        return
    for pair in pairs:
        pair.content.encode()
        (pair.prompt + pair.positive + pair.negative).encode()
        assert pair.positive.strip() and pair.negative.strip()
    pairs_digest(pairs)


@attacked
@given(rows=changed_json(ROWS))
def test_changed_rows(tmp_path: Path, rows: Any) -> None:
    attack(write(tmp_path / "pairs.jsonl", rows if isinstance(rows, list) else [rows]))


@attacked
@given(
    raw=changed_bytes("\n".join(map(json.dumps, ROWS)).encode()) | st.binary(max_size=80),
)
def test_changed_jsonl(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(raw)
    attack(path)


@attacked
@given(raw=changed_bytes(CSV.encode()) | st.binary(max_size=80))
def test_changed_csv(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(raw)
    attack(path)


def test_the_rows_under_attack_are_good(tmp_path: Path) -> None:
    assert len(read_pairs(write(tmp_path / "pairs.jsonl", ROWS))) == 3
    path = tmp_path / "pairs.csv"
    path.write_bytes(CSV.encode())
    assert [pair.prompt for pair in read_pairs(path)] == ["Tom,\nfelt", ""]


def test_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [GOOD])
    path.write_bytes(path.read_bytes() + '{"prompt": "é"}'.encode("latin-1"))
    message = refusal(path)
    assert message.startswith(f"{path}:2: not UTF-8") and "0xe9" in message


def test_repeated_pair_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [GOOD, {**GOOD, "prompt": "x"}, {**GOOD, "id": 1}])
    message = refusal(path)
    assert f"{path}:3: " in message and f"{path}:1" in message.split(": ", 1)[1]


def test_repeated_messages(tmp_path: Path) -> None:
    row = {"messages": TURNS, "positive": "a", "negative": "b"}
    assert "repeats" in refusal(write(tmp_path / "pairs.jsonl", [row, row]))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert "has no pairs" in refusal(path)


def test_csv_with_a_header_only(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,positive,negative\n")
    assert "has no pairs" in refusal(path)


BAD_CSV = {
    "no header": ("Tom felt, happy, sad\n", ":1: expected a header"),
    "no prompt": ("positive,negative\na,b\n", ":1: expected a header"),
    "too few cells": ("prompt,positive,negative\n\np,a\n", ":3: expected 3 cells"),
    "too many cells": ("prompt,positive,negative\np,a,b,c\n", ":2: expected 3 cells"),
    "open quote": ('prompt,positive,negative\np,a,"b\n', "not valid CSV"),
    "quote inside": ('prompt,positive,negative\np,"a"x,b\n', ":2: not valid CSV"),
    "empty completion": ("prompt,positive,negative\np,,b\n", ":2: positive is empty"),
    "messages not json": ("messages,positive,negative\nhi,a,b\n", ":2: messages: not valid"),
    "both": ('prompt,messages,positive,negative\np,"[1]",a,b\n', ":2: has both"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv(tmp_path: Path, case: str) -> None:
    text, fault = BAD_CSV[case]
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    assert fault in refusal(path)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/a/b/c", "a/b/c.csv", ""])
def test_nothing_there(name: str) -> None:
    assert "nothing there" in refusal(name)


def test_directory_and_unknown_ending(tmp_path: Path) -> None:
    assert "found a directory" in refusal(tmp_path)
    (tmp_path / "pairs.xlsx").write_bytes(b"x")
    assert ".jsonl" in refusal(tmp_path / "pairs.xlsx")


def fake_datasets(load: Callable[..., Any]) -> types.ModuleType:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("source", ["pairs.parquet", "owner/set", "set"])
def test_parquet_and_hub_without_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    Path("pairs.parquet").touch()
    assert "pip install 'austeer[data]'" in refusal(source)


def test_parquet_and_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, **options: Any) -> list[dict[str, Any]]:
        calls.append((name, options))
        return [
            {**GOOD, "messages": None},
            {"prompt": None, "messages": TURNS, "positive": "a", "negative": "b"},
        ]

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load))
    path = tmp_path / "pairs.parquet"
    path.touch()
    plain, chat = read_pairs(path)
    assert (plain.prompt, plain.messages, plain.where) == ("Tom felt", None, f"{path}:1")
    assert chat.messages == tuple(TURNS)
    assert read_pairs("owner/set", split="test")[1].where == "owner/set[test]:2"
    assert calls == [
        (
            "parquet",
            {"streaming": True, "data_files": str(path), "split": "train", "batch_size": 1024},
        ),
        ("owner/set", {"streaming": True, "split": "test"}),
    ]


class Group:
    """What pyarrow tells of a Parquet file with one row group of this size."""

    num_row_groups = 1

    def __init__(self, size: int) -> None:
        self.total_byte_size = size

    def row_group(self, number: int) -> Group:
        assert number == 0
        return self


@pytest.mark.parametrize(
    ("size", "rows"), [(1, 1024), (1 << 20, 256), (1 << 27, 2), (1 << 28, 1)]
)
def test_parquet_is_read_in_small_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, rows: int
) -> None:
    found = []
    pyarrow = types.ModuleType("pyarrow.parquet")
    pyarrow.read_metadata = lambda _: Group(size)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow)

    def load(name: str, **options: Any) -> Any:
        found.append(options["batch_size"])
        return [GOOD]

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load))
    path = tmp_path / "pairs.parquet"
    path.touch()
    assert len(read_pairs(path)) == 1 and found == [rows]
    pyarrow.read_metadata = lambda _: Group((1 << 28) + 1)  # type: ignore[attr-defined]
    assert "smaller row groups" in refusal(path)


def test_parquet_that_unpacks_to_more_than_memory(tmp_path: Path) -> None:
    need("datasets", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "pairs.parquet"
    rest = {"positive": ["a"] * 500, "negative": ["b"] * 500}
    parquet.write_table(pyarrow.table({"prompt": ["x" * (1 << 20)] * 500, **rest}), path)
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in iter_pairs(path)) == 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    table = pyarrow.table({"prompt": ["x" * (1 << 29)], "positive": ["a"], "negative": ["b"]})
    parquet.write_table(table, path)
    assert "smaller row groups" in refusal(path)


def test_row_of_a_dataset_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [GOOD, {**GOOD, "prompt": "x" * (1 << 24)}]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(lambda *_, **__: rows))
    assert refusal("owner/set").startswith("owner/set[train]:2: a row of more than")


def test_what_datasets_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> Any:
        raise FileNotFoundError("no such set\non the Hub")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load))
    message = refusal("owner/set")
    assert "owner/set[train]" in message and "no such set on the Hub" in message


def test_turns_of_a_dataset_that_no_json_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = {**TURNS[0], "when": datetime.datetime(2026, 1, 1)}
    rows = [{"messages": [turn], "positive": "a", "negative": "b"}]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(lambda *_, **__: rows))
    assert "turn 1: expected JSON values" in refusal("owner/set")


def test_bad_row_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [GOOD, {**GOOD, "positive": None}]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(lambda *_, **__: rows))
    assert refusal("owner/set").startswith("owner/set[train]:2: positive: expected text")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_messages_are_rendered_once(chat_tokenizer: Any) -> None:
    pairs = [make(1), ContrastivePair("", "a", "b", tuple(TURNS), "f:2")]
    rendered = render_pairs(pairs, chat_tokenizer)
    assert rendered[0] == pairs[0]
    assert rendered[1].prompt == "<s>user: Tom felt\nassistant:"
    assert render_pairs(rendered, chat_tokenizer) == rendered
    assert pairs_digest(rendered) == pairs_digest(pairs)


def test_what_the_assistant_has_begun_goes_on(chat_tokenizer: Any) -> None:
    begun = (*TURNS, {"role": "assistant", "content": "Tom was"})
    (rendered,) = render_pairs([ContrastivePair("", "a", "b", begun)], chat_tokenizer)
    assert rendered.prompt == "<s>user: Tom felt\nassistant: Tom was"


def test_tokenizer_without_a_template(tiny_tokenizer: Any) -> None:
    with pytest.raises(PairsError, match=r"f:2: .*no chat template"):
        render_pairs([ContrastivePair("", "a", "b", tuple(TURNS), "f:2")], tiny_tokenizer)


def test_template_that_refuses_a_role(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('no\nsuch role') }}"
    with pytest.raises(PairsError, match=r"f:2: .*no such role"):
        render_pairs([ContrastivePair("", "a", "b", tuple(TURNS), "f:2")], chat_tokenizer)


def test_digest_depends_on_content_alone() -> None:
    pairs = [make(1), make(2)]
    moved = ContrastivePair("p1", "+1", "-1", None, "elsewhere:9")
    assert pairs_digest(pairs) == pairs_digest([make(2), moved])
    assert pairs_digest(pairs) != pairs_digest([make(1), make(3)])
    assert pairs_digest(pairs) != pairs_digest(pairs[:1])
    # The three texts must not run into each other.
    assert pairs_digest([ContrastivePair("a", "b", "c")]) != pairs_digest(
        [ContrastivePair("ab", "", "c")]
    )


@pytest.mark.parametrize("bad", [None, 3, "half \ud800"])
def test_pairs_made_by_hand_are_whole_texts(bad: Any) -> None:
    with pytest.raises(PairsError, match="pair 2: expected three texts of whole characters"):
        check_pairs([make(1), ContrastivePair(bad, "a", "b")])
