"""Recorded choices, and their replay in a larger context."""

import pytest
import torch

from bench.replay import Replay
from bench.synthetic import ModelShape
from bench.traces import FILE, Traces, record
from longshadow.engine.ops.backend import Operators, operators

CPU = torch.device("cpu")
SHAPE = ModelShape(
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=32,
    hidden_size=64,
    intermediate_size=64,
    vocab_size=96,
    rope_theta=10_000.0,
)


@pytest.fixture(scope="module")
def traces():
    return Traces.load()


def test_the_committed_file_is_small_and_holds_a_real_models_locality(traces):
    assert FILE.stat().st_size < 100_000
    assert traces.num_rows == 18 and traces.num_steps == 32
    assert 0.3 < traces.overlap() < 0.95
    assert int(traces.candidates.min()) >= 0 and int(traces.candidates.max()) < traces.num_chunks
    assert bool((traces.candidates.diff(dim=2) > 0).all()) and bool((traces.tokens.diff(dim=2) > 0).all())
    assert int(traces.tokens.max()) < traces.num_candidates * traces.chunk_size
    # Candidates are three times the budget's chunks.
    assert traces.num_candidates * traces.chunk_size == 3 * traces.num_tokens


def test_recording_and_its_file(tmp_path):
    model = SHAPE.model(dtype=torch.float32, device="cpu", seed=0, max_positions=1024)
    prompt = torch.randint(96, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    made = record(model, prompt, steps=3, layers=(1,), budget_fraction=0.02)
    assert made.candidates.shape == (2, 3, 6) and made.tokens.shape == (2, 3, 16)
    assert made.num_chunks == (700 - 32) // 8 and made.chunk_size == 8
    made.save(tmp_path / "traces.npz")
    again = Traces.load(tmp_path / "traces.npz")
    assert torch.equal(again.candidates, made.candidates) and torch.equal(again.tokens, made.tokens)


def play(traces, *, factor, steps, batch_size=2, num_layers=3, num_heads=2):
    """Chunks [S, L, B, H, M] and the slots' tokens [S, L, B, H, T] as (chunk, offset) codes, by wrapped operators."""
    replay = Replay(
        traces,
        num_chunks=traces.num_chunks * factor + 20,
        num_candidates=traces.num_candidates * factor,
        num_layers=num_layers,
        num_heads=num_heads,
        batch_size=batch_size,
        device=CPU,
    )
    nothing = {name: (lambda *given: None) for name in Operators.__dataclass_fields__}
    reference = operators(CPU, "reference")
    wrapped = replay.operators(Operators(**{**nothing, "plan_chunks": reference.plan_chunks}))
    pairs, capacity = (batch_size, num_heads), replay.num_candidates + 3
    slot_chunks = [torch.full((*pairs, capacity), -1, dtype=torch.int32) for _ in range(num_layers)]
    last_used = [torch.zeros(*pairs, capacity, dtype=torch.int32) for _ in range(num_layers)]
    has_values = torch.zeros(*pairs, capacity, 8, dtype=torch.uint8)
    chunks, tokens, misses = [], [], []
    for step in range(steps):
        for layer in range(num_layers):
            chosen = torch.full((*pairs, capacity), -7, dtype=torch.int32)
            places = torch.full((*pairs, replay.num_tokens + 5), -7, dtype=torch.int32)
            slots, missing = torch.empty_like(chosen), torch.empty_like(chosen)
            num_misses = torch.empty(pairs, dtype=torch.int32)
            wrapped.score_chunks()
            wrapped.top_chunks(None, None, chosen)
            now = torch.tensor([step + 1], dtype=torch.int32)
            wrapped.plan_chunks(
                chosen, slot_chunks[layer], last_used[layer], has_values, now, slots, missing, num_misses
            )
            wrapped.top_chunks(None, None, places)
            assert bool((chosen[..., replay.num_candidates :] == -1).all())
            assert bool((places[..., replay.num_tokens :] == -1).all())
            taken = places[..., : replay.num_tokens].long()
            chunk = slot_chunks[layer].gather(2, taken // 8)
            chunks.append(chosen[..., : replay.num_candidates].clone())
            tokens.append(chunk * 8 + taken % 8)
            misses.append(num_misses)
    shape = (steps, num_layers)
    return replay, *(torch.stack(parts).unflatten(0, shape) for parts in (chunks, tokens, misses))


@pytest.mark.parametrize("factor", [1, 3])
def test_as_much_stays_as_was_recorded(traces, factor):
    replay, chunks, _, _ = play(traces, factor=factor, steps=4)
    recorded = traces.candidates
    for layer in range(3):
        for sequence in range(2):
            for head in range(2):
                row = (layer * 2 + head) % traces.num_rows
                for step in range(1, 4):
                    # The first call is turn 1; sequences are five turns apart.
                    turn = step + 1 + 5 * sequence
                    before, now = (set(chunks[at, layer, sequence, head].tolist()) for at in (step - 1, step))
                    old, new = (set(recorded[row, at].tolist()) for at in (turn - 1, turn))
                    assert len(now) == factor * len(new) and len(now & before) == factor * len(new & old)
    assert bool((chunks.diff(dim=-1) > 0).all())
    assert not set(chunks.flatten().tolist()) & set(replay.free_chunks.tolist())


def test_selected_tokens_are_distinct_tokens_of_the_candidates(traces):
    _, chunks, tokens, _ = play(traces, factor=2, steps=2)
    assert tokens.shape[-1] == 2 * traces.num_tokens
    ordered = tokens.sort(-1).values
    assert bool((ordered.diff(dim=-1) > 0).all())
    for own_chunks, own_tokens in zip(chunks.flatten(0, 3), tokens.flatten(0, 3), strict=True):
        assert set((own_tokens // 8).tolist()) <= set(own_chunks.tolist())
    # As recorded: how many tokens of its chunk each one has beside it.
    turn = traces.tokens[0, 1] // 8
    recorded = torch.bincount(turn, minlength=traces.num_candidates).sort().values.repeat_interleave(2)
    replayed = torch.unique(tokens[0, 0, 0, 0] // 8, return_counts=True)[1].sort().values
    assert torch.equal(recorded[recorded > 0], replayed)


def test_it_goes_back_where_the_recording_ends(traces):
    steps = 2 * traces.num_steps - 2
    _, chunks, _, misses = play(traces, factor=1, steps=steps + 1, batch_size=1, num_layers=1, num_heads=1)
    assert torch.equal(chunks[0], chunks[steps])
    assert int(misses[1:].max()) < traces.num_candidates


def test_what_does_not_fit_is_refused(traces):
    sizes = dict(num_layers=1, num_heads=1, batch_size=1, device=CPU)
    with pytest.raises(ValueError, match="multiple of the recorded"):
        Replay(traces, num_chunks=10_000, num_candidates=traces.num_candidates + 1, **sizes)
    with pytest.raises(ValueError, match="do not fit into 100"):
        Replay(traces, num_chunks=100, num_candidates=traces.num_candidates, **sizes)
