"""Windows give every pair that is not done once, in the batches of an undisturbed run."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from austeer.adapters import ContrastivePair, PairsError
from austeer.adapters.localization.distributed import Processes
from austeer.adapters.localization.stream import PairStream, Window

ALONE = Processes()


def pairs(count: int = 20) -> list[ContrastivePair]:
    words = ("park", "home", "sun", "rain", "then so it")
    return [
        ContrastivePair(
            f"one {'day ' * (n % 4)}{words[n % 5]}", " happy" * (1 + n // 5), " sad"
        )
        for n in range(count)
    ]


def stream(tokenizer: Any, count: int = 20, window: int = 8) -> PairStream:
    return PairStream(pairs(count), tokenizer, 64, window)


def numbered(windows: list[Window]) -> list[tuple[int, ...]]:
    return [
        tuple(window.start + number for number in batch)
        for window in windows
        for batch in window.batches
    ]


def all_windows(found: PairStream, done: Any, group: Processes = ALONE) -> list[Window]:
    return list(found.windows(done, 30, None, group))


def test_every_pair_once_a_window_at_a_time(tiny_tokenizer: Any) -> None:
    windows = all_windows(stream(tiny_tokenizer), np.zeros(20, bool))
    assert [(w.start, len(w.tokens), w.pending) for w in windows] == [
        (0, 8, 8), (8, 8, 8), (16, 4, 4)
    ]  # fmt: skip
    assert sorted(n for batch in numbered(windows) for n in batch) == list(range(20))


def test_batches_of_what_is_left_are_those_of_the_whole(tiny_tokenizer: Any) -> None:
    found, done = stream(tiny_tokenizer), np.zeros(20, bool)
    whole = numbered(all_windows(found, done))
    done[list(whole[1])] = done[list(whole[3])] = done[16:] = True
    done[whole[0][0]] = True
    left = numbered(all_windows(found, done))
    wanted = [b for n, b in enumerate(whole) if n not in (1, 3) and b[0] < 16]
    assert left == [wanted[0][1:], *wanted[1:]]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_share_batches_evenly(tiny_tokenizer: Any, size: int) -> None:
    found, done = stream(tiny_tokenizer), np.zeros(20, bool)
    done[[3, 9]] = True
    whole = numbered(all_windows(found, done))
    shares = [numbered(all_windows(found, done, Processes(rank, size))) for rank in range(size)]
    assert [whole[rank::size] for rank in range(size)] == shares


def test_batch_size_caps_the_pairs(tiny_tokenizer: Any) -> None:
    found = stream(tiny_tokenizer, window=100)
    (whole,) = found.windows(np.zeros(20, bool), 10_000, None, ALONE)
    (capped,) = found.windows(np.zeros(20, bool), 10_000, 3, ALONE)
    assert [len(batch) for batch in whole.batches] == [20]
    assert [len(batch) for batch in capped.batches] == [3] * 6 + [2]
    assert [n for batch in capped.batches for n in batch] == list(whole.batches[0])


def test_digest_knows_order_content_and_tokens(tiny_tokenizer: Any) -> None:
    first = stream(tiny_tokenizer).digest()
    assert first == stream(tiny_tokenizer, window=3).digest()
    assert first != PairStream(pairs()[::-1], tiny_tokenizer, 64).digest()
    assert first != stream(tiny_tokenizer, 19).digest()
    assert first != PairStream(pairs(), tiny_tokenizer, 9).digest()  # cut: other tokens


def test_a_long_pair_is_refused_before_anything_runs(tiny_tokenizer: Any) -> None:
    long = ContrastivePair("day " * 64, " happy", " sad", None, "f:21")
    found = PairStream([*pairs(), long], tiny_tokenizer, 64, 8)
    with pytest.raises(PairsError, match="f:21: the prompt alone has 66 tokens"):
        found.check_lengths()
    cut = ContrastivePair("day " * 30, " so" * 40 + " happy", " so" * 40 + " sad", None, "f:9")
    with pytest.raises(PairsError, match=r"f:9: .* cannot tell them apart"):
        PairStream([*pairs(), cut], tiny_tokenizer, 64, 8).check_lengths()
    stream(tiny_tokenizer).check_lengths()


def test_cut_completions_are_counted(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    long = ContrastivePair("one day", " happy" * 40, " sad")
    found = PairStream([*pairs(5), long], tiny_tokenizer, 24)
    found.check_lengths()
    assert "1 of 6 pairs are longer than 24 tokens" in caplog.text
    caplog.clear()
    PairStream([*pairs(5), long], tiny_tokenizer, 64).check_lengths()
    assert not caplog.records


def test_digest_knows_the_whole_vocabulary(tiny_tokenizer: Any) -> None:
    """Tokens that come after the sampled pairs may be split otherwise."""
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<late>"])
    assert stream(other).digest() != stream(tiny_tokenizer).digest()


def test_a_start_token_in_the_text_is_said(
    tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The model would see two; of a chat template the tokenizer adds none."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    start, tokenizer.chat_template = tokenizer.bos_token, "{{ bos_token }}Tom"
    turns = ({"role": "user", "content": "Tom felt"},)
    chat = ContrastivePair("", " happy", " sad", turns)
    plain = [ContrastivePair(f"{who} felt", " happy", " sad", where=who) for who in "ab"]
    PairStream([chat, *plain], tokenizer, 64).check_lengths()
    assert not caplog.records
    twice = ContrastivePair(f"{start}Tom felt", " happy", " sad", where="f:7")
    PairStream([chat, *plain, twice], tokenizer, 64).check_lengths()
    assert caplog.messages[0].startswith(f"f:7: the prompt begins with {start}")
    assert "(1 of 4 pairs)" in caplog.messages[0]
