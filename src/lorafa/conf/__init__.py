"""The configs that ship with the package, and the way from `key=value` to a checked `RunConfig`."""
