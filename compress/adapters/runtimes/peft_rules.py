"""PEFT, read in version 0.21."""

from typing import TYPE_CHECKING

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes.answers import Answer, not_known, yes

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base

# Those that LoraModel._create_new_module has dispatchers for (tuners/lora/model.py); transformers makes a GGUF file's
# blocks dense.
METHODS = {
    "aqlm", "auto-round", "awq", "bitsandbytes", "dense", "eetq", "gguf", "gptq", "hqq", "inc", "torchao",
}  # fmt: skip


def peft_answer(adapter: Adapter, base: "Base") -> Answer:
    """PEFT wraps the modules by their names in transformers, whatever the architecture is."""
    call = f'PeftModel.from_pretrained(model, "{adapter.folder}", autocast_adapter_dtype=False)'
    if base.method in METHODS:
        return yes(f"{call}; without the last argument a 16-bit adapter takes twice its size")
    return not_known(f"PEFT has no layer of its own for {base.method}; its default one may do: {call}")
