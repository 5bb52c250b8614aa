"""A batch decoded together by operators against the same sequences decoded one by one."""

import weakref
from typing import Any

import pytest
import torch

from longshadow.engine.ops import operators
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.rope import RotaryLayout
from longshadow.engine.shadowkv.step_buffers import Capacity
from tests.engine.shadowkv.batches import SMALL, Setting, copies, decode_alone, decode_together

# Kernels are interpreted where there is no GPU.
KERNELS_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compressed; dense until it is not; of two segments; with a tail that becomes a segment.
PROMPTS = [[107], [38], [60, 512], [77, 60]]
NUM_STEPS = 7


def make_batch(setting: Setting, backend: str = "reference") -> DecodeBatch:
    device = torch.device(setting.device)
    return DecodeBatch(operators(device, backend), setting.config, device)


def compare(setting: Setting, batch: DecodeBatch, prompts: list[list[int]], num_steps: int, tolerance: float) -> None:
    """Outputs and counts of some steps; the sequences end up alike, too."""
    counts = StepCounts(), StepCounts()
    original = setting.sequences(prompts)
    alone, together = (copies(original, own) for own in counts)
    for step in range(num_steps):
        tokens = [setting.new_tokens(len(prompts)) for _ in alone]
        expected = decode_alone(setting, alone, tokens)
        actual = decode_together(setting, batch, together, tokens)
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), f"step {step}"
    batch.add_hits_to(counts[1])
    for one, other in zip((s for layer in alone for s in layer), (s for layer in together for s in layer), strict=True):
        assert [part.num_tokens for part in one.segments] == [part.num_tokens for part in other.segments]
        assert torch.equal(one.tail.keys, other.tail.keys) and torch.equal(one.tail.values, other.tail.values)
    for name in ("attended_tokens", "scored_tokens", "context_tokens"):
        assert getattr(counts[0], name) == getattr(counts[1], name)
    assert counts[0].hits + counts[0].misses == counts[1].hits + counts[1].misses
    assert counts[1].hits >= counts[0].hits


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {}),
        (dict(resident_factor=1), {}),
        (dict(resident_factor=2.5, candidate_factor=1), {}),
        (dict(candidate_factor=1), dict(softcap=5.0)),
        (dict(value_dtype="int8", factor_dtype="int8"), {}),
        (dict(factor_dtype="fp8", value_store="device"), dict(has_sinks=True)),
        (dict(chunk_size=5), dict(num_groups=1, layout=None)),
        ({}, dict(num_groups=7, key_dim=64, layout=RotaryLayout(style="interleaved", rotary_dim=24))),
        (dict(center_keys=False), dict(value_dim=80, num_kv_heads=1, softcap=3.0, has_sinks=True)),
        (dict(num_sink_chunks=0, num_outlier_chunks=0), {}),
        (dict(chunk_size=1, local_tokens=1), {}),  # a tail is compressed to nothing
    ],
)
def test_together_as_one_by_one(options: dict[str, Any], shapes: dict[str, Any]) -> None:
    """Tails become segments on the way, a dense sequence sparse, and buffers too small."""
    setting = Setting(config=ShadowKVConfig(**{**SMALL, **options}), **shapes)
    compare(setting, make_batch(setting), PROMPTS, NUM_STEPS, 1e-4)


def test_half_precision_follows_within_its_rounding() -> None:
    """Keys and weights are rounded at other places, so that a token of the same weight may be another."""
    setting = Setting(config=ShadowKVConfig(**SMALL), dtype=torch.float16, rotation_dtype=torch.float16, num_layers=1)
    compare(setting, make_batch(setting), PROMPTS, 4, 0.1)


@pytest.mark.parametrize("candidate_factor", [1, 2])
def test_kernels_decode_like_the_reference(candidate_factor: float) -> None:
    config = ShadowKVConfig(**SMALL, candidate_factor=candidate_factor, resident_factor=1, value_dtype="int8")
    setting = Setting(config=config, num_layers=1, num_kv_heads=1, device=KERNELS_DEVICE)
    compare(setting, make_batch(setting, "triton"), [[60], [39], [50, 30]], 3, 1e-4)


