"""The published evaluation script: `python eval_gsm8k.py --wandb_name=<run>`."""

import sys

from lorafa.scripts.eval_gsm8k import main

if __name__ == "__main__":
    sys.exit(main())
