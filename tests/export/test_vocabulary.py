"""A pruned head keeps what the domain writes and whatever must never be missing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import EdgeError
from edge_agent.runtime.encoder import TextEncoder
from export.checkpoint.source import TOKENIZER_NAME, Checkpoint, open_checkpoint
from export.graphs.vocabulary import Vocabulary, choose_vocabulary, reach, read_texts
from export.tasks import TaskFolder, open_tasks
from tests.export.conftest import TASK
from tests.fakes import tokenizers

DOMAIN = "hydraulic pressure below setpoint\nhydraulic pump leaks\nDruck unter Sollwert\n"
GOLDEN = {"event": {"machine": "m", "text": "t"}, "decision": {"kind": "stop", "note": "conveyor 漢"}}


@pytest.fixture(scope="module")
def opened(llama: Path) -> Checkpoint:
    return open_checkpoint(llama)


@pytest.fixture(scope="module")
def encoder(opened: Checkpoint) -> TextEncoder:
    return TextEncoder(opened.path / TOKENIZER_NAME, opened.vocab_size)


@pytest.fixture
def tasks(tmp_path: Path) -> list[TaskFolder]:
    folder = tmp_path / "task"
    folder.mkdir()
    head, _ = TASK.split("    urgent:")
    task = head + "    note: {type: string, maxLength: 20}\nthresholds: {}\nlimits: {max_prompt_tokens: 128}\n"
    (folder / "task.yaml").write_text(task)
    (folder / "golden.jsonl").write_text(json.dumps(GOLDEN) + "\n")
    return open_tasks([folder], 256)


def text_file(folder: Path, text: str, name: str = "domain.txt") -> Path:
    (folder / name).write_text(text, "utf-8")
    return folder / name


def kept(vocabulary: Vocabulary) -> set[int]:
    return set(vocabulary.ids.tolist())


def test_bytes_control_tokens_and_answers_are_never_left_out(
    opened: Checkpoint, encoder: TextEncoder, tasks: list[TaskFolder], tmp_path: Path
) -> None:
    vocabulary = choose_vocabulary(opened, [text_file(tmp_path, DOMAIN)], tasks, rows=1)
    assert encoder.spelling.byte_ids <= kept(vocabulary)
    assert opened.eos_token_id in kept(vocabulary)
    for value in ("stop", "stop_all", "slow", "unknown", "conveyor 漢", '","note":"'):
        assert set(encoder.encode(value)) <= kept(vocabulary), value
    assert vocabulary.domain_tokens == 0
    assert vocabulary.dropped_tokens > 0
    assert sum(vocabulary.as_dict().values()) == 2 * len(vocabulary.ids) + vocabulary.dropped_tokens


def test_frequent_tokens_come_first(opened: Checkpoint, encoder: TextEncoder, tmp_path: Path) -> None:
    least = len(choose_vocabulary(opened, [text_file(tmp_path, "a")], [], rows=0).ids)
    file = text_file(tmp_path, "pressure\n" * 5 + "bearing\n")
    often, seldom = (set(encoder.encode(word)) - encoder.spelling.byte_ids for word in ("pressure", "bearing"))
    one_more = kept(choose_vocabulary(opened, [file], [], rows=least + len(often)))
    assert often <= one_more
    assert not seldom <= one_more


def test_rows_are_the_same_every_time_and_none_comes_twice(
    opened: Checkpoint, tasks: list[TaskFolder], tmp_path: Path
) -> None:
    files = [text_file(tmp_path, DOMAIN)]
    first, second = (choose_vocabulary(opened, files, tasks, rows=400) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    ids = np.frombuffer(first.to_bytes(), "<i4")
    assert len(set(ids.tolist())) == len(ids)
    assert first.as_dict()["rows"] == len(ids) == len(first.ids)


def test_rows_that_events_look_up_most_lie_first(
    opened: Checkpoint, encoder: TextEncoder, tasks: list[TaskFolder], tmp_path: Path
) -> None:
    """What the tasks and the bytes need is kept for other reasons, and lies among the rest by the same measure."""
    text = "stop " * 9 + "pressure " * 5 + "bearing\n"
    ids = choose_vocabulary(opened, [text_file(tmp_path, text)], tasks, rows=1000).ids.tolist()
    counted = Counter(encoder.encode(text))
    assert [counted[token] for token in ids] == sorted((counted[token] for token in ids), reverse=True)
    assert set(ids[: len(counted)]) == set(counted)
    unused = ids[len(counted) :]
    assert unused == sorted(unused)


def test_every_string_of_json_lines_counts(opened: Checkpoint, encoder: TextEncoder, tmp_path: Path) -> None:
    line = {"event": {"text": "hydraulic", "value": 3}, "decision": {"list": ["conveyor", True]}}
    file = text_file(tmp_path, json.dumps(line) + "\n\n", "rows.jsonl")
    assert list(read_texts([file])) == ["hydraulic", "conveyor"]
    found = kept(choose_vocabulary(opened, [file], [], rows=1000))
    assert {*encoder.encode("hydraulic"), *encoder.encode("conveyor")} <= found


def test_reach_of_held_out_text_is_counted_by_token(opened: Checkpoint, encoder: TextEncoder, tmp_path: Path) -> None:
    known, unknown = "hydraulic pressure", " spindle"
    vocabulary = choose_vocabulary(opened, [text_file(tmp_path, known)], [], rows=1000)
    inside = reach(opened, vocabulary, [text_file(tmp_path, known, "a.txt")])
    assert (inside.reachable, inside.tokens_with_bytes) == (inside.tokens, inside.tokens)
    assert inside.as_dict()["reachable_share"] == 1.0
    outside = reach(opened, vocabulary, [text_file(tmp_path, known + unknown, "b.txt")])
    lacking = [token for token in encoder.encode(unknown) if token not in kept(vocabulary)]
    assert lacking
    assert outside.tokens - outside.reachable == len(lacking)
    longer = sum(len(encoder.spelling.bytes_of(token)) - 1 for token in lacking)
    assert outside.tokens_with_bytes - outside.tokens == longer
    assert outside.as_dict()["length_ratio"] == round(outside.tokens_with_bytes / outside.tokens, 4)


def test_tokenizer_with_byte_fallback_keeps_its_bytes(opened: Checkpoint, checkpoint: Path, tmp_path: Path) -> None:
    tokenizers.byte_fallback(checkpoint / TOKENIZER_NAME)
    other = replace(opened, path=checkpoint)
    vocabulary = choose_vocabulary(other, [text_file(tmp_path, "stop 漢")], [], rows=0)
    encoder = TextEncoder(checkpoint / TOKENIZER_NAME, opened.vocab_size)
    assert vocabulary.byte_tokens == 256
    assert encoder.spelling.byte_ids <= kept(vocabulary)


def test_tokenizer_without_bytes_is_refused(opened: Checkpoint, checkpoint: Path, tmp_path: Path) -> None:
    tokenizers.metaspace(checkpoint / TOKENIZER_NAME)
    with pytest.raises(EdgeError) as caught:
        choose_vocabulary(replace(opened, path=checkpoint), [text_file(tmp_path, DOMAIN)], [])
    assert caught.value.code == "tokenizer.no_bytes"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("latin.txt", "Störung".encode("latin-1"), "UTF-8"),
        ("empty.txt", b" \n\n", "no text"),
        ("rows.jsonl", b'{"a": "b"}\n{"a":\n', "line 2"),
        ("numbers.jsonl", b"1\n2\n", "no text"),
        ("absent.txt", None, "No such file"),
    ],
)
def test_file_that_holds_no_text_is_refused_by_name(
    opened: Checkpoint, tmp_path: Path, name: str, content: bytes | None, match: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EdgeError, match=match) as caught:
        choose_vocabulary(opened, [tmp_path / name], [])
    assert caught.value.code == "export.vocab_text_invalid"
    assert name in caught.value.detail
