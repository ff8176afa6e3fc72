"""Training: the recipe, the trainer, checkpoints, and the settings of a run. This file loads none of them."""
