"""``python -m hesskern``."""

from hesskern.apps.cli import main

if __name__ == "__main__":
    main()
