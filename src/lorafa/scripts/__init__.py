"""The scripts that published commands call: their keys and defaults, and what each of them means here."""
