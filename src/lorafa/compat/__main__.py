"""``python -m lorafa.compat script.py ...``: a script that imports `peft`, with lorafa's objects."""

import sys

from lorafa.compat.script import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
