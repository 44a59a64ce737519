"""Find the best parameters of a classifier for handwritten digits.

Shows:
    A grid search with scikit-learn that can be killed at any moment and started again: finished evaluations are not computed
    again. It runs two evaluations at once; on a larger machine start it several times, and the copies share the work.

Run:
    $ pip install scikit-learn
    $ python examples/04_tune_digits.py

    Press Ctrl-C, or ``kill -9`` it, and start it again. The database is the first argument, by default 04_tune_digits.db in the
    current folder. Delete it to start again.

Prints:
    0.8798 {'C': 0.1, 'gamma': 0.0001}
    0.9251 {'C': 0.1, 'gamma': 0.0003}
    0.9466 {'C': 0.1, 'gamma': 0.001}
    ...
    36 evaluations: 36 completed in 11.1 s (36 by this call)
    best: {'C': 10, 'gamma': 0.0003}, accuracy 0.9859, and 0.9622 on images kept aside

    After a restart only what was missing, and the last two lines.
"""

import sys

from sklearn.datasets import load_digits
from sklearn.model_selection import KFold, ParameterGrid, cross_val_score, train_test_split
from sklearn.svm import SVC

from speval import load_evals, speval

images, labels = load_digits(return_X_y=True)
# The best of many scores is also a lucky one, so the search never sees a quarter of the images: they are for a last test.
# Nothing is shuffled: a writer's images follow one another, and after training on some of them the others are too easy.
images, aside_images, labels, aside_labels = train_test_split(images, labels, test_size=0.25, shuffle=False)


def accuracy(parameters: dict[str, float]) -> float:
    scores = cross_val_score(SVC(**parameters), images, labels, cv=KFold(10))
    print(f"{scores.mean():.4f} {parameters}", flush=True)
    return float(scores.mean())


grid = ParameterGrid({"C": [0.1, 0.3, 1, 3, 10, 30], "gamma": [0.0001, 0.0003, 0.001, 0.002, 0.005, 0.01]})
db = sys.argv[1] if len(sys.argv) > 1 else "04_tune_digits.db"
print(speval(accuracy, grid, db, concurrency=2, progress=False))

best = max(load_evals(db, status="completed"), key=lambda e: e["result"])
aside = SVC(**best["args"]).fit(images, labels).score(aside_images, aside_labels)
print(f"best: {best['args']}, accuracy {best['result']:.4f}, and {aside:.4f} on images kept aside")
