"""Nothing that comes from outside is ever unpickled (fault 13)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mball

SOURCES = sorted(Path(mball.__file__).parent.rglob("*.py"))
MODULES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
CALLS = frozenset({"torch.load", "numpy.load", "np.load", "yaml.load", "multiprocessing.connection.Client"})


def _unsafe(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [node.module] if node.module.split(".")[0] in MODULES else []
        elif isinstance(node, ast.Attribute) and (node.attr == "recv_pyobj" or ast.unparse(node) in CALLS):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("source", ["import pickle", "from pickle import loads", "x = torch.load(y)", "s.recv_pyobj()"])
def test_it_would_be_found(source: str) -> None:
    assert _unsafe(ast.parse(source))


def test_no_source_of_ours_unpickles() -> None:
    assert len(SOURCES) > 100
    assert {str(path): found for path in SOURCES if (found := _unsafe(ast.parse(path.read_text())))} == {}
