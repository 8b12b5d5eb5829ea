"""What works with which versions of Python and torch: makes an environment for each pair, and saves, loads, fetches.

  scripts/versions                                each version of both at least once
  scripts/versions --python 3.12 --torch 2.4      these pairs; both options can be repeated
  scripts/versions --all --tests                  every pair that torch has a package for; the tests as well
  scripts/versions --tests tests/unit             what follows --tests are the arguments of pytest
  scripts/versions --lowest                       the lowest versions that pyproject.toml allows
  scripts/versions --writer 2.2                   this torch, too old for mpreader, writes what the others load

Interpreters are looked for on PATH, under pyenv and by uv; those that are not there are named, and are a failure only
if --python asked for them. uv makes the environments: it is taken from PATH, or installed into the folder of the
environments. Its own variables hold: UV_TORCH_BACKEND=cpu gets torch without CUDA from PyTorch's own index, where that
can be reached; the packages for Linux on PyPI bring CUDA, some GB for each version of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
CHECKS: Final = Path(__file__).with_name("checks.py")
BOXES: Final = Path(__file__).with_name("boxes.py")

# Versions of Python that torch has packages for.
TORCHES: Final = {
    "2.4": ("3.10", "3.11", "3.12"),
    "2.8": ("3.10", "3.11", "3.12", "3.13"),
    "2.13": ("3.10", "3.11", "3.12", "3.13", "3.14"),
    "2.14": ("3.10", "3.11", "3.12", "3.13", "3.14"),
}
PYTHONS: Final = TORCHES["2.14"]
# Versions of torch that mpreader does not run with, but loads the checkpoints of, and a Python for each.
WRITERS: Final = {"2.2": "3.10", "2.3": "3.10"}
USUAL: Final = (("3.10", "2.4"), ("3.12", "2.8"), ("3.11", "2.13"), ("3.13", "2.14"), ("3.14", "2.14"))
EXTRAS: Final = ("dcp", "testing", "fsspec")  # of pyproject.toml; --tests takes "test", which has all of them
EVERY_EXTRA: Final = (*EXTRAS, "plot", "otel")
LOWEST: Final = "lowest"


class EnvironmentFailed(Exception):
    """An environment could not be made; the message is one line."""


@dataclass
class Result:
    """Outcome of one environment.

    Attributes:
        python: Version of Python that was asked for, "3.12".
        torch: Version of torch that was asked for, "2.8", or LOWEST.
        versions: Versions that were installed, by name.
        outcomes: "ok", "skipped: why" or "FAILED: why", by check.
    """

    python: str
    torch: str
    versions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        return any(outcome.startswith("FAILED") for outcome in self.outcomes.values())

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {outcome}" for name, outcome in self.outcomes.items())
        versions = self.versions or {"Python": self.python, "torch": self.torch}
        return f"{', '.join(f'{name} {version}' for name, version in versions.items())}: {outcomes}"


def main() -> int:
    options = _parser().parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    uv = _uv(options.folder)
    results = []
    for result in _results(options, uv):
        results.append(result)
        print(result, flush=True)
    if not results:
        print("There is no such pair: torch has no package for that version of Python.", file=sys.stderr)
        return 2
    print(f"\n{_table(results)}")
    return int(any(result.has_failed for result in results))


def _results(options: argparse.Namespace, uv: str) -> Iterator[Result]:
    for torch in _writers(options):  # first, since what they have written is loaded by all others
        yield _writer_result(torch, options, uv)
    for python, torch in _pairs(options):
        yield _result(python, torch, options, uv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", choices=PYTHONS, help="a version of Python, can be repeated")
    parser.add_argument("--torch", action="append", choices=TORCHES, help="a version of torch, can be repeated")
    parser.add_argument("--all", action="store_true", help="every pair of versions")
    parser.add_argument("--lowest", action="store_true", help="the lowest versions that pyproject.toml allows")
    parser.add_argument(
        "--writer", action="append", default=[], choices=WRITERS, help="a version of torch that only writes"
    )
    parser.add_argument("--interpreter", action="append", default=[], type=Path, help="an interpreter to use, too")
    parser.add_argument(
        "--tests", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="then run pytest, with these arguments"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="where the environments are made")
    parser.add_argument("--delete", action="store_true", help="delete each environment when it is done with")
    return parser


def _writers(options: argparse.Namespace) -> Sequence[str]:
    """The versions of torch that the options ask for to write only."""
    is_usual = not (options.lowest or options.all or options.python or options.torch)
    return options.writer or (list(WRITERS)[:1] if is_usual else [])


def _pairs(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The pairs (Python, torch) that the options ask for."""
    if options.lowest:
        for python in options.python or PYTHONS[:1]:
            yield python, LOWEST
    elif options.all or options.python or options.torch:
        for torch in options.torch or TORCHES:
            for python in options.python or PYTHONS:
                if python in TORCHES[torch]:
                    yield python, torch
    else:
        yield from USUAL


# -- interpreters


