"""What stands around the package: the workflow, the templates, the hooks and the policies agree with the project."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="these files are those of a checkout")


def read(name: str) -> Any:
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), yaml.BaseLoader)  # all scalars are text; `on` is no boolean


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_workflow_runs_ci_run_on_each_python_that_the_package_names():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    named = [c.rpartition(" ")[2] for c in project()["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert jobs["linux"]["strategy"]["matrix"]["python"] == named
    assert set(jobs["macos"]["strategy"]["matrix"]["python"]) <= set(named)
    for job in jobs.values():
        (command,) = [step["run"] for step in job["steps"] if "run" in step]
        assert command.endswith(".ci/run")
        assert 'PYTHON="$(command -v python)"' in command


def test_only_the_jobs_that_are_not_yet_proven_may_fail():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert {name for name, job in jobs.items() if job.get("continue-on-error") == "true"} == {"macos"}


def test_the_workflow_may_only_read_and_pins_what_it_uses():
    workflow = read(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] == "true"
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            assert "uses" not in step or re.search(r"@(v\d+|[0-9a-f]{40})$", step["uses"]), step


def test_dependabot_looks_after_packages_and_actions():
    updates = read(".github/dependabot.yml")["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}


def test_a_bug_report_asks_for_what_is_needed_to_find_it():
    fields = read(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    required = {field["id"] for field in fields if field.get("validations", {}).get("required") == "true"}
    assert required >= {"what", "version", "python", "database", "doctor"}
    assert "speval doctor" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()


@pytest.mark.parametrize(("length", "status"), [(60, 0), (61, 1)])
def test_a_long_subject_of_a_commit_is_refused(length: int, status: int, tmp_path: Path):
    (hook,) = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"] if hook["id"] == "subject"]
    message = tmp_path / "message"
    message.write_text("s" * length + "\n\nThe reason, in lines that may be longer than the subject is allowed to be.\n")
    command = [sys.executable, "-m", "pre_commit.languages.pygrep", *hook["args"], hook["entry"], message]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == status


def test_the_citation_names_what_the_package_names():
    citation, package = read("CITATION.cff"), project()["project"]
    assert (citation["title"], citation["abstract"], citation["license"]) == (
        package["name"],
        package["description"],
        package["license"],
    )


def test_no_page_leads_to_a_repository_that_does_not_exist():
    names = ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CITATION.cff", "pyproject.toml")
    shell = [*(ROOT / name for name in names), *(ROOT / ".github").rglob("*.*")]
    assert [file.name for file in shell if file.is_file() and "github.com/speval" in file.read_text(encoding="utf-8")] == []
