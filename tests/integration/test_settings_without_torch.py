"""Nothing that is read for help loads torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorafa
from toys.places import ROOT

EARLIER = ROOT / "docs/results/optimizers/lora_fa-exact/lr-0.002-seed-0"
"""A run that an earlier version has recorded."""

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
        f"from lorafa.runs.record import RunDirectory; RunDirectory.open({str(EARLIER)!r}).settings()",
    ],
)
def test_settings_and_their_help_are_read_without_torch(statement: str) -> None:
    code = STUB.format(path=str(Path(lorafa.__file__).parent), statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_report_of_a_run_is_written_without_torch(tmp_path: Path) -> None:
    shutil.copytree(EARLIER, tmp_path / "run")
    code = (
        "import sys; from lorafa.cli.main import main; "
        "code = main(['report', sys.argv[1]]); print(code, *{'torch', 'transformers'} & set(sys.modules))"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
