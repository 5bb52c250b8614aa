"""The tokens of each sequence in a batch: which are real, and the rotation each was given.

Shared by the layers of a cache, so that masks are read and angles computed once per forward.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F

from longshadow.engine.shadowkv.masks import check_columns
from longshadow.engine.shadowkv.rope import Rotation

Rows = list[slice | torch.Tensor]
EVERY_TOKEN = slice(None)
TORN = "the cache's layers hold different tokens, as after an interrupted forward: cache.reset()"
RotationSource = Callable[[str, torch.Tensor], Rotation]


class _RotationLog:
    """cos and sin of the tokens of one sequence that are not in a segment yet."""

    def __init__(self) -> None:
        self._first = 0
        self._pieces: list[Rotation] = []
        self._tables: dict[tuple[int, int], Rotation] = {}

    def append(self, piece: Rotation) -> None:
        if self._tables:
            self._forget(max(stop for _, stop in self._tables))
            self._tables.clear()
        self._pieces.append(piece)

    def table(self, start: int, stop: int) -> Rotation:
        """Rotation of tokens start .. stop; the same object for every layer of a forward."""
        if (start, stop) not in self._tables:
            joined = self._joined()
            tokens = slice(start - self._first, stop - self._first)
            self._tables[start, stop] = Rotation(joined.cos[tokens].clone(), joined.sin[tokens].clone())
        return self._tables[start, stop]

    def drop_last(self, num_tokens: int) -> None:
        """Forgets the newest tokens, which are in no table."""
        if num_tokens:
            joined = self._joined()
            self._pieces = [joined[slice(None, len(joined.cos) - num_tokens)]]

    def copy(self) -> "_RotationLog":
        copied = _RotationLog()
        copied._first, copied._pieces, copied._tables = self._first, [*self._pieces], dict(self._tables)
        return copied

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for piece in self._pieces for tensor in (piece.cos, piece.sin)]

    def _joined(self) -> Rotation:
        if len(self._pieces) > 1:
            cos = torch.cat([piece.cos for piece in self._pieces])
            self._pieces = [Rotation(cos, torch.cat([piece.sin for piece in self._pieces]))]
        return self._pieces[0]

    def _forget(self, before: int) -> None:
        rest = self._joined()[slice(before - self._first, None)]
        self._pieces = [Rotation(rest.cos.clone(), rest.sin.clone())]
        self._first = before


class TokenPositions:
    """Follows the forwards of one cache; every layer reports, the first one of a forward does the work."""

    def __init__(self, rotation_of: RotationSource) -> None:
        """`rotation_of(layer_type, position_ids [B, T])` gives cos and sin [B, T, P]."""
        self._rotation_of = rotation_of
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._num_seen = 0
        self._num_new = 0
        self._num_real: list[int] = []
        self._mask: torch.Tensor | None = None  # [B, seen] of real tokens; None: all are
        self._rows: Rows = []
        self._logs: dict[str, list[_RotationLog]] = {}
        self._logged: set[str] = set()
        self._ahead: list[torch.Tensor] = []  # position ids [B or 1, 1] of tokens that are in no log yet

    def begin(self, num_seen: int, batch_size: int, num_new: int, mask: torch.Tensor | None) -> Rows:
        """A layer that has seen `num_seen` tokens, padding included, gets `num_new` more.

        `mask` [B, seen + new] marks real tokens (None: all are). Returns for each sequence which of the new
        tokens are real. Raises RuntimeError if the layers of the cache have seen different tokens, ValueError for a
        mask that says something else of the earlier tokens than the masks that brought them.
        """
        if (num_seen, num_new) == (self._num_seen, self._num_new):
            return self._rows
        if num_seen != self._num_seen + self._num_new:
            raise RuntimeError(TORN)
        new = self.new_tokens(mask, batch_size, num_new)
        rows = _real_tokens(new, batch_size)
        self._note_mask(new, batch_size, num_new)
        old = self._num_real or [0] * batch_size
        self._num_seen, self._num_new, self._rows = num_seen, num_new, rows
        self._num_real = [count + _count(row, num_new) for count, row in zip(old, rows, strict=True)]
        self._logged.clear()
        return rows

    @property
    def num_real(self) -> list[int]:
        """Real tokens of each sequence, which is the position of the next one unless positions were given."""
        return self._num_real

    def advance(self, position_ids: torch.Tensor) -> None:
        """Every sequence gets one more real token, and no layer will report it. position_ids: [B or 1, 1].

        For forwards whose host part comes before their device part. The rotation of these tokens is computed when
        it is asked for, so it must depend on nothing but their positions.
        """
        self._note_mask(None, len(self._num_real), 1)
        self._num_seen += self._num_new
        self._num_new = 1
        self._rows = [EVERY_TOKEN] * len(self._num_real)
        self._num_real = [count + 1 for count in self._num_real]
        self._ahead.append(position_ids.clone())

    def _catch_up(self) -> None:
        """Logs the rotation of the tokens that `advance` counted."""
        if not self._ahead:
            return
        position_ids = torch.cat(self._ahead, 1)
        self._ahead = []
        for layer_type, logs in self._logs.items():
            _append(logs, self._rotation_of(layer_type, position_ids), [EVERY_TOKEN] * len(logs))

    def new_tokens(self, mask: torch.Tensor | None, batch_size: int, num_new: int) -> torch.Tensor | None:
        """The part [B, T] of a mask [B, seen + new] that is about the new tokens, None where all are real.

        Raises ValueError for another number of sequences, and where the rest of the mask is not what the masks of the
        earlier tokens were; None shows them all.
        """
        if self._num_real and len(self._num_real) != batch_size:
            raise ValueError(f"the cache holds {len(self._num_real)} sequences, the batch has {batch_size}")
        num_earlier = self._num_seen + self._num_new
        if mask is None:
            if self._mask is not None:
                self._refuse_history(torch.ones_like(self._mask), self._mask)
            return None
        check_columns(mask, batch_size, num_earlier, num_new)
        mask = mask.bool().expand(batch_size, -1)
        earlier, new = mask[:, :num_earlier], mask[:, num_earlier:]
        known = torch.ones_like(earlier) if self._mask is None else self._mask.to(mask.device)
        if not torch.equal(earlier, known):
            self._refuse_history(earlier, known)
        return None if bool(new.all()) else new

    @staticmethod
    def _refuse_history(earlier: torch.Tensor, known: torch.Tensor) -> NoReturn:
        sequence, token = (earlier != known).nonzero()[0].tolist()
        says, said = ("shows", "hid") if earlier[sequence, token] else ("hides", "showed")
        raise ValueError(
            f"the attention mask {says} earlier token {token} of sequence {sequence}, but {said} it when it was "
            "cached: pass the mask of the earlier turns, unchanged, before the new tokens' mask"
        )

    def _note_mask(self, new: torch.Tensor | None, batch_size: int, num_new: int) -> None:
        if new is None and self._mask is None:
            return
        num_earlier = self._num_seen + self._num_new
        like = new if new is not None else self._mask
        assert like is not None
        earlier = like.new_ones(batch_size, num_earlier) if self._mask is None else self._mask
        added = like.new_ones(batch_size, num_new) if new is None else new.to(earlier.device)
        self._mask = torch.cat([earlier, added], 1)

    def mask_with(self, num_new: int) -> torch.Tensor | None:
        """The mask [B, seen + new] with new tokens that are all real; None where all tokens are."""
        return None if self._mask is None else F.pad(self._mask, (0, num_new), value=True)

    def log_rotation(self, layer_type: str, position_ids: torch.Tensor) -> None:
        """Notes the new tokens' rotation for a type of layer, once per forward. position_ids: [B or 1, T]."""
        if layer_type in self._logged:
            return
        self._catch_up()
        self._logged.add(layer_type)
        logs = self._logs.setdefault(layer_type, [_RotationLog() for _ in self._rows])
        _append(logs, self._rotation_of(layer_type, position_ids), self._rows)

    def rotation(self, layer_type: str, sequence: int, start: int, stop: int, device: torch.device) -> Rotation:
        """Rotation of the real tokens start .. stop of a sequence."""
        self._catch_up()
        return self._logs[layer_type][sequence].table(start, stop).to(device)

    def select(self, sequences: list[int]) -> None:
        """Keeps these sequences, in this order; one may be named several times."""
        self._catch_up()
        self._rows = [self._rows[index] for index in sequences]
        self._num_real = [self._num_real[index] for index in sequences]
        self._mask = None if self._mask is None else self._mask[sequences]
        self._logs = {
            layer_type: [logs[index].copy() for index in sequences] for layer_type, logs in self._logs.items()
        }

    def drop_last(self, num_tokens: int) -> list[int]:
        """Forgets the newest columns of the batch, padding included; how many real tokens each sequence loses."""
        self._catch_up()
        lost = self.num_real_of_last(num_tokens)
        if self._mask is not None:
            self._mask = self._mask[:, : self._mask.shape[1] - num_tokens]
        self._num_seen, self._num_new = self._num_seen + self._num_new - num_tokens, 0
        self._num_real = [count - fewer for count, fewer in zip(self._num_real, lost, strict=True)]
        for logs in self._logs.values():
            for log, fewer in zip(logs, lost, strict=True):
                log.drop_last(fewer)
        return lost

    def num_real_of_last(self, num_tokens: int) -> list[int]:
        """Real tokens among the newest columns of the batch."""
        if self._mask is None:
            return [num_tokens] * len(self._num_real)
        counts: list[int] = self._mask[:, self._mask.shape[1] - num_tokens :].sum(1).tolist()
        return counts

    def copy(self) -> "TokenPositions":
        """An independent copy."""
        self._catch_up()
        copied = TokenPositions(self._rotation_of)
        copied._num_seen, copied._num_new = self._num_seen, self._num_new
        copied._num_real, copied._rows, copied._mask = [*self._num_real], [*self._rows], self._mask
        copied._logs = {layer_type: [log.copy() for log in logs] for layer_type, logs in self._logs.items()}
        copied._logged = set(self._logged)
        return copied

    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        logged = [tensor for logs in self._logs.values() for log in logs for tensor in log.tensors()]
        return [*logged, *self._ahead, *([] if self._mask is None else [self._mask])]


def _real_tokens(new: torch.Tensor | None, batch_size: int) -> Rows:
    """Which of the new tokens of each sequence are real, by a mask [B, T]."""
    if new is None:
        return [EVERY_TOKEN] * batch_size
    rows: Rows = []
    for row in new:
        real = row.nonzero().squeeze(1)
        first, count = int(real[0]) if len(real) else 0, len(real)
        contiguous = count == 0 or int(real[-1]) - first == count - 1
        whole = count == len(row)
        rows.append(EVERY_TOKEN if whole else slice(first, first + count) if contiguous else real)
    return rows


def _append(logs: list[_RotationLog], rotation: Rotation, rows: Rows) -> None:
    """Appends to each sequence's log what its row of cos and sin [B or 1, T, P] says of its real tokens."""
    for index, (log, row) in enumerate(zip(logs, rows, strict=True)):
        source = min(index, rotation.cos.shape[0] - 1)
        # Copies: a view would keep the whole batch's angles, and the half that pairs repeat, alive.
        log.append(Rotation(rotation.cos[source][row].clone(), rotation.sin[source][row].clone()))


def _count(row: slice | torch.Tensor, num_new: int) -> int:
    if isinstance(row, slice):
        return len(range(*row.indices(num_new)))
    return len(row)
