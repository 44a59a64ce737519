"""Draw the results of 04_tune_digits.py, also while it runs.

Shows:
    The results of a search as a data frame with a column for each argument, and as a picture. Nothing is computed again, and
    running copies are not disturbed; open evaluations are white.

Run:
    $ pip install matplotlib pandas scikit-learn
    $ python examples/04_tune_digits.py
    $ python examples/04_draw_digits.py

    The database is the first argument, by default 04_tune_digits.db in the current folder, and the picture the second one, by
    default 04_digits.svg.

Prints:
    36 of 36 evaluations drawn into 04_digits.svg
"""

import sys

import matplotlib as mpl
from matplotlib.figure import Figure

from speval import to_frame

# The same picture each time, with text that stays text.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "speval", "font.size": 11})

db = sys.argv[1] if len(sys.argv) > 1 else "04_tune_digits.db"
picture = sys.argv[2] if len(sys.argv) > 2 else "04_digits.svg"

frame = to_frame(db)
table = frame.pivot_table(index="args.C", columns="args.gamma", values="result")

figure = Figure(figsize=(6.4, 3.9), layout="constrained")  # not pyplot's, which wants a window
axes = figure.subplots()
low, high = 0.9, table.max().max()  # what is worse than that is as dark as can be
axes.pcolormesh(table.to_numpy(), vmin=low, vmax=high, cmap="viridis", edgecolors="white", linewidth=1.5)
axes.set_xticks([x + 0.5 for x in range(len(table.columns))], [f"{gamma:g}" for gamma in table.columns])
axes.set_yticks([y + 0.5 for y in range(len(table.index))], [f"{c:g}" for c in table.index])
axes.set(xlabel="gamma", ylabel="C", title=f"Accuracy of {len(frame)} classifiers of handwritten digits")
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
for y, (_, row) in enumerate(table.iterrows()):
    for x, value in enumerate(row):
        if value == value:  # not one that is still missing
            weight = "bold" if value == high else "normal"
            color = "black" if value > (low + high) / 2 else "white"
            axes.text(x + 0.5, y + 0.5, f"{value:.3f}", ha="center", va="center", color=color, weight=weight, size=9)
figure.savefig(picture, metadata={"Date": None})
print(f"{table.count().sum()} of {len(frame)} evaluations drawn into {picture}")
