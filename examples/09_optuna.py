"""Let Optuna choose the next args from the results so far; start it in several terminals, and the copies share one study.

Shows:
    An adaptive space: a generator that speval polls for the next evaluation when a slot is idle. It reports the results of all
    copies to the study, and asks the study for the next args. The number of the trial is the name.

    The study contains Optuna's knowledge, the database the evaluations. If a copy dies, the others evaluate what it has
    proposed. A trial that it had not yet proposed is missing, but every result is kept.

Run:
    $ pip install optuna
    $ python examples/09_optuna.py &
    $ python examples/09_optuna.py

    The database is the first argument, by default 09_optuna.db in the current folder; the study is beside it, in a file with
    .journal at its end. Delete both to start again.

Prints:
    best of 80: 0.0007 at {'x': 3.0259, 'y': -1.9914}
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from speval import Evaluation, load_evals, speval

TRIALS = 80
Args = dict[str, float]


def distance(args: Args) -> float:
    """Return what is to be as small as can be; some day it takes an hour."""
    return (args["x"] - 3) ** 2 + (args["y"] + 2) ** 2


def tell(e: Evaluation) -> None:
    """Tell the study of an evaluation that has ended, unless another copy has done so."""
    with suppress(UpdateFinishedTrialError):  # one does so at this moment
        if e["status"] == "completed":
            study.tell(int(e["name"]), e["result"], skip_if_finished=True)
        else:
            study.tell(int(e["name"]), state=TrialState.FAIL, skip_if_finished=True)


def propose(ended: Callable[[], list[Evaluation]]) -> Iterator[tuple[str, Args]]:
    """Yield names and args until there are enough, each chosen when it is needed."""
    while True:
        for e in ended():
            tell(e)
        trial = study.ask()
        if trial.number >= TRIALS:
            study.tell(trial, state=TrialState.FAIL)  # the copies together have asked for enough
            return
        yield str(trial.number), {"x": trial.suggest_float("x", -10, 10), "y": trial.suggest_float("y", -10, 10)}


db = sys.argv[1] if len(sys.argv) > 1 else "09_optuna.db"
optuna.logging.set_verbosity(optuna.logging.WARNING)
storage = JournalStorage(JournalFileBackend(f"{db}.journal"))
study = optuna.create_study(study_name="distance", storage=storage, load_if_exists=True)

speval(distance, propose, db, progress=False)
for e in load_evals(db):
    tell(e)
best = {key: round(value, 4) for key, value in study.best_params.items()}
print(f"best of {TRIALS}: {study.best_value:.4f} at {best}")
