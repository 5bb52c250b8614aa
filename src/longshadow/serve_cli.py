"""`longshadow serve`: the engine behind an OpenAI-compatible interface. Nothing heavy is imported up here."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from longshadow.cli_common import DType, log_to_stderr, torch_dtype, user_errors
from longshadow.env import API_KEY_VARIABLE
from longshadow.paths import check_output_folder
from longshadow.shadowkv_options import Budget, KeyFormat, Rank, ValueFormat, check_model, shadowkv_config
from longshadow.sizes import UNITS_HELP

LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str, typer.Argument(help="Hub id, folder, FILE.gguf, or `demo` (SmolLM2-135M-Instruct).")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_VARIABLE,
            show_envvar=True,
            help="Key that clients must send. Others on this machine see an option; the variable they do not.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter to add, such as a compensation.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the model is called. Default: as given, or its folder.")
    ] = None,
    document: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to read at the start; give it several times for several.")
    ] = None,
    documents_dir: Annotated[
        Path | None, typer.Option(help="Folder where documents are saved, and loaded from at the start.")
    ] = None,
    budget: Budget = None,
    rank: Rank = None,
    key_dtype: KeyFormat = None,
    value_dtype: ValueFormat = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that run at once.")] = 8,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of document, prompt and answer together. Default: the model's.")
    ] = None,
    default_max_tokens: Annotated[
        int | None, typer.Option(help="Of a chat answer whose request does not say. Default: the rest of the context.")
    ] = None,
    max_num_waiting: Annotated[int, typer.Option(help="Requests that may wait; further ones get status 429.")] = 256,
    device_memory: Annotated[
        str, typer.Option(help=f"For caches on the device: a size ({UNITS_HELP}), or a share of what is free.")
    ] = "90%",
    host_memory: Annotated[
        str | None, typer.Option(help="The same for caches in host memory. Default: 90%; on a CPU --device-memory's.")
    ] = None,
    max_body_mb: Annotated[int, typer.Option(help="Largest request body in MiB; larger ones get status 413.")] = 32,
    max_connections: Annotated[
        int, typer.Option(help="Clients connected at once; fewer where the limit of open files (ulimit -n) is lower.")
    ] = 1024,
    request_seconds: Annotated[float, typer.Option(help="Longest request; then it gets status 503.")] = 600.0,
    grace_seconds: Annotated[float, typer.Option(help="For open requests to finish when the server stops.")] = 30.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if any.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, as stored on a GPU.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Serve a model to OpenAI clients, with long documents that many questions share, and a page for browsers.

    Ctrl-C or SIGTERM stops it: open requests are finished, or after the grace time failed.
    """
    with user_errors(debug):
        log_to_stderr()
        require_libraries()

        from longshadow.compress.adapters.reading import read_adapter
        from longshadow.engine.runtime.limits import check_limits
        from longshadow.engine.serving.settings import MEBIBYTE, ServingSettings
        from longshadow.prompts import read_document

        if documents_dir is not None:
            documents_dir = check_output_folder(documents_dir, "--documents-dir")
        settings = ServingSettings(
            model_name=name or served_name(model),
            host=host,
            port=port,
            api_key=api_key or None,
            max_body_bytes=max_body_mb * MEBIBYTE,
            max_connections=max_connections,
            default_max_tokens=default_max_tokens,
            request_seconds=request_seconds,
            grace_seconds=grace_seconds,
            documents_dir=documents_dir,
        )
        check_limits(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_waiting=max_num_waiting,
            device_memory=device_memory,
            host_memory=host_memory,
        )
        shadow = shadowkv_config(budget, rank, key_dtype, value_dtype)
        if adapter is not None:
            read_adapter(adapter)  # raises for what is none, before the model is loaded
        texts = [(path, read_document(str(path))) for path in document or ()]

        from longshadow.engine.runtime import LLM
        from longshadow.engine.serving.application import make_service
        from longshadow.engine.serving.server import bound_socket, run
        from longshadow.models import load_model

        with bound_socket(settings) as bound:
            check_model(model, shadow, max_model_len)
            loaded = load_model(model, dtype=torch_dtype(dtype), device=device)
            llm = LLM(
                loaded.model,
                tokenizer=loaded.tokenizer,
                adapter=None if adapter is None else str(adapter),
                shadowkv=shadow,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_waiting=max_num_waiting,
                device_memory=device_memory,
                host_memory=host_memory,
            )
            with llm:
                service = make_service(llm, settings)
                service.documents.load_saved()
                for path, text in texts:
                    service.documents.add_file(path, text)
                if not settings.is_local and settings.api_key is None:
                    print(f"warning: without an API key whoever reaches {host} can use this model", file=sys.stderr)
                run(service, bound)


def require_libraries() -> None:
    """Raises `ValueError` where the extra `serve` is not installed."""
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        names = ", ".join(missing).replace("_", "-")
        raise ValueError(f"serving needs {names}; install them with `pip install 'longshadow[serve]'`")


def served_name(model: str) -> str:
    """What clients call a model: the name of its folder or file, otherwise what it was asked for by."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
