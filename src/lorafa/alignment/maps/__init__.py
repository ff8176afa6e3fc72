"""Distances between inner states of student and teacher, one a file."""
