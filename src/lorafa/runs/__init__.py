"""A run is a directory: what was asked, where it ran, what was measured, what came out."""
