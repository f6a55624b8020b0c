"""python -m dgc: the commands plan and doctor."""

import sys

from dgc.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
