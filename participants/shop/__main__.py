"""``python -m shop NAME``: serve one service of the shop, or one branch of its bank."""

import sys

from shop.server import main

if __name__ == "__main__":
    sys.exit(main())
