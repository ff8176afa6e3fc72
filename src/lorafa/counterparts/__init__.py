"""What scripts call by PEFT's names and lorafa has no other use for: one subject a file.

The table of :mod:`lorafa.compat` says which name is where. Nothing here is part of lorafa's public face.
"""
