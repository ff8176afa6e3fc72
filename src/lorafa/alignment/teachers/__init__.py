"""Teachers of a student: the base, states of the student itself, another model; one a file."""
