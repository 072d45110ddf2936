"""The ``hesskern`` command: says what is missing, or hands over to its subcommands."""

from __future__ import annotations

import importlib.util
import sys

from hesskern import interrupts

__all__ = ["main", "missing_packages"]

# Module name -> package name of everything the cli extra brings.
_NEEDED = {
    "click": "click",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "sklearn": "scikit-learn",
}


def missing_packages() -> list[str]:
    """Packages of the ``cli`` extra that are not installed."""
    return [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]


def main() -> None:
    """Entry point of the console script."""
    if missing := missing_packages():
        raise SystemExit(
            f"hesskern's command line needs {', '.join(missing)}. Install what it uses with\n"
            '    pip install "hesskern[cli]"'
        )
    interrupts.watch()
    try:
        from hesskern.apps.commands import hesskern
        from hesskern.apps.processes import one_voice

        with one_voice():
            hesskern(prog_name="hesskern")
    except KeyboardInterrupt:
        # Outside a command (e.g. while torch is being imported) there is nothing to clean up.
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
