"""The script of a worker process; it imports the rest.

Owns how the rest is imported. Invariant: it imports neither the package ``speval`` nor the user's main program, and removes its
modules from ``sys.modules``, so that the function can import the real package. Python compiles a script at each start, so it is
short.
"""

import os
import sys


def main() -> None:
    """Import the loop of the worker process, and run it."""
    path = os.path.abspath(__file__)  # noqa: PTH100 - pathlib takes as long to import as all else
    for name in ("speval.executors.process", "speval.executors", "speval"):
        path = os.path.dirname(path)  # noqa: PTH120
        package = type(sys)(name)
        package.__path__ = [path]
        sys.modules[name] = package
    from speval.executors.process.serve import serve

    for name in [name for name in sys.modules if name.partition(".")[0] == "speval"]:
        del sys.modules[name]
    serve(sys.argv[1], *(int(number) for number in sys.argv[2:]))


if __name__ == "__main__":
    main()
