"""Tables, plots and pages of runs. Reads run directories only; loads no model."""
