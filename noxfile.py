"""The sessions of the workspace: `uvx nox -l` lists them. Packages are discovered, so a new one edits nothing here.

How `.ci/run` (tests, then wheels) scales, on 2 cores: the environment, lint and types are paid once (about 3 minutes on a new machine, most
of it installing torch), and so are the imports of torch and transformers, since all members' tests run in one process. A member may
spend 100 seconds on its tests, on average (the first three take 320 together; the slowest are printed at the end), and takes about 5
seconds in `wheels`, whose environment takes another minute. Eleven members: 3 + 11 * 1.75 + 1, about 23 minutes, under the bound of 25.
"""

import time
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
MEMBERS = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
IMPORTS = {path.parents[2].name: path.parent.name for path in ROOT.glob("packages/*/src/*/__init__.py")}


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, and that every number in a README is the one in its result file."""
    everything(session)
    check_sources(session)


@nox.session
def tests(session: nox.Session) -> None:
    """Lint, types and every member's tests in one environment and one process; `-- wiseft -k merge` narrows them."""
    everything(session)
    check_sources(session)
    members = [argument for argument in session.posargs if argument in MEMBERS]
    options = [argument for argument in session.posargs if argument not in MEMBERS]
    session.run("pytest", "--durations=15", *[f"packages/{member}" for member in members or MEMBERS], *options)


@nox.session
@nox.parametrize("member", MEMBERS, ids=MEMBERS)
def isolated(session: nox.Session, member: str) -> None:
    """Each member alone in its own environment: catches a dependency that is used but not declared."""
    extras = ",".join(project(member).get("optional-dependencies", {}))
    groups = ["--group", "test", "--group", "models"]
    if "test" in nox.project.load_toml(ROOT / f"packages/{member}/pyproject.toml").get("dependency-groups", {}):
        groups += ["--group", f"packages/{member}/pyproject.toml:test"]
    core = [] if member == "lmcore" else ["./packages/lmcore[models]"]
    session.install(
        "--reinstall-package", member, *core, f"./packages/{member}[{extras}]" if extras else f"./packages/{member}", *groups
    )
    session.run("pytest", f"packages/{member}", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build all wheels, install the files into a fresh environment, run every command, and check that names are safe."""
    place = Path(session.create_tmp())
    for old in place.glob("*.whl"):
        old.unlink()
    session.run("uv", "build", "-q", "--all-packages", "--wheel", "--out-dir", str(place), external=True)
    built = sorted(str(path) for path in place.glob("*.whl"))
    session.install("--reinstall", "--no-deps", *built)
    session.install("pip", *built)
    for member in MEMBERS:
        for command, entry in project(member).get("scripts", {}).items():
            check_command(session, command, entry.partition(":")[0])
    for member in MEMBERS:
        if member != "lmcore":
            check_name_is_safe(session, member)
    session.log(f"1 passed: {len(built)} wheels answer and their names are safe")


@nox.session
def headlines(session: nox.Session) -> None:
    """Run the paper's claims: `-- wiseft --scale smoke` narrows them. Writes runs/claims.json and runs/index.html."""
    everything(session)
    session.run("python", "scripts/headlines.py", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure our code against its peers, which benchmarks/<package>.py names: `-- wiseft`. Writes benchmarks/results/."""
    chosen = [argument for argument in session.posargs if argument in MEMBERS]
    for script in sorted(ROOT.glob("benchmarks/*.py")):
        if not chosen or script.stem in chosen:
            everything(session)
            peers = nox.project.load_toml(script).get("dependencies", [])
            if peers:
                session.install(*peers)
            session.run("python", "-P", str(script), env={"PYTHONPATH": str(ROOT / "scripts")})


def everything(session: nox.Session) -> None:
    """All members, editable, with every extra and group, at the versions that the root pins."""
    place = {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location, "VIRTUAL_ENV": session.virtualenv.location}
    session.run_install(
        "uv", "sync", "-q", "--all-packages", "--all-extras", "--all-groups", "--python", session.virtualenv.location,
        env=place, external=True,
    )  # fmt: skip


def check_sources(session: nox.Session) -> None:
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    for name in sorted(IMPORTS.values()):
        session.run("mypy", "-p", name)
    session.run("python", "scripts/readmes.py", "--check")


def check_command(session: nox.Session, command: str, module: str) -> None:
    """The command answers `--help` in under half a second (the best of five: machines are noisy) and without torch."""
    took = []
    for _ in range(5):
        start = time.perf_counter()
        session.run(command, "--help", silent=True)
        took.append(time.perf_counter() - start)
    session.log(f"{command} --help: {min(took):.2f} s")
    if min(took) > 0.5:
        session.error(f"{command} --help took {min(took):.2f} s, more than 0.5 s")
    session.run("python", "-c", f"import sys, {module}; assert 'torch' not in sys.modules, 'torch was imported'")


def check_name_is_safe(session: nox.Session, member: str) -> None:
    """Installed without lmcore beside it, a member fails: no index has that local version, so no stranger's lmcore can step in."""
    session.run("uv", "pip", "uninstall", "-q", "lmcore", member, external=True)
    alone = ["python", "-m", "pip", "install", "--quiet", "--dry-run", "--no-build-isolation", f"./packages/{member}"]
    session.install("uv_build>=0.9,<1")
    said = session.run(*alone, success_codes=[1], silent=True) or ""
    if "lmcore==1.0.0+tenfold" not in said:
        session.error(f"installing {member} alone should name lmcore==1.0.0+tenfold as missing, pip said: {said}")
    beside = [*alone[:-1], "./packages/lmcore", alone[-1]]
    session.run(*beside, silent=True)
    session.install("./packages/lmcore", f"./packages/{member}")


def project(member: str) -> dict:
    return nox.project.load_toml(ROOT / f"packages/{member}/pyproject.toml")["project"]
