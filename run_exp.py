"""The published entry script: `python run_exp.py ++dataset_name=meta_math +init=gradient +peft=qv ++peft.lora_r=8`."""

import sys

from lorafa.scripts.run_exp import main

if __name__ == "__main__":
    sys.exit(main())
