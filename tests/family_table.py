"""What becomes of every causal-LM type of the installed transformers: `python -m tests.family_table` (`make
test-families`) tries them all, writes docs/families.json and the list in README.md.

Each column is one feature, tried on a hardened tiny model against the stock library: it is "equal", or "refused" with
the reason that a user reads. Anything else fails.
"""

import json
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from tests.engine.prefix_sharing.sweep import try_sharing
from tests.model_zoo import NOT_BUILT, TYPES, VOCABULARY, tiny_model

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "families.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

PROMPT, PADDING, ANSWER, TURN, SECOND_ANSWER = 96, 17, 12, 21, 6
# At full rank and budget, with segments, residents and a later turn, but nothing left out.
EVERYTHING = ShadowKVConfig(
    rank_energy=1.0, budget_fraction=1.0, dense_threshold=0, local_tokens=8, segment_tokens=64, num_outlier_chunks=1
)
# Logits by rounding only, in units of their standard deviation.
TOLERANCE = 1e-3


def try_cache(model: PreTrainedModel) -> str | None:
    """Two turns with `ShadowKVCache` and with the stock cache: why the model is refused; None where they are equal.

    The batch is padded, or one sequence where the stock cache takes no more.
    """
    try:
        cache = ShadowKVCache.for_model(model, EVERYTHING)
    except ValueError as error:
        return str(error)
    batch_size = 2
    try:
        expected = _two_turns(model, DynamicCache(config=model.config), batch_size)
    # What stock models cannot do they refuse in many ways.
    except Exception:
        batch_size = 1
        expected = _two_turns(model, DynamicCache(config=model.config), batch_size)
    with cache:
        found = _two_turns(model, cache, batch_size)
    for (tokens, logits), (wanted, wanted_logits) in zip(found, expected, strict=True):
        error = float((logits - wanted_logits).abs().max() / wanted_logits.std())
        assert torch.equal(tokens, wanted), f"other tokens than the stock cache's, logits off by {error:.1e}"
        assert error < TOLERANCE, f"logits off by {error:.1e} of their standard deviation"
    return None


def _two_turns(model: Any, cache: Any, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and logits of both turns."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (batch_size, PROMPT), generator=generator)
    question = torch.randint(2, VOCABULARY, (batch_size, TURN), generator=generator)
    mask = torch.ones_like(ids)
    if batch_size > 1:
        ids[0, :PADDING] = mask[0, :PADDING] = 0
    turns = []
    for num_new in (ANSWER, SECOND_ANSWER):
        output = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        turns.append((output.sequences, torch.stack(output.logits)))
        ids = torch.cat([output.sequences, question], 1)
        mask = torch.cat([mask, mask.new_ones(batch_size, num_new + TURN)], 1)
    return turns


# What is tried of each type: why it is refused, None where it is equal.
COLUMNS: dict[str, Callable[[PreTrainedModel], str | None]] = {"cache": try_cache, "sharing": try_sharing}


def try_types(names: Iterable[str], columns: Iterable[str] = tuple(COLUMNS)) -> dict[str, dict[str, str]]:
    """A row for each type, of these columns."""
    results = {}
    for name in names:
        results[name] = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]}
        if name in NOT_BUILT:
            results[name]["not_built"] = NOT_BUILT[name]
            continue
        for column in columns:
            try:
                reason = COLUMNS[column](tiny_model(name))
            except Exception as error:
                raise AssertionError(f"{name}, {column}: {type(error).__name__}: {error}") from error
            results[name][column] = "equal" if reason is None else "refused"
            if reason is not None:
                results[name][f"{column}_reason"] = reason
    return results


def read_table() -> dict[str, Any]:
    """The committed table."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def render(table: dict[str, Any]) -> str:
    """The list in README: model types by what becomes of them."""
    types = table["types"]
    built = sum("not_built" not in row for row in types.values())
    cached, sharing = (
        [name for name, row in types.items() if row.get(column) == "equal"] for column in ("cache", "sharing")
    )
    text = (
        f"Tested families: of the {len(types)} causal-LM types of transformers {table['transformers']}, "
        f"`make test-families` builds {built} as tiny random models. {len(cached)} give the stock cache's tokens "
        f"where nothing is left out: {', '.join(cached)}. {len(sharing)} give plain rows' logits and gradients under "
        f"`share_prefixes`: the same but {', '.join(name for name in cached if name not in sharing)}, and besides "
        f"{', '.join(name for name in sharing if name not in cached)}. The others are refused before anything runs; "
        "[docs/families.json](docs/families.json) has each one's reason."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def with_list(readme: str, table: dict[str, Any]) -> str:
    """README's text with the list as the table has it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render(table)}\n{END}{after}"


def main() -> None:
    """Tries every type, or those that are named, and writes what became of them."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = sys.argv[1:] or TYPES
    table: dict[str, Any] = {"transformers": transformers.__version__, "types": {}}
    if sys.argv[1:]:
        table = read_table()
    for name in names:
        table["types"] |= try_types([name])
        print(json.dumps({name: table["types"][name]}), flush=True)
    table["types"] = dict(sorted(table["types"].items()))
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    README.write_text(with_list(README.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
