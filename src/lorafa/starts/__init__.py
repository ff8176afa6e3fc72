"""A start from data as the user sees it: statistics, ranks, step size, and PEFT's functions for it."""
