"""llama.cpp, read in November 2026.

llama_adapter_lora_init_impl (src/llama-adapter.cpp) refuses a tensor that the base's file does not have, such as that
of a head which is the embedding, and one of another shape. It has no other pieces of adapters than pairs of factors,
whose ranks may differ.
"""

from shlex import quote
from typing import TYPE_CHECKING

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes.answers import Answer, no, not_known, yes

if TYPE_CHECKING:
    from longshadow.compress.adapters.bases import Base


def llama_cpp_answer(adapter: Adapter, base: "Base") -> Answer:
    """Asks our own export, which writes no file that llama.cpp would refuse."""
    from longshadow.compress.adapters.gguf_export import UnknownArchitecture, tensor_names

    if adapter.oddities:
        return no(adapter.oddities[0].meaning)
    if base.method not in ("gguf", "dense"):
        return not_known(
            f"llama.cpp runs GGUF files, and what its converter makes of a {base.method} model is not known"
        )
    try:
        tensor_names(adapter, base)
    except UnknownArchitecture as error:
        return not_known(str(error))
    except ValueError as error:
        return no(str(error))
    model, folder = quote(base.name) if base.method == "gguf" else "BASE.gguf", quote(str(adapter.folder))
    export = f"longshadow adapter export {folder} --to gguf --output adapter.gguf --base {quote(base.name)}"
    converted = "" if base.method == "gguf" else "convert the base to BASE.gguf, "
    return yes(f"{converted}{export}, llama-server -m {model} --lora adapter.gguf")
