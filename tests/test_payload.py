"""What the function refers to means the same in a worker process as where it was written."""

import functools
import importlib.machinery
import importlib.util
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import unittest.mock
import zipapp
from pathlib import Path
from typing import Any

import pytest

from speval import FunctionError, speval
from speval.executors.importable import FreshInterpreter
from speval.executors.payload import pickled

from .conftest import Scripts

# A name that means another file there

MODEL = """
OF = {!r}
class Odd(Exception):
    pass
class Model:
    def of(self):
        return OF
def function(args):
    if args == 2:
        raise Odd
    return [OF, Model().of()]
"""

ASK = """
from speval import speval, load_evals
by_attribute = lambda args: [model.OF, model.Model().of()]
def by_body(args):
    return function(args)
model, function = found, found.function
for i, f in enumerate([function, by_attribute, by_body]):
    speval(f, [1], f"{i}.db", executor="process", progress=False)
    evaluation = load_evals(f"{i}.db")[0]
    print(evaluation["result"] or evaluation["error"])
speval(function, [2], "runs.db", executor="process", progress=False, retry_on=model.Odd, max_attempts=2, backoff=0)
print(load_evals("runs.db")[0]["attempts"])
"""

BY_PATH = """
import importlib.util, sys
def load(path):
    spec = importlib.util.spec_from_file_location("model", path)
    sys.modules["model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""

TEMPORARY = """
import sys
sys.path.insert(0, "lib")
import model as found
sys.path.remove("lib")
"""

FINDER = """
import importlib.util, sys
class Finder:
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_file_location(name, "lib/model.py") if name == "model" else None
sys.meta_path.insert(0, Finder())
import model as found
"""

HOOK = """
import importlib.machinery, os, sys
def hook(entry):
    if entry != "the lib":
        raise ImportError
    loader = importlib.machinery.SourceFileLoader, [".py"]
    class Finder(importlib.machinery.FileFinder):
        pass
    return Finder(os.path.abspath("lib"), loader)
sys.path_hooks.insert(0, hook)
sys.path.insert(0, "the lib")
import model as found
"""


def write_models(scripts: Scripts) -> None:
    (scripts.folder / "lib").mkdir()
    scripts.write(MODEL.format("lib"), "lib/model.py")
    scripts.write(MODEL.format("decoy"), "model.py")


@pytest.mark.parametrize(
    "how",
    [
        BY_PATH + "found = load('lib/model.py')",
        BY_PATH + "found = load('lib/model.py')\nload('model.py')",
        BY_PATH + "found = load('lib/model.py')\ndel sys.modules['model']",
        TEMPORARY,
        FINDER,
        HOOK,
    ],
    ids=["by path", "two versions", "forgotten", "temporary entry", "finder", "path hook"],
)
def test_what_another_file_would_be_in_a_worker_goes_by_value(scripts: Scripts, how):
    write_models(scripts)
    done = scripts.run(how + ASK)
    assert done.stdout == "['lib', 'lib']\n" * 3 + "2\n", done.stderr


def test_it_goes_by_value_to_the_pool_of_others_too(scripts: Scripts):
    write_models(scripts)
    done = scripts.run(
        TEMPORARY
        + """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from speval import speval, load_evals
        if __name__ == "__main__":
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                speval(found.function, [1], "runs.db", executor=pool, progress=False)
            print(load_evals("runs.db")[0]["result"])
        """.replace("\n        ", "\n")
    )
    assert done.stdout == "['lib', 'lib']\n", done.stderr


def test_modules_by_value_that_refer_to_each_other_travel(scripts: Scripts):
    (scripts.folder / "lib" / "package").mkdir(parents=True)
    scripts.write("from . import left, right\nOF = 'package'", "lib/package/__init__.py")
    scripts.write("import package\nfrom . import right\nONE = 1", "lib/package/left.py")
    scripts.write("import package\nfrom . import left\ndef two(): return left.ONE + 1", "lib/package/right.py")
    done = scripts.run(
        """
        import sys
        sys.path.insert(0, "lib")
        import package
        del sys.path[0]
        from speval import speval, load_evals
        speval(lambda args: [package.OF, package.right.two(), package.left.right.left.ONE], [1], "runs.db", executor="process")
        print(load_evals("runs.db")[0]["result"])
        """
    )
    assert done.stdout == "['package', 2, 1]\n", done.stderr


def test_an_import_in_the_body_that_would_bring_another_file_is_refused(scripts: Scripts):
    write_models(scripts)
    done = scripts.run(
        TEMPORARY
        + """
