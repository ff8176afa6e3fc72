"""Divergences of the student's distribution over the next token from the teacher's, one a file."""
