"""`python -m bench list | run TABLE | render | verify`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.record import Record, read_records
from bench.render import PAGE, RESULTS, page_is_current, render_page, render_record
from bench.table import load_table, table_names

USER_ERROR = 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of longshadow.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the tables and what they measure")
    run = commands.add_parser("run", help="measure a table and write its record")
    run.add_argument("table", help="a name from `list`")
    run.add_argument("--quick", action="store_true", help="a small version, for trying; its record is scratch")
    run.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--output", type=Path, help="write the record to this file instead")
    run.add_argument("--fresh", action="store_true", help="measure again what an interrupted run has finished")
    run.add_argument("--commit", help="the commit being measured, where there is no git (or COMMIT)")
    commands.add_parser("render", help="write RESULTS.md from the tracked records")
    commands.add_parser("verify", help="fail when RESULTS.md differs from the tracked records")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 1 for a failed check, 2 for a user's error."""
    options = build_parser().parse_args(arguments)
    try:
        if options.command == "list":
            return list_tables()
        if options.command == "run":
            return run(options)
        if options.command == "render":
            PAGE.write_text(render_page(read_records(RESULTS)), encoding="utf-8")
            return 0
        return verify()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return 130


def list_tables() -> int:
    """Prints every table with its title and devices."""
    for name in table_names():
        table = load_table(name)
        print(f"{name:20} {', '.join(table.configs):10} {table.title}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Measures one table, writes the record and prints it. A failed check hides speed-ups and returns 1."""
    from bench.runner import run_table

    table = load_table(options.table)
    record = run_table(
        table,
        device=options.device,
        quick=options.quick,
        fresh=options.fresh,
        seed=options.seed,
        commit=options.commit,
    )
    path: Path = options.output or record.path(RESULTS)
    record.write(path)
    print(render_record(record, table))
    print(f"record: {path}", file=sys.stderr)
    return exit_status(record)


def exit_status(record: Record) -> int:
    """0 when the record's check is green, otherwise 1."""
    return 0 if record.check.passed else 1


def verify() -> int:
    """Compares RESULTS.md with the records."""
    if page_is_current():
        return 0
    print("bench/RESULTS.md differs from bench/results: run `python -m bench render`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
