"""Where a command looks: options, environment, pyproject.toml; and what it says when there is nothing to find."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Project

HEADER = "from millstream import *\n"


def first_line(project: Project, *words: str) -> str:
    return project(*words).stderr.splitlines()[0]


def test_the_shared_options_stand_before_or_after_a_commands_own_words(project: Project) -> None:
    project.environment = {}
    for words in (
        ("--app", "shop:app", "--broker", "sqlite:///a.db", "stream", "ls"),
        ("--app", "shop:app", "stream", "--broker", "sqlite:///a.db", "ls"),
        ("stream", "ls", "--broker", "sqlite:///a.db", "--app", "shop:app"),
        ("--broker", "sqlite:///b.db", "stream", "ls", "--broker", "sqlite:///a.db", "--app", "shop"),
    ):
        assert first_line(project, *words) == f"broker sqlite:///{project.path}/a.db, app shop"


def test_the_command_line_wins_over_the_app_and_the_app_over_the_environment(project: Project) -> None:
    where = f"broker sqlite:///{project.path}"
    assert first_line(project, "stream", "ls") == f"{where}/shop.db, app shop"
    project.environment["MILLSTREAM_BROKER"] = "sqlite:///env.db"
    assert first_line(project, "stream", "ls") == f"{where}/env.db, app shop"
    assert first_line(project, "stream", "ls", "--app", "shop:other") == f"{where}/shop.db, app other"
    assert (
        first_line(project, "stream", "ls", "--app", "shop:other", "--broker", "sqlite:///c.db")
        == f"{where}/c.db, app other"
    )
    del project.environment["MILLSTREAM_APP"]
    assert first_line(project, "stream", "ls") == f"{where}/env.db"


def test_the_nearest_pyproject_names_the_app_and_its_folder_is_importable(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.environment = {}
    project.write("pyproject.toml", '[tool.millstream]\napp = "shop:app"\n')
    (project.path / "below").mkdir()
    monkeypatch.chdir(project.path / "below")
    assert first_line(project, "stream", "ls") == f"broker sqlite:///{project.path}/below/shop.db, app shop"
    project.write("pyproject.toml", "[tool")
    done = project("stream", "ls")
    assert done.exit_code == 2 and "Cannot read" in done.stderr and "pyproject.toml" in done.stderr


def test_passwords_are_masked_wherever_a_url_is_shown(project: Project) -> None:
    for url in ("redis://:secret@127.0.0.1:1/0", "redis://me:secret@127.0.0.1:1/0", "gopher://me:secret@there"):
        done = project("stream", "ls", "--broker", url)
        assert done.exit_code in (2, 3) and "secret" not in done.output and ":***@" in done.stderr


def test_a_function_that_makes_the_app_is_called_when_asked_for(project: Project) -> None:
    assert first_line(project, "stream", "ls", "--app", "shop:make", "--factory").endswith(", app made")
    done = project("stream", "ls", "--app", "shop:make")
    assert done.exit_code == 2 and "shop:make is not an app; use --factory if it is a function." in done.stderr


def test_without_any_broker_the_ways_to_name_one_are_told(project: Project) -> None:
    project.environment = {}
    done = project("stream", "ls")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1 and "--app shop.main:app" in done.stderr and "MILLSTREAM_BROKER" in done.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import nothing_here", "broken.py, line 1: No module named 'nothing_here'"),
        ("x = 1\napp = 1 / 0", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("def f(:", "broken.py, line 1: invalid syntax"),
        ("raise SystemExit(0)", "broken.py, line 1: SystemExit: 0"),
        ("import json\njson.loads('{')", "broken.py, line 2: JSONDecodeError"),
        (HEADER + "shop = App('shop')", "broken:app is not an app; the module has broken:shop."),
        (HEADER + "app = App('no/name')", "broken.py, line 2: 'no/name' cannot name an app"),
        (
            HEADER + "class A(Event, type='a'):\n    n: int\nclass B(Event, type='a'):\n    n: int\nStream('s', A | B)",
            "broken.py, line 6: stream 's': A and B are both named 'a'",
        ),
        (
            HEADER + "class A(Event, type='a'):\n    n: int\nparts = Router()\n"
            "@parts.subscriber(Stream('s', A), 'g')\nasync def f(event: A, bank) -> None: ...",
            "broken.py",
        ),
    ],
    ids=range(9),
)
def test_an_app_that_cannot_be_loaded_is_one_line_with_file_and_error(
    project: Project, text: str, complaint: str
) -> None:
    project.write("broken.py", text)
    done = project("stream", "ls", "--app", "broken:app")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert complaint in done.stderr and "Traceback" not in done.stderr


def test_a_module_that_is_not_there_is_told_with_the_folder_that_was_searched(project: Project) -> None:
    done = project("stream", "ls", "--app", "nowhere.main:app")
    assert done.exit_code == 2
    assert (
        f"Cannot load the app 'nowhere.main:app': No module named 'nowhere' (imports start in {project.path})"
        in done.stderr
    )


def test_the_traceback_is_shown_only_when_asked_for(project: Project) -> None:
    project.write("broken.py", "app = 1 / 0")
    assert "Traceback" in project("stream", "ls", "--app", "broken:app", "--debug").stderr
    assert "Traceback" in project("--debug", "stream", "ls", "--app", "broken:app").stderr