from speval import speval
def function(args):
    import model
    return model.OF
speval(function, [1], "runs.db", executor="process")
"""
    )
    assert "FunctionError: function can't run in worker processes: the module 'model' is imported in the body of" in done.stderr
    assert f"lib/model.py, and a fresh interpreter finds another one, from {scripts.folder}/model.py." in done.stderr
    assert "Keep its folder in sys.path" in done.stderr
    assert not (scripts.folder / "runs.db").exists()


def test_also_a_relative_or_nested_import_in_a_body_is_refused_if_it_would_bring_another_file(scripts: Scripts):
    for folder in ("lib/pack", "pack"):
        (scripts.folder / folder).mkdir(parents=True)
        scripts.write("", f"{folder}/__init__.py")
        for name in ("other", "later"):
            scripts.write(f"OF = {folder!r}", f"{folder}/{name}.py")
    scripts.write(
        """
        def relative(args):
            from .other import OF
        def sibling(args):
            from . import other
        def dotted(args):
            import pack.other
        def not_loaded_yet(args):
            from .later import OF
        def nested(args):
            def inner():
                from pack.other import OF
        def harmless(args):
            import json, os.path
            from collections import abc
        """,
        "lib/pack/sub.py",
    )
    done = scripts.run(
        """
        import sys
        sys.path.insert(0, "lib")
        import pack.other, pack.sub
        del sys.path[0]
        from speval import FunctionError
        from speval.executors.payload import pickled
        for name, function in vars(pack.sub).items():
            if callable(function):
                try:
                    pickled(function, ())
                    print(name, "goes")
                except FunctionError as error:
                    print(name, f"imported in the body of {name}" in str(error))
        """
    )
    names = ["relative", "sibling", "dotted", "not_loaded_yet", "nested"]
    assert done.stdout.splitlines() == [*(f"{name} True" for name in names), "harmless goes"], done.stderr


def extension() -> Path:
    """Return an extension of the standard library that is a file."""
    for name in ("_bisect", "_heapq", "_queue", "_statistics", "_zoneinfo", "_asyncio"):
        spec = importlib.util.find_spec(name)
        if spec is not None and str(spec.origin).endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
            return Path(str(spec.origin))
    pytest.skip("this Python has its extensions built in")


def test_a_compiled_module_from_elsewhere_is_refused_with_its_file_and_what_to_do(scripts: Scripts):
    file = extension()
    (scripts.folder / "lib").mkdir()
    shutil.copy(file, scripts.folder / "lib")
    name = file.name.partition(".")[0]
    done = scripts.run(
        f"""
        import importlib.util, sys
        sys.modules.pop({name!r}, None)
        spec = importlib.util.spec_from_file_location({name!r}, {str(scripts.folder / "lib" / file.name)!r})
        sys.modules[{name!r}] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        compiled = next(value for value in vars(module).values() if type(value) is type(len) or type(value) is type)
        from speval import FunctionError, speval
        for function in (lambda args: str(module), lambda args: str(compiled)):
            try:
                speval(function, [1], "runs.db", executor="process")
            except FunctionError as error:
                print(error)
        """
    )
    problem = f"the module {name!r} is a compiled module, which can't be pickled: here it is from"
    assert done.stdout.count(problem) == 2, done.stderr
    assert done.stdout.count("Keep its folder in sys.path") == 2
    assert str(scripts.folder / "lib" / file.name) in done.stdout


# A name that means the same file there

SITE = """
import importlib.machinery, importlib.util, sys
SIGN = "__editable__.acme.finder.__path_hook__"
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {folder!r} + "/src/flat.py") if name == "flat" else None
class InNamespace:
    @staticmethod
    def find_spec(name, target=None):
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [{folder!r} + "/src/acme"]
        return spec if name == "acme" else None
