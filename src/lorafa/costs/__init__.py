"""What an adapter costs, counted before any training."""