def _uv(folder: Path) -> str:
    found = shutil.which("uv")
    if found:
        return found
    own = folder / "uv"
    if not (own / "bin/uv").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", own], check=True)
        subprocess.run([own / "bin/python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    return str(own / "bin/uv")


def _find_interpreter(python: str, given: Sequence[Path], uv: str) -> str | None:
    """The path of an interpreter of a version, or None."""
    candidates = [*map(str, given), f"python{python}", *_of_pyenv(python), *_of_uv(python, uv)]
    return next((path for path in candidates if _version_of(path) == python), None)


def _version_of(interpreter: str) -> str | None:
    # pyenv's shims are on PATH for versions that are not selected, too, and fail.
    command = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _of_pyenv(python: str) -> list[str]:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return [str(folder / "bin/python") for folder in sorted((root / "versions").glob(f"{python}.*"))]


def _of_uv(python: str, uv: str) -> list[str]:
    command = [uv, "python", "find", "--no-python-downloads", python]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:1] if done.returncode == 0 else []


# -- one environment


def _result(python: str, torch: str, options: argparse.Namespace, uv: str) -> Result:
    result = Result(python, torch)
    interpreter = _find_interpreter(python, options.interpreter, uv)
    if interpreter is None:
        kind = "FAILED" if options.python else "skipped"
        result.outcomes = {"environment": f"{kind}: there is no Python {python} here"}
        return result
    environment = options.folder / f"python{python}-torch{torch}"
    with _told_in(result, "environment", environment, options):
        _make(environment, interpreter, torch, uv, with_tests=options.tests is not None)
        _check(result, environment, options.folder, options.tests)
    return result


@contextmanager
def _told_in(result: Result, step: str, environment: Path, options: argparse.Namespace) -> Iterator[None]:
    """Note in a result that a step has failed, and delete its environment if that is asked for."""
    try:
        yield
    except EnvironmentFailed as error:
        result.outcomes[step] = f"FAILED: {error}"
    finally:
        if options.delete:
            shutil.rmtree(environment, ignore_errors=True)


def _make(environment: Path, interpreter: str, torch: str, uv: str, *, with_tests: bool) -> None:
    _does([uv, "venv", "--quiet", "--clear", "--python", interpreter, str(environment)])
    command = [uv, "pip", "install", "--quiet", "--python", str(environment / "bin/python")]
    if torch == LOWEST:
        extras = (*EVERY_EXTRA, *["test"] * with_tests)
        versions = ["--resolution", "lowest-direct", "s3torchconnector[dcp]>=1.5"]
    else:
        extras, versions = (("test",) if with_tests else EXTRAS), [f"torch=={torch}.*", "s3torchconnector[dcp]"]
    _does([*command, "-e", f"{ROOT}[{','.join(extras)}]", *versions])


def _writer_result(torch: str, options: argparse.Namespace, uv: str) -> Result:
    result = Result(WRITERS[torch], torch)
    environment = options.folder / f"torch{torch}"
    with _told_in(result, "written", environment, options):
        _write(environment, _find_interpreter(result.python, options.interpreter, uv), torch, uv)
        result.outcomes["written"] = "ok"
    return result


def _write(environment: Path, interpreter: str | None, torch: str, uv: str) -> None:
    """Write a checkpoint with a version of torch that mpreader does not run with; the checks load boxes of it."""
    if interpreter is None:
        raise EnvironmentFailed("there is no Python here that it has packages for")
    _does([uv, "venv", "--quiet", "--clear", "--python", interpreter, str(environment)])
    python = str(environment / "bin/python")
    _does([uv, "pip", "install", "--quiet", "--python", python, f"torch=={torch}.*", "numpy<2"])
    _does([python, str(BOXES), str(environment.parent / "written")])


def _does(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentFailed(" ".join(done.stderr.split())[-500:])


def _check(result: Result, environment: Path, folder: Path, tests: Sequence[str] | None) -> None:
    """Make the checks in the environment, and run the tests there. Their output goes to a file beside it."""
    python = environment / "bin/python"
    variables = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables.get('PATH', '')}"
    with (folder / f"{environment.name}.log").open("w+") as log:
        command = [python, CHECKS, folder / "written"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables, check=False)
        if done.returncode:
            raise EnvironmentFailed(f"the checks ended with status {done.returncode}: see {log.name}")
        report = json.loads(done.stdout.splitlines()[-1])
        result.versions, result.outcomes = report["versions"], report["outcomes"]
        if tests is not None:
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
            status = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=variables, check=False).returncode
            log.seek(0)
            summary = log.read().rstrip().rpartition("\n")[2].strip("= ")
            result.outcomes["tests"] = f"{'FAILED' if status else 'ok'}: {summary}"


def _table(results: Sequence[Result]) -> str:
    """The outcomes as a table, what is wrong in short."""
    names = list(dict.fromkeys(name for result in results for name in result.outcomes))
    lines = [["Python", "torch", "numpy", "boto3", *names]]
    for result in results:
        versions = {"Python": result.python, "torch": result.torch} | result.versions
        outcomes = (result.outcomes.get(name, "") for name in names)
        lines.append(
            [*(versions.get(name, "") for name in lines[0][:4]), *(outcome.partition(":")[0] for outcome in outcomes)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