def hook(entry):
    if entry != SIGN:
        raise ImportError
    return InNamespace
sys.meta_path.append(Finder)
sys.path_hooks.append(hook)
sys.path.append(SIGN)
"""


def test_what_finders_of_the_site_find_goes_by_name_and_is_imported(scripts: Scripts, monkeypatch):
    # As setuptools does for editable installs, flat ones and those in a namespace.
    (scripts.folder / "src" / "acme").mkdir(parents=True)
    (scripts.folder / "site").mkdir()
    for name in ("flat.py", "acme/tools.py"):
        scripts.write("import sys\ndef g(a): return [a, vars(sys.modules[__name__]) is globals()]", f"src/{name}")
    scripts.write(SITE.format(folder=str(scripts.folder)), "site/sitecustomize.py")
    monkeypatch.setenv("PYTHONPATH", str(scripts.folder / "site"))
    done = scripts.run(
        """
        import flat, acme.tools
        from speval import speval, load_evals
        def inside(args):
            import acme.tools
            return acme.tools.g(args)
        for i, f in enumerate([flat.g, acme.tools.g, lambda a: flat.g(a), lambda a: acme.tools.g(a), inside]):
            speval(f, [1], f"{i}.db", executor="process", progress=False)
            evaluation = load_evals(f"{i}.db")[0]
            print(evaluation["result"] or evaluation["error"])
        """
    )
    assert done.stdout == "[1, True]\n" * 5, done.stderr


IN_A_PACKAGE = """
from speval import speval, load_evals
from . import helper
def function(args):
    from . import helper as again
    return [helper.twice(args), again is helper, helper.__name__]
if __name__ == "__main__":
    speval(function, [1], "runs.db", executor="process", progress=False)
    print(load_evals("runs.db")[0]["result"])
