"""A document's state from the tensors of its file.

Legend: H KV heads, n tokens, D head_dim.
"""

from collections import defaultdict

import torch

from longshadow.engine.runtime.document_header import Header
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.runtime.windows import WindowSequence
from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.segment import Segment, restore


def restore_state(runner: ModelRunner, header: Header, tensors: dict[str, torch.Tensor]) -> SequenceState:
    """The inverse of `named_tensors`, on the runner's device; `tensors` were checked."""
    num_tokens = header.start.num_tokens
    state = runner.new_state(num_tokens, blocked_energy=False)
    state.num_tokens = num_tokens
    energies = iter(header.energies)
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name in sorted(tensors):
        parts[name.rpartition(".")[0]].append(tensors[name])
    for index, layer in enumerate(state.layers):
        if isinstance(layer, WindowSequence):
            keys, values = (tensor.to(runner.device) for tensor in parts[f"{index}.window"])
            layer.restore(keys, values, num_tokens)
            continue
        layer.device = runner.device
        layer.segments = _segments(runner, header, parts, index, next(energies))
        if header.tail:
            layer.tail.append(*(tensor.to(runner.device) for tensor in parts[f"{index}.tail"]))
        if f"{index}.energy" in parts:
            layer.query_energy = QueryEnergy(parts[f"{index}.energy"][0].to(runner.device))
    return state


def _segments(
    runner: ModelRunner,
    header: Header,
    parts: dict[str, list[torch.Tensor]],
    index: int,
    energies: tuple[float, ...],
) -> list[Segment]:
    segments, start = [], 0
    rotations, layout = runner.rotations[index], runner.layouts[index]
    for place, (num_tokens, energy) in enumerate(zip(header.segments, energies, strict=True)):
        prefix = f"{index}.{place}."
        segments.append(
            restore(
                {name.removeprefix(prefix): held for name, held in parts.items() if name.startswith(prefix)},
                rotations(start, start + num_tokens),
                layout,
                runner.config,
                energy_kept=energy,
                dtype=runner.model.dtype,
                device=runner.device,
            )
        )
        start += num_tokens
    return segments
