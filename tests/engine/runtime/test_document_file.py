import contextlib
import dataclasses
import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime import Document, DocumentError
from tests.engine.runtime.engines import engine, peaked_model, small_config
from tests.engine.shadowkv.families import tiny_model

TEXT = "Once upon a time there was a cache. " * 8
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def document(llm: LLM) -> Document:
    return llm.add_document(TEXT, name="story")


@pytest.fixture
def path(document: Document, tmp_path: Path) -> Path:
    place = tmp_path / "story.safetensors"
    document.save(place)
    return place


def answer(llm: LLM, document: Document) -> list[int]:
    return llm.generate("who?", GREEDY, document=document)[0].outputs[0].token_ids


def test_a_loaded_document_answers_as_the_one_that_was_saved(llm: LLM, document: Document, path: Path) -> None:
    loaded = llm.load_document(path)
    assert (loaded.name, loaded.num_tokens, loaded.memory) == ("story", document.num_tokens, document.memory)
    assert loaded.id != document.id  # which is taken
    assert answer(llm, loaded) == answer(llm, document)
    assert loaded.reserved == document.reserved
    llm.remove_document(loaded)


def test_another_engine_loads_it_under_its_id(llm: LLM, document: Document, path: Path) -> None:
    expected = answer(llm, document)
    with engine() as other:
        loaded = other.load_document(path)
        assert loaded.id == document.id
        assert answer(other, loaded) == expected


@pytest.mark.parametrize(
    "config",
    [
        small_config(factor_dtype="int8", value_dtype="int8"),
        small_config(factor_dtype="fp8", rank_energy=0.9, rank=None),
        small_config(key_store="exact", query_weighted=False, value_store="device"),
        small_config(dense_threshold=10_000),
    ],
    ids=["int8", "fp8, rank by energy", "exact keys", "dense"],
)
def test_every_way_to_store_tokens(config: Any, tmp_path: Path) -> None:
    with engine(model=peaked_model().float(), shadowkv=config) as opened:
        document = opened.add_document(TEXT)
        document.save(tmp_path / "file")
        loaded = opened.load_document(tmp_path / "file")
        assert answer(opened, loaded) == answer(opened, document)
        assert loaded.memory == document.memory


