"""Every code block of README.md and docs/ runs, in the order of the page, as a reader would run it.

- `python` whose first line is a comment with a file name is written to that file; any other is run as a program.
- `console`: lines that begin with `$ ` are run by bash in the page's folder; what stands below is what they must print,
  where `…` stands for anything. A command that ends with ` &` goes on in the background until the page ends; then it
  gets SIGTERM and must exit with 0.
- `redis` goes to a server that belongs to the page. `json` must be JSON. `text` is a picture.
- `<!-- not run: why -->` on the line before a block leaves it out; few may.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

from tests.servers import RedisServer, wait_until

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {"README.md": 2}  # `make demo` and `make test`: this is `make test`, and the demo has tests of its own

BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (?P<name>[\w/]+\.py)\b")
LOOKS = re.compile(r"millstream (tail|\w+ (ls|show))\b")
LIMIT_S = 60
PATIENCE_S = 20


@dataclass
class Page:
    """A page being read: its folder, its server, and what still runs."""

    folder: Path
    server: RedisServer | None
    exported: dict[str, str] = field(default_factory=dict)
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return (
            os.environ
            | self.exported
            | {"PATH": path, "COLUMNS": "110", "NO_COLOR": "1", "PYTHONPATH": str(self.folder)}
        )

    def python(self, text: str) -> None:
        first = FILE.match(text)
        if first is not None:
            file = self.folder / first["name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            compile(text, first["name"], "exec")
        else:
            (self.folder / "_block.py").write_text(text, encoding="utf-8")
            self.check(f"{shlex.quote(sys.executable)} _block.py", None)

    def console(self, text: str) -> None:
        for command, expected in commands(text):
            if command.endswith(" &"):
                self.start(command.removesuffix(" &"))
            elif command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                self.exported[name] = self.mine(value)
            else:
                self.check(self.mine(command), expected)

    def check(self, command: str, expected: str | None) -> None:
        done = self.bash(command)
        if expected and LOOKS.match(command):  # what it shows may be on its way
            deadline = time.monotonic() + PATIENCE_S
            while not matches(expected, done.stdout) and time.monotonic() < deadline:
                done = self.bash(command)
        looked = LOOKS.match(command) and done.returncode == 1  # it found something
        assert done.returncode == 0 or looked, f"$ {command}\n{done.stdout}\n(exit code {done.returncode})"
        assert matches(expected or "", done.stdout), f"$ {command}\n{done.stdout}\n--- the page says ---\n{expected}"

    def bash(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )

    def start(self, command: str) -> None:
        log = self.folder / f"background-{len(self.background)}.log"
        with log.open("wb") as output:
            words = shlex.split(self.mine(command))
            self.background.append(
                subprocess.Popen(words, cwd=self.folder, env=self.environment(), stdout=output, stderr=output)
            )
        wait_until(lambda: b"handles" in log.read_bytes(), 20, f"{command!r} to handle events")

    def redis(self, text: str) -> None:
        assert self.server is not None
        with redis.Redis.from_url(self.server.url) as client:
            for line in text.strip().splitlines():
                client.execute_command(*shlex.split(line))

    def mine(self, command: str) -> str:
        """A page speaks of the reader's own server; here that is the page's."""
        return command if self.server is None else command.replace("redis://localhost:6379/0", self.server.url)

    def end(self) -> None:
        for process in self.background:
            process.send_signal(signal.SIGTERM)
        for process in self.background:
            assert process.wait(30) == 0, process.args


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block, and what it must print."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        while lines[0].endswith("\\"):
            lines[:2] = [lines[0].removesuffix("\\") + lines[1].strip()]
        yield lines[0].split("   # ")[0].rstrip(), "\n".join(lines[1:]).strip()


def matches(expected: str, printed: str) -> bool:
    """True when it printed this, `…` standing for anything and white space for white space."""
    pattern = r"\s+".join(re.escape(word).replace("…", r"[\s\S]*?") for word in expected.split())
    return re.search(pattern, printed) is not None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_every_block_of_the_page_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = file.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert text.count("\n```") == 2 * len(blocks) + text.startswith("```"), "a block is not closed"
    for name in [name for name in os.environ if name.startswith("MILLSTREAM_")]:
        monkeypatch.delenv(name)
    left_out = 0
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer.start()) if "redis" in text else None
        page = Page(tmp_path, server)
        stack.callback(page.end)
        for block in blocks:
            if (block["note"] or "").startswith("not run:"):
                left_out += 1
            else:
                run(page, block["kind"], block["text"])
    assert left_out <= NOT_RUN.get(file.name, 0)


def run(page: Page, kind: str, text: str) -> None:
    match kind:
        case "python":
            page.python(text)
        case "console":
            page.console(text)
        case "redis":
            page.redis(text)
        case "json":
            json.loads(text)
        case "text" | "toml":
            pass
        case _:
            pytest.fail(f"a block of kind {kind!r}: nothing would run it")
