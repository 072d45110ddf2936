"""``python -m hesskern``."""

from hesskern.cli import main

if __name__ == "__main__":
    main()