def test_sequences_come_go_and_move() -> None:
    """Places without a sequence, sequences that change places, that leave, and that come back."""
    setting = Setting(config=ShadowKVConfig(**SMALL, resident_factor=1), num_layers=1)
    batch, counts = make_batch(setting), (StepCounts(), StepCounts())
    original = setting.sequences([[103], [70], [81], [90]])
    alone, together = (copies(original, own) for own in counts)
    for seats in ([0, 1], [0, 1], [1, None, 0], [None, 2, 0], [3, 2, 0, 1], [2, 3], [3]):
        tokens = [setting.new_tokens(len(seats)) for _ in original]
        actual = decode_together(
            setting, batch, [[None if seat is None else layer[seat] for seat in seats] for layer in together], tokens
        )
        for place, seat in enumerate(seats):
            if seat is not None:
                chosen = [[layer[seat]] for layer in alone]
                own = [tuple(x[place : place + 1] for x in new) for new in tokens]
                expected = decode_alone(setting, chosen, own)[:, 0]
                assert (actual[:, place] - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("places", [[1, 0], [1, None, 0], [1, 1, 0], [1]])
def test_resident_chunks_move_with_their_sequences(places: list[int | None]) -> None:
    """To other places of a batch of the same or another size, and to copies."""
    setting = Setting(config=ShadowKVConfig(**SMALL, resident_factor=1))
    batch, counts = make_batch(setting), StepCounts()
    sequences = copies(setting.sequences([[103], [103]]), counts)
    tokens = [setting.new_tokens(2) for _ in sequences]
    decode_together(setting, batch, sequences, tokens)
    batch.add_hits_to(counts)
    num_candidates = counts.misses
    assert num_candidates > 0 and counts.hits == 0
    is_copied = places.count(1) > 1
    if is_copied:
        batch.rearrange([1, 1, 0])
    moved = [
        [None if place is None else layer[place].copy() if is_copied else layer[place] for place in places]
        for layer in sequences
    ]
    # The same queries find the same chunks, all of them resident.
    again = [tuple(x[[place or 0 for place in places]] for x in new) for new in tokens]
    out = decode_together(setting, batch, moved, again)
    batch.add_hits_to(counts)
    num_sequences = len(places) - places.count(None)
    assert counts.misses == num_candidates and counts.hits == num_candidates * num_sequences // 2
    assert not is_copied or torch.equal(out[:, 0], out[:, 1])


def test_what_operators_do_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="key_store is 'exact'"):
        make_batch(Setting(config=ShadowKVConfig(**SMALL, key_store="exact")))


def test_launches_stay_the_same_until_memory_moves() -> None:
    setting = Setting(config=ShadowKVConfig(**SMALL))
    batch = make_batch(setting)
    sequences = setting.sequences([[103], [90]])
    signatures = []
    for _ in range(6):
        decode_together(setting, batch, sequences, [setting.new_tokens(2) for _ in sequences])
        signatures.append(batch.signature)
    assert len(set(signatures)) == 1
    decode_together(setting, batch, [layer[:1] for layer in sequences], [setting.new_tokens(1) for _ in sequences])
    assert batch.signature != signatures[0]


def test_a_batch_holds_what_it_is_told_and_lets_places_go() -> None:
    """The same launches while sequences come, leave and grow; another size frees everything at once."""
    setting = Setting(config=ShadowKVConfig(**SMALL))
    batch = make_batch(setting)
    sequences = setting.sequences([[103], [90], [38]])
    room = Capacity(num_segments=3, num_chunks=80, num_candidates=20, num_selected=10, num_slots=20)
    batch.hold(2, room)
    signatures, segment = set(), weakref.ref(sequences[0][0].segments[0])
    for seats in ([0, None], [0, 1], [2, 1], [None, 1]):
        seated = [[None if seat is None else layer[seat] for seat in seats] for layer in sequences]
        decode_together(setting, batch, seated, [setting.new_tokens(2) for _ in sequences])
        signatures.add(batch.signature)
    assert len({version for version, _ in signatures}) == 1
    decode_together(setting, batch, [layer[:2] for layer in sequences], [setting.new_tokens(2) for _ in sequences])
    for layer in sequences:
        del layer[0]
    del seated
    assert segment() is not None
    batch.vacate(0)
    assert segment() is None
    batch.hold(2, room)
    assert batch.tensors()["resident"]
    batch.hold(1, room)
    assert not batch.tensors()["resident"]