def test_sliding_windows(tmp_path: Path) -> None:
    with LLM(tiny_model("gemma3_text"), shadowkv=small_config(), device_memory="1G") as opened:
        tokens = torch.randint(1, 128, (150,), generator=torch.Generator().manual_seed(0)).tolist()
        document = opened.add_document(tokens)
        document.save(tmp_path / "file")
        loaded = opened.load_document(tmp_path / "file")
        first, second = (opened.generate([[5, 6]], GREEDY, document=one)[0] for one in (document, loaded))
        assert first.outputs[0].token_ids == second.outputs[0].token_ids


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shadowkv": small_config(rank=7)}, "rank is 8, here 7"),
        ({"shadowkv": small_config(factor_dtype="int8")}, "factor_dtype is None, here 'int8'"),
        ({"model": peaked_model().float()}, "another model"),
        ({"max_model_len": 100}, "more than 98 tokens"),
    ],
)
def test_an_engine_that_differs_refuses_it(path: Path, changes: dict[str, Any], reason: str) -> None:
    with engine(**changes) as other, pytest.raises(DocumentError, match=reason):
        other.load_document(path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The file with another header of longshadow's, all else as it was."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    outer = json.loads(content[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["longshadow"])
    change(inner)
    outer["__metadata__"]["longshadow"] = json.dumps(inner)
    header = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def set_to(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update(values)


HUGE = 2**62


@pytest.mark.parametrize(
    "change",
    [
        set_to(segments=[HUGE]),
        set_to(segments=[-8]),
        set_to(segments=[8.0]),
        set_to(segments=[True]),
        set_to(segments="8"),
        set_to(segments=None),
        set_to(segments=[]),
        set_to(segments=[7]),
        set_to(segments=[8]),
        set_to(tail=HUGE),
        set_to(tail=-1),
        set_to(tail=0),
        set_to(tail=None),
        set_to(ranks=[[HUGE], [HUGE]]),
        set_to(ranks=[[0], [0]]),
        set_to(ranks=[[8]]),
        set_to(ranks=[8, 8]),
        set_to(energies=[["x"], ["y"]]),
        set_to(energies=[[1.0], []]),
        set_to(id=5),
        set_to(id="x" * 5000),
        set_to(name=["x"]),
        set_to(name="\ud800"),
        set_to(checksum="0"),
        set_to(checksum=1),
        set_to(version=2),
        set_to(format="other"),
        set_to(dtype="float16"),
        set_to(rope=[]),
        set_to(layers=[]),
    ],
)
def test_a_hostile_header_is_refused_in_one_line(
    llm: LLM, path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewritten(path, change)
    before = llm.statistics()
    with pytest.raises(DocumentError, match=f"cannot load {path}: ") as caught:
        llm.load_document(path)
    assert "\n" not in str(caught.value)
    # All but the speed of the last seconds.
    assert dataclasses.replace(llm.statistics(), tokens_per_second=before.tokens_per_second) == before


def damaged_contents(path: Path, name: str, value: bytes) -> None:
    """Other bytes at the beginning of a tensor, with a checksum that fits."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    place = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[place : place + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.0.exact chunks.0", struct.pack("<q", HUGE)),
        ("0.0.exact chunks.0", struct.pack("<q", -1)),
        ("0.0.exact chunks.0", struct.pack("<qq", 1, 1)),
        ("1.0.values.0", struct.pack("<d", float("nan"))),
        ("0.tail.0", struct.pack("<d", float("inf"))),
    ],
)
def test_impossible_contents_are_refused(llm: LLM, path: Path, name: str, value: bytes, monkeypatch: Any) -> None:
    damaged_contents(path, name, value)
    with pytest.raises(DocumentError, match="its checksum differs"):
        llm.load_document(path)
    monkeypatch.setattr("longshadow.engine.runtime.document_file.checksum", lambda tensors: header_checksum(path))
    with pytest.raises(DocumentError, match="holds impossible numbers"):
        llm.load_document(path)


def header_checksum(path: Path) -> int:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return int(json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["longshadow"])["checksum"])


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_an_error_and_leaks_nothing(llm: LLM, path: Path, data: st.DataObject) -> None:
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    broken = whole[:place] if cut else whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    path_of_broken = path.with_name("broken")
    path_of_broken.write_bytes(broken if cut else broken + whole[place + 1 :])
    before = llm.statistics()
    # What can change unseen is a byte of the document's name or id.
    with contextlib.suppress(DocumentError):
        llm.remove_document(llm.load_document(path_of_broken))
    assert llm.statistics().device_bytes == before.device_bytes
    assert llm.statistics().host_bytes == before.host_bytes


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, struct.pack("<Q", 2**40) + b"{}", b"{}" * 50])
def test_what_is_no_container_is_refused(llm: LLM, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DocumentError, match="cannot load"):
        llm.load_document(tmp_path / "file")


def test_what_is_no_file_is_refused(llm: LLM, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(DocumentError, match="there is no file"):
            llm.load_document(place)


def test_a_document_that_does_not_fit_is_refused_before_it_is_read(path: Path, monkeypatch: Any) -> None:
    with engine() as other:
        free = other.statistics()
        other._engine.budget.device_limit = free.device_bytes + free.host_bytes + 100
        monkeypatch.setattr("longshadow.engine.runtime.document_file.checksum", None)
        with pytest.raises(DocumentError, match="more than there are now"):
            other.load_document(path)


def test_a_full_disk_leaves_the_old_file_and_no_other(llm: LLM, document: Document, path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(DocumentError, match="cannot write") as caught:
            document.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there(document: Document, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="cannot write"):
        document.save(tmp_path / "none" / "file")
