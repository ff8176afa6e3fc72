"""What a model scores: exact-match accuracy on GSM8K-style problems, and the loss of its answers."""
