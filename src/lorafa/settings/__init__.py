"""Settings as they are written: checked values, typed classes made of plain mappings, and what sources declare."""
