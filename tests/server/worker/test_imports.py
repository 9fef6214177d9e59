from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import importlib.util, sys
sys.path.insert(0, {path!r})
from mball.server.worker import imports
seen = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.generation.utils":
            seen.append(importlib.util.find_spec("sklearn"))
sys.meta_path.insert(0, Watch())
imports.import_all()
import sklearn
print(seen, "mball.server.worker.process" in sys.modules, sklearn.imported)
"""


def test_what_no_worker_uses_is_not_there_while_it_imports_and_can_be_had_later(tmp_path: Path) -> None:
    (tmp_path / "sklearn.py").write_text("imported = True")
    command = [sys.executable, "-c", _PROGRAM.format(path=str(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout == "[None] True True\n", result.stderr[-2000:]
