"""Training: the chunked loss, the trainer, the recipe. Import them by module; this package itself loads nothing."""