"""


@pytest.mark.parametrize("kind", ["module", "zip"])
def test_a_program_run_as_a_module_or_from_a_zip_works(scripts: Scripts, kind):
    package = scripts.folder / "source" / "package"
    package.mkdir(parents=True)
    scripts.write("", "source/package/__init__.py")
    scripts.write("def twice(args): return 2 * args", "source/package/helper.py")
    scripts.write(IN_A_PACKAGE, "source/package/program.py")
    if kind == "zip":
        scripts.write(
            "import runpy\nrunpy.run_module('package.program', run_name='__main__', alter_sys=True)", "source/__main__.py"
        )
        zipapp.create_archive(scripts.folder / "source", scripts.folder / "app.pyz")
        command, folder = ["app.pyz"], scripts.folder
    else:
        command, folder = ["-m", "package.program"], scripts.folder / "source"
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[2, True, 'package.helper']\n", done.stderr


def test_what_packages_and_the_standard_library_bring_goes_by_name():
    import collections.abc  # noqa: F401
    import concurrent.futures.thread  # noqa: F401
    import os.path  # noqa: F401
    import xml.etree.ElementTree  # noqa: F401

    import numpy.linalg
    import pandas
    import scipy.optimize  # noqa: F401

    fresh = FreshInterpreter()
    ours = {"numpy", "pandas", "scipy", "speval", "os", "collections", "xml", "concurrent", "json", "functools"}
    names = [name for name, module in list(sys.modules.items()) if module is not None and name.partition(".")[0] in ours]
    assert len(names) > 500
    assert [name for name in names if not fresh.imports(name)] == []
    assert numpy.linalg
    assert pandas


def test_a_module_that_says_it_has_another_name_goes_by_the_one_it_is_imported_by():
    import _collections_abc
    import _decimal
    import _io

    for module in (_collections_abc, _decimal, _io):
        (function, _), size = pickle.loads(body := pickled(lambda args: module, ())), len(body)
        assert function(None) is module
        assert size < 1000


def test_what_a_package_adds_to_its_own_path_goes_by_name_and_what_a_script_adds_by_value(scripts: Scripts):
    for folder in ("own", "other", "extra"):
        (scripts.folder / folder).mkdir()
    scripts.write("import os\n__path__.append(os.path.abspath('extra'))", "own/__init__.py")
    scripts.write("", "other/__init__.py")
    for name in ("first", "second"):
        scripts.write("import sys\ndef g(a): return vars(sys.modules.get(__name__)) is globals()", f"extra/{name}.py")
    done = scripts.run(
        """
        import other, os
        other.__path__.append(os.path.abspath("extra"))
        import own.first, other.second
        from speval.executors.importable import FreshInterpreter
        fresh = FreshInterpreter()
        print(fresh.imports("own.first"), fresh.imports("other.second"))
        """
    )
    assert done.stdout == "True False\n", done.stderr


def test_another_module_under_a_name_goes_by_name_if_the_package_has_put_it_there(scripts: Scripts):
    for folder in ("own", "other"):
        (scripts.folder / folder).mkdir()
        scripts.write("", f"{folder}/model.py")
    scripts.write("", "actual.py")
    scripts.write("import sys, actual\nsys.modules['own.model'] = actual", "own/__init__.py")
    scripts.write("", "other/__init__.py")
    done = scripts.run(
        """
        import own.model, other, sys
        sys.modules["other.model"] = sys.modules["actual"]
        from speval.executors.importable import FreshInterpreter
        fresh = FreshInterpreter()
        print(fresh.imports("actual"), fresh.imports("own.model"), fresh.imports("other.model"))
        """
    )
    assert done.stdout == "True True False\n", done.stderr


NAMED = """
from typing import NewType, ParamSpec
class _Missing:
    def __reduce__(self):
        return "MISSING"
MISSING, Id, P = _Missing(), NewType("Id", int), ParamSpec("P")
MISSING.of = {!r}
def function(args, missing=MISSING):
    return [missing.of, missing is MISSING, Id(args), P.__name__]
"""


@pytest.mark.parametrize("name", ["model", "__main__"])
def test_what_goes_by_its_own_name_goes_by_value_where_that_means_another_one(scripts: Scripts, name):
    (scripts.folder / "first").mkdir()
    scripts.write(NAMED.format("first"), "first/model.py")
    scripts.write(NAMED.format("second"), "model.py")
    load = NAMED.format("first") if name == "__main__" else BY_PATH + "\nfunction = load('first/model.py').function"
    ask = "speval(function, [1], 'runs.db', executor='process', progress=False)\nprint(load_evals('runs.db')[0]['result'])"
    done = scripts.run(f"from speval import load_evals, speval\n{load}\n{ask}")
    assert done.stdout == "['first', True, 1, 'P']\n", done.stderr


# What needs care on its way


@pytest.mark.parametrize("method", [str.upper, str.__len__, object.__init__])
def test_a_method_of_a_built_in_class_travels(method):
    function, _ = pickle.loads(pickled(lambda args: method, ()))
    assert function(None) == method


def test_a_function_without_a_module_is_not_looked_up_where_it_was_found(scripts: Scripts):
    done = scripts.run(
        """
        import sys, types
        from speval import load_evals, speval
        made = types.ModuleType("made")
        source = "from dataclasses import dataclass\\n@dataclass\\nclass Point:\\n    x: int"
        exec(source, vars(made))  # before it is in sys.modules: what dataclass makes has no module
        sys.modules["made"] = made
        speval(lambda args: made.Point(args) == made.Point(1), [1], "runs.db", executor="process", progress=False)
        print(load_evals("runs.db")[0]["result"])
        """
    )
    assert done.stdout == "True\n", done.stderr


def test_what_functools_makes_of_functions_and_methods_travels(scripts: Scripts):
    done = scripts.run(
        """
        import functools
        from speval import speval, load_evals
        class Study:
            def __init__(self, n): self.n = n
            @functools.cached_property
            def table(self): return list(range(self.n))
            @functools.singledispatchmethod
            def kind(self, x): return "any"
            @kind.register
            def _(self, x: int): return "int"
        @functools.singledispatch
        def depth(x): return 0
        @depth.register
        def _(x: list): return 1 + depth(x[0])
        def function(args):
            study = Study(args)
            return [study.table, study.table is study.table, study.kind(1), study.kind(""), depth([[1]])]
        Study(1).table, depth([1]), Study(1).kind(1)
        speval(function, [2], "runs.db", executor="process", progress=False)
        print([e["result"] or e["error"]["traceback"] for e in load_evals("runs.db")])
        """
    )
    assert done.stdout == "[[[0, 1], True, 'int', 'any', 2]]\n", done.stderr


BY_NAME = """
import multiprocessing, pickle
from speval import speval, load_evals
class Model:
    def __init__(self, x): self.x = x
