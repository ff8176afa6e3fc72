"""Talking to a base model and its adapters side by side: in a terminal, on a page, and by the OpenAI protocol."""
