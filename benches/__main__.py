"""``python -m benches kernels``: the same as ``fastdit bench kernels``."""

import sys

from fastdit.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
