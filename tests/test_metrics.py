"""The tree keeps to the bounds of `make metrics`, and what that counts as swallowed is what we mean."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import metrics
import pytest
from metrics import Package, Source


@pytest.fixture(scope="module")
def package() -> Package:
    return Package.read()


@pytest.mark.parametrize("bound", metrics.BOUNDS)
def test_the_tree_keeps_to_the_bound(package: Package, bound: str) -> None:
    assert metrics.BOUNDS[bound](package) == []


def test_each_long_file_has_a_reason() -> None:
    assert all(reason.strip() for reason in metrics.LONG_FILES.values())


# --- what counts as swallowed -------------------------------------------------------------------------------

SWALLOWED = {
    "passed over": "except OSError:\n    pass",
    "every exception": "except:\n    return None",
    "another value in its place": "except FileNotFoundError:\n    return False",
    "named but not used": "except OSError as error:\n    value = None",
    "an exit without a word": "except OSError:\n    os._exit(1)",
    "raised only by a function made here": "except OSError:\n    def later():\n        raise ValueError",
    "a logger's other method": "except OSError:\n    log.setLevel(10)",
    "somebody else's `error`": "except OSError:\n    parser.error('no')",
}
ANSWERED = {
    "raised on": "except OSError:\n    tidy_up()\n    raise",
    "raised as another": "except OSError:\n    raise ConfigError('no') from None",
    "raised on where it is not expected": "except OSError as e:\n    if e.errno != 2:\n        raise\n    return None",
    "logged": "except OSError:\n    log.warning('no', exc_info=True)",
    "logged by an attribute": "except OSError:\n    self._log.exception('no')",
    "warned": "except OSError:\n    warnings.warn('no')",
    "returned": "except OSError as error:\n    return error",
    "stored": "except OSError as error:\n    self.problem = error",
    "used in a text": "except OSError as error:\n    detail = f'no: {error}'",
    "used later": "except OSError as error:\n    later(lambda: told(error))",
}


def swallowed(code: str) -> list[tuple[int, str]]:
    return metrics.swallows(ast.parse(dedent(code)))


def around(handler: str) -> str:
    return f"def work():\n    try:\n        step()\n{indent(handler, '    ')}"


@pytest.mark.parametrize("handler", SWALLOWED)
def test_a_handler_that_makes_nothing_of_the_exception_counts(handler: str) -> None:
    code = around(SWALLOWED[handler])
    (found,) = swallowed(code)
    assert found == (4, code.splitlines()[3].split(" as ")[0].strip(" :"))


@pytest.mark.parametrize("handler", ANSWERED)
def test_a_handler_that_answers_the_exception_does_not_count(handler: str) -> None:
    assert swallowed(around(ANSWERED[handler])) == []


def test_each_handler_of_a_try_counts_by_itself() -> None:
    code = around("except OSError:\n    raise\nexcept ValueError:\n    pass\nexcept KeyError:\n    pass")
    assert swallowed(code) == [(6, "except ValueError"), (8, "except KeyError")]


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("from contextlib import suppress\nwith suppress(OSError):\n    step()", [2]),
        ("from contextlib import suppress as quiet\nwith quiet(OSError), open('x'):\n    step()", [2]),
        ("import contextlib\nwith contextlib.suppress(OSError):\n    step()", [2]),
        ("import contextlib as c\nwith c.ExitStack() as stack:\n    stack.enter_context(c.suppress(OSError))", [3]),
        ("from contextlib import suppress\nquiet = suppress\nwith quiet(OSError):\n    step()", [2]),
        ("from warnings import suppress\nwith suppress(OSError):\n    step()", []),
        ("from contextlib import suppress", []),
    ],
)
def test_suppress_counts_by_whatever_name(code: str, lines: list[int]) -> None:
    assert swallowed(code) == [(line, "suppress") for line in lines]


@pytest.mark.parametrize(
    "definition",
    [
        "def missing_ok():\n    return suppress(FileNotFoundError)",
        "@contextmanager\ndef missing_ok():\n    try:\n        yield\n    except FileNotFoundError:\n        pass",
        "@contextmanager\ndef missing_ok():\n    with suppress(FileNotFoundError):\n        yield",
    ],
)
def test_a_name_for_what_is_swallowed_counts_once(definition: str) -> None:
    uses = "\n".join(f"def use_{n}():\n    with missing_ok():\n        os.unlink('{n}')" for n in range(5))
    assert len(swallowed(f"from contextlib import contextmanager, suppress\n{definition}\n{uses}")) == 1


# --- the other figures --------------------------------------------------------------------------------------


def test_the_lines_of_functions_and_classes() -> None:
    source = Source(
        "x.py",
        dedent('''\
        @decorated
        def outer():
            """Its docstring."""
            def inner():
                return 1
            return inner

        class Box:
            def method(self): return 2
        '''),
    )
    told = [(found.name, found.line, found.lines) for found in (*source.functions(), *source.classes())]
    assert told == [("outer", 2, 5), ("outer.inner", 4, 2), ("Box.method", 9, 1), ("Box", 8, 2)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 1", 1),
        ("return 1 if a else 2", 2),
        ("return a and b or c", 3),
        ("for x in a:\n    if x: pass\n    elif y: pass\n    else: pass", 4),
        ("try:\n    step()\nexcept OSError: raise\nexcept ValueError: raise", 3),
        ("return [x for x in a if x if y]", 4),
        ("def inner():\n    if a: pass\nreturn lambda: 1 if a else 2", 1),
        ("match a:\n    case 1: pass\n    case _: pass", 3),
    ],
)
def test_complexity_counts_branches(body: str, expected: int) -> None:
    (function, *_) = ast.parse(f"def work():\n{indent(body, '    ')}").body
    assert metrics.complexity(function) == expected


@pytest.mark.parametrize(("values", "expected"), [([], 0), ([7], 7), (list(range(1, 21)), 19), ([1] * 19 + [99], 1)])
def test_the_95th_percentile(values: list[int], expected: int) -> None:
    assert metrics.percentile(values, 95) == expected


# --- broken bounds ------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Package:
    for path, text in files.items():
        root.joinpath("roll_ckpt", path).parent.mkdir(parents=True, exist_ok=True)
        root.joinpath("roll_ckpt", path).write_text(text)
    return Package.read(root)


def test_a_long_file_needs_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tree(tmp_path, {"long.py": "x = 1\n" * 401, "room/fits.py": "x = 1\n" * 400})
    monkeypatch.setattr(metrics, "LONG_FILES", {})
    assert metrics.long_files(package) == ["roll_ckpt/long.py:1: 401 lines"]
    monkeypatch.setattr(metrics, "LONG_FILES", {"roll_ckpt/long.py": "one table", "roll_ckpt/room/fits.py": "no more"})
    assert metrics.long_files(package) == ["roll_ckpt/room/fits.py:1: named in LONG_FILES, but not that long"]


def test_the_other_bounds_name_file_and_line(tmp_path: Path) -> None:
    long = "\ndef long():\n" + "    x = 1\n" * 30
    package = tree(
        tmp_path,
        {
            **{f"m{n:02}.py": "" for n in range(11)},
            "room/a.py": long + "class Large:\n" + "    x = 1\n" * 250,
            "room/b.py": "try:\n    step()\nexcept OSError:\n    pass\n",
        },
    )
    assert metrics.long_functions(package) == ["roll_ckpt/room/a.py:2: long: 31 lines"]
    assert metrics.long_classes(package) == ["roll_ckpt/room/a.py:33: Large: 251 lines"]
    assert metrics.swallowed(package) == ["roll_ckpt/room/b.py:3: except OSError"]
    assert metrics.root_modules(package) == [f"roll_ckpt/m{n:02}.py:1" for n in range(11)]


def test_the_script_says_by_its_exit_code_whether_a_bound_is_broken(package: Package) -> None:
    done = subprocess.run([sys.executable, metrics.__file__], capture_output=True, text=True)
    broken = [bound for bound, offenders in metrics.BOUNDS.items() if offenders(package)]
    assert (done.returncode, done.stderr) == (1 if broken else 0, "")
    assert [line.removeprefix("Broken: ") for line in done.stdout.splitlines() if line.startswith("Broken")] == broken
    assert "swallowed per 1000 lines" in done.stdout
