"""The command line, called within the process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from hesskern.apps import commands


def run(*arguments: object) -> Result:
    """``hesskern ARGUMENTS``."""
    return CliRunner().invoke(commands.hesskern, list(map(str, arguments)))
