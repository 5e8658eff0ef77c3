"""``python -m aiovm``."""

from aiovm.cli import main

if __name__ == "__main__":
    main()
