"""`peft` by name: after ``import lorafa.compat``, ``import peft`` in the same process gives lorafa's objects.

Nothing is patched: a finder stands first among those that Python asks for modules (``sys.meta_path``), and answers for
`peft` and what is below it.
"""

from lorafa.compat.finder import serve

serve()
