"""What has to pass, in sessions: ``nox`` runs them all, ``nox -s lint`` one, ``nox -l`` lists them.

They run in the environment that nox is installed in: another one would compile llama.cpp again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.stop_on_first_error = True
nox.options.sessions = ["lint", "types", "docs", "coverage", "engines"]


def tool(session: nox.Session, name: str, *arguments: str) -> None:
    """Run a program of this environment, whether or not it is activated.

    Python keeps what it has compiled, also where it is told not to: tests start a few hundred
    processes, and pytest compiles each test anew for its assertions.
    """
    env = {"PYTHONDONTWRITEBYTECODE": ""}
    session.run(str(Path(sys.executable).with_name(name)), *arguments, env=env)


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
    """All tests, or what is behind --, as for pytest: `nox -s tests -- -m unit -k chat`."""
    tool(session, "pytest", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Unit tests, and how much of the code they run; less than the floor fails.

    Not all tests: to watch every line costs those with an engine a third of their time.
    """
    tool(session, "pytest", "-m", "unit", "--cov", *session.posargs)


@nox.session
def engines(session: nox.Session) -> None:
    """The other tests: those that need llama.cpp or a model, and what hostile input may cost.

    Most of them in two processes. The others measure times and memory of whole commands, or how
    threads get on with each other: one after the other.
    """
    rooms = ("bundle", "decoder", "export", "forms", "planning", "prompt")
    side_by_side = [f"tests/{room}" for room in rooms]
    others = ("pytest", "-m", "not unit", *session.posargs)
    tool(session, *others, *side_by_side, "-n", "2", "--dist", "worksteal")
    tool(session, *others, *(f"--ignore={folder}" for folder in side_by_side))


@nox.session
def thorough(session: nox.Session) -> None:
    """All tests, each that draws its inputs at random with about ten times as many."""
    tool(session, "pytest", "--hypothesis-profile", "thorough", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """The files of a release, in dist/; the wheel is installed by itself and asked a question."""
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    tools, fresh = (Path(session.create_tmp()).resolve() / name for name in ("tools", "fresh"))
    for folder in (tools, fresh):
        session.run(sys.executable, "-m", "venv", "--clear", str(folder))
    shutil.rmtree("dist", ignore_errors=True)
    session.run(str(tools / scripts / "pip"), "install", "-q", "build", "twine")
    session.run(str(tools / scripts / "python"), "-m", "build", "--outdir", "dist")
    files = sorted(map(str, Path("dist").iterdir()))
    session.run(str(tools / scripts / "twine"), "check", "--strict", *files)
    wheel = next(name for name in files if name.endswith(".whl"))
    session.run(str(fresh / scripts / "pip"), "install", "-q", wheel)
    picture = str(Path("examples/images/receipt-1.png").resolve())
    with session.chdir(fresh):  # not where the sources are
        session.run(str(fresh / scripts / "edge-vlm"), "ask", picture, "What is the total?")
