"""The data sets that have a name, one a file, each a line of ``lorafa.data.DATASETS``.

What the published ones share stands beside them: their source and what is held out of them in
:mod:`lorafa.data.sets.published`, how their rows become texts in :mod:`lorafa.data.sets.prompts`.
"""
