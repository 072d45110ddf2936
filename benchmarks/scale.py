"""Many ranks on paper, and what of it can be counted or timed on one machine.

python benchmarks/scale.py tables       # docs/scale.md: bytes and times from shapes
python benchmarks/scale.py messages     # what calls send in a group of 1,024 equal ranks
python benchmarks/scale.py processes    # 1, 2 and 4 gloo processes on this machine
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
from scale_messages import messages
from scale_processes import processes
from scale_tables import tables


@click.group()
def main() -> None:
    """Bytes, messages and times of passes on many ranks."""


@main.command("tables")
def tables_command() -> None:
    """Tables of docs/scale.md."""
    click.echo("\n\n".join(tables()))


@main.command("messages")
def messages_command() -> None:
    """Messages and bytes of calls in groups of up to 1,024 ranks, in one process."""
    click.echo(messages())


@main.command("processes")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--quick", is_flag=True, help="Few samples: does it run.")
def processes_command(repeats: int, quick: bool) -> None:
    """Strong and weak scaling of factors on 1, 2 and 4 gloo processes of this machine."""
    click.echo(processes(repeats, 512) if quick else processes(repeats))


if __name__ == "__main__":
    main()
