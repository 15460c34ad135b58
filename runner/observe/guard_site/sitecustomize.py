"""Python runs this when it starts, before any other code: the guard of whoever started it holds
here, too. What was to run in its place runs after it.
"""

import importlib.machinery
import importlib.util
import os
import sys

from runner.observe.network_guard import inherit_guard

inherit_guard()

_HERE = os.path.dirname(os.path.abspath(__file__))
_OTHERS = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _HERE]
_SPEC = importlib.machinery.PathFinder.find_spec("sitecustomize", _OTHERS)
if _SPEC is not None and _SPEC.loader is not None:
    _SPEC.loader.exec_module(importlib.util.module_from_spec(_SPEC))