def square(x): return x * x
def function(args):
    found = pickle.loads(pickle.dumps(Model(args))).x
    if args in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context(args).Pool(1) as pool:
            found = pool.map(square, [3])
    return found
"""


def test_what_is_pickled_by_name_over_there_is_found_in_its_main_module(scripts: Scripts):
    run = "speval(function, [1, 'fork', 'spawn'], 'runs.db', concurrency=3, progress=False)\n"
    show = "print([e['result'] or e['error'] for e in load_evals('runs.db')])"
    done = scripts.run(f"{BY_NAME}\nif __name__ == '__main__':\n    {run}    {show}")
    assert done.stdout == "[1, [9], [9]]\n", done.stderr
    # Without the guard, processes that are spawned over there must not run the script again.
    done = scripts.run(f"print('top level'){BY_NAME}import math\nsquare = math.fabs\n{run}{show}".replace("runs.db", "2.db"))
    assert done.stdout == "top level\n[1, [3.0], [3.0]]\n", done.stderr


def test_a_proxy_of_a_manager_takes_its_key_along(db):
    with multiprocessing.get_context("spawn").Manager() as manager:
        queue, lock = manager.Queue(), manager.Lock()

        def function(args):
            with lock:
                queue.put(args)

        assert speval(function, [1, 2], db, executor="process").completed == 2
        assert sorted([queue.get(), queue.get()]) == [1, 2]


class Circle:
    def __init__(self):
        self.func = self

    def __call__(self, args):
        return args


class Everything:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Everything()

    def __call__(self, args):
        return args


class Liar(Circle):
    __class__ = property(lambda self: functools.partial)


@pytest.mark.parametrize("executor", ["thread", "process", "coroutine"])
@pytest.mark.parametrize(
    "make",
    [Circle, Everything, Liar, lambda: unittest.mock.Mock(return_value=1), lambda: unittest.mock.MagicMock(return_value=1)],
)
def test_a_callable_with_odd_attributes_ends(db, make, executor):
    function = make()
    if executor == "process" and type(function) is Liar:
        with pytest.raises(FunctionError, match="Liar can't run in worker processes"):
            speval(function, [1, 2], db, executor=executor)
        return
    summary = speval(function, [1, 2], db, executor=executor, max_attempts=1, progress=False)
    assert summary.completed + summary.failed == 2


def test_partials_in_a_circle_are_refused_or_fail(db):
    circle: Any = functools.partial(len)
    circle.__setstate__((circle, (), {}, {}))
    try:
        with pytest.raises(FunctionError):
            speval(circle, [1], db, executor="process")
    finally:
        circle.__setstate__((len, (), {}, {}))
