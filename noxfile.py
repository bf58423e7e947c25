"""What has to pass, in sessions: ``nox`` runs them all, ``nox -s lint`` one, ``nox -l`` lists them.

They run in the environment that nox is installed in: another one would compile llama.cpp again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.stop_on_first_error = True
nox.options.sessions = ["lint", "types", "docs", "coverage"]


def tool(session: nox.Session, name: str, *arguments: str) -> None:
    """Run a program of this environment, whether or not it is activated."""
    session.run(str(Path(sys.executable).with_name(name)), *arguments)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, and what may import what. `nox -s lint -- --fix` mends what it can."""
    tool(session, "ruff", "check", *session.posargs, ".")
    tool(session, "ruff", "format", *(() if "--fix" in session.posargs else ("--check",)), ".")
    tool(session, "lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Type hints."""
    tool(session, "mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Generated pages and pictures, as they should be. `nox -s docs -- --write` writes them."""
    for script in ("generate_commands.py", "draw_rooms.py"):
        tool(session, "python", f"docs/{script}", *(session.posargs or ("--check",)))


@nox.session
def tests(session: nox.Session) -> None:
    """Tests; arguments behind -- are pytest's: `nox -s tests -- -m unit`."""
    tool(session, "pytest", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """All tests, and how much of the code they run; less than the floor fails."""
    tool(session, "pytest", "--cov", "--cov-report=term", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """The files of a release, in dist/: their names, and that the wheel holds what it should."""
