"""What a worker process is started with: the script that imports the rest.

Owns how the rest is imported. Invariant: neither the package nor the user's main program is, and no trace is left of what is
imported here: the function may import the real package. A script is compiled at each start, so this one is short.
"""

import os
import sys


def main() -> None:
    """Import what serves, and let it serve."""
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
