"""Nothing that is read for help loads torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lorafa

STUB = """
import sys, types
package = types.ModuleType("lorafa")
package.__path__ = [{path!r}]
sys.modules["lorafa"] = package  # without what the package itself imports
{statement}
print(*sorted({{"torch", "transformers", "datasets", "accelerate"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import lorafa.train.settings.run",
        "import lorafa.conf.compose",
        "from lorafa.cli.settings import settings_help; assert 'optim.algorithm=exact' in settings_help()",
        "from lorafa.models import MODELS; MODELS.get('smollm2-135m')",
        "from lorafa.data import data_set_of; data_set_of('a/b')",
    ],
)
def test_settings_and_their_help_are_read_without_torch(statement: str) -> None:
    code = STUB.format(path=str(Path(lorafa.__file__).parent), statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
