"""``python -m shop orders|payments|inventory|shipping``: serve one service of the shop."""

import sys

from shop.server import main

if __name__ == "__main__":
    sys.exit(main())
