"""What scripts written for other libraries expect to find."""
