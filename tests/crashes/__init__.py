"""Copies of a script, killed and stopped at random or at a chosen commit, and a close look at what is left.

Invariant: the checks believe only what was written outside of speval, a log with one line for each execution and what each
copy has printed, and compare the database, read as anybody can, with that. Nothing in speval knows of it: kills at a chosen
commit come from a script that wraps methods.
"""

from .checks import Figures, inconsistencies
from .processes import rows
from .steps import Kill, Scenario, faults_after, held_by_a_dead_copy, kill_at_each_step, old_database
from .storm import Round, storm

__all__ = [
    "Figures",
    "Kill",
    "Round",
    "Scenario",
    "faults_after",
    "held_by_a_dead_copy",
    "inconsistencies",
    "kill_at_each_step",
    "old_database",
    "rows",
    "storm",
]
