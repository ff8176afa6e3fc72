"""Settings are composed wherever Hydra is in use already: inside ``hydra.main``, in several threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorafa.conf.compose import compose

SCRIPT = """
import hydra
from hydra.core.hydra_config import HydraConfig
from lorafa.conf.compose import compose

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    name = HydraConfig.get().job.name
    assert compose(["peft.r=3"]).peft.r == 3
    assert HydraConfig.get().job.name == name
    print("composed")

main()
"""


def test_threads_compose_at_the_same_time() -> None:
    with ThreadPoolExecutor(4) as pool:
        ranks = list(pool.map(lambda r: compose([f"peft.r={r}"]).peft.r, range(1, 9)))
    assert ranks == list(range(1, 9))


def test_a_script_of_hydra_composes_a_run_and_keeps_its_own_settings(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "hydra.run.dir=."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "composed\n", done.stderr
