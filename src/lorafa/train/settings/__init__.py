"""The settings of a run, a group a file. Nothing here loads torch: they are read to print help."""
