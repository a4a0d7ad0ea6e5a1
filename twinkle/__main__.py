"""``python -m twinkle``."""

from __future__ import annotations

import sys

from twinkle.cli import main

if __name__ == "__main__":
    sys.exit(main())
