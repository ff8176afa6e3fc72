"""Rows, samples, batches and models to train on.

``sources.load_records`` -> ``chat.encode_all`` -> ``collate.Collator``; ``models.load_model`` for the model.
"""
