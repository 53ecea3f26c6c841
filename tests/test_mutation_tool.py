"""The mutation tool makes the changes it should, and its list of survivors is about code that exists."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mutation"
TARGETS = [
    t for p in sorted((FOLDER / "targets").glob("*.toml")) for t in tomllib.loads(p.read_text())["target"]
]

sys.path.insert(0, str(FOLDER))
spec = importlib.util.spec_from_file_location("mutation_operators", FOLDER / "operators.py")
operators = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = operators
spec.loader.exec_module(operators)
sys.path.remove(str(FOLDER))


def mutants(tmp_path, source):
    (tmp_path / "m.py").write_text(source)
    return operators.Module(str(tmp_path / "m.py")).mutants


@pytest.mark.parametrize(
    ("line", "after"),
    [
        ("return a < 1", {"return a <= 1", "return a > 1", "return a < 2", "return a < 0"}),
        ("return a - 0.5", {"return a + 0.5", "return a - 0.55"}),
        ("return not a", {"return a"}),
        ("return a.clamp(min=b)", {"return a.clamp(max=b)", "return a.clamp()", "return a"}),
        ("return f(a, b, k=True)", {"return f(b, a, k=True)", "return f(a, b)", "return f(a, b, k=False)"}),
        ("return a[:b]", {"return a[:b + 1]"}),
        ("return a and b", {"return a or b"}),
        ("if a: return b", {"if True:", "if False:"}),
        ("a.x = b", {"pass"}),
        ("a += b", {"pass", "a -= b"}),
        ("raise ValueError(f'{a + 1} is wrong')", {"pass"}),
        ("with a.using(b): f(a)", {"if True:", "pass"}),
        ("assert a > 0, 'words'", set()),
        ("log.warning('words', a + 1)", set()),
        ("return min(a, b)", {"return max(a, b)", "return min(b, a)"}),
    ],
)
def test_the_changes_of_a_line(tmp_path, line, after):
    found = mutants(tmp_path, f"def f(a: int = 3, b=None) -> int:\n    '''Words of 1.'''\n    {line}\n")
    assert {m.after for m in found if m.line > 1} == after
    assert {m.after for m in found if m.line == 1} == {"def f(a: int=4, b=None) -> int:"}
    assert {m.key for m in found if m.line > 1} <= {("f", 1)}
    assert [m.key for m in found if m.line == 1] == [None]


def test_a_change_is_made_and_undone(tmp_path):
    (tmp_path / "m.py").write_text("class A:\n    def f(self):\n        return 2 + 2\n")
    module = operators.Module(str(tmp_path / "m.py"))

    def value(mutant):
        names = {}
        exec(module.compiled(mutant), names)
        return names["A"]().f()

    assert [value(m) for m in module.mutants] == [0, 5, 5]
    assert value(None) == 4
    assert {m.function for m in module.mutants} == {"A.f"}


def test_a_test_that_notices_nothing_is_found_out(tmp_path):
    """A module of two functions, one of them tested."""
    package, tests = tmp_path / "pack", tmp_path / "tests"
    (tests / "mutation" / "targets").mkdir(parents=True)
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "m.py").write_text(
        "ONE = 1\n\n\ndef called(a):\n    return a + ONE\n\n\ndef idle(a):\n    return a - 1\n"
    )
    (tests / "test_m.py").write_text(
        "from pack.m import called\n\n\ndef test_m():\n    assert called(2) == 3\n"
    )
    for file in FOLDER.glob("*.py"):
        (tests / "mutation" / file.name).write_text(file.read_text())
    target = '[[target]]\nmodule = "pack.m"\ntests = ["tests/test_m.py"]\n'
    survivor = (
        '[[target.survivor]]\nfunction = "idle"\nbefore = "return a - 1"\nafter = "return a + 1"\nwhy = "w"\n'
    )
    (tests / "mutation" / "targets" / "t.toml").write_text(target + survivor)
    done = subprocess.run([sys.executable, "tests/mutation"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "return a - 2" in done.stdout
    assert "return a - 0" in done.stdout
    assert "return a + 1" not in done.stdout
    assert done.stdout.splitlines()[-2].split() == ["pack.m", "6", "3", "0", "1", "2", "66.7%"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t["module"])
def test_accepted_survivors_are_changes_of_the_code_as_it_is(target):
    spec = importlib.util.find_spec(target["module"])
    known = {(m.function, m.before, m.after) for m in operators.Module(spec.origin).mutants}
    for survivor in target.get("survivor", []):
        assert (survivor["function"], survivor["before"], survivor["after"]) in known
        assert len(survivor["why"]) > 10
    for test in target["tests"]:
        assert (FOLDER.parents[1] / test).is_file()
