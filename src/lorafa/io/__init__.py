"""Adapter files: written whole, read strictly, checked against the base they were made for."""
