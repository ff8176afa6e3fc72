"""`python run_exp.py +init=pissa peft.r=8` is `lorafa train +init=pissa peft.r=8`: the published entry script."""

import sys

from lorafa.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
