"""What an adapter is, told by its file alone or together with its base model or another adapter."""
