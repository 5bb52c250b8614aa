"""`score_chunks` in PyTorch: the specification."""

import torch

from longshadow.engine.ops.logits import attention_logits
from longshadow.engine.ops.tables import Field, read_packed, read_rows, tensor_at


def score_chunks(
    query: torch.Tensor,
    table: torch.Tensor,
    scaling: float,
    softcap: float,
    kind: int,
    scores: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package."""
    _, num_heads, num_groups, head_dim = query.shape
    scores.fill_(-torch.inf)
    for query_HGD, segments, scores_HC in zip(query, read_rows(table), scores, strict=True):
        if not segments:
            continue
        logits, excluded = [], []
        for row in segments:
            shape = (num_heads, row[Field.NUM_CHUNKS], head_dim)
            landmarks = read_packed(
                row[Field.LANDMARKS], row[Field.LANDMARK_SCALES], shape, kind, query.dtype, query.device
            )
            logits.append(attention_logits(query_HGD, landmarks, scaling, softcap))
            exact = tensor_at(row[Field.EXACT_CHUNKS], (num_heads, row[Field.NUM_EXACT]), torch.int64, query.device)
            excluded.append(exact + row[Field.FIRST_CHUNK])
        logits_HGC, excluded_Hp = torch.cat(logits, 2), torch.cat(excluded, 1)
        logits_HGC.scatter_(2, excluded_Hp.unsqueeze(1).expand(-1, num_groups, -1), -torch.inf)
        weights_HC = logits_HGC.softmax(-1).amax(1)
        scores_HC[:, : weights_HC.shape[1]] = weights_HC.scatter_(1, excluded_Hp, -torch.inf)
